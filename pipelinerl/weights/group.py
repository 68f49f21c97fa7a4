"""The group of a weight transport, seen from the driver: trainer rank 0 and every worker of some engines."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import WeightSyncError
from pipelinerl.weights.calls import Broken, Calls
from pipelinerl.weights.membership import Conduct, ReceivingEngine
from pipelinerl.weights.places import assign

LEAVE_S = 5.0  # how long engines have to leave a group
INFO_KEYS = {  # what of a manifest the workers of a transport are told with every update
    "gloo": (),  # it is told when they join
    "nccl": ("names", "dtype_names", "shapes"),
    "ipc": (),
}


class SendingTrainer(Protocol):
    """The trainer, as far as weight updates go.

    A WeightSyncError is a transport that broke; anything else is a trainer rank that failed.
    """

    async def listen(self, backend: str) -> dict[str, Any]: ...

    async def connect_weights(self, world_size: int) -> dict[str, Any]: ...

    async def send_weights(self, transmission: int) -> dict[str, Any]: ...

    async def resend_weights(self, transmission: int) -> None: ...


@dataclass
class Group:
    """The members of an epoch, and what an update consists of."""

    epoch: int
    engines: Sequence[ReceivingEngine]
    update_info: dict[str, Any]
    names: list[str]
    nbytes: int
    coupled: bool  # when a member fails, so do the others
    numbered: bool  # updates are told their number
    transmissions: int = 0

    def next_update(self) -> tuple[int, dict[str, Any]]:
        """The number of the next update in this epoch, and what its receivers are told."""
        number, self.transmissions = self.transmissions, self.transmissions + 1
        return number, self.update_info | ({"transmission": number} if self.numbered else {})


class Groups:
    """Makes one group after the other."""

    def __init__(
        self, trainer: SendingTrainer, conduct: Conduct, config: WeightsConfig, backend: str, workers_per_engine: int
    ):
        self._trainer = trainer
        self._conduct = conduct
        self._timeout_s = config.timeout_s
        self._backend = backend
        self._workers = workers_per_engine
        self._epochs = 0
        self._group: Group | None = None
        self._good = False  # the group may be used again

    async def of(self, engines: Sequence[ReceivingEngine]) -> Group:
        """The group of these engines: the one there is, or that of the next epoch. Raises Broken."""
        if self._group is None or not self._good or list(self._group.engines) != list(engines):
            await self.leave()
            self._epochs += 1
            try:
                self._group = await self._build(engines)
            except WeightSyncError as error:  # of the trainer; those of engines come as Broken
                raise Broken(error) from error
            self._good = True
        return self._group

    def spoil(self) -> None:
        """The group must not be used again."""
        self._good = False

    async def leave(self) -> None:
        """Have the engines of the group leave it, as far as they are able to. The trainer does when it listens next."""
        group, self._group = self._group, None
        if group is not None:
            leaving = [asyncio.ensure_future(engine.disconnect()) for engine in group.engines]
            await asyncio.wait(leaving, timeout=LEAVE_S)
            for task in leaving:
                task.cancel()
                task.add_done_callback(_taken)

    async def _build(self, engines: Sequence[ReceivingEngine]) -> Group:
        rendezvous = await self._trainer.listen(self._backend)
        seats, world_size = await self._seats(rendezvous, engines)
        coupled = self._backend != "gloo" or world_size > 1
        joining = self._each(
            engines,
            [
                engine.connect(rendezvous | seat | {"world_size": world_size})
                for engine, seat in zip(engines, seats, strict=True)
            ],
        )
        with joining:
            manifest = await self._with_engines(self._trainer.connect_weights(world_size), joining)
            await joining.results(self._timeout_s, coupled)
        info = {key: manifest[key] for key in INFO_KEYS[self._backend]}
        names, nbytes = list(manifest["names"]), sum(manifest["sizes"])
        return Group(self._epochs, list(engines), info, names, nbytes, coupled, numbered=self._backend != "nccl")

    async def _seats(
        self, rendezvous: dict[str, Any], engines: Sequence[ReceivingEngine]
    ) -> tuple[list[dict[str, Any]], int]:
        """What each engine needs to know to join, and the size of the group."""
        if self._backend != "gloo":
            offsets = [{"rank_offset": 1 + index * self._workers} for index in range(len(engines))]
            return offsets, 1 + self._workers * len(engines)
        with self._each(engines, [engine.locate(rendezvous["segment"]) for engine in engines]) as locating:
            nodes = await locating.results(self._timeout_s, coupled=False)
        places, world_size = assign(nodes)
        return [{"places": of_engine} for of_engine in places], world_size

    async def _with_engines(self, call: Coroutine[Any, Any, dict[str, Any]], calls: Calls[Any]) -> dict[str, Any]:
        """A call to the trainer that waits for the engines."""
        try:
            return await call
        except WeightSyncError:
            await calls.grace()
            raise

    def _each(self, engines: Sequence[ReceivingEngine], calls: Sequence[Coroutine[Any, Any, Any]]) -> Calls[Any]:
        return Calls(engines, calls, self._conduct)


def _taken(task: asyncio.Future[None]) -> None:
    """Take notice of how it ended, or asyncio prints it. An engine's trouble shows in what it does next."""
    if not task.cancelled():
        task.exception()
