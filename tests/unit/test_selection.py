"""The selection audit: its statistic by hand, its false alarms by simulation, and what it is told by the loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.metrics.selection import (
    LEAST,
    Comparison,
    Resolved,
    SelectionAudit,
    Sides,
    compare,
    ks_distance,
    ks_limit,
)
from pipelinerl.types import GroupMeta, Outcome, RolloutMeta

OK, ERROR = Outcome.OK, Outcome.ENV_ERROR


def resolved(lengths: list[int], reason: str = "", rewards: list[float] | None = None) -> Resolved:
    return Resolved(tuple(lengths), tuple(rewards or [1.0] * len(lengths)), reason)


def compared(groups: list[Resolved], quantity: str) -> Comparison:
    return compare(Sides.of(groups, quantity))


def test_the_statistic_by_hand() -> None:
    assert ks_distance(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert ks_distance(np.array([1.0, 2.0]), np.array([3.0])) == 1
    # up to 1: 1/2 and 1/4; up to 2: 1 and 1/2
    assert ks_distance(np.array([1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])) == 0.5
    assert math.isnan(ks_distance(np.array([]), np.array([1.0])))


def test_the_limit_by_hand() -> None:
    # c(0.05) = sqrt(-ln(0.025) / 2) = 1.3581, the textbook value; 20 and 30 draws
    assert ks_limit(20, 30, alpha=0.05) == pytest.approx(1.3581 * math.sqrt(50 / 600), rel=1e-4)
    assert ks_limit(0, 5) == ks_limit(5, 0) == math.inf


values = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=12).map(np.array)


@given(values, values)
def test_a_part_differs_from_the_whole_by_the_share_of_the_rest(used: np.ndarray, left_out: np.ndarray) -> None:
    """Why the limit for (trained, resolved) is that for (trained, left out) times the share that was left out."""
    whole = np.concatenate([used, left_out])
    share = len(left_out) / len(whole)
    assert ks_distance(used, whole) == pytest.approx(share * ks_distance(used, left_out), abs=1e-12)


@given(values, values)
def test_order_and_side_do_not_matter(a: np.ndarray, b: np.ndarray) -> None:
    assert ks_distance(a, b) == ks_distance(b[::-1], a[::-1])


def test_when_nothing_is_left_out_nothing_can_part() -> None:
    found = compared([resolved([1, 2]), resolved([9, 9])], "length")
    assert (found.distance, found.limit, found.parted) == (0.0, math.inf, False)
    assert found.trained_mean == found.resolved_mean == 5.25


def test_the_lengths_of_samples_without_a_score_count_and_their_rewards_do_not() -> None:
    groups = [resolved([1, 9], rewards=[1.0, math.nan]), resolved([2, 2], rewards=[0.0, 1.0])]
    lengths, rewards = compared(groups, "length"), compared(groups, "reward")
    assert (lengths.trained_mean, lengths.resolved_mean) == (5 / 3, 3.5)
    assert lengths.distance == pytest.approx(1 / 4)
    assert (rewards.distance, rewards.resolved_mean) == (0.0, 2 / 3)


def drops(rng: np.random.Generator, biased: bool) -> list[Resolved]:
    """200 groups of 4 with lengths of their own, a quarter dropped: at random, or those that are long."""
    groups = []
    for mean in rng.lognormal(4, 0.7, 200):
        lengths = rng.poisson(mean, 4).tolist()
        dropped = sum(lengths) > 4 * 85 if biased else rng.random() < 0.25
        groups.append(resolved(lengths, "errored" if dropped else ""))
    return groups


def test_random_drops_part_rarely_and_drops_of_long_groups_surely() -> None:
    rng = np.random.default_rng(0)
    found = [compared(drops(rng, biased=False), "length") for _ in range(300)]
    assert not any(one.parted for one in found)
    assert max(one.distance for one in found) > 0.02, "they do differ"
    assert all(compared(drops(rng, biased=True), "length").parted for _ in range(20))


def test_samples_of_a_group_are_alike_so_groups_are_counted() -> None:
    """Counted as samples, random drops of such groups would part now and then."""
    rng = np.random.default_rng(1)
    false_alarms = 0
    for _ in range(300):
        groups = [
            resolved([length] * 16, "errored" if rng.random() < 0.25 else "") for length in rng.integers(1, 999, 60)
        ]
        found = compared(groups, "length")
        assert not found.parted
        false_alarms += found.distance > found.limit / math.sqrt(16)
    assert false_alarms > 3


# The audit


def group(ticket: int, lengths: list[int], reward: float = 1.0, outcome: Outcome = OK) -> GroupMeta:
    rollouts = tuple(RolloutMeta(reward, outcome, {}, n + 1, 1, n, {0: n}) for n in lengths)
    return GroupMeta(ticket, f"train/{ticket}", 0, rollouts, 1.0)


def run_steps(audit: SelectionAudit, steps: int, reason: str) -> list[list[str]]:
    """A step trains on 8 short groups, and 4 long ones are dropped."""
    found = []
    for step in range(steps):
        audit.trained([group(i, [10, 11, 12]) for i in range(8)])
        for i in range(4):
            audit.dropped(group(i, [90, 91, 92], reward=0.0), reason)
        found.append(audit.step(step)[1])
    return found


def test_an_alarm_comes_once_and_with_enough_groups() -> None:
    messages = run_steps(SelectionAudit(window=4), 8, "errored")
    told = [step for step, of_step in enumerate(messages) if of_step]
    assert len(told) == 1 and told[0] > 0
    assert len(messages[told[0]]) == 2
    assert "the lengths of trained samples" in messages[told[0]][0] and "the rewards" in messages[told[0]][1]


def test_what_is_left_out_on_purpose_is_shown_and_does_not_alarm() -> None:
    audit = SelectionAudit(window=4)
    assert not any(run_steps(audit, 6, "zero_variance"))
    audit.trained([group(0, [10, 11, 12])])
    metrics, _ = audit.step(7)
    assert metrics["selection/length_distance"] > LEAST and metrics["selection/left_out"] > 0.3
    assert "selection/length_limit" not in metrics


def test_steps_leave_the_window() -> None:
    audit = SelectionAudit(window=2)
    run_steps(audit, 3, "errored")
    found = []
    for step in range(3):
        audit.trained([group(0, [10])])
        found.append(audit.step(step)[0]["selection/length_distance"])
    assert found[0] > 0 and found[1:] == [0, 0]


def test_what_is_in_flight_is_compared_by_age() -> None:
    clock = [0.0]
    audit = SelectionAudit(window=4, now=lambda: clock[0])
    for ticket in range(3):
        audit.admitted(ticket, version=0)
    clock[0] = 2.0
    audit.finished(group(0, [3]), version=1)
    audit.admitted(1, version=1)  # requeued: it keeps its age
    clock[0] = 5.0
    audit.finished(group(2, [3]), version=2)
    metrics, _ = audit.step(version=4)
    assert {
        name.removeprefix("selection/"): value for name, value in metrics.items() if "_s_" in name or "age" in name
    } == {
        "running_age_max": 4.0,
        "running_s_max": 5.0,
        "finished_age_max": 2.0,
        "finished_s_max": 5.0,
    }
    assert metrics["selection/running"] == 1
