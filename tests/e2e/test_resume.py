"""A run that is killed and started again by the same command goes on as if nothing had happened.

The ledger of an asynchronous run that goes on is in test_faults.py.
"""

import random
from pathlib import Path
from typing import Any

from pipelinerl.errors import EXIT_DONE
from pipelinerl.metrics.log import read_metrics
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
        assert run.exit_code(240) == EXIT_DONE, run.output
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
