"""Algorithms for several hosts with several ranks each: what crosses between hosts crosses once, not once per rank.

May live here: pure functions that know which ranks share a host. May not: the words shared with the other algorithms (``algorithms``,
``algorithms_move``), when an algorithm is used (``choose``), how one learns who shares a host (``bootstrap``).

Arguments are those of ``algorithms_move`` and ``algorithms``. One more occurs: ``hosts``, the number of each rank's host. Hosts are
numbered from 0 without gaps, there are at least two, and any rank may be on any of them: the ranks of a host need not be adjacent, nor
need hosts have equally many.

*Rings and leaders.* The items are cut into as many slices as the largest host has ranks, and every slice has one ring, in which each host
takes part with one rank, its *leader*: of ring j the j-th rank of the host, counted modulo those that it has. So on equal hosts every rank
leads one ring. On a smaller host some ranks lead several; its cable carries no more for that, and nobody on a larger host has to
do more than his share of the work within it. (As many rings as the *smallest* host has ranks would carry as little, but make a few ranks of
a large host reduce for all the others.)

*Bits and order.* Of one item one rank computes the result, and the others receive it: all hold the same bits. Within a host the leader
begins with its own item and adds those of the other ranks in rank order, lower ranks on the left; between hosts partial sums go round as
in any ring. So the order of operations depends on the item's place and on who shares a host, never on time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rt.algorithms import as_met, finish, meet, ring_reduce
from rt.algorithms_move import Span, Way, local_step, pieces, recv_step, ring_spread, ring_ways, schedule, send_step
from rt.schedule import INPUT, OUTPUT, TEMP, Kind, Schedule, Step, Temp


class _Part(NamedTuple):
    """One part of a ring between hosts: which way it goes, seen from one host."""

    leader: int  # rank of this host in the ring
    way: Way  # between the leaders of the hosts
    lane: int  # within the host
    chunks: tuple[Span, ...]  # of INPUT, the one of each host

    def met(self, host: int) -> list[Span]:
        """Put the chunks in the order in which a host adds to them, its own last."""
        return as_met(host, self.way, self.chunks)

    def finished(self, host: int) -> list[Span]:
        """Put the chunks in the order in which a host gets them finished, its own first."""
        *others, own = self.met(host)
        return [own, *others]


def _parts(rank: int, hosts: Sequence[int], count: int, lanes: int, itemsize: int) -> Iterator[_Part]:
    """List all parts of all rings, in one order on all ranks."""
    on = [[peer for peer, host in enumerate(hosts) if host == number] for number in range(max(hosts) + 1)]
    rings, here = max(map(len, on)), hosts[rank]
    parts = pieces(count, itemsize, 2 * lanes, rings * len(on))
    for number, one in enumerate(Span(INPUT, 0, count).split(rings)):
        leaders = [ranks[number % len(ranks)] for ranks in on]
        for lane, (way, part) in enumerate(zip(ring_ways(here, len(on), parts), one.split(parts), strict=True)):
            # Numbered so that a host meets them in the order in which they lie in memory, whichever way they go: see _runs.
            chunks = tuple(part.split(len(on))[:: -way.turn])
            between = way._replace(ahead=leaders[way.ahead], behind=leaders[way.behind])
            yield _Part(leaders[here], between, lane, chunks)


def _runs(spans: Sequence[Span]) -> list[Span]:
    """Join spans that follow each other in memory: what goes within a host takes two messages, however many hosts there are."""
    runs: list[Span] = []
    for span in spans:
        if runs and runs[-1].start + runs[-1].length == span.start:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + span.length)
        else:
            runs.append(span)
    return runs


def _lead(rank: int, hosts: Sequence[int], part: _Part, scratch: int, mean: bool, wide: bool) -> Iterator[Step]:
    """Reduce what this host has of a part, take it round the hosts, and hand the result to this host.

    Args:
        rank: of this process, which leads the part's ring on its host.
        hosts: of all ranks.
        part: what to reduce.
        scratch: number of the TEMP that is used if ``wide``.
        mean, wide: as everywhere.
    """
    here = hosts[rank]
    beside = [peer for peer, host in enumerate(hosts) if host == here and peer != rank]
    met = part.met(here)
    first = min(chunk.start for chunk in met)

    def kept(span: Span) -> Span:
        return span.on(TEMP + scratch, -first) if wide else span.on(OUTPUT)

    for own in _runs(met) if beside else ():
        if wide:
            yield local_step(Kind.CONVERT, own, kept(own))
        for index, peer in enumerate(beside):
            yield meet(peer, part.lane, kept(own) if wide or index else own, kept(own), left=peer < rank)
    partial = [kept(chunk) for chunk in met]
    yield from ring_reduce(rank, part.way, partial if beside else met, partial, wide)
    mine = met[-1].on(OUTPUT)
    yield from finish(partial[-1], mine, mean)
    yield from ring_spread(here, part.way, mine, [chunk.on(OUTPUT) for chunk in part.chunks])
    for done in _runs(part.finished(here)):
        yield from (send_step(peer, part.lane, done.on(OUTPUT)) for peer in beside)


def all_reduce(
    rank: int, hosts: Sequence[int], count: int, lanes: int, itemsize: int, *, mean: bool = False, wide: bool = False
) -> Schedule:
    """All-reduce ``count`` items within each host, round rings of one rank per host, and back.

    With H hosts of L ranks: a rank hands all slices but its own to their leaders on its host, ``(L - 1) / L * count`` items; takes its own
    round the hosts, in both directions and over all lanes, ``2 * (H - 1) / H * count / L`` items; and hands the result to the ranks of its
    host, as many as it was handed. So a host sends ``2 * (H - 1) / H * count`` items to others: as much as if one rank lived there. If
    ``wide`` partial sums travel between hosts as float32, half as much again. ``2 * (H - 1)`` hops between hosts and two within, all
    of which overlap. Scratch: none; if ``wide`` the slices that a rank leads, as float32.

    Source: the "2D-torus" all-reduce of Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash", 2018, which
    has these three phases, also in Cho et al., "BlueConnect: decomposing all-reduce for deep learning on heterogeneous network
    hierarchy", MLSys 2019. The overlap of the phases and the treatment of unequal hosts are ours.
    """
    handed: list[Step] = []
    led: list[Step] = []
    taken: list[Step] = []
    temps: list[Temp] = []
    here = hosts[rank]
    for part in _parts(rank, hosts, count, lanes, itemsize):
        if part.leader == rank:
            led += _lead(rank, hosts, part, len(temps), mean, wide)
            temps += [Temp(sum(chunk.length for chunk in part.chunks), True)] if wide else []
        else:
            handed += [send_step(part.leader, part.lane, run) for run in _runs(part.met(here))]
            taken += [recv_step(part.leader, part.lane, run.on(OUTPUT)) for run in _runs(part.finished(here))]
    # In this order, so that who leads has what it needs before it waits for others.
    return schedule("hierarchy_wide" if wide else "hierarchy", handed + led + taken, temps)
