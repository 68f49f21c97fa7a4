"""What a weight update consists of: an ordered list of parameters, cut into buckets the same way on both sides.

Names and shapes are those of the Hugging Face checkpoint; the engine's own model loader fuses and shards them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 16  # bytes; every parameter of a bucket starts at a multiple, so that any dtype can view it


@dataclass(frozen=True, slots=True)
class Parameter:
    """One full (unsharded) tensor of the checkpoint."""

    name: str
    dtype: str  # a torch dtype's name, e.g. "bfloat16"
    shape: tuple[int, ...]
    nbytes: int

    @property
    def padded_nbytes(self) -> int:
        """What it takes in a bucket's buffer."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parameters of one update, in the order in which they are sent."""

    parameters: tuple[Parameter, ...]
    bucket_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def buckets(self) -> Iterator[Sequence[Parameter]]:
        """Consecutive parameters that travel in one broadcast of at most `bucket_bytes` (one parameter at least)."""
        bucket: list[Parameter] = []
        size = 0
        for parameter in self.parameters:
            if bucket and size + parameter.padded_nbytes > self.bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.padded_nbytes
        if bucket:
            yield bucket

    def layout(self) -> tuple[list["Placed"], int]:
        """Where each bucket lies in a buffer that holds them all, one after the other, and that buffer's size."""
        placed, position = [], 0
        for bucket in self.buckets():
            size = offsets(bucket)[1]
            placed.append(Placed(bucket, position, position + size))
            position += size
        return placed, position

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, the form in which vLLM passes update infos between its processes."""
        return {
            "names": [p.name for p in self.parameters],
            "dtype_names": [p.dtype for p in self.parameters],
            "shapes": [list(p.shape) for p in self.parameters],
            "sizes": [p.nbytes for p in self.parameters],
            "bucket_bytes": self.bucket_bytes,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Manifest":
        columns = zip(data["names"], data["dtype_names"], data["shapes"], data["sizes"], strict=True)
        return cls(tuple(Parameter(n, d, tuple(s), b) for n, d, s, b in columns), data["bucket_bytes"])


@dataclass(frozen=True, slots=True)
class Placed:
    """A bucket, and its place [start, end) in a buffer of the whole update, in bytes."""

    bucket: Sequence[Parameter]
    start: int
    end: int

    @property
    def names(self) -> str:
        """For an error message."""
        first, last = self.bucket[0].name, self.bucket[-1].name
        return f"parameter {first}" if first == last else f"parameters {first} to {last}"


def offsets(bucket: Sequence[Parameter]) -> tuple[list[int], int]:
    """Byte offset of each parameter in its bucket's buffer, and the buffer's size."""
    starts, position = [], 0
    for parameter in bucket:
        starts.append(position)
        position += parameter.padded_nbytes
    return starts, position
