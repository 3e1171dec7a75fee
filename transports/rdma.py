"""A link over RDMA: a connected queue pair and the stream that the engine makes of it.

May live here: the end of such a link, and its failures in words. May not: the stream (``rt/_rdma.h``), how queue pairs are made and
connected (``transports.verbs``), which rank connects to which (``rt.queue_pairs``).
"""

from __future__ import annotations

import os
import select
import time

from rt._fastpath import RdmaStream
from transports.verbs import QueuePair

RING_BYTES = 1024 * 1024  # each way
_LOOK_AGAIN_SECONDS = 0.002
_VERBS = ("", "ibv_post_send", "ibv_post_recv", "ibv_poll_cq", "ibv_req_notify_cq")
_COMPLETED, _LOST = 5, 6
_STATUS = {  # of completions, as <infiniband/verbs.h> numbers them
    1: "local length error",
    2: "local queue pair error",
    4: "local protection error",
    5: "flushed: the connection failed before",
    9: "the peer's side cannot take this request",
    10: "the peer's memory refused the access (a wrong key or address)",
    11: "the peer failed to serve the request",
    12: "no answer from the peer, retries exhausted",
    13: "the peer was never ready to receive",
}


class RdmaLink(RdmaStream):
    """One end: what ``Engine.add_link`` takes.

    Args:
        pair: a connected queue pair; the link's from now on.
        peer: the rank at the other end, for messages.
    """

    def __new__(cls, pair: QueuePair, peer: int) -> RdmaLink:
        made = super().__new__(cls, **pair.for_stream())
        made._pair, made.peer = pair, peer
        return made

    _pair: QueuePair
    peer: int

    @property
    def fd(self) -> int:
        """Readable when the link should be asked again."""
        return self._pair.fd

    @property
    def reliable(self) -> bool:
        """Whether the device repeats what gets lost."""
        return self._pair.reliable

    @property
    def where(self) -> str:
        """The device and port on this side."""
        return self._pair.where

    @property
    def failure(self) -> str:
        """What went wrong, in words; "" while nothing did."""
        what, code, status, vendor, receiving = self.fault
        if not what:
            return ""
        if what == _LOST:
            return f"{self.where}: a message from rank {self.peer} was lost: the connection is unreliable (UC)"
        if what != _COMPLETED:
            return f"{self.where}: {_VERBS[what]} failed: {os.strerror(code)} (errno {code})"
        text = f"{_STATUS.get(status, 'failed')} (status {status}, vendor {vendor})"
        return f"{self.where}: {'receiving from' if receiving else 'writing to'} rank {self.peer}: {text}"

    def close(self, seconds: float = 0.0) -> None:
        """Leave: tell the peer, and wait at most so many seconds until its device has that and all before. Idempotent.

        With no seconds nothing is said: then the peer learns of it from others, or when it next writes.
        """
        until = time.monotonic() + seconds
        if seconds:
            self.say_goodbye()
        while self.unfinished() and time.monotonic() < until:
            select.select([], [], [], _LOOK_AGAIN_SECONDS)
        self.shut()
        self._pair.close()
