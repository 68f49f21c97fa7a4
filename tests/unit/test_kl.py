"""KL estimators against numbers worked out by hand, and their gradients against the true one, by enumeration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.kl import ESTIMATORS, kl_loss, to_go
from pipelinerl.config.schema import KLConfig

LN2 = math.log(2)
LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, 0.7], dtype=torch.float64)
OTHER = torch.tensor([1.0, 0.5, -0.5, 0.2, -2.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([0.0, 0.4, 1.0, -0.3, 0.1], dtype=torch.float64)


def log_softmax(logits):
    return torch.log_softmax(logits, dim=-1)


def term(new, reference, rollout=None, coef=1.0, **config):
    rollout = new if rollout is None else rollout
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (new, reference, rollout))
    return kl_loss(*tensors, KLConfig(**config), coef).tolist()


def expected_gradient(estimator, sampled_from, cap=None):
    """The mean gradient over tokens from this distribution, every token of the vocabulary with its probability."""
    logits = LOGITS.clone().requires_grad_()
    config = KLConfig.model_construct(estimator=estimator, importance_cap=cap, max_log_ratio=100.0)
    losses = kl_loss(log_softmax(logits), log_softmax(OTHER), log_softmax(sampled_from), config, 1.0)
    (log_softmax(sampled_from).exp() * losses).sum().backward()
    return logits.grad


def true_gradient():
    logits = LOGITS.clone().requires_grad_()
    (log_softmax(logits).exp() * (log_softmax(logits) - log_softmax(OTHER))).sum().backward()
    return logits.grad


def test_the_estimators_by_hand():
    # the policy gives the token twice the probability that the reference gives it: d = ln 2
    d = torch.tensor([LN2, -LN2], dtype=torch.float64)
    assert ESTIMATORS["k1"](d).tolist() == pytest.approx([LN2, -LN2])
    assert ESTIMATORS["k2"](d).tolist() == pytest.approx([LN2**2 / 2, LN2**2 / 2])
    assert ESTIMATORS["k3"](d).tolist() == pytest.approx([1 / 2 - 1 + LN2, 2 - 1 - LN2])


def test_k3_is_not_lost_to_cancellation():
    assert ESTIMATORS["k3"](torch.tensor([1e-4])).item() == pytest.approx(0.5e-8, rel=1e-3)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name):
    new, reference = log_softmax(LOGITS), log_softmax(OTHER)
    divergence = (new.exp() * (new - reference)).sum().item()
    assert (new.exp() * ESTIMATORS[name](new - reference)).sum().item() == pytest.approx(divergence, rel=1e-12)


def test_the_term_by_hand():
    # d = ln 2, on a token that the engine gave half the probability (ratio 2) or four times less (4, capped at 3)
    found = term([-1.0] * 2, [-1.0 - LN2] * 2, [-1.0 - LN2, -1.0 - 2 * LN2], 0.1, estimator="k2", importance_cap=3.0)
    assert found == pytest.approx([0.1 * 2 * LN2**2 / 2, 0.1 * 3 * LN2**2 / 2])
    found = term([-1.0], [-1.0 - LN2], [-1.0 - LN2], 0.1, estimator="k3", importance_cap=None)
    assert found == pytest.approx([0.1 * (LN2 - 1 / 2)])


def test_the_log_ratio_is_clamped_and_the_gradient_ends_there():
    new = torch.tensor([-1.0, -1.0, -20.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-20.0, -3.0, -1.0, -1.0], dtype=torch.float64)
    losses = kl_loss(new, reference, new.detach(), KLConfig(estimator="k2", max_log_ratio=5.0), 1.0)
    losses.sum().backward()
    assert losses.tolist() == [12.5, 2.0, 12.5, 2.0]
    assert new.grad.tolist() == [0, 2, 0, -2]


def test_k2_in_the_loss_has_the_gradient_of_the_kl():
    assert expected_gradient("k2", LOGITS).tolist() == pytest.approx(true_gradient().tolist(), rel=1e-10)


def test_with_the_importance_ratio_it_has_it_on_tokens_of_another_policy_too():
    assert expected_gradient("k2", BEHAVIOUR, cap=1e9).tolist() == pytest.approx(true_gradient().tolist(), rel=1e-10)
    without = expected_gradient("k2", BEHAVIOUR)
    assert (without - true_gradient()).norm() > 0.1 * true_gradient().norm()


def test_k1_in_the_loss_has_no_gradient_in_expectation():
    assert expected_gradient("k1", LOGITS).tolist() == pytest.approx([0] * 5, abs=1e-12)
    assert true_gradient().norm() > 0.1


def test_k3_in_the_loss_has_another_gradient_than_the_kl():
    assert (expected_gradient("k3", LOGITS) - true_gradient()).norm() > 0.1 * true_gradient().norm()


@pytest.mark.parametrize("bad", [(math.nan, -1.0), (-math.inf, -1.0), (-1.0, -math.inf)])
def test_a_logprob_that_is_not_finite_is_not_hidden_by_the_clamp(bad):
    assert math.isnan(term([bad[0]], [bad[1]])[0])
    assert math.isnan(term([-1.0], [-1.0], [math.nan])[0])


def test_to_go_by_hand():
    assert to_go(np.array([1.0, 2.0, 4.0], np.float32)).tolist() == [7.0, 6.0, 4.0]
    assert to_go(np.zeros(0, np.float32)).tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-15, 15), min_size=1, max_size=20))
def test_k2_and_k3_are_never_negative(values):
    d = torch.tensor(values, dtype=torch.float64)
    assert (ESTIMATORS["k2"](d) >= 0).all() and (ESTIMATORS["k3"](d) >= 0).all()


def test_the_coefficient_follows_its_schedule():
    config = KLConfig(coef=0.1, final_coef=0.0, anneal_steps=5)
    assert [config.at(step, 100) for step in (1, 2, 3, 5, 100)] == pytest.approx([0.1, 0.075, 0.05, 0, 0])
    assert [KLConfig(coef=0.0, final_coef=0.4).at(step, 5) for step in (1, 2, 5)] == pytest.approx([0, 0.1, 0.4])
    assert KLConfig(coef=0.3).at(7, 9) == 0.3
