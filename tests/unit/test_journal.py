"""The journal of a run on fakes, whether it balances, and that what does not is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.errors import BudgetSpent, DataError, EnvironmentProblem
from pipelinerl.loop import train
from pipelinerl.metrics.journal import Journal
from pipelinerl.metrics.journal_check import check_journal
from pipelinerl.metrics.jsonl import read_lines
from pipelinerl.types import FleetEvent, GroupMeta, Outcome, RankBatch, RolloutMeta, SampleRef, StepResult, TurnMeta
from tests.unit.fakes import FakeRun, fake_run

OK, ERROR = Outcome.OK, Outcome.ENV_ERROR


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "journal.jsonl")


def edit(run_dir: Path, number: int, **changes: Any) -> None:
    """Change a line, counted from 0."""
    events = lines(run_dir)
    events[number] |= changes
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def of(run_dir: Path, event: str) -> list[int]:
    """Numbers of the lines with an event."""
    return [number for number, line in enumerate(lines(run_dir)) if line["event"] == event]


async def finished(run: FakeRun) -> FakeRun:
    await train(run)
    run.history.journal.ended(0)
    return run


# What a run writes


async def test_a_run_in_events(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "steps=1", "eval.at_end=false", "async.mode=sync")
    run.fleet.outcomes = lambda group: [OK, ERROR] if group == 0 else [OK, OK]
    await finished(run)
    events = lines(tmp_path)
    assert [event["event"] for event in events] == [
        *["started", "updated", "evaluated", "admitted", "admitted", "generated", "dropped", "generated"],
        *["admitted", "generated", "batch", "trained", "updated", "ended"],
    ]
    assert events[5]["rollouts"] == [
        {"reward": 0.0, "outcome": "ok", "prompt": 2, "tokens": 3, "turns": [[2, [[0, 3]], []]]},
        {"reward": 1.0, "outcome": "env_error", "prompt": 2, "tokens": 3, "turns": [[2, [[0, 3]], []]]},
    ]
    assert {"tickets": [1, 2], "step": 1, "ranks": 1, "samples": [4]}.items() <= events[10].items()
    assert {"step": 1, "version": 1, "applied": True, "loss": 1.0, "grad_norm": 1.0}.items() <= events[11].items()
    found = check_journal(tmp_path, run.buffer.ledger.to_dict())
    assert found.balances and found.tickets == {0: "dropped(errored)", 1: "trained@1", 2: "trained@1"}
    assert found.describe() == ("balances: 3 prompts, 2 trained, 1 dropped(errored); largest lag 0, bound 0")


@pytest.mark.parametrize("lag", [0, 1, 3])
async def test_the_lag_of_every_step_is_in_it(tmp_path: Path, lag: int) -> None:
    run = await finished(fake_run(tmp_path, f"async.max_lag={lag}", "steps=8"))
    found = check_journal(tmp_path, run.buffer.ledger.to_dict())
    assert found.balances and list(found.lags.values()) == [min(step, lag) for step in range(8)]


async def test_skipped_steps_drop_their_groups(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.trainer.skips = {2}
    await finished(run)
    found = check_journal(tmp_path, run.buffer.ledger.to_dict())
    assert found.balances and found.counts == {"trained": 6, "dropped(not_finite)": 2}


async def test_a_run_that_gives_up_leaves_open_tickets_and_balances(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "batch.max_dropped_groups_in_a_row=3")
    run.fleet.outcomes = lambda group: [ERROR, ERROR] if group >= 4 else [OK, OK]
    with pytest.raises(BudgetSpent):
        await train(run)
    found = check_journal(tmp_path, run.buffer.ledger.to_dict())
    assert found.balances, found.problems
    assert found.counts["dropped(errored)"] >= 3


async def test_a_resumed_run_goes_on_in_the_same_journal(tmp_path: Path) -> None:
    """Killed after step 3, resumed from step 2: tickets of step 3, and a drop after step 2, are done again."""
    first = fake_run(tmp_path, "steps=8", "async.max_lag=1")
    saved: dict[str, Any] = {}
    first.fleet.outcomes = lambda group: [ERROR, ERROR] if group == 7 else [OK, OK]

    def stop_at_3(step: int) -> DriverState:
        saved[str(step)] = first.state(step)
        return first.state(step)

    original = first.trainer.step

    async def step(updates: Any, payloads: Any) -> StepResult:
        if first.trainer.done == 2:
            saved["2"] = first.state(2)
        if first.trainer.done == 3:
            raise BudgetSpent("the end")
        return await original(updates, payloads)

    first.trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(BudgetSpent):
        await train(first)
    assert check_journal(tmp_path).balances
    second = await finished(fake_run(tmp_path, "steps=8", "async.max_lag=1", state=saved["2"]))
    found = check_journal(tmp_path, second.buffer.ledger.to_dict())
    assert found.balances, found.problems
    assert (found.lives, sorted(found.steps), found.counts["trained"]) == (2, list(range(1, 9)), 16)


# What does not balance


@pytest.fixture
async def whole(tmp_path: Path) -> Path:
    await finished(fake_run(tmp_path, "async.max_lag=1"))
    assert check_journal(tmp_path).balances
    return tmp_path


def without(run_dir: Path, number: int) -> None:
    events = lines(run_dir)
    del events[number]
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


async def test_a_ticket_that_is_trained_twice_is_found(whole: Path) -> None:
    edit(whole, of(whole, "batch")[1], tickets=[0, 3])
    assert "ticket 0 is in the batch of step 2 and trained@1" in check_journal(whole).describe()


async def test_a_ticket_that_is_lost_is_found(whole: Path) -> None:
    edit(whole, of(whole, "batch")[1], tickets=[3])
    assert "the run is done and 1 tickets are open, 2 is generated" in check_journal(whole).describe()


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ("generated", "ticket 0 is in the batch of step 1 and running"),
        ("admitted", "ticket 0 becomes generated and was unknown"),
        ("batch", "step 1 trained without a batch"),
        ("trained", "the run is done and 2 tickets are open"),
        ("started", "does not begin with started"),
    ],
)
async def test_an_event_that_is_missing_is_found(whole: Path, event: str, problem: str) -> None:
    without(whole, of(whole, event)[0])
    assert problem in check_journal(whole).describe()


async def test_a_lag_above_the_bound_is_found(whole: Path) -> None:
    for number in of(whole, "started"):
        edit(whole, number, max_lag=0)
    assert "step 2 trained on tokens of lag 1, the bound is 0" in check_journal(whole).describe()


async def test_a_ledger_that_says_something_else_is_found(whole: Path) -> None:
    ledger = {"trained": {"1": [0, 1]}, "dropped": {"errored": [2]}, "queued": [], "running": [], "generated": []}
    assert "ticket 2 is trained@2 in the journal and dropped(errored) in the ledger" in str(
        check_journal(whole, ledger).problems
    )


async def test_no_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"journal\.jsonl"):
        check_journal(tmp_path)


# Requeued groups and restarts


def group(ticket: int, version: int) -> GroupMeta:
    rollout = RolloutMeta(1.0, OK, {}, 5, 2, 3, {version: 3}, "", (TurnMeta(2, ((version, 3),)),))
    return GroupMeta(ticket, f"train/{ticket}", 0, (rollout, rollout), 0.1)


def batch(journal: Journal, step: int, tickets: list[int]) -> None:
    refs = tuple(SampleRef(i, r, 0.5, 5) for i in range(len(tickets)) for r in range(2))
    journal.batch(step, tickets, [[RankBatch((refs,))]])


def result(step: int) -> StepResult:
    return StepResult(step, {"optim/loss": float("nan"), "optim/grad_norm": 1.0}, True)


def opened(run_dir: Path, queued: tuple[int, ...] = (), drawn: int = 0, step: int = 0) -> Journal:
    journal = Journal(run_dir, now=lambda: 1.0)
    ledger = {"drawn": drawn, "queued": list(queued), "running": [], "generated": []}
    journal.started(step, "elsewhere" if step else None, ledger, {}, max_lag=1)
    return journal


@pytest.mark.parametrize("again", [True, False])
def test_a_requeued_group_is_sampled_again(tmp_path: Path, again: bool) -> None:
    journal = opened(tmp_path)
    journal.admitted(0, "train/0", 0)
    journal.requeued(0, "engine 1 died")
    if again:
        journal.admitted(0, "train/0", 0)
    journal.generated(group(0, 0))
    batch(journal, 1, [0])
    journal.trained(1, result(1))
    journal.ended(0)
    assert check_journal(tmp_path).balances


def test_after_a_restart_of_the_trainer_the_later_step_counts(tmp_path: Path) -> None:
    """It goes back to step 1, after which ticket 1 was generated and ticket 2 was not drawn."""
    journal = opened(tmp_path)

    def generate(ticket: int, version: int) -> None:
        journal.admitted(ticket, f"train/{ticket}", version)
        journal.generated(group(ticket, version))

    generate(0, 0)
    generate(1, 0)
    for step in (1, 2):
        batch(journal, step, [step - 1])
        journal.trained(step, result(step))
    generate(2, 1)
    batch(journal, 3, [2])
    journal.trainer_restarted("rank 0 died", 1, {"drawn": 2, "queued": [], "running": [], "generated": [1]})
    for step in (2, 3):
        generate(step - 1, 1)
        batch(journal, step, [step - 1])
        journal.trained(step, result(step))
    journal.ended(0)
    found = check_journal(tmp_path)
    assert found.balances, found.problems
    assert found.tickets == {0: "trained@1", 1: "trained@2", 2: "trained@3"}
    assert found.describe().endswith("largest lag 1, bound 1, 1 restarts")


async def test_what_happens_to_engines_is_in_it(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "steps=1")
    for kind, ticket in (("lost", None), ("requeued", 0), ("requeued", None), ("restarted", None), ("healthy", None)):
        run.history.engine(FleetEvent(kind, 1, f"engine 1: {kind}", ticket))
    told = [{k: v for k, v in event.items() if k != "t"} for event in lines(tmp_path)[1:]]
    assert told == [
        {"event": "engine", "engine": 1, "state": "lost", "text": "engine 1: lost"},
        {"event": "requeued", "ticket": 0, "reason": "engine 1: requeued"},
        {"event": "restarted", "what": "engine 1", "why": "engine 1: restarted"},
        {"event": "engine", "engine": 1, "state": "healthy", "text": "engine 1: healthy"},
    ]


def test_a_run_that_goes_on_from_another_runs_checkpoint(tmp_path: Path) -> None:
    journal = opened(tmp_path, queued=(1,), drawn=3, step=5)
    journal.admitted(1, "train/1", 5)
    journal.generated(group(1, 5))
    batch(journal, 6, [1])
    journal.trained(6, result(6))
    journal.ended(0)
    found = check_journal(tmp_path)
    assert found.balances and found.tickets == {0: "closed", 1: "trained@6", 2: "closed"}


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.admitted(0, "train/0", 0)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "gener')
    assert check_journal(tmp_path).tickets == {0: "running"}
    opened(tmp_path, queued=(0,), drawn=1)
    assert check_journal(tmp_path).balances


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal._file._file.close()
    journal._file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*journal\.jsonl: No space left"):
        journal.admitted(0, "train/0", 0)
