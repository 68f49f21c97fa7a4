"""A worker extension that spoils the next update in a way the test names, behind the canary's back.

The engine's processes import it by name; `sabotage` arrives there through `collective_rpc`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from pipelinerl.engine.extension import WorkerExtension
from pipelinerl.weights import loading
from pipelinerl.weights.manifest import Parameter, offsets
from pipelinerl.weights.twin import Twin

SABOTEUR = "tests.integration.saboteur.Saboteur"
LAYER = "model.layers.0."
ORIGINALS = {(loading, "repack_tied_head"): loading.repack_tied_head, (Twin, "exchange"): Twin.exchange}

Bucket = tuple[Sequence[Parameter], Tensor]


class Saboteur(WorkerExtension):
    """Everything is as it was before the update after it."""

    rank: int

    def sabotage(self, kind: str) -> None:
        self._next_sabotage = kind

    def weights_receive(self, *args: Any) -> None:
        canary, seat = self._weight_canary(), args[0]
        vars(canary).pop("begin", None)
        vars(seat).pop("receive", None)
        for (owner, name), original in ORIGINALS.items():
            setattr(owner, name, original)
        kind = self.__dict__.pop("_next_sabotage", "")
        if kind == "layer not updated on rank 1":
            kind = "layer not updated" if self.rank == 1 else ""
        if kind in LOADS:
            begin: Any = canary.begin
            spoil = LOADS[kind]

            def begin_on_a_spoiled_door(version: int, door: Any = None) -> None:
                load = door.load_weights
                door.load_weights = lambda weights: load(spoil(weights))
                begin(version, door)

            canary.begin = begin_on_a_spoiled_door  # type: ignore[method-assign]
        elif kind in ARRIVALS:
            receive: Any = seat.receive
            change = ARRIVALS[kind]
            seat.receive = lambda transmission: change(receive(transmission))
        elif kind == "stale head":
            loading.repack_tied_head = lambda _: None
        elif kind == "no exchange":
            Twin.exchange = lambda _: None  # type: ignore[method-assign]
        elif kind == "half an exchange":
            Twin.exchange = exchange_of_half  # type: ignore[method-assign]
        super().weights_receive(*args)


def without_a_layer(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if not name.startswith(LAYER))


def with_layers_swapped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        head, layers, tail = name.partition("layers.")
        yield (f"{head}{layers}{1 - int(tail[0])}{tail[1:]}" if layers else name), tensor


def without_the_second(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    return (bucket for number, bucket in enumerate(buckets) if number != 1)


def without_any(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    return (bucket for bucket in buckets if not bucket)


def with_norm_twice(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    """vLLM itself refuses most parameters that come twice; a norm it takes."""
    for parameters, buffer in buckets:
        yield parameters, buffer
        if parameters[-1].name == "model.norm.weight":
            yield parameters[-1:], buffer[offsets(parameters)[0][-1] :]


def exchange_of_half(twin: Twin) -> None:
    """As an exchange that breaks off in the middle."""
    pairs = twin._of_module
    twin._of_module = dict(islice(pairs.items(), len(pairs) // 2))
    ORIGINALS[Twin, "exchange"](twin)
    twin._of_module = pairs


LOADS: dict[str, Callable[..., Any]] = {"layer not updated": without_a_layer, "layers swapped": with_layers_swapped}
ARRIVALS: dict[str, Callable[..., Any]] = {
    "lost bucket": without_the_second,
    "norm twice": with_norm_twice,
    "nothing": without_any,
}
