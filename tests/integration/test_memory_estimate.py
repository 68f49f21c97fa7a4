"""The formula for activations against what torch keeps for the backward pass of a real decoder."""

from pathlib import Path

import pytest
import torch

from pipelinerl.config.footprint import footprint
from pipelinerl.config.memory import layer_activations
from pipelinerl.config.schema import RunConfig
from pipelinerl.trainer.model import PolicyModel, load_policy
from tests.integration.models import run_config, write_model

TOKENS = 512


def kept_bytes(policy: PolicyModel) -> int:
    """Bytes of all storages that the forward pass of the body keeps, parameters not among them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.hidden(torch.arange(TOKENS) % 7, torch.arange(TOKENS), [(1, TOKENS)]).sum()
    return sum(storage.nbytes() for storage in kept.values())


def policy_of(config: RunConfig, checkpointing: bool) -> PolicyModel:
    return load_policy(config.model, 1.0, 256, checkpointing).train()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_the_formula_says(tmp_path: Path, dtype: str) -> None:
    config = run_config(write_model(tmp_path / "m", tied=True, hidden_size=256), dtype)
    size = footprint(config)
    assert size is not None and size.shape is not None
    shape, width = size.shape, {"float32": 4, "bfloat16": 2}[dtype]
    last_norm = TOKENS * shape.hidden * (4 + width)  # its input in fp32, and the normalised one
    layers = TOKENS * shape.layers * layer_activations(shape, width)
    assert kept_bytes(policy_of(config, checkpointing=False)) == pytest.approx(layers + last_norm, rel=0.02)
    inputs = TOKENS * shape.layers * width * shape.hidden
    assert kept_bytes(policy_of(config, checkpointing=True)) == pytest.approx(inputs + last_norm, rel=0.02)
