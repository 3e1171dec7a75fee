"""Python objects of any size between ranks: pickled, but with large buffers sent from where they lie and received where they stay.

May live here: how an object is cut into works, and the order in which the works of several calls go out. May not: waiting (a call here is
a ``Work`` like any other, for ``aio`` and ``sync`` to wait for), signatures of the public calls (``api``).

An object's size is unknown to who receives it, so a call may be several works:

* The **header**, of fixed size, goes into the channel of ordinary calls when the call is made: so call order is wire order, and a rank that
  calls something else is found out. It tells the sizes, and holds the whole pickle if that fits: most objects need nothing more.
* The **body** follows when the header has come: the pickle, and every buffer of 64 KiB or more that the object's reducers give out of band
  (NumPy arrays do; PEP 574), each as a work of its own from its own memory into memory of its own.

Bodies go through channels of their own, one per stream of calls, so no later call can be taken for one. All ranks make the same calls in
the same order, but headers may *end* in another: a body is submitted once the bodies of all earlier calls were. What ends a header starts
the body, in whatever thread that is. Nobody has to await for it, and cancelling an await changes nothing.
"""

from __future__ import annotations

import os
import pickle
import struct
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from rt import _fastpath
from rt.aio import Work, copied
from rt.collectives import _peer, _rank, _tag
from rt.dtypes import DType, Op
from rt.errors import ConfigError, RTError
from rt.group import Call, CoreGroup
from rt.schedule import Collective
from rt.secret import switch

HEADER_BYTES = 4096  # one small frame; what does not fit costs a second round
OUT_OF_BAND_BYTES = 65536  # a smaller buffer is copied into the pickle: that costs less than a work of its own

_COUNTS = struct.Struct("<QQ")  # bytes of the pickle, number of buffers out of band; then their sizes, then the pickle, as far as they fit
_SIZE_BYTES = 8
_BYTE = np.dtype(np.uint8)

Array = np.ndarray[Any, Any]
# Yields works that must end before it goes on; returns the last ones and what makes the result. Later calls wait until it returns.
Stages = Generator[list[Work], None, tuple[list[Work], Callable[[], Any]]]


