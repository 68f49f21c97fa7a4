"""TRL's own loss code as an oracle: its GRPOTrainer's methods, unbound, on numbers of ours, without model or trainer.

TRL works on padded [B, T], makes its importance weights while it generates and divides inside the loss; here the same
tokens are flat, and what the loss is a mean over is in weights. Loss and gradient must agree to 1e-5.

Left out, because only one side has it: TOPR, DPPO-TV, prompt_mean and the other masks (ours), VESPO (TRL's). The value
of TRL's bias-corrected KL is compared and its gradient is not: TRL differentiates the importance ratio, which is a
constant here. The entropy bonus is left out too: TRL's is a mean over tokens whatever the loss is a mean over.
"""

import types
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelinerl.algo.aggregation import token_weights
from pipelinerl.algo.objective import Coefficients, Tokens, objective
from pipelinerl.config.schema import (
    CISPO,
    GSPO,
    SAPO,
    Aggregation,
    AlgoConfig,
    DualClip,
    GSPOToken,
    PPOClip,
    ReinforceIS,
    TwoSided,
)

# Two prompts with two completions each, uneven, tool output (0) inside some: True where the policy sampled.
SAMPLED = [[1, 1, 0, 1, 1], [1], [1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1]]
LENGTHS = [sum(row) for row in SAMPLED]
PROMPT, MAX_TOKENS = 3, 11
TOLERANCE = {"rel": 1e-5, "abs": 1e-7}


@pytest.fixture(scope="module")
def trl():
    """The module of GRPOTrainer, imported without vLLM, which its loss does not need and which takes 10 s."""
    from trl import import_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
        from trl.trainer import grpo_trainer

        patch.setattr(grpo_trainer, "gather_object", lambda values: values)  # of one process
        yield grpo_trainer


