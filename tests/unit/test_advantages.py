from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.advantages import ADVANTAGES, group_advantages
from pipelinerl.config.schema import PPOClip
from pipelinerl.errors import DataError

LOO, GRPO = PPOClip(advantage="loo"), PPOClip(advantage="grpo")
GRPO_STD, LOO_STD = PPOClip(advantage="grpo", normalize_std=True), PPOClip(advantage="loo", normalize_std=True)
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0]

groups = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=1, max_size=12)
configs = st.sampled_from([LOO, GRPO, GRPO_STD, LOO_STD])


def advantages(rewards, config, valid=None):
    valid = [True] * len(rewards) if valid is None else valid
    return group_advantages(np.array(rewards, np.float32), np.array(valid), config)


def test_leave_one_out_by_hand():
    # sum 3 of 5. A reward of 1 faces the others' mean 2/4: 1 - .5 = .5; a reward of 0 faces 3/4: -.75
    assert advantages(REWARDS, LOO) == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])


def test_grpo_by_hand():
    # mean 3/5: 1 - .6 = .4, 0 - .6 = -.6
    assert advantages(REWARDS, GRPO) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])


def test_std_is_the_population_one():
    # [2, 0, 0, 2]: mean 1, population variance (1+1+1+1)/4 = 1 (the sample variance would be 4/3)
    assert advantages([2, 0, 0, 2], GRPO_STD) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    # leave-one-out: 2 - 2/3 = 4/3 and 0 - 4/3 = -4/3, over the same std 1
    assert advantages([2, 0, 0, 2], LOO_STD) == pytest.approx([4 / 3, -4 / 3, -4 / 3, 4 / 3], abs=1e-5)


def test_std_has_a_floor():
    # deviations +-1e-6 over a std of 1e-6 plus the floor 1e-6: one half, not one
    assert advantages([2e-6, 0.0], GRPO_STD) == pytest.approx([0.5, -0.5], rel=1e-5)


def test_errored_rollouts_are_in_no_baseline_and_get_zero():
    # left over: [1, 0, 0]; leave-one-out 1 - 0 = 1 and 0 - 1/2 = -.5. The rewards of the errored ones are never read.
    result = advantages([1, np.nan, 0, 100, 0], LOO, [True, False, True, False, True])
    assert result == pytest.approx([1, 0, -0.5, 0, -0.5])


@pytest.mark.parametrize("valid", [[False, False, False], [False, True, False]])
@pytest.mark.parametrize("config", [LOO, GRPO, GRPO_STD])
def test_fewer_than_two_scored_rollouts_teach_nothing(valid, config):
    assert advantages([1, 2, 3], config, valid).tolist() == [0, 0, 0]


@pytest.mark.parametrize("config", [LOO, GRPO, GRPO_STD, LOO_STD])
def test_equal_rewards_give_exactly_zero(config):
    # in float64 the mean of equal numbers is often off by a rounding error, which would pass for a signal
    for size in range(2, 12):
        assert group_advantages(np.full(size, 0.1), np.ones(size, np.bool_), config).tolist() == [0] * size


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(DataError, match="nan of rollout 2"):
        advantages([0, 1, np.nan], LOO)


@given(groups, configs, st.randoms(use_true_random=False))
def test_relabelling_the_rollouts_relabels_the_advantages(group, config, random):
    order = random.sample(range(len(group)), len(group))
    rewards, valid = [reward for reward, _ in group], [ok for _, ok in group]
    direct = advantages(rewards, config, valid)
    relabelled = advantages([rewards[i] for i in order], config, [valid[i] for i in order])
    assert relabelled == pytest.approx(direct[order], abs=1e-5)


@given(groups, configs, st.integers(-50, 50))
def test_a_constant_added_to_all_rewards_changes_nothing(group, config, shift):
    rewards, valid = [reward for reward, _ in group], [ok for _, ok in group]
    shifted = advantages([reward + shift for reward in rewards], config, valid)
    assert shifted == pytest.approx(advantages(rewards, config, valid), abs=1e-5)


@given(groups, configs)
def test_advantages_of_a_group_sum_to_zero(group, config):
    result = advantages([reward for reward, _ in group], config, [ok for _, ok in group])
    assert result.dtype == np.float32 and abs(float(result.sum())) < 1e-4


@given(groups)
def test_leave_one_out_is_grpo_scaled_by_group_size(group):
    rewards, valid = [reward for reward, _ in group], [ok for _, ok in group]
    count = sum(valid)
    if count >= 2:
        expected = advantages(rewards, GRPO, valid) * count / (count - 1)
        assert advantages(rewards, LOO, valid) == pytest.approx(expected, abs=1e-5)


def test_every_form_the_configuration_allows_exists():
    assert set(get_args(PPOClip.model_fields["advantage"].annotation)) == set(ADVANTAGES)
