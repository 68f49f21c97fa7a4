"""The lag contract: which groups may start, and which ones a step trains on.

A group takes a place when it is admitted. Step t trains on places [tB, (t+1)B), B groups a step, in the order of
admission whatever order they finish in. A place p is given out only while `p < (max_lag + version + 1) * B`, where
`version` is the version all engines serve. Its tokens are then sampled at `version` or later and trained at step
floor(p / B) <= max_lag + version, so no token is ever older than `max_lag` optimizer steps, and nothing has to be
dropped to keep it so. A group that turns out to be unusable gives its place to the next one, which only moves the
later ones forward.

Because of that order, which problems a step trains on does not depend on timing. After a resume the tickets that the
checkpoint found open come first, in their old order.

    admit     waits for    a place to become free         unblocked by   published, drop
    take      waits for    the first B groups in order    unblocked by   put, drop
"""

import asyncio
from collections import Counter
from typing import Generic, TypeVar

from pipelinerl.rollout.ledger import Ledger

Group = TypeVar("Group")


class GroupBuffer(Generic[Group]):
    """Groups between admission and training, from `version` on. For one event loop.

    `ledger` is told what becomes of every ticket; that of a resumed run says which ones to admit first.
    """

    def __init__(self, groups_per_step: int, max_lag: int, steps: int, version: int = 0, ledger: Ledger | None = None):
        self._groups_per_step = groups_per_step
        self._max_lag = max_lag
        self._steps = steps
        self._version = version
        self._taken = version * groups_per_step  # places handed to the trainer
        self._groups: dict[int, Group | None] = {}  # ticket -> group, None while it runs; in order of admission
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
        return sum(group is None for group in self._groups.values())

    @property
    def ready(self) -> int:
        """Groups that are finished and wait to be trained on."""
        return len(self._groups) - self.running

    async def admit(self) -> int:
        """Wait for a place and return its ticket. Never returns once the run has all the groups it needs."""
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            ticket = self.ledger.draw()
            self._groups[ticket] = None
            return ticket

    async def put(self, ticket: int, group: Group) -> None:
        """The group of `ticket` is finished."""
        async with self._changed:
            assert self._groups[ticket] is None, f"ticket {ticket} was put twice"
            self._groups[ticket] = group
            self.ledger.generated(ticket)
            self._changed.notify_all()

    async def drop(self, ticket: int, reason: str) -> None:
        """The group of `ticket` is unusable: count it under `reason` and free its place."""
        async with self._changed:
            assert self._groups[ticket] is None, f"ticket {ticket} is finished, it cannot be dropped"
            del self._groups[ticket]
            self.ledger.drop([ticket], reason)
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
            await self._changed.wait_for(self._step_is_ready)
            tickets = list(self._groups)[: self._groups_per_step]
            groups = [self._groups.pop(ticket) for ticket in tickets]
            self._taken += len(groups)
            self._changed.notify_all()
            return [group for group in groups if group is not None]

    def _has_room(self) -> bool:
        last_step = min(self._max_lag + self._version, self._steps - 1)
        return self._taken + len(self._groups) < (last_step + 1) * self._groups_per_step

    def _step_is_ready(self) -> bool:
        first = list(self._groups.values())[: self._groups_per_step]
        return len(first) == self._groups_per_step and all(group is not None for group in first)
