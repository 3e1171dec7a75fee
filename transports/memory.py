"""Links inside one process: bounded byte pipes with faults, for simulations and tests of programs built on ``rt``.

May live here: byte pipes and what can go wrong with them. May not: schedules, ranks, clocks. Nothing here waits; whoever owns the
engines calls ``Engine.progress`` in an order of its choosing, so a run is repeatable from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Pipe:
    """One direction: at most ``capacity`` bytes under way; each transfer may be cut short by ``dice``.

    Args:
        capacity: bytes in the pipe at most, at least 1.
        dice: decides how much of what is possible happens; None: all of it.
        cut_after: total bytes after which the pipe ends (the writer gets ``ConnectionResetError``, the reader end of stream).
    """

    def __init__(self, capacity: int, dice: random.Random | None = None, cut_after: int | None = None) -> None:
        self.capacity = capacity
        self.dice = dice
        self.cut_after = cut_after
        self.carried = 0
        self.closed = False
        self._bytes = bytearray()

    def write(self, data: memoryview) -> int:
        if self.closed:
            raise ConnectionResetError("the memory link was cut")
        room = self._part(min(len(data), self.capacity - len(self._bytes)))
        if self.cut_after is not None and self.carried + room >= self.cut_after:
            room = self.cut_after - self.carried
            self.closed = True
        self._bytes += data[:room]
        self.carried += room
        return room

    def read_into(self, buffer: memoryview) -> int:
        count = self._part(min(len(buffer), len(self._bytes)))
        if not self._bytes and self.closed:
            return -1
        buffer[:count] = self._bytes[:count]
        del self._bytes[:count]
        return count

    def _part(self, possible: int) -> int:
        return possible if self.dice is None or possible == 0 else self.dice.randint(0, possible)


class MemoryLink:
    """One end of a pair of pipes: what ``Engine.add_link`` takes. ``wake`` is called on the peer's end after each transfer."""

    def __init__(self, outgoing: Pipe, incoming: Pipe) -> None:
        self.outgoing = outgoing
        self.incoming = incoming
        self.wake: Callable[[], None] | None = None
        self.wake_peer: Callable[[], None] | None = None

    def send(self, data: memoryview) -> int:
        sent = self.outgoing.write(data)
        if sent and self.wake_peer is not None:
            self.wake_peer()
        return sent

    def recv_into(self, buffer: memoryview) -> int:
        count = self.incoming.read_into(buffer)
        if count > 0 and self.wake_peer is not None:
            self.wake_peer()
        return count


def memory_pair(capacity: int = 1 << 16, dice: random.Random | None = None, cut_after: int | None = None) -> tuple[MemoryLink, MemoryLink]:
    """Return the two ends of a link; ``cut_after`` cuts the direction from the first to the second."""
    forth, back = Pipe(capacity, dice, cut_after), Pipe(capacity, dice)
    return MemoryLink(forth, back), MemoryLink(back, forth)
