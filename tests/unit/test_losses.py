"""Each objective against numbers worked out by hand, and its gradient against the closed form."""

import math

import pytest
import torch
from hypothesis import given, settings

from pipelinerl.algo.losses import policy_loss
from pipelinerl.config.schema import (
    CISPO,
    DPPOTV,
    GSPO,
    SAPO,
    TOPR,
    DualClip,
    GSPOToken,
    PPOClip,
    ReinforceIS,
    TwoSided,
)
from tests.unit.loss_inputs import ALL, advantages, evaluate, from_rows, inputs, rows

LN = math.log
PPO = PPOClip(clip_low=0.2, clip_high=0.28)
SEQUENCE = GSPO(clip_low=0.2, clip_high=0.28)


def at(ratios, given_advantages, sequence=None):
    """Tokens with logprob -1 and these ratios to the proximal policy; the ratio to the engine is another one, 7."""
    return inputs([-1] * len(ratios), [-1 - LN(r) for r in ratios], [-1 - LN(7)] * len(ratios), given_advantages,
                  sequence=sequence)  # fmt: skip


def at_engine(ratios, given_advantages, sequence=None):
    """Tokens with logprob -1 and these ratios to the engine; the ratio to the proximal policy is another one, 7."""
    return inputs([-1] * len(ratios), [-1 - LN(7)] * len(ratios), [-1 - LN(r) for r in ratios], given_advantages,
                  sequence=sequence)  # fmt: skip


def check(found, loss, clipped, gradient):
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[1] == clipped
    assert found[2] == pytest.approx(gradient, rel=1e-5)


def test_ppo_clip_by_hand():
    # bounds [0.8, 1.28]
    #   1.5,  2: min( 3.0,  2.56) -> -2.56, clipped above, no gradient
    #   1.5, -2: min(-3.0, -2.56) ->  3.0, gradient -r A = 3
    #   0.5,  2: min( 1.0,  1.6 ) -> -1.0, gradient -1
    #   0.5, -2: min(-1.0, -1.6 ) ->  1.6, clipped below, no gradient
    #   1.1,  2: inside            -> -2.2, gradient -2.2
    found = evaluate(at([1.5, 1.5, 0.5, 0.5, 1.1], [2, -2, 2, -2, 2]), PPO)
    check(found, [-2.56, 3.0, -1.0, 1.6, -2.2], [1, 0, 0, -1, 0], [0, 3.0, -1.0, 0, -2.2])


def test_the_bounds_of_ppo_clip_are_separate():
    # [0.9, 1.5]: 1.4 is inside, 0.85 is not
    found = evaluate(at([1.4, 0.85], [1, -1]), PPOClip(clip_low=0.1, clip_high=0.5))
    check(found, [-1.4, 0.9], [0, -1], [-1.4, 0])


def test_dual_clip_by_hand():
    #   5, -2: PPO says 10, which 3 * 2 bounds: 6, clipped above, no gradient
    #   5,  2: PPO's own bound, -2.56
    #   2, -2: -r A = 4, free
    #   0.5, -2: PPO's own bound, 1.6
    found = evaluate(at([5, 5, 2, 0.5], [-2, 2, -2, -2]), DualClip(clip_low=0.2, clip_high=0.28, bound=3.0))
    check(found, [6, -2.56, 4, 1.6], [1, 1, 0, -1], [0, 0, 4, 0])


def test_the_second_bound_of_dual_clip_is_for_negative_advantages_only():
    found = evaluate(at([1.3, 1.3], [1, -1]), DualClip(clip_low=0.2, clip_high=0.5, bound=1.1))
    check(found, [-1.3, 1.1], [0, 1], [-1.3, 0])


def test_two_sided_by_hand():
    #   5, -2: r counts as 4: 8, clipped above, no gradient
    #   3, -2: -r A = 6, free
    #   5,  2: PPO's own bound, -2.56
    #   0.5, -2: PPO's own bound, 1.6
    config = TwoSided(clip_low=0.2, clip_high=0.28, max_ratio=4.0)
    found = evaluate(at([5, 3, 5, 0.5], [-2, -2, 2, -2]), config)
    check(found, [8, 6, -2.56, 1.6], [1, 0, 1, -1], [0, 6, 0, 0])


