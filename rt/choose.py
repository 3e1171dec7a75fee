"""Which algorithm a collective uses.

May live here: thresholds and the decision, as a pure function of what all ranks know alike; every rank must come to the same answer.
May not: the algorithms themselves (``algorithms``, ``algorithms_*``) and anything that differs between ranks other than ``rank``.
"""

from __future__ import annotations

from collections.abc import Sequence

from rt import algorithms, algorithms_exchange, algorithms_move, algorithms_rooted, algorithms_scan
from rt.dtypes import HALF, ITEMSIZE, DType, Op
from rt.schedule import TEMP, Collective, Schedule, Temp

# Largest number of bytes for which an algorithm is used. Below, rounds count; above, bytes do. Bytes are those of x for all-reduce,
# broadcast, reduce and the scans, of one rank's block (the largest) for the others. Between two ranks measured over TCP on loopback (an
# exchange moves as many bytes as a ring, in one phase instead of two, but reduces everything twice); the others are first guesses.
PAIR_DOUBLING_BYTES = 512 * 1024
DOUBLING_BYTES = 16 * 1024
OWNER_BYTES = 256 * 1024
DIRECT_WIDE_BYTES = 4 * 1024
DIRECT_BLOCK_BYTES = 64 * 1024
BINOMIAL_BYTES = 64 * 1024
BINOMIAL_BLOCK_BYTES = 4 * 1024
SCAN_DOUBLING_BYTES = 16 * 1024

_ROUNDING = frozenset({Op.SUM, Op.PROD, Op.MEAN})


def choose(
    kind: Collective, *, rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, full_mesh: bool, root: int = 0,
    counts: Sequence[int] = (),
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
    """
    itemsize = ITEMSIZE[dtype]
    mesh = full_mesh or size <= 3  # in a ring of three all are neighbours
    if count == 0 and kind not in (Collective.BARRIER, Collective.ALL_TO_ALL_V):
        return _nothing(kind, rank, size, root, mesh)
    each = counts or [count] * size
    small_blocks = mesh and max(each) * itemsize <= DIRECT_BLOCK_BYTES
    match kind:
        case Collective.ALL_REDUCE:
            return _all_reduce(rank, size, count, dtype, op, lanes, mesh)
        case Collective.REDUCE_SCATTER | Collective.REDUCE_SCATTER_V:
            return _reduce_scatter(rank, each, dtype, op, lanes, mesh, small_blocks)
        case Collective.ALL_GATHER | Collective.ALL_GATHER_V:
            if small_blocks:
                return algorithms_move.direct_all_gather(rank, each)
            return algorithms_move.ring_all_gather(rank, each, lanes, itemsize)
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
        case Collective.REDUCE:
            return _reduce(rank, size, count, dtype, op, lanes, mesh, root)
        case Collective.GATHER | Collective.GATHER_V:
            if not mesh:
                return algorithms_rooted.ring_gather(rank, each, root, lanes, itemsize)
            if max(each) * itemsize <= BINOMIAL_BLOCK_BYTES:
                return algorithms_rooted.binomial_gather(rank, each, root)
            return algorithms_rooted.direct_gather(rank, each, root, lanes, itemsize)
        case Collective.SCATTER | Collective.SCATTER_V:
            if not mesh:
                return algorithms_rooted.ring_scatter(rank, each, root, lanes, itemsize)
            if max(each) * itemsize <= BINOMIAL_BLOCK_BYTES:
                return algorithms_rooted.binomial_scatter(rank, each, root)
            return algorithms_rooted.direct_scatter(rank, each, root, lanes, itemsize)
        case Collective.ALL_TO_ALL:
            if mesh:
                return algorithms_exchange.direct_all_to_all(rank, each, each, lanes, itemsize)
            return algorithms_exchange.ring_all_to_all(rank, size, count, lanes, itemsize)
        case Collective.ALL_TO_ALL_V:
            return algorithms_exchange.direct_all_to_all(rank, counts[:size], counts[size:], lanes, itemsize)
        case Collective.SCAN | Collective.EXSCAN:
            return _scan(kind, rank, size, count, dtype, op, lanes, mesh)


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


def _reduce_scatter(
    rank: int, counts: Sequence[int], dtype: DType, op: Op, lanes: int, mesh: bool, small_blocks: bool
) -> Schedule:
    itemsize = ITEMSIZE[dtype]
    mean = op is Op.MEAN
    if _needs_wide(len(counts), dtype, op):
        if mesh:
            return algorithms.direct_reduce_scatter(rank, counts, lanes, itemsize, mean=mean, wide=True)
        return algorithms.ring_reduce_scatter_wide(rank, counts, lanes, itemsize, mean=mean)
    if small_blocks:
        return algorithms.direct_reduce_scatter(rank, counts, lanes, itemsize, mean=mean)
    return algorithms.ring_reduce_scatter(rank, counts, lanes, itemsize, mean=mean)


def _reduce(rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, mesh: bool, root: int) -> Schedule:
    itemsize = ITEMSIZE[dtype]
    nbytes = count * itemsize
    mean, wide = op is Op.MEAN, _needs_wide(size, dtype, op)
    if mesh and not wide and nbytes <= (BINOMIAL_BYTES if size == 2 else DOUBLING_BYTES):
        return algorithms_rooted.binomial_reduce(rank, size, count, root, mean=mean)
    if mesh and (wide or (size > 2 and nbytes <= OWNER_BYTES)):
        return algorithms_rooted.owner_reduce(rank, size, count, root, lanes, itemsize, mean=mean, wide=wide)
    return algorithms_rooted.pipelined_reduce(rank, size, count, root, lanes, itemsize, mean=mean, wide=wide)


def _scan(kind: Collective, rank: int, size: int, count: int, dtype: DType, op: Op, lanes: int, mesh: bool) -> Schedule:
    itemsize = ITEMSIZE[dtype]
    inclusive = kind is Collective.SCAN
    wide = _needs_wide(size if inclusive else size - 1, dtype, op)  # the last rank's own part is not in an exscan
    if mesh and count * itemsize <= SCAN_DOUBLING_BYTES:
        doubling = algorithms_scan.doubling_scan if inclusive else algorithms_scan.doubling_exscan
        return doubling(rank, size, count, wide=wide)
    pipelined = algorithms_scan.pipelined_scan if inclusive else algorithms_scan.pipelined_exscan
    return pipelined(rank, size, count, lanes, itemsize, wide=wide)
