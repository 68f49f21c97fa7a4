"""A worker's seat in a weight update over host memory: how the bytes get to it. See weights/host_sender.py.

    maps the trainer's segment        on the trainer's node
    receives a gloo broadcast         the first worker of any other node, into a segment of its own
    maps the segment of that worker   the others of that node

Needs no vLLM. All methods may wait and belong to a thread that may be kept waiting.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.weights.gloo_group import GlooGroup, finish
from pipelinerl.weights.host_sender import bell
from pipelinerl.weights.manifest import Manifest, Parameter, Placed
from pipelinerl.weights.places import Place
from pipelinerl.weights.segment import Address, Segment


class Seat:
    """Joined for one epoch; holds what it maps as long as it lives."""

    def __init__(self, who: str, place: Place, init_info: dict[str, Any]):
        """`who` is for errors, `init_info` is what `HostSender.listen` returns, with the `world_size`. Returns when all
        members of a broadcast have joined."""
        self._who = who
        self._place = place
        self._timeout = timedelta(seconds=init_info["timeout_s"])
        self._layout, nbytes = Manifest.from_dict(init_info["manifest"]).layout()
        self._group: GlooGroup | None = None
        self._announced: list[str] = []
        address, port, world_size = init_info["address"], init_info["port"], init_info["world_size"]
        try:
            self._store = dist.TCPStore(address, port, is_master=False, timeout=self._timeout)
            self._segment = self._join(init_info, nbytes, world_size)
        except RuntimeError as error:
            raise WeightSyncError(f"{who} could not join the weight transport: {first_line(error)}") from error

    def _join(self, init_info: dict[str, Any], nbytes: int, world_size: int) -> Segment:
        key = f"segment/{self._place.node}"
        if self._place.rank is not None:
            segment = Segment.create(nbytes)
            self._store.set(key, json.dumps(segment.address.to_dict()))
            self._group = GlooGroup(
                self._store, init_info["epoch"], self._place.rank, world_size, init_info["timeout_s"]
            )
            return segment
        address = json.loads(self._store.get(key)) if self._place.node else init_info["segment"]
        mapped = Segment.open(Address(**address))
        if mapped is None:
            raise WeightSyncError(f"{self._who}: the shared memory of process {address['pid']} is gone")
        return mapped

    def receive(self, transmission: int) -> Iterator[tuple[Sequence[Parameter], Tensor]]:
        """Each bucket with its bytes, as soon as they are there. They stay until the next transmission is sent."""
        content = self._segment.content
        while self._announced:
            self._store.delete_key(self._announced.pop())
        pending = [self._group.broadcast(content[p.start : p.end]) for p in self._layout] if self._group else []
        for index, placed in enumerate(self._layout):
            if pending:
                finish(pending[index], self._who, placed)
                self._announced.append(bell(self._place.node, transmission, index))
                self._store.set(self._announced[-1], "")
            else:
                self._wait(bell(self._place.node, transmission, index), placed)
            yield placed.bucket, content[placed.start : placed.end]

    def _wait(self, key: str, placed: Placed) -> None:
        try:
            self._store.wait([key], self._timeout)
        except RuntimeError as error:
            raise WeightSyncError(
                f"{self._who}: {placed.names} did not come from {self._place.node or 'trainer rank 0'} within "
                f"weights.timeout_s={self._timeout.total_seconds():g} s, or it is gone: {first_line(error)}"
            ) from error
