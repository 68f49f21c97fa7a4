"""The canary of a weight update: what has arrived is what was sent, and the engine computes with it.

It lives in every vLLM worker, beside the transport and independent of it, and listens at the one door through which
all weights go in, the `load_weights` of the model, or of the double that is loaded in its place (twin.py):

    begin(version, door)      before the update: record what will pass
    arrived(names, digests)   ARRIVED   every parameter has passed once, in this very update, with the digest that the
                                        trainer made; of a double that can be known before the model is touched
    check(names, digests)     before the engine is resumed: ARRIVED, and
                              LOADED    a few columns of every parameter, read back from what the engine computes with
                                        (readback.py), are those that arrived, bit for bit

A stale or misplaced parameter is wrong in every column, so a few are enough; the digests cover the rest. The columns
rotate with the version. What cannot be read back (quantised layers, experts, capped logits) is named as such.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pipelinerl.weights.digest import device_digest
from pipelinerl.weights.readback import Locator, Place, Source

COLUMNS = 8  # of each parameter, per update
EXPLAINED = 4  # wrong parameters that are compared with everything else to say what they hold

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Share:
    """The part of an arrived parameter that is compared."""

    place: Place
    columns: tuple[int, ...]
    values: Tensor  # [R, k], or [R] of a vector


@dataclass(eq=False)
class Recording:
    """What passed during one update."""

    version: int
    arrivals: Counter[str] = field(default_factory=Counter)
    digests: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)  # by label, see Locator.places
    unread: set[str] = field(default_factory=set)  # parameters with a use that cannot be read back
    seconds: float = 0.0


class Canary:
    """Watches the updates of one worker's model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, tied: bool):
        self._model: Any = model
        self._locator = Locator(model, dtype, device, tied)
        self._places: dict[str, Mapping[str, Place | None]] = {}
        self._recording: Recording | None = None
        self._door: Any = model  # whose `load_weights` is listened at
        self._own_door: dict[str, Any] = {}  # what there was in its __dict__ before
        self._last_good: Recording | None = None

    def begin(self, version: int, door: Any = None) -> None:
        """Record what passes `load_weights` of `door`, by default of the model, from here on."""
        self._stop_listening()  # to an update that broke off
        recording = self._recording = Recording(version)
        self._door = self._model if door is None else door
        load: Callable[[Weights], Any] = self._door.load_weights
        self._own_door = {key: value for key, value in vars(self._door).items() if key == "load_weights"}

        def record_and_load(weights: Weights) -> Any:
            return load(self._recorded(weights, recording))

        self._door.load_weights = record_and_load

    def arrived(self, names: Sequence[str], digests: Sequence[int]) -> dict[str, str]:
        """What is wrong with what has passed so far, as {parameter: what}. May be asked before `check`."""
        assert self._recording is not None, "begin comes first"
        return _not_as_sent(self._recording, names, digests)

    def check(self, names: Sequence[str], digests: Sequence[int]) -> dict[str, Any]:
        """What is wrong, as {parameter: what}, and how much could be read back. All as plain data.

        `names` and `digests` are those of the trainer.
        """
        start = time.perf_counter()
        recording = self._stop_listening()
        assert recording is not None, "begin comes first"
        wrong = _not_as_sent(recording, names, digests)
        for label, what in self._not_as_loaded(recording).items():
            wrong.setdefault(label, what)
        if not wrong:
            self._last_good = recording
        not_read_back = [name for name in names if name in recording.unread]
        seconds = {"seconds": recording.seconds, "check_s": time.perf_counter() - start}
        return {"wrong": wrong, "not_read_back": not_read_back} | seconds

    def _stop_listening(self) -> Recording | None:
        recording, self._recording = self._recording, None
        if recording is not None:
            del self._door.load_weights
            vars(self._door).update(self._own_door)
            self._door = self._model  # a double must not live on
        return recording

    def _recorded(self, weights: Weights, recording: Recording) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            start = time.perf_counter()
            self._record(name, tensor, recording)
            recording.seconds += time.perf_counter() - start
            yield name, tensor

    def _record(self, name: str, tensor: Tensor, recording: Recording) -> None:
        recording.arrivals[name] += 1
        recording.digests[name] = device_digest(tensor)
        if name not in self._places:
            self._places[name] = self._locator.places(name, tensor.shape)
        for label, place in self._places[name].items():
            if place is None:
                recording.unread.add(name)
            else:
                columns = choose_columns(recording.version, place.inputs)
                recording.shares[label] = Share(place, columns, place.cut(tensor, columns))

    def _not_as_loaded(self, recording: Recording) -> dict[str, str]:
        reader = _Reader()
        wrong = {
            label: read
            for label, share in recording.shares.items()
            if not _same(share.values, read := reader.read(share))
        }
        return {
            label: self._explain(label, read, recording) if number < EXPLAINED else "is not what arrived"
            for number, (label, read) in enumerate(wrong.items())
        }

    def _explain(self, label: str, read: Tensor, recording: Recording) -> str:
        """What a parameter holds in the place of what arrived."""
        share = recording.shares[label]
        before = self._last_good.shares.get(label) if self._last_good else None
        if self._last_good and before and _same(before.values, _Reader().read(before)):
            return f"still holds version {self._last_good.version}"
        for other, its in recording.shares.items():
            if other != label and its.columns == share.columns and _same(its.values, read):
                return f"holds the values of {other}"
        if share.values.shape != read.shape:
            return f"reads back in the shape {tuple(read.shape)} instead of {tuple(share.values.shape)}"
        expected = share.values.to(read.dtype)
        count, gap = int((expected != read).sum()), float((expected - read).abs().max())
        return f"is not what arrived in {count} of {read.numel()} values read back, by up to {gap:.2g}"


