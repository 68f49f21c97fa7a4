"""Who sits where: properties over random clusters, and cases worked out by hand."""

import itertools
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.cluster.placement import Demand, Placement, Process, place
from pipelinerl.config.device import Device
from pipelinerl.config.inventory import Inventory, Node, uniform
from pipelinerl.config.schema import RunConfig
from tests.unit.fakes import small_config

BASE = small_config("cluster.device=auto")


def config(
    ranks: int, engines: int, tensor_parallel: int = 1, pipeline_parallel: int = 1, backend: str = "auto"
) -> RunConfig:
    """Copied, not validated: quick, and the number of samples in a step does not limit the ranks."""
    widths = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return BASE.model_copy(
        update={
            "trainer": BASE.trainer.model_copy(update={"ranks": ranks}),
            "engine": BASE.engine.model_copy(update={"count": engines} | widths),
            "weights": BASE.weights.model_copy(update={"backend": backend}),
        }
    )


def gpu_nodes(*gpus: int, cpus: float = 64) -> Inventory:
    return Inventory(tuple(Node(f"n{i}", cpus, count) for i, count in enumerate(gpus)))


def cpu_nodes(*cpus: float) -> Inventory:
    return Inventory(tuple(Node(f"n{i}", count) for i, count in enumerate(cpus)))


def check(placement: Placement, inventory: Inventory, ranks: int, engines: int) -> None:
    """Every process once and in order, and nothing beyond what a node has."""
    names = [f"trainer rank {i}" for i in range(ranks)] + [f"engine {i}" for i in range(engines)]
    assert [process.name for process in placement.processes] == names
    for node, processes in placement.by_node().items():
        assert node in inventory.nodes
        assert round(sum(100 * process.cpus for process in processes)) <= 100 * node.cpus
        assert sum(process.gpus for process in processes) <= node.gpus
        assert all(process.cpus > 0 for process in processes)


