"""A weight update from the driver's side. The fakes meet as the real parts do: no call returns before all are in."""

import asyncio
from typing import Any

import pytest

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import WeightSyncError, WorkerDied
from pipelinerl.weights import publisher
from pipelinerl.weights.manifest import Manifest, Parameter
from pipelinerl.weights.publisher import Publisher
from tests.unit.fakes import SECONDS

PARAMETERS = (Parameter("embed.weight", "bfloat16", (8, 4), 64), Parameter("norm.weight", "float32", (4,), 16))
MANIFEST = Manifest(PARAMETERS, bucket_bytes=64).to_dict()


class Trainer:
    def __init__(self, meeting: asyncio.Barrier) -> None:
        self._meeting = meeting
        self.backend = ""
        self.world_size = 0
        self.sent = 0
        self.digests: list[int] | None = None  # None: the canary is off
        self.error: Exception | None = None

    async def listen(self, backend: str) -> dict[str, Any]:
        self.backend = backend
        return {"address": "node-0", "port": 4711}

    async def connect_weights(self, world_size: int) -> dict[str, Any]:
        self.world_size = world_size
        await self._meeting.wait()
        return MANIFEST

    async def send_weights(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        await self._meeting.wait()
        self.sent += 1
        sent = {"seconds": 0.5, "bytes": 80.0}
        return sent if self.digests is None else sent | {"digests": self.digests}


class Engine:
    def __init__(self, meeting: asyncio.Barrier, number: int) -> None:
        self._meeting = meeting
        self._number = number
        self.init_info: dict[str, Any] = {}
        self.updates: list[tuple[dict[str, Any], int]] = []
        self.commits: list[tuple[int, list[str], list[int]]] = []
        self.error: Exception | None = None
        self.seconds_to_error = 0.0
        self.hangs = False
        self.fails_verification: Exception | None = None
        self.verification_hangs = False

    async def connect(self, init_info: dict[str, Any]) -> None:
        self.init_info = init_info
        await self._meeting.wait()

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        if self.error is not None:
            await asyncio.sleep(self.seconds_to_error)
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        await self._meeting.wait()
        self.updates.append((update_info, version))
        return self._times()

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]:
        if self.fails_verification is not None:
            raise self.fails_verification
        if self.verification_hangs:
            await asyncio.Event().wait()
        self.commits.append((version, names, digests))
        canary = {"canary_s": 0.125 * (1 + self._number), "params_read_back": 1.0 - 0.5 * self._number}
        return self._times() | {"pause_s": 1.0 + self._number} | (canary if digests else {})

    def _times(self) -> dict[str, float]:
        return {"drain_s": 0.25 * self._number, "transfer_s": 3.0 - self._number}


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members have a tenth of a second to report after one has failed."""
    monkeypatch.setattr(publisher, "CAUSE_GRACE_S", 0.1)


class Setup:
    def __init__(self, engines: int = 2, workers: int = 1, backend: str = "gloo", timeout_s: float = SECONDS) -> None:
        meeting = asyncio.Barrier(1 + engines)
        self.trainer = Trainer(meeting)
        self.engines = [Engine(meeting, number) for number in range(engines)]
        config = WeightsConfig(timeout_s=timeout_s)
        self.publisher = Publisher(self.trainer, self.engines, config, backend, workers)

    async def connected(self) -> "Setup":
        async with asyncio.timeout(SECONDS):
            await self.publisher.connect()
        return self


@pytest.mark.parametrize(
    ("engines", "workers", "rank_offsets", "world_size"),
    [(1, 1, [1], 2), (2, 1, [1, 2], 3), (3, 1, [1, 2, 3], 4), (1, 2, [1], 3), (2, 2, [1, 3], 5), (3, 2, [1, 3, 5], 7)],
)
async def test_every_worker_of_every_engine_has_a_rank_of_its_own(
    engines: int, workers: int, rank_offsets: list[int], world_size: int
) -> None:
    setup = await Setup(engines, workers).connected()
    assert [engine.init_info["rank_offset"] for engine in setup.engines] == rank_offsets
    assert {engine.init_info["world_size"] for engine in setup.engines} == {setup.trainer.world_size} == {world_size}
    assert all(engine.init_info["address"] == "node-0" for engine in setup.engines)


async def test_a_version_is_sent_and_received_at_the_same_time() -> None:
    setup = await Setup(engines=2).connected()
    for version in (0, 1, 5):
        metrics = await setup.publisher.publish(version)
    assert setup.trainer.sent == 3
    assert [[version for _, version in engine.updates] for engine in setup.engines] == [[0, 1, 5]] * 2
    assert [engine.commits for engine in setup.engines] == [[(version, [], []) for version in (0, 1, 5)]] * 2
    # Engine 0 reports pause 1, drain 0, transfer 3; engine 1 pause 2, drain 0.25, transfer 2: the slower one counts.
    assert metrics == {
        "sync/pause_s": 2.0,
        "sync/drain_s": 0.25,
        "sync/transfer_s": 3.0,
        "sync/send_s": 0.5,
        "sync/bytes": 80.0,
        "sync/version": 5.0,
    }


@pytest.mark.parametrize(
    ("backend", "keys"),
    [
        ("nccl", {"names", "dtype_names", "shapes"}),  # all that vLLM's NCCLWeightTransferUpdateInfo takes
        ("gloo", {"names", "dtype_names", "shapes", "sizes", "bucket_bytes"}),
    ],
)
async def test_an_update_info_has_what_the_transport_takes(backend: str, keys: set[str]) -> None:
    setup = await Setup(backend=backend).connected()
    await setup.publisher.publish(0)
    assert setup.trainer.backend == backend
    for engine in setup.engines:
        [(update_info, _)] = engine.updates
        assert update_info == {key: MANIFEST[key] for key in keys}


async def test_an_update_that_takes_too_long_names_the_setting() -> None:
    setup = await Setup(timeout_s=0.05).connected()
    setup.engines[1].hangs = True
    with pytest.raises(WeightSyncError, match=r"version 3 took more than weights\.timeout_s=0\.05 s"):
        await setup.publisher.publish(3)


async def test_the_error_of_an_engine_ends_the_update_at_once() -> None:
    setup = await Setup().connected()
    setup.engines[0].error = WorkerDied("engine 0: gone")
    async with asyncio.timeout(SECONDS):
        with pytest.raises(WorkerDied, match="engine 0: gone"):
            await setup.publisher.publish(1)


async def test_a_dead_engine_is_the_cause_though_the_trainer_complains_first() -> None:
    setup = await Setup().connected()
    setup.trainer.error = WeightSyncError("trainer rank 0: connection closed by peer")
    setup.engines[0].error, setup.engines[0].seconds_to_error = WorkerDied("engine 0: gone"), 0.03
    async with asyncio.timeout(SECONDS):
        with pytest.raises(WorkerDied, match="engine 0: gone"):
            await setup.publisher.publish(1)


# The canary


async def published(*digests: list[int]) -> Setup:
    """After a publication of each, and what comes next has other digests."""
    setup = await Setup().connected()
    for version, values in enumerate(digests):
        setup.trainer.digests = values
        await setup.publisher.publish(version)
    return setup


async def test_every_engine_verifies_against_what_the_trainer_sent() -> None:
    setup = await published([11, -22])
    names = ["embed.weight", "norm.weight"]
    assert [engine.commits for engine in setup.engines] == [[(0, names, [11, -22])]] * 2


async def test_the_metrics_of_the_canary() -> None:
    setup = await Setup().connected()
    setup.trainer.digests = [1, 2]
    first = await setup.publisher.publish(0)
    assert first["sync/canary_s"] == 0.25 and first["sync/params_read_back"] == 0.5  # of the worse engine
    assert first["sync/canary_err"] == 0 and "sync/params_changed" not in first  # nothing to compare with
    setup.trainer.digests = [1, 3]
    assert (await setup.publisher.publish(1))["sync/params_changed"] == 0.5
    assert (await setup.publisher.publish(2))["sync/params_changed"] == 0
    setup.trainer.digests = None
    assert not any("canary" in name or "params" in name for name in await setup.publisher.publish(3))


async def test_no_engine_is_resumed_before_all_have_loaded() -> None:
    setup = await Setup().connected()
    setup.engines[1].error = WeightSyncError("engine 1: did not complete")
    with pytest.raises(WeightSyncError, match="engine 1: did not complete"):
        await setup.publisher.publish(1)
    assert [engine.commits for engine in setup.engines] == [[], []]


async def test_an_engine_that_does_not_pass_ends_the_update_with_its_words() -> None:
    setup = await published([1, 2])
    setup.engines[1].fails_verification = WeightSyncError("engine 1: version 1 did not pass")
    with pytest.raises(WeightSyncError, match="engine 1: version 1 did not pass"):
        await setup.publisher.publish(1)


async def test_sending_and_verifying_share_one_time_limit() -> None:
    setup = await Setup(timeout_s=0.05).connected()
    setup.engines[0].verification_hangs = True
    with pytest.raises(WeightSyncError, match=r"version 3 took more than weights\.timeout_s=0\.05 s"):
        await setup.publisher.publish(3)


async def test_an_engine_that_dies_while_it_verifies_is_the_cause() -> None:
    setup = await Setup().connected()
    setup.engines[0].fails_verification = WeightSyncError("engine 0: collective call failed")
    setup.engines[1].fails_verification = WorkerDied("engine 1: gone")
    with pytest.raises(WorkerDied, match="engine 1: gone"):
        await setup.publisher.publish(1)


@pytest.mark.parametrize(
    ("digests", "changed", "text"),
    [
        (
            [1, 2],
            True,
            r"version 1: lr > 0 and the step was applied, yet no parameter of the trainer changed.*bfloat16",
        ),
        ([1, 3], False, r"version 1: .* yet parameters of the trainer changed: norm\.weight$"),
        ([2, 1], False, r"yet parameters of the trainer changed: embed\.weight, norm\.weight$"),
    ],
)
async def test_weights_that_change_against_expectation_reach_no_engine_that_runs(
    digests: list[int], changed: bool, text: str
) -> None:
    setup = await published([1, 2])
    setup.trainer.digests = digests
    with pytest.raises(WeightSyncError, match=text):
        await setup.publisher.publish(1, changed=changed)
    assert all(len(engine.updates) == 2 and len(engine.commits) == 1 for engine in setup.engines)


@pytest.mark.parametrize(
    ("digests", "changed"), [([1, 2], False), ([1, 2], None), ([1, 3], True), ([1, 3], None), ([3, 4], True)]
)
async def test_weights_that_do_as_expected_are_published(digests: list[int], changed: bool | None) -> None:
    setup = await published([1, 2])
    setup.trainer.digests = digests
    metrics = await setup.publisher.publish(1, changed=changed)
    assert metrics["sync/version"] == 1


@pytest.mark.parametrize("changed", [True, False, None])
async def test_the_first_publication_has_nothing_to_differ_from(changed: bool | None) -> None:
    setup = await Setup().connected()
    setup.trainer.digests = [1, 2]
    assert (await setup.publisher.publish(0, changed=changed))["sync/version"] == 0


async def test_a_version_that_no_engine_serves_is_not_what_the_next_one_is_compared_with() -> None:
    setup = await published([1, 2])
    setup.trainer.digests = [1, 3]
    setup.engines[0].fails_verification = WeightSyncError("engine 0: did not pass")
    with pytest.raises(WeightSyncError, match="did not pass"):
        await setup.publisher.publish(1, changed=True)
    setup.engines[0].fails_verification = None
    assert (await setup.publisher.publish(2, changed=True))["sync/params_changed"] == 0.5
