"""The trainer's end of a weight update: takes the tensors of a source in order and broadcasts them.

One sender per transport, chosen by `make_sender`. The life of a sender is `listen` (returns where engines find it),
`connect` (blocks until all engine workers have joined), then `send` once per update. Only trainer rank 0 has one.
"""

import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.weights.digest import device_digest, digest
from pipelinerl.weights.gloo_group import GlooGroup
from pipelinerl.weights.manifest import offsets
from pipelinerl.weights.source import Bucket, WeightSource, run_through


class Sender(Protocol):
    """A transport as the trainer uses it."""

    def listen(self, address: str) -> dict[str, Any]:
        """Open a port on this node; the result goes into every engine's init info."""

    def connect(self, world_size: int) -> None:
        """Wait until `world_size - 1` engine workers have joined."""

    def send(self, source: WeightSource, with_digests: bool = True) -> list[int]:
        """Broadcast all tensors. Returns when the last one has left; raises WeightSyncError.

        The result is every parameter's digest, in the order of the manifest; nothing when not asked for.
        """


class GlooSender:
    """CPU tensors in flat byte buffers; a bucket is filled while the one before is in flight."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._store: dist.TCPStore | None = None
        self._group: GlooGroup | None = None
        self._epoch = 0

    def listen(self, address: str) -> dict[str, Any]:
        timeout = timedelta(seconds=self._timeout_s)
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return {"address": address, "port": self._store.port, "epoch": self._epoch, "timeout_s": self._timeout_s}

    def connect(self, world_size: int) -> None:
        assert self._store is not None, "listen comes first"
        self._group = GlooGroup(self._store, self._epoch, 0, world_size, self._timeout_s)

    def send(self, source: WeightSource, with_digests: bool = True) -> list[int]:
        assert self._group is not None, "connect comes first"
        digests: list[int] = []
        pending: list[tuple[dist.Work, Tensor]] = []
        last = ""
        with run_through(source) as buckets:
            for bucket in buckets:
                starts, size = offsets([parameter for parameter, _ in bucket])
                buffer = torch.empty(size, dtype=torch.uint8)
                for (parameter, tensor), start in zip(bucket, starts, strict=True):
                    flat = tensor.contiguous().view(-1).view(torch.uint8)
                    buffer[start : start + parameter.nbytes].copy_(flat)
                if len(pending) == 2:
                    self._finish(*pending.pop(0), bucket[0][0].name)
                pending.append((self._group.broadcast(buffer), buffer))
                if with_digests:  # while the bucket is on its way
                    digests += [digest(tensor) for _, tensor in bucket]
                last = bucket[-1][0].name
            for work, buffer in pending:
                self._finish(work, buffer, last)
        return digests

    def _finish(self, work: dist.Work, buffer: Tensor, near: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise WeightSyncError(
                f"trainer rank 0: the weight broadcast broke off near parameter {near} "
                f"({len(buffer)} bytes in the bucket): {first_line(error)}"
            ) from error


class NcclSender:
    """vLLM's packed NCCL broadcast, for trainers and engines that have GPUs of their own."""

    def __init__(self, bucket_bytes: int):
        self._bucket_bytes = bucket_bytes
        self._address: tuple[str, int] | None = None
        self._communicator: Any = None

    def listen(self, address: str) -> dict[str, Any]:
        with socket.socket() as probe:
            probe.bind((address, 0))
            self._address = (address, probe.getsockname()[1])
        return {
            "master_address": self._address[0],
            "master_port": self._address[1],
            "packed": True,
            "packed_buffer_size_bytes": self._bucket_bytes,
            "packed_num_buffers": 2,
        }

    def connect(self, world_size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        assert self._address is not None, "listen comes first"
        host, port = self._address
        self._communicator = trainer_init({"master_address": host, "master_port": port, "world_size": world_size})

    def send(self, source: WeightSource, with_digests: bool = True) -> list[int]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        digests: list[Tensor] = []

        def take(item: tuple[str, Tensor]) -> Tensor:
            if with_digests:
                digests.append(device_digest(item[1]))
            return item[1]

        torch.cuda.synchronize()  # the producer packs on streams of its own, which do not wait for the optimizer's
        with run_through(source) as buckets:
            packed_nccl_broadcast_producer(
                iterator=_copies(buckets),
                group=self._communicator,
                src=0,
                post_iter_func=take,
                buffer_size_bytes=source.manifest.bucket_bytes,
                num_buffers=2,
            )
        torch.cuda.synchronize()
        return [int(value) for value in digests]


def _copies(buckets: Iterator[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """Copies, since the producer holds tensors over the end of a bucket. It changes streams at places of its own: a
    copy waits for what made the bucket, and the bucket is let go of when its copies are made."""
    for bucket in buckets:
        made = torch.cuda.current_stream().record_event()
        copied = []
        for parameter, tensor in bucket:
            stream = torch.cuda.current_stream()
            stream.wait_event(made)
            copy = tensor.clone(memory_format=torch.contiguous_format)
            copied.append(stream.record_event())
            yield parameter.name, copy
        for event in copied:
            event.synchronize()


def make_sender(backend: str, timeout_s: float, bucket_bytes: int) -> Sender:
    """The sender of a resolved backend, "gloo" or "nccl"."""
    return GlooSender(timeout_s) if backend == "gloo" else NcclSender(bucket_bytes)
