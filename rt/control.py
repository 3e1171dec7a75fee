"""The control thread: liveness and blame, for the life of a group, while user code computes or blocks.

May live here: the thread, its private event loop, the messages on control connections and what they lead to. May not: anything about
collectives or data sockets (it only hands those over), who is to blame (``rt.blame``), the relay's bookkeeping (``transports.relay``).

Nothing here runs on a timer while nothing is wrong: idle costs nothing, and a stopped or long computing peer is not a lost one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import selectors
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rt import _doors, _status
from rt._inquiry import ASK, TELL, Inquiry
from rt.blame import Judge, Report, Verdict
from rt.bootstrap import Wiring, bootstrap
from rt.config import RingConfig
from rt.pool import Keeper
from transports import tcp
from transports.relay import RELAY_ACK, RELAY_DATA, Relay, RelayPipe

__all__ = ["Control", "Report", "Verdict"]

_REPORT, _VERDICT, _BYE, _BYE_HEARD = 2, 3, 4, 5  # 1 is tcp.JSON, 6 and 7 are the relay's, 8 and 9 rt._inquiry's
_CALLS, _TALLY = 10, 11
_RANK = struct.Struct("!I")
_LAST_WORDS_SECONDS = 0.1  # between the end of a process and the last message it sent
_FLUSH_SECONDS = 0.5
_log = logging.getLogger("rt")


@dataclass
class _Peer:
    """A directly connected rank."""

    rank: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    address: str
    knows: asyncio.Event = field(default_factory=asyncio.Event)  # it has heard our BYE, or is gone


class Control:
    """The control thread of one process.

    Attributes:
        ready: the wiring, once the group has formed; fails as ``bootstrap`` does. Cancelling it gives up.
    """

    def __init__(
        self,
        config: RingConfig,
        on_verdict: Callable[[Verdict], None],
        on_bye: Callable[[int], None] | None,
        on_relay_wake: Callable[[int], None] | None,
        on_ask: Callable[[], _doors.Facts] | None,
        reachable: Callable[[int, int], bool] | None,
    ) -> None:
        self.ready: concurrent.futures.Future[Wiring] = concurrent.futures.Future()
        self._config = config
        self._rank = config.rank
        self._on_verdict = on_verdict
        self._on_bye = on_bye
        self._reachable = reachable
        # Never uvloop, whatever the policy says: this loop only sleeps, and it must be able to let go of its fds after a fork.
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._judge = Judge(config.rank == 0, self._loop, self._decide)
        self._relay = Relay(config.rank, config.size, self._send, self._post, on_relay_wake)
        self._inquiry = Inquiry(config.rank, config.size, self._send, lambda rank: rank in self._peers, on_ask or _status.process)
        self.on_calls: Callable[[bytes], None] = lambda payload: None  # what a rank tells that it called; in the control thread
        self.tallies: dict[int, bytes] = {}  # what each direct peer told last by its ``tell_tally``
        self._door: _status.Door | None = None
        self._missing: Callable[[], list[str]] = list
        self._peers: dict[int, _Peer] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._pidfds: dict[int, int] = {}
        self._seen: set[Report] = set()
        self._left: set[int] = set()
        self._lost: set[int] = set()
        self._pool: Keeper | None = None
        self._leaving = asyncio.Event()
        self._farewell_seconds = 0.0
        self._main_task: asyncio.Task[None] | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="rt-control", daemon=True)

    @classmethod
    def start(
        cls,
        config: RingConfig,
        *,
        on_verdict: Callable[[Verdict], None],
        on_bye: Callable[[int], None] | None = None,
        on_relay_wake: Callable[[int], None] | None = None,
        on_ask: Callable[[], _doors.Facts] | None = None,
        reachable: Callable[[int, int], bool] | None = None,
    ) -> Control:
        """Start the thread and return at once.

        Args:
            config: the group to form.
            on_verdict: called once per failure, in the control thread.
            on_bye: called in the control thread with each rank that leaves in order.
            on_relay_wake: called in the control thread with the peer of a relay pipe that may go on and has no ``wake`` of its own.
            on_ask: called in the control thread to learn what this rank is doing (see ``rt._status``).
            reachable: for tests, see ``bootstrap``.
        """
        control = cls(config, on_verdict, on_bye, on_relay_wake, on_ask, reachable)
        control._thread.start()
        return control

    def report(self, report: Report) -> None:
        """Flood a local suspicion and have it judged. Any thread; never blocks; does nothing after ``close``."""
        self._post(self._hear, report, None)

    def tell_calls(self, payload: bytes) -> None:
        """Tell rank 0 what this rank called, if they are connected. In the control thread."""
        if self._rank == 0:
            _guarded(self.on_calls, payload)
        else:
            self._send(0, _CALLS, payload)

    def tell_tally(self, rank: int, payload: bytes) -> None:
        """Tell a direct peer how many messages were sent to it. In the control thread."""
        self._send(rank, _TALLY, payload)

    def tell_all(self, payload: bytes) -> None:
        """Tell every rank that is connected with this one what ``on_calls`` is for there. In the control thread."""
        self._flood(_CALLS, payload, None)

    def later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called in the control thread after some seconds. Any thread; nothing happens once the thread has ended."""
        self._post(self._call_later, seconds, function, *arguments)

    def relay(self, peer: int) -> RelayPipe:
        """Return the pipe to a rank that is not connected directly. Raises ValueError where ``peer`` is no other rank."""
        return self._relay.pipe(peer)

    def close(self, timeout: float) -> None:
        """Leave in order and end the thread: say BYE, wait until the direct peers' control threads have heard it, at most ``timeout`` s.

        Any thread, also at interpreter exit; a second call waits for the first. Does not wait for the peers to leave.
        """
        if self._abandoned:
            return
        self._post(self._leave, timeout)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout + 2 * _FLUSH_SECONDS)

    def after_fork_in_child(self) -> None:
        """Let go of all descriptors in a forked child without a word to the peers or to the parent's loop.

        Each is replaced by /dev/null, not closed: nothing is shut down, the parent's epoll set stays as it is, and no Python object is
        left with a number that the child might use for something else.
        """
        self._abandoned = True
        if self._pool is not None:
            self._pool.abandon_in_child()
        fds = [*self._pidfds.values(), *(peer.writer.get_extra_info("socket").fileno() for peer in self._peers.values())]
        fds += [self._door.fileno()] if self._door is not None else []
        fds += [self._selector.fileno()] if hasattr(self._selector, "fileno") else []
        null = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            if fd >= 0:
                os.dup2(null, fd, inheritable=False)
        os.close(null)

    # The thread

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._abandoned:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(function, *arguments)

    def _call_later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_later(seconds, function, *arguments)

    def _run(self) -> None:
        with asyncio.Runner(debug=False, loop_factory=lambda: self._loop) as runner, suppress(asyncio.CancelledError):
            runner.run(self._main())

    async def _main(self) -> None:
        if _doors.SUPPORTED:
            try:
                self._door = _status.Door(self._loop, self._config.job, self._rank, self._what_we_do)
            except OSError as error:  # no more descriptors; the group must not depend on it
                _log.info("rank %d: rt.doctor cannot ask this rank: %s", self._rank, error)
        try:
            await self._live()
        finally:
            if self._door is not None:
                self._door.close()

    async def _live(self) -> None:
        self._main_task = asyncio.current_task()
        self.ready.add_done_callback(lambda ready: self._post(self._give_up) if ready.cancelled() else None)
        if self._leaving.is_set():  # closed before the thread began
            self._give_up()
        try:
            wiring = await bootstrap(self._config, reachable=self._reachable, on_begin=self._on_begin)
        except asyncio.CancelledError:
            self.ready.cancel()
            self.ready.set_running_or_notify_cancel()
            raise
        except Exception as error:
            if self.ready.set_running_or_notify_cancel():
                self.ready.set_exception(error)
            return
        self._main_task = None
        self._adopt(wiring)
        self._pool = Keeper(self._loop)
        if self.ready.set_running_or_notify_cancel():
            self.ready.set_result(wiring)
        else:
            self._leaving.set()
            for sock in (sock for socks in wiring.data.values() for sock in socks):
                sock.close()
            if wiring.rdma is not None:
                wiring.rdma.close()
        try:
            await self._leaving.wait()
            await self._farewell()
        finally:
            self._pool.close()

    def _adopt(self, wiring: Wiring) -> None:
        for rank, (reader, writer) in wiring.control.items():
            self._peers[rank] = _Peer(rank, reader, writer, tcp.show(writer.get_extra_info("peername")))
        self._tasks = [self._loop.create_task(self._listen(peer)) for peer in self._peers.values()]
        for rank, host in enumerate(wiring.hosts):
            if host.pid != os.getpid() and wiring.hosts[self._rank].sees(host):
                self._watch(rank, host.pid)

    def _on_begin(self, missing: Callable[[], list[str]]) -> None:
        self._missing = missing

    async def _what_we_do(self) -> _doors.Facts:
        """What all ranks of the group are doing, as far as they say so; before there is a group, what this one waits for."""
        found: _doors.Facts = {"size": self._config.size, "rank": self._rank, "formed": bool(self._peers)}
        if not self._peers:
            return {**found, **_status.process(), "missing": self._missing()}
        gone = {rank: "left" for rank in self._left} | {rank: "lost" for rank in self._lost}
        answers = await self._inquiry.ask(rank for rank in range(self._config.size) if rank not in gone)
        return {**found, "ranks": [answers.get(rank) for rank in range(self._config.size)], "gone": gone}

    def _give_up(self) -> None:
        if self._main_task is not None:
            self._main_task.cancel()

    def _leave(self, timeout: float) -> None:
        self._farewell_seconds = timeout
        self._leaving.set()
        self._give_up()

    async def _farewell(self) -> None:
        """Say BYE behind everything else, and stay until it was heard.

        Only the answer proves that: closing a connection with unread bytes in it makes the kernel throw away what is still unsent.
        """
        self._relay.end([rank for rank in range(self._config.size) if rank != self._rank and rank not in self._peers])
        self._flood(_BYE, _RANK.pack(self._rank), None)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._farewell_seconds):
                for peer in self._peers.values():
                    await peer.knows.wait()
        for task in self._tasks:
            task.cancel()
        for rank in list(self._pidfds):
            self._unwatch(rank)
        for peer in self._peers.values():
            peer.writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await asyncio.gather(*(peer.writer.wait_closed() for peer in self._peers.values()), return_exceptions=True)
        for peer in self._peers.values():
            peer.writer.transport.abort()
        await asyncio.sleep(0)  # transports close their sockets in the iteration after

    # Messages

    def _send(self, rank: int, kind: int, payload: bytes) -> None:
        if rank in self._peers:
            tcp.write_frame(self._peers[rank].writer, kind, payload)

    def _flood(self, kind: int, payload: bytes, source: int | None) -> None:
        for rank in self._peers:
            if rank != source:
                self._send(rank, kind, payload)

    async def _listen(self, peer: _Peer) -> None:
        """Handle what one direct peer sends, until the connection ends."""
        report = Report.of_rank("lost", peer.rank, f"lost rank {peer.rank} (tcp {peer.address}): connection closed")
        try:
            while True:
                self._on_frame(peer, *await tcp.read_frame(peer.reader))
        except EOFError:
            pass
        except (ValueError, struct.error) as error:
            report = Report.of_rank("protocol", peer.rank, f"from {peer.address}: {error}")
        except OSError as error:
            report = Report.of_rank("lost", peer.rank, f"lost rank {peer.rank} (tcp {peer.address}): {error.strerror or error}")
        peer.knows.set()
        self._suspect(report)
        peer.writer.close()

    def _on_frame(self, peer: _Peer, kind: int, payload: bytes) -> None:
        if kind == _REPORT:
            self._hear(Report.unpack(payload), peer.rank)
        elif kind == _VERDICT:
            self._obey(Report.unpack(payload).verdict(), peer.rank)
        elif kind == _BYE:
            self._hear_bye(peer, *_RANK.unpack(payload))
        elif kind == _BYE_HEARD:
            peer.knows.set()
        elif kind in (RELAY_DATA, RELAY_ACK):
            self._relay.on_frame(kind, payload)
        elif kind == _CALLS:
            _guarded(self.on_calls, payload)
        elif kind == _TALLY:
            self.tallies[peer.rank] = payload
        elif kind in (ASK, TELL):
            self._inquiry.on_frame(kind, payload)
        else:
            raise ValueError(f"a control message of unknown type {kind}")

    def _hear_bye(self, peer: _Peer, rank: int) -> None:
        if rank not in self._left:
            self._left.add(rank)
            self._flood(_BYE, _RANK.pack(rank), peer.rank)
            self._unwatch(rank)
            self._relay.left(rank)
            if self._on_bye is not None:
                _guarded(self._on_bye, rank)
        if rank == peer.rank:
            self._send(rank, _BYE_HEARD, b"")

    # Blame

    def _suspect(self, report: Report) -> None:
        """Report the loss of a rank, unless it left, is known to be lost, or we are leaving ourselves."""
        if not (report.culprit in self._left or report.culprit in self._lost or self._leaving.is_set()):
            self._hear(report, None)

    def _hear(self, report: Report, source: int | None) -> None:
        if report in self._seen:
            return
        self._seen.add(report)
        self._flood(_REPORT, report.pack(), source)
        if report.group == 0:
            self._lost.add(report.culprit)
            self._relay.lost(report.culprit)
        self._judge.hear(report)

    def _obey(self, verdict: Verdict, source: int) -> None:
        if verdict not in self._seen:
            self._seen.add(verdict)
            self._flood(_VERDICT, verdict.pack(), source)
            self._judge.settle(verdict)

    def _decide(self, report: Report) -> None:
        verdict = report.verdict()
        if self._rank == 0:
            self._seen.add(verdict)
            self._flood(_VERDICT, verdict.pack(), None)
        _log.info("rank %d: verdict: %s", self._rank, verdict)
        _guarded(self._on_verdict, verdict)

    # Processes on this host

    def _watch(self, rank: int, pid: int) -> None:
        """Learn of the end of a process even where a forked child of it keeps its connections open."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(rank, pid)
        except OSError as error:  # an old kernel, or a sandbox: the connections remain
            _log.info("rank %d: cannot watch process %d of rank %d: %s", self._rank, pid, rank, error)
        else:
            self._pidfds[rank] = fd
            self._loop.add_reader(fd, self._ended, rank, pid)

    def _ended(self, rank: int, pid: int) -> None:
        self._unwatch(rank)
        report = Report.of_rank("lost", rank, f"process {pid} ended")
        self._loop.call_later(_LAST_WORDS_SECONDS, self._suspect, report)

    def _unwatch(self, rank: int) -> None:
        fd = self._pidfds.pop(rank, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)


def _guarded(callback: Callable[[Any], None], argument: Any) -> None:
    """Call user code; its errors are its own and must not end the control thread."""
    try:
        callback(argument)
    except Exception:
        _log.exception("a callback of the control thread failed")
