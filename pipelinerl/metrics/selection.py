"""Are the samples that are trained on those that were generated? Lengths and rewards of both, over a sliding window.

A sample is *resolved* when its group is trained on or dropped. Of the resolved samples of the last `window` steps,
those that were trained on are compared with all: in a run that leaves nothing out these are the same. Groups that are
generated and still wait are in neither: they follow in order of admission, whatever they are like, and comparing them
would show how the policy moves, not how samples are chosen. Left out are the samples of dropped groups, and those whose
outcome is not scored, of which only lengths are compared, for they have no reward.

    D      largest difference of two distribution functions (Kolmogorov and Smirnov's statistic), trained and resolved
    limit  what D exceeds by chance with probability ALPHA at most, were the samples left out a random draw

With samples used of n groups and left out of m, D(trained, left out) stays below c sqrt((n + m) / (n m)) with
c = sqrt(-ln(ALPHA / 2) / 2); D(trained, resolved) is that times the share of samples that was left out. Groups count
and not samples, because the samples of one prompt are alike. A difference below LEAST is no alarm however sure it is.

Groups whose rewards are all equal and that `batch.zero_variance=refill` replaces are left out on purpose. They are in
the metrics, and not in what the alarm compares.

Of samples in flight the driver knows how long they have been running: `selection/running_age_max` (versions since the
admission of the oldest) against `selection/finished_age_max`, and their seconds. Their lengths and rewards nobody
knows, so they are not compared.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelinerl.types import GroupMeta

ALPHA = 1e-4  # per step and quantity
LEAST = 0.05
ON_PURPOSE = ("zero_variance",)
QUANTITIES = ("length", "reward")

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A group that was trained on, or dropped for `reason`."""

    lengths: tuple[int, ...]  # of the sampled tokens of each rollout
    rewards: tuple[float, ...]  # of each; nan where not scored
    reason: str = ""  # "": trained on

    @classmethod
    def of(cls, group: GroupMeta, reason: str = "") -> "Resolved":
        return cls(
            tuple(rollout.completion_len for rollout in group.rollouts),
            tuple(rollout.reward if rollout.outcome.scored else math.nan for rollout in group.rollouts),
            reason,
        )


