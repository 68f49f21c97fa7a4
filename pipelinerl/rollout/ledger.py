"""Where every drawn prompt is. A prompt is known by its ticket, its number in the order of drawing.

    queued ──> running ──> generated ──> trained@step
       ^          └────────────┴───────> dropped(reason)
       └── what a checkpoint finds queued, running or generated

A ticket is in one state, and `trained` and `dropped` are final: nothing is trained on twice, and nothing is lost
without a reason.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pipelinerl.errors import DataError


class State(StrEnum):
    """Of a ticket that is still open."""

    QUEUED = "queued"  # to be drawn again after a resume
    RUNNING = "running"
    GENERATED = "generated"


class Ledger:
    """All tickets of a run, `[0, drawn)`. For one thread."""

    def __init__(self) -> None:
        self._drawn = 0
        self._open: dict[int, State] = {}
        self._queued: deque[int] = deque()  # the open ones that are, ascending
        self._trained: dict[int, int] = {}  # ticket -> step
        self._dropped: dict[int, str] = {}  # ticket -> reason
        self._reasons: Counter[str] = Counter()

    @property
    def dropped(self) -> Counter[str]:
        """How many were dropped, by reason."""
        return self._reasons

    @property
    def last_step(self) -> int:
        """The newest step that any ticket was trained at; 0 before the first."""
        return max(self._trained.values(), default=0)

    def state(self, ticket: int) -> str:
        """E.g. "running", "trained@3" or "dropped(errored)"."""
        if ticket in self._trained:
            return f"trained@{self._trained[ticket]}"
        return f"dropped({self._dropped[ticket]})" if ticket in self._dropped else str(self._open[ticket])

    def draw(self) -> int:
        """The ticket to run next: the lowest queued one, or else a new one."""
        ticket = self._queued.popleft() if self._queued else self._drawn
        self._drawn = max(self._drawn, ticket + 1)
        self._open[ticket] = State.RUNNING
        return ticket

    def generated(self, ticket: int) -> None:
        """Its group is finished and waits to be trained on."""
        self._expect(ticket, State.RUNNING)
        self._open[ticket] = State.GENERATED

    def drop(self, tickets: Iterable[int], reason: str) -> None:
        """They will never be trained on, for `reason`."""
        for ticket in tickets:
            self._expect(ticket, State.RUNNING, State.GENERATED)
            del self._open[ticket]
            self._dropped[ticket] = reason
            self._reasons[reason] += 1

    def trained(self, tickets: Iterable[int], step: int) -> None:
        """Optimizer step `step` was made of them."""
        for ticket in tickets:
            self._expect(ticket, State.GENERATED)
            del self._open[ticket]
            self._trained[ticket] = step

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: the tickets of each state, step and reason."""
        by_step: dict[str, list[int]] = {}
        for ticket, step in self._trained.items():
            by_step.setdefault(str(step), []).append(ticket)
        by_reason: dict[str, list[int]] = {}
        for ticket, reason in self._dropped.items():
            by_reason.setdefault(reason, []).append(ticket)
        by_state = {str(s): sorted(t for t, state in self._open.items() if state is s) for s in State}
        return {"drawn": self._drawn, **by_state, "trained": by_step, "dropped": by_reason}

    @classmethod
    def resumed(cls, data: Mapping[str, Any]) -> "Ledger":
        """The ledger that `to_dict` gave, with all that was open queued again.

        Raises DataError when the tickets do not add up: one twice, or one missing.
        """
        ledger = cls()
        ledger._drawn = int(data["drawn"])
        ledger._queued = deque(sorted(int(t) for state in State for t in data[state]))
        ledger._open = dict.fromkeys(ledger._queued, State.QUEUED)
        ledger._trained = {int(t): int(step) for step, tickets in data["trained"].items() for t in tickets}
        ledger._dropped = {int(t): reason for reason, tickets in data["dropped"].items() for t in tickets}
        ledger._reasons = Counter(ledger._dropped.values())
        entries = sum(len(data[state]) for state in State)
        entries += sum(map(len, data["trained"].values())) + sum(map(len, data["dropped"].values()))
        known = ledger._open.keys() | ledger._trained.keys() | ledger._dropped.keys()
        if entries != ledger._drawn or known != set(range(ledger._drawn)):
            raise DataError(f"the ledger of prompts has {entries} entries for {ledger._drawn} tickets drawn")
        return ledger

    def _expect(self, ticket: int, *states: State) -> None:
        if self._open.get(ticket) in states:
            return
        known = ticket in self._open or ticket in self._trained or ticket in self._dropped
        found = self.state(ticket) if known else "unknown"
        raise AssertionError(f"ticket {ticket} is {found}, not {' or '.join(states)}")
