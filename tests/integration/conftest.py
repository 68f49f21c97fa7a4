"""Fixtures of the real parts: model directories and a running engine."""

import os

# What the cluster gives its workers on a CPU (cluster/ray_cluster.py), before anything imports torch or vLLM here.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from tests.integration.serving import Served


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head is its embedding."""
    from tests.integration.models import write_model

    return write_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a head of its own."""
    from tests.integration.models import write_model

    return write_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fp32_engine(tied_model: Path) -> "AsyncIterator[Served]":
    """One float32 engine with a tied head for all tests, and the policy whose weights it serves."""
    from tests.integration.models import run_config
    from tests.integration.serving import serve

    async with serve(run_config(tied_model)) as served:
        yield served
