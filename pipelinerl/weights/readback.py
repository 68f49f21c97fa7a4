"""What a vLLM worker computes with, read back in the layout of the checkpoint.

A loaded weight may be fused with others (q, k and v), sharded over tensor-parallel ranks, padded, or held by a kernel
in a packed copy: on CPU the `.weight` of a linear layer is empty. So a layer is asked, not looked at: a row of the
identity through the kernel that serves gives one column of the weight, and exactly so: all other products are zero.

R = rows (outputs) that this worker holds, k = columns (inputs) that are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

ROWS_SHARDED = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
LINEAR = (*ROWS_SHARDED, RowParallelLinear, ReplicatedLinear)
HEAD_LABEL = "{} as the head"  # a tied embedding is used twice, and may be stale in one of the places only


class Source(Protocol):
    """Something of the engine that gives values back."""

    def read(self, columns: Sequence[int]) -> Tensor:
        """The values [R, k] of this worker's columns; all values [R] of a vector."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A linear layer, through the kernel that serves it."""

    layer: Any
    inputs: int
    device: torch.device

    def read(self, columns: Sequence[int]) -> Tensor:
        rows = _identity(self.inputs, columns, self.layer.params_dtype, self.device)
        return self.layer.quant_method.apply(self.layer, rows, None).T


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter that the engine uses as it is stored."""

    module: nn.Module
    name: str

    def read(self, columns: Sequence[int]) -> Tensor:
        tensor = getattr(self.module, self.name).detach()
        return tensor if tensor.ndim < 2 else tensor.flatten(1)[:, list(columns)]


@dataclass(frozen=True, eq=False)
class Head:
    """The final projection, through the processor that makes logits of it. Without its gathering of the vocabulary:
    a collective call would wait for ever for a rank on which the parameter did not arrive."""

    processor: LogitsProcessor
    head: Any
    dtype: torch.dtype  # of the hidden state
    device: torch.device

    def read(self, columns: Sequence[int]) -> Tensor:
        rows = _identity(self.head.embedding_dim, columns, self.dtype, self.device)
        return self.processor(self.head, rows, skip_gather=True).T


@dataclass(frozen=True, eq=False)
class Place:
    """Where this worker holds its share of a checkpoint's parameter."""

    source: Source
    rows: slice  # of what the source reads
    share: slice  # the same rows in the checkpoint's tensor
    dtype: torch.dtype  # in which the worker holds them
    inputs: int  # columns of the share; 0 for a vector
    first: int = 0  # where they begin in the checkpoint's tensor

    def cut(self, tensor: Tensor, columns: Sequence[int]) -> Tensor:
        """A copy of those values of the checkpoint's tensor that `read` should give back."""
        if not self.inputs:
            return tensor[self.share].to(self.dtype, copy=True)
        return tensor.flatten(1)[self.share, [self.first + column for column in columns]].to(self.dtype)


