"""The cases of test_trainer.py: what a rank of each does, and what it notes down. ranks.py runs them."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, StepResult


@dataclass(frozen=True)
class Case:
    """`steps[s][rank]` is what a rank does in step s, with the payloads `groups[s]`."""

    config: RunConfig
    steps: Sequence[Sequence[RankBatch]]
    groups: Sequence[Sequence[RolloutGroup]]
    export: Path | None = None


@dataclass
class RankRun:
    """What one rank saw: its weights before the first step and after each one, and the results in between."""

    setup: Mapping[str, Any]
    weights: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from pipelinerl.trainer.worker import TrainerWorker
    from pipelinerl.weights.sender import parameters_in_order

    worker = TrainerWorker(case.config, rank, "cpu")
    run = RankRun(worker.setup("127.0.0.1", port))

    def note_weights() -> None:
        tensors = parameters_in_order(worker._policy.hf)  # what the sender would send
        run.weights.append({name: tensor.float().numpy().copy() for name, tensor in tensors})

    note_weights()
    for ranks, groups in zip(case.steps, case.groups, strict=True):
        run.results.append(worker.step(ranks[rank], *groups))
        note_weights()
    if case.export and rank == 0:
        worker.export(str(case.export))
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))
