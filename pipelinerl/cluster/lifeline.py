"""No process outlives the one that started it."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

INTERVAL_S = 1.0


def end_with_parent(also: Sequence[psutil.Process] = ()) -> None:
    """End this process, all that it has started and those in `also`, within about INTERVAL_S of its parent's end.

    Ray's workers notice that their raylet is gone when they next talk to it, and what they have started (the core of an
    engine) has no such tie. The kernel's PR_SET_PDEATHSIG is about the parent's thread, and Ray's may be short-lived.
    """
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent, also), name="lifeline", daemon=True).start()


def agents_of_raylet() -> list[psutil.Process]:
    """Ray's two agents on this node, asked in a worker. They want to tell the cluster about the end of their raylet
    before they end too, and wait for a minute for a cluster that is gone as well."""
    found = []
    for sibling in psutil.Process(os.getppid()).children():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if " ".join(sibling.cmdline()).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent")):
                found.append(sibling)
    return found


def _watch(parent: int, also: Sequence[psutil.Process]) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    for process in [*psutil.Process().children(recursive=True), *also]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)
