"""Scoring by the trainer, without an engine: which weights and which KV stand behind each token.

The reference is transformers alone, one token at a time, as an engine decodes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from pipelinerl.batch.samples import collate, train_sample
from pipelinerl.errors import EnvironmentProblem
from pipelinerl.trainer.attention import runs_of_equal_length
from pipelinerl.trainer.hidden_states import hidden_states
from pipelinerl.trainer.model import PolicyModel, load_policy
from pipelinerl.trainer.nudge import Weights, nudge
from pipelinerl.trainer.scoring import score_completions
from pipelinerl.types import Completion, Outcome, Rollout, ScoredSequence, ScoreRequest, Turn, VersionSpan
from tests.integration.models import load_reference, run_config, write_model

TEMPERATURES = (0.7, 1.0, 1.3)
NUDGED = {0: False, 1: True, 2: False, 3: True, 4: True}

Models = Mapping[bool, PreTrainedModel]


def request(kv: str = "keep", temperatures: Sequence[float] = TEMPERATURES, **fields: str) -> ScoreRequest:
    return ScoreRequest(tuple(temperatures), NUDGED, kv, **fields)


def make_policy(path: Path, dtype: str = "float32", checkpointing: bool = False, chunk: int = 7) -> PolicyModel:
    return load_policy(run_config(path, dtype).model, 1.0, chunk, checkpointing)


@pytest.fixture(scope="module")
def models(tied_model: Path) -> Models:
    """By whether they are nudged."""
    both = {False: load_reference(tied_model), True: load_reference(tied_model)}
    nudge(both[True])
    return both


def turn(context: int, *spans: tuple[int, int], argmax: bool = False) -> Turn:
    """Random tokens. A span is (version, tokens)."""
    rng = np.random.default_rng([context, *(number for span in spans for number in span)])
    made, start = [], 0
    for version, count in spans:
        made.append(VersionSpan(version, start, start + count))
        start += count
    tokens = rng.integers(6, 100, start).astype(np.int32)
    logprobs = rng.normal(-1, 1, start).astype(np.float32)
    completion = Completion(tokens, logprobs, tuple(made), "stop", "", tokens.copy() if argmax else None)
    return Turn(rng.integers(6, 100, context).astype(np.int32), completion)


def rollout(*turns: Turn) -> Rollout:
    return Rollout(turns, 0.0, Outcome.OK)


def by_token(rollout: Rollout) -> list[list[bool]]:
    """For each turn, whether the nudged weights sampled its tokens."""
    return [
        [NUDGED[span.version] for span in turn.completion.spans for _ in range(span.start, span.end)]
        for turn in rollout.turns
    ]


@torch.no_grad()
def decoded(models: Models, rollout: Rollout) -> Tensor:
    """Logits [C, vocabulary] of the sampled tokens when each turn is a request with a KV cache of its own."""
    before: list[int] = []
    rows = []
    for turn, states in zip(rollout.turns, by_token(rollout), strict=True):
        before += turn.context.tolist()
        cache, new = DynamicCache(), list(before)
        for token, nudged in zip(turn.completion.tokens.tolist(), states, strict=True):
            rows.append(models[nudged](torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0, -1])
            new = [token]
        before += turn.completion.tokens.tolist()
    return torch.stack(rows)


@torch.no_grad()
def recomputed(models: Models, rollout: Rollout) -> Tensor:
    """Logits [C, vocabulary] of full forward passes, the row of each token from its version's."""
    tokens = torch.as_tensor(np.concatenate([part for t in rollout.turns for part in (t.context, t.completion.tokens)]))
    full = {nudged: model(tokens[None].long()).logits[0] for nudged, model in models.items()}
    rows, start = [], 0
    for turn, states in zip(rollout.turns, by_token(rollout), strict=True):
        start += len(turn.context)
        rows += [full[nudged][start + index - 1] for index, nudged in enumerate(states)]
        start += len(states)
    return torch.stack(rows)


