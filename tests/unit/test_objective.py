"""The loss of a micro-batch against numbers worked out by hand, and what its terms do to each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.objective import Coefficients
from pipelinerl.config.schema import CISPO, PPOClip
from tests.unit.objective_tokens import ROLLOUT, evaluate, tokens

LN = math.log
LN2 = LN(2)
KL = {"coef": 0.1, "estimator": "k2", "importance_cap": None}


def algo(kind=PPOClip, **values):
    return kind.model_validate({"kl": KL, **values})


def test_the_policy_loss_alone_by_hand():
    # ratios 1 and 2 (clipped at 1.28); -(0.5 * 1 * 3 + 0.25 * 1.28 * 2)
    found, by_logprob, by_entropy = evaluate(tokens([0, LN2], [3, 2], weights=[0.5, 0.25]))
    assert found.loss.item() == pytest.approx(-2.14)
    assert by_logprob.tolist() == pytest.approx([-1.5, 0]) and by_entropy.tolist() == [0, 0]
    assert found.clipped.tolist() == [0, 1]


def test_all_terms_by_hand():
    # token 0: r 1, -1 * 3; KL d = ln 2: 0.1 * ln2^2 / 2; entropy 0.01 * 2
    # token 1: r 2 clipped at 1.28, -1.28 * 2; KL d = 0; entropy 0.01 * 3
    given_tokens = tokens([0, LN2], [3, 2], weights=[0.5, 0.25], reference=[-LN2, LN2], entropy=[2, 3])
    found, by_logprob, by_entropy = evaluate(given_tokens, algo(), kl=0.1, entropy=0.01)
    assert found.loss.item() == pytest.approx(0.5 * (-3 + 0.05 * LN2**2 - 0.02) + 0.25 * (-2.56 - 0.03))
    assert by_logprob.tolist() == pytest.approx([0.5 * (-3 + 0.1 * LN2), 0])
    assert by_entropy.tolist() == pytest.approx([-0.005, -0.0025])


def test_a_mask_takes_the_policy_loss_and_neither_kl_nor_entropy():
    config = algo(correction={"icepop": [0.5, 1.5]})
    given_tokens = tokens([LN2, 0], [-1, -1], reference=[0, 0], entropy=[2, 2])
    found, by_logprob, by_entropy = evaluate(given_tokens, config, kl=0.1, entropy=0.01)
    assert found.correction.masked["icepop"].tolist() == [True, False]
    assert by_logprob.tolist() == pytest.approx([0.1 * LN2, 1.0])
    assert by_entropy.tolist() == pytest.approx([-0.01, -0.01])
    assert found.loss.item() == pytest.approx((0.05 * LN2**2 - 0.02) + (1 - 0.02))


def test_a_mask_keeps_the_denominator():
    # the second token counts 1/2 whether or not the first one is masked
    masked, by_logprob, _ = evaluate(tokens([LN2, 0], weights=[0.5, 0.5]), algo(correction={"icepop": [0.5, 1.5]}))
    assert masked.loss.item() == pytest.approx(-0.5) and by_logprob.tolist() == [0, -0.5]


def test_decoupled_the_ratio_to_the_proximal_policy_is_clipped_and_the_rest_weighed():
    # proximal/engine 4, capped at 3; current/proximal 1/2 (inside where A > 0) and 2 (clipped where A > 0)
    config = algo(proximal="recompute", correction={"tis_token": 3.0})
    found, by_logprob, _ = evaluate(tokens([LN2, LN(8)], [1, 1], old=[LN(4), LN(4)]), config)
    assert found.loss.item() == pytest.approx(-3 * 0.5 - 3 * 1.28)
    assert by_logprob.tolist() == pytest.approx([-1.5, 0])
    assert found.correction.weight.tolist() == pytest.approx([3, 3])


def test_the_importance_weight_has_no_gradient_where_the_proximal_policy_is_the_current_one():
    # the first update with proximal=recompute: r = 1, and w = current/engine is a constant
    config = algo(proximal="recompute", correction={"tis_token": 5.0})
    given_tokens = tokens([LN2, -LN2], [1, -3], old=[LN2, -LN2])
    found, by_logprob, _ = evaluate(given_tokens, config)
    assert found.loss.item() == pytest.approx(-2 * 1 + 0.5 * 3)
    assert by_logprob.tolist() == pytest.approx([-2, 1.5])


def test_in_bypass_it_is_ppo_on_the_ratio_to_the_engine():
    plain = evaluate(tokens([0.1, -0.2, 0.5], [1, -1, 2]))
    masked = evaluate(tokens([0.1, -0.2, 0.5], [1, -1, 2]), algo(correction={"veto": 1e-4}))
    assert plain[0].loss.item() == masked[0].loss.item() and torch.equal(plain[1], masked[1])


def test_other_objectives_are_composed_alike():
    # CISPO: -sg(min(2, 5)) * 3 * logprob
    given_tokens = tokens([LN2], [3], reference=[0], entropy=[2])
    found, by_logprob, _ = evaluate(given_tokens, algo(CISPO), kl=0.1, entropy=0.01)
    assert found.loss.item() == pytest.approx(-6 * (ROLLOUT + LN2) + 0.05 * LN2**2 - 0.02)
    assert by_logprob.tolist() == pytest.approx([-6 + 0.1 * LN2])


def test_coefficients_of_a_step():
    config = algo(kl={"coef": 0.2, "final_coef": 0.0}, entropy={"coef": 0.0, "final_coef": 0.03})
    assert Coefficients.at(config, 1, 3) == Coefficients(0.2, 0.0)
    assert Coefficients.at(config, 2, 3) == Coefficients(pytest.approx(0.1), pytest.approx(0.015))
    assert Coefficients.at(config, 3, 3).metrics(config) == {"optim/kl_coef": 0.0, "optim/entropy_coef": 0.03}


def test_a_kl_in_the_reward_is_no_term_of_the_loss():
    config = algo(kl={"coef": 0.2, "place": "reward", "estimator": "k1"})
    assert Coefficients.at(config, 1, 3) == Coefficients(0.0, 0.0)
    assert Coefficients().metrics(config) == {}


def test_no_token_is_a_loss_of_0():
    found, by_logprob, _ = evaluate(tokens([], reference=[]), algo(correction={"k3": 0.1}), kl=0.1, entropy=0.1)
    assert found.loss.item() == 0 and by_logprob.shape == (0,)


@pytest.mark.parametrize("field", ["log_ratio", "reference", "entropy", "advantages"])
def test_what_is_not_finite_makes_the_loss_not_finite(field):
    values = {"log_ratio": [0.0, 0.0], "reference": [0.0, 0.0], "entropy": [1.0, 1.0], "advantages": [1.0, 1.0]}
    values[field] = [0.0, math.nan]
    log_ratio = values.pop("log_ratio")
    config = algo(correction={"icepop": [0.5, 2.0], "veto": 1e-4})
    found, *_ = evaluate(tokens(log_ratio, **values), config, kl=0.1, entropy=0.01)
    assert not math.isfinite(found.loss.item())


ROWS = st.tuples(st.floats(-3, 3), st.floats(-2, 2), st.floats(-3, 3), st.floats(0, 3), st.floats(0.01, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=8), st.lists(ROWS, max_size=8), st.booleans())
def test_micro_batches_add_up_to_the_whole(first, second, masks):
    config = algo(correction={"icepop": [0.5, 2.0], "geometric": [0.5, 2.0]} if masks else {})

    def loss(given_rows, start):
        log_ratio, advantages, reference, entropy, weights = zip(*given_rows, strict=True) if given_rows else ((),) * 5
        sequence = [(start + i) // 2 for i in range(len(given_rows))]  # of two tokens each
        given_tokens = tokens(
            log_ratio, advantages, reference=reference, entropy=entropy, weights=weights, sequence=sequence,
            dtype=torch.float64,
        )  # fmt: skip
        found, by_logprob, _ = evaluate(given_tokens, config, kl=0.1, entropy=0.01)
        return found.loss.item(), by_logprob.tolist()

    first = first + first[: len(first) % 2]  # no sequence is cut
    whole, parts = loss(first + second, 0), (loss(first, 0), loss(second, len(first)))
    assert whole[0] == pytest.approx(parts[0][0] + parts[1][0], rel=1e-5, abs=1e-5)
    assert whole[1] == pytest.approx(parts[0][1] + parts[1][1], rel=1e-5, abs=1e-6)
