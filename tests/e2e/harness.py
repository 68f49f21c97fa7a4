"""Runs of the real command in processes of their own, tagged so that every process they start can be found again."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipelinerl.metrics.log import read_metrics
from pipelinerl.rollout.ledger import Ledger

TAG = "PIPELINERL_TEST_TAG"
START_S = 420.0  # until a run has started on a machine that is busy with others; 30 s when it is not


class TrainCommand:
    """`pipelinerl train OVERRIDES`, or another command, in a process group of its own, as a terminal would start it."""

    def __init__(
        self, run_dir: Path, overrides: Sequence[str], command: str = "train", takes_run_dir: bool = False
    ):  # `takes_run_dir`: as an argument of its own, not as a setting
        self.run_dir = run_dir
        self.tag = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()  # of the run
        self._asked: set[psutil.Process] = set()  # for their tag, which they have from their first moment or never
        self._output = (run_dir.parent / f"{run_dir.name}.out").open("w+")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipelinerl", command),
                *(str(run_dir) if takes_run_dir else f"run_dir={run_dir}", *overrides),
            ],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=_user_environment() | {TAG: self.tag},
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()

    def wait_for_line(self, text: str, timeout_s: float = START_S) -> None:
        """Return when the output holds `text`."""
        self.wait_until(lambda: text in self.output, f"{text!r} in the output", timeout_s)

    def wait_for_step(self, step: int, timeout_s: float = START_S) -> None:
        """Return when so many optimizer steps have been recorded."""
        metrics = self.run_dir / "metrics.jsonl"

        def reached() -> bool:
            return metrics.exists() and metrics.read_text().count('"kind": "train"') >= step

        self.wait_until(reached, f"step {step} in metrics.jsonl", timeout_s)

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the run ended while waiting for {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output}"
            time.sleep(0.1)

    def interrupt_group(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to every process of the foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def exit_code(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None

    def processes(self) -> list[psutil.Process]:
        """All living processes of the run: those that carry its tag, adopted ones too, and whatever they started.

        Graders start with a clean environment and so without the tag; they are found below their parents, and stay
        known when those are gone.
        """
        living = {process.pid: process for process in psutil.process_iter()}
        for process in living.values():
            if process not in self._asked and (environment := _environment(process)):
                self._asked.add(process)
                if environment.get(TAG) == self.tag:
                    self._seen.add(process)
        parents = {pid: _parent(process) for pid, process in living.items()}
        ours = {process.pid for process in self._seen if living.get(process.pid) == process}
        while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
            ours |= more
        self._seen.update(living[pid] for pid in ours)
        return [process for process in self._seen if _alive(process)]

    def processes_named(self, part: str) -> list[psutil.Process]:
        """Those whose title or command line contains `part`, oldest first."""
        found = [process for process in self.processes() if part in title(process)]
        return sorted(found, key=psutil.Process.create_time)

    def process_named(self, part: str) -> psutil.Process:
        """The one process whose title or command line contains `part`."""
        found = self.processes_named(part)
        assert len(found) == 1, [title(process) for process in self.processes()]
        return found[0]

    def leftovers(self, grace_s: float = 10) -> list[str]:
        """Command lines of what is still alive after `grace_s` seconds."""
        deadline = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [title(process) for process in left]

    def close(self) -> None:
        """Kill whatever is left, so that one failed test does not disturb the next."""
        for process in self.processes():
            process.kill()
        self._output.close()


def ledger_of(run_dir: Path) -> dict[str, Any]:
    """ledger.json, which must balance: every prompt that was drawn is in one state, and trained on at most once."""
    ledger: dict[str, Any] = json.loads((run_dir / "ledger.json").read_text())
    Ledger.resumed(ledger)
    states = [*ledger["trained"].values(), *ledger["dropped"].values()]
    states += [ledger[name] for name in ("queued", "running", "generated")]
    assert sorted(ticket for tickets in states for ticket in tickets) == list(range(ledger["drawn"]))
    return ledger


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are of optimizer steps."""
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]


def _user_environment() -> dict[str, str]:
    """The environment without what other tests have set in it: the command must do without."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "DS_", "TORCH", "OMP_"))}


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    """Name and command line, or the title that a process gave itself; empty when it is gone."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
