"""Helpers of the bootstrap and control tests: configurations on loopback and whole worlds inside one process.

May live here: what both test files need. May not: assertions.
"""

from __future__ import annotations

import atexit
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rt.bootstrap import Wiring
from rt.config import RingConfig
from rt.control import Control, Verdict
from rt.secret import Secret

SECRET = Secret(b"the secret of the tests, 32 byte", "test")
PATIENCE = 20.0  # seconds until a test that waits for something gives up


def config(rank: int, size: int, **fields: Any) -> RingConfig:
    """A configuration with defaults for everything."""
    defaults: dict[str, Any] = {
        "addresses": None,
        "coordinator": None,
        "store": None,
        "connections": 1,
        "job": "a test",
        "connect_timeout": PATIENCE,
        "timeout": None,
        "secret": SECRET,
        "shm": False,
        "spin": None,
        "tuning": None,
        "coordinator_fd": None,
        "interfaces": None,
        "source": "test",
    }
    return RingConfig(rank=rank, size=size, **{**defaults, **fields})


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on just now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socks = [socket.socket(family) for _ in range(count)]
    for sock in socks:
        sock.bind((host, 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def ring(size: int, host: str = "127.0.0.1", connections: int = 1, **fields: Any) -> list[RingConfig]:
    """Configurations of all ranks of a ring file."""
    ports = iter(free_ports(size * connections, host))
    addresses = tuple(tuple((host, next(ports)) for _ in range(connections)) for _ in range(size))
    return [config(rank, size, addresses=addresses, connections=connections, **fields) for rank in range(size)]


def coordinated(size: int, host: str = "127.0.0.1", **fields: Any) -> list[RingConfig]:
    """Configurations of all ranks with a coordinator whose listening socket exists already."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(16)
    coordinator = (host, listener.getsockname()[1])
    atexit.register(listener.close)
    fd = listener.fileno()
    return [config(rank, size, coordinator=coordinator, coordinator_fd=None if rank else fd, **fields) for rank in range(size)]


def only_neighbours(size: int) -> Callable[[int, int], bool]:
    """One cable per pair of neighbours and no forwarding."""
    return lambda a, b: (a - b) % size in (1, size - 1)


class Messages(logging.Handler):
    """Waits for log lines: the way to know that something has happened inside."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._arrived = threading.Condition()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._arrived:
            self._lines.append(record.getMessage())
            self._arrived.notify_all()

    def count(self, text: str) -> int:
        with self._arrived:
            return sum(text in line for line in self._lines)

    def wait_for(self, text: str, times: int = 1) -> None:
        with self._arrived:
            if not self._arrived.wait_for(lambda: sum(text in line for line in self._lines) >= times, PATIENCE):
                raise AssertionError(f"{text!r} was not logged {times} times:\n" + "\n".join(self._lines))


@contextmanager
def listening_to_log() -> Iterator[Messages]:
    """All messages of the logger "rt"."""
    logger, messages = logging.getLogger("rt"), Messages()
    level = logger.level
    logger.addHandler(messages)
    logger.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)


class Member:
    """One rank's control thread with what it called back."""

    def __init__(self, ring_config: RingConfig, reachable: Callable[[int, int], bool] | None = None) -> None:
        self.rank = ring_config.rank
        self.verdicts: queue.Queue[Verdict] = queue.Queue()
        self.byes: queue.Queue[int] = queue.Queue()
        self.control = Control.start(ring_config, on_verdict=self.verdicts.put, on_bye=self.byes.put, reachable=reachable)

    def wiring(self) -> Wiring:
        return self.control.ready.result(PATIENCE)

    def end(self, timeout: float = PATIENCE) -> None:
        self.control.close(timeout)
        if self.control.ready.done() and not self.control.ready.cancelled() and self.control.ready.exception() is None:
            for sock in (sock for socks in self.control.ready.result().data.values() for sock in socks):
                sock.close()


@contextmanager
def world(configs: list[RingConfig], reachable: Callable[[int, int], bool] | None = None) -> Iterator[list[Member]]:
    """Control threads of these ranks, connected; those that are left at the end are closed together."""
    members = [Member(each, reachable) for each in configs]
    try:
        yield members
    finally:
        ending = [threading.Thread(target=member.end) for member in members]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
