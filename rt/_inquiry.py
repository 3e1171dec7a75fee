"""One rank's part in finding out what all ranks are doing: it asks the others, answers them, and passes on what is for somebody else.

May live here: questions and answers between control threads. May not: sockets (``rt.control`` sends what it is told to), what a rank says
of itself and who may ask (``_status``).

Nothing is flooded: a question goes to each rank by itself, directly or along the ring, and its answer comes back likewise. Who has not
answered after a moment is stopped, or cannot be reached, or keeps Python's lock: that is an answer, too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from transports.relay import shorter_way

if TYPE_CHECKING:
    from rt._doors import Facts

ASK, TELL = 8, 9  # frame types on control connections
WAIT_SECONDS = 1.5

_HEAD = struct.Struct("!III")  # source, destination, number of the question
_MOST_BYTES = 200_000  # of an answer: a frame holds little more


class Inquiry:
    """The questions of one rank; methods belong to the control thread.

    Args:
        rank: this rank.
        size: number of ranks.
        send: ``send(neighbour, frame type, payload)``; does nothing where that connection has gone.
        direct: whether a rank is connected with this one.
        answer: what this rank is doing.
    """

    def __init__(
        self, rank: int, size: int, send: Callable[[int, int, bytes], None], direct: Callable[[int], bool], answer: Callable[[], Facts]
    ) -> None:
        self._rank, self._size = rank, size
        self._send = send
        self._direct = direct
        self._answer = answer
        self._numbers = itertools.count()
        self._open: dict[tuple[int, int], asyncio.Future[Facts]] = {}

    async def ask(self, ranks: Iterable[int]) -> dict[int, Facts]:
        """Return what these ranks are doing, those that say so in time; this rank may be one of them."""
        number = next(self._numbers) % 2**32
        loop = asyncio.get_running_loop()
        wanted = {rank: loop.create_future() for rank in ranks}
        self._open |= {(rank, number): future for rank, future in wanted.items()}
        try:
            for rank, future in wanted.items():
                if rank == self._rank:
                    future.set_result(self._answer())
                else:
                    self._pass_on(ASK, self._rank, rank, number, b"")
            if wanted:
                await asyncio.wait(wanted.values(), timeout=WAIT_SECONDS)
            return {rank: future.result() for rank, future in wanted.items() if future.done()}
        finally:
            for rank in wanted:
                del self._open[rank, number]

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Answer a question, take an answer, or pass either on. Raises ValueError or struct.error where the frame is malformed."""
        source, destination, number = _HEAD.unpack_from(payload)
        if not (source < self._size and destination < self._size):
            raise ValueError(f"a question from rank {source} to rank {destination} in a world of {self._size}")
        body = payload[_HEAD.size :]
        if destination != self._rank:
            self._pass_on(kind, source, destination, number, body)
        elif kind == ASK:
            said = json.dumps(self._answer()).encode()
            self._pass_on(TELL, self._rank, source, number, said if len(said) < _MOST_BYTES else b"{}")
        else:
            future = self._open.get((source, number))
            if future is not None and not future.done():
                future.set_result(_object(body))

    def _pass_on(self, kind: int, source: int, destination: int, number: int, body: bytes) -> None:
        hop = destination if self._direct(destination) else (self._rank + shorter_way(self._rank, destination, self._size)) % self._size
        self._send(hop, kind, _HEAD.pack(source, destination, number) + body)


def _object(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError("an answer that is no object")
    return found
