"""Collectives with a root, all-to-all, and what moves blocks of any length: results on real ranks under every front end, against NumPy.

May live here: results, memory and disagreement of the collectives in ``rt/collectives_blocks.py``. May not: those of the others
(``test_collectives``, ``test_mismatch``), algorithms by themselves (``test_algorithms``).

Worlds cost time, so a body checks many calls in a loop; the label of a failed check says which.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, results
from test_collectives import Array, reduced, same, sample

from rt.dtypes import DType, Op, op_supported

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
