"""What a Ray cluster is asked and what its nodes have to show, without a cluster: Ray's answers are given."""

import asyncio
import errno
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import ray

from pipelinerl.cluster import ray_cluster, remote, reservation
from pipelinerl.config.inventory import Node
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem
from tests.integration.models import run_config
from tests.unit.fakes import until


def answers(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], free: dict[str, dict[str, float]]) -> None:
    context = SimpleNamespace(get_node_id=lambda: "driver")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(reservation, "available_resources_per_node", lambda: free)


def alive(number: str, address: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": number, "NodeManagerAddress": address, "Alive": True, "Resources": resources}


def test_nodes_are_those_alive_the_drivers_first_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"NodeID": "gone", "NodeManagerAddress": "10.0.0.1", "Alive": False, "Resources": {}}
    nodes = [gone, alive("aaaaaaaa", "10.0.0.3", CPU=8, GPU=4), alive("driver", "10.0.0.9", CPU=4)]
    nodes.append(alive("bbbbbbbb", "10.0.0.3", CPU=2))
    answers(monkeypatch, nodes, {"aaaaaaaa": {"CPU": 7.5, "GPU": 2.5}, "driver": {"CPU": 4.0}, "bbbbbbbb": {}})
    assert reservation.cluster_inventory(free=True).nodes == (
        Node("node 10.0.0.9", 4.0, 0, id="driver"),
        Node("node 10.0.0.3 (aaaaaa)", 7.5, 2, id="aaaaaaaa"),  # half a GPU is none
        Node("node 10.0.0.3 (bbbbbb)", 0.0, 0, id="bbbbbbbb"),  # Ray leaves out what is used up
    )
    assert reservation.cluster_inventory(free=False).gpus == 4


def test_a_node_that_sees_everything_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [], {})
    (tmp_path / reservation.MARKER).write_text("driver")
    assert reservation._probe(str(tmp_path), "driver", [str(tmp_path)]) == []
    assert [file.name for file in tmp_path.iterdir()] == [reservation.MARKER], "its trial file is gone"


def test_a_node_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [], {})
    monkeypatch.setattr(reservation.time, "sleep", lambda _: None)
    shared = "it must be on storage that all nodes share"
    elsewhere = f"{tmp_path} is not the driver's; run_dir must be on storage that all nodes share"
    assert reservation._probe(str(tmp_path), "driver", ["/nowhere/model"]) == [
        elsewhere,
        f"/nowhere/model is not there; {shared}",
    ]
    (tmp_path / reservation.MARKER).write_text("another driver")  # the same path on another disk
    assert reservation._probe(str(tmp_path), "driver", []) == [elsewhere]

    def full(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / reservation.MARKER).write_text("driver")
    monkeypatch.setattr(Path, "write_text", full)
    assert reservation._probe(str(tmp_path), "driver", []) == [f"cannot write into {tmp_path}: Read-only file system"]


def test_a_port_that_takes_connections_is_told_from_one_that_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert ray_cluster._listens(address)
    assert not ray_cluster._listens(address)
    assert not ray_cluster._listens("auto")


def test_workers_elsewhere_get_the_drivers_settings_and_none_of_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "NCCL_SOCKET_IFNAME", "HF_TOKEN", "VLLM_API_KEY", "AWS_PROFILE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, name.lower())
    forwarded = ray_cluster._forwarded()
    assert forwarded["HF_HOME"] == "hf_home" and forwarded["NCCL_SOCKET_IFNAME"] == "nccl_socket_ifname"
    assert not {"HF_TOKEN", "VLLM_API_KEY", "AWS_PROFILE", "RAY_AUTH_TOKEN"} & forwarded.keys()


def joined(timeout_s: float) -> RunConfig:
    """Two ranks and two engines on a cluster that is joined."""
    cluster = {"address": "10.0.0.1:6379", "placement_timeout_s": timeout_s}
    return run_config(Path("a/model"), trainer={"ranks": 2}, engine={"count": 2}, cluster=cluster)


