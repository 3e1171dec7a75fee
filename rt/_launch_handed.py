"""What ranks are handed besides variables: rank 0's listening socket, addresses, ports that are free, files that have no name.

May live here: these, on the ranks' own host. May not: what is in the files, who gets what (``_launch_plan``), the processes.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rt import interfaces
from rt.errors import ConfigError


class Handed:
    """Descriptors that live until the ranks have been started, and files that live as long as this."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None
        self._held: list[socket.socket] = []
        self._files: dict[str, tuple[str, IO[bytes]]] = {}  # by content

    def look(self, question: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """Find the addresses at which ranks here are reached, and ports there.

        Args:
            question: see ``_launch_plan.question``.
            environ: says, if anything does, which interfaces are asked for.

        Returns:
            What ``_launch_plan.Ground`` holds of it.

        Raises:
            ConfigError: there is no such address, or nobody can listen there.
        """
        choice = interfaces.asked(None, environ) if question["size"] > 1 else None
        found = interfaces.listing() if choice is not None else []
        reached = {rank: interfaces.reached(found, choice, question["here"], ips) for rank, ips in question["ips"].items()}
        first = next(iter(reached.values()))
        place = question["here"] if choice is None else first[0]
        return {
            "address": place,
            "addresses": reached,
            "interfaces": interfaces.nccl_names(found, first) if choice is not None else "",
            "listening": self.listen(place, question["size"]) if question["listen"] else 0,
            "ports": {rank: self.free_ports(often(addresses, question["ports"])) for rank, addresses in reached.items()},
        }

    def listen(self, address: str, size: int) -> int:
        """Open rank 0's socket, which it inherits so that nobody can take its port in between, and return the port."""
        self.listener = _listen(address, max(128, size))
        port: int = self.listener.getsockname()[1]
        return port

    def free_ports(self, addresses: Sequence[str]) -> list[tuple[str, int]]:
        """Return a free port for each address; they are kept so until ``let_go``."""
        held = [_listen(address) for address in addresses]
        self._held += held
        return [(address, sock.getsockname()[1]) for address, sock in zip(addresses, held, strict=True)]

    def let_go(self) -> None:
        """Leave the free ports to the ranks, which are started now."""
        for sock in self._held:
            sock.close()

    def path(self, content: str) -> str:
        """Return a path at which the ranks find this text, where the system can of a file without a name."""
        if content in self._files:
            return self._files[content][0]
        file: Any
        if hasattr(os, "memfd_create"):
            file = os.fdopen(os.memfd_create("rt-launch"), "w+b", buffering=0)
            path = f"/proc/self/fd/{file.fileno()}"
        else:
            file = tempfile.NamedTemporaryFile(prefix="rt-launch-", buffering=0)
            path = file.name
        file.write(content.encode())
        self._files[content] = path, file
        return path

    def inherited(self, rank: int) -> list[int]:
        """Return the descriptors that a rank gets."""
        first = [self.listener.fileno()] if rank == 0 and self.listener is not None else []
        return first + [file.fileno() for _, file in self._files.values()]

    def variables(self, rank: int, files: dict[str, str]) -> dict[str, str]:
        """Return how a rank finds what it is handed."""
        found = {name: self.path(content) for name, content in files.items()}
        if rank == 0 and self.listener is not None:
            found["RT_COORDINATOR_FD"] = str(self.listener.fileno())
        return found

    def started(self) -> None:
        """Close what only the ranks need."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None


def often(addresses: Sequence[str], count: int) -> list[str]:
    """Return each address ``count`` times in a row: as many connections it is to have."""
    return [address for address in addresses for _ in range(count)]


def _listen(address: str, backlog: int = 1) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.bind(place)
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            raise ConfigError(f"{address} is no address of this host") from None
        raise ConfigError(f"cannot listen at {address}: {error.strerror}") from None
