"""Parameters under ZeRO 3, where every rank holds a shard of each and a whole one exists only while it is gathered.

What the rest of the trainer needs to know of that is here. For parameters that are not sharded (ZeRO 0 to 2) all of it
is the plain thing: shapes are shapes, and gathering does nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from pipelinerl.weights import manifest


def is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed has cut this parameter up."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(parameter.ds_shape) if is_sharded(parameter) else tuple(parameter.shape)  # type: ignore[attr-defined]


def full_numel(parameter: Tensor) -> int:
    """The elements of the whole parameter."""
    return int(parameter.ds_numel) if is_sharded(parameter) else parameter.numel()  # type: ignore[attr-defined]


def manifest_entry(name: str, parameter: Tensor) -> manifest.Parameter:
    """What a manifest says of the whole parameter."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return manifest.Parameter(name, dtype, full_shape(parameter), full_numel(parameter) * parameter.element_size())


def held(parameter: Parameter) -> Tensor:
    """What this rank holds of the parameter for good: its shard (flat, with padding at the end), or all of it.

    A gathered copy does not follow changes of the shard: call `release` before.
    """
    shard: Tensor = parameter.ds_tensor if is_sharded(parameter) else parameter.detach()  # type: ignore[attr-defined]
    return shard


@contextmanager
def gathered(parameters: Iterable[Parameter | None]) -> Iterator[None]:
    """Inside, these parameters are whole on every rank; all ranks must ask for the same ones at the same time.

    Views taken inside do not outlive the context: copy what is needed longer.
    """
    sharded = [parameter for parameter in parameters if parameter is not None and is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def release(module: nn.Module) -> None:
    """Let go of gathered copies, also of the small ones that DeepSpeed keeps: it gathers them again when needed."""
    from_zero: Any
    for from_zero in module.parameters():
        if is_sharded(from_zero) and from_zero.ds_status.name == "AVAILABLE":
            from_zero.partition()


def shard(model: nn.Module, deepspeed_config: dict[str, Any]) -> None:
    """Cut up a model that is whole in host memory. Of its parameters, one at a time is whole on the device.

    The model comes as transformers loads it. Made under `deepspeed.zero.Init` instead, as transformers does when it
    knows of ZeRO 3, a bf16 model has its rotary table rounded to bf16 and is another model than the engine's; and that
    way reads the whole checkpoint into host memory as well.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ShardedLinear


class ShardedLinear(nn.Linear):
    """A linear layer whose graph does not keep the gathered weight alive from the forward to the backward pass.

    DeepSpeed would put its function for that in the place of torch's for the whole process (which
    `memory_efficient_linear=False` prevents). On inputs of three dimensions it rounds before it adds the bias: in bf16
    another layer than torch's and the engine's. On two dimensions it is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        flat = zero3_linear_wrap(x.flatten(0, -2), self.weight, self.bias)
        y: Tensor = flat.unflatten(0, x.shape[:-1])
        return y


def use_outside(user: nn.Module, parameters: Iterable[Parameter]) -> None:
    """Have DeepSpeed gather parameters of other modules whenever `user` runs, forward and backward."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(user, parameter)
