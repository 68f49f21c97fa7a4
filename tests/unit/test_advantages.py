"""Advantages against values worked out by hand, and what must not change them."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.advantages import ADVANTAGES, GroupScores, has_signal, step_advantages
from pipelinerl.config.schema import Advantage
from pipelinerl.errors import DataError
from pipelinerl.types import SampleKL

FORMS = sorted(ADVANTAGES)
GROUP_FORMS = sorted(set(FORMS) - {"reinforce_pp"})


def group(rewards, lengths=None, valid=None, components=None, kl=(), name="train/7"):
    count = len(rewards)
    return GroupScores(
        name=name,
        rewards=np.array(rewards, np.float32),
        valid=np.array([True] * count if valid is None else valid, np.bool_),
        lengths=np.array([1] * count if lengths is None else lengths, np.int32),
        components=tuple(components or [{}] * count),
        kl={sample.rollout: sample for sample in kl},
    )


def advantages(groups, form, **arguments):
    return [values.tolist() for values in step_advantages(groups, form, **arguments).values]


def flat(groups):
    return [value for values in groups for value in values]


# Two groups: rewards 1 0 of completions with 1 and 3 tokens, rewards 3 1 of completions with 2 and 2.
TWO = [group([1, 0], [1, 3]), group([3, 1], [2, 2])]

GOLDEN = {
    # 1 - 0, 0 - 1; 3 - 1, 1 - 3
    "rloo": [[1, -1], [2, -2]],
    # means 1/2 and 2
    "dr_grpo": [[0.5, -0.5], [1, -1]],
    # over the groups' own std, 1/2 and 1
    "grpo": [[1, -1], [1, -1]],
    # over the groups' own means, 1/2 and 2
    "maxrl": [[1, -1], [0.5, -0.5]],
    # std of .5 -.5 1 -1: sqrt((.25 + .25 + 1 + 1) / 4) = .7905694
    "batch_std": [[0.6324555, -0.6324555], [1.2649111, -1.2649111]],
    # of 8 tokens: mean (1 + 0 + 6 + 2) / 8 = 1.125, mean square (1 + 0 + 18 + 2) / 8 = 2.625, so variance 1.359375 and
    # std 1.1659224. (1 - 1.125), (0 - 1.125), (3 - 1.125), (1 - 1.125) over it
    "reinforce_pp": [[-0.1072112, -0.9649012], [1.6081687, -0.1072112]],
    # .5 -.5 1 -1 over 1 3 2 2 tokens: mean (.5 - 1.5 + 2 - 2) / 8 = -.125, mean square (.25 + .75 + 2 + 2) / 8 = .625,
    # so variance .609375 and std .7806247. .625 -.375 1.125 -.875 over it
    "reinforce_pp_baseline": [[0.8006408, -0.4803845], [1.4411534, -1.1208971]],
    # the only component is the reward: 1 -1 1 -1 as grpo, whose std over the step is 1
    "gdpo": [[1, -1], [1, -1]],
}


@pytest.mark.parametrize("form", FORMS)
def test_two_groups_by_hand(form):
    assert flat(advantages(TWO, form)) == pytest.approx(flat(GOLDEN[form]), rel=1e-5)


def test_larger_groups_by_hand():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    # sum 3 of 5. A reward of 1 faces the others' mean 2/4: 1 - .5 = .5; a reward of 0 faces 3/4: -.75
    assert advantages([group(rewards)], "rloo") == [[0.5, -0.75, -0.75, 0.5, 0.5]]
    # mean .6, variance .6 * .4 = .24
    expected = [0.4 / 0.24**0.5, -0.6 / 0.24**0.5]
    assert advantages([group(rewards)], "grpo")[0][:2] == pytest.approx(expected, rel=1e-5)
    assert advantages([group(rewards)], "maxrl")[0][:2] == pytest.approx([0.4 / 0.6, -1], rel=1e-5)


def test_a_std_has_a_floor():
    # deviations +-1e-6 over a std of 1e-6 plus the floor 1e-6: one half, not one
    assert advantages([group([2e-6, 0.0])], "grpo")[0] == pytest.approx([0.5, -0.5], rel=1e-5)


# gdpo


def parts(correct, form):
    return [{"correct": c, "format": f} for c, f in zip(correct, form, strict=True)]


def test_gdpo_keeps_apart_what_a_sum_of_rewards_confuses():
    # In the sum, 1 0 and 2 0 are both +1 -1 after grpo. Here: 1 -1 of the first component alone, 2 -2 of both;
    # std over the step sqrt((1 + 1 + 4 + 4) / 4) = 1.5811388
    step = [
        group([1, 0], components=parts([1, 0], [1, 1])),
        group([2, 0], components=parts([1, 0], [1, 0])),
    ]
    assert flat(advantages(step, "gdpo")) == pytest.approx([0.6324555, -0.6324555, 1.2649111, -1.2649111], rel=1e-5)
    # with weights 1 and 1/2: 1 -1, 1.5 -1.5, std sqrt((1 + 1 + 2.25 + 2.25) / 4) = 1.2747549
    weighted = advantages(step, "gdpo", component_weights={"correct": 1.0, "format": 0.5})
    assert flat(weighted) == pytest.approx([0.7844645, -0.7844645, 1.1766968, -1.1766968], rel=1e-5)
    # only what is named counts
    assert flat(advantages(step, "gdpo", component_weights={"format": 2.0})) == pytest.approx(
        [0, 0, 2**0.5, -(2**0.5)], rel=1e-5
    )


@pytest.mark.parametrize("absent", [{"correct": 1.0}, {"correct": 1.0, "format": float("nan")}])
def test_gdpo_leaves_a_component_that_is_not_there_out_of_its_statistics(absent):
    # correct 1 1 0: mean 2/3, std sqrt(2)/3, so .7071 .7071 -1.4142. format 1 - 0: 1 and -1, and nothing in between.
    # Sum 1.7071 .7071 -2.4142, mean square (2.9142 + .5 + 5.8284) / 3 = 3.0809, std 1.7553
    step = [group([0, 0, 0], components=[{"correct": 1.0, "format": 1.0}, absent, {"correct": 0.0, "format": 0.0}])]
    assert advantages(step, "gdpo")[0] == pytest.approx([0.97257, 0.40285, -1.37541], abs=1e-4)


def test_gdpo_does_not_read_the_reward_where_there_are_components():
    step = [group([float("nan")] * 2, components=parts([1, 0], [0, 0]))]
    assert advantages(step, "gdpo")[0] == pytest.approx([1, -1], rel=1e-5)
    with pytest.raises(DataError, match=r"train/7: component format=inf of rollout 1"):
        advantages([group([0, 0], components=parts([1, 0], [0, float("inf")]))], "gdpo")


# What has no signal


@pytest.mark.parametrize("form", GROUP_FORMS)
def test_a_group_of_equal_rewards_gets_exactly_zero_and_the_others_do_not(form):
    # 0.1, because in floating point the mean of equal numbers is often off by a rounding error
    for size in range(2, 9):
        flat_one, other = advantages([group([0.1] * size), group([1, 0, 0])], form)
        assert flat_one == [0] * size
        assert all(other)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_equal_rewards_gets_exactly_zero(form):
    assert advantages([group([0.1] * 3, [3, 1, 7]), group([0.1] * 2)], form) == [[0] * 3, [0] * 2]


@pytest.mark.parametrize("valid", [[False, False, False], [False, True, False]])
@pytest.mark.parametrize("form", GROUP_FORMS)
def test_fewer_than_two_scored_rollouts_teach_nothing(valid, form):
    assert advantages([group([1, 2, 3], valid=valid), group([1, 0])], form)[0] == [0, 0, 0]
    assert advantages([group([1, 2, 3], valid=valid)], form) == [[0, 0, 0]]


def test_without_a_group_baseline_equal_rewards_do_teach():
    # rewards 1 1 and 0 0, one token each: mean 1/2, std 1/2
    assert flat(advantages([group([1, 1]), group([0, 0])], "reinforce_pp")) == pytest.approx([1, 1, -1, -1], rel=1e-5)


def test_completions_without_tokens_are_in_no_token_statistics():
    # token mean (2 * 1 + 2 * 0) / 4 = 1/2, std 1/2; the reward 9 of no tokens is not in them
    step = [group([1, 0, 9], [2, 2, 0])]
    assert advantages(step, "reinforce_pp")[0] == pytest.approx([1, -1, 17], rel=1e-5)
    for form in FORMS:
        assert np.isfinite(advantages([group([1, 0], [0, 0])], form)).all()


@pytest.mark.parametrize(
    ("scores", "form", "signal"),
    [
        (group([1, 0]), "rloo", True),
        (group([0.1] * 3), "rloo", False),
        (group([1, 0, 0], valid=[False, True, True]), "rloo", False),
        (group([1, 1], components=parts([1, 0], [0, 1])), "rloo", False),
        (group([1, 1], components=parts([1, 0], [0, 1])), "gdpo", True),
        (group([1, 0], components=parts([1, 1], [0, float("nan")])), "gdpo", False),
    ],
)
def test_what_counts_as_zero_variance(scores, form, signal):
    assert has_signal(scores, form) is signal


# What is refused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named_with_its_group(form, reward):
    with pytest.raises(DataError, match=rf"train/9: reward {reward} of rollout 2"):
        advantages([*TWO, group([0, 1, reward], name="train/9")], form)


def test_maxrl_refuses_negative_rewards_by_group():
    with pytest.raises(DataError, match=r"train/9: reward -0\.5 of rollout 1 with algo\.advantage=maxrl"):
        advantages([*TWO, group([1, -0.5], name="train/9")], "maxrl")


# KL in the reward


def kl_of(number, tokens, rollout):
    """The KL of a rollout with these k1 of its tokens."""
    to_go = np.cumsum(tokens[::-1])[::-1]
    return SampleKL(number, rollout, float(sum(tokens)), float(to_go.sum()), float((to_go**2).sum()))


def test_group_forms_take_the_kl_of_the_completion_off_its_reward():
    # 1 - .5 * .4 = .8 and 0 - .5 * -.2 = .1: leave-one-out .7 and -.7
    step = [group([1, 0], kl=[SampleKL(0, 0, 0.4, 9.0, 9.0), SampleKL(0, 1, -0.2, 9.0, 9.0)])]
    made = step_advantages(step, "rloo", beta=0.5)
    assert made.values[0].tolist() == pytest.approx([0.7, -0.7])
    assert made.kl_to_go == 0
    # equal rewards with different KL are no longer equal
    assert advantages([group([1, 1], kl=step[0].kl.values())], "rloo", beta=0.5)[0] == pytest.approx([-0.3, 0.3])


def test_the_kl_to_go_of_reinforce_pp_by_hand():
    # k1 of the tokens .2 .4 and .5, so to go .6 .4 and .5; beta 1/2. Rewards 1 and 0 of the tokens become
    # .7 .8 and -.25: mean 1.25/3 = .4166667, mean square (.49 + .64 + .0625)/3 = .3975, variance .2238889, std .4731690
    step = [group([1, 0], [2, 1], kl=[kl_of(0, [0.2, 0.4], 0), kl_of(0, [0.5], 1)])]
    made = step_advantages(step, "reinforce_pp", beta=0.5)
    assert made.values[0].tolist() == pytest.approx([0.5833333 / 0.4731690, -0.4166667 / 0.4731690], rel=1e-5)
    assert made.kl_to_go == pytest.approx(0.5 / 0.4731690, rel=1e-5)


k1_lists = st.lists(st.integers(-8, 8).map(lambda quarters: quarters / 4), min_size=1, max_size=5)
kl_samples = st.lists(st.tuples(st.integers(-4, 4), k1_lists), min_size=2, max_size=6)


@given(kl_samples, st.sampled_from([0.25, 0.5, 2.0]))
def test_token_advantages_of_reinforce_pp_are_whitened_over_the_step(samples, beta):
    rewards, k1 = [reward for reward, _ in samples], [tokens for _, tokens in samples]
    kl = [kl_of(0, tokens, index) for index, tokens in enumerate(k1)]
    made = step_advantages([group(rewards, [len(tokens) for tokens in k1], kl=kl)], "reinforce_pp", beta)
    to_go = [np.cumsum(tokens[::-1])[::-1] for tokens in k1]
    per_token = np.concatenate([a - made.kl_to_go * k for a, k in zip(made.values[0], to_go, strict=True)])
    raw = np.concatenate([reward - beta * k for reward, k in zip(rewards, to_go, strict=True)])
    assert per_token == pytest.approx((raw - raw.mean()) / (raw.std() + 1e-6), abs=1e-4)


# Properties

rollouts = st.tuples(st.integers(0, 8), st.integers(1, 20), st.booleans())
steps = st.lists(st.lists(rollouts, min_size=1, max_size=6), min_size=1, max_size=4)
forms = st.sampled_from(FORMS)


def groups_of(step, shift=0):
    return [group([r + shift for r, _, _ in rows], [n for _, n, _ in rows], [ok for _, _, ok in rows]) for rows in step]


@given(steps, forms, st.randoms(use_true_random=False))
def test_relabelling_rollouts_and_groups_relabels_the_advantages(step, form, random):
    direct = advantages(groups_of(step), form)
    order = random.sample(range(len(step)), len(step))
    within = [random.sample(range(len(rows)), len(rows)) for rows in step]
    relabelled = advantages(groups_of([[step[g][i] for i in within[g]] for g in order]), form)
    assert flat(relabelled) == pytest.approx([direct[g][i] for g in order for i in within[g]], abs=1e-5)


@given(steps, forms)
def test_errored_rollouts_are_in_no_statistics_and_get_zero(step, form):
    whole = advantages(groups_of(step), form)
    poisoned = [[(float("nan") if not ok else r, 999 if not ok else n, ok) for r, n, ok in rows] for rows in step]
    assert advantages(groups_of(poisoned), form) == whole
    scored = [[row for row in rows if row[2]] for rows in step]
    alone = advantages(groups_of(scored), form)
    for rows, values, values_alone in zip(step, whole, alone, strict=True):
        assert [value for value, (_, _, ok) in zip(values, rows, strict=True) if ok] == values_alone
        assert not any(value for value, (_, _, ok) in zip(values, rows, strict=True) if not ok)


@given(steps, st.sampled_from(sorted(set(FORMS) - {"maxrl"})), st.integers(-50, 50))
def test_a_constant_added_to_all_rewards_changes_nothing(step, form, shift):
    assert flat(advantages(groups_of(step, shift), form)) == pytest.approx(
        flat(advantages(groups_of(step), form)), abs=1e-4
    )


@given(steps, st.sampled_from(["rloo", "grpo", "dr_grpo", "maxrl", "batch_std", "gdpo"]))
def test_advantages_of_a_group_sum_to_zero(step, form):
    for values in step_advantages(groups_of(step), form).values:
        assert values.dtype == np.float32 and abs(float(values.sum())) < 1e-4


@given(steps)
def test_leave_one_out_is_dr_grpo_scaled_by_the_group_size(step):
    for rows, mean, others in zip(
        step, advantages(groups_of(step), "dr_grpo"), advantages(groups_of(step), "rloo"), strict=True
    ):
        count = sum(ok for *_, ok in rows)
        assert others == pytest.approx([value * count / max(count - 1, 1) for value in mean], abs=1e-5)


def test_every_form_the_configuration_allows_exists():
    assert set(get_args(Advantage)) == set(ADVANTAGES)
