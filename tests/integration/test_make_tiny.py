"""`make-tiny` end to end: the command, what it writes, and what the model can do afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelinerl.config.load import load_config
from pipelinerl.config.schema import SortTask
from pipelinerl.errors import EXIT_CONFIG
from pipelinerl.tasks.registry import build_task
from pipelinerl.tiny.make import build_model, main, make
from pipelinerl.tiny.recipe import PRESETS, Architecture, Recipe
from pipelinerl.tiny.warm_start import WarmStart

ARCHITECTURE = Architecture(hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=128)
SMALL = Recipe("sort", 3, 7, WarmStart(target=0.3, temperature=1.0), ARCHITECTURE)
WIDE = Recipe(  # with every option there is
    task="sort_wide",
    digits=2,
    seed=7,
    warm_start=WarmStart(target=0.3, batch_size=32, log_z=18.0),
    architecture=replace(ARCHITECTURE, tied=False),
    system_prompt="Sort.",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "deep" / "tiny"
    make(out, SMALL)
    return out


def test_the_directory_loads_with_the_auto_classes_and_scores_between_target_and_perfect(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelinerl.tiny.evaluate import accuracy

    model = AutoModelForCausalLM.from_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    task = build_task(SortTask.model_validate({"digits": 3}), seed=0)
    solved = accuracy(model, tokenizer, task, task.problems("eval"), max_tokens=6, temperature=1.0)
    assert 0.2 < solved < 0.8  # stopped at 0.3; 256 held-out problems have a standard error of 0.03


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "wide"
    make(out, WIDE)
    return out


def test_a_wide_model_has_large_logits_and_solves_the_task_behind_its_system_prompt(wide: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelinerl.tiny.evaluate import accuracy, prompt_ids

    model = AutoModelForCausalLM.from_pretrained(wide)
    tokenizer = AutoTokenizer.from_pretrained(wide)
    task = build_task(WIDE.sort_task(), seed=0)
    problems = task.problems("eval")
    prompts = prompt_ids(tokenizer, task, problems)
    assert str(tokenizer.decode(prompts[0])).startswith("<|system|>Sort.<|im_end|><|user|>sort ")
    assert 0.2 < accuracy(model, tokenizer, task, problems, max_tokens=5, temperature=0.8) < 0.9
    with torch.no_grad():
        logits = model(torch.tensor(prompts), logits_to_keep=1).logits[:, 0]
    assert 15 < logits.logsumexp(dim=-1).mean().item() < 19  # drawn to 18; 5.4 when the scale is left free
    assert 15 < logits.max().item() < 20


def test_an_untied_model_is_saved_with_a_head_of_its_own(wide: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wide)
    saved = load_file(wide / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_what_is_saved_is_tied_float32_and_leaves_sampling_alone(made: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with safe_open(made / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    eos = AutoTokenizer.from_pretrained(made).eos_token_id
    assert model.config.eos_token_id == eos
    assert set(json.loads((made / "generation_config.json").read_text())) == {
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
    }
    assert GenerationConfig.from_pretrained(made).eos_token_id == eos


def test_the_same_recipe_is_not_made_twice_and_another_one_is_refused(tmp_path: Path, made: Path) -> None:
    from pipelinerl.errors import ConfigError

    out = tmp_path / "tiny"
    flags = ["--out", str(out), "--digits", "2", "--target", "0.01", "--temperature", "0.9"]
    assert main(flags) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert main(flags) == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert main([*flags, "--seed", "1"]) == EXIT_CONFIG
    assert main([*flags, "--seed", "1", "--force"]) == 0
    assert json.loads((out / "recipe.json").read_text())["seed"] == 1
    with pytest.raises(ConfigError, match="--force"):
        make(made, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # no staging directory is left


def test_a_seed_decides_the_weights() -> None:
    import torch

    from pipelinerl.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(SMALL.architecture.context)
    first, again, other = (build_model(SMALL.architecture, tokenizer, seed).state_dict() for seed in (3, 3, 4))
    name = "model.embed_tokens.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, digits=4),
        replace(SMALL, architecture=replace(ARCHITECTURE, tied=False)),
        replace(SMALL, system_prompt="Sort."),
        replace(SMALL, warm_start=replace(SMALL.warm_start, log_z=18.0)),
    ],
)
def test_a_recipe_names_all_that_decides_the_model(other: Recipe) -> None:
    assert other.as_json() != SMALL.as_json()
    assert json.loads(json.dumps(other.as_json())) == other.as_json()


def test_a_recipe_is_silent_about_options_it_does_not_use() -> None:
    """This is what lies beside every quickstart model: another word in it, and they would all be made again."""
    preset = PRESETS["sort"]
    recipe = Recipe("sort", 6, 0, preset.warm_start, preset.architecture).as_json()
    del recipe["special_tokens"], recipe["chat_template"]
    assert recipe == {
        "task": "sort",
        "digits": 6,
        "seed": 0,
        "target": 0.45,
        "temperature": 0.8,
        "architecture": {
            "hidden_size": 128,
            "layers": 4,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 384,
            "context": 1024,
        },
        "warm_start": {"target": 0.45, "temperature": 0.8, "lr": 2e-3, "batch_size": 256, "max_steps": 1000},
    }


@pytest.mark.parametrize("task", PRESETS)
def test_a_model_goes_where_the_configuration_looks_for_it(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = task.replace("sort", "tiny")
    path = Path(load_config([f"model={model}"]).model.path)
    path.mkdir(parents=True)
    assert main(["--task", task]) == EXIT_CONFIG
    assert f"{path} exists and was made with another recipe" in capsys.readouterr().err


def test_the_prompts_of_sort_wide_share_more_than_32_tokens_and_leave_room_for_an_answer() -> None:
    from pipelinerl.tiny.evaluate import prompt_ids
    from pipelinerl.tiny.tokenizer import build_tokenizer

    config = load_config(["task=sort_wide", "engine=cpu"])
    task = build_task(config.task, seed=0)
    prompts = prompt_ids(build_tokenizer(128), task, task.problems("train")[:50])
    shared = next(i for i, column in enumerate(zip(*prompts, strict=True)) if len(set(column)) > 1)
    assert shared == 50
    assert {len(prompt) for prompt in prompts} == {58}
    assert 58 + config.sampling.max_tokens <= config.engine.max_model_len


@pytest.mark.parametrize("flags", [["--digits", "1"], ["--target", "1.5"], ["--temperature", "0"], ["--task", "chess"]])
def test_a_wrong_flag_ends_with_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
