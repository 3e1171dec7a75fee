"""Collectives that block: the same names as ``rt``, returning the result.

    import rt.sync as rt
    group = rt.init()
    total = rt.all_sum(x)

May live here: the blocking driver (how a thread waits for a work) and the blocking faces of what ``rt`` offers. May not: collectives.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import rt
from rt import _fastpath, collectives, world
from rt.aio import Work
from rt.api import Api, Start, check_common
from rt.backends import is_available
from rt.deferred import ready_core, start_waiting
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

__all__ = [
    "CollectiveTimeoutError", "ConfigError", "Group", "GroupAbortedError", "GroupBrokenError", "GroupClosedError", "MismatchError",
    "PeerLostError", "ProtocolError", "RTError", "RendezvousError", "abort", "all_gather", "all_gather_objects", "all_gather_v",
    "all_max", "all_min", "all_reduce", "all_sum", "all_to_all", "all_to_all_v", "average_gradients", "barrier", "broadcast",
    "broadcast_object", "close", "exscan", "gather", "gather_objects", "gather_v", "init", "is_available", "rank", "recv", "recv_like",
    "recv_object", "reduce", "reduce_scatter_v", "scan", "scatter", "scatter_v", "send", "send_object", "sendrecv", "size", "sum_scatter",
]  # fmt: skip

_OWN_THREADS = 2  # this one and the control thread: no third can make a call
_local = threading.local()


def _wait(work: Work, timeout: float | None) -> Any:
    """Drive the engine from this thread until the work has ended."""
    core = work.group
    if work.state == _fastpath.FLYING and not core.block(work):
        assert core.engine is not None and core.world is not None
        sleeper = getattr(_local, "sleeper", None)
        if sleeper is None:
            sleeper = _local.sleeper = _fastpath.Sleeper()
        try:
            if not _fastpath.wait(core.engine, work, sleeper, -1.0 if timeout is None else timeout, core.world.spin, _alone):
                core.world.timed_out(work, timeout or 0.0)
                _fastpath.wait(core.engine, work, sleeper, -1.0, 0.0, None)
        except BaseException:
            work.give_back()
            raise
    return work.outcome()


def _alone() -> bool:
    """Say whether no thread but this one can make a call."""
    return threading.active_count() <= _OWN_THREADS


class _Blocking(Api[Any]):
    def _run(self, what: str, group: Any, start: Start, x: Any, out: Any, timeout: float | None, stream: Any, key: Any) -> Any:
        if timeout is not None or stream is not None or key is not None:
            check_common(what, timeout, key)
        core = core_of(group, what) if group is not None else _world_core()
        _refuse_inside_loop(core)
        limit = timeout if timeout is not None else core.timeout
        if stream is None:
            return _wait(start(core.blocking(limit), x, out), limit)
        with core.on_stream(stream, what):
            return _wait(start(core.blocking(limit), x, out), limit)

    def _all_reduce(self, group: Any, what: str, op: str, x: Any, out: Any, timeout: float | None, stream: Any, key: Any) -> Any:
        # A small one between ranks that poll takes less time than the layers that most calls go through. The world's do before.
        core = core_of(group, what) if group is not None else None
        call = ALL_REDUCE_AS.get(op) if type(op) is str else None
        if core is not None and call is not None and timeout is None is core.timeout and stream is None is key:
            work = core.known.run(call, x, out, what, core.world.spin if core.world is not None else 0.0)
            if work is not None:
                return work.result if work.state == _fastpath.DONE else _wait(work, None)
        return super()._all_reduce(group, what, op, x, out, timeout, stream, key)


def _refuse_inside_loop(core: CoreGroup) -> None:
    loop = asyncio._get_running_loop()
    if loop is not None and core.in_flight() and core.driver_of(loop) is not None:
        raise RuntimeError(
            f"a call of rt.sync would block the event loop that drives {core.in_flight()} collectives in flight; "
            "use `await rt...` here"
        )


def _world_core() -> CoreGroup:
    core = ready_core()
    return core if core is not None else init()._core


class Group(_Group[Any]):
    __doc__ = _Group.__doc__

    @property
    def _api(self) -> Api[Any]:
        return _api

    def split(self, color: int, key: int = -1) -> Group:
        """Return the group of the ranks with the same ``color``, in the order of ``key`` (negative: the rank), ties by rank.

        All ranks of this group must call.
        """
        core = self._core
        _refuse_inside_loop(core)
        work, number = collectives.split(core, color, key)
        part = collectives.split_group(core, _wait(work, core.timeout), number)
        if part.making is not None:
            part.making.result()
        return Group(part)

    def average_gradients(
        self, gradients: Any, all_reduce_size: int = BUCKET_BYTES, communication_type: Any = None, communication_stream: Any = None
    ) -> Any:
        """As ``rt.sync.average_gradients`` on this group."""
        return average_gradients(gradients, self, all_reduce_size, communication_type, communication_stream)


_api = _Blocking()
all_reduce = _fastpath.shortened_by_op(_api.all_reduce, ALL_REDUCE_AS, _wait)
all_sum = _fastpath.shortened(_api.all_sum, ALL_REDUCE_AS["sum"], _wait)
all_max = _fastpath.shortened(_api.all_max, ALL_REDUCE_AS["max"], _wait)
all_min = _fastpath.shortened(_api.all_min, ALL_REDUCE_AS["min"], _wait)
all_gather = _fastpath.shortened(_api.all_gather, ALL_GATHER_AS, _wait)
sum_scatter = _fastpath.shortened_by_op(_api.sum_scatter, SUM_SCATTER_AS, _wait)
broadcast = _api.broadcast
reduce = _api.reduce
gather = _api.gather
scatter = _api.scatter
all_to_all = _fastpath.shortened(_api.all_to_all, ALL_TO_ALL_AS, _wait)
all_gather_v = _api.all_gather_v
reduce_scatter_v = _api.reduce_scatter_v
gather_v = _api.gather_v
scatter_v = _api.scatter_v
all_to_all_v = _api.all_to_all_v
scan = _api.scan
exscan = _api.exscan
sendrecv = _api.sendrecv
barrier = _fastpath.shortened_barrier(_api.barrier, *BARRIER_AS, wait=_wait)
send = _api.send
recv = _api.recv
recv_like = _api.recv_like
send_object = _api.send_object
recv_object = _api.recv_object
broadcast_object = _api.broadcast_object
gather_objects = _api.gather_objects
all_gather_objects = _api.all_gather_objects


def init(
    strict: bool = False,
    backend: str = "any",
    *,
    rank: int | None = None,
    world_size: int | None = None,
    coordinator: str | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    connections_per_ip: int | None = None,
    connect_timeout: float | None = None,
    timeout: float | None = None,
    secret: bytes | str | None = None,
    shm: bool | None = None,
    device: str | None = None,
    all_gather_factory: Callable[[int, int], Callable[[bytes, int], bytes]] | None = None,
) -> Group:
    """Form the group of all ranks, or return it if it has formed. See ``rt.init`` for arguments and errors."""
    future = world.start(
        backend, strict, rank=rank, world_size=world_size, coordinator=coordinator, hostfile=hostfile,
        connections_per_ip=connections_per_ip, connect_timeout=connect_timeout, timeout=timeout, secret=secret,
        shm=shm, device=device, all_gather_factory=all_gather_factory,
    )  # fmt: skip
    try:
        core = future.result()
    except BaseException:
        future.cancel()
        raise
    start_waiting()
    return Group(core)


def close() -> None:
    """Leave in order: finish own works, say goodbye to all ranks, hear theirs (at most 5 s), close everything. Idempotent."""
    for found in world.worlds():
        found.close()


def abort() -> None:
    """End every work of the world now, on all ranks, with ``GroupAbortedError``. Does not wait."""
    core = world.current()
    if core is not None:
        Group(core).abort()


def rank() -> int:
    """Return this process' rank in the world."""
    return _world_core().rank


def size() -> int:
    """Return the number of ranks in the world."""
    return _world_core().size


def average_gradients(
    gradients: Any, group: Any = None, all_reduce_size: int = BUCKET_BYTES, communication_type: Any = None, communication_stream: Any = None
) -> Any:
    """Average a tree of arrays over all ranks; see ``rt.average_gradients``."""
    start = averaging(all_reduce_size, communication_type)
    return _api._run("average_gradients", group, start, gradients, None, None, communication_stream, None)


init.__doc__, average_gradients.__doc__ = rt.init.__doc__, rt.average_gradients.__doc__
