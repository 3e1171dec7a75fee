"""What every collective returns, on real ranks under every front end, against NumPy.

May live here: results, for all dtypes, operators, layouts, sizes and groups. May not: disagreeing ranks, failures, arguments that are
refused for reasons other than memory (``test_api``).

Worlds cost time, so a body checks many calls in a loop; the label of a failed check says which.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import ranks
from ranks import FRONTS, in_order, results

from rt.dtypes import HALF, INEXACT, DType, Op, numpy_dtype, op_supported

Array = np.ndarray[Any, Any]
LOOPS = FRONTS[1:]
CASES = [(dtype, op) for dtype in DType for op in Op if op_supported(dtype, op)]
SHAPES = ((), (0,), (1,), (4, 0), (7,), (3, 5), (1003,))
fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", LOOPS)


# ---- data and what NumPy makes of it ------------------------------------------------------------------------------------------------


def sample(dtype: DType, shape: Any, rank: int, seed: int = 0) -> Array:
    """Items whose sums and products are exact in float32, so that the order of a reduction does not show; integers of any size."""
    rng = np.random.default_rng([seed, rank])
    to = numpy_dtype(dtype)
    if dtype in INEXACT:
        x = rng.integers(-7, 8, shape)
        return np.asarray(x + 1j * rng.integers(-7, 8, shape) if to.kind == "c" else x).astype(to)
    if dtype is DType.BOOL:
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    low, high = np.iinfo(to).min, np.iinfo(to).max
    return np.asarray(rng.integers(low, high, shape, to, endpoint=True))


def reduced(dtype: DType, op: Op, arrays: list[Array]) -> Array:
    """The reduction, rounded once."""
    to = arrays[0].dtype
    with np.errstate(all="ignore"):
        if dtype in HALF:
            return reduced(DType.FLOAT32, op, [x.astype(np.float32) for x in arrays]).astype(to)
        stack = np.stack(arrays)
        if op is Op.MEAN:
            total = np.asarray(stack.sum(axis=0, dtype=to))
            parts = total.reshape(-1).view(total.real.dtype)  # NumPy divides complex numbers by complex numbers, and rounds twice
            return (parts / parts.dtype.type(len(arrays))).view(to).reshape(total.shape)
        if dtype is DType.BOOL and op in (Op.SUM, Op.PROD):
            op = Op.OR if op is Op.SUM else Op.AND
        ufunc = {
            Op.SUM: np.add, Op.PROD: np.multiply, Op.MIN: np.minimum, Op.MAX: np.maximum,
            Op.AND: np.bitwise_and, Op.OR: np.bitwise_or, Op.XOR: np.bitwise_xor,
        }[op]  # fmt: skip
        return np.asarray(ufunc.reduce(stack, axis=0, dtype=to))


def same(found: Any, expected: Array, *label: object) -> None:
    """Equal in kind, dtype, shape and every item; NaN equals NaN."""
    assert isinstance(found, np.ndarray), (*label, type(found))
    forms = (found.dtype, found.shape), (expected.dtype, expected.shape)
    assert forms[0] == forms[1], (*label, *forms)
    a, b = (x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for x in (found, expected))
    if not np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"):
        wrong = np.flatnonzero((a != b).reshape(-1))
        first = a.reshape(-1)[wrong[0]], b.reshape(-1)[wrong[0]]
        raise AssertionError(f"{label}: {len(wrong)} of {a.size} differ, first [{wrong[0]}]: {first[0]!r}, not {first[1]!r}")


class Digest:
    """What ranks compare at the end: every bit of everything they got."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, array: Array) -> None:
        self._hash.update(array.tobytes())

    def value(self) -> str:
        return self._hash.hexdigest()


# ---- every collective, dtype, operator and shape -------------------------------------------------------------------------------------


