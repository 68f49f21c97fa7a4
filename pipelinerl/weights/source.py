"""Where a weight update, or an export, takes its tensors from.

The senders know no model. They follow the manifest of a source, which gathers what is sharded and merges what is
trained apart from the weights (adapters), one bucket at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from pipelinerl.weights.manifest import Manifest, Parameter

Bucket = Sequence[tuple[Parameter, Tensor]]


class WeightSource(Protocol):
    """The full tensors of a model, under their checkpoint names."""

    @property
    def manifest(self) -> Manifest:
        """What `buckets` yields, in its order."""

    @property
    def collective(self) -> bool:
        """True when all trainer ranks must run through `buckets` together; otherwise rank 0 alone may."""

    def buckets(self) -> Iterator[Bucket]:
        """The buckets of the manifest with their detached tensors.

        The tensors hold only until the next bucket is asked for: whoever needs them longer copies them.
        """


class WholeModel:
    """A model of which this process holds every parameter. A tied head occurs once, under the embedding's name."""

    collective = False

    def __init__(self, model: nn.Module, bucket_bytes: int):
        self._model = model
        self.manifest = manifest_of(model, bucket_bytes)

    def buckets(self) -> Iterator[Bucket]:
        tensors = dict(parameters_in_order(self._model))
        for bucket in self.manifest.buckets():
            yield [(parameter, tensors[parameter.name]) for parameter in bucket]


@contextmanager
def run_through(source: WeightSource) -> Iterator[Iterator[Bucket]]:
    """The source's buckets. A collective source is run to its end also when the user gives up: other ranks wait."""
    buckets = source.buckets()
    try:
        yield buckets
    finally:
        if source.collective:
            for _ in buckets:
                pass


def parameters_in_order(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint names and tensors. A tied head occurs once, under the embedding's name, as in a saved checkpoint."""
    for name, parameter in model.named_parameters(remove_duplicate=True):
        yield name, parameter.detach()


def manifest_of(model: nn.Module, bucket_bytes: int) -> Manifest:
    """The manifest of a model all of whose parameters are here."""
    entries = (
        Parameter(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
        for name, t in parameters_in_order(model)
    )
    return Manifest(tuple(entries), bucket_bytes)
