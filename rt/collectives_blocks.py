"""More collectives: those with a result on one rank only, and those that move a block per rank, also blocks of different lengths.

May live here: reduce, gather, scatter, all-to-all and the kinds with counts, with what callers may pass, what they get back, and the
errors for anything else. May not: waiting, algorithms, links, and checks of arguments that other collectives need too (``collectives``).
As there, every function takes a core group and returns a Work at once.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from rt import arrays
from rt.aio import Work
from rt.collectives import _aliasing, _alone, _array, _block_shape, _gathered_shape, _operator, _rank, _target, again, remember
from rt.dtypes import Op, check_op, code_of
from rt.group import ALL_TO_ALL_AS, Call, CoreGroup
from rt.schedule import Collective


def reduce(group: CoreGroup, x: Any, op: str, root: int, out: Any) -> Work:
    """Start a reduction to one rank; the result has x's shape there and is None elsewhere."""
    work = Work(group)
    code = _operator(op, "reduce")
    array = _array(x, "reduce", work)
    dtype = code_of(array.dtype, "reduce")
    check_op(dtype, code, "reduce")
    root = _rank(root, group, "root", "reduce")
    if group.size == 1:
        return _alone(work, x, array, out, "reduce")
    target, alias = None, None
    if group.rank == root:
        target = _target(out, array.shape, array, "reduce", work)
        alias = _aliasing(x, array, target, "reduce", {(0, 0)})
    work.result = target
    call = Call(Collective.REDUCE, dtype, code, array.shape, array.size, root=root, alias=alias)
    group.submit("reduce", call, array, target, work)
    return work


def gather(group: CoreGroup, x: Any, root: int, out: Any, counts: Any = None) -> Work:
    """Start a gather: on the root the blocks of all ranks along axis 0, in rank order; None elsewhere."""
    what = "gather" if counts is None else "gather_v"
    work = Work(group)
    array = _array(x, what, work)
    dtype = code_of(array.dtype, what)
    root = _rank(root, group, "root", what)
    rows = None if counts is None else _own_rows(counts, array.shape, group, what)
    if group.size == 1:
        return _alone(work, x, array, out, what)
    shape = _gathered_shape(array.shape, group) if rows is None else (sum(rows), *array.shape[1:])
    target, alias = None, None
    if group.rank == root:
        target = _target(out, shape, array, what, work)
        start = root * array.size if rows is None else _start(rows, root, shape)
        alias = _aliasing(x, array, target, what, {(start, 0)})
    work.result = target
    if rows is None:
        call = Call(Collective.GATHER, dtype, Op.SUM, array.shape, array.size, root=root, alias=alias)
    else:
        call = Call(Collective.GATHER_V, dtype, Op.SUM, shape, math.prod(shape), root=root, counts=rows, alias=alias)
    group.submit(what, call, array, target, work)
    return work


def scatter(group: CoreGroup, x: Any, root: int, out: Any, counts: Any = None) -> Work:
    """Start a scatter: this rank's block, along axis 0, of the root's x."""
    what = "scatter" if counts is None else "scatter_v"
    work = Work(group)
    root = _rank(root, group, "root", what)
    mine = group.rank == root
    rows = None if counts is None else _counts(counts, group, "counts", what)
    shape, like, array = _whole(group, x, out, rows, mine, work, what)
    dtype = like.dtype
    if rows is not None:
        _check_sum(rows, shape, "counts", what)
    if array is not None and group.size == 1:
        return _alone(work, x, array, out, what)
    block = _block_shape(shape, group, what) if rows is None else (rows[group.rank], *shape[1:])
    target = _target(out, block, like, what, work)
    start = root * target.size if rows is None else _start(rows, root, shape)
    alias = _aliasing(x, array, target, what, {(0, start)}) if array is not None else None
    work.result = target
    if rows is None:
        call = Call(Collective.SCATTER, code_of(dtype, what), Op.SUM, shape, target.size, root=root, alias=alias)
    else:
        call = Call(Collective.SCATTER_V, code_of(dtype, what), Op.SUM, shape, math.prod(shape), root=root, counts=rows, alias=alias)
    group.submit(what, call, array, target, work)
    return work


