"""Strict JSON lines on disk: non-finite floats travel as strings, and a line torn by a crash is survivable."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelinerl.errors import DataError, EnvironmentProblem

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def json_float(value: float) -> float | str:
    """`value` itself, or "nan", "inf", "-inf": JSON has no literal for these, and jq and pandas refuse Python's."""
    number = float(value)
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else ("inf" if number > 0 else "-inf")


def from_json_float(value: float | str) -> float:
    """Inverse of `json_float`."""
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON in UTF-8, newline included. Raises ValueError for a non-finite float left in it.

    A lone surrogate, which broken model output can hold, has no UTF-8 form: `backslashreplace` makes it the JSON
    escape it needs.
    """
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


class LineFile:
    """An append-only file of JSON lines, unbuffered: a line that was appended is with the operating system.

    Raises:
        EnvironmentProblem: the file cannot be opened or written (disk full, permissions); names the path.
    """

    def __init__(self, path: Path, truncate: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and not truncate:
                _end_at_a_line(path)
            self._file = open(path, "wb" if truncate else "ab", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise EnvironmentProblem(f"cannot open {path}: {error.strerror or error}") from error

    def append(self, record: Mapping[str, Any]) -> None:
        rest = memoryview(to_line(record))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()


def _end_at_a_line(path: Path) -> None:
    """Cut off a last line that a crash left incomplete, so that the next one starts on a line of its own."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    tail = data[whole:]
    if not tail:
        return
    with path.open("r+b") as file:
        if _parses(tail):
            file.seek(0, 2)
            file.write(b"\n")
        else:
            file.truncate(whole)


def _parses(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in order; an incomplete last line is left out.

    Raises:
        DataError: the file is not there, or a line before the last is not a JSON object; names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    records: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not _parses(line):
            if number == len(lines):  # no newline follows it: the writer died here
                break
            raise DataError(f"{path}, line {number}: not a JSON object")
        records.append(json.loads(line))
    return records
