"""Algorithms that only move data (all-gather, broadcast, barrier, send, recv), and the vocabulary that all algorithms share.

May live here: pure functions ``(rank, size, count, ...) -> Schedule`` without arithmetic on items, and the small words they are made
of (a span of items, a way round the ring). May not: reductions (``algorithms``), thresholds between algorithms (``choose``), sockets,
clocks, arrays.

Every function takes ``rank`` and ``size`` of the group (``size`` >= 2), ``count`` in items, ``lanes`` (streams to each peer, >= 1) and
``itemsize`` in bytes, and returns the program of that rank. Where every rank has a block, ``counts`` are the items of each, alike or not,
instead of ``size`` and ``count``. None checks its arguments: they come from ``choose``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp

# A message below this many bytes is not cut further: two halves would cost two wake-ups and save no time on the wire.
PART_BYTES = 16 * 1024


class Span(NamedTuple):
    """A run of ``length`` items of one buffer."""

    buffer: int
    start: int
    length: int

    def split(self, pieces: int) -> list[Span]:
        """Cut into ``pieces`` adjacent spans; the first ``length % pieces`` are one item longer."""
        short, longer = divmod(self.length, pieces)
        starts = [self.start + i * short + min(i, longer) for i in range(pieces)]
        return [Span(self.buffer, start, short + (i < longer)) for i, start in enumerate(starts)]

    def on(self, buffer: int, shift: int = 0) -> Span:
        """Return the same items of another buffer, ``shift`` items further on."""
        return Span(buffer, self.start + shift, self.length)


def blocks(buffer: int, counts: Sequence[int]) -> list[Span]:
    """Lay blocks of ``counts`` items one behind the other."""
    return [Span(buffer, start, count) for start, count in zip(accumulate(counts, initial=0), counts, strict=False)]


class Way(NamedTuple):
    """How one part of the data travels round the ring, seen from one rank."""

    ahead: int  # rank it is sent to
    behind: int  # rank it comes from
    lane: int
    turn: int  # +1: towards higher ranks; -1: towards lower ranks


def ring_ways(rank: int, size: int, parts: int) -> list[Way]:
    """Spread ``parts`` over both directions and all lanes: even parts travel right (to rank + 1), odd ones left.

    Right and left share a lane number because they are different directions of a pair, except in a group of two, where both ways lead
    to the same peer in the same direction: there every part has a lane of its own.
    """
    ways = []
    for part in range(parts):
        turn = -1 if part % 2 else 1
        ways.append(Way((rank + turn) % size, (rank - turn) % size, part if size == 2 else part // 2, turn))
    return ways


def pieces(count: int, itemsize: int, most: int, share: int = 1) -> int:
    """Say into how many pieces (1 to ``most``) to cut ``count`` items, of which each message carries ``1 / share``."""
    return max(1, min(most, count * itemsize // (PART_BYTES * share)))


def stripes(span: Span, lanes: int, itemsize: int) -> Iterable[tuple[int, Span]]:
    """Cut what goes to one peer over the lanes to it; gives (lane, span) pairs."""
    return enumerate(span.split(pieces(span.length, itemsize, lanes)))


def send_step(peer: int, lane: int, src: Span) -> Step:
    """Send ``src`` to ``peer``."""
    return Step(Kind.SEND, peer, lane, src=src.buffer, src_off=src.start, count=src.length)


def recv_step(peer: int, lane: int, dst: Span) -> Step:
    """Receive ``dst`` from ``peer``."""
    return Step(Kind.RECV, peer, lane, dst=dst.buffer, dst_off=dst.start, count=dst.length)


def local_step(kind: Kind, src: Span, dst: Span) -> Step:
    """COPY, SCALE or CONVERT ``src`` into ``dst``."""
    return Step(kind, src=src.buffer, src_off=src.start, dst=dst.buffer, dst_off=dst.start, count=src.length)


def others(rank: int, size: int, turn: int = 1) -> list[int]:
    """List the other ranks beginning with the neighbour, so that no rank is the first target of all the others."""
    return [(rank + turn * hop) % size for hop in range(1, size)]


def schedule(name: str, steps: Iterable[Step], temps: Sequence[Temp] = ()) -> Schedule:
    """Make a schedule without steps of no items (the other side leaves out the same ones, as counts agree) and without unused scratch."""
    kept = tuple(step for step in steps if step.count)
    used = {buffer for step in kept for buffer in (step.src, step.src2, step.dst)}
    return Schedule(kept, tuple(temp if TEMP + i in used else Temp(0, temp.wide) for i, temp in enumerate(temps)), name)


def ring_spread(rank: int, way: Way, first: Span, chunks: Sequence[Span]) -> Iterator[Step]:
    """Pass chunks round the ring until all ranks have all; ``first`` is what this rank has, ``chunks[j]`` where chunk j goes."""
    size = len(chunks)
    yield send_step(way.ahead, way.lane, first)
    for hop in range(1, size):
        chunk = chunks[(rank - way.turn * hop) % size]
        yield recv_step(way.behind, way.lane, chunk)
        if hop + 1 < size:
            yield send_step(way.ahead, way.lane, chunk)


def ring_all_gather(rank: int, counts: Sequence[int], lanes: int, itemsize: int) -> Schedule:
    """Gather blocks of ``counts`` items into OUTPUT round the ring, in both directions and over all lanes.

    ``size - 1`` hops; every rank sends all blocks but one, the least possible. Source: the all-gather half of Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
    """
    block, places = Span(INPUT, 0, counts[rank]), blocks(OUTPUT, counts)
    parts = pieces(max(counts), itemsize, 2 * lanes)
    split = [place.split(parts) for place in places]
    steps: list[Step] = []
    for i, (way, part) in enumerate(zip(ring_ways(rank, len(counts), parts), block.split(parts), strict=True)):
        steps += ring_spread(rank, way, part, [place[i] for place in split])
    steps.append(local_step(Kind.COPY, block, places[rank]))
    return schedule("ring", steps)


def direct_all_gather(rank: int, counts: Sequence[int]) -> Schedule:
    """Gather blocks of ``counts`` items into OUTPUT: everyone sends its block to everyone.

    One round of ``size - 1`` messages; every rank sends its block as often. The "linear" all-gather of MPI libraries.
    """
    block, places, size = Span(INPUT, 0, counts[rank]), blocks(OUTPUT, counts), len(counts)
    steps = [send_step(peer, 0, block) for peer in others(rank, size)]
    steps.append(local_step(Kind.COPY, block, places[rank]))
    steps += [recv_step(peer, 0, places[peer]) for peer in others(rank, size, -1)]
    return schedule("direct", steps)


def binomial_broadcast(rank: int, size: int, count: int, root: int) -> Schedule:
    """Broadcast ``count`` items down a binomial tree: after round i, ``2 ** i`` ranks have them.

    ``ceil(log2(size))`` rounds; ``(size - 1) * count`` items in all, of which the root sends up to ``ceil(log2(size)) * count``.
    Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
    """
    place = (rank - root) % size
    source, target = Span(INPUT, 0, count), Span(OUTPUT, 0, count)
    # The lowest set bit of a place is the distance to its parent; the root has all larger bits as children.
    reach = place & -place if place else 1 << (size - 1).bit_length()
    steps = [recv_step((rank - reach) % size, 0, target)] if place else []
    while reach > 1:
        reach //= 2
        if place + reach < size:
            steps.append(send_step((rank + reach) % size, 0, target if place else source))
    if not place:
        steps.append(local_step(Kind.COPY, source, target))
    return schedule("binomial", steps)


def pipelined_broadcast(rank: int, size: int, count: int, root: int, lanes: int, itemsize: int) -> Schedule:
    """Broadcast ``count`` items along the ring, half of them in each direction; every rank passes on what it has while more arrives.

    ``size - 1`` hops that overlap (cut-through needs no steps of its own); ``(size - 1) * count`` items in all, no rank sends more than
    ``count``. Source: the pipelined chain, for instance Pjesivac-Grbovic et al., "Performance analysis of MPI collective operations",
    Cluster Computing 2007.
    """
    source, target = Span(INPUT, 0, count), Span(OUTPUT, 0, count)
    parts = pieces(count, itemsize, 2 * lanes)
    steps: list[Step] = []
    for way, part in zip(ring_ways(rank, size, parts), target.split(parts), strict=True):
        place = way.turn * (rank - root) % size
        if place:
            steps.append(recv_step(way.behind, way.lane, part))
        if place + 1 < size:
            steps.append(send_step(way.ahead, way.lane, part if place else part.on(INPUT)))
    if rank == root:
        steps.append(local_step(Kind.COPY, source, target))
    return schedule("pipeline", steps)


def _token(ahead: Iterable[int], behind: Iterable[int], cell: int) -> Iterator[Step]:
    """Send and receive one item again and again through the same cell: as every send reads what was received last, rounds stay in order."""
    item = Span(TEMP, cell, 1)
    for to, origin in zip(ahead, behind, strict=True):
        yield send_step(to, 0, item)
        yield recv_step(origin, 0, item)


def barrier(rank: int, size: int) -> Schedule:
    """Wait for all ranks by dissemination: in round i every rank tells rank + 2**i that it and all it has heard of are here.

    ``ceil(log2(size))`` rounds of one item (one byte: x is uint8). Source: Hensgen, Finkel and Manber, "Two algorithms for barrier
    synchronization", International Journal of Parallel Programming 1988.
    """
    leaps = [1 << i for i in range((size - 1).bit_length())]
    steps = _token([(rank + leap) % size for leap in leaps], [(rank - leap) % size for leap in leaps], 0)
    return schedule("dissemination", steps, [Temp(1, False)])


def ring_barrier(rank: int, size: int) -> Schedule:
    """Wait for all ranks where only neighbours connect: tokens travel halfway round, both ways, each waiting for the one before.

    ``size // 2`` rounds; ``size - 1`` items sent by every rank. Source: ours; a ring version of :func:`barrier`.
    """
    steps: list[Step] = []
    for way, hops in zip(ring_ways(rank, size, 2), (size // 2, (size - 1) // 2), strict=True):
        steps += _token([way.ahead] * hops, [way.behind] * hops, 0 if way.turn > 0 else 1)
    return schedule("ring", steps, [Temp(2, False)])


def send(peer: int, count: int, lanes: int, itemsize: int) -> Schedule:
    """Send INPUT (``count`` items) to ``peer``, striped over the lanes where it is big; meets :func:`recv` of the same arguments."""
    return schedule("striped", [send_step(peer, lane, part) for lane, part in stripes(Span(INPUT, 0, count), lanes, itemsize)])


def recv(peer: int, count: int, lanes: int, itemsize: int) -> Schedule:
    """Receive OUTPUT (``count`` items) from ``peer``; meets :func:`send` of the same arguments."""
    return schedule("striped", [recv_step(peer, lane, part) for lane, part in stripes(Span(OUTPUT, 0, count), lanes, itemsize)])
