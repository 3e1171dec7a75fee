"""A link over RDMA: one ordered byte stream each way, made of writes into rings of registered memory.

May live here: the stream, its flow control and its completions. May not: how queue pairs are made and connected (``transports.verbs``),
which rank connects to which (``rt.queue_pairs``). Nothing here waits or locks: the engine calls it under its lock.

What is sent is copied into a registered ring here and written from there to the same place of the peer's ring, by RDMA WRITE WITH
IMMEDIATE, so the peer learns of it in one message. The immediate number says what the message is::

    bit 31 clear   data; its length is in the completion
    bit 31 set     a credit: the other 31 bits are the bytes that were consumed since the last one; none at all: the sender has left

A place in the ring is free again when the peer has consumed what was there (its credit) *and* the device has let go of it here (the
completion of the write): a write that must be repeated reads its source again.

Both sides count messages as well as bytes: every one takes a receive that the peer has posted. There are as many of those as data
messages that may be under way and credits that may be, so the peer always has one.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from transports.verbs import CREDITS, RECEIVE, QueuePair

RING_BYTES = 1024 * 1024  # each way
_CREDIT = 1 << 31
_STATUS = {  # of completions, as <infiniband/verbs.h> numbers them: what it means, and the errno that says it best
    1: ("local length error", errno.EMSGSIZE),
    2: ("local queue pair error", errno.EIO),
    4: ("local protection error", errno.EFAULT),
    5: ("flushed: the connection failed before", errno.ECONNRESET),
    9: ("the peer's side cannot take this request", errno.EPROTO),
    10: ("the peer's memory refused the access (a wrong key or address)", errno.EACCES),
    11: ("the peer failed to serve the request", errno.EREMOTEIO),
    12: ("no answer from the peer, retries exhausted", errno.ETIMEDOUT),
    13: ("the peer was never ready to receive", errno.ETIMEDOUT),
}


class RdmaLink:
    """One end: what ``Engine.add_link`` takes.

    Args:
        pair: a connected queue pair; the link's from now on.
        peer: the rank at the other end, for messages.

    Attributes:
        failure: what went wrong, in words; "" while nothing did.
        wake: called where one direction finds that the other may go on; the engine's ``ready``.
    """

    def __init__(self, pair: QueuePair, peer: int) -> None:
        self.peer = peer
        self.failure = ""
        self.wake: Callable[[], None] = _nobody
        self._pair = pair
        self._error = 0
        # Sending: positions count bytes since the beginning; the place in the ring is the remainder.
        self._outgoing, self._out_room = pair.outgoing, pair.ring_bytes
        self._sent = self._consumed = self._completed = 0
        self._ends: deque[int] = deque()  # of data messages that the peer has not consumed
        self._posted = self._finished = 0  # work requests, ever
        self._signalled: deque[tuple[int, int]] = deque()  # (requests posted, position) at each that will complete
        self._unsignalled_bytes = 0
        self._signal_all = self._blocked = False
        # Receiving.
        self._incoming, self._in_room = pair.incoming, pair.ring_bytes
        self._arrived = self._taken = self._credited = 0
        self._arrived_ends: deque[int] = deque()
        self._uncredited_messages = 0
        self._armed = self._stirred = self._ended = False

    @property
    def fd(self) -> int:
        """Readable when the link should be asked again."""
        return self._pair.fd

    @property
    def bytes_sent(self) -> int:
        """How much was handed to the device."""
        return self._sent

    @property
    def where(self) -> str:
        """The device and port on this side."""
        return self._pair.where

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Take the first bytes of ``parts``, as many as there is room for, and return how many; 0: none now.

        Raises:
            OSError: the connection has failed; ``failure`` says how.
        """
        self._check()
        begin, room = self._sent, self._room()
        if not room:
            room = self._wait_for_room()
        ring, capacity = self._outgoing, self._out_room
        position, end = begin, begin + room
        for part in parts:
            offset, left = 0, min(len(part), end - position)
            while left:
                at = position % capacity
                count = min(left, capacity - at)
                ring[at : at + count] = part[offset : offset + count]
                position, offset, left = position + count, offset + count, left - count
            if position == end:
                break
        if position > begin:
            self._post(position)
        return position - begin

    def recv_into(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer`` with what has come and return how many bytes; 0: none now, -1: none ever again.

        Raises:
            OSError: the connection has failed, and all that came before has been handed out.
        """
        if self._arrived == self._taken:
            while self._arrived == self._taken and self._settle():
                pass  # credits and completions of our own; who returns empty-handed must have asked to be woken
            if self._arrived == self._taken:
                self._rest()
            if self._blocked and self._room():
                self._blocked = False
                self.wake()
            if self._arrived == self._taken:
                self._check()
                return -1 if self._ended else 0
        ring, capacity = self._incoming, self._in_room
        count = min(len(buffer), self._arrived - self._taken)
        at = self._taken % capacity
        first = min(count, capacity - at)
        buffer[:first] = ring[at : at + first]
        if first < count:
            buffer[first:count] = ring[: count - first]
        self._taken += count
        ends = self._arrived_ends
        while ends and ends[0] <= self._taken:
            ends.popleft()
            self._uncredited_messages += 1
        self._give_credit()
        return count

    def ending(self) -> None:
        """From here on every write is to complete, so that ``close`` knows when the peer has it."""
        self._signal_all = True

    def close(self, seconds: float = 0.0) -> None:
        """Leave: tell the peer, and wait at most so many seconds until its device has that and all before. Idempotent.

        With no seconds nothing is said: then the peer learns of it from others, or when it next writes.
        """
        until = time.monotonic() + seconds
        while seconds and self._settle():
            pass
        if seconds and not self._error and not self._ended:
            self._write(0, 0, 0, _CREDIT, True)
        # A peer that has left waits for nothing, and may have closed its queue pair already: it acknowledges nothing.
        while not self._error and not self._ended and self._signalled and time.monotonic() < until:
            self._settle()
        self._fail(errno.EBADF, "the link is closed")
        self._outgoing = self._incoming = memoryview(b"")
        self._pair.close()

    # Sending

    def _wait_for_room(self) -> int:
        arrived = self._arrived
        while not self._room() and self._settle():
            pass
        if not self._room():
            self._rest()
        room = self._room()
        self._blocked = not room
        if self._arrived != arrived:
            self.wake()  # found on the way, and no event will tell of it
        self._check()
        if self._ended:
            raise BrokenPipeError(errno.EPIPE, f"rank {self.peer} has left")
        return room

    def _room(self) -> int:
        """Bytes that may be put into the outgoing ring now."""
        # One fewer each time: where the ring ends in between, one call makes two messages.
        if len(self._ends) >= self._pair.messages - 1 or self._posted - self._finished >= self._pair.depth - CREDITS - 1:
            return 0
        return self._out_room - (self._sent - min(self._consumed, self._completed))

    def _post(self, position: int) -> None:
        """Write what lies between what was sent and ``position``: in two messages where the ring ends in between."""
        capacity = self._out_room
        while self._sent < position:
            at = self._sent % capacity
            count = min(position - self._sent, capacity - at)
            self._sent += count
            self._ends.append(self._sent)
            self._unsignalled_bytes += count
            often = self._posted - (self._signalled[-1][0] if self._signalled else self._finished)
            signalled = self._signal_all or self._unsignalled_bytes >= capacity // 8 or often >= self._pair.messages // 4
            self._write(at, at, count, 0, signalled)

    def _write(self, mine: int, theirs: int, nbytes: int, number: int, signalled: bool) -> None:
        self._posted += 1
        if signalled:
            self._signalled.append((self._posted, self._sent))
            self._unsignalled_bytes = 0
        try:
            self._pair.write(mine, theirs, nbytes, number, signalled=signalled)
        except Exception as error:
            self._fail(getattr(error, "error_code", errno.EIO), f"{self.where}: ibv_post_send failed: {error}")

    # Receiving

    def _give_credit(self) -> None:
        """Tell the peer what was consumed, a quarter of the ring or of the messages at a time: it has room for that many credits."""
        owed = self._taken - self._credited
        if owed < self._in_room // 4 and self._uncredited_messages < max(self._pair.messages // 2, 1):
            return
        if self._posted - self._finished >= self._pair.depth:
            return  # a completion makes room, and comes by here
        self._credited = self._taken
        self._uncredited_messages = 0
        self._write(0, 0, 0, _CREDIT | owed, True)

    # Completions

    def _settle(self) -> bool:
        """Take what has completed and say whether that was anything."""
        if self._error:
            return False
        try:
            found = self._pair.poll()
        except Exception as error:
            self._fail(getattr(error, "error_code", errno.EIO), f"{self.where}: ibv_poll_cq failed: {error}")
            return False
        for completion in found:
            if completion.status:
                self._completed_badly(completion)
                return True
            if completion.wr_id == RECEIVE:
                self._landed(completion)
            else:
                self._finished, self._completed = self._signalled.popleft()
        if found:
            self._stirred = True
            self._give_credit()
        return bool(found)

    def _landed(self, completion: Any) -> None:
        number = completion.imm_data
        if number == _CREDIT:
            self._ended = True
        elif number & _CREDIT:
            self._consumed += number ^ _CREDIT
            while self._ends and self._ends[0] <= self._consumed:
                self._ends.popleft()
        else:
            self._arrived += completion.byte_len
            self._arrived_ends.append(self._arrived)
        try:
            self._pair.receive()
        except Exception as error:
            self._fail(getattr(error, "error_code", errno.EIO), f"{self.where}: ibv_post_recv failed: {error}")

    def _rest(self) -> None:
        """Nothing can be done now: see to it that ``fd`` tells when, and look once more."""
        if self._error or (self._armed and not self._stirred):
            return
        try:
            # Room may also come from our own completions; whoever has room waits for the peer only.
            blocked = not self._room()
            (self._pair.arm_all if blocked else self._pair.arm)()
        except Exception as error:
            self._fail(getattr(error, "error_code", errno.EIO), f"{self.where}: ibv_req_notify_cq failed: {error}")
            return
        self._armed, self._stirred = not blocked, False
        self._settle()

    # Failure

    def _completed_badly(self, completion: Any) -> None:
        text, code = _STATUS.get(completion.status, ("failed", errno.EIO))
        what = "receiving from" if completion.wr_id == RECEIVE else "writing to"
        detail = f"{text} (status {completion.status}, vendor {completion.vendor_err})"
        self._fail(code, f"{self.where}: {what} rank {self.peer}: {detail}")

    def _fail(self, code: int, text: str) -> None:
        if not self._error:
            self._error, self.failure = code if code > 0 else errno.EIO, text

    def _check(self) -> None:
        if self._error:
            raise OSError(self._error, self.failure or os.strerror(self._error))


def _nobody() -> None:
    """Nobody drives this link but its owner."""
