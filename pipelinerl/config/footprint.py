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
class Shape:
    """A decoder as its config.json describes it."""

    layers: int
    hidden: int
    mlp: int  # inner width, of one expert where there are several
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, except `parameters`. What is computed with them comes on top; see memory.py."""

    parameters: int
    shape: Shape | None  # None: config.json does not describe a plain decoder
    engine_weights: int  # one copy, over the workers of one engine
    kv_per_token: int | None  # over the workers of one engine; None as for `shape`
    trainer_weights: int  # per rank
    trainer_gradients: int  # per rank
    trainer_optimizer: int  # per rank
    reference: int  # per rank, the frozen copy of a KL term; 0 without one
    trained: int  # parameters with a gradient, over all ranks

    @property
    def trainer_total(self) -> int:
        """Per rank, wherever it is kept."""
        return self.trainer_weights + self.trainer_gradients + self.trainer_optimizer + self.reference


def footprint(config: RunConfig) -> Footprint | None:
    """The footprint of `model.path`, or None when that is not a local directory with weights.

    Raises: EnvironmentProblem for a damaged config.json or safetensors file.
    """
    directory = Path(config.model.path)
    shapes = _tensors(directory)
    if shapes is None:
        return None
    parameters = sum(map(math.prod, shapes.values()))
    adapters = _adapters(shapes, config.trainer.lora)
    trained = adapters or parameters
    weights, gradients, optimizer = _trainer_bytes(config.model.dtype, config.trainer)
    shape = _shape(read_json(directory / "config.json"))
    width = BYTES[config.model.dtype]
    return Footprint(
        parameters=parameters,
        shape=shape,
        engine_weights=parameters * width,
        kv_per_token=None if shape is None else 2 * shape.layers * shape.kv_heads * shape.head_dim * width,
        trainer_weights=round((parameters + adapters) * weights),
        trainer_gradients=round(trained * gradients),
        trainer_optimizer=round(trained * optimizer),
        reference=_reference(config, parameters) * width,
        trained=trained,
    )


def _tensors(directory: Path) -> dict[str, list[int]] | None:
    """Shapes of all tensors of a model directory; None when it is not one."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files or not (directory / "config.json").is_file():
        return None
    return {name: shape for file in files for name, shape in _shapes(file).items()}


def _reference(config: RunConfig, parameters: int) -> int:
    """Parameters of the reference policy, which every rank holds whole; that of a model not here counts as ours."""
    kl = config.algo.kl
    if not kl.on:
        return 0
    shapes = None if kl.reference is None else _tensors(Path(kl.reference))
    return parameters if shapes is None else sum(map(math.prod, shapes.values()))


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

    Gradients are accumulated in fp32. The optimizer holds an fp32 copy of the weights, but for stage 0 in fp32, which
    has the weights themselves, and two moments (Adam) or one (SGD with momentum). The ranks divide the optimizer from
    stage 1 on, the gradients from 2 on, the weights from 3 on.
    """
    stage, ranks = config.zero_stage, config.ranks
    copy = 0.0 if stage == 0 and dtype == "float32" else 4.0
    moments = 8.0 if config.optimizer != "sgd" else 4.0 if config.betas[0] else 0.0
    weights, gradients, optimizer = float(BYTES[dtype]), 4.0, copy + moments
    shares = [ranks if stage >= first else 1 for first in (3, 2, 1)]
    return weights / shares[0], gradients / shares[1], optimizer / shares[2]


def _shape(model: dict[str, Any]) -> Shape | None:
    """None when a number is missing that a plain decoder has."""
    try:
        heads, hidden = model["num_attention_heads"], model["hidden_size"]
        return Shape(
            layers=model["num_hidden_layers"],
            hidden=hidden,
            mlp=model["intermediate_size"],
            heads=heads,
            kv_heads=model.get("num_key_value_heads") or heads,
            head_dim=model.get("head_dim") or hidden // heads,
            vocabulary=model["vocab_size"],
        )
    except KeyError:
        return None


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


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises EnvironmentProblem that names the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise EnvironmentProblem(f"{file}: should hold a JSON object")
    return data
