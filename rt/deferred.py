"""Collectives called before the group has formed.

May live here: the queue of such calls, and how a loop waits for the group. May not: anything once the group is there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from rt import _fastpath, world
from rt.aio import Work
from rt.arrays import private
from rt.group import CoreGroup

_T = TypeVar("_T")
_waiting: deque[Deferred] = deque()
_fastpath.calls_that_wait(_waiting)
_starting = threading.RLock()  # who starts calls that waited starts all of them, in order; re-entered where a start asks for the group


class Deferred:
    """Stands for a work that is started, in call order, when the group has formed. Awaitable, and cancelled, like the work itself."""

    def __init__(
        self, start: Callable[[CoreGroup, Any, Any], Work], x: Any, out: Any, formed: concurrent.futures.Future[CoreGroup]
    ) -> None:
        self._start = start
        self._x, self._out = x, out
        self.formed = formed
        self._work: Work | None = None
        self._error: BaseException | None = None
        _waiting.append(self)

    def __repr__(self) -> str:
        return "<rt.Work that waits for the group to form>" if self._work is None else repr(self._work)

    def start(self) -> None:
        """Start the work; what it raises is raised by the await."""
        try:
            self._work = self._start(self.formed.result(), self._x, self._out)
        except Exception as error:
            self._error = error

    def __await__(self) -> Generator[Any, None, Any]:
        if self._work is None and self._error is None:
            try:
                yield from wait_until(self.formed).__await__()
            except asyncio.CancelledError:
                # The call still counts; its memory is the caller's again.
                self._x = private(self._x)
                self._out = None
                raise
            start_waiting()
        if self._error is not None:
            raise self._error
        assert self._work is not None
        return (yield from self._work.__await__())


async def wait_until(formed: concurrent.futures.Future[_T]) -> _T:
    """Return the group, or whatever it is, once it has formed. Cancelling this harms nobody else who waits: the ranks go on meeting."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not done.done():
            done.set_result(None)

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(end)

    formed.add_done_callback(tell)
    await done
    return formed.result()


def start_waiting() -> None:
    """Start, in call order, every call whose group has formed; those whose group never will are dropped, and their awaits say why."""
    with _starting:
        while _waiting and _waiting[0].formed.done():
            _waiting.popleft().start()


def ready_core() -> CoreGroup | None:
    """Return the world's group if it has formed (or is a group of one), having started every call that waited for it."""
    core = world.current()
    if core is None:
        future = world.start()
        if not future.done():
            return None
        core = future.result()
    if _waiting:
        start_waiting()
    return core
