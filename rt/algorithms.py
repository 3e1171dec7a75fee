"""Algorithms that reduce: all-reduce and reduce-scatter.

May live here: pure functions ``(rank, size, count, ...) -> Schedule`` that combine items of several ranks. May not: algorithms that only
move data and the words shared with them (``algorithms_move``), thresholds between algorithms (``choose``), sockets, clocks, arrays.

Arguments are those of ``algorithms_move``. Two more occur:

* ``mean``: divide the finished sum by ``size``, before it is rounded; x must be floating or complex.
* ``wide`` (or a name ending in ``_wide``): x is a half type and is summed or multiplied in float32, rounded once at the end. Left out,
  halves are rounded after every operation, which is right for min and max, and for a single operation (two ranks).

Who computes a chunk matters: where one rank does and the others receive the result, all ranks hold the same bits whatever the order.
Where several ranks compute the same items they must do the same operations on the same operands, so these reduce in rank order, the
lower rank being the left operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rt.algorithms_move import (
    Span,
    Way,
    blocks,
    local_step,
    others,
    pieces,
    recv_step,
    ring_spread,
    ring_ways,
    schedule,
    send_step,
    stripes,
)
from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp


def meet(peer: int, lane: int, own: Span, dst: Span, *, left: bool, wide: bool = False) -> Step:
    """Receive from ``peer`` and combine with ``own`` into ``dst``; ``left`` says that what arrives is the left operand."""
    return Step(Kind.RECV_REDUCE, peer, lane, own.buffer, own.start, -1, 0, dst.buffer, dst.start, own.length, left, wide)


def finish(total: Span, out: Span, mean: bool) -> Iterator[Step]:
    """Bring a finished sum into ``out``: divide while it is still wide, then round once."""
    if mean:
        yield local_step(Kind.SCALE, total, total)
    if total.buffer != out.buffer:
        yield local_step(Kind.CONVERT, total, out)


# --- rings: only neighbours talk ------------------------------------------------------------------------------------------------------


def ring_reduce(rank: int, way: Way, own: Sequence[Span], kept: Sequence[Span], wide: bool) -> Iterator[Step]:
    """Send partial sums once round the ring; rank r ends with the whole of chunk r.

    Args:
        rank: of this process.
        way: how the part travels.
        own: this rank's contribution to the chunk met at hop 0, 1, ...; the last is its own chunk.
        kept: where the partial sum of that chunk is kept, the last one being the total; at hop 0 used only if ``wide``.
        wide: partial sums travel and are kept as float32; so is a contribution that lies where its partial sum is kept.
    """
    last = len(own) - 1
    for hop, (mine, partial) in enumerate(zip(own, kept, strict=True)):
        if wide and mine != partial:
            yield local_step(Kind.CONVERT, mine, partial)
            mine = partial
        if hop:
            yield meet(way.behind, way.lane, mine, partial, left=way.behind < rank, wide=wide)
        if hop < last:
            yield send_step(way.ahead, way.lane, partial if hop else mine)


def as_met(rank: int, way: Way, chunks: Sequence[Span]) -> list[Span]:
    """Put chunks in the order in which a rank meets them, its own last."""
    return [chunks[(rank - way.turn * hop) % len(chunks)] for hop in range(1, len(chunks) + 1)]


def _two_slots(part: int, met: Sequence[Span]) -> list[Span]:
    """Keep partial sums in two TEMPs per part by turns: one fills while the other is sent on."""
    return [Span(TEMP + 2 * part + hop % 2, 0, chunk.length) for hop, chunk in enumerate(met)]


def _ring_all_reduce(rank: int, size: int, count: int, lanes: int, itemsize: int, mean: bool, wide: bool) -> Schedule:
    parts = pieces(count, itemsize, 2 * lanes, size)
    steps: list[Step] = []
    temps: list[Temp] = []
    for i, (way, part) in enumerate(zip(ring_ways(rank, size, parts), Span(INPUT, 0, count).split(parts), strict=True)):
        chunks = part.split(size)
        met = as_met(rank, way, chunks)
        if wide:
            kept = _two_slots(i, met)
            temps += [Temp(chunks[0].length, True)] * 2
        else:
            kept = [chunk.on(OUTPUT) for chunk in met]
        mine = chunks[rank].on(OUTPUT)
        steps += ring_reduce(rank, way, met, kept, wide)
        steps += finish(kept[-1], mine, mean)
        steps += ring_spread(rank, way, mine, [chunk.on(OUTPUT) for chunk in chunks])
    return schedule("ring_wide" if wide else "ring", steps, temps)


def ring_all_reduce(rank: int, size: int, count: int, lanes: int, itemsize: int, *, mean: bool = False) -> Schedule:
    """All-reduce ``count`` items round the ring, in both directions and over all lanes: reduce-scatter, then all-gather.

    ``2 * (size - 1)`` hops; every rank sends ``2 * (size - 1) / size * count`` items, the least possible; no scratch. Source: Patarasuk
    and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
    """
    return _ring_all_reduce(rank, size, count, lanes, itemsize, mean, False)


def ring_all_reduce_wide(rank: int, size: int, count: int, lanes: int, itemsize: int, *, mean: bool = False) -> Schedule:
    """Do :func:`ring_all_reduce` for half types: partial sums travel as float32, finished chunks as halves.

    ``2 * (size - 1)`` hops; every rank sends ``(size - 1) / size * count`` float32 items and as many halves: half as much again as a
    narrow ring. Scratch: two float32 chunks per part.
    """
    return _ring_all_reduce(rank, size, count, lanes, itemsize, mean, True)


def _ring_reduce_scatter(rank: int, counts: Sequence[int], lanes: int, itemsize: int, mean: bool, wide: bool) -> Schedule:
    most, size = max(counts), len(counts)
    parts = pieces(most, itemsize, 2 * lanes)
    split = [block.split(parts) for block in blocks(INPUT, counts)]
    outs = Span(OUTPUT, 0, counts[rank]).split(parts)
    steps: list[Step] = []
    temps: list[Temp] = []
    for i, (way, part) in enumerate(zip(ring_ways(rank, size, parts), Span(INPUT, 0, most).split(parts), strict=True)):
        met = as_met(rank, way, [block[i] for block in split])
        out = outs[i]
        kept = _two_slots(i, met)  # never OUTPUT: in place that is this rank's own contribution, which is needed last
        if not wide:
            kept[-1] = out
        temps += [Temp(part.length, wide)] * 2
        steps += ring_reduce(rank, way, met, kept, wide)
        steps += finish(kept[-1], out, mean)
    return schedule("ring_wide" if wide else "ring", steps, temps)


def ring_reduce_scatter(rank: int, counts: Sequence[int], lanes: int, itemsize: int, *, mean: bool = False) -> Schedule:
    """Reduce INPUT (blocks of ``counts`` items) and leave block ``rank`` of the result in OUTPUT, round the ring.

    ``size - 1`` hops; every rank sends all blocks but its own, the least possible. INPUT is not written; scratch: two of the largest
    block. Source: the first half of Patarasuk and Yuan, JPDC 2009.
    """
    return _ring_reduce_scatter(rank, counts, lanes, itemsize, mean, False)


def ring_reduce_scatter_wide(rank: int, counts: Sequence[int], lanes: int, itemsize: int, *, mean: bool = False) -> Schedule:
    """Do :func:`ring_reduce_scatter` for half types: partial sums travel as float32, so twice its bytes; scratch: two float32 blocks."""
    return _ring_reduce_scatter(rank, counts, lanes, itemsize, mean, True)


# --- all pairs talk -------------------------------------------------------------------------------------------------------------------


def _fold(rank: int, size: int, lane: int, own: Span, at: int, wide: bool) -> list[Step]:
    """Receive one span from every other rank and reduce all in rank order, from the left, into TEMP from item ``at`` on.

    Only from rank 2 on does something have to be received before ``own`` can be used. TEMP + 1 then holds ``own`` in wide form, and
    TEMP + 2 what came from rank 0, as no step receives halves into a wide buffer without reducing.
    """
    total = Span(TEMP, at, own.length)
    steps: list[Step] = []
    if wide:
        mine = total if rank < 2 else total.on(TEMP + 1)
        steps.append(local_step(Kind.CONVERT, own, mine))
        own = mine
    if rank < 2:
        steps.append(meet(1 - rank, lane, own, total, left=rank == 1))
    else:
        landing = total.on(TEMP + 2) if wide else total
        steps.append(recv_step(0, lane, landing))
        if wide:
            steps.append(local_step(Kind.CONVERT, landing, total))
        steps += [meet(peer, lane, total, total, left=False) for peer in range(1, rank)]
        steps.append(Step(Kind.REDUCE, -1, 0, *total[:2], *own[:2], *total))
    steps += [meet(peer, lane, total, total, left=False) for peer in range(max(rank, 1) + 1, size)]
    return steps


def _fold_into(rank: int, size: int, lane: int, own: Span, at: int, out: Span, *, mean: bool, wide: bool) -> list[Step]:
    """Do :func:`_fold` and bring the result into ``out``, which may be the memory of ``own``."""
    steps = _fold(rank, size, lane, own, at, wide)
    if wide:
        return steps + list(finish(Span(TEMP, at, own.length), out, mean))
    steps[-1] = steps[-1]._replace(dst=out.buffer, dst_off=out.start)  # own is used up by now, so the last step may overwrite it
    return steps + list(finish(out, out, mean))


def fold_temps(rank: int, count: int, wide: bool) -> list[Temp]:
    """List the TEMPs that :func:`_fold` uses for spans of ``count`` items in all."""
    return [Temp(count, wide)] + ([Temp(count, True), Temp(count, False)] if wide and rank > 1 else [])


def to_owners(rank: int, size: int, chunks: Sequence[Span], out: Span, lanes: int, itemsize: int, *, mean: bool, wide: bool) -> list[Step]:
    """Send ``chunks[j]`` to rank j, and reduce what all ranks have of ``chunks[rank]`` into ``out``."""
    steps = [send_step(peer, lane, part) for peer in others(rank, size) for lane, part in stripes(chunks[peer], lanes, itemsize)]
    mine = chunks[rank]
    for lane, part in stripes(mine, lanes, itemsize):
        at = part.start - mine.start
        steps += _fold_into(rank, size, lane, part, at, part.on(out.buffer, out.start - mine.start), mean=mean, wide=wide)
    return steps


def direct_all_reduce(rank: int, size: int, count: int, *, mean: bool = False, wide: bool = False) -> Schedule:
    """All-reduce ``count`` items in one round: everyone sends INPUT to everyone and reduces all, in rank order.

    One round of ``size - 1`` messages; every rank sends ``(size - 1) * count`` items and does all the work of the reduction; bits are
    identical on all ranks. Partial sums stay in TEMP: in place, OUTPUT is still being sent. Source: the "linear" all-reduce of MPI
    libraries without its root.
    """
    whole = Span(INPUT, 0, count)
    steps = to_owners(rank, size, [whole] * size, whole.on(OUTPUT), 1, 1, mean=mean, wide=wide)
    return schedule("direct", steps, fold_temps(rank, count, wide))


def owner_all_reduce(rank: int, size: int, count: int, lanes: int, itemsize: int, *, mean: bool = False, wide: bool = False) -> Schedule:
    """All-reduce ``count`` items in two rounds: chunk j goes to its owner, rank j, which reduces in rank order and sends the result to all.

    Two rounds of ``size - 1`` messages, striped over the lanes where big; every rank sends ``2 * (size - 1) / size * count`` items, as
    a ring does, but in the dtype of x also where it accumulates in float32 (``wide``). The result of an item does not depend on
    its place in the array: it has the bits that :func:`direct_all_reduce` gives. Scratch: one chunk, if ``wide`` up to three. Source:
    all-reduce as reduce-scatter and all-gather by direct exchange; Rabenseifner, "Optimization of collective reduction operations",
    ICCS 2004, has the two-phase scheme.
    """
    chunks = Span(INPUT, 0, count).split(size)
    mine = chunks[rank].on(OUTPUT)
    steps = to_owners(rank, size, chunks, mine, lanes, itemsize, mean=mean, wide=wide)
    steps += [send_step(peer, lane, part) for peer in others(rank, size) for lane, part in stripes(mine, lanes, itemsize)]
    for peer in others(rank, size, -1):
        steps += [recv_step(peer, lane, part) for lane, part in stripes(chunks[peer].on(OUTPUT), lanes, itemsize)]
    return schedule("owner", steps, fold_temps(rank, mine.length, wide))


def direct_reduce_scatter(
    rank: int, counts: Sequence[int], lanes: int, itemsize: int, *, mean: bool = False, wide: bool = False
) -> Schedule:
    """Reduce INPUT (blocks of ``counts`` items) and leave block ``rank`` in OUTPUT: block j goes straight to rank j.

    One round of ``size - 1`` messages, striped over the lanes where big; every rank sends all blocks but its own, in the dtype of x also
    if ``wide``. Reduced in rank order. INPUT is not written; scratch: one block, if ``wide`` up to three. Source: the "pairwise exchange"
    reduce-scatter of Thakur, Rabenseifner and Gropp, IJHPCA 2005, in one round.
    """
    own = Span(OUTPUT, 0, counts[rank])
    steps = to_owners(rank, len(counts), blocks(INPUT, counts), own, lanes, itemsize, mean=mean, wide=wide)
    return schedule("direct", steps, fold_temps(rank, own.length, wide))


def _double(rank: int, place: int, surplus: int, core: int, current: Span, out: Span) -> Iterator[Step]:
    """Exchange with the partner at distance 1, 2, 4, ...: each time both hold the reduction of twice as many adjacent ranks."""
    leap = 1
    while leap < core:
        other = place ^ leap
        peer = 2 * other + 1 if other < surplus else other + surplus
        yield send_step(peer, 0, current)
        yield meet(peer, 0, current, out, left=peer < rank)
        current = out
        leap *= 2


def doubling_all_reduce(rank: int, size: int, count: int, *, mean: bool = False) -> Schedule:
    """All-reduce ``count`` items by recursive doubling.

    ``log2(size)`` rounds, in each of which every rank sends ``count`` items. Where ``size`` is no power of two, the first ranks pair up:
    the even ones hand their data to the odd ones, sit out and get the result at the end: two rounds more. Both partners of an exchange
    compute ``lower ranks op higher ranks``, so bits are identical on all ranks. No scratch. Source: Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005 (the treatment of other sizes is
    Rabenseifner's).
    """
    core = 1 << (size.bit_length() - 1)
    surplus = size - core
    own, out = Span(INPUT, 0, count), Span(OUTPUT, 0, count)
    paired = rank < 2 * surplus
    if paired and rank % 2 == 0:
        return schedule("doubling", [send_step(rank + 1, 0, own), recv_step(rank + 1, 0, out)])
    steps = [meet(rank - 1, 0, own, out, left=True)] if paired else []
    steps += _double(rank, rank // 2 if paired else rank - surplus, surplus, core, out if paired else own, out)
    steps += finish(out, out, mean)
    if paired:
        steps.append(send_step(rank - 1, 0, out))
    return schedule("doubling", steps)
