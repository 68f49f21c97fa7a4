"""One run meets fault after fault and goes on, is stopped, goes on again, and ends when it can save nothing more.

Its completions are long at first, so that weight updates land inside them, and of one token when it goes on.
"""

import json
import math
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelinerl.checkpoint.store import newest_whole
from pipelinerl.errors import EXIT_ENVIRONMENT, EXIT_SIGTERM
from pipelinerl.metrics.rollouts import read_rollouts
from tests.e2e.harness import TrainCommand, ledger_of, train_records

BOUND_S = 60  # for whatever a fault costs
EVERY = 4


@pytest.fixture
def overrides(random_model: Path) -> list[str]:
    small = [f"model.path={random_model}", "steps=100000", "batch.groups_per_step=4", "batch.group_size=4"]
    small += ["async.max_lag=2", f"checkpoint.every={EVERY}", "metrics.plots=false", "eval.at_start=false"]
    small += ["sampling.max_tokens=64", "metrics.rollout_groups_per_step=null"]
    return [*small, "engine.max_restarts=0", "trainer.max_restarts=0", "parity.preflight=off"]


@pytest.fixture
def runs(tmp_path: Path, overrides: list[str]) -> Iterator[list[TrainCommand]]:
    """The run, started; a test may append the one that goes on from it."""
    commands = [TrainCommand(tmp_path / "run", overrides)]
    yield commands
    for command in commands:
        command.close()


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in train_records(run_dir)]


def goes_on(run: TrainCommand) -> None:
    run.wait_for_step(len(steps_of(run.run_dir)) + 3, BOUND_S)


def ask_what_it_does(run: TrainCommand) -> None:
    """SIGUSR1: a report with the stacks of every process of ours, and no harm."""
    run.process.send_signal(signal.SIGUSR1)
    run.wait_until(lambda: "hang report (asked for by SIGUSR1)" in run.output, "hang report", 20)
    report = run.run_dir / "hang_report" / "1"
    sections = dict(part.split("\n", 1) for part in (report / "stacks.txt").read_text().split("==== ")[1:])
    stacks = {who.split(",")[0]: text for who, text in sections.items()}
    assert stacks.keys() == {"driver", "trainer_rank_0", "engine_0", "worker of an engine"}
    assert "pipelinerl/session.py" in stacks["driver"] and "vllm" in stacks["worker of an engine"]
    assert all("Thread" in text or "most recent call first" in text for text in stacks.values()), stacks
    facts = json.loads((report / "facts.json").read_text())
    assert facts["trainer_version"] >= 2 and facts["last_weight_update"]["version"] >= 1  # it overlaps the next step
    assert [(engine["engine"], engine["state"]) for engine in facts["engines"]] == [(0, "healthy")]
    assert {call["worker"] for call in facts["open_calls"]} <= {"engine 0", "trainer rank 0"}
    assert "grader_child" in (report / "processes.txt").read_text()


def test_helpers_may_die_sigterm_saves_and_a_full_disk_ends_the_run(
    runs: list[TrainCommand], overrides: list[str]
) -> None:
    [run] = runs
    run_dir = run.run_dir
    run.wait_for_step(2)
    ask_what_it_does(run)
    run.process_named("grader_child").kill()
    goes_on(run)
    run.process_named("wandb-core").kill()
    goes_on(run)
    assert run.process_named("grader_child"), "another one is in its place"

    run.process.terminate()
    assert run.exit_code(BOUND_S) == EXIT_SIGTERM, run.output
    assert run.leftovers() == []
    first, steps = ledger_of(run_dir), steps_of(run_dir)
    assert steps == list(range(1, len(steps) + 1)), "no line of metrics.jsonl is lost with W&B"
    saved = newest_whole(run_dir / "checkpoints", print)
    assert saved is not None and saved.name == f"step_{len(steps):06d}", "SIGTERM saves what there is"

    updates_landed_inside_completions(run_dir)

    again = TrainCommand(run_dir, [*overrides, "sampling.max_tokens=1"])
    runs.append(again)
    again.wait_for_line(f"resuming from {saved}")
    again.wait_for_step(len(steps) + 2 * EVERY + 1)
    again.wait_until(lambda: newest_whole(run_dir / "checkpoints", print) != saved, "another checkpoint", BOUND_S)
    fill_the_disk_of(again)
    begin = time.monotonic()
    assert again.exit_code(BOUND_S) == EXIT_ENVIRONMENT, again.output
    assert time.monotonic() - begin < BOUND_S and again.leftovers() == []
    [error] = re.findall("^pipelinerl: error: (.*)$", again.output, re.MULTILINE)
    assert f"{run_dir}/checkpoints/" in error and "could not be written" in error and "File too large" in error
    whole = newest_whole(run_dir / "checkpoints", print)
    assert whole is not None and whole != saved, "the checkpoints before are whole"

    second = ledger_of(run_dir)
    kept = {step: tickets for step, tickets in second["trained"].items() if int(step) <= len(steps)}
    assert kept == first["trained"], "nothing is trained twice"
    drawn_before = set(range(first["drawn"]))
    settled = [t for tickets in [*second["trained"].values(), *second["dropped"].values()] for t in tickets]
    still_open = [t for name in ("queued", "running", "generated") for t in second[name]]
    assert drawn_before <= set(settled) | set(still_open), "nothing is lost"
    assert second["dropped"] == first["dropped"], "an empty completion is one like any other"
    completions_were_of_one_token(run_dir, since=len(steps))


def updates_landed_inside_completions(run_dir: Path) -> None:
    records = train_records(run_dir)
    assert max(record["staleness/multi_version_frac"] for record in records[3:]) > 0.25
    assert all(record["staleness/max"] <= 2 for record in records)
    assert all(record.get("mismatch/abs_logprob_mean", 0) < 1e-4 for record in records), "old KV is not mismatch"
    spans = [row["weight_versions"] for row in read_rollouts(run_dir)]
    assert any(len(versions) > 1 and versions[0][2] > 1 for versions in spans)


def completions_were_of_one_token(run_dir: Path, since: int) -> None:
    """The text of those that are an end of sequence is empty."""
    records = [record for record in train_records(run_dir) if record["step"] > since]
    for record in records:
        assert all(math.isfinite(value) for name, value in record.items() if name != "kind"), record
        assert record["completion/tokens_max"] == 1 and record["optim/skipped"] == 0
    texts = {row["completion"] for row in read_rollouts(run_dir) if row["step"] > since}
    assert "" in texts and len(texts) > 2


def fill_the_disk_of(run: TrainCommand) -> None:
    """A file of the trainer's can grow no more, as on a full disk; needs no privileges, unlike a small file system."""
    trainer = run.process_named("ray::_SyncHost")
    hard = resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (50_000, hard))
