"""Memory that processes of one node share, in which a whole weight update lies.

It is a file without a name (memfd): the others open it through the process that made it, and it is gone when the last
of them is, however they end. Whoever cannot open it is on another node, or in another container, and is sent the bytes.
"""

import mmap
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKEN_BYTES = 16
HEADER_BYTES = 4096  # a page of its own for the token, so that the weights begin at one


@dataclass(frozen=True, slots=True)
class Address:
    """Where a segment can be opened, and how to tell that it is the right one."""

    pid: int
    fd: int
    nbytes: int
    token: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Segment:
    """A mapped segment; `content` is its bytes [nbytes], uint8. They are unmapped with the last view of them."""

    def __init__(self, mapped: mmap.mmap, address: Address):
        self._mapped = mapped
        self.address = address
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        self.content: Tensor = whole[HEADER_BYTES : HEADER_BYTES + address.nbytes]

    @classmethod
    def create(cls, nbytes: int) -> "Segment":
        """Raises OSError when the node has not that much memory left for it."""
        fd = os.memfd_create("pipelinerl-weights", os.MFD_CLOEXEC)
        size = HEADER_BYTES + nbytes
        os.posix_fallocate(fd, 0, size)  # now, where it is an error, and not at the first touch, where it kills
        mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        token = secrets.token_bytes(TOKEN_BYTES)
        mapped[:TOKEN_BYTES] = token
        return cls(mapped, Address(os.getpid(), fd, nbytes, token.hex()))

    @classmethod
    def open(cls, address: Address) -> "Segment | None":
        """The segment at `address`; None where that is not the memory of this node."""
        try:
            fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            size = HEADER_BYTES + address.nbytes
            if os.fstat(fd).st_size != size or os.pread(fd, TOKEN_BYTES, 0).hex() != address.token:
                return None
            return cls(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), address)
        finally:
            os.close(fd)


def node_name() -> str:
    """The same for two processes exactly when they can open each other's segments."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
