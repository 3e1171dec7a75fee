"""A group whose arrays travel by MPI.

May live here: what a checked call becomes in flight there, in both front ends. May not: MPI's words (``transports.mpi``), how it is waited
for (``mpi_waiting``), how the ranks meet (``mpi_world``).

All that is not a collective or message of arrays is as in any group: control, failures, objects, splits. So the group has the ring's
links, too. A call that blocks is MPI's blocking function, which is faster than a request and a wait, and which MPI does not match with
requests: all ranks must make a call in the same front end. Small and large calls have a communicator each: only within one does their
order count.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from rt import _fastpath, mpi_calls
from rt.aio import BUDGET_BYTES, LoopDriver, Work
from rt.dtypes import HALF, ITEMSIZE, Op
from rt.errors import GroupBrokenError, PeerLostError, RTError
from rt.group import KNOWN_OPS, Call, CoreGroup, InLibrary, Ready
from rt.mpi_waiting import LOOP_BYTES, Driver, Request, Worker, patiently
from rt.schedule import Collective
from transports.mpi import ITEMS_MOST, Wording, message_pieces, travels

if TYPE_CHECKING:
    from rt.mpi_world import MpiWorld

_AT_ONCE_BYTES = 65536  # a send of less is over when it was called, as on the ring
LAST_WORDS_SECONDS = 0.5  # between the message of a process that must end and its end: others have theirs to say
_LOOK_SECONDS = 0.1
_P2P = (Collective.SEND, Collective.RECV)
_OF_A_BLOCK = (Collective.ALL_GATHER, Collective.GATHER)  # their shape is one rank's

Array = np.ndarray[Any, Any]
Comms = concurrent.futures.Future[tuple[Any, Any]]


class MpiGroup(CoreGroup):
    """Some ranks of an MPI world.

    Args:
        comms: will hold the communicators for small and for large calls.
    """

    world: MpiWorld
    _front = "await"

    def __init__(
        self, world: MpiWorld, ranks: Any, rank: int, name: str, identity: int, timeout: float | None, comms: Comms
    ) -> None:
        super().__init__(world, ranks, rank, name, identity, timeout)
        self._made = comms
        self._wording = Wording(world.words, rank, self.size)
        self._worker = Worker(name)
        self._described: dict[tuple[Call, str], tuple[bytes, str]] = {}  # by call and front end
        self._messages: dict[tuple[Collective, int, int], int] = {}  # how many of a kind, by peer and tag
        self.count = 0  # of collectives
        self.called: list[bytes] = []  # signatures of those that were not told to rank 0 yet
        self._compared = 0  # of those that were
        self._last, self._told_at = b"", 0.0  # the last of these, and when
        self.flying: set[Work] = set()  # by MPI
        self.blocked: dict[int, Work] = {}  # by thread, what it waits for inside MPI
        self.known = _fastpath.LibraryCalls(
            Work, self, None, identity, self.ranks, self._recent, KNOWN_OPS, self._begin, self.note, self.blocked, self.raise_for
        )
        self._face = _Blocking(self, None)

    # -- submitting

    def submit(self, what: str, call: Call, source: Any, target: Any, work: Work, budget: int = BUDGET_BYTES) -> None:
        """Start ``work``; arguments are checked by now. Raises the group's error if it is broken or closed."""
        if not travels(call):
            super().submit(what, call, source, target, work, budget)
            return
        signature, work.about = self.described(call, self._front)
        work.what = what
        if self.failure is not None:
            raise self.failure(work, True)
        if call.kind in _P2P:
            channel = call.kind, call.root, call.tag
            work.sequence = self._messages[channel] = self._messages.get(channel, -1) + 1
            work.peer = call.root
        else:
            self.note(work, signature)
        self._lend(work)
        self._carry(call, source, target, work)

    def _begin(self, work: Work, function: Callable[..., Any] | None, arguments: tuple[Any, ...], signature: bytes) -> None:
        """Begin an all-reduce that was made before, of arrays that MPI takes as they are."""
        self.note(work, signature)
        self._lend(work)
        if function is None:
            self._worker.put(lambda: self._carry_large(lambda: self._comms()[1].Allreduce(*arguments), work))
            return
        self._ask(work, self._guard(work, lambda: function(*arguments)).Test, lambda: self._ended(work), arguments[1].nbytes, arguments)

    def _ask(self, work: Work, test: Callable[[], bool], end: Callable[[], None], nbytes: int, memory: object) -> None:
        """Have a request tested until it has ended."""
        self._drive(Request(test, end, lambda error: self._mpi_failed(work, error), nbytes, self, memory))
        if self.failure is not None:
            self.world.requests.give_up(self)

    def _lend(self, work: Work) -> None:
        work.lent = True
        self.flying.add(work)
        if self.failure is not None:  # since the group was looked at; from now on who breaks it finds the work
            self.flying.discard(work)
            raise self.failure(work, True)

    def note(self, work: Work, signature: bytes) -> None:
        """Number a collective, and have it compared with what the other ranks called."""
        work.sequence = self.count
        self.count += 1
        self.called.append(signature)
        if len(self.called) == 1:
            self.world.compare_soon()

    def ready(self, call: Call) -> Ready:
        """Return what carries out a call that goes over the links, or one that ``known`` may remember."""
        if not travels(call):
            return super().ready(call)
        made, words, large = None, self._wording.words, self._is_large(call)
        awaited, blocks = self.described(call, "await"), self.described(call, "block")
        plain = call.kind is Collective.ALL_REDUCE and call.dtype not in HALF and call.op is not Op.MEAN
        if plain and self._bytes(call) <= ITEMS_MOST:  # nothing is to do before and after it
            comm, operator = self._comms()[large], words.op(call.dtype, call.op)
            made = comm.Allreduce, None if large else comm.Iallreduce, operator, words.mpi.IN_PLACE, awaited[0]
        return Ready(cast(_fastpath.Program, made), blocks[0], self.identity, blocks[1])

    def take_called(self) -> mpi_calls.Told:
        """Return what was called since the last time."""
        count = len(self.called)  # another thread may add to them meanwhile
        told = mpi_calls.Told(self.identity, self.size, self.rank, self._compared, self.called[:count])
        if count:
            self._last, self._told_at = self.called[count - 1], time.monotonic()
        del self.called[:count]
        self._compared += count
        return told

    def latest(self) -> str:
        """Return in words the collective that this rank called last, "" if it has called none."""
        return mpi_calls.explain(self.count - 1, self.called[-1] if self.called else self._last) if self.count else ""

    def in_library(self) -> InLibrary:
        """Return what MPI carries. When a thread began to block in it is known to 50 ms: its rank told of the call then."""
        works: dict[Work, float | None] = {work: work.since or None for work in list(self.flying)}
        works |= dict.fromkeys(list(self.blocked.values()), time.monotonic() if self.called else self._told_at)
        flying = [(work, since) for work, since in works.items() if work.state == _fastpath.FLYING]
        return InLibrary(flying, self.count, self.world.heard(self.identity))

    def described(self, call: Call, front: str) -> tuple[bytes, str]:
        """Return the signature of a call that is awaited or blocks, and it in words."""
        found = self._described.get((call, front))
        if found is None:
            # What each pair of ranks exchanges in an all-to-all with counts nobody compares; MPI finds out what is too long.
            same = call._replace(shape=(0, *call.shape[1:]), counts=()) if call.kind is Collective.ALL_TO_ALL_V else call
            signature = self.signature_of(same._replace(kind=Collective.ALL_TO_ALL) if same is not call else call, f"mpi {front}")
            found = self._described[call, front] = signature, self.about(call)
        return found

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        """Begin a call that is awaited."""
        small, large = self._comms()
        if call.kind in _P2P:
            self._message(small, call, source, target, work)
        elif self._is_large(call):
            self._worker.put(lambda: self._carry_large(lambda: self._wording.say(call, source, target).run(large), work))
        else:
            exchange = self._wording.say(call, source, target)
            request = self._guard(work, lambda: exchange.begin(small))

            def end() -> None:
                if exchange.after is not None:
                    exchange.after()
                self._ended(work)

            self._ask(work, request.Test, end, self._bytes(call), exchange)

    def _comms(self) -> tuple[Any, Any]:
        """Return the communicators for small and large calls; of a fresh part of the world they may take a moment."""
        while True:
            try:
                return self._made.result(0 if self._made.done() else _LOOK_SECONDS)
            except TimeoutError:
                if self.failure is not None:
                    raise self.failure(Work(self), True) from None

    def _is_large(self, call: Call) -> bool:
        """Say whether a call is made by the thread: alike on all ranks, so what a rank alone knows must not decide."""
        return call.kind is Collective.ALL_TO_ALL_V or self._bytes(call) > LOOP_BYTES

    def _bytes(self, call: Call) -> int:
        nbytes = ITEMSIZE[call.dtype] * (self.size if call.kind in _OF_A_BLOCK else 1)
        for side in call.shape:
            nbytes *= side
        return nbytes

    def _drive(self, request: Request) -> None:
        self.world.requests.add(request)
        loop = asyncio._get_running_loop()
        if loop is None:
            self.world.requests.watch()
        else:
            self.mpi_driver(loop).ask()

    def _carry_large(self, make: Callable[[], Any], work: Work) -> None:
        """In the group's thread: wait for the other ranks, which costs nothing, and then make the call, which costs a core."""
        try:
            together = self._comms()[1].Ibarrier()
            if patiently(together.Test, lambda: work.state != _fastpath.FLYING):
                self._inside(work, make)
                self._ended(work)
        except Exception as error:
            self._mpi_failed(work, error)

    def _message(self, comm: Any, call: Call, source: Any, target: Any, work: Work) -> None:
        """Begin to send or receive; a small send is over at once, from a copy."""
        of = self._wording.words.type(call.dtype)
        sends = call.kind is Collective.SEND
        array = source if sends else target
        at_once = sends and array.nbytes < _AT_ONCE_BYTES
        function = comm.Isend if sends else comm.Irecv
        buffers = message_pieces(array.copy() if at_once else array, of)
        requests = [self._guard(work, lambda buffer=buffer: function(buffer, call.root, call.tag)) for buffer in buffers]  # type: ignore[misc]
        statuses = [self._wording.words.mpi.Status() for _ in requests]

        def end() -> None:
            if not sends:
                self._check_received(work, statuses, buffers)
            self._ended(work)

        def test() -> bool:
            return bool(self._wording.words.mpi.Request.Testall(requests, statuses))

        if at_once:
            self._ended(work)
            if test():
                return
        self._ask(work, test, end, array.nbytes, buffers)

    def _check_received(self, work: Work, statuses: list[Any], buffers: list[list[Any]]) -> None:
        for status, (_, count, of) in zip(statuses, buffers, strict=True):
            found = status.Get_count(of)
            if found != count:
                raise Disagreement(f"received {found} items where {count} were expected")

    # -- ends

    def _guard(self, work: Work, call: Callable[[], Any]) -> Any:
        """Make a call of MPI; what it raises breaks the group."""
        try:
            return call()
        except Exception as error:
            self.raise_for(work, error)

    def raise_for(self, work: Work, error: Exception) -> NoReturn:
        """Break the group for what MPI raised, and raise the group's error."""
        self._mpi_failed(work, error)
        raise self.failure(work) if self.failure is not None else error from None

    def _inside(self, work: Work, call: Callable[[], Any]) -> None:
        """Make a blocking call of MPI, out of which nobody can get this thread."""
        thread = threading.get_ident()
        self.blocked[thread] = work
        try:
            if self.failure is not None:  # since the group was looked at; from now on who breaks it ends this process
                raise self.failure(work, True)
            call()
        finally:
            del self.blocked[thread]

    def _ended(self, work: Work) -> None:
        if work.state == _fastpath.FLYING:
            self.flying.discard(work)
            work.finish(work.result)

    def _mpi_failed(self, work: Work, error: Exception) -> None:
        """MPI raised: every rank is told, unless the group is broken already."""
        if self.failure is None:
            self.world.mpi_failed(self, work, error)

    # -- waiting

    def driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        """Return what moves this group in ``loop``: it tests MPI's requests, and drives the ring's links."""
        return cast(LoopDriver, self.mpi_driver(loop))

    def mpi_driver(self, loop: asyncio.AbstractEventLoop) -> Driver:
        """Return the driver of this world's requests in ``loop``, attached now if it is new."""
        found = self.world.mpi_drivers.get(loop)
        if found is None:
            found = self.world.mpi_drivers[loop] = Driver(super().driver(loop), self.world.requests)
        return found

    def blocking(self, limit: float | None) -> CoreGroup:
        """Return this group as calls see it that block, for at most ``limit`` seconds."""
        return self._face if limit is None else _Blocking(self, limit)

    def block(self, work: Work) -> bool:
        """Wait in this thread for a work that MPI moves; False: the engine moves it."""
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
        """Break the group for good, from any thread. What MPI has begun cannot be taken back: its memory stays MPI's."""
        super().fail(failure)
        self.world.requests.give_up(self)
        for work in list(self.flying):
            self.flying.discard(work)
            if work.state == _fastpath.FLYING:
                work.fail(self.failure or failure)
        stuck = [(self.failure or failure)(work) for work in self.blocked.values() if work.state != _fastpath.DONE]
        if isinstance(error := (self.failure or failure)(Work(self)), GroupBrokenError):
            self._say(stuck or [error] if isinstance(error, PeerLostError) else stuck)
            if stuck:
                self._end_process()

    @staticmethod
    def _say(errors: list[RTError]) -> None:
        """Say at once what MPI's launcher, which ends the job when a rank is lost, leaves nobody the time to raise."""
        for error in errors:
            print(f"[rt] {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _end_process(self) -> None:
        """Threads are inside a call of MPI that will not return, and nobody can get them out."""
        print(f"[rt] rank {self.rank}/{self.size}: a blocking call of MPI cannot be undone: this process ends", file=sys.stderr, flush=True)
        timer = threading.Timer(LAST_WORDS_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()


class _Blocking(MpiGroup):
    """An MPI group as calls see it that block: it shares all of the group's state, and makes MPI's blocking calls."""

    __slots__ = ("_limit", "known")
    _front = "block"

    def __init__(self, group: MpiGroup, limit: float | None) -> None:
        self.__dict__ = group.__dict__
        self._limit = limit
        self.known = cast(_fastpath.Calls, _OnlyRemembers(group.known))

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        small, large = self._comms()
        if self._limit is not None:
            self.world.limit(work, self._limit)
        if call.kind in _P2P:
            self._message(small, call, source, target, work)
            return
        comm = large if self._is_large(call) else small

        def carry() -> None:
            self._inside(work, lambda: self._wording.say(call, source, target).run(comm))

        if comm is large and self._worker.busy:  # its calls came first
            ended = threading.Event()
            self._worker.put(lambda: self._in_turn(work, carry))
            self._worker.put(ended.set)
            ended.wait()
        else:
            self._guard(work, carry)
            self._ended(work)

    def _in_turn(self, work: Work, carry: Callable[[], None]) -> None:
        try:
            if work.state == _fastpath.FLYING:
                carry()
                self._ended(work)
        except Exception as error:
            self._mpi_failed(work, error)

    def _message(self, comm: Any, call: Call, source: Any, target: Any, work: Work) -> None:
        sends = call.kind is Collective.SEND
        # Half of an exchange must not block: the other half comes after it.
        if sends and (source.nbytes < _AT_ONCE_BYTES or work.what == "sendrecv"):
            super()._message(comm, call, source, target, work)
            return
        buffers = message_pieces(source if sends else target, self._wording.words.type(call.dtype))
        statuses = [] if sends else [self._wording.words.mpi.Status() for _ in buffers]

        def carry() -> None:
            for buffer in buffers if sends else ():
                comm.Send(buffer, call.root, call.tag)
            for buffer, status in zip(buffers, statuses, strict=False):
                comm.Recv(buffer, call.root, call.tag, status)
            if not sends:
                self._check_received(work, statuses, buffers)

        self._guard(work, lambda: self._inside(work, carry))
        self._ended(work)

    def _drive(self, request: Request) -> None:
        self.world.requests.add(request)
        self.world.requests.watch()


class _OnlyRemembers:
    """A group's table of known calls, for calls that did not find themselves there, or must not look: those that block with a limit."""

    def __init__(self, table: _fastpath.Calls) -> None:
        self.remember = table.remember

    def start(self, *_: Any) -> None:
        """Find nothing."""

    reduce = start


class Disagreement(Exception):
    """A message was not what its receiver expected."""
