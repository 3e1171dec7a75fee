"""Which algorithm a collective uses.

May live here: which algorithms can be used in a case, how each is asked for its schedule, and the decision, as a pure function of what
all ranks know alike; every rank must come to the same answer. May not: what is preferred (``tuning``), the algorithms themselves
(``algorithms``, ``algorithms_*``) and anything that differs between ranks other than ``rank``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rt import algorithms, algorithms_exchange, algorithms_hierarchy, algorithms_move, algorithms_rooted, algorithms_scan
from rt.dtypes import HALF, ITEMSIZE, DType, Op
from rt.schedule import TEMP, Collective, Schedule, Temp
from rt.tuning import ALGORITHMS, Table, shipped

_ROUNDING = frozenset({Op.SUM, Op.PROD, Op.MEAN})
_REDUCING = frozenset(
    {
        Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE, Collective.REDUCE_SCATTER_V, Collective.SCAN,
        Collective.EXSCAN,
    }
)  # fmt: skip


class Case(NamedTuple):
    """What an algorithm is asked for; alike on all ranks but for ``rank``.

    Attributes:
        each: items of every rank's block.
        wide: halves must be reduced in float32.
        mesh: every pair of ranks is connected.
        hosts: of each rank the number of its host; none: all share one.
    """

    rank: int
    size: int
    items: int
    each: Sequence[int]
    itemsize: int
    lanes: int
    root: int
    mean: bool
    wide: bool
    mesh: bool
    hosts: Sequence[int]


class Algorithm(NamedTuple):
    """How to get a schedule, and in which cases there is a right one. Some algorithm of every collective fits every case."""

    schedule: Callable[[Case], Schedule]
    fits: Callable[[Case], bool]


def _meshed(case: Case) -> bool:
    return case.mesh


def _narrow(case: Case) -> bool:
    return case.mesh and not case.wide


def _anywhere(case: Case) -> bool:
    return True


def _layered(case: Case) -> bool:
    """Several hosts, some of which have several ranks."""
    return case.mesh and 1 < len(set(case.hosts)) < case.size


def _hierarchy(c: Case) -> Schedule:
    return algorithms_hierarchy.all_reduce(c.rank, c.hosts, c.items, c.lanes, c.itemsize, mean=c.mean, wide=c.wide)


def _unless_halves_can(case: Case) -> bool:
    """Where all are connected, halves travel as halves, and an item's result does not depend on its place."""
    return not (case.mesh and case.wide)