async def test_room_that_lacks_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [alive("driver", "10.0.0.1", CPU=0.0)], {"driver": {}})
    expected = (
        r"^no room in the cluster at 10\.0\.0\.1:6379 within cluster\.placement_timeout_s=0\.2: 4 processes find "
        r"no room on cores, at least 0\.01 of one for each: node 10\.0\.0\.1 has 0$"
    )
    with pytest.raises(EnvironmentProblem, match=expected):
        await reservation.reserve(joined(0.2), "cpu")


async def test_a_node_that_comes_late_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, free = [alive("driver", "10.0.0.1")], {"driver": dict[str, float]()}
    answers(monkeypatch, nodes, free)
    monkeypatch.setattr(reservation, "RETRY_S", 0.05)
    asked: list[Any] = []

    class Group:
        def __init__(self, bundles: Any, strategy: str, bundle_label_selector: Any):
            asked.append((bundles, bundle_label_selector))

        async def ready(self) -> None: ...

    monkeypatch.setattr(reservation, "placement_group", Group)
    waiting = asyncio.create_task(reservation.reserve(joined(30), "cpu"))
    await asyncio.sleep(0.2)
    assert not waiting.done() and asked == []
    nodes.append(alive("late", "10.0.0.2", CPU=8))
    free["late"] = {"CPU": 8.0}
    placement, seats = await waiting
    assert [(seat.process, seat.bundle) for seat in seats] == list(zip(placement.processes, range(4), strict=True))
    assert asked == [([{"CPU": 1.0}] * 4, [{"ray.io/node-id": "late"}] * 4)]


# A node that is lost


