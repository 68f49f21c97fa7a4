"""The command line as a user meets it: its own process, its exit code, its text, its speed."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelinerl import cli
from pipelinerl.config.files import group_options
from pipelinerl.config.load import load_config
from pipelinerl.errors import BudgetSpent, ConfigError, PipelineRLError

HEAVY = ("torch", "transformers", "ray", "vllm", "deepspeed", "accelerate", "wandb")
PROBE = """
import sys
from pipelinerl.cli import main
code = main(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("LOADED", *loaded)
sys.exit(code)
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str
    seconds: float


def run(*arguments: str, cwd: Path | None = None) -> Ran:
    return _run([sys.executable, "-m", "pipelinerl", *arguments], cwd)


def _run(command: list[str], cwd: Path | None = None) -> Ran:
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)
    return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def test_a_wrong_key_ends_in_exit_2_quickly(tmp_path: Path) -> None:
    ran = run("train", "trainer.lrr=1", cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "pipelinerl: error: trainer.lrr = 1: unknown key; did you mean trainer.lr?\n"
    assert ran.seconds < 5  # 2 s on an idle machine, with room for a busy one
    assert list(tmp_path.iterdir()) == []


def test_several_problems_are_listed_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "steps=0", "seed=x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "pipelinerl: error: 2 problems",
        "  seed = 'x': should be a whole number",
        "  steps = 0: should be greater than 0",
    ]


def test_a_missing_tiny_model_ends_in_exit_3_with_the_command_that_makes_it(tmp_path: Path) -> None:
    ran = run("train", cwd=tmp_path)
    assert ran.code == 3
    assert ran.err.startswith("pipelinerl: error: model.path=models/tiny: no such directory")
    assert ran.err.endswith("run: pipelinerl make-tiny --task sort\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["train", "--help"], ["train", "--dry-run"], ["train", "x=1"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_run_starts(arguments: list[str]) -> None:
    ran = _run([sys.executable, "-c", PROBE, ",".join(HEAVY), *arguments])
    assert ran.out.splitlines()[-1] == "LOADED"


def test_help_imports_neither_hydra_nor_pydantic() -> None:
    ran = _run([sys.executable, "-c", PROBE, ",".join([*HEAVY, "hydra", "omegaconf", "pydantic", "numpy"]), "--help"])
    assert ran.out.splitlines()[-1] == "LOADED"
    assert ran.code == 0


def test_help_is_quick_and_lists_every_command() -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(f"\n  {name} " in ran.out for name in cli.COMMANDS)
    assert ran.seconds < 2  # 0.1 s on an idle machine


def test_train_help_lists_groups_options_and_defaults() -> None:
    ran = run("train", "--help")
    assert ran.code == 0
    for group, options in group_options().items():
        assert f"  {group:<16} {', '.join(options)}\n" in ran.out
    quickstart = load_config()
    assert f"trainer.lr={quickstart.trainer.lr} " in ran.out
    assert f"batch.group_size={quickstart.batch.group_size} " in ran.out


def test_dry_run_shows_the_plan_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=math_7b_8gpu", "batch.groups_per_step=10", "batch.group_size=16", "async.max_lag=8"]
    assert cli.main(["train", "--dry-run", *arguments]) == 0
    out = capsys.readouterr().out
    assert "160 = 10 groups x 16 completions" in out
    assert "8 step(s) = 1,280 samples" in out  # 8 * 160
    assert "  GPUs needed            8\n" in out
    assert out.count("in force") == 4
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = f"{sys.executable} -m pipelinerl train --help | true; exit ${{PIPESTATUS[0]}}"
    ran = _run(["bash", "-c", shell])
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["make_tiny"], "unknown command 'make_tiny'; did you mean make-tiny?"),
        (["qqq"], "unknown command 'qqq'; the commands are train, "),
        (["steps=3"], "'steps=3' is no command; did you mean: pipelinerl train steps=3?"),
        (["--versoin"], "unknown option '--versoin'; did you mean --version?"),
        (["train", "--dryrun"], "unknown option '--dryrun'; did you mean --dry-run?"),
    ],
)
def test_a_wrong_word_gets_the_nearest_right_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pipelinerl <command>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a = 1: unknown key"), 2, "pipelinerl: error: a = 1: unknown key\n"),
        (BudgetSpent("64 groups in a row were unusable"), 5, "pipelinerl: error: 64 groups in a row were unusable\n"),
        (PipelineRLError(""), 4, "pipelinerl: error: PipelineRLError\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("pipelinerl.commands.train.main", fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err.endswith(text)
