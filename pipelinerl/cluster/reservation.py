"""Room for the processes of a run in a running Ray cluster.

The plan is what Ray does: `place` decides on the free resources of every node, and one placement group holds a bundle
for each process, tied to its node by the label that every Ray node carries. It is reserved as a whole or not at all,
and kept while the run lasts, so that a process that died can be started again in its bundle. The bundles of a node that
is lost are lost with it, as Ray has no other node of that label: the processes get another group, by the same way.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelinerl.cluster.placement import Demand, Placement, Process, place
from pipelinerl.config.device import Device
from pipelinerl.config.inventory import Inventory, Node
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem, WorkerDied, first_line

NODE_LABEL = "ray.io/node-id"
RETRY_S = 1.0
ELSEWHERE_S = 10.0  # after which another place is looked for, where somebody was quicker
MARKER = ".driver"  # a file in the log directory by which a node tells that it sees the driver's


@dataclass(frozen=True, slots=True)
class Seat:
    """A process and the bundle that is reserved for it."""

    process: Process
    group: Any
    bundle: int


def cluster_inventory(free: bool) -> Inventory:
    """The living nodes of the cluster, the driver's first, with all they have or what is free of it.

    Memory is left unknown: Ray counts what it lends to tasks, which is not what a machine has.
    """
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeManagerAddress"]))
    now = available_resources_per_node() if free else {}
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    nodes = []
    for node in alive:
        address, number = node["NodeManagerAddress"], node["NodeID"]
        has = now.get(number, {}) if free else node["Resources"]
        name = f"node {address}" + (f" ({number[:6]})" if addresses[address] > 1 else "")
        nodes.append(Node(name, has.get("CPU", 0.0), int(has.get("GPU", 0)), id=number))
    return Inventory(tuple(nodes))


async def reserve(config: RunConfig, device: Device, demand: Demand | None = None) -> tuple[Placement, list[Seat]]:
    """Reserve a bundle for every process. A cluster that is joined gets `cluster.placement_timeout_s` to have room.

    Raises: EnvironmentProblem that says what is missing.
    """
    cluster = config.cluster
    own = cluster.address == "local"
    deadline = time.monotonic() + cluster.placement_timeout_s
    while True:
        placement = place(config, await asyncio.to_thread(cluster_inventory, free=not own), device, demand)
        if not placement.problems:
            left = deadline - time.monotonic()
            group = await _reserved(placement, left if own else min(left, ELSEWHERE_S))
            if group is not None:
                return placement, [Seat(process, group, i) for i, process in enumerate(placement.processes)]
        # A cluster of our own has all it will ever have; another may be starting up, or be busy with an earlier run.
        if own or time.monotonic() + RETRY_S > deadline:
            raise EnvironmentProblem("\n".join(_no_room(config, placement)))
        await asyncio.sleep(RETRY_S)


def release(seats: Collection[Seat], kept: Collection[Seat]) -> None:
    """Give back the groups of `seats` in which none of `kept` has its bundle."""
    used = {seat.group.id for seat in kept}
    for group in {seat.group.id: seat.group for seat in seats if seat.group.id not in used}.values():
        remove_placement_group(group)


async def lost(seats: Sequence[Seat]) -> list[Seat]:
    """Those whose node is no longer in the cluster. Ray notices the sudden end of a node some 15 s late."""
    alive = {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
    return [seat for seat in seats if seat.process.node.id not in alive]


async def watch(seats: Sequence[Seat]) -> None:
    """Look at the nodes of these seats for ever. Raises WorkerDied when one is lost: what is about to start there never
    does, and Ray does not say so."""
    while not (gone := await lost(seats)):
        await asyncio.sleep(RETRY_S)
    process = gone[0].process
    raise WorkerDied(f"{process.name}: {process.node.name} was lost while it started there")


def check_nodes(placement: Placement, logs: Path, inputs: list[str], env: dict[str, str], timeout_s: float) -> None:
    """Have every node but the driver's show that it has the same code, sees `inputs` and can write into `logs`.

    Raises: EnvironmentProblem with a line for every node that cannot.
    """
    here = ray.get_runtime_context().get_node_id()
    marker = logs / MARKER
    marker.write_text(here)
    try:
        calls = {
            node: _on(node, env).remote(str(logs), here, inputs) for node in placement.by_node() if node.id != here
        }
        deadline = time.monotonic() + timeout_s
        found = [_answer(node, call, deadline - time.monotonic()) for node, call in calls.items()]
    finally:
        marker.unlink(missing_ok=True)
    if problems := [line for lines in found for line in lines]:
        raise EnvironmentProblem("\n".join(problems))


def _on(node: Node, env: dict[str, str]) -> Any:
    """`_probe`, to be called on this node."""
    where = NodeAffinitySchedulingStrategy(node.id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "runtime_env": {"env_vars": env}, "scheduling_strategy": where}
    return ray.remote(_probe).options(**options)


def _answer(node: Node, call: Any, timeout_s: float) -> list[str]:
    try:
        return [f"{node.name}: {line}" for line in ray.get(call, timeout=max(0.0, timeout_s))]
    except GetTimeoutError:
        return [f"{node.name}: no process started there within cluster.placement_timeout_s; see Ray's logs on it"]
    except RayTaskError as error:
        hint = "; every node needs this installation at the same path" if isinstance(error.cause, ImportError) else ""
        return [f"{node.name}: a process there failed with {first_line(error.cause)}{hint}"]
    except RayError as error:
        return [f"{node.name}: a process could not be started there: {first_line(error)}"]


def _probe(logs: str, driver: str, inputs: list[str]) -> list[str]:
    """What a node lacks; runs there."""
    marker, problems = Path(logs) / MARKER, []
    for _ in range(20):  # a shared file system may show a new file late
        if marker.is_file():
            break
        time.sleep(0.25)
    if not marker.is_file() or marker.read_text() != driver:
        problems.append(f"{logs} is not the driver's; run_dir must be on storage that all nodes share")
    else:
        trial = Path(logs) / f"{MARKER}.{ray.get_runtime_context().get_node_id()}"
        try:
            trial.write_text("")
            trial.unlink()
        except OSError as error:
            problems.append(f"cannot write into {logs}: {error.strerror}")
    missing = (path for path in inputs if not Path(path).exists())
    return problems + [f"{path} is not there; it must be on storage that all nodes share" for path in missing]


async def _reserved(placement: Placement, patience_s: float) -> Any:
    """The group, or None when it was not to be had for so long: somebody else took the room meanwhile."""
    group = placement_group(
        [process.resources() for process in placement.processes],
        strategy="PACK",  # the selectors leave no choice
        bundle_label_selector=[{NODE_LABEL: process.node.id} for process in placement.processes],
    )
    try:
        async with asyncio.timeout(max(RETRY_S, patience_s)):
            await group.ready()
    except TimeoutError:
        remove_placement_group(group)
        return None
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _no_room(config: RunConfig, placement: Placement) -> list[str]:
    cluster = config.cluster
    if cluster.address == "local":
        return list(placement.problems) or ["Ray did not give this run the resources of its own cluster"]
    problems = placement.problems or ("the room there was, was taken by somebody else every time",)
    waited = f"no room in the cluster at {cluster.address} within cluster.placement_timeout_s="
    return [f"{waited}{cluster.placement_timeout_s:g}: {problem}" for problem in problems]
