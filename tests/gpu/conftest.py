"""What only a CUDA GPU can show. One is enough, also for tests of many."""

import os
from pathlib import Path

import pytest

from pipelinerl.config.device import gpu_count

# What the cluster gives its workers on a GPU (cluster/ray_cluster.py), before anything imports vLLM here.
os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not gpu_count():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def many_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses two processes on one GPU of a host. It takes this one, and all that start from now on, for hosts of
    their own, between which it sends over the loopback device: slowly, but by the same calls and in the same order."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "one_host_each"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("NCCL_HOSTID", f"process {os.getpid()}")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