class Groups:
    """Placement groups, all of which Ray can give: their bundles' nodes, and which of them were given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[list[str]] = []
        self.removed: list[int] = []
        monkeypatch.setattr(reservation, "placement_group", self._make)
        monkeypatch.setattr(reservation, "remove_placement_group", lambda group: self.removed.append(group.id))

    def _make(self, bundles: Any, strategy: str, bundle_label_selector: list[dict[str, str]]) -> Any:
        async def ready() -> None: ...

        self.made.append([selector[reservation.NODE_LABEL] for selector in bundle_label_selector])
        return SimpleNamespace(id=len(self.made) - 1, ready=ready)


@dataclass
class Started:
    """A process that comes up at once, or, on a node of `dying`, never."""

    node: str
    dying: set[str]
    killed: bool = False

    async def endpoint(self, timeout_s: float) -> tuple[str, int]:
        await asyncio.sleep(60 if self.node in self.dying else 0)
        return self.node, 1

    def kill(self) -> None:
        self.killed = True


@dataclass
class Joined:
    """A cluster of fake nodes with two ranks on `two` and an engine each on `driver` and `one`."""

    cluster: ray_cluster.RayCluster
    groups: Groups
    nodes: list[dict[str, Any]]
    free: dict[str, dict[str, float]]
    checked: list[list[str]]
    started: list[tuple[str, str]] = field(default_factory=list)
    dying: set[str] = field(default_factory=set)

    def lose(self, number: str) -> None:
        next(node for node in self.nodes if node["NodeID"] == number)["Alive"] = False

    def join(self, number: str, cpus: float) -> None:
        self.nodes.append(alive(number, number, CPU=cpus))
        self.free[number] = {"CPU": cpus}

    def start(self, seat: reservation.Seat, *args: Any, **options: Any) -> Any:
        self.started.append((seat.process.name, seat.process.node.id))
        return Started(seat.process.node.id, self.dying)


@pytest_asyncio.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Joined:
    cpus = {"driver": 1.0, "two": 2.0, "one": 1.0}
    nodes, free = (
        [alive(name, name, CPU=count) for name, count in cpus.items()],
        {name: {"CPU": count} for name, count in cpus.items()},
    )
    answers(monkeypatch, nodes, free)
    monkeypatch.setattr(reservation, "RETRY_S", 0.05)
    checked: list[list[str]] = []
    looks = lambda placement, *_: checked.append([node.id for node in placement.by_node()])  # noqa: E731
    monkeypatch.setattr(ray_cluster, "check_nodes", looks)
    cluster = ray_cluster.RayCluster(joined(0.5), tmp_path)
    joins = Joined(cluster, Groups(monkeypatch), nodes, free, checked)
    monkeypatch.setattr(cluster, "_start", joins.start)
    await cluster.reserve()
    free |= {name: {} for name in cpus}
    return joins


async def test_a_process_is_started_again_in_its_place_and_elsewhere_when_the_node_is_gone(run: Joined) -> None:
    moved: list[str] = []
    run.cluster.listener = lambda process: moved.append(f"{process.name} -> {process.node.name}")
    config = joined(0.5)
    await run.cluster.start_engine(1, config)
    run.lose("one")
    run.join("spare", 4)
    await run.cluster.start_engine(1, config)
    await run.cluster.start_engine(1, config)
    assert run.started == [("engine 1", "one"), ("engine 1", "spare"), ("engine 1", "spare")]
    assert run.groups.made == [["two", "two", "driver", "one"], ["spare"]] and moved == ["engine 1 -> node spare"]
    assert run.checked[1:] == [["spare"]], "as at the start, before a process is there"
    assert run.cluster.places()["engine 1"] == "node spare"
    run.lose("spare")
    run.join("last", 4)
    await run.cluster.start_engine(1, config)
    assert run.groups.removed == [1], "the first group has the others, the second nobody"


async def test_ranks_move_together_and_only_those_whose_node_is_gone(run: Joined) -> None:
    run.lose("two")
    run.join("small", 1)
    run.join("large", 2)
    await run.cluster.start_ranks()
    assert run.started == [("trainer rank 0", "large"), ("trainer rank 1", "large")]
    assert run.groups.made[1:] == [["large", "large"]] and run.groups.removed == []


async def test_without_room_a_start_fails_and_the_next_one_may_find_some(run: Joined) -> None:
    run.lose("one")
    lacks = r"no room in the cluster .* within cluster\.placement_timeout_s=0\.5: 1 process finds no room on cores"
    with pytest.raises(EnvironmentProblem, match=lacks):
        await run.cluster.start_engine(1, joined(0.5))
    run.join("back", 1)
    await run.cluster.start_engine(1, joined(0.5))
    assert run.started == [("engine 1", "back")]


async def test_a_node_that_is_not_fit_gets_no_process(run: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(*_: Any) -> None:
        raise EnvironmentProblem("node other: the model is not there")

    monkeypatch.setattr(ray_cluster, "check_nodes", unfit)
    run.lose("one")
    run.join("other", 1)
    with pytest.raises(EnvironmentProblem, match="the model is not there"):
        await run.cluster.start_engine(1, joined(0.5))
    assert run.started == [] and run.groups.removed == [1] and run.cluster.places()["engine 1"] == "node one"


async def test_a_node_that_is_lost_during_a_start_does_not_hold_it_up(run: Joined) -> None:
    run.dying.add("one")
    starting = asyncio.create_task(run.cluster.start_engine(1, joined(30)))
    await until(lambda: run.started == [("engine 1", "one")])
    run.join("spare", 1)
    run.lose("one")
    worker: Any = await asyncio.wait_for(starting, 5)
    assert run.started[1:] == [("engine 1", "spare")] and not worker.killed


@pytest.mark.parametrize(("address", "chosen"), [("10.1.2.3", "ib0"), ("127.0.0.1", "lo"), ("10.9.9.9", None)])
def test_gloo_is_bound_to_the_interface_with_the_nodes_address(
    monkeypatch: pytest.MonkeyPatch, address: str, chosen: str | None
) -> None:
    interfaces = {"lo": "127.0.0.1", "eth0": "192.168.0.2", "ib0": "10.1.2.3"}
    table = {name: [SimpleNamespace(address=ip)] for name, ip in interfaces.items()}
    monkeypatch.setattr(remote.psutil, "net_if_addrs", lambda: table)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    environment: dict[str, str] = {}
    monkeypatch.setattr(remote.os, "environ", environment)
    remote._talk_over_the_nodes_interface()
    assert environment.get("GLOO_SOCKET_IFNAME") == chosen
    environment["GLOO_SOCKET_IFNAME"] = "mine"
    remote._talk_over_the_nodes_interface()
    assert environment["GLOO_SOCKET_IFNAME"] == "mine", "what the user sets stays"
