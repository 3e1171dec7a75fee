"""Python objects between ranks: any size, without copies, in call order.

May live here: the object calls over real processes, under every front end. May not: cancellation and errors (``test_object_failures``),
arrays as such (``test_collectives``), signatures of the calls (``test_api``).
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
import threading
import types
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
import ranks
from hosts import ranks_on, ring_as_mlx_writes_it, ring_file

import rt.sync
from rt import objects
from rt.aio import Work
from rt.objects import HEADER_BYTES, OUT_OF_BAND_BYTES, Message

fronts = pytest.mark.parametrize("front", ranks.FRONTS)
loops = pytest.mark.parametrize("front", ranks.FRONTS[1:])
Array = np.ndarray[Any, Any]

# Around what fits into a header (the counts and the pickle's own words take some of it), and around what goes out of band.
BYTES = (
    *(0, 1, 500), *range(HEADER_BYTES - 80, HEADER_BYTES + 20, 7), OUT_OF_BAND_BYTES - 1, OUT_OF_BAND_BYTES, OUT_OF_BAND_BYTES + 1,
    300_001, 4 << 20,
)  # fmt: skip
LARGE_BYTES = 64 << 20


_PERIOD = 251
_base = np.arange(_PERIOD, dtype=np.uint8)


def pattern(nbytes: int, seed: int) -> Array:
    """Bytes that tell where they come from: no power of two is a multiple of their period."""
    global _base
    if len(_base) < nbytes + _PERIOD:
        _base = np.resize(_base[:_PERIOD], 2 * nbytes + _PERIOD)
    return _base[seed % _PERIOD : seed % _PERIOD + nbytes].copy()


def nested(nbytes: int, seed: int) -> dict[str, Any]:
    """An object with arrays at several depths, in band and out of band, C and Fortran order, writable and not, and one met twice."""
    fixed = pattern(nbytes, seed)
    fixed.flags.writeable = False
    twice = pattern(nbytes, seed + 1)
    return {
        "text": "x" * (nbytes % 9000),
        "list": [fixed, (twice, [twice])],
        "fortran": np.asfortranarray(pattern(nbytes // 8 * 8, seed + 2).reshape(8, -1)),
        "strided": pattern(nbytes, seed + 3)[::2],
        "bytes": pattern(nbytes, seed + 4).tobytes(),
        "seed": seed,
    }


def check_nested(found: Any, nbytes: int, seed: int) -> None:
    expected = nested(nbytes, seed)
    assert list(found) == list(expected) and found["text"] == expected["text"] and found["seed"] == seed
    assert found["bytes"] == expected["bytes"]
    for name in ("fortran", "strided"):
        assert np.array_equal(found[name], expected[name])
    fixed, (twice, [again]) = found["list"]
    assert np.array_equal(fixed, expected["list"][0]) and np.array_equal(twice, expected["list"][1][0]) and again is twice
    assert found["fortran"].flags.f_contiguous


# ---- what arrives ---------------------------------------------------------------------------------------------------------------------


async def every_call(rt: Any, group: Any, ctl: ranks.Ctl, sizes: tuple[int, ...]) -> None:
    rank, size = group.rank(), group.size()
    for number, nbytes in enumerate(sizes):
        root = number % size
        mine = pattern(nbytes, rank)
        found = await rt.broadcast_object(mine if rank == root else None, root)
        assert np.array_equal(found, pattern(nbytes, root)) and (found is mine) == (rank == root)
        listed = await group.gather_objects(mine, root)
        assert (listed is None) == (rank != root)
        everything = await rt.all_gather_objects(mine)
        for each in (listed, everything):
            if each is not None:
                assert len(each) == size and each[rank] is mine
                assert all(np.array_equal(one, pattern(nbytes, r)) for r, one in enumerate(each))
        if rank == 0:
            assert await group.send_object(mine, size - 1, tag=number) is mine
        elif rank == size - 1:
            assert np.array_equal(await group.recv_object(0, tag=number), pattern(nbytes, 0))
    for nbytes in (10, 5000, OUT_OF_BAND_BYTES, 1 << 20):
        for seed, one in enumerate(await rt.all_gather_objects(nested(nbytes, rank))):
            check_nested(one, nbytes, seed)
    for strange in (None, "", 17, [], {1: {2: {3}}}, ValueError("an error is an object"), np.float32(3)):
        for one in await rt.all_gather_objects(strange if rank else "another"):
            assert one == "another" or repr(one) == repr(strange)


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_objects_of_any_size_arrive(size: int, front: str) -> None:
    ranks.results(size, every_call, front=front, args=(BYTES,), timeout=60)


@pytest.mark.namespaces
@pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")
@pytest.mark.parametrize("front", ["sync", "uvloop"])
def test_objects_arrive_where_only_neighbours_connect(front: str, tmp_path: Path) -> None:
    ring = ring_file(tmp_path, ring_as_mlx_writes_it(4))
    with netns.ring_of_hosts(4) as hosts, ranks_on(hosts, every_call, ring, front=front, args=((1, 5000, 300_001),)) as world:
        ranks.succeeded(world.wait())


async def one_large(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    mine = pattern(LARGE_BYTES, group.rank())
    assert np.array_equal(await rt.broadcast_object(mine, 1), pattern(LARGE_BYTES, 1))
    found = await (rt.send_object(mine, 1) if group.rank() == 0 else rt.recv_object(0))
    assert np.array_equal(found, pattern(LARGE_BYTES, 0))


@fronts
def test_large_objects_arrive(front: str) -> None:
    ranks.results(2, one_large, front=front)


async def many_buffers(rt: Any, group: Any, ctl: ranks.Ctl, count: int) -> None:
    """More buffers than the header has room for sizes."""

    def arrays(seed: int) -> list[Array]:
        return [np.full(OUT_OF_BAND_BYTES + i % 3, (i + seed) % 251, np.uint8) for i in range(count)]

    found = [*await rt.all_gather_objects(arrays(group.rank())), await rt.broadcast_object(arrays(9) if group.rank() == 1 else None, 1)]
    listed = await rt.gather_objects(arrays(group.rank()))
    found += listed or []
    for seed, one in zip((0, 1, 9, 0, 1), found, strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(one, arrays(seed), strict=True))


@pytest.mark.parametrize("front", ["sync", "uvloop"])
def test_an_object_of_very_many_buffers(front: str) -> None:
    ranks.results(2, many_buffers, front=front, args=(HEADER_BYTES // 8 + 1,))


def test_an_object_in_a_group_of_one_is_returned() -> None:
    thing = object()  # cannot even be pickled
    assert rt.sync.broadcast_object(thing) is thing
    assert rt.sync.gather_objects(thing) == [thing] == rt.sync.all_gather_objects(thing)
    with pytest.raises(ValueError, match="Cannot send to a singleton group"):
        rt.sync.send_object(thing, 0)
    with pytest.raises(ValueError, match="Cannot recv from a singleton group"):
        rt.sync.recv_object(0)
    with pytest.raises(ValueError, match="Invalid root=1"):
        rt.sync.broadcast_object(thing, 1)


# ---- without copies -------------------------------------------------------------------------------------------------------------------


class Memory:
    """Gives one buffer out of band and keeps what it is rebuilt from: on both sides the very memory that is sent or was received."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Memory, (pickle.PickleBuffer(self.buffer),)


