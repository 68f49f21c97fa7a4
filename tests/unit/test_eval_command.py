"""`pipelinerl eval` up to the start of its engines: which model it means, with which settings; and what it prints."""

import os
from pathlib import Path

import pytest
import yaml

from pipelinerl import cli
from pipelinerl.appraise import results, table
from pipelinerl.checkpoint.exported import exported_model
from pipelinerl.config.load import load_config
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError
from pipelinerl.types import Outcome
from tests.unit.configs import config_of
from tests.unit.test_evaluation import group


def model(path: Path, age_s: float) -> Path:
    """A model directory that was exported so many seconds ago."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    stamp = path.stat().st_mtime - age_s
    os.utime(path / "config.json", (stamp, stamp))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run of its own settings, with no model yet."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = load_config([f"run_dir={run_dir}", "task.digits=4", "eval.engine=dedicated", "name=mine"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    return run_dir


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that evaluations were asked for, none of which is started."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("pipelinerl.appraise.appraise", lambda config: configs.append(config) or 0)
    return configs


def test_the_newest_model_of_a_run_is_meant(run_dir: Path) -> None:
    older = model(run_dir / "exports" / "step_000010", 30)
    assert exported_model(run_dir).model == older
    final = model(run_dir / "model", 20)
    assert exported_model(run_dir).model == final
    beyond = model(run_dir / "exports" / "step_000020", 10)  # the run was resumed for more steps
    (run_dir / "exports" / "step_000030.partial").mkdir()
    assert exported_model(run_dir).model == beyond
    for one in (older, final):
        found = exported_model(one)
        assert (found.model, found.run_dir) == (one, run_dir)


def test_what_is_no_exported_model_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no exported model yet: .*checkpoint\.export_every"):
        exported_model(run_dir)
    with pytest.raises(ConfigError, match=r"no run directory: it has no config\.yaml"):
        exported_model(tmp_path)
    alone = model(tmp_path / "a" / "b" / "hub_model", 0)
    with pytest.raises(ConfigError, match=f"use model.path={alone}"):
        exported_model(alone)


def test_a_runs_model_is_evaluated_with_the_settings_of_the_run(run_dir: Path, evaluated: list[RunConfig]) -> None:
    path = model(run_dir / "model", 0)
    assert cli.main(["eval", f"--checkpoint={run_dir}", "eval.samples=4", "eval.temperature=0.7"]) == 0
    (config,) = evaluated
    assert config.model.path == str(path.resolve()) and config.task.digits == 4 and config.name == "mine"  # type: ignore[union-attr]
    assert (config.eval.samples, config.eval.engine, config.run_dir) == (4, "shared", None)


def test_a_model_is_evaluated_with_the_settings_of_the_command(tmp_path: Path, evaluated: list[RunConfig]) -> None:
    path = model(tmp_path / "some" / "model", 0)
    assert cli.main(["eval", f"model.path={path}", "task.digits=5"]) == 0
    assert evaluated[0].model.path == str(path) and evaluated[0].task.digits == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint"], "--checkpoint: name a run directory"),
        (["--checkpoint=nowhere"], "nowhere is no run directory"),
        (["--checkpoint=a", "model.path=b"], "model.path=b with --checkpoint=a: both name the model"),
        (["--checkpoint=a", "model=tiny"], "model=tiny with --checkpoint=a: both name the model"),
        (["--chekpoint=a"], "unknown option '--chekpoint'; did you mean --checkpoint?"),
        (["eval.sample=3"], "eval.sample = 3: unknown key; did you mean eval.samples?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], evaluated: list[RunConfig]
) -> None:
    assert cli.main(["eval", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"pipelinerl: error: {message}") and evaluated == []


OK, CUT, ERROR = Outcome.OK, Outcome.TRUNCATED, Outcome.ENV_ERROR
GROUPS = [
    group(0, [1, 1], [OK, CUT]),
    group(1, [1, 0]),
    group(2, [0, 9], [OK, ERROR]),
]
SETTINGS = ("eval.samples=2", "eval.temperature=0.7")


def test_the_table_says_what_was_measured_and_how_sure_it_is() -> None:
    lines = [" ".join(line.split()) for line in table(config_of(*SETTINGS), GROUPS).splitlines() if line]
    assert lines[0] == "3 problems, 2 completion(s) each, at temperature 0.7"
    assert lines[2].startswith("avg@2 0.500 ") and lines[2].endswith(" 3")
    assert lines[3].startswith("pass@1 0.500 ") and lines[4] == "pass@2 1.000 0.342 to 1.000 2"
    assert lines[5:] == ["truncated 20.0%", "tokens 2.5 a completion, 12 at most", "no reward 1 of 6 completions"]


def test_the_document_holds_settings_figures_and_counts() -> None:
    document = results(config_of(*SETTINGS), "sort", GROUPS, 1.5)
    assert document["sampling"] == {"samples": 2, "temperature": 0.7, "max_tokens": 12, "pass_reward": 1.0, "seed": 0}
    assert document["figures"]["pass@2"] == {
        "value": 1.0, "low": pytest.approx(0.3424, abs=1e-4), "high": 1.0, "problems": 2
    }  # fmt: skip
    assert document["outcomes"] == {"env_error": 1, "ok": 4, "truncated": 1}
    assert (document["problems"], document["errored"], document["truncated_frac"]) == (3, 1, 0.2)
    assert list(document["figures"]) == ["avg@2", "pass@1", "pass@2"]