@dataclass(frozen=True, slots=True)
class Sides:
    """One quantity of some resolved groups: the values that were trained on, the others, and of how many groups."""

    used: Values
    left_out: Values
    groups_used: int
    groups_left_out: int

    @classmethod
    def of(cls, groups: Sequence[Resolved], quantity: str) -> "Sides":
        """`quantity`: "length" or "reward"."""
        used: list[float] = []
        left_out: list[float] = []
        groups_used = groups_left_out = 0
        for group in groups:
            values = group.rewards if quantity == "reward" else group.lengths
            scored = [v for v, reward in zip(values, group.rewards, strict=True) if math.isfinite(reward)]
            others = [v for v, r in zip(values, group.rewards, strict=True) if not math.isfinite(r)]
            ours, theirs = ([], scored) if group.reason else (scored, [])
            if quantity == "length":
                theirs = theirs + others
            used += ours
            left_out += theirs
            groups_used += bool(ours)
            groups_left_out += bool(theirs)
        return cls(np.array(used, np.float64), np.array(left_out, np.float64), groups_used, groups_left_out)

    @classmethod
    def together(cls, parts: Sequence["Sides"]) -> "Sides":
        return cls(
            np.concatenate([np.zeros(0), *(part.used for part in parts)]),
            np.concatenate([np.zeros(0), *(part.left_out for part in parts)]),
            sum(part.groups_used for part in parts),
            sum(part.groups_left_out for part in parts),
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The values that were trained on, against all that are resolved."""

    distance: float  # D; 0 when there is nothing to compare
    limit: float  # inf when there is nothing to compare
    trained_mean: float
    resolved_mean: float

    @property
    def parted(self) -> bool:
        return self.distance > max(self.limit, LEAST)


def ks_distance(a: Values, b: Values) -> float:
    """Largest difference between the distribution functions of two samples, 0 to 1; nan when one is empty."""
    if not len(a) or not len(b):
        return math.nan
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    below_a = np.searchsorted(a, at, side="right") / len(a)
    below_b = np.searchsorted(b, at, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


def ks_limit(n: int, m: int, alpha: float = ALPHA) -> float:
    """What `ks_distance` of n and of m draws from one distribution exceeds with probability `alpha` at most."""
    if not n or not m:
        return math.inf
    return math.sqrt(-math.log(alpha / 2) / 2) * math.sqrt((n + m) / (n * m))


def compare(sides: Sides) -> Comparison:
    """How far what was trained on is from all of it."""
    ours, everything = sides.used, np.concatenate([sides.used, sides.left_out])
    means = (float(ours.mean()) if len(ours) else math.nan, float(everything.mean()) if len(everything) else math.nan)
    if not len(ours) or not len(sides.left_out):
        return Comparison(0.0, math.inf, *means)
    share = len(sides.left_out) / len(everything)
    return Comparison(ks_distance(ours, everything), ks_limit(sides.groups_used, sides.groups_left_out) * share, *means)


@dataclass(frozen=True, slots=True)
class _Step:
    """What was resolved in one step, by quantity."""

    unasked: Mapping[str, Sides]
    on_purpose: Mapping[str, Sides]  # all of it left out
    samples: int
    left_out: int

    @classmethod
    def of(cls, groups: Sequence[Resolved]) -> "_Step":
        asked = [group for group in groups if group.reason in ON_PURPOSE]
        unasked = [group for group in groups if group.reason not in ON_PURPOSE]
        samples = sum(len(group.lengths) for group in groups)
        used = sum(sum(map(math.isfinite, group.rewards)) for group in groups if not group.reason)
        judged, shown = ({q: Sides.of(part, q) for q in QUANTITIES} for part in (unasked, asked))
        return cls(judged, shown, samples, samples - used)


class SelectionAudit:
    """Told of every group as the driver learns of it; asked once a step.

    Args:
        window: steps.
        now: a clock, seconds.
    """

    def __init__(self, window: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._resolved: list[Resolved] = []  # since the last step
        self._window: deque[_Step] = deque(maxlen=window)
        self._running: dict[int, tuple[int, float]] = {}  # ticket -> version and time of its admission
        self._finished: deque[list[tuple[int, float]]] = deque([[]], maxlen=window)  # versions and seconds they took
        self._reported: set[str] = set()

    def admitted(self, ticket: int, version: int) -> None:
        """A ticket that is requeued keeps the age that it has."""
        self._running.setdefault(ticket, (version, self._now()))

    def start_anew(self) -> None:
        """Nothing is in flight any more."""
        self._running.clear()

    def finished(self, group: GroupMeta, version: int) -> None:
        """All of its samples are there; the engines serve `version`."""
        if found := self._running.pop(group.id, None):
            self._finished[-1].append((version - found[0], self._now() - found[1]))

    def trained(self, groups: Sequence[GroupMeta]) -> None:
        self._resolved += [Resolved.of(group) for group in groups]

    def dropped(self, group: GroupMeta, reason: str) -> None:
        self._resolved.append(Resolved.of(group, reason))

    def step(self, version: int) -> tuple[dict[str, float], list[str]]:
        """At the end of a step: its metrics, and a message for each quantity that begins to part with it.

        version: that the engines serve.
        """
        self._window.append(_Step.of(self._resolved))
        self._resolved = []
        left_out = sum(step.left_out for step in self._window) / max(1, sum(step.samples for step in self._window))
        metrics, messages = {"selection/left_out": left_out}, list[str]()
        for quantity in QUANTITIES:
            unasked = Sides.together([step.unasked[quantity] for step in self._window])
            on_purpose = Sides.together([step.on_purpose[quantity] for step in self._window])
            judged = compare(unasked)
            found = compare(Sides.together([unasked, on_purpose])) if len(on_purpose.left_out) else judged
            metrics |= {
                f"selection/{quantity}_distance": found.distance,
                f"selection/{quantity}_trained_mean": found.trained_mean,
                f"selection/{quantity}_resolved_mean": found.resolved_mean,
            }
            if math.isfinite(judged.limit):
                metrics[f"selection/{quantity}_limit"] = judged.limit
            messages += self._begun(quantity, judged)
        metrics |= self._ages(version)
        self._finished.append([])
        return metrics, messages

    def _begun(self, quantity: str, judged: Comparison) -> Iterator[str]:
        if not judged.parted:
            self._reported.discard(quantity)
        elif quantity not in self._reported:
            self._reported.add(quantity)
            yield (
                f"selection: the {quantity}s of trained samples are not those of generated ones: their distributions "
                f"are {judged.distance:.2f} apart, by chance at most {judged.limit:.2f} (mean "
                f"{judged.trained_mean:.4g} trained, {judged.resolved_mean:.4g} generated); groups/* and outcome/* "
                "count what is left out"
            )

    def _ages(self, version: int) -> dict[str, float]:
        now = self._now()
        running = [(version - since, now - began) for since, began in self._running.values()]
        finished = [one for step in self._finished for one in step]
        metrics = {"selection/running": float(len(running))}
        for name, ages in (("running", running), ("finished", finished)):
            if ages:
                metrics[f"selection/{name}_age_max"] = float(max(age for age, _ in ages))
                metrics[f"selection/{name}_s_max"] = max(seconds for _, seconds in ages)
        return metrics