_MOVE, _ROOTED, _SCAN, _EXCHANGE = algorithms_move, algorithms_rooted, algorithms_scan, algorithms_exchange
_KNOWN: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "doubling": Algorithm(lambda c: algorithms.doubling_all_reduce(c.rank, c.size, c.items, mean=c.mean), _meshed),
        "direct": Algorithm(lambda c: algorithms.direct_all_reduce(c.rank, c.size, c.items, mean=c.mean), _meshed),
        "owner": Algorithm(lambda c: algorithms.owner_all_reduce(c.rank, c.size, c.items, c.lanes, c.itemsize, mean=c.mean), _meshed),
        "hierarchy": Algorithm(_hierarchy, _layered),
        "ring": Algorithm(lambda c: algorithms.ring_all_reduce(c.rank, c.size, c.items, c.lanes, c.itemsize, mean=c.mean), _anywhere),
    },
    "all_reduce_wide": {
        "direct": Algorithm(lambda c: algorithms.direct_all_reduce(c.rank, c.size, c.items, mean=c.mean, wide=True), _meshed),
        "owner": Algorithm(
            lambda c: algorithms.owner_all_reduce(c.rank, c.size, c.items, c.lanes, c.itemsize, mean=c.mean, wide=True), _meshed
        ),
        "hierarchy": Algorithm(_hierarchy, _layered),
        "ring": Algorithm(
            lambda c: algorithms.ring_all_reduce_wide(c.rank, c.size, c.items, c.lanes, c.itemsize, mean=c.mean), _unless_halves_can
        ),
    },
    "reduce_scatter": {
        "direct": Algorithm(
            lambda c: algorithms.direct_reduce_scatter(c.rank, c.each, c.lanes, c.itemsize, mean=c.mean, wide=c.wide), _meshed
        ),
        "ring": Algorithm(
            lambda c: (algorithms.ring_reduce_scatter_wide if c.wide else algorithms.ring_reduce_scatter)(
                c.rank, c.each, c.lanes, c.itemsize, mean=c.mean
            ),
            _unless_halves_can,
        ),
    },
    "all_gather": {
        "direct": Algorithm(lambda c: _MOVE.direct_all_gather(c.rank, c.each), _meshed),
        "ring": Algorithm(lambda c: _MOVE.ring_all_gather(c.rank, c.each, c.lanes, c.itemsize), _anywhere),
    },
    "broadcast": {
        "binomial": Algorithm(lambda c: _MOVE.binomial_broadcast(c.rank, c.size, c.items, c.root), _meshed),
        "pipeline": Algorithm(lambda c: _MOVE.pipelined_broadcast(c.rank, c.size, c.items, c.root, c.lanes, c.itemsize), _anywhere),
    },
    "reduce": {
        "binomial": Algorithm(lambda c: _ROOTED.binomial_reduce(c.rank, c.size, c.items, c.root, mean=c.mean), _narrow),
        "owner": Algorithm(
            lambda c: _ROOTED.owner_reduce(c.rank, c.size, c.items, c.root, c.lanes, c.itemsize, mean=c.mean, wide=c.wide), _meshed
        ),
        "pipeline": Algorithm(
            lambda c: _ROOTED.pipelined_reduce(c.rank, c.size, c.items, c.root, c.lanes, c.itemsize, mean=c.mean, wide=c.wide),
            _unless_halves_can,
        ),
    },
    "gather": {
        "binomial": Algorithm(lambda c: _ROOTED.binomial_gather(c.rank, c.each, c.root), _meshed),
        "direct": Algorithm(lambda c: _ROOTED.direct_gather(c.rank, c.each, c.root, c.lanes, c.itemsize), _meshed),
        "ring": Algorithm(lambda c: _ROOTED.ring_gather(c.rank, c.each, c.root, c.lanes, c.itemsize), _anywhere),
    },
    "scatter": {
        "binomial": Algorithm(lambda c: _ROOTED.binomial_scatter(c.rank, c.each, c.root), _meshed),
        "direct": Algorithm(lambda c: _ROOTED.direct_scatter(c.rank, c.each, c.root, c.lanes, c.itemsize), _meshed),
        "ring": Algorithm(lambda c: _ROOTED.ring_scatter(c.rank, c.each, c.root, c.lanes, c.itemsize), _anywhere),
    },
    "all_to_all": {
        "direct": Algorithm(lambda c: _EXCHANGE.direct_all_to_all(c.rank, c.each, c.each, c.lanes, c.itemsize), _meshed),
        "ring": Algorithm(lambda c: _EXCHANGE.ring_all_to_all(c.rank, c.size, c.items, c.lanes, c.itemsize), _anywhere),
    },
    "scan": {
        "doubling": Algorithm(lambda c: _SCAN.doubling_scan(c.rank, c.size, c.items, wide=c.wide), _meshed),
        "pipeline": Algorithm(lambda c: _SCAN.pipelined_scan(c.rank, c.size, c.items, c.lanes, c.itemsize, wide=c.wide), _anywhere),
    },
    "exscan": {
        "doubling": Algorithm(lambda c: _SCAN.doubling_exscan(c.rank, c.size, c.items, wide=c.wide), _meshed),
        "pipeline": Algorithm(lambda c: _SCAN.pipelined_exscan(c.rank, c.size, c.items, c.lanes, c.itemsize, wide=c.wide), _anywhere),
    },
    "barrier": {
        "dissemination": Algorithm(lambda c: _MOVE.barrier(c.rank, c.size), _meshed),
        "ring": Algorithm(lambda c: _MOVE.ring_barrier(c.rank, c.size), _anywhere),
    },
}


