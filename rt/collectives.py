"""The collectives: arguments are checked, memory is found, a work is started.

May live here: what callers may pass, what they get back, and the errors for anything else. May not: waiting, algorithms, links. Every
call takes a core group and returns a Work at once, as do those of ``collectives_blocks`` (a block per rank, results on one rank only),
``objects`` and ``gradients``; both front ends call these and nothing else.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from rt import _fastpath, arrays
from rt.aio import BUDGET_BYTES, Work
from rt.dtypes import INEXACT, OPS, DType, Op, check_op, code_of, numpy_dtype
from rt.group import ALL_GATHER_AS, ALL_REDUCE_AS, BARRIER_AS, SUM_SCATTER_AS, Call, CoreGroup, hash64, known_as
from rt.schedule import Collective


def all_reduce(group: CoreGroup, x: Any, op: str, out: Any, what: str = "all_reduce") -> Work:
    """Start an all-reduce; the result has x's shape. Of a list of arrays, the result is the list of theirs."""
    code = _operator(op, what)
    # The call that servers make all day: to check and describe it takes longer than to carry it out.
    known = again(group, x, out, what, ALL_REDUCE_AS[op])
    if known is not None:
        return known
    if isinstance(x, (list, tuple)):
        from rt import fused  # 4 ms, which ``import rt`` is spared

        return fused.all_reduce(group, x, code, out, what)
    work = Work(group)
    array = _array(x, what, work)
    if group.size == 1:
        check_op(code_of(array.dtype, what), code, what)
        return _alone(work, x, array, out, what)
    target = _target(out, array.shape, array, what, work)
    alias = (0, 0) if target is array else _aliasing(x, array, target, what, {(0, 0)})
    work.result = target
    dtype = code_of(array.dtype, what)
    check_op(dtype, code, what)
    call = Call(Collective.ALL_REDUCE, dtype, code, array.shape, array.size, alias=alias)
    group.submit(what, call, array, target, work)
    if array is x:
        remember(group, call, x, target, x.shape)
    return work


def again(group: CoreGroup, x: Any, out: Any, what: str, call: int) -> Work | None:
    """Start a call that was made before, None if it was not; ``call`` is what ``known_as`` returns."""
    known: Work | None = group.known.start(call, x, out, what, BUDGET_BYTES)
    if known is not None:
        group.follow(known.status)
    return known


def remember(
    group: CoreGroup, call: Call, x: np.ndarray[Any, Any], target: np.ndarray[Any, Any], shape: tuple[int, ...], number: int = 0
) -> None:
    """Have ``again`` find a call whose arguments are x itself and a result of x's dtype and this shape.

    Args:
        number: by which it is found; 0: what ``known_as`` returns.
    """
    # What another thread did to the arrays meanwhile must not be remembered.
    apart = _fastpath.lie_apart(x, target)
    if (x.shape, target.shape, x.dtype, apart) == (call.shape, shape, target.dtype, call.alias is None) and code_of(x.dtype) == call.dtype:
        group.known.remember(number or known_as(call.kind, call.op, call.root), x, target, group.ready(call))


def all_gather(group: CoreGroup, x: Any, out: Any) -> Work:
    """Start an all-gather: blocks of all ranks along axis 0, in rank order."""
    known = again(group, x, out, "all_gather", ALL_GATHER_AS)
    if known is not None:
        return known
    work = Work(group)
    array = _array(x, "all_gather", work)
    dtype = code_of(array.dtype, "all_gather")
    if group.size == 1:
        return _alone(work, x, array, out, "all_gather")
    shape = _gathered_shape(array.shape, group)
    target = _target(out, shape, array, "all_gather", work)
    alias = _aliasing(x, array, target, "all_gather", {(group.rank * array.size, 0)})
    work.result = target
    call = Call(Collective.ALL_GATHER, dtype, Op.SUM, array.shape, array.size, alias=alias)
    group.submit("all_gather", call, array, target, work)
    if array is x:
        remember(group, call, x, target, shape)
    return work


def sum_scatter(group: CoreGroup, x: Any, op: str, out: Any) -> Work:
    """Start a reduce-scatter: this rank's block, along axis 0, of the reduction."""
    code = _operator(op, "sum_scatter")
    known = again(group, x, out, "sum_scatter", SUM_SCATTER_AS[op])
    if known is not None:
        return known
    work = Work(group)
    array = _array(x, "sum_scatter", work)
    dtype = code_of(array.dtype, "sum_scatter")
    check_op(dtype, code, "sum_scatter")
    if group.size == 1:
        return _alone(work, x, array, out, "sum_scatter")
    shape = _block_shape(array.shape, group, "sum_scatter")
    target = _target(out, shape, array, "sum_scatter", work)
    alias = _aliasing(x, array, target, "sum_scatter", {(0, group.rank * target.size)})
    work.result = target
    call = Call(Collective.REDUCE_SCATTER, dtype, code, array.shape, target.size, alias=alias)
    group.submit("sum_scatter", call, array, target, work)
    if array is x:
        remember(group, call, x, target, shape)
    return work


