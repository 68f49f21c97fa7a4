"""The trainer's part of a checkpoint: weights, optimizer, schedule and random state, for any number of ranks.

    trainer-<rank>.safetensors   fragments of fp32 masters and moments, and this rank's random state
    trainer-<rank>.json          which parameter, kind and interval each fragment is; counters

A rank writes what it holds, without asking the others: under ZeRO its shards, at stage 0, where all ranks hold all,
its share. Since fragments are intervals of named parameters, they load into any other division. The model's own
weights are not written: they are the masters, rounded.

A snapshot has two halves. `Snapshot.begin` copies to host memory, because the next update changes everything in place;
a thread then writes, which holds nobody up.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelinerl.checkpoint.manifest import FileRecord, secured
from pipelinerl.errors import ConfigError, DataError, EnvironmentProblem
from pipelinerl.trainer.fragments import MASTER, Fragment, OptimizerView

CPU_RNG, CUDA_RNG = "rng/cpu", "rng/cuda"


@dataclass(frozen=True)
class Counters:
    """What belongs to all ranks alike."""

    version: int
    updates: int  # that the optimizer counted
    scheduled: int  # updates that the schedule counted
    ranks: int


class Snapshot:
    """A rank's part of one checkpoint, while it is being written."""

    def __init__(self, folder: Path, rank: int, tensors: dict[str, Tensor], description: dict[str, Any]):
        self._folder = folder
        self._rank = rank
        self._tensors = tensors
        self._description = description
        self._files: dict[str, FileRecord] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    @classmethod
    def begin(
        cls, folder: Path, view: OptimizerView, counters: Counters, rank: int, device: torch.device
    ) -> "Snapshot":
        """Copy the state to host memory and start to write it."""
        tensors: dict[str, Tensor] = {CPU_RNG: torch.get_rng_state()}
        if device.type == "cuda":
            tensors[CUDA_RNG] = torch.cuda.get_rng_state(device)
        entries = []
        for fragment in _share(view, rank, counters.ranks):
            key = f"{fragment.kind}/{fragment.name}"
            tensors[key] = fragment.values.to("cpu", copy=True)
            entries.append([fragment.name, fragment.kind, fragment.start, fragment.start + len(fragment.values)])
        description = {
            "version": counters.version,
            "updates": counters.updates,
            "scheduled": counters.scheduled,
            "ranks": counters.ranks,
            "kinds": [MASTER, *view.moments()],
            "shapes": {name: list(shape) for name, shape in view.shapes.items()},
            "fragments": entries,
        }
        snapshot = cls(folder, rank, tensors, description)
        snapshot._thread.start()
        return snapshot

    def poll(self) -> dict[str, FileRecord] | None:
        """The files, once they are on the disk; None before. Raises EnvironmentProblem when that failed."""
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise EnvironmentProblem(
                f"trainer rank {self._rank}: the checkpoint in {self._folder} could not be written: {self._error}"
            ) from self._error
        return self._files

    def _write(self) -> None:
        name = f"trainer-{self._rank}"
        try:
            save_file(self._tensors, self._folder / f"{name}.safetensors")
            (self._folder / f"{name}.json").write_text(json.dumps(self._description) + "\n")
            self._files = {n: secured(self._folder / n) for n in (f"{name}.safetensors", f"{name}.json")}
        except Exception as error:  # safetensors has an error type of its own
            self._error = error
        self._tensors = {}


def restore(folder: Path, view: OptimizerView, rank: int, ranks: int, device: torch.device) -> Counters:
    """Load a checkpoint, made by any number of ranks at any ZeRO stage, to the bit.

    Random states are loaded when there are as many ranks as there were. Raises ConfigError when model or optimizer are
    not those of the checkpoint.
    """
    saved = _Saved(folder)
    _check(saved, view)
    first = saved.descriptions[0]
    kinds = first["kinds"]
    if kinds != [MASTER]:
        view.make_moments(kinds[1:], first["updates"])
    with torch.no_grad():
        for fragment in view.fragments(kinds):
            saved.read_into(fragment)
    view.refresh_model()
    if first["ranks"] == ranks:
        torch.set_rng_state(saved.tensor(rank, CPU_RNG))
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensor(rank, CUDA_RNG), device)
    return Counters(first["version"], first["updates"], first["scheduled"], first["ranks"])


class _Saved:
    """The files of all ranks, opened. Tensors are read where they are needed, and no more of them."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("trainer-*.json"), key=lambda path: int(path.stem.removeprefix("trainer-")))
        if not paths:
            raise DataError(f"{folder}: no trainer-*.json in it, so this is no checkpoint of a trainer")
        self.folder = folder
        self.descriptions: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        self._files = [safe_open(path.with_suffix(".safetensors"), framework="pt") for path in paths]
        self._places: dict[str, list[tuple[int, int, int]]] = {}  # kind/name -> (start, end, file)
        for number, description in enumerate(self.descriptions):
            for name, kind, start, end in description["fragments"]:
                self._places.setdefault(f"{kind}/{name}", []).append((start, end, number))

    def tensor(self, rank: int, key: str) -> Tensor:
        tensor: Tensor = self._files[rank].get_tensor(key)
        return tensor

    def read_into(self, fragment: Fragment) -> None:
        """Fill the fragment with what overlaps it. Raises DataError when that leaves a gap."""
        key = f"{fragment.kind}/{fragment.name}"
        begin, end, filled = fragment.start, fragment.start + len(fragment.values), 0
        for start, stop, number in self._places.get(key, []):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                values = self._files[number].get_slice(key)[low - start : high - start]
                fragment.values[low - begin : high - begin].copy_(values)
                filled += high - low
        if filled != end - begin:
            raise DataError(f"{self.folder}: {key} has {filled} of the elements [{begin}, {end}); a file is missing")


def _share(view: OptimizerView, rank: int, ranks: int) -> Iterator[Fragment]:
    """What this rank writes: its shards, or every so many parameters of those that all ranks have."""
    fragments = view.fragments([MASTER, *view.moments()])
    if not view.is_whole:
        yield from fragments
        return
    owner = _owners(view.shapes, ranks)
    yield from (fragment for fragment in fragments if owner[fragment.name] == rank)


def _owners(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """Parameter -> the rank that writes it: each to the rank with the fewest elements, the largest first."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    loads, owner = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner


def _check(saved: _Saved, view: OptimizerView) -> None:
    first = saved.descriptions[0]
    if len(saved.descriptions) != first["ranks"]:
        raise DataError(f"{saved.folder}: files of {len(saved.descriptions)} ranks, {first['ranks']} wrote it")
    there = {name: tuple(shape) for name, shape in first["shapes"].items()}
    for name, shape in view.shapes.items():
        if there.get(name) != shape:
            found = f"has shape {list(there[name])} in it" if name in there else "is not in it"
            raise ConfigError(
                f"{saved.folder} does not fit the model: {name} {list(shape)} {found}; use the model.path and the "
                "trainer.lora of the run that made it"
            )
    if extra := sorted(there.keys() - view.shapes.keys()):
        raise ConfigError(
            f"{saved.folder} does not fit the model: it trained {extra[0]} too ({len(extra)} such parameters); use the "
            "model.path and the trainer.lora of the run that made it"
        )
    expected = view.expected_moments
    if len(first["kinds"]) > 1 and first["kinds"][1:] != expected:
        raise ConfigError(
            f"{saved.folder} holds the moments {first['kinds'][1:]}, trainer.optimizer has {expected}; use the "
            "trainer.optimizer of the run that made it"
        )