def choose(
    kind: Collective, *, rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, full_mesh: bool, root: int = 0,
    counts: Sequence[int] = (), hosts: Sequence[int] = (), links: str = "tcp", table: Table | None = None,
) -> Schedule:  # fmt: skip
    """Return the schedule of ``rank`` for one collective.

    Args:
        kind: the collective.
        rank: of this process in the group.
        size: of the group, at least 2.
        count: items of x for all-reduce, broadcast, reduce, the scans, send and recv; items of one rank's block for all-gather and gather
            (their input), reduce-scatter and scatter (their output), and all-to-all; of all blocks for kinds with ``counts``; ignored by
            the barrier.
        dtype: of x; a barrier moves uint8.
        op: of a reduction, ignored by the others. The dtype must support it (``dtypes.op_supported``).
        lanes: streams to each peer, the same number on all ranks.
        full_mesh: whether every pair of ranks is connected; if not, only ring neighbours are (rank +- 1 modulo size). Send, recv and
            all-to-all with counts (what passes by is not known here) do not ask: what is below them relays.
        root: root of a broadcast, reduce, gather or scatter; peer of a send or recv.
        counts: the kinds whose names end in V: items of the block of each rank; all-to-all: items for each rank, then items from each.
        hosts: of each rank the number of its host, from 0 without gaps; none: all share one.
        links: what joins the ranks, one of ``tuning.LINKS``.
        table: what is preferred; None: what the table that is shipped says.
    """
    itemsize = ITEMSIZE[dtype]
    mesh = full_mesh or size <= 3  # in a ring of three all are neighbours
    if count == 0 and kind not in (Collective.BARRIER, Collective.ALL_TO_ALL_V):
        return _nothing(kind, rank, size, root, mesh)
    match kind:
        case Collective.SEND:
            return algorithms_move.send(root, count, lanes, itemsize)
        case Collective.RECV:
            return algorithms_move.recv(root, count, lanes, itemsize)
        case Collective.ALL_TO_ALL_V:
            return algorithms_exchange.direct_all_to_all(rank, counts[:size], counts[size:], lanes, itemsize)
    each = counts or [count] * size
    wide = kind in _REDUCING and needs_wide(size - (kind is Collective.EXSCAN), dtype, op)
    case = Case(rank, size, count, each, itemsize, lanes, root, op is Op.MEAN, wide, mesh, hosts)
    row = "all_reduce_wide" if wide and kind is Collective.ALL_REDUCE else kind.name.lower().removesuffix("_v")
    plan = _fitting(row, (table or shipped()).prefers(row, links, size, max(each) * itemsize), case).schedule(case)
    return _compared(plan, rank, size) if 0 in counts else plan


def _fitting(row: str, preferred: str, case: Case) -> Algorithm:
    """Return the algorithm that is preferred if it fits the case, else the nearest that does, first among those for more bytes."""
    names = ALGORITHMS[row]
    at = names.index(preferred)
    return next(_KNOWN[row][name] for name in (*names[at:], *reversed(names[:at])) if _KNOWN[row][name].fits(case))


def _nothing(kind: Collective, rank: int, size: int, peer: int, mesh: bool) -> Schedule:
    """Move nothing, but meet: ranks that pass empty arrays are compared with the others, and a recv waits for its send."""
    token = algorithms_move.Span(TEMP, 0, 1)
    if kind is Collective.SEND:
        return Schedule((algorithms_move.send_step(peer, 0, token),), (Temp(1, False),), "striped")
    if kind is Collective.RECV:
        return Schedule((algorithms_move.recv_step(peer, 0, token),), (Temp(1, False),), "striped")
    return algorithms_move.barrier(rank, size) if mesh else algorithms_move.ring_barrier(rank, size)


def _compared(plan: Schedule, rank: int, size: int) -> Schedule:
    """Let neighbours whose blocks are empty compare their calls all the same: an item that nobody keeps goes from rank to rank."""
    right, left = (rank + 1) % size, (rank - 1) % size
    peers = {step.peer for step in plan.steps}
    token = algorithms_move.Span(TEMP + len(plan.temps), 0, 1)
    steps = [] if right in peers else [algorithms_move.send_step(right, 0, token)]
    steps += [] if left in peers else [algorithms_move.recv_step(left, 0, token.on(token.buffer, 1))]
    return plan._replace(steps=(*plan.steps, *steps), temps=(*plan.temps, Temp(2, False))) if steps else plan


def needs_wide(contributions: int, dtype: DType, op: Op) -> bool:
    """Say whether halves must be reduced in float32; one sum of two halves is rounded once anyway, and the rank's own part of an exscan is
    not in it."""
    return dtype in HALF and op in _ROUNDING and (contributions > 2 or op is Op.MEAN)
