"""The two ways in which received weights get into a vLLM model. Both end with a model that computes with them.

TwinLoading       loads a double beside the running model, bucket by bucket as they come; the exchange is instant
LayerwiseLoading  loads the model itself, which must stand still: all of it happens in `exchange`
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from pipelinerl.weights.manifest import Parameter, offsets
from pipelinerl.weights.twin import Twin

RELOAD = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

Buckets = Iterable[tuple[Sequence[Parameter], Tensor]]
Watch = Callable[[Any], None]  # is told the module whose `load_weights` all weights are about to pass


class Loading(Protocol):
    """One update of one model."""

    def prepare(self, buckets: Buckets) -> None:
        """Beside the running model: take what arrives."""

    def exchange(self) -> None:
        """While the model stands still: make it compute with what arrived."""


class TwinLoading:
    """See twin.py."""

    def __init__(self, model: nn.Module, model_config: Any, watch: Watch):
        self._config = model_config
        self._watch = watch
        self._live = model
        self._twin: Twin | None = None

    def prepare(self, buckets: Buckets) -> None:
        twin = Twin(self._live)
        self._watch(twin.model)
        load_layerwise(twin.model, self._config, buckets)
        self._twin = twin

    def exchange(self) -> None:
        assert self._twin is not None, "prepare comes first"
        self._twin.exchange()


class LayerwiseLoading:
    """Keeps the buckets, which are views of memory that holds still until the update is over."""

    def __init__(self, model: nn.Module, model_config: Any, watch: Watch):
        self._config = model_config
        self._watch = watch
        self._live = model
        self._buckets: list[tuple[Sequence[Parameter], Tensor]] = []

    def prepare(self, buckets: Buckets) -> None:
        self._buckets = list(buckets)

    def exchange(self) -> None:
        self._watch(self._live)
        load_layerwise(self._live, self._config, self._buckets)


@torch.no_grad()
def load_layerwise(model: Any, model_config: Any, buckets: Buckets) -> None:
    """vLLM's layerwise reload; meanwhile, and if it fails, the model is unusable."""
    tied = _is_tied(model_config)
    initialize_layerwise_reload(model)
    for bucket, buffer in buckets:
        model.load_weights(_views(bucket, buffer))
    with _without_expected_warnings(tied):
        finalize_layerwise_reload(model, model_config)
    if tied:
        repack_tied_head(model)


class PausedUpdates:
    """Mixin of a vLLM worker whose updates are vLLM's own, for `collective_rpc`."""

    vllm_config: Any
    get_model: Callable[[], nn.Module]
    weight_transfer_engine: Any
    _weight_update_active: bool

    def weights_warn_of_losses_only(self) -> None:
        """Leave out, for good, what vLLM warns of at every update though nothing is lost."""
        if not any(isinstance(found, _Losses) for found in RELOAD.filters):
            RELOAD.addFilter(_Losses(_is_tied(self.vllm_config.model_config)))

    def weights_leave_at(self) -> str:
        """The mailbox at which the transport is told to leave, when the worker waits for it; "" where there is none."""
        return str(getattr(self.weight_transfer_engine, "leave_at", ""))

    def weights_close_session(self) -> None:
        """End an update that broke off, so that the next one can start. The model then holds a mixture of weights."""
        if self._weight_update_active:
            model = self.get_model()
            for layer in model.modules():
                info = get_layerwise_info(layer)
                if info.can_load():  # a layer of which a part has come keeps what it had
                    info.loaded_weights.clear()
                    info.load_numel = 0
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            self._weight_update_active = False


def _is_tied(model_config: Any) -> bool:
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


def repack_tied_head(model: Any) -> None:
    """A tied bf16 head on CPU computes from a packed copy that the reload does not refresh: make it anew."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if head is not None and method is not None and head.weight.device.type == "cpu":
        method.process_weights_after_loading(head)


class _Losses(logging.Filter):
    """vLLM warns at every update of layers that received nothing. A rotary table never does, a tied head never does
    under its own name; any other layer it names is a real loss and stays visible."""

    def __init__(self, tied: bool):
        super().__init__()
        self._expected = {f"{name}: Failed to load weights" for name in ["RotaryEmbedding"] + ["ParallelLMHead"] * tied}

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() not in self._expected


@contextmanager
def _without_expected_warnings(tied: bool) -> Iterator[None]:
    losses = _Losses(tied)
    RELOAD.addFilter(losses)
    try:
        yield
    finally:
        RELOAD.removeFilter(losses)


def _views(bucket: Sequence[Parameter], buffer: Tensor) -> list[tuple[str, Tensor]]:
    starts, _ = offsets(bucket)
    return [(p.name, _view(p, buffer, start)) for p, start in zip(bucket, starts, strict=True)]


def _view(parameter: Parameter, buffer: Tensor, start: int) -> Tensor:
    return buffer[start : start + parameter.nbytes].view(getattr(torch, parameter.dtype)).view(parameter.shape)
