"""One run in which one process after the other is killed or stopped, for real, and which goes on every time."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelinerl.errors import EXIT_SIGTERM
from pipelinerl.metrics.log import read_metrics
from pipelinerl.rollout.ledger import Ledger
from tests.e2e.harness import TrainCommand

BOUND_S = 90  # for each recovery; a process takes 10 to 20 s to start on two shared cores
HANG_S = 8


@pytest.fixture
def run(tmp_path: Path, random_model: Path) -> Iterator[TrainCommand]:
    """An endless run with two engines and two trainer ranks."""
    overrides = [f"model.path={random_model}", "steps=100000", "batch.groups_per_step=4", "batch.group_size=4"]
    overrides += ["engine.count=2", "trainer.ranks=2", "checkpoint.every=5", "async.max_lag=2"]
    overrides += [f"engine.hang_timeout_s={HANG_S}", f"trainer.hang_timeout_s={HANG_S}", "trainer.max_restarts=3"]
    overrides += ["eval.at_start=false", "parity.preflight=off", "metrics.wandb.mode=disabled", "metrics.plots=false"]
    command = TrainCommand(tmp_path / "run", overrides)
    yield command
    command.close()


def named(run: TrainCommand, part: str) -> list[psutil.Process]:
    """The run's processes with `part` in their title, oldest first."""
    found = [p for p in run.processes() if part in " ".join([p.name(), *p.cmdline()])]
    return sorted(found, key=psutil.Process.create_time)


def goes_on(run: TrainCommand, said: str, times: int) -> float:
    """Seconds until `said` was in the output so many times and three more steps are done after that."""
    start = time.monotonic()
    run.wait_until(lambda: run.output.count(said) >= times, f"{said!r} {times} times", BOUND_S)
    lines = (run.run_dir / "metrics.jsonl").read_text().count('"kind": "train"')
    run.wait_for_step(lines + 3, BOUND_S)
    return time.monotonic() - start


@pytest.mark.timeout(600)
def test_a_run_outlives_the_death_of_any_of_its_workers(run: TrainCommand) -> None:
    run.wait_for_step(6)
    took = {}
    named(run, "EngineCore")[0].kill()
    took["engine core killed"] = goes_on(run, "serves version", 1)
    os.kill(named(run, "EngineCore")[0].pid, signal.SIGSTOP)
    took["engine core stopped"] = goes_on(run, "serves version", 2)
    assert "has not answered for engine.hang_timeout_s" in run.output
    named(run, "_AsyncHost")[0].kill()
    took["engine's actor killed"] = goes_on(run, "serves version", 3)
    named(run, "_SyncHost")[0].kill()
    took["trainer rank killed"] = goes_on(run, "training goes on after step", 1)
    os.kill(named(run, "_SyncHost")[1].pid, signal.SIGSTOP)
    took["trainer rank stopped"] = goes_on(run, "training goes on after step", 2)
    assert len(named(run, "EngineCore")) == 2 and len(named(run, "_SyncHost")) == 2, "nothing of the dead is left"

    run.process.terminate()
    assert run.exit_code(BOUND_S) == EXIT_SIGTERM, run.output
    assert run.leftovers() == []
    print({name: round(seconds, 1) for name, seconds in took.items()})

    ledger = json.loads((run.run_dir / "ledger.json").read_text())
    Ledger.resumed(ledger)  # every ticket is in one state
    trained = [ticket for tickets in ledger["trained"].values() for ticket in tickets]
    assert len(trained) == len(set(trained))
    records = [r for r in read_metrics(run.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert max(record["staleness/max"] for record in records) <= 2
    assert all(record["optim/skipped"] == 0 for record in records)
