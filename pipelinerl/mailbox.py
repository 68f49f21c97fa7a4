"""Messages between the processes of one node: a datagram each, to sockets that no file system has a name for."""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

LARGEST = 2**16  # bytes of a message


class Mailbox:
    """Takes what others post to its `address`, which fits into JSON."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # to a name of the kernel's choice
        self._closed = False
        self.address = bytes(self._socket.getsockname()).hex()

    def listen(self, take: Callable[[bytes], object], thread: str) -> None:
        """Hand every message to `take` until the mailbox is closed, in a thread of that name."""
        threading.Thread(target=self._listen, args=(take,), name=thread, daemon=True).start()

    def _listen(self, take: Callable[[bytes], object]) -> None:
        with self._socket:
            while (message := self._socket.recv(LARGEST)) or not self._closed:
                take(message)

    async def taken(self) -> bytes:
        """The next message, in an event loop. A mailbox is listened at in one of the two ways only."""
        self._socket.setblocking(False)
        return await asyncio.get_running_loop().sock_recv(self._socket, LARGEST)

    def close(self) -> None:
        """What is posted later is refused; the thread that listens ends when it has handed on what came before."""
        self._closed = True
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RD)


def post(address: str, message: bytes) -> None:
    """Put a message into a mailbox, without waiting. Raises OSError when it is gone, or full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(message, bytes.fromhex(address))
