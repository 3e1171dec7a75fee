"""Collective communication that can be awaited.

    import rt
    group = await rt.init()
    total = await rt.all_sum(x)

``rt.sync`` has the same names and blocks instead. Collectives are plain functions that submit at once and return an awaitable ``Work``:
call order is wire order. See ``help(rt.all_reduce)`` and the README.

May live here: the asyncio faces of what the package offers. May not: collectives (``rt.collectives``), the driver (``rt.aio``).
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

try:
    from rt import _fastpath
except ImportError as error:
    if os.path.exists(os.path.join(os.path.dirname(__file__), "_fastpath.pyx")):
        raise ImportError(
            f"{os.path.dirname(__file__)} is rt's source, in which nothing was built, and it hides an installed rt from programs that are "
            "started from its folder: run them from another one, or build it (`make`, or `pip install -e .`)"
        ) from error
    raise
from rt import collectives, world
from rt.aio import Work
from rt.api import Api, Start, check_common
from rt.backends import is_available
from rt.deferred import Deferred, ready_core, start_waiting, wait_until
from rt.errors import (
    CollectiveTimeoutError,
    ConfigError,
    GroupAbortedError,
    GroupBrokenError,
    GroupClosedError,
    MismatchError,
    PeerLostError,
    ProtocolError,
    RendezvousError,
    RTError,
)
from rt.faces import Group as _Group
from rt.faces import core_of
from rt.gradients import BUCKET_BYTES, averaging
from rt.group import ALL_GATHER_AS, ALL_REDUCE_AS, ALL_TO_ALL_AS, BARRIER_AS, SUM_SCATTER_AS, CoreGroup
from rt.runner import run

if os.path.exists(os.path.join(os.path.dirname(__file__), "rest1.py")):  # a file of theirs; asking importlib.metadata costs 20 ms
    warnings.warn(
        "PyPI's `rt` (a client of Request Tracker) is installed into the same folder as rt-collectives, and each overwrites files of the "
        "other; `pip uninstall rt rt-collectives`, then install rt-collectives again",
        RuntimeWarning,
        stacklevel=2,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "CollectiveTimeoutError", "ConfigError", "Group", "GroupAbortedError", "GroupBrokenError", "GroupClosedError", "MismatchError",
    "PeerLostError", "ProtocolError", "RTError", "RendezvousError", "Work", "abort", "all_gather", "all_gather_objects", "all_gather_v",
    "all_max", "all_min", "all_reduce", "all_sum", "all_to_all", "all_to_all_v", "average_gradients", "barrier", "broadcast",
    "broadcast_object", "close", "exscan", "gather", "gather_objects", "gather_v", "init", "is_available", "rank", "recv", "recv_like",
    "recv_object", "reduce", "reduce_scatter_v", "run", "scan", "scatter", "scatter_v", "send", "send_object", "sendrecv", "size",
    "sum_scatter",
]  # fmt: skip


class _Awaitable(Api[Awaitable[Any]]):
    def _run(
        self, what: str, group: Any, start: Start, x: Any, out: Any, timeout: float | None, stream: Any, key: Any
    ) -> Awaitable[Any]:
        if timeout is not None or stream is not None or key is not None:
            check_common(what, timeout, key)
        core = core_of(group, what) if group is not None else ready_core()
        if core is None:
            if asyncio._get_running_loop() is None:
                raise RuntimeError("no event loop is running, so nobody would make this call: in a script without one use rt.sync")
            return Deferred(lambda formed, x, out: _start(what, formed, start, x, out, timeout, stream), x, out, world.start())
        return _start(what, core, start, x, out, timeout, stream)


def _start(what: str, core: CoreGroup, start: Start, x: Any, out: Any, timeout: float | None, stream: Any) -> Work:
    if stream is None:
        work = start(core, x, out)
    else:
        with core.on_stream(stream, what):
            work = start(core, x, out)
    _limit(work, timeout if timeout is not None else core.timeout)
    return work


def _limit(work: Work, seconds: float | None) -> None:
    if seconds is not None and not work.done():
        work.limit(seconds)


class Group(_Group[Awaitable[Any]]):
    __doc__ = _Group.__doc__

    @property
    def _api(self) -> Api[Awaitable[Any]]:
        return _api

    def split(self, color: int, key: int = -1) -> Awaitable[Group]:
        """Return the group of the ranks with the same ``color``, in the order of ``key`` (negative: the rank), ties by rank.

        All ranks of this group must call.
        """
        core = self._core
        work, number = collectives.split(core, color, key)
        _limit(work, core.timeout)

        async def form() -> Group:
            part = collectives.split_group(core, await work, number)
            if part.making is not None:
                await wait_until(part.making)
            return Group(part)

        return form()

    def average_gradients(
        self, gradients: Any, all_reduce_size: int = BUCKET_BYTES, communication_type: Any = None, communication_stream: Any = None
    ) -> Awaitable[Any]:
        """As ``rt.average_gradients`` on this group."""
        return average_gradients(gradients, self, all_reduce_size, communication_type, communication_stream)


_api = _Awaitable()
all_reduce = _fastpath.shortened_by_op(_api.all_reduce, ALL_REDUCE_AS)
all_sum = _fastpath.shortened(_api.all_sum, ALL_REDUCE_AS["sum"])
all_max = _fastpath.shortened(_api.all_max, ALL_REDUCE_AS["max"])
all_min = _fastpath.shortened(_api.all_min, ALL_REDUCE_AS["min"])
all_gather = _fastpath.shortened(_api.all_gather, ALL_GATHER_AS)
sum_scatter = _fastpath.shortened_by_op(_api.sum_scatter, SUM_SCATTER_AS)
broadcast = _api.broadcast
reduce = _api.reduce
gather = _api.gather
scatter = _api.scatter
all_to_all = _fastpath.shortened(_api.all_to_all, ALL_TO_ALL_AS)
all_gather_v = _api.all_gather_v
reduce_scatter_v = _api.reduce_scatter_v
gather_v = _api.gather_v
scatter_v = _api.scatter_v
all_to_all_v = _api.all_to_all_v
scan = _api.scan
exscan = _api.exscan
sendrecv = _api.sendrecv
barrier = _fastpath.shortened_barrier(_api.barrier, *BARRIER_AS)
send = _api.send
recv = _api.recv
recv_like = _api.recv_like
send_object = _api.send_object
recv_object = _api.recv_object
broadcast_object = _api.broadcast_object
gather_objects = _api.gather_objects
all_gather_objects = _api.all_gather_objects


async def init(
    strict: bool = False,
    backend: str = "any",
    *,
    rank: int | None = None,
    world_size: int | None = None,
    coordinator: str | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    connections_per_ip: int | None = None,
    connect_timeout: float | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  # of collectives, not of this call
    secret: bytes | str | None = None,
    shm: bool | None = None,
    device: str | None = None,
    all_gather_factory: Callable[[int, int], Callable[[bytes, int], bytes]] | None = None,
) -> Group:
    """Form the group of all ranks, or return it if it has formed; ``rt`` awaits the others, ``rt.sync`` blocks until they are there.

    Args:
        strict: an error instead of a group of one if nothing is configured.
        backend: ``ring``; ``mpi``, of processes that ``mpirun`` or the like started; ``nccl``, for arrays of CuPy; or ``any``: what was
            started first, else what ``RT_BACKEND`` says, else NCCL where MLX's variables for it are set, else the ring where something
            configures it, else MPI where it started several processes.
        rank, world_size, coordinator: this process, how many there are, ``host:port`` where rank 0 listens.
        hostfile: instead of a coordinator: JSON list of lists of ``ip:port``, one list per rank, one connection per address.
        connections_per_ip: sockets between two ranks (with a coordinator).
        connect_timeout: seconds until the ranks must have met (60).
        timeout: seconds a collective may take by default (for ever).
        secret: what connections prove to know.
        shm: False to go over TCP between ranks of one host, too, instead of through shared memory.
        device: ``jaccl``: the RDMA device that reaches every rank, or ``auto``; see ``docs/rdma.md``.
        all_gather_factory: ``jaccl``: ``factory(rank, size)`` makes ``f(mine, nbytes)``, which exchanges what queue pairs need.

    What is not given comes from ``RT_RANK``, ``RT_HOSTFILE`` and so on; see ``docs``. Nothing configured: a group of one,
    with a RuntimeWarning where a launcher seems to have started several processes.

    Raises:
        ConfigError: configured wrongly; one line that says what was found where, and what was expected.
        RendezvousError: not all ranks came in time; names the missing ones and the addresses tried.
    """
    future = world.start(
        backend, strict, rank=rank, world_size=world_size, coordinator=coordinator, hostfile=hostfile,
        connections_per_ip=connections_per_ip, connect_timeout=connect_timeout, timeout=timeout, secret=secret,
        shm=shm, device=device, all_gather_factory=all_gather_factory,
    )  # fmt: skip
    core = future.result() if future.done() else await wait_until(future)
    start_waiting()
    return Group(core)


async def close() -> None:
    """Leave in order: finish own works, say goodbye to all ranks, hear theirs (at most 5 s), close everything. Idempotent."""
    for found in world.worlds():
        await asyncio.get_running_loop().run_in_executor(None, found.leave)
        found.release()


def abort() -> None:
    """End every work of the world now, on all ranks, with ``GroupAbortedError``. Does not wait."""
    core = world.current()
    if core is not None:
        Group(core).abort()


def rank() -> int:
    """Return this process' rank in the world; ``init`` first."""
    return _formed().rank


def size() -> int:
    """Return the number of ranks in the world; ``init`` first."""
    return _formed().size


def _formed() -> CoreGroup:
    core = ready_core()
    if core is None:
        raise RuntimeError("the group has not formed yet: `await rt.init()` first")
    return core


def average_gradients(
    gradients: Any, group: Any = None, all_reduce_size: int = BUCKET_BYTES, communication_type: Any = None, communication_stream: Any = None
) -> Awaitable[Any]:
    """Average a tree of arrays over all ranks; shapes, dtypes and structure stay. The call submits the collectives, not the await.

    Args:
        gradients: any pytree (dicts, lists, tuples, ...) of floating or complex arrays, of any kinds.
        group: None: the world.
        all_reduce_size: leaves are joined into buckets of at least this many bytes, one per dtype; 0 or less: one collective per leaf.
        communication_type: dtype to communicate in; results are cast back.
        communication_stream: must be None on this backend.

    In a group of one the very same tree is returned.

    Raises:
        MismatchError: leaves have other names (keys, attributes, places in lists), shapes or dtypes on another rank.
        TypeError: a leaf is no floating or complex array.
    """
    start = averaging(all_reduce_size, communication_type)
    return _api._run("average_gradients", group, start, gradients, None, None, communication_stream, None)
