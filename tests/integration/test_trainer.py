"""Trainer ranks on DeepSpeed: a step does not depend on how it was cut, and a bad one changes nothing.

All cases run in one subprocess (see trainer_ranks.py). AdamW divides its first step by |gradient| + eps. With the
usual eps that is the gradient's sign, in which rounding noise of a tiny gradient becomes a full step. Here eps is 1,
far above the gradients, so that a step is nearly proportional to the gradient: -lr * g / (|g| + 1). Comparing weights
then compares gradients, element by element.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelinerl.batch.packing import rank_batches
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan
from tests.integration import trainer_ranks
from tests.integration.models import load_reference, reference_logprobs, run_config
from tests.integration.ranks import results_of
from tests.integration.trainer_ranks import Case, RankRun

Weights = dict[str, NDArray[np.float32]]

TEMPERATURE = 0.8
LR, EPS, MAX_NORM = 1.0, 1.0, 0.25
BF16_LR = 30.0  # a change must be large against the spacing of bf16 numbers
GSPO = {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04}  # some of the sequences below are clipped, some are not
ADAM: dict[str, Any] = {"lr": LR, "eps": EPS, "max_grad_norm": MAX_NORM, "weight_decay": 0.0, "betas": (0.9, 0.95)}


def make_groups(model: Path) -> list[RolloutGroup]:
    """Three groups of four rollouts of different lengths, two turns in some, with logprobs that miss the policy's a
    little, so that some ratios are clipped and some are not."""
    rng = np.random.default_rng(3)
    policy = load_reference(model)
    return [
        RolloutGroup(g, f"train/{g}", tuple(make_rollout(policy, rng, 1 + (g + k) % 2) for k in range(4)))
        for g in range(3)
    ]


def make_rollout(policy: Any, rng: np.random.Generator, turns: int) -> Rollout:
    pieces = [
        (rng.integers(6, 100, rng.integers(2, 9)), rng.integers(6, 100, rng.integers(1, 20))) for _ in range(turns)
    ]
    with torch.no_grad():
        tokens = np.concatenate([part for piece in pieces for part in piece])
        logprobs = np.append(0.0, reference_logprobs(policy, tokens.tolist(), TEMPERATURE).numpy())
    made, start = [], 0
    for context, sampled in pieces:
        start += len(context)
        noisy = logprobs[start : start + len(sampled)] + rng.normal(0, 0.2, len(sampled))
        start += len(sampled)
        span = VersionSpan(0, 0, len(sampled))
        completion = Completion(sampled.astype(np.int32), noisy.astype(np.float32), (span,), "stop", "")
        made.append(Turn(context.astype(np.int32), completion))
    return Rollout(tuple(made), 1.0, Outcome.OK)


def references(groups: Sequence[RolloutGroup]) -> list[SampleRef]:
    advantages = (1.0, -0.5, 0.25, -2.0)
    return [
        SampleRef(g, k, advantages[k] * (1 + g), rollout.total_len)
        for g, group in enumerate(groups)
        for k, rollout in enumerate(group.rollouts)
    ]


def sampled_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(rollout.completion_len for group in groups for rollout in group.rollouts)


def cut(groups: Sequence[RolloutGroup], ranks: int, tokens: int = 10_000) -> list[RankBatch]:
    return rank_batches(references(groups), ranks, tokens, sampled_tokens(groups))


def uneven(groups: Sequence[RolloutGroup]) -> list[RankBatch]:
    """Rank 0 has three micro-batches; rank 1 has one sample and two dummies."""
    refs = references(groups)
    rank_0 = (tuple(refs[0:5]), tuple(refs[5:6]), tuple(refs[6:11]))
    rank_1 = ((refs[11],), (), ())
    return [RankBatch(batches, sampled_tokens(groups), len(refs)) for batches in (rank_0, rank_1)]


def with_nan(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """One logprob of the last rollout is NaN: in `uneven` that is the one sample of rank 1."""
    rollout = groups[-1].rollouts[-1]
    turn = rollout.turns[0]
    logprobs = turn.completion.logprobs.copy()
    logprobs[0] = np.nan
    turn = replace(turn, completion=replace(turn.completion, logprobs=logprobs))
    broken = replace(rollout, turns=(turn, *rollout.turns[1:]))
    return [*groups[:-1], replace(groups[-1], rollouts=(*groups[-1].rollouts[:-1], broken))]


def make_cases(tied: Path, untied: Path, groups: list[RolloutGroup], folder: Path) -> dict[str, Case]:
    def case(
        steps: list[list[RankBatch]],
        payloads: list[list[RolloutGroup]] | None = None,
        *,
        model: Path = tied,
        dtype: str = "float32",
        export: Path | None = None,
        algo: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> Case:
        sections = {
            "trainer": ADAM | {"ranks": len(steps[0])} | trainer,
            "sampling": {"temperature": TEMPERATURE},
            "algo": algo or {},
        }
        return Case(run_config(model, dtype, **sections), steps, payloads or [groups] * len(steps), export)

    bad = with_nan(groups)
    one, two = cut(groups, 1), cut(groups, 2)
    return {
        "whole": case([one, one], export=folder / "exported"),
        "micro_batches": case([cut(groups, 1, 80)]),
        "zero_2": case([cut(groups, 1, 80)], zero_stage=2),
        "ranks": case([two]),
        "dummies": case([uneven(groups)]),
        "dummies_zero_2": case([uneven(groups)], zero_stage=2),
        "small_chunks": case([cut(groups, 1, 80)], logprob_chunk=5, gradient_checkpointing=True),
        "gspo": case([one], algo=GSPO),
        "gspo_dummies": case([uneven(groups)], algo=GSPO),
        "untied": case([one], model=untied),
        "untied_dummies": case([uneven(groups)], model=untied),
        "nan_zero_1": case([uneven(groups)] * 3, [bad, bad, groups]),
        "nan_zero_2": case([uneven(groups)] * 3, [bad, bad, groups], zero_stage=2),
        "lr_0": case([one, one], lr=0.0),
        "bf16": case([one], dtype="bfloat16", lr=BF16_LR, export=folder / "exported_bf16"),
        "bf16_micro_batches": case([cut(groups, 1, 60)], dtype="bfloat16", lr=BF16_LR),
        "bf16_nan": case([uneven(groups)] * 2, [bad, groups], dtype="bfloat16"),
    }


@pytest.fixture(scope="module")
def groups(tied_model: Path) -> list[RolloutGroup]:
    return make_groups(tied_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def runs(tied_model: Path, untied_model: Path, groups: list[RolloutGroup], folder: Path) -> dict[str, list[RankRun]]:
    """Every case, as [rank]."""
    return results_of(trainer_ranks, make_cases(tied_model, untied_model, groups, folder), folder)


def change(run: RankRun, step: int = 0) -> Weights:
    """What a step did to the weights."""
    return {name: run.weights[step + 1][name] - before for name, before in run.weights[step].items()}


def assert_same_change(actual: Weights, expected: Weights, tolerance: float) -> None:
    """The distance is small against the change itself, for every parameter."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = np.linalg.norm(value)
        assert size > 1e-5, name
        assert np.linalg.norm(actual[name] - value) < tolerance * size, name


