"""The real command on a Ray cluster of three nodes, which it joins. The nodes share this machine, Ray does not know."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelinerl.errors import EXIT_DONE
from tests.e2e.harness import TrainCommand

CORES = (1, 2, 1)
TINY = ["eval.at_start=false", "eval.at_end=false", "parity.preflight=off", "engine.kv_cache_mb=64"]


@pytest.fixture(scope="module")
def cluster_address() -> Iterator[str]:
    """The address of a cluster whose own processes do not count as a run's."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES[0], **small})
    try:
        for cores in CORES[1:]:
            cluster.add_node(num_cpus=cores, **small)
        yield cluster.address
    finally:
        cluster.shutdown()


def start(tmp_path: Path, model: Path, address: str, *overrides: str) -> TrainCommand:
    sizes = ["steps=3", "batch.groups_per_step=4", "batch.group_size=4", f"model.path={model}"]
    joins = ["cluster=ray_cpu", f"cluster.address={address}", "engine.count=2", "trainer.ranks=2"]
    return TrainCommand(tmp_path / "run", [*sizes, *joins, *TINY, *overrides])


def test_ranks_and_engines_are_on_nodes_of_their_own(tmp_path: Path, random_model: Path, cluster_address: str) -> None:
    run = start(tmp_path, random_model, cluster_address)
    try:
        assert run.exit_code(240) == EXIT_DONE, run.output
        placed = json.loads((run.run_dir / "settings.json").read_text())["placement"]
        assert placed["trainer rank 0"] == placed["trainer rank 1"], "packed on the node with two cores"
        assert len(set(placed.values())) == 3, placed
        metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert sum(record["kind"] == "train" for record in metrics) == 3
        assert run.leftovers() == []
    finally:
        run.close()
