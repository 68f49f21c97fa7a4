"""The panel of corrections against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.counterfactual import RULES
from pipelinerl.algo.diagnostics import Sums
from pipelinerl.config.schema import CISPO, CorrectionConfig, PPOClip
from tests.unit.objective_tokens import sums, tokens

LN = math.log


def panel(given_tokens, algo=None, **coefficients):
    return sums(given_tokens, algo, **coefficients).finish()


def test_it_is_about_every_correction():
    assert set(RULES) == set(CorrectionConfig.model_fields)
    metrics = panel(tokens([0.0]))
    for rule in RULES:
        assert metrics[f"counterfactual/{rule}/frac"] == 0 and metrics[f"counterfactual/{rule}/grad_share"] == 0
        assert f"correction/{rule}_frac" not in metrics


def test_fraction_and_share_of_the_gradient_by_hand():
    # CISPO: |d loss / d logprob| = weight * min(rho, 5) * |A|: 0.1 * 1 * 1, 0.1 * 3 * 2, 0.2 * 0.1 * 4, 0.1 * 1 * 0
    given_tokens = tokens([0, LN(3), LN(0.1), 0], [1, -2, 4, 0], weights=[0.1, 0.1, 0.2, 0.1])
    metrics = panel(given_tokens, CISPO())
    total = 0.1 + 0.6 + 0.08
    # beyond the cap of 2; outside [0.5, 5]
    assert metrics["counterfactual/tis_token/frac"] == 0.25
    assert metrics["counterfactual/tis_token/grad_share"] == pytest.approx(0.6 / total)
    assert metrics["counterfactual/icepop/frac"] == 0.25
    assert metrics["counterfactual/icepop/grad_share"] == pytest.approx(0.08 / total)


def test_the_gradient_is_that_of_the_whole_loss():
    # the policy loss of the first token is clipped and has none; the KL pulls it by 0.1 * ln 4 all the same
    given_tokens = tokens([LN(4), 0], [1, 1], reference=[0, 0])
    algo = PPOClip(kl={"coef": 0.1, "importance_cap": None})
    assert panel(given_tokens, algo)["counterfactual/tis_token/grad_share"] == 0
    pulled = 0.1 * LN(4)
    found = panel(given_tokens, algo, kl=0.1)["counterfactual/tis_token/grad_share"]
    assert found == pytest.approx(pulled / (pulled + 1))


def test_sequences_count_with_all_their_tokens():
    # one token of probability ratio 1e-5 in a sequence of three
    metrics = panel(tokens([LN(1e-5), 0, 0, 0], sequence=[0, 0, 0, 1]), CISPO())
    assert metrics["counterfactual/veto/frac"] == 0.75
    assert metrics["counterfactual/veto/grad_share"] == pytest.approx(2.00001 / 3.00001)


def test_tokens_of_a_large_lag():
    metrics = panel(tokens([0, 0, 0, 0], lag=[0, 4, 5, 9]))
    assert metrics["counterfactual/version_mask/frac"] == 0.5


def test_one_that_is_on_is_reported_as_such_with_its_own_parameter():
    algo = PPOClip(correction={"icepop": [0.9, 1.1], "version_mask": 0})
    metrics = panel(tokens([0.0, 0.2, 0.0, 0.0], lag=[0, 0, 1, 0]), algo)
    assert metrics["correction/icepop_frac"] == 0.25 and metrics["correction/version_mask_frac"] == 0.25
    assert not [name for name in metrics if name.startswith(("counterfactual/icepop", "counterfactual/version_mask"))]


def test_a_cap_that_is_on_is_reported_by_what_it_caps():
    algo = PPOClip(proximal="recompute", correction={"tis_token": 3.0})
    # proximal/engine 4 and 2.5, which the usual cap of 2 would touch too; the current policy is the proximal one
    metrics = panel(tokens([LN(4), LN(2.5)], old=[LN(4), LN(2.5)]), algo)
    assert metrics["correction/tis_token_frac"] == 0.5
    assert metrics["correction/weight_mean"] == pytest.approx(2.75)
    # of the others too x is proximal/engine
    assert metrics["counterfactual/sequence_mis/frac"] == 0.5


def test_no_gradient_has_no_shares():
    metrics = panel(tokens([LN(3)], [0]))
    assert metrics["counterfactual/tis_token/frac"] == 1 and "counterfactual/tis_token/grad_share" not in metrics


ROW = st.tuples(st.floats(-3, 3), st.floats(-2, 2), st.integers(0, 8))


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12))
def test_micro_batches_add_up_and_shares_are_shares(rows, cut):
    algo = PPOClip(correction={"icepop": [0.5, 2.0]})

    def of(part):
        log_ratio, advantages, lag = zip(*part, strict=True) if part else ((),) * 3
        return sums(tokens(log_ratio, advantages, lag=lag, dtype=torch.float64), algo)

    whole = of(rows).finish()
    assert (of(rows[:cut]) + of(rows[cut:]) + Sums.zero()).finish() == pytest.approx(whole, rel=1e-6, abs=1e-9)
    for name, value in whole.items():
        if name.endswith(("grad_share", "frac")) and "/" in name:
            assert 0 <= value <= 1 + 1e-9, name
