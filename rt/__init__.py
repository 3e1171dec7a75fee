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
from collections.abc import Awaitable, Callable
from typing import Any

from rt import collectives, gradients, world
from rt.aio import Work
from rt.api import Api, check_common, core_of
from rt.api import Group as _Group
from rt.config import is_available
from rt.deferred import Deferred, ready_core
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
from rt.group import CoreGroup

__all__ = [
    "CollectiveTimeoutError", "ConfigError", "Group", "GroupAbortedError", "GroupBrokenError", "GroupClosedError", "MismatchError",
    "PeerLostError", "ProtocolError", "RTError", "RendezvousError", "Work", "abort", "all_gather", "all_max", "all_min", "all_reduce",
    "all_sum", "average_gradients", "barrier", "broadcast", "close", "init", "is_available", "rank", "recv", "recv_like", "send", "size",
    "sum_scatter",
]  # fmt: skip


class _Awaitable(Api[Awaitable[Any]]):
    def _run(
        self, group: Any, start: Callable[[CoreGroup], Work], timeout: float | None, stream: Any, key: Any, finish: Callable[[Any], Any] | None = None
    ) -> Awaitable[Any]:
        if timeout is not None or stream is not None or key is not None:
            check_common(timeout, stream, key)
        core = core_of(group) if group is not None else ready_core()
        if core is None:
            return Deferred(lambda formed: _start(formed, start, timeout), world.start())
        return _start(core, start, timeout)


def _start(core: CoreGroup, start: Callable[[CoreGroup], Work], timeout: float | None) -> Work:
    work = start(core)
    seconds = timeout if timeout is not None else core.timeout
    if seconds is not None and not work.done():
        work.limit(seconds)
    return work


class Group(_Group[Awaitable[Any]]):
    __doc__ = _Group.__doc__

    async def split(self, color: int, key: int = -1) -> Group:
        """Return the group of the ranks with the same ``color``, ordered by ``key`` (negative: by rank), ties by rank. All ranks must call."""
        return Group(collectives.split_group(self._core, await collectives.split(self._core, color, key)))

    def average_gradients(self, gradients: Any, **keywords: Any) -> Awaitable[Any]:
        """As ``rt.average_gradients`` on this group."""
        return average_gradients(gradients, self, **keywords)


_api = _Awaitable()
Group._api = _api
all_reduce = _api.all_reduce
all_sum = _api.all_sum
all_max = _api.all_max
all_min = _api.all_min
all_gather = _api.all_gather
sum_scatter = _api.sum_scatter
broadcast = _api.broadcast
barrier = _api.barrier
send = _api.send
recv = _api.recv
recv_like = _api.recv_like


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
    timeout: float | None = None,
    secret: bytes | str | None = None,
) -> Group:
    """Form the group of all ranks, or return it if it has formed. See ``rt.sync.init`` for arguments and errors."""
    future = world.start(
        backend, strict, rank=rank, world_size=world_size, coordinator=coordinator, hostfile=hostfile,
        connections_per_ip=connections_per_ip, connect_timeout=connect_timeout, timeout=timeout, secret=secret,
    )  # fmt: skip
    return Group(future.result() if future.done() else await asyncio.wrap_future(future))


async def close() -> None:
    """Leave in order: finish own works, say goodbye to all ranks, hear theirs (at most 5 s), close everything. Idempotent."""
    found = world.current_world()
    if found is not None:
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
    gradients_tree: Any, group: Any = None, all_reduce_size: int = gradients.BUCKET_BYTES, communication_type: Any = None, communication_stream: Any = None
) -> Awaitable[Any]:
    """Average a tree of arrays over all ranks; see ``rt.sync.average_gradients``. Collectives are submitted by the call, not by the await."""
    check_common(None, communication_stream, None)
    core = core_of(group) if group is not None else _formed()
    if core.size == 1:
        works: list[Work] = []
        finish: Callable[[list[Any]], Any] = lambda _: gradients_tree  # noqa: E731
    else:
        plan = gradients.Plan(gradients_tree, all_reduce_size, communication_type)
        works, finish = plan.start(core), plan.finish

    async def collect() -> Any:
        return finish([await work for work in works])

    return collect()
