"""The cases of test_sequence_parallel.py: what a rank of each does, and what it notes down. ranks.py runs them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, ScoredSequence, ScoreRequest, StepResult

REFUSED = (3, 8)  # ranks that cannot share the heads of the tiny model: 4, and 2 for keys and values


@dataclass(frozen=True)
class Case:
    """One step, and a score of the same groups by rank 0 alone."""

    config: RunConfig
    batches: Sequence[RankBatch]
    groups: Sequence[RolloutGroup]
    request: ScoreRequest


@dataclass
class RankRun:
    """What one rank saw."""

    weights: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)  # before the step and after
    results: list[StepResult] = field(default_factory=list)
    scored: list[ScoredSequence] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    exported_config: str = ""


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from pipelinerl.errors import ConfigError
    from pipelinerl.trainer.sequence_parallel import SequenceShards
    from pipelinerl.trainer.source import state_dict_of
    from pipelinerl.trainer.worker import TrainerWorker

    worker, run = TrainerWorker(case.config, rank, "cpu"), RankRun()
    worker.setup("127.0.0.1", port)

    def note_weights() -> None:
        run.weights.append({name: tensor.numpy() for name, tensor in state_dict_of(worker._source).items()})

    note_weights()
    run.results.append(worker.step([case.batches[rank]], *case.groups))
    note_weights()
    if rank == 0 and case.config.trainer.zero_stage < 3:
        run.scored = worker.score(case.request, *case.groups)
        worker.export(str(out.with_suffix("")))
        run.exported_config = (out.with_suffix("") / "config.json").read_text()
    for size in REFUSED:
        try:
            SequenceShards(worker._policy.hf, size)
        except ConfigError as error:
            run.refusals.append(str(error))
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))
