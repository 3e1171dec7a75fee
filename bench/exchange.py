"""A bare exchange over TCP, to hold an all-reduce against: the bytes that it must move, and nothing else.

May live here: that exchange. May not: reductions, other collectives, an import of ``rt``.
"""

from __future__ import annotations

import contextlib
import select
import socket

from bench.data import Array

_MOST_BYTES = 1 << 18  # of one system call: the best out of 64 KiB, 256 KiB and 1 MiB


class Ring:
    """The ranks pass round a ring, through the kernel's TCP, what an all-reduce must move; nothing is reduced.

    What is faster than this at large sizes saves copies by not sending; what is slower pays for more than its bytes.
    """

    def __init__(self, size: int, right: socket.socket, left: socket.socket) -> None:
        self._size = size
        self._right = right
        self._left = left
        for sock in (right, left):
            sock.setblocking(False)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        for _ in range(2):  # once round says that the last has come, once more tells the others
            self._pass_on(memoryview(bytes(1)), memoryview(bytearray(1)), 1)

    def __call__(self, x: Array, out: Array) -> None:
        """Send the bytes of an all-reduce of x, and receive as many into out."""
        source, target = x.data.cast("B"), out.data.cast("B")
        self._pass_on(source, target, 2 * (self._size - 1) * source.nbytes // self._size)

    def _pass_on(self, source: memoryview, target: memoryview, nbytes: int) -> None:
        """Send ``nbytes`` of source, over and over if it is shorter, and receive as many into target."""
        sent = received = 0
        poll = select.poll()
        while sent < nbytes or received < nbytes:
            moved = 0
            with contextlib.suppress(BlockingIOError):
                if sent < nbytes:
                    moved += self._right.send(_piece(source, sent, nbytes))
                    sent += moved
            with contextlib.suppress(BlockingIOError):
                if received < nbytes:
                    got = self._left.recv_into(_piece(target, received, nbytes))
                    if not got:
                        raise ConnectionError("the left neighbour has gone")
                    received += got
                    moved += got
            if not moved:
                poll.register(self._right, select.POLLOUT if sent < nbytes else 0)
                poll.register(self._left, select.POLLIN if received < nbytes else 0)
                poll.poll()


def _piece(memory: memoryview, start: int, end: int) -> memoryview:
    at = start % memory.nbytes
    return memory[at : min(at + _MOST_BYTES, at + end - start, memory.nbytes)]
