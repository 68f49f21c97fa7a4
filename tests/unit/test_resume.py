"""What `resume=auto|never|PATH` comes to, and a training loop that is killed and goes on, on fakes."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.resume import Checkpoint, find_checkpoint, read_checkpoint
from pipelinerl.checkpoint.store import checkpoints_in, step_name
from pipelinerl.errors import ConfigError, DataError, EnvironmentProblem, WorkerDied
from pipelinerl.loop import train
from pipelinerl.metrics.log import read_metrics
from pipelinerl.run_dir import train_run_dir
from pipelinerl.types import Outcome
from tests.unit.fakes import SECONDS, FakeRun, Gate, fake_run, references, settle, small_config, until

OVERRIDES = ("steps=6", "checkpoint.every=2", "eval.every=2")


async def finish(run: FakeRun) -> None:
    async with asyncio.timeout(SECONDS):
        await train(run)


async def killed(
    run_dir: Path, step: int, *overrides: str, arrange: Callable[[FakeRun], None] | None = None
) -> FakeRun:
    """A run whose trainer dies in `step`, when the checkpoint before it is complete. Only what is on disk is left."""
    run = fake_run(run_dir, *OVERRIDES, *overrides)
    (arrange or uneven)(run)
    run.trainer.fails_at[step] = WorkerDied("killed")
    gate = run.trainer.gates[step] = Gate()
    gate.close()
    task = asyncio.create_task(train(run))
    await until(lambda: (run_dir / "checkpoints" / step_name((step - 1) // 2 * 2)).is_dir())
    await run.saver.all_done()  # its thread would outlive the end of this run, as no thread outlives a process
    await settle()
    gate.open()
    with pytest.raises(WorkerDied, match="killed"):
        await asyncio.wait_for(task, SECONDS)
    run.log.close()
    return run


async def resumed(run_dir: Path, *overrides: str) -> FakeRun:
    """The same run, started again and played to its end."""
    run = fake_run(run_dir, *OVERRIDES, *overrides, state=newest(run_dir).state)
    uneven(run)
    await finish(run)
    return run


def uneven(run: FakeRun) -> None:
    """Some groups are unusable, some rewards differ; both depend on the ticket only, as with seeded engines."""
    run.fleet.outcomes = lambda group: [Outcome.ENV_ERROR if group % 5 == 1 else Outcome.OK] * 2
    run.fleet.rewards = lambda group: [float(group % 3), 1.0]


def newest(run_dir: Path) -> Checkpoint:
    checkpoint = find_checkpoint(small_config(f"run_dir={run_dir}"), print)
    assert checkpoint is not None
    return checkpoint


def work(run: FakeRun) -> list[tuple[list[int], Any]]:
    """[step] -> tickets and what the trainer was told to do with them."""
    return [
        ([group.id for group in groups], references(updates))
        for groups, updates in zip(run.trainer.groups, run.trainer.updates, strict=True)
    ]


def logged(run_dir: Path, kind: str, names: Sequence[str]) -> dict[int, list[Any]]:
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]
    return {record["step"]: [record.get(name) for name in names] for record in records}


# The loop


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("step", [3, 4, 5, 6])
async def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, step: int, mode: str) -> None:
    override = f"async.mode={mode}"
    whole = fake_run(tmp_path / "whole", *OVERRIDES, override)
    uneven(whole)
    await finish(whole)
    before = await killed(tmp_path / "run", step, override)
    done = newest(tmp_path / "run").step
    assert done == (step - 1) // 2 * 2
    after = await resumed(tmp_path / "run", override)
    assert work(before)[:done] + work(after) == work(whole)
    assert after.buffer.ledger.to_dict() == whole.buffer.ledger.to_dict()
    names = ["reward/mean", "optim/loss", "groups/errored", "sync/version"]
    if mode == "async":
        names.remove("groups/errored")  # which step reports a drop depends on timing
    assert logged(tmp_path / "run", "train", names) == logged(tmp_path / "whole", "train", names)


async def test_a_resumed_run_publishes_its_version_and_repeats_no_evaluation(tmp_path: Path) -> None:
    await killed(tmp_path, 5)
    run = await resumed(tmp_path)
    assert run.publisher.published == [4, 5, 6]
    assert {version for version, _ in run.fleet.evaluated} == {6}
    assert [step for step, _ in logged(tmp_path, "eval", []).items()] == [0, 2, 4, 6]


async def test_what_was_open_is_sampled_again_first_under_the_same_tickets(tmp_path: Path) -> None:
    await killed(tmp_path, 3, "async.max_lag=1", arrange=lambda run: None)
    ledger = newest(tmp_path).state.ledger
    still_open = sorted([*ledger["running"], *ledger["generated"]])
    assert still_open == [4, 5, 6, 7], "the places of steps 3 and 4, at version 2 with a lag of 1"
    again = fake_run(tmp_path, *OVERRIDES, "async.max_lag=1", state=newest(tmp_path).state)
    await finish(again)
    assert again.fleet.started == [4, 5, 6, 7, 8, 9, 10, 11]


async def test_counters_go_on(tmp_path: Path) -> None:
    await killed(tmp_path, 3, arrange=lambda run: run.trainer.skips.add(2))
    state = newest(tmp_path).state
    assert state.skipped_in_a_row == 1 and state.generated_tokens > 0
    assert state.ledger["dropped"] == {"not_finite": [2, 3]} and state.ledger["trained"] == {"1": [0, 1]}
    again = fake_run(tmp_path, *OVERRIDES, state=state)
    assert (again.start, again.skipped_in_a_row, again.generated_tokens) == (2, 1, state.generated_tokens)


# Saving


async def test_a_checkpoint_that_is_being_written_holds_up_no_step_but_the_next_checkpoint(tmp_path: Path) -> None:
    run = fake_run(tmp_path, *OVERRIDES)
    run.trainer.writing.close()
    task = asyncio.create_task(train(run))
    try:
        await until(lambda: run.trainer.done == 4)
        await settle()
        assert checkpoints_in(tmp_path / "checkpoints") == [] and run.trainer.done == 4
        run.trainer.writing.open()
        async with asyncio.timeout(SECONDS):
            await task
    finally:
        task.cancel()
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step_000006", "step_000004"]
    for path in checkpoints_in(tmp_path / "checkpoints"):
        assert (path / "trainer-0.json").read_text() == f"version {read_checkpoint(path).step}"


async def test_a_write_that_fails_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = fake_run(tmp_path, *OVERRIDES)

    async def fail_from_step_4(folder: str) -> None:
        if run.trainer.done >= 4:
            run.trainer.write_fails = EnvironmentProblem("trainer rank 0: No space left on device")
        await type(run.trainer).snapshot(run.trainer, folder)

    run.trainer.snapshot = fail_from_step_4  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem, match="No space left"):
        await finish(run)
    assert newest(tmp_path).step == 2


async def test_the_folder_that_cannot_be_made_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    run = fake_run(tmp_path, *OVERRIDES)
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(EnvironmentProblem, match=r"checkpoint of step 2 .*checkpoint\.every=0"):
        await finish(run)


async def test_the_last_step_is_saved_too_and_exports_have_their_own_interval(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "steps=5", "checkpoint.every=3", "checkpoint.export_every=2")
    await finish(run)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step_000005", "step_000003"]
    exports = {path.name: (path / "version").read_text() for path in (tmp_path / "exports").iterdir()}
    assert exports == {"step_000002": "2", "step_000004": "4"}
    held = logged(tmp_path, "run", ["checkpoint/held_s", "checkpoint/export_s"])
    assert {step: [value is not None for value in values] for step, values in held.items()} == {
        2: [False, True], 3: [True, False], 4: [False, True], 5: [True, False],
    }  # fmt: skip


async def test_the_best_by_a_metric_of_the_evaluation_is_kept(tmp_path: Path) -> None:
    best = ["checkpoint.keep_best=true", "checkpoint.keep_last=1", "checkpoint.best_metric=optim/loss"]
    run = fake_run(tmp_path, *OVERRIDES, *best)
    run.trainer.metrics = {4: {"optim/loss": 99.0}}
    await finish(run)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step_000006", "step_000004"]
    run = fake_run(tmp_path / "eval", *OVERRIDES, *best[:2], "checkpoint.best_metric=eval/fake/accuracy")
    said: list[str] = []
    run.saver.tell = said.append
    await finish(run)
    assert said == [] and len(checkpoints_in(tmp_path / "eval" / "checkpoints")) == 1  # all alike: the newest


async def test_a_run_that_is_asked_to_end_saves_after_the_step_in_hand(tmp_path: Path) -> None:
    run = fake_run(tmp_path, *OVERRIDES)
    gate = run.trainer.gates[3] = Gate()
    gate.close()
    task = asyncio.create_task(train(run))
    await until(lambda: gate.arrived == 1)
    run.ending.wished = True
    gate.open()
    async with asyncio.timeout(SECONDS):
        await task
    assert run.trainer.done == 3 and newest(tmp_path).step == 3


# The setting


def config(run_dir: Path | None, **keys: Any) -> Any:
    overrides = [] if run_dir is None else [f"run_dir={run_dir}"]
    return small_config(*OVERRIDES, *overrides, *(f"{key}={value}" for key, value in keys.items()))


def entered(config: Any) -> tuple[int | None, list[str]]:
    """The step that a run goes on from, and what is said."""
    said: list[str] = []
    _, checkpoint = train_run_dir(config, said.append)
    return (checkpoint.step if checkpoint else None), said


@pytest.fixture
async def run_dir(tmp_path: Path) -> Path:
    """Of a run that was killed in step 5, with checkpoints of steps 2 and 4."""
    await killed(tmp_path / "run", 5, f"run_dir={tmp_path / 'run'}")
    return tmp_path / "run"


async def test_auto_takes_the_newest_of_its_own_directory_and_says_so(run_dir: Path) -> None:
    step, said = entered(config(run_dir))
    assert step == 4
    assert said == [f"resuming from {run_dir / 'checkpoints' / 'step_000004'}: 4 steps are done"]


async def test_auto_is_a_fresh_run_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert entered(config(tmp_path / "new")) == (None, [])
    assert entered(config(None)) == (None, [])


async def test_settings_that_changed_are_named(run_dir: Path) -> None:
    changed = small_config(*OVERRIDES, f"run_dir={run_dir}", "trainer.lr=3.0e-05", "steps=9", "name=other")
    _, said = entered(changed)
    assert said[1:] == ["settings that changed since: steps: 6 -> 9; trainer.lr: 1e-06 -> 3e-05"]


async def test_another_model_is_refused_before_anything_is_written(run_dir: Path) -> None:
    before = (run_dir / "config.yaml").exists()
    with pytest.raises(ConfigError, match=r"model\.path=b/model, but .*step_000004 holds the weights of a/model"):
        entered(small_config(*OVERRIDES, f"run_dir={run_dir}", "model.path=b/model"))
    assert (run_dir / "config.yaml").exists() == before


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/step_000002"])
async def test_a_path_is_a_checkpoint_or_a_run_and_begins_a_run_of_its_own(
    run_dir: Path, tmp_path: Path, named: str
) -> None:
    step, said = entered(config(tmp_path / "new", resume=run_dir / named))
    assert step == (2 if "step" in named else 4) and "resuming from" in said[0]
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("resume", "words"),
    [("never", r"resume=auto goes on with it"), ("{run}", r"resume=auto goes on with it; to begin one from .*run, ch")],
)
async def test_a_directory_with_a_run_is_never_overwritten(run_dir: Path, resume: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"holds a run already; .*{words}"):
        entered(config(run_dir, resume=resume.format(run=run_dir)))


def test_a_run_that_has_no_checkpoint_yet_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no checkpoint to go on from; choose another run_dir, or move that one away"):
        entered(config(tmp_path))


def test_a_path_that_is_nothing_of_the_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run directory"):
        entered(config(tmp_path / "new", resume=tmp_path))


async def test_a_damaged_checkpoint_is_named_and_the_earlier_one_used(run_dir: Path) -> None:
    os.truncate(run_dir / "checkpoints" / "step_000004" / "driver.json", 10)
    step, said = entered(config(run_dir))
    assert step == 2
    assert "damaged checkpoint" in said[0] and "driver.json has 10 bytes" in said[0] and "step_000002" in said[1]
    os.truncate(run_dir / "checkpoints" / "step_000002" / "driver.json", 10)
    with pytest.raises(DataError, match=r"driver\.json has 10 bytes"):  # named itself, nothing takes its place
        entered(config(run_dir.parent / "new", resume=run_dir / "checkpoints" / "step_000002"))


def test_the_state_of_another_version_of_the_program_is_refused(tmp_path: Path) -> None:
    DriverState(3, {}, 1.5, wandb_id="ab").write(tmp_path)
    assert DriverState.read(tmp_path) == DriverState(3, {}, 1.5, wandb_id="ab")
    (tmp_path / "driver.json").write_text(json.dumps({"step": 3, "cursor": 8}))
    with pytest.raises(DataError, match="cursor"):
        DriverState.read(tmp_path)
