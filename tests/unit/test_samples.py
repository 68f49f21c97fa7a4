from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.batch.samples import PackedBatch, collate, dummy_sample, train_sample
from pipelinerl.types import Completion, Outcome, Rollout, TrainSample, Turn, VersionSpan


def turn(context, tokens, logprobs, spans):
    return Turn(
        np.array(context, np.int32),
        Completion(
            np.array(tokens, np.int32),
            np.array(logprobs, np.float32),
            tuple(VersionSpan(*span) for span in spans),
            "stop",
            "",
        ),
    )


def rollout(*turns):
    return Rollout(turns, 1.0, Outcome.OK)


FIRST = rollout(turn([11, 12], [21, 22], [-0.1, -0.2], [(4, 0, 1), (5, 1, 2)]))
SECOND = rollout(turn([13], [23], [-0.3], [(5, 0, 1)]))


@st.composite
def samples(draw):
    """A sample whose token ids, logprobs and versions all differ from token to token."""
    length = draw(st.integers(1, 6))
    mask = np.array([False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))])
    start = draw(st.integers(1, 1000))
    steps = np.arange(start, start + length)
    return TrainSample(
        tokens=steps.astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -steps / 1024, 0).astype(np.float32),
        versions=np.where(mask, steps, -1).astype(np.int32),
        advantage=draw(st.floats(-2, 2, width=32)),
        weight=draw(st.floats(0.0, 2.0, width=32)),
    )


def test_sample_of_one_turn():
    sample = train_sample(FIRST, 0.5)
    assert sample.tokens.tolist() == [11, 12, 21, 22]
    assert sample.loss_mask.tolist() == [False, False, True, True]
    assert sample.logprobs == pytest.approx([0, 0, -0.1, -0.2])
    assert sample.versions.tolist() == [-1, -1, 4, 5]
    assert sample.advantage == 0.5


def test_only_sampled_tokens_of_each_turn_are_in_the_loss():
    # prompt 1 2 | sampled 3 | tool output 4 5 | sampled 6 7, an update landing between 6 and 7
    sample = train_sample(
        rollout(turn([1, 2], [3], [-0.5], [(7, 0, 1)]), turn([4, 5], [6, 7], [-0.6, -0.7], [(7, 0, 1), (8, 1, 2)])), 1.0
    )
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sample.loss_mask.tolist() == [False, False, True, False, False, True, True]
    assert sample.logprobs == pytest.approx([0, 0, -0.5, 0, 0, -0.6, -0.7])
    assert sample.versions.tolist() == [-1, -1, 7, -1, -1, 7, 8]


def test_an_empty_completion_adds_no_loss():
    sample = train_sample(rollout(turn([1, 2], [], [], [])), 1.0)
    assert sample.tokens.tolist() == [1, 2] and not sample.loss_mask.any()


def test_a_rollout_without_a_prompt_is_refused():
    with pytest.raises(AssertionError, match="before the first sampled token"):
        train_sample(rollout(turn([], [1], [-0.1], [(0, 0, 1)])), 1.0)


def test_packed_row_by_hand():
    # the example of the module's documentation
    row = collate([train_sample(FIRST, 0.5, 1 / 3), train_sample(SECOND, -1.0, 1 / 3)])
    assert row.input_ids.tolist() == [11, 12, 21, 22, 13, 23]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 4, 6]
    assert row.target_ids.tolist() == [12, 21, 22, 0, 23, 0]
    assert row.loss_mask.tolist() == [False, True, True, False, True, False]
    assert row.logprobs == pytest.approx([0, -0.1, -0.2, 0, -0.3, 0])
    assert row.versions.tolist() == [-1, 4, 5, -1, 5, -1]
    assert row.advantages.tolist() == [0, 0.5, 0.5, 0, -1, 0]
    assert row.weights == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3, 0])
    assert row.sequence.tolist() == [0, 0, 0, 0, 1, 1]


def test_dtypes_are_what_torch_indexes_and_gathers_with():
    row = collate([train_sample(FIRST, 0.5)])
    assert {name: str(getattr(row, name).dtype) for name in row.__slots__} == {
        "input_ids": "int64",
        "position_ids": "int64",
        "cu_seqlens": "int32",
        "target_ids": "int64",
        "loss_mask": "bool",
        "logprobs": "float32",
        "versions": "int32",
        "advantages": "float32",
        "weights": "float32",
        "sequence": "int64",
    }


def test_a_dummy_is_one_token_without_loss():
    row = collate([dummy_sample()])
    assert row.input_ids.tolist() == [0] and row.cu_seqlens.tolist() == [0, 1]
    assert not row.loss_mask.any() and row.versions.tolist() == [-1]


def test_an_empty_micro_batch_is_refused():
    with pytest.raises(AssertionError, match="dummy_sample"):
        collate([])


@given(st.lists(samples(), min_size=1, max_size=5))
def test_every_sampled_token_is_predicted_once_from_the_position_before_it(batch):
    row = collate(batch)
    for index, sample in enumerate(batch):
        start, end = row.cu_seqlens[index : index + 2]
        assert row.input_ids[start:end].tolist() == sample.tokens.tolist()
        assert (row.sequence[start:end] == index).all()
        assert not row.loss_mask[end - 1]
        for t in np.flatnonzero(sample.loss_mask):
            position = start + t - 1
            assert row.loss_mask[position] and row.target_ids[position] == sample.tokens[t]
            assert row.logprobs[position] == sample.logprobs[t] and row.versions[position] == sample.versions[t]
            assert row.advantages[position] == np.float32(sample.advantage)
            assert row.weights[position] == np.float32(sample.weight)
    assert row.loss_mask.sum() == sum(sample.loss_mask.sum() for sample in batch)
    for outside in (row.advantages, row.weights, row.logprobs):
        assert not outside[~row.loss_mask].any()


@given(st.lists(samples(), min_size=1, max_size=4), st.lists(samples(), min_size=1, max_size=4))
def test_packing_together_is_packing_apart_side_by_side(first, second):
    whole, left, right = collate(first + second), collate(first), collate(second)
    for field in fields(PackedBatch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name == "cu_seqlens":
            b = b[1:] + len(left.input_ids)
        if field.name == "sequence":
            b = b + len(first)
        assert getattr(whole, field.name).tolist() == a.tolist() + b.tolist(), field.name
