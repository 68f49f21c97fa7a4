"""From the groups of a step to the work of the ranks: what is trained on, with which weight, in which update."""

import pytest

from pipelinerl.errors import DataError
from pipelinerl.types import GroupMeta, Outcome, RolloutMeta, SampleKL
from pipelinerl.updates import make_batches, why_unusable
from tests.unit.fakes import references, small_config

OK, ERROR, TRUNCATED, TOO_LONG = Outcome.OK, Outcome.ENV_ERROR, Outcome.TRUNCATED, Outcome.PROMPT_TOO_LONG
PROMPT = 3


def group(rewards, lengths=None, outcomes=None, id=0, components=None):
    rows = zip(
        rewards,
        lengths or [2] * len(rewards),
        outcomes or [OK] * len(rewards),
        components or [{}] * len(rewards),
        strict=True,
    )
    rollouts = tuple(RolloutMeta(r, o, parts, n + PROMPT, PROMPT, n, {0: n}) for r, n, o, parts in rows)
    return GroupMeta(id, f"train/{id}", 0, rollouts, 1.0)


def trained(groups, *overrides, step=1, kl=None):
    """(group, rollout) -> reference, in a run with these settings."""
    return {
        (ref.group, ref.rollout): ref
        for ref in references(make_batches(groups, small_config(*overrides), step, kl).updates)
    }


FOUR = [group([1, 0], [1, 3]), group([0, 1], [2, 2]), group([1, 0], [4, 4]), group([1, 0], [5, 1])]
FOUR_GROUPS = "batch.groups_per_step=4"


def test_one_update_trains_on_all_groups_with_one_denominator():
    refs = trained(FOUR, FOUR_GROUPS)
    assert list(refs) == [(g, r) for g in range(4) for r in range(2)]
    assert {ref.weight for ref in refs.values()} == {1 / 22}  # 4 + 4 + 8 + 6 tokens
    assert [refs[0, r].length for r in range(2)] == [1 + PROMPT, 3 + PROMPT]
    assert [ref.advantage for ref in refs.values()] == [1, -1, -1, 1, 1, -1, 1, -1]


def test_updates_share_the_groups_in_order_and_each_has_its_own_denominator():
    made = make_batches(FOUR, small_config(FOUR_GROUPS, "batch.updates=2", "trainer.ranks=2"), 1)
    first, second = (references([update]) for update in made.updates)
    assert [ref.group for ref in first] == [0, 0, 1, 1]
    assert [ref.group for ref in second] == [2, 2, 3, 3]
    assert {ref.weight for ref in first} == {1 / 8} and {ref.weight for ref in second} == {1 / 14}
    assert [len(update) for update in made.updates] == [2, 2]  # ranks


def test_advantages_are_of_the_whole_step_whatever_the_number_of_updates():
    # centred rewards .5 -.5 and 2 -2: std over the step sqrt((.25 + .25 + 4 + 4) / 4) = 1.4577380; of the first update
    # alone it would be .5
    groups = [group([1, 0]), group([4, 0])]
    for updates in (1, 2):
        refs = trained(groups, f"batch.updates={updates}", "algo.advantage=batch_std")
        assert refs[0, 0].advantage == pytest.approx(0.5 / 1.4577380, rel=1e-5)


@pytest.mark.parametrize("kind", ["reinforce_is", "gspo"])
def test_completions_that_were_not_scored_are_in_no_batch_no_baseline_and_no_denominator(kind):
    groups = [group([1, float("nan"), 0], [1, 50, 3], [OK, ERROR, OK]), group([1, 0, 0])]
    refs = trained(groups, f"algo.kind={kind}")
    assert (0, 1) not in refs and len(refs) == 5
    assert refs[0, 0].advantage == 1 and refs[0, 2].advantage == -1
    expected = {"reinforce_is": 1 / 10, "gspo": 1 / (5 * 3)}[kind]  # 1 + 3 + 6 tokens; 5 sequences, this one of 3
    assert refs[0, 2].weight == pytest.approx(expected)


def test_masking_truncated_completions_changes_neither_baseline_nor_denominator():
    groups = [group([1, 0, 0], [2, 2, 9], [OK, OK, TRUNCATED]), group([1, 0, 0], [3, 3, 3])]
    plain, masked = trained(groups), trained(groups, "algo.mask_truncated=true")
    assert masked[0, 2].weight == 0 and plain[0, 2].weight == 1 / 22
    assert all(masked[place] == ref for place, ref in plain.items() if place != (0, 2))
    assert masked[0, 2].advantage == plain[0, 2].advantage


def test_shaped_rewards_are_what_advantages_are_made_of():
    # limit 10, buffer 4: a length of 8 costs half of the penalty
    groups = [group([1, 1], [6, 8])]
    made = make_batches(groups, small_config("sampling.max_tokens=10", "reward.overlong_buffer=4"), 1)
    assert [values.tolist() for values in made.advantages] == [[0.5, -0.5]]
    assert made.metrics == {"adv/abs_mean": 0.5, "reward/shaped_mean": 0.75, "reward/shaped_std": 0.25}


def test_without_shaping_there_are_no_shaped_rewards_in_the_metrics():
    assert make_batches(FOUR, small_config(FOUR_GROUPS), 1).metrics == {"adv/abs_mean": 1.0}


