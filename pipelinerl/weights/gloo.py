"""Weight broadcast over gloo, the transport of machines without GPUs.

`GlooSender` lives in trainer rank 0, `GlooWeightTransferEngine` in every engine worker, where importing this module
registers it in vLLM's factory (engine/extension.py does so, before the worker makes its transfer engine). Both sides
cut the same manifest into the same buckets; each bucket is one broadcast of one flat byte buffer, and a bucket is
loaded while the next one is in flight.

Between start and finish vLLM's layerwise reload leaves the model unusable: the engine must be paused, and must not be
resumed unless every bucket has arrived.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pipelinerl.weights.gloo_group import GlooGroup
from pipelinerl.weights.manifest import Manifest, Parameter, offsets


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """How a worker joins the group. Its rank is `rank_offset` plus its rank inside the engine."""

    address: str
    port: int
    epoch: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """A manifest as plain lists."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    sizes: list[int]
    bucket_bytes: int


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving side, inside a vLLM worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    supports_draft_weight_update = False

    group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        store = dist.TCPStore(
            init_info.address, init_info.port, is_master=False, timeout=timedelta(seconds=init_info.timeout_s)
        )
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = GlooGroup(store, init_info.epoch, rank, init_info.world_size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        assert self.group is not None, "init_transfer_engine comes first"
        manifest = Manifest.from_dict(asdict(update_info))
        for bucket, buffer in self.group.receive(manifest):
            self.model.load_weights(_views(bucket, buffer))

    def finish_weight_update(self) -> None:
        with _without_expected_warnings(tied=self._tied()):
            finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def shutdown(self) -> None:
        self.group = None

    def _repack_tied_head(self) -> None:
        """A tied bf16 head on CPU computes from a packed copy that the reload does not refresh: make it anew."""
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        if self._tied() and head is not None and method is not None and self.device.type == "cpu":
            method.process_weights_after_loading(head)

    def _tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))


@contextmanager
def _without_expected_warnings(tied: bool) -> Iterator[None]:
    """vLLM warns at every update of layers that received nothing. A rotary table never does, a tied head never does
    under its own name; any other layer it names is a real loss and stays visible."""
    expected = ["RotaryEmbedding"] + ["ParallelLMHead"] * tied

    def keep(record: logging.LogRecord) -> bool:
        return record.getMessage() not in [f"{name}: Failed to load weights" for name in expected]

    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _views(bucket: Any, buffer: Tensor) -> list[tuple[str, Tensor]]:
    starts, _ = offsets(bucket)
    return [(p.name, _view(p, buffer, start)) for p, start in zip(bucket, starts, strict=True)]


def _view(parameter: Parameter, buffer: Tensor, start: int) -> Tensor:
    return buffer[start : start + parameter.nbytes].view(getattr(torch, parameter.dtype)).view(parameter.shape)


if "gloo" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
