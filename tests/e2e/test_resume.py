"""A run that is killed and started again by the same command goes on as if nothing had happened."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from pipelinerl.errors import EXIT_DONE
from pipelinerl.metrics.log import read_metrics
from pipelinerl.rollout.ledger import Ledger
from tests.e2e.harness import TrainCommand
from tests.e2e.test_main_job import ROOT

STEPS, EVERY = 6, 2
SMALL = [
    f"model.path={ROOT / 'models' / 'tiny'}",  # made by quickstart.sh: a random model would have no reward
    f"steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "batch.groups_per_step=6",
    "batch.group_size=4",
    "trainer.lr=1e-3",
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
        assert run.exit_code(240) == EXIT_DONE, run.output
        return run.output
    finally:
        run.close()


def kill(run: TrainCommand, after_step: int) -> None:
    """SIGKILL to everything, once so many steps are on file and the checkpoint before them too."""
    run.wait_for_step(after_step)
    due = after_step // EVERY * EVERY
    run.wait_until(lambda: (run.run_dir / "checkpoints" / f"step_{due:06d}").exists(), "checkpoint", 60)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.close()


def numbers(run_dir: Path) -> dict[int, dict[str, Any]]:
    """step -> what is compared of it; where a step was done twice, the second time counts."""
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    return {record["step"]: {name: record.get(name) for name in COMPARED} for record in records}


def test_in_sync_mode_every_loss_and_reward_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    overrides = [*SMALL, "async.mode=sync"]
    finish(TrainCommand(tmp_path / "whole", overrides))
    expected = numbers(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert len({values["optim/loss"] for values in expected.values()}) == STEPS
    assert all(0 < values["reward/mean"] < 1 for values in expected.values())

    killed = tmp_path / "killed"
    kill(TrainCommand(killed, overrides), after_step=random.Random(4).randrange(EVERY, STEPS))
    output = finish(TrainCommand(killed, overrides))
    assert "resuming from" in output
    assert numbers(killed) == expected
    assert (killed / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()


def test_in_async_mode_no_prompt_is_trained_twice_and_none_is_lost(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "async.max_lag=2"]
    kill(TrainCommand(run_dir, overrides), after_step=3)
    saved = json.loads((run_dir / "checkpoints" / "step_000002" / "driver.json").read_text())["ledger"]
    still_open = saved["queued"] + saved["running"] + saved["generated"]
    assert still_open, "generation runs ahead of training"
    finish(TrainCommand(run_dir, overrides))

    ledger = json.loads((run_dir / "ledger.json").read_text())
    Ledger.resumed(ledger)  # every ticket is in exactly one state
    assert {step: tickets for step, tickets in ledger["trained"].items() if int(step) <= 2} == saved["trained"]
    trained = [ticket for tickets in ledger["trained"].values() for ticket in tickets]
    assert len(trained) == len(set(trained)) == STEPS * 6
    reasons = [ticket for tickets in ledger["dropped"].values() for ticket in tickets]
    assert sorted([*trained, *reasons]) == list(range(ledger["drawn"])), "nothing is open at the end"
    assert set(still_open) <= set(trained) | set(reasons)
    rollouts = [json.loads(line) for path in (run_dir / "rollouts").iterdir() for line in path.read_text().splitlines()]
    by_file = {(row["step"], row["group_id"]) for row in rollouts}
    assert by_file == {(int(step), ticket) for step, tickets in ledger["trained"].items() for ticket in tickets}
