"""Algorithms with a root: reduce, gather and scatter.

May live here: pure functions ``(rank, size or counts, ..., root) -> Schedule`` for collectives whose result, or whose input, only the root
has. May not: broadcast (``algorithms_move``), thresholds between algorithms (``choose``), sockets, clocks, arrays.

Arguments are those of ``algorithms_move`` and ``algorithms``. ``counts`` are the items of each rank's block. Only the root touches OUTPUT
of a reduce or gather and INPUT of a scatter: elsewhere what is passed on lies in TEMPs.

Trees here are laid over *adjacent* ranks: a range of ranks is cut in half again and again, and every range is led by its lowest rank, or by
the root if that is in it. So what a leader holds is one run of blocks, whatever the root, and a reduction keeps lower ranks left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from rt.algorithms import finish, fold_temps, meet, to_owners
from rt.algorithms_move import Span, blocks, local_step, recv_step, schedule, send_step, stripes
from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp


class _Merge(NamedTuple):
    """Two adjacent ranges become one, seen from the leader of one of them."""

    mine: range  # the ranks it leads
    theirs: range
    peer: int  # leader of the others
    leads: bool  # whether it leads both together


def _merges(rank: int, size: int, root: int) -> list[_Merge]:
    """List the merges in which a rank leads a side, from single ranks up; all but the root do not lead after their last."""
    found: list[_Merge] = []
    whole = range(size)
    while len(whole) > 1:
        middle = (whole.start + whole.stop + 1) // 2
        low, high = range(whole.start, middle), range(middle, whole.stop)
        mine, theirs = (low, high) if rank in low else (high, low)
        if rank == (root if root in mine else mine.start):
            peer = root if root in theirs else theirs.start
            found.append(_Merge(mine, theirs, peer, rank == (root if root in whole else whole.start)))
        whole = mine
    return found[::-1]


class _Line(NamedTuple):
    """Blocks on their way between the root and one side of it round the ring, seen from a rank of that side."""

    inward: int  # neighbour on the root's side
    outward: int
    beyond: list[int]  # ranks further out whose blocks this rank passes on, the nearest first


def _sides(size: int, root: int) -> list[list[int]]:
    """List the ranks to the right and to the left of the root, the nearest first: each goes the shorter way round."""
    right = size // 2
    return [[(root + hop) % size for hop in range(1, right + 1)], [(root - hop) % size for hop in range(1, size - right)]]


def _line(rank: int, size: int, root: int) -> _Line:
    side = next(side for side in _sides(size, root) if rank in side)
    turn = (side[0] - root) % size
    return _Line((rank - turn) % size, (rank + turn) % size, side[side.index(rank) + 1 :])


class _Places:
    """Where the blocks of adjacent ranks lie in a buffer that begins with those of ``held``."""

    def __init__(self, counts: Sequence[int], held: range, buffer: int) -> None:
        self._starts = list(accumulate(counts, initial=0))
        self._base = self._starts[held.start]
        self._buffer = buffer

    def __call__(self, ranks: range) -> Span:
        start = self._starts[ranks.start]
        return Span(self._buffer, start - self._base, self._starts[ranks.stop] - start)


def _slots(counts: Sequence[int], beyond: Sequence[int]) -> list[Temp]:
    """Two TEMPs by turns for blocks that are passed on: one fills while the other is sent."""
    return [Temp(max((counts[each] for each in beyond), default=0), False)] * 2


# --- reduce ---------------------------------------------------------------------------------------------------------------------------


def binomial_reduce(rank: int, size: int, count: int, root: int, *, mean: bool = False) -> Schedule:
    """Reduce ``count`` items up a binomial tree.

    ``ceil(log2(size))`` rounds; every rank but the root sends ``count`` items. Scratch: ``count`` items. Source: Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005; that the tree keeps ranks in order is ours.
    """
    current = Span(INPUT, 0, count)
    total = current.on(OUTPUT if rank == root else TEMP)
    steps: list[Step] = []
    for merge in _merges(rank, size, root):
        if merge.leads:
            steps.append(meet(merge.peer, 0, current, total, left=merge.peer < rank))
            current = total
        else:
            steps.append(send_step(merge.peer, 0, current))
    if rank == root:
        steps += finish(total, total, mean)
    return schedule("binomial", steps, [Temp(count, False)])


def owner_reduce(
    rank: int, size: int, count: int, root: int, lanes: int, itemsize: int, *, mean: bool = False, wide: bool = False
) -> Schedule:
    """Reduce ``count`` items in two rounds: chunk j goes to rank j, which reduces in rank order and sends the result to the root.

    Every rank sends ``count`` items; the root receives ``2 * (size - 1) / size * count``, all in the dtype of x also if ``wide``. Scratch:
    two chunks, if ``wide`` up to four. Source: reduce as reduce-scatter and gather, Rabenseifner, "Optimization of collective reduction
    operations", ICCS 2004.
    """
    chunks = Span(INPUT, 0, count).split(size)
    mine = chunks[rank].on(OUTPUT) if rank == root else Span(TEMP + 3, 0, chunks[rank].length)
    steps = to_owners(rank, size, chunks, mine, lanes, itemsize, mean=mean, wide=wide)
    if rank != root:
        steps += [send_step(root, lane, part) for lane, part in stripes(mine, lanes, itemsize)]
    else:
        for peer in range(size):
            if peer != root:
                steps += [recv_step(peer, lane, part) for lane, part in stripes(chunks[peer].on(OUTPUT), lanes, itemsize)]
    temps = fold_temps(rank, mine.length, wide)
    temps += [Temp(0, False)] * (3 - len(temps))
    return schedule("owner", steps, [*temps, Temp(mine.length, False)])


def pipelined_reduce(
    rank: int, size: int, count: int, root: int, lanes: int, itemsize: int, *, mean: bool = False, wide: bool = False
) -> Schedule:
    """Reduce ``count`` items along the line of ranks, from both ends to the root; partial sums are passed on while more arrives.

    Up to ``size - 1`` hops that overlap; every rank but the root sends ``count`` items, as float32 if ``wide``. Only ranks that follow each
    other talk. Scratch: ``count`` items (float32 if ``wide``), but none on a root that is not. Source: the pipelined chain, Pjesivac-
    Grbovic et al., "Performance analysis of MPI collective operations", Cluster Computing 2007.
    """
    before = [rank - 1] if 0 < rank <= root else []
    after = [rank + 1] if root <= rank < size - 1 else []
    steps: list[Step] = []
    for lane, part in stripes(Span(INPUT, 0, count), lanes, itemsize):
        out, current = part.on(OUTPUT), part
        total = out if rank == root and not wide else part.on(TEMP)
        if wide:
            steps.append(local_step(Kind.CONVERT, part, total))
            current = total
        for peer in before + after:
            steps.append(meet(peer, lane, current, total, left=peer < rank, wide=wide))
            current = total
        if rank == root:
            steps += finish(total, out, mean)
        else:
            steps.append(send_step(rank + (1 if rank < root else -1), lane, current))
    return schedule("pipeline_wide" if wide else "pipeline", steps, [Temp(count, wide)])


# --- gather ---------------------------------------------------------------------------------------------------------------------------


def binomial_gather(rank: int, counts: Sequence[int], root: int) -> Schedule:
    """Gather blocks of ``counts`` items into the root's OUTPUT, up a binomial tree.

    ``ceil(log2(size))`` rounds; a block is sent up to that often, ``size / 2 * log2(size)`` blocks in all. Scratch: the blocks passed on.
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 2005.
    """
    merges = _merges(rank, len(counts), root)
    held = range(len(counts)) if rank == root else merges[-1].mine
    place = _Places(counts, held, OUTPUT if rank == root else TEMP)
    own = Span(INPUT, 0, counts[rank])
    single = len(held) == 1
    steps = [] if single else [local_step(Kind.COPY, own, place(range(rank, rank + 1)))]
    for merge in merges:
        if merge.leads:
            steps.append(recv_step(merge.peer, 0, place(merge.theirs)))
        else:
            steps.append(send_step(merge.peer, 0, own if single else place(merge.mine)))
    return schedule("binomial", steps, [Temp(place(held).length, False)])


def direct_gather(rank: int, counts: Sequence[int], root: int, lanes: int, itemsize: int) -> Schedule:
    """Gather blocks of ``counts`` items into the root's OUTPUT: everyone sends to the root.

    One round of ``size - 1`` messages, striped over the lanes where big; every block is sent once. The "linear" gather of MPI libraries.
    """
    own = Span(INPUT, 0, counts[rank])
    if rank != root:
        return schedule("direct", [send_step(root, lane, part) for lane, part in stripes(own, lanes, itemsize)])
    places = blocks(OUTPUT, counts)
    steps = [local_step(Kind.COPY, own, places[root])]
    for peer, place in enumerate(places):
        if peer != root:
            steps += [recv_step(peer, lane, part) for lane, part in stripes(place, lanes, itemsize)]
    return schedule("direct", steps)


def ring_gather(rank: int, counts: Sequence[int], root: int, lanes: int, itemsize: int) -> Schedule:
    """Gather blocks of ``counts`` items into the root's OUTPUT where only neighbours connect: ranks pass on the blocks of those beyond.

    ``size // 2`` hops; the root's neighbours send all blocks of their side. Scratch: two blocks. Source: ours; the ring of
    ``ring_all_gather``, cut opposite the root.
    """
    own, size = Span(INPUT, 0, counts[rank]), len(counts)
    if rank == root:
        places = blocks(OUTPUT, counts)
        steps = [local_step(Kind.COPY, own, places[root])]
        for side in _sides(size, root):
            for origin in side:
                steps += [recv_step(side[0], lane, part) for lane, part in stripes(places[origin], lanes, itemsize)]
        return schedule("ring", steps)
    line = _line(rank, size, root)
    steps = [send_step(line.inward, lane, part) for lane, part in stripes(own, lanes, itemsize)]
    for turn, origin in enumerate(line.beyond):
        for lane, part in stripes(Span(TEMP + turn % 2, 0, counts[origin]), lanes, itemsize):
            steps += [recv_step(line.outward, lane, part), send_step(line.inward, lane, part)]
    return schedule("ring", steps, _slots(counts, line.beyond))


# --- scatter --------------------------------------------------------------------------------------------------------------------------


def binomial_scatter(rank: int, counts: Sequence[int], root: int) -> Schedule:
    """Scatter blocks of ``counts`` items of the root's INPUT, down a binomial tree: :func:`binomial_gather` backwards.

    ``ceil(log2(size))`` rounds; ``size / 2 * log2(size)`` blocks in all. Scratch: the blocks passed on. Source: Thakur, Rabenseifner and
    Gropp, IJHPCA 2005.
    """
    merges = _merges(rank, len(counts), root)
    held = range(len(counts)) if rank == root else merges[-1].mine
    place = _Places(counts, held, INPUT if rank == root else TEMP)
    own = Span(OUTPUT, 0, counts[rank])
    single = len(held) == 1
    steps: list[Step] = []
    for merge in reversed(merges):
        if merge.leads:
            steps.append(send_step(merge.peer, 0, place(merge.theirs)))
        else:
            steps.append(recv_step(merge.peer, 0, own if single else place(merge.mine)))
    if not single:
        steps.append(local_step(Kind.COPY, place(range(rank, rank + 1)), own))
    return schedule("binomial", steps, [Temp(place(held).length, False)])


def direct_scatter(rank: int, counts: Sequence[int], root: int, lanes: int, itemsize: int) -> Schedule:
    """Scatter blocks of ``counts`` items of the root's INPUT: the root sends to everyone.

    One round of ``size - 1`` messages, striped over the lanes where big; every block is sent once. The "linear" scatter of MPI libraries.
    """
    own = Span(OUTPUT, 0, counts[rank])
    if rank != root:
        return schedule("direct", [recv_step(root, lane, part) for lane, part in stripes(own, lanes, itemsize)])
    places = blocks(INPUT, counts)
    steps: list[Step] = []
    for peer, place in enumerate(places):
        if peer != root:
            steps += [send_step(peer, lane, part) for lane, part in stripes(place, lanes, itemsize)]
    return schedule("direct", [*steps, local_step(Kind.COPY, places[root], own)])


def ring_scatter(rank: int, counts: Sequence[int], root: int, lanes: int, itemsize: int) -> Schedule:
    """Scatter blocks of ``counts`` items of the root's INPUT where only neighbours connect, those that go furthest first.

    ``size // 2`` hops; the root's neighbours receive all blocks of their side. Scratch: two blocks. Source: ours; :func:`ring_gather`
    backwards.
    """
    own, size = Span(OUTPUT, 0, counts[rank]), len(counts)
    steps: list[Step] = []
    if rank == root:
        places = blocks(INPUT, counts)
        for side in _sides(size, root):
            for target in reversed(side):
                steps += [send_step(side[0], lane, part) for lane, part in stripes(places[target], lanes, itemsize)]
        return schedule("ring", [*steps, local_step(Kind.COPY, places[root], own)])
    line = _line(rank, size, root)
    for turn, target in enumerate(reversed(line.beyond)):
        for lane, part in stripes(Span(TEMP + turn % 2, 0, counts[target]), lanes, itemsize):
            steps += [recv_step(line.inward, lane, part), send_step(line.outward, lane, part)]
    steps += [recv_step(line.inward, lane, part) for lane, part in stripes(own, lanes, itemsize)]
    return schedule("ring", steps, _slots(counts, line.beyond))
