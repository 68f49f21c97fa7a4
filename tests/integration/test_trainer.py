"""Trainer ranks on DeepSpeed: a step is the one worked out by hand however it was cut and sharded, and a bad one
changes nothing.

All cases run in one subprocess (see trainer_ranks.py). AdamW divides its first step by |gradient| + eps. With the
usual eps that is the gradient's sign, in which rounding noise of a tiny gradient becomes a full step. Here eps is 1,
far above the gradients, so that a step is nearly proportional to the gradient: -lr * g / (|g| + 1). Comparing weights
then compares gradients, element by element.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipelinerl.algo.aggregation import token_weights
from pipelinerl.batch.packing import rank_batches
from pipelinerl.config.schema import Aggregation
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan
from pipelinerl.weights.digest import digest
from tests.integration import trainer_ranks
from tests.integration.models import MAX_LENGTH, load_reference, reference_logprobs, run_config
from tests.integration.ranks import results_of
from tests.integration.trainer_ranks import SMALL_BUCKET, Case, RankRun, Weights

Gradients = dict[str, NDArray[np.float64]]

TEMPERATURE = 0.8
LR, EPS, MAX_NORM = 30.0, 1.0, 0.25  # a change must be large against the spacing of numbers around the weights
DECAY = 0.01
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


def references(
    groups: Sequence[RolloutGroup], aggregation: Aggregation = "token_mean", denominator: float | None = None
) -> list[SampleRef]:
    advantages = (1.0, -0.5, 0.25, -2.0)
    rollouts = [(g, k, rollout) for g, group in enumerate(groups) for k, rollout in enumerate(group.rollouts)]
    lengths, numbers = [r.completion_len for _, _, r in rollouts], [g for g, _, _ in rollouts]
    weights = token_weights(lengths, numbers, aggregation, 40, denominator)
    return [
        SampleRef(g, k, advantages[k] * (1 + g), rollout.total_len, float(weight))
        for (g, k, rollout), weight in zip(rollouts, weights, strict=True)
    ]


def sampled_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(rollout.completion_len for group in groups for rollout in group.rollouts)


def cut(groups: Sequence[RolloutGroup], ranks: int, tokens: int = 10_000) -> list[RankBatch]:
    return rank_batches(references(groups), ranks, tokens)


def uneven(groups: Sequence[RolloutGroup], aggregation: Aggregation = "token_mean") -> list[RankBatch]:
    """Rank 0 has three micro-batches; rank 1 has one sample and two dummies."""
    refs = references(groups, aggregation)
    return [
        RankBatch((tuple(refs[0:5]), tuple(refs[5:6]), tuple(refs[6:11]))),
        RankBatch(((refs[11],), (), ())),
    ]


PLANNED = 1000.0  # the denominator of a step that comes in parts; the true one is known when the last part is there


def in_parts(groups: Sequence[RolloutGroup], ranks: int, aggregation: Aggregation = "token_mean") -> list[Any]:
    """[chunk][rank] the second group, then the other two, of which the last rank gets one sample and a dummy."""
    refs = references(groups, aggregation, PLANNED)
    first, (*rest, last) = refs[4:8], refs[:4] + refs[8:]
    if ranks == 1:
        return [rank_batches(first, 1, 80), rank_batches([*rest, last], 1, 80)]
    second = [RankBatch((tuple(rest[:5]), tuple(rest[5:]))), RankBatch(((last,), ()))]
    return [rank_batches(first, 2, 10_000), second]


def unpacked(groups: Sequence[RolloutGroup]) -> list[RankBatch]:
    """One sample in each micro-batch."""
    refs = references(groups)
    return [RankBatch(tuple((ref,) for ref in refs[rank::2])) for rank in range(2)]


def with_nan(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """One logprob of the last rollout is NaN: in `uneven` that is the one sample of rank 1."""
    rollout = groups[-1].rollouts[-1]
    turn = rollout.turns[0]
    logprobs = turn.completion.logprobs.copy()
    logprobs[0] = np.nan
    turn = replace(turn, completion=replace(turn.completion, logprobs=logprobs))
    broken = replace(rollout, turns=(turn, *rollout.turns[1:]))
    return [*groups[:-1], replace(groups[-1], rollouts=(*groups[-1].rollouts[:-1], broken))]


def write_odd_model(target: Path) -> Path:
    """No biases, a tied head, and no size that two ranks or a tile could divide evenly: 101 tokens, hidden size 96."""
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=133,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


STAGES = (0, 1, 2, 3)
AGGREGATIONS: tuple[Aggregation, ...] = (
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "constant",
    "prompt_mean",
)


def make_cases(tied: Path, untied: Path, odd: Path, groups: list[RolloutGroup], folder: Path) -> dict[str, Case]:
    def case(
        *updates: list[RankBatch],
        payloads: list[list[RolloutGroup]] | None = None,
        model: Path = tied,
        dtype: str = "float32",
        export: str = "",
        send: bool = False,
        algo: dict[str, Any] | None = None,
        scale: float | None = None,
        **trainer: Any,
    ) -> Case:
        """Every update is a step of its own."""
        sections = {
            "trainer": ADAM | {"ranks": len(updates[0])} | trainer,
            "sampling": {"temperature": TEMPERATURE},
            "algo": algo or {},
            "weights": {"bucket_mb": 1},
        }
        config = run_config(model, dtype, **sections)
        steps = [[update] for update in updates]
        target = folder / export if export else None
        return Case(config, steps, payloads or [groups] * len(steps), target, send, scale)

    def streamed(
        ranks: int,
        aggregation: Aggregation = "token_mean",
        payloads: list[list[RolloutGroup]] | None = None,
        **options: Any,
    ) -> Case:
        """As many steps as payloads, each in parts."""
        chunks, payloads = in_parts(groups, ranks, aggregation), payloads or [groups]
        true = {"token_mean": sampled_tokens(groups), "prompt_mean": len(groups)}[aggregation]
        made = case(chunks[0], payloads=payloads, scale=PLANNED / true, **options)
        return replace(made, steps=[chunks] * len(payloads))

    bad, one, two, ragged = with_nan(groups), cut(groups, 1), cut(groups, 2), uneven(groups)
    cases = {
        "whole": case(one, one, export="exported"),
        "micro_batches": case(cut(groups, 1, 80), zero_stage=0),
        "micro_batches_zero_3": case(cut(groups, 1, 80), zero_stage=3),
        "ranks": case(two, zero_stage=2),
        "unpacked": case(unpacked(groups), send=True),
        "unpacked_zero_3": case(
            unpacked(groups), zero_stage=3, gradient_checkpointing=True, logprob_chunk=5, send=True, export="exported_3"
        ),
        "gspo_dummies": case(uneven(groups, "seq_mean_token_mean"), algo=GSPO, zero_stage=3),
        "untied_dummies": case(ragged, model=untied, zero_stage=3),
        "offloaded": case(ragged, zero_stage=2, offload_optimizer=True),
        "offloaded_zero_3": case(ragged, zero_stage=3, offload_optimizer=True, offload_parameters=True),
        "lr_0": case(one, one, lr=0.0),
        "adam": case(one, optimizer="adam", weight_decay=DECAY),
        "adamw": case(one, optimizer="adamw", weight_decay=DECAY),
        "sgd": case(one, one, optimizer="sgd", weight_decay=DECAY),
        "bf16": case(one, dtype="bfloat16", export="exported_bf16"),
        "bf16_adamw_zero_0": case(one, dtype="bfloat16", weight_decay=DECAY, zero_stage=0),
        "scheduled": scheduled(tied, groups),
    }
    cases |= {f"dummies_zero_{stage}": case(ragged, zero_stage=stage) for stage in STAGES}
    cases |= {f"odd_zero_{stage}": case(ragged, model=odd, zero_stage=stage) for stage in STAGES}
    cases |= {f"{name}_zero_{s}": case(uneven(groups, name), zero_stage=s) for s, name in enumerate(AGGREGATIONS)}
    cases |= {f"parts_zero_{stage}": streamed(2, zero_stage=stage) for stage in STAGES}
    cases["parts_prompt_mean"] = streamed(1, "prompt_mean", zero_stage=3, offload_optimizer=True)
    cases |= {f"nan_parts_zero_{stage}": streamed(2, payloads=[bad, groups], zero_stage=stage) for stage in (1, 3)}
    cases |= {f"bf16_parts_zero_{stage}": streamed(2, dtype="bfloat16", zero_stage=stage) for stage in (0, 1, 3)}
    payloads = [bad, bad, groups]
    cases |= {f"nan_zero_{stage}": case(*[ragged] * 3, payloads=payloads, zero_stage=stage) for stage in STAGES}
    bf16: dict[str, Any] = {"dtype": "bfloat16", "payloads": [bad, groups]}
    cases |= {f"bf16_nan_zero_{stage}": case(*[ragged] * 2, zero_stage=stage, **bf16) for stage in STAGES}
    return cases


def scheduled(model: Path, groups: list[RolloutGroup]) -> Case:
    """Two updates per step, of which the first of the run is skipped: three of the four count."""
    trainer = ADAM | {"schedule": "linear", "warmup_steps": 1}
    config = run_config(model, trainer=trainer, sampling={"temperature": TEMPERATURE})
    config = config.model_copy(update={"steps": 2, "batch": config.batch.model_copy(update={"updates": 2})})
    refs = references(groups)
    broken, clean = [RankBatch((tuple(refs[11:]),))], [RankBatch((tuple(refs[:11]),))]
    return Case(config, [[broken, clean], [clean, clean]], [with_nan(groups)] * 2)


@pytest.fixture(scope="module")
def groups(tied_model: Path) -> list[RolloutGroup]:
    return make_groups(tied_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_odd_model(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def runs(
    tied_model: Path, untied_model: Path, odd_model: Path, groups: list[RolloutGroup], folder: Path
) -> dict[str, list[RankRun]]:
    """Every case, as [rank]."""
    return results_of(trainer_ranks, make_cases(tied_model, untied_model, odd_model, groups, folder), folder)


def change(run: RankRun, step: int = 0) -> Weights:
    """What a step did to the weights."""
    return {name: run.weights[step + 1][name] - before for name, before in run.weights[step].items()}


def assert_same_change(actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    """The distance is small against the change itself, for the whole and, within twice as much, for each parameter."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = np.linalg.norm(value)
        assert size > 1e-5, name
        assert np.linalg.norm(actual[name] - value) < 2 * tolerance * size, name
    distance, whole = (
        np.linalg.norm(np.concatenate([part.ravel() for part in parts]))
        for parts in ([actual[name] - value for name, value in expected.items()], expected.values())
    )
    assert distance < tolerance * whole, distance / whole


