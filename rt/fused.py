"""Several arrays in one call: small ones travel together, large ones each on their own, all submitted at once.

May live here: which arrays travel together, how they are joined and cut apart, and the work that stands for several. May not: what an
array is (``arrays``), trees (``gradients``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rt import _fastpath, arrays, collectives
from rt.aio import BUDGET_BYTES, Work
from rt.arrays import Array, Wrap
from rt.dtypes import DType, Op, check_op, code_of
from rt.group import LIST_COUNT_BITS, LIST_COUNT_MOST, Call, CoreGroup, hash64, known_as
from rt.schedule import Collective

ALONE_BYTES = 64 * 1024  # an array of so many is not joined with others: copying it would cost about as much as a work
_BUCKET_BYTES = 1 << 20  # of joined arrays: little enough to stay in the cache between joining and sending
_LAYOUTS_MOST = 256
_KNOWN_BUCKETS = 16  # most of a list that are kept in a group's table of known calls, whose other calls need its places, too

Form = tuple[np.dtype[Any], tuple[int, ...]]


class Bucket(NamedTuple):
    """Arrays that travel together, as one.

    Attributes:
        dtype, code: on the wire.
        items: of all together.
        members, shapes: of each, its position in the call's list and its shape.
    """

    dtype: np.dtype[Any]
    code: DType
    items: int
    members: list[int]
    shapes: list[tuple[int, ...]]


class Layout:
    """How a list of arrays travels.

    A bucket takes arrays of its dtype, in order, until it holds at least ``bucket_bytes``; the array that crosses the line is included.

    Args:
        what: the call that makes it, for messages.
        forms: dtype and shape of each array.
        wire: dtype to communicate in; None: each its own.
        bucket_bytes: 0 or less: every array alone.
        alone_bytes: arrays of at least so many are never joined; None: all may be.
        names: what the arrays are called; the same on all ranks.
        count: of the caller's arrays; a list of nothing travels as one array.

    Attributes:
        tag: in the signature of all its works, so that a rank which passes another list is found out: how many arrays, and a hash.
        codes: of the dtypes of the arrays.
    """

    def __init__(
        self, what: str, forms: Sequence[Form], wire: np.dtype[Any] | None, bucket_bytes: int, alone_bytes: int | None, names: str,
        count: int,
    ) -> None:  # fmt: skip
        self.codes = {code_of(dtype, f"{what}: item {index}") for index, (dtype, _) in enumerate(forms)}
        hashed = hash64("list", *(f"{dtype.name}{shape}" for dtype, shape in forms), names) >> LIST_COUNT_BITS
        self.tag = min(count, LIST_COUNT_MOST) << (64 - LIST_COUNT_BITS) | hashed
        # Kept also where nothing is cast back: lists are told apart by the addresses of their dtypes.
        self.dtypes = [dtype for dtype, _ in forms]
        self.casts = wire is not None
        self.buckets: list[Bucket] = []
        gathering: dict[Any, tuple[list[int], int]] = {}
        found: list[tuple[np.dtype[Any], list[int]]] = []
        for index, (own, shape) in enumerate(forms):
            dtype = wire or own
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            alone = bucket_bytes <= 0 or (alone_bytes is not None and nbytes >= alone_bytes)
            members, filled = gathering.pop(dtype, ([], 0)) if not alone else ([], 0)
            if not members:
                found.append((dtype, members))
            members.append(index)
            if not alone and filled + nbytes < bucket_bytes:
                gathering[dtype] = members, filled + nbytes
        for dtype, members in found:
            self.buckets.append(_bucket(dtype, members, forms))

    def cut(self, results: Sequence[Array]) -> list[Array]:
        """Return the result of each array, from those of the buckets."""
        pieces: list[Any] = [None] * sum(len(bucket.members) for bucket in self.buckets)
        for bucket, result in zip(self.buckets, results, strict=True):
            if len(bucket.members) == 1:
                pieces[bucket.members[0]] = result
                continue
            _fastpath.cut(result, bucket.members, bucket.shapes, pieces)
        if self.casts:
            return [piece if piece.dtype == to else arrays.copy(piece, to) for piece, to in zip(pieces, self.dtypes, strict=True)]
        return pieces

    def copy_to(self, outs: list[Array], results: Sequence[Array]) -> None:
        """Copy the result of each array that did not travel alone to where the caller wants it."""
        for bucket, result in zip(self.buckets, results, strict=True):
            if len(bucket.members) > 1:
                _fastpath.spread(result, bucket.members, outs)


def _bucket(dtype: np.dtype[Any], members: list[int], forms: Sequence[Form]) -> Bucket:
    shapes = [forms[index][1] for index in members]
    return Bucket(dtype, code_of(dtype), sum(map(math.prod, shapes)), members, shapes)


_layouts: dict[Any, Layout] = {}


def layout_of(
    what: str, given: Views, wire: np.dtype[Any] | None, bucket_bytes: int, alone_bytes: int | None, names: str = ""
) -> Layout:
    """Return the layout of such a list, made once."""
    count = 0 if given is _NOTHING else len(given.items)
    key = (given.form, wire, bucket_bytes, alone_bytes, names, count)
    found = _layouts.get(key)
    if found is None:
        found = Layout(what, [(each.dtype, each.shape) for each in given.items], wire, bucket_bytes, alone_bytes, names, count)
        if len(_layouts) >= _LAYOUTS_MOST:
            _layouts.clear()
        _layouts[key] = found
    return found


class Views(NamedTuple):
    """The arrays of a list.

    Attributes:
        items: their memory, as plain NumPy arrays.
        wraps: what makes results of their kind, for those that were something else.
        form: what lists of the same dtypes and shapes have alike.
    """

    items: list[Array]
    wraps: dict[int, Wrap]
    form: bytes

    def hand_out(self, pieces: list[Array]) -> list[Any]:
        """Return results as arrays of the kinds that were passed."""
        results: list[Any] = pieces
        for index, wrap in self.wraps.items():
            results[index] = wrap(pieces[index])
        return results


def views(xs: Sequence[Any], what: str, numbers: bool) -> Views:
    """Return the memory of every array of a list.

    Args:
        numbers: whether Python's and NumPy's numbers may be among them.
    """
    items = list(xs)
    wraps: dict[int, Wrap] = {}
    form = _fastpath.forms_key(items)
    if form is not None:
        return Views(items, wraps, form)
    for index, x in enumerate(items):
        if type(x) is not np.ndarray:
            where = f"{what}: item {index}"
            if not numbers and isinstance(x, arrays.SCALARS):
                raise TypeError(f"{where}: expected a list of arrays, got a list with a {type(x).__name__}; use numpy.array(...) first")
            items[index], wrap, _ = arrays.view(x, where)
            if wrap is not None:
                wraps[index] = wrap
    form = _fastpath.forms_key(items)
    assert form is not None  # all are plain by now
    return Views(items, wraps, form)


class Works(Work):
    """Several works of one call, which ends when all have. Awaited, cancelled and timed out like one.

    Attributes:
        parts: in the order in which they were submitted.
    """

    def __init__(self, parts: list[Work], about: str, on_give_back: Callable[[], None]) -> None:
        super().__init__(parts[0].group)
        self.what, self.about = parts[0].what, about
        self.parts = parts
        self._on_give_back = on_give_back
        self.lent = any(part.lent for part in parts)
        self._flying = parts[::-1]
        self._watch()

    def _watch(self) -> None:
        """Wait for one part after the other, so that it costs each part one waiter."""
        while self._flying:
            if self._flying[-1].add_waiter(self._watch):
                return
            self._flying.pop()
        failed = next((part for part in self.parts if part.state == _fastpath.FAILED), None)
        if failed is None:
            self.finish(self.parts)
            return
        part, error = failed, failed.error
        assert error is not None
        self.fail(lambda _: error(part))

    def pending(self) -> Work:
        """Return the first part in flight."""
        return next((part for part in self.parts if part.state == _fastpath.FLYING), self.parts[-1])

    def describe(self) -> str:
        """Return ``all_sum #3 to #5 (200 arrays)``."""
        first, last = self.parts[0].sequence, self.parts[-1].sequence
        return f"{self.what} #{first} to #{last} ({self.about})" if first != last else f"{self.what} #{first} ({self.about})"

    def _give_back(self) -> Generator[None, None, None]:
        self._on_give_back()
        for part in self.parts:
            yield from part._give_back()


