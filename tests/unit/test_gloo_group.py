"""Real gloo broadcasts on localhost: `GlooSender` at one end, `GlooGroup.receive` at the other."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelinerl.errors import WeightSyncError
from pipelinerl.weights.digest import digest
from pipelinerl.weights.gloo_group import GlooGroup
from pipelinerl.weights.manifest import Manifest, offsets
from pipelinerl.weights.sender import GlooSender
from pipelinerl.weights.source import Bucket, WholeModel, parameters_in_order

TIMEOUT_S = 60.0


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a float32 norm, an odd shape, a scalar and a matrix that is no
    contiguous tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(40, 16, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(7)
        self.odd = nn.Parameter(torch.randn(3, 5, 1).to(torch.bfloat16))
        self.scale = nn.Parameter(torch.randn(()))
        self.turned = nn.Parameter(torch.randn(6, 9).T)
        self.head = nn.Linear(16, 40, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight


def receive(group: GlooGroup, manifest: Manifest) -> dict[str, Tensor]:
    """All parameters of one update, as views of the buckets: vLLM keeps such views over several buckets."""
    received = {}
    for bucket, buffer in group.receive(manifest):
        for parameter, start in zip(bucket, offsets(bucket)[0], strict=True):
            flat = buffer[start : start + parameter.nbytes].view(getattr(torch, parameter.dtype))
            received[parameter.name] = flat.view(parameter.shape)
    return received


def join(init_info: dict[str, Any], rank: int, world_size: int) -> GlooGroup:
    """As an engine worker joins; see GlooWeightTransferEngine.init_transfer_engine."""
    timeout = timedelta(seconds=init_info["timeout_s"])
    address, port = init_info["address"], init_info["port"]
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return GlooGroup(store, init_info["epoch"], rank, world_size, init_info["timeout_s"])


@contextmanager
def receivers(sender: GlooSender, count: int) -> Iterator[tuple[ThreadPoolExecutor, list[GlooGroup]]]:
    """`count` groups that have joined the sender's, and threads for them."""
    init_info = sender.listen("127.0.0.1")
    with ThreadPoolExecutor(count) as threads:
        joining = [threads.submit(join, init_info, 1 + i, 1 + count) for i in range(count)]
        sender.connect(1 + count)
        yield threads, [future.result() for future in joining]


@pytest.mark.parametrize("bucket_bytes", [64, 400, 2**20])
def test_every_receiver_gets_every_bit_of_update_after_update(bucket_bytes: int) -> None:
    sender = GlooSender(TIMEOUT_S)
    with receivers(sender, count=2) as (threads, groups):
        for seed in range(2):
            model = Tied(seed)
            source = WholeModel(model, bucket_bytes)
            manifest = Manifest.from_dict(source.manifest.to_dict())
            receiving = [threads.submit(receive, group, manifest) for group in groups]
            digests = sender.send(source)
            for future in receiving:
                received = future.result()
                assert digests == [digest(tensor) for tensor in received.values()]
                assert list(received) == ["odd", "scale", "turned", "embed.weight", "norm.weight", "norm.bias"]
                for name, tensor in parameters_in_order(model):
                    assert received[name].dtype == tensor.dtype
                    assert torch.equal(received[name], tensor), name


def test_digests_are_made_only_when_asked_for() -> None:
    sender = GlooSender(TIMEOUT_S)
    with receivers(sender, count=1) as (threads, groups):
        source = WholeModel(Tied(0), 400)
        receiving = threads.submit(receive, groups[0], source.manifest)
        assert sender.send(source, with_digests=False) == []
        receiving.result()


def test_a_tied_weight_is_sent_once_and_sizes_are_those_of_the_tensors() -> None:
    manifest = WholeModel(Tied(0), 64).manifest
    assert [(p.name, p.dtype, p.shape, p.nbytes) for p in manifest.parameters] == [
        ("odd", "bfloat16", (3, 5, 1), 2 * 15),
        ("scale", "float32", (), 4),
        ("turned", "float32", (9, 6), 4 * 54),
        ("embed.weight", "bfloat16", (40, 16), 2 * 640),
        ("norm.weight", "float32", (7,), 4 * 7),
        ("norm.bias", "float32", (7,), 4 * 7),
    ]
    # 30 and 4 bytes take 32 and 16 of 64; 216 and 1280 are too large for company; 28 and 28 take 32 each.
    buckets = [[p.name for p in bucket] for bucket in manifest.buckets()]
    assert buckets == [["odd", "scale"], ["turned"], ["embed.weight"], ["norm.weight", "norm.bias"]]


