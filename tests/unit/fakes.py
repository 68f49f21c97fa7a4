"""Engines, trainer and weight updates without processes: what the loop sees of them, on one event loop.

A `Gate` lets a test decide when something happens. `FakeFleet` samples the first token of every completion by the
version it serves when the group starts and the others by the one it serves when the group ends.
"""

import asyncio
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.manifest import FileRecord, secured
from pipelinerl.checkpoint.saver import Saver
from pipelinerl.checkpoint.store import FOLDER, CheckpointStore
from pipelinerl.config.schema import RunConfig
from pipelinerl.metrics.history import History
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.rollout.ledger import Ledger
from pipelinerl.tasks.base import Env, Grade, Split
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
    SampleRef,
    StepResult,
    Turn,
    VersionSpan,
)

PROMPT_TOKENS, COMPLETION_TOKENS = 2, 3
SECONDS = 5.0  # more than any wait of a test that passes


class Gate:
    """Counts arrivals and holds them up until the test opens it. Born open."""

    def __init__(self) -> None:
        self.arrived = 0
        self._open = asyncio.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    async def pass_through(self) -> None:
        self.arrived += 1
        await self._open.wait()


class Payload:
    """Stands for a Ray reference: can be awaited any number of times."""

    def __init__(self, group: RolloutGroup) -> None:
        self.group = group

    def __await__(self) -> Generator[None, None, RolloutGroup]:
        yield
        return self.group


class FakeFleet:
    """Engines that answer at once, or when the test opens `gate`.

    `outcomes(group_id)` says how the completions of a group end, `rewards(group_id)` what they are worth.
    """

    def __init__(self, group_size: int) -> None:
        self.version = 0  # that all engines serve
        self.started: list[int] = []  # group ids, in the order of the calls
        self.finished: list[int] = []
        self.evaluated: list[tuple[int, str]] = []  # (version, problem)
        self.gate, self.eval_gate = Gate(), Gate()
        self.evaluator_joins = False
        self.restarted = asyncio.Event()  # an engine needs the current weights
        self.fails_at: dict[int, Exception] = {}  # group id -> what its call raises
        self.eval_fails_at: dict[int, Exception] = {}
        self.outcomes: Callable[[int], Sequence[Outcome]] = lambda _: [Outcome.OK] * group_size
        self.rewards: Callable[[int], Sequence[float]] = lambda _: [float(i % 2) for i in range(group_size)]

    async def rollout(self, group_id: int, problem: Problem) -> tuple[GroupMeta, Payload]:
        self.started.append(group_id)
        first = self.version
        await self.gate.pass_through()
        await asyncio.sleep(0)
        if group_id in self.fails_at:
            raise self.fails_at[group_id]
        ends = zip(self.rewards(group_id), self.outcomes(group_id), strict=True)
        rollouts = tuple(make_rollout(reward, outcome, first, self.version) for reward, outcome in ends)
        self.finished.append(group_id)
        meta = GroupMeta(group_id, problem.id, 0, tuple(map(RolloutMeta.of, rollouts)), 0.01)
        return meta, Payload(RolloutGroup(group_id, problem.id, rollouts))

    async def evaluate(self, group_id: int, problem: Problem) -> GroupMeta:
        self.evaluated.append((self.version, problem.id))
        first = self.version
        await self.eval_gate.pass_through()
        if group_id in self.eval_fails_at:
            raise self.eval_fails_at[group_id]
        rollout = make_rollout(float(group_id == 0), Outcome.OK, first, self.version)
        return GroupMeta(group_id, problem.id, 0, (RolloutMeta.of(rollout),), 0.01)

    async def stale(self) -> None:
        await self.restarted.wait()

    def metrics(self) -> dict[str, float]:
        return {}

    def busy_s(self) -> float:
        return 0.0