def fewest_nodes(units: list[int], ranks: int, engines: int, width: int) -> int:
    """By trying every way to divide the ranks."""
    ways = (
        way
        for way in itertools.product(*(range(min(unit, ranks) + 1) for unit in units))
        if sum(way) == ranks and sum((unit - used) // width for unit, used in zip(units, way, strict=True)) >= engines
    )
    return min(sum(used > 0 for used in way) for way in ways)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_gpus(gpus: list[int], ranks: int, engines: int, width: int) -> None:
    inventory = gpu_nodes(*gpus)
    placement = place(config(ranks, engines, width), inventory, "cuda")
    there_is_room = sum(gpus) >= ranks + engines * width and sum(count // width for count in gpus) >= engines
    if sum(gpus) == 1 and ranks == engines == width == 1:
        assert placement.shares_gpu
        return
    assert bool(placement.problems) != there_is_room
    if not there_is_room:
        assert placement.processes == ()
        assert all("missing" in problem or "room for" in problem for problem in placement.problems)
        assert all(f"n{i} has {count}" in placement.problems[0] for i, count in enumerate(gpus))
        return
    check(placement, inventory, ranks, engines)
    assert [process.gpus for process in placement.processes] == [1] * ranks + [width] * engines
    assert len({process.node for process in placement.trainers}) == fewest_nodes(gpus, ranks, engines, width)
    nodes = [process.node for process in placement.trainers]
    assert [node for node, _ in itertools.groupby(nodes)] == list(dict.fromkeys(nodes)), (
        "ranks of a node are neighbours"
    )
    used = Counter(node.name for node in nodes)
    counts = Counter(process.node.name for process in placement.engines)
    for one, other in itertools.permutations(inventory.nodes, 2):
        full = (other.gpus - used[other.name]) // width == counts[other.name]
        assert counts[one.name] - counts[other.name] <= 1 or full, "engines are even, but where there is no room"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([0, 0.5, 1, 2, 3, 16]), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 2),
)
def test_cores(cpus: list[float], ranks: int, engines: int, width: int) -> None:
    inventory = cpu_nodes(*cpus)
    placement = place(config(ranks, engines, width), inventory, "cpu")
    if not sum(cpus):
        assert "find no room" in placement.problems[0] and "n0 has 0" in placement.problems[0]
        return
    assert placement.problems == ()
    check(placement, inventory, ranks, engines)
    (share,) = {process.cpus for process in placement.trainers}
    assert {round(process.cpus / width, 4) for process in placement.engines} == {share}, "a worker has what a rank has"
    assert share <= 1 and not any(process.gpus for process in placement.processes)
    whole = sum(int(count) for count in cpus) >= ranks + engines * width
    if whole and sum(int(count) // width for count in cpus) >= engines:
        assert share == 1


@pytest.mark.parametrize(
    ("ranks", "engines", "width", "cpus", "share"),
    [
        (1, 1, 1, 2, 1.0),
        (1, 1, 1, 64, 1.0),
        (1, 1, 1, 1, 0.5),
        (1, 2, 1, 2, 0.66),
        (4, 4, 1, 1, 0.12),
        (2, 1, 2, 2, 0.5),
    ],
)
def test_a_worker_gets_a_core_or_its_share_rounded_down(
    ranks: int, engines: int, width: int, cpus: int, share: float
) -> None:
    placement = place(config(ranks, engines, width), cpu_nodes(cpus), "cpu")
    assert [process.cpus for process in placement.processes] == [share] * ranks + [share * width] * engines


def seats(placement: Placement) -> dict[str, str]:
    return {process.name: process.node.name for process in placement.processes}


def test_three_small_nodes_take_ranks_on_one_and_engines_on_the_others() -> None:
    placement = place(config(2, 2), cpu_nodes(1, 2, 1), "cpu")
    assert seats(placement) == {"trainer rank 0": "n1", "trainer rank 1": "n1", "engine 0": "n0", "engine 1": "n2"}


def test_two_nodes_of_eight_gpus() -> None:
    placement = place(config(8, 2, 4), uniform(2, 64, 8, None, None), "cuda")
    assert {name: node for name, node in seats(placement).items() if node == "node 1"} == {
        "engine 0": "node 1",
        "engine 1": "node 1",
    }
    assert placement.processes[0].resources() == {"CPU": 1.0, "GPU": 1.0}
    assert placement.engines[0].resources() == {"CPU": 1.0, "GPU": 4.0}


def test_ranks_use_up_what_is_too_little_for_an_engine() -> None:
    # Engines of 4: only 4 + 4 of the 5 + 5 GPUs are good for one, so the two ranks must take the odd ones.
    placement = place(config(2, 2, 4), gpu_nodes(5, 5), "cuda")
    assert seats(placement) == {"trainer rank 0": "n0", "trainer rank 1": "n1", "engine 0": "n0", "engine 1": "n1"}


def test_the_only_gpu_is_shared() -> None:
    placement = place(config(1, 1), gpu_nodes(0, 1, cpus=4), "cuda")
    assert placement.shares_gpu
    assert [(p.name, p.node.name, p.resources()) for p in placement.processes] == [
        ("trainer rank 0", "n1", {"CPU": 1.0, "GPU": 0.5}),
        ("engine 0", "n1", {"CPU": 1.0, "GPU": 0.5}),
    ]


@pytest.mark.parametrize(
    ("wanted", "inventory", "problems"),
    [
        (
            config(1, 1, backend="nccl"),
            gpu_nodes(1),
            ["weights.backend=nccl: trainer and engine share the only GPU, and NCCL refuses two processes on one; "
             "use weights.backend=auto"],
        ),
        (
            config(2, 1),
            gpu_nodes(1),
            ["3 GPUs needed (engine.count=1 x tensor_parallel=1 + trainer.ranks=2), 2 missing: n0 has 1 (one GPU is "
             "shared only by one rank and one engine of one worker)"],
        ),
        (
            config(4, 4, 2, 2),
            gpu_nodes(8, 3),
            ["20 GPUs needed (engine.count=4 x tensor_parallel=2 x pipeline_parallel=2 + trainer.ranks=4), 9 missing: "
             "n0 has 8, n1 has 3",
             "an engine needs 4 GPUs on one node (tensor_parallel=2 x pipeline_parallel=2), room for 2 of 4 engines: "
             "n0 has 8, n1 has 3"],
        ),
        (
            config(1, 1, 8),
            gpu_nodes(4, 4, 6),
            ["an engine needs 8 GPUs on one node (tensor_parallel=8), 2 missing on the largest: "
             "n0 has 4, n1 has 4, n2 has 6"],
        ),
        (
            config(1, 1),
            gpu_nodes(8, cpus=0),
            ["2 GPUs needed (engine.count=1 x tensor_parallel=1 + trainer.ranks=1), 2 missing: "
             "n0 has 0 (of 8, with 0 cores)"],
        ),
        (
            config(1, 1),
            gpu_nodes(),
            ["2 GPUs needed (engine.count=1 x tensor_parallel=1 + trainer.ranks=1), 2 missing: there is no node"],
        ),
    ],
)  # fmt: skip
def test_what_lacks_is_said(wanted: RunConfig, inventory: Inventory, problems: list[str]) -> None:
    assert place(wanted, inventory, "cuda") == Placement((), tuple(problems))


# Processes whose node is lost, over what is free on the others.


def again(wanted: RunConfig, free: Inventory, device: Device, *names: str) -> Placement:
    """Those of a run that had half a core each for a process, or with a GPU a whole one."""
    cpus, gpus = (1.0, 1) if device == "cuda" else (0.5, 0)
    width = wanted.engine.workers
    ranks = [Process("trainer rank", i, Node("lost", 9), cpus, gpus) for i in range(wanted.trainer.ranks)]
    wide = cpus if gpus else cpus * width
    engines = [Process("engine", i, Node("lost", 9), wide, gpus * width) for i in range(wanted.engine.count)]
    lost = [process for process in [*ranks, *engines] if process.name in names]
    return place(wanted, free, device, Demand.again(wanted, lost))


def test_a_process_that_is_placed_again_keeps_its_name_and_takes_what_it_had() -> None:
    wide = config(4, 3, 2)
    assert seats(again(wide, gpu_nodes(1, 1, 3), "cuda", "engine 1")) == {"engine 1": "n2"}
    ranks = again(wide, gpu_nodes(1, 2), "cuda", "trainer rank 1", "trainer rank 3")
    assert seats(ranks) == {"trainer rank 1": "n1", "trainer rank 3": "n1"}
    (engine,) = again(wide, cpu_nodes(0.9, 8), "cpu", "engine 2").processes
    assert (engine.node.name, engine.cpus) == ("n1", 1.0), "two workers of half a core, though there is more"
    (rank,) = again(wide, gpu_nodes(1, cpus=0.25), "cuda", "trainer rank 0").processes
    assert rank.resources() == {"CPU": 0.25, "GPU": 1.0}, "its cores do not keep it from a GPU"
    alone = again(config(1, 1), gpu_nodes(1), "cuda", "engine 0")
    assert not alone.shares_gpu, "the rank has its own elsewhere"


@pytest.mark.parametrize(
    ("device", "names", "free", "problems"),
    [
        (
            "cuda",
            ["engine 1"],
            gpu_nodes(1, 1),
            ["an engine needs 2 GPUs on one node (tensor_parallel=2), 1 missing on the largest: n0 has 1, n1 has 1"],
        ),
        (
            "cuda",
            ["engine 1"],
            gpu_nodes(1, 0),
            ["2 GPUs needed (engine 1 x tensor_parallel=2), 1 missing: n0 has 1, n1 has 0 (one GPU is shared only by "
             "one rank and one engine of one worker)",
             "an engine needs 2 GPUs on one node (tensor_parallel=2), 1 missing on the largest: n0 has 1, n1 has 0"],
        ),
        (
            "cuda",
            ["trainer rank 1", "trainer rank 2"],
            gpu_nodes(0),
            ["2 GPUs needed (trainer rank 1 and trainer rank 2), 2 missing: n0 has 0"],
        ),
        (
            "cpu",
            ["trainer rank 1"],
            cpu_nodes(0.4),
            ["1 process finds no room on cores, at least 0.5 of one for each: n0 has 0.4"],
        ),
    ],
)  # fmt: skip
def test_what_lacks_for_processes_that_lost_their_node_is_said(
    device: Device, names: list[str], free: Inventory, problems: list[str]
) -> None:
    assert again(config(4, 3, 2), free, device, *names) == Placement((), tuple(problems))


def test_a_node_with_few_cores_divides_them() -> None:
    placement = place(config(4, 4), gpu_nodes(8, cpus=4), "cuda")
    assert {process.cpus for process in placement.processes} == {0.5}


def test_hundreds_of_nodes_are_placed_at_once() -> None:
    placement = place(config(512, 192, 4), gpu_nodes(*[8] * 160), "cuda")
    assert len({process.node for process in placement.trainers}) == 64  # 512 / 8
    assert set(Counter(process.node for process in placement.engines).values()) == {2}


def test_a_placement_does_not_change() -> None:
    process = Process("engine", 0, Node("n", 1), 1.0, 0)
    with pytest.raises(FrozenInstanceError):
        process.cpus = 2.0  # type: ignore[misc]
