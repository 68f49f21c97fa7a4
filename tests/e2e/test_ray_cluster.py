"""The real command on a Ray cluster of three nodes, which it joins. They share this machine, but Ray does not know."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelinerl.errors import EXIT_ENVIRONMENT, EXIT_SIGTERM
from pipelinerl.metrics.log import read_metrics
from tests.e2e.harness import TrainCommand
from tests.e2e.test_faults import ledger_of

TOKEN = "0123456789abcdef" * 4
OURS = ("ray::_SyncHost", "ray::_AsyncHost", "VLLM::", "grader_child")  # what a run starts on nodes
TINY = ["steps=100000", "batch.groups_per_step=4", "batch.group_size=4", "engine.kv_cache_mb=64", "checkpoint.every=3"]
TINY += ["eval.at_start=false", "eval.at_end=false", "parity.preflight=off", "metrics.plots=false"]
BOUND_S = 120  # from the loss of a node to steps with all engines; another node joins meanwhile


class Nodes:
    """Three nodes with two, one and one cores, for holders of a token."""

    def __init__(self, folder: Path):
        self._seen: set[psutil.Process] = set()
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_raylet_start_wait_time_s": "120"}
        env |= {"RAY_health_check_period_ms": "1000"}  # a lost node is noticed after 5 s, not 15
        self._errors = (folder / "nodes.err").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.ray_nodes", "2", "1", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | env,
        )
        assert self.process.stdout is not None
        addresses = (line.split()[1] for line in self.process.stdout if line.startswith("address "))
        self.address = next(addresses, "")
        assert self.address, (folder / "nodes.err").read_text()

    def started(self) -> list[str]:
        """Titles of the living processes that runs have started on the nodes."""
        self._seen.update(psutil.Process(self.process.pid).children(recursive=True))
        titles = (_title(process) for process in self._seen)
        return [title for title in titles if any(name in title for name in OURS)]

    def exchange(self, node: str, cores: int) -> None:
        """Kill a node, all its processes at once, and add another one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"exchange {node} {cores}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.started()
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            for process in [self.process, *self._seen]:
                if process.pid != os.getpid() and psutil.pid_exists(process.pid):
                    process.kill()
            self._errors.close()


def _title(process: psutil.Process) -> str:
    """Its title; nothing when it is dead."""
    try:
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return " ".join([process.name(), *process.cmdline()]) if alive else ""
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    nodes.close()


def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, address: str, token: str, *overrides: str
) -> TrainCommand:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    joins = ["cluster=ray_cpu", f"cluster.address={address}", f"model.path={model}"]
    return TrainCommand(tmp_path / "run", [*joins, *TINY, *overrides])


def placement_of(run: TrainCommand) -> dict[str, str]:
    placed: dict[str, str] = json.loads((run.run_dir / "settings.json").read_text())["placement"]
    return placed


def is_whole_again(run: TrainCommand) -> float:
    """Seconds until three steps were done with two engines, after engine 1 was started again."""
    begin = time.monotonic()
    run.wait_for_line("engine 1: started again", BOUND_S)

    def all_serve() -> bool:
        last = [r for r in read_metrics(run.run_dir / "metrics.jsonl") if r["kind"] == "train"][-3:]
        return [(record["fleet/engines"], record["fleet/restarts"] > 0) for record in last] == [(2, True)] * 3

    run.wait_until(all_serve, "three steps with two engines", BOUND_S - (time.monotonic() - begin))
    return round(time.monotonic() - begin, 1)


def test_ranks_are_packed_engines_spread_one_moves_when_its_node_is_lost_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: Path, nodes: Nodes
) -> None:
    two_of_both = ("engine.count=2", "trainer.ranks=2")
    run = start(tmp_path, monkeypatch, random_model, nodes.address, TOKEN, *two_of_both)
    try:
        run.wait_for_step(3)
        seen = nodes.started()
        assert len([title for title in seen if "Host" in title]) == 4 and any("VLLM::" in title for title in seen), seen
        placed = placement_of(run)
        assert placed["trainer rank 0"] == placed["trainer rank 1"], "packed on the node with two cores"
        assert len(set(placed.values())) == 3, placed

        [lost] = re.findall(r"\((\w+)\)", placed["engine 1"])
        nodes.exchange(lost, cores=1)
        print(f"whole again {is_whole_again(run)} s after the loss of a node")
        moved = placement_of(run)
        assert moved["engine 1"] not in placed.values() and f"engine 1 moved to {moved['engine 1']}\n" in run.output
        assert {**moved, "engine 1": placed["engine 1"]} == placed, "nobody else moved"
        assert len([title for title in nodes.started() if "AsyncHost" in title]) == 2, (
            "nothing of the lost node is left"
        )

        run.process.terminate()
        assert run.exit_code(BOUND_S) == EXIT_SIGTERM, run.output
        ledger_of(run.run_dir)
        records = [r for r in read_metrics(run.run_dir / "metrics.jsonl") if r["kind"] == "train"]
        assert all(record["optim/skipped"] == 0 for record in records)
        assert run.leftovers() == []
        until = time.monotonic() + 15
        while nodes.started() and time.monotonic() < until:
            time.sleep(0.2)
        assert nodes.started() == []
    finally:
        run.close()


def test_a_wrong_token_keeps_a_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: Path, nodes: Nodes
) -> None:
    run = start(tmp_path, monkeypatch, random_model, nodes.address, "f" * 64)
    try:
        assert run.exit_code(120) == EXIT_ENVIRONMENT, run.output
        errors = [line for line in run.output.splitlines() if line.startswith("pipelinerl: error:")]
        hint = "the cluster there did not take our token, or we have none: set RAY_AUTH_MODE=token"
        assert len(errors) == 1 and hint in errors[0], run.output
        assert nodes.started() == [] and run.leftovers() == []
    finally:
        run.close()
