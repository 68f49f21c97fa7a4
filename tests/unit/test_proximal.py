"""Proximal policies against numbers worked out by hand."""

import pytest
import torch

from pipelinerl.algo.proximal import proximal_logprobs, proximal_of
from pipelinerl.config.schema import CISPO, PPOClip

LAGS = [0, 1, 2, 4, 10]


def proximal(kind, new=-1.0, rollout=-3.0, start=None):
    count = len(LAGS)
    return proximal_logprobs(
        kind,
        torch.full((count,), new, requires_grad=True),
        torch.full((count,), rollout),
        torch.tensor(LAGS, dtype=torch.int32),
        start,
    )


def test_rollout_is_the_engine():
    assert proximal("rollout").tolist() == [-3.0] * 5


def test_recompute_is_what_the_trainer_had_at_the_start_of_the_step():
    start = torch.tensor([-1.1, -1.2, -1.3, -1.4, -1.5])
    assert torch.equal(proximal("recompute", start=start), start)


def test_while_the_weights_have_not_moved_that_is_the_current_policy():
    assert proximal("recompute").tolist() == [-1.0] * 5


def test_interpolation_by_hand():
    # log mu = -3, log pi = -1; alpha = 1 (lag 0), 0, 1/2, 3/4, 9/10: the engine's part is 1/lag
    assert proximal("interpolate").tolist() == pytest.approx([-1.0, -3.0, -2.0, -1.5, -1.2])


@pytest.mark.parametrize("kind", ["rollout", "recompute", "interpolate"])
def test_no_gradient_goes_through_it(kind):
    assert not proximal(kind).requires_grad


def test_objectives_on_the_ratio_to_the_engine_have_no_other_proximal_policy():
    assert proximal_of(CISPO()) == "rollout"
    assert proximal_of(PPOClip(proximal="interpolate", correction={"tis_token": 2.0})) == "interpolate"
