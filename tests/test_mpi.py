"""The behaviour of groups on backend ``mpi``, under each MPI library: what the ring's suite asserts, with its bodies.

May live here: which bodies of other test modules run on MPI, and how large; what only MPI has. May not: bodies that the ring runs too
(they stay in their modules), failures (``test_mpi_failures``), the launcher (``test_mpi_launch``).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_collectives
import test_concurrency
import test_family
import test_fused
import test_gradients
import test_objects
from mpi import libraries, results

fronts = pytest.mark.parametrize("front", ["sync", "asyncio"])


async def sums(rt: Any, group: Any, ctl: Any) -> str:
    """Of every way a call can take: at once, in turns of the loop, by the group's thread, in place."""
    me, size = group.rank(), group.size()
    for count in (1, 1000, 300_000, 3_000_000):
        x = np.arange(count, dtype=np.float32) % 100 + me
        expected = (np.arange(count, dtype=np.float32) % 100) * size + sum(range(size))
        assert np.array_equal(await rt.all_sum(x), expected), count
        out = np.empty_like(x)
        for _ in range(3):
            assert await rt.all_sum(x, out=out) is out
            assert np.array_equal(out, expected), count
        assert await rt.all_sum(x, out=x) is x
        assert np.array_equal(x, expected), count
    return type(group.real._core if ctl.front == "sync" else group._core).__name__


@libraries
@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce(library: str, front: str, size: int) -> None:
    assert results(size, sums, library=library, front=front) == ["MpiGroup"] * size


SUITE: list[tuple[Callable[..., Any], int, tuple[Any, ...]]] = [
    (test_collectives.every_reduction, 1, (((7,),),)),
    (test_collectives.every_reduction, 2, (test_collectives.SHAPES,)),
    (test_collectives.every_reduction, 3, (((7,), (1003,)),)),
    (test_collectives.every_reduction, 4, (((7,), (1003,)),)),
    (test_collectives.every_move, 3, ()),
    (test_collectives.large, 2, ()),
    (test_collectives.corners, 4, ()),
    (test_collectives.zeros, 3, ()),
    (test_collectives.halves, 4, ()),
    (test_collectives.arithmetic, 2, ()),
    (test_collectives.any_memory, 2, ()),
    (test_collectives.scalars, 2, ()),
    (test_collectives.outputs, 3, ()),
    (test_collectives.overlaps, 2, ()),
    (test_collectives.neighbours_in_memory, 2, ()),
    (test_family.plain, 3, (test_family.ROWS, 0)),
    (test_family.every_dtype, 3, ()),
    (test_family.halves, 4, ()),
    (test_family.sub_groups, 4, ()),
    (test_family.refusals, 2, ()),
    (test_family.counted, 3, (0,)),
    (test_family.counts_refused, 2, ()),
    (test_family.prefixes, 4, ()),
    (test_family.around, 3, ()),
    (test_concurrency.tags, 3, ()),
    (test_concurrency.exchange, 2, ((0, 1, 16_383),)),
    (test_concurrency.large_send, 3, ()),
    (test_concurrency.splits, 4, ()),
    (test_fused.sums, 3, ()),
    (test_fused.outs, 2, ()),
    (test_gradients.trees, 2, ()),
    (test_gradients.of_groups, 3, ()),
    (test_objects.every_call, 3, (test_objects.BYTES[:6],)),
    (test_objects.in_call_order, 2, (1,)),
]


LOOPS_SUITE: list[tuple[Callable[..., Any], int, tuple[Any, ...]]] = [  # several calls at once, which cannot all block
    (test_concurrency.many_in_flight, 3, ()),
    (test_concurrency.hundred, 3, ()),
    (test_concurrency.opposite, 2, ()),
    (test_concurrency.split_order, 2, ()),
    (test_concurrency.concurrent_groups, 4, ()),
    (test_objects.two_threads, 2, ()),
]


