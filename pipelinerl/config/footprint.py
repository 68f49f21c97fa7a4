"""What a model weighs, read from its directory without loading it.

Parameters are counted from the headers of the safetensors files, so the number is exact for any architecture;
a tied head is stored, and counted, once.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelinerl.config.schema import Dtype, RunConfig
from pipelinerl.errors import EnvironmentProblem

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, except `parameters`. Activations, logits and framework overhead come on top."""

    parameters: int
    engine_weights: int  # one copy, over the GPUs of one engine
    kv_per_token: int | None  # None: config.json does not describe plain attention
    trainer_weights: int  # per rank
    trainer_gradients: int  # per rank
    trainer_optimizer: int  # per rank

    @property
    def trainer_total(self) -> int:
        """Per rank."""
        return self.trainer_weights + self.trainer_gradients + self.trainer_optimizer


def footprint(config: RunConfig) -> Footprint | None:
    """The footprint of `model.path`, or None when that is not a local directory with weights.

    Raises: EnvironmentProblem for a damaged config.json or safetensors file.
    """
    directory = Path(config.model.path)
    files = sorted(directory.glob("model*.safetensors"))
    if not files or not (directory / "config.json").is_file():
        return None
    parameters = sum(_parameters(file) for file in files)
    weights, gradients, optimizer = _trainer_bytes(config.model.dtype, config.trainer.zero_stage, config.trainer.ranks)
    return Footprint(
        parameters=parameters,
        engine_weights=parameters * BYTES[config.model.dtype],
        kv_per_token=_kv_per_token(_json(directory / "config.json"), config.model.dtype),
        trainer_weights=round(parameters * weights),
        trainer_gradients=round(parameters * gradients),
        trainer_optimizer=round(parameters * optimizer),
    )


def _trainer_bytes(dtype: Dtype, stage: int, ranks: int) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer on one rank (ZeRO, 1910.02054).

    Gradients are accumulated in fp32. The optimizer holds an fp32 copy of the weights and Adam's two moments,
    divided by the ranks; from stage 2 on the gradients are divided too.
    """
    return float(BYTES[dtype]), 4.0 / (ranks if stage >= 2 else 1), 12.0 / ranks


def _kv_per_token(model: dict[str, Any], dtype: Dtype) -> int | None:
    """Keys and values of one token over all layers."""
    try:
        heads = model["num_attention_heads"]
        head_dim = model.get("head_dim") or model["hidden_size"] // heads
        layers = model["num_hidden_layers"]
    except KeyError:
        return None
    return int(2 * layers * model.get("num_key_value_heads", heads) * head_dim * BYTES[dtype])


def _parameters(file: Path) -> int:
    """Values in a safetensors file: 8 bytes give the length of a JSON header with every tensor's shape."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(f"{file}: not a readable safetensors file ({error})") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise EnvironmentProblem(f"{file}: should hold a JSON object")
    return data
