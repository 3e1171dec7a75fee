"""From a configuration to connected queue pairs: which are made, and what the ranks tell each other of them.

May live here: opening devices once per process, making a queue pair per peer and device, the exchange. May not: verbs
(``transports.verbs``), the stream (``transports.rdma``), how bytes of the exchange travel (``rt.bootstrap``).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rt._fastpath import Engine
from rt.config_rdma import AllGather, RdmaConfig
from rt.errors import RendezvousError
from rt.tallies import Tally
from transports import verbs
from transports.rdma import RING_BYTES, RdmaLink
from transports.tcp import in_thread
from transports.verbs import Device, End, QueuePair

if TYPE_CHECKING:
    from rt.control import Control

_ALL_RINGS_BYTES = 64 * 1024 * 1024  # of a process
_LEAST_RING_BYTES = 64 * 1024


def ring_bytes(links: int) -> int:
    """Return the capacity of a ring where a process has so many links: a power of two, all of them together bounded."""
    capacity = RING_BYTES
    while capacity > _LEAST_RING_BYTES and 2 * links * capacity > _ALL_RINGS_BYTES:
        capacity //= 2
    return capacity


class QueuePairs:
    """All queue pairs of a process, and the devices that they are on.

    Args:
        config: which devices lead where.
        rank: this process.
        size: number of ranks.

    Attributes:
        links: per peer its links, in the order of its devices; once connected.

    Raises:
        VerbsError: a device is missing, cannot be used, or has not what is needed.
    """

    def __init__(self, config: RdmaConfig, rank: int, size: int) -> None:
        self.links: dict[int, list[RdmaLink]] = {}
        self._rank = rank
        self._devices: dict[str, Device] = {}
        self._pairs: dict[int, list[QueuePair]] = {}
        self._owner = os.getpid()
        peers = [peer for peer in range(size) if config.connected(rank, peer, size)]
        capacity = ring_bytes(sum(len(config.names(rank, peer)) for peer in peers))
        try:
            for peer in peers:
                self._pairs[peer] = []
                for name in config.names(rank, peer):
                    self._pairs[peer].append(QueuePair(self._device(name), capacity))
        except BaseException:
            self.close()
            raise

    def _device(self, name: str) -> Device:
        if name not in self._devices:
            port = verbs.find_port(name)
            # ``auto`` may find what is also named: a device is opened once.
            self._devices[name] = next((known for known in self._devices.values() if known.port == port), None) or Device(port)
        return self._devices[name]

    def offers(self) -> dict[str, list[dict[str, Any]]]:
        """Return what each peer must know of this rank's queue pairs, for JSON."""
        return {str(peer): [asdict(pair.end()) for pair in pairs] for peer, pairs in self._pairs.items()}

    def connect(self, offered: list[dict[str, list[dict[str, Any]]]]) -> None:
        """Connect every queue pair with its peer's, from what all ranks offered. Raises VerbsError."""
        for peer, pairs in self._pairs.items():
            theirs = offered[peer].get(str(self._rank), [])
            if len(theirs) != len(pairs):
                raise verbs.VerbsError(0, f"rank {peer} has {len(theirs)} queue pairs for rank {self._rank}, expected {len(pairs)}")
            for pair, end in zip(pairs, theirs, strict=True):
                pair.connect(End(**end))
        self.links = {peer: [RdmaLink(pair, peer) for pair in pairs] for peer, pairs in self._pairs.items()}

    def add_to(self, engine: Engine, peer: int, socks: Iterable[socket.socket], control: Control | None) -> None:
        """Give the links to ``peer`` to an engine, in place of its sockets, which are closed; the control connection stays."""
        for sock in socks:
            sock.close()
        for link in self.links.get(peer, ()):
            engine.add_link(peer, link, link.fd)
        if control is not None and not all(link.reliable for link in self.links.get(peer, ())):
            Tally(control, peer, self.links[peer])

    def failure(self, peer: int) -> str:
        """Return how a link to ``peer`` failed, in words, or "" if none did."""
        return next((link.failure for link in self.links.get(peer, ()) if link.failure), "")

    def ending(self) -> None:
        """Tell the links that what is sent from here on must be known to have arrived."""
        for link in self._all():
            link.ending()

    def close(self, seconds: float = 0.0) -> None:
        """Wait for what was sent, at most so long, and give everything back. Idempotent."""
        if os.getpid() != self._owner:
            return
        for link in self._all():
            link.close(seconds)
        for pair in (pair for pairs in self._pairs.values() for pair in pairs):
            pair.close()
        for device in set(self._devices.values()):
            device.close()
        self._pairs, self._devices = {}, {}

    def let_go(self) -> None:
        """In a forked child: the connections are the parent's, and stay as they are."""
        for device in set(self._devices.values()):
            device.let_go()

    def _all(self) -> list[RdmaLink]:
        return [link for links in self.links.values() for link in links]


async def connect(config: RdmaConfig, rank: int, size: int, all_gather: Callable[[Any], Awaitable[list[Any]]]) -> QueuePairs:
    """Make this rank's queue pairs, learn of the others', and connect. That all have done so is known after the next all-gather.

    Args:
        config: which devices lead where.
        rank: this process.
        size: number of ranks.
        all_gather: of values for JSON, by our own connections; used unless the user brought a function.

    Raises:
        RendezvousError: a device cannot be used, or the user's function returned what it must not.
    """
    found: QueuePairs | None = None
    try:
        found = QueuePairs(config, rank, size)
        offers = found.offers()
        if config.factory is None:
            offered = await all_gather(offers)
        else:
            gather = config.factory(rank, size)
            offered = await in_thread(lambda: all_gather_by(gather, size, offers))
        found.connect(offered)
    except BaseException as error:
        if found is not None:
            found.close()
        if isinstance(error, (OSError, ValueError)):
            text = error.strerror if isinstance(error, OSError) else error
            raise RendezvousError(f"rank {rank}/{size}: {text or error}") from error
        raise
    return found


def all_gather_by(gather: AllGather, size: int, value: Any) -> list[Any]:
    """All-gather a JSON value by a function that gathers equally many bytes of each rank: first the lengths, then padded texts.

    Raises:
        ValueError: it returned another number of bytes than it must.
    """
    text = json.dumps(value).encode()
    lengths = [int.from_bytes(piece, "little") for piece in _gathered(gather, size, len(text).to_bytes(8, "little"))]
    pieces = _gathered(gather, size, text.ljust(max(lengths)))
    return [json.loads(piece[:length]) for piece, length in zip(pieces, lengths, strict=True)]


def _gathered(gather: AllGather, size: int, mine: bytes) -> list[bytes]:
    found = gather(mine, len(mine))
    if not isinstance(found, bytes) or len(found) != size * len(mine):
        returned = f"{len(found)} bytes" if isinstance(found, bytes) else type(found).__name__
        raise ValueError(f"Custom all-gather returned {returned} but expected {size * len(mine)}")
    return [found[at : at + len(mine)] for at in range(0, len(found), len(mine))]
