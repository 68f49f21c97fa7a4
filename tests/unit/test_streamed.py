"""A step that is trained on in chunks is the step that is trained on whole, whatever the chunks."""

from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.config.schema import OF_THE_STEP, Advantage, Aggregation, RunConfig
from pipelinerl.streamed import StreamedStep
from pipelinerl.types import GroupMeta, Outcome, RankBatch, RolloutMeta, SampleKL
from pipelinerl.updates import make_batches
from tests.unit.fakes import references, small_config

OK, ERROR, TRUNCATED = Outcome.OK, Outcome.ENV_ERROR, Outcome.TRUNCATED
PROMPT, LIMIT = 3, 10
GROUP_ADVANTAGES = [name for name in get_args(Advantage) if name not in OF_THE_STEP]


def group(id: int, lengths: list[int], outcomes: list[Outcome] | None = None) -> GroupMeta:
    ends = zip(lengths, outcomes or [OK] * len(lengths), strict=True)
    rollouts = tuple(
        RolloutMeta(float(k % 2), outcome, {}, n + PROMPT, PROMPT, n, {0: n}) for k, (n, outcome) in enumerate(ends)
    )
    return GroupMeta(id, f"train/{id}", 0, rollouts, 1.0)


def config_of(groups: int, *overrides: str) -> RunConfig:
    """Steps of `groups` groups of 4, and micro-batches of 16 tokens."""
    sizes = (f"batch.groups_per_step={groups}", "batch.group_size=4", f"sampling.max_tokens={LIMIT}")
    rows = ("engine.max_model_len=16", "trainer.micro_batch_tokens=16", "trainer.ranks=2")
    return small_config(*sizes, *rows, "batch.stream=true", *overrides)


@st.composite
def steps(draw: st.DrawFn) -> list[GroupMeta]:
    """Groups with two to four scored rollouts, ids ascending with gaps."""
    ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(sorted))
    ends = st.lists(st.sampled_from([OK, OK, TRUNCATED, ERROR]), min_size=2, max_size=2)
    lengths = st.lists(st.integers(1, LIMIT), min_size=4, max_size=4)
    return [group(id, draw(lengths), [OK, TRUNCATED, *draw(ends)]) for id in ids]


def train(
    step: StreamedStep, chunks: list[list[GroupMeta]], config: RunConfig, kl: list[SampleKL]
) -> dict[tuple[int, int], tuple[float, float, int]]:
    """(id of the group, rollout) -> advantage, weight and length of what is trained on, chunk by chunk."""
    trained = {}
    for chunk in chunks:
        ids = [group.id for group in chunk]
        own = [SampleKL(ids.index(k.group), k.rollout, k.total, 0.0, 0.0) for k in kl if k.group in ids] or None
        assert not step.complete
        batches = step.batches(chunk, own)
        step.add(chunk, own)
        assert len({len(batch.micro_batches) for batch in batches}) == 1 and len(batches) == config.trainer.ranks
        for ref in references([batches]):
            trained[ids[ref.group], ref.rollout] = (ref.advantage, ref.weight, ref.length)
    return trained


