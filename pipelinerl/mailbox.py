"""Messages between the processes of one node: a datagram each, to sockets that no file system has a name for."""

import asyncio
import socket

LARGEST = 2**16  # bytes of a message


class Mailbox:
    """Takes what others post to its `address`, which fits into JSON."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # to a name of the kernel's choice
        self.address = bytes(self._socket.getsockname()).hex()

    def take(self) -> bytes:
        """The next message; waits for it."""
        return self._socket.recv(LARGEST)

    async def taken(self) -> bytes:
        """The same in an event loop. A mailbox is for one kind of waiting only."""
        self._socket.setblocking(False)
        return await asyncio.get_running_loop().sock_recv(self._socket, LARGEST)

    def close(self) -> None:
        """What is posted later is refused."""
        self._socket.close()


def post(address: str, message: bytes) -> None:
    """Put a message into a mailbox, without waiting. Raises OSError when it is gone, or full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(message, bytes.fromhex(address))
