"""What holds for every objective: equivalences, what must not matter, and what must not be hidden."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.losses import LOSSES, LossInputs, LossOutputs, policy_loss
from pipelinerl.config.schema import GSPO, DualClip, GSPOToken, PPOClip, TwoSided
from tests.unit.loss_inputs import ALL, KINDS, advantages, evaluate, from_rows, inputs, rows

PPO, SEQUENCE, SEQUENCE_TOKEN = (section(clip_low=0.2, clip_high=0.28) for section in (PPOClip, GSPO, GSPOToken))
every_objective = pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
few = settings(max_examples=20)


def test_every_kind_the_configuration_allows_has_a_loss_and_is_tested_here():
    assert set(LOSSES) == KINDS == {config.kind for config in ALL}


# --- equivalences


@every_objective
@few
@given(rows, advantages)
def test_every_objective_is_the_policy_gradient_at_ratio_one(config, given_rows, given_advantages):
    on_policy = [(i, new, new, new, kept) for i, new, _, _, kept in given_rows]
    _, clipped, gradient = evaluate(from_rows(on_policy, given_advantages), config)
    expected = [-given_advantages[i] if kept else 0 for i, *_, kept in given_rows]
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not any(clipped)


@given(rows, advantages)
def test_both_forms_of_gspo_are_ppo_where_sequences_have_one_token(given_rows, given_advantages):
    table = [(new, old, mu, given_advantages[i], kept) for i, new, old, mu, kept in given_rows]
    single = [list(column) for column in zip(*table, strict=True)]
    expected = evaluate(inputs(*single), PPO)
    for config in (SEQUENCE, SEQUENCE_TOKEN):
        for sequence_level, token_level in zip(evaluate(inputs(*single), config), expected, strict=True):
            assert sequence_level == pytest.approx(token_level, rel=1e-6, abs=1e-7)


@given(rows, advantages)
def test_both_forms_of_gspo_are_one_when_a_sequence_has_one_advantage(given_rows, given_advantages):
    one, other = (evaluate(from_rows(given_rows, given_advantages), c) for c in (SEQUENCE, SEQUENCE_TOKEN))
    for values, others in zip(one, other, strict=True):
        assert values == pytest.approx(others, rel=1e-5, abs=1e-6)


@given(rows, advantages)
def test_dual_clip_and_two_sided_are_ppo_until_their_second_bound(given_rows, given_advantages):
    # the largest ratio is exp(3) = 20.1
    expected = evaluate(from_rows(given_rows, given_advantages), PPO)
    for config in (DualClip(clip_low=0.2, clip_high=0.28, bound=21), TwoSided(clip_high=0.28, max_ratio=21)):
        assert evaluate(from_rows(given_rows, given_advantages), config) == expected


def test_a_sequence_weighs_the_same_in_gspo_whatever_its_length():
    """Each of its tokens has the same loss, so a mean over them is the sequence's."""
    short, _, _ = evaluate(inputs([-1, -2], [-1.1, -2.05], [0, 0], [1, 1], sequence=[0, 0]), SEQUENCE)
    long, _, _ = evaluate(inputs([-1, -2] * 5, [-1.1, -2.05] * 5, [0] * 10, [1] * 10, sequence=[0] * 10), SEQUENCE)
    assert short == pytest.approx([-math.exp(0.075)] * 2, rel=1e-5) and long == pytest.approx(short * 5, rel=1e-5)


# --- what must not matter


@every_objective
@few
@given(given_rows=rows, given_advantages=advantages, random=st.randoms(use_true_random=False))
def test_order_padding_and_the_names_of_sequences_do_not_matter(config, given_rows, given_advantages, random):
    order, names = random.sample(range(len(given_rows)), len(given_rows)), random.sample(range(-9, 900), 4)
    padding = [(names[random.randrange(4)], math.nan, math.inf, -math.inf, False) for _ in range(3)]
    moved_rows = [(names[i], *rest) for i, *rest in (given_rows[j] for j in order)] + padding
    moved_advantages = {names[i]: a for i, a in enumerate(given_advantages)}
    direct = evaluate(from_rows(given_rows, given_advantages), config)
    moved = evaluate(from_rows(moved_rows, moved_advantages), config)
    for before, after in zip(direct, moved, strict=True):
        assert after == pytest.approx([before[j] for j in order] + [0] * 3, rel=1e-4, abs=1e-5)


@every_objective
def test_nothing_outside_the_mask_reaches_loss_or_gradient(config):
    bad, mask = [math.nan, math.inf, -math.inf], [True, False, False, False]
    clean = evaluate(inputs([-1.5], [-1], [-1.2], [-2]), config)
    dirty = evaluate(inputs([-1.5, *bad], [-1, *bad], [-1.2, *bad], [-2, *bad], mask, sequence=[0] * 4), config)
    assert dirty == tuple([*values, 0, 0, 0] for values in clean)


