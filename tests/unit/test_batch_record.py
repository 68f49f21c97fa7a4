"""Recorded batches come back to the last bit, and a disk that is full is named."""

import threading
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.batch import record
from pipelinerl.batch.record import RecordedBatch, batch_path, read_batch, write_batch
from pipelinerl.errors import DataError, EnvironmentProblem
from pipelinerl.trainer.recorder import BatchRecorder
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan

any_float = st.floats(width=64)
small = st.integers(0, 4)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    counts = draw(st.lists(st.integers(1, 4), max_size=3))
    starts = [*accumulate(counts, initial=0)]
    spans = tuple(VersionSpan(version, a, b) for version, (a, b) in enumerate(pairwise(starts)))
    logprobs = draw(st.lists(st.floats(width=32), min_size=starts[-1], max_size=starts[-1]))
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=starts[-1], max_size=starts[-1]))
    anew = tuple(start for start in starts[1:-1] if draw(st.booleans()))
    return Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), spans, "stop", "a text", kv_from=anew)


turns = st.builds(Turn, st.lists(small, min_size=1, max_size=4).map(lambda v: np.array(v, np.int32)), completions())
rollouts = st.builds(
    Rollout,
    st.lists(turns, max_size=3).map(tuple),
    any_float,
    st.sampled_from(Outcome),
    st.dictionaries(st.text(max_size=3), any_float, max_size=2),
    st.just("the prompt"),
    st.text(max_size=5),
)
groups = st.builds(RolloutGroup, small, st.text(max_size=5), st.lists(rollouts, max_size=3).map(tuple))
refs = st.builds(SampleRef, small, small, any_float, small, any_float)
rank_batches = st.builds(
    RankBatch, st.lists(st.lists(refs, max_size=3).map(tuple), max_size=3).map(tuple), st.floats(0, 1)
)


def same(a: object, b: object) -> bool:
    """To the bit, nan included; arrays by type too."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float) and isinstance(b, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or (a != a and b != b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        names = a.__dataclass_fields__
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    return a == b


def without_texts(group: RolloutGroup) -> RolloutGroup:
    def bare(turn: Turn) -> Turn:
        return replace(turn, completion=replace(turn.completion, text=""))

    kept = (replace(r, prompt_text="", turns=tuple(map(bare, r.turns))) for r in group.rollouts)
    return replace(group, rollouts=tuple(kept))


@given(st.lists(rank_batches, min_size=1, max_size=2), st.lists(groups, max_size=3))
@settings(max_examples=60, deadline=None)
def test_it_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, updates: list[RankBatch], given_groups: list[RolloutGroup]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    batch = RecordedBatch(12, 1, tuple(updates), tuple(given_groups))
    path = write_batch(folder, batch)
    assert path.name == "step_000012.rank_1.npz"
    expected = replace(batch, groups=tuple(map(without_texts, batch.groups)))
    assert same(read_batch(folder, 12, 1), expected)


def a_batch(tokens: int = 5) -> RecordedBatch:
    logprobs = np.linspace(-1, 0, tokens, dtype=np.float32)
    completion = Completion(np.arange(tokens, dtype=np.int32), logprobs, (VersionSpan(0, 0, tokens),), "stop", "")
    rollout = Rollout((Turn(np.array([7, 8], np.int32), completion),), 1.0, Outcome.OK)
    ref = SampleRef(0, 0, 1 / 3, tokens + 2, 1e-17)
    return RecordedBatch(3, 0, (RankBatch(((ref,), ())),), (RolloutGroup(0, "train/0", (rollout,)),))


def test_numpy_reads_it_without_us(tmp_path: Path) -> None:
    path = write_batch(tmp_path, a_batch())
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["tokens"].tolist() == [7, 8, 0, 1, 2, 3, 4]
        assert arrays["shares"].tolist() == [[1 / 3, 1e-17]]


def test_it_takes_4_bytes_a_token_and_4_more_a_sampled_one(tmp_path: Path) -> None:
    sizes = [write_batch(tmp_path, a_batch(tokens)).stat().st_size for tokens in (1000, 2000)]
    assert sizes[1] - sizes[0] == pytest.approx(8 * 1000, abs=20)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step_000003\.rank_0\.npz is not there"):
        read_batch(tmp_path, 3, 0)
    path = write_batch(tmp_path, a_batch())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"step_000003\.rank_0\.npz cannot be read"):
        read_batch(tmp_path, 3, 0)


# The recorder


def record_step(recorder: BatchRecorder, step: int = 3) -> None:
    batch = a_batch()
    recorder.begin(step, batch.updates, batch.groups)


def test_a_step_is_not_held_up_by_its_own_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, done = threading.Event(), []

    def slow(folder: Path, batch: RecordedBatch) -> Path:
        assert gate.wait(5)
        done.append(batch.step)
        return write_batch(folder, batch)

    monkeypatch.setattr("pipelinerl.trainer.recorder.write_batch", slow)
    recorder = BatchRecorder(tmp_path / "new" / "batches", 0)
    record_step(recorder, 3)
    assert done == []
    gate.set()
    record_step(recorder, 4)  # waits for the one before it
    recorder.finish()
    assert done == [3, 4] and read_batch(tmp_path / "new" / "batches", 4, 0).step == 4


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_a_full_disk(file: object, **arrays: object) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    monkeypatch.setattr(record.np, "savez", to_a_full_disk)
    recorder = BatchRecorder(tmp_path, 0)
    record_step(recorder)
    message = (
        r"cannot write .*step_000003\.rank_0\.npz: No space left on device; make room, or set journal\.batches=false"
    )
    for call in (recorder.finish, lambda: record_step(recorder, 4), recorder.finish):
        with pytest.raises(EnvironmentProblem, match=message):
            call()
    assert not batch_path(tmp_path, 3, 0).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"file/batches cannot be made"):
        BatchRecorder(tmp_path / "file" / "batches", 0)
