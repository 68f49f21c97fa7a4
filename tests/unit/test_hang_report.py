"""Hang reports and lifelines, with real processes: whatever one is stuck in, it is in the report, and nothing stays."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelinerl.cluster.hang_report import write_hang_report
from pipelinerl.cluster.waiting import noted, open_calls
from pipelinerl.stacks import FOLDER

ANSWERING = """
import sys
from pathlib import Path
from pipelinerl.stacks import answer_stack_requests
answer_stack_requests(Path(sys.argv[1]), sys.argv[2])
"""
BUSY = """
def stuck_in_python():
    print("ready", flush=True)
    while True: pass
stuck_in_python()
"""
HOLDS_THE_LOCK = """
import ctypes, threading
def stuck_in_foreign_code():
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
stuck_in_foreign_code()
"""

AT_WORK = """
import faulthandler
from pipelinerl.stacks import SIGNAL
faulthandler.unregister(SIGNAL)  # it ends the process now
def works():
    print("ready", flush=True)
    while True: deep(100)
def deep(n):
    return deep(n - 1) if n else None
works()
"""

Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that answer in the run directory `tmp_path`, and waits until they do."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, program: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", ANSWERING + program, str(tmp_path / "logs" / FOLDER), name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_every_process_is_in_the_report_whatever_it_is_stuck_in(start: Start, tmp_path: Path) -> None:
    python, foreign = start("python", BUSY), start("foreign", HOLDS_THE_LOCK)
    stopped, gone = start("stopped", BUSY), start("gone", BUSY)
    stopped.send_signal(signal.SIGSTOP)
    gone.kill()
    gone.wait()
    while psutil.Process(stopped.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    begin = time.monotonic()
    first = write_hang_report(tmp_path, {"why": "a test", "groups_running": 3}, timeout_s=2.0)
    assert time.monotonic() - begin < 10

    assert json.loads((first / "facts.json").read_text()) == {"why": "a test", "groups_running": 3}
    sections = dict(part.split("\n", 1) for part in (first / "stacks.txt").read_text().split("==== ")[1:])
    by_name = {who.split(",")[0]: text for who, text in sections.items()}
    assert by_name.keys() == {"python", "foreign", "stopped", "gone"}
    assert "stuck_in_python" in by_name["python"] and "stuck_in_foreign_code" in by_name["foreign"]
    assert "no answer within 2 s" in by_name["stopped"] and by_name["gone"].startswith("(gone)")
    rows = {int(row.split()[0]): row for row in (first / "processes.txt").read_text().splitlines()[1:]}
    assert rows.keys() >= {os.getpid(), python.pid, foreign.pid, stopped.pid} and gone.pid not in rows
    assert "stopped" in rows[stopped.pid] and python.poll() is None, "to be asked is not to be ended"

    second = write_hang_report(tmp_path, {}, timeout_s=0.5)
    assert (first.name, second.name) == ("1", "2")
    assert (second / "stacks.txt").read_text().count("stuck_in_python") == 1, "only what was answered this time"


def test_a_process_that_runs_is_asked_without_the_signal_that_could_crash_it(start: Start, tmp_path: Path) -> None:
    process = start("at work", AT_WORK)
    for number in range(1, 4):
        report = write_hang_report(tmp_path, {})
        assert report.name == str(number) and "in works" in (report / "stacks.txt").read_text()
        assert process.poll() is None


def test_a_number_that_another_process_has_now_is_not_signalled(tmp_path: Path) -> None:
    """SIGUSR2 ends a process that does not expect it."""
    folder = tmp_path / "logs" / FOLDER
    folder.mkdir(parents=True)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        who = {"name": "old", "host": os.uname().nodename, "pid": stranger.pid, "created": 1e9}
        (folder / "old.txt").write_text(json.dumps(who) + "\n")
        report = write_hang_report(tmp_path, {}, timeout_s=0.2)
        assert "(gone)" in (report / "stacks.txt").read_text()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_open_calls_say_what_is_waited_for() -> None:
    with noted("engine 0", "update_weights"):
        with noted("engine 0", "rollout"), noted("engine 0", "rollout"):
            time.sleep(0.06)
            calls: list[dict[str, Any]] = open_calls()
        assert [call["method"] for call in open_calls()] == ["update_weights"]
    assert open_calls() == []
    assert [(call["worker"], call["method"], call["open"]) for call in calls] == [
        ("engine 0", "update_weights", 1),
        ("engine 0", "rollout", 2),
    ]
    assert all(call["oldest_s"] >= 0.1 for call in calls)


FAMILY = """
import subprocess, sys, time
if sys.argv[1] == "parent":
    worker = subprocess.Popen([sys.executable, "-c", sys.argv[2], "worker"])
    print(worker.pid, flush=True)
else:
    from pipelinerl.cluster.lifeline import end_with_parent
    end_with_parent()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    print(child.pid, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_worker_and_all_it_started_end_with_its_parent(state: str) -> None:
    """Also a child in a session of its own, and one that is stopped."""
    command = [sys.executable, "-c", FAMILY, "parent", FAMILY]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    if state == "stopped":
        family[1].suspend()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family))


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
