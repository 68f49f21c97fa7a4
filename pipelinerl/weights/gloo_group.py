"""A private gloo process group for weight broadcasts: trainer rank 0 sends, every engine worker receives.

It is independent of torch's default group on either side, so a failed update can drop it and build the next one
under a new epoch. Holds no reference to vLLM: the trainer imports this module too.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipelinerl.weights.manifest import Manifest, Parameter, offsets


class GlooGroup:
    """Rank 0 broadcasts flat byte buffers. Every wait ends after `timeout_s` with an error."""

    def __init__(self, store: dist.Store, epoch: int, rank: int, world_size: int, timeout_s: float):
        self._store = store  # the group dies with its store
        prefix = dist.PrefixStore(f"weights/{epoch}", store)
        self._group = dist.ProcessGroupGloo(prefix, rank, world_size, timedelta(seconds=timeout_s))

    def broadcast(self, buffer: Tensor) -> dist.Work:
        """Start the broadcast of `buffer` (uint8) from rank 0 and return the handle to wait for."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([buffer], options)

    def receive(self, manifest: Manifest) -> Iterator[tuple[Sequence[Parameter], Tensor]]:
        """Yield each bucket with its filled buffer, the next bucket's broadcast already running.

        Every buffer is a new one: vLLM keeps views of what it was given until a fused layer (q, k and v, say) is
        complete, and a layer may be spread over several buckets. At most three are alive at a time otherwise.
        """

        def start(bucket: Sequence[Parameter]) -> tuple[dist.Work, Tensor]:
            buffer = torch.empty(offsets(bucket)[1], dtype=torch.uint8)
            return self.broadcast(buffer), buffer

        buckets = list(manifest.buckets())
        pending = start(buckets[0]) if buckets else None
        for index, bucket in enumerate(buckets):
            assert pending is not None
            work, buffer = pending
            work.wait()
            if index + 1 < len(buckets):
                pending = start(buckets[index + 1])
            yield bucket, buffer