async def every_reduction(rt: Any, group: Any, ctl: Any, shapes: Any) -> str:
    digest, me, size = Digest(), group.rank(), group.size()
    for number, (dtype, op) in enumerate(CASES):
        for shape in shapes:
            inputs = [sample(dtype, shape, r, number) for r in range(size)]
            expected = reduced(dtype, op, inputs) if size > 1 else inputs[0]
            before = inputs[me].copy()
            found = await rt.all_reduce(inputs[me], op.name.lower())
            same(found, expected, "all_reduce", dtype, op, shape)
            same(inputs[me], before, "input of all_reduce", dtype, op, shape)
            digest.add(found)
            named = {Op.SUM: rt.all_sum, Op.MIN: rt.all_min, Op.MAX: rt.all_max}.get(op)
            if named is not None:
                same(await named(inputs[me]), expected, f"all_{op.name}", dtype, shape)
            if shape and size > 1:
                await check_sum_scatter(rt, group, dtype, op, shape, number)
    return digest.value()


async def check_sum_scatter(rt: Any, group: Any, dtype: DType, op: Op, shape: Any, seed: int) -> None:
    me, size = group.rank(), group.size()
    whole = (shape[0] * size, *shape[1:])
    inputs = [sample(dtype, whole, r, seed) for r in range(size)]
    expected = reduced(dtype, op, inputs)[me * shape[0] : (me + 1) * shape[0]]
    same(await rt.sum_scatter(inputs[me], op.name.lower()), expected, "sum_scatter", dtype, op, whole)


@fronts
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_reduction_of_every_dtype(front: str, size: int) -> None:
    assert len(set(results(size, every_reduction, front=front, args=(SHAPES,)))) == 1


def test_eight_ranks() -> None:
    assert len(set(results(8, every_reduction, front="asyncio", args=(((7,), (1003,)),), timeout=60))) == 1