def address(buffer: Any) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


def test_buffers_are_sent_from_where_they_lie_and_stay_where_they_land() -> None:
    array = np.zeros(OUT_OF_BAND_BYTES, np.uint8)
    sent = Message.of([Memory(array), Memory(bytes(OUT_OF_BAND_BYTES)), np.zeros(OUT_OF_BAND_BYTES - 1, np.uint8)])
    assert address(sent.buffers[0]) == address(array) and len(sent.buffers) == 2
    received = Message.arriving(sent.header)
    assert not received.first and len(sent.rest()) == 3, "the third array went into the pickle, which therefore follows"
    received.allocate()
    for mine, theirs in zip(received.rest(), sent.rest(), strict=True):
        mine[:] = theirs
    writable, fixed, small = received.load("recv_object", 0)
    assert address(writable.buffer) == address(received.buffers[0]) and address(fixed.buffer) == address(received.buffers[1])
    assert memoryview(fixed.buffer).readonly and not memoryview(writable.buffer).readonly and small.flags.writeable


async def keep_memory(rt: Any, group: Any, ctl: ranks.Ctl) -> int:
    """What an object of one large array costs in memory, beyond the array: bytes at the peak."""
    nbytes = LARGE_BYTES
    await rt.broadcast_object(np.ones(100_000) if group.rank() == 0 else None)
    thing = np.ones(nbytes, np.uint8) if group.rank() == 0 else None
    await rt.barrier()
    gc.collect()
    before = peak_bytes()
    thing = await rt.broadcast_object(thing)
    assert int(thing.sum()) == nbytes and thing.flags.writeable
    return peak_bytes() - before - (nbytes if group.rank() else 0)


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process' memory is read from Linux' /proc")
@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_no_side_holds_a_copy(front: str) -> None:
    for extra in ranks.results(2, keep_memory, front=front):
        assert extra < LARGE_BYTES // 4


# ---- order ----------------------------------------------------------------------------------------------------------------------------


