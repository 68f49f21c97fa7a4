"""What a tiny model is made from: its recipe, and for each task the preset that a recipe starts from.

The rest of a preset is in `conf/`: what the task is like in `conf/task`, where the model goes in `conf/model`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelinerl.config.preflight import TINY_MODELS
from pipelinerl.config.schema import SortTask
from pipelinerl.tiny.tokenizer import CHAT_TEMPLATE, SPECIALS
from pipelinerl.tiny.warm_start import WarmStart


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Qwen2. Head size 32 is the smallest that vLLM's CPU attention takes."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    context: int = 1024
    tied: bool = True  # the head is the embedding


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what the model becomes."""

    task: str
    digits: int
    seed: int
    warm_start: WarmStart
    architecture: Architecture = Architecture()
    system_prompt: str | None = None

    def sort_task(self) -> SortTask:
        """The task that the model is warm-started on."""
        scratchpad = self.task == "sort_scratchpad"
        return SortTask(digits=self.digits, scratchpad=scratchpad, system_prompt=self.system_prompt)

    def as_json(self) -> dict[str, Any]:
        """The recipe as it lies beside the model.

        Options that are not used are left out, so that having one more of them changes no recipe without it.
        """
        recipe = {
            "task": self.task,
            "digits": self.digits,
            "seed": self.seed,
            "target": self.warm_start.target,
            "temperature": self.warm_start.temperature,
            "architecture": asdict(self.architecture),
            "system_prompt": self.system_prompt,
            "warm_start": asdict(self.warm_start),
            "special_tokens": list(SPECIALS),
            "chat_template": CHAT_TEMPLATE,
        }
        return _without_unused(recipe)


@dataclass(frozen=True, slots=True)
class Preset:
    """What a task's model is unless the command line says otherwise."""

    architecture: Architecture
    warm_start: WarmStart


PRESETS = {
    "sort": Preset(Architecture(), WarmStart()),
    # Smaller, so that sampling its long completions takes longer than training on them.
    "sort_scratchpad": Preset(
        Architecture(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=256), WarmStart()
    ),
    # Logits as large as those of real models, so that rounding them costs as much as it does there.
    "sort_wide": Preset(Architecture(layers=2), WarmStart(batch_size=128, log_z=18.0)),
}
assert PRESETS.keys() == TINY_MODELS.keys()

UNUSED = {"tied": True, "system_prompt": None, "log_z": None}  # option -> its value when it is not used


def _without_unused(data: Mapping[str, Any]) -> dict[str, Any]:
    used = {key: value for key, value in data.items() if key not in UNUSED or value != UNUSED[key]}
    return {key: _without_unused(value) if isinstance(value, Mapping) else value for key, value in used.items()}
