"""A run that is killed and started again by the same command goes on as if nothing had happened."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.batch.record import FOLDER as BATCHES
from pipelinerl.batch.record import read_batch
from pipelinerl.errors import EXIT_DONE
from pipelinerl.metrics.journal_check import check_journal
from pipelinerl.metrics.log import read_metrics
from pipelinerl.rollout.ledger import Ledger
from tests.e2e.harness import TrainCommand
from tests.e2e.test_main_job import ROOT

STEPS = 10
GONE_S = 20
SMALL = [
    f"model.path={ROOT / 'models' / 'tiny'}",  # made by quickstart.sh: a random model would have no reward
    f"steps={STEPS}",
    "batch.groups_per_step=6",
    "batch.group_size=4",
    "trainer.lr=2e-4",
    "parity.preflight=off",
    "eval.at_start=false",
    "eval.at_end=false",
    "metrics.wandb.mode=disabled",
    "metrics.plots=false",
    "metrics.rollout_groups_per_step=null",
]
COMPARED = ("optim/loss", "optim/grad_norm", "optim/lr", "reward/mean", "mismatch/abs_logprob_mean")


def finish(run: TrainCommand) -> str:
    """Let it come to its end; returns what it said."""
    try:
        assert run.exit_code(480) == EXIT_DONE, run.output
        return run.output
    finally:
        run.close()


def kill_driver(run: TrainCommand, after_step: int, saved: int) -> None:
    """SIGKILL to the driver alone, once so many steps are on file and the checkpoint of step `saved` too.

    Nobody is left to clean up, and yet Ray, engines, ranks and graders end within GONE_S.
    """
    run.wait_for_step(after_step)
    run.wait_until(lambda: (run.run_dir / "checkpoints" / f"step_{saved:06d}").exists(), "checkpoint", 60)
    assert len(run.processes()) > 8, "the harness sees all processes"
    run.process.kill()
    run.process.wait()
    try:
        assert run.leftovers(GONE_S) == []
    finally:
        run.close()


def numbers(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """step -> what is compared of it, each time that it was done."""
    found: dict[int, list[dict[str, Any]]] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["kind"] == "train":
            found.setdefault(record["step"], []).append({name: record.get(name) for name in COMPARED})
    return found


def test_in_sync_mode_every_loss_and_reward_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """The killed run went on beyond its checkpoint: the steps that are done again have been done without a break."""
    overrides, saved = [*SMALL, "async.mode=sync", "checkpoint.every=5"], 5
    run_dir = tmp_path / "run"
    kill_driver(TrainCommand(run_dir, overrides), after_step=random.Random(4).choice([7, 8]), saved=saved)
    before = numbers(run_dir)
    output = finish(TrainCommand(run_dir, overrides))
    assert "resuming from" in output
    done = numbers(run_dir)
    assert sorted(done) == list(range(1, STEPS + 1))
    again = [step for step, times in done.items() if len(times) == 2]
    assert again == [step for step in before if step > saved] and again
    assert all(done[step][0] == done[step][1] for step in again)
    assert len({times[-1]["optim/grad_norm"] for times in done.values()}) > STEPS // 2, "steps differ from each other"
    assert all(0 < times[-1]["reward/mean"] < 1 for times in done.values())


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of an async run that was killed once, and the ledger of the checkpoint it went on from.

    It streams its batches.
    """
    run_dir = tmp_path_factory.mktemp("async") / "run"
    overrides = [*SMALL, "async.max_lag=2", "checkpoint.every=2", "checkpoint.keep_last=9", "batch.stream=true"]
    kill_driver(TrainCommand(run_dir, overrides), after_step=3, saved=2)
    output = finish(TrainCommand(run_dir, overrides))
    step = int(re.findall(r"resuming from .*step_(\d+)", output)[0])
    saved = json.loads((run_dir / "checkpoints" / f"step_{step:06d}" / "driver.json").read_text())
    assert "  journal   balances: " in output
    return run_dir, saved["ledger"]