@settings(deadline=None, max_examples=60)
@given(
    steps(),
    st.sampled_from(GROUP_ADVANTAGES),
    st.sampled_from(get_args(Aggregation)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_chunks_in_any_order_add_up_to_the_whole_step(
    groups: list[GroupMeta], advantage: str, aggregation: str, with_kl: bool, random: Random
) -> None:
    with_kl = with_kl and advantage != "maxrl"
    kl_settings = ["algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.coef=0.5"] if with_kl else []
    of_loss = [f"algo.advantage={advantage}", f"algo.aggregation={aggregation}", "algo.mask_truncated=true"]
    config = config_of(len(groups), *of_loss, *kl_settings)
    scored = [(g, r) for g in groups for r, rollout in enumerate(g.rollouts) if rollout.outcome.scored]
    kl = [SampleKL(g.id, r, random.random(), 0.0, 0.0) for g, r in scored] if with_kl else []
    ids = [g.id for g in groups]
    of_step = [SampleKL(ids.index(k.group), k.rollout, k.total, 0.0, 0.0) for k in kl] if with_kl else None
    whole = make_batches(groups, config, 3, of_step)

    arrived = random.sample(groups, len(groups))
    cuts = sorted(random.sample(range(1, len(groups)), random.randrange(len(groups))))
    chunks = [arrived[a:b] for a, b in zip([0, *cuts], [*cuts, len(groups)], strict=True)]
    step = StreamedStep(config, 3)
    trained = train(step, chunks, config, kl)

    assert step.complete and step.chunks == [[g.id for g in chunk] for chunk in chunks]
    expected = {(ids[ref.group], ref.rollout): ref for ref in references(whole.updates)}
    assert trained.keys() == expected.keys()
    for place, ref in expected.items():
        got, weight, length = trained[place]
        assert (got, length) == (ref.advantage, ref.length)  # to the bit
        assert weight * step.scale == pytest.approx(ref.weight, rel=1e-12)
    values = step.values()
    assert values.metrics == pytest.approx(whole.metrics, rel=1e-12, nan_ok=True)
    assert [a.tolist() for a in values.advantages] == [a.tolist() for a in whole.advantages]

    again = StreamedStep(config, 3)  # chunks that were recorded
    assert train(again, [[groups[ids.index(i)] for i in chunk] for chunk in step.chunks], config, kl) == trained
    assert again.scale == step.scale


def scale_of(*groups: GroupMeta, aggregation: str) -> float:
    step = StreamedStep(config_of(len(groups), f"algo.aggregation={aggregation}"), 1)
    step.add(groups)
    return step.scale


def test_the_scale_is_planned_over_counted() -> None:
    whole, errored = group(0, [1, 2, 3, 4]), group(1, [5, 5, 9, 5], [OK, OK, ERROR, OK])
    for aggregation in ("seq_mean_token_mean", "seq_mean_token_sum", "constant", "prompt_mean"):
        assert scale_of(whole, group(1, [5, 5, 5, 5]), aggregation=aggregation) == 1.0
    assert scale_of(whole, errored, aggregation="constant") == 8 / 7
    assert scale_of(whole, errored, aggregation="prompt_mean") == 1.0
    assert scale_of(whole, errored, aggregation="token_mean") == 8 * LIMIT / 25


def test_it_is_worth_starting_when_every_rank_has_a_full_micro_batch_or_no_more_will_come() -> None:
    step = StreamedStep(config_of(3), 1)  # 2 ranks of 16 tokens
    fewer = group(0, [4, 4, 4, 9], [OK, OK, OK, ERROR])  # 3 x 7 tokens, prompts included
    assert not step.worth_starting([])
    assert not step.worth_starting([fewer])
    assert step.worth_starting([fewer, group(1, [1, 1, 1, 1])])  # 21 + 16
    step.add([fewer, group(1, [1, 1, 1, 1])])
    assert step.worth_starting([group(2, [1, 1, 1, 1])])  # 16, but the last
    shared = StreamedStep(config_of(3, "trainer.sequence_parallel=2"), 1)  # both ranks work on one row
    assert shared.worth_starting([fewer])


def test_a_step_has_its_scale_and_values_only_when_it_is_complete() -> None:
    step = StreamedStep(config_of(2), 1)
    step.add([group(0, [1, 1, 1, 1])])
    for read in (lambda: step.scale, step.values):
        with pytest.raises(AssertionError):
            read()
    with pytest.raises(AssertionError, match="another step"):
        step.add([group(n, [1, 1, 1, 1]) for n in (1, 2)])


def test_every_chunk_feeds_every_rank_as_often() -> None:
    batches: list[RankBatch] = StreamedStep(config_of(2), 1).batches([group(0, [10, 10, 10, 10])])
    assert [len(batch.micro_batches) for batch in batches] == [2, 2]