@pytest.mark.parametrize("config", [SEQUENCE, GSPOToken(clip_low=0.2, clip_high=0.28)])
def test_both_forms_of_gspo_by_hand(config):
    # A = 2: ratios 2, 0.5, 1.331, geometric mean s = 1.1, inside [0.8, 1.28]: -2.2 on each token
    # A = -2: one ratio, s = 1.5: min(-3, -2.56) -> 3
    # A = 1: ratios 2 and 0.98, s = 1.4: -1.28, clipped as a whole, although 0.98 alone is inside
    # A = -1: ratios 0.5 and 0.98, s = 0.7: 0.8, clipped below
    given_inputs = at(
        [2, 0.5, 1.331, 1.5, 2, 0.98, 0.5, 0.98], [2, 2, 2, -2, 1, 1, -1, -1], sequence=[0, 0, 0, 1, 2, 2, 3, 3]
    )
    loss, clipped = [-2.2] * 3 + [3.0] + [-1.28] * 2 + [0.8] * 2, [0] * 4 + [1] * 2 + [-1] * 2
    check(evaluate(given_inputs, config), loss, clipped, [-2.2] * 3 + [3.0, 0, 0, 0, 0])


def test_gspo_shares_a_tokens_gradient_with_its_sequence_and_gspo_token_does_not():
    # s = sqrt(1.21) = 1.1: the loss of the first token alone, -s A, moves both tokens by half of it, or itself by all
    for config, expected in ((SEQUENCE, [-1.1, -1.1]), (GSPOToken(clip_low=0.2, clip_high=0.28), [-2.2, 0])):
        given_inputs = at([1.21, 1], [2, 2], sequence=[0, 0])
        first = policy_loss(given_inputs, config).token_loss[0]
        (gradient,) = torch.autograd.grad(first, given_inputs.logprobs_new)
        assert gradient.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_bounds_of_gspo_are_those_of_the_paper():
    # two tokens each, s = 1.0005 and 1.0003 with A = 1, 0.9996 and 0.9998 with A = -1
    sums = [2 * LN(s) for s in (1.0005, 1.0003, 0.9996, 0.9998)]
    old = [part for total in sums for part in (-0.25 - total, 0.25)]
    given_advantages = [1, 1, 1, 1, -1, -1, -1, -1]
    given_inputs = inputs([-0.25, 0.25] * 4, old, [0] * 8, given_advantages, sequence=[0, 0, 1, 1, 2, 2, 3, 3])
    loss, clipped, _ = evaluate(given_inputs, GSPO())
    assert loss[::2] == pytest.approx([-1.0004, -1.0003, 0.9997, 0.9998], abs=1e-6)
    assert clipped == [1, 1, 0, 0, -1, -1, 0, 0]


def test_extreme_tokens_of_a_sequence_average_out_before_the_clamp_in_gspo():
    # log-ratios 500 and -500 have mean 0: the clamp to +-20 is on the mean, as the exponential is
    loss, _, gradient = evaluate(inputs([0, -500], [-500, 0], [0, 0], [1, 1], sequence=[0, 0]), SEQUENCE)
    assert loss == gradient == [-1, -1]


def test_sapo_by_hand():
    # tau (r - 1) = ln 3, where sigmoid is 3/4, or -ln 3, where it is 1/4; the gate's slope is 4 * 3/16 = 3/4 at both
    #   tau 1, A =  2, r = 1 + ln 3:     gate 4 * 3/4 = 3,   loss -6, gradient -r 3/4 A
    #   tau 2, A = -2, r = 1 + ln(3)/2:  gate 2 * 3/4 = 1.5, loss  3
    #   tau 2, A = -2, r = 1 - ln(3)/2:  gate 2 * 1/4 = 0.5, loss  1
    ratios = [1 + LN(3), 1 + LN(3) / 2, 1 - LN(3) / 2]
    found = evaluate(at(ratios, [2, -2, -2]), SAPO(tau_positive=1.0, tau_negative=2.0))
    check(found, [-6, 3, 1], [0, 0, 0], [-1.5 * ratios[0], 1.5 * ratios[1], 1.5 * ratios[2]])


def test_reinforce_is_by_hand():
    # log pi = -1, cap 2, so the loss is min(rho, 2) A: 2 * 3, 2 * -3, 0.5 * 3, and the gradient minus that
    found = evaluate(at_engine([4, 4, 0.5], [3, -3, 3]), ReinforceIS(max_ratio=2.0))
    check(found, [6, -6, 1.5], [1, 1, 0], [-6, 6, -1.5])


def test_cispo_by_hand():
    # log pi = -1, so the loss is clip(rho, 0.5, 5) A: 5 * 3, 5 * -3, 0.5 * 2, 2 * -2, and the gradient minus that
    found = evaluate(at_engine([8, 8, 0.25, 2], [3, -3, 2, -2]), CISPO(min_ratio=0.5, max_ratio=5.0))
    check(found, [15, -15, 1, -4], [1, 1, -1, 0], [-15, 15, -1, 4])


