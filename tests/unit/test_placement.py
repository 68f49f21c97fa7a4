"""Resources asked of Ray."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.cluster.placement import bundles
from pipelinerl.config.schema import RunConfig
from tests.unit.fakes import small_config


def config(ranks: int, engines: int, tensor_parallel: int = 1) -> RunConfig:
    return small_config(
        f"trainer.ranks={ranks}",
        f"engine.count={engines}",
        f"engine.tensor_parallel={tensor_parallel}",
        "batch.groups_per_step=64",  # enough samples for any number of ranks here
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 64), st.sampled_from(["cpu", "cuda"]))
def test_all_processes_fit_the_cores_there_are(ranks: int, engines: int, cpus: int, device: str) -> None:
    trainers, rollout = bundles(config(ranks, engines), device, cpus)
    assert (len(trainers), len(rollout)) == (ranks, engines)
    shares = [bundle.resources()["CPU"] for bundle in trainers + rollout]
    assert all(0 < share <= 1 for share in shares)
    assert math.fsum(shares) <= cpus + 1e-9


@pytest.mark.parametrize(
    ("ranks", "engines", "cpus", "share"),
    [(1, 1, 2, 1.0), (1, 1, 64, 1.0), (1, 1, 1, 0.5), (1, 2, 2, 0.66), (4, 4, 1, 0.12)],
)
def test_a_process_gets_a_core_or_its_share_rounded_down(ranks: int, engines: int, cpus: int, share: float) -> None:
    trainers, rollout = bundles(config(ranks, engines), "cpu", cpus)
    assert {bundle.cpus for bundle in trainers + rollout} == {share}


def test_bundles_are_named_after_their_processes() -> None:
    trainers, rollout = bundles(config(2, 3), "cpu", 8)
    assert [bundle.name for bundle in trainers] == ["trainer rank 0", "trainer rank 1"]
    assert [bundle.name for bundle in rollout] == ["engine 0", "engine 1", "engine 2"]


def test_a_rank_gets_one_gpu_and_an_engine_one_for_each_of_its_workers() -> None:
    trainers, rollout = bundles(config(2, 2, tensor_parallel=4), "cuda", 64)
    assert [bundle.resources() for bundle in trainers] == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert [bundle.resources() for bundle in rollout] == [{"CPU": 1.0, "GPU": 4.0}] * 2


def test_without_gpus_none_is_asked_for() -> None:
    trainers, rollout = bundles(config(1, 1, tensor_parallel=2), "cpu", 4)
    assert [bundle.resources() for bundle in trainers + rollout] == [{"CPU": 1.0}] * 2
