"""How the bytes of an update get to each worker over host memory. Pure; the driver decides with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """What the driver decided for a worker: its rank in the broadcast, or whose segment it maps."""

    rank: int | None  # None: it maps
    node: str  # the node whose segment it maps or, with a rank, fills; "" is the trainer's

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Place":
        return cls(data["rank"], data["node"])


def assign(nodes: Sequence[Sequence[str]]) -> tuple[list[list[dict[str, Any]]], int]:
    """Places [engine][worker] as plain data, and the size of the broadcast group, the trainer included.

    `nodes` are the names [engine][worker] of the memory that each can map, "" for the trainer's.
    """
    ranks: dict[str, int] = {}
    places: list[list[dict[str, Any]]] = []
    for workers in nodes:
        places.append([])
        for node in workers:
            leads = node != "" and node not in ranks
            if leads:
                ranks[node] = 1 + len(ranks)
            places[-1].append({"rank": ranks[node] if leads else None, "node": node})
    return places, 1 + len(ranks)
