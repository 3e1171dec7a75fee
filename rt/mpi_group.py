"""A group whose arrays travel by MPI.

May live here: what a checked call becomes in flight there, in both front ends. May not: MPI's words (``transports.mpi``), how it is waited
for (``library_waiting``), how the ranks meet (``mpi_world``).

All that is not a collective or message of arrays is as in any group: control, failures, objects, splits. So the group has the ring's
links, too. A call that blocks is MPI's blocking function, which is faster than a request and a wait, and which MPI does not match with
requests: all ranks must make a call in the same front end. Small and large calls have a communicator each: only within one does their
order count.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rt import _fastpath
from rt.aio import Work
from rt.dtypes import HALF, ITEMSIZE, Op
from rt.errors import GroupBrokenError, GroupClosedError, PeerLostError, RTError
from rt.group import Call, CoreGroup, InLibrary, Ready
from rt.library_group import P2P, LibraryGroup
from rt.library_waiting import LOOP_BYTES, Request, Worker, patiently
from rt.schedule import Collective
from transports.mpi import ITEMS_MOST, Wording, message_pieces, travels

if TYPE_CHECKING:
    from rt.mpi_world import MpiWorld

_AT_ONCE_BYTES = 65536  # a send of less is over when it was called, as on the ring
LAST_WORDS_SECONDS = 0.5  # between the message of a process that must end and its end: others have theirs to say
_LOOK_SECONDS = 0.1
_OF_A_BLOCK = (Collective.ALL_GATHER, Collective.GATHER)  # their shape is one rank's

Array = np.ndarray[Any, Any]
Comms = concurrent.futures.Future[tuple[Any, Any]]


class MpiGroup(LibraryGroup):
    """Some ranks of an MPI world.

    Args:
        comms: will hold the communicators for small and for large calls.
    """

    world: MpiWorld
    way = "mpi await"

    def __init__(
        self, world: MpiWorld, ranks: Any, rank: int, name: str, identity: int, timeout: float | None, comms: Comms
    ) -> None:
        super().__init__(world, ranks, rank, name, identity, timeout)
        self._made = comms
        self._wording = Wording(world.words, rank, self.size)
        self._worker = Worker(name)
        self.blocked: dict[int, Work] = {}  # by thread, what it waits for inside MPI
        self.known = _fastpath.LibraryCalls(
            Work, self, None, identity, self.ranks, self._recent, self._begin, self.note, self.blocked, self.raise_for
        )
        self._face = _Blocking(self, None)

    # -- submitting

    def travels(self, call: Call, source: Any, target: Any) -> bool:
        """Say whether MPI carries a call."""
        return travels(call)

    def ready(self, call: Call) -> Ready:
        """Return what carries out a call that goes over the links, or one that ``known`` may remember."""
        if not travels(call):
            return super().ready(call)
        made, words, large = None, self._wording.words, self._is_large(call)
        awaited, blocks = self.described(call, MpiGroup.way), self.described(call, _Blocking.way)
        plain = call.kind is Collective.ALL_REDUCE and call.dtype not in HALF and call.op is not Op.MEAN
        if plain and self._bytes(call) <= ITEMS_MOST:  # nothing is to do before and after it
            comm, operator = self._comms()[large], words.op(call.dtype, call.op)
            made = comm.Allreduce, None if large else comm.Iallreduce, operator, words.mpi.IN_PLACE, awaited[0]
        return Ready(cast(_fastpath.Program, made), blocks[0], self.identity, blocks[1])

    def in_library(self) -> InLibrary:
        """Return what MPI carries. When a thread began to block in it is known to 50 ms: its rank told of the call then."""
        found = super().in_library()
        since = dict.fromkeys(list(self.blocked.values()), time.monotonic() if self.called else self._told_at)
        works = dict(found.works) | {work: began for work, began in since.items() if work.state == _fastpath.FLYING}
        return found._replace(works=list(works.items()))

    def idle(self) -> bool:
        """Say whether no thread is inside MPI for this group, making its communicators or a call, and nothing is in flight."""
        return (self.size == 1 or self._made.done()) and not self._worker.busy and super().idle()

    def _begin(self, work: Work, function: Callable[..., Any] | None, arguments: tuple[Any, ...], signature: bytes) -> None:
        """Begin an all-reduce that was made before, of arrays that MPI takes as they are."""
        self.note(work, signature)
        self._lend(work)
        if function is None:
            self._worker.put(lambda: self._carry_large(lambda: self._comms()[1].Allreduce(*arguments), work))
            return
        self._ask(work, self._guard(work, lambda: function(*arguments)).Test, lambda: self._ended(work), arguments[1].nbytes, arguments)

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        """Begin a call that is awaited."""
        small, large = self._comms()
        if call.kind in P2P:
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
            except Exception as error:  # of MPI's: it could not make them
                self.raise_for(Work(self), error)

    def _is_large(self, call: Call) -> bool:
        """Say whether a call is made by the thread: alike on all ranks, so what a rank alone knows must not decide."""
        return call.kind is Collective.ALL_TO_ALL_V or self._bytes(call) > LOOP_BYTES

    def _bytes(self, call: Call) -> int:
        nbytes = ITEMSIZE[call.dtype] * (self.size if call.kind in _OF_A_BLOCK else 1)
        for side in call.shape:
            nbytes *= side
        return nbytes

    def _carry_large(self, make: Callable[[], Any], work: Work) -> None:
        """In the group's thread: wait for the other ranks, which costs nothing, and then make the call, which costs a core."""
        try:
            together = self._comms()[1].Ibarrier()
            if patiently(together.Test, lambda: work.state != _fastpath.FLYING):
                self._inside(work, make)
                self._ended(work)
        except Exception as error:
            self._library_failed(work, error)

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

    def _differs(self, error: Exception) -> bool:
        return isinstance(error, Disagreement) or getattr(error, "Get_error_class", int)() == self._wording.words.mpi.ERR_TRUNCATE

    # -- waiting

    def blocking(self, limit: float | None) -> CoreGroup:
        """Return this group as calls see it that block, for at most ``limit`` seconds."""
        return self._face if limit is None else _Blocking(self, limit)

    # -- failing

    def fail(self, failure: Callable[..., RTError]) -> None:
        """Break the group for good, from any thread. What MPI has begun cannot be taken back: its memory stays MPI's."""
        super().fail(failure)
        stuck = [(self.failure or failure)(work) for work in self.blocked.values() if work.state != _fastpath.DONE]
        if isinstance(error := (self.failure or failure)(Work(self)), GroupBrokenError | GroupClosedError):
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
    way = "mpi block"

    def __init__(self, group: MpiGroup, limit: float | None) -> None:
        self.__dict__ = group.__dict__
        self._limit = limit
        self.known = cast(_fastpath.Calls, _OnlyRemembers(group.known))

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        small, large = self._comms()
        if self._limit is not None:
            self.world.limit(work, self._limit)
        if call.kind in P2P:
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
            self._library_failed(work, error)

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
        self.remember, self.remember_message, self.break_off = table.remember, table.remember_message, table.break_off

    def start(self, *_: Any) -> None:
        """Find nothing."""

    send = recv = recv_like = sendrecv = start


class Disagreement(Exception):
    """A message was not what its receiver expected."""
