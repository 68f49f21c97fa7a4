import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.batch.packing import pack, rank_batches
from pipelinerl.errors import ConfigError
from pipelinerl.types import SampleRef

CAPACITY = 100
lengths_lists = st.lists(st.integers(1, CAPACITY), max_size=60)
rank_counts = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def loads(packed, lengths):
    """Tokens as [rank][micro_batch]."""
    return [[sum(lengths[i] for i in micro) for micro in micros] for micros in packed]


def completions(seed, count, capacity):
    """Log-normal lengths around 600 tokens, at most `capacity`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(600), 0.8, count)
    return np.clip(drawn, 16, capacity).astype(int).tolist()


def test_one_rank_gets_equal_micro_batches():
    # 6 x 30 tokens in passes of 100: three fit into one, so two are needed
    assert loads(pack([30] * 6, 1, 100), [30] * 6) == [[90, 90]]
    # 5 x 30: two are needed, 90 + 60
    assert loads(pack([30] * 5, 1, 100), [30] * 5) == [[90, 60]]
    # 6 x 20 tokens: 60 + 60, where filling up the first would give 100 + 20
    assert loads(pack([20] * 6, 1, 100), [20] * 6) == [[60, 60]]


def test_ranks_share_what_would_fit_one_pass():
    # 10 + 20 + 30 + 40 = 100 fits one pass; two ranks take 50 each: [40, 10] and [30, 20]
    assert pack([10, 20, 30, 40], 2, 100) == [[[3, 0]], [[2, 1]]]


def test_full_micro_batches_are_found():
    # 60+40, 70+30, 50+50 fill three passes of 100 exactly
    lengths = [60, 40, 70, 30, 50, 50]
    assert loads(pack(lengths, 1, 100), lengths) == [[100, 100, 100]]


def test_where_the_emptiest_first_overflows_the_bound_still_holds():
    # longest first into the emptier of two: 3+2+2 = 7 and 3+2; only [3, 3] + [2, 2, 2] keeps to 6
    assert pack([3, 3, 2, 2, 2], 1, 6) == [[[0, 1], [2, 3, 4]]]


def test_micro_batches_stay_equal_where_the_emptiest_first_overflows():
    # longest first into the emptiest of three reaches 4+4+3 = 11 > 10. Filling up to 10 gives 5+5, 4+4, 3+3+3;
    # filling up to 9 gives 5+4, 5+4, 3+3+3
    lengths = [5, 5, 4, 4, 3, 3, 3]
    assert loads(pack(lengths, 1, 10), lengths) == [[9, 9, 9]]


def test_ranks_without_work_get_empty_micro_batches():
    assert pack([5, 7], 4, 100) == [[[1]], [[0]], [[]], [[]]]


def test_no_samples():
    assert pack([], 3, 100) == [[], [], []]


def test_a_sample_that_fits_nowhere_names_the_key():
    with pytest.raises(ConfigError, match=r"101 tokens.*trainer\.micro_batch_tokens=100"):
        pack([5, 101], 2, 100)


@given(lengths_lists, rank_counts)
def test_every_sample_once_within_the_bound_and_equal_counts(lengths, ranks):
    packed = pack(lengths, ranks, CAPACITY)
    assert len(packed) == ranks and len({len(micros) for micros in packed}) == 1
    assert sorted(i for micros in packed for micro in micros for i in micro) == list(range(len(lengths)))
    assert all(load <= CAPACITY for rank in loads(packed, lengths) for load in rank)


@given(lengths_lists, rank_counts)
def test_longest_first_and_largest_micro_batch_first(lengths, ranks):
    packed = pack(lengths, ranks, CAPACITY)
    for micro in (micro for micros in packed for micro in micros):
        assert [lengths[i] for i in micro] == sorted((lengths[i] for i in micro), reverse=True)
    assert all(rank == sorted(rank, reverse=True) for rank in loads(packed, lengths))


@given(lengths_lists, rank_counts)
def test_no_more_micro_batches_than_needed(lengths, ranks):
    # two passes of first-fit-decreasing always hold more than one capacity together, so n passes hold > (n-1)/2 of it
    used = sum(bool(micro) for micros in pack(lengths, 1, CAPACITY) for micro in micros)
    assert used <= 2 * sum(lengths) / CAPACITY + 1
    assert len(pack(lengths, ranks, CAPACITY)[0]) <= -(-used // ranks)


@given(lengths_lists, rank_counts, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(lengths, ranks, random):
    shuffled = random.sample(lengths, len(lengths))

    def shape(values):
        return [[[values[i] for i in micro] for micro in micros] for micros in pack(values, ranks, CAPACITY)]

    assert shape(shuffled) == shape(lengths)
    assert pack(lengths, ranks, CAPACITY) == pack(list(lengths), ranks, CAPACITY)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([4096, 8192, 16384]))
def test_eight_ranks_are_balanced_on_log_normal_lengths(seed, capacity):
    lengths = completions(seed, 512, 4096)
    per_rank = [sum(rank) for rank in loads(pack(lengths, 8, capacity), lengths)]
    assert max(per_rank) / (sum(per_rank) / 8) <= 1.05


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_passes_are_full_and_ranks_in_step_with_many_samples(seed):
    lengths = completions(seed, 3000, 8192)
    packed = pack(lengths, 8, 8192)
    assert sum(lengths) / (8 * len(packed[0]) * 8192) >= 0.97
    # ranks wait for each other after each micro-batch: what they wait for is the largest of each row
    waited_for = sum(max(row) for row in zip(*loads(packed, lengths), strict=True))
    assert waited_for / (sum(lengths) / 8) <= 1.05


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_micro_batches_of_one_rank_are_alike(seed):
    lengths = completions(seed, 200, 4096)
    (rank,) = loads(pack(lengths, 1, 16384), lengths)
    assert max(rank) / min(rank) <= 1.05


def test_rank_batches_carry_the_references_and_the_kl_to_go():
    refs = [SampleRef(group=g, rollout=r, advantage=g - r, length=10 * (g + r + 1)) for g in range(2) for r in range(2)]
    batches = rank_batches(refs, ranks=2, micro_batch_tokens=50, kl_to_go=0.25)
    # lengths 10, 20, 20, 30 -> [30, 10] and [20, 20]
    assert [[len(micro) for micro in batch.micro_batches] for batch in batches] == [[2], [2]]
    assert batches[0].micro_batches[0] == (refs[3], refs[0]) and batches[1].micro_batches[0] == (refs[1], refs[2])
    assert all(batch.kl_to_go == 0.25 for batch in batches)
