"""Which steps a replay does, with which settings, and what it calls different. The real thing is in e2e."""

import math
from pathlib import Path

import pytest

from pipelinerl.commands.replay import main
from pipelinerl.errors import ConfigError, DataError
from pipelinerl.metrics.journal import Journal
from pipelinerl.replay import difference, read_record
from pipelinerl.types import RankBatch, StepResult
from tests.unit.fakes import small_config

EMPTY = {"queued": [], "running": [], "generated": []}


def life(run_dir: Path, step: int, steps: range, *overrides: str, resumed_from: str | None = None) -> Journal:
    (run_dir / "batches").mkdir(exist_ok=True)
    journal = Journal(run_dir)
    journal.started(step, resumed_from, {"drawn": 0, **EMPTY}, small_config(*overrides).dump(), 2)
    for done in steps:
        train(journal, done)
    return journal


def train(journal: Journal, step: int) -> None:
    journal.batch(step, [], [[RankBatch(())]])
    journal.trained(step, StepResult(step, {"optim/loss": 1.0, "optim/grad_norm": 1.0}, True))


def test_a_run_is_replayed_from_its_start(tmp_path: Path) -> None:
    life(tmp_path, 0, range(1, 5))
    record = read_record(tmp_path)
    assert record.steps_to_replay(None, None) == [1, 2, 3, 4] and record.resumed_from is None
    assert record.steps_to_replay(3, None) == [1, 2, 3]
    assert record.steps_to_replay(None, 2) == [3, 4]
    assert record.config_of([1, 2, 3, 4]) == small_config()


def test_a_run_that_began_from_a_checkpoint_is_replayed_from_there(tmp_path: Path) -> None:
    life(tmp_path, 7, range(8, 10), resumed_from="/other/checkpoints/step_000007")
    record = read_record(tmp_path)
    assert record.steps_to_replay(None, None) == [8, 9]
    assert record.resumed_from == Path("/other/checkpoints/step_000007")


def test_a_step_whose_second_batch_was_not_trained_to_its_end_does_not_count(tmp_path: Path) -> None:
    """The first time's metrics are on file, and the second time's batch."""
    life(tmp_path, 0, range(1, 5))
    life(tmp_path, 2, range(3, 4)).batch(4, [], [[RankBatch(())]])
    record = read_record(tmp_path)
    assert record.steps_to_replay(None, None) == [1, 2, 3]
    with pytest.raises(DataError, match="recorded steps are 1 to 3, and step 4 is not among them"):
        record.steps_to_replay(4, None)
    with pytest.raises(DataError, match="none is after 3"):
        record.steps_to_replay(None, 3)


def test_after_a_restart_of_the_trainer_the_later_steps_count(tmp_path: Path) -> None:
    journal = life(tmp_path, 0, range(1, 4))
    journal.restarted("engine 0", "killed")
    assert read_record(tmp_path).steps_to_replay(None, None) == [1, 2, 3]
    journal.trainer_restarted("rank 1 died", 1, {"drawn": 0, **EMPTY})
    assert read_record(tmp_path).steps_to_replay(None, None) == [1]
    train(journal, 2)
    assert read_record(tmp_path).steps_to_replay(None, None) == [1, 2]


def test_settings_that_changed_in_between_are_named(tmp_path: Path) -> None:
    life(tmp_path, 0, range(1, 4))
    life(tmp_path, 3, range(4, 6), "trainer.lr=0.5", "metrics.plots=false")
    record = read_record(tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.lr changed .* before step 4.*--until=3.*--from-checkpoint=3"):
        record.config_of([1, 2, 3, 4])
    assert record.config_of([1, 2, 3]).trainer.lr == 1e-6 and record.config_of([4, 5]).trainer.lr == 0.5


def test_a_run_without_batches_cannot_be_replayed(tmp_path: Path) -> None:
    life(tmp_path, 0, range(1, 4))
    (tmp_path / "batches").rmdir()
    with pytest.raises(DataError, match=r"journal\.batches=false"):
        read_record(tmp_path)


LOGGED = {
    "kind": "train",
    "step": 3,
    "optim/loss": 0.25,
    "policy/k3": math.nan,
    "perf/train_s": 1.0,
    "reward/mean": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"perf/train_s": 2.0}, ""),
        ({"optim/loss": math.nextafter(0.25, 1)}, "optim/loss was 0.25, and is 0.25000000000000006 in the replay"),
        ({"policy/k3": 0.0}, "policy/k3 was nan, and is 0.0 in the replay"),
        ({"policy/new": 1.0}, "policy/new is not in metrics.jsonl, and is 1.0 in the replay"),
        (
            {"optim/loss": 1.0, "policy/k3": 1.0},
            "optim/loss was 0.25, and is 1.0 in the replay; 1 more of its 2 metrics differ",
        ),
    ],
)
def test_every_metric_of_the_trainer_is_compared_to_the_last_bit(changes: dict[str, float], expected: str) -> None:
    replayed = {"optim/loss": 0.25, "policy/k3": math.nan, "perf/train_s": 1.5} | changes
    assert difference(LOGGED, replayed) == expected


@pytest.mark.parametrize(("value", "same"), [(0.2525, True), (0.26, False), (math.nan, False), (math.inf, False)])
def test_a_tolerance_is_relative(value: float, same: bool) -> None:
    assert (difference(LOGGED, {"optim/loss": value}, 0.01) == "") is same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one run directory, not 0"),
        (["a", "b"], "one run directory, not 2"),
        (["run", "--until=last"], "--until=last"),
        (["run", "--tolerance=-1"], "--tolerance=-1"),
        (["run", "--untill=3"], "unknown option '--untill'"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_a_directory_without_a_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"journal\.jsonl"):
        main([str(tmp_path)])
    (tmp_path / "journal.jsonl").write_text("")
    (tmp_path / "batches").mkdir()
    with pytest.raises(DataError, match="recorded steps are none"):
        main([str(tmp_path)])
