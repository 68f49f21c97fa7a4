"""What every transport of weights over host memory must do with a real engine. Those of GPUs: tests/gpu.

Both ends without an engine, and members that die: tests/unit/test_host_transport.py. Two workers of one engine:
test_tensor_parallel.py.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from pipelinerl.errors import WeightSyncError

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

BUCKET_BYTES = 50_000
PROMPTS = [[1, 2, 3 + index] for index in range(8)]
GREEDY = [[1, 2, 3 + index] for index in range(32)]

# Sends the weights in a file, and is gone after the second bucket.
MORTAL = """
import json, os, sys, time
from safetensors.torch import load_file
from pipelinerl.weights.host_sender import HostSender
from pipelinerl.weights.manifest import Manifest
tensors = load_file(sys.argv[1])
class Source:
    collective = False
    manifest = Manifest.from_dict(json.loads(sys.argv[2]))
    def buckets(self):
        for number, bucket in enumerate(self.manifest.buckets()):
            if number == 2:
                time.sleep(0.3)
                os._exit(1)
            yield [(p, 2 * tensors[p.name]) for p in bucket]
sender = HostSender(Source(), 60.0, sys.argv[3] == "shared")
print(json.dumps(sender.listen("127.0.0.1")), flush=True)
sender.connect(1 if sys.argv[3] == "shared" else 2)
sys.stdin.readline()
sender.send(0)
"""


@pytest_asyncio.fixture(loop_scope="session", params=["shared", "broadcast"])
async def served(request: pytest.FixtureRequest, fp32_engine: "Served") -> "AsyncIterator[Served]":
    """The engine, and a link to it by which it maps the sender's memory, or is sent a broadcast."""
    from tests.integration.serving import Link

    before, shared = fp32_engine.link, request.param == "shared"
    fp32_engine.link = await Link.make(
        fp32_engine.policy, fp32_engine.engine, BUCKET_BYTES, shared_memory=shared, version=before.version
    )
    yield fp32_engine
    before.version = fp32_engine.link.version
    fp32_engine.link = before
    await before.connect()


async def undisturbed(served: "Served") -> None:
    """Sequences get the same bits while updates are loaded beside them as when they are alone."""
    alone = await served.generate(GREEDY, 0.0, 100)
    for _ in range(3):
        beside, _ = await asyncio.gather(served.generate(GREEDY, 0.0, 100), served.link.transfer())
        for a, b in zip(alone, beside, strict=True):
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs)


async def serves(served: "Served") -> None:
    """The engine samples with the policy's weights."""
    from tests.integration.serving import differences

    completions = await served.generate(PROMPTS, 1.0, 30)
    assert {span.version for c in completions for span in c.spans} == {served.engine.version}
    tolerance = 1e-4 if served.config.model.dtype == "float32" else 0.1
    assert differences(served.policy, PROMPTS, completions).max() < tolerance


async def test_update_after_update_arrives_bit_by_bit(served: "Served") -> None:
    """The canary compares digests, and what the engine computes with."""
    from tests.integration.serving import disturb

    assert len(list(served.link.manifest.buckets())) > 3
    for seed in range(3):
        disturb(served.policy, 0.02, seed)
        assert (await served.link.send())["params_read_back"] == 1
    await serves(served)


async def test_an_engine_goes_on_while_it_receives(served: "Served") -> None:
    """What has arrived waits for its commit; the sequences meanwhile, also new ones, have the old weights, and not one
    bit of their logprobs is touched by the loading beside them."""
    from tests.integration.serving import disturb

    old = served.engine.version
    await undisturbed(served)
    running = asyncio.gather(*(served.engine.generate(prompt, 1.0, 200) for prompt in PROMPTS))
    await asyncio.sleep(0.05)
    disturb(served.policy, 0.02, seed=3)
    digests = await served.link.transfer()
    fresh = await served.engine.generate([1, 2, 3], 1.0, 5)
    assert [span.version for span in fresh.spans] == [old] and served.engine.version == old
    await served.engine.commit(served.link.version, [p.name for p in served.link.manifest.parameters], digests)
    assert all(completion.finish_reason in ("stop", "length") for completion in await running)
    await serves(served)


async def test_a_sender_that_dies_leaves_the_weights_as_they_were(
    served: "Served", tied_model: Path, request: pytest.FixtureRequest
) -> None:
    """All or nothing, although part of them had arrived; and the next sender finds the engine well."""
    from pipelinerl.weights.places import assign
    from tests.integration.serving import disturb

    await served.link.send()
    shared = served.link.sender._shared  # type: ignore[attr-defined]
    manifest = served.link.manifest.to_dict()
    arguments = [str(tied_model / "model.safetensors"), json.dumps(manifest), "shared" if shared else "broadcast"]
    process = subprocess.Popen(
        [sys.executable, "-c", MORTAL, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        info: dict[str, Any] = json.loads(await asyncio.to_thread(process.stdout.readline))
        [places], world_size = assign([await served.engine.locate(info["segment"])])
        await served.engine.connect(info | {"places": places, "world_size": world_size})
        version = served.engine.version
        receiving = asyncio.create_task(served.engine.update_weights({"transmission": 0}, version + 1))
        process.stdin.write("go\n")
        process.stdin.flush()
        async with asyncio.timeout(30):
            with pytest.raises(
                WeightSyncError, match=r"engine 0 worker 0: .* goes on with the weights it has: .*layers"
            ):
                await receiving
    finally:
        process.kill()
        process.wait()
    assert served.engine.version == version
    await serves(served)
    disturb(served.policy, 0.02, seed=4)
    await served.link.connect()
    assert (await served.link.send())["params_read_back"] == 1
    await serves(served)


async def test_what_an_old_epoch_sends_reaches_nobody(served: "Served") -> None:
    from tests.integration.serving import Link, disturb

    old, version = served.link, served.link.version
    served.link = await Link.make(
        served.policy,
        served.engine,
        BUCKET_BYTES,
        1.0,
        old.sender._shared,
        version,  # type: ignore[attr-defined]
    )
    with pytest.raises(WeightSyncError, match="goes on with the weights it has"):
        await asyncio.gather(
            served.engine.update_weights({"transmission": 0}, version + 1),
            asyncio.to_thread(old.sender.send, old.transmissions),
        )
    assert served.engine.version == version
    await serves(served)
    disturb(served.policy, 0.02, seed=5)
    served.link.sender._timeout_s = 60.0  # type: ignore[attr-defined]
    await served.link.connect()
    await served.link.send()
    await serves(served)


async def test_an_engine_that_was_told_to_leave_says_so(served: "Served") -> None:
    await served.engine.disconnect()
    served.link.version += 1
    with pytest.raises(WeightSyncError):
        await served.engine.update_weights({"transmission": 0}, served.link.version)
    await serves(served)
    await served.link.connect()
    await served.link.send()
    await serves(served)
