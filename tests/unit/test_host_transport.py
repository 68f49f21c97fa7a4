"""Both ends of the transport over host memory: `HostSender` and `Seat`, mapped and over real gloo broadcasts."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelinerl.errors import WeightSyncError
from pipelinerl.weights.digest import digest
from pipelinerl.weights.host_sender import HostSender
from pipelinerl.weights.manifest import Placed, offsets
from pipelinerl.weights.places import Place, assign
from pipelinerl.weights.seat import Seat
from pipelinerl.weights.segment import Address, Segment, node_name
from pipelinerl.weights.source import Bucket, WholeModel, parameters_in_order

TIMEOUT_S = 60.0
NODES = {  # the memory that each receiver can map, "" being the sender's
    "shared": ["", ""],
    "broadcast": ["here", "there"],
    "a node with a leader": ["there", "there", ""],
}


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


def four_buckets() -> WholeModel:
    """Four matrices of 256 KiB, each a bucket."""
    return WholeModel(nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))), 2**18)


def received(seat: Seat, transmission: int) -> dict[str, Tensor]:
    """All parameters of one update, copied out."""
    tensors = {}
    for bucket, buffer in seat.receive(transmission):
        for parameter, start in zip(bucket, offsets(bucket)[0], strict=True):
            flat = buffer[start : start + parameter.nbytes].clone().view(getattr(torch, parameter.dtype))
            tensors[parameter.name] = flat.view(parameter.shape)
    return tensors


@dataclass
class Party:
    """A sender and the receivers that have joined it."""

    sender: HostSender
    threads: ThreadPoolExecutor
    seats: list[Seat]
    transmissions: int = 0

    def receive(self) -> list["Future[dict[str, Tensor]]"]:
        """Begin to receive the next update everywhere."""
        number, self.transmissions = self.transmissions, self.transmissions + 1
        return [self.threads.submit(received, seat, number) for seat in self.seats]

    def join(self, nodes: Sequence[str]) -> None:
        """Everybody in the next epoch."""
        info = self.sender.listen("127.0.0.1")
        places, world_size = assign([[node] for node in nodes])
        info |= {"world_size": world_size}
        joining = [
            self.threads.submit(Seat, f"worker {i}", Place.from_dict(place), info) for i, [place] in enumerate(places)
        ]
        self.sender.connect(world_size)
        self.seats, self.transmissions = [future.result(TIMEOUT_S) for future in joining], 0


@contextmanager
def party(source: Any, nodes: Sequence[str], timeout_s: float = TIMEOUT_S) -> Iterator[Party]:
    with ThreadPoolExecutor(len(nodes)) as threads:
        made = Party(HostSender(source, timeout_s), threads, [])
        made.join(nodes)
        yield made
        made.sender.close()


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("bucket_bytes", [64, 400, 2**20])
def test_every_receiver_gets_every_bit_of_update_after_update(bucket_bytes: int, nodes: list[str]) -> None:
    model = Tied(0)
    source = WholeModel(model, bucket_bytes)
    with party(source, nodes) as made:
        for seed in range(3):
            with torch.no_grad():
                for parameter, other in zip(model.parameters(), Tied(seed).parameters(), strict=True):
                    parameter.copy_(other)
            receiving = made.receive()
            digests = made.sender.send(seed)
            for future in receiving:
                tensors = future.result(TIMEOUT_S)
                assert digests == [digest(tensor) for tensor in tensors.values()]
                assert list(tensors) == ["odd", "scale", "turned", "embed.weight", "norm.weight", "norm.bias"]
                for name, tensor in parameters_in_order(model):
                    assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_what_is_sent_is_a_snapshot(nodes: list[str]) -> None:
    """The optimizer may change the weights as soon as `send` has returned, before anybody has read them."""
    source = four_buckets()
    with party(source, nodes) as made:
        digests = made.sender.send(0)
        with torch.no_grad():
            for _, tensor in parameters_in_order(source._model):
                tensor.fill_(torch.nan)
        for future in made.receive():
            assert [digest(tensor) for tensor in future.result(TIMEOUT_S).values()] == digests


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_the_snapshot_can_be_sent_again_in_a_new_epoch(nodes: list[str]) -> None:
    source = four_buckets()
    with party(source, nodes) as made:
        digests = made.sender.send(0)
        with torch.no_grad():
            for _, tensor in parameters_in_order(source._model):
                tensor.fill_(0)
        made.join(list(reversed(nodes)))
        receiving = made.receive()
        made.sender.resend(0)
        for future in receiving:
            assert [digest(tensor) for tensor in future.result(TIMEOUT_S).values()] == digests


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_an_old_epoch_gets_nothing_that_is_sent_in_the_next(nodes: list[str]) -> None:
    source = four_buckets()
    with party(source, nodes) as made:
        old, made.seats = made.seats, []
        late = made.threads.submit(received, old[0], 0)
        made.join(nodes[1:])
        made.sender.send(0)
        for future in made.receive():
            assert len(future.result(TIMEOUT_S)) == 4
        with pytest.raises(WeightSyncError, match="worker 0"):
            late.result(TIMEOUT_S)


def test_digests_are_made_only_when_asked_for() -> None:
    with party(WholeModel(Tied(0), 400), [""]) as made:
        assert made.sender.send(0, with_digests=False) == []


def test_places() -> None:
    """One worker of every other node receives; the others of it, and all on the trainer's, map."""
    places, world_size = assign([["", "a"], ["a", "b"], ["", ""]])
    assert world_size == 3
    assert [[(place["rank"], place["node"]) for place in engine] for engine in places] == [
        [(None, ""), (1, "a")],
        [(None, "a"), (2, "b")],
        [(None, ""), (None, "")],
    ]
    assert assign([[""], ["", ""]])[1] == 1


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
    layout, size = manifest.layout()
    assert [[p.name for p in placed.bucket] for placed in layout] == [
        ["odd", "scale"],
        ["turned"],
        ["embed.weight"],
        ["norm.weight", "norm.bias"],
    ]
    assert [(placed.start, placed.end) for placed in layout] == [(0, 48), (48, 272), (272, 1552), (1552, 1616)]
    assert size == 1616 and layout[0].names == "parameters odd to scale" and layout[1].names == "parameter turned"


