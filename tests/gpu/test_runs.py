"""Runs of the real command on a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import TrainCommand, ledger_of, title, train_records
from tests.integration.models import write_model

SMALL = ["batch.groups_per_step=4", "batch.group_size=4", "metrics.wandb.mode=disabled", "metrics.plots=false"]
ON_GPU = ["engine=gpu", "trainer=gpu", "model.dtype=bfloat16", "engine.enforce_eager=true"]
BESIDE_OTHERS = ["engine.max_model_len=256", "engine.kv_cache_mb=256", "engine.gpu_memory_utilization=0.05"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "random", tied=True)


def test_trainer_and_engine_share_the_only_gpu(tmp_path: Path, model: Path) -> None:
    overrides = [f"model.path={model}", "steps=12", "cluster=local_gpu", *SMALL, *ON_GPU, *BESIDE_OTHERS]
    command = TrainCommand(tmp_path / "run", overrides)
    try:
        assert command.exit_code(300) == 0, command.output
        assert command.leftovers() == []
    finally:
        command.close()
    records = train_records(command.run_dir)
    assert len(records) == 12
    for record in records:
        assert record.get("mismatch/abs_logprob_mean", 0) < 0.02 and record["staleness/max"] <= 2
        assert record["optim/skipped"] == 0
    ledger_of(command.run_dir)


def engine_core(cluster: psutil.Process) -> psutil.Process:
    """Of one of its engines."""
    return next(process for process in cluster.children(recursive=True) if "EngineCore" in title(process))


@pytest.fixture
def four_gpus(many_on_one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray cluster that believes to have them: its address, and the process below which all of it is. Each of its
    workers sees the one GPU there is."""
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.ray_nodes", f"{os.cpu_count()}:4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        yield cluster.stdout.readline().split()[1], psutil.Process(cluster.pid)
    finally:
        cluster.stdin.close()
        cluster.wait(60)


def test_two_engines_and_two_ranks_exchange_weights_by_nccl_and_outlive_an_engine(
    tmp_path: Path, model: Path, four_gpus: tuple[str, psutil.Process]
) -> None:
    address, cluster = four_gpus
    overrides = [f"model.path={model}", "steps=100000", "cluster=ray", f"cluster.address={address}"]
    overrides += ["engine.count=2", "trainer.ranks=2", "weights.timeout_s=15", "eval.at_start=false"]
    command = TrainCommand(tmp_path / "run", overrides + SMALL + ON_GPU + BESIDE_OTHERS)
    try:
        command.wait_for_step(4)
        engine_core(cluster).kill()
        command.wait_until(lambda: "started again, " in command.output, "the engine's restart", 150)

        def all_serve() -> bool:
            return [record["fleet/engines"] for record in train_records(command.run_dir)[-3:]] == [2, 2, 2]

        command.wait_until(all_serve, "three steps with two engines", 150)
        command.process.terminate()
        assert command.exit_code(60) == 143, command.output
        assert command.leftovers() == []
    finally:
        command.close()
    records = train_records(command.run_dir)
    assert all(record.get("mismatch/abs_logprob_mean", 0) < 0.02 for record in records)
    assert max(record["staleness/max"] for record in records) <= 2
    ledger_of(command.run_dir)
