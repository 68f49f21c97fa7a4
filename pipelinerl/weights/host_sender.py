"""The sender of machines without GPUs. It copies the weights once, into memory that the engines of its node map; one
worker of every other node gets them from there by a gloo broadcast, and shares them with the others of its node alike.

    trainer rank 0 ──copy──> segment <──map── workers of this node
                                └──gloo──> segment of a node <──map── its other workers

The copy is a snapshot: when `send` returns, the trainer may go on, while gloo's threads send and engines read. A bucket
is announced in a key-value store that the trainer serves. Readers wait there: the store wakes them, ends their wait
after a time, and tells them at once when the trainer is gone.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.weights.digest import digest
from pipelinerl.weights.gloo_group import GlooGroup, finish, let_go
from pipelinerl.weights.manifest import Placed, offsets
from pipelinerl.weights.segment import Segment
from pipelinerl.weights.source import Bucket, WeightSource, run_through

ME = "trainer rank 0"
STORE_S = 120.0  # for answers of the store, which is served in this very process


def bell(node: str, transmission: int, bucket: int) -> str:
    """The key under which the arrival of a bucket in a node's segment is announced; the trainer's node is ""."""
    return f"bucket/{node}/{transmission}/{bucket}"


class HostSender:
    """CPU tensors of `source` in one segment, sent bucket by bucket while the next is copied."""

    def __init__(self, source: WeightSource, timeout_s: float, shared_memory: bool = True):
        self._source = source
        self._timeout_s = timeout_s
        self._shared = shared_memory
        self._layout, self._nbytes = source.manifest.layout()
        self._segment: Segment | None = None  # of all epochs: its content is what `resend` sends
        self._store: dist.TCPStore | None = None
        self._group: GlooGroup | None = None
        self._epoch = 0
        self._pending: list[tuple[dist.Work, Placed]] = []
        self._announced: list[str] = []

    def listen(self, address: str) -> dict[str, Any]:
        self.close()
        if self._segment is None:
            self._segment = Segment.create(self._nbytes)
        self._epoch += 1
        patience = timedelta(seconds=STORE_S)
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        return {
            "address": address,
            "port": self._store.port,
            "epoch": self._epoch,
            "timeout_s": self._timeout_s,
            "manifest": self._source.manifest.to_dict(),
            "segment": self._segment.address.to_dict() if self._shared else None,
        }

    def connect(self, world_size: int) -> None:
        assert self._store is not None, "listen comes first"
        if world_size == 1:  # all engines map the segment
            return
        try:
            self._group = GlooGroup(self._store, self._epoch, 0, world_size, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(
                f"{ME}: not all of {world_size - 1} engine workers joined the weight broadcast within "
                f"weights.timeout_s={self._timeout_s:g} s: {first_line(error)}"
            ) from error

    def send(self, transmission: int, with_digests: bool = True) -> list[int]:
        assert self._segment is not None and self._store is not None, "listen comes first"
        with run_through(self._source) as buckets:
            self._finish()  # inside: the other ranks take part in a collective source whatever comes of it
            digests: list[int] = []
            for index, (bucket, placed) in enumerate(zip(buckets, self._layout, strict=True)):
                self._copy(bucket, placed)
                self._start(transmission, index, placed)
                if with_digests:  # while the bucket is on its way
                    digests += [digest(tensor) for _, tensor in bucket]
        return digests

    def resend(self, transmission: int) -> None:
        for index, placed in enumerate(self._layout):
            self._start(transmission, index, placed)

    def close(self) -> None:
        """Readers of this epoch fail in their next wait, at the latest when what is still being sent times out."""
        left = [self._group, self._store, self._pending]
        self._group, self._store, self._pending, self._announced = None, None, [], []
        let_go(left)

    def _copy(self, bucket: Bucket, placed: Placed) -> None:
        assert self._segment is not None
        for (parameter, tensor), start in zip(bucket, offsets(placed.bucket)[0], strict=True):
            place = self._segment.content[placed.start + start :][: parameter.nbytes]
            place.copy_(tensor.contiguous().view(-1).view(torch.uint8))

    def _start(self, transmission: int, index: int, placed: Placed) -> None:
        assert self._segment is not None and self._store is not None
        if self._group is not None:
            part = self._segment.content[placed.start : placed.end]
            self._pending.append((self._group.broadcast(part), placed))
        self._announced.append(bell("", transmission, index))
        self._store.set(self._announced[-1], "")

    def _finish(self) -> None:
        """What was sent before must have left: its segment is about to be overwritten."""
        while self._pending:
            finish(self._pending[0][0], ME, self._pending[0][1])
            self._pending.pop(0)
        assert self._store is not None
        while self._announced:
            self._store.delete_key(self._announced.pop())
