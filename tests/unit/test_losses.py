import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.losses import LOSSES, LossInputs, LossOutputs, policy_loss
from pipelinerl.config.schema import AlgoConfig, PPOClip, ReinforceIS

PPO = PPOClip(clip_low=0.2, clip_high=0.28)
IS = ReinforceIS(max_ratio=2.0)
BOTH = [PPO, IS]
LN = math.log

tokens = st.lists(
    st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-3, 3), st.booleans()), min_size=1, max_size=24
)


def inputs(new, rollout, advantages, mask=None):
    mask = [True] * len(new) if mask is None else mask
    return LossInputs(
        logprobs_new=torch.tensor(new, dtype=torch.float32, requires_grad=True),
        logprobs_rollout=torch.tensor(rollout, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        mask=torch.tensor(mask, dtype=torch.bool),
        sequence=torch.zeros(len(new), dtype=torch.int64),
    )


def columns(rows):
    return inputs(*(list(column) for column in zip(*rows, strict=True)))


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


@given(tokens)
def test_all_objectives_are_the_policy_gradient_at_ratio_one(rows):
    on_policy = [(new, new, a, kept) for new, _, a, kept in rows]
    expected = [-a if kept else 0 for _, _, a, kept in rows]
    for config in BOTH:
        _, clipped, gradient = evaluate(columns(on_policy), config)
        assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert not any(clipped)


@pytest.mark.parametrize("config", BOTH)
def test_nothing_outside_the_mask_reaches_loss_or_gradient(config):
    bad = [math.nan, math.inf, -math.inf]
    clean = evaluate(inputs([-1.5], [-1], [2]), config)
    dirty = evaluate(inputs([-1.5, *bad], [-1, *bad], [2, *bad], [True, False, False, False]), config)
    assert dirty[0] == clean[0] + [0, 0, 0]
    assert dirty[1] == clean[1] + [False] * 3
    assert dirty[2] == clean[2] + [0, 0, 0]


@pytest.mark.parametrize("config", BOTH)
def test_all_masked_is_a_zero_loss_with_a_zero_gradient(config):
    loss, clipped, gradient = evaluate(inputs([math.nan, -1], [0, -5], [1, 1], [False, False]), config)
    assert loss == gradient == [0, 0] and clipped == [False, False]


@pytest.mark.parametrize("config", BOTH)
def test_no_tokens_at_all(config):
    assert evaluate(inputs([], [], []), config) == ([], [], [])


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    "token", [(math.nan, -1, 1), (-math.inf, -1, 1), (-1, -math.inf, 1), (-1, math.nan, 1), (-1, -1, math.nan)]
)
def test_a_non_finite_sampled_token_is_visible_in_the_loss(config, token):
    (bad, good), _, _ = evaluate(columns([(*token, True), (-1, -1, 1, True)]), config)
    assert not math.isfinite(bad) and math.isfinite(good)


@pytest.mark.parametrize("config", BOTH)
def test_extreme_ratios_stay_finite(config):
    # log-ratios of +-500 are clamped to +-20: exp(20) = 4.85e8
    loss, _, gradient = evaluate(inputs([0, -500, 0, -500], [-500, 0, -500, 0], [1, 1, -1, -1]), config)
    assert all(map(math.isfinite, loss + gradient))
    if config is PPO:
        assert loss[2] == pytest.approx(math.exp(20), rel=1e-4)


@given(tokens, st.randoms(use_true_random=False))
def test_order_and_padding_do_not_matter(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    padding = [(math.nan, -1.0, 5.0, False)] * 3
    for config in BOTH:
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

    monkeypatch.setitem(LOSSES, "ppo_clip", careless)
    outputs = policy_loss(inputs([-1, -1], [-1, -1], [1, 1], [True, False]), PPO)
    assert outputs.token_loss.tolist() == [1, 0] and outputs.clipped.tolist() == [True, False]


def test_the_engine_side_carries_no_gradient():
    flat = inputs([-1], [-1.5], [2])
    rollout, advantages = flat.logprobs_rollout.requires_grad_(), flat.advantages.requires_grad_()
    for config in BOTH:
        policy_loss(flat, config).token_loss.sum().backward()
    assert rollout.grad is None and advantages.grad is None


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="advantages"):
        inputs([-1, -1], [-1, -1], [1])


def test_every_kind_the_configuration_allows_has_a_loss():
    union = get_args(get_args(AlgoConfig)[0])
    assert {section.model_fields["kind"].default for section in union} == set(LOSSES)
