"""The cases of test_trainer.py: what a rank of each does, and what it notes down. ranks.py runs them."""

import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import RunConfig
from pipelinerl.types import RankBatch, RolloutGroup, StepResult

Weights = dict[str, NDArray[np.float32]]
SMALL_BUCKET = 2**16  # bytes


@dataclass(frozen=True)
class Case:
    """`steps[s][update][rank]` is what a rank does in an update of step s, with the payloads `groups[s]`.

    With a `scale` there is one update in a step, and `steps[s][chunk][rank]` are the parts that it comes in.
    """

    config: RunConfig
    steps: Sequence[Sequence[Sequence[RankBatch]]]
    groups: Sequence[Sequence[RolloutGroup]]
    export: Path | None = None
    send: bool = False
    scale: float | None = None  # of the gradient, at the end of a step that comes in parts


@dataclass
class RankRun:
    """What one rank saw: its weights before the first step and after each one, and the results in between."""

    setup: Mapping[str, Any]
    weights: list[Weights] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    left_whole: list[str] = field(default_factory=list)  # sharded parameters found whole between two calls
    most_whole: int = 0  # bytes of sharded parameters that were whole at a time while weights were read
    received: dict[str, Any] = field(default_factory=dict)  # by an engine, raw bytes
    digests: list[int] = field(default_factory=list)


def run_rank(case: Case, rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from pipelinerl.trainer.sharding import is_sharded
    from pipelinerl.trainer.source import make_source
    from pipelinerl.trainer.worker import TrainerWorker

    worker = TrainerWorker(case.config, rank, "cpu")
    run = RankRun(worker.setup("127.0.0.1", port))
    source = make_source(worker._policy.hf, SMALL_BUCKET)

    def whole() -> dict[str, int]:
        """Bytes of the parameters that ZeRO 3 is to keep in shards and that are whole at this moment."""
        parameters: list[tuple[str, Any]] = list(worker._policy.named_parameters())
        return {name: p.nbytes for name, p in parameters if is_sharded(p) and not p.ds_persist}

    def look() -> None:
        run.left_whole += [name for name, nbytes in whole().items() if nbytes]
        weights: Weights = {}
        for bucket in source.buckets():  # what is sent
            run.most_whole = max(run.most_whole, sum(whole().values()))
            weights |= {parameter.name: tensor.float().numpy().copy() for parameter, tensor in bucket}
        run.weights.append(weights)
        run.left_whole += [name for name, nbytes in whole().items() if nbytes]

    look()
    for updates, groups in zip(case.steps, case.groups, strict=True):
        share = [ranks[rank] for ranks in updates]
        if case.scale is None:
            run.results.append(worker.step(share, *groups))
        else:
            worker.begin_step()
            for chunk in share:
                for _ in source.buckets():  # an update of the engines may be under way
                    pass
                worker.accumulate(chunk, chunk is share[-1], *groups)
            run.results.append(worker.finish_step(case.scale))
        look()
    if case.send:
        send(worker, rank, run)
    if case.export and (rank == 0 or case.config.trainer.zero_stage == 3):
        worker.export(str(case.export))
    dist.destroy_process_group()
    out.write_bytes(pickle.dumps(run))


def send(worker: Any, rank: int, run: RankRun) -> None:
    """Send the weights from rank 0 to a thread of it that receives them as an engine does."""
    from pipelinerl.weights.manifest import offsets
    from pipelinerl.weights.places import Place
    from pipelinerl.weights.seat import Seat

    if rank:
        worker.send_weights(0)
        return
    info = worker.listen("gloo", "127.0.0.1")

    def receive(seat: Seat) -> dict[str, Any]:
        return {
            parameter.name: (parameter.dtype, parameter.shape, buffer[start : start + parameter.nbytes].numpy().copy())
            for bucket, buffer in seat.receive(0)
            for parameter, start in zip(bucket, offsets(bucket)[0], strict=True)
        }

    def join() -> Seat:
        return Seat("worker 0", Place(1, "another node"), info | {"world_size": 2})

    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(join)
        worker.connect(2)
        receiving = threads.submit(receive, joining.result())
        run.digests = worker.send_weights(0)["digests"]
        run.received = receiving.result()
