"""Collectives with a root, all-to-all, and what moves blocks of any length: results on real ranks under every front end, against NumPy.

May live here: results, memory and disagreement of the collectives in ``rt/collectives_blocks.py``. May not: those of the others
(``test_collectives``, ``test_mismatch``), algorithms by themselves (``test_algorithms``).

Worlds cost time, so a body checks many calls in a loop; the label of a failed check says which.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, results
from test_collectives import Array, reduced, same, sample

from rt import _fastpath
from rt.dtypes import INEXACT, DType, Op, numpy_dtype, op_supported
from rt.errors import CollectiveTimeoutError, GroupBrokenError
from rt.schedule import Collective

fronts = pytest.mark.parametrize("front", FRONTS)
CASES = [(dtype, op) for dtype in DType for op in Op if op_supported(dtype, op)]
# Rows of four float32 or the like: nothing, one, small, both sides of 64 KiB, 3 MiB.
ROWS = (0, 1, 37, 4096, 4097, 196_608)


def for_root(found: Any, expected: Array, root: bool, *label: object) -> None:
    """The root has the result, the others None."""
    if root:
        same(found, expected, *label)
    else:
        assert found is None, label


# ---- reduce, gather, scatter, all_to_all ----------------------------------------------------------------------------------------------


async def plain(rt: Any, group: Any, ctl: Any, rows: Any, pick: int) -> None:
    """Every call from every root, and then in place."""
    me, size = group.rank(), group.size()
    for number, count in enumerate(rows):
        dtype = (DType.FLOAT32, DType.FLOAT16, DType.COMPLEX64, DType.INT32)[(number + pick) % 4]
        inputs = [sample(dtype, (count, 4), r, number) for r in range(size)]
        wholes = [np.concatenate([sample(dtype, (count, 4), r, j) for j in range(size)]) for r in range(size)]
        joined, total = np.concatenate(inputs), reduced(dtype, Op.SUM, inputs)
        mine = slice(me * count, (me + 1) * count)
        crossed = np.concatenate([whole[mine] for whole in wholes])
        before = inputs[me].copy(), wholes[me].copy()
        for root in range(size) if count < 9000 else (size - 1,):
            label = (dtype, count, root)
            for_root(await rt.reduce(inputs[me], root=root), total, me == root, "reduce", *label)
            for_root(await rt.gather(inputs[me], root), joined, me == root, "gather", *label)
            same(await rt.scatter(wholes[me], root), wholes[root][mine], "scatter", *label)
            await into_out(rt, group, inputs[me], wholes, total, joined, root, label)
        same(await rt.all_to_all(wholes[me]), crossed, "all_to_all", dtype, count)
        same(inputs[me], before[0], "input")
        same(wholes[me], before[1], "input")
        x = wholes[me].copy()
        assert await rt.all_to_all(x, out=x) is x
        same(x, crossed, "all_to_all in place", dtype, count)
        out = np.empty_like(x)
        assert await rt.all_to_all(wholes[me], out=out) is out
        same(out, crossed, "all_to_all into out", dtype, count)


async def into_out(rt: Any, group: Any, x: Array, wholes: list[Array], total: Array, joined: Array, root: int, label: Any) -> None:
    """The same with out=, apart and in place; on other ranks than the root of reduce and gather it is left alone."""
    me, count = group.rank(), len(x)
    mine, is_root = slice(me * count, (me + 1) * count), group.rank() == root
    for call, expected in ((rt.reduce, total), (rt.gather, joined)):
        out = np.full_like(expected, 77)
        found = await call(x, root=root, out=out)
        assert found is (out if is_root else None)
        same(out, expected if is_root else np.full_like(expected, 77), "into out", *label)
    copy = x.copy()
    await rt.reduce(copy, root=root, out=copy)
    same(copy, total if is_root else x, "reduce in place", *label)
    whole = np.full_like(joined, 77)
    whole[mine] = x
    for_root(await rt.gather(whole[mine], root, out=whole), joined, is_root, "gather in place", *label)
    whole = wholes[me].copy()
    out = whole[mine]
    assert await rt.scatter(whole, root, out=out) is out
    same(out, wholes[root][mine], "scatter in place", *label)
    out = np.full_like(x, 77)
    assert await rt.scatter(wholes[root] if is_root else None, root, out=out) is out
    same(out, wholes[root][mine], "scatter into out", *label)


@fronts
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rooted_and_all_to_all(front: str, size: int) -> None:
    results(size, plain, front=front, args=(ROWS, FRONTS.index(front)), timeout=60)


def test_more_ranks_and_sockets() -> None:
    results(5, plain, front="asyncio", args=(ROWS[:-1], 0), env={"RT_CONNECTIONS_PER_IP": "2"}, timeout=60)


async def every_dtype(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for number, (dtype, op) in enumerate(CASES):
        for count in (7, 5003):
            inputs = [sample(dtype, (count,), r, number) for r in range(size)]
            root = number % size
            found = await rt.reduce(inputs[me], op.name.lower(), root)
            for_root(found, reduced(dtype, op, inputs), me == root, "reduce", dtype, op, count)
    for dtype in DType:
        x = [sample(dtype, (size, 3), r) for r in range(size)]
        for_root(await rt.gather(x[me], 1), np.concatenate(x), me == 1, "gather", dtype)
        same(await rt.scatter(x[me], 1), x[1][me : me + 1], "scatter", dtype)
        same(await rt.all_to_all(x[me]), np.stack([each[me] for each in x]), "all_to_all", dtype)
    for_root(await rt.gather(me + 0.5, 0), np.arange(size) + 0.5, me == 0, "numbers")


@fronts
def test_every_dtype_and_operator(front: str) -> None:
    results(3, every_dtype, front=front)


async def halves(rt: Any, group: Any, ctl: Any) -> None:
    """Sums that float32 holds exactly and halves do not: rounding twice would show."""
    me, size = group.rank(), group.size()
    for dtype in (np.float16,):
        for count in (3, 70_001):
            draw = np.random.default_rng(count)
            inputs = (draw.integers(-2048, 2048, (size, count)) * 2.0 ** -draw.integers(0, 8, (size, count))).astype(dtype)
            exact = inputs.astype(np.float64).sum(axis=0).astype(np.float32)
            found = await rt.reduce(inputs[me], "sum", 1)
            for_root(found, exact.astype(dtype), me == 1, "sum", count)
            for_root(await rt.reduce(inputs[me], "mean", 0), (exact / np.float32(size)).astype(dtype), me == 0, "mean", count)


def test_halves_are_rounded_once() -> None:
    results(4, halves, front="asyncio")


async def sub_groups(rt: Any, group: Any, ctl: Any) -> None:
    """Roots are ranks of the group, whose order may be any."""
    me = group.rank()
    backwards = await group.split(0, 10 - me)
    pair = await group.split(me % 2)
    for sub, members in ((backwards, [3, 2, 1, 0]), (pair, [me % 2, me % 2 + 2])):
        here, size = sub.rank(), sub.size()
        for root in range(size):
            for_root(await sub.gather(me, root), np.array(members), here == root, "gather", root)
            for_root(await sub.reduce(np.full(5000, me), "max", root), np.full(5000, max(members)), here == root, "reduce", root)
            same(await sub.scatter(np.arange(size) + 10 * members[here], root), np.array([here + 10 * members[root]]), "scatter", root)
        same(await rt.all_to_all(np.arange(size) + 10 * me, group=sub), np.array(members) * 10 + here, "all_to_all")


@fronts
def test_sub_groups(front: str) -> None:
    results(4, sub_groups, front=front)


async def refusals(rt: Any, group: Any, ctl: Any) -> int:
    """Arguments that are refused before anything is sent: the group stays usable."""
    me, size = group.rank(), group.size()
    x, odd = np.zeros((2 * size, 3), np.float32), np.zeros((2 * size + 1, 3), np.float32)
    attempts: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "all_to_all.*divisible", lambda: rt.all_to_all(odd)),
        (ValueError, "all_to_all.*divisible", lambda: rt.all_to_all(1.0)),
        (ValueError, "scatter.*divisible", lambda: rt.scatter(odd)),
        (ValueError, "root=9", lambda: rt.reduce(x, "sum", 9)),
        (ValueError, "root=-1", lambda: rt.gather(x, -1)),
        (ValueError, "root=2", lambda: rt.scatter(x, 2)),
        (TypeError, "root must be an integer", lambda: rt.scatter(x, 0.5)),
        (ValueError, "op must be one of", lambda: rt.reduce(x, "avg")),
        (TypeError, "bool or integer", lambda: rt.reduce(x, "xor")),
        (ValueError, "overlaps", lambda: rt.all_to_all(x[: 2 * size - size], out=x[1 : size + 1])),
        (ValueError, "overlaps", lambda: rt.reduce(x[:2], root=me, out=x[1:3])),
        (ValueError, "overlaps", lambda: rt.gather(x[1:2], me, out=x[:size] if me == 0 else x[1 : size + 1])),
        (ValueError, "overlaps", lambda: rt.scatter(x, me, out=x[1:3])),
        (ValueError, "out must have shape", lambda: rt.gather(x, me, out=x.copy())),
        (ValueError, "out must have shape", lambda: rt.scatter(x, out=np.zeros((3, 3), np.float32))),
        (TypeError, "list", lambda: rt.all_to_all([1, 2])),
        (TypeError, "not the root gives x" if me else "NoneType", lambda: rt.scatter(None)),
    ]
    for kind, text, call in attempts:
        with pytest.raises(kind, match=text):
            await call()
    same(await rt.all_sum(np.ones(1)), np.full(1, float(size)))
    return len(attempts)


@fronts
def test_refused_arguments(front: str) -> None:
    assert len(set(results(2, refusals, front=front))) == 1


# ---- blocks of any lengths --------------------------------------------------------------------------------------------------------------


def uneven(size: int, seed: int) -> list[list[int]]:
    """Counts of rows of 4 items: nothing at all, all on one rank, small, and around and far above 64 KiB."""
    draw = np.random.default_rng(seed)
    one = [0] * size
    one[seed % size] = 50
    return [[0] * size, one, *(draw.integers(0, most, size).tolist() for most in (3, 40, 9000)), [(r + 1) * 60_000 for r in range(size)]]


async def counted(rt: Any, group: Any, ctl: Any, pick: int) -> None:
    me, size = group.rank(), group.size()
    for number, counts in enumerate(uneven(size, pick)):
        dtype = (DType.FLOAT32, DType.BFLOAT16, DType.COMPLEX64, DType.INT32)[(number + pick) % 4]
        blocks = [sample(dtype, (count, 4), r, number) for r, count in enumerate(counts)]
        joined = np.concatenate(blocks)
        wholes = [sample(dtype, (sum(counts), 4), r, number) for r in range(size)]
        mine = slice(sum(counts[:me]), sum(counts[: me + 1]))
        total = reduced(dtype, Op.SUM, wholes)[mine]
        root = (number + pick) % size
        label = (dtype, counts, root)
        same(await rt.all_gather_v(blocks[me], counts), joined, "all_gather_v", *label)
        same(await rt.reduce_scatter_v(wholes[me], counts), total, "reduce_scatter_v", *label)
        for_root(await rt.gather_v(blocks[me], np.array(counts), root), joined, me == root, "gather_v", *label)
        same(await rt.scatter_v(wholes[me], tuple(counts), root), wholes[root][mine], "scatter_v", *label)
        whole = np.full_like(joined, 77)
        whole[mine] = blocks[me]
        assert await rt.all_gather_v(whole[mine], counts, out=whole) is whole
        same(whole, joined, "all_gather_v in place", *label)
        whole[:] = 77
        whole[mine] = blocks[me]
        for_root(await rt.gather_v(whole[mine], counts, root, out=whole), joined, me == root, "gather_v in place", *label)
        whole = wholes[me].copy()
        same(await rt.reduce_scatter_v(whole, counts, out=whole[mine]), total, "reduce_scatter_v in place", *label)
        whole = wholes[me].copy()
        found = await rt.scatter_v(whole if me == root else None, counts, root, out=whole[mine])
        same(found, wholes[root][mine], "scatter_v in place", *label)
        await crossed(rt, group, dtype, counts, number)


async def crossed(rt: Any, group: Any, dtype: DType, counts: list[int], seed: int) -> None:
    """What rank i sends rank j is what the table says; a symmetric one may be exchanged in place."""
    me, size = group.rank(), group.size()
    draw = np.random.default_rng(seed)
    table = draw.permuted(np.tile(counts, (size, 1)), axis=1)
    for rows in (table, table + table.T):
        blocks = [[sample(dtype, (rows[i, j], 4), 10 * i + j, seed) for j in range(size)] for i in range(size)]
        x, expected = np.concatenate(blocks[me]), np.concatenate([blocks[i][me] for i in range(size)])
        same(await rt.all_to_all_v(x, rows[me], rows[:, me]), expected, "all_to_all_v", dtype, rows)
    assert await rt.all_to_all_v(x, rows[me], rows[:, me], out=x) is x
    same(x, expected, "all_to_all_v in place", dtype, rows)


@fronts
@pytest.mark.parametrize("size", [2, 4])
def test_blocks_of_any_lengths(front: str, size: int) -> None:
    results(size, counted, front=front, args=(FRONTS.index(front),), timeout=60)


def test_blocks_over_several_sockets() -> None:
    results(3, counted, front="asyncio", args=(5,), env={"RT_CONNECTIONS_PER_IP": "3"}, timeout=60)


async def counts_refused(rt: Any, group: Any, ctl: Any) -> int:
    me = group.rank()
    x = np.zeros((3, 2), np.float32)
    attempts: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "2 numbers", lambda: rt.all_gather_v(x, [3])),
        (ValueError, "none negative", lambda: rt.gather_v(x, [4, -1])),
        (TypeError, "sequence of integers", lambda: rt.scatter_v(x, 3)),
        (TypeError, "sequence of integers", lambda: rt.scatter_v(x, [1.5, 1.5])),
        (ValueError, r"counts\[.\] = 2 rows along axis 0, but has shape \(3, 2\)", lambda: rt.all_gather_v(x, [2, 2])),
        (ValueError, r"sum\(counts\) = 4 rows", lambda: rt.reduce_scatter_v(x, [2, 2])),
        (ValueError, r"sum\(counts\) = 4 rows", lambda: rt.scatter_v(x, [2, 2])),
        (ValueError, r"sum\(send_counts\) = 5 rows", lambda: rt.all_to_all_v(x, [2, 3], [2, 3])),
        (ValueError, "what this rank sends itself", lambda: rt.all_to_all_v(x, [1, 2], [2, 1])),
        (ValueError, "overlaps", lambda: rt.all_to_all_v(x[:2], [1, 1], [1, 2] if me == 0 else [2, 1], out=x)),
        (ValueError, "rows along axis 0", lambda: rt.all_gather_v(1.0, [1, 1])),
    ]
    for kind, text, call in attempts:
        with pytest.raises(kind, match=text):
            await call()
    same(await rt.all_sum(np.ones(1)), np.full(1, 2.0))
    return len(attempts)


@fronts
def test_refused_counts(front: str) -> None:
    assert len(set(results(2, counts_refused, front=front))) == 1


# ---- scans and sendrecv -----------------------------------------------------------------------------------------------------------------


def identity(dtype: DType, op: Op, shape: Any) -> Array:
    to = numpy_dtype(dtype)
    if op in (Op.MIN, Op.MAX) and dtype in INEXACT:
        end = np.inf if op is Op.MIN else -np.inf
        return np.full(shape, complex(end, end) if to.kind == "c" else end, to)
    if op in (Op.MIN, Op.MAX) and dtype is not DType.BOOL:
        return np.full(shape, np.iinfo(to).max if op is Op.MIN else np.iinfo(to).min, to)
    if op is Op.AND:
        return np.invert(np.zeros(shape, to))
    return np.full(shape, {Op.PROD: 1, Op.MIN: True, Op.MAX: False}.get(op, 0), to)


async def prefixes(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for number, (dtype, op) in enumerate(CASES):
        if op is Op.MEAN:
            with pytest.raises(ValueError, match="mean"):
                await rt.scan(sample(dtype, (3,), me), "mean")
            continue
        for shape in ((), (0, 3), (7,), (9001,)):
            inputs = [sample(dtype, shape, r, number) for r in range(size)]
            name, before = op.name.lower(), inputs[me].copy()
            inclusive = reduced(dtype, op, inputs[: me + 1])
            exclusive = reduced(dtype, op, inputs[:me]) if me else identity(dtype, op, shape)
            same(await rt.scan(inputs[me], name), inclusive, "scan", dtype, op, shape)
            same(await rt.exscan(inputs[me], name), exclusive, "exscan", dtype, op, shape)
            same(inputs[me], before, "input", dtype, op, shape)
            same(reduced(dtype, op, [identity(dtype, op, shape), inputs[me]]), inputs[me], "identity", dtype, op)
            for call, expected in ((rt.scan, inclusive), (rt.exscan, exclusive)):
                x = inputs[me].copy()
                assert await call(x, name, out=x) is x
                same(x, expected, "in place", call, dtype, op, shape)


@fronts
@pytest.mark.parametrize("size", [2, 4])
def test_scans(front: str, size: int) -> None:
    results(size, prefixes, front=front, timeout=60)


async def long_prefixes(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for dtype in (DType.FLOAT16, DType.FLOAT32, DType.INT8):
        for count in (16_384, 16_385, 786_433):
            inputs = [sample(dtype, count, r, count) for r in range(size)]
            same(await rt.scan(inputs[me]), reduced(dtype, Op.SUM, inputs[: me + 1]), "scan", dtype, count)
            exclusive = reduced(dtype, Op.SUM, inputs[:me]) if me else np.zeros(count, numpy_dtype(dtype))
            same(await rt.exscan(inputs[me]), exclusive, "exscan", dtype, count)
            out = inputs[me].copy()
            same(await rt.exscan(out, out=out), exclusive, "exscan in place", dtype, count)


@fronts
def test_long_scans(front: str) -> None:
    results(5, long_prefixes, front=front, timeout=60)


async def around(rt: Any, group: Any, ctl: Any) -> None:
    """Everybody to the right, then to the left, and in place: blocking ranks in a ring must not wait for each other."""
    me, size = group.rank(), group.size()
    right, left = (me + 1) % size, (me - 1) % size
    for count in (0, 1, 1000, 16_384, 16_385, 786_433):
        x = np.full((count,), me, np.float32)
        same(await rt.sendrecv(x, right, left), np.full(count, left, np.float32), "right", count)
        same(await rt.sendrecv(x, left, right, tag=3), np.full(count, right, np.float32), "left", count)
        same(x, np.full(count, me, np.float32), "x", count)
        assert await rt.sendrecv(x, right, left, out=x) is x
        same(x, np.full(count, left, np.float32), "in place", count)
    # A chain of different shapes and dtypes, and a partner that calls send and recv.
    x, out = np.arange(2 + me, dtype=np.int16), np.empty(2 + left, np.int16)
    same(await rt.sendrecv(x, right, left, out=out), np.arange(2 + left, dtype=np.int16), "shapes")
    if me == 0:
        same(await rt.sendrecv(np.full(3, 1.0), 1, 1), np.full(3, 2.0), "with send and recv")
    elif me == 1:
        same(await rt.recv(3, np.float64, 0), np.full(3, 1.0))
        await rt.send(np.full(3, 2.0), 0)
    for call in (lambda: rt.sendrecv(x, me, left), lambda: rt.sendrecv(x, right, me), lambda: rt.sendrecv(x, size, left)):
        with pytest.raises(ValueError, match="Invalid"):
            await call()
    same(await rt.all_sum(1), np.asarray(size))


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_sendrecv(front: str, size: int) -> None:
    results(size, around, front=front)


async def cancelled(rt: Any, group: Any, ctl: Any) -> None:
    """Both halves give the caller's memory back, and go on."""
    me, count = group.rank(), 1 << 20
    x = np.full(count, 1.0 + me)
    if me == 0:
        work = rt.sendrecv(x, 1, 1, out=np.empty(count))
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not work.done()
        x[:] = -1
        await rt.barrier()
    else:
        await rt.barrier()
        same(await rt.sendrecv(x, 0, 0), np.full(count, 1.0), "what was sent before it was cancelled")
    same(await rt.all_sum(1), np.asarray(2))


