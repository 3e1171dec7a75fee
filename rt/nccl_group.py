"""A group whose arrays on a device travel by NCCL.

May live here: what a checked call becomes in flight there, in both front ends, and how a communicator comes and goes. May not: NCCL's words
(``transports.nccl``), how the ranks meet (``nccl_world``), what any library's group needs (``library_group``).

A call is launched on the caller's current stream before it returns, so what the caller launches there afterwards comes after it. Its work
ends with an event behind it on that stream. Arrays of the host, objects, barriers and splits go over the ring's links.

Messages to and from other ranks are launched together, when somebody waits for one of them or the loop has its next turn: NCCL lets a
message wait on the device until its receiver is there, and two ranks that send to each other before they receive would wait for ever.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rt import _fastpath, device_arrays
from rt.aio import BUDGET_BYTES, Work
from rt.device_arrays import OnDevice
from rt.dtypes import DType, Op
from rt.errors import RTError
from rt.group import Call, CoreGroup
from rt.library_group import P2P, LibraryGroup
from rt.library_waiting import Request, Worker
from rt.schedule import Collective
from transports import nccl

if TYPE_CHECKING:
    from rt.nccl_world import NcclWorld

_ID_BYTES = 128
_END_SECONDS = 5.0  # for which a communicator may take its leave


class NcclGroup(LibraryGroup):
    """Some ranks of an NCCL world.

    Attributes:
        making: holds the communicator, once it is there.
        device: whose arrays it takes, of this process.
    """

    world: NcclWorld
    way = "nccl"
    takes_devices = True
    making: concurrent.futures.Future[Any]

    def __init__(self, world: NcclWorld, ranks: Any, rank: int, name: str, identity: int, timeout: float | None) -> None:
        super().__init__(world, ranks, rank, name, identity, timeout)
        self.cupy, self._nccl = nccl.load()
        self.device = world.device
        self.making = concurrent.futures.Future()
        self.wording = nccl.Wording(self.cupy, self._nccl, rank, self.size)
        self._calling = threading.RLock()  # NCCL allows one thread at a time in a communicator, but for looking at errors and aborting
        self._worker, self._breaker = Worker(f"{name} nccl"), Worker(f"{name} nccl abort")
        self._messages_next: _Batch | None = None
        self._together: _Batch | None = None
        self.captured: list[Any] = []  # what graphs use, whenever they are launched
        self.on_device_now: dict[_Batch, None] = {}  # launched and not seen to have ended
        self._ending = False
        self._face = _Blocking(self, None)
        self.known = _Forgetful(Work, self, self.engine, identity, self.ranks, self._recent)
        if self.size > 1:
            self._worker.put(self._connect)
        else:
            self.making.set_result(None)

    # -- connecting

    def _connect(self) -> None:
        """In the group's thread: tell the others where NCCL meets, over the ring's links, and meet."""
        try:
            place = np.zeros(_ID_BYTES, np.uint8)
            if self.rank == 0:
                place[:] = np.frombuffer(self._nccl.get_unique_id(), np.uint8)
            call = Call(Collective.BROADCAST, DType.UINT8, Op.SUM, place.shape, place.size, root=0, alias=(0, 0), part="nccl")
            work = Work(self)
            CoreGroup.submit(self, "nccl", call, place, place, work)
            assert self.engine is not None
            _fastpath.wait(self.engine, work, _fastpath.Sleeper(), -1.0, 0.0, None)
            work.outcome()
            with self.cupy.cuda.Device(self.device):
                comm = self._nccl.NcclCommunicator(self.size, place.tobytes(), self.rank)
        except Exception as error:
            if not isinstance(error, RTError):  # those come with the group's failure
                text = f"NCCL on rank {self.world.rank} could not connect device {self.device}: {error}; {self.world.advice()}"
                self.world.not_connected(self, text)
            return
        try:
            self.making.set_result(comm)
        except concurrent.futures.InvalidStateError:  # the group has failed meanwhile
            comm.abort()

    # -- memory

    def on_device(self, x: Any, what: str) -> OnDevice | None:
        """Return what stands for an array of CuPy. Raises ValueError if it is on another device than this group's."""
        found = device_arrays.on_device(x)
        if found is not None and x.device.id != self.device:
            raise ValueError(
                f"{what}: the array is on device {x.device.id}, expected {self.device}, the one of this rank; "
                f"make arrays under `with cupy.cuda.Device({self.device})`, or allow each rank its own by CUDA_VISIBLE_DEVICES"
            )
        return found

    def memory(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """Return memory for a result: on the device if it is to be like an array there."""
        if not isinstance(like, OnDevice):
            return super().memory(shape, dtype, like)
        with self.cupy.cuda.Device(self.device):
            return device_arrays.fresh(shape, dtype)

    def on_stream(self, stream: Any, what: str) -> contextlib.AbstractContextManager[Any]:
        """Return the stream, which is a context in which it is the current one; ``what`` names the call, in messages."""
        if not hasattr(stream, "ptr") or not hasattr(stream, "__enter__"):
            raise TypeError(f"{what}: stream must be a stream of CuPy (cupy.cuda.Stream), not {type(stream).__name__}")
        return stream  # type: ignore[no-any-return]

    # -- submitting

    def travels(self, call: Call, source: Any, target: Any) -> bool:
        """Say whether NCCL carries a call: where its arrays lie decides."""
        return isinstance(source, OnDevice) or isinstance(target, OnDevice)

    def submit(self, what: str, call: Call, source: Any, target: Any, work: Work, budget: int = BUDGET_BYTES) -> None:
        """Start ``work``; arguments are checked by now. Raises the group's error if it is broken or closed.

        Raises:
            TypeError: NCCL cannot do that, or one of input and output is on the device and the other is not.
            ValueError: a tag.
        """
        if self.travels(call, source, target):
            sides = [side for side in (source, target) if side is not None]
            if not all(isinstance(side, OnDevice) for side in sides):
                raise TypeError(f"{what}: x and out must both be arrays of CuPy, or both lie in host memory")
            nccl.check(what, call)
            work.hand_out = work.hand_out or (device_arrays.owner if isinstance(work.result, OnDevice) else None)
        elif call.kind not in P2P and not call.part and self.failure is None:
            self.tell(self.described(call, "links")[0])  # so that a rank which passes an array of CuPy is found out
        super().submit(what, call, source, target, work, budget)

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        with self._calling:
            stream = self.cupy.cuda.get_current_stream(self.device)
            if self._together is not None:
                self._together.add(call, source, target, work)
            elif call.kind in P2P:
                self._message(call, source, target, work, stream)
            else:
                self._launch_messages()
                batch = _Batch(self, stream)
                batch.add(call, source, target, work)
                self._begin(batch)

    def _begin(self, batch: _Batch) -> None:
        """Launch a batch that nobody watches yet."""
        self._guard(batch.works[0], batch.launch)
        if batch.launched:
            self._watch(batch)

    def _watch(self, batch: _Batch) -> None:
        self._drive(Request(batch.test, batch.end, batch.fail, 0, self, batch))
        if self.failure is not None:  # since the group was looked at
            self.world.requests.give_up(self)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Launch all collectives that are called within in one group of NCCL's, on the current stream."""
        with self._calling:
            self._launch_messages()
            batch = self._together = _Batch(self, self.cupy.cuda.get_current_stream(self.device))
            try:
                yield
            finally:
                self._together = None
                if batch.works:  # also where a later one was refused: these were called
                    self._begin(batch)

    def _message(self, call: Call, source: Any, target: Any, work: Work, stream: Any) -> None:
        """Have a message launched with others, soon."""
        batch = self._messages_next
        if batch is None or batch.stream is not stream:
            self._launch_messages()
            batch = self._messages_next = _Batch(self, stream)
        batch.add(call, source, target, work)
        batch.half = work.what == "sendrecv" and call.kind is Collective.SEND
        if stream.is_capturing():
            if not batch.half:
                self._launch_messages()
        elif len(batch.works) == 1:
            self._watch(batch)

    def _launch_messages(self) -> None:
        """Launch the messages that are still to go, so that what comes next comes after them."""
        batch, self._messages_next = self._messages_next, None
        if batch is not None:
            self._guard(batch.works[0], batch.launch)

    def launch_now(self, batch: _Batch) -> None:
        """Launch messages that somebody waits for."""
        with self._calling:
            if self._messages_next is batch:
                self._messages_next = None
                batch.launch()

    # -- waiting

    ended = LibraryGroup._ended
    failed = LibraryGroup._library_failed

    def blocking(self, limit: float | None) -> CoreGroup:
        """Return this group as calls see it that block, for at most ``limit`` seconds."""
        return self._face if limit is None else _Blocking(self, limit)

    # -- the end

    def fail(self, failure: Callable[..., RTError]) -> None:
        """Break the group for good, from any thread. The communicator is aborted, in a thread; what it uses lives until then."""
        on_device = list(self.on_device_now)
        super().fail(failure)
        self._messages_next = None
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.making.set_exception((self.failure or failure)(Work(self)))
        if not self._ending and self.making.exception() is None and self.making.result() is not None:
            self._ending = True
            self._breaker.put(lambda: self._abort(on_device))

    def _abort(self, on_device: list[_Batch]) -> None:
        with contextlib.suppress(Exception):  # the group has its error
            self.making.result().abort()
        for batch in on_device:
            batch.let_go()

    def end(self) -> None:
        """Give the communicator back in order, when nothing is in flight; aborts it if that takes long."""
        if self._ending or not self.making.done() or self.making.exception() is not None or self.making.result() is None:
            return
        self._ending = True
        ended = threading.Event()

        def destroy() -> None:
            with contextlib.suppress(Exception):
                self.making.result().destroy()
            ended.set()

        self._worker.put(destroy)
        if not ended.wait(_END_SECONDS):
            self._breaker.put(lambda: self._abort([]))


class _Batch:
    """Calls that are launched together on a stream, and end together.

    Attributes:
        half: it holds one half of an exchange, and is not launched before it holds the other.
    """

    def __init__(self, group: NcclGroup, stream: Any) -> None:
        self.stream = stream
        self.works: list[Work] = []
        self.half = False
        self._group = group
        self._calls: list[tuple[Call, Any, Any]] = []
        self._exchanges: list[nccl.Exchange] = []
        self._event: Any = None
        self._thread = threading.get_ident()

    def add(self, call: Call, source: Any, target: Any, work: Work) -> None:
        """Take a call."""
        self._calls.append((call, source, target))
        self.works.append(work)

    def launch(self) -> None:
        """Launch all, and an event behind them."""
        group = self._group
        cuda, comm = group.cupy.cuda, group.making.result()
        with cuda.Device(group.device), self.stream:
            self._exchanges = [group.wording.say(*call) for call in self._calls]
            group.on_device_now[self] = None
            group.wording.launch(comm, self._exchanges, self.stream)
            if self.stream.is_capturing():  # nothing has run yet: it does whenever the graph is launched, with this memory
                group.captured.append((self._calls, self._exchanges))
                self.end()
                return
            event = cuda.Event(disable_timing=True)
            event.record(self.stream)
            self._event = event

    @property
    def launched(self) -> bool:
        """Whether its end is still to be seen."""
        return self._event is not None

    def test(self) -> bool:
        """Say whether all has ended; launches what is still to be. Raises what NCCL has to say."""
        if self._event is None:
            # Only who calls knows when a batch is complete: another thread may look between two calls.
            if self._thread == threading.get_ident() and not self.half:
                self._group.launch_now(self)
            return False
        if self._event.done:
            return True
        try:
            self._group.making.result().check_async_error()
        except Exception:
            if not self._event.done:  # a peer that has what it needs may leave before we look
                raise
            return True
        return False

    def end(self) -> None:
        """End the works."""
        for work in self.works:
            self._group.ended(work)
        self.let_go()

    def fail(self, error: Exception) -> None:
        """Break the group for what ``test`` raised."""
        self._group.failed(self.works[0], error)

    def let_go(self) -> None:
        """Give memory back."""
        self._group.on_device_now.pop(self, None)
        self._calls, self._exchanges = [], []


class _Blocking(NcclGroup):
    """An NCCL group as calls see it that block: it shares all of the group's state."""

    __slots__ = ("_limit",)

    def __init__(self, group: NcclGroup, limit: float | None) -> None:
        self.__dict__ = group.__dict__
        self._limit = limit

    def _carry(self, call: Call, source: Any, target: Any, work: Work) -> None:
        super()._carry(call, source, target, work)
        if self._limit is not None:
            self.world.limit(work, self._limit)

    def _drive(self, request: Request) -> None:
        self.world.requests.add(request)  # who blocks looks itself


class _Forgetful(_fastpath.Calls):
    """Remembers no call: what goes over the links is told to rank 0 like all others."""

    def remember(self, call: int, x: Any, out: Any, ready: Any) -> None:
        """Do nothing."""

    def remember_message(self, kind: int, peer: Any, tag: Any, x: Any, call: Any) -> None:
        """Do nothing."""
