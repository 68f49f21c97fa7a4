"""The grader process: answers JSON lines on stdin with JSON lines on stdout. Started by `grader.py`.

It runs scorers over text that a model wrote, so it holds nothing worth stealing, cannot outlive its parent, has a
bounded address space, and keeps its two pipes away from the scorer's own input and output. Only the standard library
is imported here, so that it starts in milliseconds.

    {"load": "package.module:function"}                 -> {} or {"unloadable": why}
    {"scorer": "package.module:function", "kwargs": {}} -> {"reward": r, "parts": {name: r}} or {"error": why}
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

MAX_DETAIL = 2000  # characters of an error's text
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Scorer = Callable[..., "float | Mapping[str, float]"]


def main() -> None:
    """Serve until stdin closes. `argv[1]` is the process that must be alive, `argv[2]` the address space in bytes."""
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to stop
    _limit(resource.RLIMIT_AS, int(sys.argv[2]))
    _limit(resource.RLIMIT_CORE, 0)
    requests, replies = _claim_pipes()
    _send(replies, {})
    for line in requests:
        _send(replies, _answer(json.loads(line)))


def _die_with(parent: int) -> None:
    """Have the kernel SIGKILL this process when the parent's thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _claim_pipes() -> tuple[TextIO, TextIO]:
    """Move the pipes off fds 0 and 1, where a scorer would read and print, and silence 0, 1 and 2.

    Until here stderr is the parent's, so that a grader that cannot start says why.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return requests, replies


def _send(replies: TextIO, reply: Mapping[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    if "load" in request:
        try:
            _resolve(request["load"])
        except BaseException as error:
            return {"unloadable": _describe(error)}
        return {}
    try:
        return _plain(_resolve(request["scorer"])(**request["kwargs"]))
    except BaseException as error:  # also SystemExit and MemoryError: a scorer's fault is reported, not died of
        return {"error": _describe(error)}


def _resolve(spec: str) -> Scorer:
    module, _, function = spec.partition(":")
    scorer = getattr(importlib.import_module(module), function)
    if not callable(scorer):
        raise TypeError(f"{function} is a {type(scorer).__name__}, not a function")
    return scorer  # type: ignore[no-any-return]


def _plain(result: "float | Mapping[str, float]") -> dict[str, Any]:
    """The scorer's result as JSON: a number is the reward, a mapping names the parts whose sum is the reward."""
    if isinstance(result, Mapping):
        parts = {str(name): _number(value) for name, value in result.items()}
        return {"reward": sum(parts.values()), "parts": parts}
    return {"reward": _number(result), "parts": {}}


def _number(value: object) -> float:
    """A float; bools and numpy scalars count as numbers, text does not."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"the scorer returned a {type(value).__name__} where a number was expected")
    return float(value)


def _describe(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception whose __str__ raises
        text = type(error).__name__
    return text[:MAX_DETAIL]


if __name__ == "__main__":
    main()
