"""Low-rank adapters on real DeepSpeed ranks: what is trained, what the engines get, what is exported.

All cases run in one subprocess (see lora_ranks.py). SGD makes a change of the factors their gradient, element by
element.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

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
from tests.integration import lora_ranks
from tests.integration.lora_ranks import Case, RankRun, Tensors
from tests.integration.models import load_reference, reference_logprobs, run_config
from tests.integration.ranks import results_of

TEMPERATURE = 0.8
RANK, ALPHA = 4, 6.0
LR, BF16_LR, MAX_NORM = 2.0, 20.0, 0.5
SGD: dict[str, Any] = {"optimizer": "sgd", "betas": (0.0, 0.0), "lr": LR, "max_grad_norm": MAX_NORM}
LORA: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OWN, NUDGED = 0, 1  # the versions of the request: with the weights themselves, and with a probe's second set
REQUEST = ScoreRequest((TEMPERATURE,), {OWN: False, NUDGED: True})
LENGTHS = (17, 3, 9, 30, 12, 5)
REFUSED = (["lm_head"], ["embed_tokens"], ["q_proj", "no_such_layer"], ["all-linear", "q_proj"], ["norm"])


def make_groups(*versions: int) -> list[RolloutGroup]:
    """The same rollouts, whose versions take turns. Logprobs are far off the policy's, so some ratios are clipped."""
    rng = np.random.default_rng(5)

    def rollout(index: int) -> Rollout:
        length = LENGTHS[index]
        tokens, logprobs = rng.integers(6, 100, length).astype(np.int32), rng.normal(-4.5, 0.5, length)
        span = VersionSpan(versions[index % len(versions)], 0, length)
        completion = Completion(tokens, logprobs.astype(np.float32), (span,), "stop", "")
        return Rollout((Turn(rng.integers(6, 100, 5).astype(np.int32), completion),), 1.0, Outcome.OK)

    return [RolloutGroup(g, f"train/{g}", tuple(rollout(3 * g + k) for k in range(3))) for g in range(2)]


GROUPS, PROBED = make_groups(OWN), make_groups(OWN, NUDGED)
REFS = [
    SampleRef(g, k, (1.0, -0.5, 0.7)[k] * (1 + g), rollout.total_len, weight=1 / sum(LENGTHS))
    for g, group in enumerate(GROUPS)
    for k, rollout in enumerate(group.rollouts)
]


