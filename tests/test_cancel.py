"""Cancelling an await never harms the group, and gives the caller's memory back.

May live here: cancellation, time limits of asyncio, and what interrupts a wait, over real processes. May not: Ctrl-C as a way to end a
process (``test_exit``).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import ranks

ASYNC_FRONTS = [front for front in ranks.FRONTS if front != "sync"]
Array = np.ndarray[Any, Any]
BYTES = (4, 100, 4096, 65536, 65540, 300_000, 1 << 20, 4 << 20)
GARBAGE = np.float32(1e30)


class Step:
    """One call of the long run: its arrays, the call, and what must come of it. All values are small integers, so sums are exact."""

    def __init__(self, number: int, nbytes: int, kind: str, place: str, rank: int, size: int) -> None:
        self.kind, self.rank, self.size = kind, rank, size
        blocks = size if kind in ("sum_scatter", "all_gather") else 1
        count = max(1, nbytes // 4 // blocks)
        self.whole = (np.arange(count * blocks, dtype=np.float32) * 7 + number) % 251
        mine = slice(rank * count, (rank + 1) * count)
        if kind == "all_gather":
            self.expected = np.concatenate([self.whole[r * count : (r + 1) * count] + r for r in range(size)])
            self.x, self.out = self.whole[mine] + np.float32(rank), np.empty(count * size, np.float32)
            if place == "in place":
                self.out[mine] = self.x
                self.x = self.out[mine]
        elif kind == "sum_scatter":
            self.expected = self.whole[mine] * size + size * (size - 1) / 2
            self.x = self.whole + np.float32(rank)
            self.out = self.x[mine] if place == "in place" else np.empty(count, np.float32)
        else:
            root = number % size
            self.root = root
            self.expected = self.whole + root if kind == "broadcast" else self.whole * size + size * (size - 1) / 2
            self.x = self.whole + np.float32(rank)
            self.out = self.x if place == "in place" else np.empty_like(self.x)
        self.options: dict[str, Any] = {} if place == "fresh" else {"out": self.out}

    def start(self, rt: Any) -> Awaitable[Any]:
        if self.kind == "broadcast":
            return rt.broadcast(self.x, self.root, **self.options)
        return getattr(rt, self.kind)(self.x, **self.options)

    def spoil(self) -> None:
        """What a caller may do who got his memory back."""
        self.x.fill(GARBAGE)
        self.out.fill(GARBAGE)

    def still_spoilt(self) -> bool:
        return bool((self.x == GARBAGE).all() and (self.out == GARBAGE).all())


async def cancelled_at_some_time(awaitable: Awaitable[Any], dice: random.Random) -> Any:
    """Await, but cancel after some turns of the loop or some microseconds: by hand, or by ``asyncio.timeout``."""
    if dice.random() < 0.5:
        async with asyncio.timeout(dice.choice([0, 0, 1e-4, 1e-3])):
            return await awaitable
    task = asyncio.ensure_future(as_coroutine(awaitable))
    await asyncio.sleep(0)  # a task that has not begun awaits nothing yet
    if dice.random() < 0.5:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
    else:
        await asyncio.sleep(dice.random() * 2e-3)
    task.cancel()
    if dice.random() < 0.2:
        await asyncio.sleep(0)
        task.cancel()  # once more while the first is being honoured
    return await task


async def as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


CANCELLED = 0.3  # of the awaits; two of three end before they are


async def long_run(rt: Any, group: Any, ctl: ranks.Ctl, steps: int, seed: int) -> tuple[int, int]:
    """Some calls in flight at any time; returns how many were right and how many were cancelled."""
    common, dice = random.Random(seed), random.Random(f"{seed} {group.rank()}")
    right = cancelled = 0
    spoilt: list[Step] = []
    for number in range(0, steps, 4):
        batch = []
        for one in range(number, number + 4):
            kind = common.choice(["all_sum", "all_sum", "all_gather", "sum_scatter", "broadcast"])
            nbytes = common.choice(BYTES[: common.choice([4, 6, 8])])
            batch.append(Step(one, nbytes, kind, dice.choice(["fresh", "out", "in place"]), group.rank(), group.size()))
        works = [step.start(rt) for step in batch]
        for step, work in zip(batch, works, strict=True):
            try:
                result = await (cancelled_at_some_time(work, dice) if dice.random() < CANCELLED else work)
            except (asyncio.CancelledError, TimeoutError):
                step.spoil()
                spoilt.append(step)
                cancelled += 1
                continue
            assert np.array_equal(result, step.expected), f"step {number}: {step.kind} of {step.x.nbytes} B"
            right += 1
        if number % 100 == 0:
            await rt.barrier()
            assert all(step.still_spoilt() for step in spoilt), "the runtime wrote where it had no business any more"
            spoilt.clear()
    await rt.barrier()
    return right, cancelled


@pytest.mark.parametrize("front", ASYNC_FRONTS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_thousand_steps_with_every_tenth_cancelled(size: int, front: str) -> None:
    steps = 1000
    for right, cancelled in ranks.results(size, long_run, front=front, args=(steps, size), timeout=60):
        assert right + cancelled == steps
        assert cancelled > steps / 100, "many are too fast to be cancelled, but not nearly all"


async def cancel_while_waiting(rt: Any, group: Any, ctl: ranks.Ctl) -> list[bool]:
    """Rank 0 calls, is cancelled and overwrites its arrays long before rank 1 comes."""
    found = []
    for number, (kind, place, nbytes) in enumerate(
        (kind, place, nbytes)
        for kind in ("all_sum", "all_gather", "sum_scatter", "broadcast")
        for place in ("fresh", "out", "in place")
        for nbytes in (4, 65540, 4 << 20)
    ):
        step = Step(2 * number + 1, nbytes, kind, place, group.rank(), group.size())  # odd: rank 1 is root
        if group.rank() == 0:
            task = asyncio.ensure_future(as_coroutine(step.start(rt)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            step.spoil()
            ctl.tell("cancelled")
            await rt.barrier()
            found.append(step.still_spoilt())
        else:
            ctl.hear()
            found.append(bool(np.array_equal(await step.start(rt), step.expected)))
            await rt.barrier()
    return found


@pytest.mark.parametrize("front", ASYNC_FRONTS)
def test_the_memory_is_free_the_moment_the_cancellation_arrives(front: str) -> None:
    with ranks.Ranks(2, cancel_while_waiting, front=front) as world:
        for _ in range(36):
            world.hear(0)
            world.tell(1, "go on")
        outcomes = world.wait()
    assert [outcome.value for outcome in outcomes] == [[True] * 36] * 2, "\n".join(map(str, outcomes))


async def cancel_point_to_point(rt: Any, group: Any, ctl: ranks.Ctl) -> list[bool]:
    """Cancelled sends arrive all the same; a cancelled receive swallows its message."""
    large, found = np.arange(1 << 20, dtype=np.float32), []
    for cancel_send in (True, False):
        if group.rank() == 0:
            x = large.copy()
            task = asyncio.ensure_future(as_coroutine(rt.send(x, 1)))
            await asyncio.sleep(0)
            if cancel_send:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                x.fill(GARBAGE)
            ctl.tell("sent")
            if not cancel_send:
                await task
            await rt.send(large + 1, 1)
            found.append(True)
        else:
            out = np.zeros_like(large)
            if cancel_send:
                ctl.hear()
                found.append(bool(np.array_equal(await rt.recv_like(large, 0), large)))
            else:
                task = asyncio.ensure_future(as_coroutine(rt.recv_like(large, 0, out=out)))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                out.fill(GARBAGE)
            found.append(bool(np.array_equal(await rt.recv_like(large, 0), large + 1)))
            found.append(cancel_send or bool((out == GARBAGE).all()))
    await rt.barrier()
    return found


@pytest.mark.parametrize("front", ASYNC_FRONTS)
def test_cancelled_send_and_recv(front: str) -> None:
    with ranks.Ranks(2, cancel_point_to_point, front=front) as world:
        for _ in range(2):
            world.hear(0)
            world.tell(1, "sent")
        outcomes = world.wait()
    assert [outcome.value for outcome in outcomes] == [[True] * 2, [True] * 5], "\n".join(map(str, outcomes))


async def await_again(rt: Any, group: Any, ctl: ranks.Ctl) -> list[float]:
    """A work whose await was cancelled still gives its result, to others that await it too."""
    x = np.full(70_000, group.rank() + 1, np.float32)
    work = rt.all_sum(x)
    tasks = [asyncio.ensure_future(as_coroutine(work)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    results = [float(each[-1]) for each in found if not isinstance(each, BaseException)]
    return [*results, float((await work)[-1])]


@pytest.mark.parametrize("front", ASYNC_FRONTS)
def test_a_cancelled_work_may_be_awaited_again(front: str) -> None:
    for found in ranks.results(2, await_again, front=front):
        assert len(found) >= 3 and set(found) == {3.0}


async def cancel_before_the_group(rt: Any, group: Any, ctl: ranks.Ctl, how: str) -> list[float]:
    """Rank 0 cancels what it called before the group has formed; rank 1 starts to form it only after that."""
    assert group is None
    x = np.array([1.0, 2.0], np.float32)
    if int(ctl.hear()) == 0:
        calls: dict[str, Callable[[], Awaitable[Any]]] = {"init": rt.init, "all_sum": lambda: rt.all_sum(x)}
        other = asyncio.ensure_future(rt.init())
        task = asyncio.ensure_future(as_coroutine(calls[how]()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):
                await task
        x.fill(GARBAGE)
        ctl.tell("cancelled")
        await other
    else:
        await rt.init()
        if how == "all_sum":
            assert (await rt.all_sum(x)).tolist() == [2.0, 4.0]
    return (await rt.all_sum(np.array([1.0]))).tolist()


@pytest.mark.parametrize("front", ASYNC_FRONTS)
@pytest.mark.parametrize("how", ["init", "all_sum"])
def test_cancel_before_the_group_has_formed(how: str, front: str) -> None:
    with ranks.Ranks(2, cancel_before_the_group, front=front, args=(how,), init=False) as world:
        world.tell(0, 0)
        world.hear(0)
        world.tell(1, 1)
        outcomes = world.wait()
    assert [outcome.value for outcome in outcomes] == [[2.0], [2.0]], "\n".join(map(str, outcomes))
