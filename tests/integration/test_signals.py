"""What SIGTERM and SIGINT do to a run's frame, in a process of its own; the work is a stand-in."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, os, signal, sys
from pipelinerl.concurrency import Ending
from pipelinerl.session import until_done_or_signal

patience_s, step_s, signals = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3].split(",")
ending = Ending(patience_s)

async def work():
    try:
        for name in signals:
            os.kill(os.getpid(), getattr(signal, name))
        await asyncio.sleep(step_s)
        print("wished" if ending.wished else "not wished")
        return 0
    finally:
        print("cleaned up")

sys.exit(until_done_or_signal(work(), ending))
"""


@pytest.mark.parametrize(
    ("patience_s", "step_s", "signals", "code", "said"),
    [
        (30, 0.2, "SIGTERM", 143, "wished cleaned up"),  # the step in hand is finished
        (0.2, 30, "SIGTERM", 143, "cleaned up"),  # it takes too long
        (0, 30, "SIGTERM", 143, "cleaned up"),  # there is nothing to finish
        (30, 30, "SIGTERM,SIGTERM", 143, "cleaned up"),  # somebody insists
        (30, 30, "SIGINT", 130, "cleaned up"),
    ],
)
def test_a_signal_ends_the_work(patience_s: float, step_s: float, signals: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(patience_s), str(step_s), signals]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.split()) == (code, said.split()), done.stderr
    assert signal.Signals(code - 128).name in done.stderr and "Traceback" not in done.stderr
