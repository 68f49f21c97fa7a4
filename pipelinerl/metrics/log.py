"""The run's record of numbers: `metrics.jsonl` first, mirrors (W&B, console) after.

The file is the truth and failing to write it is an error. A mirror that fails is switched off with one warning.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelinerl.metrics.jsonl import LineFile, from_json_float, json_float, read_lines

logger = logging.getLogger(__name__)

Kind = Literal["train", "eval", "run"]

FILE_NAME = "metrics.jsonl"
ELAPSED = "time/elapsed_s"


class Sink(Protocol):
    """A mirror of the metrics. It may raise; it then gets no further calls but `close`."""

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """`step` is in optimizer steps; `values` holds `time/elapsed_s` too. Must not block for long."""

    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON line per call to `run_dir/metrics.jsonl` and mirrors it to the sinks.

    A resumed run appends to the file it finds: elapsed time goes on from the last line, and where a step was
    logged twice, the later line counts.

    Raises:
        EnvironmentProblem: the file cannot be opened or written; names the path.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink] = ()) -> None:
        self.path = run_dir / FILE_NAME
        self._file = LineFile(self.path)
        self._sinks = list(sinks)
        self._alive = list(sinks)
        self._start = time.monotonic() - _elapsed_before(self.path)

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, earlier lives of a resumed run included."""
        return time.monotonic() - self._start

    def log(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Record `values` (metric name -> number) at optimizer step `step`."""
        assert not {"kind", "step", ELAPSED} & values.keys(), f"reserved names in {sorted(values)}"
        numbers = {ELAPSED: round(self.elapsed_s, 3)} | {name: float(value) for name, value in values.items()}
        encoded = {name: json_float(value) for name, value in numbers.items()}
        self._file.append({"kind": kind, "step": int(step)} | encoded)
        for sink in tuple(self._alive):
            try:
                sink.write(kind, step, numbers)
            except Exception as error:
                self._alive.remove(sink)
                logger.warning("%s switched off: %s. %s has all metrics", _name(sink), _cause(error), self.path)

    def close(self) -> None:
        """Close the file and all sinks. Safe to call twice."""
        self._file.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("%s did not close: %s", _name(sink), _cause(error))
        self._sinks, self._alive = [], []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`: `kind` (str), `step` (int) and floats, non-finite ones restored.

    An incomplete last line is left out. Raises `DataError` naming file and line for any other damage.
    """
    return [
        {name: value if name in ("kind", "step") else from_json_float(value) for name, value in record.items()}
        for record in read_lines(path)
    ]


def _elapsed_before(path: Path) -> float:
    if not path.is_file():
        return 0.0
    return max((float(record.get(ELAPSED, 0.0)) for record in read_metrics(path)), default=0.0)


def _name(sink: Sink) -> str:
    return type(sink).__name__


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
