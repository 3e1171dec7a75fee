"""What the launcher and the supervisors on other hosts say to each other: frames in both directions of one ssh connection.

May live here: the form of frames and their kinds. May not: what they lead to (``_launch_link``, ``_supervisor``).

A frame has a kind, the rank it is about (0 where it is about none) and a payload. The supervisor's begin after ``MARK``: what a login shell
printed before is nobody's. A conversation: HELLO, CHECK, CHECKED, then, when all hosts are ready, START; after that everything at any time.
Both sides send BEAT when they have nothing else to say, because a cable that is pulled ends no connection. Output waits for room: a
supervisor sends no more of a stream than ``WINDOW_BYTES`` ahead of the last TAKEN, and the launcher no more input ahead of READ, so
that neither side ever stops reading and a beat is never stuck behind something that nobody wants.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = b"\0rt-supervisor\n"
WINDOW_BYTES = 1 << 18
BEAT_SECONDS = 0.5
_HEADER = struct.Struct("!BII")


class Kind(enum.IntEnum):
    """Who sends it, and the payload; numbers are 8 bytes, big-endian."""

    BEAT = 1  # both
    HELLO = 2  # supervisor: JSON about its host and version; its form never changes, so that other versions can be told
    CHECK = 3  # launcher: JSON, what is going to be started
    CHECKED = 4  # supervisor: JSON, what is wrong with that
    START = 5  # launcher: JSON, with the secret
    STARTED = 6  # supervisor: number of the rank's process
    REFUSED = 7  # supervisor: text, why a rank could not be started
    INPUT = 8  # launcher: bytes for stdin; empty: its end
    READ = 9  # supervisor: number of bytes the rank has taken; -1: it wants no more
    OUT = 10  # supervisor: bytes of stdout; empty: its end
    ERR = 11  # supervisor: bytes of stderr; empty: its end
    TAKEN_OUT = 12  # launcher: number of bytes for which there is room again
    TAKEN_ERR = 13
    SIGNAL = 14  # launcher: number of a signal for the rank's group
    EXIT = 15  # supervisor: exit code, minus the signal if one killed it
    GONE = 16  # supervisor: nobody is left in the rank's group
    END = 17  # launcher: 1: kill whatever is left and end; 0: leave what has left its rank's group on purpose
    PAUSE = 18  # launcher: it is going to be stopped, and will not beat until it goes on


class Frame(NamedTuple):
    kind: int
    rank: int
    payload: bytes

    @property
    def number(self) -> int:
        return int.from_bytes(self.payload, "big", signed=True)

    @property
    def json(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.payload)
        return said


def frame(kind: Kind, rank: int = 0, payload: bytes | memoryview | int | dict[str, Any] = b"") -> bytes:
    """Return a frame as it is sent."""
    if isinstance(payload, int):
        payload = payload.to_bytes(8, "big", signed=True)
    elif isinstance(payload, dict):
        payload = json.dumps(payload).encode()
    return _HEADER.pack(kind, rank, len(payload)) + payload


class Reader:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that ``data`` completes."""
        self._kept += data
        at = 0
        while len(self._kept) - at >= _HEADER.size:
            kind, rank, nbytes = _HEADER.unpack_from(self._kept, at)
            if len(self._kept) - at - _HEADER.size < nbytes:
                break
            at += _HEADER.size
            yield Frame(kind, rank, bytes(self._kept[at : at + nbytes]))
            at += nbytes
        del self._kept[:at]
