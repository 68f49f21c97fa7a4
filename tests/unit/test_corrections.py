"""Each correction against weights worked out by hand, and what holds for all of them."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.corrections import CORRECTIONS, DEFAULTS, CorrectionInputs, affected, correct
from pipelinerl.config.schema import CorrectionConfig

PRESETS = Path(__file__).parents[2] / "conf/algo/correction"
NAMES = sorted(CorrectionConfig.model_fields)
CAPS = ["tis_sequence", "tis_token"]
MASKS = [name for name in NAMES if name not in CAPS]


def inputs(x, sequence=None, ratio=None, advantages=None, mask=None, lag=None):
    """Tokens with these x; each a sequence of its own with A = 1, lag 0 and a ratio to the engine of 1 unless told."""
    n = len(x)
    return CorrectionInputs(
        log_x=torch.tensor(x, dtype=torch.float64).log().float(),
        log_ratio=torch.tensor([1.0] * n if ratio is None else ratio, dtype=torch.float64).log().float(),
        advantages=torch.tensor([1.0] * n if advantages is None else advantages, dtype=torch.float32),
        mask=torch.tensor([True] * n if mask is None else mask, dtype=torch.bool),
        sequence=torch.tensor(list(range(n)) if sequence is None else sequence, dtype=torch.int64),
        lag=torch.tensor([0] * n if lag is None else lag, dtype=torch.int32),
    )


def only(name):
    return CorrectionConfig.model_validate({name: getattr(DEFAULTS, name)})


def weights(given_inputs, decoupled=True, **config):
    return correct(given_inputs, CorrectionConfig.model_validate(config), decoupled).weight.tolist()


def test_tis_of_tokens_by_hand():
    assert weights(inputs([4, 1, 0.5]), tis_token=2.0) == pytest.approx([2, 1, 0.5])


def test_tis_of_sequences_by_hand():
    # products 2 * 2 = 4, 4 * 2 = 8, 0.5
    found = weights(inputs([2, 2, 4, 2, 0.5], [0, 0, 1, 1, 2]), tis_sequence=5.0)
    assert found == pytest.approx([4, 4, 5, 5, 0.5])


def test_icepop_by_hand():
    x = [0.4, 0.6, 4, 6]
    assert weights(inputs(x), icepop=[0.5, 5.0]) == pytest.approx([0, 0.6, 4, 0])
    # where the objective holds x itself, only the mask is left
    assert weights(inputs(x), decoupled=False, icepop=[0.5, 5.0]) == [0, 1, 1, 0]


def test_sequence_mis_by_hand():
    # products 2.8, 3.2, 0.3, 0.36
    found = weights(inputs([2, 1.4, 2, 1.6, 0.3, 0.6, 0.6], [0, 0, 1, 1, 2, 3, 3]), sequence_mis=[0.33, 3.0])
    assert found == [1, 1, 0, 0, 0, 1, 1]


def test_geometric_by_hand():
    # geometric means 1, 1.008 (whose product would be out), sqrt(1.02 * 1.01) = 1.015, 0.98
    x, sequence = [1.1, 1 / 1.1, 1.008, 1.008, 1.02, 1.01, 0.98], [0, 0, 1, 1, 2, 2, 3]
    assert weights(inputs(x, sequence), geometric=[0.99, 1.01]) == [1, 1, 1, 1, 0, 0, 0]


def test_k3_by_hand():
    # x - 1 - log x: 0.0177 at 1.2, 0 at 1, 0.0231 at 0.8; means 0.0088, 0.0177, 0.0231
    found = weights(inputs([1.2, 1, 1.2, 1.2, 0.8], [0, 0, 1, 1, 2]), k3=0.01)
    assert found == [1, 1, 0, 0, 0]


def test_a_small_k3_is_not_lost_to_cancellation():
    # log x = 2^-12: k3 = 2^-25 = 3e-8, and float32 has steps of 1.2e-7 at x = 1
    given_inputs = inputs([math.exp(2.0**-12)])
    assert weights(given_inputs, k3=2.5e-8) == [0] and weights(given_inputs, k3=3.5e-8) == [1]


def test_veto_by_hand():
    found = weights(inputs([1, 0.5e-4, 1, 2e-4], [0, 0, 1, 1]), veto=1e-4)
    assert found == [0, 0, 1, 1]


def test_opsm_by_hand():
    # mean log(engine/current): 0.6, 0.6, (1.2 - 0.1) / 2 = 0.55, 0.4, -0.9; x has no part in it
    log_ratios = [-0.6, -0.6, -1.2, 0.1, -0.4, 0.9]
    given_inputs = inputs([7] * 6, [0, 1, 2, 2, 3, 4], [math.exp(v) for v in log_ratios], [-1, 1, -1, -1, -1, -1])
    assert weights(given_inputs, opsm=0.5) == [0, 1, 0, 0, 1, 1]


def test_the_version_mask_by_hand():
    found = weights(inputs([1, 1, 1], [0, 0, 0], lag=[4, 5, 0]), version_mask=4)
    assert found == [1, 0, 1]


def test_nothing_on_is_a_weight_of_one_on_sampled_tokens():
    found = correct(inputs([9, 0.1], mask=[True, False]), CorrectionConfig(), decoupled=True)
    assert found.weight.tolist() == [1, 0] and not found.masked


def test_all_that_are_on_multiply_and_each_mask_is_reported_by_itself():
    given_inputs = inputs([3, 0.5, 1e-5, 1, 1.5], [0, 0, 1, 1, 2], lag=[0, 9, 9, 0, 0])
    config = CorrectionConfig(tis_token=2.0, veto=1e-4, version_mask=4)
    found = correct(given_inputs, config, decoupled=True)
    assert found.weight.tolist() == pytest.approx([2, 0, 0, 0, 1.5])
    assert {name: mask.tolist() for name, mask in found.masked.items()} == {
        "veto": [False, False, True, True, False],
        "version_mask": [False, True, True, False, False],
    }


@pytest.mark.parametrize("name", CAPS)
def test_a_weight_is_not_put_on_top_of_an_objective_that_holds_it(name):
    with pytest.raises(AssertionError, match=name):
        correct(inputs([1]), only(name), decoupled=False)


# --- what would be affected


def test_a_cap_affects_what_it_cuts_down_and_a_mask_what_it_drops():
    assert affected("tis_token", inputs([2.1, 1.9, 0.1]), 2.0).tolist() == [True, False, False]
    assert affected("tis_token", inputs([1.0]), 1.0).tolist() == [False]
    assert affected("tis_sequence", inputs([2, 2, 2.4, 2.4], [0, 0, 1, 1]), 5.0).tolist() == [False, False, True, True]
    assert affected("icepop", inputs([0.4, 0.6, 4, 6]), (0.5, 5.0)).tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(-12, 3), st.integers(0, 2), st.integers(0, 9), st.booleans()), min_size=1))
def test_what_a_mask_would_affect_is_what_it_masks(name, rows):
    log_x, sequence, lag, mask = zip(*rows, strict=True)
    x = [math.exp(v) for v in log_x]
    given_inputs = inputs(x, sequence, x, [(-1) ** i for i in sequence], mask, lag)
    found = correct(given_inputs, only(name), decoupled=True)
    would = affected(name, given_inputs, getattr(DEFAULTS, name))
    assert torch.equal(found.masked[name], would)
    assert torch.equal(found.weight == 0, would | ~given_inputs.mask)


# --- for all of them


def test_the_defaults_are_those_of_the_presets():
    presets = {}
    for path in PRESETS.glob("*.yaml"):
        for name, value in yaml.safe_load(path.read_text()).items():
            value = tuple(value) if isinstance(value, list) else float(value)  # YAML 1.1 reads 1e-4 as text
            assert presets.setdefault(name, value) == value, path
    assert presets == dict(DEFAULTS) and set(presets) == set(NAMES) == set(CORRECTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_equal_policies_are_not_corrected(name):
    found = correct(inputs([1] * 3, [0, 0, 1], advantages=[-1, -1, 1]), only(name), decoupled=True)
    assert found.weight.tolist() == [1, 1, 1]
    assert not affected(name, inputs([1] * 3), getattr(DEFAULTS, name)).any()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    rows=st.lists(
        st.tuples(st.integers(-40, 40), st.integers(0, 3), st.integers(0, 9), st.booleans()), min_size=1, max_size=12
    ),
    random=st.randoms(use_true_random=False),
)
def test_order_padding_and_the_names_of_sequences_do_not_matter(name, rows, random):
    def found(table):
        log_x, sequence, lag, mask, advantages = zip(*table, strict=True)
        x = [math.exp(v / 16) for v in log_x]
        return correct(inputs(x, sequence, x, advantages, mask, lag), only(name), decoupled=True).weight.tolist()

    # A = 1 in even sequences, -1 in odd ones
    table = [(v, i, lag, mask, (-1) ** i) for v, i, lag, mask in rows]
    order, names = random.sample(range(len(rows)), len(rows)), random.sample(range(-9, 900), 4)
    moved = [(v, names[i], *rest) for v, i, *rest in (table[j] for j in order)]
    padding = [(math.nan, names[0], 99, False, math.nan)] * 2
    direct = found(table)
    assert found(moved + padding) == pytest.approx([direct[j] for j in order] + [0, 0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("field", ["x", "ratio"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_an_unknown_ratio_is_no_weight_and_no_mask(name, bad, field, decoupled):
    if name in CAPS and not decoupled:
        return
    given_inputs = inputs(**({"x": [1, 1, 1], "sequence": [0, 0, 1], "advantages": [-1] * 3} | {field: [bad, 1, 1]}))
    first, _, last = correct(given_inputs, only(name), decoupled).weight.tolist()
    assert math.isnan(first) and last == 1


@pytest.mark.parametrize("name", NAMES)
def test_all_masked_and_no_tokens(name):
    for given_inputs in (inputs([math.nan, 9], [0, 0], mask=[False, False]), inputs([])):
        found = correct(given_inputs, only(name), decoupled=True)
        assert not found.weight.any()
        assert not affected(name, given_inputs, getattr(DEFAULTS, name)).any()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_have_finite_weights_and_no_gradient(name):
    extreme = torch.tensor([500.0, -500.0], requires_grad=True)
    ones = torch.ones(2)
    given_inputs = CorrectionInputs(extreme, extreme, -ones, ones.bool(), torch.tensor([0, 1]), torch.tensor([99, 99]))
    found = correct(given_inputs, only(name), decoupled=True).weight
    assert found.isfinite().all() and not found.requires_grad
    assert affected(name, given_inputs, getattr(DEFAULTS, name)).any()
