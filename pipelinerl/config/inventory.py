"""The hardware that a run may use: nodes with cores, GPUs and memory, found on this machine or given in numbers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelinerl.config.device import gpu_count, gpu_memory
from pipelinerl.config.schema import RunConfig

GB = 10**9


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. Bytes where it is about memory, None where that is not known."""

    name: str  # as people call it, in messages
    cpus: float
    gpus: int = 0
    memory: int | None = None
    gpu_memory: int | None = None  # of each GPU
    id: str = ""  # as Ray calls it


@dataclass(frozen=True, slots=True)
class Inventory:
    """All nodes, the one with the driver first."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)


def this_machine(config: RunConfig, gpus: int | None = None) -> Inventory:
    """What a run with `cluster.address=local` has. `gpus` replaces the number that is found."""
    found = gpu_count() if gpus is None else gpus
    cpus = config.cluster.num_cpus or _cores()
    return Inventory((Node("this machine", cpus, found, _memory(), gpu_memory() if found else None),))


def uniform(nodes: int, cpus: float, gpus: int, memory: int | None, gpu_memory: int | None) -> Inventory:
    """`nodes` machines of a kind; memory in bytes, `gpu_memory` of each GPU."""
    return Inventory(tuple(Node(f"node {i}", cpus, gpus, memory, gpu_memory) for i in range(nodes)))


def _cores() -> int:
    """Cores, as far as a container's limit lets them through."""
    limits = [
        max(1, int(quota) // int(period))
        for quota, period in _cgroup("cpu.max", parts=2)
        if quota.isdigit() and period.isdigit()
    ]
    return min([os.cpu_count() or 1, *limits])


def _memory() -> int:
    """Bytes of main memory, as far as a container's limit lets them through."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(int(limit) for (limit,) in _cgroup("memory.max", parts=1) if limit.isdigit())])


def _cgroup(name: str, parts: int) -> Iterator[list[str]]:
    file = Path("/sys/fs/cgroup") / name
    words = file.read_text().split() if file.is_file() else []
    if len(words) == parts:
        yield words
