"""The asyncio driver: how a work is awaited, and how an event loop moves an engine.

May live here: everything that touches an event loop. May not: what a collective is or means; the engine is moved only through
``progress``, which never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from rt import _fastpath

if TYPE_CHECKING:
    from rt.group import CoreGroup

BUDGET_BYTES = _fastpath.BUDGET_BYTES  # moved per turn of the loop: about 0.3 ms
FAIR_SECONDS = 1e-3  # awaits that never suspend hand the loop over once in this time
_SLICE_BYTES = 1 << 20
_BYTE = np.dtype(np.uint8)


class LoopDriver:
    """Moves one engine from one event loop: a reader on the engine's descriptor, and ``call_soon`` while there is more to do."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: _fastpath.Engine, spin_seconds: float) -> None:
        self._spin_seconds = spin_seconds
        self.loop = loop
        self.turned = time.monotonic()
        self.engine = engine
        self._scheduled = False  # a turn was asked of the loop
        self._due = False  # and is still needed
        self._fd = engine.fileno()
        loop.add_reader(self._fd, self._readable)
        engine.sleepers += 1

    def _readable(self) -> None:
        # Not while a turn is scheduled: it would schedule a second one, and with every event the loop would do more turns at a time.
        if self._scheduled:
            self._due = True
        else:
            self.spin()

    def _turn(self) -> None:
        self._scheduled = False
        if self._due:
            self.spin()

    def spin(self) -> None:
        """Make progress, and poll for a moment where that pays (see ``_fastpath.turn``)."""
        self._due = False
        if _fastpath.turn(self.engine, BUDGET_BYTES, self._spin_seconds) == _fastpath.BUDGET:
            self._ask()

    def follow(self, status: int) -> None:
        """Do what the engine's answer to a submit asks for."""
        # Shared memory wakes nobody who has not asked; that is done by a turn, and if an await makes it first, so much the better.
        if status == _fastpath.BUDGET or (status == _fastpath.BLOCKED and self.engine.shares_memory):
            self._ask()

    def _ask(self) -> None:
        self._due = True
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._turn)

    def waiter(self, future: asyncio.Future[None]) -> Callable[[], None]:
        """Return what ends ``future`` from whatever thread finished the work."""

        def end() -> None:
            if not future.done():
                future.set_result(None)

        return within(self.loop, end)

    def detach(self) -> None:
        """Stop watching; in the loop's own thread, or after the loop has closed."""
        self.engine.sleepers -= 1
        if not self.loop.is_closed():
            self.loop.remove_reader(self._fd)


def within(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> Callable[[], None]:
    """Return what has ``call()`` made by the loop, from any thread. At once, if that is the loop's; which that is may change."""

    def tell() -> None:
        if asyncio._get_running_loop() is loop:
            call()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(call)

    return tell


class Work(_fastpath.Work):
    """A collective under way. Await it (again and again, if you like) for its result.

    Cancelling the await, also by ``asyncio.timeout``, never harms the group: the collective goes on with a private copy, and
    ``CancelledError`` arrives once the caller's memory is free.
    """

    __slots__ = ()  # one is made at every call

    def __init__(self, group: CoreGroup) -> None:
        self.group = group

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        if self.state == _fastpath.FLYING:
            self.group.driver(loop).spin()
        if self.state == _fastpath.FLYING:
            self._watch_limit(loop)
            future: asyncio.Future[None] = loop.create_future()
            driver = self.group.driver(loop)
            waiter = driver.waiter(future)
            if self.add_waiter(waiter):
                try:
                    yield from future
                except BaseException:
                    self.remove_waiter(waiter)
                    yield from self._wait_out(driver, loop) if self.lent else self._give_back_in_slices()
                    raise
            driver.turned = time.monotonic()
        elif (attached := self.group.driver_of(loop)) is not None and time.monotonic() - attached.turned > FAIR_SECONDS:
            yield
            attached.turned = time.monotonic()
        return self.outcome()

    def __getattr__(self, name: str) -> Any:
        hint = "" if name.startswith("_") else f"; its result may have: `await` it first, it is {self!r}"
        if hint and hasattr(asyncio.Future, name):  # asyncio.wait asks for them
            hint = "; it can be awaited, but is no asyncio.Future: `asyncio.gather(work)` and `asyncio.ensure_future(work)` make one of it"
        raise AttributeError(f"a Work has no {name!r}{hint}", name=name, obj=self)

    def limit(self, seconds: float) -> None:
        """Give the work that many seconds from now. Watched by the running loop, else from the first await on."""
        self.deadline = seconds, time.monotonic() + seconds
        loop = asyncio._get_running_loop()
        if loop is not None:
            self._watch_limit(loop)

    def _watch_limit(self, loop: asyncio.AbstractEventLoop) -> None:
        world = self.group.world
        if self.deadline is None or world is None:
            return
        (seconds, deadline), self.deadline = self.deadline, None
        timer = loop.call_later(max(0.0, deadline - time.monotonic()), world.timed_out, self, seconds)
        self.add_waiter(within(loop, timer.cancel))

    def done(self) -> bool:
        """Say whether the collective has ended, well or badly."""
        return self.state != _fastpath.FLYING

    def __repr__(self) -> str:
        state = ("in flight", "done", "failed")[self.state]
        return f"<rt.Work {self.describe()} {state}>"

    def describe(self) -> str:
        """Return ``all_sum #17 (float32, 4096 B)``."""
        return f"{self.what} #{self.sequence} ({self.about})"

    def give_back(self) -> None:
        """Free the caller's memory at once: the work goes on with private copies."""
        for _ in self._give_back():
            pass

    def _give_back_in_slices(self) -> Generator[None, None, None]:
        """As ``give_back``, with a turn of the loop between slices; a second cancellation does not end it early."""
        for _ in self._give_back():
            try:
                yield
            except asyncio.CancelledError:
                continue

    def _wait_out(self, driver: LoopDriver, loop: asyncio.AbstractEventLoop) -> Generator[Any, None, None]:
        """Wait until the work has ended: its memory cannot be had before. A second cancellation does not end this early."""
        while not self.done():
            future: asyncio.Future[None] = loop.create_future()
            waiter = driver.waiter(future)
            if self.add_waiter(waiter):
                try:
                    yield from future
                except asyncio.CancelledError:
                    self.remove_waiter(waiter)

    def _give_back(self) -> Generator[None, None, None]:
        engine = self.group.engine
        source, target = self.source, self.target
        if engine is None or self.state != _fastpath.FLYING or (source is None and target is None):
            return
        shared = self.borrows_source and self.borrows_target and np.may_share_memory(source, target)
        if self.borrows_source and not shared:
            private = yield from copied(source)
            _fastpath.move_memory(engine, self, source, private, False)
        if self.borrows_target:
            # The engine writes there, so it must stand still while the bytes are copied: no slices. In place, one of the two is a part
            # of the other and they move together.
            whole = source if shared and source.nbytes > target.nbytes else target
            _fastpath.move_memory(engine, self, whole, _fastpath.empty((whole.nbytes,), _BYTE), True)


def copied(array: np.ndarray[Any, Any]) -> Generator[None, None, np.ndarray[Any, Any]]:
    """Return the bytes of an array in new memory; yields between slices."""
    private = _fastpath.empty((array.nbytes,), _BYTE)
    old = array.reshape(-1).view(np.uint8)
    for start in range(0, array.nbytes, _SLICE_BYTES):
        if start:
            yield
        private[start : start + _SLICE_BYTES] = old[start : start + _SLICE_BYTES]
    return private