class FakeTrainer:
    """Remembers what it was given. `gates[step]`, where there is one, holds that step up."""

    def __init__(self, done: int = 0) -> None:
        self.done = done  # steps
        self.writing = Gate()  # of a snapshot; its write takes as long as the gate is closed
        self.written: dict[str, FileRecord] | None = None
        self.write_fails: Exception | None = None
        self.updates: list[Sequence[Sequence[RankBatch]]] = []  # [step][update][rank]
        self.groups: list[list[RolloutGroup]] = []
        self.parts: list[tuple[list[RankBatch], list[RolloutGroup], bool]] = []  # of a step that comes in parts
        self.scales: list[float] = []  # [step]
        self.part_gate = Gate()  # of every part
        self.gates: dict[int, Gate] = {}
        self.skips: set[int] = set()  # steps that turn out not to be finite
        self.metrics: dict[int, dict[str, float]] = {}  # step -> what differs from the usual metrics
        self.fails_at: dict[int, Exception] = {}
        self.kl: Callable[[SampleRef], SampleKL] = lambda ref: SampleKL(ref.group, ref.rollout, 0.0, 0.0, 0.0)
        self.measured: list[list[SampleRef]] = []  # what KL was measured of, call by call

    async def reference_kl(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> list[SampleKL]:
        self.measured.append(references(updates))
        return [self.kl(ref) for ref in reversed(self.measured[-1])]  # in any order

    async def step(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> StepResult:
        self.updates.append(updates)
        self.groups.append([await payload for payload in payloads])
        return await self._end_step()

    async def begin_step(self) -> None:
        assert not self.parts, "the step before is not finished"

    async def accumulate(self, batches: Sequence[RankBatch], payloads: Sequence[Any], last: bool) -> None:
        assert not (self.parts and self.parts[-1][2]), "nothing follows the last part"
        self.parts.append((list(batches), [await payload for payload in payloads], last))
        await self.part_gate.pass_through()

    async def finish_step(self, scale: float) -> StepResult:
        assert self.parts[-1][2], "the last part was not said to be the last"
        self.scales.append(scale)
        self.updates.append([batches for batches, *_ in self.parts])
        self.groups.append([group for _, groups, _ in self.parts for group in groups])
        self.parts.clear()
        return await self._end_step()

    async def _end_step(self) -> StepResult:
        self.done += 1
        step = self.done
        if step in self.gates:
            await self.gates[step].pass_through()
        if step in self.fails_at:
            raise self.fails_at[step]
        metrics = {"perf/train_s": 1e-6, "optim/loss": float(step), "optim/lr": 1e-6, "optim/grad_norm": 1.0}
        return StepResult(step, metrics | self.metrics.get(step, {}), applied=step not in self.skips)

    async def snapshot(self, folder: str) -> None:
        path = Path(folder) / "trainer-0.json"
        path.write_text(f"version {self.done}")
        self.written = {path.name: secured(path)}

    async def checkpoint_poll(self) -> dict[str, FileRecord] | None:
        if self.write_fails:
            raise self.write_fails
        return self.written if self.writing.is_open else None

    async def export(self, target: str) -> None:
        Path(target).mkdir()
        (Path(target) / "version").write_text(str(self.done))


class FakePublisher:
    """Brings a version to a fake fleet in two turns of the event loop."""

    def __init__(self, fleet: FakeFleet) -> None:
        self._fleet = fleet
        self.published: list[int] = []
        self.changed: list[bool | None] = []  # what each publication was expected to bring
        self.gates: dict[int, Gate] = {}

    async def begin(self, version: int, changed: bool | None = None) -> asyncio.Task[dict[str, float]]:
        return asyncio.create_task(self.publish(version, changed))

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]:
        if version in self.gates:
            await self.gates[version].pass_through()
        await asyncio.sleep(0)
        self._fleet.version = version
        self._fleet.restarted.clear()
        await asyncio.sleep(0)
        self.published.append(version)
        self.changed.append(changed)
        return {"sync/version": float(version)}


class FakeTask:
    """Problems without content, three of them held out."""

    name = "fake"
    skipped_rows = 0

    def __init__(self, held_out: int = 3) -> None:
        self._held_out = held_out

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(f"{split}/{i}", {}) for i in range(1000 if split == "train" else self._held_out)]

    def env(self, problem: Problem, grade: Grade) -> Env:
        raise NotImplementedError("the fake fleet plays no episodes")


