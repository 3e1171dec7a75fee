"""The collectives that are measured, one description each: sizes, calls per system, right results, bandwidths.

May live here: what tells one collective from another, and the data they move. May not: an import of ``rt``, of a peer, or of anything
else that not every interpreter has but NumPy (``rank.py`` runs this under the peers'); measuring; text.

Sizes are nccl-tests': its ``size`` is the larger of the two buffers of a rank, its ``count`` the items of one block. Where a buffer holds
a block per rank, blocks are whole multiples of 16 bytes, so the size that is measured may be a little less than the one asked for.
Sources: https://github.com/NVIDIA/nccl-tests, ``doc/PERFORMANCE.md`` (bandwidths) and the ``GetCollByteCount`` of each program (sizes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.data import Array, Data

Bound = Callable[[], Any]  # one call, ready to be timed
Bind = Callable[[Any, "Buffers"], Bound]  # from a system's module and buffers

PLACES = ("out_of_place", "in_place", "fresh")  # into out=, over x itself, into an array that the call makes
_BLOCK_BYTES = 16
_MPI = ("mpich", "openmpi")


@dataclass
class Buffers:
    """What one rank calls with: arrays, or what a system makes of them. None: the call has no such argument.

    Attributes:
        x: the input.
        out: the output; None where the call makes it (``fresh``) or this rank gets none (not the root of a reduce or gather).
        op: rt's name of the operator.
    """

    x: Any
    out: Any
    op: str
    root: int
    rank: int
    size: int
    place: str


@dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
        name: the command of ``rt.bench``.
        program: nccl-tests' program for it.
        title: OSU's name of it.
        blocks: whether the input, and whether the output, holds a block per rank.
        factor: bus bandwidth over algorithm bandwidth, of the number of ranks.
        expected: a rank's right output from (its rank, the ranks' inputs or their reduction), see ``expect``.
        needs: the function of ``rt`` that it measures.
        binds: system -> how it is called there; a system that is not here does not offer it.
        in_place: systems that can put the result where the input is.
        reduces: whether it has an operator.
        rooted: whether it has a root.
        at_root: whether only the root gets a result.
    """

    name: str
    program: str
    title: str
    blocks: tuple[bool, bool]
    factor: Callable[[int], float]
    expected: Callable[[int, Data], Array]
    needs: str
    binds: dict[str, Bind]
    in_place: tuple[str, ...] = ("rt",)
    reduces: bool = False
    rooted: bool = False
    at_root: bool = False

    @property
    def moves(self) -> bool:
        """Whether it moves anything: a barrier does not."""
        return self.name != "barrier"

    def count(self, nbytes: int, itemsize: int, size: int) -> int:
        """Return nccl-tests' count for a size asked for: items of a block where a buffer holds one per rank, else of the buffer."""
        if any(self.blocks):
            return nbytes // size // _BLOCK_BYTES * _BLOCK_BYTES // itemsize
        return nbytes // itemsize

    def items(self, count: int, size: int) -> tuple[int, int]:
        """Return the items of the input and of the output."""
        sends, receives = (count * size if whole else count for whole in self.blocks)
        return sends, receives

    def places(self, system: str) -> tuple[str, ...]:
        """Return where a system can put results; none: it does not offer this collective."""
        if system not in self.binds:
            return ()
        if not self.moves:
            return PLACES[:1]
        fresh = PLACES[2:] if system == "rt" else ()
        return (*PLACES[:1], *(PLACES[1:2] if system in self.in_place else ()), *fresh)

    def memory(self, rank: int, size: int, count: int, dtype: Any, place: str) -> tuple[Array, Array]:
        """Return input and output of a rank; in place they share memory as NCCL has it: a block lies where its rank's is."""
        sends, receives = self.items(count, size)
        if place != "in_place":
            # full, not zeros: its pages are there before the clock runs
            return np.full(sends, 0, dtype), np.full(receives if place == "out_of_place" else 0, 0, dtype)
        whole = np.full(max(sends, receives), 0, dtype)
        mine = slice(rank * count, (rank + 1) * count)
        return (whole if sends == len(whole) else whole[mine]), (whole if receives == len(whole) else whole[mine])


def _one(size: int) -> float:
    return 1.0


def _others(size: int) -> float:
    return (size - 1) / size


def _rt(name: str, *more: str) -> Bind:
    """Bind ``rt.NAME(x, *more, out=out)``, where ``more`` are names of attributes of the buffers."""

    def bind(rt: Any, buffers: Buffers) -> Bound:
        function, x, out, arguments = getattr(rt, name), buffers.x, buffers.out, [getattr(buffers, each) for each in more]
        return lambda: function(x, *arguments, out=out)

    return bind


def _rt_send_recv(rt: Any, buffers: Buffers) -> Bound:
    right, left = (buffers.rank + 1) % buffers.size, (buffers.rank - 1) % buffers.size
    return lambda: rt.sendrecv(buffers.x, right, left, out=buffers.out)


def _gloo_op(dist: Any, op: str) -> Any:
    return {"sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(
        op, dist.ReduceOp.AVG
    )


