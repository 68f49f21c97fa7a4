"""Two workers that share the weights of one engine: the same logprobs, and each verifies its own shard."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.integration.models import run_config
from tests.integration.test_canary import BUCKET_BYTES, caught, sabotage
from tests.integration.test_scoring import TOKENS, check, compare

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tensor_parallel_engine(untied_model: Path) -> "AsyncIterator[Served]":
    """Takes about 30 s to start."""
    from pipelinerl.engine import vllm_engine
    from tests.integration.saboteur import SABOTEUR
    from tests.integration.serving import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "WORKER_EXTENSION", SABOTEUR)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        config = run_config(untied_model, engine={"tensor_parallel": 2})
        async with serve(config, BUCKET_BYTES) as served:
            yield served


async def test_scores_and_hidden_states_are_the_engines(tensor_parallel_engine: "Served") -> None:
    from tests.integration.serving import PROMPTS

    await check(tensor_parallel_engine, PROMPTS[:24], 1.0)
    found = await compare(tensor_parallel_engine, TOKENS)
    assert found.jump is None and 0 < max(found.differences) < 1e-5, found.describe()


async def test_every_rank_verifies_its_own_shard(tensor_parallel_engine: "Served") -> None:
    times = await tensor_parallel_engine.link.send()
    assert times["params_read_back"] == 1
    holds = tensor_parallel_engine.engine.version
    await sabotage(tensor_parallel_engine, "layer not updated on rank 1")
    text = await caught(tensor_parallel_engine)
    assert f"path: model.layers.0.self_attn.q_proj.weight still holds version {holds} on rank 1; " in text
    assert text.endswith("; and 9 more")
