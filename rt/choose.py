"""Which algorithm a collective uses.

May live here: thresholds and the decision, as a pure function of what all ranks know alike; every rank must come to the same answer.
May not: the algorithms themselves (``algorithms``, ``algorithms_move``) and anything that differs between ranks other than ``rank``.
"""

from __future__ import annotations

from rt import algorithms, algorithms_move
from rt.dtypes import HALF, ITEMSIZE, DType, Op
from rt.schedule import TEMP, Collective, Schedule, Temp

# Largest number of bytes for which an algorithm is used. Below, rounds count; above, bytes do. Bytes are those of x for all-reduce and
# broadcast, of one rank's block for all-gather and reduce-scatter. Between two ranks measured over TCP on loopback (an exchange moves as
# many bytes as a ring, in one phase instead of two, but reduces everything twice); the others are first guesses.
PAIR_DOUBLING_BYTES = 512 * 1024
DOUBLING_BYTES = 16 * 1024
OWNER_BYTES = 256 * 1024
DIRECT_WIDE_BYTES = 4 * 1024
DIRECT_BLOCK_BYTES = 64 * 1024
BINOMIAL_BYTES = 64 * 1024

_ROUNDING = frozenset({Op.SUM, Op.PROD, Op.MEAN})


def choose(
    kind: Collective, *, rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, full_mesh: bool, root: int = 0
) -> Schedule:
    """Return the schedule of ``rank`` for one collective.

    Args:
        kind: the collective.
        rank: of this process in the group.
        size: of the group, at least 2.
        count: items of x for all-reduce, broadcast, send and recv; items of one rank's block for all-gather (its input) and
            reduce-scatter (its output); ignored by the barrier.
        dtype: of x; a barrier moves uint8.
        op: of a reduction, ignored by the others. The dtype must support it (``dtypes.op_supported``).
        lanes: streams to each peer, the same number on all ranks.
        full_mesh: whether every pair of ranks is connected; if not, only ring neighbours are (rank +- 1 modulo size). Send and recv do
            not ask: what is below them relays.
        root: root of a broadcast, peer of a send or recv.
    """
    itemsize = ITEMSIZE[dtype]
    mesh = full_mesh or size <= 3  # in a ring of three all are neighbours
    if count == 0 and kind is not Collective.BARRIER:
        return _nothing(kind, rank, size, root, mesh)
    match kind:
        case Collective.ALL_REDUCE:
            return _all_reduce(rank, size, count, dtype, op, lanes, mesh)
        case Collective.REDUCE_SCATTER:
            return _reduce_scatter(rank, size, count, dtype, op, lanes, mesh)
        case Collective.ALL_GATHER:
            if mesh and count * itemsize <= DIRECT_BLOCK_BYTES:
                return algorithms_move.direct_all_gather(rank, size, count)
            return algorithms_move.ring_all_gather(rank, size, count, lanes, itemsize)
        case Collective.BROADCAST:
            if mesh and count * itemsize <= BINOMIAL_BYTES:
                return algorithms_move.binomial_broadcast(rank, size, count, root)
            return algorithms_move.pipelined_broadcast(rank, size, count, root, lanes, itemsize)
        case Collective.BARRIER:
            return algorithms_move.barrier(rank, size) if mesh else algorithms_move.ring_barrier(rank, size)
        case Collective.SEND:
            return algorithms_move.send(root, count, lanes, itemsize)
        case Collective.RECV:
            return algorithms_move.recv(root, count, lanes, itemsize)


def _nothing(kind: Collective, rank: int, size: int, peer: int, mesh: bool) -> Schedule:
    """Move nothing, but meet: ranks that pass empty arrays are compared with the others, and a recv waits for its send."""
    token = algorithms_move.Span(TEMP, 0, 1)
    if kind is Collective.SEND:
        return Schedule((algorithms_move.send_step(peer, 0, token),), (Temp(1, False),), "striped")
    if kind is Collective.RECV:
        return Schedule((algorithms_move.recv_step(peer, 0, token),), (Temp(1, False),), "striped")
    return algorithms_move.barrier(rank, size) if mesh else algorithms_move.ring_barrier(rank, size)


def _needs_wide(size: int, dtype: DType, op: Op) -> bool:
    """Say whether halves must be reduced in float32; one sum of two halves is rounded once anyway."""
    return dtype in HALF and op in _ROUNDING and (size > 2 or op is Op.MEAN)


def _all_reduce(rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, mesh: bool) -> Schedule:
    itemsize = ITEMSIZE[dtype]
    nbytes = count * itemsize
    mean = op is Op.MEAN
    if _needs_wide(size, dtype, op):
        if not mesh:
            return algorithms.ring_all_reduce_wide(rank, size, count, lanes, itemsize, mean=mean)
        if nbytes <= DIRECT_WIDE_BYTES:
            return algorithms.direct_all_reduce(rank, size, count, mean=mean, wide=True)
        return algorithms.owner_all_reduce(rank, size, count, lanes, itemsize, mean=mean, wide=True)
    if mesh and nbytes <= (PAIR_DOUBLING_BYTES if size == 2 else DOUBLING_BYTES):
        return algorithms.doubling_all_reduce(rank, size, count, mean=mean)
    if mesh and size > 2 and nbytes <= OWNER_BYTES:
        return algorithms.owner_all_reduce(rank, size, count, lanes, itemsize, mean=mean)
    return algorithms.ring_all_reduce(rank, size, count, lanes, itemsize, mean=mean)


def _reduce_scatter(rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, mesh: bool) -> Schedule:
    itemsize = ITEMSIZE[dtype]
    mean = op is Op.MEAN
    if _needs_wide(size, dtype, op):
        if mesh:
            return algorithms.direct_reduce_scatter(rank, size, count, lanes, itemsize, mean=mean, wide=True)
        return algorithms.ring_reduce_scatter_wide(rank, size, count, lanes, itemsize, mean=mean)
    if mesh and count * itemsize <= DIRECT_BLOCK_BYTES:
        return algorithms.direct_reduce_scatter(rank, size, count, lanes, itemsize, mean=mean)
    return algorithms.ring_reduce_scatter(rank, size, count, lanes, itemsize, mean=mean)
