"""Does a run's journal balance? Every ticket in one state, every batch made of what was generated, no lag too large.

The journal is replayed event by event. A process that is started again goes on from a checkpoint, and so does a run
whose trainer was restarted: what was trained or dropped after it is undone, to the ledger that the checkpoint holds,
and the steps are done again. So the later of two is what counts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelinerl.metrics.journal import FILE_NAME
from pipelinerl.metrics.jsonl import read_lines

RUNNING, REQUEUED, GENERATED, QUEUED, CLOSED = "running", "requeued", "generated", "queued", "closed"
OPEN = (RUNNING, REQUEUED, GENERATED, QUEUED)
SCORED = ("ok", "truncated")
SHOWN = 5  # problems that a line names


@dataclass
class Balance:
    """What a journal comes to. Steps count from 1; a lag is in optimizer steps."""

    tickets: dict[int, str] = field(default_factory=dict)  # ticket -> state: open, "trained@3", "dropped(errored)"
    steps: dict[int, list[int]] = field(default_factory=dict)  # step -> tickets it trained on
    lags: dict[int, int] = field(default_factory=dict)  # step -> largest lag of a trained token
    max_lag: int = 0  # the bound
    restarts: Counter[str] = field(default_factory=Counter)  # by what
    lives: int = 0  # processes that drove the run
    exit_code: int | None = None  # of the last of them; None: it was killed, or is alive
    problems: list[str] = field(default_factory=list)

    @property
    def balances(self) -> bool:
        return not self.problems

    @property
    def counts(self) -> Counter[str]:
        """Tickets by state; the trained ones together."""
        return Counter(state.partition("@")[0] for state in self.tickets.values())

    def describe(self) -> str:
        """One line."""
        if self.problems:
            more = f" (and {len(self.problems) - SHOWN} more)" if len(self.problems) > SHOWN else ""
            return f"DOES NOT BALANCE: {'; '.join(self.problems[:SHOWN])}{more}"
        counts = self.counts
        trained = counts.pop("trained", 0) + counts.pop(CLOSED, 0)
        rest = "".join(f", {count} {state}" for state, count in sorted(counts.items()))
        again = f", {sum(self.restarts.values())} restarts" if self.restarts else ""
        return (
            f"balances: {len(self.tickets)} prompts, {trained} trained{rest}; largest lag "
            f"{max(self.lags.values(), default=0)}, bound {self.max_lag}{again}"
        )


def check_journal(run_dir: Path, ledger: Mapping[str, Any] | None = None) -> Balance:
    """Replay `run_dir/journal.jsonl`. With `ledger`, as `Ledger.to_dict` gives it, its end must be the same.

    Raises: DataError when the journal is not there or not readable; names file and line.
    """
    replay = _Replay()
    for number, event in enumerate(read_lines(run_dir / FILE_NAME), start=1):
        replay.take(number, event)
    found = replay.finish()
    if ledger is not None:
        found.problems += _against(found, ledger)
    return found


class _Replay:
    """The state of all tickets after each event."""

    def __init__(self) -> None:
        self.found = Balance()
        self._oldest: dict[int, int | None] = {}  # ticket -> version that sampled its oldest trained token
        self._batches: dict[int, list[int]] = {}  # step -> tickets, not trained yet
        self._line = 0
        self._takes: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "started": self._started,
            "admitted": self._admitted,
            "requeued": self._requeued,
            "generated": self._generated,
            "dropped": self._dropped,
            "batch": self._batch,
            "trained": self._trained,
            "restarted": self._restarted,
            "ended": self._ended,
        }

    def take(self, line: int, event: Mapping[str, Any]) -> None:
        self._line = line
        if line == 1 and event["event"] != "started":
            self._problem("the journal does not begin with started")
        if event["event"] in self._takes:
            self._takes[event["event"]](event)

    def finish(self) -> Balance:
        """Steps must follow each other, and a run that came to its end leaves no ticket open."""
        steps = sorted(self.found.steps)
        if steps != list(range(steps[0], steps[0] + len(steps)) if steps else []):
            self._problem(f"steps {steps[0]} to {steps[-1]} have gaps: {len(steps)} are there")
        if self.found.exit_code == 0 and (still := self._open()):
            self._problem(f"the run is done and {len(still)} tickets are open, {still[0]} is {self._state(still[0])}")
        return self.found

    def _started(self, event: Mapping[str, Any]) -> None:
        self.found.lives += 1
        self.found.max_lag = event["max_lag"]
        self.found.exit_code = None
        self._go_on(event["step"], event["drawn"], set(event["queued"]))

    def _restarted(self, event: Mapping[str, Any]) -> None:
        self.found.restarts[event["what"].split()[0]] += 1
        if event["what"] == "trainer":
            self._go_on(event["step"], event["drawn"], set(event["queued"]))

    def _go_on(self, step: int, drawn: int, queued: set[int]) -> None:
        """After `step`, with the ledger as it was then: `drawn` tickets, all of them closed but the queued ones."""
        found = self.found
        self._undo_steps_after(step)
        for ticket in [ticket for ticket in found.tickets if ticket >= drawn]:
            del found.tickets[ticket]
        for ticket in range(drawn):
            state = found.tickets.get(ticket, "")
            if ticket in queued:
                if state.startswith("trained"):
                    self._problem(f"ticket {ticket} is {state} and to be drawn again")
                found.tickets[ticket] = QUEUED
            elif ticket not in found.tickets:
                found.tickets[ticket] = CLOSED  # in another run directory
            elif not state or state in OPEN:
                self._problem(f"ticket {ticket} is {state or 'open'}, and the checkpoint takes it for closed")

    def _admitted(self, event: Mapping[str, Any]) -> None:
        self._move(event["ticket"], ("", QUEUED, REQUEUED), RUNNING)

    def _requeued(self, event: Mapping[str, Any]) -> None:
        self._move(event["ticket"], (RUNNING, REQUEUED, GENERATED), REQUEUED)

    def _generated(self, event: Mapping[str, Any]) -> None:
        self._move(event["ticket"], (RUNNING, REQUEUED), GENERATED)
        self._oldest[event["ticket"]] = min(
            (
                run[0]
                for rollout in event["rollouts"]
                if rollout["outcome"] in SCORED
                for turn in rollout["turns"]
                for run in turn[1]
            ),
            default=None,
        )

    def _dropped(self, event: Mapping[str, Any]) -> None:
        for ticket in event["tickets"]:
            self._move(ticket, (RUNNING, REQUEUED, GENERATED), f"dropped({event['reason']})")

    def _batch(self, event: Mapping[str, Any]) -> None:
        step, tickets = event["step"], event["tickets"]
        if len(set(tickets)) < len(tickets):
            self._problem(f"the batch of step {step} has a ticket twice")
        for ticket in tickets:
            if self._state(ticket) != GENERATED:
                self._problem(f"ticket {ticket} is in the batch of step {step} and {self._state(ticket) or 'unknown'}")
        self._batches[step] = tickets

    def _trained(self, event: Mapping[str, Any]) -> None:
        step = event["step"]
        if step not in self._batches:
            self._problem(f"step {step} trained without a batch")
            return
        tickets = self._batches.pop(step)
        self.found.steps[step] = tickets
        oldest = [version for ticket in tickets if (version := self._oldest.get(ticket)) is not None]
        self.found.lags[step] = lag = max((step - 1 - version for version in oldest), default=0)
        if lag > self.found.max_lag:
            self._problem(f"step {step} trained on tokens of lag {lag}, the bound is {self.found.max_lag}")
        if any(version > step - 1 for version in oldest):
            self._problem(f"step {step} trained on tokens of a version that did not exist")
        if event["applied"]:
            for ticket in tickets:
                self._move(ticket, (GENERATED,), f"trained@{step}")

    def _ended(self, event: Mapping[str, Any]) -> None:
        self.found.exit_code = event["code"]

    def _undo_steps_after(self, step: int) -> None:
        """Forget them; the tickets that they trained on have no state of their own now."""
        for later in [later for later in self.found.steps if later > step]:
            for ticket in self.found.steps.pop(later):
                if self._state(ticket) == f"trained@{later}":
                    self.found.tickets[ticket] = ""
            del self.found.lags[later]
        self._batches.clear()

    def _move(self, ticket: int, expected: Sequence[str], state: str) -> None:
        if self._state(ticket) not in expected:
            self._problem(f"ticket {ticket} becomes {state} and was {self._state(ticket) or 'unknown'}")
        self.found.tickets[ticket] = state

    def _state(self, ticket: int) -> str:
        return self.found.tickets.get(ticket, "")

    def _open(self) -> list[int]:
        return [ticket for ticket, state in self.found.tickets.items() if state in OPEN]

    def _problem(self, text: str) -> None:
        self.found.problems.append(f"line {self._line}: {text}")


def _against(found: Balance, ledger: Mapping[str, Any]) -> list[str]:
    """Where the ledger says something else."""
    says = {ticket: f"trained@{step}" for step, tickets in ledger["trained"].items() for ticket in tickets}
    says |= {ticket: f"dropped({reason})" for reason, tickets in ledger["dropped"].items() for ticket in tickets}
    says |= {ticket: state for state in (QUEUED, RUNNING, GENERATED) for ticket in ledger[state]}
    same = {CLOSED: says.values(), REQUEUED: (QUEUED, RUNNING)}  # what the journal does not know better
    return [
        f"ticket {ticket} is {found.tickets.get(ticket) or 'unknown'} in the journal and "
        f"{says.get(ticket, 'unknown')} in the ledger"
        for ticket in sorted(says.keys() | found.tickets.keys())
        if says.get(ticket) not in same.get(found.tickets.get(ticket, ""), (found.tickets.get(ticket),))
    ]
