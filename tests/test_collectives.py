"""What every collective returns, on real ranks under every front end, against NumPy.

May live here: results, for all dtypes, operators, layouts, sizes and groups. May not: disagreeing ranks, failures, arguments that are
refused for reasons other than memory (``test_api``).

Worlds cost time, so a body checks many calls in a loop; the label of a failed check says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import ranks
from expected import Digest, reduced, same, sample
from ranks import FRONTS, in_order, results

from rt.dtypes import INEXACT, DType, Op, numpy_dtype, op_supported

Array = np.ndarray[Any, Any]
CASES = [(dtype, op) for dtype in DType for op in Op if op_supported(dtype, op)]
SHAPES = ((), (0,), (1,), (4, 0), (7,), (3, 5), (1003,))
fronts = pytest.mark.parametrize("front", FRONTS)


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
