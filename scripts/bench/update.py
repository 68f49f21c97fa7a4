#!/usr/bin/env python
"""What a weight update costs an engine that is serving, against the least it could cost.

    python scripts/bench/update.py

An engine in bfloat16 serves `--requests` sequences while updates come over host memory. In every repetition, one after
the other and with the engine at work:

    memcpy      one copy of the update's bytes, the least that a change of all weights could take
    step        one step of the engine
    broadcast   one raw gloo broadcast of the same bytes in one buffer, to another process
    update      its phases as the engine and the sender report them: stage, load, pause, total
    fan-out     until 1 and until 3 processes have all bytes of an update, mapped and by broadcast

Bounds: pause <= 3 memcpy + step, total <= 1.5 broadcast + load, transfer to 3 <= 1.3 transfer to 1, nothing aborted.
Medians, with smallest and largest. Exit code 1 when the median of a bound's ratio is above --max-ratio.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
FAN_OUT = 3
SETTLE_S = 0.3  # between measurements


def write_model(args: argparse.Namespace, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from pipelinerl.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(args.length)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.length,
        tie_word_embeddings=args.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters in bfloat16", flush=True)


def run_config(args: argparse.Namespace, model: Path) -> Any:
    from pipelinerl.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "model": {"path": str(model), "dtype": "bfloat16"},
            "task": {"kind": "sort"},
            "algo": {"kind": "ppo_clip"},
            "sampling": {"max_tokens": args.length // 2},
            "engine": {
                "max_model_len": args.length,
                "max_num_seqs": args.requests,
                "max_num_batched_tokens": max(args.length, 1024),
                "kv_cache_mb": args.kv_cache_mb,
                "enforce_eager": True,
            },
            "weights": {"bucket_mb": args.bucket_mb},
            "cluster": {"device": "cpu"},
        }
    )


def member(pipe: Connection) -> None:
    """A process that joins groups and receives what it is told to."""
    import torch
    import torch.distributed as dist

    from pipelinerl.weights.gloo_group import GlooGroup
    from pipelinerl.weights.places import Place
    from pipelinerl.weights.seat import Seat

    seat: Any = None
    raw: Any = None
    while (order := pipe.recv()) is not None:
        kind, *what = order
        if kind == "join":
            place, info = what
            seat = Seat("member", Place.from_dict(place), info)
        elif kind == "receive":
            for _ in seat.receive(*what):
                pass
        elif kind == "join raw":
            port, nbytes = what
            store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
            raw = GlooGroup(store, 0, 1, 2, 60.0), torch.zeros(nbytes, dtype=torch.uint8)
        elif kind == "receive raw":
            raw[0].broadcast(raw[1]).wait()
        pipe.send(time.perf_counter())


class Members:
    """Processes that receive."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=member, args=(there,), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def order(self, *orders: tuple[Any, ...]) -> Callable[[], None]:
        """One order to each of the first members; the result waits until they have done it."""
        pipes = self._pipes[: len(orders)]
        for pipe, order in zip(pipes, orders, strict=True):
            pipe.send(order)

        def done() -> None:
            for pipe in pipes:
                pipe.recv()

        return done

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(10)


class FanOut:
    """A sender and the first `count` members, on its node or treated as if each were on one of its own."""

    def __init__(self, source: Any, members: Members, count: int, mapped: bool):
        from pipelinerl.weights.host_sender import HostSender
        from pipelinerl.weights.places import assign

        self._sender, self._members, self._count = HostSender(source, 60.0), members, count
        self._number = 0
        places, world_size = assign([["" if mapped else str(node)] for node in range(count)])
        info = self._sender.listen("127.0.0.1") | {"world_size": world_size}
        joined = members.order(*(("join", place, info) for [place] in places))
        self._sender.connect(world_size)
        joined()

    def measure(self) -> float:
        """Seconds until all have all bytes."""
        received = self._members.order(*[("receive", self._number)] * self._count)
        start = time.perf_counter()
        self._sender.send(self._number, with_digests=False)
        received()
        self._number += 1
        return time.perf_counter() - start


class Raw:
    """A gloo broadcast of one flat buffer to one member."""

    def __init__(self, members: Members, nbytes: int):
        import torch
        import torch.distributed as dist

        from pipelinerl.weights.gloo_group import GlooGroup

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._members, self._buffer = members, torch.ones(nbytes, dtype=torch.uint8)
        joined = members.order(("join raw", store.port, nbytes))
        self._group = GlooGroup(store, 0, 0, 2, 60.0)
        joined()

    def measure(self) -> float:
        received = self._members.order(("receive raw",))
        start = time.perf_counter()
        self._group.broadcast(self._buffer).wait()
        received()
        return time.perf_counter() - start


def memcpy(nbytes: int) -> float:
    """The fastest of three copies between buffers that are in memory already."""
    import torch

    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass
