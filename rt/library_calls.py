"""What the ranks of a world called whose arrays a library moves, compared: nothing of it is on the library's wire.

May live here: the message in which a rank tells rank 0 what it called, and rank 0's comparison. May not: what follows from a disagreement
(``rt.library_world``), the connection (``rt.control``).
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

from rt.group import SIGNATURE_BYTES, explain_signature

_MOST = 500  # signatures in a message: well within a frame


class Told(NamedTuple):
    """Calls of one rank of one group, in their order.

    Attributes:
        group: 64-bit identity.
        size, rank: of the group, and of the teller in it.
        first: number of the first.
        signatures: of each.
    """

    group: int
    size: int
    rank: int
    first: int
    signatures: list[bytes]

    def pack(self) -> list[bytes]:
        """Write the messages."""
        messages = []
        for start in range(0, len(self.signatures), _MOST):
            head = json.dumps([self.group, self.size, self.rank, self.first + start]).encode()
            messages.append(head + b"\n" + b"".join(self.signatures[start : start + _MOST]))
        return messages

    @classmethod
    def unpack(cls, payload: bytes) -> Told:
        """Read a message. Raises ValueError where the bytes are none."""
        head, _, body = payload.partition(b"\n")
        group, size, rank, first = json.loads(head)
        return cls(group, size, rank, first, [body[i : i + SIGNATURE_BYTES] for i in range(0, len(body), SIGNATURE_BYTES)])


class Left(NamedTuple):
    """What a rank had called in a group when it left.

    Attributes:
        group: 64-bit identity.
        rank: of the group.
        calls: how many collectives.
        sent, received: how many messages, by the other rank.
    """

    group: int
    rank: int
    calls: int
    sent: list[int]
    received: list[int]

    def pack(self) -> bytes:
        """Write the message."""
        return json.dumps(self).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Left:
        """Read a message. Raises ValueError where the bytes are none."""
        return cls(*json.loads(payload))


class Disagreement(NamedTuple):
    """Two ranks that called different things: numbers in the group, and what happened in words."""

    group: int
    sequence: int
    ranks: tuple[int, int]
    text: str


class Comparison:
    """What rank 0 knows of the calls of all groups; of each only those that some rank has not told yet.

    Args:
        unsaid: what differs between calls that differ and are the same in words.
    """

    def __init__(self, unsaid: str) -> None:
        self._unsaid = unsaid
        self._groups: dict[int, _Calls] = {}

    def hear(self, told: Told) -> Disagreement | None:
        """Take note of what a rank told; the first difference from what another told."""
        calls = self._groups.setdefault(told.group, _Calls(told.size))
        for number, signature in enumerate(told.signatures, told.first):
            other = calls.compare(told.rank, number, signature)
            if other is not None:
                return Disagreement(told.group, number, (other[0], told.rank), _text(number, self._unsaid, other, (told.rank, signature)))
        calls.told[told.rank] = told.first + len(told.signatures)
        calls.trim()
        return None

    def told(self, group: int) -> list[int]:
        """Return how many calls each rank of a group has told of, [] where none has."""
        calls = self._groups.get(group)
        return [] if calls is None else list(calls.told)

    def behind(self, group: int, sequence: int) -> list[int]:
        """Return the ranks of a group that have told of no call of that number."""
        calls = self._groups.get(group)
        return [] if calls is None else [rank for rank, count in enumerate(calls.told) if count <= sequence]


class _Calls:
    """Those of one group."""

    def __init__(self, size: int) -> None:
        self.told = [0] * size  # how many, by rank
        self._first = 0
        self._known: list[tuple[int, bytes]] = []  # who told first, and what

    def compare(self, rank: int, number: int, signature: bytes) -> tuple[int, bytes] | None:
        at = number - self._first
        if at == len(self._known):
            self._known.append((rank, signature))
        return self._known[at] if self._known[at][1] != signature else None

    def trim(self) -> None:
        done = min(self.told) - self._first
        if done > 0:
            del self._known[:done]
            self._first += done


def explain(number: int, signature: bytes) -> str:
    """Return a call in words; signatures here have no number of their own."""
    return explain_signature(number.to_bytes(4, sys.byteorder) + signature[4:])


def _text(number: int, unsaid: str, *sides: tuple[int, bytes]) -> str:
    """Describe both sides, the lower rank first, as the ring does."""
    numbered = [(rank, explain(number, signature)) for rank, signature in sorted(sides)]
    text = "ranks disagree: " + ", but ".join(f"rank {rank} called {said}" for rank, said in numbered)
    if numbered[0][1] == numbered[1][1]:
        text += f"; {unsaid}"
    return text
