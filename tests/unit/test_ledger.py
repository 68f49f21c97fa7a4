"""The ledger of prompts: one state each, nothing twice, nothing lost, over any history and any number of resumes."""

import json
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelinerl.errors import DataError
from pipelinerl.rollout.ledger import Ledger


class History(RuleBasedStateMachine):
    """Random runs with checkpoints and kills, beside a model that is told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model: dict[int, str] = {}  # ticket -> state
        self.step = 0
        self.checkpoint: tuple[dict[str, Any], dict[int, str], int] = (self.ledger.to_dict(), {}, 0)

    def of_state(self, *states: str) -> list[int]:
        return sorted(ticket for ticket, state in self.model.items() if state in states)

    @rule()
    def draw(self) -> None:
        ticket = self.ledger.draw()
        queued = self.of_state("queued")
        assert ticket == (queued[0] if queued else len(self.model)), "queued ones first, in order, then new ones"
        self.model[ticket] = "running"

    @precondition(lambda self: self.of_state("running"))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.of_state("running")))
        if data.draw(st.booleans()):
            self.ledger.generated(ticket)
            self.model[ticket] = "generated"
        else:
            reason = data.draw(st.sampled_from(["errored", "zero_variance"]))
            self.ledger.drop([ticket], reason)
            self.model[ticket] = f"dropped({reason})"

    @precondition(lambda self: self.of_state("generated"))
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        self.step += 1
        tickets = data.draw(st.lists(st.sampled_from(self.of_state("generated")), min_size=1, unique=True))
        self.ledger.trained(tickets, self.step)
        self.model |= dict.fromkeys(tickets, f"trained@{self.step}")

    @rule()
    def save(self) -> None:
        self.checkpoint = (json.loads(json.dumps(self.ledger.to_dict())), dict(self.model), self.step)

    @rule()
    def kill_and_resume(self) -> None:
        data, model, self.step = self.checkpoint
        self.ledger = Ledger.resumed(data)
        still_open = ("running", "generated")
        self.model = {ticket: "queued" if state in still_open else state for ticket, state in model.items()}

    @invariant()
    def every_ticket_is_in_the_state_that_it_should_be_in(self) -> None:
        assert {ticket: self.ledger.state(ticket) for ticket in self.model} == self.model
        data = self.ledger.to_dict()
        listed = data["queued"] + data["running"] + data["generated"]
        listed += [t for name in ("trained", "dropped") for tickets in data[name].values() for t in tickets]
        assert sorted(listed) == sorted(self.model) == list(range(data["drawn"]))
        assert all(int(step) <= self.step for step in data["trained"])
        assert self.ledger.dropped.total() == sum(state.startswith("dropped") for state in self.model.values())


TestHistory = History.TestCase


def ended() -> Ledger:
    """Ticket 0 trained at step 1, ticket 1 dropped, ticket 2 running."""
    ledger = Ledger()
    for _ in range(3):
        ledger.draw()
    ledger.generated(0)
    ledger.trained([0], 1)
    ledger.drop([1], "errored")
    return ledger


def test_the_dict_is_for_people_too() -> None:
    assert ended().to_dict() == {
        "drawn": 3, "queued": [], "running": [2], "generated": [], "trained": {"1": [0]}, "dropped": {"errored": [1]},
    }  # fmt: skip


def test_nothing_is_trained_twice_or_after_it_was_dropped_or_before_it_is_there() -> None:
    for ticket, found in ((0, "trained@1"), (1, r"dropped\(errored\)"), (2, "running"), (9, "unknown")):
        with pytest.raises(AssertionError, match=f"ticket {ticket} is {found}, not generated"):
            ended().trained([ticket], 2)


@pytest.mark.parametrize(
    "change",
    [
        {"drawn": 4},  # one is missing
        {"running": []},
        {"running": [2, 0]},  # one is in two states
        {"trained": {"1": [0, 0]}},
        {"running": [7]},
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="ledger of prompts"):
        Ledger.resumed(ended().to_dict() | change)
