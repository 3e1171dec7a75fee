"""The launcher's stdin on its way to all ranks: each reads all of it, and its end.

May live here: one buffer with a place in it for every rank. May not: output, processes, and waiting: ``rt.launch`` calls when a descriptor
is ready or a deadline has come.

Bounded: at most ``LIMIT_BYTES`` are kept, for all ranks together, so the slowest reader sets the pace. Not for ever: a rank that takes
nothing for ``patience`` seconds while another has nothing left to read gets no more. It is said, for it will see an end of file that is
none. If nobody reads, nobody is kept waiting, and nothing is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from rt._forward import READ_BYTES, reopened

LIMIT_BYTES = 1 << 20
_LOOK_AGAIN = 1.0  # seconds until a launcher in the background looks whether the terminal is its own again


@dataclass(eq=False)
class Feed:
    """The stdin of one rank.

    Attributes:
        pipe: its writing end, made non-blocking; None if this is no pipe (``rt._launch_link.RemoteFeed``).
        at: counts the bytes it has taken.
        moved: when it took some last.
    """

    index: int
    pipe: IO[bytes] | None
    at: int = 0
    moved: float = 0.0

    def __post_init__(self) -> None:
        self.fd = -1 if self.pipe is None else self.pipe.fileno()
        if self.pipe is not None:
            os.set_blocking(self.fd, False)

    @property
    def closed(self) -> bool:
        return self.pipe is None or self.pipe.closed

    @property
    def ready(self) -> bool:
        """Whether there is room; with a pipe it is poll() that knows."""
        return True

    def put(self, piece: memoryview) -> int:
        """Hand on what there is room for, and say how much that was."""
        return os.write(self.fd, piece)

    def close(self) -> None:
        """Let its reader see the end."""
        assert self.pipe is not None
        self.pipe.close()


class Input:
    """Our stdin and the ranks it goes to.

    Args:
        fd: our stdin.
        feeds: theirs; they are closed here.
        patience: see above, in seconds.
        complain: told when a rank is left behind.
    """

    def __init__(self, fd: int, feeds: Sequence[Feed], patience: float, complain: Callable[[str], None]) -> None:
        pipe = reopened(fd, os.O_RDONLY)
        self.fd = fd if pipe is None else pipe
        self.is_terminal = os.isatty(fd)
        self.feeds = feeds
        self._patience = patience
        self._complain = complain
        self._kept = bytearray()
        self._start = 0  # how many bytes came before those that are kept
        self._ended = False
        self._blocked: float | None = None  # since when somebody waits for somebody else
        self._resume: float | None = None  # when to look at the terminal again

    def wanted(self) -> bool:
        """Say whether there is room to read, and somebody to read for."""
        return bool(self._open()) and not self._ended and self._resume is None and len(self._kept) < LIMIT_BYTES

    def has_more_for(self, feed: Feed) -> bool:
        """Say whether there is something to write to a rank."""
        return not feed.closed and feed.at < self._start + len(self._kept)

    def read(self) -> bool:
        """Take what is there; True if it ends a line."""
        if self._in_background():  # reading would stop us
            self._resume = time.monotonic() + _LOOK_AGAIN
            return False
        try:
            text = os.read(self.fd, READ_BYTES)
        except BlockingIOError:  # somebody else has taken it
            return False
        except OSError:  # the terminal has gone
            text = b""
        self._ended = not text
        self._kept += text
        self._trim()
        return text.endswith(b"\n")

    def write(self, feed: Feed) -> None:
        """Hand on what a rank's pipe takes; a rank that has closed it wants no more."""
        if feed.closed:  # since poll() called it ready
            return
        try:
            with memoryview(self._kept) as whole, whole[feed.at - self._start :] as piece:
                written = feed.put(piece)
        except BlockingIOError:
            return
        except OSError:  # EPIPE: it has ended, or closed its stdin
            feed.close()
        else:
            feed.at, feed.moved = feed.at + written, time.monotonic()
        self._trim()

    def due(self, now: float) -> float | None:
        """Return when ``attend`` has something to do, None if there is nothing to wait for."""
        if self._resume is not None:
            return self._resume
        blocked = not self._ended and len(self._kept) >= LIMIT_BYTES and not all(self.has_more_for(feed) for feed in self._open())
        if not blocked:
            self._blocked = None
            return None
        self._blocked = now if self._blocked is None else self._blocked
        return self._patience + max(self._blocked, min(feed.moved for feed in self._hindmost()))

    def attend(self, now: float) -> None:
        """Do what is due: look at the terminal again, or leave those behind for whom others wait."""
        due = self.due(now)
        if due is None or due > now:
            return
        if self._resume is not None:
            self._resume = None
            return
        for feed in [feed for feed in self._hindmost() if feed.moved + self._patience <= now]:
            self._complain(
                f"rank {feed.index} has not read its stdin for {self._patience:g} seconds, and others wait for theirs: "
                f"it gets no more, {self._start + len(self._kept) - feed.at} bytes are lost to it"
            )
            feed.close()
        self._trim()

    def _open(self) -> list[Feed]:
        return [feed for feed in self.feeds if not feed.closed]

    def _hindmost(self) -> list[Feed]:
        return [feed for feed in self._open() if feed.at == self._start]

    def _trim(self) -> None:
        """Let go of what all have, and end those that have everything."""
        if self._ended:
            for feed in self._open():
                if not self.has_more_for(feed):
                    feed.close()
        least = min((feed.at for feed in self._open()), default=self._start + len(self._kept))
        del self._kept[: least - self._start]
        self._start = least

    def _in_background(self) -> bool:
        if not self.is_terminal:
            return False
        try:
            return os.tcgetpgrp(self.fd) != os.getpgrp()
        except OSError:  # not the terminal that controls us: nobody is stopped for reading it
            return False
