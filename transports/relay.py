"""Byte streams between ranks that no cable connects, forwarded along the ring by the control threads of the ranks between them.

May live here: the pipe that an engine sees, the choice of the way round, forwarding and flow control. May not: sockets and threads
(``rt.control`` calls this file from its own thread and sends what it is told to).

Flow control is end to end: a sender has at most ``WINDOW`` bytes that the receiver has not consumed, so ranks in between hold no
more than that per pipe and never have to push back. That is what keeps forwarding free of deadlock.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable

RELAY_DATA, RELAY_ACK = 6, 7  # frame types on control connections
WINDOW = 1024 * 1024

_PIECE = 128 * 1024
_HEAD = struct.Struct("!IIb3x")  # source, destination, way round the ring: +1 to the right, -1 to the left
_COUNT = struct.Struct("!I")


def carriers(a: int, b: int, size: int) -> set[int]:
    """Return the ranks that forward what ranks ``a`` and ``b`` of a ring of ``size`` say to each other, the way there and the way back."""
    return _between(a, b, size) | _between(b, a, size)


def shorter_way(source: int, destination: int, size: int) -> int:
    """Return +1 where it is not farther to the right round a ring of ``size``, else -1; the next rank on the way finds the same."""
    return 1 if 2 * ((destination - source) % size) <= size else -1


def _between(source: int, destination: int, size: int) -> set[int]:
    way = shorter_way(source, destination, size)
    hops = (way * (destination - source)) % size
    return {(source + way * hop) % size for hop in range(1, hops)}


class RelayPipe:
    """An ordered byte stream to ``peer`` and one from it. Methods may be called by any thread and never block.

    Attributes:
        peer: the rank at the other end.
        wake: called in the control thread when a ``send`` that was cut short or a ``recv_into`` that got nothing may go on.
    """

    def __init__(self, peer: int, transmit: Callable[[int, bytes], None], acknowledge: Callable[[int, int], None]) -> None:
        self.peer = peer
        self.wake: Callable[[], None] | None = None
        self._transmit = transmit
        self._acknowledge = acknowledge
        self._lock = threading.Lock()
        self._in_flight = 0
        self._cut_short = False
        self._arrived: deque[memoryview] = deque()
        self._held = 0
        self._unacknowledged = 0
        self._ended = False

    def send(self, data: memoryview) -> int:
        """Accept the first bytes of ``data`` (a flat byte view), as many as the window admits, and return how many; 0 = would block.

        Raises:
            BrokenPipeError: the peer has left or cannot be reached any more.
        """
        with self._lock:
            if self._ended:
                raise BrokenPipeError(f"rank {self.peer} has left, or a rank on the way to it")
            accepted = min(len(data), WINDOW - self._in_flight)
            self._in_flight += accepted
            self._cut_short = accepted < len(data)
            for start in range(0, accepted, _PIECE):  # under the lock: pieces of two senders must not interleave
                self._transmit(self.peer, bytes(data[start : min(start + _PIECE, accepted)]))
        return accepted

    def recv_into(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer`` and return how many bytes; 0 = nothing now, -1 = nothing ever again."""
        with self._lock:
            if not self._arrived:
                return -1 if self._ended and len(buffer) else 0
            filled = 0
            while self._arrived and filled < len(buffer):
                piece = self._arrived.popleft()
                taken = min(len(piece), len(buffer) - filled)
                buffer[filled : filled + taken] = piece[:taken]
                if taken < len(piece):
                    self._arrived.appendleft(piece[taken:])
                filled += taken
            self._held -= filled
            self._unacknowledged += filled
            if self._unacknowledged >= WINDOW // 4:
                self._acknowledge(self.peer, self._unacknowledged)
                self._unacknowledged = 0
        return filled

    def land(self, payload: memoryview) -> bool:
        """Control thread: take in what the peer sent (nothing: it has ended) and say whether somebody must wake.

        Raises:
            ValueError: the peer sent more than its window.
        """
        with self._lock:
            if self._held + len(payload) > WINDOW:
                raise ValueError(f"rank {self.peer} relayed more than {WINDOW} B that were not consumed")
            if not payload:
                self._ended = True
                return True
            was_empty = not self._arrived
            self._arrived.append(payload)
            self._held += len(payload)
            return was_empty

    def acknowledged(self, count: int) -> bool:
        """Control thread: the peer consumed ``count`` bytes; say whether a sender must wake. Raises ValueError on impossible counts."""
        with self._lock:
            if count > self._in_flight:
                raise ValueError(f"rank {self.peer} acknowledged {count} B of {self._in_flight} B")
            self._in_flight -= count
            woken, self._cut_short = self._cut_short, False
            return woken