def _gloo_over_copy(call: Callable[[Any, Buffers], Any]) -> Bind:
    """Gloo does this in place only; out of place its users copy first, and that is timed with it."""

    def bind(dist: Any, buffers: Buffers) -> Bound:
        def out_of_place() -> Any:
            buffers.out.copy_(buffers.x)
            return call(dist, buffers)

        return out_of_place if buffers.place == "out_of_place" else lambda: call(dist, buffers)

    return bind


def _gloo_broadcast(dist: Any, buffers: Buffers) -> Bound:
    copies = buffers.place == "out_of_place" and buffers.rank == buffers.root

    def call() -> Any:
        if copies:
            buffers.out.copy_(buffers.x)
        return dist.broadcast(buffers.out, buffers.root)

    return call


def _gloo_chunks(tensor: Any, buffers: Buffers) -> Any:
    return list(tensor.chunk(buffers.size)) if buffers.rank == buffers.root else None


def _gloo_gather(dist: Any, buffers: Buffers) -> Bound:
    chunks = _gloo_chunks(buffers.out, buffers)
    return lambda: dist.gather(buffers.x, chunks, dst=buffers.root)


def _gloo_scatter(dist: Any, buffers: Buffers) -> Bound:
    chunks = _gloo_chunks(buffers.x, buffers)
    return lambda: dist.scatter(buffers.out, chunks, src=buffers.root)


def _gloo_send_recv(dist: Any, buffers: Buffers) -> Bound:
    right, left = (buffers.rank + 1) % buffers.size, (buffers.rank - 1) % buffers.size

    def call() -> None:
        for work in (dist.isend(buffers.x, right), dist.irecv(buffers.out, left)):
            work.wait()

    return call


def _mlx_all_reduce(mx: Any, buffers: Buffers) -> Bound:
    known = {"sum": mx.distributed.all_sum, "max": mx.distributed.all_max, "min": mx.distributed.all_min}
    if buffers.op not in known:
        raise ValueError(f"mlx has no all_reduce with {buffers.op}; it has {', '.join(known)}")
    return lambda: known[buffers.op](buffers.x)


def _mpi(bind: Bind) -> dict[str, Bind]:
    """Return what binds a collective of MPI; the buffers of those hold pairs of an array and its type in MPI."""
    return dict.fromkeys(_MPI, bind)


def _mpi_x(mpi: Any, buffers: Buffers) -> Any:
    return mpi.IN_PLACE if buffers.place == "in_place" else buffers.x


def _mpi_op(mpi: Any, buffers: Buffers) -> Any:
    known = {"sum": mpi.SUM, "prod": mpi.PROD, "max": mpi.MAX, "min": mpi.MIN}
    if buffers.op not in known:
        raise ValueError(f"MPI has no {buffers.op}; it has {', '.join(known)}")
    if buffers.x[1] == mpi.UINT16_T:
        raise ValueError("these MPI libraries reduce no bfloat16")
    return known[buffers.op]


def _mpi_all(name: str) -> Bind:
    """Bind a function that takes the same on all ranks: ``Allgather`` and the like."""

    def bind(mpi: Any, buffers: Buffers) -> Bound:
        function, x, out = getattr(mpi.COMM_WORLD, name), _mpi_x(mpi, buffers), buffers.out
        return lambda: function(x, out)

    return bind


def _mpi_reducing(name: str) -> Bind:
    def bind(mpi: Any, buffers: Buffers) -> Bound:
        function, x, out, op = getattr(mpi.COMM_WORLD, name), _mpi_x(mpi, buffers), buffers.out, _mpi_op(mpi, buffers)
        return lambda: function(x, out, op)

    return bind


def _mpi_broadcast(mpi: Any, buffers: Buffers) -> Bound:
    function, out, root = mpi.COMM_WORLD.Bcast, buffers.out, buffers.root

    def out_of_place() -> None:
        np.copyto(out[0], buffers.x[0])
        function(out, root)

    return out_of_place if buffers.place == "out_of_place" and buffers.rank == root else lambda: function(out, root)


def _mpi_reduce(mpi: Any, buffers: Buffers) -> Bound:
    function, op, root = mpi.COMM_WORLD.Reduce, _mpi_op(mpi, buffers), buffers.root
    x, out = (_mpi_x(mpi, buffers), buffers.out) if buffers.rank == root else (buffers.x, None)
    return lambda: function(x, out, op, root)


def _mpi_gather(mpi: Any, buffers: Buffers) -> Bound:
    function, root = mpi.COMM_WORLD.Gather, buffers.root
    x, out = (_mpi_x(mpi, buffers), buffers.out) if buffers.rank == root else (buffers.x, None)
    return lambda: function(x, out, root)


def _mpi_scatter(mpi: Any, buffers: Buffers) -> Bound:
    function, root = mpi.COMM_WORLD.Scatter, buffers.root
    x, out = (buffers.x, buffers.out) if buffers.rank == root else (None, buffers.out)
    if buffers.rank == root and buffers.place == "in_place":
        out = mpi.IN_PLACE
    return lambda: function(x, out, root)


