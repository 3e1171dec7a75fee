"""Giving memory back that results no longer use (rt/_pool.pxi keeps it for the next ones).

May live here: when memory has lain unused for long enough, in whose loop that is found out. May not: what is kept while calls go on.

Nothing happens here while nothing is kept: the first array that dies wakes the loop, and from there on it looks once in a period until all
is given back. So a program that stops calling has lost the memory after two periods, and the timer with it.
"""

from __future__ import annotations

import asyncio
import logging
import os

from rt import _fastpath

# Between two looks; what lies unused from one to the next goes. The 10 ms that 64 MiB of fresh pages cost are 1 % of so long.
PERIOD_SECONDS = 1.0
_WAKE_BYTES = 64
_log = logging.getLogger("rt")


class Keeper:
    """Makes results use memory again, as long as its loop runs to give it back in the end. The first one of a process does; others rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._fd = _fastpath.pool_open()
        if self._fd is not None:
            loop.add_reader(self._fd, self._wake)

    def _wake(self) -> None:
        assert self._fd is not None
        os.read(self._fd, _WAKE_BYTES)
        self._timer = self._loop.call_later(PERIOD_SECONDS, self._look)

    def _look(self) -> None:
        gone, left = _fastpath.pool_turn()
        if gone:
            _log.debug("gave back %d B that results used; %d B are kept", gone, left)
        self._timer = self._loop.call_later(PERIOD_SECONDS, self._look) if left else None

    def close(self) -> None:
        """Give everything back, and keep nothing any more. In the loop's thread."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._fd = None
            _fastpath.pool_close()

    def abandon_in_child(self) -> None:
        """After fork, in the child, where no loop runs."""
        if self._fd is not None:
            self._fd = None
            _fastpath.pool_abandon_in_child()
