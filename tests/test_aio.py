"""The asyncio driver by itself: how turns of the loop are asked for.

May live here: ``LoopDriver`` against a loop and an engine whose every answer is chosen. May not: collectives (``test_collectives``).
"""

from __future__ import annotations

from collections.abc import Callable
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
    driver = aio.LoopDriver(loop, SimpleNamespace(fileno=lambda: 0), 0.0)  # type: ignore[arg-type]
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
