"""Works and groups as objects, and who may move them: loops one after the other, threads, both at once.

May live here: those, over real ranks. May not: several works of one thread (``test_concurrency``), results (``test_collectives``).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, Ranks, results

import rt
import rt.sync

fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", FRONTS[1:])


# ---- works and groups as objects ------------------------------------------------------------------------------------------------------


async def _value(work: Any) -> Any:
    return await work


async def work_object(rt: Any, group: Any, ctl: Any) -> None:
    work = rt.all_sum(np.ones(4, np.float32))
    assert isinstance(work, rt.Work)
    first, second = await work, await work
    assert first is second and work.done()
    both = await asyncio.gather(_value(work), _value(work))
    assert both[0] is both[1] is first
    assert repr(work) == f"<rt.Work {work.describe()} done>" and work.describe() == "all_sum #0 (float32, 16 B)"
    if group.rank():
        await rt.barrier()
        await rt.send(np.ones(3, np.float32), 0)
        return
    waiting = rt.recv(3, np.float32, 1)
    assert not waiting.done() and repr(waiting) == "<rt.Work recv #0 (float32, 12 B) in flight>", waiting
    with pytest.raises(AttributeError, match=r"no 'add_done_callback'; .* no asyncio.Future: .* `asyncio.ensure_future\(work\)`"):
        await asyncio.wait([waiting])
    with pytest.raises(AttributeError, match=r"a Work has no 'shape'; its result may have: `await` it first, it is <rt.Work recv #0 "):
        _ = waiting.shape
    assert not hasattr(waiting, "__array__")
    found = await asyncio.gather(_value(waiting), _value(waiting), rt.barrier())
    assert found[0] is found[1]


@loops
def test_a_work_may_be_awaited_again(front: str) -> None:
    results(2, work_object, front=front)


async def names(rt: Any, group: Any, ctl: Any) -> list[str]:
    sub = await group.split(5)
    return [repr(group), repr(sub), repr(await sub.split(group.rank()))]


@fronts
def test_what_groups_are_called(front: str) -> None:
    module = "rt.sync" if front == "sync" else "rt"
    for rank, found in enumerate(results(2, names, front=front)):
        assert found[0] == f"<{module}.Group world: rank {rank} of 2>"
        assert found[1] == f"<{module}.Group world.split(color=5): rank {rank} of 2>"
        assert found[2] == f"<{module}.Group world.split(color=5).split(color={rank}): rank 0 of 1>"


# ---- loops and threads ----------------------------------------------------------------------------------------------------------------


async def blocking_inside(art: Any, group: Any, ctl: Any) -> None:
    me = group.rank()
    if me == 0:
        work = art.all_sum(np.ones(3))
        face = rt.sync.Group(group._core)
        for call in (lambda: rt.sync.all_sum(1), lambda: face.split(0), lambda: face.average_gradients([np.ones(2)])):
            with pytest.raises(RuntimeError, match=r"await rt"):
                call()
        ctl.tell("refused")
    else:
        ctl.hear()
        work = art.all_sum(np.ones(3))
    assert (await work).tolist() == [2.0] * 3
    assert int(rt.sync.all_sum(1)) == 2, "nothing is in flight: allowed"


@loops
def test_blocking_call_inside_a_loop_with_works_in_flight(front: str) -> None:
    with Ranks(2, blocking_inside, front=front) as ranks:
        assert ranks.hear(0) == "refused"
        ranks.tell(1, "go")
        for outcome in ranks.wait():
            assert outcome.error is None and outcome.returncode == 0, outcome


async def two_loops(face: Any, group: Any, ctl: Any) -> None:
    """This body runs without a loop, so it may make its own: a work outlives its loop and is finished by the next."""
    me, left = face.rank(), []
    core_group = rt.Group(group._core)

    async def first() -> None:
        assert int(await core_group.all_sum(1)) == 2
        left.append(core_group.recv_like(np.ones(70_000), 1 - me))
        left.append(core_group.all_sum(np.ones(300_000)))

    async def second() -> None:
        sent = core_group.send(np.ones(70_000), 1 - me)
        assert (await left[1])[-1] == 2 and (await left[0])[-1] == 1
        await sent

    asyncio.run(first())
    asyncio.run(second())
    assert int(await face.all_sum(3)) == 6
    asyncio.run(_run_again(core_group))


async def _run_again(group: Any) -> None:
    assert int(await group.all_sum(2)) == 4


def test_asyncio_run_twice_with_one_group() -> None:
    results(2, two_loops)


def _in_threads(count: int, target: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            target(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


async def threads_blocking(face: Any, group: Any, ctl: Any) -> None:
    """Three threads on one group: messages are told apart by tag, and equal collectives may meet in any order."""
    me = group.rank()

    def work(index: int) -> None:
        for i in range(60):
            count = (1, 500, 40_000)[i % 3]
            assert rt.sync.all_sum(np.ones(100))[-1] == 2
            mine = np.full(count, index * 1000 + i * 2 + me)
            if me == 0:
                rt.sync.send(mine, 1, tag=index)
                got = rt.sync.recv_like(mine, 1, tag=index)
            else:
                got = rt.sync.recv_like(mine, 0, tag=index)
                rt.sync.send(mine, 0, tag=index)
            assert (got == mine + 1 - 2 * me).all(), (index, i)

    _in_threads(3, work)
    assert int(await face.all_sum(1)) == 2


def test_three_threads_on_one_group() -> None:
    results(2, threads_blocking)


async def threads_beside_a_loop(face: Any, group: Any, ctl: Any) -> None:
    """Two blocking threads and the loop, each on tags and groups of its own, over the same links."""
    me = group.rank()
    groups = [await group.split(0) for _ in range(2)]

    def work(index: int) -> None:
        for i in range(40):
            x = np.full((3, 20_000)[i % 2], float(index + i))
            assert (rt.sync.all_sum(x, group=groups[index]) == 2 * x).all(), (index, i)

    threads = [asyncio.to_thread(work, index) for index in range(2)]

    async def in_loop() -> None:
        for i in range(40):
            x = np.full((5, 30_000)[i % 2], float(i))
            assert (await face.all_sum(x) == 2 * x).all(), i
            got, _ = await asyncio.gather(face.recv_like(x, 1 - me, tag=i), face.send(x, 1 - me, tag=i))
            assert (got == x).all()

    await asyncio.gather(in_loop(), *threads)


@loops
def test_threads_beside_a_loop(front: str) -> None:
    results(2, threads_beside_a_loop, front=front)
