"""The trainer's weight source: what `weights/source.py` describes, for a model that may be sharded over ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipelinerl.trainer.lora import MergedModel, has_adapters
from pipelinerl.trainer.sharding import gathered, is_sharded, manifest_entry
from pipelinerl.weights.manifest import Manifest
from pipelinerl.weights.source import Bucket, WeightSource, WholeModel


class ShardedModel:
    """A model under ZeRO 3. At no time is more than one bucket of it whole, beyond what DeepSpeed keeps whole."""

    collective = True

    def __init__(self, model: nn.Module, bucket_bytes: int):
        self._parameters = dict(model.named_parameters(remove_duplicate=True))
        entries = (manifest_entry(name, parameter) for name, parameter in self._parameters.items())
        self.manifest = Manifest(tuple(entries), bucket_bytes)

    def buckets(self) -> Iterator[Bucket]:
        for bucket in self.manifest.buckets():
            with gathered(self._parameters[parameter.name] for parameter in bucket):
                yield [(parameter, self._parameters[parameter.name].detach()) for parameter in bucket]


def make_source(model: nn.Module, bucket_bytes: int) -> WeightSource:
    """The source that fits the model."""
    if has_adapters(model):
        return MergedModel(model, bucket_bytes)
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    return ShardedModel(model, bucket_bytes) if sharded else WholeModel(model, bucket_bytes)


def state_dict_of(source: WeightSource) -> dict[str, Tensor]:
    """Copies of all tensors in host memory, under their checkpoint names."""
    return {
        parameter.name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for bucket in source.buckets()
        for parameter, tensor in bucket
    }


def take_part(source: WeightSource) -> None:
    """What a rank does that is needed for the others to get their tensors, and needs none itself."""
    for _ in source.buckets():
        pass
