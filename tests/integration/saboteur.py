"""A worker extension that spoils the next update in a way the test names, behind the canary's back.

The engine's processes import it by name; `sabotage` arrives there through `collective_rpc`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from pipelinerl.engine.extension import WorkerExtension
from pipelinerl.weights.manifest import Parameter, offsets

SABOTEUR = "tests.integration.saboteur.Saboteur"
LAYER = "model.layers.0."

Bucket = tuple[Sequence[Parameter], Tensor]


class Saboteur(WorkerExtension):
    """Everything is as it was before the update after it."""

    rank: int
    weight_transfer_engine: Any

    def sabotage(self, kind: str) -> None:
        self._next_sabotage = kind

    def canary_begin(self, version: int) -> None:
        model, transfer = self.get_model(), self.weight_transfer_engine
        for thing, name in ((model, "load_weights"), (transfer, "_repack_tied_head"), (transfer.group, "receive")):
            vars(thing).pop(name, None)
        kind = self.__dict__.pop("_next_sabotage", "")
        if kind == "layer not updated" or (kind == "layer not updated on rank 1" and self.rank == 1):
            load_through(model, without_a_layer)
        elif kind == "layers swapped":
            load_through(model, with_layers_swapped)
        elif kind == "stale head":
            transfer._repack_tied_head = lambda: None
        elif kind in ("lost bucket", "norm twice"):
            receive, change = transfer.group.receive, without_the_second if kind == "lost bucket" else with_norm_twice
            transfer.group.receive = lambda manifest: change(receive(manifest))
        super().canary_begin(version)


def load_through(model: Any, change: Any) -> None:
    """Change what is loaded, after it has arrived."""
    load = model.load_weights
    model.load_weights = lambda weights: load(change(weights))


def without_a_layer(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if not name.startswith(LAYER))


def with_layers_swapped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        head, layers, tail = name.partition("layers.")
        yield (f"{head}{layers}{1 - int(tail[0])}{tail[1:]}" if layers else name), tensor


def without_the_second(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    return (bucket for number, bucket in enumerate(buckets) if number != 1)


def with_norm_twice(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    """vLLM itself refuses most parameters that come twice; a norm it takes."""
    for parameters, buffer in buckets:
        yield parameters, buffer
        if parameters[-1].name == "model.norm.weight":
            yield parameters[-1:], buffer[offsets(parameters)[0][-1] :]