# In a process of its own: joins, takes one of the buckets, and dies.
DYING_RECEIVER = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
from pipelinerl.weights.gloo_group import GlooGroup
from pipelinerl.weights.manifest import Manifest

info, manifest = map(json.loads, sys.argv[1:])
store = dist.TCPStore(info["address"], info["port"], is_master=False, timeout=timedelta(seconds=info["timeout_s"]))
group = GlooGroup(store, info["epoch"], 1, 2, info["timeout_s"])
next(group.receive(Manifest.from_dict(manifest)))
os._exit(1)
"""


def four_buckets() -> WholeModel:
    """Four matrices of 256 KiB, each a bucket."""
    return WholeModel(nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))), 2**18)


def test_a_receiver_that_dies_in_a_transfer_is_an_error_and_no_hang() -> None:
    source = four_buckets()
    sender = GlooSender(TIMEOUT_S)
    arguments = [json.dumps(part) for part in (sender.listen("127.0.0.1"), source.manifest.to_dict())]
    receiver = subprocess.Popen([sys.executable, "-c", DYING_RECEIVER, *arguments])
    try:
        sender.connect(2)
        started = time.monotonic()
        with pytest.raises(WeightSyncError, match=r"trainer rank 0: .* near parameter [1-3]\.weight"):
            sender.send(source)
        assert time.monotonic() - started < TIMEOUT_S / 2  # by the broken connection, long before the timeout
        with pytest.raises(WeightSyncError):  # the group is of no more use, and says so
            sender.send(source)
    finally:
        receiver.kill()
        receiver.wait()


def test_a_receiver_that_stops_taking_is_an_error_after_the_timeout() -> None:
    source = four_buckets()
    sender = GlooSender(timeout_s=1.0)
    with receivers(sender, count=1) as (threads, [group]):
        taking = group.receive(source.manifest)
        first = threads.submit(next, taking)
        with pytest.raises(WeightSyncError, match="trainer rank 0"):
            sender.send(source)
        assert first.result()[0] == [source.manifest.parameters[0]]


class Together:
    """A source that all ranks run through, as one whose buckets are gathered. Its tensors hold one bucket long."""

    collective = True

    def __init__(self) -> None:
        whole = four_buckets()
        self._whole, self.manifest = whole, whole.manifest
        self.given: list[str] = []

    def buckets(self) -> Iterator[Bucket]:
        for bucket in self._whole.buckets():
            self.given += [parameter.name for parameter, _ in bucket]
            copies = [(parameter, tensor.clone()) for parameter, tensor in bucket]
            yield copies
            for _, tensor in copies:
                tensor.fill_(torch.nan)


def test_tensors_that_hold_one_bucket_long_arrive_as_they_were() -> None:
    sender, source = GlooSender(TIMEOUT_S), Together()
    with receivers(sender, count=1) as (threads, [group]):
        receiving = threads.submit(receive, group, source.manifest)
        digests = sender.send(source)
        received = receiving.result()
    assert all(bool(tensor.isfinite().all()) for tensor in received.values())
    assert [digest(tensor) for tensor in received.values()] == digests


def test_a_collective_source_is_run_to_its_end_when_the_receiver_fails() -> None:
    """Or the other trainer ranks would wait for this one's part in the buckets that are left."""
    sender, source = GlooSender(timeout_s=1.0), Together()
    with receivers(sender, count=1), pytest.raises(WeightSyncError):
        sender.send(source)
    assert source.given == [f"{index}.weight" for index in range(4)]


def test_a_receiver_waits_no_longer_than_the_timeout() -> None:
    manifest = four_buckets().manifest
    sender = GlooSender(timeout_s=0.5)
    with (
        receivers(sender, count=1) as (threads, [group]),
        pytest.raises(RuntimeError, match=r"(?i)timed? ?out"),
    ):
        threads.submit(receive, group, manifest).result(timeout=TIMEOUT_S)


def test_a_sender_that_nobody_joins_gives_up() -> None:
    sender = GlooSender(timeout_s=0.5)
    sender.listen("127.0.0.1")
    with pytest.raises(RuntimeError):
        sender.connect(2)


def test_the_trainer_can_import_its_end_without_vllm() -> None:
    script = """
import sys
import pipelinerl.weights.sender
print([name for name in ("vllm", "ray", "deepspeed", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