@every_objective
def test_all_masked_is_a_zero_loss_with_a_zero_gradient(config):
    found = evaluate(inputs([math.nan, -1], [0, -5], [0, -5], [1, 1], [False, False]), config)
    assert found == ([0, 0], [0, 0], [0, 0])


@every_objective
def test_no_tokens_at_all(config):
    assert evaluate(inputs([], [], [], []), config) == ([], [], [])


@every_objective
def test_a_sequence_without_sampled_tokens_adds_nothing(config):
    mask, sequence = [False, True, True], [3, 5, 5]
    found = evaluate(inputs([math.nan, -1, -2], [0, -1, -2], [0, -1, -2], [7, 1, 1], mask, sequence), config)
    assert found[1:] == ([0, 0, 0], [0, -1, -1])


def test_the_other_policies_and_the_advantages_carry_no_gradient():
    flat = inputs([-1], [-1.5], [-1.4], [2])
    constants = (flat.logprobs_old, flat.logprobs_rollout, flat.advantages)
    for values in constants:
        values.requires_grad_()
    for config in ALL:
        policy_loss(flat, config).token_loss.sum().backward()
    assert [values.grad for values in constants] == [None] * 3


def test_the_mask_also_holds_for_a_loss_that_ignores_it(monkeypatch):
    def careless(given_inputs, config):
        ones = torch.ones_like(given_inputs.logprobs_new)
        return LossOutputs(ones, ones.to(torch.int8))

    monkeypatch.setitem(LOSSES, "ppo_clip", careless)
    outputs = policy_loss(inputs([-1, -1], [-1, -1], [-1, -1], [1, 1], [True, False]), PPO)
    assert outputs.token_loss.tolist() == [1, 0] and outputs.clipped.tolist() == [1, 0]


# --- what must not be hidden


@every_objective
@pytest.mark.parametrize("field", range(4), ids=["new", "old", "rollout", "advantage"])
def test_a_non_finite_sampled_token_is_visible_in_the_loss_of_its_own_sequence_only(config, field):
    for bad, sign in product([math.nan, math.inf, -math.inf], [1.0, -1.0]):
        columns = [[-1.0, -1.0] for _ in range(3)] + [[sign, sign]]
        columns[field][0] = bad
        bad_loss, good_loss = policy_loss(inputs(*columns), config).token_loss.tolist()
        assert not math.isfinite(bad_loss) and math.isfinite(good_loss), (bad, sign)


@pytest.mark.parametrize("config", [SEQUENCE, SEQUENCE_TOKEN], ids=lambda config: config.kind)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_token_poisons_its_own_sequence_in_gspo_and_no_other(config, bad):
    new, mask = [-1, bad, -1, -1, bad], [True, True, True, True, False]  # the last is padding
    loss, _, _ = evaluate(inputs(new, [-1] * 5, [-1] * 5, [1] * 5, mask, sequence=[0, 0, 1, 1, 1]), config)
    assert all(map(math.isnan, loss[:2])) and loss[2:] == [-1, -1, 0]


@every_objective
def test_extreme_ratios_stay_finite(config):
    # log-ratios of +-500 are clamped to +-20: exp(20) = 4.85e8
    new, other = [0, -500, 0, -500], [-500, 0, -500, 0]
    loss, _, gradient = evaluate(inputs(new, other, other, [1, 1, -1, -1]), config)
    assert all(map(math.isfinite, loss + gradient))
    if config.kind in ("ppo_clip", "gspo", "gspo_token"):
        assert loss[2] == pytest.approx(math.exp(20), rel=1e-4)


def test_bfloat16_inputs_are_computed_on_in_float32():
    # both logprobs are exact in bfloat16, their difference -(1 + 2^-7) + 2^-13 is not
    new = torch.tensor([-(1 + 2.0**-7)], dtype=torch.bfloat16, requires_grad=True)
    old, advantage = torch.tensor([-(2.0**-13)]).bfloat16(), torch.tensor([1.0]).bfloat16()
    mask, sequence = torch.tensor([True]), torch.tensor([0])
    outputs = policy_loss(LossInputs(new, old, old, advantage, mask, sequence), PPOClip(clip_low=0.9))
    assert outputs.token_loss.dtype == torch.float32
    assert outputs.token_loss.item() == pytest.approx(-math.exp(-(1 + 2.0**-7) + 2.0**-13), rel=1e-6)
    outputs.token_loss.sum().backward()
    assert new.grad is not None and new.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("short", range(1, 4), ids=["logprobs_old", "logprobs_rollout", "advantages"])
def test_shapes_are_checked(short, request):
    columns = [[-1, -1] for _ in range(4)]
    columns[short] = [-1]
    with pytest.raises(AssertionError, match=request.node.callspec.id):
        inputs(*columns)
