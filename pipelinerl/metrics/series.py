"""One metric over the steps of a run, out of the records that `read_metrics` returns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.metrics.log import Kind

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Series:
    """`values[i]` was logged at optimizer step `steps[i]`; steps ascend and nan values are left out."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def first(self, count: int) -> float:
        """Mean of the first `count` values; nan when there are none."""
        return mean(self.values[:count])

    def last(self, count: int) -> float:
        """Mean of the last `count` values; nan when there are none."""
        return mean(self.values[-count:])

    def running_mean(self, window: int) -> NDArray[np.float64]:
        """At each step the mean of up to `window` values that end there."""
        return np.array([mean(self.values[max(0, end - window) : end]) for end in range(1, len(self) + 1)])

    def since(self, step: int) -> "Series":
        """The part at steps >= `step`."""
        keep = self.steps >= step
        return Series(self.steps[keep], self.values[keep])


def mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


def series(records: Records, kind: Kind, name: str) -> Series:
    """Metric `name` of the records of `kind`. A step that a resumed run did again counts as it was done last."""
    found = {
        int(record["step"]): float(record[name]) for record in records if record["kind"] == kind and name in record
    }
    steps = [step for step in sorted(found) if not math.isnan(found[step])]
    return Series(np.array(steps, dtype=np.int64), np.array([found[step] for step in steps], dtype=np.float64))


def intervals(records: Records, task: str, figure: str) -> tuple[Series, Series]:
    """Lower and upper ends of the 95% intervals of `eval/<task>/<figure>`."""
    name = f"eval/{task}/{figure}"
    return series(records, "eval", f"{name}/ci_low"), series(records, "eval", f"{name}/ci_high")


def accuracies(records: Records) -> dict[str, Series]:
    """Task -> its `eval/<task>/accuracy`, tasks in alphabetical order."""
    names = {name for record in records if record["kind"] == "eval" for name in record}
    tasks = sorted(
        name.removeprefix("eval/").removesuffix("/accuracy")
        for name in names
        if name.startswith("eval/") and name.endswith("/accuracy")
    )
    return {task: series(records, "eval", f"eval/{task}/accuracy") for task in tasks}
