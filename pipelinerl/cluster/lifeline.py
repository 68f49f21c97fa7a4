"""No process outlives the one that started it."""

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

INTERVAL_S = 1.0


def end_with_parent() -> None:
    """End this process, and all that it has started, within about INTERVAL_S of its parent's end.

    Ray's workers notice that their raylet is gone when they next talk to it, and what they have started (the core of an
    engine) has no such tie. The kernel's PR_SET_PDEATHSIG is about the parent's thread, and Ray's may be short-lived.
    """
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os.kill(os.getpid(), signal.SIGKILL)
