"""Token weights against values worked out by hand: what the loss of an update is a mean over."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.aggregation import denominator_of, token_weights
from pipelinerl.config.schema import CISPO, GSPO, Aggregation, GSPOToken, PPOClip

AGGREGATIONS = get_args(Aggregation)
# Three completions of 1, 3 and 4 tokens; the first two answer one prompt. The limit is 10 tokens.
LENGTHS, GROUPS, LIMIT = [1, 3, 4], [5, 5, 2], 10


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 8, 1 / 8, 1 / 8]),
        ("seq_mean_token_mean", [1 / 3, 1 / 9, 1 / 12]),  # 1/3 of a mean over 1, 3, 4 tokens
        ("seq_mean_token_sum", [1 / 3, 1 / 3, 1 / 3]),
        ("constant", [1 / 30, 1 / 30, 1 / 30]),  # 3 completions times 10 tokens
        ("prompt_mean", [1 / 8, 1 / 8, 1 / 8]),  # half of a mean over 4 tokens, twice
    ],
)
def test_three_completions_by_hand(aggregation, expected):
    assert token_weights(LENGTHS, GROUPS, aggregation, LIMIT).tolist() == pytest.approx(expected)


def test_prompts_count_alike_whatever_they_are_answered_with():
    # 2 prompts; 6 tokens of the one, 2 of the other
    assert token_weights([2, 4, 2], [0, 0, 1], "prompt_mean", LIMIT).tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 4])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_loss_of_one_everywhere_has_the_mean_the_name_says(aggregation):
    """Sum of weight times the sample's summed loss, against the mean spelled out token by token."""
    losses = [[1.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    tokens = [loss for sample in losses for loss in sample]
    spelled_out = {
        "token_mean": np.mean(tokens),
        "seq_mean_token_mean": np.mean([np.mean(sample) for sample in losses]),
        "seq_mean_token_sum": np.mean([np.sum(sample) for sample in losses]),
        "constant": np.sum(tokens) / (3 * LIMIT),
        "prompt_mean": np.mean([np.mean(tokens[:4]), np.mean(tokens[4:])]),
    }
    weights = token_weights(LENGTHS, GROUPS, aggregation, LIMIT)
    total = sum(weight * sum(sample) for weight, sample in zip(weights, losses, strict=True))
    assert total == pytest.approx(spelled_out[aggregation])


@given(st.data(), st.sampled_from(AGGREGATIONS))
def test_a_denominator_of_parts_is_the_sum_of_theirs_and_scales_the_weights_to_those_of_the_whole(data, aggregation):
    """What a step that trains on its groups as they arrive rests on; the parts share no group."""
    of_group = st.lists(st.integers(0, 50), min_size=1, max_size=5)
    parts = data.draw(st.lists(st.lists(of_group, min_size=1, max_size=4), min_size=1, max_size=4))
    numbered = [[(f"{p}/{g}", n) for g, group in enumerate(part) for n in group] for p, part in enumerate(parts)]

    def arguments(samples):
        return [n for _, n in samples], [group for group, _ in samples], aggregation

    whole = [sample for part in numbered for sample in part]
    denominator = denominator_of(*arguments(whole))
    assert denominator == sum(denominator_of(*arguments(part)) for part in numbered)
    weights = np.concatenate([token_weights(*arguments(part), LIMIT, 7.0) for part in numbered])
    assert weights * 7.0 / max(denominator, 1) == pytest.approx(token_weights(*arguments(whole), LIMIT), rel=1e-12)


samples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=20)


@given(samples, st.sampled_from(["token_mean", "seq_mean_token_mean", "prompt_mean"]))
def test_the_weights_of_all_tokens_of_a_mean_sum_to_one(batch, aggregation):
    lengths, groups = [length for length, _ in batch], [group for _, group in batch]
    assert np.dot(token_weights(lengths, groups, aggregation, LIMIT), lengths) == pytest.approx(1)


@given(samples, st.sampled_from(AGGREGATIONS), st.randoms(use_true_random=False))
def test_order_and_numbering_do_not_matter(batch, aggregation, random):
    order = random.sample(range(len(batch)), len(batch))
    names = random.sample(range(100, 200), 6)
    direct = token_weights([n for n, _ in batch], [g for _, g in batch], aggregation, LIMIT)
    moved = token_weights([batch[i][0] for i in order], [names[batch[i][1]] for i in order], aggregation, LIMIT)
    assert moved == pytest.approx(direct[order])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_completions_without_tokens_divide_nothing_by_zero(aggregation):
    # an empty completion beside one of 4 tokens counts as a completion and as a prompt
    weights = token_weights([0, 4], [0, 1], aggregation, LIMIT)
    expected = {"token_mean": 1 / 4, "seq_mean_token_mean": 1 / 8, "seq_mean_token_sum": 1 / 2, "constant": 1 / 20}
    assert weights[1] == pytest.approx(expected.get(aggregation, 1 / 8))
    assert np.isfinite(weights).all()
    assert np.isfinite(token_weights([0, 0], [0, 0], aggregation, LIMIT)).all()


def test_an_objective_is_averaged_as_it_was_published_unless_said_otherwise():
    assert [algo.mean_over for algo in (PPOClip(), CISPO(), GSPO(), GSPOToken())] == [
        "token_mean", "token_mean", "seq_mean_token_mean", "seq_mean_token_mean"
    ]  # fmt: skip
    assert GSPO(aggregation="token_mean").mean_over == "token_mean"