class FakeRun(Run):
    """A `Run` of fakes, with their own types."""

    fleet: FakeFleet
    trainer: FakeTrainer
    publisher: FakePublisher


def small_config(*overrides: str) -> RunConfig:
    """The schema's defaults, but 4 steps of 2 groups of 2 completions, and no checkpoints.

    Overrides are `section.key=value`.
    """
    data: dict[str, Any] = {
        "model": {"path": "a/model"},
        "task": {"kind": "sort"},
        "algo": {"kind": "reinforce_is"},
        "batch": {"groups_per_step": 2, "group_size": 2},
        "checkpoint": {"every": 0},
        "steps": 4,
    }
    for override in overrides:
        path, _, value = override.partition("=")
        *sections, key = path.split(".")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = yaml.safe_load(value)
    return RunConfig.model_validate(data)


def fake_run(run_dir: Path, *overrides: str, held_out: int = 3, state: DriverState | None = None) -> FakeRun:
    """A run of `small_config(*overrides)` on fakes that writes to `run_dir`, and goes on from `state`."""
    config, task = small_config(*overrides), FakeTask(held_out)
    fleet = FakeFleet(config.batch.group_size)
    state = state or DriverState(0, Ledger().to_dict(), 0.0)
    ledger, lag = Ledger.resumed(state.ledger), config.async_.lag_bound
    buffer = GroupBuffer[Finished](config.batch.groups_per_step, lag, config.steps, state.step, ledger)
    trainer = FakeTrainer(state.step)
    store = CheckpointStore(run_dir / FOLDER, config.checkpoint.keep_last, config.checkpoint.keep_best)
    run = FakeRun(
        config=config,
        task=task,
        stream=ProblemStream(task.problems("train"), config.seed),
        buffer=buffer,
        fleet=fleet,
        trainer=trainer,
        publisher=FakePublisher(fleet),
        log=MetricsLog(run_dir),
        rollouts=RolloutWriter(run_dir, config.metrics.rollout_groups_per_step),
        saver=Saver(config, store, trainer, run_dir / "exports"),
        history=History.open(run_dir, config.journal),
    )
    run.resume(state)
    run.history.journal.started(state.step, None, state.ledger, config.dump(), lag)
    return run


def make_rollout(reward: float, outcome: Outcome, first: int, last: int) -> Rollout:
    """One token by version `first`, the others by `last`; nothing at all when the engine gave the request up."""
    if outcome is Outcome.INFRA_ABORT:
        return Rollout((), reward, outcome, detail="engine gave up")
    spans = (VersionSpan(first, 0, 1), VersionSpan(last, 1, COMPLETION_TOKENS))
    completion = Completion(
        tokens=np.arange(COMPLETION_TOKENS, dtype=np.int32),
        logprobs=np.full(COMPLETION_TOKENS, -0.5, dtype=np.float32),
        spans=spans if first != last else (VersionSpan(first, 0, COMPLETION_TOKENS),),
        finish_reason="stop",
        text="text",
    )
    turn = Turn(np.zeros(PROMPT_TOKENS, dtype=np.int32), completion)
    return Rollout((turn,), reward, outcome, detail="" if outcome.scored else "no reward")


def references(updates: Sequence[Sequence[RankBatch]]) -> list[SampleRef]:
    """All that the updates [update][rank] train on, in order of group and rollout."""
    refs = [ref for ranks in updates for batch in ranks for micro_batch in batch.micro_batches for ref in micro_batch]
    return sorted(refs, key=lambda ref: (ref.group, ref.rollout))


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` holds; TimeoutError when it never does."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def settle(rounds: int = 50) -> None:
    """Let everything run that is able to run."""
    for _ in range(rounds):
        await asyncio.sleep(0)