def scan(group: CoreGroup, x: Any, op: str, out: Any, what: str = "scan") -> Work:
    """Start a prefix reduction over the ranks: of ranks 0 to this one, or as ``exscan`` to the one before."""
    work = Work(group)
    code = _operator(op, what)
    array = _array(x, what, work)
    dtype = code_of(array.dtype, what)
    if code is Op.MEAN:
        raise ValueError(f"{what}: op must be one of {', '.join(op for op in OPS if op != 'mean')}, not {op!r}")
    check_op(dtype, code, what)
    inclusive = what == "scan"
    if inclusive and group.size == 1:
        return _alone(work, x, array, out, what)
    target = _target(out, array.shape, array, what, work)
    alias = _aliasing(x, array, target, what, {(0, 0)})
    work.result = target
    if not inclusive and group.rank == 0:
        if alias is not None:  # x is still to be sent when the identity has taken its place
            array, alias, work.borrows_source = arrays.copy(array), None, False
        target[...] = _identity(dtype, code)
        if group.size == 1:
            work.finish(target)
            return work
    kind = Collective.SCAN if inclusive else Collective.EXSCAN
    group.submit(what, Call(kind, dtype, code, array.shape, array.size, alias=alias), array, target, work)
    return work


def _identity(dtype: DType, op: Op) -> Any:
    """Return what changes nothing when it is combined."""
    if op in (Op.SUM, Op.OR, Op.XOR):
        return 0
    if op is Op.PROD:
        return 1
    to = numpy_dtype(dtype)
    if op is Op.AND:
        return np.invert(np.zeros((), to))
    if to.kind == "b":
        return op is Op.MIN
    if dtype not in INEXACT:
        return np.iinfo(to).max if op is Op.MIN else np.iinfo(to).min
    end = np.inf if op is Op.MIN else -np.inf
    return complex(end, end) if to.kind == "c" else end


def broadcast(group: CoreGroup, x: Any, root: int, out: Any) -> Work:
    """Start a broadcast of the root's x; the others pass an array of the same shape and dtype, whose content does not matter."""
    root = _rank(root, group, "root", "broadcast")
    known = again(group, x, out, "broadcast", known_as(Collective.BROADCAST, root=root))
    if known is not None:
        return known
    work = Work(group)
    array = _array(x, "broadcast", work)
    dtype = code_of(array.dtype, "broadcast")
    if group.size == 1:
        return _alone(work, x, array, out, "broadcast")
    target = _target(out, array.shape, array, "broadcast", work)
    alias = (0, 0) if target is array else _aliasing(x, array, target, "broadcast", {(0, 0)})
    work.result = target
    call = Call(Collective.BROADCAST, dtype, Op.SUM, array.shape, array.size, root=root, alias=alias)
    group.submit("broadcast", call, array, target, work)
    if array is x:
        remember(group, call, x, target, x.shape)
    return work


def barrier(group: CoreGroup) -> Work:
    """Start a barrier: done when every rank has called."""
    number, nothing = BARRIER_AS
    known = again(group, nothing, nothing, "barrier", number)
    if known is not None:
        known.result = None
        return known
    work = Work(group)
    if group.size == 1:
        work.finish(None)
        return work
    call = Call(Collective.BARRIER, DType.UINT8, Op.SUM, (), 0)
    group.submit("barrier", call, None, None, work)
    group.known.remember(number, nothing, nothing, group.ready(call))
    return work


def send(group: CoreGroup, x: Any, dst: int, tag: int) -> Work:
    """Start a send; the result is x."""
    known: Work | None = group.known.send(Collective.SEND, x, dst, tag, BUDGET_BYTES)
    if known is not None:
        group.follow(known.status)
        return known
    work = Work(group)
    array = _array(x, "send", work)
    dtype = code_of(array.dtype, "send")
    peer = _peer(dst, group, "send to", "destination", "send")
    work.result = _itself(work, x, array)
    call = Call(Collective.SEND, dtype, Op.SUM, array.shape, array.size, root=peer, tag=_tag(tag, "send"))
    group.submit("send", call, array, None, work)
    _remember_message(group, call, array if array is x else None)
    return work


