"""The loop of a process that watches others: it sleeps in ``poll`` until a descriptor, a signal or a deadline calls.

May live here: ``poll``, and how signals wake it. May not: what is done then (``_launch_job``, ``_supervisor``).
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Callable, Iterable


class Loop:
    """Descriptors with what is to be called when they are ready."""

    def __init__(self) -> None:
        self._poll = select.poll()  # not epoll: it refuses regular files, and stdin or stdout may be one
        self._calls: dict[int, Callable[[], None]] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def watch_signals(self, numbers: Iterable[int], call: Callable[[set[int]], None]) -> None:
        """From now on let these signals do nothing but wake the loop, which hands on their numbers. For the main thread."""
        self._sockets = reader, writer = socket.socketpair()
        for end in self._sockets:
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in numbers:
            signal.signal(number, _wake)
        self.want(reader.fileno(), True, select.POLLIN, lambda: call(set(reader.recv(4096))))

    def want(self, fd: int, wanted: bool, event: int, call: Callable[[], None]) -> None:
        """Call ``call`` at ``event`` on ``fd`` from now on, or no more."""
        registered = fd in self._calls
        if wanted and not registered:
            self._poll.register(fd, event)
            self._calls[fd] = call
        elif registered and not wanted:
            self._poll.unregister(fd)
            del self._calls[fd]

    def wait(self, seconds: float | None) -> None:
        """Sleep until something is ready, at most ``seconds``, and call what is wanted then."""
        for fd, _ in self._poll.poll(None if seconds is None else seconds * 1000):
            if (call := self._calls.get(fd)) is not None:  # else it is no more wanted since another call
                call()

    def close(self) -> None:
        if self._sockets is not None:
            signal.set_wakeup_fd(-1)
            for end in self._sockets:
                end.close()


def _wake(number: int, frame: object) -> None:
    """Handle no signal: the loop reads its number from the wakeup socket."""