class Message:
    """An object as it travels.

    Attributes:
        header: HEADER_BYTES, of uint8 like everything here.
        first: pieces without which the sizes of the others are not known: the table of sizes, if it does not fit into the header.
        stream: the pickle.
        buffers: memory out of band: of the sender's object, or of the object to be made.
    """

    def __init__(self, header: Array, sizes: bytes | None, stream: bytes | None, buffers: list[Array]) -> None:
        self.header = header
        stream_bytes, count = _COUNTS.unpack_from(header.data)
        self._end = _COUNTS.size  # of the used part of the header
        self.first: list[Array] = []
        self._more: list[Array] = []
        self._sizes = self._place(count * _SIZE_BYTES, sizes, self.first)
        self.stream = self._place(stream_bytes, stream, self._more)
        self.buffers = buffers

    def _place(self, nbytes: int, given: bytes | None, pieces: list[Array]) -> Array:
        """Return where a part lies: in the header if it fits, else in memory that becomes one of ``pieces``: what is given, or new."""
        begin, end = self._end, self._end + nbytes
        if end <= HEADER_BYTES:
            self._end = end
            return self.header[begin:end]
        pieces.append(_fastpath.empty((nbytes,), _BYTE) if given is None else np.frombuffer(given, np.uint8))
        return pieces[-1]

    @classmethod
    def of(cls, obj: Any) -> Message:
        """Pickle an object. Raises what its reducers raise."""
        views: list[memoryview] = []

        def inside(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes < OUT_OF_BAND_BYTES:
                return True
            views.append(view)
            return False

        stream = pickle.dumps(obj, protocol=5, buffer_callback=inside)
        head = _COUNTS.pack(len(stream), len(views))
        sizes = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
        for part in (sizes, stream):
            if len(head) + len(part) <= HEADER_BYTES:
                head += part
        header = np.frombuffer(head.ljust(HEADER_BYTES, b"\0"), np.uint8)
        return cls(header, sizes, stream, [np.frombuffer(view, np.uint8) for view in views])

    @classmethod
    def arriving(cls, header: Array) -> Message:
        """Find memory for what a header announces; for the buffers, ``allocate`` does once ``first`` is here."""
        return cls(header, None, None, [])

    def allocate(self) -> None:
        """Find memory for the buffers."""
        sizes = struct.unpack(f"<{len(self._sizes) // _SIZE_BYTES}Q", self._sizes.data)
        self.buffers = [_fastpath.empty((nbytes,), _BYTE) for nbytes in sizes]

    def rest(self) -> list[Array]:
        """The pieces that follow ``first``."""
        return [*self._more, *self.buffers]

    def load(self, what: str, sender: int) -> Any:
        """Make the object. This runs code that the sender chose, and raises what that raises, with a note of the call and the sender."""
        try:
            return pickle.loads(self.stream.data, buffers=self.buffers)
        except Exception as error:
            error.add_note(f"{what}: the object of rank {sender} could not be unpickled")
            raise


class Order:
    """One stream of calls whose bodies share channels: what decides which call goes on.

    Works end in any thread, and where one is submitted, which is with the lock, works of other orders may end. Who is told of that must not
    wait for their lock: two threads could wait for each other's. So ends are noted, and whoever lets go of the lock looks at the notes.
    As a context it is the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.calls: deque[ObjectWork] = deque()
        self._ended: deque[ObjectWork] = deque()  # a call for each of its works that has ended
        self._turning = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._look()

    def note(self, call: ObjectWork) -> None:
        """A work of this call has ended. From any thread, whatever locks it holds."""
        self._ended.append(call)
        self._look()

    def _look(self) -> None:
        """Go on with calls whose works have ended. If another thread has the lock, it will look when it has let it go."""
        while self._ended and self._lock.acquire(blocking=False):
            try:
                while self._ended:
                    self._ended.popleft().one_ended()
            finally:
                self._lock.release()

    def turn(self) -> None:
        """Move the first call on as far as it goes, and then the next. With the lock."""
        if self._turning:  # a work ended while it was submitted: the loop below looks again
            return
        self._turning = True
        try:
            while self.calls and self.calls[0].left == 0:
                if self.calls[0].advance():
                    self.calls.popleft()
        finally:
            self._turning = False


class ObjectWork(Work):
    """A call that moves objects: a work made of works."""

    def __init__(self, group: CoreGroup, what: str, order: Order, own: Message | None) -> None:
        super().__init__(group)
        self.what, self.about = what, "object"
        self.left = 0  # works of this stage that have not ended
        self._order = order
        self._own = own
        self._stages: Stages
        self._header: Work | None = None
        self._works: list[Work] = []
        self._released = False
        self._load: Callable[[], Any] | None = None

    def begin(self, stages: Stages) -> ObjectWork:
        """Submit the header; raises what that raises."""
        with self._order:
            self._stages = stages
            works = next(stages)
            self._header = works[0]
            self._order.calls.append(self)
            self._watch(works)
            self._order.turn()
        return self

    def advance(self) -> bool:
        """Begin the next stage; True if the next call may go on. With the order's lock."""
        if self._failed():
            return True
        try:
            works = next(self._stages)
        except StopIteration as stop:
            works, self._load = stop.value
            self._released = True
            self._watch(works)
            self._end()
        except Exception as error:
            found, broken = error, self.group.failure
            # What broke the group while the header was under way ended this call, too; only calls that come later get another text.
            self._fail(broken if broken is not None and isinstance(error, RTError) else lambda _: found)
            # Not the group's own error: no memory, or a header that makes no sense. The others would wait for ever.
            if not isinstance(error, RTError) and self.group.world is not None:
                self.group.world.abort(self.group, text=f"rank {self.group.world.rank} cannot receive an object: {error!r}")
        else:
            self._watch(works)
            return False
        return True

    def _watch(self, works: list[Work]) -> None:
        self._works = works
        self.left = len(works)
        for work in works:
            if not work.add_waiter(self._note):
                self.left -= 1

    def _note(self) -> None:
        self._order.note(self)

    def one_ended(self) -> None:
        """Go on without one of the works. With the order's lock."""
        self.left -= 1
        if self._released:
            self._end()
        else:
            self._order.turn()

    def _end(self) -> None:
        if self.left == 0 and self.state == _fastpath.FLYING and not self._failed():
            self._own = None
            self.finish(None)

    def _failed(self) -> bool:
        """If a work of this stage failed, fail with its error."""
        for work in self._works:
            if work.state == _fastpath.FAILED:
                make = work.error
                assert make is not None
                self._fail(lambda _, work=work, make=make: make(work))  # type: ignore[misc]  # the defaults bind this work
                return True
        return False

    def _fail(self, error: Callable[[_fastpath.Work], BaseException]) -> None:
        self._own = None
        self._stages.close()
        self.fail(error)

    def outcome(self) -> Any:
        """Return the result or raise the error. The first time this unpickles, in the thread that asks."""
        load = self._load
        if self.state == _fastpath.DONE and load is not None:
            self.result = load()
            self._load = None
        return super().outcome()

    def pending(self) -> Work:
        """The work that is waited for, for messages; this one if it waits for an earlier call."""
        return next((work for work in self._works if work.state == _fastpath.FLYING), self)

    def describe(self) -> str:
        """As its header."""
        return super().describe() if self._header is None else self._header.describe()

    def _give_back(self) -> Generator[None, None, None]:
        own = self._own
        if own is None or self.group.engine is None:
            return
        for index, buffer in enumerate(own.buffers):
            if self._released and not any(work.source is buffer for work in self._works):
                continue
            private = yield from copied(buffer)
            with self._order:
                own.buffers[index] = private
                for work in self._works:
                    if work.source is buffer:
                        _fastpath.move_memory(self.group.engine, work, buffer, private, False)


# -- the calls --------------------------------------------------------------------------------------------------------------------------


def send_object(group: CoreGroup, obj: Any, dst: int, tag: int) -> Work:
    """Start to send an object; the result is the object."""
    peer = _peer(dst, group, "send to", "destination", "send_object")
    tag = _tag(tag, "send_object")
    message = _pack(group, obj, "send_object")
    key = ("send", peer, tag)
    return _work(group, "send_object", key, message).begin(_send(group, message, peer, tag, lambda: obj))


def recv_object(group: CoreGroup, src: int, tag: int) -> Work:
    """Start to receive an object."""
    peer = _peer(src, group, "recv from", "source", "recv_object")
    tag = _tag(tag, "recv_object")
    _trust(group)
    return _work(group, "recv_object", ("recv", peer, tag), None).begin(_recv(group, peer, tag))


def broadcast_object(group: CoreGroup, obj: Any, root: int) -> Work:
    """Start to broadcast the root's object."""
    root = _rank(root, group, "root", "broadcast_object")
    if group.size == 1:
        return _alone(group, obj)
    message = _pack(group, obj, "broadcast_object") if group.rank == root else None
    _trust(group)
    return _work(group, "broadcast_object", (), message).begin(_broadcast(group, obj, message, root))


def gather_objects(group: CoreGroup, obj: Any, root: int) -> Work:
    """Start to gather the ranks' objects on the root."""
    root = _rank(root, group, "root", "gather_objects")
    if group.size == 1:
        return _alone(group, [obj])
    message = _pack(group, obj, "gather_objects")
    return _work(group, "gather_objects", (), message).begin(_gather(group, "gather_objects", obj, message, root))


def all_gather_objects(group: CoreGroup, obj: Any) -> Work:
    """Start to gather the ranks' objects on every rank."""
    if group.size == 1:
        return _alone(group, [obj])
    message = _pack(group, obj, "all_gather_objects")
    return _work(group, "all_gather_objects", (), message).begin(_gather(group, "all_gather_objects", obj, message, -1))


def _alone(group: CoreGroup, result: Any) -> Work:
    work = Work(group)
    work.finish(result)
    return work


def _work(group: CoreGroup, what: str, key: tuple[Any, ...], message: Message | None) -> ObjectWork:
    return ObjectWork(group, what, group.object_orders.setdefault(key, Order()), message)


def _pack(group: CoreGroup, obj: Any, what: str) -> Message:
    _trust(group)
    try:
        return Message.of(obj)
    except Exception as error:
        error.add_note(f"{what}: the {type(obj).__name__} could not be pickled; nothing was sent")
        raise


def _trust(group: CoreGroup) -> None:
    """Refuse to unpickle what strangers may have sent."""
    if group.world is None or group.world.authenticated or switch(os.environ, "RT_INSECURE_OBJECTS", "objects of anybody are unpickled"):
        return
    raise ConfigError(
        "objects are pickles, whoever sends one makes its receiver run any code, and with RT_INSECURE=1 anybody may be a sender: found no "
        "secret, expected RT_SECRET_FILE or RT_SECRET on all ranks instead of RT_INSECURE=1; or, on a network where you trust everybody, "
        "RT_INSECURE_OBJECTS=1 on all ranks"
    )


# -- their stages -----------------------------------------------------------------------------------------------------------------------


def _send(group: CoreGroup, message: Message, peer: int, tag: int, result: Callable[[], Any]) -> Stages:
    def move(pieces: list[Array], part: str) -> list[Work]:
        return [_submit(group, "send_object", Collective.SEND, piece, None, peer, tag, part) for piece in pieces]

    yield move([message.header], "header")
    yield move(message.first, "body")
    return move(message.rest(), "body"), result


def _recv(group: CoreGroup, peer: int, tag: int) -> Stages:
    def move(pieces: list[Array], part: str) -> list[Work]:
        return [_submit(group, "recv_object", Collective.RECV, None, piece, peer, tag, part) for piece in pieces]

    header = np.empty(HEADER_BYTES, np.uint8)
    yield move([header], "header")
    message = Message.arriving(header)
    yield move(message.first, "body")
    message.allocate()
    return move(message.rest(), "body"), lambda: message.load("recv_object", peer)


def _broadcast(group: CoreGroup, obj: Any, message: Message | None, root: int) -> Stages:
    def move(pieces: list[Array], part: str) -> list[Work]:
        return [_submit(group, "broadcast_object", Collective.BROADCAST, piece, piece, root, 0, part) for piece in pieces]

    header = np.empty(HEADER_BYTES, np.uint8) if message is None else message.header
    yield move([header], "header")
    if message is not None:
        yield move(message.first, "body")
        return move(message.rest(), "body"), lambda: obj
    message = Message.arriving(header)
    yield move(message.first, "body")
    message.allocate()
    return move(message.rest(), "body"), lambda: message.load("broadcast_object", root)


def _gather(group: CoreGroup, what: str, obj: Any, own: Message, root: int) -> Stages:
    """To one root, or (-1) to all ranks."""
    headers = np.empty((group.size, HEADER_BYTES), np.uint8)
    yield [_submit(group, what, Collective.ALL_GATHER, own.header, headers, root, 0, "header")]
    kept = range(group.size) if root < 0 or root == group.rank else [group.rank]  # what this rank takes part in moving
    messages = {rank: own if rank == group.rank else Message.arriving(headers[rank]) for rank in kept}

    def move(rank: int, pieces: list[Array]) -> list[Work]:
        if root < 0:
            return [_submit(group, what, Collective.BROADCAST, piece, piece, rank, 0, "body") for piece in pieces]
        if rank == root:
            return []
        if rank == group.rank:
            return [_submit(group, what, Collective.SEND, piece, None, root, 0, "gather") for piece in pieces]
        return [_submit(group, what, Collective.RECV, None, piece, rank, 0, "gather") for piece in pieces]

    yield [work for rank, message in messages.items() for work in move(rank, message.first)]
    for message in messages.values():
        if message is not own:
            message.allocate()
    works = [work for rank, message in messages.items() for work in move(rank, message.rest())]
    if len(messages) < group.size:
        return works, lambda: None
    return works, lambda: [obj if message is own else message.load(what, rank) for rank, message in messages.items()]


def _submit(
    group: CoreGroup, what: str, kind: Collective, source: Array | None, target: Array | None, root: int, tag: int, part: str
) -> Work:
    """Start to move one piece; source and target of a broadcast are the same memory, which the root only reads."""
    work = Work(group)
    array = source if source is not None else target
    assert array is not None
    alias = (0, 0) if source is target else None
    call = Call(kind, DType.UINT8, Op.SUM, array.shape, array.size, root=root, tag=tag, alias=alias, part=part)
    group.submit(what, call, source, target, work)
    return work
