"""CUDA IPC, the transport of a GPU that trainer and engine share (NCCL refuses two ranks on one).

The receiving end, in every vLLM worker: vLLM's IPC engine, to which the chunks come through a key-value store of the
trainer and not through vLLM's own calls. So both ends work at the same time, as with the other transports, and no
handle is pickled: VLLM_ALLOW_INSECURE_SERIALIZATION stays off.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.weights.device_senders import chunk_key, decode_handle, read_key

NAME = "shared_gpu"  # vLLM has an "ipc" of its own


@dataclass
class SharedGpuInitInfo(WeightTransferInitInfo):
    """Where the trainer's store is."""

    address: str
    port: int
    timeout_s: float
    rank_offset: int
    world_size: int


@dataclass
class SharedGpuUpdateInfo(WeightTransferUpdateInfo):
    """Which transmission; the chunks describe themselves."""

    transmission: int


class SharedGpuEngine(IPCWeightTransferEngine):
    """Reads chunk by chunk out of the trainer's buffer."""

    init_info_cls = SharedGpuInitInfo
    update_info_cls = SharedGpuUpdateInfo

    _store: dist.TCPStore | None = None
    _rank = 0
    model: Any

    def init_transfer_engine(self, init_info: SharedGpuInitInfo) -> None:
        self._timeout = timedelta(seconds=init_info.timeout_s)
        self._store = dist.TCPStore(init_info.address, init_info.port, is_master=False, timeout=self._timeout)
        self._rank = init_info.rank_offset - 1 + self.parallel_config.rank

    def receive_weights(self, update_info: SharedGpuUpdateInfo) -> None:
        assert self._store is not None, "init_transfer_engine comes first"
        number = 0
        while (chunk := self._chunk(update_info.transmission, number)) is not None:
            weights = packed_ipc_consumer(
                ipc_handle={uuid: decode_handle(handle) for uuid, handle in chunk["handles"].items()},
                names=chunk["names"],
                shapes=chunk["shapes"],
                dtype_names=chunk["dtype_names"],
                tensor_sizes=chunk["tensor_sizes"],
                device_index=self.device.index,
                importer=self._packed_importer,
            )
            torch.cuda.synchronize()  # the copies are made before the trainer fills the buffer again
            self._store.set(read_key(update_info.transmission, number, self._rank), "")
            self.model.load_weights(weights)
            number += 1

    def shutdown(self) -> None:
        super().shutdown()
        self._store = None

    def _chunk(self, transmission: int, number: int) -> dict[str, Any] | None:
        assert self._store is not None
        try:
            self._store.wait([chunk_key(transmission, number)], self._timeout)
            chunk: dict[str, Any] | None = json.loads(self._store.get(chunk_key(transmission, number)))
        except RuntimeError as error:
            raise WeightSyncError(
                f"worker {self._rank}: chunk {number} of the weights did not come from trainer rank 0 within "
                f"{self._timeout.total_seconds():g} s, or it is gone: {first_line(error)}"
            ) from error
        return chunk


if NAME not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(NAME, SharedGpuEngine)
