"""The cases of test_probe_ranks.py: training with a probe between two steps. ranks.py runs them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import FloatArray, RankBatch, RolloutGroup, ScoredSequence, ScoreRequest, StepResult

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

    from pipelinerl.trainer.source import state_dict_of
    from pipelinerl.trainer.worker import TrainerWorker

    worker = TrainerWorker(case.config, rank, "cpu")
    worker.setup("127.0.0.1", port)
    run = RankRun()
    together = case.config.trainer.zero_stage == 3  # no rank has a whole weight

    def note_weights(moment: str) -> None:
        tensors = state_dict_of(worker._source)  # what the sender would send
        run.weights[moment] = {
            name: tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy()
            for name, tensor in tensors.items()
        }

    def score(moment: str, request: ScoreRequest) -> None:
        if rank == 0 or together:
            run.scored[moment] = worker.score(request, case.probed)

    run.results.append(worker.step([case.batches[rank]], *case.groups))
    note_weights("before")
    if case.request is not None:
        score("own", case.request)
        worker.nudge()
        note_weights("nudged")
        score("nudged", case.request)
        note_weights("nudged, after scoring")
        worker.nudge()
        note_weights("after")
        if rank == 0 or together:
            run.hidden_states = worker.hidden_states([7, 8, 9])
    run.results.append(worker.step([case.batches[rank]], *case.groups))
    worker.nudge()  # at once, while ZeRO 3 holds small parameters that it gathered in the step
    note_weights("end, nudged")
    worker.nudge()
    note_weights("end")
    worker.nudge()
    try:
        worker.step([case.batches[rank]], *case.groups)
    except AssertionError as error:
        run.refused = str(error)
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))