def start(
    group: CoreGroup, layout: Layout, items: list[Array], op: Op, what: str, targets: Sequence[Array] | None = None
) -> list[Work]:
    """Submit the works of a list, joining each bucket only then: the first travel while the next are copied.

    Args:
        targets: per array where its result goes if it travels alone; None: to memory of ours.
    """
    works = []
    budget = BUDGET_BYTES // max(1, len(layout.buckets))  # a call may take no longer than any other turn of a loop
    for bucket in layout.buckets:
        if len(bucket.members) > 1:
            source = _fastpath.empty((bucket.items,), bucket.dtype)
            if not _fastpath.join(items, bucket.members, source):
                np.concatenate([items[index].reshape(-1) for index in bucket.members], out=source, casting="unsafe")
            works.append(_submit(group, layout, bucket, (source, source), op, what, budget, (False, False)))
            continue
        index = bucket.members[0]
        mine, target = items[index], None if targets is None else targets[index]
        source = arrays.contiguous(mine) if mine.dtype == bucket.dtype else arrays.copy(mine, bucket.dtype)
        borrows = source is mine, target is not None
        if target is None and source is not mine:
            target = source
        works.append(_submit(group, layout, bucket, (source, target), op, what, budget, borrows))
    return works


def _submit(
    group: CoreGroup, layout: Layout, bucket: Bucket, memory: tuple[Array, Array | None], op: Op, what: str, budget: int,
    borrows: tuple[bool, bool],
) -> Work:  # fmt: skip
    """Start the work of a bucket, from and to this memory, which may be the caller's."""
    number = known_as(Collective.ALL_REDUCE, op) ^ layout.tag
    source, target = memory
    work: Work | None = group.known.start(number, source, target, what, budget)
    if work is not None:
        work.borrows_source, work.borrows_target = borrows
        group.follow(work.status)
        return work
    work = Work(group)
    work.borrows_source, work.borrows_target = borrows
    work.result = target if target is not None else _fastpath.empty(source.shape, bucket.dtype)
    alias = None if _fastpath.lie_apart(source, work.result) else (0, 0)  # no other overlap has come so far
    call = Call(Collective.ALL_REDUCE, bucket.code, op, source.shape, bucket.items, tag=layout.tag, alias=alias)
    group.submit(what, call, source, work.result, work, budget)
    if len(layout.buckets) <= _KNOWN_BUCKETS:
        collectives.remember(group, call, source, work.result, source.shape, number)
    return work