# Processes that die. They are forks of a server that has imported torch once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pipelinerl.weights.seat", "tests.unit.test_host_transport"])


def run_member(info: dict[str, Any], place: dict[str, Any]) -> None:
    """Joins, takes one bucket, and is gone."""
    seat = Seat("worker 0", Place.from_dict(place), info)
    first = seat._layout[0]
    assert seat._group is not None
    seat._group.broadcast(seat._segment.content[first.start : first.end]).wait()
    os._exit(1)


def run_sender(pipe: Connection, world_size: int) -> None:
    """Says where it listens, sends one bucket, and is gone."""
    sender = HostSender(four_buckets(), TIMEOUT_S)
    pipe.send(sender.listen("127.0.0.1") | {"world_size": world_size})
    sender.connect(world_size)
    copy: Any = sender._copy

    def copy_or_die(bucket: Bucket, placed: Placed) -> None:
        if placed.start:
            time.sleep(0.3)  # gloo has its own threads: let the first bucket leave
            os._exit(1)
        copy(bucket, placed)

    sender._copy = copy_or_die  # type: ignore[method-assign]
    sender.send(0)


def test_a_receiver_that_dies_in_a_broadcast_is_an_error_and_no_hang() -> None:
    source = four_buckets()
    sender = HostSender(source, TIMEOUT_S)
    info = sender.listen("127.0.0.1") | {"world_size": 2}
    [[place]], _ = assign([["there"]])
    process = FORKS.Process(target=run_member, args=(info, place))
    process.start()
    try:
        sender.connect(2)
        started = time.monotonic()
        sender.send(0)  # the copy is made whatever comes of it
        with pytest.raises(WeightSyncError, match=r"trainer rank 0: .* at parameter [1-3]\.weight"):
            sender.send(1)
        assert time.monotonic() - started < TIMEOUT_S / 2  # by the broken connection, long before the timeout
        with ThreadPoolExecutor(1) as threads:
            made = Party(sender, threads, [])
            made.join(["there"])  # the next epoch
            [receiving] = made.receive()
            digests = sender.send(0)
            assert [digest(tensor) for tensor in receiving.result(TIMEOUT_S).values()] == digests
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(("node", "world_size"), [("", 1), ("there", 2)])
def test_a_sender_that_dies_is_noticed_at_once(node: str, world_size: int) -> None:
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=run_sender, args=(there, world_size))
    process.start()
    try:
        info = here.recv()
        [[place]], _ = assign([[node]])
        seat = Seat("worker 0", Place.from_dict(place), info)
        taking = seat.receive(0)
        assert [parameter.name for parameter in next(taking)[0]] == ["0.weight"]
        started = time.monotonic()
        with pytest.raises(WeightSyncError, match=r"worker 0: .*1\.weight"):
            next(taking)
        assert time.monotonic() - started < TIMEOUT_S / 2
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("node", ["", "there"])
def test_a_receiver_waits_no_longer_than_the_timeout(node: str) -> None:
    with party(four_buckets(), [node], timeout_s=3.0) as made:
        [waiting] = made.receive()
        with pytest.raises(WeightSyncError, match=r"worker 0: .*parameter 0\.weight"):
            waiting.result(TIMEOUT_S)