def _whole(
    group: CoreGroup, x: Any, out: Any, rows: tuple[int, ...] | None, mine: bool, work: Work, what: str
) -> tuple[tuple[int, ...], np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return the shape of what is scattered, an array of its dtype and kind, and it if it is ``mine``; elsewhere ``out`` may tell."""
    if mine:
        array = _array(x, what, work)
        return array.shape, array, array
    if x is not None:
        like, work.hand_out = arrays.form(x, what, group)
        return like.shape, like, None
    found = out if isinstance(out, np.ndarray) or out is None else group.on_device(out, what)
    if found is None or not found.ndim:
        raise TypeError(f"{what}: a rank that is not the root gives x, for its shape and dtype, or the array that receives as out=")
    return (group.size * found.shape[0] if rows is None else sum(rows), *found.shape[1:]), found, None


def all_to_all(group: CoreGroup, x: Any, out: Any) -> Work:
    """Start an all-to-all: block j of x, along axis 0, goes to rank j, and block i of the result comes from rank i."""
    known = again(group, x, out, "all_to_all", ALL_TO_ALL_AS)
    if known is not None:
        return known
    work = Work(group)
    array = _array(x, "all_to_all", work)
    dtype = code_of(array.dtype, "all_to_all")
    if group.size == 1:
        return _alone(work, x, array, out, "all_to_all")
    _block_shape(array.shape, group, "all_to_all")
    target = _target(out, array.shape, array, "all_to_all", work)
    alias = _aliasing(x, array, target, "all_to_all", {(0, 0)})
    work.result = target
    call = Call(Collective.ALL_TO_ALL, dtype, Op.SUM, array.shape, array.size // group.size, alias=alias)
    group.submit("all_to_all", call, array, target, work)
    if array is x:
        remember(group, call, x, target, x.shape)
    return work


def all_to_all_v(group: CoreGroup, x: Any, send_counts: Any, recv_counts: Any, out: Any) -> Work:
    """Start an all-to-all of blocks of different lengths."""
    what = "all_to_all_v"
    work = Work(group)
    array = _array(x, what, work)
    dtype = code_of(array.dtype, what)
    sent, received = _counts(send_counts, group, "send_counts", what), _counts(recv_counts, group, "recv_counts", what)
    _check_sum(sent, array.shape, "send_counts", what)
    if sent[group.rank] != received[group.rank]:
        own = f"send_counts[{group.rank}]={sent[group.rank]} and recv_counts[{group.rank}]={received[group.rank]}"
        raise ValueError(f"{what}: {own} must be equal: both are what this rank sends itself")
    if group.size == 1:
        return _alone(work, x, array, out, what)
    target = _target(out, (sum(received), *array.shape[1:]), array, what, work)
    # Blocks that change their places in memory could wait for each other in a circle.
    alias = _aliasing(x, array, target, what, {(0, 0)} if sent == received else set())
    work.result = target
    call = Call(Collective.ALL_TO_ALL_V, dtype, Op.SUM, array.shape, array.size, counts=sent + received, alias=alias)
    group.submit(what, call, array, target, work)
    return work


def all_gather_v(group: CoreGroup, x: Any, counts: Any, out: Any) -> Work:
    """Start an all-gather of blocks of different lengths."""
    what = "all_gather_v"
    work = Work(group)
    array = _array(x, what, work)
    dtype = code_of(array.dtype, what)
    rows = _own_rows(counts, array.shape, group, what)
    if group.size == 1:
        return _alone(work, x, array, out, what)
    shape = (sum(rows), *array.shape[1:])
    target = _target(out, shape, array, what, work)
    alias = _aliasing(x, array, target, what, {(_start(rows, group.rank, shape), 0)})
    work.result = target
    group.submit(what, Call(Collective.ALL_GATHER_V, dtype, Op.SUM, shape, target.size, counts=rows, alias=alias), array, target, work)
    return work


def reduce_scatter_v(group: CoreGroup, x: Any, counts: Any, op: str, out: Any) -> Work:
    """Start a reduce-scatter into blocks of different lengths."""
    what = "reduce_scatter_v"
    work = Work(group)
    code = _operator(op, what)
    array = _array(x, what, work)
    dtype = code_of(array.dtype, what)
    check_op(dtype, code, what)
    rows = _counts(counts, group, "counts", what)
    _check_sum(rows, array.shape, "counts", what)
    if group.size == 1:
        return _alone(work, x, array, out, what)
    target = _target(out, (rows[group.rank], *array.shape[1:]), array, what, work)
    alias = _aliasing(x, array, target, what, {(0, _start(rows, group.rank, array.shape))})
    work.result = target
    call = Call(Collective.REDUCE_SCATTER_V, dtype, code, array.shape, array.size, counts=rows, alias=alias)
    group.submit(what, call, array, target, work)
    return work


# -- counts -----------------------------------------------------------------------------------------------------------------------------


def _counts(counts: Any, group: CoreGroup, name: str, what: str) -> tuple[int, ...]:
    """Check what says how many rows belong to each rank."""
    try:
        rows = tuple(operator.index(each) for each in counts)
    except TypeError:
        raise TypeError(f"{what}: {name} must be a sequence of integers, not {counts!r}") from None
    if len(rows) != group.size or any(each < 0 for each in rows):
        raise ValueError(f"{what}: {name} must have {group.size} numbers, none negative: one for each rank of the group; got {rows}")
    return rows


def _check_sum(rows: tuple[int, ...], shape: tuple[int, ...], name: str, what: str) -> None:
    if not shape or shape[0] != sum(rows):
        raise ValueError(f"{what}: x must have sum({name}) = {sum(rows)} rows along axis 0, but has shape {shape}")


def _own_rows(counts: Any, shape: tuple[int, ...], group: CoreGroup, what: str) -> tuple[int, ...]:
    rows = _counts(counts, group, "counts", what)
    if not shape or shape[0] != rows[group.rank]:
        raise ValueError(f"{what}: x must have counts[{group.rank}] = {rows[group.rank]} rows along axis 0, but has shape {shape}")
    return rows


def _start(rows: tuple[int, ...], rank: int, shape: tuple[int, ...]) -> int:
    """Items before the block of a rank."""
    return sum(rows[:rank]) * math.prod(shape[1:])