def recv(group: CoreGroup, shape: Any, dtype: Any, src: int, out: Any, tag: int) -> Work:
    """Start a receive of an array of the given shape and dtype."""
    code = code_of(arrays.dtype_of(dtype, "recv"), "recv")
    known: Work | None = group.known.recv(Collective.RECV, shape, numpy_dtype(code), src, out, tag, BUDGET_BYTES)
    if known is not None:
        group.follow(known.status)
        return known
    work = Work(group)
    peer = _peer(src, group, "recv from", "source", "recv")
    sides = _shape(shape, "recv")
    return _receive(group, work, _target(out, sides, None, "recv", work, numpy_dtype(code)), code, peer, tag, "recv")


def recv_like(group: CoreGroup, x: Any, src: int, out: Any, tag: int) -> Work:
    """Start a receive of an array of x's shape, dtype and kind."""
    known: Work | None = group.known.recv_like(Collective.RECV, x, src, out, tag, BUDGET_BYTES)
    if known is not None:
        group.follow(known.status)
        return known
    work = Work(group)
    like, work.hand_out = arrays.form(x, "recv_like", group)
    peer = _peer(src, group, "recv from", "source", "recv_like")
    target = _target(out, like.shape, like, "recv_like", work)
    return _receive(group, work, target, code_of(like.dtype, "recv_like"), peer, tag, "recv_like")


def _receive(group: CoreGroup, work: Work, target: np.ndarray[Any, Any], code: DType, peer: int, tag: int, what: str) -> Work:
    work.result = target
    call = Call(Collective.RECV, code, Op.SUM, target.shape, target.size, root=peer, tag=_tag(tag, what))
    group.submit(what, call, None, target, work)
    _remember_message(group, call, target)
    return work


def sendrecv(group: CoreGroup, x: Any, dst: int, src: int, out: Any, tag: int) -> Work:
    """Start a send and a receive under the same tag; the result is what arrives, when x is free too."""
    known: tuple[Work, Work] | None = group.known.sendrecv(Collective.SEND, Collective.RECV, x, dst, src, out, tag, BUDGET_BYTES)
    if known is not None:
        for each in known:
            group.follow(each.status)
        return _both(*known)
    sent, work = Work(group), Work(group)
    array = _array(x, "sendrecv", sent)
    dtype, number = code_of(array.dtype, "sendrecv"), _tag(tag, "sendrecv")
    to, origin = _peer(dst, group, "send to", "destination", "sendrecv"), _peer(src, group, "recv from", "source", "sendrecv")
    like = array if out is None else arrays.form(out, "sendrecv", group)[0]
    target = _target(out, like.shape, like, "sendrecv", work)
    if out is None:
        work.hand_out = sent.hand_out
    arrives = code_of(target.dtype, "sendrecv")
    if np.may_share_memory(array, target):  # two works know nothing of each other's memory
        array, sent.borrows_source = arrays.copy(array), False
    work.result = target
    sends = Call(Collective.SEND, dtype, Op.SUM, array.shape, array.size, root=to, tag=number)
    receives = Call(Collective.RECV, arrives, Op.SUM, target.shape, target.size, root=origin, tag=number)
    if not group.receives_first:
        group.submit("sendrecv", sends, array, None, sent)
        group.submit("sendrecv", receives, None, target, work)
    else:
        group.submit("sendrecv", receives, None, target, work)
        try:
            group.submit("sendrecv", sends, array, None, sent)
        except BaseException:  # Ctrl-C: nobody will wait for what arrives
            work.give_back()
            raise
    _remember_message(group, sends, array if array is x else None)
    _remember_message(group, receives, target)
    return _both(sent, work)


def _both(sent: Work, work: Work) -> Work:
    """Return what ends when x is free and the other array has come."""
    if sent.state == _fastpath.DONE:
        return work
    from rt import fused

    return fused.hold([work, sent], f"{work.about}, sent and received", lambda results: results[0])


def _remember_message(group: CoreGroup, call: Call, x: Any) -> None:
    """Have a message of x, or into x, found when it comes again."""
    if type(x) is np.ndarray and (x.shape, x.dtype) == (call.shape, numpy_dtype(call.dtype)):  # not what another thread made of it
        group.known.remember_message(call.kind, call.root, call.tag, x, call)


# -- arguments ------------------------------------------------------------------------------------------------------------------------

def _operator(op: str, what: str) -> Op:
    try:
        return OPS[op]
    except (KeyError, TypeError):
        raise ValueError(f"{what}: op must be one of {', '.join(OPS)}, not {op!r}") from None


def _gathered_shape(shape: tuple[int, ...], group: CoreGroup) -> tuple[int, ...]:
    """Shape of the blocks of all ranks along axis 0; numbers become a list."""
    return (group.size * shape[0], *shape[1:]) if shape else (group.size,)


