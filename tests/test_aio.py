"""The asyncio driver by itself: how turns of the loop are asked for.

May live here: ``LoopDriver`` against a loop and an engine whose every answer is chosen, or real ones that do nothing else. May not:
collectives (``test_collectives``).
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from rt import _fastpath, aio


class Loop:
    """What a driver sees of a loop; remembers what was asked of it."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], Any]] = []
        self.reader: Callable[[], Any] = lambda: None

    def add_reader(self, fd: int, callback: Callable[[], Any]) -> None:
        self.reader = callback

    def call_soon(self, callback: Callable[[], Any]) -> None:
        self.soon.append(callback)


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop with a driver whose engine always has more to do than one turn holds."""
    turns: list[int] = []
    busy = SimpleNamespace(turn=lambda engine, budget, spin: turns.append(budget) or _fastpath.BUDGET, BUDGET=_fastpath.BUDGET)
    monkeypatch.setattr(aio, "_fastpath", busy)
    loop = Loop()
    driver = aio.LoopDriver(loop, SimpleNamespace(fileno=lambda: 0, sleepers=0), 0.0)  # type: ignore[arg-type]
    return SimpleNamespace(loop=loop, driver=driver, turns=turns)


def test_events_do_not_multiply_turns(driven: Any) -> None:
    """However many events come, one turn is waiting: with two, the loop would do two at a time from then on, and timers fire late."""
    for _ in range(50):
        driven.loop.reader()
        assert len(driven.loop.soon) == 1
        driven.loop.soon.pop()()
    assert len(driven.turns) <= 51


def test_a_turn_that_spent_its_budget_is_followed_by_another(driven: Any) -> None:
    driven.loop.reader()
    for _ in range(5):
        (turn,) = driven.loop.soon
        driven.loop.soon.clear()
        turn()
    assert driven.turns == [aio.BUDGET_BYTES] * 6


class Selector(selectors.DefaultSelector):
    """Tells that its loop is about to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep = threading.Event()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0:
            self.asleep.set()
        return super().select(timeout)


def test_a_loop_that_runs_in_another_thread_now_is_woken() -> None:
    """Who ends a work may be the thread in which its driver was made, and the loop may be elsewhere by then."""
    selector, engine, work = Selector(), _fastpath.Engine(), _fastpath.Work()
    loop = asyncio.SelectorEventLoop(selector)

    async def attach() -> aio.LoopDriver:
        return aio.LoopDriver(loop, engine, 0.0)

    async def wait() -> None:
        future = loop.create_future()
        assert work.add_waiter(driver.waiter(future))
        selector.asleep.clear()
        await asyncio.wait_for(future, 20)

    driver = loop.run_until_complete(attach())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loop.run_until_complete, wait())
        assert selector.asleep.wait(20)
        work.finish(None)
        waiting.result(15)
    driver.detach()
    loop.close()
    engine.close()
    assert engine.sleepers == 0
