"""What the driver costs per sample, with 1 to 1000 engines.

    python scripts/bench/controller.py

The driver is the real one: `loop.train` with admission, routing, ledger, journal, advantages, packing, metrics and
rollout files. Engines, trainer and weight updates are stubs that cost next to nothing: a group is done after a random
time of some milliseconds, groups finish out of order, and the lag bound holds as many of them in flight as in a real
run. Runs of all sizes take turns. `CPU us` is all CPU time of the process over the samples that were trained on.

Exit code 1 when the median rate with any number of engines is below --min-rate, or the median cost per sample with the
most engines is above --max-growth times that with the fewest.
"""

import argparse
import asyncio
import cProfile
import gc
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipelinerl.checkpoint.manifest import FileRecord
from pipelinerl.checkpoint.saver import Saver
from pipelinerl.checkpoint.store import FOLDER, CheckpointStore
from pipelinerl.cluster.fleet import Fleet
from pipelinerl.concurrency import background
from pipelinerl.config.schema import RunConfig
from pipelinerl.loop import train
from pipelinerl.metrics.history import History
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.tasks.registry import build_task
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.training.state import Finished, Run
from pipelinerl.types import (
    Completion,
    GroupMeta,
    Outcome,
    Problem,
    RankBatch,
    Rollout,
    RolloutGroup,
    RolloutMeta,
    SampleKL,
    StepResult,
    Turn,
    VersionSpan,
)

PATTERNS = 64  # different groups; what the driver does depends on rewards and lengths
PROMPT = 16  # tokens


class Payload:
    """Stands for a Ray reference to a group of which the metadata is known."""

    def __init__(self, meta: GroupMeta) -> None:
        self._meta = meta

    def __await__(self) -> Generator[None, None, RolloutGroup]:
        yield
        return RolloutGroup(self._meta.id, self._meta.problem_id, tuple(map(_rollout, self._meta.rollouts)))


def _rollout(meta: RolloutMeta) -> Rollout:
    length = meta.completion_len
    [version] = meta.tokens_by_version
    tokens, logprobs = np.zeros(length, np.int32), np.full(length, -1.0, np.float32)
    completion = Completion(tokens, logprobs, (VersionSpan(version, 0, length),), "stop", "")
    return Rollout((Turn(np.zeros(PROMPT, np.int32), completion),), meta.reward, meta.outcome, meta.components)


class Serving:
    """What all stub engines sample from: prepared groups of the version that is served."""

    def __init__(self, config: RunConfig) -> None:
        self._size, self._longest = config.batch.group_size, config.sampling.max_tokens
        self.rng = random.Random(config.seed)
        self.serve(0)

    def serve(self, version: int) -> None:
        draw = random.Random(version)
        self.groups = [tuple(self._meta(draw, version) for _ in range(self._size)) for _ in range(PATTERNS)]

    def _meta(self, draw: random.Random, version: int) -> RolloutMeta:
        length = draw.randint(1, self._longest)
        reward = float(draw.random() < 0.5)
        return RolloutMeta(reward, Outcome.OK, {}, PROMPT + length, PROMPT, length, {version: length})


class StubWorker:
    """What the fleet sees of a RemoteWorker."""

    def __init__(self, number: int, serving: Serving, mean_s: float) -> None:
        self.name = f"engine {number}"
        self._number, self._serving, self._mean_s = number, serving, mean_s

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        return {}

    async def call_pair(self, method: str, group_id: int, problem: Problem, *args: Any) -> tuple[GroupMeta, Payload]:
        seconds = self._serving.rng.expovariate(1 / self._mean_s)
        await asyncio.sleep(seconds)
        rollouts = self._serving.groups[group_id % PATTERNS]
        meta = GroupMeta(group_id, problem.id, self._number, rollouts, seconds)
        return meta, Payload(meta)

    async def processes(self, timeout_s: float) -> None:
        return None

    def kill(self) -> None:
        raise AssertionError(f"{self.name} is stuck")


class StubLauncher:
    def __init__(self, serving: Serving, mean_s: float) -> None:
        self._serving, self._mean_s = serving, mean_s

    async def start_engine(self, index: int, config: RunConfig) -> Any:
        return StubWorker(index, self._serving, self._mean_s)

    async def stop_engine(self, worker: Any) -> None:
        raise NotImplementedError


