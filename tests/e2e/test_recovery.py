"""A run whose processes are killed, and then stopped, for real, and which goes on each time, until its disk is full."""

import json
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelinerl.errors import EXIT_ENVIRONMENT
from pipelinerl.metrics.jsonl import read_lines
from tests.e2e.harness import TrainCommand, ledger_of, train_records

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


def is_whole_again(run: TrainCommand, engines: int, trainers: int) -> float:
    """Seconds until so many engines and trainers were started again in all, and steps are done with all engines."""
    start = time.monotonic()
    for said, times in (("started again, ", engines), ("training goes on after step", trainers)):
        run.wait_until(
            lambda said=said, times=times: run.output.count(said) >= times, f"{said!r} {times} times", BOUND_S
        )

    def all_serve() -> bool:
        return [record["fleet/engines"] for record in train_records(run.run_dir)[-3:]] == [2, 2, 2]

    run.wait_until(all_serve, "three steps with two engines", BOUND_S)
    assert len(run.processes_named("EngineCore")) == 2 and len(run.processes_named("_SyncHost")) == 2, (
        "nothing of the dead is left"
    )
    return round(time.monotonic() - start, 1)


def stopped_in_an_update(run: TrainCommand, core: psutil.Process) -> str:
    """Stop an engine core and return when a weight update waits for it. Returns the engine's name."""
    core.suspend()
    for number in range(1, 10):
        time.sleep(1.5)
        run.process.send_signal(signal.SIGUSR1)
        facts = run.run_dir / "hang_report" / str(number) / "facts.json"
        run.wait_until(lambda facts=facts: facts.exists() and facts.read_text().endswith("}\n"), str(facts), 20)
        for call in json.loads(facts.read_text())["open_calls"]:
            if call["method"] in ("update_weights", "commit") and call["oldest_s"] > 1:
                return str(call["worker"])
    raise AssertionError(f"no update waits for it: {facts.read_text()}")


def journal(run: TrainCommand) -> list[dict[str, Any]]:
    return read_lines(run.run_dir / "journal.jsonl")


def updated_without(run: TrainCommand, engine: str) -> bool:
    """Whether a weight update was completed since that engine was lost; it must not have been started again by then."""
    events = journal(run)
    for place, event in enumerate(events):
        if event["event"] == "engine" and event["state"] == "lost":
            assert f"{engine}: its vLLM core process died" in event["text"]
            assert "restarted" not in [later["event"] for later in events[place:]]
            return "updated" in [later["event"] for later in events[place:]]
    return False


def stop_the_driver(run: TrainCommand) -> None:
    """Stop the driver for longer than any limit, in which a heartbeat and a pulse are under way, and are answered."""
    workers = [run.processes_named("EngineCore")[0], run.processes_named("_SyncHost")[0]]
    for worker in workers:
        worker.suspend()
    time.sleep(3)  # heartbeat_s and pulse_s are 2 s: both wait for an answer now
    run.process.send_signal(signal.SIGSTOP)
    for worker in workers:
        worker.resume()
    time.sleep(HANG_S)
    run.process.send_signal(signal.SIGCONT)


def fill_the_disk_of_the_driver(run: TrainCommand) -> None:
    """metrics.jsonl, its largest file, takes a few more bytes, as on a disk that is full in the middle of a line."""
    size = (run.run_dir / "metrics.jsonl").stat().st_size
    assert size > (run.run_dir / "journal.jsonl").stat().st_size
    hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size + 100, hard))


def test_a_run_outlives_the_death_of_all_its_workers_and_their_hanging_and_its_own(run: TrainCommand) -> None:
    run.wait_for_step(6)
    first, second = run.processes_named("EngineCore")
    actor_of_second = second.parent()
    assert actor_of_second is not None and "_AsyncHost" in " ".join(actor_of_second.cmdline())
    engine = stopped_in_an_update(run, first)
    first.kill()
    run.wait_until(lambda: updated_without(run, engine), "the update without the dead engine", BOUND_S)
    for victim in (actor_of_second, run.processes_named("_SyncHost")[0]):
        victim.kill()
    killed = is_whole_again(run, engines=2, trainers=1)

    for victim in (run.processes_named("EngineCore")[0], run.processes_named("_SyncHost")[1]):
        victim.suspend()
    stopped = is_whole_again(run, engines=3, trainers=2)
    assert f"has not answered for engine.hang_timeout_s={HANG_S} s" in run.output
    print(f"whole again after {killed} s (killed) and {stopped} s (stopped)")

    before = [event for event in journal(run) if event["event"] in ("engine", "restarted", "requeued")]
    stop_the_driver(run)
    run.wait_for_step(len(train_records(run.run_dir)) + 5)
    is_whole_again(run, engines=3, trainers=2)
    after = [event for event in journal(run) if event["event"] in ("engine", "restarted", "requeued")]
    assert after == before, "nobody is blamed for what the driver slept through"

    fill_the_disk_of_the_driver(run)
    assert run.exit_code(BOUND_S) == EXIT_ENVIRONMENT, run.output
    assert run.leftovers() == []
    errors = re.findall("^pipelinerl: error: (.*)$", run.output, re.MULTILINE)
    assert errors == [f"cannot write {run.run_dir}/metrics.jsonl: File too large"], run.output
    assert "Traceback" not in run.output
    assert journal(run)[-1]["event"] == "ended" and journal(run)[-1]["code"] == EXIT_ENVIRONMENT

    ledger_of(run.run_dir)
    assert not (run.run_dir / "metrics.jsonl").read_bytes().endswith(b"\n"), "the last line is torn"
    records = train_records(run.run_dir)
    assert max(record["staleness/max"] for record in records) <= 2
    assert all(record["optim/skipped"] == 0 for record in records)