def logprobs_of(logits: Tensor, rollout: Rollout, temperature: float) -> Tensor:
    tokens = torch.as_tensor(np.concatenate([turn.completion.tokens for turn in rollout.turns])).long()
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, tokens[:, None])[:, 0]


def assert_scores(scored: ScoredSequence, logits: Tensor, rollout: Rollout) -> None:
    assert tuple(scored.trainer) == TEMPERATURES
    for temperature, logprobs in scored.trainer.items():
        assert logprobs.dtype == np.float32
        expected = logprobs_of(logits, rollout, temperature)
        torch.testing.assert_close(torch.from_numpy(logprobs), expected, atol=1e-5, rtol=1e-5)
    completions = [turn.completion for turn in rollout.turns]
    np.testing.assert_array_equal(scored.engine, np.concatenate([c.logprobs for c in completions]))
    spans = [span for completion in completions for span in completion.spans]
    assert scored.versions.tolist() == [s.version for s in spans for _ in range(s.end - s.start)]


ROLLOUTS = {
    "of one version": rollout(turn(5, (0, 9))),
    "of the nudged one": rollout(turn(5, (1, 9))),
    "across an update": rollout(turn(4, (0, 6), (1, 8))),
    "back again": rollout(turn(4, (1, 6), (2, 8))),
    "one token before it": rollout(turn(3, (0, 1), (1, 7))),
    "one token after it": rollout(turn(3, (0, 7), (1, 1))),
    "prompt of one token": rollout(turn(1, (0, 3), (1, 3))),
    "across three": rollout(turn(4, (0, 5), (1, 1), (2, 4), (3, 5))),
    "across one that changed nothing": rollout(turn(4, (3, 5), (4, 6))),
    "two turns, an update between": rollout(turn(4, (0, 5)), turn(3, (1, 6))),
    "two turns, an update in each": rollout(turn(4, (0, 5), (1, 4)), turn(3, (1, 2), (2, 6))),
    "an update in the last of three": rollout(turn(4, (0, 5)), turn(2, (0, 3)), turn(3, (0, 4), (1, 6))),
    "a turn without a token": rollout(turn(4, (0, 5), (1, 2)), turn(2), turn(3, (1, 4))),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_kept_kv_is_replayed_as_an_engine_decodes(name: str, models: Models, tied_model: Path) -> None:
    policy = make_policy(tied_model)
    (scored,) = score_completions(policy, [ROLLOUTS[name]], request(), Weights(policy))
    assert_scores(scored, decoded(models, ROLLOUTS[name]), ROLLOUTS[name])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_recomputed_kv_is_a_full_pass_of_each_version(name: str, models: Models, tied_model: Path) -> None:
    policy = make_policy(tied_model)
    (scored,) = score_completions(policy, [ROLLOUTS[name]], request("recompute"), Weights(policy))
    assert_scores(scored, recomputed(models, ROLLOUTS[name]), ROLLOUTS[name])


def test_the_references_differ_where_they_should(models: Models) -> None:
    """By far more than the tolerance, so that neither kind of KV can pass for the other."""
    for name in ("across an update", "one token before it", "across three", "two turns, an update in each"):
        gap = decoded(models, ROLLOUTS[name]) - recomputed(models, ROLLOUTS[name])
        assert gap.abs().max() > 0.05, name
    for name in ("of one version", "two turns, an update between", "across one that changed nothing"):
        gap = decoded(models, ROLLOUTS[name]) - recomputed(models, ROLLOUTS[name])
        assert gap.abs().max() < 1e-4, name


@pytest.mark.parametrize("start", [False, True], ids=["own weights", "nudged weights"])
def test_many_are_scored_in_order_and_the_weights_stay(start: bool, models: Models, tied_model: Path) -> None:
    """40 straddling ones are more than are replayed at a time; rollouts without a token give no result."""
    policy = make_policy(tied_model, checkpointing=True)
    weights = Weights(policy)
    weights.use(start)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    mixed = [rollout(turn(3 + i % 5, (i % 3, 2 + i % 4), (i % 3 + 1, 1 + i % 7))) for i in range(40)]
    asked = [rollout(), mixed[0], rollout(turn(4)), *ROLLOUTS.values(), *mixed[1:]]
    scored = score_completions(policy, asked, request(), weights)
    expected = [one for one in asked if one.completion_len]
    for result, one in zip(scored, expected, strict=True):
        assert_scores(result, decoded(models, one), one)
    assert weights.nudged == start and policy.training and policy.hf.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_is_what_a_training_step_computes(dtype: str, tied_model: Path) -> None:
    """The forward pass that a step makes of the same sample, to the bit."""
    policy = make_policy(tied_model, dtype)
    one = rollout(turn(4, (0, 30)), turn(3, (0, 20)))
    row = collate([train_sample(one, 1.0)])
    positions = torch.from_numpy(row.loss_mask.nonzero()[0])
    policy.temperature = 0.7
    trained, _ = policy(
        torch.from_numpy(row.input_ids),
        torch.from_numpy(row.position_ids),
        runs_of_equal_length([len(row.input_ids)]),
        positions,
        torch.from_numpy(row.target_ids)[positions],
    )
    policy.temperature = 1.0
    (scored,) = score_completions(policy, [one], request(), Weights(policy))
    assert trained.requires_grad
    np.testing.assert_array_equal(scored.trainer[0.7], trained.detach().numpy())


def test_a_version_that_nobody_knows_the_weights_of_is_an_error(tied_model: Path) -> None:
    policy = make_policy(tied_model)
    with pytest.raises(KeyError):
        score_completions(policy, [rollout(turn(3, (9, 4)))], request(), Weights(policy))


def test_flips_are_where_the_most_likely_tokens_differ(models: Models, tied_model: Path) -> None:
    policy = make_policy(tied_model)
    with_argmax = rollout(turn(4, (0, 5), (1, 9), argmax=True), turn(2, (1, 4), argmax=True))
    partly = rollout(turn(4, (0, 5), argmax=True), turn(2, (1, 4)))
    scored = score_completions(policy, [with_argmax, partly], request(), Weights(policy))
    tokens = np.concatenate([turn.completion.tokens for turn in with_argmax.turns])  # `turn` calls them the most likely
    expected = decoded(models, with_argmax).argmax(-1).numpy() != tokens
    assert scored[0].flips is not None and scored[0].flips.tolist() == expected.tolist()
    assert scored[1].flips is None


def test_a_nudge_moves_logprobs_by_far_more_than_any_tolerance(tied_model: Path) -> None:
    policy = make_policy(tied_model)
    weights = Weights(policy)
    one = rollout(turn(4, (0, 200)))
    as_version_1 = ScoreRequest((1.0,), {0: True})
    own, nudged = (score_completions(policy, [one], r, weights)[0].trainer[1.0] for r in (request(), as_version_1))
    gap = np.abs(own - nudged)
    assert 1e-2 < gap.mean() < 1 and np.isfinite(nudged).all()


# --- the head ---------------------------------------------------------------------------------------------------------


def head_logprobs(policy: PolicyModel, one: Rollout, weight: Tensor) -> Tensor:
    """Of a one-turn rollout at temperature 1, from the policy's hidden states and a head by hand."""
    (only,) = one.turns
    tokens = [*only.context.tolist(), *only.completion.tokens.tolist()]
    final = torch.from_numpy(hidden_states(policy, tokens)[-1]).to(weight.dtype)
    return logprobs_of((final[len(only.context) - 1 : -1] @ weight.T).float(), one, 1.0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "an index"])
