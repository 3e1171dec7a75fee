"""Algorithms for prefixes over the ranks: scan and exscan.

May live here: pure functions ``(rank, size, count, ...) -> Schedule`` by which rank r gets the reduction of ranks 0 to r, or to r - 1. May
not: other reductions (``algorithms``), thresholds between algorithms (``choose``), sockets, clocks, arrays.

Arguments are those of ``algorithms``. Lower ranks are always the left operand. Rank 0 of an exscan leaves OUTPUT alone: no operation of a
schedule makes an identity.
"""

from __future__ import annotations

from collections.abc import Iterator

from rt.algorithms import meet
from rt.algorithms_move import Span, local_step, recv_step, schedule, send_step, stripes
from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp


def _doubling(rank: int, first: int, size: int, own: Span, total: Span, wide: bool) -> Iterator[Step]:
    """Make the prefix over ranks ``first`` to ``rank`` of their ``own`` in ``total``; it stays in ``own`` on the first."""
    leap = 1
    while first + leap < size:
        if rank + leap < size:
            yield send_step(rank + leap, 0, own)
        if rank - leap >= first:
            yield meet(rank - leap, 0, own, total, left=True, wide=wide)
            own = total
        leap *= 2


def doubling_scan(rank: int, size: int, count: int, *, wide: bool = False) -> Schedule:
    """Scan ``count`` items by recursive doubling: after round i a rank has the reduction of the ``2 ** i`` ranks up to itself.

    ``ceil(log2(size))`` rounds, in each of which a rank sends ``count`` items, as float32 if ``wide``. Scratch: none, if ``wide`` ``count``
    float32 items. Source: Hillis and Steele, "Data parallel algorithms", Communications of the ACM 1986.
    """
    own, out = Span(INPUT, 0, count), Span(OUTPUT, 0, count)
    total = own.on(TEMP) if wide else out
    steps = [local_step(Kind.CONVERT, own, total)] if wide else []
    steps += _doubling(rank, 0, size, total if wide else own, total, wide)
    if wide:
        steps.append(local_step(Kind.CONVERT, total, out))
    elif rank == 0:
        steps.append(local_step(Kind.COPY, own, out))
    return schedule("doubling", steps, [Temp(count, wide)])


def doubling_exscan(rank: int, size: int, count: int, *, wide: bool = False) -> Schedule:
    """Do an exclusive scan of ``count`` items: everyone hands its items to the next rank, and those do :func:`doubling_scan`.

    ``1 + ceil(log2(size - 1))`` rounds. Scratch: none, if ``wide`` ``count`` items and as many float32 items. Source: Hillis and Steele,
    Communications of the ACM 1986, after a shift.
    """
    own, out = Span(INPUT, 0, count), Span(OUTPUT, 0, count)
    steps = [send_step(rank + 1, 0, own)] if rank + 1 < size else []
    if rank > 0:
        shifted, total = (own.on(TEMP + 1), own.on(TEMP)) if wide else (out, out)
        steps.append(recv_step(rank - 1, 0, shifted))
        if wide:
            steps.append(local_step(Kind.CONVERT, shifted, total))
        steps += _doubling(rank, 1, size, total, total, wide)
        if wide:
            steps.append(local_step(Kind.CONVERT, total, out))
    return schedule("doubling", steps, [Temp(count, wide), Temp(count, False)])


def pipelined_scan(rank: int, size: int, count: int, lanes: int, itemsize: int, *, wide: bool = False) -> Schedule:
    """Scan ``count`` items along the line of ranks; every rank passes on its prefix while more of the one before arrives.

    ``size - 1`` hops that overlap; every rank but the last sends ``count`` items, as float32 if ``wide``. Only ranks that follow each other
    talk. Reduced in rank order, from the left. Scratch: none, if ``wide`` ``count`` float32 items. Source: the "linear" scan of MPI
    libraries.
    """
    steps: list[Step] = []
    for lane, own in stripes(Span(INPUT, 0, count), lanes, itemsize):
        out = own.on(OUTPUT)
        total = own.on(TEMP) if wide else out
        if wide:
            steps.append(local_step(Kind.CONVERT, own, total))
        elif rank == 0:
            steps.append(local_step(Kind.COPY, own, out))
        if rank > 0:
            steps.append(meet(rank - 1, lane, total if wide else own, total, left=True, wide=wide))
        if rank + 1 < size:
            steps.append(send_step(rank + 1, lane, total if wide or rank else own))
        if wide:
            steps.append(local_step(Kind.CONVERT, total, out))
    return schedule("pipeline_wide" if wide else "pipeline", steps, [Temp(count, wide)])


def pipelined_exscan(rank: int, size: int, count: int, lanes: int, itemsize: int, *, wide: bool = False) -> Schedule:
    """Do an exclusive scan of ``count`` items along the line of ranks: what arrives is kept, what is passed on has this rank's part in it.

    Hops and bytes of :func:`pipelined_scan`. Scratch: twice ``count`` items, float32 if ``wide``: in place what arrives must not hide x.
    Source: the "linear" exscan of MPI libraries.
    """
    steps: list[Step] = []
    for lane, own in stripes(Span(INPUT, 0, count), lanes, itemsize):
        before, passed = own.on(TEMP), own.on(TEMP + 1) if rank or wide else own
        if rank > 0:
            steps.append(recv_step(rank - 1, lane, before))
        if rank + 1 < size:
            if wide:
                steps.append(local_step(Kind.CONVERT, own, passed))
            if rank > 0:
                mine = passed if wide else own
                steps.append(Step(Kind.REDUCE, -1, 0, *before[:2], *mine[:2], *passed))
            steps.append(send_step(rank + 1, lane, passed))
        if rank > 0:
            steps.append(local_step(Kind.CONVERT if wide else Kind.COPY, before, own.on(OUTPUT)))
    return schedule("pipeline_wide" if wide else "pipeline", steps, [Temp(count, wide)] * 2)
