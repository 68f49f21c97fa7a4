"""One trainer rank. A plain class: the cluster layer makes it a Ray actor, one per rank.

Its life: `setup` on all ranks at once, `listen` and `connect` for the weight transport (rank 0 sends), then `step` and
`send_weights` in turns, and `export` at the end. Calls run one after another, in the order they were made.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelinerl.batch.samples import collate, dummy_sample, train_sample
from pipelinerl.config.schema import RunConfig
from pipelinerl.trainer.backend import DeepSpeedBackend, init_process_group
from pipelinerl.trainer.hidden_states import hidden_states
from pipelinerl.trainer.model import PolicyModel, export_policy, load_policy
from pipelinerl.trainer.nudge import Weights
from pipelinerl.trainer.scoring import score_completions
from pipelinerl.trainer.step import train_step
from pipelinerl.types import (
    FloatArray,
    RankBatch,
    RolloutGroup,
    SampleRef,
    ScoredSequence,
    ScoreRequest,
    StepResult,
    TrainSample,
)
from pipelinerl.weights.manifest import Manifest
from pipelinerl.weights.sender import Sender, make_sender, manifest_of


class TrainerWorker:
    """Holds this rank's share of model and optimizer."""

    def __init__(self, config: RunConfig, rank: int, device: str):
        self._config = config
        self._rank = rank
        self._device = torch.device(device)
        self._version = 0
        self._policy: PolicyModel
        self._weights: Weights
        self._backend: DeepSpeedBackend
        self._sender: Sender | None = None
        self._manifest: Manifest

    def setup(self, address: str, port: int) -> dict[str, Any]:
        """Join the other ranks at `address:port` and load the model. Returns what there is to log about it."""
        config = self._config
        torch.manual_seed(config.seed)
        init_process_group(
            self._device, self._rank, config.trainer.ranks, address, port, timeout_s=config.trainer.step_timeout_s
        )
        policy = load_policy(
            config.model,
            config.sampling.temperature,
            config.trainer.logprob_chunk,
            config.trainer.gradient_checkpointing,
        ).to(self._device)
        bf16 = config.model.dtype == "bfloat16"
        self._backend = DeepSpeedBackend(policy, config.trainer, bf16, config.steps, self._device)
        self._policy = policy
        self._weights = Weights(policy)
        self._manifest = manifest_of(policy.hf, config.weights.bucket_mb * 2**20)
        return {
            "parameters": sum(p.numel() for p in policy.parameters()),
            "dtype": config.model.dtype,
            "head_dtype": str(policy.head_dtype).removeprefix("torch."),
            "temperature": policy.temperature,
            "tied_head": bool(policy.hf.config.tie_word_embeddings),
        }

    def listen(self, backend: str, address: str) -> dict[str, Any]:
        """Rank 0 only: open the weight transport. Returns what engines need to join it."""
        weights = self._config.weights
        self._sender = make_sender(backend, weights.timeout_s, weights.bucket_mb * 2**20)
        return self._sender.listen(address)

    def connect(self, world_size: int) -> dict[str, Any]:
        """Rank 0 only: wait for all engine workers. Returns the manifest of every update, as plain lists."""
        assert self._sender is not None, "listen comes first"
        self._sender.connect(world_size)
        return self._manifest.to_dict()

    def send_weights(self) -> dict[str, Any]:
        """Rank 0 only: broadcast the current weights. Returns seconds and bytes and, with the canary on, the `digests`
        of all parameters in the order of the manifest."""
        assert self._sender is not None, "listen comes first"
        start = time.perf_counter()
        canary = self._config.parity.canary
        digests = self._sender.send(self._policy.hf, self._manifest, with_digests=canary)
        sent = {"seconds": time.perf_counter() - start, "bytes": float(self._manifest.nbytes)}
        return sent | {"digests": digests} if canary else sent

    def step(self, updates: Sequence[RankBatch], *payloads: RolloutGroup) -> StepResult:
        """This rank's share of a step, of one or more optimizer updates. `payloads[i]` is the group that
        `SampleRef.group == i` names."""
        assert not self._weights.nudged, "a probe must take its nudge back before a step"
        start = time.perf_counter()
        for batch in updates:
            rows = [collate(_samples(refs, payloads)) for refs in batch.micro_batches]
            applied, metrics = train_step(self._backend, rows, self._version, self._config.algo)
        self._version += 1
        metrics["perf/train_s"] = time.perf_counter() - start
        return StepResult(self._version, metrics, applied)

    def nudge(self) -> None:
        """All ranks: exchange the weights for a probe's second set, or the second set for the weights."""
        self._weights.use(not self._weights.nudged)

    def score(self, request: ScoreRequest, *payloads: RolloutGroup) -> list[ScoredSequence]:
        """Rank 0 only: the logprobs of the groups' completions; see trainer/scoring.py. Changes no weight."""
        rollouts = [rollout for group in payloads for rollout in group.rollouts]
        return score_completions(self._policy, rollouts, request, self._weights)

    def hidden_states(self, tokens: list[int]) -> list[FloatArray]:
        """Rank 0 only: the residual stream [tokens, hidden] at each place; see trainer/hidden_states.py."""
        return hidden_states(self._policy, tokens)

    def export(self, target: str) -> None:
        """Rank 0 only: write the model and its tokenizer to `target`."""
        export_policy(self._policy, self._config.model.path, Path(target))


def _samples(refs: Sequence[SampleRef], payloads: Sequence[RolloutGroup]) -> list[TrainSample]:
    if not refs:
        return [dummy_sample()]
    return [train_sample(payloads[ref.group].rollouts[ref.rollout], ref.advantage, ref.weight) for ref in refs]
