"""Trainer checkpoints on real DeepSpeed ranks: going on from one is bit for bit not having stopped, and the number of
ranks and the ZeRO stage are free to change. All cases run in one subprocess (see ranks.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelinerl.batch.packing import rank_batches
from pipelinerl.checkpoint.manifest import FileRecord, secured
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan
from tests.integration import checkpoint_ranks
from tests.integration.checkpoint_ranks import Case, RankRun, Weights
from tests.integration.models import run_config
from tests.integration.ranks import results_of

LR = {"lr": 0.01, "warmup_steps": 3, "schedule": "linear", "weight_decay": 0.1}  # 4 steps: every one has its own rate
STEPS = 6


@dataclass(frozen=True)
class Layout:
    """How a trainer is divided, and what it is."""

    zero_stage: int
    ranks: int
    dtype: str = "float32"
    optimizer: str = "adamw"
    offload: bool = False

    @property
    def name(self) -> str:
        return f"zero{self.zero_stage}x{self.ranks}-{self.dtype}-{self.optimizer}{'-offload' * self.offload}"


FP32 = [Layout(0, 2), Layout(1, 2), Layout(3, 2)]
BF16 = [Layout(0, 1, "bfloat16"), Layout(3, 2, "bfloat16")]
OTHERS = [Layout(1, 2, optimizer="sgd"), Layout(2, 2, offload=True)]
LAYOUTS = [*FP32, *BF16, *OTHERS]
MOVES = [  # a checkpoint of the first is loaded by the second
    (Layout(1, 2), Layout(0, 1)),
    (Layout(1, 2), Layout(3, 2)),
    (Layout(3, 2), Layout(2, 1)),
    (Layout(0, 2), Layout(1, 2)),
    (Layout(3, 2, "bfloat16"), Layout(0, 2, "bfloat16")),
]


def make_groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(5)

    def rollout() -> Rollout:
        context, sampled = rng.integers(6, 40, 5), rng.integers(6, 40, rng.integers(3, 20))
        logprobs = rng.normal(-3, 0.3, len(sampled)).astype(np.float32)
        span = VersionSpan(0, 0, len(sampled))
        completion = Completion(sampled.astype(np.int32), logprobs, (span,), "stop", "")
        return Rollout((Turn(context.astype(np.int32), completion),), 1.0, Outcome.OK)

    return [RolloutGroup(g, f"train/{g}", (rollout(), rollout(), rollout())) for g in range(2)]


def cut(groups: Sequence[RolloutGroup], ranks: int) -> list[RankBatch]:
    refs = [
        SampleRef(g, k, (1.0, -0.5, 0.25)[k] * (1 + g), rollout.total_len, 0.02)
        for g, group in enumerate(groups)
        for k, rollout in enumerate(group.rollouts)
    ]
    return rank_batches(refs, ranks, 1000)


def make_cases(model: Path, other_model: Path, folder: Path) -> dict[str, Case]:
    groups = make_groups()

    def case(layout: Layout, path: Path = model, **steps: Any) -> Case:
        trainer = LR | {"ranks": layout.ranks, "zero_stage": layout.zero_stage, "optimizer": layout.optimizer}
        config = run_config(
            path,
            layout.dtype,
            trainer=trainer | {"offload_optimizer": layout.offload, "max_grad_norm": 0.5},
            algo={"kind": "reinforce_is"},
        ).model_copy(update={"steps": STEPS})
        return Case(config, groups, **steps)

    def stretch(layout: Layout) -> list[list[RankBatch]]:
        return [cut(groups, layout.ranks)] * 2

    cases: dict[str, Case] = {}
    for layout in LAYOUTS:
        target = folder / layout.name
        target.mkdir()
        cases[layout.name] = case(layout, before=stretch(layout), save=target, after=stretch(layout))
        cases[f"{layout.name}-resumed"] = case(layout, load=target, after=stretch(layout))
    for source, target in MOVES:
        cases[move_name(source, target)] = case(target, load=folder / source.name)
    adamw = folder / Layout(1, 2).name
    cases["other_model"] = case(Layout(0, 1), other_model, load=adamw)
    cases["other_optimizer"] = case(Layout(0, 1, optimizer="sgd"), load=adamw)
    return cases


def move_name(source: Layout, target: Layout) -> str:
    return f"{source.name}--{target.name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(tied_model: Path, untied_model: Path, folder: Path) -> dict[str, list[RankRun]]:
    return results_of(checkpoint_ranks, make_cases(tied_model, untied_model, folder), folder)


def whole(ranks: Sequence[Weights]) -> Weights:
    """Full flat tensors, put together from the fragments of all ranks."""
    parts: dict[str, dict[int, Any]] = {}
    for rank in ranks:
        for place, values in rank.items():
            key, _, start = place.rpartition("@")
            parts.setdefault(key, {})[int(start)] = values
    for key, fragments in parts.items():
        ends = [start + len(fragments[start]) for start in sorted(fragments)]
        assert sorted(fragments) == [0, *ends[:-1]], key
    return {key: np.concatenate([fragments[start] for start in sorted(fragments)]) for key, fragments in parts.items()}


def assert_equal(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name].view(np.uint32), value.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_going_on_from_a_checkpoint_is_not_having_stopped(runs: dict[str, list[RankRun]], layout: Layout) -> None:
    uninterrupted, resumed = runs[layout.name], runs[f"{layout.name}-resumed"]
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after.version == 2
        assert_equal(after.saved, before.saved)
        assert_equal(after.state, before.state)
        assert_equal(after.weights, before.weights)
        assert after.lrs == before.lrs and len(set(after.lrs)) == 2
        assert after.random == before.random
    moments = {"sgd": ["momentum_buffer"]}.get(layout.optimizer, ["exp_avg", "exp_avg_sq"])
    saved, final = whole([run.saved for run in resumed]), whole([run.state for run in resumed])
    assert {key.split("/")[0] for key in saved} == {"master", *moments}
    assert all(not np.array_equal(final[key], value) for key, value in saved.items()), "the last two steps do something"


@pytest.mark.parametrize(("source", "target"), MOVES, ids=lambda layout: layout.name)
def test_ranks_and_zero_stage_may_change(runs: dict[str, list[RankRun]], source: Layout, target: Layout) -> None:
    loaded = runs[move_name(source, target)]
    expected = whole([run.saved for run in runs[source.name]])
    assert_equal(whole([run.state for run in loaded]), expected)
    for run in loaded:
        for name, weights in run.weights.items():  # of the model: the masters, rounded to its dtype
            master = expected[f"master/{name}"].reshape(weights.shape)
            np.testing.assert_array_equal(weights, rounded(master, target.dtype), err_msg=name)


def rounded(values: Any, dtype: str) -> Any:
    import torch

    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


def test_random_state_is_kept_per_rank_when_there_are_as_many(runs: dict[str, list[RankRun]]) -> None:
    first, second = runs[Layout(1, 2).name]
    assert first.random != second.random
    moved = runs[move_name(Layout(1, 2), Layout(3, 2))]
    assert [run.random for run in moved] == [first.random, second.random]


def test_what_is_on_disk_is_what_the_ranks_say(runs: dict[str, list[RankRun]], folder: Path) -> None:
    for layout in (Layout(0, 2), Layout(3, 2)):
        files: dict[str, FileRecord] = {}
        for rank, run in enumerate(runs[layout.name]):
            assert set(run.files) == {f"trainer-{rank}.json", f"trainer-{rank}.safetensors"}
            files |= run.files
        assert files == {name: secured(folder / layout.name / name) for name in files}
        sizes = [files[f"trainer-{rank}.safetensors"].bytes for rank in range(2)]
        assert max(sizes) < 1.3 * min(sizes), "the ranks share the writing"


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(runs: dict[str, list[RankRun]]) -> None:
    [other_model], [other_optimizer] = runs["other_model"], runs["other_optimizer"]
    assert "ConfigError" in other_model.error and "lm_head.weight" in other_model.error
    assert "model.path" in other_model.error
    assert "ConfigError" in other_optimizer.error and "trainer.optimizer" in other_optimizer.error
