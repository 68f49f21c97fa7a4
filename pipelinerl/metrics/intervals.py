"""95% confidence intervals of a mean over problems. Pure, and the same for the same numbers: nothing is resampled.

Problems are the unit: completions of one problem are not independent, so an interval over all completions would be too
narrow (2411.00640). What is a share, in [0, 1], gets Wilson's score interval, which holds near 0 and 1 and for few
problems, where mean +- 1.96 standard errors does not (Brown, Cai, DasGupta 2001). Its n is the effective sample size
(Kish 1965; for score intervals Korn and Graubard 1998): the number of independent yes-or-no outcomes that would vary as
much as the problems' values do. With one yes-or-no completion per problem that is the number of problems, and the
interval is Wilson's own. What is no share gets Student's t interval.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
Z = 1.959963984540054  # quantile of the normal distribution at (1 + LEVEL) / 2

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and the interval [low, high] around it; nan where one problem says nothing about spread."""

    value: float
    low: float
    high: float
    problems: int


def mean_interval(values: Values, outcomes: int) -> Estimate:
    """The mean of a value per problem, [N] with N > 0.

    `outcomes`: independent outcomes behind all values together, at least N. No interval is narrower than theirs.
    """
    assert 0 < len(values) <= outcomes, (len(values), outcomes)
    mean = float(values.mean())
    if values.min() < 0 or values.max() > 1:
        return Estimate(mean, *_student(values), len(values))
    return Estimate(mean, *_wilson(mean, _effective_size(values, outcomes)), len(values))


def paired_difference(before: Values, after: Values) -> Estimate:
    """The mean of after - before, [N] each, of the same problems in the same order, N > 0.

    Shares: the interval of Agresti and Min (2005), which adds two problems, one for either direction, each with half
    its weight; so it has a width even when all problems changed alike. Otherwise Student's t on the differences.
    """
    assert 0 < len(before) == len(after), (len(before), len(after))
    differences, count = after - before, len(before)
    both = np.concatenate([before, after])
    if both.min() < 0 or both.max() > 1:
        return Estimate(float(differences.mean()), *_student(differences), count)
    middle = float(differences.sum()) / (count + 2)
    variance = (float((differences**2).sum()) + 1) / (count + 2) - middle**2
    half = Z * math.sqrt(variance / (count + 2))
    return Estimate(float(differences.mean()), max(-1.0, middle - half), min(1.0, middle + half), count)


def _effective_size(values: Values, outcomes: int) -> float:
    """Yes-or-no outcomes whose mean has the standard error of the mean of `values`, between N and `outcomes`."""
    count, mean = len(values), float(values.mean())
    if count == 1 or mean in (0.0, 1.0):  # nothing is seen of how problems differ
        return float(count)
    variance = float(values.var(ddof=1))
    size = count * mean * (1 - mean) / variance if variance > 0 else math.inf
    return min(max(size, float(count)), float(outcomes))


def _wilson(mean: float, size: float) -> tuple[float, float]:
    scale = 1 + Z**2 / size
    middle = (mean + Z**2 / (2 * size)) / scale
    half = Z / scale * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    return (0.0 if mean == 0 else max(0.0, middle - half)), (1.0 if mean == 1 else min(1.0, middle + half))


def _student(values: Values) -> tuple[float, float]:
    count = len(values)
    if count < 2:
        return math.nan, math.nan
    half = student_quantile(count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


def student_quantile(freedom: int) -> float:
    """Quantile of Student's t distribution at (1 + LEVEL) / 2.

    Exact for 1 and 2 degrees of freedom, else Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), whose
    error is 0.13% at 3 and falls from there.
    """
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    if freedom == 2:
        return LEVEL / math.sqrt((1 - LEVEL**2) / 2)
    z = Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))
