"""Which engine the next group goes to. Pure: it knows engines by number only.

The least-loaded engine that is enabled; of several, the one with the lowest number. The candidates lie in a heap as
(load, engine). An entry whose load is no longer the engine's is stale: it is skipped when it comes up, and the heap is
made anew before stale entries outnumber the engines by far. So a call costs O(log n) for n engines, on average.

acquire   waits for   an engine that is enabled   unblocked by   add, enable
"""

import asyncio
import heapq

STALE_SHARE = 4  # entries of the heap for each engine at which it is made anew


class LeastLoaded:
    """Engines and how many groups each has in flight. For one event loop."""

    def __init__(self, engines: int = 0) -> None:
        self._loads = dict.fromkeys(range(engines), 0)  # of all engines, also of disabled ones
        self._enabled = set(self._loads)
        self._heap = [(0, engine) for engine in self._loads]
        self._any_enabled = asyncio.Event()
        self._in_flight = 0
        self._note_enabled()

    @property
    def in_flight(self) -> int:
        """Groups in flight on all engines."""
        return self._in_flight

    @property
    def enabled(self) -> int:
        """Engines that take groups."""
        return len(self._enabled)

    def load(self, engine: int) -> int:
        """Groups in flight on `engine`."""
        return self._loads[engine]

    async def acquire(self) -> int:
        """The engine for one more group, which counts as its load until `release`. Waits while none is enabled."""
        while not self._enabled:
            await self._any_enabled.wait()
        engine = self._least_loaded()
        self._change_load(engine, +1)
        return engine

    def release(self, engine: int) -> None:
        """A group of `engine` is done, or lost; also when the engine is disabled by now."""
        assert self._loads[engine] > 0, f"engine {engine} has no group in flight"
        self._change_load(engine, -1)

    def add(self, engine: int) -> None:
        """A new engine, enabled and without load."""
        assert engine not in self._loads, f"engine {engine} is here already"
        self._loads[engine] = 0
        self.enable(engine)

    def remove(self, engine: int) -> None:
        """Forget an engine, which must have no group in flight: disable it, and wait for their ends."""
        assert not self._loads[engine], f"engine {engine} has {self._loads[engine]} groups in flight"
        self.disable(engine)
        del self._loads[engine]

    def enable(self, engine: int) -> None:
        """It takes groups (again)."""
        assert engine in self._loads, f"no engine {engine}"
        if engine not in self._enabled:
            self._enabled.add(engine)
            self._push(engine)
            self._note_enabled()

    def disable(self, engine: int) -> None:
        """It takes no further groups; those in flight stay its load."""
        assert engine in self._loads, f"no engine {engine}"
        self._enabled.discard(engine)
        self._note_enabled()

    def _least_loaded(self) -> int:
        while not self._is_current(*self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def _is_current(self, load: int, engine: int) -> bool:
        return engine in self._enabled and self._loads[engine] == load

    def _change_load(self, engine: int, by: int) -> None:
        self._loads[engine] += by
        self._in_flight += by
        if engine in self._enabled:
            self._push(engine)

    def _push(self, engine: int) -> None:
        if len(self._heap) > STALE_SHARE * len(self._loads):
            self._heap = [(self._loads[other], other) for other in self._enabled]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self._loads[engine], engine))

    def _note_enabled(self) -> None:
        if self._enabled:
            self._any_enabled.set()
        else:
            self._any_enabled.clear()
