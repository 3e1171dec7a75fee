"""Collectives called before the group has formed.

May live here: the queue of such calls. May not: anything once the group is there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from rt import world
from rt.aio import Work
from rt.group import CoreGroup

_waiting: deque[Deferred] = deque()


class Deferred:
    """Stands for a work that is started, in call order, when the group has formed. Awaitable like the work itself."""

    def __init__(self, start: Callable[[CoreGroup], Work], formed: concurrent.futures.Future[CoreGroup]) -> None:
        self._start = start
        self._formed = formed
        self._work: Work | None = None
        self._error: BaseException | None = None
        _waiting.append(self)

    def start(self, core: CoreGroup) -> None:
        """Start the work; what it raises is raised by the await."""
        try:
            self._work = self._start(core)
        except Exception as error:
            self._error = error

    def __await__(self) -> Generator[Any, None, Any]:
        if self._work is None and self._error is None:
            yield from asyncio.wrap_future(self._formed)
            ready_core()
        if self._error is not None:
            raise self._error
        assert self._work is not None
        return (yield from self._work.__await__())


def ready_core() -> CoreGroup | None:
    """Return the world's group if it has formed (or is a group of one), having started every call that waited for it."""
    core = world.current()
    if core is None:
        future = world.start()
        if not future.done():
            return None
        core = future.result()
    while _waiting:
        _waiting.popleft().start(core)
    return core
