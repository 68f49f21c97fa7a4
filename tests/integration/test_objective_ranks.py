"""Trainer ranks on DeepSpeed: the terms of the objective, and steps of several updates, as worked out in plain torch.

All cases run in one subprocess (see ranks.py). As in test_trainer.py Adam's eps is 1, far above the gradients, so that
a step is nearly proportional to the gradient and comparing weights compares gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelinerl.errors import ConfigError, EnvironmentProblem
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan
from tests.integration import objective_ranks
from tests.integration.models import load_reference, reference_logprobs, run_config, write_model
from tests.integration.objective_ranks import Case, RankRun
from tests.integration.ranks import results_of

TEMPERATURE = 0.8
MAX_NORM = 0.25
ADAM: dict[str, Any] = {"lr": 1.0, "eps": 1.0, "max_grad_norm": MAX_NORM, "weight_decay": 0.0, "betas": (0.9, 0.95)}
KL, ENTROPY = 0.3, 0.2
TERMS: dict[str, Any] = {
    "kl": {"coef": KL, "final_coef": 0.0, "offload": True},
    "entropy": {"coef": ENTROPY},
}
RECOMPUTE: dict[str, Any] = {"proximal": "recompute", "correction": {"tis_token": 1.1}}
ADVANTAGES = (1.0, -0.5, 0.25, -2.0)


def make_group(model: Path) -> RolloutGroup:
    """Four rollouts of different lengths, with logprobs that miss the policy's a little; the last one has two turns."""
    rng, policy = np.random.default_rng(5), load_reference(model)
    rollouts = []
    for pieces in ([(4, 9)], [(7, 5)], [(3, 14)], [(5, 4), (3, 6)]):
        tokens = rng.integers(6, 100, sum(map(sum, pieces)))
        with torch.no_grad():
            logprobs = np.append(0.0, reference_logprobs(policy, tokens.tolist(), TEMPERATURE).numpy())
        turns, start = [], 0
        for context, sampled in pieces:
            middle, end = start + context, start + context + sampled
            noisy = (logprobs[middle:end] + rng.normal(0, 0.2, sampled)).astype(np.float32)
            completion = Completion(
                tokens[middle:end].astype(np.int32), noisy, (VersionSpan(0, 0, sampled),), "stop", ""
            )
            turns.append(Turn(tokens[start:middle].astype(np.int32), completion))
            start = end
        rollouts.append(Rollout(tuple(turns), 1.0, Outcome.OK))
    return RolloutGroup(17, "train/0", tuple(rollouts))


def batch(group: RolloutGroup, *micro_batches: Sequence[int], kl_to_go: float = 0.0) -> RankBatch:
    """Micro-batches of rollouts, by number; a token weighs 1/50."""

    def ref(k: int) -> SampleRef:
        return SampleRef(0, k, ADVANTAGES[k], group.rollouts[k].total_len, 1 / 50)

    return RankBatch(tuple(tuple(map(ref, numbers)) for numbers in micro_batches), kl_to_go)


def with_nan(group: RolloutGroup) -> RolloutGroup:
    """A logprob of the first rollout is NaN."""
    turn = group.rollouts[0].turns[0]
    logprobs = np.append(np.float32(np.nan), turn.completion.logprobs[1:])
    broken = Rollout((replace(turn, completion=replace(turn.completion, logprobs=logprobs)),), 1.0, Outcome.OK)
    return replace(group, rollouts=(broken, *group.rollouts[1:]))


