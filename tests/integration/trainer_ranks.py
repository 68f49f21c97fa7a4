"""A program that runs trainer cases, each on ranks of its own: `python -m tests.integration.trainer_ranks IN OUT`.

DeepSpeed takes seconds to import and its state is global. So this process imports it once and every rank of every case
is a fork of it that starts a process group, trains, writes down what happened, and exits.
"""

import multiprocessing
import pickle
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, StepResult

CASE_TIMEOUT_S = 120


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


def run_case(name: str, case: Case, target: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forks = multiprocessing.get_context("fork")
    outs = [target / f"{name}-{rank}.pickle" for rank in range(case.config.trainer.ranks)]
    ranks = [forks.Process(target=run_rank, args=(case, rank, port, out)) for rank, out in enumerate(outs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(CASE_TIMEOUT_S)
    ended = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    if ended != [0] * len(ranks):
        sys.exit(f"case {name}: exit codes {ended}")


def main(source: str, target: str) -> None:
    import pipelinerl.trainer.worker  # noqa: F401  the slow imports, once for all forks

    for name, case in pickle.loads(Path(source).read_bytes()).items():
        run_case(name, case, Path(target))


if __name__ == "__main__":
    # By its full name, so that what is pickled here can be read where this module is imported.
    from tests.integration import trainer_ranks

    trainer_ranks.main(*sys.argv[1:])
