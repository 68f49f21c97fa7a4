"""A run whose processes are killed, and then stopped, for real, and which goes on each time."""

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

BOUND_S = 150  # for everything to be back; three to five processes start on two shared cores meanwhile
HANG_S = 12


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


def is_whole_again(run: TrainCommand, engines: int, trainers: int) -> float:
    """Seconds until so many engines and trainers were started again in all, and steps are done with all engines."""
    start = time.monotonic()
    for said, times in (("started again, ", engines), ("training goes on after step", trainers)):
        run.wait_until(
            lambda said=said, times=times: run.output.count(said) >= times, f"{said!r} {times} times", BOUND_S
        )

    def all_serve() -> bool:
        last = [r for r in read_metrics(run.run_dir / "metrics.jsonl") if r["kind"] == "train"][-3:]
        return [record["fleet/engines"] for record in last] == [2, 2, 2]

    run.wait_until(all_serve, "three steps with two engines", BOUND_S)
    assert len(named(run, "EngineCore")) == 2 and len(named(run, "_SyncHost")) == 2, "nothing of the dead is left"
    return round(time.monotonic() - start, 1)


@pytest.mark.timeout(600)
def test_a_run_outlives_the_death_of_all_its_workers_and_then_their_hanging(run: TrainCommand) -> None:
    run.wait_for_step(6)
    first, second = named(run, "EngineCore")
    actor_of_second = second.parent()
    assert actor_of_second is not None and "_AsyncHost" in " ".join(actor_of_second.cmdline())
    for victim in (first, actor_of_second, named(run, "_SyncHost")[0]):
        victim.kill()
    killed = is_whole_again(run, engines=2, trainers=1)

    for victim in (named(run, "EngineCore")[0], named(run, "_SyncHost")[1]):
        os.kill(victim.pid, signal.SIGSTOP)
    stopped = is_whole_again(run, engines=3, trainers=2)
    assert f"has not answered for engine.hang_timeout_s={HANG_S} s" in run.output
    print(f"whole again after {killed} s (killed) and {stopped} s (stopped)")

    run.process.terminate()
    assert run.exit_code(BOUND_S) == EXIT_SIGTERM, run.output
    assert run.leftovers() == []

    ledger = json.loads((run.run_dir / "ledger.json").read_text())
    Ledger.resumed(ledger)  # every ticket is in one state
    trained = [ticket for tickets in ledger["trained"].values() for ticket in tickets]
    assert len(trained) == len(set(trained))
    records = [r for r in read_metrics(run.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert max(record["staleness/max"] for record in records) <= 2
    assert all(record["optim/skipped"] == 0 for record in records)
