"""A double of a vLLM model that takes new weights while the model itself serves, and then exchanges them with it.

vLLM's layerwise reload makes a model unusable until it is finished. Here it runs on the double: a tree of the same
module classes, with parameters of their own that share no memory with the model's. Kernels that hold a packed copy of
a weight (all linear layers on CPU) make it for the double's module. `exchange` then gives the model the double's
tensors and kernels and takes microseconds: it copies nothing.

No kernel may run on the double before the exchange: those of vLLM's CPU build share scratch memory with the ones that
serve, and both would compute nonsense. Packing a weight is a plain copy in another order and runs beside them.

Only for models that run eagerly on CPU: a compiled or captured model holds on to addresses and kernels.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

from pipelinerl.errors import WeightSyncError

TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # of nn.Module
OF_THE_LOADING = ("load_weights", "_do_torchao_reload", "_original_do_torchao_reload")


class Twin:
    """The double of `live`. For one update: its content is undefined after `exchange`, or after a load that failed."""

    def __init__(self, live: nn.Module):
        self._of_module: dict[nn.Module, nn.Module] = {}
        self._of_tensor: dict[int, Tensor] = {}  # by id: what is shared in the model (a tied head) is so here
        self._before = {module: dict(vars(module)) for module in live.modules()}
        self.model: Any = self._double(live)
        for module, double in self._of_module.items():
            _give_metadata(module, double)

    @property
    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every module of the model with its double."""
        yield from self._of_module.items()

    def exchange(self) -> None:
        """The model computes with the double's weights from here on, the double holds the model's."""
        changes = [(module, double, _changed(before, double)) for (module, double), before in self._with_before()]
        seen: set[int] = set()
        for module, double, names in changes:
            for name in names:
                mine, its = vars(module).get(name), vars(double)[name]
                vars(module)[name], vars(double)[name] = its, mine
            for name, tensor in _tensors(module):
                other = dict(_tensors(double)).get(name)
                assert other is not None and other.shape == tensor.shape, f"{type(module).__name__}.{name}"
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensor.data, other.data = other.data, tensor.data

    def _with_before(self) -> Iterator[tuple[tuple[nn.Module, nn.Module], dict[str, Any]]]:
        for pair in self.pairs:
            yield pair, self._before[pair[0]]

    def _double(self, module: nn.Module) -> nn.Module:
        if module not in self._of_module:
            double = object.__new__(type(module))
            self._of_module[module] = double
            vars(double).update(vars(module))
            loadable = any(parameter is not None for parameter in module._parameters.values())
            vars(double).update(
                _parameters={name: self._fresh(t, module, double, True) for name, t in module._parameters.items()},
                _buffers={name: self._fresh(t, module, double, loadable) for name, t in module._buffers.items()},
                _modules={name: None if m is None else self._double(m) for name, m in module._modules.items()},
                _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
            )
        return self._of_module[module]

    def _fresh(self, tensor: Any, module: nn.Module, double: nn.Module, apart: bool) -> Any:
        """A tensor object of its own: with memory of its own and the same values in it, or, if not `apart`, a view."""
        if tensor is None:
            return None
        if id(tensor) not in self._of_tensor:
            data = tensor.detach()
            fresh = data.clone() if apart else data
            fresh.__class__ = tensor.__class__
            fresh.__dict__ = _bound(tensor.__dict__, module, double)
            self._of_tensor[id(tensor)] = fresh
        return self._of_tensor[id(tensor)]


def _give_metadata(module: nn.Module, double: nn.Module) -> None:
    """What vLLM recorded of the module's tensors in load format, for the double."""
    recorded = layerwise.get_layerwise_info(module).restore_metadata
    info = layerwise.get_layerwise_info(double)
    info.restore_device = layerwise.get_layerwise_info(module).restore_device
    copies = []
    for tensors in recorded:
        copied = {name: to_meta_tensor(tensor) for name, tensor in tensors.items()}
        for tensor in copied.values():
            tensor.__dict__ = _bound(tensor.__dict__, module, double)
        copies.append(copied)
    info.restore_metadata = (copies[0], copies[1])


def _bound(attributes: dict[str, Any], module: nn.Module, double: nn.Module) -> dict[str, Any]:
    """The attributes of a tensor (its weight loader) with methods of the module bound to the double."""
    from vllm.model_executor.model_loader.reload.sanitize import layer_ref_sentinel

    def bind(value: Any) -> Any:
        if isinstance(value, MethodType) and (value.__self__ is module or value.__self__ is layer_ref_sentinel):
            function: Callable[..., Any] = value.__func__
            return function.__get__(double)
        return value

    return {name: bind(value) for name, value in attributes.items()}


def _changed(before: dict[str, Any], double: nn.Module) -> list[str]:
    """Attributes that the loading has set: kernels and what belongs to them."""
    names = [
        name
        for name, value in vars(double).items()
        if name not in TREE + OF_THE_LOADING and (name not in before or value is not before[name])
    ]
    for name in names:
        if isinstance(vars(double)[name], nn.Module | nn.Parameter):
            raise WeightSyncError(f"{type(double).__name__}.{name}: loading replaced a part of the model")
    return names


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of modules that have parameters; other modules are never loaded."""
    if any(parameter is not None for parameter in module._parameters.values()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield name, tensor
