"""What a run that hangs looks like from outside: the stacks of all its processes, and what the driver knows.

    <run_dir>/hang_report/N/facts.json      what the caller knows: queues, engines, the last weight update, open calls
                            processes.txt   every process below this one: pid, state, CPU seconds, memory, title
                            stacks.txt      every thread of every process of ours that answered

Processes are asked (see stacks.py), and after half of `timeout_s` those that did not answer are asked by a signal; the
rest is local and quick. Those on other nodes are listed but not asked.
"""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelinerl.mailbox import post
from pipelinerl.stacks import FOLDER, SIGNAL

POLL_S = 0.05
TITLE = 120  # characters of a command line


def write_hang_report(run_dir: Path, facts: Mapping[str, Any], timeout_s: float = 5.0) -> Path:
    """Write the next report and return its folder. Blocks for at most about `timeout_s`; raises OSError if it cannot
    write. `facts` must be JSON, or have a text."""
    base = run_dir / "hang_report"
    base.mkdir(parents=True, exist_ok=True)
    target = base / str(1 + len(list(base.iterdir())))
    target.mkdir()
    (target / "facts.json").write_text(json.dumps(dict(facts), indent=2, default=str) + "\n")
    (target / "processes.txt").write_text(_processes())
    (target / "stacks.txt").write_text(_stacks(run_dir / "logs" / FOLDER, timeout_s))
    return target


def _processes() -> str:
    """A line for this process and for each below it."""
    rows = [f"{'pid':>8} {'parent':>8} {'state':<10} {'cpu s':>9} {'rss MiB':>8}  command"]
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess), process.oneshot():
            cpu = process.cpu_times()
            title = " ".join(" ".join(process.cmdline()).split()) or process.name()
            rows.append(
                f"{process.pid:>8} {process.ppid():>8} {process.status():<10} {cpu.user + cpu.system:>9.1f} "
                f"{process.memory_info().rss >> 20:>8}  {title[:TITLE]}"
            )
    return "\n".join(rows) + "\n"


@dataclass
class _Asked:
    """A process that can answer, and how much its file held before."""

    path: Path
    who: str
    process: psutil.Process | None  # None: it cannot answer
    state: str  # why it cannot; "" when it was asked
    before: int

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def answered(self) -> bool:
        return self.size > self.before

    def signal(self) -> bool:
        """Ask it once more; says whether it was. Not when it is stopped: it would get the signal when it goes on."""
        with suppress(psutil.NoSuchProcess):
            if self.process is not None and self.process.status() != psutil.STATUS_STOPPED:
                self.process.send_signal(SIGNAL)
                return True
        return False


def _stacks(folder: Path, timeout_s: float) -> str:
    asked = [_ask(path) for path in sorted(folder.glob("*.txt"))]
    _wait([process for process in asked if not process.state], timeout_s / 2)
    _wait([process for process in asked if not process.answered and process.signal()], timeout_s / 2)
    return "\n".join(f"==== {process.who}\n{_answer(process, timeout_s)}" for process in asked)


def _ask(path: Path) -> _Asked:
    who = json.loads(path.read_text().split("\n", 1)[0])
    asked = _Asked(path, f"{who['name']}, pid {who['pid']} on {who['host']}", None, "", path.stat().st_size)
    if who["host"] != socket.gethostname():
        asked.state = "on another node: not asked"
        return asked
    try:
        process = psutil.Process(who["pid"])
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() != who["created"]:
            asked.state = "gone"  # another one may have the number now: SIGNAL would end it
        else:
            asked.process = process
            with suppress(OSError):
                post(who["mailbox"], b"?")
    except psutil.NoSuchProcess:
        asked.state = "gone"
    return asked


def _wait(asked: Sequence[_Asked], timeout_s: float) -> None:
    """Return when all answers are there and none has grown between two looks, or when the time is over."""
    deadline, sizes = time.monotonic() + timeout_s, [-1]
    while time.monotonic() < deadline:
        before, sizes = sizes, [process.size for process in asked]
        if sizes == before and all(process.answered for process in asked):
            return
        time.sleep(POLL_S)


def _answer(process: _Asked, timeout_s: float) -> str:
    if process.state:
        return f"({process.state})\n"
    with process.path.open("rb") as file:
        file.seek(process.before)
        answer = file.read().decode(errors="replace")
    return answer or f"(no answer within {timeout_s:g} s: stopped, or in the kernel; processes.txt has its state)\n"