class StubTrainer:
    """What is not called in a run of whole batches, without checkpoints and KL, is not there."""

    def __init__(self) -> None:
        self.version = 0

    async def begin_step(self) -> None:
        raise NotImplementedError

    async def accumulate(self, batches: Sequence[RankBatch], payloads: Sequence[Any], last: bool) -> None:
        raise NotImplementedError

    async def finish_step(self, scale: float) -> StepResult:
        raise NotImplementedError

    async def step(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> StepResult:
        self.version += 1
        metrics = {"perf/train_s": 1e-6, "optim/loss": 0.0, "optim/lr": 1e-6, "optim/grad_norm": 1.0}
        return StepResult(self.version, metrics, applied=True)

    async def reference_kl(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> list[SampleKL]:
        raise NotImplementedError

    async def snapshot(self, folder: str) -> None:
        raise NotImplementedError

    async def checkpoint_poll(self) -> dict[str, FileRecord] | None:
        raise NotImplementedError

    async def export(self, target: str) -> None:
        raise NotImplementedError


class StubPublisher:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def begin(self, version: int, changed: bool | None = None) -> asyncio.Task[dict[str, float]]:
        return asyncio.create_task(self._arrive(version))

    async def _arrive(self, version: int) -> dict[str, float]:
        self._serving.serve(version)
        return {"sync/version": float(version)}


def run_config(args: argparse.Namespace, engines: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "steps": args.steps,
            "model": {"path": "no/model"},
            "task": {"kind": "sort"},
            "algo": {"kind": "ppo_clip"},
            "batch": {"groups_per_step": args.groups, "group_size": args.group_size},
            "sampling": {"max_tokens": 1024},
            "engine": {"count": engines},
            "trainer": {"ranks": args.ranks},
            "checkpoint": {"every": 0},
            "eval": {"at_start": False, "at_end": False},
        }
    )


def measure(args: argparse.Namespace, engines: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a run."""
    config = run_config(args, engines)
    task, serving, trainer = build_task(config.task, config.seed), Serving(config), StubTrainer()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        store = CheckpointStore(run_dir / FOLDER, config.checkpoint.keep_last, config.checkpoint.keep_best)
        run = Run(
            config=config,
            task=task,
            stream=ProblemStream(task.problems("train"), config.seed),
            buffer=GroupBuffer[Finished](config.batch.groups_per_step, config.async_.lag_bound, config.steps),
            fleet=(fleet := Fleet(StubLauncher(serving, args.mean_ms / 1000), config)),
            trainer=trainer,
            publisher=StubPublisher(serving),
            log=MetricsLog(run_dir),
            rollouts=RolloutWriter(run_dir, config.metrics.rollout_groups_per_step),
            saver=Saver(config, store, trainer, run_dir / "exports"),
            history=History.open(run_dir, config.journal),
        )
        lag = config.async_.lag_bound
        run.history.journal.started(0, None, run.buffer.ledger.to_dict(), config.dump(), lag)
        seconds, spent = asyncio.run(timed(run, fleet))
        run.log.close()
    assert trainer.version == args.steps
    return seconds, spent


async def timed(run: Run, fleet: Fleet) -> tuple[float, float]:
    """Seconds and CPU seconds from the first group to the last step, with the heartbeats of all engines."""
    await fleet.start()
    gc.collect()
    gc.freeze()  # as a run does
    start, cpu = time.perf_counter(), time.process_time()
    async with background(fleet.supervise()):
        await train(run)
    return time.perf_counter() - start, time.process_time() - cpu


def profile(args: argparse.Namespace) -> None:
    """Where the driver spends its time, with the most engines."""
    profiler = cProfile.Profile()
    profiler.runcall(measure, args, max(args.engines))
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--groups", type=int, default=512, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=8, help="of the trainer")
    parser.add_argument("--mean-ms", type=float, default=5.0, help="that a stub engine takes for a group")
    parser.add_argument("--rounds", type=int, default=5, help="runs with each number of engines")
    parser.add_argument("--min-rate", type=float, default=20_000, help="samples per second")
    parser.add_argument("--max-growth", type=float, default=2.0, help="of the cost per sample")
    parser.add_argument("--profile", action="store_true", help="print where one run spends its time instead")
    args = parser.parse_args()
    if args.profile:
        profile(args)
        return 0
    samples = args.steps * args.groups * args.group_size
    rates: dict[int, list[float]] = {engines: [] for engines in args.engines}
    costs: dict[int, list[float]] = {engines: [] for engines in args.engines}
    measure(args, args.engines[0])  # imports and caches
    for number in range(args.rounds):
        for engines in args.engines if number % 2 else args.engines[::-1]:
            seconds, cpu = measure(args, engines)
            rates[engines].append(samples / seconds)
            costs[engines].append(1e6 * cpu / samples)
    print(
        f"{args.steps} steps of {args.groups} groups of {args.group_size}, {args.ranks} trainer ranks; median of "
        f"{args.rounds} runs in turns (lowest to highest)\n"
    )
    print("| engines | samples/s | CPU us per sample |\n|---|---|---|")
    for engines in args.engines:
        print(f"| {engines} | {_spread(rates[engines], ',.0f')} | {_spread(costs[engines], '.1f')} |")
    growth = median(costs[max(args.engines)]) / median(costs[min(args.engines)])
    slowest = min(map(median, rates.values()))
    print(
        f"\ncost per sample from {min(args.engines)} to {max(args.engines)} engines: {growth:.2f}x, at most "
        f"{args.max_growth}x wanted; slowest {slowest:,.0f} samples/s, at least {args.min_rate:,.0f} wanted"
    )
    return int(growth > args.max_growth or slowest < args.min_rate)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
