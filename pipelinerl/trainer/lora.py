"""Low-rank adapters (LoRA, 2106.09685) through peft, computed with as the weights that the engines get.

An adapter adds `alpha / rank * B A` to the weight W of a linear layer. The engines know no adapters: they get the sum,
rounded to the model's dtype. So the trainer multiplies with that rounded sum too, bit for bit:

    y = merged x + b,    merged = round(W + s B A),    the sum in fp32

The gradient takes the rounding for the identity, and no [O, I] gradient is ever made: dB = s dy (A x)^T and
dA = s (B^T dy) x^T, as in peft. peft's own forward pass multiplies W and the adapter one after the other. In bf16 that
is another function than the engine's: on models/tiny the two are 5.2e-3 nats per token apart, as much as bf16 itself is
off (4.9e-3 from the same weights in fp32). Here they are 0 apart. In fp32 it makes no difference (6.5e-7), and making
the sum costs no more than the second product does (2048 tokens, O = I = 2048, r = 16, on a CPU).

Only adapters are trained: base, embeddings, norms, biases and head stay frozen. Adapters have the model's dtype; where
that is bf16, DeepSpeed keeps fp32 masters of them, so that no step is too small to count.

N = tokens, I = inputs, O = outputs of a layer, r = rank, s = alpha / rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelinerl.config.schema import LoraConfig
from pipelinerl.errors import ConfigError, first_line
from pipelinerl.trainer.sharding import gathered, is_sharded, manifest_entry
from pipelinerl.weights.manifest import Manifest, Parameter
from pipelinerl.weights.source import Bucket

ADAPTER = "default"
ALL_LINEAR = "all-linear"


class MergedLinear(Linear):
    """A linear layer of peft's whose forward pass uses the merged weight. The parameters are peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] -> [..., O]."""
        base: Any = self.get_base_layer()
        y: Tensor = _Apply.apply(x, base.weight, base.bias, *self._factors())
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight [O, I] that the layer multiplies with: a new tensor in the dtype of the base."""
        base: Any = self.get_base_layer()
        return _merge(base.weight, *self._factors())

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        layers: Any = self
        return layers.lora_A[ADAPTER].weight, layers.lora_B[ADAPTER].weight, layers.scaling[ADAPTER]


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


class _Apply(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None, a [r, I], b [O, r] -> [..., O]; gradients of x, a and b.

    The merged weight is made anew in the backward pass: kept, it would be a second model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, _merge(weight, a, b, scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dy = gradients[0]
        dx = dy @ _merge(weight, a, b, ctx.scale) if ctx.needs_input_grad[0] else None
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        da = ctx.scale * (dy @ b).T @ x
        db = ctx.scale * dy.T @ (x @ a.T)
        return dx, None, None, da, db, None


def add_adapters(hf: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put adapters into the model, in place, and freeze everything else. B is zero, so they change nothing yet.

    A depends on the seed and the model alone: it is the same on all ranks. The model may be sharded.

    Raises ConfigError when a target names no linear layer of the model, or one that has to stay as it is.
    """
    targets: Any = ALL_LINEAR if config.targets == [ALL_LINEAR] else config.targets
    alpha: Any = config.alpha  # peft says int, and takes any number
    peft = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)
    peft._register_custom_module({nn.Linear: MergedLinear})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(peft, hf, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"trainer.lora.targets={config.targets}: {first_line(error)}") from error
    adapted = {name: module for name, module in hf.named_modules() if isinstance(module, LoraLayer)}
    _check_targets(config, adapted, hf.get_output_embeddings())
    for layer in _layers(hf):
        dtype = layer.get_base_layer().weight.dtype
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
        for parameter in layer.parameters():  # which it reads by itself: ZeRO 3 has to gather them for it
            deepspeed.zero.register_external_parameter(layer, parameter)


def _check_targets(config: LoraConfig, adapted: dict[str, Any], head: nn.Module) -> None:
    """Every target names something, and linear layers below the head only."""
    key = f"trainer.lora.targets={config.targets}"
    for target in config.targets:
        if config.targets != [ALL_LINEAR] and not any(f".{name}".endswith(f".{target}") for name in adapted):
            raise ConfigError(f"{key}: the model has no module named {target}; all-linear stands alone")
    for name, module in adapted.items():
        if module is head or not isinstance(module, MergedLinear):
            raise ConfigError(f"{key}: {name} is the head or no linear layer, and cannot be adapted")


def _layers(model: nn.Module) -> Iterator[Any]:
    """The adapted layers."""
    return (module for module in model.modules() if isinstance(module, MergedLinear))


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return any(_layers(model))


class MergedModel:
    """The adapted model as the engines know it: a WeightSource of merged weights under the checkpoint's names.

    A bucket's weights are merged when it is asked for, so there is never a second model.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int):
        self._tensors = {tensor.name: tensor for tensor in _checkpoint_tensors(model)}
        self.collective = any(is_sharded(parameter) for parameter in model.parameters())
        self.manifest = Manifest(tuple(tensor.entry() for tensor in self._tensors.values()), bucket_bytes)

    def buckets(self) -> Iterator[Bucket]:
        for bucket in self.manifest.buckets():
            tensors = [self._tensors[parameter.name] for parameter in bucket]
            with gathered(part for tensor in tensors for part in tensor.parts()):
                yield [(parameter, tensor.read()) for parameter, tensor in zip(bucket, tensors, strict=True)]


@dataclass(frozen=True, eq=False)
class _CheckpointTensor:
    """One tensor of the checkpoint, and the layer whose adapter is merged into it."""

    name: str
    parameter: nn.Parameter
    layer: MergedLinear | None

    def parts(self) -> list[nn.Parameter]:
        """What `read` needs whole."""
        return [self.parameter] if self.layer is None else list(self.layer.parameters())

    def entry(self) -> Parameter:
        return manifest_entry(self.name, self.parameter)

    def read(self) -> Tensor:
        return self.parameter.detach() if self.layer is None else self.layer.merged_weight()


def _checkpoint_tensors(model: nn.Module) -> Iterator[_CheckpointTensor]:
    """In the order of the base model's parameters; a tied head occurs once."""
    layers = {id(layer.get_base_layer().weight): layer for layer in _layers(model)}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if not _is_factor(name):
            yield _CheckpointTensor(name.replace(".base_layer.", "."), parameter, layers.get(id(parameter)))


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def export_adapter(model: PreTrainedModel, base: str, target: Path) -> None:
    """Write what `PeftModel.from_pretrained(base, target)` loads. All ranks call it, rank 0 writes."""
    factors = {name: parameter for name, parameter in model.named_parameters() if _is_factor(name)}
    with gathered(factors.values()):
        if dist.get_rank() != 0:
            return
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": factor.detach().cpu().contiguous()
            for name, factor in factors.items()
        }
        staging = target.with_name(target.name + ".partial")
        peft: Any = model.peft_config[ADAPTER]
        written = replace(peft, base_model_name_or_path=base, inference_mode=True, task_type="CAUSAL_LM")
        written.save_pretrained(str(staging))
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        staging.rename(target)