@pytest.fixture(scope="module")
def group(tied_model: Path) -> RolloutGroup:
    return make_group(tied_model)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that is another model than the policy."""
    return write_model(tmp_path_factory.mktemp("reference"), tied=True, seed=7)


@pytest.fixture(scope="module")
def runs(
    tied_model: Path, group: RolloutGroup, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[RankRun]]:
    """Every case, as [rank]."""

    def case(steps: Any, algo: dict[str, Any], payload: RolloutGroup = group, **trainer: Any) -> Case:
        if "kl" in algo:
            algo = algo | {"kl": algo["kl"] | {"reference": str(other)}}
        config = run_config(
            tied_model,
            algo=algo,
            batch={"updates": len(steps[0]), "groups_per_step": 2},
            sampling={"temperature": TEMPERATURE},
            trainer=ADAM | {"ranks": len(steps[0][0])} | trainer,
        ).model_copy(update={"steps": 2})
        return Case(config, steps, [payload], measure=algo.get("kl", {}).get("place") == "reward")

    one = [batch(group, (0, 1, 2, 3))]
    uneven = [batch(group, (0, 1), (2,)), batch(group, (3,), ())]
    two = [[batch(group, (0, 1), (2,))], [batch(group, (3, 1), (0,))]]
    on_two_ranks = [[batch(group, (0, 1)), batch(group, (2,))], [batch(group, (3,), (1,)), batch(group, (0,), ())]]
    in_reward = {"kl": {"coef": 0.1, "place": "reward", "estimator": "k1"}}
    cases = {
        "terms": case([[one], [one]], TERMS),
        "terms_uneven": case([[uneven]], TERMS),
        "updates": case([two], RECOMPUTE),
        "updates_two_ranks": case([on_two_ranks], RECOMPUTE),
        "updates_zero_3": case([on_two_ranks], RECOMPUTE, zero_stage=3),
        "first_update_bad": case([[two[0], [batch(group, (3, 1), (2,))]]], RECOMPUTE, with_nan(group)),
        "to_go": case([[[batch(group, (0, 1), (2, 3), kl_to_go=0.5)]]], in_reward),
    }
    return results_of(objective_ranks, cases, tmp_path_factory.mktemp("objective"))


@dataclass
class Scored:
    """The sampled tokens of a rollout, in plain torch."""

    new: Tensor
    entropy: Tensor
    engine: Tensor


def score(policy: Any, rollout: Rollout) -> Scored:
    tokens = np.concatenate([part for turn in rollout.turns for part in (turn.context, turn.completion.tokens)])
    ids = torch.as_tensor(tokens.astype(np.int64))
    hidden = policy.base_model(ids[None]).last_hidden_state[0, :-1]
    logprobs = torch.log_softmax(hidden @ policy.get_output_embeddings().weight.T / TEMPERATURE, -1)
    sampled = np.concatenate([[turn_part] * n for turn in rollout.turns for turn_part, n in
                              ((False, len(turn.context)), (True, len(turn.completion.tokens)))])[1:]  # fmt: skip
    where = torch.as_tensor(sampled.astype(bool))
    new = logprobs.gather(-1, ids[1:, None])[:, 0]
    engine = torch.cat([torch.from_numpy(turn.completion.logprobs) for turn in rollout.turns])
    return Scored(new[where], -(logprobs.exp() * logprobs).sum(-1)[where], engine)


def clipped(log_ratio: Tensor, advantage: Tensor | float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)


class ByHand:
    """A policy that is trained rollout by rollout."""

    def __init__(self, model: Path):
        self.policy = load_reference(model)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1.0, eps=1.0, weight_decay=0, betas=(0.9, 0.95))

    def update(self, losses: Sequence[Tensor]) -> float:
        loss = torch.cat(list(losses)).sum() / 50
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_NORM)
        assert norm > MAX_NORM
        self.optimizer.step()
        return loss.item()

    def check(self, weights: dict[str, Any], start: Path) -> None:
        """The distance to these weights is small against what training has changed."""
        before = dict(load_reference(start).named_parameters())
        for name, parameter in self.policy.named_parameters():
            moved = (parameter - before[name]).norm().item()
            assert moved > 1e-5 and (parameter - torch.from_numpy(weights[name])).norm().item() < 2e-4 * moved, name


def step_with_terms(model: Path, other: Path, group: RolloutGroup, kl: float) -> tuple[ByHand, float, list[float]]:
    by_hand, frozen = ByHand(model), load_reference(other).requires_grad_(False)
    losses, divergence = [], []
    for rollout, advantage in zip(group.rollouts, ADVANTAGES, strict=True):
        found, reference = score(by_hand.policy, rollout), score(frozen, rollout).new
        d = found.new - reference
        weight = (found.new - found.engine).detach().exp().clamp(max=2)
        terms = kl * weight * d.clamp(-10, 10).square() / 2 - ENTROPY * found.entropy
        losses.append(clipped(found.new - found.engine, advantage) + terms)
        divergence += (torch.exp(-d) - 1 + d).tolist()
    return by_hand, by_hand.update(losses), divergence


def test_kl_to_another_reference_and_entropy_are_terms_of_the_loss(
    runs: dict[str, list[RankRun]], tied_model: Path, other: Path, group: RolloutGroup
) -> None:
    by_hand, loss, divergence = step_with_terms(tied_model, other, group, KL)
    metrics = runs["terms_uneven"][0].results[0].metrics
    assert metrics["optim/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["policy/kl_ref"] == pytest.approx(np.mean(divergence), rel=1e-4)
    for rank in runs["terms_uneven"]:
        by_hand.check(rank.weights, tied_model)


def test_the_coefficient_of_the_kl_is_that_of_the_step(runs: dict[str, list[RankRun]]) -> None:
    first, second = (result.metrics for result in runs["terms"][0].results)
    assert (first["optim/kl_coef"], second["optim/kl_coef"]) == (KL, 0.0)
    assert first["optim/entropy_coef"] == second["optim/entropy_coef"] == ENTROPY
    assert first["optim/loss"] == pytest.approx(runs["terms_uneven"][0].results[0].metrics["optim/loss"], rel=1e-5)


def updates_by_hand(
    model: Path, group: RolloutGroup, updates: Sequence[Sequence[int]]
) -> tuple[ByHand, list[float], float]:
    """Updates on rollouts of these numbers: the policy, the losses, and how far a log ratio ever was from 0."""
    by_hand = ByHand(model)
    start = [score(by_hand.policy, rollout).new.detach() for rollout in group.rollouts]
    losses, distance = [], 0.0
    for members in updates:
        parts = []
        for k in members:
            found = score(by_hand.policy, group.rollouts[k])
            weight = (start[k] - found.engine).exp().clamp(max=1.1)
            parts.append(weight * clipped(found.new - start[k], ADVANTAGES[k]))
            distance = max(distance, (found.new - start[k]).abs().max().item())
        losses.append(by_hand.update(parts))
    return by_hand, losses, distance


@pytest.mark.parametrize("case", ["updates", "updates_two_ranks", "updates_zero_3"])
def test_the_second_update_of_a_step_is_kept_near_the_policy_at_its_start(
    case: str, runs: dict[str, list[RankRun]], tied_model: Path, group: RolloutGroup
) -> None:
    by_hand, losses, distance = updates_by_hand(tied_model, group, [(0, 1, 2), (3, 1, 0)])
    assert distance > 0.25  # beyond the clip: against the current policy all ratios would be 1
    for rank in runs[case]:
        (result,) = rank.results
        assert result.applied and result.version == 1
        assert result.metrics["optim/loss"] == pytest.approx(losses[-1], rel=1e-4)
        assert result.metrics["policy/clip_rate"] > 0
        by_hand.check(rank.weights, tied_model)


def test_mismatch_is_of_the_first_update_alone(runs: dict[str, list[RankRun]], group: RolloutGroup) -> None:
    lengths = [rollout.completion_len for rollout in group.rollouts]
    for case in ("updates", "updates_two_ranks"):
        metrics = runs[case][0].results[0].metrics
        assert metrics["mismatch/tokens"] == sum(lengths[:3])
        assert metrics["staleness/tokens_lag_0"] == sum(lengths[k] for k in (0, 1, 2, 3, 1, 0))


def test_a_bad_update_is_skipped_and_the_other_one_of_the_step_is_not(
    runs: dict[str, list[RankRun]], tied_model: Path, group: RolloutGroup
) -> None:
    (run,) = runs["first_update_bad"]
    assert run.results[0].applied and run.results[0].metrics["optim/skipped"] == 1
    by_hand, *_ = updates_by_hand(tied_model, group, [(3, 1, 2)])
    by_hand.check(run.weights, tied_model)


def test_what_a_rollout_costs_in_kl_and_what_of_it_is_taken_off_each_token(
    runs: dict[str, list[RankRun]], tied_model: Path, other: Path, group: RolloutGroup
) -> None:
    by_hand, frozen = ByHand(tied_model), load_reference(other).requires_grad_(False)
    losses = []
    (run,) = runs["to_go"]
    measured = {kl.rollout: kl for kl in run.measured}
    assert {kl.group for kl in run.measured} == {0} and len(measured) == len(run.measured) == 4
    for k, rollout in enumerate(group.rollouts):
        found = score(by_hand.policy, rollout)
        k1 = found.engine - score(frozen, rollout).new
        to_go = torch.stack([k1[t:].sum() for t in range(len(k1))])
        assert measured[k].total == pytest.approx(k1.sum().item(), rel=1e-4, abs=1e-4)
        assert measured[k].to_go_sum == pytest.approx(to_go.sum().item(), rel=1e-4, abs=1e-4)
        assert measured[k].to_go_squares == pytest.approx(to_go.square().sum().item(), rel=1e-4)
        losses.append(clipped(found.new - found.engine, ADVANTAGES[k] - 0.5 * to_go))
    assert run.results[0].metrics["optim/loss"] == pytest.approx(by_hand.update(losses), rel=1e-4)
    by_hand.check(run.weights, tied_model)


def test_the_reference_computes_a_rollout_once(runs: dict[str, list[RankRun]]) -> None:
    assert runs["to_go"][0].reference_rows == 2  # the rows of one pass, for measuring and training
    assert runs["terms"][0].reference_rows == 2  # one row in each of two steps


def test_a_reference_that_cannot_be_one_is_named(tied_model: Path, tmp_path: Path) -> None:
    from pipelinerl.trainer.reference import Reference

    def load(reference: Path, vocabulary: int) -> None:
        config = run_config(tied_model, algo={"kl": {"coef": 0.1, "reference": str(reference)}})
        Reference.load(config, torch.device("cpu"), vocabulary)

    with pytest.raises(EnvironmentProblem, match=f"^algo.kl.reference={tmp_path}"):
        load(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"^algo.kl.reference=.* has a vocabulary of \d+ tokens.* one of 10:"):
        load(tied_model, 10)
