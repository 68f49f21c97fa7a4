"""The real command on a Ray cluster of three nodes, which it joins. They share this machine, but Ray does not know."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelinerl.errors import EXIT_DONE, EXIT_ENVIRONMENT
from tests.e2e.harness import TrainCommand

TOKEN = "0123456789abcdef" * 4
OURS = ("ray::_Host", "ray::_AsyncHost", "VLLM::", "grader_child")  # what a run starts on nodes
TINY = ["steps=3", "batch.groups_per_step=4", "batch.group_size=4", "engine.kv_cache_mb=64", "metrics.plots=false"]
TINY += ["eval.at_start=false", "eval.at_end=false", "parity.preflight=off"]


class Nodes:
    """Three nodes with one, two and one cores, for holders of a token."""

    def __init__(self, folder: Path):
        self._seen: set[psutil.Process] = set()
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_raylet_start_wait_time_s": "120"}
        self._errors = (folder / "nodes.err").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.ray_nodes", "1", "2", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | auth,
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


@pytest.mark.timeout(420)
def test_ranks_are_packed_engines_spread_and_none_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: Path, nodes: Nodes
) -> None:
    two_of_both = ("engine.count=2", "trainer.ranks=2")
    run = start(tmp_path, monkeypatch, random_model, nodes.address, TOKEN, *two_of_both)
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + 360
        while run.process.poll() is None and time.monotonic() < deadline:
            seen.update(nodes.started())
            time.sleep(0.2)
        assert run.exit_code(1) == EXIT_DONE, run.output
        assert len([title for title in seen if "Host" in title]) >= 2 and any("VLLM::" in title for title in seen), seen
        placed = json.loads((run.run_dir / "settings.json").read_text())["placement"]
        assert placed["trainer rank 0"] == placed["trainer rank 1"], "packed on the node with two cores"
        assert len(set(placed.values())) == 3, placed
        records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert sum(record["kind"] == "train" for record in records) == 3
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
