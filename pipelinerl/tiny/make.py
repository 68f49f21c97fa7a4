"""`pipelinerl make-tiny`: a small language model with everything a big one has, made from a seed.

The directory is an ordinary HF checkpoint (config, safetensors, tokenizer, chat template) that transformers and vLLM
load like any other. `recipe.json` in it records how it was made: the same recipe is not cooked twice.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelinerl.config.load import load_config
from pipelinerl.config.preflight import TINY_MODELS
from pipelinerl.config.schema import SortTask
from pipelinerl.errors import EXIT_DONE, ConfigError, PipelineRLError
from pipelinerl.tiny.recipe import PRESETS, Architecture, Recipe

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

    from pipelinerl.tiny.warm_start import Progress

RECIPE_FILE = "recipe.json"


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    args = _parse(argv)
    try:
        recipe, out = _plan(args)
        if _already_made(out, recipe) and not args.force:
            print(f"{out} is there already and was made with this recipe")
            return EXIT_DONE
        make(out, recipe, force=args.force)
    except PipelineRLError as error:
        print(f"make-tiny: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def make(out: Path, recipe: Recipe, force: bool = False) -> None:
    """Build, warm-start and save the model; `out` appears complete or not at all.

    Raises ConfigError when `out` exists and `force` is not set.
    """
    if out.exists() and not force:
        raise ConfigError(f"{out} exists and was made with another recipe; pass --force to replace it, or --out DIR")
    import torch

    from pipelinerl.tasks.registry import build_task
    from pipelinerl.tiny.tokenizer import build_tokenizer
    from pipelinerl.tiny.warm_start import warm_start

    # The model is too small for more threads, and with one the result is the same on a busy machine.
    torch.set_num_threads(1)
    started = time.monotonic()
    task = build_task(recipe.sort_task(), recipe.seed)
    tokenizer = build_tokenizer(recipe.architecture.context)
    model = build_model(recipe.architecture, tokenizer, recipe.seed)
    print(f"warm-starting {model.num_parameters():,} parameters on {recipe.task}, {recipe.digits} digits", flush=True)
    last = warm_start(model, tokenizer, task, recipe.warm_start, recipe.seed, _print_progress)
    _save(out, model, tokenizer, recipe.as_json())
    print(
        f"wrote {out} in {time.monotonic() - started:.0f} s: solves {last.sampled:.0%} "
        f"sampled at temperature {recipe.warm_start.temperature:g}, {last.greedy:.0%} greedy"
    )


def build_model(architecture: Architecture, tokenizer: "Qwen2Tokenizer", seed: int) -> "Qwen2ForCausalLM":
    """An untrained float32 model for this tokenizer, its weights drawn from `seed`."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        max_position_embeddings=architecture.context,
        tie_word_embeddings=architecture.tied,
        dtype="float32",
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)  # neutral: it must not change how engines sample
    return model


def _plan(args: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe, and the directory for the model: the preset with what the command line says otherwise."""
    preset = PRESETS[args.task]
    config = load_config([f"task={args.task}", f"model={TINY_MODELS[args.task]}"])
    assert isinstance(config.task, SortTask)
    recipe = Recipe(
        task=args.task,
        digits=args.digits or config.task.digits,
        seed=args.seed,
        warm_start=replace(preset.warm_start, target=args.target, temperature=args.temperature),
        architecture=replace(preset.architecture, tied=not args.untied),
        system_prompt=config.task.system_prompt,
    )
    return recipe, Path(args.out or config.model.path)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "pipelinerl make-tiny", description="Make a small model: the one of the quickstart, or of another task."
    )
    parser.add_argument("--out", help="directory to write (default: that of the task's model in conf/model)")
    parser.add_argument("--task", choices=sorted(PRESETS), default="sort")
    parser.add_argument("--digits", type=int, help="length of the numbers to sort (default: as in conf/task)")
    parser.add_argument("--untied", action="store_true", help="a head of its own, instead of the embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.45, help="sampled accuracy to stop at (default: 0.45)")
    parser.add_argument("--temperature", type=float, default=0.8, help="at which accuracy is sampled (default: 0.8)")
    parser.add_argument("--force", action="store_true", help="replace the directory")
    args = parser.parse_args(argv)
    if args.digits is not None and not 2 <= args.digits <= 16:
        parser.error(f"--digits {args.digits} is not between 2 and 16")
    if not 0 < args.target < 1:
        parser.error(f"--target {args.target} is not between 0 and 1")
    if not 0 < args.temperature <= 2:
        parser.error(f"--temperature {args.temperature} is not between 0 and 2")
    return args


def _already_made(out: Path, recipe: Recipe) -> bool:
    try:
        made = json.loads((out / RECIPE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(made == recipe.as_json())


def _print_progress(progress: "Progress") -> None:
    accuracies = f"sampled {progress.sampled:.3f}  greedy {progress.greedy:.3f}"
    print(f"step {progress.step:4d}  loss {progress.loss:.3f}  {accuracies}", flush=True)


def _save(out: Path, model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", recipe: Mapping[str, Any]) -> None:
    """Write beside `out`, then rename: a reader never sees half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _save_model(staging, model)
        tokenizer.save_pretrained(staging)
        (staging / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
        staging.chmod(0o755)  # mkdtemp made it private
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_model(folder: Path, model: "Qwen2ForCausalLM") -> None:
    """What `model.save_pretrained` writes, without its import of DeepSpeed (seconds, and a warning)."""
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