def ppo_by_hand(log_ratio: Tensor, advantage: float) -> Tensor:
    """Summed over the tokens of a rollout."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()


def gspo_by_hand(log_ratio: Tensor, advantage: float) -> Tensor:
    """One value for the whole rollout, whatever its turns."""
    ratio = log_ratio.mean().exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.97, 1.04) * advantage)


def by_hand(
    model: Path,
    groups: Sequence[RolloutGroup],
    lr: float = LR,
    dtype: torch.dtype = torch.float32,
    objective: Callable[[Tensor, float], Tensor] = ppo_by_hand,
    count: int | None = None,
) -> tuple[float, float, Weights]:
    """Loss, gradient norm and first step, rollout by rollout in plain torch. `count` replaces the sampled tokens."""
    policy = load_reference(model, dtype)
    losses: list[Tensor] = []
    for ref in references(groups):
        rollout = groups[ref.group].rollouts[ref.rollout]
        parts = [part for turn in rollout.turns for part in (turn.context, turn.completion.tokens)]
        new = torch.cat([torch.zeros(1), reference_logprobs(policy, np.concatenate(parts).tolist(), TEMPERATURE)])
        start, log_ratios = 0, []
        for turn in rollout.turns:
            start += len(turn.context)
            stop = start + len(turn.completion.tokens)
            log_ratios.append(new[start:stop] - torch.from_numpy(turn.completion.logprobs))
            start = stop
        losses.append(objective(torch.cat(log_ratios), ref.advantage))
    loss = torch.stack(losses).sum() / (count or sampled_tokens(groups))
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in policy.parameters() if p.grad is not None))
    steps = {}
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        clipped = parameter.grad.float() * min(1.0, MAX_NORM / norm)
        # AdamW's first step: both moments are debiased to g and g^2.
        steps[name] = (-lr * clipped / (clipped.abs() + EPS)).numpy()
    return loss.item(), norm, steps


@pytest.mark.parametrize(
    ("case", "head", "objective", "count"),
    [
        ("whole", "tied_model", ppo_by_hand, None),
        ("untied", "untied_model", ppo_by_hand, None),
        ("gspo", "tied_model", gspo_by_hand, 12),  # three groups of four rollouts
    ],
)
def test_a_step_is_the_one_worked_out_without_packing(
    case: str,
    head: str,
    objective: Callable[[Tensor, float], Tensor],
    count: int | None,
    runs: dict[str, list[RankRun]],
    groups: list[RolloutGroup],
    request: pytest.FixtureRequest,
) -> None:
    loss, norm, expected = by_hand(request.getfixturevalue(head), groups, objective=objective, count=count)
    run = runs[case][0]
    metrics = run.results[0].metrics
    assert norm > 1.2 * MAX_NORM  # clipping to the norm is part of what is compared
    assert metrics["optim/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["optim/lr"] == LR and metrics["optim/skipped"] == 0
    assert 0 < metrics["policy/clip_rate"] < 1
    assert_same_change(change(run), expected, 2e-4)


CUTS = {
    "micro_batches": "whole",
    "zero_2": "whole",
    "ranks": "whole",
    "dummies": "whole",
    "dummies_zero_2": "whole",
    "small_chunks": "whole",
    "untied_dummies": "untied",
    "gspo_dummies": "gspo",
}


@pytest.mark.parametrize("case", CUTS)
def test_ranks_micro_batches_and_zero_stage_do_not_change_a_step(case: str, runs: dict[str, list[RankRun]]) -> None:
    expected = runs[CUTS[case]][0]
    for rank in runs[case]:
        assert_same_change(change(rank), change(expected), 2e-5)
        metrics, wanted = dict(rank.results[0].metrics), dict(expected.results[0].metrics)
        del metrics["perf/train_s"], wanted["perf/train_s"]
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_the_cases_are_cut_as_they_say(groups: list[RolloutGroup]) -> None:
    assert [len(batch.micro_batches) for batch in cut(groups, 1)] == [1]
    assert len(cut(groups, 1, 80)[0].micro_batches) >= 4
    assert [len(batch.micro_batches) for batch in cut(groups, 2)] == [1, 1]
    assert [[len(m) for m in batch.micro_batches] for batch in uneven(groups)] == [[5, 1, 5], [1, 0, 0]]


def test_all_ranks_hold_the_same_bits_and_report_the_same(runs: dict[str, list[RankRun]]) -> None:
    for name in ("ranks", "dummies", "dummies_zero_2", "nan_zero_1", "nan_zero_2", "bf16_nan"):
        first, second = runs[name]
        for mine, other in zip(first.weights, second.weights, strict=True):
            assert all(np.array_equal(mine[key], other[key]) for key in mine), name
        for a, b in zip(first.results, second.results, strict=True):
            assert a.applied == b.applied and a.version == b.version
            for key in a.metrics.keys() - {"perf/train_s"}:
                assert a.metrics[key] == pytest.approx(b.metrics[key], rel=1e-12, nan_ok=True), (name, key)


@pytest.mark.parametrize("case", ["nan_zero_1", "nan_zero_2", "bf16_nan"])
def test_a_nan_on_one_rank_skips_the_step_on_all(case: str, runs: dict[str, list[RankRun]]) -> None:
    for rank in runs[case]:
        *bad, clean = rank.results
        for index, result in enumerate(bad):
            assert not result.applied and result.metrics["optim/skipped"] == 1
            assert math.isnan(result.metrics["optim/loss"])
            assert all(np.array_equal(rank.weights[0][key], value) for key, value in rank.weights[index + 1].items())
        assert clean.applied and clean.metrics["optim/skipped"] == 0
        assert [result.version for result in rank.results] == list(range(1, len(rank.results) + 1))
        assert math.isfinite(clean.metrics["optim/loss"]) and clean.metrics["optim/lr"] == LR


@pytest.mark.parametrize("case", ["nan_zero_1", "nan_zero_2"])
def test_a_skipped_step_leaves_no_trace_in_the_optimizer(case: str, runs: dict[str, list[RankRun]]) -> None:
    """The clean step after it is the very first step of a run."""
    for rank in runs[case]:
        assert_same_change(change(rank, step=len(rank.results) - 1), change(runs["whole"][0]), 2e-5)


def test_a_learning_rate_of_0_changes_no_bit(runs: dict[str, list[RankRun]]) -> None:
    (run,) = runs["lr_0"]
    assert [result.applied for result in run.results] == [True, True]
    assert run.results[0].metrics["optim/grad_norm"] > 0 and run.results[0].metrics["optim/lr"] == 0
    for later in run.weights[1:]:
        assert all(np.array_equal(run.weights[0][key], value) for key, value in later.items())


def test_the_lag_of_tokens_is_measured_against_the_version_that_trains(
    runs: dict[str, list[RankRun]], groups: list[RolloutGroup]
) -> None:
    """All tokens are of version 0: lag 0 in the first step, 1 in the second, where none is left to compare."""
    first, second = runs["whole"][0].results
    assert (first.version, second.version) == (1, 2)
    assert first.metrics["mismatch/tokens"] == sampled_tokens(groups)
    assert first.metrics["mismatch/abs_logprob_mean"] == pytest.approx(0.2 * math.sqrt(2 / math.pi), rel=0.2)
    assert second.metrics["mismatch/tokens"] == 0 and "mismatch/abs_logprob_mean" not in second.metrics


def test_bf16_trains_and_does_not_depend_on_the_cut_either(
    runs: dict[str, list[RankRun]], groups: list[RolloutGroup], tied_model: Path
) -> None:
    """Against transformers in bf16 with an fp32 head: bf16 and fp32 gradients of this steep model are 27% apart."""
    (whole,), (pieces,) = runs["bf16"], runs["bf16_micro_batches"]
    assert whole.setup["dtype"] == "bfloat16" and whole.setup["head_dtype"] == "float32"
    loss, norm, expected = by_hand(tied_model, groups, BF16_LR, torch.bfloat16)
    first, second, plain = (
        np.concatenate([weights[name].ravel() for name in expected])
        for weights in (change(whole), change(pieces), expected)
    )
    assert np.linalg.norm(first - plain) < 0.05 * np.linalg.norm(plain)
    assert np.linalg.norm(second - first) < 0.02 * np.linalg.norm(plain)
    for run in (whole, pieces):
        assert run.results[0].metrics["optim/loss"] == pytest.approx(loss, rel=0.01)
        assert run.results[0].metrics["optim/grad_norm"] == pytest.approx(norm, rel=0.02)


def test_setup_says_what_is_trained(runs: dict[str, list[RankRun]]) -> None:
    tied, untied = runs["whole"][0].setup, runs["untied"][0].setup
    assert tied["tied_head"] and not untied["tied_head"]
    assert tied["temperature"] == TEMPERATURE and tied["dtype"] == tied["head_dtype"] == "float32"
    assert tied["parameters"] == sum(value.size for value in runs["whole"][0].weights[0].values())
    head = runs["untied"][0].weights[0]["lm_head.weight"]
    assert untied["parameters"] == tied["parameters"] + head.size


@pytest.mark.parametrize(
    ("case", "name", "dtype"), [("whole", "exported", "float32"), ("bf16", "exported_bf16", "bfloat16")]
)
def test_the_export_is_the_trained_model(
    case: str, name: str, dtype: str, runs: dict[str, list[RankRun]], folder: Path, tied_model: Path
) -> None:
    exported = AutoModelForCausalLM.from_pretrained(folder / name)
    assert exported.dtype == getattr(torch, dtype)
    trained = load_reference(tied_model, exported.dtype)
    last = {key: torch.from_numpy(value).to(exported.dtype) for key, value in runs[case][0].weights[-1].items()}
    assert trained.load_state_dict(last, strict=False).missing_keys == ["lm_head.weight"]  # tied
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        before = load_reference(tied_model, exported.dtype)(ids).logits
        assert torch.equal(exported.eval()(ids).logits, trained(ids).logits)
        assert not torch.equal(before, trained(ids).logits)
    assert "pipelinerl" not in (folder / name / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert tokenizer.encode("sort 31") == AutoTokenizer.from_pretrained(tied_model).encode("sort 31")
    assert not list(folder.glob("*.partial"))
