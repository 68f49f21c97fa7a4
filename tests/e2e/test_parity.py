"""`pipelinerl parity`, and what training does about parity, with the real command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.metrics.log import read_metrics
from tests.e2e.harness import TrainCommand

CASE_KEYS = [
    *("name", "tokens", "mean_abs", "max_abs", "mean_signed", "k3", "ratio_mean", "token_mult_prob_error"),
    *("frac_out_0.5_2", "clip_rate", "argmax_flips", "ran", "reason", "detail"),
]


def finished(run_dir: Path, command: str, overrides: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself and leaves nothing running."""
    run = TrainCommand(run_dir, ["metrics.wandb.mode=disabled", *overrides], command)
    try:
        code = run.exit_code(480)
        assert run.leftovers() == []
        return code, run.output
    finally:
        run.close()


@pytest.fixture(scope="module")
def report(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """parity.json, run directory and output of a configuration without the first fix, with bisect and four cases."""
    run_dir = tmp_path_factory.mktemp("parity") / "run"
    options = [
        "--bisect",
        "--ablate=trainer_temperature,no_update,prefix_caching,async_scheduling",
        f"model.path={random_model}",
        "engine.logprobs_mode=raw_logprobs",
    ]
    code, output = finished(run_dir, "parity", options)
    assert code == 1, output
    return json.loads((run_dir / "parity.json").read_text()), run_dir, output


def test_the_report_has_its_schema_and_its_plots(report: tuple[dict[str, Any], Path, str]) -> None:
    document, run_dir, output = report
    assert list(document) == ["model", "settings", "cases", "verdict", "layer", "advice"]
    assert all(list(case) == CASE_KEYS for case in document["cases"])
    assert document["settings"]["engines"][0]["logprobs_mode"] == "raw_logprobs"
    assert (
        document["settings"]["engines"][0]["head_dtype"] == document["settings"]["trainer"]["head_dtype"] == "float32"
    )
    assert "verdict: FAIL, semantic" in output and "Traceback" not in output
    plots = {path.name for path in (run_dir / "plots").glob("*.png")}
    assert plots >= {"parity_differences.png", "parity_signed.png", "parity_layers.png"}


def test_the_verdict_names_layer_and_setting_and_the_gain_is_measured(report: tuple[dict[str, Any], Path, str]) -> None:
    document = report[0]
    assert (document["verdict"], document["layer"]) == ("fail", "semantic")
    assert document["advice"].startswith("engine.logprobs_mode=processed_logprobs: mean |Δ|")
    cases = {case["name"]: case for case in document["cases"]}
    fixed = cases["all_fixes"]
    assert fixed["mean_abs"] < 1e-5 and fixed["max_abs"] < 1e-4 and fixed["argmax_flips"] < 0.01
    assert fixed["tokens"] > 500 and set(fixed["detail"]["phases"]) == {"fresh", "straddling", "after"}
    assert fixed["detail"]["setting"] == "engine.logprobs_mode=processed_logprobs"
    assert cases["configured"]["mean_abs"] > 1000 * fixed["mean_abs"]


def test_each_case_shows_its_effect_or_says_why_it_cannot(report: tuple[dict[str, Any], Path, str]) -> None:
    cases = {case["name"]: case for case in report[0]["cases"]}
    reference = cases["all_fixes"]["mean_abs"]
    assert cases["trainer_temperature"]["mean_abs"] > 100 * reference
    assert cases["no_update"]["mean_abs"] > 100 * reference
    for name, reason in (("prefix_caching", "fills no KV block"), ("async_scheduling", "CPU")):
        assert not cases[name]["ran"] and reason in cases[name]["reason"] and cases[name]["mean_abs"] is None


def test_with_lr_0_weight_updates_change_nothing(random_model: Path, tmp_path: Path) -> None:
    """Twenty updates with the same weights: no drift of any mismatch, and the canary sees every byte unchanged. The
    evaluations, on an engine of their own, are equal."""
    options = [
        f"model.path={random_model}",
        "trainer.lr=0",
        "steps=20",
        "async.mode=sync",
        "weights.sync_mode=blocking",  # so that each step reports its own update
        "batch.groups_per_step=4",
        "eval.every=10",
        "eval.engine=dedicated",
        "metrics.plots=false",
    ]
    code, output = finished(tmp_path / "run", "train", options)
    assert code == 0 and "parity holds" in output, output
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 20
    for record in steps:
        assert record["mismatch/tokens"] == record["completion/tokens_sum"]
        assert record["mismatch/abs_logprob_mean"] < 1e-5 and record["mismatch/abs_logprob_max"] < 1e-4
        assert record["staleness/abs_log_ratio_lag_0"] == record["mismatch/abs_logprob_mean"]
        assert record["sync/canary_err"] == 0 and record["sync/params_changed"] == 0
        assert record["sync/params_read_back"] == 1
        assert record["policy/clip_rate"] == 0 and record["policy/kl_old_new"] < 1e-9
    first, last = ([r["mismatch/abs_logprob_mean"] for r in part] for part in (steps[:5], steps[-5:]))
    assert sum(last) < 1.5 * sum(first)
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [0, 10, 20]
    same = [name for name in evaluations[0] if name.startswith("eval/") and not name.endswith("/version")]
    assert same and all(record[name] == evaluations[0][name] for record in evaluations for name in same)
    assert evaluations[-1]["eval/sort/gain"] == 0
    assert not [record for record in records if "parity/alarm" in record]
    assert json.loads((tmp_path / "run" / "parity.json").read_text())["verdict"] == "pass"
