"""The cases of test_objective_ranks.py: what a rank of each does, and what it notes down. ranks.py runs them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, SampleKL, StepResult


@dataclass(frozen=True)
class Case:
    """`steps[s][update][rank]` is what a rank does in step s, always with the same payloads."""

    config: RunConfig
    steps: Sequence[Sequence[Sequence[RankBatch]]]
    groups: Sequence[RolloutGroup]
    measure: bool = False  # ask for the KL to the reference before each step


@dataclass
class RankRun:
    """What one rank saw."""

    results: list[StepResult] = field(default_factory=list)
    measured: list[SampleKL] = field(default_factory=list)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # after the last step
    reference_rows: int = 0  # forward passes of the reference


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from pipelinerl.trainer.source import state_dict_of
    from pipelinerl.trainer.worker import TrainerWorker

    worker = TrainerWorker(case.config, rank, "cpu")
    worker.setup("127.0.0.1", port)
    run = RankRun()

    def count(*_: object) -> None:
        run.reference_rows += 1

    if worker._reference:
        worker._reference._policy.register_forward_hook(count)
    for updates in case.steps:
        share = [ranks[rank] for ranks in updates]
        if case.measure:
            run.measured += worker.reference_kl(share, *case.groups)
        run.results.append(worker.step(share, *case.groups))
    run.weights = {name: tensor.float().numpy() for name, tensor in state_dict_of(worker._source).items()}
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))
