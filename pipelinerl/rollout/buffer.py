"""The lag contract: which groups may start, and which ones a step trains on.

A group takes a place when it is admitted. Step t trains on places [tB, (t+1)B), B groups a step, in the order of
admission whatever order they finish in. A place p is given out only while `p < (max_lag + version + 1) * B`, where
`version` is the version all engines serve. Its tokens are then sampled at `version` or later and trained at step
floor(p / B) <= max_lag + version, so no token is ever older than `max_lag` optimizer steps, and nothing has to be
dropped to keep it so. A group that turns out to be unusable gives its place to the next one, which only moves the
later ones forward.

Because of that order, which problems a step trains on does not depend on timing. It also says early which groups a
step is certain to have: one that is among the first B stays there, whatever is dropped. `take_ready` hands those out
before the step is complete (`batch.stream`). After a resume the tickets that the checkpoint found open come first, in
their old order.

    admit       waits for    a place to become free              unblocked by   published, drop
    take        waits for    all of the first B groups           unblocked by   put, drop
    take_ready  waits for    any of the first B groups           unblocked by   put, drop
    drained     waits for    all admitted groups and free places unblocked by   put, admit

Every operation takes the same time whatever the number of groups in flight; taking a group costs once for each.
"""

import asyncio
from collections import Counter, OrderedDict
from typing import Generic, TypeVar

from pipelinerl.rollout.ledger import Ledger

Group = TypeVar("Group")


class GroupBuffer(Generic[Group]):
    """Groups between admission and training, from `version` on. For one event loop.

    `ledger` is told what becomes of every ticket; that of a resumed run says which ones to admit first. Tickets ascend
    in the order of admission.
    """

    def __init__(self, groups_per_step: int, max_lag: int, steps: int, version: int = 0, ledger: Ledger | None = None):
        self._groups_per_step = groups_per_step
        self._max_lag = max_lag
        self._steps = steps
        self._version = version
        self._taken = version * groups_per_step  # places handed to the trainer
        # ticket -> group, None while it runs; in order of admission. `_later` is empty while `_step` has places left.
        self._step: dict[int, Group | None] = {}  # of the step that is taken next
        self._later: OrderedDict[int, Group | None] = OrderedDict()
        self._step_ready: list[int] = []  # tickets of `_step` that are finished
        self._running = 0
        self._changed = asyncio.Condition()
        self.ledger = ledger or Ledger()

    @property
    def version(self) -> int:
        """That all engines serve."""
        return self._version

    @property
    def dropped(self) -> Counter[str]:
        """Groups that were dropped in the whole run, by reason."""
        return self.ledger.dropped

    @property
    def running(self) -> int:
        """Groups that are admitted and not finished."""
        return self._running

    @property
    def ready(self) -> int:
        """Groups that are finished and wait to be trained on."""
        return len(self._step) + len(self._later) - self._running

    async def admit(self) -> int:
        """Wait for a place and return its ticket. Never returns once the run has all the groups it needs."""
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            ticket = self.ledger.draw()
            self._later[ticket] = None
            self._running += 1
            self._fill_step()
            self._changed.notify_all()
            return ticket

    async def put(self, ticket: int, group: Group) -> None:
        """The group of `ticket` is finished."""
        async with self._changed:
            places = self._places_of(ticket)
            assert places[ticket] is None, f"ticket {ticket} was put twice"
            places[ticket] = group
            self._running -= 1
            self.ledger.generated(ticket)
            if places is self._step:
                self._step_ready.append(ticket)
            self._changed.notify_all()

    async def drop(self, ticket: int, reason: str) -> None:
        """The group of `ticket` is unusable: count it under `reason` and free its place."""
        async with self._changed:
            places = self._places_of(ticket)
            assert places[ticket] is None, f"ticket {ticket} is finished, it cannot be dropped"
            del places[ticket]
            self._running -= 1
            self.ledger.drop([ticket], reason)
            self._fill_step()
            self._changed.notify_all()

    async def published(self, version: int) -> None:
        """All engines serve `version` now."""
        async with self._changed:
            assert version >= self._version, f"version {version} follows {self._version}"
            self._version = version
            self._changed.notify_all()

    async def take(self) -> list[Group]:
        """The groups of the next step, oldest first. `ledger.trained` is for the caller to say, after the step."""
        async with self._changed:
            assert not self._taken_of_step, "a step that take_ready has begun is taken by take_ready"
            await self._changed.wait_for(lambda: len(self._step_ready) == self._groups_per_step)
            return self._hand_out()

    async def take_ready(self) -> list[Group]:
        """One or more groups of the next step, oldest first: those that are finished and were not taken yet. Once all
        `groups_per_step` of them are taken, the next call is for the step that follows."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._step_ready))
            return self._hand_out()

    async def drained(self) -> None:
        """Wait until every group that the version the engines serve admits is finished. None starts before the next
        `published`, so nothing is being sampled during the update that follows."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._running and not self._has_room())

    @property
    def _taken_of_step(self) -> int:
        """Places of the next step that the trainer has already."""
        return self._taken % self._groups_per_step

    def _has_room(self) -> bool:
        last_step = min(self._max_lag + self._version, self._steps - 1)
        return self._taken + len(self._step) + len(self._later) < (last_step + 1) * self._groups_per_step

    def _places_of(self, ticket: int) -> dict[int, Group | None]:
        return self._step if ticket in self._step else self._later

    def _fill_step(self) -> None:
        """Let the oldest of the later groups take the places that the next step has left."""
        while self._later and self._taken_of_step + len(self._step) < self._groups_per_step:
            ticket, group = self._later.popitem(last=False)
            self._step[ticket] = group
            if group is not None:
                self._step_ready.append(ticket)

    def _hand_out(self) -> list[Group]:
        """All that is ready of the next step."""
        groups = [self._step.pop(ticket) for ticket in sorted(self._step_ready)]
        self._step_ready.clear()
        self._taken += len(groups)
        self._fill_step()
        self._changed.notify_all()
        return [group for group in groups if group is not None]
