"""The cases of the ablation: legal configurations, one thing at a time, and a reason where one cannot show."""

from dataclasses import replace

import pytest

from pipelinerl.config.load import load_config
from pipelinerl.config.plan import parity_fixes
from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.ablation import CASES, Case, Setup, all_fixes, as_overrides, with_settings
from pipelinerl.types import ScoreRequest

CPU = load_config(["model.dtype=bfloat16", "cluster.device=cpu"])
SETUP = Setup(CPU, "cpu", prompt_tokens=60)
REQUEST = ScoreRequest((0.8, 1.0), {0: False, 1: True})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_that_is_not_blocked_is_a_legal_configuration_that_differs(case: Case) -> None:
    setup = replace(SETUP, device="cuda", config=with_settings(CPU, {"cluster.device": "cuda"}))
    here = SETUP if not case.blocked(SETUP) else setup
    changes = case.settings(here)
    if case.scoring is None:
        assert changes, "a case changes the engine or the scoring"
        assert with_settings(here.config, changes) != here.config
    elif not changes:
        assert case.scoring(REQUEST) != REQUEST


def test_names_are_unique_and_every_case_says_what_it_is_and_what_it_should_show() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.what and case.expect for case in CASES)


def test_all_fixes_puts_every_fix_in_force_and_leaves_the_rest_alone() -> None:
    off = load_config(
        [
            "engine.logprobs_mode=raw_logprobs",
            "engine.prefix_caching=true",
            "engine.update_pause=abort",
            "trainer.lr=0.5",
        ]
    )
    fixed = all_fixes(off)
    assert all(fix.in_force for fix in parity_fixes(fixed))
    assert fixed.trainer == off.trainer and fixed.sampling == off.sampling
    assert all_fixes(fixed) == fixed


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("raw_logprobs", {"sampling.temperature": 1.0}, "the same"),
        ("trainer_temperature", {"sampling.temperature": 1.0}, "the same"),
        ("bf16_head", {"model.dtype": "float32"}, "float32"),
        ("prefix_caching", {"engine.block_size": 64}, "60 tokens and fills no KV block of 64"),
        ("async_scheduling", {}, "CPU"),
        ("cuda_graphs", {}, "GPU"),
        ("attention_backend", {}, "GPU"),
        ("v1_model_runner", {}, "GPU"),
    ],
)
def test_a_case_that_cannot_show_here_says_why(name: str, config: dict[str, object], reason: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert reason in case.blocked(replace(SETUP, config=with_settings(CPU, config)))


def test_settings_are_shown_as_the_user_would_type_them() -> None:
    changes = {"engine.prefix_caching": True, "engine.block_size": 32}
    assert as_overrides(changes) == "engine.prefix_caching=true engine.block_size=32"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_salt"):
        with_settings(CPU, {"engine.cache_salt": "version"})
    assert isinstance(with_settings(CPU, {}), RunConfig)
