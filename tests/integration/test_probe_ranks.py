"""A probe between two optimizer steps, on DeepSpeed: it leaves no trace.

All cases run in one subprocess (see probe_ranks.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelinerl.batch.packing import rank_batches
from pipelinerl.types import Completion, Outcome, Rollout, RolloutGroup, SampleRef, ScoreRequest, Turn, VersionSpan
from tests.integration import probe_ranks
from tests.integration.models import load_reference, reference_logprobs, run_config
from tests.integration.probe_ranks import Case, RankRun
from tests.integration.ranks import results_of

# Straddlers and whole ones, at version 0 (own weights) and 1 (nudged)
SPANS = ([(0, 8)], [(0, 5), (1, 6)], [(1, 7)], [(1, 3), (0, 9)])
TEMPERATURE = 0.8
Runs = dict[tuple[str, bool], list[RankRun]]  # by case and whether there was a probe, as [rank]
REQUEST = ScoreRequest((TEMPERATURE, 1.0), {0: False, 1: True})
CASES = {
    "float32": ("float32", 1, 1),
    "bfloat16, 2 ranks, ZeRO 2": ("bfloat16", 2, 2),
    "float32, 2 ranks, ZeRO 3": ("float32", 2, 3),
}


def make_rollout(rng: np.random.Generator, spans: Sequence[tuple[int, int]]) -> Rollout:
    made, start = [], 0
    for version, count in spans:
        made.append(VersionSpan(version, start, start + count))
        start += count
    tokens = rng.integers(6, 100, start).astype(np.int32)
    completion = Completion(tokens, rng.normal(-4, 0.3, start).astype(np.float32), tuple(made), "stop", "")
    return Rollout((Turn(rng.integers(6, 100, 5).astype(np.int32), completion),), 1.0, Outcome.OK)


def make_group(seed: int, spans: Sequence[Sequence[tuple[int, int]]]) -> RolloutGroup:
    rng = np.random.default_rng(seed)
    return RolloutGroup(seed, f"train/{seed}", tuple(make_rollout(rng, rollout) for rollout in spans))


PROBED = make_group(0, SPANS)
TRAINED = [make_group(seed, [[(0, 9)], [(0, 4)], [(0, 17)]]) for seed in (1, 2)]


@pytest.fixture(scope="module")
def runs(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("probe")
    tokens = sum(rollout.completion_len for group in TRAINED for rollout in group.rollouts)
    refs = [
        SampleRef(g, k, 1.0 - k / 2, r.total_len, 1 / tokens)
        for g, group in enumerate(TRAINED)
        for k, r in enumerate(group.rollouts)
    ]
    cases = {}
    for name, (dtype, ranks, stage) in CASES.items():
        trainer = {"ranks": ranks, "zero_stage": stage, "lr": 1e-2, "warmup_steps": 0}
        config = run_config(tied_model, dtype, trainer=trainer, sampling={"temperature": TEMPERATURE})
        for probed in (False, True):
            batches = rank_batches(refs, ranks, 10_000)
            cases[f"{name} {probed}"] = Case(config, batches, TRAINED, PROBED, REQUEST if probed else None)
    results = results_of(probe_ranks, cases, folder)
    return {(name, probed): results[f"{name} {probed}"] for name in CASES for probed in (False, True)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_after_a_probe_is_the_step_without_one(case: str, runs: Runs) -> None:
    for with_probe, without in zip(runs[case, True], runs[case, False], strict=True):
        assert all(result.applied for result in [*with_probe.results, *without.results])
        for name, bits in without.weights["end"].items():
            assert np.array_equal(with_probe.weights["end"][name], bits), name
            assert not np.array_equal(without.weights["before"][name], bits), name  # the step did something
        probed, plain = (dict(run.results[1].metrics) for run in (with_probe, without))
        del probed["perf/train_s"], plain["perf/train_s"]
        assert probed == plain


@pytest.mark.parametrize("case", CASES)
def test_a_probe_changes_every_weight_on_every_rank_and_takes_it_back(case: str, runs: Runs) -> None:
    for run in runs[case, True]:
        before, nudged, scored, after = (
            run.weights[moment] for moment in ("before", "nudged", "nudged, after scoring", "after")
        )
        for name, bits in before.items():
            assert (nudged[name] != bits).all(), name
            assert (run.weights["end, nudged"][name] != run.weights["end"][name]).all(), name
            assert np.array_equal(scored[name], nudged[name]) and np.array_equal(after[name], bits), name


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_the_weights_held_when_asked(case: str, runs: Runs) -> None:
    own, nudged = (runs[case, True][0].scored[moment] for moment in ("own", "nudged"))
    assert len(own) == len(nudged) == len(SPANS)
    for a, b in zip(own, nudged, strict=True):
        for temperature in REQUEST.temperatures:
            np.testing.assert_array_equal(a.trainer[temperature], b.trainer[temperature])


@pytest.mark.parametrize("case", ["float32", "float32, 2 ranks, ZeRO 3"])
def test_scores_are_those_of_the_trained_weights(case: str, runs: Runs, tied_model: Path) -> None:
    """Of the first rollout, all of version 0, by transformers with the weights after the first step."""
    run = runs[case, True][0]
    model = load_reference(tied_model)
    trained = {name: torch.from_numpy(bits).view(torch.float32) for name, bits in run.weights["before"].items()}
    model.load_state_dict(trained, strict=False)
    (turn,) = PROBED.rollouts[0].turns
    tokens = [*turn.context.tolist(), *turn.completion.tokens.tolist()]
    with torch.no_grad():
        expected = reference_logprobs(model, tokens, TEMPERATURE)[len(turn.context) - 1 :]
    np.testing.assert_allclose(run.scored["own"][0].trainer[TEMPERATURE], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("case", ["float32", "float32, 2 ranks, ZeRO 3"])
def test_the_worker_gives_its_hidden_states(case: str, runs: Runs) -> None:
    run = runs[case, True][0]
    assert [part.shape for part in run.hidden_states] == [(3, 128)] * 4
    embedding = run.weights["before"]["model.embed_tokens.weight"].view(np.float32)
    np.testing.assert_array_equal(run.hidden_states[0], embedding[[7, 8, 9]])


def test_a_step_on_nudged_weights_is_refused(runs: Runs) -> None:
    for ranks in runs.values():
        assert all("take its nudge back" in run.refused for run in ranks)
