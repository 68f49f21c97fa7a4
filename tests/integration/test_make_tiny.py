"""`make-tiny` end to end: the command, what it writes, and what the model can do afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelinerl.config.schema import SortTask
from pipelinerl.errors import EXIT_CONFIG
from pipelinerl.tasks.registry import build_task
from pipelinerl.tiny.make import Architecture, Recipe, build_model, main, make

SMALL = Recipe(
    "sort", 3, 7, 0.3, 1.0, Architecture(hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=128)
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


def test_a_recipe_names_all_that_decides_the_model() -> None:
    assert replace(SMALL, digits=4).as_json() != SMALL.as_json()
    assert json.loads(json.dumps(SMALL.as_json())) == SMALL.as_json()


@pytest.mark.parametrize("flags", [["--digits", "1"], ["--target", "1.5"], ["--temperature", "0"], ["--task", "chess"]])
def test_a_wrong_flag_ends_with_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
