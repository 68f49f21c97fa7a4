"""A program that trains with a probe between two steps: `python -m tests.integration.probe_ranks IN OUT`.

Every rank is a fork, as in trainer_ranks.py, which runs the cases without a probe.
"""

import multiprocessing
import pickle
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import FloatArray, RankBatch, RolloutGroup, ScoredSequence, ScoreRequest, StepResult

TIMEOUT_S = 120

Weights = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """Two steps on `groups`, and between them, if there is a request, a probe that scores `probed`."""

    config: RunConfig
    batches: Sequence[RankBatch]
    groups: Sequence[RolloutGroup]
    probed: RolloutGroup
    request: ScoreRequest | None


@dataclass
class RankRun:
    """What one rank saw. Weights are raw bits."""

    results: list[StepResult] = field(default_factory=list)
    weights: dict[str, Weights] = field(default_factory=dict)  # by moment
    scored: dict[str, list[ScoredSequence]] = field(default_factory=dict)  # by the weights held when asked
    hidden_states: list[FloatArray] = field(default_factory=list)
    refused: str = ""  # what a step on nudged weights ended with


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch
    import torch.distributed as dist

    from pipelinerl.trainer.worker import TrainerWorker
    from pipelinerl.weights.sender import parameters_in_order

    worker = TrainerWorker(case.config, rank, "cpu")
    worker.setup("127.0.0.1", port)
    run = RankRun()

    def note_weights(moment: str) -> None:
        tensors = parameters_in_order(worker._policy.hf)  # what the sender would send
        run.weights[moment] = {
            name: tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy().copy()
            for name, tensor in tensors
        }

    def score(moment: str) -> None:
        if rank == 0:
            run.scored[moment] = worker.score(case.request, case.probed)

    run.results.append(worker.step(case.batches[rank], *case.groups))
    note_weights("before")
    if case.request is not None:
        score("own")
        worker.nudge()
        note_weights("nudged")
        score("nudged")
        note_weights("nudged, after scoring")
        worker.nudge()
        note_weights("after")
        if rank == 0:
            run.hidden_states = worker.hidden_states([7, 8, 9])
    run.results.append(worker.step(case.batches[rank], *case.groups))
    note_weights("end")
    worker.nudge()
    try:
        worker.step(case.batches[rank], *case.groups)
    except AssertionError as error:
        run.refused = str(error)
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
        process.join(TIMEOUT_S)
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
    from tests.integration import probe_ranks

    probe_ranks.main(*sys.argv[1:])
