"""Writes what a rank trains on from a thread of its own, one step at a time. A step waits for the one before it."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelinerl.batch.record import RecordedBatch, batch_path, write_batch
from pipelinerl.errors import EnvironmentProblem, first_line
from pipelinerl.types import RankBatch, RolloutGroup


class BatchRecorder:
    """Of one rank. A write that fails is raised by the next call: a run that only seems recorded is worse than none."""

    def __init__(self, folder: Path, rank: int):
        self._folder = folder
        self._rank = rank
        self._thread: threading.Thread | None = None
        self._error: EnvironmentProblem | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{folder} cannot be made: {error.strerror or error}; {_WAY_OUT}") from error

    def begin(
        self, step: int, updates: Sequence[RankBatch], groups: Sequence[RolloutGroup], scale: float | None = None
    ) -> None:
        """Start to write the batch of `step`; `scale` as in RecordedBatch.

        Raises EnvironmentProblem when the one before could not be written.
        """
        self.finish()
        batch = RecordedBatch(step, self._rank, tuple(updates), tuple(groups), scale)
        self._thread = threading.Thread(target=self._write, args=(batch,), name="batches", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all that was begun is on file. Raises EnvironmentProblem, again and again, when it is not."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, batch: RecordedBatch) -> None:
        try:
            write_batch(self._folder, batch)
        except OSError as error:
            path = batch_path(self._folder, batch.step, self._rank)
            self._error = EnvironmentProblem(f"cannot write {path}: {error.strerror or first_line(error)}; {_WAY_OUT}")
        except Exception as error:  # a thread's traceback would be seen by nobody
            self._error = EnvironmentProblem(f"cannot record step {batch.step}: {type(error).__name__}: {error}")


def joined(
    parts: Sequence[tuple[RankBatch, Sequence[RolloutGroup]]],
) -> tuple[list[RankBatch], list[RolloutGroup]]:
    """The parts of a streamed step, each of which counts its own groups, as batches that count all groups."""
    batches: list[RankBatch] = []
    groups: list[RolloutGroup] = []
    for batch, own in parts:
        rows = (
            tuple(replace(ref, group=ref.group + len(groups)) for ref in micro_batch)
            for micro_batch in batch.micro_batches
        )
        batches.append(replace(batch, micro_batches=tuple(rows)))
        groups += own
    return batches, groups


_WAY_OUT = "make room, or set journal.batches=false"
