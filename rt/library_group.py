"""A group whose arrays a library moves: what such groups have in common.

May live here: how calls that the library carries out are numbered, told, waited for, and end. May not: a library's words
(``transports.mpi``, ``transports.nccl``), what a call becomes there (``mpi_group``, ``nccl_group``).

All that the library does not carry is as in any group: control, failures, objects, splits. So the group has the ring's links, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rt import _fastpath, library_calls
from rt.aio import BUDGET_BYTES, LoopDriver, Work
from rt.errors import RTError
from rt.group import Call, CoreGroup, InLibrary
from rt.library_waiting import Driver, Request, patiently
from rt.schedule import Collective

if TYPE_CHECKING:
    from rt.library_world import LibraryWorld

P2P = (Collective.SEND, Collective.RECV)


class LibraryGroup(CoreGroup):
    """Some ranks of a world that has a library."""

    world: LibraryWorld

    way = ""  # in which calls go, where all ranks must go it alike
    receives_first = False  # the send is the half that is only begun; libraries may block in the receive

    def __init__(self, world: LibraryWorld, ranks: Any, rank: int, name: str, identity: int, timeout: float | None) -> None:
        super().__init__(world, ranks, rank, name, identity, timeout)
        self._described: dict[tuple[Call, str], tuple[bytes, str]] = {}  # by call and way
        self._messages: dict[tuple[Collective, int, int], int] = {}  # how many of a kind, by peer and tag
        self.count = 0  # of collectives
        self.called: list[bytes] = []  # signatures of those that were not told to rank 0 yet
        self._compared = 0  # of those that were
        self._last, self._told_at = b"", 0.0  # the last of these, and when
        self.flying: set[Work] = set()  # by the library
        self._left = {left.rank: left for left in world.left(identity)}  # of its ranks

    # -- submitting

    def travels(self, call: Call, source: Any, target: Any) -> bool:
        """Say whether the library carries a call; what it does not goes over the ring's links."""
        raise NotImplementedError

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        """Have the library begin a call."""
        raise NotImplementedError

    def submit(self, what: str, call: Call, source: Any, target: Any, work: Work, budget: int = BUDGET_BYTES) -> None:
        """Start ``work``; arguments are checked by now. Raises the group's error if it is broken or closed."""
        if not self.travels(call, source, target):
            super().submit(what, call, source, target, work, budget)
            return
        signature, work.about = self.described(call)
        work.what = what
        if self.failure is not None:
            raise self.failure(work, True)
        if call.kind in P2P:
            channel = call.kind, call.root, call.tag
            work.sequence = self._messages[channel] = self._messages.get(channel, -1) + 1
            work.peer = call.root
            self._fail_if_missed([work])
        else:
            self.note(work, signature)
        self._lend(work)
        self._carry(call, source, target, work)

    def _lend(self, work: Work) -> None:
        work.lent = True
        self.flying.add(work)
        if self.failure is not None:  # since the group was looked at; from now on who breaks it finds the work
            self.flying.discard(work)
            raise self.failure(work, True)

    def _ask(self, work: Work, test: Callable[[], bool], end: Callable[[], None], nbytes: int, memory: object) -> None:
        """Have a request tested until it has ended."""
        self._drive(Request(test, end, lambda error: self._library_failed(work, error), nbytes, self, memory))
        if self.failure is not None:
            self.world.requests.give_up(self)

    def described(self, call: Call, way: str = "") -> tuple[bytes, str]:
        """Return the signature of a call that goes that way or, "", the group's own, and it in words."""
        way = way or self.way
        found = self._described.get((call, way))
        if found is None:
            # What each pair of ranks exchanges in an all-to-all with counts nobody compares; MPI finds out what is too long.
            same = call._replace(shape=(0, *call.shape[1:]), counts=()) if call.kind is Collective.ALL_TO_ALL_V else call
            signature = self.signature_of(same._replace(kind=Collective.ALL_TO_ALL) if same is not call else call, way)
            found = self._described[call, way] = signature, self.about(call)
        return found

    # -- telling

    def note(self, work: Work, signature: bytes) -> None:
        """Number a collective, and have it compared with what the other ranks called."""
        work.sequence = self.count
        self.tell(signature)
        if self._left:
            self._fail_if_missed([work])

    def tell(self, signature: bytes) -> None:
        """Have a collective compared with what the other ranks called."""
        self.count += 1
        self.called.append(signature)
        if len(self.called) == 1:
            self.world.compare_soon()

    def take_called(self) -> library_calls.Told:
        """Return what was called since the last time."""
        count = len(self.called)  # another thread may add to them meanwhile
        told = library_calls.Told(self.identity, self.size, self.rank, self._compared, self.called[:count])
        if count:
            self._last, self._told_at = self.called[count - 1], time.monotonic()
        del self.called[:count]
        self._compared += count
        return told

    def latest(self) -> str:
        """Return in words the collective that this rank called last, "" if it has called none."""
        return library_calls.explain(self.count - 1, self.called[-1] if self.called else self._last) if self.count else ""

    def in_library(self) -> InLibrary:
        """Return what the library carries."""
        works = [(work, work.since or None) for work in list(self.flying) if work.state == _fastpath.FLYING]
        return InLibrary(works, self.count, self.world.heard(self.identity))

    # -- ranks that leave

    def idle(self) -> bool:
        """Say whether the library does nothing for this group."""
        return not self.in_library().works

    def last_calls(self) -> library_calls.Left:
        """Return how often this rank has called."""
        return library_calls.Left(self.identity, self.rank, self.count, self._exchanged(Collective.SEND), self._exchanged(Collective.RECV))

    def _exchanged(self, kind: Collective) -> list[int]:
        found = [0] * self.size
        for (each, peer, _), last in list(self._messages.items()):
            found[peer] += (last + 1) * (each is kind)
        return found

    def miss(self, left: library_calls.Left) -> None:
        """Break the group if a call in flight needs a rank that has left without it; those that are still to come look themselves."""
        self._left[left.rank] = left
        self._fail_if_missed([work for work, _ in self.in_library().works])

    def _fail_if_missed(self, works: list[Work]) -> None:
        for left in list(self._left.values()):
            if self.failure is None and any(self._needs(work, left) for work in works):
                self.fail(self.closed(f"rank {left.rank} has closed the group and is still needed"))

    def _needs(self, work: Work, left: library_calls.Left) -> bool:
        if work.peer is None:
            return work.sequence >= left.calls
        mine = [self._exchanged(kind)[left.rank] for kind in P2P]
        return work.peer == left.rank and (mine[0] > left.received[self.rank] or mine[1] > left.sent[self.rank])

    # -- ends

    def _guard(self, work: Work, call: Callable[[], Any]) -> Any:
        """Make a call of the library; what it raises breaks the group."""
        try:
            return call()
        except Exception as error:
            self.raise_for(work, error)

    def raise_for(self, work: Work, error: Exception) -> NoReturn:
        """Break the group for what the library raised, and raise the group's error."""
        self._library_failed(work, error)
        raise self.failure(work) if self.failure is not None else error from None

    def _library_failed(self, work: Work, error: Exception) -> None:
        """The library raised: every rank is told, unless the group is broken already."""
        if self.failure is None:
            self.world.library_failed(self, work, error, self._differs(error))

    def _differs(self, error: Exception) -> bool:
        """Say whether the library raised because ranks called different things."""
        return False

    def _ended(self, work: Work) -> None:
        if work.state == _fastpath.FLYING:
            self.flying.discard(work)
            work.finish(work.result)

    # -- waiting

    def driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        """Return what moves this group in ``loop``: it tests the library's requests, and drives the ring's links."""
        return cast(LoopDriver, self.library_driver(loop))

    def library_driver(self, loop: asyncio.AbstractEventLoop) -> Driver:
        """Return the driver of this world's requests in ``loop``, attached now if it is new."""
        found = self.world.library_drivers.get(loop)
        if found is None:
            found = self.world.library_drivers[loop] = Driver(super().driver(loop), self.world.requests)
        return found

    def _drive(self, request: Request) -> None:
        """Have a request tested, by the running loop if there is one."""
        self.world.requests.add(request)
        loop = asyncio._get_running_loop()
        if loop is None:
            self.world.requests.watch()
        else:
            self.library_driver(loop).ask()

    def block(self, work: Work) -> bool:
        """Wait in this thread for a work that the library moves; False: the engine moves it."""
        if not cast(Work, work.pending()).lent:
            return False
        requests = self.world.requests

        def test() -> bool:
            requests.poll()
            return work.state != _fastpath.FLYING

        return patiently(test, lambda: False)

    def in_flight(self) -> int:
        """Number of works of this process that have not ended."""
        return super().in_flight() + len(self.world.requests)

    # -- failing

    def fail(self, failure: Callable[..., RTError]) -> None:
        """Break the group for good, from any thread. What the library has begun is its own: its memory stays the library's."""
        super().fail(failure)
        self.world.requests.give_up(self)
        for work in list(self.flying):
            self.flying.discard(work)
            if work.state == _fastpath.FLYING:
                work.fail(self.failure or failure)