def cut(ranks: int, tokens: int = 10_000) -> list[RankBatch]:
    return rank_batches(REFS, ranks, tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def runs(tied_model: Path, untied_model: Path, folder: Path) -> dict[str, list[RankRun]]:
    """Every case, as [rank]."""

    def case(batches: list[RankBatch], model: Path = tied_model, dtype: str = "float32", **changes: Any) -> Case:
        settings = SGD | {"ranks": len(batches), "lora": LORA} | changes
        config = run_config(model, dtype, trainer=settings, sampling={"temperature": TEMPERATURE})
        return Case(config, batches, GROUPS, PROBED, REQUEST)

    cases = {
        "whole": case(cut(1)),
        "zero_0": case(cut(2), zero_stage=0, gradient_checkpointing=True),
        "zero_2": case(cut(2, 40), zero_stage=2),
        "zero_3": case(cut(2, 40), zero_stage=3),
        "some, untied": case(cut(1), untied_model, lora=LORA | {"targets": ["q_proj", "mlp.down_proj"]}),
        "bf16": case(cut(1), dtype="bfloat16", lr=BF16_LR),
        "bf16_zero_3": case(cut(2, 40), dtype="bfloat16", lr=BF16_LR, zero_stage=3),
    }
    cases = {name: replace(made, exports=folder / name) for name, made in cases.items()}
    seed_1 = cases["whole"].config.model_copy(update={"seed": 1})
    cases["other_seed"] = replace(cases["whole"], config=seed_1, exports=None, steps=0)
    cases["refused"] = replace(cases["whole"], refused=REFUSED)
    return results_of(lora_ranks, cases, folder)


TRAINED = ("whole", "zero_0", "zero_2", "zero_3", "some, untied", "bf16", "bf16_zero_3")
MODELS = {"some, untied": "untied_model"}


@pytest.fixture
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The model that a case started from, as transformers runs it, in the case's dtype."""
    case = request.node.callspec.params["case"]
    dtype = torch.bfloat16 if case.startswith("bf16") else torch.float32
    return load_reference(request.getfixturevalue(MODELS.get(case, "tied_model")), dtype)


def checkpoint_tensors(model: PreTrainedModel) -> Tensors:
    return {name: p.detach().float().numpy() for name, p in model.named_parameters()}


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(actual[name], value), name


def with_weights(model: PreTrainedModel, weights: Tensors) -> PreTrainedModel:
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    model.tie_weights()
    return model


def logprobs_of(model: PreTrainedModel, version: int | None = None) -> np.ndarray:
    """Of all sampled tokens, or of those of one version."""
    rollouts = [rollout for group in PROBED for rollout in group.rollouts]
    with torch.no_grad():
        found = [
            reference_logprobs(model, tokens_of(rollout), TEMPERATURE)[len(rollout.turns[0].context) - 1 :].numpy()
            for rollout in rollouts
            if version in (None, rollout.turns[0].completion.spans[0].version)
        ]
    return np.concatenate(found)


def scores_of(run: RankRun, version: int) -> np.ndarray:
    return np.concatenate([score.trainer[TEMPERATURE] for score in run.scored if score.versions[0] == version])


def tokens_of(rollout: Rollout) -> list[int]:
    (turn,) = rollout.turns
    return [*turn.context.tolist(), *turn.completion.tokens.tolist()]


def by_hand(model: PreTrainedModel, factors: Tensors, targets: Sequence[str]) -> tuple[float, float, Tensors]:
    """Loss, gradient norm and gradient of the factors, in plain torch, with whole weights W + alpha/rank B A."""
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in factors.items()}
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(targets)):
            weight = module._parameters.pop("weight").detach()
            a, b = leaves[f"{name}.lora_A.default.weight"], leaves[f"{name}.lora_B.default.weight"]
            module.weight = weight + ALPHA / RANK * b @ a
    total = torch.zeros(())
    for ref in REFS:
        rollout = GROUPS[ref.group].rollouts[ref.rollout]
        completion = rollout.turns[0].completion
        new = reference_logprobs(model, tokens_of(rollout), TEMPERATURE)[-len(completion.tokens) :]
        ratio = (new - torch.from_numpy(completion.logprobs)).exp()
        total = total - torch.minimum(ratio * ref.advantage, ratio.clamp(0.8, 1.28) * ref.advantage).sum() * ref.weight
    total.backward()
    norm = math.sqrt(sum(float(leaf.grad.double().square().sum()) for leaf in leaves.values() if leaf.grad is not None))
    return total.item(), norm, {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}


