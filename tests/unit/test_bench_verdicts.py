"""Benchmarks that take long: their runs are legal configurations, and their verdicts are those of the figures."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.config.load import load_config
from pipelinerl.config.schema import LengthsTask, RunConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
BENCH: Any = importlib.import_module("overlap")
ROLLOUT: Any = importlib.import_module("rollout")


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"set": [], "rounds": 1, "min_overlap": 0.9, "min_gain": 1.5} | changes)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", list(BENCH.CASES))
def test_every_case_is_a_legal_run_of_given_lengths(name: str, mode: str) -> None:
    case = BENCH.CASES[name]
    config = load_config(BENCH.overrides(arguments(rounds=3), case, "models/tiny", Path("runs/a")))
    part = BENCH.part_of(config, mode, start=2 * case.steps, steps=case.steps)
    assert RunConfig.model_validate(part.dump()) == part
    assert part.async_.lag_bound == (case.max_lag if mode == "async" else 0)
    assert part.steps == config.steps / 2
    assert isinstance(config.task, LengthsTask)
    assert (config.task.median, config.task.sigma) == (case.median, case.sigma)
    assert config.cluster.pin_cores and case.steps > 2 * (case.max_lag + 2)  # some are measured
    assert case.prompt + 4 + config.sampling.max_tokens <= config.engine.max_model_len


def pair(generate: float, train: float, sync: float, both: float) -> Any:
    return BENCH.Pair(BENCH.Times(sync, generate, train, {}), BENCH.Times(both, 0.0, 0.0, {}))


def test_the_verdict_is_that_of_the_medians(capsys: pytest.CaptureFixture[str]) -> None:
    perfect, slow = pair(2.0, 1.0, 3.1, 2.1), pair(2.0, 1.0, 3.1, 2.6)
    assert perfect.overlap == pytest.approx(2.0 / 2.1) and perfect.gain == pytest.approx(3.1 / 2.1)
    assert BENCH.report(arguments(), {"engine": [slow, perfect, perfect]}) == 0
    assert BENCH.report(arguments(), {"engine": [slow, perfect, slow]}) == 1
    assert "missed: ['engine']" in capsys.readouterr().out
    assert BENCH.report(arguments(), {"lognormal": [perfect]}) == 1  # its gain is below 1.5
    assert BENCH.report(arguments(), {"lognormal": [pair(2.0, 1.0, 3.2, 2.1)]}) == 0


def rounds(seconds: list[float]) -> list[dict[str, float]]:
    return [{"tokens": 1000, "seconds": each, "cpu": each} for each in seconds]


def test_the_rollout_path_is_judged_by_the_median_ratio_of_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(
        model="m", dtype="float32", groups=2, group_size=8, max_num_seqs=4, rounds=3, min_ratio=0.9
    )
    bare = rounds([1.0, 2.0, 1.0])
    assert ROLLOUT.report(args, {"worker": rounds([1.1, 2.1, 5.0]), "bare": bare}) == 0  # 0.91, 0.95, 0.2
    assert ROLLOUT.report(args, {"worker": rounds([1.2, 2.1, 5.0]), "bare": bare}) == 1
    assert "worker / bare: 0.833" in capsys.readouterr().out
