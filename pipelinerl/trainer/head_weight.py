"""The weight of the head with which a probe scores: the served one, in another dtype, or the checkpoint's unrounded.

The engine multiplies the rounded weight that it stores. A trainer that kept the float32 weights of the checkpoint (or a
float32 master copy) would multiply others, and `head="checkpoint"` shows what that amounts to.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelinerl.errors import EnvironmentProblem, first_line
from pipelinerl.trainer.model import PolicyModel
from pipelinerl.trainer.sharding import gathered, is_sharded
from pipelinerl.types import ScoreRequest


class HeadWeight:
    """Follows the policy's weights as they are nudged and taken back."""

    def __init__(self, policy: PolicyModel, request: ScoreRequest):
        """Raises EnvironmentProblem when the checkpoint's head is asked for and is not to be had, or is the same."""
        assert request.head in ("served", "checkpoint"), request.head
        assert request.head == "served" or request.head_dtype is None, "the checkpoint's head is multiplied in float32"
        self._policy = policy
        self._dtype = None if request.head_dtype is None else getattr(torch, request.head_dtype)
        self._lost = _lost_by_rounding(policy) if request.head == "checkpoint" else None

    def get(self) -> Tensor | None:
        """The weight [vocabulary, H] in the dtype to multiply in; None for what the policy does by itself."""
        if self._lost is None and self._dtype is None:
            return None
        weight = self._policy.hf.get_output_embeddings().weight
        with gathered([weight]):
            served: Tensor = weight.detach()
            if self._lost is not None:
                return served.float() + self._lost
            return served.to(self._dtype, copy=is_sharded(weight))


def _lost_by_rounding(policy: PolicyModel) -> Tensor:
    """Stored minus served head weight [vocabulary, H], float32, of the checkpoint that the policy was loaded from.

    A difference, so that it can be added to nudged weights too: the nudge of a weight depends on its rounded bits.
    """
    path = Path(policy.hf.name_or_path)
    if not path.is_dir():
        raise EnvironmentProblem(f"model.path={path} is not a local directory, so its unrounded head cannot be read")
    served = policy.hf.get_output_embeddings().weight
    name = next(name for name, parameter in policy.hf.named_parameters() if parameter is served)
    stored = _read(path, name)
    lost = stored.float() - stored.to(served.dtype).float()
    if not lost.any():
        stored_as, served_as = (str(t.dtype).removeprefix("torch.") for t in (stored, served))
        raise EnvironmentProblem(
            f"model.path={path} stores {name} in {stored_as} and the engine serves it in {served_as}: rounding changes "
            "no value, so scoring with the checkpoint's head would show nothing"
        )
    return lost.to(served.device)


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors checkpoint."""
    index = path / "model.safetensors.index.json"
    try:
        file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
        with safe_open(path / file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise EnvironmentProblem(f"model.path={path}: cannot read {name}: {first_line(error)}") from error
    return tensor
