"""Who takes part in a weight update, and who failed in the last ones."""

from collections.abc import Sequence
from typing import Any, Protocol

from pipelinerl.errors import WorkerDied

FAILURES_IN_A_ROW = 2  # of an engine that is alive, before it is given up


class ReceivingEngine(Protocol):
    """A rollout worker, as far as weight updates go."""

    async def locate(self, segment: dict[str, Any] | None) -> list[str]: ...

    async def connect(self, init_info: dict[str, Any]) -> None: ...

    async def disconnect(self) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]: ...

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]: ...


class Members(Protocol):
    """The fleet, as far as weight updates go."""

    def members(self) -> Sequence[ReceivingEngine]:
        """Engines whose process is up and that should get the next update: healthy ones, and stale ones."""

    def lost(self, engine: Any, error: Exception) -> None:
        """This engine died, or failed again and again: it gets no more updates until it has been started again."""

    def refitted(self, engine: Any, version: int) -> None:
        """It serves `version` now."""


class FixedMembers:
    """Engines that nobody starts again: those that are lost are out."""

    def __init__(self, engines: Sequence[ReceivingEngine]):
        self._engines = list(engines)
        self.errors: list[Exception] = []

    def members(self) -> Sequence[ReceivingEngine]:
        return list(self._engines)

    def lost(self, engine: Any, error: Exception) -> None:
        self._engines.remove(engine)
        self.errors.append(error)

    def refitted(self, engine: Any, version: int) -> None:
        """Nothing to note."""


class Conduct:
    """Counts the failures of engines, and tells the fleet which are to be given up."""

    def __init__(self, members: Members):
        self._members = members
        self._failures: dict[int, int] = {}  # by id, in a row

    def succeeded(self, engine: ReceivingEngine, version: int) -> None:
        self._failures.pop(id(engine), None)
        self._members.refitted(engine, version)

    def failed(self, engine: ReceivingEngine, error: Exception) -> None:
        """Of its own accord, not because others did."""
        count = self._failures.get(id(engine), 0) + 1
        self._failures[id(engine)] = count
        if isinstance(error, WorkerDied) or count >= FAILURES_IN_A_ROW:
            self.give_up(engine, error)

    def give_up(self, engine: ReceivingEngine, error: Exception) -> None:
        self._failures.pop(id(engine), None)
        self._members.lost(engine, error)
