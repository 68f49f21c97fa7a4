"""The trainer's end of a weight update: takes the tensors of a source in order and brings them to the engines.

One sender per transport, chosen by `make_sender`. The life of a group is `listen` (returns where engines find it) and
`connect` (blocks until all engine workers have joined), then `send` once per update; the next `listen` drops the group
and opens the next epoch. Only trainer rank 0 has a sender.
"""

from typing import Any, Protocol

from pipelinerl.weights.host_sender import HostSender
from pipelinerl.weights.source import WeightSource


class Sender(Protocol):
    """A transport as the trainer uses it."""

    def listen(self, address: str) -> dict[str, Any]:
        """Leave the group there was and open another on this node; the result goes into every engine's init info."""

    def connect(self, world_size: int) -> None:
        """Wait until `world_size - 1` engine workers have joined. Raises WeightSyncError."""

    def send(self, transmission: int, with_digests: bool = True) -> list[int]:
        """Bring all tensors on their way, as number `transmission` of this epoch. Raises WeightSyncError.

        When it returns, the trainer may change its weights. The result is every parameter's digest, in the order of
        the manifest; nothing when not asked for.
        """

    def resend(self, transmission: int) -> None:
        """The tensors of the last `send` once more, in a new epoch, though the trainer's weights may have changed."""

    def close(self) -> None:
        """Leave the group."""


def make_sender(backend: str, source: WeightSource, timeout_s: float, shared_memory: bool = True) -> Sender:
    """The sender of a resolved backend: "gloo", "nccl" or "ipc"."""
    if backend == "gloo":
        return HostSender(source, timeout_s, shared_memory)
    from pipelinerl.weights.device_senders import IpcSender, NcclSender

    return NcclSender(source, timeout_s) if backend == "nccl" else IpcSender(source, timeout_s)
