"""What becomes of every prompt, as the training loop tells it: written to the journal, and watched for selection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelinerl.config.schema import JournalConfig
from pipelinerl.metrics.journal import Journal
from pipelinerl.metrics.selection import SelectionAudit
from pipelinerl.types import FleetEvent, GroupMeta, Problem, RankBatch, StepResult


@dataclass(frozen=True)
class History:
    """The journal of a run and the audit of its samples. Versions are those that the engines serve."""

    journal: Journal
    audit: SelectionAudit

    @classmethod
    def open(cls, run_dir: Path, config: JournalConfig) -> "History":
        return cls(Journal(run_dir), SelectionAudit(config.selection_window))

    def admitted(self, ticket: int, problem: Problem, version: int) -> None:
        """`ticket` takes a place."""
        self.journal.admitted(ticket, problem.id, version)
        self.audit.admitted(ticket, version)

    def generated(self, group: GroupMeta, version: int) -> None:
        """The group is finished."""
        self.journal.generated(group)
        self.audit.finished(group, version)

    def dropped(self, group: GroupMeta, reason: str) -> None:
        """A finished group is not trained on."""
        self.journal.dropped([group.id], reason)
        self.audit.dropped(group, reason)

    def engine(self, event: FleetEvent) -> None:
        """Something happened to an engine."""
        if event.kind == "requeued":
            if event.group_id is not None:
                self.journal.requeued(event.group_id, event.text)
        elif event.kind == "restarted":
            self.journal.restarted(f"engine {event.engine}", event.text)
        else:
            self.journal.engine(event.engine, event.kind, event.text)

    def trainer_restarted(self, why: str, step: int, ledger: Mapping[str, Any]) -> None:
        """The trainer goes on after step `step`, where the prompts were as `ledger` says. What is open starts anew."""
        self.journal.trainer_restarted(why, step, ledger)
        self.audit.start_anew()

    def batch(self, step: int, groups: Sequence[GroupMeta], updates: Sequence[Sequence[RankBatch]]) -> None:
        """Step `step` begins."""
        self.journal.batch(step, [group.id for group in groups], updates)

    def trained(self, step: int, groups: Sequence[GroupMeta], result: StepResult) -> None:
        """Step `step` is done. One that was skipped has trained on nothing."""
        self.journal.trained(step, result)
        if result.applied:
            self.audit.trained(groups)
        else:
            for group in groups:
                self.dropped(group, "not_finite")
