"""Checkpoints on disk: killed in mid-save, cut short, bits flipped; and which ones are kept."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelinerl.checkpoint import store as store_module
from pipelinerl.checkpoint.manifest import MANIFEST, secured, verify
from pipelinerl.checkpoint.store import CheckpointStore, checkpoints_in, newest_whole
from pipelinerl.errors import DataError


def save(folder: Path, step: int, metric: float | None = None, keep_last: int = 9, keep_best: bool = False) -> Path:
    """A checkpoint of two files."""
    store = CheckpointStore(folder, keep_last, keep_best)
    staged = store.stage(step)
    (staged / "weights").write_bytes(random.Random(step).randbytes(500))
    (staged / "state.json").write_text(f'{{"step": {step}}}')
    files = {name: secured(staged / name) for name in ("weights", "state.json")}
    return store.commit(staged, step, files, metric)


def found(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what was said."""
    said: list[str] = []
    return newest_whole(folder, said.append), said


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_the_newest_of_several_is_found_and_latest_names_it(tmp_path: Path) -> None:
    for step in (2, 10, 1_000_000):
        path = save(tmp_path, step)
        assert path.name == (tmp_path / "latest").read_text().strip()
        assert found(tmp_path) == (path, [])
    assert verify(path).step == 1_000_000
    assert names(tmp_path) == ["step_1000000", "step_000010", "step_000002"]


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert found(tmp_path) == (None, []) == found(tmp_path / "missing")


def remove(path: Path) -> None:
    (path / "weights").unlink()


def truncate(path: Path) -> None:
    os.truncate(path / "weights", 499)


def extend(path: Path) -> None:
    os.truncate(path / "weights", 501)


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncated_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 100)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (remove, "weights is missing"),
        (truncate, "weights has 499 bytes instead of 500"),
        (extend, "weights has 501 bytes instead of 500"),
        (no_manifest, "never finished"),
        (truncated_manifest, f"{MANIFEST} is damaged"),
    ],
)
def test_a_damaged_one_is_named_and_set_aside_and_the_one_before_is_used(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    older, damaged = save(tmp_path, 2), save(tmp_path, 4)
    harm(damaged)
    path, said = found(tmp_path)
    assert path == older
    [line] = said
    assert str(damaged) in line and words in line
    assert names(tmp_path) == ["step_000002"] and (tmp_path / "step_000004.damaged").is_dir()
    assert save(tmp_path, 4) == found(tmp_path)[0], "its place is free again"


def test_when_all_are_damaged_nothing_is_started_and_nothing_is_moved(tmp_path: Path) -> None:
    for step in (2, 4):
        truncate(save(tmp_path, step))
    with pytest.raises(DataError, match=r"all 2 checkpoint\(s\) are damaged"):
        found(tmp_path)
    assert names(tmp_path) == ["step_000004", "step_000002"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "step_000002"
    if not path.exists():
        save(tmp_path, 2, metric=0.5)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    with pytest.raises(DataError, match=file.name):
        verify(path)
    file.write_bytes(content)
    verify(path)


MOMENTS = ["mkdtemp", "weights", "write_manifest", "rename", "latest", "rmtree", "end"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, moment: str) -> None:
    """The third save, with two kept, is killed for real, in a process of its own."""
    first, second = save(tmp_path, 2), save(tmp_path, 4)
    child = os.fork()
    if child == 0:
        _die_at(moment)
        save(tmp_path, 6, keep_last=2)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    path, said = found(tmp_path)
    complete = moment in ("latest", "rmtree", "end")
    assert path == (tmp_path / "step_000006" if complete else second)
    assert verify(path).step == (6 if complete else 4)
    assert all("cut short" in line for line in said) and bool(said) == (
        moment in ("weights", "write_manifest", "rename")
    )
    again = save(tmp_path, 6, keep_last=2)
    assert found(tmp_path) == (again, []) and names(tmp_path) == ["step_000006", "step_000004"]
    assert not first.exists() and not list(tmp_path.glob("*.partial"))


def _die_at(moment: str) -> None:
    """In the child: SIGKILL in the place of a call that a save makes."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "mkdtemp":
        store_module.tempfile.mkdtemp = die  # type: ignore[assignment]
    elif moment == "weights":
        Path.write_bytes = die  # type: ignore[method-assign, assignment]
    elif moment == "write_manifest":
        store_module.write_manifest = die  # type: ignore[assignment]
    elif moment == "rename":
        Path.rename = die  # type: ignore[method-assign, assignment]
    elif moment == "latest":
        Path.replace = die  # type: ignore[method-assign, assignment]
    elif moment == "rmtree":
        store_module.shutil.rmtree = die  # type: ignore[assignment]


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_000005", "step_000004"]


def test_the_best_is_kept_too_and_replaced_by_a_better_or_equal_one(tmp_path: Path) -> None:
    kept = []
    for step, metric in enumerate([0.2, 0.9, 0.5, None, 0.3, 0.9, 0.1], start=1):
        save(tmp_path, step, metric, keep_last=1, keep_best=True)
        kept.append([int(name.removeprefix("step_")) for name in names(tmp_path)])
    assert kept == [[1], [2], [3, 2], [4, 2], [5, 2], [6], [7, 6]]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    first = save(tmp_path, 2)
    (first / "left").write_text("by the run before")
    assert save(tmp_path, 2) == first
    assert sorted(path.name for path in first.iterdir()) == [MANIFEST, "state.json", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]