def test_in_async_mode_no_prompt_is_trained_twice_and_none_is_lost(
    killed_and_resumed: tuple[Path, dict[str, Any]],
) -> None:
    run_dir, saved = killed_and_resumed
    still_open = saved["queued"] + saved["running"] + saved["generated"]
    assert still_open, "generation runs ahead of training"

    ledger = json.loads((run_dir / "ledger.json").read_text())
    Ledger.resumed(ledger)  # every ticket is in exactly one state
    assert {step: ledger["trained"][step] for step in saved["trained"]} == saved["trained"]
    trained = [ticket for tickets in ledger["trained"].values() for ticket in tickets]
    assert len(trained) == len(set(trained)) == STEPS * 6
    reasons = [ticket for tickets in ledger["dropped"].values() for ticket in tickets]
    assert sorted([*trained, *reasons]) == list(range(ledger["drawn"])), "nothing is open at the end"
    assert set(still_open) <= set(trained) | set(reasons)
    rollouts = [json.loads(line) for path in (run_dir / "rollouts").iterdir() for line in path.read_text().splitlines()]
    by_file = {(row["step"], row["group_id"]) for row in rollouts}
    assert by_file == {(int(step), ticket) for step, tickets in ledger["trained"].items() for ticket in tickets}


def test_the_journal_balances_and_no_token_was_older_than_the_bound(
    killed_and_resumed: tuple[Path, dict[str, Any]],
) -> None:
    run_dir, _ = killed_and_resumed
    found = check_journal(run_dir, json.loads((run_dir / "ledger.json").read_text()))
    assert found.balances, found.problems
    assert (found.lives, found.exit_code, sorted(found.steps)) == (2, EXIT_DONE, list(range(1, STEPS + 1)))
    measured = {r["step"]: r["staleness/max"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"}
    assert found.lags == measured and 0 < max(found.lags.values()) <= 2


def replayed(run_dir: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of `pipelinerl replay`; nothing may be left running."""
    command = TrainCommand(run_dir, options, "replay", takes_run_dir=True)
    try:
        return command.exit_code(120), command.output
    finally:
        assert command.leftovers() == []
        command.close()


def test_replay_reproduces_every_number_of_the_trainer(killed_and_resumed: tuple[Path, dict[str, Any]]) -> None:
    """Over the kill: the steps after the checkpoint are those that were done again, in parts as groups were ready."""
    batches = [read_batch(killed_and_resumed[0] / BATCHES, step, rank=0) for step in range(1, STEPS + 1)]
    assert all(batch.scale is not None for batch in batches), "each step was trained on in parts"
    code, output = replayed(killed_and_resumed[0])
    assert code == EXIT_DONE, output
    assert output.count("reproduced\n") == STEPS
    counted = re.search(r"all ([\d,]+) numbers of 10 steps are reproduced to the last bit", output)
    assert counted and int(counted[1].replace(",", "")) > 40 * STEPS


def test_replay_names_the_step_and_the_number_that_was_tampered_with(
    killed_and_resumed: tuple[Path, dict[str, Any]],
) -> None:
    """From a checkpoint of the run, so as not to do all of it again. One unit in the last place is enough."""
    run_dir, _ = killed_and_resumed
    records = (run_dir / "metrics.jsonl").read_text().splitlines()
    number = max(i for i, line in enumerate(records) if '"kind": "train", "step": 7,' in line)
    record = json.loads(records[number])
    true, false = record["optim/grad_norm"], math.nextafter(record["optim/grad_norm"], math.inf)
    records[number] = json.dumps(record | {"optim/grad_norm": false})
    (run_dir / "metrics.jsonl").write_text("\n".join(records) + "\n")
    code, output = replayed(run_dir, "--from-checkpoint=4", "--until=8")
    assert code == 1, output
    assert "step 5: loss" in output and "step 6: loss" in output and "step 8" not in output
    assert f"step 7: optim/grad_norm was {false!r}, and is {true!r} in the replay\n" in output
