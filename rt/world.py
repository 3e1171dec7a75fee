"""The world of a process: how it comes to be, what happens to it, and how it ends.

May live here: starting and caching the world, the events of the engine and the verdicts of the control thread, orderly exit, fork. May
not: collectives, configuration, waiting of any front end (``init`` here returns a future).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import itertools
import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rt import _fastpath, backends, config, log
from rt.aio import LoopDriver, Work
from rt.blame import Report, Verdict
from rt.errors import (
    CollectiveTimeoutError,
    GroupAbortedError,
    GroupBrokenError,
    GroupClosedError,
    MismatchError,
    PeerLostError,
    ProtocolError,
    RTError,
)
from rt.group import WAITING_ALIKE, CoreGroup, explain_signature, hash64
from transports.relay import carriers

if TYPE_CHECKING:
    from rt.bootstrap import Wiring
    from rt.control import Control
    from rt.queue_pairs import QueuePairs
    from rt.tuning import Table

GOODBYE_SECONDS = 5.0
SPIN_SECONDS = 50e-6  # about what a wake-up costs; only where every rank of this host has a core to itself
_CONTROL_SECONDS = 1.0
_LAST_WRITES_SECONDS = 1.0  # until the peers' devices have what was sent
_LOOK_AGAIN_SECONDS = 0.02

_ERRORS: dict[str, type[GroupBrokenError]] = {
    "lost": PeerLostError,
    "mismatch": MismatchError,
    "timeout": CollectiveTimeoutError,
    "aborted": GroupAbortedError,
    "protocol": ProtocolError,
}


class World:
    """One engine, one control thread, and the groups on them."""

    def __init__(self, ring: config.RingConfig) -> None:
        self.rank = ring.rank
        self.size = ring.size
        self.timeout = ring.timeout
        self.lanes = 1  # connections per pair, once they are made
        self.authenticated = ring.secret.key is not None  # peers proved to know the job's secret
        self.direct: frozenset[tuple[int, int]] = frozenset()
        self.hosts: tuple[Any, ...] = (None,) * ring.size  # of each rank what is equal on its host; the same on all ranks
        self.engine = _fastpath.Engine()
        self.drivers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopDriver] = weakref.WeakKeyDictionary()
        self.groups: dict[int, CoreGroup] = {}
        self.addresses: dict[int, str] = {}
        self.shared: frozenset[tuple[int, int]] = frozenset()  # pairs (a, b), a < b, that share memory
        self.tuning: Table | None = None  # rank 0's, once the ranks have met
        self.spin = 0.0  # seconds a blocking call polls before it sleeps
        self.closed = False
        self.orphan = False  # a forked child: the connections are the parent's
        self.rdma: QueuePairs | None = None
        self._ring = ring
        self._identity = hash64("world", ring.job)  # of the group of all ranks
        self._verdicts: list[Verdict] = []
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self.control: Control | None = None
        self.engine.set_event_handler(self._on_events)

    def start(self) -> concurrent.futures.Future[CoreGroup]:
        """Begin to meet the other ranks; the future holds the world's group."""
        future: concurrent.futures.Future[CoreGroup] = concurrent.futures.Future()
        if self.size == 1:
            future.set_result(self.new_group(range(1), 0, "world", self._identity))
            return future
        self._begin(future)
        return future

    def _begin(self, future: concurrent.futures.Future[CoreGroup]) -> None:
        self._meet(self._ring, future)

    def _meet(self, ring: config.RingConfig, future: concurrent.futures.Future[CoreGroup]) -> None:
        """Start the control thread, which meets the other ranks."""
        from rt.control import Control  # with all of bootstrap behind it: a group of one never needs it

        self.control = Control.start(ring, on_verdict=self._on_verdict, on_bye=self._on_bye, on_ask=self._on_ask)
        ready = self.control.ready
        ready.add_done_callback(lambda wiring: self._wired(wiring, future))
        future.add_done_callback(lambda f: ready.cancel() if f.cancelled() else None)
        import rt.choose  # noqa: F401  # while the ranks meet, so that the first call need not

    def _wired(self, wiring: concurrent.futures.Future[Any], future: concurrent.futures.Future[CoreGroup]) -> None:
        """In the control thread: hand the sockets to the engine."""
        try:
            found = wiring.result()
            self.direct, self.shared, self.tuning = found.direct, found.shared, found.tuning
            self.rdma = found.rdma
            self.lanes = max(map(len, (found.rdma.links if found.rdma is not None else found.data).values()), default=1)
            self.hosts = tuple(host.network for host in found.hosts)
            scarce = _cores() < sum(found.hosts[self.rank].sees(host) for host in found.hosts)
            self.spin = self._ring.spin if self._ring.spin is not None else 0.0 if scarce else SPIN_SECONDS
            self.addresses = {peer: _address(socks[0]) for peer, socks in found.data.items()}
            for peer in range(self.size):
                self._add_links(peer, found)
                if peer != self.rank and peer not in found.data:
                    self._add_relay(peer)
            group = self.new_group(range(self.size), self.rank, "world", self._identity)
        except BaseException as error:
            if not future.cancelled():
                future.set_exception(error)
            return
        if future.set_running_or_notify_cancel():
            future.set_result(group)

    def _add_links(self, peer: int, wiring: Wiring) -> None:
        if wiring.rdma is not None:
            wiring.rdma.add_to(self.engine, peer, wiring.data.get(peer, ()), self.control)
            return
        if peer not in wiring.memory:
            for sock in wiring.data.get(peer, ()):
                self.engine.add_socket(peer, sock)
            return
        from transports import shm  # loaded by the bootstrap

        fd, first = wiring.memory[peer]
        try:
            for index, sock in enumerate(wiring.data[peer]):
                self.engine.add_shared(peer, sock, fd, index * shm.stride(wiring.ring_bytes), wiring.ring_bytes, first)
        finally:
            os.close(fd)

    def _add_relay(self, peer: int) -> None:
        assert self.control is not None
        pipe = self.control.relay(peer)
        index = self.engine.add_link(peer, pipe)
        pipe.wake = lambda: self.engine.ready(index)

    def new_group(self, ranks: Any, rank: int, name: str, identity: int, timeout: float | None = None) -> CoreGroup:
        """Register a group; a verdict that came before it counts."""
        group = self._make_group(ranks, rank, name, identity, self._ring.timeout if timeout is None else timeout)
        with self._lock:
            self.groups[identity] = group
            early = [verdict for verdict in self._verdicts if self._concerns(verdict, group)]
        for verdict in early:
            self._break(group, verdict)
        return group

    def _make_group(self, ranks: Any, rank: int, name: str, identity: int, timeout: float | None) -> CoreGroup:
        return CoreGroup(self, ranks, rank, name, identity, timeout)

    def links(self) -> dict[int, str]:
        """Return how this rank reaches each other one: ``shm``, ``tcp HOST:PORT`` (of the first socket), or ``relayed``."""
        return {peer: self._link(peer) for peer in range(self.size) if peer != self.rank}

    def _link(self, peer: int) -> str:
        if (min(peer, self.rank), max(peer, self.rank)) in self.shared:
            return "shm"
        if self.rdma is not None and peer in self.rdma.links:
            return f"rdma {self.rdma.links[peer][0].where}"
        return f"tcp {self.addresses[peer]}" if peer in self.addresses else "relayed"

    # -- loops

    def driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        """Return this world's driver in ``loop``, attached now if it is new."""
        driver = self.drivers.get(loop)
        if driver is None:
            for gone in [each for each in list(self.drivers) if each.is_closed()]:
                self.drivers.pop(gone).detach()
            driver = self.drivers[loop] = LoopDriver(loop, self.engine, self.spin)
        return driver

    # -- failures

    def _on_events(self, events: list[Any]) -> None:
        """Judge what the engine found, in whatever thread it was found."""
        for kind, peer, code, group, channel, sequence, mine, theirs in events:
            known = self.groups.get(group)
            if kind == _fastpath.LOST:
                if peer not in self.addresses:
                    continue  # the end of a relayed stream is a consequence; its cause comes through the control thread
                closed = f"connection closed ({os.strerror(code)})" if code else "connection closed"
                reason = (self.rdma and self.rdma.failure(peer)) or closed
                self._report(Report.of_rank("lost", peer, f"lost rank {peer} ({self._link(peer)}): {reason}"))
            elif kind == _fastpath.PROTOCOL:
                self._report(Report.of_rank("protocol", peer, f"rank {peer} sent bytes that are no frame of this version (type {code})"))
            elif kind == _fastpath.CLOSED:
                if known is not None:
                    known.fail(known.closed(f"rank {peer} has closed the group and is still needed"))
            else:
                self._report(self._mismatch(known, peer, group, channel, sequence, mine, theirs, code))

    def _mismatch(
        self, group: CoreGroup | None, peer: int, identity: int, channel: int, sequence: int, mine: bytes, theirs: bytes, roles: int
    ) -> Report:
        """Both sides find the same disagreement, and both must describe it in the same words: lower rank first."""
        if not any(mine):  # the engine has forgotten the call: it had ended without this peer
            sequence = int.from_bytes(theirs[:4], sys.byteorder)
            mine = (group.recent(sequence) if group is not None and channel == identity else None) or b""
        # Roles are known where two blocked ranks wait for each other (_deadlock.pxi); within a channel they follow from it.
        my_role, their_role = ((roles - 1) % 3, (roles - 1) // 3) if roles else (None, None)
        own = explain_signature(mine, my_role) if mine else f"something else as #{sequence}, long ago"
        sides = sorted([(self.rank, own), (peer, explain_signature(theirs, their_role))])
        numbers = {rank: group.ranks.index(rank) if group is not None and rank in group.ranks else rank for rank, _ in sides}
        text = "ranks disagree: " + ", but ".join(f"rank {numbers[rank]} called {said}" for rank, said in sides)
        alike = sides[0][1] == sides[1][1]
        text += "; each waits for the other" + WAITING_ALIKE[my_role] * alike if my_role is not None else ""
        text += "; they choose algorithms by different tables, links or lanes" if alike and my_role is None else ""
        return Report("mismatch", identity, sequence, sides[1][0], "", text)

    def _report(self, report: Report) -> None:
        if self.control is not None and not self.closed:
            self.control.report(report)

    def timed_out(self, work: Work, seconds: float) -> None:
        """A time limit expired: blame a rank that has not called, else one that is late."""
        work = cast(Work, work.pending())
        absent, late = self.engine.waiting_for(work)
        if work.state != _fastpath.FLYING:
            return
        waited = absent or late
        text = f"not done {seconds:g} s after rank {work.group.rank} called; it waits for rank{'s' if len(waited) > 1 else ''} "
        text += (", ".join(str(work.group.ranks.index(r)) for r in waited) or "none") + (", which did not call" if absent else "")
        # Who called and is late may itself wait for another: blame needs a single one.
        culprit = absent[0] if absent else late[0] if len(late) == 1 else -1
        self._report(Report("timeout", work.group.identity, work.sequence, culprit, work.describe(), text))

    def abort(self, group: CoreGroup, culprit: int | None = None, text: str | None = None) -> None:
        """End every work of a group now, here and on all its ranks. Unless told otherwise this rank is to blame, for calling ``abort``."""
        culprit = self.rank if culprit is None else culprit
        text = text or f"rank {self.rank} called abort()"
        self._report(Report("aborted", group.identity, 0, culprit, "", text))
        group.fail(group.broken(GroupAbortedError, culprit, text))

    def abort_all(self, culprit: int | None, text: str) -> None:
        """Abort every group that this rank is in and that has not failed."""
        for group in list(self.groups.values()):
            if group.failure is None:
                self.abort(group, culprit, text)

    def _on_verdict(self, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts.append(verdict)
            groups = [group for group in self.groups.values() if self._concerns(verdict, group)]
        for group in groups:
            self._break(group, verdict)

    def _on_bye(self, rank: int) -> None:
        """A rank has left in order; who needs its GOODBYE has it, but others may have needed it to forward."""
        with self._lock:
            groups = [group for group in self.groups.values() if rank not in group.ranks and self._forwards(rank, group)]
        for group in groups:
            group.fail(group.closed(f"rank {rank} of the world, which forwarded between ranks of this group, has left"))

    def _on_ask(self) -> dict[str, Any]:
        from rt import _status  # loaded by the control thread

        return _status.describe(self)

    def _concerns(self, verdict: Verdict, group: CoreGroup) -> bool:
        if verdict.group:
            return verdict.group == group.identity
        return verdict.culprit in group.ranks or self._forwards(verdict.culprit, group)

    def _forwards(self, rank: int, group: CoreGroup) -> bool:
        """Whether some pair of this group's ranks has no connection and talks through ``rank``."""
        pairs = itertools.combinations(sorted(group.ranks), 2)
        return any(pair not in self.direct and rank in carriers(*pair, self.size) for pair in pairs)

    @staticmethod
    def _break(group: CoreGroup, verdict: Verdict) -> None:
        culprit = verdict.culprit if verdict.culprit >= 0 else None
        group.fail(group.broken(_ERRORS[verdict.kind], culprit, verdict.text))

    # -- leaving

    @property
    def broken(self) -> bool:
        """Whether the world's group has failed. Others may have without it, and then the links are whole."""
        group = self.groups.get(self._identity)
        return group is not None and group.failure is not None

    def leave(self) -> None:
        """Leave in order: finish own works, say GOODBYE, hear the peers'. Blocks, at most about 11 s. Idempotent."""
        with self._closing:
            if self.closed or self.orphan:
                return
            if self.size > 1 and not self.broken:
                self._drive(lambda: self.engine.in_flight() == 0)
                if self.rdma is not None:
                    self.rdma.ending()
                self.engine.say_goodbye()
                self._drive(lambda: not self.engine.goodbyes_missing())
            for group in list(self.groups.values()):
                group.report_unheard()
                group.fail(group.closed("the group was closed here"))
            self.closed = True
            if self.control is not None:
                self.control.close(_CONTROL_SECONDS)

    def _drive(self, finished: Callable[[], bool]) -> None:
        poll = select.poll()
        poll.register(self.engine.fileno(), select.POLLIN)
        until = time.monotonic() + GOODBYE_SECONDS
        while True:
            status = self.engine.progress(1 << 24)
            if finished():
                return
            rest = until - time.monotonic()
            if rest <= 0:
                return
            if status != _fastpath.BUDGET:
                # Another driver may read what this one waits for, and the descriptor is edge-triggered: look again now and then.
                poll.poll(min(rest, _LOOK_AGAIN_SECONDS) * 1e3)

    def close(self) -> None:
        """Leave and give every descriptor back."""
        self.leave()
        self.release()

    def release(self) -> None:
        """Give the engine's descriptors back; loops that watched them must know first."""
        if self.orphan:
            return
        current = asyncio._get_running_loop()
        for loop, driver in list(self.drivers.items()):
            if loop is current or loop.is_closed():
                driver.detach()
            else:
                with contextlib.suppress(RuntimeError):  # it closed between the two lines
                    loop.call_soon_threadsafe(driver.detach)
        self.drivers.clear()
        self.engine.close()
        if self.rdma is not None:
            self.rdma.close(0.0 if self.broken else _LAST_WRITES_SECONDS)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connections; every group raises from here on."""
        self.orphan = self.closed = True
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self.engine.abandon_in_child()
        if self.rdma is not None:
            self.rdma.let_go()
        if self.control is not None:
            self.control.after_fork_in_child()
        for group in self.groups.values():
            group.refuse(group.closed("this process was forked from a rank; only the parent may use its groups"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _address(sock: Any) -> str:
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "unknown"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- the one world of a process ---------------------------------------------------------------------------------------------------------

class _Started(NamedTuple):
    """A world of this process, and its group, which the future holds once it has formed."""

    world: World
    group: concurrent.futures.Future[CoreGroup]

    def lives(self) -> bool:
        return not self.world.closed and not _failed(self.group)


_lock = threading.Lock()
_started: dict[str, _Started] = {}  # by backend: one world of each may be there at a time
_first = ""  # of these, the one that ``init()`` without a backend means
_formed: CoreGroup | None = None  # that one's group: every call asks for it, and futures take locks


def start(backend: str = "any", strict: bool = False, **keywords: Any) -> concurrent.futures.Future[CoreGroup]:
    """Begin to form the world of a backend, or return the one that is there; ``any`` means the one that was started first.

    Raises:
        TypeError, ValueError: bad arguments; see ``backends.choose_backend``.
        ConfigError: configuration begun but wrong; with ``strict`` also none at all.
    """
    global _first, _formed
    with _lock:
        living = {name: each for name, each in _started.items() if each.lives()}
        if backend == "any" and living:
            backends.choose_backend(backend, os.environ, strict)  # bad arguments are errors also when there is nothing left to do
            return (living.get(_first) or next(iter(living.values()))).group
        chosen = backends.choose_backend(backend, os.environ, strict)
        if chosen in living:
            return living[chosen].group
        chosen, made = _make(chosen, backend, strict, living, keywords)
        if made is None:
            log.configure(os.environ, 0)
            backends.settle_for_one(backend, strict, keywords)
            single: concurrent.futures.Future[CoreGroup] = concurrent.futures.Future()
            single.set_result(CoreGroup(None, [0], 0, "singleton", hash64("singleton")))
            return single
        log.configure(os.environ, made.rank)
        _started.pop(chosen, None)
        _started[chosen] = _Started(made, made.start())
        if _first not in living:
            _fastpath.calls_of_world(None, 0.0)
            _first, _formed = chosen, None
        return _started[chosen].group


def _make(
    chosen: str | None, backend: str, strict: bool, living: dict[str, _Started], keywords: dict[str, Any]
) -> tuple[str, World | None]:
    """Return which backend it will be and its world, None where nothing configures one."""
    devices = {name: keywords.pop(name, None) for name in ("device", "all_gather_factory")}
    backends.check_devices(chosen, devices)
    if chosen == "jaccl":
        from rt.config_rdma import resolve_rdma

        rdma = resolve_rdma(**devices, **keywords)
        return "jaccl", World(rdma) if rdma is not None else None
    if chosen == "nccl":
        from rt import nccl_world

        return "nccl", nccl_world.make(keywords)
    if chosen == "ring":
        ring = config.resolve_ring(**keywords)
        if ring is not None:
            return "ring", World(ring)
        if backend == "any" and backends.numbered_by_mpi() and backends.is_available("mpi"):
            chosen = "mpi"
    if chosen == "mpi" or (chosen == "ring" and "mpi" in living):
        from rt import mpi_world

        if chosen == "ring":  # its ranks have met already
            return "ring", mpi_world.ring(keywords)
        return "mpi", mpi_world.make(strict and backend == "mpi", keywords)
    return "", None


def _failed(future: concurrent.futures.Future[CoreGroup]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def current() -> CoreGroup | None:
    """Return the group of the world that calls without ``group=`` mean, if it has formed, also when it has failed or closed since."""
    global _formed
    if _formed is None and _first:
        future = _started[_first].group
        if future.done() and not _failed(future):
            _formed = group = future.result()
            if group.timeout is None and group.world is not None:
                _fastpath.calls_of_world(group.known, group.world.spin)
    return _formed


def worlds() -> list[World]:
    """Return the worlds that were started last, of every backend, the one that calls without ``group=`` mean first."""
    return [each.world for name, each in sorted(_started.items(), key=lambda item: item[0] != _first)]


def end() -> None:
    """Close the worlds that were started last, formed or not."""
    for world, group in list(_started.values()):
        if not world.orphan:
            if not group.done():
                group.cancel()
            with contextlib.suppress(RTError):
                world.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for each in _started.values():
        each.world.abandon()


atexit.register(end)
os.register_at_fork(after_in_child=_after_fork)

__all__ = ["GroupClosedError", "World", "current", "end", "start", "worlds"]
