"""More collectives: those with a result on one rank only, and those that move a block per rank.

May live here: reduce, gather, scatter and all-to-all, with what callers may pass, what they get back, and the errors for anything else.
May not: waiting, algorithms, links, and checks of arguments that other collectives need too (``collectives``). As there, every function
takes a core group and returns a Work at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rt.aio import Work
from rt.collectives import _aliasing, _alone, _array, _block_shape, _gathered_shape, _operator, _rank, _target
from rt.dtypes import Op, check_op, code_of
from rt.group import Call, CoreGroup
from rt.schedule import Collective


def reduce(group: CoreGroup, x: Any, op: str, root: int, out: Any) -> Work:
    """Start a reduction to one rank; the result has x's shape there and is None elsewhere."""
    work = Work(group)
    code = _operator(op)
    array = _array(x, "reduce", work)
    dtype = code_of(array.dtype)
    check_op(dtype, code, "reduce")
    root = _rank(root, group, "root")
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


def gather(group: CoreGroup, x: Any, root: int, out: Any) -> Work:
    """Start a gather: on the root the blocks of all ranks along axis 0, in rank order; None elsewhere."""
    work = Work(group)
    array = _array(x, "gather", work)
    dtype = code_of(array.dtype)
    root = _rank(root, group, "root")
    if group.size == 1:
        return _alone(work, x, array, out, "gather")
    target, alias = None, None
    if group.rank == root:
        target = _target(out, _gathered_shape(array.shape, group), array, "gather", work)
        alias = _aliasing(x, array, target, "gather", {(root * array.size, 0)})
    work.result = target
    call = Call(Collective.GATHER, dtype, Op.SUM, array.shape, array.size, root=root, alias=alias)
    group.submit("gather", call, array, target, work)
    return work


def scatter(group: CoreGroup, x: Any, root: int, out: Any) -> Work:
    """Start a scatter: this rank's block, along axis 0, of the root's x."""
    work = Work(group)
    root = _rank(root, group, "root")
    mine = group.rank == root
    shape, dtype, array = _whole(group, x, out, mine, work, "scatter")
    if array is not None and group.size == 1:
        return _alone(work, x, array, out, "scatter")
    target = _target(out, _block_shape(shape, group, "scatter"), None, "scatter", work, dtype)
    alias = _aliasing(x, array, target, "scatter", {(0, root * target.size)}) if array is not None else None
    work.result = target
    call = Call(Collective.SCATTER, code_of(dtype), Op.SUM, shape, target.size, root=root, alias=alias)
    group.submit("scatter", call, array, target, work)
    return work


def _whole(
    group: CoreGroup, x: Any, out: Any, mine: bool, work: Work, what: str
) -> tuple[tuple[int, ...], np.dtype[Any], np.ndarray[Any, Any] | None]:
    """Return shape and dtype of what is scattered, and the array if it is ``mine``; elsewhere ``out`` may tell them."""
    if mine:
        array = _array(x, what, work)
        return array.shape, array.dtype, array
    if x is not None:
        form = _array(x, what, None)
        return form.shape, form.dtype, None
    if not isinstance(out, np.ndarray) or not out.ndim:
        raise TypeError(f"{what}: a rank that is not the root gives x, for its shape and dtype, or the array that receives as out=")
    return (group.size * out.shape[0], *out.shape[1:]), out.dtype, None


def all_to_all(group: CoreGroup, x: Any, out: Any) -> Work:
    """Start an all-to-all: block j of x, along axis 0, goes to rank j, and block i of the result comes from rank i."""
    work = Work(group)
    array = _array(x, "all_to_all", work)
    dtype = code_of(array.dtype)
    if group.size == 1:
        return _alone(work, x, array, out, "all_to_all")
    _block_shape(array.shape, group, "all_to_all")
    target = _target(out, array.shape, array, "all_to_all", work)
    alias = _aliasing(x, array, target, "all_to_all", {(0, 0)})
    work.result = target
    call = Call(Collective.ALL_TO_ALL, dtype, Op.SUM, array.shape, array.size // group.size, alias=alias)
    group.submit("all_to_all", call, array, target, work)
    return work
