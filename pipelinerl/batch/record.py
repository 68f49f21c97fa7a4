"""A step's work as a trainer rank was given it, on disk: `batches/step_000012.rank_0.npz`.

Arrays as they are and a header of JSON, nothing pickled: `numpy.load(path, allow_pickle=False)` reads it anywhere.
Token ids, logprobs, advantages and weights come back to the last bit, which is what a replay needs. Texts are left out;
the tokens say the same.

    header       uint8 [.], JSON in UTF-8: step, rank, scale, updates, groups
    tokens       int32, of all turns of all rollouts in a row, context and completion alternating
    logprobs     float32, of the sampled ones among them
    refs         int32 [refs, 3] group, rollout and length of each sample that is trained on
    shares       float64 [refs, 2] its advantage and its weight

`updates` holds for each update `kl_to_go` and the number of refs in each micro-batch; the refs follow in that order.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelinerl.errors import DataError
from pipelinerl.metrics.jsonl import from_json_float, json_float
from pipelinerl.types import (
    Completion,
    FloatArray,
    IntArray,
    Outcome,
    RankBatch,
    Rollout,
    RolloutGroup,
    SampleRef,
    Turn,
    VersionSpan,
)

FOLDER = "batches"
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """`SampleRef.group` counts `groups`."""

    step: int  # from 1
    rank: int
    updates: tuple[RankBatch, ...]
    groups: tuple[RolloutGroup, ...]
    scale: float | None = None  # of a streamed step: `updates` are its parts, whose gradients add up and are scaled


def batch_path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step_{step:06d}.rank_{rank}.npz"


def write_batch(folder: Path, batch: RecordedBatch) -> Path:
    """Write it to its place in `folder`, whole or not at all. Raises OSError."""
    path = batch_path(folder, batch.step, batch.rank)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:  # a name would get .npz appended
        np.savez(file, **_arrays(batch))
    partial.replace(path)
    return path


def read_batch(folder: Path, step: int, rank: int) -> RecordedBatch:
    """What `write_batch` was given, without texts. Raises DataError when it is not there or damaged; names the file."""
    path = batch_path(folder, step, rank)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _restored({name: arrays[name] for name in arrays.files})
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: the batch of step {step} was not recorded") from error
    except Exception as error:  # numpy and zipfile have many
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _arrays(batch: RecordedBatch) -> dict[str, Any]:
    refs = [ref for update in batch.updates for micro_batch in update.micro_batches for ref in micro_batch]
    turns = [turn for group in batch.groups for rollout in group.rollouts for turn in rollout.turns]
    header = {
        "step": batch.step,
        "rank": batch.rank,
        "scale": batch.scale,
        "updates": [
            {"kl_to_go": update.kl_to_go, "micro_batches": [len(refs) for refs in update.micro_batches]}
            for update in batch.updates
        ],
        "groups": [
            {"id": group.id, "problem": group.problem_id, "rollouts": list(map(_described, group.rollouts))}
            for group in batch.groups
        ],
    }
    return {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "tokens": _joined([part for turn in turns for part in (turn.context, turn.completion.tokens)], np.int32),
        "logprobs": _joined([turn.completion.logprobs for turn in turns], np.float32),
        "refs": np.array([(ref.group, ref.rollout, ref.length) for ref in refs], np.int32).reshape(-1, 3),
        "shares": np.array([(ref.advantage, ref.weight) for ref in refs], np.float64).reshape(-1, 2),
    }


def _described(rollout: Rollout) -> dict[str, Any]:
    return {
        "reward": json_float(rollout.reward),
        "outcome": rollout.outcome.value,
        "components": {name: json_float(value) for name, value in rollout.components.items()},
        "detail": rollout.detail,
        "turns": [
            {
                "context": len(turn.context),
                "spans": [[span.version, span.start, span.end] for span in turn.completion.spans],
                "kv_from": turn.completion.kv_from,
                "finish_reason": turn.completion.finish_reason,
            }
            for turn in rollout.turns
        ],
    }


def _restored(arrays: dict[str, Any]) -> RecordedBatch:
    header = json.loads(arrays["header"].tobytes())
    tokens, logprobs = _Reader(arrays["tokens"]), _Reader(arrays["logprobs"])
    groups = tuple(
        RolloutGroup(
            group["id"],
            group["problem"],
            tuple(_rollout(rollout, tokens, logprobs) for rollout in group["rollouts"]),
        )
        for group in header["groups"]
    )
    refs = _refs(arrays["refs"], arrays["shares"])
    updates = tuple(
        RankBatch(
            tuple(tuple(next(refs) for _ in range(count)) for count in update["micro_batches"]), update["kl_to_go"]
        )
        for update in header["updates"]
    )
    return RecordedBatch(header["step"], header["rank"], updates, groups, header["scale"])


def _refs(refs: Any, shares: Any) -> Iterator[SampleRef]:
    for (group, rollout, length), (advantage, weight) in zip(refs.tolist(), shares.tolist(), strict=True):
        yield SampleRef(group, rollout, advantage, length, weight)


def _rollout(described: dict[str, Any], tokens: "_Reader", logprobs: "_Reader") -> Rollout:
    return Rollout(
        turns=tuple(_turn(turn, tokens, logprobs) for turn in described["turns"]),
        reward=from_json_float(described["reward"]),
        outcome=Outcome(described["outcome"]),
        components={name: from_json_float(value) for name, value in described["components"].items()},
        detail=described["detail"],
    )


def _turn(described: dict[str, Any], tokens: "_Reader", logprobs: "_Reader") -> Turn:
    spans = tuple(VersionSpan(*span) for span in described["spans"])
    sampled = spans[-1].end if spans else 0
    context: IntArray = tokens.take(described["context"])
    completion = Completion(
        tokens.take(sampled),
        logprobs.take(sampled),
        spans,
        described["finish_reason"],
        "",
        kv_from=tuple(described["kv_from"]),
    )
    return Turn(context, completion)


class _Reader:
    """Takes pieces off an array from its start."""

    def __init__(self, values: Any):
        self._values = values
        self._at = 0

    def take(self, count: int) -> Any:
        self._at += count
        return self._values[self._at - count : self._at]


def _joined(parts: Sequence[IntArray] | Sequence[FloatArray], dtype: type[np.generic]) -> Any:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)