def _block_shape(shape: tuple[int, ...], group: CoreGroup, what: str) -> tuple[int, ...]:
    """Shape of one of the equal blocks of an array along axis 0."""
    if not shape or shape[0] % group.size:
        raise ValueError(
            f"[{what}] Invalid shape={shape} for a group of size {group.size}. The first dimension (axis 0) must be divisible "
            "by the group size and input must have at least one."
        )
    return (shape[0] // group.size, *shape[1:])


_array = arrays.source  # x, what, work
_target = arrays.target  # out, shape, the array that gives the dtype, what, work, dtype
_aliasing = arrays.aliasing  # x, its array, the target, what, allowed


def _alone(work: Work, x: Any, array: np.ndarray[Any, Any], out: Any, what: str) -> Work:
    """A group of one: the result is x."""
    if out is not None:
        target = _target(out, array.shape, array, what, work)
        if target is not array:
            np.copyto(target, array)
        work.finish(target)
    else:
        work.finish(_itself(work, x, array))
    return work


def _itself(work: Work, x: Any, array: np.ndarray[Any, Any]) -> Any:
    """Return x, for calls that return what they were given; of what has no kind of its own, the array."""
    wrapped, work.hand_out = work.hand_out, None
    return x if isinstance(x, np.ndarray) or wrapped is not None else array


def _rank(rank: Any, group: CoreGroup, name: str, what: str) -> int:
    try:
        value = operator.index(rank)
    except TypeError:
        raise TypeError(f"{what}: {name} must be an integer, not {type(rank).__name__}") from None
    if not 0 <= value < group.size:
        raise ValueError(f"{what}: Invalid {name}={value} for a group of size {group.size}")
    return value


def _peer(rank: Any, group: CoreGroup, doing: str, name: str, what: str) -> int:
    if group.size == 1:
        raise ValueError(f"{what}: Cannot {doing} a singleton group")
    peer = _rank(rank, group, name, what)
    if peer == group.rank:
        raise ValueError(f"{what}: Invalid {name}={peer}: a rank cannot {doing} itself")
    return peer


def _tag(tag: Any, what: str) -> int:
    return _int64(tag, "tag", what)


def _int64(value: Any, name: str, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: {name} must be an integer, not {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{what}: {name} must fit into 64 bits, got {number}")
    return number


def _shape(shape: Any, what: str) -> tuple[int, ...]:
    try:
        sides = (operator.index(shape),) if not isinstance(shape, (tuple, list)) else tuple(operator.index(side) for side in shape)
    except TypeError:
        raise TypeError(f"{what}: shape must be a sequence of integers, not {shape!r}") from None
    if any(side < 0 for side in sides):
        raise ValueError(f"{what}: shape must not have negative sides, got {sides}")
    return sides


# -- groups -----------------------------------------------------------------------------------------------------------------------------

_SPLIT = 1  # tag in the signature of the all-gather behind split: it must not be taken for a user's


def split(group: CoreGroup, color: int, key: int) -> tuple[Work, int]:
    """Start to exchange the colors and keys of a split; ``split_group`` makes the group from the result and the number of the split."""
    work = Work(group)
    mine = np.array([_int64(color, "color", "split"), _int64(key, "key", "split")], np.int64)
    if group.size == 1:
        work.finish(mine.reshape(1, 2))
        return work, 0
    work.result = np.empty((group.size, 2), np.int64)
    call = Call(Collective.ALL_GATHER, DType.INT64, Op.SUM, (2,), 2, tag=_SPLIT)
    group.submit("split", call, mine, work.result, work)
    group.splits += 1  # counted where it is submitted: all ranks submit in the same order, but splits may end in another
    return work, group.splits


def split_group(group: CoreGroup, pairs: np.ndarray[Any, Any], number: int) -> CoreGroup:
    """Return this rank's group of a split: same color, ordered by key, ties by rank; a negative key means the rank."""
    if group.world is None or group.size == 1:
        return CoreGroup(group.world, group.ranks, 0, f"{group.name}.split", hash64(group.identity, "split"), group.timeout)
    color = int(pairs[group.rank, 0])
    members = [rank for rank in range(group.size) if pairs[rank, 0] == color]
    members.sort(key=lambda rank: (int(pairs[rank, 1]) if pairs[rank, 1] >= 0 else rank, rank))
    return group.world.new_group(
        [group.ranks[rank] for rank in members],
        members.index(group.rank),
        f"{group.name}.split(color={color})",
        hash64(group.identity, "split", number, color),
        group.timeout,
    )