def named(suite: list[tuple[Callable[..., Any], int, tuple[Any, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("body", "size", "args"), suite, ids=[f"{b.__module__[5:]}.{b.__name__}-{n}" for b, n, _ in suite])


@libraries
@fronts
@named(SUITE)
def test_as_on_the_ring(library: str, front: str, body: Callable[..., Any], size: int, args: tuple[Any, ...]) -> None:
    results(size, body, library=library, front=front, args=args)


@libraries
@named(LOOPS_SUITE)
def test_as_on_the_ring_in_a_loop(library: str, body: Callable[..., Any], size: int, args: tuple[Any, ...]) -> None:
    results(size, body, library=library, front="asyncio", args=args)


async def cancelled(rt: Any, group: Any, ctl: Any, count: int) -> float:
    """A cancelled await ends when the collective has, and the memory is the caller's again then."""
    x, out = np.ones(count, np.float32), np.zeros(count, np.float32)
    await rt.barrier()
    if group.rank() == 0:
        task = asyncio.ensure_future(as_coroutine(rt.all_sum(x, out=out)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done(), "the other rank has not called"
        await group.send_object("call", 1)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert out[-1] == group.size(), "MPI has written it by now"
    else:
        await group.recv_object(0)
        await rt.all_sum(x, out=out)
    return float(await rt.all_sum(1.0))


async def as_coroutine(work: Any) -> Any:
    return await work


@libraries
@pytest.mark.parametrize("count", [1000, 3_000_000])
def test_a_cancelled_await_waits_for_mpi(library: str, count: int) -> None:
    assert results(2, cancelled, library=library, front="asyncio", args=(count,)) == [2.0, 2.0]


async def far_tags(rt: Any, group: Any, ctl: Any) -> None:
    """Tags that MPI has not, beside some that it has."""
    tags = (0, 1, 2**15 - 1, 2**15, 2**62, -1)
    x = np.arange(3)
    if group.rank() == 0:
        for tag in tags:
            await rt.send(x + tag % 1000, 1, tag=tag)
    else:
        for tag in reversed(tags):
            assert np.array_equal(await rt.recv(3, x.dtype, 0, tag=tag), x + tag % 1000), tag


@libraries
@fronts
def test_tags_of_64_bits(library: str, front: str) -> None:
    results(2, far_tags, library=library, front=front)


async def in_pieces(rt: Any, group: Any, ctl: Any) -> None:
    """Calls of more items than MPI counts, made to be of fewer."""
    from rt import mpi_group
    from transports import mpi

    mpi.ITEMS_MOST = mpi_group.ITEMS_MOST = 2_000_000  # type: ignore[misc]
    me, size, count = group.rank(), group.size(), 5_000_001
    of_rank = [np.arange(count, dtype=np.float32) % 100 + rank for rank in range(size)]
    total = np.sum(of_rank, axis=0)
    x = of_rank[me]
    for _ in range(2):
        assert np.array_equal(await rt.all_sum(x), total)
    assert np.array_equal(await rt.all_reduce(x.astype(np.uint8), "max"), of_rank[-1].astype(np.uint8)), "an operator of ours"
    assert np.array_equal(await rt.all_sum(x.astype(np.float16)), total.astype(np.float16)), "widened"
    reduced = await rt.reduce(x, root=1)
    assert np.array_equal(reduced, total) if me == 1 else reduced is None
    assert np.array_equal(await rt.broadcast(x, root=size - 1), of_rank[-1])
    assert np.array_equal(await rt.scan(x), np.sum(of_rank[: me + 1], axis=0))
    assert np.array_equal(await rt.exscan(x), np.sum([x * 0, *of_rank[:me]], axis=0))
    if me == 0:
        await rt.send(x, 1)
    elif me == 1:
        assert np.array_equal(await rt.recv(count, x.dtype, 0), of_rank[0])
    out = x.copy()
    assert await rt.all_sum(out, out=out) is out and np.array_equal(out, total)


@libraries
@fronts
def test_calls_in_pieces(library: str, front: str) -> None:
    results(3, in_pieces, library=library, front=front)


async def beyond_two_gib(rt: Any, group: Any, ctl: Any, count: int) -> None:
    """More items than a C int counts, and more bytes."""
    x = np.full(count, group.rank() + 1, np.uint8)
    x[-1] = 100
    assert await rt.all_sum(x, out=x) is x
    assert x[0] == x[count // 2] == x[-2] == 3 and x[-1] == 200
    x[-1] = group.rank()
    assert (await rt.broadcast(x, root=1, out=x))[-1] == 1
    if group.rank() == 0:
        await rt.send(x, 1)
    else:
        x[:] = 0
        await rt.recv_like(x, 0, out=x)
        assert x[0] == x[count // 2] == 3 and x[-1] == 1


def _free_gib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20


@libraries
@pytest.mark.skipif(sys.platform != "linux" or _free_gib() < 14, reason="takes 14 GiB of free memory")
def test_more_than_two_gib(library: str) -> None:
    results(2, beyond_two_gib, library=library, front="asyncio", args=(2**31 + 12345,), timeout=240)