class Relay:
    """The pipes of one rank, and its part in the pipes of others.

    Args:
        rank: this rank.
        size: number of ranks.
        send: ``send(neighbour, frame type, payload)``, called in the control thread only.
        post: ``post(function, *arguments)`` runs a function in the control thread soon, in order.
        on_wake: what to call with the peer's rank for pipes whose ``wake`` is not set.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        send: Callable[[int, int, bytes], None],
        post: Callable[..., None],
        on_wake: Callable[[int], None] | None,
    ) -> None:
        self._rank, self._size = rank, size
        self._send = send
        self._post = post
        self._on_wake = on_wake
        self._lock = threading.Lock()
        self._pipes: dict[int, RelayPipe] = {}
        self._cut_off: set[int] = set()

    def pipe(self, peer: int) -> RelayPipe:
        """Return the one pipe to ``peer``; any thread. Raises ValueError where ``peer`` is no other rank."""
        if not (0 <= peer < self._size and peer != self._rank):
            raise ValueError(f"rank {peer} is none of the other ranks of a world of {self._size}")
        with self._lock:
            if peer not in self._pipes:
                self._pipes[peer] = RelayPipe(peer, self._transmit, self._acknowledge)
                if peer in self._cut_off:
                    self._pipes[peer].land(memoryview(b""))
            return self._pipes[peer]

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Control thread: forward a frame or take it in. Raises ValueError or struct.error where it is malformed."""
        source, destination, way = _HEAD.unpack_from(payload)
        if not (source < self._size and destination < self._size and way in (1, -1)):
            raise ValueError(f"relay from rank {source} to rank {destination}, way {way}, in a world of {self._size}")
        if destination != self._rank:
            self._send((self._rank + way) % self._size, kind, payload)
            return
        pipe, body = self.pipe(source), memoryview(payload)[_HEAD.size :]
        if pipe.land(body) if kind == RELAY_DATA else pipe.acknowledged(*_COUNT.unpack(body)):
            self._wake(pipe)

    def end(self, peers: list[int]) -> None:
        """Control thread: tell ``peers`` that nothing more will come, behind everything sent before."""
        for peer in peers:
            self._forward(RELAY_DATA, peer, shorter_way(self._rank, peer, self._size), b"")

    def lost(self, rank: int) -> None:
        """Control thread: ``rank`` is dead; end the pipes to it and through it."""
        self._cut([rank, *(peer for peer in range(self._size) if self._passes(rank, peer))])

    def left(self, rank: int) -> None:
        """Control thread: ``rank`` left in order; end the pipes through it (it has ended its own, behind its last bytes)."""
        self._cut([peer for peer in range(self._size) if self._passes(rank, peer)])

    def _cut(self, peers: list[int]) -> None:
        for peer in peers:
            if peer != self._rank and peer not in self._cut_off:
                self._cut_off.add(peer)
                with self._lock:
                    pipe = self._pipes.get(peer)
                if pipe is not None and pipe.land(memoryview(b"")):
                    self._wake(pipe)

    def _passes(self, rank: int, peer: int) -> bool:
        """Whether ``rank`` lies between this rank and ``peer`` on the way there or back."""
        return peer != self._rank and rank in carriers(self._rank, peer, self._size)

    def _forward(self, kind: int, peer: int, way: int, body: bytes) -> None:
        self._send((self._rank + way) % self._size, kind, _HEAD.pack(self._rank, peer, way) + body)

    def _transmit(self, peer: int, piece: bytes) -> None:
        self._post(self._forward, RELAY_DATA, peer, shorter_way(self._rank, peer, self._size), piece)

    def _acknowledge(self, peer: int, count: int) -> None:
        # Back the way the data came, so that data and acknowledgements depend on the same ranks.
        self._post(self._forward, RELAY_ACK, peer, -shorter_way(peer, self._rank, self._size), _COUNT.pack(count))

    def _wake(self, pipe: RelayPipe) -> None:
        if pipe.wake is not None:
            pipe.wake()
        elif self._on_wake is not None:
            self._on_wake(pipe.peer)
