"""Ranks that share each row (Ulysses), on DeepSpeed over gloo: the loss and the gradient are those of one rank.

All cases run in one subprocess (see sequence_ranks.py). SGD makes a change of the weights their gradient, element by
element; the learning rate is large, or the weights' own rounding would show.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelinerl.batch.packing import rank_batches
from pipelinerl.types import (
    Completion,
    Outcome,
    RankBatch,
    Rollout,
    RolloutGroup,
    SampleRef,
    ScoreRequest,
    Turn,
    VersionSpan,
)
from tests.integration import sequence_ranks
from tests.integration.models import run_config
from tests.integration.ranks import results_of
from tests.integration.sequence_ranks import REFUSED, Case, RankRun

TEMPERATURE = 0.8
REQUEST = ScoreRequest((TEMPERATURE,), {0: False})
SGD: dict[str, Any] = {"optimizer": "sgd", "betas": (0.0, 0.0), "lr": 20.0, "max_grad_norm": 0.5}
ENTROPY = {"kind": "ppo_clip", "entropy": {"coef": 0.05}}
# (context, completion): of the first, all sampled tokens are in the second half of a row of its own
LENGTHS = ((60, 4), (5, 17), (4, 3), (7, 9), (3, 30), (6, 12))


def make_groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(7)

    def rollout(context: int, sampled: int) -> Rollout:
        tokens, logprobs = rng.integers(6, 100, sampled), rng.normal(-4.5, 0.5, sampled)
        span = VersionSpan(0, 0, sampled)
        completion = Completion(tokens.astype(np.int32), logprobs.astype(np.float32), (span,), "stop", "")
        return Rollout((Turn(rng.integers(6, 100, context).astype(np.int32), completion),), 1.0, Outcome.OK)

    return [RolloutGroup(g, f"train/{g}", tuple(rollout(*LENGTHS[3 * g + k]) for k in range(3))) for g in range(2)]


GROUPS = make_groups()
REFS = [
    SampleRef(g, k, (1.0, -0.5, 0.7)[k] * (1 + g), rollout.total_len, weight=1 / sum(n for _, n in LENGTHS))
    for g, group in enumerate(GROUPS)
    for k, rollout in enumerate(group.rollouts)
]


def cut(ranks: int, together: int, tokens: int = 10_000) -> list[RankBatch]:
    """The work of each rank when consecutive ones share rows."""
    return [batch for batch in rank_batches(REFS, ranks // together, tokens) for _ in range(together)]


def uneven() -> list[RankBatch]:
    """Two pairs of ranks: the first has three rows, of odd lengths, the second has one and two dummies."""
    first = RankBatch(((REFS[0],), (REFS[1], REFS[2]), (REFS[3],)))
    second = RankBatch(((REFS[4], REFS[5]), (), ()))
    return [first, first, second, second]


@pytest.fixture(scope="module")
def runs(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RankRun]]:
    """Every case, as [rank]."""

    def case(batches: Sequence[RankBatch], together: int, **trainer: Any) -> Case:
        settings = SGD | {"ranks": len(batches), "sequence_parallel": together} | trainer
        config = run_config(tied_model, trainer=settings, sampling={"temperature": TEMPERATURE}, algo=ENTROPY)
        return Case(config, batches, GROUPS, REQUEST)

    cases = {
        "one": case(cut(1, 1), 1),
        "two": case(cut(2, 2, 64), 2, zero_stage=2, gradient_checkpointing=True),
        "two_pairs": case(uneven(), 2, zero_stage=3),
        "more_ranks_than_kv_heads": case(cut(4, 4), 4),
    }
    return results_of(sequence_ranks, cases, tmp_path_factory.mktemp("sequence"))


SHARED = ("two", "two_pairs", "more_ranks_than_kv_heads")


@pytest.mark.parametrize("case", SHARED)
def test_ranks_that_share_rows_make_the_step_of_one_rank(case: str, runs: dict[str, list[RankRun]]) -> None:
    (one,) = runs["one"]
    for run in runs[case]:
        for name, before in one.weights[0].items():
            change, actual = one.weights[1][name] - before, run.weights[1][name] - run.weights[0][name]
            assert np.linalg.norm(change) > 1e-4, name
            assert np.linalg.norm(actual - change) < 1e-5 * np.linalg.norm(change), name


@pytest.mark.parametrize("case", SHARED)
def test_every_token_is_counted_once(case: str, runs: dict[str, list[RankRun]]) -> None:
    wanted = dict(runs["one"][0].results[0].metrics)
    assert wanted["mismatch/tokens"] == sum(sampled for _, sampled in LENGTHS)
    del wanted["perf/train_s"]
    for run in runs[case]:
        metrics = dict(run.results[0].metrics)
        del metrics["perf/train_s"]
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", ["two", "more_ranks_than_kv_heads"])
def test_rank_0_scores_whole_sequences_alone(case: str, runs: dict[str, list[RankRun]]) -> None:
    for mine, expected in zip(runs[case][0].scored, runs["one"][0].scored, strict=True):
        np.testing.assert_allclose(mine.trainer[TEMPERATURE], expected.trainer[TEMPERATURE], atol=1e-5)


def test_an_export_names_no_attention_of_ours(runs: dict[str, list[RankRun]]) -> None:
    assert "ulysses" not in runs["two"][0].exported_config


def test_heads_that_cannot_be_dealt_out_are_refused(runs: dict[str, list[RankRun]]) -> None:
    for size, message in zip(REFUSED, runs["one"][0].refusals, strict=True):
        assert message.startswith(f"trainer.sequence_parallel={size} ") and "4 attention heads and 2 key" in message
