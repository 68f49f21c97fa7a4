"""Who sits where: from configuration and inventory to a node, cores and GPUs for every process. Pure.

Rules. A process has its devices to itself: a GPU per trainer rank and per engine worker (`engine.workers` = TP x PP),
on a CPU a core each, or the same fraction of one where there are fewer cores. The workers of an engine are on one
node. Trainer ranks are packed onto as few nodes as leave room for the engines, in order of rank; engines are spread
evenly over the room that is left. Where the cluster has one GPU, one rank and one engine share it. Processes whose node
is lost are placed anew by the same rules, over what is free on the others.

A unit is what a worker needs: a GPU, or on a CPU a share of a core. With `u` units on a node there is room for
`u // workers` engines, and ranks fill up what is left over, so everything fits exactly if both the engines and the sum
of the units do.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelinerl.config.device import Device
from pipelinerl.config.inventory import Inventory, Node
from pipelinerl.config.schema import RunConfig

Role = Literal["trainer rank", "engine"]
HUNDREDTHS = 100  # Ray counts fractions of a core; more digits than two would only be noise


@dataclass(frozen=True, slots=True)
class Process:
    """A process, and the part of a node that is its own."""

    role: Role
    index: int  # among those of its role
    node: Node
    cpus: float
    gpus: float  # 0.5 where two share the only one

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    def resources(self) -> dict[str, float]:
        """As Ray names them."""
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})


@dataclass(frozen=True, slots=True)
class Placement:
    """Every process, trainer ranks first and both in order; none where there are `problems`, which say what lacks."""

    processes: tuple[Process, ...]
    problems: tuple[str, ...] = ()

    @property
    def trainers(self) -> tuple[Process, ...]:
        return tuple(process for process in self.processes if process.role == "trainer rank")

    @property
    def engines(self) -> tuple[Process, ...]:
        return tuple(process for process in self.processes if process.role == "engine")

    @property
    def shares_gpu(self) -> bool:
        """Whether trainer and engine are on one GPU."""
        return any(0 < process.gpus < 1 for process in self.processes)

    def by_node(self) -> dict[Node, list[Process]]:
        """The processes of every node that has any."""
        found: dict[Node, list[Process]] = {}
        for process in self.processes:
            found.setdefault(process.node, []).append(process)
        return found


@dataclass(frozen=True, slots=True)
class Demand:
    """Which processes are to be placed: the indices of trainer ranks and of engines."""

    ranks: tuple[int, ...]
    engines: tuple[int, ...]
    width: int  # workers of an engine
    share: float | None = None  # of a core that each had before: a worker on a CPU, a process with a GPU

    @classmethod
    def of(cls, config: RunConfig, engines: bool = True, trainer: bool = True) -> "Demand":
        """Of a run; without `engines`, or without `trainer`, of a command that has none of those."""
        ranks, count = config.trainer.ranks * trainer, config.engines * engines
        return cls(tuple(range(ranks)), tuple(range(count)), config.engine.workers)

    @classmethod
    def again(cls, config: RunConfig, lost: Sequence[Process]) -> "Demand":
        """Of the processes of a run that have lost their places. Each takes what it had; with a GPU, fewer cores do."""
        ranks = tuple(process.index for process in lost if process.role == "trainer rank")
        engines = tuple(process.index for process in lost if process.role == "engine")
        width = config.engine.workers
        shares = (p.cpus / width if p.role == "engine" and not p.gpus else p.cpus for p in lost)
        return cls(ranks, engines, width, max(shares))

    @property
    def units(self) -> int:
        """GPUs, or shares of cores, where each worker has its own."""
        return len(self.ranks) + len(self.engines) * self.width


def place(config: RunConfig, inventory: Inventory, device: Device, demand: Demand | None = None) -> Placement:
    """Place all processes of a run, or those of `demand`, or say what the inventory lacks."""
    demand = demand or Demand.of(config)
    ranks, engines, width = len(demand.ranks), len(demand.engines), demand.width
    nodes = inventory.nodes
    if device == "cpu":
        return _place_on_cores(demand, nodes)
    # A GPU without a hundredth of a core for the process that drives it is of no use.
    units = [min(node.gpus, int(HUNDREDTHS * node.cpus)) for node in nodes]
    if sum(units) == 1 and (ranks, engines, width) == (1, 1, 1):
        return _on_one_gpu(config, nodes[units.index(1)])
    if problems := tuple(_shortfalls(config, demand, nodes, units)):
        return Placement((), problems)
    seats = _seats(units, ranks, engines, width)
    counts = Counter([*seats.ranks, *seats.engines])
    cpus = [min(demand.share or 1.0, _share(node.cpus, counts[i])) for i, node in enumerate(nodes)]
    trainers = (Process("trainer rank", i, nodes[at], cpus[at], 1) for i, at in _zip(demand.ranks, seats.ranks))
    rollout = (Process("engine", i, nodes[at], cpus[at], width) for i, at in _zip(demand.engines, seats.engines))
    return Placement((*trainers, *rollout))


def _on_one_gpu(config: RunConfig, node: Node) -> Placement:
    if config.weights.backend == "nccl":
        return Placement(
            (),
            (
                "weights.backend=nccl: trainer and engine share the only GPU, and NCCL refuses two processes on one; "
                "use weights.backend=auto",
            ),
        )
    cpus = _share(node.cpus, 2)
    return Placement((Process("trainer rank", 0, node, cpus, 0.5), Process("engine", 0, node, cpus, 0.5)))


def _place_on_cores(demand: Demand, nodes: Sequence[Node]) -> Placement:
    """The largest share of a core, up to a whole one, with which every process finds room, or the demand's."""
    ranks, engines, width = len(demand.ranks), len(demand.engines), demand.width
    hundredths = [int(HUNDREDTHS * node.cpus) for node in nodes]
    shares = range(HUNDREDTHS, 0, -1) if demand.share is None else [round(HUNDREDTHS * demand.share)]
    for share in shares:
        units = [count // share for count in hundredths]
        if _fits(units, ranks, engines, width):
            seats = _seats(units, ranks, engines, width)
            cpus, wide = share / HUNDREDTHS, round(share * width / HUNDREDTHS, 2)
            trainers = (Process("trainer rank", i, nodes[at], cpus, 0) for i, at in _zip(demand.ranks, seats.ranks))
            rollout = (Process("engine", i, nodes[at], wide, 0) for i, at in _zip(demand.engines, seats.engines))
            return Placement((*trainers, *rollout))
    cores = ", ".join(f"{node.name} has {node.cpus:g}" for node in nodes) or "there is no node"
    workers = demand.units
    who = f"{workers} processes find" if workers > 1 else "1 process finds"
    return Placement((), (f"{who} no room on cores, at least {shares[-1] / HUNDREDTHS:g} of one for each: {cores}",))


def _zip(indices: Sequence[int], nodes: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(indices, nodes, strict=True)


def _share(cpus: float, processes: int) -> float:
    """Cores of each of so many processes on a node, at most one, rounded down."""
    return min(1.0, int(HUNDREDTHS * cpus / max(processes, 1)) / HUNDREDTHS)


@dataclass(frozen=True, slots=True)
class _Seats:
    """The index of the node of every rank and of every engine."""

    ranks: list[int]
    engines: list[int]


def _fits(units: Sequence[int], ranks: int, engines: int, width: int) -> bool:
    return sum(unit // width for unit in units) >= engines and sum(units) >= engines * width + ranks


def _seats(units: Sequence[int], ranks: int, engines: int, width: int) -> _Seats:
    """Ranks on as few nodes as possible, engines as evenly as the rest allows."""
    taken = _ranks_per_node(units, ranks, engines, width)
    room = [(unit - used) // width for unit, used in zip(units, taken, strict=True)]
    counts = [0] * len(units)
    order = []
    for _ in range(engines):
        free = (i for i in range(len(units)) if counts[i] < room[i])
        at = min(free, key=lambda i: (counts[i], taken[i], i))
        counts[at] += 1
        order.append(at)
    return _Seats([i for i, used in enumerate(taken) for _ in range(used)], order)


def _ranks_per_node(units: Sequence[int], ranks: int, engines: int, width: int) -> list[int]:
    """How many ranks each node takes."""
    taken = [0] * len(units)
    chosen = _nodes_for_ranks(units, ranks, engines, width)
    for i in chosen:  # first what is too little for another engine anyway
        taken[i] = min(units[i] % width, ranks - sum(taken))
    for i in chosen:
        taken[i] += min(units[i] - taken[i], ranks - sum(taken))
    return taken


def _nodes_for_ranks(units: Sequence[int], ranks: int, engines: int, width: int) -> list[int]:
    """The smallest set of nodes that can hold all ranks and leaves room for all engines.

    Ranks cost no engine its place as long as they sit where another engine would not fit anyway; the others cost one
    place for every `width` of them. So a set is good if its units hold the ranks, and its odd units enough of them.
    """
    spare_places = sum(unit // width for unit in units) - engines
    odd_needed = max(0, ranks - width * spare_places)
    # For every number of nodes and of odd units (no more than needed): the most units, and the nodes that have them.
    best: list[dict[int, tuple[int, list[int]]]] = [{0: (0, [])}]
    for i, unit in enumerate(units):
        best.append({})
        for size in range(len(best) - 2, -1, -1):
            for odd, (total, nodes) in best[size].items():
                state = min(odd_needed, odd + unit % width)
                if total + unit > best[size + 1].get(state, (-1, []))[0]:
                    best[size + 1][state] = (total + unit, [*nodes, i])
    sets = (states[odd_needed] for states in best if odd_needed in states)
    return next(nodes for total, nodes in sets if total >= ranks)


def _shortfalls(config: RunConfig, demand: Demand, nodes: Sequence[Node], units: Sequence[int]) -> Iterator[str]:
    """What is missing, if anything: GPUs altogether, or enough of them on one node."""
    ranks, engines, width = len(demand.ranks), len(demand.engines), demand.width
    have = ", ".join(
        f"{node.name} has {unit}" + (f" (of {node.gpus}, with {node.cpus:g} cores)" if unit < node.gpus else "")
        for node, unit in zip(nodes, units, strict=True)
    )
    have = have or "there is no node"
    factors = f"tensor_parallel={config.engine.tensor_parallel}"
    if config.engine.pipeline_parallel > 1:
        factors += f" x pipeline_parallel={config.engine.pipeline_parallel}"
    needed, total = demand.units, sum(units)
    if needed > total:
        one = " (one GPU is shared only by one rank and one engine of one worker)" if total == 1 else ""
        terms = [f"{_engines(config, demand)} x {factors}"] * bool(engines) + [_ranks(config, demand)] * bool(ranks)
        yield f"{needed} GPUs needed ({' + '.join(terms)}), {needed - total} missing: {have}{one}"
    places = sum(unit // width for unit in units)
    if width > 1 and places < engines:
        most = max(units, default=0)
        lack = f"{width - most} missing on the largest" if most < width else f"room for {places} of {engines} engines"
        yield f"an engine needs {width} GPUs on one node ({factors}), {lack}: {have}"


def _engines(config: RunConfig, demand: Demand) -> str:
    """As settings where it is all engines, else by name."""
    if len(demand.engines) < config.engines:
        return " and ".join(f"engine {index}" for index in demand.engines)
    count = f"engine.count={config.engine.count}"
    return f"({count} + 1 to evaluate)" if config.engines > config.engine.count else count


def _ranks(config: RunConfig, demand: Demand) -> str:
    if len(demand.ranks) < config.trainer.ranks:
        return " and ".join(f"trainer rank {index}" for index in demand.ranks)
    return f"trainer.ranks={config.trainer.ranks}"
