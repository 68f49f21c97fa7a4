"""A weight update from the driver's side. The fakes meet as the real parts do: no call returns before all are in."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import PipelineRLError, Stalled, VerificationFailed, WeightSyncError, WorkerDied
from pipelinerl.weights import calls
from pipelinerl.weights.manifest import Manifest, Parameter
from pipelinerl.weights.publisher import Publisher
from tests.unit.fakes import SECONDS, Gate, until

PARAMETERS = (Parameter("embed.weight", "bfloat16", (8, 4), 64), Parameter("norm.weight", "float32", (4,), 16))
MANIFEST = Manifest(PARAMETERS, bucket_bytes=64).to_dict()


class Trainer:
    def __init__(self) -> None:
        self.backend = ""
        self.epochs = 0
        self.world_size = 0
        self.sent: list[int] = []  # numbers of the transmissions
        self.resent: list[int] = []
        self.digests: list[int] | None = None  # None: the canary is off
        self.listen_fails: PipelineRLError | None = None
        self.fails: list[PipelineRLError] = []  # what the next sends raise
        self.sending = Gate()

    async def listen(self, backend: str) -> dict[str, Any]:
        if self.listen_fails is not None:
            raise self.listen_fails
        self.backend = backend
        self.epochs += 1
        return {"address": "node-0", "port": 4711, "epoch": self.epochs, "segment": {"pid": 7}}

    async def connect_weights(self, world_size: int) -> dict[str, Any]:
        self.world_size = world_size
        return MANIFEST

    async def send_weights(self, transmission: int) -> dict[str, Any]:
        await self.sending.pass_through()
        if self.fails:
            raise self.fails.pop(0)
        self.sent.append(transmission)
        sent = {"seconds": 0.5}
        return sent if self.digests is None else sent | {"digests": list(self.digests)}

    async def resend_weights(self, transmission: int) -> None:
        self.resent.append(transmission)


class Engine:
    """Fails with the errors in `receive_fails` and `commit_fails`, one for each call."""

    def __init__(self, number: int, nodes: list[str]) -> None:
        self._number = number
        self._nodes = nodes
        self.joined: list[dict[str, Any]] = []
        self.left = 0
        self.updates: list[tuple[dict[str, Any], int]] = []
        self.commits: list[tuple[int, list[str], list[int]]] = []
        self.connect_fails: list[PipelineRLError] = []
        self.receive_fails: list[PipelineRLError] = []
        self.seconds_to_error = 0.0
        self.commit_fails: list[PipelineRLError] = []
        self.receiving, self.committing = Gate(), Gate()

    async def locate(self, segment: dict[str, Any] | None) -> list[str]:
        assert segment == {"pid": 7}
        return self._nodes

    async def connect(self, init_info: dict[str, Any]) -> None:
        if self.connect_fails:
            raise self.connect_fails.pop(0)
        self.joined.append(init_info)

    async def disconnect(self) -> None:
        self.left += 1

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        await self.receiving.pass_through()
        if self.receive_fails:
            await asyncio.sleep(self.seconds_to_error)
            raise self.receive_fails.pop(0)
        self.updates.append((update_info, version))
        return {"transfer_s": 3.0 - self._number, "load_s": 0.25 * (1 + self._number)}

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]:
        await self.committing.pass_through()
        if self.commit_fails:
            raise self.commit_fails.pop(0)
        self.commits.append((version, names, digests))
        canary = {"canary_s": 0.125 * (1 + self._number), "params_read_back": 1.0 - 0.5 * self._number}
        times = {"pause_s": 1.0 + self._number, "drain_s": 0.25 * self._number, "resume_s": 0.5}
        return times | (canary if digests else {})

    @property
    def versions(self) -> list[int]:
        return [version for version, *_ in self.commits]


class Fleet:
    """Forgets engines that are lost, as one does that starts them again."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.gone: list[tuple[Engine, Exception]] = []
        self.told: list[tuple[Engine, int]] = []

    def members(self) -> Sequence[Engine]:
        return list(self.engines)

    def lost(self, engine: Any, error: Exception) -> None:
        self.engines.remove(engine)
        self.gone.append((engine, error))

    def refitted(self, engine: Any, version: int) -> None:
        self.told.append((engine, version))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members have a tenth of a second to report after one has failed."""
    monkeypatch.setattr(calls, "CAUSE_GRACE_S", 0.1)


class Setup:
    def __init__(
        self,
        engines: int = 2,
        workers: int = 1,
        backend: str = "gloo",
        timeout_s: float = SECONDS,
        node: str = "",
    ) -> None:
        self.trainer = Trainer()
        self.engines = [Engine(number, [node] * workers) for number in range(engines)]
        self.fleet = Fleet(self.engines)
        config = WeightsConfig(timeout_s=timeout_s)
        self.publisher = Publisher(self.trainer, self.fleet, config, backend, workers)

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]:
        async with asyncio.timeout(SECONDS):
            return await self.publisher.publish(version, changed)


async def test_a_version_is_sent_and_received_at_the_same_time() -> None:
    setup = Setup(engines=2)
    for version in (0, 1, 5):
        metrics = await setup.publish(version)
    assert setup.trainer.sent == [0, 1, 2] and setup.trainer.epochs == 1
    for engine in setup.engines:
        assert [info["transmission"] for info, _ in engine.updates] == [0, 1, 2]
        assert [version for _, version in engine.updates] == engine.versions == [0, 1, 5]
        assert engine.commits[0] == (0, [], [])  # the canary is off
    assert setup.fleet.told == [(engine, version) for version in (0, 1, 5) for engine in setup.engines]
    total_s = metrics.pop("sync/total_s")
    assert 0 <= total_s < SECONDS
    assert metrics == {  # of the slower engine
        "sync/pause_s": 2.0,
        "sync/drain_s": 0.25,
        "sync/transfer_s": 3.0,
        "sync/load_s": 0.5,
        "sync/resume_s": 0.5,
        "sync/stage_s": 0.5,
        "sync/bytes": 80.0,
        "sync/version": 5.0,
        "sync/epoch": 1.0,
        "sync/attempts": 1.0,
    }


@pytest.mark.parametrize(
    ("engines", "workers", "offsets", "world_size"),
    [(1, 1, [1], 2), (2, 1, [1, 2], 3), (1, 2, [1], 3), (3, 2, [1, 3, 5], 7)],
)
async def test_on_gpus_every_worker_of_every_engine_has_a_rank_of_its_own(
    engines: int, workers: int, offsets: list[int], world_size: int
) -> None:
    setup = Setup(engines, workers, backend="nccl")
    await setup.publish(0)
    joined = [engine.joined[0] for engine in setup.engines]
    assert [info["rank_offset"] for info in joined] == offsets
    assert {info["world_size"] for info in joined} == {setup.trainer.world_size} == {world_size}
    assert all(info["address"] == "node-0" for info in joined)


@pytest.mark.parametrize(("node", "world_size"), [("", 1), ("elsewhere", 2)])
async def test_on_cpu_one_worker_of_every_other_node_is_in_the_broadcast(node: str, world_size: int) -> None:
    setup = Setup(engines=2, workers=2, node=node)
    await setup.publish(0)
    places = [place for engine in setup.engines for place in engine.joined[0]["places"]]
    leader = None if node == "" else 1
    assert [place["rank"] for place in places] == [leader, None, None, None]
    assert setup.trainer.world_size == world_size


@pytest.mark.parametrize(
    ("backend", "keys"),
    [
        ("nccl", {"names", "dtype_names", "shapes"}),  # all that vLLM's NCCLWeightTransferUpdateInfo takes
        ("gloo", {"transmission"}),  # the rest was told when they joined
        ("ipc", {"transmission"}),
    ],
)
async def test_an_update_info_has_what_the_transport_takes(backend: str, keys: set[str]) -> None:
    setup = Setup(backend=backend)
    await setup.publish(0)
    assert setup.trainer.backend == backend
    for engine in setup.engines:
        [(info, _)] = engine.updates
        assert info.keys() == keys
        assert all(info[key] == MANIFEST[key] for key in keys - {"transmission"})


# Overlap


async def test_the_trainer_is_free_when_it_has_copied_its_weights() -> None:
    setup = Setup()
    setup.engines[0].receiving.close()
    task = await setup.publisher.begin(1)
    assert not task.done() and setup.trainer.sent == [0]
    setup.engines[0].receiving.open()
    assert (await task)["sync/version"] == 1 and setup.engines[0].versions == [1]


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_a_trainer_that_sends_its_own_tensors_is_free_at_the_end(backend: str) -> None:
    setup = Setup(backend=backend)
    setup.engines[0].committing.close()
    beginning = asyncio.create_task(setup.publisher.begin(1))
    await until(lambda: setup.engines[0].committing.arrived == 1)
    assert not beginning.done()
    setup.engines[0].committing.open()
    assert (await beginning).done()


async def test_one_update_at_a_time() -> None:
    setup = Setup()
    setup.engines[0].committing.close()
    first = await setup.publisher.begin(1)
    second = asyncio.create_task(setup.publisher.begin(2))
    await asyncio.sleep(0.02)
    assert setup.trainer.sent == [0] and not second.done()
    setup.engines[0].committing.open()
    await first
    assert (await (await second))["sync/version"] == 2
    assert setup.engines[0].versions == [1, 2]


async def test_a_retry_sends_the_copy_and_not_the_weights_that_the_trainer_has_by_then() -> None:
    setup = Setup()
    setup.engines[1].receive_fails = [WeightSyncError("engine 1: broke off")]
    metrics = await setup.publish(1)
    assert (setup.trainer.sent, setup.trainer.resent) == ([0], [0])  # the first of either epoch
    assert metrics["sync/attempts"] == 2 and metrics["sync/epoch"] == 2
    assert setup.engines[0].versions == setup.engines[1].versions == [1]


async def test_without_a_copy_a_retry_sends_again() -> None:
    setup = Setup(engines=1, backend="nccl")
    setup.engines[0].receive_fails = [WeightSyncError("engine 0: broke off")]
    await setup.publish(1)
    assert (setup.trainer.sent, setup.trainer.resent) == ([0, 0], [])


async def test_a_cancelled_update_leaves_nothing_running() -> None:
    setup = Setup()
    setup.trainer.sending.close()
    beginning = asyncio.create_task(setup.publisher.begin(1))
    await until(lambda: setup.trainer.sending.arrived == 1)
    beginning.cancel()
    await asyncio.wait([beginning])
    setup.trainer.sending.open()
    assert (await setup.publish(2))["sync/epoch"] == 2  # not in the group that was broken off
    assert setup.engines[0].versions == [2]


# Engines that come and go


async def test_engines_that_join_or_leave_make_a_new_epoch() -> None:
    setup = Setup(engines=3)
    third = setup.fleet.engines.pop()
    assert (await setup.publish(1))["sync/epoch"] == 1
    setup.fleet.engines.append(third)
    assert (await setup.publish(2))["sync/epoch"] == 2
    assert [engine.left for engine in setup.engines] == [1, 1, 0]
    assert third.versions == [2]
    setup.fleet.engines.remove(setup.engines[0])
    assert (await setup.publish(3))["sync/epoch"] == 3
    assert (await setup.publish(4))["sync/epoch"] == 3
    assert setup.engines[0].versions == [1, 2]


@pytest.mark.parametrize("when", ["connect_fails", "receive_fails", "commit_fails"])
async def test_an_engine_that_dies_is_lost_and_the_others_serve(when: str) -> None:
    setup = Setup(engines=3)
    death = WorkerDied("engine 1: gone")
    setattr(setup.engines[1], when, [death])
    metrics = await setup.publish(1)
    assert setup.fleet.gone == [(setup.engines[1], death)]
    assert setup.engines[0].versions == setup.engines[2].versions == [1]
    assert [engine for engine, _ in setup.fleet.told] == [setup.engines[0], setup.engines[2]]
    assert metrics["sync/attempts"] == 1 + (when == "connect_fails")
    assert (await setup.publish(2))["sync/epoch"] == 2


async def test_an_engine_that_fails_twice_in_a_row_is_lost() -> None:
    setup = Setup()
    errors = [WeightSyncError(f"engine 1: {which}") for which in ("first", "second")]
    setup.engines[1].receive_fails = list(errors)
    metrics = await setup.publish(1)
    assert setup.fleet.gone == [(setup.engines[1], errors[1])] and metrics["sync/attempts"] == 2
    assert setup.engines[0].versions == [1]


async def test_failures_with_a_success_in_between_are_forgiven() -> None:
    setup = Setup()
    for version in (1, 2, 3):
        setup.engines[1].receive_fails = [WeightSyncError("engine 1: again")]
        assert (await setup.publish(version))["sync/attempts"] == 2
    assert not setup.fleet.gone and setup.engines[1].versions == [1, 2, 3]


async def test_in_a_broadcast_the_dead_engine_is_the_cause_though_others_complain_first() -> None:
    setup = Setup(engines=2, node="elsewhere")
    setup.trainer.fails = [WeightSyncError("trainer rank 0: connection closed by peer")]
    setup.engines[0].receive_fails = [WeightSyncError("engine 0: connection closed by peer")]
    setup.engines[1].receive_fails, setup.engines[1].seconds_to_error = [WorkerDied("engine 1: gone")], 0.03
    await setup.publish(1)
    assert [engine for engine, _ in setup.fleet.gone] == [setup.engines[1]]
    assert setup.engines[0].versions == [1]


async def test_an_engine_that_does_not_answer_is_lost_after_two_attempts() -> None:
    setup = Setup(timeout_s=0.05)
    setup.engines[1].receiving.close()
    metrics = await setup.publish(3)
    [(engine, error)] = setup.fleet.gone
    assert engine is setup.engines[1] and metrics["sync/attempts"] == 2
    assert "took more than weights.timeout_s=0.05 s" in str(error)
    assert setup.engines[0].versions == [3]


@pytest.mark.parametrize("error", [WorkerDied("engine 0: gone"), WeightSyncError("engine 0: broke off")])
async def test_an_update_that_no_engine_is_left_for_is_over(error: PipelineRLError) -> None:
    """The fleet starts them again, and they are brought up to date then."""
    setup = Setup(engines=1)
    setup.engines[0].receive_fails = [error] * 5
    metrics = await setup.publish(7)
    assert "sync/pause_s" not in metrics and metrics["sync/version"] == 7
    assert [engine for engine, _ in setup.fleet.gone] == setup.engines


async def test_a_transport_that_keeps_breaking_is_given_up() -> None:
    setup = Setup(engines=2, node="elsewhere")
    setup.trainer.fails = [WeightSyncError("trainer rank 0: no route to host")] * 5
    assert (await setup.publish(1))["sync/attempts"] == 3
    assert setup.trainer.epochs == 3
    assert len(setup.fleet.gone) == 2 and all("no route to host" in str(error) for _, error in setup.fleet.gone)


@pytest.mark.parametrize("error", [WorkerDied("trainer rank 1: gone"), Stalled("trainer rank 0: send_weights")])
@pytest.mark.parametrize("where", ["listen", "send"])
async def test_what_happens_to_the_trainer_is_not_the_engines_fault(error: PipelineRLError, where: str) -> None:
    setup = Setup()
    if where == "listen":
        setup.trainer.listen_fails = error
    else:
        setup.trainer.fails = [error]
    with pytest.raises(type(error)) as raised:
        await setup.publish(1)
    assert raised.value is error and not setup.fleet.gone
    setup.trainer.listen_fails = None
    assert (await setup.publish(2))["sync/epoch"] == 2


# The canary


async def published(*digests: list[int]) -> Setup:
    """After a publication of each, and what comes next has other digests."""
    setup = Setup()
    for version, values in enumerate(digests):
        setup.trainer.digests = values
        await setup.publish(version)
    return setup


async def test_every_engine_verifies_against_what_the_trainer_sent() -> None:
    setup = await published([11, -22])
    names = ["embed.weight", "norm.weight"]
    assert [engine.commits for engine in setup.engines] == [[(0, names, [11, -22])]] * 2


async def test_the_metrics_of_the_canary() -> None:
    setup = Setup()
    setup.trainer.digests = [1, 2]
    first = await setup.publish(0)
    assert first["sync/canary_s"] == 0.25 and first["sync/params_read_back"] == 0.5  # of the worse engine
    assert first["sync/canary_err"] == 0 and "sync/params_changed" not in first  # nothing to compare with
    setup.trainer.digests = [1, 3]
    assert (await setup.publish(1))["sync/params_changed"] == 0.5
    assert (await setup.publish(2))["sync/params_changed"] == 0
    setup.trainer.digests = None
    assert not any("canary" in name or "params" in name for name in await setup.publish(3))


async def test_an_engine_that_refuses_is_sent_the_weights_again() -> None:
    setup = await published([1, 2])
    refusal = VerificationFailed("engine 1: version 1 did not pass")
    setup.engines[1].commit_fails = [refusal]
    metrics = await setup.publish(1)
    assert metrics["sync/canary_err"] == 1 and metrics["sync/attempts"] == 2
    assert setup.engines[0].versions == setup.engines[1].versions == [0, 1]
    setup.engines[1].commit_fails = [refusal, refusal]
    await setup.publish(2)
    assert setup.fleet.gone == [(setup.engines[1], refusal)]


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
async def test_weights_that_change_against_expectation_reach_no_engine(
    digests: list[int], changed: bool, text: str
) -> None:
    setup = await published([1, 2])
    setup.trainer.digests = digests
    with pytest.raises(WeightSyncError, match=text):
        await setup.publish(1, changed=changed)
    assert all(engine.versions == [0] for engine in setup.engines) and not setup.fleet.gone


@pytest.mark.parametrize(
    ("digests", "changed"), [([1, 2], False), ([1, 2], None), ([1, 3], True), ([1, 3], None), ([3, 4], True)]
)
async def test_weights_that_do_as_expected_are_published(digests: list[int], changed: bool | None) -> None:
    setup = await published([1, 2])
    setup.trainer.digests = digests
    assert (await setup.publish(1, changed=changed))["sync/version"] == 1


@pytest.mark.parametrize("changed", [True, False, None])
async def test_the_first_publication_has_nothing_to_differ_from(changed: bool | None) -> None:
    setup = Setup()
    setup.trainer.digests = [1, 2]
    assert (await setup.publish(0, changed=changed))["sync/version"] == 0


@pytest.mark.parametrize(("digests", "changed"), [([1, 3], False), ([1, 3], None), ([2, 3], True)])
async def test_engines_that_all_died_in_an_update_get_it_again_or_what_came_after_it(
    digests: list[int], changed: bool | None
) -> None:
    setup = await published([1, 2])
    setup.trainer.digests = [1, 3]
    for engine in setup.engines:
        engine.receive_fails = [WorkerDied("gone")]
    assert "sync/params_changed" not in await setup.publish(1, changed=True)
    setup.fleet.engines = list(setup.engines)  # started again
    setup.trainer.digests = digests
    assert (await setup.publish(2, changed=changed))["sync/params_changed"] == (0.5 if changed else 0)


async def test_updates_that_no_engine_was_there_for_count_for_the_next_one() -> None:
    """As when the only engine is being started again, and the trainer takes a step meanwhile."""
    setup = await published([1, 2])
    setup.fleet.engines = []
    for changed in (True, False, None):
        assert "sync/params_changed" not in await setup.publish(1, changed)
    setup.fleet.engines = list(setup.engines)
    setup.trainer.digests = [1, 3]
    assert (await setup.publish(1, changed=False))["sync/params_changed"] == 0.5
    with pytest.raises(WeightSyncError, match="yet parameters of the trainer changed"):
        setup.trainer.digests = [1, 4]
        await setup.publish(1, changed=False)


async def test_an_update_that_no_engine_was_there_for_must_show_in_the_next_one() -> None:
    setup = await published([1, 2])
    setup.fleet.engines = []
    await setup.publish(1, changed=True)
    setup.fleet.engines = list(setup.engines)
    with pytest.raises(WeightSyncError, match="yet no parameter of the trainer changed"):
        await setup.publish(2, changed=False)


async def test_an_update_that_is_sent_again_is_not_compared_with_itself() -> None:
    setup = await published([1, 2])
    setup.trainer.digests = [1, 3]
    setup.engines[0].receive_fails = [WeightSyncError("again")]
    metrics = await setup.publish(1, changed=True)
    assert metrics["sync/attempts"] == 2 and metrics["sync/params_changed"] == 0.5
