"""The core of a group: its ranks, its links, its plans and its one failure. Both front ends show faces of this object.

May live here: what a group knows and how a checked call becomes a work. May not: argument checks (``collectives``), waiting
(``aio``, ``sync``), how the world comes to be (``world``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import struct
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rt import _fastpath
from rt.aio import BUDGET_BYTES, LoopDriver, Work
from rt.dtypes import ITEMSIZE, OPS, DType, Op
from rt.errors import ConfigError, GroupAbortedError, GroupBrokenError, GroupClosedError, RTError
from rt.schedule import Collective

if TYPE_CHECKING:
    import concurrent.futures

    from rt.device_arrays import OnDevice
    from rt.objects import Order
    from rt.world import World

_SIGNATURE = struct.Struct("=IBBBBQiIQQ3Q")
SIGNATURE_BYTES = _SIGNATURE.size
_PLANS_MOST = 4096
_PLAIN_DIMS = 3
_OF_OBJECTS = 0x40  # in the kind of a signature: the call moves objects
_REDUCING = frozenset(
    {
        Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE, Collective.REDUCE_SCATTER_V, Collective.SCAN,
        Collective.EXSCAN,
    }
)  # fmt: skip
_ROOTED = frozenset(
    {Collective.BROADCAST, Collective.REDUCE, Collective.GATHER, Collective.SCATTER, Collective.GATHER_V, Collective.SCATTER_V}
)
_COUNTED = frozenset({Collective.ALL_GATHER_V, Collective.REDUCE_SCATTER_V, Collective.GATHER_V, Collective.SCATTER_V})
_COUNTS_TOLD = 64  # ranks: the counts of more make a message that nobody reads
_RECENT = 64  # calls that can still be named when a peer turns out to have called something else


class Call(NamedTuple):
    """What is asked for, as all ranks must ask alike; plans are kept by it.

    Attributes:
        kind: the collective.
        dtype, op: codes.
        shape: of x as the caller sees it; compared between ranks.
        items: as ``choose`` wants them counted.
        root: rank in the group; for send and recv the peer.
        tag: of send and recv.
        counts: rows (along axis 0) of each rank's block where blocks differ; ``shape`` is then that of all blocks together. All-to-all:
            rows for each rank, then rows from each; ``shape`` is that of x, whose first side nobody compares.
        alias: where input and output start in shared memory, None out of place.
        part: of a call that moves objects ("" of others): its header, or the name of the channel its body takes.
    """

    kind: Collective
    dtype: DType
    op: Op
    shape: tuple[int, ...]
    items: int
    root: int = -1
    tag: int = 0
    counts: tuple[int, ...] = ()
    alias: tuple[int, int] | None = None
    part: str = ""


class Ready(NamedTuple):
    """What a call needs that was computed once."""

    program: _fastpath.Program
    signature: bytes  # or one for every rank
    channel: int
    about: str


def known_as(kind: Collective, op: Op = Op.SUM, root: int = -1) -> int:
    """Return the number that tells a call in the table of calls that were made before, with what its arrays show."""
    return kind | op << 8 | root + 1 << 16


ALL_REDUCE_AS = {name: known_as(Collective.ALL_REDUCE, op) for name, op in OPS.items()}
SUM_SCATTER_AS = {name: known_as(Collective.REDUCE_SCATTER, op) for name, op in OPS.items()}
ALL_GATHER_AS = known_as(Collective.ALL_GATHER)
ALL_TO_ALL_AS = known_as(Collective.ALL_TO_ALL)
BARRIER_AS = known_as(Collective.BARRIER), np.empty(0, np.uint8)  # has no arrays, and stands in the table under this one


def hash64(*parts: object) -> int:
    """Return a 64-bit number that all ranks derive alike and that is never 0."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def number_of(counts: tuple[int, ...]) -> int:
    """Return the 64-bit number that stands for counts in a signature: even, and all of them, where they fit; else odd, and a hash."""
    bits = 63 // len(counts)
    if any(count >> bits for count in counts):
        return hash64(*counts)
    return sum(count << (1 + bits * index) for index, count in enumerate(counts))


