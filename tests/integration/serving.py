"""A running vLLM engine and a trainer's policy in one process, joined by the gloo transport."""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import vllm.v1.engine.utils as engine_utils
from torch import Tensor

from pipelinerl.config.schema import RunConfig
from pipelinerl.engine.vllm_engine import VllmEngine
from pipelinerl.trainer.model import PolicyModel, load_policy
from pipelinerl.types import Completion
from pipelinerl.weights.group import INFO_KEYS
from pipelinerl.weights.manifest import Manifest
from pipelinerl.weights.places import assign
from pipelinerl.weights.sender import Sender, make_sender
from pipelinerl.weights.source import WholeModel

PROMPTS = [[1, 2, 3 + index] for index in range(64)]


class Receiver(Protocol):
    """An engine, or a rollout worker."""

    async def locate(self, segment: dict[str, Any] | None) -> list[str]: ...

    async def connect(self, init_info: dict[str, Any]) -> None: ...

    async def disconnect(self) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]: ...

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]: ...


@dataclass
class Link:
    """A policy, and the transport that brings its weights to one engine."""

    policy: PolicyModel
    source: WholeModel
    sender: Sender
    engine: Receiver
    backend: str
    version: int = 0
    transmissions: int = 0

    @classmethod
    async def make(
        cls,
        policy: PolicyModel,
        engine: Receiver,
        bucket_bytes: int,
        timeout_s: float = 60.0,
        shared_memory: bool = True,
        version: int = 0,
        backend: str = "gloo",
    ) -> "Link":
        source = WholeModel(policy.hf, bucket_bytes)
        sender = make_sender(backend, source, timeout_s, shared_memory)
        link = cls(policy, source, sender, engine, backend, version)
        await link.connect()
        return link

    async def connect(self) -> None:
        """Join the engine and the sender in the next epoch."""
        rendezvous = self.sender.listen("127.0.0.1")
        if self.backend == "gloo":
            [places], world_size = assign([await self.engine.locate(rendezvous["segment"])])
            info = rendezvous | {"places": places, "world_size": world_size}
        else:
            world_size = 2
            info = rendezvous | {"rank_offset": 1, "world_size": world_size}
        await asyncio.gather(asyncio.to_thread(self.sender.connect, world_size), self.engine.connect(info))
        self.transmissions = 0

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    async def transfer(self) -> list[int]:
        """Bring the policy's weights, as the next version, to the engine, which goes on as it is. Their digests."""
        self.version += 1
        number, self.transmissions = self.transmissions, self.transmissions + 1
        told = {key: value for key, value in self.manifest.to_dict().items() if key in INFO_KEYS[self.backend]}
        info = told | ({} if self.backend == "nccl" else {"transmission": number})
        digests, _ = await asyncio.gather(
            asyncio.to_thread(self.sender.send, number), self.engine.update_weights(info, self.version)
        )
        return digests

    async def send(self) -> dict[str, float]:
        """Bring the policy's weights, as the next version, into the running engine."""
        digests = await self.transfer()
        return await self.engine.commit(self.version, [p.name for p in self.manifest.parameters], digests)


@dataclass
class Served:
    """An engine and the policy whose weights it has, as long as tests that change the one send it to the other."""

    config: RunConfig
    engine: VllmEngine
    link: Link

    @property
    def policy(self) -> PolicyModel:
        return self.link.policy

    @property
    def backend(self) -> str:
        return self.link.backend

    async def generate(self, prompts: Sequence[list[int]], temperature: float, max_tokens: int) -> list[Completion]:
        """One completion per prompt, all at the same time."""
        return await asyncio.gather(*(self.engine.generate(prompt, temperature, max_tokens) for prompt in prompts))


@contextmanager
def forked_cores() -> Iterator[None]:
    """Engine cores that start meanwhile are forks of one process that has imported vLLM, which takes each 9 s."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["vllm.v1.engine.core", "pipelinerl.engine.extension"])
    spawns, engine_utils.get_mp_context = engine_utils.get_mp_context, lambda: forks
    try:
        yield
    finally:
        engine_utils.get_mp_context = spawns


@asynccontextmanager
async def serve(
    config: RunConfig, bucket_bytes: int = 2**20, shared_memory: bool = True, backend: str = "gloo"
) -> AsyncIterator[Served]:
    """An engine, shut down afterwards."""
    with nullcontext() if config.engine.tensor_parallel > 1 or backend != "gloo" else forked_cores():
        engine = await VllmEngine.start(config, 0, backend)
    try:
        policy = load_policy(config.model, config.sampling.temperature, config.trainer.logprob_chunk, False)
        if backend != "gloo":
            policy.to("cuda")  # the last GPU is the engine's, where there are two
        link = await Link.make(policy, engine, bucket_bytes, shared_memory=shared_memory, backend=backend)
        yield Served(config, engine, link)
    finally:
        await engine.shutdown()


def trainer_logprobs(
    policy: PolicyModel, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """The trainer's logprobs [len(completion)] of a completion."""
    device = next(policy.parameters()).device
    ids = torch.tensor([*prompt, *completion], device=device)
    positions = torch.arange(len(prompt) - 1, len(ids) - 1, device=device)
    policy.temperature = temperature
    with torch.no_grad():
        logprobs: Tensor = policy(
            ids, torch.arange(len(ids), device=device), [(1, len(ids))], positions, ids[positions + 1]
        )[0].cpu()
    return logprobs


def differences(
    policy: PolicyModel, prompts: Sequence[list[int]], completions: Sequence[Completion], temperature: float = 1.0
) -> Tensor:
    """|engine logprob - trainer logprob| of all sampled tokens."""
    return torch.cat(
        [
            (trainer_logprobs(policy, prompt, c.tokens.tolist(), temperature) - torch.from_numpy(c.logprobs)).abs()
            for prompt, c in zip(prompts, completions, strict=True)
        ]
    )


def disturb(policy: PolicyModel, scale: float, seed: int) -> None:
    """Change every parameter by noise, as an optimizer step would; logprobs move by far more than any tolerance."""
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device) * scale
            parameter.add_(noise.to(parameter))