class Locator:
    """Finds the places of checkpoint parameters in one worker's model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, tied: bool):
        self._model: Any = model
        self._modules = dict(model.named_modules())
        self._dtype = dtype
        self._device = device
        self._tied = tied
        self._kernels: dict[nn.Module, Kernel] = {}

    def places(self, name: str, shape: Sequence[int]) -> Mapping[str, Place | None]:
        """Every use of the parameter, under a label; None where its values cannot be read back."""
        module, attribute, part = self._resolve(name)
        if isinstance(module, ParallelLMHead):
            return {name: self._head(attribute, shape)}
        if isinstance(module, VocabParallelEmbedding):
            uses = {name: self._embedding(module, attribute, shape)}
            return uses | {HEAD_LABEL.format(name): self._head(attribute, shape)} if self._tied else uses
        if isinstance(module, LinearBase):
            return {name: self._linear(module, attribute, part, shape)}
        return {name: self._stored(module, attribute, shape)}

    def _resolve(self, name: str) -> tuple[Any, str, int | None]:
        """The module and its attribute, and which part of a fused module the parameter is.

        Renamings are vLLM's `hf_to_vllm_mapper`, fusions its `packed_modules_mapping`.
        """
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        mapped = mapper.map_name(name) if mapper is not None else name
        path, _, attribute = (mapped or name).rpartition(".")
        leaf = name.split(".")[-2] if "." in name else ""
        for fused, parts in getattr(self._model, "packed_modules_mapping", {}).items():
            if leaf in parts and leaf != fused:
                parent = path.rpartition(".")[0]
                return self._modules.get(f"{parent}.{fused}"), attribute, parts.index(leaf)
        return self._modules.get(path), attribute, None

    def _linear(self, layer: Any, attribute: str, part: int | None, shape: Sequence[int]) -> Place | None:
        if type(layer) not in LINEAR or not isinstance(layer.quant_method, UnquantizedLinearMethod):
            return None
        sizes = layer.output_partition_sizes  # rows of each fused part that this worker holds
        start, count = (0, sum(sizes)) if part is None else (sum(sizes[:part]), sizes[part])
        rank, world = (layer.tp_rank, layer.tp_size) if type(layer) in ROWS_SHARDED else (0, 1)
        if part is None and len(sizes) > 1 and world > 1:
            return None  # fused in the checkpoint already, each part sharded by itself
        if part and isinstance(layer, QKVParallelLinear):
            rank, world = rank // layer.num_kv_head_replicas, world // layer.num_kv_head_replicas
        rows, share = slice(start, start + count), slice(rank * count, (rank + 1) * count)
        if attribute == "bias" and tuple(shape) == (world * count,):
            return Place(Stored(layer, "bias"), rows, share, layer.params_dtype, inputs=0)
        if attribute != "weight" or tuple(shape) != (world * count, layer.input_size):
            return None
        inputs, first = layer.input_size, 0
        if isinstance(layer, RowParallelLinear):
            inputs, first = layer.input_size_per_partition, layer.tp_rank * layer.input_size_per_partition
        kernel = self._kernels.setdefault(layer, Kernel(layer, inputs, self._device))  # one for all its parts
        return Place(kernel, rows, share, layer.params_dtype, inputs, first)

    def _embedding(self, layer: Any, attribute: str, shape: Sequence[int]) -> Place | None:
        if not isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            return None
        return _vocabulary(layer, attribute, shape, Stored(layer, "weight"))

    def _head(self, attribute: str, shape: Sequence[int]) -> Place | None:
        """Logits are the projection itself only when nothing scales, caps or shifts them."""
        head, processor = getattr(self._model, "lm_head", None), getattr(self._model, "logits_processor", None)
        if (
            not isinstance(head, VocabParallelEmbedding)
            or not isinstance(processor, LogitsProcessor)
            or not isinstance(head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
            or getattr(head, "bias", None) is not None
            or processor.logits_as_input
            or processor.soft_cap is not None
            or processor.scale != 1
        ):
            return None
        return _vocabulary(head, attribute, shape, Head(processor, head, self._dtype, self._device))

    def _stored(self, module: Any, attribute: str, shape: Sequence[int]) -> Place | None:
        """Norms and other plain modules; not what a `quant_method` may have repacked."""
        tensor = getattr(module, attribute, None)
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.shape != tuple(shape):
            return None
        if hasattr(module, "quant_method"):
            return None
        inputs = tensor[:1].numel() if tensor.ndim > 1 else 0
        return Place(Stored(module, attribute), slice(None), slice(None), tensor.dtype, inputs)


def _vocabulary(layer: Any, attribute: str, shape: Sequence[int], source: Source) -> Place | None:
    """Rows are tokens: first the share of the checkpoint's vocabulary, then padding and added tokens."""
    if attribute != "weight" or tuple(shape) != (layer.org_vocab_size, layer.embedding_dim):
        return None
    at = layer.shard_indices
    share = slice(at.org_vocab_start_index, at.org_vocab_end_index)
    return Place(source, slice(0, at.num_org_elements), share, layer.weight.dtype, layer.embedding_dim)


def _identity(size: int, columns: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows [k, size] of the identity matrix."""
    rows = torch.zeros(len(columns), size, dtype=dtype, device=device)
    rows[list(range(len(columns))), list(columns)] = 1
    return rows