def test_the_head_can_be_that_of_the_checkpoint(tied: bool, sharded: bool, tmp_path: Path) -> None:
    """The model stores float32; the policy, like an engine, holds it rounded to bfloat16."""
    path = write_model(tmp_path, tied=tied)
    stored = load_file(path / "model.safetensors")
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if sharded:
        save_file({name: stored[name]}, path / "a.safetensors", metadata={"format": "pt"})
        rest = {key: value for key, value in stored.items() if key != name}
        save_file(rest, path / "b.safetensors", metadata={"format": "pt"})
        files = dict.fromkeys(rest, "b.safetensors") | {name: "a.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        (path / "model.safetensors").unlink()
    policy = make_policy(path, "bfloat16")
    one = rollout(turn(4, (0, 60)))
    (unrounded,) = score_completions(policy, [one], request(head="checkpoint"), Weights(policy))
    (served,) = score_completions(policy, [one], request(), Weights(policy))
    found = [torch.from_numpy(scored.trainer[1.0]) for scored in (unrounded, served)]
    expected = [head_logprobs(policy, one, weight) for weight in (stored[name], stored[name].bfloat16().float())]
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().mean() > 1e-3


def test_an_unrounded_head_is_nudged_like_the_rounded_one(tied_model: Path) -> None:
    """What rounding lost is added to the nudged weight: 2^-9 of it at most, and not another nudge."""
    policy = make_policy(tied_model, "bfloat16")
    one = rollout(turn(4, (1, 60)))
    scores = [
        score_completions(policy, [one], request(head=head), Weights(policy))[0].trainer[1.0]
        for head in ("checkpoint", "served")
    ]
    assert 1e-3 < np.abs(scores[0] - scores[1]).mean() < 3e-2


@pytest.mark.parametrize(("configured", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_head_can_be_multiplied_in_another_dtype(configured: str, asked: str, tied_model: Path) -> None:
    policy = make_policy(tied_model, "bfloat16")
    policy.head_dtype = getattr(torch, configured)
    one = rollout(turn(4, (0, 60)))
    weight = policy.hf.get_output_embeddings().weight.detach()
    for dtype, fields in ((configured, {}), (asked, {"head_dtype": asked})):
        (scored,) = score_completions(policy, [one], request(**fields), Weights(policy))
        expected = head_logprobs(policy, one, weight.to(getattr(torch, dtype)))
        torch.testing.assert_close(torch.from_numpy(scored.trainer[1.0]), expected, atol=1e-5, rtol=1e-5)
    assert (head_logprobs(policy, one, weight) - head_logprobs(policy, one, weight.float())).abs().mean() > 1e-3


def test_a_checkpoint_that_lost_nothing_by_rounding_is_said_to_show_nothing(tied_model: Path, tmp_path: Path) -> None:
    one = [rollout(turn(4, (0, 6)))]
    same = make_policy(tied_model)  # float32, served in float32
    with pytest.raises(EnvironmentProblem, match=r"in float32 and the engine serves it in float32: .* show nothing"):
        score_completions(same, one, request(head="checkpoint"), Weights(same))
    rounded = load_reference(tied_model, torch.bfloat16)
    rounded.save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        policy = make_policy(tmp_path, dtype)
        with pytest.raises(EnvironmentProblem, match=rf"in bfloat16 and the engine serves it in {dtype}"):
            score_completions(policy, one, request(head="checkpoint"), Weights(policy))


def test_a_checkpoint_that_cannot_be_read_is_named(tied_model: Path, tmp_path: Path) -> None:
    one = [rollout(turn(4, (0, 6)))]
    policy = make_policy(tied_model, "bfloat16")
    for path, problem in (
        (tmp_path / "gone", "is not a local directory"),
        (tmp_path, "cannot read model.embed_tokens"),
    ):
        policy.hf.name_or_path = str(path)
        with pytest.raises(EnvironmentProblem, match=f"model.path={path}:? {problem}"):
            score_completions(policy, one, request(head="checkpoint"), Weights(policy))