@pytest.mark.parametrize("front", FRONTS[1:])
def test_a_cancelled_sendrecv_goes_on(front: str) -> None:
    results(2, cancelled, front=front)


async def late(rt: Any, group: Any, ctl: Any) -> None:
    """The time limit counts for each half, whichever is late."""
    x = np.ones(1 << 20)
    for half in ("both", "send"):
        sub = await group.split(0)
        if group.rank() == 0:
            with pytest.raises(CollectiveTimeoutError):
                await sub.sendrecv(x, 1, 1, timeout=0.3)
        else:
            with pytest.raises(GroupBrokenError):
                if half == "send":
                    await sub.send(x, 0)
                await sub.recv_like(x, 0, tag=9)
    same(await rt.all_sum(1), np.asarray(2))


@fronts
def test_a_late_sendrecv(front: str) -> None:
    results(2, late, front=front)


async def receives_first(rt: Any, group: Any, ctl: Any) -> None:
    """The peer hears that it may send before our own message keeps the link busy."""
    x, out = np.ones(1 << 20), np.empty(1 << 20)
    for how in ("made", "known"):
        if group.rank() == 0:
            work = rt.sendrecv(x, 1, 1, out=out)
            flying = _fastpath.works_of(group._core.world.engine)
            assert [each.result is out for each in flying] == [True, False], how
            await rt.barrier()
            await work
        else:
            await rt.barrier()
            await rt.sendrecv(x, 0, 0)


