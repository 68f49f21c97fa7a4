"""When to give a run up, or to tell the person who watches it."""

import time
from collections.abc import Sequence

from pipelinerl.errors import BudgetSpent, ParityError
from pipelinerl.training.state import Run
from pipelinerl.types import FleetEvent, GroupMeta, StepResult


def tell_about_fleet(run: Run, event: FleetEvent) -> None:
    """Pass on what happens to engines."""
    run.history.engine(event)
    if event.kind != "requeued":
        run.tell(event.text)
    run.last_progress = time.monotonic()


def check_dropped(run: Run, group: GroupMeta, reason: str) -> None:
    """Give up after too many unusable groups in a row."""
    run.dropped_in_a_row[reason] += 1
    if run.dropped_in_a_row.total() >= run.config.batch.max_dropped_groups_in_a_row:
        reasons = ", ".join(f"{count} {name}" for name, count in run.dropped_in_a_row.items())
        detail = next((rollout.detail for rollout in group.rollouts if rollout.detail), "no detail")
        if reason == "zero_variance":
            detail = "its rewards are all equal; batch.zero_variance=keep trains on such groups"
        raise BudgetSpent(
            f"{run.dropped_in_a_row.total()} groups in a row were unusable (batch.max_dropped_groups_in_a_row), by "
            f"reason: {reasons}; the last one, {group.problem_id}: {detail}"
        )


def check_skipped(run: Run, result: StepResult) -> None:
    """Give up after too many non-finite steps in a row."""
    run.skipped_in_a_row = 0 if result.applied else run.skipped_in_a_row + 1
    if run.skipped_in_a_row > run.config.trainer.max_skipped_steps:
        raise BudgetSpent(
            f"{run.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient "
            f"(trainer.max_skipped_steps={run.config.trainer.max_skipped_steps}); the weights are those before them"
        )


def check_parity(run: Run, step: int, result: StepResult) -> None:
    """Say, or with `parity.alarm=stop` end the run, when engine and trainer part, or the objective breaks down."""
    for message in run.alarm.check(result.metrics) if run.alarm else []:
        run.log.log("run", step, {"parity/alarm": 1.0})
        run.tell(f"step {step}: parity alarm, {message}")
        if run.config.parity.alarm == "stop":
            raise ParityError(f"step {step}: {message} (parity.alarm=warn goes on)")


def check_selection(run: Run, step: int, messages: Sequence[str]) -> None:
    """Say, or with `journal.selection=stop` end the run, when trained samples part from generated ones."""
    for message in messages if run.config.journal.selection != "off" else ():
        run.log.log("run", step, {"selection/alarm": 1.0})
        run.tell(f"step {step}: {message}")
        if run.config.journal.selection == "stop":
            raise BudgetSpent(f"step {step}: {message} (journal.selection=warn goes on)")