def each(group: CoreGroup, xs: Sequence[Any], op: Op, out: Any, what: str, finish: Callable[[list[Any]], Any]) -> Work:
    """Start an all-reduce of every array of a list on a device: NCCL makes one kernel of them, so they are not joined.

    Args:
        finish: makes of the list of results what the caller gets.
    """
    if out is not None and (not isinstance(out, (list, tuple)) or len(out) != len(xs)):
        raise ValueError(f"{what}: out must be a list of {len(xs)} arrays, as x is")
    with group.together():
        works = [collectives.all_reduce(group, x, op.name.lower(), y, what) for x, y in zip(xs, out or [None] * len(xs), strict=True)]
    return hold(works, f"{len(xs)} arrays", finish, lambda: None)


def hold(
    works: list[Work], about: str, finish: Callable[[list[Array]], Any], on_give_back: Callable[[], None] | None = None
) -> Work:
    """Return one work that stands for several and hands out what ``finish`` makes of their results.

    Args:
        on_give_back: called when the caller's memory must be the caller's again; None: ``finish`` writes to none.
    """
    if len(works) == 1 and on_give_back is None:
        works[0].hand_out = lambda result: finish([result])
        return works[0]
    whole = Works(works, about, on_give_back or (lambda: None))
    whole.hand_out = lambda parts: finish([part.outcome() for part in parts])
    return whole


def all_reduce(group: CoreGroup, xs: Sequence[Any], op: Op, out: Any, what: str) -> Work:
    """Start an all-reduce of every array of a list; the result is a list of their results.

    Raises:
        TypeError: an item is no array, has a dtype that ``op`` is not defined on, or ``out`` is no list.
        ValueError: ``out`` does not fit: its length, an item of it, or memory that it shares with anything but the same item of ``xs``.
    """
    if group.takes_devices and any(group.on_device(x, what) is not None for x in xs):
        return each(group, xs, op, out, what, list)
    given = views(xs, what, numbers=False)
    outs = None if out is None else _outs(out, given.items, what)
    # A list of nothing is a call as any other, to be compared with those of the other ranks.
    travelling = given if given.items else _NOTHING
    layout = layout_of(what, travelling, None, _BUCKET_BYTES, ALONE_BYTES)
    for code in layout.codes if given.items else ():
        check_op(code, op, what)
    if group.size == 1:
        work = Work(group)
        for x, target in zip(given.items, outs or (), strict=outs is not None):
            np.copyto(target, x)
        itself = [x if isinstance(x, np.ndarray) or i in given.wraps else given.items[i] for i, x in enumerate(xs)]
        work.finish(itself if out is None else list(out))
        return work
    works = start(group, layout, travelling.items, op, what, outs or None)
    about = f"{len(xs)} arrays"
    if outs is None:
        return hold(works, about, lambda results: given.hand_out(layout.cut(results)[: len(xs)]))
    answer, written = list(out), outs

    def write(results: list[Array]) -> list[Any]:
        if written:  # else the memory was given back
            layout.copy_to(written, results)
        return answer

    return hold(works, about, write, written.clear)


_NOTHING = views([np.empty(0, np.uint8)], "", numbers=False)


def _outs(out: Any, items: list[Array], what: str) -> list[Array]:
    """Return the memory of ``out=`` of a list."""
    if not isinstance(out, (list, tuple)):
        raise TypeError(f"{what}: out of a list must be a list of arrays, not {type(out).__name__}")
    if len(out) != len(items):
        raise ValueError(f"{what}: out must be a list of {len(items)} arrays, but has {len(out)}")
    outs = list(out)
    if not _fastpath.all_lie_like(outs, items):
        outs = [arrays.written(each, x.shape, x.dtype, f"{what}: item {i}") for i, (each, x) in enumerate(zip(out, items, strict=True))]
    places = _fastpath.overlap(items, outs)
    if places is not None:
        raise ValueError(
            f"{what}: out at item {places[0]} overlaps item {places[1]}; each may be the array at its own place, or share no memory with "
            "any other"
        )
    return outs