class Load:
    """Requests that are always in flight."""

    engine: Any
    finished: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def keep(self, count: int, max_tokens: int) -> AsyncIterator[None]:
        async def ask(number: int) -> None:
            while True:
                done = await self.engine.generate([1, 2, 3 + number % 30], 1.0, max_tokens)
                self.finished.append(done.finish_reason)

        tasks = [asyncio.create_task(ask(number)) for number in range(count)]
        yield
        for task in tasks:
            task.cancel()


async def step_of(engine: Any) -> float:
    """The engine answers between two steps: a question asked after an answer comes back a step later."""
    await engine._llm.collective_rpc("weights_state")
    start = time.perf_counter()
    for _ in range(5):
        await engine._llm.collective_rpc("weights_state")
    return (time.perf_counter() - start) / 5


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    from pipelinerl.engine.vllm_engine import VllmEngine
    from pipelinerl.weights.host_sender import HostSender
    from pipelinerl.weights.membership import FixedMembers
    from pipelinerl.weights.publisher import Publisher
    from pipelinerl.weights.source import WholeModel

    config = run_config(args, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    source = WholeModel(model, config.weights.bucket_mb * 2**20)
    nbytes = source.manifest.nbytes
    members = Members(FAN_OUT)
    raw = await asyncio.to_thread(Raw, members, nbytes)
    fan_outs = {
        f"{'mapped' if mapped else 'broadcast'} to {count}": (mapped, count)
        for mapped in (True, False)
        for count in (1, FAN_OUT)
    }
    engine = await VllmEngine.start(config, 0, "gloo")

    class Trainer:
        """Rank 0, in a thread."""

        sender = HostSender(source, config.weights.timeout_s)

        async def listen(self, backend: str) -> dict[str, Any]:
            return self.sender.listen("127.0.0.1")

        async def connect_weights(self, world_size: int) -> dict[str, Any]:
            self.sender.connect(world_size)
            return source.manifest.to_dict()

        async def send_weights(self, transmission: int) -> dict[str, Any]:
            start = time.perf_counter()
            digests = await asyncio.to_thread(self.sender.send, transmission)
            return {"seconds": time.perf_counter() - start, "digests": digests}

        async def resend_weights(self, transmission: int) -> None:
            raise AssertionError("nothing fails here")

    publisher = Publisher(Trainer(), FixedMembers([engine]), config.weights, "gloo", 1)
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    load = Load(engine)
    try:
        async with load.keep(args.requests, config.sampling.max_tokens):
            await publisher.publish(0)  # allocates
            for version in range(1, args.repeats + 1):
                await asyncio.sleep(SETTLE_S)
                note("memcpy", await asyncio.to_thread(memcpy, nbytes))
                note("step", await step_of(engine))
                note("broadcast", await asyncio.to_thread(raw.measure))
                await asyncio.sleep(SETTLE_S)
                update = await publisher.publish(version)
                for phase in ("stage", "transfer", "load", "drain", "exchange", "canary", "resume", "pause", "total"):
                    note(phase, update[f"sync/{phase}_s"])
                for name, (mapped, count) in fan_outs.items():
                    link = await asyncio.to_thread(FanOut, source, members, count, mapped)
                    await asyncio.to_thread(link.measure)  # touches its memory
                    note(name, min([await asyncio.to_thread(link.measure) for _ in range(3)]))
        assert "abort" not in load.finished, "an update aborted sequences"
    finally:
        await engine.shutdown()
        members.close()
    print(f"{nbytes / 1e6:.0f} MB, {args.requests} requests in flight, {len(load.finished)} finished, none aborted\n")
    return found


def report(found: dict[str, list[float]], max_ratio: float) -> int:
    columns = zip(*found.values(), strict=True)
    rows = [dict(zip(found, values, strict=True)) for values in columns]
    bounds = {
        "pause / (3 memcpy + step)": [r["pause"] / (3 * r["memcpy"] + r["step"]) for r in rows],
        "total / (1.5 broadcast + load)": [r["total"] / (1.5 * r["broadcast"] + r["load"]) for r in rows],
        "mapped to 3 / (1.3 x to 1)": [r["mapped to 3"] / (1.3 * r["mapped to 1"]) for r in rows],
    }
    print("| ms | median | smallest | largest |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{1000 * f(values):.1f}" for f in (statistics.median, min, max)) + " |")
    print("\n| ratio to the bound | median | smallest | largest |\n|---|---|---|---|")
    for name, values in bounds.items():
        print(f"| {name} | " + " | ".join(f"{f(values):.2f}" for f in (statistics.median, min, max)) + " |")
    return int(any(statistics.median(values) > max_ratio for values in bounds.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 192")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--length", type=int, default=1024, help="engine.max_model_len; answers have half of it")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--kv-cache-mb", type=int, default=2560)
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-ratio", type=float, default=1.0)
    return parser.parse_args()


def main() -> int:
    args = parse()
    os.environ |= ENVIRONMENT  # before torch and vLLM are imported, here and in the processes
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, Path(folder))
        return report(asyncio.run(measure(args, Path(folder))), args.max_ratio)


if __name__ == "__main__":
    sys.exit(main())