async def in_call_order(rt: Any, group: Any, ctl: ranks.Ctl, seed: int) -> None:
    """Objects of all sizes and ordinary collectives, twelve calls in flight at a time (where there is a loop), awaited in any order."""
    common, dice = random.Random(seed), random.Random(f"{seed} {group.rank()}")
    rank, size = group.rank(), group.size()
    for _ in range(20):
        calls = []
        for number in range(12):
            nbytes = common.choice((0, 100, 5000, 70_000, 1 << 20))
            root, kind = common.randrange(size), common.choice(("broadcast", "gather", "all_gather", "array", "p2p", "p2p array"))
            mine = (number, rank, pattern(nbytes, number + rank))
            if kind == "broadcast":
                expected, work = (number, root), rt.broadcast_object(mine if rank == root else None, root)
            elif kind == "gather":
                expected, work = [(number, r) for r in range(size)] if rank == root else None, rt.gather_objects(mine, root)
            elif kind == "all_gather":
                expected, work = [(number, r) for r in range(size)], rt.all_gather_objects(mine)
            elif kind == "array":
                expected, work = float(size * number), rt.all_sum(np.full(nbytes // 8 + 1, float(number)))
            elif rank == root:
                expected = "sent"
                to = (root + 1) % size
                work = rt.send_object(mine, to) if kind == "p2p" else rt.send(np.full(nbytes // 8 + 1, float(number)), to)
            elif rank == (root + 1) % size:
                expected = (number, root) if kind == "p2p" else float(number)
                work = rt.recv_object(root) if kind == "p2p" else rt.recv((nbytes // 8 + 1,), np.float64, root)
            else:
                continue
            calls.append((expected, work, nbytes))
        dice.shuffle(calls)
        for expected, work, nbytes in calls:
            check_call(expected, await work, nbytes)


async def beside_a_thread(rt: Any, group: Any, ctl: ranks.Ctl) -> int:
    """Calls of several stages where a third thread exists, so that no rank wakes after a while to ask whether two wait for each other."""
    ended = threading.Event()
    threading.Thread(target=ended.wait).start()
    nbytes = 0
    for _ in range(100):
        found = await rt.all_gather_objects(pattern(1 << 20, group.rank()))
        nbytes += sum(each.nbytes for each in found)
    ended.set()
    return nbytes


@fronts
def test_stages_that_begin_when_others_end_go_on(front: str) -> None:
    assert ranks.results(2, beside_a_thread, front=front) == [200 << 20] * 2


def test_two_orders_that_end_each_others_works_do_not_wait_for_each_other() -> None:
    """Where one submits, works of the other end, and the other way round."""
    group, met = types.SimpleNamespace(world=None, engine=None, failure=None), threading.Barrier(2)
    orders, flying = [objects.Order(), objects.Order()], [Work(group), Work(group)]  # type: ignore[arg-type]

    def under_way(work: Work) -> objects.Stages:
        header = Work(group)  # type: ignore[arg-type]
        header.finish(None)
        yield [header]
        return [work], lambda: None

    def submitting(other: Work) -> objects.Stages:
        met.wait(20)
        other.finish(None)
        return (yield from under_way(other))

    def begin(which: int, stages: objects.Stages) -> Work:
        return objects.ObjectWork(group, "x", orders[which], None).begin(stages)  # type: ignore[arg-type]

    works = [begin(which, under_way(flying[which])) for which in range(2)]
    threads = [threading.Thread(target=begin, args=(which, submitting(flying[1 - which])), daemon=True) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and all(work.done() for work in works)


def check_call(expected: Any, found: Any, nbytes: int) -> None:
    if isinstance(expected, list):
        for one, single in zip(expected, found, strict=True):
            check_call(one, single, nbytes)
    elif isinstance(expected, tuple):
        assert (found[0], found[1]) == expected and np.array_equal(found[2], pattern(nbytes, sum(expected)))
    elif isinstance(expected, float):
        assert (found == expected).all()
    elif expected is None:
        assert found is None


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_objects_and_arrays_in_flight_together(size: int, front: str) -> None:
    ranks.results(size, in_call_order, front=front, args=(size,), timeout=60)


async def a_hundred(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    size = group.size()
    works = [rt.broadcast_object(("number", i, pattern((i % 5) * 40_000, i)), i % size) for i in range(100)]
    for i, (name, number, array) in enumerate(await asyncio.gather(*works)):
        assert (name, number) == ("number", i) and np.array_equal(array, pattern((i % 5) * 40_000, i))


@loops
def test_a_hundred_objects_at_once(front: str) -> None:
    ranks.results(3, a_hundred, front=front)


async def two_threads(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    """Objects from the loop and, blocking, from another thread at the same time, on two groups."""
    import rt.sync as blocking

    other = await group.split(0)

    def in_thread() -> None:
        for i in range(50):
            thing = blocking.broadcast_object(pattern(100_000, i), i % 2, group=other)
            assert np.array_equal(thing, pattern(100_000, i))

    ended = asyncio.get_running_loop().run_in_executor(None, in_thread)
    for i in range(50):
        assert np.array_equal(await rt.broadcast_object(pattern(100_000, i + 1), i % 2), pattern(100_000, i + 1))
    await ended


@loops
def test_objects_of_a_loop_and_a_thread(front: str) -> None:
    ranks.results(2, two_threads, front=front)
