"""Every way in which an update can go wrong without an error of the transport is found, and named.

A good update passes the canary in all other tests of this directory too: their engines have it on.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from pipelinerl.errors import VerificationFailed
from tests.integration.models import run_config

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

BUCKET_BYTES = 100_000
GREEDY = [[1, 2, 3 + index] for index in range(16)]


@pytest.fixture(scope="module")
def saboteurs() -> Iterator[None]:
    """Engines that start meanwhile have saboteurs for workers."""
    from pipelinerl.engine import vllm_engine
    from tests.integration.saboteur import SABOTEUR

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "WORKER_EXTENSION", SABOTEUR)
        yield


@asynccontextmanager
async def serving(model: Path, dtype: str, head_dtype: str, **engine: Any) -> "AsyncIterator[Served]":
    """An engine at version 1, after an update of every parameter that the canary passed."""
    from tests.integration.serving import disturb, serve

    async with serve(run_config(model, dtype, model={"head_dtype": head_dtype}, engine=engine), BUCKET_BYTES) as served:
        disturb(served.policy, 0.05, seed=1)
        times = await served.link.send()
        assert times["params_read_back"] == 1
        assert 0 < times["canary_s"] < times["pause_s"]
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def victim(tied_model: Path, saboteurs: None) -> "AsyncIterator[Served]":
    """Tied and in bfloat16 throughout: on CPU its head computes from a copy that has to be made anew."""
    async with serving(tied_model, "bfloat16", "bfloat16") as served:
        yield served


async def sabotage(served: "Served", kind: str) -> None:
    """Spoil the next update."""
    await served.engine._llm.collective_rpc("sabotage", args=(kind,))


async def caught(served: "Served", loaded: bool = True) -> str:
    """What the next update, of weights that all change, is refused with. A good one after it heals the engine.

    An engine that has loaded what it refuses stays paused, any other goes on with the weights it has.
    """
    from tests.integration.serving import differences, disturb

    served_version = served.engine.version
    disturb(served.policy, 0.05, seed=served.link.version)
    with pytest.raises(VerificationFailed) as refused:
        await served.link.send()
    text = str(refused.value)
    then = "stays paused" if loaded else "goes on with the weights it has"
    assert text.startswith(
        f"engine 0: version {served.link.version} did not pass verification and the engine {then}; inference path: "
    )
    assert "\n" not in text and len(text) < 500

    waiting = asyncio.create_task(served.engine.generate([1, 2, 3], 1.0, 20))
    done, _ = await asyncio.wait([waiting], timeout=1.0 if loaded else 30.0)
    assert bool(done) == (not loaded) and served.engine.version == served_version

    times = await served.link.send()
    assert times["params_read_back"] == 1 and (times["pause_s"] > 1) == loaded  # it stood still since the bad update
    completion = await waiting
    assert {span.version for span in completion.spans} == {served.link.version if loaded else served_version}
    assert served.engine.version == served.link.version
    after = await served.engine.generate([1, 2, 3], 1.0, 20)
    assert differences(served.policy, [[1, 2, 3]], [after]).mean() < 5e-2
    return text


async def test_loading_beside_the_model_does_not_touch_it(victim: "Served") -> None:
    """In bfloat16, whose kernels and packed weights are others than those of float32."""
    from tests.integration.test_transports import undisturbed

    await undisturbed(victim)
    await victim.link.send()


async def test_a_layer_that_is_not_updated(victim: "Served") -> None:
    holds = victim.engine.version
    await sabotage(victim, "layer not updated")
    text = await caught(victim)
    # In a layer: q, k, v with biases, o, gate, up, down, two norms.
    assert f"path: model.layers.0.self_attn.q_proj.weight still holds version {holds}; " in text
    assert text.count(f"still holds version {holds}") == 3 and text.endswith("; and 9 more")


async def test_two_layers_swapped(victim: "Served") -> None:
    await sabotage(victim, "layers swapped")
    text = await caught(victim)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert f"path: {name.format(0)} holds the values of {name.format(1)}; " in text
    assert text.endswith("; and 21 more")


async def test_a_stale_tied_head(victim: "Served") -> None:
    holds = victim.engine.version
    await sabotage(victim, "stale head")
    text = await caught(victim)
    assert text.endswith(f"path: model.embed_tokens.weight as the head still holds version {holds}")


async def test_an_exchange_that_does_not_take_place(victim: "Served") -> None:
    holds = victim.engine.version
    await sabotage(victim, "no exchange")
    text = await caught(victim)
    assert text.count(f"still holds version {holds}") == 3
    assert text.endswith(f"; and {len(victim.link.manifest.parameters) - 2} more")  # the tied one counts twice


async def test_an_exchange_that_breaks_off(victim: "Served") -> None:
    holds = victim.engine.version
    await sabotage(victim, "half an exchange")
    text = await caught(victim)
    assert f"path: model.embed_tokens.weight as the head still holds version {holds}; " in text
    assert "embed_tokens.weight still" not in text  # the embedding itself comes first


async def test_a_new_version_without_weights(victim: "Served") -> None:
    await sabotage(victim, "nothing")
    text = await caught(victim, loaded=False)
    assert "path: model.embed_tokens.weight did not arrive; " in text
    assert text.endswith(f"; and {len(victim.link.manifest.parameters) - 3} more")


async def test_a_flipped_bit_on_the_way(victim: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second parameter of a bucket."""
    from pipelinerl.weights.manifest import offsets

    layout, _ = victim.link.manifest.layout()
    hit = next(placed for placed in layout if len(placed.bucket) > 1)
    sender: Any = victim.link.sender
    copy = sender._copy

    hits = [hit]

    def flip(bucket: Any, placed: Any) -> None:
        copy(bucket, placed)
        if placed in hits:
            hits.clear()
            sender._segment.content[placed.start + offsets(hit.bucket)[0][1] + hit.bucket[1].nbytes // 2] ^= 4

    monkeypatch.setattr(sender, "_copy", flip)
    text = await caught(victim, loaded=False)
    assert text.endswith(f"path: {hit.bucket[1].name} arrived with other bytes than were sent")


async def test_a_lost_bucket(victim: "Served") -> None:
    lost = [parameter.name for parameter in list(victim.link.manifest.buckets())[1]]
    assert len(lost) > 3
    await sabotage(victim, "lost bucket")
    text = await caught(victim, loaded=False)
    named = [f"{name} did not arrive" for name in lost[:3]]
    assert text.split("path: ")[1].split("; ") == [*named, f"and {len(lost) - 3} more"]


async def test_a_parameter_that_arrives_twice(victim: "Served") -> None:
    await sabotage(victim, "norm twice")
    assert (await caught(victim, loaded=False)).endswith("path: model.norm.weight arrived 2 times")


async def test_without_the_canary_nothing_is_verified(victim: "Served") -> None:
    from pipelinerl.engine.vllm_engine import VllmEngine

    engine, link = victim.engine, victim.link
    blind = VllmEngine(engine._llm, engine.settings, victim.config.engine, canary=False, index=0, backend="gloo")
    link.engine = blind
    await link.connect()
    await sabotage(victim, "no exchange")
    await link.transfer()
    assert blind.version == 0
    times = await blind.commit(link.version, [], [])
    assert blind.version == link.version and "params_read_back" not in times
    completion = await engine.generate([1, 2, 3], 1.0, 20)
    assert {span.version for span in completion.spans} == {link.version}
    link.engine = engine
    await link.connect()
    await link.send()


async def test_updates_with_the_same_weights_change_no_bit(fp32_engine: "Served") -> None:
    """As with a learning rate of 0."""
    await fp32_engine.link.send()
    before = await fp32_engine.generate(GREEDY, 0.0, 40)
    for _ in range(20):
        times = await fp32_engine.link.send()
        assert times["params_read_back"] == 1
        after = await fp32_engine.generate(GREEDY, 0.0, 40)
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs)