@pytest.mark.parametrize("front", FRONTS[1:])
def test_a_sendrecv_receives_first(front: str) -> None:
    results(2, receives_first, front=front)


async def interrupted(rt: Any, group: Any, ctl: Any) -> None:
    """Ctrl-C between the two halves: ``out`` is the caller's again, although something is on its way there."""
    x, out, other = np.ones(1 << 20), np.zeros(1 << 20), 1 - group.rank()
    if group.rank() == 0:
        core, submit = group._core, type(group._core).submit

        def interrupting(what: str, call: Any, *rest: Any) -> None:
            submit(core, what, call, *rest)
            if call.kind == Collective.SEND:
                raise KeyboardInterrupt

        core.submit = interrupting
        with pytest.raises(KeyboardInterrupt):
            await rt.sendrecv(x, other, other, out=out)
        del core.submit
        out[:] = -1
        await rt.barrier()
    else:
        await rt.barrier()
        same(await rt.sendrecv(x, other, other), x)
    same(await rt.all_sum(1), np.asarray(2))  # behind the message
    assert group.rank() == 1 or (out == -1).all()


@pytest.mark.parametrize("front", FRONTS[1:])
def test_an_interrupted_sendrecv_gives_memory_back(front: str) -> None:
    results(2, interrupted, front=front)
