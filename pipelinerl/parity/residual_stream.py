"""Records the residual stream of a transformer while it runs, by hooks that fit models of transformers and of vLLM.

The places: after the embedding, after each block, after the final norm. The two libraries agree in one convention, a
`ModuleList` named `layers`, whose members take the stream as their first floating-point tensor. They return it whole,
or, in vLLM, as a pair (output of the MLP, stream so far) whose sum it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelinerl.errors import EnvironmentProblem


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks. Raises EnvironmentProblem for a model that has not exactly one `layers` list."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module)
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise EnvironmentProblem(
            f"{type(model).__name__} should have one list of blocks named `layers` and has {names}: "
            "its hidden states cannot be compared"
        )
    return found[0][1]


class ResidualStream:
    """Records every forward pass from construction to `take`. `model` returns what its final norm returned."""

    def __init__(self, model: nn.Module):
        blocks = find_blocks(model)
        self._parts: list[list[Tensor]] = [[] for _ in range(len(blocks) + 2)]
        first, *after_blocks, last = self._parts
        self._hooks = [
            blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: _note(first, _first_stream(args, kwargs)), with_kwargs=True
            ),
            model.register_forward_hook(lambda _, __, output: _note(last, _normed(output))),
        ]
        self._hooks += [_hook(block, parts) for block, parts in zip(blocks, after_blocks, strict=True)]

    def take(self) -> list[Tensor]:
        """Stop, and return [tokens, hidden] float32 on the CPU for each place; consecutive passes are joined."""
        for hook in self._hooks:
            hook.remove()
        return [torch.cat(parts) if parts else torch.empty(0, 0) for parts in self._parts]


def _hook(block: nn.Module, parts: list[Tensor]) -> RemovableHandle:
    return block.register_forward_hook(lambda _, __, output: _note(parts, _stream(output)))


def _note(parts: list[Tensor], stream: Tensor) -> None:
    # A copy, because vLLM's fused norms write into their inputs.
    parts.append(stream.detach().reshape(-1, stream.shape[-1]).to("cpu", torch.float32, copy=True))


def _first_stream(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())


def _stream(output: Any) -> Tensor:
    """The stream after a block."""
    if isinstance(output, Tensor):
        return output
    stream: Tensor = output[0]
    residual = output[1] if len(output) > 1 else None
    return stream + residual if isinstance(residual, Tensor) and residual.shape == stream.shape else stream


def _normed(output: Any) -> Tensor:
    """What a model returned, without what it may have returned beside it."""
    final: Tensor = output if isinstance(output, Tensor) else output[0]
    return final