def ppo_by_hand(log_ratio: Tensor, advantage: float) -> Tensor:
    """Summed over the tokens of a rollout."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()


def gspo_by_hand(log_ratio: Tensor, advantage: float) -> Tensor:
    """One value for the whole rollout, whatever its turns; each of its tokens has it."""
    ratio = log_ratio.mean().exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.97, 1.04) * advantage) * len(log_ratio)


@dataclass(frozen=True)
class ByHand:
    """The step of plain torch, rollout by rollout."""

    loss: float
    norm: float
    before: Weights
    gradient: Gradients  # clipped

    def adamw(self) -> Gradients:
        """AdamW's first step: both moments are debiased to g and g^2."""
        return {name: -LR * g / (np.abs(g) + EPS) for name, g in self.gradient.items()}


def by_hand(
    model: Path,
    groups: Sequence[RolloutGroup],
    aggregation: Aggregation = "token_mean",
    objective: Callable[[Tensor, float], Tensor] = ppo_by_hand,
    dtype: torch.dtype = torch.float32,
) -> ByHand:
    policy = load_reference(model, dtype)
    losses: list[Tensor] = []
    for ref in references(groups, aggregation):
        rollout = groups[ref.group].rollouts[ref.rollout]
        parts = [part for turn in rollout.turns for part in (turn.context, turn.completion.tokens)]
        new = torch.cat([torch.zeros(1), reference_logprobs(policy, np.concatenate(parts).tolist(), TEMPERATURE)])
        start, log_ratios = 0, []
        for turn in rollout.turns:
            start += len(turn.context)
            stop = start + len(turn.completion.tokens)
            log_ratios.append(new[start:stop] - torch.from_numpy(turn.completion.logprobs))
            start = stop
        losses.append(objective(torch.cat(log_ratios), ref.advantage) * ref.weight)
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = {name: p.grad.double() for name, p in policy.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    clipped = {name: (gradient * min(1.0, MAX_NORM / norm)).numpy() for name, gradient in gradients.items()}
    before = {name: p.detach().float().numpy() for name, p in policy.named_parameters()}
    return ByHand(loss.item(), norm, before, clipped)


BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("tied_model", {}),
    "gspo_dummies": ("tied_model", {"aggregation": "seq_mean_token_mean", "objective": gspo_by_hand}),
    "untied_dummies": ("untied_model", {}),
    **{f"odd_zero_{stage}": ("odd_model", {}) for stage in STAGES},
    **{f"{name}_zero_{stage}": ("tied_model", {"aggregation": name}) for stage, name in enumerate(AGGREGATIONS)},
    "parts_prompt_mean": ("tied_model", {"aggregation": "prompt_mean"}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_step_is_the_one_worked_out_without_packing(
    case: str, runs: dict[str, list[RankRun]], groups: list[RolloutGroup], request: pytest.FixtureRequest
) -> None:
    head, arguments = BY_HAND[case]
    expected = by_hand(request.getfixturevalue(head), groups, **arguments)
    for run in runs[case]:
        metrics = run.results[0].metrics
        assert expected.norm > 1.2 * MAX_NORM or case.startswith(("odd", "constant", "seq_mean_token_sum"))
        assert metrics["optim/loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert metrics["optim/grad_norm"] == pytest.approx(expected.norm, rel=1e-5)
        assert metrics["optim/lr"] == LR and metrics["optim/skipped"] == 0
        assert_same_change(change(run), expected.adamw(), 1e-5)


CUTS = {
    "micro_batches",
    "micro_batches_zero_3",
    "ranks",
    "unpacked",
    "unpacked_zero_3",
    "offloaded",
    "offloaded_zero_3",
    *(f"dummies_zero_{stage}" for stage in STAGES),
    *(f"parts_zero_{stage}" for stage in STAGES),
}


@pytest.mark.parametrize("case", sorted(CUTS))
def test_ranks_micro_batches_packing_and_zero_stage_do_not_change_a_step(
    case: str, runs: dict[str, list[RankRun]]
) -> None:
    expected = runs["whole"][0]
    for rank in runs[case]:
        assert_same_change(change(rank), change(expected), 1e-5)
        metrics, wanted = dict(rank.results[0].metrics), dict(expected.results[0].metrics)
        del metrics["perf/train_s"], wanted["perf/train_s"]
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_cases_are_cut_as_they_say(groups: list[RolloutGroup]) -> None:
    assert [len(batch.micro_batches) for batch in cut(groups, 1)] == [1]
    assert len(cut(groups, 1, 80)[0].micro_batches) >= 4
    assert [len(batch.micro_batches) for batch in cut(groups, 2)] == [1, 1]
    assert [[len(m) for m in batch.micro_batches] for batch in uneven(groups)] == [[5, 1, 5], [1, 0, 0]]
    assert [[len(m) for m in batch.micro_batches] for batch in unpacked(groups)] == [[1] * 6] * 2
    assert [[[len(m) for m in batch.micro_batches] for batch in part] for part in in_parts(groups, 2)] == [
        [[3], [1]],
        [[5, 2], [1, 0]],
    ]


def test_all_ranks_hold_the_same_bits_and_report_the_same(runs: dict[str, list[RankRun]]) -> None:
    for name, ranks in runs.items():
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0].weights, other.weights, strict=True):
                assert all(np.array_equal(mine[key], theirs[key]) for key in mine), name
            for a, b in zip(ranks[0].results, other.results, strict=True):
                assert a.applied == b.applied and a.version == b.version
                for key in a.metrics.keys() - {"perf/train_s"}:
                    assert a.metrics[key] == pytest.approx(b.metrics[key], rel=1e-12, nan_ok=True), (name, key)


NANS = [f"{dtype}nan_zero_{stage}" for dtype in ("", "bf16_") for stage in STAGES]
NANS += [f"nan_parts_zero_{stage}" for stage in (1, 3)]


@pytest.mark.parametrize("case", NANS)
def test_a_nan_on_one_rank_skips_the_step_on_all(case: str, runs: dict[str, list[RankRun]]) -> None:
    for rank in runs[case]:
        *bad, clean = rank.results
        for index, result in enumerate(bad):
            assert not result.applied and result.metrics["optim/skipped"] == 1
            assert math.isnan(result.metrics["optim/loss"]) and result.metrics["optim/grad_norm"] == math.inf
            assert all(np.array_equal(rank.weights[0][key], value) for key, value in rank.weights[index + 1].items())
        assert clean.applied and clean.metrics["optim/skipped"] == 0
        assert [result.version for result in rank.results] == list(range(1, len(rank.results) + 1))
        assert math.isfinite(clean.metrics["optim/loss"]) and math.isfinite(clean.metrics["optim/grad_norm"])


@pytest.mark.parametrize("case", [name for name in NANS if not name.startswith("bf16")])
def test_a_skipped_step_leaves_no_trace_in_the_optimizer(case: str, runs: dict[str, list[RankRun]]) -> None:
    """The clean step after it is the very first step of a run."""
    for rank in runs[case]:
        assert_same_change(change(rank, step=len(rank.results) - 1), change(runs["whole"][0]), 1e-5)


def test_a_learning_rate_of_0_changes_no_bit(runs: dict[str, list[RankRun]]) -> None:
    (run,) = runs["lr_0"]
    assert [result.applied for result in run.results] == [True, True]
    assert run.results[0].metrics["optim/grad_norm"] > 0 and run.results[0].metrics["optim/lr"] == 0
    for later in run.weights[1:]:
        assert all(np.array_equal(run.weights[0][key], value) for key, value in later.items())


def test_optimizers_take_the_first_step_of_their_definition(
    runs: dict[str, list[RankRun]], groups: list[RolloutGroup], tied_model: Path
) -> None:
    """Weight decay, on matrices only, is a part of the gradient but in AdamW, where it shrinks the weight by itself."""
    hand = by_hand(tied_model, groups)
    decay = {name: DECAY * w * (w.ndim == 2) for name, w in hand.before.items()}
    whole = {name: g + decay[name] for name, g in hand.gradient.items()}
    assert_same_change(change(runs["adam"][0]), {n: -LR * g / (np.abs(g) + EPS) for n, g in whole.items()}, 1e-5)
    assert_same_change(change(runs["adamw"][0]), {n: d - LR * decay[n] for n, d in hand.adamw().items()}, 1e-5)
    assert_same_change(change(runs["sgd"][0]), {n: -LR * g for n, g in whole.items()}, 1e-5)


def test_momentum_of_sgd_is_the_first_beta(runs: dict[str, list[RankRun]]) -> None:
    """The second step is -lr (g_2 + beta g_1). A second gradient is at most MAX_NORM long, its decay left aside."""
    (run,) = runs["sgd"]
    first, second = (np.concatenate([v.ravel() for v in change(run, step).values()]) for step in (0, 1))
    before = np.concatenate([(w * (w.ndim == 2)).ravel() for w in run.weights[1].values()])
    gradient = -second / LR + 0.9 * first / LR - DECAY * before
    assert np.linalg.norm(gradient) == pytest.approx(min(MAX_NORM, run.results[1].metrics["optim/grad_norm"]), rel=1e-3)


def test_the_schedule_counts_applied_updates(runs: dict[str, list[RankRun]]) -> None:
    """A warm-up of 1, then linear to 0 at 4: the rates are 0, 0 (the first update was skipped), 1 and 2/3."""
    (run,) = runs["scheduled"]
    first, second = run.results
    assert first.applied and first.metrics["optim/skipped"] == 1 and first.metrics["optim/lr"] == 0
    assert second.metrics["optim/skipped"] == 0
    assert second.metrics["optim/lr"] == pytest.approx(2 / 3 * LR)
    assert all(np.array_equal(run.weights[0][key], value) for key, value in run.weights[1].items())


def test_the_lag_of_tokens_is_measured_against_the_version_that_trains(
    runs: dict[str, list[RankRun]], groups: list[RolloutGroup]
) -> None:
    """All tokens are of version 0: lag 0 in the first step, 1 in the second, where none is left to compare."""
    first, second = runs["whole"][0].results
    assert (first.version, second.version) == (1, 2)
    assert first.metrics["mismatch/tokens"] == sampled_tokens(groups)
    assert first.metrics["mismatch/abs_logprob_mean"] == pytest.approx(0.2 * math.sqrt(2 / math.pi), rel=0.2)
    assert second.metrics["mismatch/tokens"] == 0 and "mismatch/abs_logprob_mean" not in second.metrics


BF16 = ["bf16", *(f"bf16_nan_zero_{s}" for s in STAGES), *(f"bf16_parts_zero_{s}" for s in (0, 1, 3))]


@pytest.mark.parametrize("case", BF16)
def test_bf16_trains_and_depends_neither_on_the_cut_nor_on_the_stage(
    case: str, runs: dict[str, list[RankRun]], groups: list[RolloutGroup], tied_model: Path
) -> None:
    """Against transformers in bf16 with an fp32 head: bf16 and fp32 gradients of this steep model are 27% apart."""
    hand = by_hand(tied_model, groups, dtype=torch.bfloat16)
    expected = hand.adamw()
    for run in runs[case]:
        assert run.setup["dtype"] == "bfloat16" and run.setup["head_dtype"] == "float32"
        step = len(run.results) - 1
        ours, plain, whole = (
            np.concatenate([weights[name].ravel() for name in expected])
            for weights in (change(run, step), expected, change(runs["bf16"][0]))
        )
        assert np.linalg.norm(ours - plain) < 0.05 * np.linalg.norm(plain)
        assert np.linalg.norm(ours - whole) < 0.03 * np.linalg.norm(plain)
        assert run.results[step].metrics["optim/loss"] == pytest.approx(hand.loss, rel=0.01)
        assert run.results[step].metrics["optim/grad_norm"] == pytest.approx(hand.norm, rel=0.02)


def test_a_bf16_forward_pass_is_the_same_to_the_bit_at_every_stage(runs: dict[str, list[RankRun]]) -> None:
    losses = {runs[f"bf16_nan_zero_{stage}"][0].results[1].metrics["optim/loss"] for stage in STAGES}
    assert len(losses) == 1


def test_weight_decay_is_applied_once_at_stage_0_in_bf16(runs: dict[str, list[RankRun]]) -> None:
    """DeepSpeed's optimizer there takes a trial step when it is made. Decay is much larger than the gradient's part."""
    (run,) = runs["bf16_adamw_zero_0"]
    for name, before in run.weights[0].items():
        if before.ndim == 2:
            assert np.vdot(run.weights[1][name], before) / np.vdot(before, before) == pytest.approx(
                1 - LR * DECAY, abs=0.03
            )


SHARDED = ["micro_batches_zero_3", "unpacked_zero_3", "dummies_zero_3", "odd_zero_3", "nan_zero_3", "untied_dummies"]


@pytest.mark.parametrize("case", SHARDED)
def test_nothing_stays_whole_under_zero_3_and_weights_are_read_bucket_by_bucket(
    case: str, runs: dict[str, list[RankRun]]
) -> None:
    for run in runs[case]:
        sizes = [value.nbytes for value in run.weights[0].values()]
        assert not run.left_whole
        assert 0 < run.most_whole <= max(SMALL_BUCKET, *sizes) < sum(sizes) / 4


def test_the_weights_sent_under_zero_3_are_those_of_zero_1_and_those_that_were_trained(
    runs: dict[str, list[RankRun]],
) -> None:
    for case in ("unpacked", "unpacked_zero_3"):
        run = runs[case][0]
        assert list(run.received) == list(run.weights[-1])
        for (name, (dtype, shape, bits)), sent in zip(run.received.items(), run.digests, strict=True):
            assert dtype == "float32" and shape == run.weights[-1][name].shape
            assert np.array_equal(bits.view(np.float32).reshape(shape), run.weights[-1][name]), name
            assert digest(torch.from_numpy(bits)) == sent
    one, three = (runs[case][0] for case in ("unpacked", "unpacked_zero_3"))
    assert list(one.received) == list(three.received)
    assert_same_change(change(three), change(one), 1e-5)


def test_setup_says_what_is_trained(runs: dict[str, list[RankRun]]) -> None:
    tied, untied = runs["whole"][0].setup, runs["untied_dummies"][0].setup
    assert tied["tied_head"] and not untied["tied_head"]
    assert tied["temperature"] == TEMPERATURE and tied["dtype"] == tied["head_dtype"] == "float32"
    assert tied["parameters"] == sum(value.size for value in runs["whole"][0].weights[0].values())
    head = runs["untied_dummies"][0].weights[0]["lm_head.weight"]
    assert untied["parameters"] == tied["parameters"] + head.size


@pytest.mark.parametrize(
    ("case", "name", "dtype"),
    [
        ("whole", "exported", "float32"),
        ("bf16", "exported_bf16", "bfloat16"),
        ("unpacked_zero_3", "exported_3", "float32"),
    ],
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
