"""Algorithms in which every rank has something for every other: all-to-all.

May live here: pure functions ``(rank, size or counts, ...) -> Schedule`` that move a block from each rank to each. May not: arithmetic on
items (``algorithms``), thresholds between algorithms (``choose``), sockets, clocks, arrays.

Arguments are those of ``algorithms_move``. In place is right because all that is sent is read before anything is written, in the order of
the program; and it cannot block, because what arrives from a rank waits only for what goes to that same rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from rt.algorithms_move import Span, blocks, local_step, others, recv_step, schedule, send_step, stripes
from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp


def direct_all_to_all(rank: int, sent: Sequence[int], received: Sequence[int], lanes: int, itemsize: int) -> Schedule:
    """Send ``sent[j]`` items of INPUT to every rank j and receive ``received[i]`` items of OUTPUT from every rank i, by direct exchange.

    One round of ``size - 1`` messages, striped over the lanes where big, beginning with the neighbours; every item is sent once. Where
    there is nothing to send an item goes that nobody keeps, so that every pair of ranks compares its calls. Source: the pairwise
    exchange of Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005, without a
    wait between its rounds.
    """
    size = len(sent)
    origins, places = blocks(INPUT, sent), blocks(OUTPUT, received)
    steps: list[Step] = []
    for peer in others(rank, size):
        block = origins[peer] if sent[peer] else Span(TEMP, 0, 1)
        steps += [send_step(peer, lane, part) for lane, part in stripes(block, lanes, itemsize)]
    steps.append(local_step(Kind.COPY, origins[rank], places[rank]))
    for peer in others(rank, size, -1):
        place = places[peer] if received[peer] else Span(TEMP + 1, peer, 1)
        steps += [recv_step(peer, lane, part) for lane, part in stripes(place, lanes, itemsize)]
    return schedule("direct", steps, [Temp(1, False), Temp(size, False)])


def ring_all_to_all(rank: int, size: int, count: int, lanes: int, itemsize: int) -> Schedule:
    """Exchange blocks of ``count`` items where only neighbours connect: each goes the shorter way round the ring and is passed on.

    ``size // 2`` hops; every rank sends about ``size ** 2 / 4`` blocks, as many as cross a link. Scratch: up to ``size`` blocks for each
    way. Source: ours; every message goes by store and forward, as on any network whose links join neighbours only.
    """
    first: list[Step] = []
    steps: list[Step] = []
    temps: list[Temp] = []
    for way, (turn, reach) in enumerate(((1, size // 2), (-1, (size - 1) // 2))):
        ahead, behind = (rank + turn) % size, (rank - turn) % size
        for hop in range(1, reach + 1):
            block = Span(INPUT, (rank + turn * hop) % size * count, count)
            first += [send_step(ahead, lane, part) for lane, part in stripes(block, lanes, itemsize)]
        for hop in range(1, reach + 1):
            # The first of the blocks that arrive is for this rank; those behind it go on, the first again for the rank they come to.
            slot = Span(TEMP + 2 * way + hop % 2, 0, (reach - hop) * count)
            mine = Span(OUTPUT, (rank - turn * hop) % size * count, count)
            head, rest = Span(slot.buffer, 0, min(count, slot.length)), Span(slot.buffer, count, max(0, slot.length - count))
            passed = slot.split(reach - hop) if hop == 1 and slot.length else [slot]
            for piece in [mine, *passed]:
                steps += [recv_step(behind, lane, part) for lane, part in stripes(piece, lanes, itemsize)]
            for piece in (head, rest):
                steps += [send_step(ahead, lane, part) for lane, part in stripes(piece, lanes, itemsize)]
        temps += [Temp(max(0, reach - 1) * count, False)] * 2
    first.append(local_step(Kind.COPY, Span(INPUT, rank * count, count), Span(OUTPUT, rank * count, count)))
    return schedule("ring", first + steps, temps)
