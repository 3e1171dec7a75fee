"""The group that users hold: every public call as a method, over one core group.

May live here: what a ``Group`` of either front end offers, each method a call of its ``Api``. May not: what a call does or means (``api``,
``collectives``), the state of a group (``group``).
"""

from __future__ import annotations

from typing import Any, Generic

from rt.api import Api, R, complete
from rt.group import CoreGroup


class Group(Generic[R]):
    """Some ranks, in an order. Made by ``init()`` and ``split()``; every collective is also a method of it.

    Groups of ``rt`` and of ``rt.sync`` are faces of the same core and accept each other wherever a group is expected.
    """

    @property
    def _api(self) -> Api[R]:
        """The front end whose face this is."""
        raise NotImplementedError

    def __init__(self, core: CoreGroup) -> None:
        if not isinstance(core, CoreGroup):
            raise TypeError("groups are made by init() and split()")
        self._core = core

    def rank(self) -> int:
        """Return this process' rank in the group."""
        return self._core.rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._core.size

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.Group {self._core.name}: rank {self._core.rank} of {self._core.size}>"

    def abort(self) -> None:
        """End every work of the group now, on all ranks, with ``GroupAbortedError``. Plain in both front ends; does not wait."""
        if self._core.world is not None:
            self._core.world.abort(self._core)

    def all_reduce(
        self, x: Any, op: str = "sum", *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.all_reduce`` on this group."""
        return self._api.all_reduce(x, op, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_sum(self, x: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_sum`` on this group."""
        return self._api.all_sum(x, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_max(self, x: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_max`` on this group."""
        return self._api.all_max(x, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_min(self, x: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_min`` on this group."""
        return self._api.all_min(x, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_gather(self, x: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_gather`` on this group."""
        return self._api.all_gather(x, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def sum_scatter(
        self, x: Any, op: str = "sum", *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.sum_scatter`` on this group."""
        return self._api.sum_scatter(x, op, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def broadcast(self, x: Any, root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.broadcast`` on this group."""
        return self._api.broadcast(x, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def reduce(
        self, x: Any, op: str = "sum", root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.reduce`` on this group."""
        return self._api.reduce(x, op, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def gather(self, x: Any, root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.gather`` on this group."""
        return self._api.gather(x, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def scatter(self, x: Any, root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.scatter`` on this group."""
        return self._api.scatter(x, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_to_all(self, x: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_to_all`` on this group."""
        return self._api.all_to_all(x, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_gather_v(self, x: Any, counts: Any, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.all_gather_v`` on this group."""
        return self._api.all_gather_v(x, counts, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def reduce_scatter_v(
        self, x: Any, counts: Any, op: str = "sum", *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.reduce_scatter_v`` on this group."""
        return self._api.reduce_scatter_v(x, counts, op, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def gather_v(
        self, x: Any, counts: Any, root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.gather_v`` on this group."""
        return self._api.gather_v(x, counts, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def scatter_v(
        self, x: Any, counts: Any, root: int = 0, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """As ``rt.scatter_v`` on this group."""
        return self._api.scatter_v(x, counts, root, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def all_to_all_v(
        self, x: Any, send_counts: Any, recv_counts: Any, *, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """As ``rt.all_to_all_v`` on this group."""
        return self._api.all_to_all_v(x, send_counts, recv_counts, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def scan(self, x: Any, op: str = "sum", *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.scan`` on this group."""
        return self._api.scan(x, op, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def exscan(self, x: Any, op: str = "sum", *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.exscan`` on this group."""
        return self._api.exscan(x, op, group=self, stream=stream, out=out, timeout=timeout, key=key)

    def barrier(self, *, stream: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """As ``rt.barrier`` on this group."""
        return self._api.barrier(group=self, stream=stream, timeout=timeout, key=key)

    def send(self, x: Any, dst: int, *, stream: Any = None, timeout: float | None = None, key: Any = None, tag: int = 0) -> R:
        """As ``rt.send`` on this group."""
        return self._api.send(x, dst, group=self, stream=stream, timeout=timeout, key=key, tag=tag)

    def recv(
        self, shape: Any, dtype: Any, src: int, *, stream: Any = None, out: Any = None, timeout: float | None = None,
        key: Any = None, tag: int = 0,
    ) -> R:  # fmt: skip
        """As ``rt.recv`` on this group."""
        return self._api.recv(shape, dtype, src, group=self, stream=stream, out=out, timeout=timeout, key=key, tag=tag)

    def recv_like(
        self, x: Any, src: int, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None, tag: int = 0
    ) -> R:
        """As ``rt.recv_like`` on this group."""
        return self._api.recv_like(x, src, group=self, stream=stream, out=out, timeout=timeout, key=key, tag=tag)

    def sendrecv(
        self, x: Any, dst: int, src: int, *, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None,
        tag: int = 0,
    ) -> R:  # fmt: skip
        """As ``rt.sendrecv`` on this group."""
        return self._api.sendrecv(x, dst, src, group=self, stream=stream, out=out, timeout=timeout, key=key, tag=tag)

    def send_object(self, obj: Any, dst: int, *, timeout: float | None = None, tag: int = 0) -> R:
        """As ``rt.send_object`` on this group."""
        return self._api.send_object(obj, dst, group=self, timeout=timeout, tag=tag)

    def recv_object(self, src: int, *, timeout: float | None = None, tag: int = 0) -> R:
        """As ``rt.recv_object`` on this group."""
        return self._api.recv_object(src, group=self, timeout=timeout, tag=tag)

    def broadcast_object(self, obj: Any, root: int = 0, *, timeout: float | None = None) -> R:
        """As ``rt.broadcast_object`` on this group."""
        return self._api.broadcast_object(obj, root, group=self, timeout=timeout)

    def gather_objects(self, obj: Any, root: int = 0, *, timeout: float | None = None) -> R:
        """As ``rt.gather_objects`` on this group."""
        return self._api.gather_objects(obj, root, group=self, timeout=timeout)

    def all_gather_objects(self, obj: Any, *, timeout: float | None = None) -> R:
        """As ``rt.all_gather_objects`` on this group."""
        return self._api.all_gather_objects(obj, group=self, timeout=timeout)


complete(Group)


def core_of(group: Any, what: str) -> CoreGroup:
    """Return the core of a group of either front end; ``what`` names the call, in messages.

    Raises:
        TypeError: ``group`` is no group.
    """
    if isinstance(group, Group):
        return group._core
    raise TypeError(f"{what}: group must be a Group made by init() or split(), not {type(group).__name__}")
