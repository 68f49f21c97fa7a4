"""The senders of machines with GPUs: NCCL between GPUs, CUDA IPC where trainer and engine share one.

They follow vLLM 0.32's `distributed/weight_transfer`. Both send the trainer's own tensors, so the trainer may change
them only when all engines have them: `send` returns then, and there is no `resend`.
"""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelinerl.errors import EnvironmentProblem, WeightSyncError, first_line
from pipelinerl.weights.digest import device_digest
from pipelinerl.weights.source import Bucket, WeightSource, run_through

UNUSABLE = (
    "weights.backend=nccl: vLLM cannot use the NCCL library of this node: it is missing, or older than vLLM needs; "
    "install the requirements of this project, or set VLLM_NCCL_SO_PATH"
)
BUFFERS = 2  # of the packed broadcast, on either side


class NcclSender:
    """vLLM's packed NCCL broadcast, over a communicator and streams of its own."""

    def __init__(self, source: WeightSource, timeout_s: float):
        self._source = source
        self._timeout_s = timeout_s
        self._address: tuple[str, int] | None = None
        self._communicator: Any = None

    def listen(self, address: str) -> dict[str, Any]:
        self.close()
        with socket.socket() as probe:
            probe.bind((address, 0))
            self._address = (address, probe.getsockname()[1])
        return {
            "master_address": self._address[0],
            "master_port": self._address[1],
            "packed": True,
            "packed_buffer_size_bytes": self._source.manifest.bucket_bytes,
            "packed_num_buffers": BUFFERS,
            "timeout_s": self._timeout_s,
        }

    def connect(self, world_size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        assert self._address is not None, "listen comes first"
        host, port = self._address
        try:
            # In a stream context, or vLLM makes a stream of its own the one on which the training goes on.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self._communicator = trainer_init(
                    {"master_address": host, "master_port": port, "world_size": world_size}
                )
        except RuntimeError as error:
            raise WeightSyncError(
                f"trainer rank 0: not all of {world_size - 1} engine workers joined NCCL: {first_line(error)}"
            ) from error
        if self._communicator.disabled:  # vLLM goes on without one, and its broadcasts do nothing
            raise EnvironmentProblem(f"trainer rank 0: {UNUSABLE}")

    def send(self, transmission: int, with_digests: bool = True) -> list[int]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        assert self._communicator is not None, "connect comes first"
        digests: list[Tensor] = []
        last = ""

        def take(item: tuple[str, Tensor]) -> Tensor:
            nonlocal last
            if self._communicator is None:
                raise RuntimeError("the communicator was aborted")
            last = item[0]
            if with_digests:
                digests.append(device_digest(item[1]))
            return item[1]

        torch.cuda.synchronize()  # the producer packs on streams of its own, which do not wait for the optimizer's
        # NCCL itself waits for ever for a member that is gone. An aborted communicator ends its wait.
        late = threading.Timer(self._timeout_s, self.close)
        late.start()
        try:
            with run_through(self._source) as buckets:
                packed_nccl_broadcast_producer(
                    iterator=_copies(buckets),
                    group=self._communicator,
                    src=0,
                    post_iter_func=take,
                    buffer_size_bytes=self._source.manifest.bucket_bytes,
                    num_buffers=BUFFERS,
                )
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self._communicator is not None:
                raise WeightSyncError(
                    f"trainer rank 0: the NCCL broadcast broke off near parameter {last}: {first_line(error)}"
                ) from error
        finally:
            late.cancel()
        if self._communicator is None:
            raise WeightSyncError(
                f"trainer rank 0: the NCCL broadcast was not taken by all engine workers within "
                f"weights.timeout_s={self._timeout_s:g} s; it stood near parameter {last}"
            )
        return [int(value) for value in digests]

    def resend(self, transmission: int) -> None:
        raise AssertionError("NCCL keeps no copy: an update is over before the trainer goes on")

    def close(self) -> None:
        """Abort the communicator: a broadcast that waits for a member that is gone ends."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy()


class IpcSender:
    """One packed buffer on the GPU that both share, filled again and again; a store says whose turn it is."""

    def __init__(self, source: WeightSource, timeout_s: float):
        self._source = source
        self._timeout_s = timeout_s
        self._store: dist.TCPStore | None = None
        self._workers = 0

    def listen(self, address: str) -> dict[str, Any]:
        self.close()
        timeout = timedelta(seconds=self._timeout_s)
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return {"address": address, "port": self._store.port, "timeout_s": self._timeout_s}

    def connect(self, world_size: int) -> None:
        self._workers = world_size - 1

    def send(self, transmission: int, with_digests: bool = True) -> list[int]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        assert self._store is not None, "listen comes first"
        digests: list[Tensor] = []

        def take(item: tuple[str, Tensor]) -> Tensor:
            if with_digests:
                digests.append(device_digest(item[1]))
            return item[1]

        with run_through(self._source) as buckets:
            chunks = packed_ipc_producer(
                iterator=((parameter.name, tensor) for bucket in buckets for parameter, tensor in bucket),
                gpu_uuid=str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid),
                post_iter_func=take,
                buffer_size_bytes=max(p.nbytes for p in self._source.manifest.parameters),
            )
            number = 0
            for chunk in chunks:
                described = {
                    "names": chunk.names,
                    "dtype_names": chunk.dtype_names,
                    "shapes": chunk.shapes,
                    "tensor_sizes": chunk.tensor_sizes,
                    "handles": {uuid: encode_handle(handle) for uuid, handle in chunk.ipc_handle.items()},
                }
                self._store.set(chunk_key(transmission, number), json.dumps(described))
                self._until_read(transmission, number, chunk.names)
                number += 1
            self._store.set(chunk_key(transmission, number), "null")  # that was all
        torch.cuda.ipc_collect()
        return [int(value) for value in digests]

    def resend(self, transmission: int) -> None:
        raise AssertionError("IPC keeps no copy: an update is over before the trainer goes on")

    def close(self) -> None:
        """Workers that wait for a chunk fail."""
        self._store = None

    def _until_read(self, transmission: int, number: int, names: list[str]) -> None:
        """The buffer may be filled again only when every worker has copied what it holds."""
        assert self._store is not None
        keys = [read_key(transmission, number, rank) for rank in range(self._workers)]
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise WeightSyncError(
                f"trainer rank 0: parameters {names[0]} to {names[-1]} were not read by all {self._workers} engine "
                f"workers within weights.timeout_s={self._timeout_s:g} s: {first_line(error)}"
            ) from error
        for key in [*keys, chunk_key(transmission, number)]:
            self._store.delete_key(key)


def chunk_key(transmission: int, number: int) -> str:
    """Where a chunk is described."""
    return f"ipc/{transmission}/{number}"


def read_key(transmission: int, number: int, rank: int) -> str:
    """Where a worker says that it has copied a chunk."""
    return f"ipc/{transmission}/{number}/read/{rank}"


def encode_handle(handle: tuple[Any, ...]) -> list[Any]:
    """The arguments of `rebuild_cuda_tensor` for a flat uint8 buffer, as JSON.

    Types are left out, since they are known: nothing that comes over the network is unpickled.
    """
    return [_encoded(value) for value in handle]


def decode_handle(encoded: list[Any]) -> tuple[Any, ...]:
    """What `encode_handle` was given."""
    values = [_decoded(value) for value in encoded]
    values[0], values[4], values[5] = Tensor, torch.UntypedStorage, torch.uint8
    return tuple(values)


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, tuple):  # torch.Size too
        return {"tuple": list(value)}
    return value if isinstance(value, int | bool | None) else None


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"]) if "bytes" in value else tuple(value["tuple"])
    return value


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
