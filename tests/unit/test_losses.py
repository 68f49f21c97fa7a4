import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.losses import LOSSES, Loss, LossInputs, LossOutputs, denominator, policy_loss
from pipelinerl.config.schema import GSPO, AlgoConfig, PPOClip, ReinforceIS
from pipelinerl.types import RankBatch

PPO = PPOClip(clip_low=0.2, clip_high=0.28)
IS = ReinforceIS(max_ratio=2.0)
SEQUENCE = GSPO(clip_low=0.2, clip_high=0.28)
ALL = [PPO, IS, SEQUENCE]
LN = math.log

tokens = st.lists(
    st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-3, 3), st.booleans()), min_size=1, max_size=24
)
# a token's sequence (0 to 3, in any order), its two logprobs, and whether it was sampled
sequence_tokens = st.lists(
    st.tuples(st.integers(0, 3), st.floats(-3, 0), st.floats(-3, 0), st.booleans()), min_size=1, max_size=16
)
sequence_advantages = st.tuples(*[st.floats(-3, 3)] * 4)


def inputs(new, rollout, advantages, mask=None, sequence=None):
    """Without `sequence` every token is one of its own, so that what holds for tokens holds for sequences too."""
    mask = [True] * len(new) if mask is None else mask
    sequence = range(len(new)) if sequence is None else sequence
    return LossInputs(
        logprobs_new=torch.tensor(new, dtype=torch.float32, requires_grad=True),
        logprobs_rollout=torch.tensor(rollout, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        mask=torch.tensor(mask, dtype=torch.bool),
        sequence=torch.tensor(list(sequence), dtype=torch.int64),
    )


def columns(rows):
    return inputs(*(list(column) for column in zip(*rows, strict=True)))


def in_sequences(rows, advantages):
    """Inputs from rows of `sequence_tokens` and one advantage per sequence."""
    return columns([(new, old, advantages[i], kept, i) for i, new, old, kept in rows])


def evaluate(given_inputs, config):
    """Per-token loss, clipped, gradient of the sum, as lists."""
    outputs = policy_loss(given_inputs, config)
    (gradient,) = torch.autograd.grad(outputs.token_loss.sum(), given_inputs.logprobs_new)
    return outputs.token_loss.tolist(), outputs.clipped.tolist(), gradient.tolist()


def test_ppo_clip_by_hand():
    # rho = 1.5, 1.5, 0.5, 0.5, 1.1 and A = 2, -2, 2, -2, 2; bounds [0.8, 1.28]
    #   1.5,  2: min( 3.0,  2.56) -> -2.56, clipped, no gradient
    #   1.5, -2: min(-3.0, -2.56) ->  3.0, gradient -rho A = 3
    #   0.5,  2: min( 1.0,  1.6 ) -> -1.0, gradient -1
    #   0.5, -2: min(-1.0, -1.6 ) ->  1.6, clipped, no gradient
    #   1.1,  2: inside            -> -2.2, gradient -2.2
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [2, -2, 2, -2, 2]
    loss, clipped, gradient = evaluate(inputs([LN(r) - 1 for r in ratios], [-1] * 5, advantages), PPO)
    assert loss == pytest.approx([-2.56, 3.0, -1.0, 1.6, -2.2], rel=1e-5)
    assert clipped == [True, False, False, True, False]
    assert gradient == pytest.approx([0, 3.0, -1.0, 0, -2.2], rel=1e-5)


def test_reinforce_is_by_hand():
    # new = -1 everywhere; rho = 4, 4, 0.5, cap 2; A = 3, -3, 3
    #   loss -min(rho, 2) A * (-1) = 2*3 = 6, -6, 0.5*3 = 1.5; gradient -min(rho, 2) A = -6, 6, -1.5
    rollout = [-1 - LN(4), -1 - LN(4), -1 - LN(0.5)]
    loss, clipped, gradient = evaluate(inputs([-1, -1, -1], rollout, [3, -3, 3]), IS)
    assert loss == pytest.approx([6, -6, 1.5], rel=1e-5)
    assert clipped == [True, True, False]
    assert gradient == pytest.approx([-6, 6, -1.5], rel=1e-5)


@given(tokens)
def test_reinforce_is_gradient_is_the_closed_form(rows):
    _, _, gradient = evaluate(columns(rows), IS)
    expected = [-min(math.exp(new - old), 2.0) * a if kept else 0 for new, old, a, kept in rows]
    assert gradient == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(tokens)
def test_ppo_gradient_is_the_ratio_inside_and_zero_where_clipped(rows):
    _, clipped, gradient = evaluate(columns(rows), PPO)
    for (new, old, a, kept), is_clipped, slope in zip(rows, clipped, gradient, strict=True):
        ratio = math.exp(new - old)
        if min(abs(ratio - 0.8), abs(ratio - 1.28)) < 1e-4 or 0 < abs(a) < 1e-6:
            continue  # on the kink, or below what float32 can tell apart
        binds = kept and ((a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8))
        assert is_clipped == binds
        assert slope == pytest.approx(-ratio * a if kept and not binds else 0, rel=1e-4, abs=1e-5)


def test_gspo_by_hand():
    # A = 2: ratios 2, 0.5, 1.331, geometric mean s = 1.1, inside [0.8, 1.28]: loss -2.2, a third of it on each token
    # A = -2: one ratio, s = 1.5: min(-3, -2.56) -> 3
    # A = 1: ratios 2 and 0.98, s = 1.4: -1.28, clipped as a whole, although 0.98 alone is inside
    ratios, advantages, sequence = [2, 0.5, 1.331, 1.5, 2, 0.98], [2, 2, 2, -2, 1, 1], [0, 0, 0, 1, 2, 2]
    given_inputs = inputs([LN(r) - 1 for r in ratios], [-1] * 6, advantages, sequence=sequence)
    loss, clipped, gradient = evaluate(given_inputs, SEQUENCE)
    assert loss == pytest.approx([-2.2 / 3] * 3 + [3.0] + [-0.64] * 2, rel=1e-5)
    assert clipped == [False] * 4 + [True] * 2
    assert gradient == pytest.approx([-2.2 / 3] * 3 + [3.0, 0, 0], rel=1e-5)


def test_the_bounds_of_gspo_are_those_of_the_paper():
    # two tokens each, so s = exp(sum / 2): 1.0005 and 1.0003 with A = 1, 0.9996 and 0.9998 with A = -1
    sums = [2 * LN(s) for s in (1.0005, 1.0003, 0.9996, 0.9998)]
    rollout = [part for total in sums for part in (-0.25 - total, 0.25)]
    given_inputs = inputs([-0.25, 0.25] * 4, rollout, [1, 1, 1, 1, -1, -1, -1, -1], sequence=[0, 0, 1, 1, 2, 2, 3, 3])
    loss, clipped, _ = evaluate(given_inputs, GSPO())
    per_sequence = [loss[i] + loss[i + 1] for i in (0, 2, 4, 6)]
    assert per_sequence == pytest.approx([-1.0004, -1.0003, 0.9997, 0.9998], abs=1e-6)
    assert clipped == [True, True, False, False, True, True, False, False]


@given(sequence_tokens, sequence_advantages)
def test_gspo_gradient_is_the_sequence_ratio_over_the_length_and_zero_where_clipped(rows, advantages):
    loss, clipped, gradient = evaluate(in_sequences(rows, advantages), SEQUENCE)
    for index, a in enumerate(advantages):
        deltas = [new - old for i, new, old, kept in rows if i == index and kept]
        if not deltas:
            continue
        s, length = math.exp(sum(deltas) / len(deltas)), len(deltas)
        if min(abs(s - 0.8), abs(s - 1.28)) < 1e-4 or 0 < abs(a) < 1e-6:
            continue  # on the kink, or below what float32 can tell apart
        binds = (a > 0 and s > 1.28) or (a < 0 and s < 0.8)
        value = -min(s * a, min(max(s, 0.8), 1.28) * a)
        for (i, _, _, kept), term, is_clipped, slope in zip(rows, loss, clipped, gradient, strict=True):
            if i == index:
                assert is_clipped == (binds and kept)
                assert term == pytest.approx(value / length if kept else 0, rel=1e-4, abs=1e-5)
                assert slope == pytest.approx(-s * a / length if kept and not binds else 0, rel=1e-4, abs=1e-5)


@given(sequence_tokens, sequence_advantages)
def test_gspo_at_ratio_one_is_reinforce_averaged_within_each_sequence(rows, advantages):
    on_policy = [(i, new, new, kept) for i, new, _, kept in rows]
    _, clipped, gradient = evaluate(in_sequences(on_policy, advantages), GSPO())
    lengths = [sum(kept for i, _, _, kept in rows if i == index) for index in range(4)]
    expected = [-advantages[i] / lengths[i] if kept else 0 for i, _, _, kept in rows]
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not any(clipped)


@given(tokens)
def test_gspo_with_sequences_of_one_token_is_ppo(rows):
    for sequence_level, token_level in zip(
        evaluate(columns(rows), SEQUENCE), evaluate(columns(rows), PPO), strict=True
    ):
        assert sequence_level == pytest.approx(token_level, rel=1e-6, abs=1e-7)


@given(sequence_tokens, sequence_advantages, st.randoms(use_true_random=False))
def test_gspo_knows_neither_the_order_of_tokens_nor_the_names_of_sequences(rows, advantages, random):
    order, names = random.sample(range(len(rows)), len(rows)), random.sample(range(9), 4)
    moved_rows = [(names[i], *rest) for i, *rest in (rows[j] for j in order)]
    moved_advantages = {names[i]: a for i, a in enumerate(advantages)}
    loss, _, gradient = evaluate(in_sequences(rows, advantages), SEQUENCE)
    moved_loss, _, moved_gradient = evaluate(in_sequences(moved_rows, moved_advantages), SEQUENCE)
    assert moved_loss == pytest.approx([loss[j] for j in order], rel=1e-4, abs=1e-5)
    if not any(_near_a_bound(rows, index) for index in range(4)):
        assert moved_gradient == pytest.approx([gradient[j] for j in order], rel=1e-4, abs=1e-5)


def _near_a_bound(rows, index):
    deltas = [new - old for i, new, old, kept in rows if i == index and kept]
    s = math.exp(sum(deltas) / len(deltas)) if deltas else 1.0
    return min(abs(s - 0.8), abs(s - 1.28)) < 1e-4


def test_a_sequence_weighs_the_same_in_gspo_whatever_its_length():
    short, _, _ = evaluate(inputs([-1, -2], [-1.1, -2.05], [1, 1], sequence=[0, 0]), SEQUENCE)
    long, _, _ = evaluate(inputs([-1, -2] * 5, [-1.1, -2.05] * 5, [1] * 10, sequence=[0] * 10), SEQUENCE)
    assert sum(short) == pytest.approx(-math.exp(0.075), rel=1e-5) and sum(long) == pytest.approx(sum(short), rel=1e-5)


def test_a_non_finite_token_poisons_its_own_sequence_in_gspo_and_no_other():
    new = [-1, math.nan, -1, -1, -math.inf]
    mask = [True, True, True, True, False]  # the infinity is padding
    given_inputs = inputs(new, [-1] * 5, [1] * 5, mask, sequence=[0, 0, 1, 1, 1])
    loss, _, _ = evaluate(given_inputs, SEQUENCE)
    assert all(map(math.isnan, loss[:2])) and loss[2:] == [-0.5, -0.5, 0]


def test_a_sequence_without_sampled_tokens_adds_nothing_in_gspo():
    given_inputs = inputs([math.nan, -1, -2], [0, -1, -2], [7, 1, 1], [False, True, True], sequence=[3, 5, 5])
    assert evaluate(given_inputs, SEQUENCE) == ([0, -0.5, -0.5], [False] * 3, [0, -0.5, -0.5])


def test_extreme_tokens_of_a_sequence_average_out_before_the_clamp_in_gspo():
    # log-ratios 500 and -500 have mean 0: the clamp to +-20 is on the mean, as the exponential is
    loss, _, gradient = evaluate(inputs([0, -500], [-500, 0], [1, 1], sequence=[0, 0]), SEQUENCE)
    assert loss == gradient == [-0.5, -0.5]


@pytest.mark.parametrize(("config", "expected"), [(PPO, 33), (IS, 33), (SEQUENCE, 4)])
def test_a_step_is_a_mean_over_its_tokens_or_for_gspo_over_its_sequences(config, expected):
    assert denominator(RankBatch((), loss_tokens=33, samples=4), config) == expected


@given(tokens)
def test_all_objectives_are_the_policy_gradient_at_ratio_one(rows):
    on_policy = [(new, new, a, kept) for new, _, a, kept in rows]
    expected = [-a if kept else 0 for _, _, a, kept in rows]
    for config in ALL:
        _, clipped, gradient = evaluate(columns(on_policy), config)
        assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert not any(clipped)


@pytest.mark.parametrize("config", ALL)
def test_nothing_outside_the_mask_reaches_loss_or_gradient(config):
    bad = [math.nan, math.inf, -math.inf]
    clean = evaluate(inputs([-1.5], [-1], [2]), config)
    dirty = evaluate(inputs([-1.5, *bad], [-1, *bad], [2, *bad], [True, False, False, False]), config)
    assert dirty[0] == clean[0] + [0, 0, 0]
    assert dirty[1] == clean[1] + [False] * 3
    assert dirty[2] == clean[2] + [0, 0, 0]


@pytest.mark.parametrize("config", ALL)
def test_all_masked_is_a_zero_loss_with_a_zero_gradient(config):
    loss, clipped, gradient = evaluate(inputs([math.nan, -1], [0, -5], [1, 1], [False, False]), config)
    assert loss == gradient == [0, 0] and clipped == [False, False]


@pytest.mark.parametrize("config", ALL)
def test_no_tokens_at_all(config):
    assert evaluate(inputs([], [], []), config) == ([], [], [])


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize(
    "token", [(math.nan, -1, 1), (-math.inf, -1, 1), (-1, -math.inf, 1), (-1, math.nan, 1), (-1, -1, math.nan)]
)
def test_a_non_finite_sampled_token_is_visible_in_the_loss(config, token):
    (bad, good), _, _ = evaluate(columns([(*token, True), (-1, -1, 1, True)]), config)
    assert not math.isfinite(bad) and math.isfinite(good)


@pytest.mark.parametrize("config", ALL)
def test_extreme_ratios_stay_finite(config):
    # log-ratios of +-500 are clamped to +-20: exp(20) = 4.85e8
    loss, _, gradient = evaluate(inputs([0, -500, 0, -500], [-500, 0, -500, 0], [1, 1, -1, -1]), config)
    assert all(map(math.isfinite, loss + gradient))
    if config is not IS:
        assert loss[2] == pytest.approx(math.exp(20), rel=1e-4)


@given(tokens, st.randoms(use_true_random=False))
def test_order_and_padding_do_not_matter(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    padding = [(math.nan, -1.0, 5.0, False)] * 3
    for config in ALL:
        direct = evaluate(columns(rows), config)
        moved = evaluate(columns([rows[i] for i in order] + padding), config)
        for before, after in zip(direct, moved, strict=True):
            assert after[: len(rows)] == [before[i] for i in order]


def test_bfloat16_inputs_are_computed_on_in_float32():
    # both logprobs are exact in bfloat16, their difference -(1 + 2^-7) + 2^-13 is not
    new = torch.tensor([-(1 + 2.0**-7)], dtype=torch.bfloat16, requires_grad=True)
    rollout, advantage = torch.tensor([-(2.0**-13)]).bfloat16(), torch.tensor([1.0]).bfloat16()
    mask, sequence = torch.tensor([True]), torch.tensor([0])
    outputs = policy_loss(LossInputs(new, rollout, advantage, mask, sequence), PPOClip(clip_low=0.9))
    assert outputs.token_loss.dtype == torch.float32
    assert outputs.token_loss.item() == pytest.approx(-math.exp(-(1 + 2.0**-7) + 2.0**-13), rel=1e-6)
    outputs.token_loss.sum().backward()
    assert new.grad is not None and new.grad.dtype == torch.bfloat16


def test_the_mask_also_holds_for_a_loss_that_ignores_it(monkeypatch):
    def careless(given_inputs, config):
        ones = torch.ones_like(given_inputs.logprobs_new)
        return LossOutputs(ones, ones.bool())

    monkeypatch.setitem(LOSSES, "ppo_clip", Loss(careless, "tokens"))
    outputs = policy_loss(inputs([-1, -1], [-1, -1], [1, 1], [True, False]), PPO)
    assert outputs.token_loss.tolist() == [1, 0] and outputs.clipped.tolist() == [True, False]


def test_the_engine_side_carries_no_gradient():
    flat = inputs([-1], [-1.5], [2])
    rollout, advantages = flat.logprobs_rollout.requires_grad_(), flat.advantages.requires_grad_()
    for config in ALL:
        policy_loss(flat, config).token_loss.sum().backward()
    assert rollout.grad is None and advantages.grad is None


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="advantages"):
        inputs([-1, -1], [-1, -1], [1])


def test_every_kind_the_configuration_allows_has_a_loss():
    union = get_args(get_args(AlgoConfig)[0])
    assert {section.model_fields["kind"].default for section in union} == set(LOSSES)