def draw(seed: int, spread: float) -> dict[str, list[Tensor]]:
    """Logprobs of four policies, nats: each from the one before by noise of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    policies: dict[str, list[Tensor]] = {name: [] for name in ("rollout", "old", "new", "reference")}
    for row in SAMPLED:
        logprobs = -1 - 2 * torch.rand(len(row), generator=generator)
        for values in policies.values():
            values.append(logprobs)
            logprobs = logprobs + spread * torch.randn(len(row), generator=generator)
    return policies


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trl_loss(trl: Any, policies: dict[str, list[Tensor]], **settings: Any) -> tuple[float, list[float], list[float]]:
    """(loss, its gradient at the tokens of SAMPLED, advantages) as TRL computes them under these settings.

    `GRPOTrainer._generate_and_score_completions` and `_compute_loss` run on a stand-in that has the logprobs and the
    rewards at hand instead of a model.
    """
    args = SimpleNamespace(
        per_device_train_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
        steps_per_generation=1, delta=settings.pop("delta", None), sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, use_bias_correction_kl=settings.pop("use_bias_correction_kl", False),
    )  # fmt: skip
    new = padded(policies["new"]).requires_grad_()
    logprobs = {"old": padded(policies["old"]), "reference": padded(policies["reference"]), "new": new}
    ids = [[5] * len(row) for row in SAMPLED]
    generated = ([[1] * PROMPT] * 4, ids, SAMPLED, [""] * 4, [v.tolist() for v in policies["rollout"]], {}, None, None)
    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0,
            gather=lambda values: values, reduce=lambda values, reduction: values,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False, name="old"),
        ref_model=SimpleNamespace(name="reference"),
        environment_factories=None, environments=None, tools=None, reward_funcs=[None], reward_func_names=["reward"],
        reward_weights=torch.ones(1), num_generations=2, multi_objective_aggregation="sum_then_normalize",
        scale_rewards="none", pad_to_multiple_of=None, mask_truncated_completions=False, num_iterations=1,
        _tokenizer=SimpleNamespace(pad_token_id=0), _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(list, rewards=defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *given: torch.tensor([[1.0], [0.0], [0.2], [0.9]]),
        _get_per_token_logps_and_entropies=lambda model, *given, **others: (
            logprobs[model.name], torch.zeros(new.shape), None
        ),
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        use_vllm=False, vllm_importance_sampling_correction=False, vllm_importance_sampling_mode=None,
        vllm_importance_sampling_clip_min=None, vllm_importance_sampling_clip_max=None,
        loss_type="grpo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.28, beta=0.0,
        off_policy_mask_threshold=None, top_entropy_quantile=1.0, max_completion_length=MAX_TOKENS,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
    )  # fmt: skip
    for name, value in settings.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    call = {name: types.MethodType(getattr(trl.GRPOTrainer, name), trainer)
            for name in ("_generate_and_score_completions", "_compute_loss")}  # fmt: skip
    batch = call["_generate_and_score_completions"]([{"prompt": ""}] * 4)
    batch.setdefault("old_per_token_logps", logprobs["old"])  # TRL recomputes it only with vLLM or several updates
    loss = call["_compute_loss"](SimpleNamespace(name="new"), batch)
    (gradient,) = torch.autograd.grad(loss, new)
    flat = torch.cat([row[: len(kept)] for row, kept in zip(gradient, SAMPLED, strict=True)])
    return loss.item(), flat.tolist(), batch["advantages"].tolist()


def our_loss(
    policies: dict[str, list[Tensor]], advantages: list[float], algo: AlgoConfig, aggregation: Aggregation
) -> tuple[float, list[float]]:
    """(loss, its gradient at the tokens of SAMPLED) by algo/objective.py, which sees the sampled tokens only."""
    counts = torch.tensor([len(row) for row in SAMPLED])
    mask = torch.tensor([kept for row in SAMPLED for kept in row]).bool()
    sequence = torch.arange(4).repeat_interleave(counts)[mask]
    new = torch.cat(policies["new"]).requires_grad_()
    weights = torch.tensor(token_weights(LENGTHS, [0, 0, 1, 1], aggregation, MAX_TOKENS))
    tokens = Tokens(
        logprobs_new=new[mask],
        entropy=torch.zeros(len(sequence)),
        logprobs_old=torch.cat(policies["old"])[mask],
        logprobs_rollout=torch.cat(policies["rollout"])[mask],
        logprobs_reference=torch.cat(policies["reference"])[mask],
        advantages=torch.tensor(advantages)[sequence],
        weights=weights[sequence],
        sequence=sequence,
        lag=torch.zeros_like(sequence),
    )
    loss = objective(tokens, algo, Coefficients.at(algo, 1, 1)).loss
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.item(), gradient.tolist()


def with_settings(algo: AlgoConfig, **sections: Any) -> AlgoConfig:
    return type(algo).model_validate(algo.model_dump() | sections)


def on_policy_engine(policies: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """TRL's "old" policy as the one that sampled: the bypass form, with one ratio."""
    return policies | {"rollout": policies["old"]}


def check(
    trl: Any, policies: dict[str, list[Tensor]], settings: dict[str, Any], algo: AlgoConfig, aggregation: Aggregation
) -> None:
    theirs, their_gradient, advantages = trl_loss(trl, policies, **settings)
    loss, gradient = our_loss(policies, advantages, algo, aggregation)
    assert loss == pytest.approx(theirs, **TOLERANCE)
    assert gradient == pytest.approx(their_gradient, **TOLERANCE)
    assert any(gradient)


