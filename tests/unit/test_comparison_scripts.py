"""Scripts that compare runs: every variant is a legal configuration; figure and table show what was logged."""

import importlib
import sys
from pathlib import Path

import pytest

from pipelinerl.config.load import load_config
from pipelinerl.config.plan import parity_fixes
from pipelinerl.metrics.compare import Panel, compare, table
from pipelinerl.metrics.log import MetricsLog

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
SCRIPT = importlib.import_module("parity_ablation")
OBJECTIVES = importlib.import_module("objectives")


def fixes_off(name: str) -> list[int]:
    """Numbers of the fixes that a variant leaves out."""
    config = load_config(["experiment=parity_ablation", "algo=gspo", *SCRIPT.VARIANTS[name]])
    return [number for number, fix in enumerate(parity_fixes(config), start=1) if not fix.in_force]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_variant_without_one_fix_leaves_out_exactly_that_one(number: int) -> None:
    (name,) = (name for name in SCRIPT.SINGLE if name.startswith(f"without_{number}_"))
    assert fixes_off(name) == [number]


def test_the_main_variants_have_all_fixes_or_none() -> None:
    assert [fixes_off(name) for name in ("reference", "fixed_v1", "initial_v1")] == [[], [], [1, 2, 3, 4]]


def test_the_variants_of_the_quickstart_are_what_their_names_say() -> None:
    configs = {name: load_config(["experiment=quickstart", *set_]) for name, set_ in OBJECTIVES.VARIANTS.items()}
    kinds = {name: config.algo.kind for name, config in configs.items()}
    assert (kinds["gspo"], kinds["cispo"], kinds["decoupled_ppo"]) == ("gspo", "cispo", "ppo_clip")
    assert configs["decoupled_ppo"].algo.proximal == "recompute"
    assert configs["lora"].trainer.lora.rank > 0
    zero_3 = configs["zero_3_two_ranks"].trainer
    assert (zero_3.zero_stage, zero_3.ranks) == (3, 2)


PANELS = [Panel("reward/mean", "Reward", "mean"), Panel("policy/clip_rate", "Clip rate", "%", scale=100)]


def run_with(folder: Path, rewards: list[float], clip_rate: float) -> Path:
    log = MetricsLog(folder, [])
    for step, reward in enumerate(rewards, start=1):
        log.log("train", step, {"reward/mean": reward, "policy/clip_rate": clip_rate})
    log.close()
    return folder


def test_the_table_has_the_mean_of_the_last_steps_and_the_range_of_the_seeds(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "a", [0.0, 0.2, 0.4], 0.01), run_with(tmp_path / "b", [0.0, 0.6, 0.8], 0.03)]
    lines = table({"two": runs, "one": runs[:1]}, PANELS, last=2).splitlines()
    assert lines[0] == "| variant | seeds | Reward | Clip rate |"
    assert lines[2] == "| two | 2 | 0.5 (0.3 to 0.7) | 2 (1 to 3) |"
    assert lines[3] == "| one | 1 | 0.3 | 1 |"


def test_a_metric_that_a_variant_does_not_have_is_left_out(tmp_path: Path) -> None:
    runs = {"one": [run_with(tmp_path / "a", [0.1, 0.2, 0.3], 0.0)]}
    missing = [*PANELS, Panel("policy/ess", "ESS", "%")]
    assert table(runs, missing, last=2).splitlines()[2].endswith("| - |")
    compare(runs, missing, tmp_path / "figures" / "figure.png")
    assert (tmp_path / "figures" / "figure.png").stat().st_size > 10_000
