"""Whether a run fits the hardware there is: everyone has a place, and every place enough memory. Starts nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelinerl.cluster.placement import Demand, Placement, Process, place
from pipelinerl.config.device import Device, resolve_device
from pipelinerl.config.footprint import Footprint, footprint
from pipelinerl.config.inventory import Inventory, Node, this_machine
from pipelinerl.config.memory import Need, engine_need, trainer_need
from pipelinerl.config.quantity import in_bytes
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem


@dataclass(frozen=True, slots=True)
class Fit:
    """A placement and what it needs. `problems` keep a run from starting; `warnings` are about estimates."""

    device: Device
    placement: Placement
    size: Footprint | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def fit(config: RunConfig, inventory: Inventory, demand: Demand | None = None) -> Fit:
    """Place the processes of `config`, or those of `demand`, and add up what they need on every device and node.

    Raises: EnvironmentProblem when the model directory is there but damaged.
    """
    device = resolve_device(config, inventory.gpus)
    placement = place(config, inventory, device, demand)
    size = footprint(config)
    problems, warnings = list(placement.problems), list[str]()
    if size is not None:
        for node, processes in placement.by_node().items():
            for found, certain in _overflows(config, device, size, node, processes):
                (problems if certain else warnings).append(found)
    return Fit(device, placement, size, tuple(dict.fromkeys(problems)), tuple(dict.fromkeys(warnings)))


def require_fit(config: RunConfig, demand: Demand | None = None) -> None:
    """Raise EnvironmentProblem when this machine is certain to be too small for a run of its own.

    What a cluster has is known only after it has been joined: see RayCluster.reserve.
    """
    if config.cluster.address == "local" and (problems := fit(config, this_machine(config), demand).problems):
        raise EnvironmentProblem("\n".join(problems))


def need_of(process: Process, config: RunConfig, device: Device, size: Footprint) -> Need:
    """Memory of one process where it sits."""
    if process.role == "engine":
        return engine_need(config, size, device, process.node.gpu_memory)
    return trainer_need(config, size, device)


def _overflows(
    config: RunConfig, device: Device, size: Footprint, node: Node, processes: Sequence[Process]
) -> Iterator[tuple[str, bool]]:
    """What of a node is too small, and whether that is certain."""
    needs = [(process, need_of(process, config, device, size)) for process in processes]
    if device == "cuda":
        together = [needs] if any(0 < process.gpus < 1 for process in processes) else [[one] for one in needs]
        for members in together:
            who = " and ".join(process.name for process, _ in members)
            yield from _overflow(
                f"{node.name}, GPU of {who}", node.gpu_memory, [(process, need, 1, False) for process, need in members]
            )
        yield from _overflow(f"{node.name}, host memory", node.memory, [(p, need, 0, True) for p, need in needs])
    else:
        yield from _overflow(f"{node.name}, memory", node.memory, [(p, n, n.devices, True) for p, n in needs])
    if device == "cuda" and node.gpu_memory is not None and config.engine.kv_cache_mb is None:
        limit = int(config.engine.gpu_memory_utilization * node.gpu_memory)
        weights = size.engine_weights // config.engine.workers
        if weights >= limit and any(process.role == "engine" for process in processes):
            yield (
                f"{node.name}: will not fit: the weights of an engine take {in_bytes(weights)} of each GPU, and "
                f"engine.gpu_memory_utilization={config.engine.gpu_memory_utilization:g} gives it {in_bytes(limit)}; "
                "raise engine.tensor_parallel",
                True,
            )


def _overflow(
    where: str, there: int | None, parts: Sequence[tuple[Process, Need, int, bool]]
) -> Iterator[tuple[str, bool]]:
    """`parts`: process, need, how many of its devices count here, and whether its host memory does."""
    if there is None:
        return
    for certain in (True, False):
        sums = [
            (process.name, devices * need.on_device(certain) + (need.on_host(certain) if host else 0))
            for process, need, devices, host in parts
        ]
        total = sum(size for _, size in sums)
        if total > there:
            verdict = "will not fit" if certain else "may not fit (estimated)"
            shown = " + ".join(f"{name} {in_bytes(size)}" for name, size in sums)
            yield f"{where}: {verdict}: {shown} needed, {in_bytes(there)} there", certain
            return
