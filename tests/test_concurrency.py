"""Several works, tags and groups at once, over real ranks and all front ends.

May live here: send and recv, works in flight together, sub-groups. May not: what single collectives compute (``test_collectives``).
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from expected import reduced, same, sample
from ranks import FRONTS, in_order, results

from rt.dtypes import DType, Op

Array = np.ndarray[Any, Any]
LOOPS = FRONTS[1:]
fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", LOOPS)


# ---- send and recv --------------------------------------------------------------------------------------------------------------------


async def tags(rt: Any, group: Any, ctl: Any) -> None:
    """Messages under several tags are received in another order than they were sent; under one tag the order holds."""
    me, count, tag_count, each = group.rank(), 500, 4, 3
    payload = {(tag, i): np.full(count, tag * 10 + i, np.int32) for tag in range(tag_count) for i in range(each)}
    if me == 0:
        await in_order([rt.send(payload[tag, i], 1, tag=tag) for i in range(each) for tag in range(tag_count)])
    elif me == 1:
        for tag in reversed(range(tag_count)):
            for i in range(each):
                same(await rt.recv(count, np.int32, 0, tag=tag), payload[tag, i], tag, i)
    same(await rt.all_sum(1), np.asarray(group.size()))


@fronts
def test_tags(front: str) -> None:
    results(3, tags, front=front)


async def exchange(rt: Any, group: Any, ctl: Any, counts: Any) -> None:
    """Both send before either receives."""
    me = group.rank()
    for count in counts:
        mine, theirs = (np.full(count, 1 + r, np.float32) for r in (me, 1 - me))
        if ctl.front == "sync":
            await rt.send(mine, 1 - me)
            got = await rt.recv_like(mine, 1 - me)
        else:
            _, got = await asyncio.gather(rt.send(mine, 1 - me), rt.recv_like(mine, 1 - me))
        same(got, theirs, count)


@fronts
def test_both_send_first(front: str) -> None:
    small = (1, 1000, 16_300)  # a little under 64 KiB is on its way before the receiver has called
    results(2, exchange, front=front, args=(small if front == "sync" else (*small, 16_384, 16_385, 1_000_003),))


async def large_send(rt: Any, group: Any, ctl: Any) -> None:
    me, count = group.rank(), 300_001
    for source, target in ((0, 1), (1, 0), (0, 2), (2, 1)):
        x = np.arange(count, dtype=np.float64) + source
        if me == source:
            await rt.send(x, target)
        elif me == target:
            same(await rt.recv(count, np.float64, source), x, source, target)


@fronts
def test_large_send(front: str) -> None:
    results(3, large_send, front=front)


async def many_in_flight(rt: Any, group: Any, ctl: Any) -> None:
    """Between all pairs and in both directions, received in any order, among collectives."""
    me, size, each = group.rank(), group.size(), 8
    others = [r for r in range(size) if r != me]

    def message(source: int, target: int, i: int) -> Array:
        return np.full((i * 4001,), source * 100 + target * 10 + i, np.int32)

    sends = [rt.send(message(me, r, i), r, tag=i % 3) for i in range(each) for r in others]
    total = rt.all_sum(np.ones(50_000))
    recvs = {(r, i): rt.recv(i * 4001, np.int32, r, tag=i % 3) for i in range(each) for r in reversed(others)}
    after = rt.all_gather(np.array([me]))
    for (source, i), work in reversed(recvs.items()):
        same(await work, message(source, me, i), source, i)
    same(await after, np.arange(size))
    same(await total, np.full(50_000, float(size)))
    await in_order(sends)


@loops
def test_many_sends_in_flight(front: str) -> None:
    results(3, many_in_flight, front=front)


# ---- several works and groups at once -------------------------------------------------------------------------------------------------


async def hundred(rt: Any, group: Any, ctl: Any) -> None:
    """``asyncio.gather`` of 100 collectives of all kinds, from empty to 1.6 MB."""
    me, size = group.rank(), group.size()
    inputs = [[sample(DType.INT32, (i * 41 if i % 10 else i * 4000) // size * size, r, i) for r in range(size)] for i in range(100)]
    calls = (rt.all_sum, rt.all_gather, rt.sum_scatter, rt.broadcast, rt.all_max)
    found = await asyncio.gather(*[calls[i % 5](inputs[i][me]) for i in range(100)])
    for i, got in enumerate(found):
        total, block = reduced(DType.INT32, Op.SUM, inputs[i]), len(inputs[i][0]) // size
        expected = (
            total, np.concatenate(inputs[i]), total[me * block : (me + 1) * block], inputs[i][0], reduced(DType.INT32, Op.MAX, inputs[i])
        )[i % 5]  # fmt: skip
        same(got, expected, i)


@loops
@pytest.mark.parametrize("size", [2, 3])
def test_gather_of_a_hundred_collectives(front: str, size: int) -> None:
    results(size, hundred, front=front)


async def opposite(rt: Any, group: Any, ctl: Any) -> None:
    one, two = await group.split(0), await group.split(0)
    for count in (1, 5000, 300_000):
        for _ in range(10):
            groups = (one, two) if group.rank() else (two, one)
            works = {g: rt.all_sum(np.full(count, 1.0 if g is one else 10.0), group=g) for g in groups}
            for g in groups:
                same(await works[g], np.full(count, 2.0 if g is one else 20.0), count)


@loops
def test_two_groups_in_opposite_order(front: str) -> None:
    results(2, opposite, front=front)


async def splits(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()

    async def members(sub: Any) -> list[int]:
        return [int(r) for r in await rt.all_gather(me, group=sub)] if sub.size() > 1 else [me]

    odd = await group.split(me % 2)
    assert await members(odd) == [r for r in range(size) if r % 2 == me % 2] and odd.rank() == me // 2
    backwards = await group.split(7, size - me)
    assert await members(backwards) == list(reversed(range(size))) and backwards.rank() == size - 1 - me
    assert await members(await group.split(7, 5)) == list(range(size)), "ties by rank"
    assert await members(await group.split(0, -1 - me)) == list(range(size)), "a negative key means the rank"
    mixed = await group.split(0, 0 if me == size - 1 else -1)  # the last one's key ties with rank 0's
    assert await members(mixed) == [0, size - 1, *range(1, size - 1)]
    low, high = await group.split(int(me >= 2)), await group.split(int(me >= 1))  # they overlap
    assert await members(low) == ([0, 1] if me < 2 else [2, 3])
    assert await members(high) == ([0] if me < 1 else [1, 2, 3])
    alone = await group.split(me)
    assert (alone.rank(), alone.size()) == (0, 1)
    same(await alone.all_sum(np.arange(3)), np.arange(3))
    assert (await (await alone.split(0)).split(1)).size() == 1
    nested = await (await backwards.split(int(backwards.rank() < 3))).split(0, me)
    assert await members(nested) == ([1, 2, 3] if me else [0])
    far = await group.split(-(2**63) if me in (0, 2) else 2**63 - 1)
    assert await members(far) == ([0, 2] if me in (0, 2) else [1, 3])
    same(await far.broadcast(np.full(3, me), 1), np.full(3, 2 if me in (0, 2) else 3))
    if me in (0, 2):
        same(await far.recv_like(np.empty(5), 0) if far.rank() else await far.send(np.ones(5), 1), np.ones(5))


@fronts
def test_split(front: str) -> None:
    results(4, splits, front=front)


async def split_order(rt: Any, group: Any, ctl: Any) -> None:
    """Groups of splits that were under way together are told apart by the order of the calls, in whatever order they are awaited."""
    me = group.rank()
    first, second = group.split(0), group.split(0)
    if me:
        b, a = await second, await first
    else:
        a, b = await first, await second
    works = [a.all_sum(1), b.all_sum(10)] if me else [b.all_sum(10), a.all_sum(1)]
    assert sorted(int(x) for x in await in_order(works)) == [2, 20]


@loops
def test_splits_under_way_together(front: str) -> None:
    results(2, split_order, front=front)


async def concurrent_groups(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    pair, ring = await group.split(me // 2), await group.split(0, size - me)
    for i in range(20):
        count = (1, 3000, 120_000)[i % 3]
        works = [
            rt.all_sum(np.full(count, 1.0)), pair.all_sum(np.full(count, float(me))), ring.all_gather(np.full(count, me)),
            pair.broadcast(np.full(count, me), 1), rt.all_max(np.full(5, me)),
        ]  # fmt: skip
        partner = me + 1 - 2 * (me % 2)
        expected = [
            np.full(count, float(size)), np.full(count, float(me + partner)), np.repeat(np.arange(size)[::-1], count),
            np.full(count, me | 1), np.full(5, size - 1),
        ]  # fmt: skip
        for k in sorted(range(5), key=lambda k: (k * (3 + me)) % 5):
            same(await works[k], expected[k], i, k)


@loops
def test_groups_at_once(front: str) -> None:
    results(4, concurrent_groups, front=front)