def _mpi_send_recv(mpi: Any, buffers: Buffers) -> Bound:
    right, left = (buffers.rank + 1) % buffers.size, (buffers.rank - 1) % buffers.size
    comm, x, out = mpi.COMM_WORLD, buffers.x, buffers.out
    if buffers.place == "in_place":
        return lambda: comm.Sendrecv_replace(out, right, 0, left, 0)
    return lambda: comm.Sendrecv(x, right, 0, out, left, 0)


COLLECTIVES = {
    each.name: each
    for each in (
        Collective(
            "all_reduce", "all_reduce_perf", "Allreduce", (False, False), lambda size: 2 * (size - 1) / size,
            lambda rank, data: data.reduced(), "all_reduce",
            {
                "rt": _rt("all_reduce", "op"),
                "gloo": _gloo_over_copy(lambda dist, b: dist.all_reduce(b.out, op=_gloo_op(dist, b.op))),
                "mlx": _mlx_all_reduce,
                **_mpi(_mpi_reducing("Allreduce")),
                "tcp": lambda ring, b: lambda: ring(b.x, b.out),
            },
            in_place=("rt", "gloo", *_MPI), reduces=True,
        ),
        Collective(
            "all_gather", "all_gather_perf", "Allgather", (False, True), _others,
            lambda rank, data: data.together([data.of(other) for other in range(data.size)]), "all_gather",
            {
                "rt": _rt("all_gather"),
                "gloo": lambda dist, b: lambda: dist.all_gather_single(b.out, b.x),
                "mlx": lambda mx, b: lambda: mx.distributed.all_gather(b.x),
                **_mpi(_mpi_all("Allgather")),
            },
            in_place=("rt", *_MPI),
        ),
        Collective(
            "reduce_scatter", "reduce_scatter_perf", "Reduce_scatter", (True, False), _others,
            lambda rank, data: data.block(data.reduced(), rank), "sum_scatter",
            {
                "rt": _rt("sum_scatter", "op"),
                "gloo": lambda dist, b: lambda: dist.reduce_scatter_single(b.out, b.x, op=_gloo_op(dist, b.op)),
                # Not in place: MPI puts the result at the front of the input, not where the rank's block is.
                **_mpi(_mpi_reducing("Reduce_scatter_block")),
            },
            reduces=True,
        ),
        Collective(
            "broadcast", "broadcast_perf", "Broadcast", (False, False), _one,
            lambda rank, data: data.of(data.root), "broadcast",
            {
                "rt": _rt("broadcast", "root"),
                "gloo": _gloo_broadcast,
                **_mpi(_mpi_broadcast),
            },
            in_place=("rt", "gloo", *_MPI), rooted=True,
        ),
        Collective(
            "reduce", "reduce_perf", "Reduce", (False, False), _one,
            lambda rank, data: data.reduced(), "reduce",
            {
                "rt": _rt("reduce", "op", "root"),
                "gloo": _gloo_over_copy(lambda dist, b: dist.reduce(b.out, b.root, op=_gloo_op(dist, b.op))),
                **_mpi(_mpi_reduce),
            },
            in_place=("rt", "gloo", *_MPI), reduces=True, rooted=True, at_root=True,
        ),
        Collective(
            "gather", "gather_perf", "Gather", (False, True), _others,
            lambda rank, data: data.together([data.of(other) for other in range(data.size)]), "gather",
            {"rt": _rt("gather", "root"), "gloo": _gloo_gather, **_mpi(_mpi_gather)},
            in_place=("rt", *_MPI), rooted=True, at_root=True,
        ),
        Collective(
            "scatter", "scatter_perf", "Scatter", (True, False), _others,
            lambda rank, data: data.block(data.of(data.root), rank), "scatter",
            {"rt": _rt("scatter", "root"), "gloo": _gloo_scatter, **_mpi(_mpi_scatter)},
            in_place=("rt", *_MPI), rooted=True,
        ),
        Collective(
            "all_to_all", "alltoall_perf", "All-to-All Personalized Exchange", (True, True), _others,
            lambda rank, data: data.together([data.block(data.of(other), rank) for other in range(data.size)]), "all_to_all",
            {
                "rt": _rt("all_to_all"),
                "gloo": lambda dist, b: lambda: dist.all_to_all_single(b.out, b.x),
                **_mpi(_mpi_all("Alltoall")),
            },
            in_place=("rt", *_MPI),
        ),
        Collective(
            "send_recv", "sendrecv_perf", "Ring Exchange", (False, False), _one,
            lambda rank, data: data.of((rank - 1) % data.size), "sendrecv",
            {"rt": _rt_send_recv, "gloo": _gloo_send_recv, **_mpi(_mpi_send_recv)},
            in_place=("rt", *_MPI),
        ),
        Collective(
            "barrier", "barrier_perf", "Barrier", (False, False), _one,
            lambda rank, data: data.of(rank), "barrier",
            {"rt": lambda rt, b: rt.barrier, "gloo": lambda dist, b: dist.barrier, **_mpi(lambda mpi, b: mpi.COMM_WORLD.Barrier)},
            in_place=(),
        ),
    )
}  # fmt: skip
