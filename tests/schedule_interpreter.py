"""A small interpreter of schedules: all ranks in one thread, on NumPy arrays, with data whose right result NumPy knows.

May live here: what the tests of algorithms and of their choice share, written from the contract in ``rt/schedule.py`` and sharing no
code with the engine. May not: links, engines, processes, tests. Steps are done whole, never item by item: what is right here needs no
concurrency. A rank does its steps either strictly in order, or in any order that memory and streams allow; sends never block.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rt.dtypes import INEXACT, DType, Op, numpy_dtype
from rt.schedule import INPUT, OUTPUT, TEMP, Collective, Kind, Schedule, Step

Array = np.ndarray[Any, Any]
DTYPES = (DType.INT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.COMPLEX64, DType.BOOL)


class Setting(NamedTuple):
    """What a collective is called with; ``items`` is the ``count`` of the algorithms, ``counts`` those of the kinds in V."""

    size: int
    items: int
    lanes: int = 1
    itemsize: int = 4
    mean: bool = False
    root: int = 0
    counts: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Items of each rank's block."""
        return self.counts or (self.items,) * self.size


class Numbers(NamedTuple):
    """What items are and how two of them combine."""

    x: np.dtype[Any]
    wide: np.dtype[Any]
    combine: Callable[[Array, Array], Array]
    poison: Any  # what memory holds before anything is written


UFUNCS = {
    Op.SUM: np.add,
    Op.PROD: np.multiply,
    Op.MIN: np.minimum,
    Op.MAX: np.maximum,
    Op.AND: np.bitwise_and,
    Op.OR: np.bitwise_or,
    Op.XOR: np.bitwise_xor,
    Op.MEAN: np.add,
}


def numbers(dtype: DType, op: Op) -> Numbers:
    return Numbers(numpy_dtype(dtype), np.dtype(np.float32), UFUNCS[op], np.nan if dtype in INEXACT else 77)


def words(form: str) -> Numbers:
    """Items are text and combine to ``form``, which shows the order of operations."""
    combine = np.frompyfunc(form.format, 2, 1)
    return Numbers(np.dtype(object), np.dtype(object), combine, "unset")


class Rank:
    """One rank: its memory and its program."""

    def __init__(self, rank: int, size: int, program: Schedule, source: Array, target: Array, kind: Numbers) -> None:
        self.rank, self.size, self.program, self.kind = rank, size, program, kind
        temps = [np.full(temp.count, kind.poison, kind.wide if temp.wide else kind.x) for temp in program.temps]
        self.buffers = [source, target, *temps]

    def view(self, buffer: int, start: int, count: int) -> Array:
        whole = self.buffers[buffer]
        assert count > 0 and start >= 0 and start + count <= len(whole), f"items {start}..{start + count} of buffer {buffer}"
        return whole[start : start + count]

    def reads(self, step: Step) -> list[Array]:
        operands = [] if step.kind is Kind.RECV else [self.view(step.src, step.src_off, step.count)]
        return operands + ([self.view(step.src2, step.src2_off, step.count)] if step.kind is Kind.REDUCE else [])

    def writes(self, step: Step) -> list[Array]:
        return [] if step.kind is Kind.SEND else [self.view(step.dst, step.dst_off, step.count)]

    def combine(self, left: Array, right: Array, dtype: np.dtype[Any]) -> Array:
        if self.kind.x in (np.float16, ml_dtypes.bfloat16):  # as the kernels do: in float32, rounded when stored
            left, right = left.astype(np.float32), right.astype(np.float32)
        return np.asarray(self.kind.combine(left, right)).astype(dtype)

    def do_local(self, step: Step) -> None:
        (src, *second), (dst,) = self.reads(step), self.writes(step)
        if step.kind is Kind.CONVERT:
            assert {src.dtype, dst.dtype} == {self.kind.x, self.kind.wide}
            dst[:] = src.astype(dst.dtype)
            return
        assert all(operand.dtype == dst.dtype for operand in (src, *second))
        if step.kind is Kind.COPY:
            dst[:] = src
        elif step.kind is Kind.REDUCE:
            dst[:] = self.combine(src, second[0], dst.dtype)
        else:
            assert step.kind is Kind.SCALE and dst.dtype in (np.float32, np.float64, np.complex64, np.complex128, object)
            dst[:] = src if dst.dtype == object else src / dst.dtype.type(self.size)

    def do_arrived(self, step: Step, wire: Array) -> None:
        (dst,) = self.writes(step)
        assert len(wire) == step.count
        if step.kind is Kind.RECV:
            assert wire.dtype == dst.dtype
            dst[:] = wire
            return
        (src,) = self.reads(step)
        assert src.dtype == dst.dtype and wire.dtype == (self.kind.wide if step.wire_wide else self.kind.x)
        left, right = (wire, src) if step.wire_left else (src, wire)
        dst[:] = self.combine(left, right, dst.dtype)


