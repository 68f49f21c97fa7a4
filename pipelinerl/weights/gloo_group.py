"""A private gloo process group for weight broadcasts: trainer rank 0 sends, one worker of every other node receives.

It is independent of torch's default group on either side, so a failed update can drop it and build the next one
under a new epoch. Holds no reference to vLLM: the trainer imports this module too.
"""

import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.weights.manifest import Placed


class GlooGroup:
    """Rank 0 broadcasts flat byte buffers. Every wait ends after `timeout_s` with an error."""

    def __init__(self, store: dist.Store, epoch: int, rank: int, world_size: int, timeout_s: float):
        self._store = store  # the group dies with its store
        prefix = dist.PrefixStore(f"weights/{epoch}", store)
        self._group = dist.ProcessGroupGloo(prefix, rank, world_size, timedelta(seconds=timeout_s))

    def broadcast(self, buffer: Tensor) -> dist.Work:
        """Start the broadcast of `buffer` (uint8) from rank 0 and return the handle to wait for.

        gloo's own threads move the bytes; broadcasts run in the order in which they were started.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([buffer], options)


def let_go(things: list[Any]) -> None:
    """Drop what is in the list in a thread: a group with broadcasts that nobody takes ends only when these time out,
    and memory of this size takes a while to be given back."""
    mine = list(things)
    things.clear()
    threading.Thread(target=mine.clear, name="weights-let-go", daemon=True).start()


def finish(work: dist.Work, who: str, placed: Placed) -> None:
    """Wait for a broadcast. Raises WeightSyncError that names the member and the parameters."""
    try:
        work.wait()
    except RuntimeError as error:
        raise WeightSyncError(
            f"{who}: the weight broadcast broke off at {placed.names} ({placed.end - placed.start} bytes): "
            f"{first_line(error)}"
        ) from error