def test_topr_by_hand():
    # log pi = -1, so the loss is weight * A and the gradient minus that
    # A = 2: weight 1 whatever the ratios; A = -2: the sequences' ratios are 0.5 * 0.5 = 0.25, and 4 * 0.5 = 2 -> 1
    found = evaluate(at_engine([4, 0.1, 0.5, 0.5, 4, 0.5], [2, 2, -2, -2, -2, -2], [0, 0, 1, 1, 2, 2]), TOPR())
    check(found, [2, 2, -0.5, -0.5, -2, -2], [0, 0, 0, 0, 1, 1], [-2, -2, 0.5, 0.5, 2, 2])


@pytest.mark.parametrize("squared", [0.0, 0.1])
def test_dppo_tv_by_hand(squared):
    # pi = 0.5; mu = 0.25, 0.25, 0.4, 0.8, 0.8 and rho = 2, 2, 1.25, 0.625, 0.625; A = 1, -1, 1, -1, 1
    # the probability rose by 0.25 and A > 0: no loss; it fell by 0.3 and A < 0: no loss; elsewhere -rho A
    mu, ratios = [0.25, 0.25, 0.4, 0.8, 0.8], [2, 2, 1.25, 0.625, 0.625]
    given_inputs = inputs([LN(0.5)] * 5, [0] * 5, [LN(p) for p in mu], [1, -1, 1, -1, 1])
    found = evaluate(given_inputs, DPPOTV(max_rise=0.2, max_fall=0.2, squared_log_ratio=squared))
    loss = [a + squared * LN(r) ** 2 for a, r in zip([0, 2, -1.25, 0, -0.625], ratios, strict=True)]
    gradient = [a + 2 * squared * LN(r) for a, r in zip([0, 2, -1.25, 0, -0.625], ratios, strict=True)]
    check(found, loss, [1, 0, 0, -1, 0], gradient)


def test_the_bounds_of_dppo_tv_are_separate():
    # pi = 0.5, mu = 0.4 and 0.6: risen and fallen by 0.1
    given_inputs = inputs([LN(0.5)] * 2, [0] * 2, [LN(0.4), LN(0.6)], [1, -1])
    assert evaluate(given_inputs, DPPOTV(max_rise=0.05, max_fall=0.2))[1] == [1, 0]
    assert evaluate(given_inputs, DPPOTV(max_rise=0.2, max_fall=0.05))[1] == [0, -1]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
@settings(max_examples=40)
@given(rows, advantages)
def test_the_gradient_is_the_closed_form(config, given_rows, given_advantages):
    """Of the sum over all tokens it is -(factor of the token) * A, for a factor that each paper gives."""
    _, clipped, gradient = evaluate(from_rows(given_rows, given_advantages), config)
    for (i, new, old, mu, kept), side, slope in zip(given_rows, clipped, gradient, strict=True):
        if not kept:
            assert (side, slope) == (0, 0)
            continue
        own = [(a - b, a - c) for j, a, b, c, sampled in given_rows if j == i and sampled]
        advantage = given_advantages[i]
        ratios = {
            "token": math.exp(new - old),
            "geometric": math.exp(sum(d for d, _ in own) / len(own)),
            "engine": math.exp(new - mu),
            "product": math.exp(sum(d for _, d in own)),
            "moved": math.exp(new) - math.exp(mu),
        }
        factor, expected_side = closed_form(config, advantage, ratios)
        assert side == expected_side
        assert slope == pytest.approx(-factor * advantage, rel=1e-4, abs=1e-5)


def closed_form(config, advantage, ratios):
    """(factor, side of the active bound) of a token."""
    r, rho = ratios["geometric" if config.kind.startswith("gspo") else "token"], ratios["engine"]
    if config.kind == "sapo":
        tau = config.tau_positive if advantage > 0 else config.tau_negative
        return r / math.cosh(tau * (r - 1) / 2) ** 2, 0
    if config.kind == "reinforce_is":
        return (2.0, 1) if rho > 2.0 else (rho, 0)
    if config.kind == "cispo":
        return (2.0, 1) if rho > 2.0 else (0.6, -1) if rho < 0.6 else (rho, 0)
    if config.kind == "topr":
        return (1.0, 0) if advantage >= 0 else (1.0, 1) if ratios["product"] > 1 else (ratios["product"], 0)
    if config.kind == "dppo_tv":
        if advantage * ratios["moved"] > 0 and abs(ratios["moved"]) > 0.2:
            return 0.0, math.copysign(1, advantage)
        return rho, 0
    if advantage > 0 and r > 1.28:
        return 0.0, 1
    if advantage < 0 and r < 0.8:
        return 0.0, -1
    if advantage < 0 and r > 1.7 and config.kind in ("dual_clip", "two_sided"):
        return 0.0, 1
    return r, 0
