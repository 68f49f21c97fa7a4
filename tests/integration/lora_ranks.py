"""The cases of test_lora.py: what a rank of each does, and what it notes down. ranks.py runs them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import LoraConfig, RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, ScoredSequence, ScoreRequest, StepResult

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """Steps on `groups`, a score of `probed` with the trained and with nudged weights, and exports.

    `refused` are targets that no adapter can have; a case that has some does nothing else.
    """

    config: RunConfig
    batches: Sequence[RankBatch]
    groups: Sequence[RolloutGroup]
    probed: Sequence[RolloutGroup]
    request: ScoreRequest
    steps: int = 2
    exports: Path | None = None
    refused: Sequence[Sequence[str]] = ()


@dataclass
class RankRun:
    """What one rank saw."""

    setup: dict[str, Any] = field(default_factory=dict)
    factors: list[Tensors] = field(default_factory=list)  # A and B, before the first step and after each
    frozen: list[Tensors] = field(default_factory=list)  # everything else, before the first step and after the last
    sent: dict[str, Tensors] = field(default_factory=dict)  # what a weight update carries, by moment
    collective: bool = False
    results: list[StepResult] = field(default_factory=list)
    scored: list[ScoredSequence] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    run = RankRun()
    if case.refused:
        run.refusals = [refusal(case.config, targets) for targets in case.refused]
    else:
        train(case, rank, port, run)
    out.write_bytes(pickle.dumps(run))


def refusal(config: RunConfig, targets: Sequence[str]) -> str:
    from pipelinerl.errors import ConfigError
    from pipelinerl.trainer.lora import add_adapters
    from pipelinerl.trainer.model import load_policy

    policy = load_policy(config.model, config.sampling.temperature, 64, False)
    try:
        add_adapters(policy.hf, LoraConfig(rank=2, targets=list(targets)), 0)
    except ConfigError as error:
        return str(error)
    return ""


def train(case: Case, rank: int, port: int, run: RankRun) -> None:
    import torch.distributed as dist

    from pipelinerl.trainer.sharding import gathered
    from pipelinerl.trainer.source import state_dict_of
    from pipelinerl.trainer.worker import TrainerWorker

    if case.exports and rank == 0:
        case.exports.mkdir()
    worker = TrainerWorker(case.config, rank, "cpu")
    run.setup = worker.setup("127.0.0.1", port)
    run.collective = worker._source.collective

    def parameters(trained: bool) -> Tensors:
        chosen = {name: p for name, p in worker._policy.hf.named_parameters() if p.requires_grad == trained}
        with gathered(chosen.values()):
            return {name: p.detach().float().numpy().copy() for name, p in chosen.items()}

    def note_sent(moment: str) -> None:
        run.sent[moment] = {name: t.float().numpy() for name, t in state_dict_of(worker._source).items()}

    run.factors.append(parameters(trained=True))
    run.frozen.append(parameters(trained=False))
    note_sent("start")
    for _ in range(case.steps):
        run.results.append(worker.step([case.batches[rank]], *case.groups))
        run.factors.append(parameters(trained=True))
    run.frozen.append(parameters(trained=False))
    note_sent("end")
    worker.nudge()
    note_sent("nudged")
    worker.nudge()
    note_sent("end, after a probe")
    together = case.config.trainer.zero_stage == 3
    if together or rank == 0:
        run.scored = worker.score(case.request, *case.probed)
        if case.exports:
            worker.export(str(case.exports / "model"))
            worker.export_adapter(str(case.exports / "adapter"))
    dist.destroy_process_group()
