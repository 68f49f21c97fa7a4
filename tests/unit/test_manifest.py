"""How a model is cut into buckets, the same way on both sides of an update."""

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.weights.manifest import ALIGNMENT, Manifest, Parameter, offsets


def parameter(nbytes: int, name: str = "weight") -> Parameter:
    return Parameter(name, "uint8", (nbytes,), nbytes)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    sizes = draw(st.lists(st.integers(1, 300), max_size=30))
    parameters = tuple(
        Parameter(f"layers.{i}.weight", draw(st.sampled_from(["bfloat16", "float32"])), (1, size), size)
        for i, size in enumerate(sizes)
    )
    return Manifest(parameters, draw(st.integers(1, 400)))


@settings(deadline=None)
@given(manifests())
def test_buckets_hold_every_parameter_once_and_in_order(manifest: Manifest) -> None:
    buckets = [list(bucket) for bucket in manifest.buckets()]
    assert all(buckets)
    assert [p for bucket in buckets for p in bucket] == list(manifest.parameters)


@settings(deadline=None)
@given(manifests())
def test_a_buffer_exceeds_the_bound_only_where_one_parameter_does(manifest: Manifest) -> None:
    for bucket in manifest.buckets():
        assert offsets(bucket)[1] <= manifest.bucket_bytes or len(bucket) == 1


@settings(deadline=None)
@given(manifests())
def test_no_bucket_is_cut_short(manifest: Manifest) -> None:
    buckets = [list(bucket) for bucket in manifest.buckets()]
    for bucket, following in pairwise(buckets):
        assert offsets([*bucket, following[0]])[1] > manifest.bucket_bytes


@settings(deadline=None)
@given(manifests())
def test_parameters_lie_aligned_and_apart_in_their_buffer(manifest: Manifest) -> None:
    for bucket in manifest.buckets():
        starts, size = offsets(bucket)
        ends = [start + p.nbytes for p, start in zip(bucket, starts, strict=True)]
        assert all(start % ALIGNMENT == 0 for start in starts)
        assert starts[0] == 0
        assert all(end <= start for end, start in zip(ends, [*starts[1:], size], strict=True))


def test_buckets_and_offsets_worked_out_by_hand() -> None:
    # 8 and 20 bytes take 16 and 32: 48 together. 40 take 48, which no longer fits in 64. 100 is too large for any
    # bucket and gets one of its own. 64 fills one exactly.
    sizes = (8, 20, 40, 100, 64)
    manifest = Manifest(tuple(parameter(size, str(size)) for size in sizes), bucket_bytes=64)
    assert [[p.name for p in bucket] for bucket in manifest.buckets()] == [["8", "20"], ["40"], ["100"], ["64"]]
    assert [offsets(bucket) for bucket in manifest.buckets()] == [([0, 16], 48), ([0], 48), ([0], 112), ([0], 64)]
    assert manifest.nbytes == 8 + 20 + 40 + 100 + 64


def test_a_model_without_parameters_has_no_buckets() -> None:
    assert list(Manifest((), 64).buckets()) == []
    assert offsets([]) == ([], 0)


@settings(deadline=None)
@given(manifests())
def test_a_manifest_survives_the_way_to_the_engine(manifest: Manifest) -> None:
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
