"""The calls to workers that have not returned: where a driver that waits is, a weight update included."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_numbers = itertools.count()
_calls: dict[int, tuple[str, str, float]] = {}  # number -> (worker, method, time it began)


@contextmanager
def noted(worker: str, method: str) -> Iterator[None]:
    """Count the call among the open ones while the body runs."""
    number = next(_numbers)
    _calls[number] = (worker, method, time.monotonic())
    try:
        yield
    finally:
        del _calls[number]


def open_calls() -> list[dict[str, Any]]:
    """Open calls by worker and method, the longest wait first: how many there are and the seconds of the oldest."""
    now = time.monotonic()
    found: dict[tuple[str, str], list[float]] = {}
    for worker, method, began in tuple(_calls.values()):
        found.setdefault((worker, method), []).append(now - began)
    entries = [
        {"worker": worker, "method": method, "open": len(ages), "oldest_s": round(max(ages), 1)}
        for (worker, method), ages in found.items()
    ]
    return sorted(entries, key=lambda entry: -float(entry["oldest_s"]))