async def every_move(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for dtype in DType:
        for number, shape in enumerate(SHAPES):
            inputs = [sample(dtype, shape, r, number) for r in range(size)]
            expected = np.concatenate(inputs) if shape else np.stack(inputs)
            same(await rt.all_gather(inputs[me]), expected if size > 1 else inputs[0], "all_gather", dtype, shape)
            for root in range(size):
                before = inputs[me].copy()
                same(await rt.broadcast(inputs[me], root), inputs[root], "broadcast", dtype, shape, root)
                same(inputs[me], before, "input of broadcast", dtype, shape, root)
            if size > 1:
                await check_pass_on(rt, group, dtype, inputs)
        await rt.barrier()


async def check_pass_on(rt: Any, group: Any, dtype: DType, inputs: list[Array]) -> None:
    """Everybody sends to the next rank but one, neighbour or not."""
    me, size = group.rank(), group.size()
    step = 1 if size == 2 else 2
    label = ("send", dtype, inputs[0].shape)
    works = [rt.send(inputs[me], (me + step) % size)]
    source = (me - step) % size
    works.append(rt.recv(inputs[source].shape, inputs[source].dtype, source))
    sent, got = await in_order(works)
    assert sent is inputs[me], label
    same(got, inputs[source], *label)


@fronts
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_move_of_every_dtype(front: str, size: int) -> None:
    results(size, every_move, front=front)


async def large(rt: Any, group: Any, ctl: Any) -> str:
    """Sizes at which other algorithms are chosen: 8 KiB to 3 MiB, lengths that no rank count divides."""
    digest, me, size = Digest(), group.rank(), group.size()
    for dtype in (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.COMPLEX128, DType.INT8):
        for count in (4099, 17_003, 70_001, 200_003):
            inputs = [sample(dtype, count, r, count) for r in range(size)]
            for op in (Op.SUM, Op.MAX, *([Op.MEAN] if dtype in INEXACT else [])):
                found = await rt.all_reduce(inputs[me], op.name.lower())
                same(found, reduced(dtype, op, inputs), "all_reduce", dtype, op, count)
                digest.add(found)
                await check_sum_scatter(rt, group, dtype, op, (count // size,), count)
            same(await rt.all_gather(inputs[me]), np.concatenate(inputs), "all_gather", dtype, count)
            same(await rt.broadcast(inputs[me], size - 1), inputs[-1], "broadcast", dtype, count)
    return digest.value()


@fronts
@pytest.mark.parametrize("size", [2, 4])
def test_large(front: str, size: int) -> None:
    assert len(set(results(size, large, front=front))) == 1


def test_several_sockets_per_pair() -> None:
    assert len(set(results(3, large, front="asyncio", env={"RT_CONNECTIONS_PER_IP": "3"}))) == 1


# ---- arithmetic -----------------------------------------------------------------------------------------------------------------------


async def corners(rt: Any, group: Any, ctl: Any) -> str:
    """Any bits at all, and those that are special."""
    digest = Digest()
    with np.errstate(all="ignore"):
        for dtype in sorted(INEXACT):
            for count in (8, 5000):
                await check_corners(rt, group, dtype, special_numbers(dtype, count, group.rank()), digest)
    return digest.value()


def special_numbers(dtype: DType, count: int, rank: int) -> Array:
    to = numpy_dtype(dtype)
    part = {np.dtype(np.complex64): np.dtype(np.float32), np.dtype(np.complex128): np.dtype(np.float64)}.get(to, to)
    rng = np.random.default_rng([count, rank])
    special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1, -1]).astype(part)
    anything = np.frombuffer(rng.bytes(count * to.itemsize), part)
    return np.where(rng.integers(0, 2, len(anything)).astype(bool), anything, rng.choice(special, len(anything))).astype(part).view(to)


async def check_corners(rt: Any, group: Any, dtype: DType, x: Array, digest: Digest) -> None:
    nan = np.isnan((await rt.all_gather(x)).reshape(group.size(), len(x))).any(axis=0)
    for op in ("sum", "prod", "min", "max", "mean"):
        found = await rt.all_reduce(x, op)
        digest.add(found)
        assert np.isnan(found)[nan].all(), (dtype, op, "NaN is lost")
        if op in ("min", "max"):
            assert not np.isnan(found)[~nan].any(), (dtype, op, "NaN from nowhere")


@fronts
@pytest.mark.parametrize("size", [2, 3, 4])
def test_bit_identical_on_all_ranks(front: str, size: int) -> None:
    assert len(set(results(size, corners, front=front))) == 1


async def zeros(rt: Any, group: Any, ctl: Any) -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        for plus in range(group.size()):
            zero = np.array([0.0 if group.rank() == plus else -0.0] * 3).astype(dtype)
            assert not np.signbit((await rt.all_max(zero)).astype(np.float64)).any(), (dtype, plus)
            assert np.signbit((await rt.all_min(zero)).astype(np.float64)).all(), (dtype, plus)
        assert np.signbit((await rt.all_sum(np.array([-0.0]).astype(dtype))).astype(np.float64)).all(), "(-0) + (-0) is -0"


def test_signed_zeros() -> None:
    results(3, zeros)


async def halves(rt: Any, group: Any, ctl: Any) -> None:
    """Sums that float32 holds exactly and halves do not: rounding twice would show."""
    me, size = group.rank(), group.size()
    for dtype, digits in ((np.float16, 11), (ml_dtypes.bfloat16, 8)):
        for count in (3, 999, 70_001):
            rng = np.random.default_rng(count)
            steps = rng.integers(0, 8, (size, count))
            inputs = (rng.integers(-(2**digits), 2**digits, (size, count)) * 2.0**-steps).astype(dtype)
            exact = inputs.astype(np.float64).sum(axis=0)
            expected = exact.astype(np.float32).astype(dtype)
            naive = inputs[0]
            for other in inputs[1:]:
                naive = (naive + other).astype(dtype)
            assert count < 99 or (naive != expected).any(), "the data do not tell the difference"
            same(await rt.all_sum(inputs[me]), expected, "sum", dtype, count)
            mean = (exact.astype(np.float32) / np.float32(size)).astype(dtype)
            same(await rt.all_reduce(inputs[me], "mean"), mean, "mean", dtype, count)
            block = np.tile(inputs[me], size)
            same(await rt.sum_scatter(block), expected, "sum_scatter", dtype, count)


@pytest.mark.parametrize("size", [3, 4])
def test_halves_are_rounded_once(size: int) -> None:
    results(size, halves, front="asyncio")


async def arithmetic(rt: Any, group: Any, ctl: Any) -> None:
    me = group.rank()
    same(await rt.all_sum(np.array([127, -128, 100], np.int8)), np.array([-2, 0, -56], np.int8))
    same(await rt.all_sum(np.array([2**64 - 1], np.uint64)), np.array([2**64 - 2], np.uint64))
    same(await rt.all_reduce(np.array([2**31 - 1], np.int32), "prod"), np.array([1], np.int32))
    same(await rt.all_sum(np.array([me == 0, False])), np.array([True, False]))
    same(await rt.all_reduce(np.array([me == 0, True]), "prod"), np.array([False, True]))
    same(await rt.all_reduce(np.array([me == 0, True]), "xor"), np.array([True, False]))
    pair = np.array([1 + (5 - me) * 1j, me - 3j], np.complex64)
    same(await rt.all_max(pair), np.array([1 + 5j, 1 - 3j], np.complex64))
    same(await rt.all_min(pair), np.array([1 + 4j, 0 - 3j], np.complex64))
    same(await rt.all_reduce(np.array([1.0 + me]), "mean"), np.array([1.5]))


@fronts
def test_arithmetic(front: str) -> None:
    results(2, arithmetic, front=front)


# ---- memory ---------------------------------------------------------------------------------------------------------------------------


def layouts(x: Array) -> Iterator[tuple[str, Array]]:
    """The same items (an even number of rows) in memory of every kind."""
    rows, columns = x.shape
    yield "fortran", np.asfortranarray(x)
    yield "transposed", np.ascontiguousarray(x.T).T
    spread = np.zeros((rows * 2, columns * 3), x.dtype)
    spread[::2, 1::3] = x
    yield "strided", spread[::2, 1::3]
    yield "negative stride", np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    unaligned = raw.view(x.dtype).reshape(x.shape)
    unaligned[:] = x
    assert not unaligned.flags.aligned
    yield "unaligned", unaligned
    fixed = x.copy()
    fixed.flags.writeable = False
    yield "read-only", fixed


async def any_memory(rt: Any, group: Any, ctl: Any) -> None:
    me = group.rank()
    inputs = [sample(DType.FLOAT64, (4, 5), r) for r in range(2)]
    for (name, x), (_, other) in zip(layouts(inputs[me]), layouts(inputs[1 - me]), strict=True):
        before = np.array(x, copy=True)
        total = inputs[0] + inputs[1]
        same(await rt.all_sum(x), total, "all_sum", name)
        same(await rt.all_gather(x), np.concatenate(inputs), "all_gather", name)
        same(await rt.sum_scatter(x), total[2 * me : 2 * me + 2], "sum_scatter", name)
        same(await rt.broadcast(x, 1), inputs[1], "broadcast", name)
        same(await rt.recv_like(x, 0) if me else await rt.send(x, 1), inputs[0], "send", name)
        same(np.asarray(x), before, "input", name)
        assert not np.shares_memory(np.asarray(other), np.asarray(x))


@fronts
def test_input_of_any_layout(front: str) -> None:
    results(2, any_memory, front=front)


async def scalars(rt: Any, group: Any, ctl: Any) -> None:
    size = group.size()
    for number, dtype in ((True, np.bool_), (3, np.int64), (1.5, np.float64), (1 + 2j, np.complex128), (np.float32(2), np.float32)):
        expected = np.asarray(number).astype(dtype)
        same(await rt.all_max(number), expected, number)
        same(await rt.all_gather(number), np.full(size, number, dtype), number)
        same(await rt.broadcast(number), expected, number)
    same(await rt.all_sum(2), np.asarray(2 * size))


@fronts
def test_python_numbers_become_0d_arrays(front: str) -> None:
    results(2, scalars, front=front)


async def outputs(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for count in (6, 120_000):
        inputs = [sample(DType.FLOAT32, count, r) for r in range(size)]
        total, joined, block = reduced(DType.FLOAT32, Op.SUM, inputs), np.concatenate(inputs), count // size
        mine = slice(me * block, (me + 1) * block)
        x = inputs[me].copy()
        for call, expected in ((rt.all_sum, total), (rt.all_gather, joined), (rt.sum_scatter, total[mine]), (rt.broadcast, inputs[0])):
            out = np.full_like(expected, 77)
            assert await call(x, out=out) is out
            same(out, expected, "out=", call, count)
            same(x, inputs[me], "input", call, count)
        for call, expected in ((rt.all_sum, total), (rt.broadcast, inputs[0])):  # x is out
            x = inputs[me].copy()
            assert await call(x, out=x) is x
            same(x, expected, "in place", call, count)
            x = inputs[me].copy()
            same(await call(x, out=x[:]), expected, "in place through another view", call, count)
        whole = np.full(size * count, 77, np.float32)  # NCCL's slices
        whole[me * count : (me + 1) * count] = inputs[me]
        same(await rt.all_gather(whole[me * count : (me + 1) * count], out=whole), joined, "all_gather in place", count)
        x = inputs[me].copy()
        same(await rt.sum_scatter(x, out=x[mine]), total[mine], "sum_scatter in place", count)
        got = np.empty(count, np.float32)
        if me == 0:
            assert await rt.recv(count, np.float32, size - 1, out=got) is got
            same(got, inputs[-1], "recv", count)
        elif me == size - 1:
            await rt.send(inputs[me], 0)


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_results_go_where_out_says(front: str, size: int) -> None:
    results(size, outputs, front=front)


async def overlaps(rt: Any, group: Any, ctl: Any) -> int:
    """Each refused call leaves the group usable."""
    me, size, refused = group.rank(), group.size(), 0
    memory = np.zeros(64, np.float32)
    wrong = (me + 1) % size
    whole = memory[: 4 * size]
    attempts = [
        (rt.all_sum, memory[0:8], memory[1:9]),
        (rt.all_sum, memory[4:12], memory[0:8]),
        (rt.broadcast, memory[0:8], memory[2:10]),
        (rt.all_gather, memory[2 + 4 * me : 6 + 4 * me], whole),
        (rt.all_gather, whole[4 * wrong : 4 * wrong + 4], whole),
        (rt.sum_scatter, whole, whole[4 * wrong : 4 * wrong + 4]),
        (rt.sum_scatter, whole, memory[4 * me + 1 : 4 * me + 5]),
        (rt.all_sum, memory[0:16:2], memory[4:12]),  # it is copied first, but what it holds afterwards would be a riddle
    ]
    for number, (call, x, out) in enumerate(attempts):
        try:
            await call(x, out=out)
        except ValueError as error:
            assert "overlap" in str(error), error
            refused += 1
        else:
            raise AssertionError(f"attempt {number} was accepted")
        same(await rt.all_sum(np.ones(1)), np.full(1, float(size)))
    return refused


@fronts
def test_out_that_overlaps_x_is_refused(front: str) -> None:
    assert results(2, overlaps, front=front) == [8, 8]


async def neighbours_in_memory(rt: Any, group: Any, ctl: Any) -> None:
    """Interleaved columns share a range of memory but no byte."""
    memory = np.ones((2, 8), np.float32)
    same(await rt.all_sum(memory[0], out=memory[1]), np.full(8, 2.0, np.float32))
    table = np.arange(16, dtype=np.float32).reshape(8, 2)
    out = np.empty(8, np.float32)
    same(await rt.all_sum(table[:, 0], out=out), table[:, 0] * 2)


@fronts
def test_out_may_lie_beside_x(front: str) -> None:
    results(2, neighbours_in_memory, front=front)


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


# ---- more than 2 GiB ------------------------------------------------------------------------------------------------------------------


async def huge(rt: Any, group: Any, ctl: Any) -> None:
    """In place, so that a rank holds little more than the array; checked in pieces for the same reason."""
    me = group.rank()

    def check(x: Array, expected: Array) -> None:
        whole = len(x) // len(expected) * len(expected)
        for start in range(0, whole, len(expected)):
            assert np.array_equal(x[start : start + len(expected)], expected), start
        assert np.array_equal(x[whole:], expected[: len(x) - whole]), "the tail"

    pattern = np.arange(9973 * 100, dtype=np.uint32)
    items = 2**31 + 12_345
    x = np.resize((pattern % 251 + me).astype(np.uint8), items)
    assert await rt.all_sum(x, out=x) is x
    check(x, (2 * (pattern % 251) + 1).astype(np.uint8))
    del x
    y = np.resize(pattern.astype(np.float32) + me, 2**29 + 4321)
    await rt.broadcast(y, 1, out=y)
    check(y, pattern.astype(np.float32) + 1)
    await rt.all_reduce(y, "mean", out=y)
    check(y, pattern.astype(np.float32) + 1)


def test_more_than_2_gib() -> None:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, ValueError):
        pytest.skip("cannot tell how much memory is free")
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of free memory, found {free / 2**30:.1f}")
    ranks.results(2, huge, front="asyncio", timeout=100)