class _Reader:
    """Reads shares; a fused layer once for all its parts."""

    def __init__(self) -> None:
        self._read: dict[tuple[Source, tuple[int, ...]], Tensor] = {}

    def read(self, share: Share) -> Tensor:
        key = (share.place.source, share.columns)
        if key not in self._read:
            self._read[key] = share.place.source.read(share.columns)
        return self._read[key][share.place.rows]


@lru_cache(maxsize=64)
def choose_columns(version: int, inputs: int) -> tuple[int, ...]:
    """Columns of this update, the same for all parameters with that many, so that swapped layers can be recognised."""
    return tuple(random.Random(f"{version}/{inputs}").sample(range(inputs), min(COLUMNS, inputs)))


def _not_as_sent(recording: Recording, names: Sequence[str], digests: Sequence[int]) -> dict[str, str]:
    received = torch.stack(list(recording.digests.values())).tolist() if recording.digests else []
    arrived = dict(zip(recording.digests, received, strict=True))
    wrong = {}
    for name, digest in zip(names, digests, strict=True):
        if name not in arrived:
            wrong[name] = "did not arrive"
        elif recording.arrivals[name] > 1:
            wrong[name] = f"arrived {recording.arrivals[name]} times"
        elif arrived[name] != digest:
            wrong[name] = "arrived with other bytes than were sent"
    return wrong | {name: "arrived without being sent" for name in arrived.keys() - set(names)}


def _same(expected: Tensor, read: Tensor) -> bool:
    """Equal as numbers: a kernel may lose the sign of a zero, or take a denormal number for one."""
    expected = expected.to(read.dtype)
    if expected.shape != read.shape:
        return False
    tiny = torch.finfo(expected.dtype).tiny
    return bool(((expected == read) | ((expected.abs() < tiny) & (read.abs() < tiny))).all())


class CanaryWorker:
    """Mixin of a vLLM worker: the canary as methods for `collective_rpc`."""

    device: torch.device
    vllm_config: Any
    get_model: Callable[[], nn.Module]

    def canary_begin(self, version: int) -> None:
        """An update to `version` is about to start."""
        self._weight_canary().begin(version)

    def canary_arrived(self, names: list[str], digests: list[int]) -> dict[str, str]:
        """See Canary.arrived."""
        return self._weight_canary().arrived(names, digests)

    @torch.no_grad()
    def canary_check(self, names: list[str], digests: list[int]) -> dict[str, Any]:
        """See Canary.check."""
        return self._weight_canary().check(names, digests)

    def _weight_canary(self) -> Canary:
        if "_canary_of_weights" not in self.__dict__:
            config = self.vllm_config.model_config
            tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
            self._canary_of_weights = Canary(self.get_model(), config.dtype, self.device, tied)
        return self._canary_of_weights