def stream(rank: int, step: Step) -> tuple[int, int, int] | None:
    """Name the ordered stream a step belongs to: (from, to, lane)."""
    if step.peer < 0:
        return None
    return (rank, step.peer, step.lane) if step.kind is Kind.SEND else (step.peer, rank, step.lane)


def bounds(arrays: Sequence[Array]) -> list[tuple[int, int]]:
    """Return where arrays (all contiguous) lie in memory, so that aliasing is found without being told of it."""
    starts = [array.__array_interface__["data"][0] for array in arrays]
    return [(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=True)]


def overlap(some: list[tuple[int, int]], more: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in more)


def hazards(rank: Rank) -> list[list[int]]:
    """List for each step the later ones that must wait for it, because they share memory or a stream."""
    steps = rank.program.steps
    reads, writes = [bounds(rank.reads(step)) for step in steps], [bounds(rank.writes(step)) for step in steps]
    names = [stream(rank.rank, step) for step in steps]

    def waits(late: int, early: int) -> bool:
        same_stream = names[late] is not None and names[late] == names[early]
        return same_stream or overlap(writes[late], writes[early] + reads[early]) or overlap(reads[late], writes[early])

    return [[late for late in range(early + 1, len(steps)) if waits(late, early)] for early in range(len(steps))]


def one_after_another(rank: Rank) -> list[list[int]]:
    """List for each step the next one."""
    count = len(rank.program.steps)
    return [[i + 1] if i + 1 < count else [] for i in range(count)]


class Net:
    """All ranks and the streams between them; the rank ``held`` has not called yet."""

    def __init__(self, ranks: Sequence[Rank], rng: random.Random, *, in_order: bool, held: int = -1) -> None:
        self.ranks, self.rng, self.held = ranks, rng, held
        self.streams: defaultdict[tuple[int, int, int], deque[Array]] = defaultdict(deque)
        self.after = [one_after_another(rank) if in_order else hazards(rank) for rank in ranks]
        self.waits = [np.bincount([i for later in after for i in later], minlength=len(after)).tolist() for after in self.after]
        self.ready = [[i for i, count in enumerate(waits) if not count] for waits in self.waits]
        self.left = [len(rank.program.steps) for rank in ranks]

    def _try(self, rank: Rank, step: Step) -> bool:
        name = stream(rank.rank, step)
        if name is None:
            rank.do_local(step)
        elif step.kind is Kind.SEND:
            self.streams[name].append(rank.reads(step)[0].copy())
        elif self.streams[name]:
            rank.do_arrived(step, self.streams[name].popleft())
        else:
            return False
        return True

    def _advance(self, rank: Rank) -> bool:
        """Do what this rank can do now, in random order where order is free; say whether that was anything."""
        ready, waits = self.ready[rank.rank], self.waits[rank.rank]
        done = [i for i in self.rng.sample(ready, len(ready)) if self._try(rank, rank.program.steps[i])]
        for i in done:
            ready.remove(i)
            for later in self.after[rank.rank][i]:
                waits[later] -= 1
                if not waits[later]:
                    ready.append(later)
        self.left[rank.rank] -= len(done)
        return bool(done)

    def run(self) -> None:
        """Go on until nobody can."""
        callers = [rank for rank in self.ranks if rank.rank != self.held]
        while True:
            self.rng.shuffle(callers)
            if not [rank for rank in callers if self._advance(rank)]:
                return

    def finish(self) -> None:
        self.run()
        assert not any(self.left), f"deadlock; steps left per rank: {self.left}"
        assert not any(self.streams.values()), "something was sent that nobody received"


def wire_is_wide(plan: Schedule, step: Step) -> bool:
    """Say whether a message is of the wide dtype."""
    if step.kind is Kind.RECV_REDUCE:
        return step.wire_wide
    buffer = step.src if step.kind is Kind.SEND else step.dst
    return buffer >= TEMP and plan.temps[buffer - TEMP].wide


