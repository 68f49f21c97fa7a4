"""The wait of a worker for an NCCL broadcast ends, with a group that is none. With NCCL itself: tests/gpu."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.model_executor.model_loader import mtp_validation  # noqa: F401  the update imports it, which takes a while

from pipelinerl.errors import WeightSyncError
from pipelinerl.mailbox import post
from pipelinerl.weights.nccl import NcclEngine, NcclInitInfo

NAMES = ["a.weight", "b.weight", "c.weight"]


class Group:
    """A communicator whose broadcasts block until it is destroyed, from the second one on."""

    disabled = False

    def __init__(self) -> None:
        self.destroyed = threading.Event()
        self.calls = 0

    def broadcast(self) -> None:
        assert not self.destroyed.is_set(), "a call of an aborted communicator"
        self.calls += 1
        if self.calls > 1:
            assert self.destroyed.wait(10)

    def destroy(self) -> None:
        self.destroyed.set()


class _Parallel:
    rank = 3


def engine_in(group: Group, monkeypatch: pytest.MonkeyPatch, timeout_s: float) -> NcclEngine:
    """As vLLM makes it, and with vLLM's own loop over names, of which each is a broadcast."""

    def consume(iterator: Any, group: Group, **_: Any) -> None:
        for _name in iterator:
            group.broadcast()

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda *_: group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
    engine = NcclEngine.__new__(NcclEngine)
    engine.parallel_config, engine.model, engine.device = _Parallel(), _Model(), "cpu"  # type: ignore[assignment]
    engine.init_transfer_engine(
        NcclInitInfo(master_address="h", master_port=1, rank_offset=4, world_size=9, packed=True, timeout_s=timeout_s)
    )
    return engine


class _Model:
    load_weights: Callable[..., None] = staticmethod(lambda weights: None)


def update() -> NCCLWeightTransferUpdateInfo:
    return NCCLWeightTransferUpdateInfo(NAMES, ["bfloat16"] * 3, [[1]] * 3)


def test_what_does_not_come_in_time_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    engine = engine_in(group, monkeypatch, timeout_s=3)
    message = r"worker 3: the NCCL broadcast broke off near parameter b\.weight: it did not come within .*=3 s"
    with pytest.raises(WeightSyncError, match=message):
        engine.receive_weights(update())
    assert group.calls == 2, "nothing is asked of an aborted communicator"


def test_a_worker_that_is_told_to_leave_does_so_in_the_middle_of_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    engine = engine_in(group, monkeypatch, timeout_s=60)
    threading.Timer(0.2, post, (engine.leave_at, b"")).start()
    with pytest.raises(WeightSyncError, match=r"near parameter b\.weight: .*, or the worker was told to leave"):
        engine.receive_weights(update())
    engine.shutdown()
    with pytest.raises(OSError):
        post(engine.leave_at, b"")


def test_a_library_that_vllm_does_not_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes on without it, and what it then calls a broadcast does nothing."""
    monkeypatch.setattr(Group, "disabled", True)
    with pytest.raises(WeightSyncError, match=r"worker 3: .* NCCL library of this node: .* VLLM_NCCL_SO_PATH"):
        engine_in(Group(), monkeypatch, timeout_s=60)


def test_an_update_that_comes_is_taken_and_nothing_is_left_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.enumerate()
    group = Group()
    engine = engine_in(group, monkeypatch, timeout_s=60)
    monkeypatch.setattr(group, "broadcast", lambda: None)
    listening = [thread for thread in threading.enumerate() if thread.name == "nccl" and thread not in before]
    engine.receive_weights(update())
    assert not group.destroyed.is_set() and len(listening) == 1
    engine.shutdown()
    listening[0].join(10)
    assert not listening[0].is_alive() and group.destroyed.is_set()