PPO = PPOClip(clip_low=0.2, clip_high=0.28)
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}
OBJECTIVES: dict[str, tuple[dict[str, Any], AlgoConfig, Aggregation]] = {
    "grpo": ({}, PPO, "seq_mean_token_mean"),
    "bnpo": ({"loss_type": "bnpo"}, PPO, "token_mean"),
    "dapo": ({"loss_type": "dapo"}, PPO, "token_mean"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, PPO, "constant"),
    "delta, as two_sided": ({"delta": 1.5}, TwoSided(max_ratio=1.5), "seq_mean_token_mean"),
    "delta, as dual_clip": ({"delta": 1.5}, DualClip(bound=1.5), "seq_mean_token_mean"),
    "delta with dapo": ({"loss_type": "dapo", "delta": 1.5}, TwoSided(max_ratio=1.5), "token_mean"),
    "gspo": (SEQUENCE, GSPO(clip_low=0.1, clip_high=0.15), "seq_mean_token_mean"),
    "gspo, as gspo_token": (SEQUENCE, GSPOToken(clip_low=0.1, clip_high=0.15), "seq_mean_token_mean"),
    "luspo": (SEQUENCE | {"loss_type": "luspo"}, GSPO(clip_low=0.1, clip_high=0.15), "seq_mean_token_sum"),
    "sapo": ({"loss_type": "sapo"}, SAPO(), "seq_mean_token_mean"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, CISPO(max_ratio=1.3), "token_mean"),
    # TRL's CISPO caps from above only, which is what REINFORCE-IS does
    "cispo, as reinforce_is": (
        {"loss_type": "cispo", "epsilon_high": 1.3}, ReinforceIS(max_ratio=1.3), "token_mean"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("spread", [0.0, 0.4, 2.0])
def test_objectives_and_what_they_are_a_mean_over(trl, name, spread):
    for seed in range(3):
        check(trl, on_policy_engine(draw(seed, spread)), *OBJECTIVES[name])


VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
CORRECTIONS = {
    "token_truncate": ((None, 1.2), {"tis_token": 1.2}),
    "token_mask": ((0.7, 1.2), {"icepop": [0.7, 1.2]}),
    "sequence_truncate": ((None, 1.5), {"tis_sequence": 1.5}),
    # TRL weighs what its mask keeps, by the product, which the cap then leaves alone
    "sequence_mask": ((0.4, 1.5), {"sequence_mis": [0.4, 1.5], "tis_sequence": 1.5}),
}


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "sapo", "delta, as two_sided"])
def test_corrections_of_the_gap_between_engine_and_proximal_policy(trl, mode, name):
    (low, high), correction = CORRECTIONS[mode]
    settings, algo, aggregation = OBJECTIVES[name]
    settings = settings | VLLM | {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }  # fmt: skip
    algo = with_settings(algo, proximal="recompute", correction=correction)
    for seed in range(3):
        check(trl, draw(seed, 0.3), settings, algo, aggregation)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_the_off_policy_sequence_mask(trl, name):
    settings, algo, aggregation = OBJECTIVES[name]
    masked, algo = settings | {"off_policy_mask_threshold": 0.1}, with_settings(algo, correction={"opsm": 0.1})
    dropped = 0
    for seed in range(4):
        policies = on_policy_engine(draw(seed, 0.5))
        check(trl, policies, masked, algo, aggregation)
        dropped += trl_loss(trl, policies, **settings)[0] != trl_loss(trl, policies, **masked)[0]
    assert dropped > 0


def test_the_off_policy_sequence_mask_looks_at_the_engine_when_the_policies_are_decoupled(trl):
    truncate = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2}
    algo = with_settings(PPO, proximal="recompute", correction={"opsm": 0.1, "tis_token": 1.2})
    for seed in range(4):
        settings = VLLM | truncate | {"off_policy_mask_threshold": 0.1}
        check(trl, draw(seed, 0.5), settings, algo, "seq_mean_token_mean")


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_k3_as_a_term_of_the_loss(trl, name):
    settings, algo, aggregation = OBJECTIVES[name]
    algo = with_settings(algo, kl={"coef": 0.3, "estimator": "k3", "importance_cap": None})
    for seed in range(3):
        check(trl, on_policy_engine(draw(seed, 0.4)), settings | {"beta": 0.3}, algo, aggregation)


def test_the_kl_term_is_neither_weighed_nor_masked_by_corrections(trl):
    truncate = {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.05}
    kl = {"coef": 0.3, "estimator": "k3", "importance_cap": None}
    correction = {"opsm": 0.1, "tis_sequence": 1.05, "sequence_mis": [1e-9, 1.05]}
    algo = with_settings(PPO, proximal="recompute", correction=correction, kl=kl)
    settings = VLLM | truncate | {"off_policy_mask_threshold": 0.1, "beta": 0.3}
    for seed in range(3):
        check(trl, draw(seed, 0.4), settings, algo, "seq_mean_token_mean")


def test_the_value_of_k3_with_its_importance_weight(trl):
    policies = on_policy_engine(draw(0, 0.4))
    theirs, _, advantages = trl_loss(trl, policies, beta=0.3, use_bias_correction_kl=True)
    algo = with_settings(PPO, kl={"coef": 0.3, "estimator": "k3", "importance_cap": 1e6})
    loss, _ = our_loss(policies, advantages, algo, "seq_mean_token_mean")
    assert loss == pytest.approx(theirs, **TOLERANCE)
