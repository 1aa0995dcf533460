"""Deadlines on a socket: everything that is read and written in one exchange ends in time."""

from __future__ import annotations

import socket
import time


class Line:
    """One connected socket under one deadline; ``TimeoutError`` when it is over.

    A peer that sends a byte now and then holds the line no longer than one that sends nothing.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._socket = connection
        self._end = time.monotonic() + seconds

    def read(self, size: int) -> bytes:
        """Return between 1 and ``size`` bytes; empty at the end of the stream."""
        self._wait()
        return self._socket.recv(size)

    def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        view = memoryview(data)
        while view:
            self._wait()
            view = view[self._socket.send(view[: 1 << 20]) :]

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def _wait(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the exchange took too long")
        self._socket.settimeout(left)
