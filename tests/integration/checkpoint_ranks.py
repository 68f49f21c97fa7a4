"""The cases of test_trainer_checkpoint.py. A rank takes steps, maybe from a checkpoint, and maybe writes one."""

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.checkpoint.manifest import FileRecord
from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """`before[s][rank]` is done before the checkpoint and `after[s][rank]` after it, both on `groups`."""

    config: RunConfig
    groups: Sequence[RolloutGroup]
    before: Sequence[Sequence[RankBatch]] = ()
    save: Path | None = None
    load: Path | None = None
    after: Sequence[Sequence[RankBatch]] = ()


@dataclass
class RankRun:
    """What one rank ended with."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)  # of the model, after the last step
    saved: Weights = field(default_factory=dict)  # fp32 state by "kind/name@start", of this rank, at the checkpoint
    state: Weights = field(default_factory=dict)  # and at the end
    lrs: list[float] = field(default_factory=list)  # of the steps after the checkpoint
    random: list[float] = field(default_factory=list)  # drawn right after the checkpoint
    version: int = 0
    error: str = ""


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch
    import torch.distributed as dist

    from pipelinerl.errors import PipelineRLError
    from pipelinerl.trainer.sharding import gathered
    from pipelinerl.trainer.worker import TrainerWorker

    worker = TrainerWorker(case.config, rank, "cpu")
    worker.setup("127.0.0.1", port)
    run = RankRun()
    torch.manual_seed(100 + rank)
    for ranks in case.before:
        worker.step([ranks[rank]], *case.groups)
    if case.save:
        worker.snapshot(str(case.save))
    if case.load:
        try:
            run.version = worker.restore(str(case.load))
        except PipelineRLError as error:
            run.error = f"{type(error).__name__}: {error}"
    run.saved = state_of(worker)
    run.random = torch.rand(3).tolist()
    for ranks in case.after:
        run.lrs.append(worker.step([ranks[rank]], *case.groups).metrics["optim/lr"])
    if case.save:  # only now: the steps above must not reach what is written
        while (files := worker.checkpoint_poll()) is None:
            time.sleep(0.01)
        run.files = files
    run.state = state_of(worker)
    for name, parameter in worker._policy.named_parameters():
        with gathered([parameter]):
            run.weights[name] = parameter.detach().float().numpy().copy()
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))


def state_of(worker: Any) -> Weights:
    from pipelinerl.trainer.fragments import MASTER, OptimizerView

    view = OptimizerView(worker._policy, worker._backend.optimizer)
    fragments = view.fragments([MASTER, *view.moments()])
    return {f"{f.kind}/{f.name}@{f.start}": f.values.numpy().copy() for f in fragments}