def assert_close(actual: Tensors, expected: Tensors, tolerance: float) -> None:
    """The distance is small against the size, for every tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(actual[name] - value) <= tolerance * np.linalg.norm(value), name


def changes(run: RankRun, step: int) -> Tensors:
    return {name: run.factors[step + 1][name] - before for name, before in run.factors[step].items()}


@pytest.mark.parametrize("case", TRAINED)
def test_the_first_update_carries_the_base_model_bit_for_bit(
    case: str, base: PreTrainedModel, runs: dict[str, list[RankRun]]
) -> None:
    for run in runs[case]:
        assert_same_bits(run.sent["start"], checkpoint_tensors(base))
        assert run.collective == ("zero_3" in case)


@pytest.mark.parametrize("case", TRAINED)
def test_only_the_adapters_are_trained(case: str, runs: dict[str, list[RankRun]]) -> None:
    for run in runs[case]:
        assert_same_bits(run.frozen[1], run.frozen[0])
        first, second = changes(run, 0), changes(run, 1)
        assert all((".lora_B." in name) == bool(change.any()) for name, change in first.items())  # B is 0: A gets none
        assert all(change.any() for change in second.values())
        assert run.setup["trained_parameters"] == sum(factor.size for factor in run.factors[0].values())
        assert len(run.factors[0]) == 2 * 2 * (2 if case == "some, untied" else len(LINEAR))  # A and B, two layers


def test_adapters_start_from_the_seed_on_every_rank(runs: dict[str, list[RankRun]]) -> None:
    expected = runs["whole"][0].factors[0]
    for name in ("zero_0", "zero_2", "zero_3"):
        for run in runs[name]:
            assert_same_bits(run.factors[0], expected)
    other = runs["other_seed"][0].factors[0]
    assert all((".lora_A." in name) != np.array_equal(other[name], value) for name, value in expected.items())


@pytest.mark.parametrize("case", ["whole", "some, untied"])
def test_steps_are_those_worked_out_with_whole_weights(
    case: str, runs: dict[str, list[RankRun]], request: pytest.FixtureRequest
) -> None:
    (run,) = runs[case]
    path = request.getfixturevalue(MODELS.get(case, "tied_model"))
    for step, result in enumerate(run.results):
        targets = ("q_proj", "down_proj") if case == "some, untied" else LINEAR
        loss, norm, gradients = by_hand(load_reference(path), run.factors[step], targets)
        assert result.metrics["optim/loss"] == pytest.approx(loss, rel=1e-5)
        assert result.metrics["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)
        expected = {name: -LR * min(1.0, MAX_NORM / norm) * value for name, value in gradients.items()}
        assert_close(changes(run, step), expected, 1e-4)


@pytest.mark.parametrize("case", ["zero_0", "zero_2", "zero_3"])
def test_ranks_micro_batches_and_zero_stage_do_not_change_a_step(case: str, runs: dict[str, list[RankRun]]) -> None:
    for run in runs[case]:
        for step in (0, 1):
            assert_close(changes(run, step), changes(runs["whole"][0], step), 2e-5)
            for key in ("optim/loss", "optim/grad_norm"):
                whole = runs["whole"][0].results[step].metrics[key]
                assert run.results[step].metrics[key] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_sent_gives_the_trainers_logprobs(
    case: str, base: PreTrainedModel, runs: dict[str, list[RankRun]]
) -> None:
    """Of the trained weights, and of the second set that a probe makes of them. In bf16 too: what is sent is what the
    trainer computes with, so that all that is left is the order of sums."""
    run = runs[case][0]
    untrained = logprobs_of(base)
    assert np.abs(logprobs_of(with_weights(base, run.sent["end"])) - untrained).mean() > 0.02
    for version, moment in ((OWN, "end"), (NUDGED, "nudged")):
        expected = logprobs_of(with_weights(base, run.sent[moment]), version)
        np.testing.assert_allclose(scores_of(run, version), expected, atol=2e-5)


@pytest.mark.parametrize("case", TRAINED)
def test_a_probe_takes_back_what_it_did_to_base_and_adapters(case: str, runs: dict[str, list[RankRun]]) -> None:
    for run in runs[case]:
        assert_same_bits(run.sent["end, after a probe"], run.sent["end"])
        for name, value in run.sent["end"].items():
            assert (run.sent["nudged"][name] != value).mean() > 0.9, name  # in bf16 the adapter's change may cancel one


@pytest.mark.parametrize("case", ["whole", "zero_3", "some, untied", "bf16"])
def test_the_merged_export_is_what_was_sent(
    case: str, base: PreTrainedModel, runs: dict[str, list[RankRun]], folder: Path
) -> None:
    exported = AutoModelForCausalLM.from_pretrained(folder / case / "model").eval()
    assert exported.dtype == base.dtype
    assert_same_bits(checkpoint_tensors(exported), runs[case][0].sent["end"])
    np.testing.assert_allclose(logprobs_of(exported, OWN), scores_of(runs[case][0], OWN), atol=2e-5)


@pytest.mark.parametrize("case", ["whole", "zero_3", "some, untied", "bf16"])
def test_the_adapter_export_on_the_base_is_the_trained_model(
    case: str, base: PreTrainedModel, runs: dict[str, list[RankRun]], folder: Path
) -> None:
    """peft multiplies base and adapter one after the other: in bf16 that is near the merged weights, and not them."""
    adapted = PeftModel.from_pretrained(base, folder / case / "adapter").eval()
    factors = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert_same_bits({name: p.float().numpy() for name, p in factors.items()}, runs[case][0].factors[-1])
    tolerance = 0.3 if case == "bf16" else 2e-5
    np.testing.assert_allclose(
        logprobs_of(adapted.get_base_model(), OWN), scores_of(runs[case][0], OWN), atol=tolerance
    )
    assert not list((folder / case).glob("*.partial"))


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_targets_that_no_adapter_can_have_are_refused(number: int, runs: dict[str, list[RankRun]]) -> None:
    message = runs["refused"][0].refusals[number]
    assert message.startswith(f"trainer.lora.targets={REFUSED[number]}: ") and "\n" not in message
