"""What the optimizer of this rank holds of every parameter, whatever the ZeRO stage.

An optimizer works on fp32 masters and on moments of their size. Under ZeRO a rank has an interval of each flattened
parameter, at stage 0 it has all of it. A fragment is such an interval: DeepSpeed's own storage, not a copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelinerl.trainer.sharding import full_numel, full_shape, is_sharded, release

MASTER = "master"


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `[start, start + len(values))` of the flattened parameter `name`. `kind` is "master" or the name of a
    moment, such as "exp_avg"."""

    name: str
    shape: tuple[int, ...]  # of the parameter
    kind: str
    start: int
    values: Tensor  # flat, fp32


class OptimizerView:
    """`optimizer` is what DeepSpeed made of torch's, or torch's itself at stage 0 in fp32."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self._model = model
        self._optimizer = optimizer
        self._base: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._whole = _whole_masters(self._parameters.values(), optimizer)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds everything (stage 0), as all others then do."""
        return self._whole is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters that are trained."""
        return {name: full_shape(parameter) for name, parameter in self._parameters.items()}

    @property
    def expected_moments(self) -> list[str]:
        """The names of the moments that the optimizer keeps once it has made an update."""
        if isinstance(self._base, torch.optim.SGD):
            return ["momentum_buffer"] if self._base.defaults["momentum"] else []
        return ["exp_avg", "exp_avg_sq"]

    def moments(self) -> list[str]:
        """The names of the moments that exist by now: optimizers make them in their first update."""
        kinds = {
            kind
            for tensor in self._stepped_tensors()
            for kind, value in self._base.state.get(tensor, {}).items()
            if torch.is_tensor(value) and value.shape == tensor.shape and value.ndim
        }
        return sorted(kinds)

    def updates(self) -> int:
        """How many updates the optimizer has counted, for its bias correction; 0 when it does not count."""
        counts = [
            int(self._base.state[t]["step"]) for t in self._stepped_tensors() if "step" in self._base.state.get(t, {})
        ]
        return max(counts, default=0)

    def fragments(self, kinds: Sequence[str]) -> Iterator[Fragment]:
        """What this rank holds, parameter by parameter."""
        for name, parameter in self._parameters.items():
            for kind in kinds:
                found = self._held(parameter, kind)
                if found is not None:
                    start, values = found
                    values = values[: full_numel(parameter) - start]  # without padding
                    yield Fragment(name, full_shape(parameter), kind, start, values)

    def make_moments(self, kinds: Sequence[str], updates: int) -> None:
        """Moments of zero, as an optimizer that has made `updates` updates would hold them."""
        counts = not isinstance(self._base, torch.optim.SGD)
        on_device = self._base.defaults.get("fused") or self._base.defaults.get("capturable")
        for tensor in self._stepped_tensors():
            state: dict[str, Any] = {kind: torch.zeros_like(tensor.detach()) for kind in kinds}
            if counts:
                state["step"] = torch.tensor(float(updates), device=tensor.device if on_device else "cpu")
            self._base.state[tensor] = state

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Make the model's weights those of the masters, rounded to the model's dtype."""
        optimizer = self._optimizer
        if self._whole is not None:
            for parameter in self._parameters.values():
                parameter.copy_(self._whole[id(parameter)])
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        else:  # stage 3
            release(self._model)
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _held(self, parameter: Any, kind: str) -> tuple[int, Tensor] | None:
        """(start, values) of this rank's interval of the parameter; None when it has none."""
        if self._whole is not None:
            master = self._whole[id(parameter)]
            values = master if kind == MASTER else self._base.state.get(master, {}).get(kind)
            values = torch.zeros_like(master) if values is None else values  # a parameter that never had a gradient
            return 0, values.detach().view(-1)
        if is_sharded(parameter):
            key = None if kind == MASTER else kind
            shard, _ = self._optimizer._get_fp32_opt_state_partition(parameter, False, key)
            return shard.numel() * self._optimizer._get_param_partition_rank(parameter), shard.detach()
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat: Tensor = self._stepped_tensors()[mapping.param_group_index]
        source = flat if kind == MASTER else self._base.state[flat][kind]
        address = mapping.hp_fragment_address
        return mapping.lp_fragment_address.start, source.detach().narrow(0, address.start, address.numel)

    def _stepped_tensors(self) -> list[Tensor]:
        """The tensors that torch's optimizer steps on: flat shards under ZeRO."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        assert self._whole is not None
        return list(self._whole.values())


def _whole_masters(parameters: Any, optimizer: Any) -> Mapping[int, Tensor] | None:
    """id of a parameter -> its fp32 master; None where ZeRO shards them."""
    parameters = list(parameters)
    if any(is_sharded(p) or hasattr(p, "_hp_mapping") for p in parameters):
        return None
    if hasattr(optimizer, "fp32_groups"):  # bf16: masters beside the model
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(p): master for group in groups for p, master in zip(*group, strict=True)}
    return {id(parameter): parameter for parameter in parameters}
