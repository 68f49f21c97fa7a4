"""`journal.jsonl`: what happened to every prompt of a run, one line per event, in the order in which it happened.

    started     step, resumed_from, how many tickets are drawn and which of them are queued, max_lag, the configuration
    admitted    ticket, problem, the version that engines serve
    requeued    ticket, reason
    generated   ticket, engine, and of each rollout reward, outcome, lengths and who sampled its tokens
    dropped     tickets, reason
    batch       step, tickets in order, how many samples each update trains on; batches/ has the tokens and their shares
    trained     step, version, applied, loss, grad_norm
    updated     version, epoch, seconds
    restarted   what, why; of the trainer also step, drawn and queued: what came after that step is undone
    engine      engine, state, text
    evaluated   version; on an engine of its own, where that has begun
    ended       code, why

Every line has `event` and `t`, seconds since the epoch. A rollout is an object like

    {"reward": 1.0, "outcome": "ok", "prompt": 12, "tokens": 42, "turns": [[12, [[4, 30], [5, 12]], []]]}

where a turn is [tokens of new context, [[version, tokens], ...], tokens before which the KV was made anew]. With
`sampling.seeded` the seed of a completion is rollout/seeds.py's completion_seed(seed, "train", ticket, rollout, turn),
whichever engine samples it and however often.

A line that was appended is with the operating system: a kill loses none. metrics/journal_check.py reads it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelinerl.metrics.jsonl import LineFile, json_float
from pipelinerl.types import GroupMeta, RankBatch, RolloutMeta, StepResult

FILE_NAME = "journal.jsonl"


class Journal:
    """Appends to `run_dir/journal.jsonl`; a resumed run goes on with the file it finds.

    Raises:
        EnvironmentProblem: the file cannot be opened or written; names the path.
    """

    def __init__(self, run_dir: Path, now: Callable[[], float] = time.time) -> None:
        self.path = run_dir / FILE_NAME
        self._file = LineFile(self.path)
        self._now = now

    def started(
        self, step: int, resumed_from: str | None, ledger: Mapping[str, Any], config: Mapping[str, Any], max_lag: int
    ) -> None:
        """A process begins, or goes on after step `step`. `ledger` as `Ledger.to_dict` gives it, `config` likewise."""
        start = _start(step, ledger)
        self._append("started", **start, resumed_from=resumed_from, max_lag=max_lag, config=dict(config))

    def admitted(self, ticket: int, problem_id: str, version: int) -> None:
        """`ticket` takes a place; the engines serve `version`."""
        self._append("admitted", ticket=ticket, problem=problem_id, version=version)

    def requeued(self, ticket: int, reason: str) -> None:
        """What was sampled for `ticket` is lost; it is sampled again."""
        self._append("requeued", ticket=ticket, reason=reason)

    def generated(self, group: GroupMeta) -> None:
        """The group of ticket `group.id` is finished."""
        self._append(
            "generated",
            ticket=group.id,
            engine=group.worker,
            seconds=round(group.seconds, 3),
            rollouts=[_rollout(rollout) for rollout in group.rollouts],
        )

    def dropped(self, tickets: Sequence[int], reason: str) -> None:
        """They will never be trained on."""
        self._append("dropped", tickets=list(tickets), reason=reason)

    def batch(self, step: int, tickets: Sequence[int], updates: Sequence[Sequence[RankBatch]]) -> None:
        """Step `step` is going to train on `tickets`, in [update][rank]."""
        samples = [sum(len(refs) for rank in ranks for refs in rank.micro_batches) for ranks in updates]
        self._append("batch", step=step, tickets=list(tickets), ranks=len(updates[0]), samples=samples)

    def trained(self, step: int, result: StepResult) -> None:
        """Step `step` is done."""
        loss, norm = result.metrics["optim/loss"], result.metrics["optim/grad_norm"]
        self._append(
            "trained",
            step=step,
            version=result.version,
            applied=result.applied,
            loss=json_float(loss),
            grad_norm=json_float(norm),
        )

    def updated(self, version: int, epoch: int, seconds: float) -> None:
        """All engines serve `version`; `epoch` counts the communication groups that the updates went through."""
        self._append("updated", version=version, epoch=epoch, seconds=round(seconds, 4))

    def restarted(self, what: str, why: str) -> None:
        """An engine was replaced. What it had in flight is requeued, or was."""
        self._append("restarted", what=what, why=why)

    def trainer_restarted(self, why: str, step: int, ledger: Mapping[str, Any]) -> None:
        """The trainer was replaced and goes on after step `step`. Everything after that is undone, to `ledger`."""
        self._append("restarted", what="trainer", why=why, **_start(step, ledger))

    def engine(self, engine: int, state: str, text: str) -> None:
        """What became of an engine."""
        self._append("engine", engine=engine, state=state, text=text)

    def evaluated(self, version: int) -> None:
        """The held-out problems were given to engines that serve `version`."""
        self._append("evaluated", version=version)

    def ended(self, code: int, why: str = "") -> None:
        """The process ends by itself, with exit code `code`."""
        self._append("ended", code=code, why=why)

    def close(self) -> None:
        self._file.close()

    def _append(self, event: str, **values: Any) -> None:
        self._file.append({"event": event, "t": round(self._now(), 3), **values})


def _start(step: int, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The step that is done, and the tickets that are drawn already, all of them closed but the queued ones."""
    queued = sorted(ticket for state in ("queued", "running", "generated") for ticket in ledger[state])
    return {"step": step, "drawn": ledger["drawn"], "queued": queued}


def _rollout(meta: RolloutMeta) -> dict[str, Any]:
    return {
        "reward": json_float(meta.reward),
        "outcome": meta.outcome.value,
        "prompt": meta.prompt_len,
        "tokens": meta.completion_len,
        "turns": [[turn.context, turn.runs, turn.kv_from] for turn in meta.turns],
    }