def assert_matched(plans: list[Schedule]) -> None:
    """Check that every message sent is received, in the same order, with the same count and dtype."""
    sent: defaultdict[tuple[int, int, int], list[tuple[int, bool]]] = defaultdict(list)
    received: defaultdict[tuple[int, int, int], list[tuple[int, bool]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for step in plan.steps:
            name = stream(rank, step)
            assert step.count > 0
            if name is not None:
                assert step.peer != rank and 0 <= step.peer < len(plans)
                (sent if step.kind is Kind.SEND else received)[name].append((step.count, wire_is_wide(plan, step)))
    assert sent == received
    assert len({plan.name for plan in plans}) == 1


GATHERS = (Collective.ALL_GATHER, Collective.ALL_GATHER_V, Collective.GATHER, Collective.GATHER_V)
SCATTERS = (Collective.REDUCE_SCATTER, Collective.REDUCE_SCATTER_V, Collective.SCATTER, Collective.SCATTER_V)


def lengths(kind: Collective, rank: int, s: Setting) -> tuple[int, int]:
    """Return how many items INPUT and OUTPUT of a rank have; none where a program must not touch them."""
    whole, block = sum(s.blocks), s.blocks[rank]
    if kind in (Collective.GATHER, Collective.GATHER_V):
        return block, whole if rank == s.root else 0
    if kind in (Collective.SCATTER, Collective.SCATTER_V):
        return whole if rank == s.root else 0, block
    if kind in GATHERS:
        return block, whole
    if kind in SCATTERS:
        return whole, block
    if kind is Collective.ALL_TO_ALL:
        return whole, whole
    untouched = (kind is Collective.REDUCE and rank != s.root) or (kind is Collective.EXSCAN and rank == 0)
    return s.items, 0 if untouched else s.items


def in_place_offsets(kind: Collective, rank: int, s: Setting) -> tuple[int, int] | None:
    """Return where INPUT and OUTPUT start in memory they share, None if one of them is none."""
    if 0 in lengths(kind, rank, s):
        return None
    start = sum(s.blocks[:rank])
    return (start, 0) if kind in GATHERS else (0, start) if kind in SCATTERS else (0, 0)


def memory(kind: Collective, rank: int, x: Array, s: Setting, poison: Any, in_place: bool) -> tuple[Array, Array]:
    """Return INPUT, holding ``x``, and OUTPUT of one rank; in place they share memory as the contract says."""
    given, made = lengths(kind, rank, s)
    offsets = in_place_offsets(kind, rank, s) if in_place else None
    if offsets is None:
        return x.copy(), np.full(made, poison, x.dtype)
    whole = np.full(max(given, made), poison, x.dtype)
    sides = whole[offsets[0] : offsets[0] + given], whole[offsets[1] : offsets[1] + made]
    sides[INPUT][:] = x
    return sides


def simulate(
    kind: Collective, plans: list[Schedule], s: Setting, inputs: list[Array], items: Numbers, rng: random.Random, in_place: bool = False
) -> list[Array]:
    """Run ``plans`` on ``inputs`` and return all OUTPUTs; checks that out of place no INPUT changes."""
    sides = [memory(kind, rank, x, s, items.poison, in_place) for rank, x in enumerate(inputs)]
    ranks = [Rank(i, s.size, plan, *side, items) for i, (plan, side) in enumerate(zip(plans, sides, strict=True))]
    few = max(len(plan.steps) for plan in plans) < 60  # hazards are looked for pair by pair
    Net(ranks, rng, in_order=not few or rng.random() < 0.5).finish()
    if not in_place:
        for rank, x in enumerate(inputs):
            np.testing.assert_array_equal(sides[rank][INPUT], x, err_msg=f"rank {rank}: INPUT was written")
    return [side[OUTPUT] for side in sides]


def exact_data(dtype: DType, op: Op, count: int, rng: np.random.Generator) -> Array:
    """Draw items whose sums and products are exact in any order and in every dtype, up to 17 of them."""
    if dtype is DType.BOOL:
        return rng.integers(0, 2, count).astype(bool)
    small = np.array([-1, 1, 1, 2]) if op is Op.PROD else np.arange(-7, 8)
    x = rng.choice(small, count)
    if dtype is DType.COMPLEX64:
        z = x * rng.choice([1, 1j, -1j], count) if op is Op.PROD else x + 1j * rng.choice(small, count)
        return z.astype(np.complex64)
    return x.astype(numpy_dtype(dtype))


def accumulated(inputs: Sequence[Array], op: Op) -> Array:
    """Reduce in rank order, halves in float32, rounded once."""
    dtype = inputs[0].dtype
    half = dtype in (np.float16, ml_dtypes.bfloat16)
    total: Array = functools.reduce(UFUNCS[op], [x.astype(np.float32) if half else x for x in inputs])
    if op is Op.MEAN:
        total = total / total.dtype.type(len(inputs))
    return total.astype(dtype)


def expected(kind: Collective, inputs: list[Array], op: Op, s: Setting) -> list[Array]:
    nothing, ends = inputs[0][:0], np.cumsum(s.blocks)[:-1]

    def at_root(result: Array) -> list[Array]:
        return [result if rank == s.root else nothing for rank in range(s.size)]

    match kind:
        case Collective.BROADCAST:
            return [inputs[s.root]] * s.size
        case Collective.ALL_GATHER | Collective.ALL_GATHER_V:
            return [np.concatenate(inputs)] * s.size
        case Collective.GATHER | Collective.GATHER_V:
            return at_root(np.concatenate(inputs))
        case Collective.SCATTER | Collective.SCATTER_V:
            return np.split(inputs[s.root], ends)
        case Collective.ALL_TO_ALL:
            return [np.concatenate([np.split(x, ends)[rank] for x in inputs]) for rank in range(s.size)]
        case Collective.SCAN:
            return [accumulated(inputs[: rank + 1], op) for rank in range(s.size)]
        case Collective.EXSCAN:
            return [accumulated(inputs[:rank], op) if rank else nothing for rank in range(s.size)]
    total = accumulated(inputs, op)
    if kind is Collective.REDUCE:
        return at_root(total)
    return [total] * s.size if kind is Collective.ALL_REDUCE else np.split(total, ends)
