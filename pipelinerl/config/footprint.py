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

from pipelinerl.config.schema import Dtype, LoraConfig, RunConfig, TrainerConfig
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
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    parameters = sum(map(math.prod, shapes.values()))
    adapters = _adapters(shapes, config.trainer.lora)
    trained = adapters or parameters
    weights, gradients, optimizer = _trainer_bytes(config.model.dtype, config.trainer)
    return Footprint(
        parameters=parameters,
        engine_weights=parameters * BYTES[config.model.dtype],
        kv_per_token=_kv_per_token(_json(directory / "config.json"), config.model.dtype),
        trainer_weights=round((parameters + adapters) * weights),
        trainer_gradients=round(trained * gradients),
        trainer_optimizer=round(trained * optimizer),
    )


def _adapters(shapes: dict[str, list[int]], config: LoraConfig) -> int:
    """Values in the low-rank adapters: matrices of rank x inputs and outputs x rank beside every adapted weight."""
    names = () if "all-linear" in config.targets else tuple(f"{target}.weight" for target in config.targets)
    adapted = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and (name.endswith(names) if names else not ("embed" in name or "head" in name))
    ]
    return config.rank * sum(map(sum, adapted))


def _trainer_bytes(dtype: Dtype, config: TrainerConfig) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer on one rank (ZeRO, 1910.02054).

    Gradients are accumulated in fp32. The optimizer holds an fp32 copy of the weights and Adam's two moments. The ranks
    divide the optimizer from stage 1 on, the gradients from 2 on, the weights from 3 on.
    """
    stage, ranks = config.zero_stage, config.ranks
    weights, gradients, optimizer = float(BYTES[dtype]), 4.0, 12.0
    shares = [ranks if stage >= first else 1 for first in (3, 2, 1)]
    return weights / shares[0], gradients / shares[1], optimizer / shares[2]


def _kv_per_token(model: dict[str, Any], dtype: Dtype) -> int | None:
    """Keys and values of one token over all layers."""
    try:
        heads = model["num_attention_heads"]
        head_dim = model.get("head_dim") or model["hidden_size"] // heads
        layers = model["num_hidden_layers"]
    except KeyError:
        return None
    return int(2 * layers * model.get("num_key_value_heads", heads) * head_dim * BYTES[dtype])


def _shapes(file: Path) -> dict[str, list[int]]:
    """The tensors of a safetensors file: 8 bytes give the length of a JSON header with their shapes."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        return {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
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
