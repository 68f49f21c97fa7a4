"""Trained rewards from the task's, worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.rewards import trained_rewards
from pipelinerl.config.schema import RewardConfig
from pipelinerl.errors import DataError
from pipelinerl.types import Outcome, RolloutMeta


def rollout(reward=1.0, length=10, outcome=Outcome.OK, components=None):
    return RolloutMeta(reward, outcome, components or {}, length + 3, 3, length, {0: length})


def rewards(rollouts, max_tokens=100, **config):
    return trained_rewards("train/7", rollouts, RewardConfig(**config), max_tokens).tolist()


def test_without_settings_the_reward_is_the_tasks():
    assert rewards([rollout(0.25, 100), rollout(-3.0, 1, Outcome.TRUNCATED)]) == [0.25, -3.0]


def test_dapo_overlong_shaping_by_hand():
    # limit 100, buffer 40: free up to 60, half of the penalty at 80, all of it at 100 and beyond (several turns)
    lengths = [1, 60, 70, 80, 100, 140]
    shaped = rewards([rollout(1.0, n) for n in lengths], overlong_buffer=40)
    assert shaped == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    assert rewards([rollout(1.0, 80)], overlong_buffer=40, overlong_penalty=0.5) == [0.75]


def test_the_published_numbers_of_dapo():
    # 20480 tokens with a buffer of 4096: 16384 is free, 18432 costs half, 20480 all
    config = {"max_tokens": 20480, "overlong_buffer": 4096}
    assert rewards([rollout(0.0, n) for n in (16384, 18432, 20480)], **config) == [0, -0.5, -1]


def test_a_truncated_completion_pays_the_whole_penalty_at_any_length():
    # it ran into the model's own limit before sampling.max_tokens
    assert rewards([rollout(1.0, 50, Outcome.TRUNCATED)], overlong_buffer=40) == [0.0]
    assert rewards([rollout(1.0, 50, Outcome.TRUNCATED)]) == [1.0]


def test_the_length_penalty_is_in_proportion_to_length():
    assert rewards([rollout(1.0, 25), rollout(1.0, 100)], length_penalty=0.5) == [0.875, 0.5]


def test_both_penalties_come_off_the_weighted_components():
    # 2 * 1 - .5 * 1 = 1.5; 80 of 100 tokens: overlong .5, length .1 * .8
    one = rollout(9.0, 80, components={"match": 1.0, "cost": 1.0, "other": 77.0})
    shaped = rewards([one], weights={"match": 2.0, "cost": -0.5}, overlong_buffer=40, length_penalty=0.1)
    assert shaped == pytest.approx([1.5 - 0.5 - 0.08])


def test_a_component_that_one_rollout_lacks_counts_nothing_there():
    two = [rollout(components={"match": 1.0, "bonus": 1.0}), rollout(components={"match": 1.0})]
    assert rewards(two, weights={"match": 1.0, "bonus": 0.5}) == [1.5, 1.0]


def test_an_unknown_component_is_an_error_that_names_those_there_are():
    known = [rollout(components={"match": 1.0}), rollout(components={"format": 1.0})]
    with pytest.raises(DataError, match=r"train/7: reward\.weights\.mach is for .*; it has format, match"):
        rewards(known, weights={"match": 1.0, "mach": 1.0})
    with pytest.raises(DataError, match=r"it has none, only a reward; use reward\.weights=\{\}"):
        rewards([rollout()], weights={"match": 1.0})


def test_a_rollout_that_was_not_scored_has_no_reward_and_names_no_component():
    failed = rollout(5.0, 0, Outcome.ENV_ERROR)
    assert np.isnan(rewards([failed], weights={"match": 1.0}, overlong_buffer=1)).all()
    mixed = rewards([failed, rollout(components={"match": 1.0})], weights={"match": 3.0})
    assert np.isnan(mixed[0]) and mixed[1] == 3.0


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 99), st.floats(0, 2))
def test_longer_is_never_better(length, more, buffer, penalty):
    short, long = rewards(
        [rollout(0.0, length), rollout(0.0, length + more)],
        overlong_buffer=buffer, overlong_penalty=penalty, length_penalty=0.1,
    )  # fmt: skip
    assert long < short <= 0 and short >= -penalty - 0.1 * length / 100 - 1e-6
