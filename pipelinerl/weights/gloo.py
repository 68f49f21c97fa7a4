"""The receiving end of weight updates on CPU, in every vLLM worker, which goes on stepping meanwhile.

    weights_join      a thread takes the worker's seat in the transport
    weights_receive   a thread receives an update and prepares it beside the running model
    weights_state     how far that is, for who has heard nothing for long
    canary_arrived    what is wrong with what was received; nothing has been loaded by then
    weights_exchange  while generation is paused: the model takes the update, and canary_check reads it back

vLLM calls a method of a worker between two steps only. So the order to receive comes to a mailbox instead, the door of
the worker, and the threads report their end to another.

An update that fails before `exchange` leaves the model as it was. Importing this module registers the engine in vLLM's
factory (engine/extension.py does so, before the worker makes its transfer engine). vLLM's own update methods are of no
use with it: they receive in the thread that steps.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.mailbox import Mailbox, post
from pipelinerl.weights.canary import Canary
from pipelinerl.weights.gloo_group import let_go
from pipelinerl.weights.loading import LayerwiseLoading, Loading, TwinLoading
from pipelinerl.weights.manifest import Parameter
from pipelinerl.weights.places import Place
from pipelinerl.weights.seat import Seat
from pipelinerl.weights.segment import Address, Segment, node_name


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Unused: workers join through `StagedUpdates.weights_start`."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """Unused, as HostInitInfo."""


class GlooWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """What vLLM makes for `weight_transfer_config.backend=gloo`. It holds the state of StagedUpdates."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo
    supports_draft_weight_update = False

    seat: Seat | None = None
    door: Mailbox | None = None  # through which it is told to receive, also in the middle of a step; of one epoch
    update: "Update | None" = None
    task: "Task | None" = None

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        raise NotImplementedError("the gloo transport is driven through StagedUpdates")

    start_weight_update = finish_weight_update = receive_weights = init_transfer_engine

    def shutdown(self) -> None:
        left = [self.seat, self.door, self.update, self.task]
        if self.door is not None:
            self.door.close()
        self.seat = self.door = self.update = self.task = None
        let_go(left)


@dataclass
class Update:
    """One update between its arrival and its exchange."""

    version: int
    loading: Loading


@dataclass
class Task:
    """Work in a thread that may be kept waiting. Dropped, it ends by itself and its result goes nowhere."""

    run: Callable[[], None] | None
    report: "Report"
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def start(self, name: str) -> "Task":
        threading.Thread(target=self._target, name=name, daemon=True).start()
        return self

    def _target(self) -> None:
        run, self.run = self.run, None  # it holds the update, which is to end with its exchange
        assert run is not None
        try:
            run()
        except WeightSyncError as error:
            self.error = str(error)
        except Exception as error:  # whatever vLLM's loaders raise must reach the driver
            self.error = f"{type(error).__name__}: {first_line(error)}"
        self.done.set()
        self.report.send(self.error)


@dataclass
class Report:
    """Where the process that holds the engine waits for the end of a task; `number` says which task."""

    address: str  # of its mailbox
    number: int
    rank: int
    times: dict[str, float] = field(default_factory=dict)

    def send(self, error: str | None) -> None:
        content = {"number": self.number, "rank": self.rank, "error": error, "times": self.times}
        with suppress(OSError):  # it may be gone
            post(self.address, json.dumps(content).encode())


class StagedUpdates:
    """Mixin of a vLLM worker: the methods above, for `collective_rpc`. They return at once."""

    rank: int
    vllm_config: Any
    weight_transfer_engine: GlooWeightTransferEngine
    get_model: Callable[[], Any]
    _weight_canary: Callable[[], Canary]

    def weights_locate(self, segment: dict[str, Any] | None) -> str:
        """ "" where this worker can map the trainer's segment, else the name of the memory it shares with others.

        Without a segment every worker is alone.
        """
        if segment is None:
            return f"{node_name()}/{os.getpid()}"
        return "" if Segment.open(Address(**segment)) else node_name()

    def weights_join(
        self,
        init_info: dict[str, Any],
        places: list[dict[str, Any]],
        eager: bool,
        canary: bool,
        address: str,
        number: int,
    ) -> str:
        """Take a seat; `places` are those of the workers of this engine, `address` is where threads report.

        Returns the address of the worker's door.
        """
        transfer = self.weight_transfer_engine
        transfer.shutdown()  # an epoch before
        who, place = self._weights_name(), Place.from_dict(places[self.rank])
        report = Report(address, number, self.rank)

        def join() -> None:
            seat = Seat(who, place, init_info)
            if transfer.task is task:  # still wanted
                transfer.seat = seat

        def receive(message: bytes) -> None:
            order, seat = json.loads(message), transfer.seat
            if door is transfer.door and seat is not None:
                own_report = replace(report, number=order["number"], times={})
                self.weights_receive(seat, order["transmission"], order["version"], eager, canary, own_report)

        door = transfer.door = Mailbox()
        door.listen(receive, "weights-door")
        task = transfer.task = Task(join, report)
        task.start("weights-join")
        return door.address

    def weights_receive(
        self, seat: Seat, transmission: int, version: int, eager: bool, canary: bool, report: Report
    ) -> None:
        """Receive and prepare an update. Called by the thread of the door."""
        transfer = self.weight_transfer_engine
        watch: Callable[[Any], None] = lambda _: None  # noqa: E731
        if canary:
            watch = lambda door: self._weight_canary().begin(version, door)  # noqa: E731
        loading_class = TwinLoading if eager else LayerwiseLoading
        loading = loading_class(self.get_model(), self.vllm_config.model_config, watch)
        update, waited = Update(version, loading), [0.0]
        buckets = seat.receive(transmission)

        def receive() -> None:
            start = time.perf_counter()
            loading.prepare(_timed(buckets, waited))
            report.times["transfer_s"] = waited[0]
            report.times["load_s"] = time.perf_counter() - start - waited[0]
            if transfer.task is task:
                transfer.update = update

        transfer.update = None
        task = transfer.task = Task(receive, report)
        task.start("weights-receive")

    def weights_state(self) -> dict[str, Any]:
        """Whether the thread of the newest order is done, the number of that order, and what became of it."""
        task = self.weight_transfer_engine.task
        if task is None:
            error = f"{self._weights_name()} was told to leave the transport"
            return {"done": True, "number": None, "error": error, "times": {}}
        report = task.report
        return {"done": task.done.is_set(), "number": report.number, "error": task.error, "times": report.times}

    def weights_exchange(self, version: int) -> None:
        """Make the model compute with the update. Generation must stand still."""
        transfer = self.weight_transfer_engine
        update, transfer.update = transfer.update, None
        assert update is not None and update.version == version, "no such update has arrived"
        update.loading.exchange()
        let_go([update])  # with all that the model held before
        del update

    def weights_leave(self) -> None:
        """Drop seat and update; a thread that still waits ends by itself."""
        self.weight_transfer_engine.shutdown()

    def _weights_name(self) -> str:
        return f"worker {self.rank}"


def _timed(
    buckets: Iterator[tuple[Sequence[Parameter], Tensor]], waited: list[float]
) -> Iterator[tuple[Sequence[Parameter], Tensor]]:
    while True:
        start = time.perf_counter()
        item = next(buckets, None)
        waited[0] += time.perf_counter() - start
        if item is None:
            return
        yield item


if "gloo" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
