"""What a Ray cluster is asked and what its nodes have to show, without a cluster: Ray's answers are given."""

import asyncio
import errno
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipelinerl.cluster import ray_cluster, remote, reservation
from pipelinerl.config.inventory import Node
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem
from tests.integration.models import run_config


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