def test_reward_weights_choose_the_components_and_a_wrong_one_names_the_group():
    parts = [{"match": 1.0, "format": 0.0}, {"match": 0.0, "format": 1.0}]
    refs = trained([group([5, 5], components=parts)], "reward.weights={match: 1.0, format: 0.25}")
    assert refs[0, 0].advantage == 0.75  # 1 - .25
    with pytest.raises(DataError, match=r"train/3: reward\.weights\.mach .* it has format, match"):
        trained([group([5, 5], components=parts, id=3)], "reward.weights={mach: 1.0}")


# KL in the reward

IN_REWARD = ("algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.coef=0.5")


def test_a_kl_in_the_reward_changes_advantages_and_not_the_packing():
    groups = [group([1, 0], id=0), group([1, 0], id=1)]
    kl = [SampleKL(1, 0, 0.8, 1.0, 1.0), SampleKL(0, 1, 0.2, 1.0, 1.0)]
    kl += [SampleKL(0, 0, 0.0, 0.0, 0.0), SampleKL(1, 1, 0.0, 0.0, 0.0)]
    before, after = trained(groups, *IN_REWARD), trained(groups, *IN_REWARD, kl=kl)
    assert {place: ref.advantage for place, ref in after.items()} == pytest.approx(
        {(0, 0): 1.1, (0, 1): -1.1, (1, 0): 0.6, (1, 1): -0.6}  # 1 - (0 - .1), and (1 - .4) - 0
    )
    assert [(r.length, r.weight) for r in before.values()] == [(r.length, r.weight) for r in after.values()]
    metrics = make_batches(groups, small_config(*IN_REWARD), 1, kl).metrics
    assert metrics["reward/kl_mean"] == pytest.approx((0.4 + 0.1) / 4)


def test_reinforce_pp_leaves_the_kl_to_go_of_all_updates_to_the_trainer():
    # one token each; R - .5 K of the tokens: 1 0 0 -1, so mean 0, std sqrt(1/2)
    groups = [group([1, 1], [1, 1]), group([1, 0], [1, 1])]
    kl = [SampleKL(g, r, k, k, k * k) for g, r, k in [(0, 0, 0.0), (0, 1, 2.0), (1, 0, 2.0), (1, 1, 2.0)]]
    made = make_batches(groups, small_config(*IN_REWARD, "algo.advantage=reinforce_pp", "batch.updates=2"), 1, kl)
    assert [batch.kl_to_go for ranks in made.updates for batch in ranks] == pytest.approx([0.5 * 2**0.5] * 2, rel=1e-5)
    assert [ref.advantage for ref in references(made.updates)] == pytest.approx([2**0.5] * 3 + [0], abs=1e-5)


@pytest.mark.parametrize(("step", "coef"), [(1, 0.5), (3, 0.25), (5, 0.0), (8, 0.0)])
def test_the_coefficient_follows_its_schedule(step, coef):
    settings = (*IN_REWARD, "algo.kl.final_coef=0", "algo.kl.anneal_steps=5", "steps=8")
    kl = [SampleKL(0, 0, 1.0, 1.0, 1.0), SampleKL(0, 1, 0.0, 0.0, 0.0)]
    assert trained([group([1, 0])], *settings, step=step, kl=kl)[0, 0].advantage == pytest.approx(1 - coef)


# Ranks


def test_ranks_that_share_sequences_get_the_same_work():
    settings = ("trainer.ranks=4", "trainer.sequence_parallel=2", FOUR_GROUPS)
    (update,) = make_batches(FOUR, small_config(*settings), 1).updates
    assert update[0] is update[1] and update[2] is update[3]
    assert len(references([[update[0], update[2]]])) == 8  # all of it, once


def test_fewer_groups_than_updates_make_fewer_updates():
    # pipelinerl parity trains on what a probe left over
    assert len(make_batches([group([1, 0])], small_config("batch.updates=2"), 1).updates) == 1


# Groups that are replaced


@pytest.mark.parametrize(
    ("meta", "settings", "reason"),
    [
        (group([1, 0], outcomes=[OK, ERROR]), [], "errored"),
        (group([0, 0], outcomes=[TOO_LONG, TOO_LONG]), [], "prompt_too_long"),
        (group([1, 0, 0], outcomes=[OK, TOO_LONG, ERROR]), [], "errored"),
        (group([1, 1]), [], None),
        (group([1, 1]), ["batch.zero_variance=refill"], "zero_variance"),
        (group([1, 0]), ["batch.zero_variance=refill"], None),
        (group([1, 1, 0], outcomes=[OK, OK, ERROR]), ["batch.zero_variance=refill"], "zero_variance"),
        # the trained rewards count, not the task's
        (group([1, 1], [1, 1024]), ["batch.zero_variance=refill", "reward.length_penalty=0.5"], None),
        (
            group([1, 0], components=[{"a": 1.0}, {"a": 1.0}]),
            ["batch.zero_variance=refill", "reward.weights={a: 1.0}"],
            "zero_variance",
        ),
        (
            group([1, 1], components=[{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]),
            ["batch.zero_variance=refill", "algo.advantage=gdpo"],
            None,
        ),
    ],
)
def test_why_a_group_is_replaced(meta, settings, reason):
    assert why_unusable(meta, small_config(*settings)) == reason