def test_a_sender_that_nobody_joins_gives_up() -> None:
    sender = HostSender(four_buckets(), timeout_s=0.5)
    sender.listen("127.0.0.1")
    with pytest.raises(WeightSyncError, match="trainer rank 0: not all of 1 engine workers joined"):
        sender.connect(2)


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


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_tensors_that_hold_one_bucket_long_arrive_as_they_were(nodes: list[str]) -> None:
    source = Together()
    with party(source, nodes) as made:
        receiving = made.receive()
        digests = made.sender.send(0)
        for future in receiving:
            tensors = future.result(TIMEOUT_S)
            assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            assert [digest(tensor) for tensor in tensors.values()] == digests


def test_a_collective_source_is_run_to_its_end_when_a_receiver_fails() -> None:
    """Or the other trainer ranks would wait for this one's part in the buckets that are left."""
    source = Together()
    with party(source, ["there"], timeout_s=3.0) as made:
        made.sender.send(0)  # nobody takes it
        source.given.clear()
        with pytest.raises(WeightSyncError):
            made.sender.send(1)
    assert source.given == [f"{index}.weight" for index in range(4)]


# Segments


def read_segment(pipe: Connection, address: Address) -> None:
    segment = Segment.open(address)
    pipe.send((node_name(), None if segment is None else segment.content.tolist()))


def hold_segment(pipe: Connection) -> None:
    segment = Segment.create(2**20)
    pipe.send(segment.address)
    time.sleep(TIMEOUT_S)


def test_another_process_of_the_node_maps_a_segment_and_nothing_else() -> None:
    segment = Segment.create(5)
    segment.content.copy_(torch.arange(5, dtype=torch.uint8))
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=read_segment, args=(there, segment.address))
    process.start()
    assert here.recv() == (node_name(), [0, 1, 2, 3, 4])
    process.join()
    address = segment.address
    for wrong in (
        Address(address.pid, address.fd, 6, address.token),
        Address(address.pid, address.fd, 5, "00" * 16),
        Address(address.pid, 10_000, 5, address.token),
        Address(2**22 + 1, address.fd, 5, address.token),
    ):
        assert Segment.open(wrong) is None


def test_a_segment_is_gone_with_its_last_process() -> None:
    """Also of one that is killed: no name is left behind in the file system."""
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=hold_segment, args=(there,))
    process.start()
    address = here.recv()
    mapped = Segment.open(address)
    assert mapped is not None
    process.kill()
    process.join()
    assert Segment.open(address) is None
    mapped.content.fill_(1)  # who has it mapped keeps it
    assert int(mapped.content.sum()) == 2**20


def test_what_either_end_imports() -> None:
    """The driver no torch, the trainer no vLLM."""
    script = """
import sys
import pipelinerl.weights.publisher
print([name for name in ("vllm", "ray", "torch") if name in sys.modules])
import pipelinerl.weights.sender
print([name for name in ("vllm", "ray", "deepspeed", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