def explain_counts(number: int, size: int) -> str:
    """Return in words what ``number_of`` made of the counts of a group's ranks."""
    if number & 1:
        return f"counts {number:016x} (a hash)"
    bits = 63 // size
    return f"counts {[number >> (1 + bits * index) & ((1 << bits) - 1) for index in range(size)]}"


class InLibrary(NamedTuple):
    """What a library that tells nothing carries of a group.

    Attributes:
        works: in flight, and since when somebody has waited for each, None where nobody has.
        called: how many collectives this rank has called.
        heard: likewise of each rank of the group, as far as this one was told; may be empty.
    """

    works: list[tuple[Work, float | None]]
    called: int
    heard: list[int]


class CoreGroup:
    """Some ranks of the world, in an order.

    Attributes:
        ranks: world rank of each rank of the group.
        rank: of this process in the group.
        timeout: seconds a collective may take unless the call says otherwise; None for ever.
        hosts: of each rank the number of its host, in the order in which ranks of the group come to hosts.
        making: ends when a library has connected its ranks, None where none has to.
        receives_first: whether the receive of a ``sendrecv`` begins first.
        full_mesh, link_kind, tuning: what algorithms are chosen by, alike on all ranks: whether all pairs are connected, by what (one of
            ``tuning.LINKS``), and rank 0's table. Only where there are several ranks.
    """

    making: concurrent.futures.Future[Any] | None = None
    takes_devices = False  # whether its arrays may lie on devices
    receives_first = True  # the peer may send its message only once it knows that, and would hear of it behind ours

    def __init__(
        self, world: World | None, ranks: Sequence[int], rank: int, name: str, identity: int, timeout: float | None = None
    ) -> None:
        self.world = world
        self.ranks = list(ranks)
        self.rank = rank
        self.size = len(self.ranks)
        self.name = name
        self.identity = identity
        self.timeout = timeout
        self.engine = world.engine if world is not None and self.size > 1 else None
        self._unheard: tuple[str, str, int] | None = None  # what, about and sequence of a work that the failure ended
        self._heard = False  # somebody was told of the failure
        self.failure: Callable[..., RTError] | None = None  # of a work; True behind it: of a call that came after the failure
        self.splits = 0
        self.object_orders: dict[tuple[Any, ...], Order] = {}
        self._plans: dict[Call, Ready] = {}
        self._recent: list[tuple[int, bytes]] = [(-1, b"")] * _RECENT
        self.known = _fastpath.Calls(Work, self, self.engine, identity, self.ranks, self._recent)
        if self.engine is not None and world is not None:
            pairs = set(itertools.combinations(sorted(self.ranks), 2))
            self.full_mesh = pairs <= world.direct
            self.link_kind = "shm" if pairs <= world.shared else "mixed" if pairs & world.shared else "tcp"
            self.tuning = world.tuning
            self.hosts = _numbered([world.hosts[r] for r in self.ranks])
            self._links = [0 if r == world.rank else self.engine.links_to(r) for r in self.ranks]

    # -- submitting

    def submit(self, what: str, call: Call, source: Any, target: Any, work: Work, budget: int = BUDGET_BYTES) -> None:
        """Start ``work``; arguments are checked by now. Raises the group's error if it is broken or closed."""
        ready = self.ready(call)
        assert self.engine is not None
        work.what = what
        work.about = ready.about
        if self.failure is not None:
            raise self.failure(work, True)
        try:
            status = self.engine.submit(
                work, ready.program, self.identity, ready.channel, ready.signature, self.ranks, self.size, source, target, budget
            )
            if ready.channel == self.identity:
                self._recent[work.sequence % _RECENT] = (work.sequence, ready.signature[: _SIGNATURE.size])
            if self.failure is not None and work.state == _fastpath.FLYING:
                self.engine.break_group(self.identity, self.failure)  # it broke between the two lines above
            self.follow(status)
        except BaseException:  # Ctrl-C: nobody will wait for it
            work.give_back()
            raise

    def follow(self, status: int) -> None:
        """Have the running loop, if there is one, do what the engine's answer to a submit asks for."""
        loop = asyncio._get_running_loop()
        if loop is not None:
            self.driver(loop).follow(status)

    def ready(self, call: Call) -> Ready:
        """Return what carries out a call, made once."""
        return self._plans.get(call) or self.plan(call)

    def recent(self, sequence: int) -> bytes | None:
        """Return the signature of a collective that this rank called not long ago, None if it is not known any more."""
        found, signature = self._recent[sequence % _RECENT]
        return sequence.to_bytes(4, sys.byteorder) + signature[4:] if found == sequence else None

    def latest(self) -> str:
        """Return in words the collective that this rank called last, "" if it has called none."""
        sequence, signature = max(self._recent)
        return explain_signature(self.recent(sequence) or signature) if signature else ""

    def in_library(self) -> InLibrary | None:
        """Return what a library carries of this group, for ``rt.doctor``; None where the engine carries all."""
        return None

    def algorithm(self, kind: str, dtype: str, items: int) -> str | None:
        """Return the name of the schedule made last for such a call (its kind, dtype and items), None if none was; for measurements."""
        for call, ready in reversed(self._plans.items()):
            if (call.kind.name.lower(), call.dtype.name.lower(), call.items) == (kind, dtype, items):
                return ready.program.name
        return None

    def plan(self, call: Call) -> Ready:
        """Choose and compile what carries out a call; plans are kept."""
        row_items = _count(call.shape[1:])
        from rt.choose import choose  # all algorithms: 10 ms, which ``import rt`` and a group of one are spared

        schedule = choose(
            call.kind,
            rank=self.rank,
            size=self.size,
            count=call.items,
            dtype=call.dtype,
            op=call.op,
            lanes=self.world.lanes if self.world is not None else 1,
            full_mesh=self.full_mesh,
            root=max(call.root, 0),
            counts=[rows * row_items for rows in call.counts],
            hosts=self.hosts,
            links=self.link_kind,
            table=self.tuning,
        )
        op = Op.SUM if call.op is Op.MEAN else call.op
        program = _fastpath.Program(schedule, call.dtype, op, self._links, call.alias)
        ready = Ready(program, self.signature_of(call, schedule.name), self._channel(call), self.about(call))
        if len(self._plans) >= _PLANS_MOST:
            self._plans.clear()
            self.known.forget()
        self._plans[call] = ready
        return ready

    def about(self, call: Call) -> str:
        """Return what a call moves, for messages: ``float32, 4096 B``."""
        nbytes = _count(call.shape) * ITEMSIZE[call.dtype]
        if call.part:
            return "object" if call.part == "header" else f"object, a piece of {nbytes} B"
        counts = f", counts {list(call.counts)}" if call.kind in _COUNTED and len(call.counts) <= _COUNTS_TOLD else ""
        return f"{call.dtype.name.lower()}, {nbytes} B{counts}" if call.kind is not Collective.BARRIER else "all ranks"

    def signature_of(self, call: Call, algorithm: str) -> bytes:
        """Return what the peers compare of a call, or as much for every rank of the group where that differs."""
        if call.kind is Collective.ALL_TO_ALL_V:
            return self._signatures_of_pairs(call, algorithm)
        return self._signature(call, _count(call.shape) * ITEMSIZE[call.dtype], algorithm)

    def _signature(self, call: Call, nbytes: int, algorithm: str) -> bytes:
        """What the peers compare. Send and recv have one signature: which of them is which follows from the channel."""
        p2p = call.kind in (Collective.SEND, Collective.RECV)
        kind = (Collective.SEND if p2p else call.kind) | (_OF_OBJECTS if call.part else 0)
        shape = call.shape
        dims = (*shape, 0, 0, 0)[:_PLAIN_DIMS]
        if len(shape) > _PLAIN_DIMS:
            dims = (*shape[: _PLAIN_DIMS - 1], hash64(*shape[_PLAIN_DIMS - 1 :]))
        lanes = self.world.lanes if self.world is not None else 1
        table = self.tuning.fingerprint if self.tuning is not None else ""
        fingerprint = hash64(algorithm, self.identity, lanes, self.full_mesh, self.hosts, self.link_kind, table)
        root = -1 if p2p else call.root
        tag = number_of(call.counts) if call.counts else call.tag & (2**64 - 1)
        return _SIGNATURE.pack(0, kind, call.dtype, call.op, len(shape), nbytes, root, self.size, fingerprint, tag, *dims)

    def _signatures_of_pairs(self, call: Call, algorithm: str) -> bytes:
        """Of an all-to-all with counts: for each rank what both must know alike of what they exchange, the lower rank's rows first."""
        rows = zip(call.counts[: self.size], call.counts[self.size :], strict=True)
        pairs = [(sent, received) if self.rank < peer else (received, sent) for peer, (sent, received) in enumerate(rows)]
        any_rows = call._replace(shape=(0, *call.shape[1:]), counts=())
        return b"".join(self._signature(any_rows._replace(tag=down), up, algorithm) for up, down in pairs)

    def _channel(self, call: Call) -> int:
        apart = () if call.part in ("", "header") else (call.part,)
        if call.kind is Collective.SEND:
            return hash64(self.identity, "p2p", self.rank, call.root, call.tag, *apart)
        if call.kind is Collective.RECV:
            return hash64(self.identity, "p2p", call.root, self.rank, call.tag, *apart)
        return hash64(self.identity, *apart) if apart else self.identity

    # -- memory

    def on_device(self, x: Any, what: str) -> OnDevice | None:
        """Return what stands for an array that lies where this group takes arrays and the host cannot read; None for any other."""
        return None

    def memory(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """Return memory for a result, of the kind of ``like``, or what this group takes where that is None."""
        return _fastpath.empty(shape, dtype)

    def together(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose collectives a library launches together, where ``takes_devices``."""
        raise NotImplementedError

    def on_stream(self, stream: Any, what: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which calls are made on a stream of the caller's; ``what`` names the call, in messages."""
        where = f"only backend 'nccl' takes; group {self.name} takes stream=None"
        raise ConfigError(f"{what}: stream= is for arrays on a device, which {where}")

    # -- driving

    def driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        """Return the driver of this world's engine in ``loop``, attached now if it is new."""
        assert self.world is not None
        return self.world.driver(loop)

    def driver_of(self, loop: asyncio.AbstractEventLoop) -> LoopDriver | None:
        """As ``driver``, but None where none was attached."""
        return None if self.world is None else self.world.drivers.get(loop)

    def blocking(self, limit: float | None) -> CoreGroup:
        """Return this group as calls see it that block, for at most ``limit`` seconds: on the ring they are as any other."""
        return self

    def block(self, work: Work) -> bool:
        """Wait in this thread for a work that the engine does not move; False: the engine moves it."""
        return False

    def in_flight(self) -> int:
        """Number of works of this process that have not ended."""
        return self.engine.in_flight() if self.engine is not None else 0

    # -- failing

    def fail(self, failure: Callable[..., RTError]) -> None:
        """Break the group for good, from any thread. The first failure stays."""
        if self.failure is None:
            self.refuse(failure)
        if self.engine is not None:
            ended = self.engine.break_group(self.identity, self.failure or failure)
            if ended is not None:
                self._unheard = ended.what, ended.about, ended.sequence

    def report_unheard(self) -> None:
        """Log a failure that ended works and that nothing has raised: no await, no later call. Who called ``abort()`` knows.

        Not where another group's failure was raised: it has one cause with this one, and what a program says last is looked at.
        """
        if self._unheard is None or self.failure is None or self.world is None or any(each._heard for each in self.world.groups.values()):
            return
        work = Work(self)
        work.what, work.about, work.sequence = self._unheard
        error = self.failure(work)
        by_abort_here = isinstance(error, GroupAbortedError) and error.culprit == self.world.rank
        if isinstance(error, GroupBrokenError) and not by_abort_here:
            logging.getLogger("rt").error("%s (nobody awaited the call)", error)

    def refuse(self, failure: Callable[..., RTError]) -> None:
        """Have every call from now on raise ``failure``."""
        self.failure = failure
        self.known.break_off(failure)

    def broken(self, kind: type[GroupBrokenError], culprit: int | None, text: str) -> Callable[..., GroupBrokenError]:
        """Return what makes this group's error for a work."""

        def make(work: Work, later: bool = False) -> GroupBrokenError:
            self._heard = True
            got = f" after {work.received} B" if work.received else ""
            earlier = "the group failed earlier: " if later else ""
            return kind(self._told(work, later, earlier + text + got), group=self.name, culprit=culprit, work=work.describe())

        return make

    def closed(self, text: str) -> Callable[..., GroupClosedError]:
        """Return what makes this group's ``GroupClosedError`` for a work."""
        return lambda work, later=False: GroupClosedError(self._told(work, later, text))

    def _told(self, work: Work, later: bool, text: str) -> str:
        """Return the message of a failure for a work that it ended, or for a ``later`` call, which has no number and is not to blame."""
        about = f"{work.what} ({work.about})" if later else work.describe() if work.what else f"group {self.name}"
        where = f" of {self.name}" if work.what and self.name != "world" else ""
        return f"rank {self.rank}/{self.size}{where}: {about}: {text}"


LIST_COUNT_BITS = 16  # of the tag of a list of arrays; the rest is a hash of what they are
LIST_COUNT_MOST = (1 << LIST_COUNT_BITS) - 1
WAITING_ALIKE = (  # what is said of two ranks that wait for each other in calls of the same words, by their role (_deadlock.pxi)
    ", and both send: let one of them receive first, or use sendrecv",
    ", and neither sends",
    ", in two groups: the calls of several groups belong in one order on all ranks",
)


def explain_signature(signature: bytes, role: int | None = None) -> str:
    """Return in words what a signature says: ``all_reduce #3 sum float32 (2, 2)``; ``role`` tells a send (0) from a recv (1)."""
    sequence, kind, dtype, op, ndim, nbytes, root, size, _, tag, *dims = _SIGNATURE.unpack(signature)
    objects, kind = kind & _OF_OBJECTS, kind & ~_OF_OBJECTS
    try:
        if objects:
            return _explain_objects(Collective(kind), sequence, root, tag, role)
        name = Collective(kind).name.lower() if kind != Collective.SEND else ("send", "recv", "send/recv")[2 if role is None else role]
        parts = [f"{name} #{sequence}", DType(dtype).name.lower()]
        shape = tuple(dims[:ndim]) if ndim <= _PLAIN_DIMS else f"({dims[0]}, {dims[1]}, ... {ndim} dimensions)"
        parts += [Op(op).name.lower()] if kind in _REDUCING else []
        if kind == Collective.ALL_TO_ALL_V:
            rows = f"rows of shape {shape[1:]}" if ndim <= _PLAIN_DIMS else f"rows of {ndim - 1} dimensions"
            parts += [rows, f"{nbytes} from the lower to the higher rank and {tag} back"]
        else:
            parts += [f"shape {shape}", f"{nbytes} B"]
        parts += [f"root {root}"] if kind in _ROOTED else []
        parts += [explain_counts(tag, size)] if kind in _COUNTED else []
        parts += [f"tag {tag - 2**64 if tag >= 2**63 else tag}"] if kind == Collective.SEND else []
        parts += [_explain_list(tag)] if kind == Collective.ALL_REDUCE and tag else []
    except ValueError:
        return "a call of another version of rt"
    return " ".join(parts)


def _explain_list(tag: int) -> str:
    count, hashed = divmod(tag, 1 << (64 - LIST_COUNT_BITS))
    arrays = "1 array" if count == 1 else f"{count} arrays" if count < LIST_COUNT_MOST else f"{count} or more arrays"
    return f"of a list of {arrays}, whose dtypes, shapes and names have the hash {hashed:012x}"


def _explain_objects(kind: Collective, sequence: int, root: int, tag: int, role: int | None) -> str:
    """As ``explain_signature``, of a call that moves objects: their header's shape is none of the caller's."""
    if kind is Collective.SEND:
        return f"{('send', 'recv', 'send/recv')[2 if role is None else role]}_object #{sequence} tag {tag - 2**64 if tag >= 2**63 else tag}"
    if kind is Collective.BROADCAST:
        return f"broadcast_object #{sequence} root {root}"
    return f"gather_objects #{sequence} root {root}" if root >= 0 else f"all_gather_objects #{sequence}"


def _numbered(names: Sequence[Any]) -> tuple[int, ...]:
    """Number names from 0 in the order in which they first occur."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
