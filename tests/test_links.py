"""What every link must do, asked of each kind: memory links, socket pairs, TCP on loopback, shared memory, RDMA (in its guest).

May live here: the conformance suite. May not: schedules beyond send and recv, configuration of sockets. Engines are driven as drivers do
it: by their descriptor where there is one, by the link's wake-ups where there is none. A forgotten wake-up fails the test.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest

from rt import _fastpath, algorithms, algorithms_move
from rt.dtypes import Op, code_of
from transports import shm
from transports.memory import MemoryLink, memory_pair
from transports.rdma import RdmaLink
from transports.verbs import Device, QueuePair, find_port

LOST, CLOSED, PROTOCOL = _fastpath.LOST, _fastpath.CLOSED, _fastpath.PROTOCOL
PATIENCE_MS = 10_000  # until a test that waits for a wake-up gives up
KINDS = ("memory", "pair", "tcp", "shm", *(["rdma"] if "RT_RDMA_GUEST" in os.environ else []))
POLLS = 5e-3  # seconds in which a thread may move more than once
BIG = 1 << 19  # items; far more than any link holds


class RawSocket:
    """The far end of a link, in the hands of a test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(True)
        sock.settimeout(PATIENCE_MS / 1e3)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self) -> bytes:
        return self.sock.recv(1 << 16)

    def end(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class RawMemory:
    def __init__(self, link: MemoryLink) -> None:
        self.link = link

    def send(self, data: bytes) -> None:
        assert self.link.send(memoryview(data)) == len(data)

    def recv(self) -> bytes:
        buffer = bytearray(1 << 16)
        return bytes(buffer[: max(self.link.recv_into(buffer), 0)])

    def end(self) -> None:
        self.link.outgoing.closed = self.link.incoming.closed = True
        assert self.link.wake_peer is not None
        self.link.wake_peer()

    reset = end


class RawRings:
    """Writes and reads rings as ``rt/_ring.h`` does, with the near end standing still meanwhile."""

    WRITTEN, PLACE, CONSUMED, READER_SLEEPS, WRITER_SLEEPS, DATA = 0, 8, 128, 256, 384, 512

    def __init__(self, fd: int, sock: socket.socket, capacity: int) -> None:
        self.memory = mmap.mmap(fd, 0)
        self.sock = sock
        self.capacity = capacity

    def _look(self, ring: int, place: int, form: str = "Q") -> int:
        return int(struct.unpack_from("=" + form, self.memory, ring * (self.DATA + self.capacity) + place)[0])

    def _set(self, ring: int, place: int, value: int, form: str = "Q") -> None:
        struct.pack_into("=" + form, self.memory, ring * (self.DATA + self.capacity) + place, value)

    def _wake(self, ring: int, place: int) -> None:
        if self._look(ring, place, "I"):
            self._set(ring, place, 0, "I")
            self.sock.send(b"\0")

    def send(self, data: bytes) -> None:
        at, start = self._look(1, self.WRITTEN), self.DATA + self.capacity + self.DATA
        assert at - self._look(1, self.CONSUMED) + len(data) <= self.capacity
        for i, byte in enumerate(data):
            self.memory[start + (at + i) % self.capacity] = byte
        self._set(1, self.WRITTEN, at + len(data))
        self._wake(1, self.READER_SLEEPS)

    def recv(self) -> bytes:
        at, end = self._look(0, self.CONSUMED), self._look(0, self.WRITTEN)
        found = bytes(self.memory[self.DATA + i % self.capacity] for i in range(at, end))
        self._set(0, self.CONSUMED, end)
        self._wake(0, self.WRITER_SLEEPS)
        return found

    def told_place(self) -> int:
        """The processor that the near end polled on last, and 1."""
        return self._look(0, self.PLACE, "I")

    def tell_place(self, place: int) -> None:
        self._set(1, self.PLACE, place, "I")

    def end(self) -> None:
        self.memory.close()
        self.sock.close()

    def reset(self) -> None:
        self.memory.close()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class RawRdma:
    """One RDMA link, polled by a test."""

    def __init__(self, link: RdmaLink) -> None:
        self.link = link

    def send(self, data: bytes) -> None:
        assert self.link.send(data) == len(data)

    def recv(self) -> bytes:
        buffer = bytearray(1 << 16)
        return bytes(buffer[: max(self.link.recv_into(buffer), 0)])

    def end(self) -> None:
        self.link.close(PATIENCE_MS / 1e3)

    reset = end  # a queue pair that goes without a word is found by the control thread, or by writing


class Pair:
    """Two engines and the link between them; or one engine and a raw end."""

    def __init__(self, kind: str, small: bool = False) -> None:
        self.kind = kind
        self.ends: list[Any]
        if kind == "memory":
            self.ends = list(memory_pair(100 if small else 1 << 16))
        elif kind == "rdma":
            self.device, self.ends = rdma_pair(4096 if small else 1 << 16)
        else:
            self.ends = list(socket.socketpair() if kind == "pair" else tcp_pair())
            for end in self.ends:
                end.setblocking(False)
                if small and kind != "shm":
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.capacity = 4096 if small else 1 << 16
        self.fd = shm.make(shm.stride(self.capacity)) if kind == "shm" else -1
        self.engines: list[_fastpath.Engine] = []
        self.events: list[list[Any]] = []

    def engine(self) -> _fastpath.Engine:
        rank = len(self.engines)
        engine, events = _fastpath.Engine(), list[Any]()
        engine.set_event_handler(events.extend)
        self.join(rank, engine, 1 - rank)
        self.engines.append(engine)
        self.events.append(events)
        return engine

    def join(self, which: int, engine: _fastpath.Engine, peer: int) -> None:
        """Give one end of the link to an engine, as its link to the rank ``peer``."""
        end = self.ends[which]
        if self.kind == "memory":
            index = engine.add_link(peer, end)
            self.ends[1 - which].wake_peer = lambda: engine.ready(index)
        elif self.kind == "rdma":
            engine.add_link(peer, end, end.fd)
        elif self.kind == "shm":
            engine.add_shared(peer, end, self.fd, 0, self.capacity, which == 0)
        else:
            engine.add_socket(peer, end)

    def raw(self) -> Any:
        if self.kind == "shm":
            return RawRings(self.fd, self.ends[1], self.capacity)
        kinds: dict[str, Any] = {"memory": RawMemory, "rdma": RawRdma}
        return kinds.get(self.kind, RawSocket)(self.ends[1])

    def drive(self, until: Callable[[], bool]) -> None:
        drive(self.engines, until)

    def close(self) -> None:
        for engine in self.engines:
            engine.break_group(1, lambda work: RuntimeError("over"))
            engine.close()
        for end in self.ends:
            if not isinstance(end, MemoryLink):
                end.close()
        if self.kind == "rdma":
            self.device.close()
        if self.fd >= 0:
            os.close(self.fd)


def drive(driven: list[_fastpath.Engine], until: Callable[[], bool]) -> None:
    """Sleep until an engine's descriptor says that it can go on, and let it; as any driver does."""
    poll = select.poll()
    engines = {engine.fileno(): engine for engine in driven}
    for fd in engines:
        poll.register(fd, select.POLLIN)
    again = dict(engines)
    while not until():
        for fd in again or (ready := [fd for fd, _ in poll.poll(PATIENCE_MS)]):
            engines[fd].progress(1 << 16)
        if not again:
            assert ready, "nobody was woken"
        again = {fd: engine for fd, engine in engines.items() if engine.progress(1 << 16) == _fastpath.BUDGET}


def rdma_pair(ring_bytes: int) -> tuple[Device, list[RdmaLink]]:
    """Two links in one process, through a device as between any two."""
    device = Device(find_port("auto"))
    pairs = [QueuePair(device, ring_bytes) for _ in range(2)]
    ends = [pair.end() for pair in pairs]
    for pair, end in zip(pairs, reversed(ends), strict=True):
        pair.connect(end)
    return device, [RdmaLink(pair, 1 - rank) for rank, pair in enumerate(pairs)]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    with closing(Pair(kind)) as pair:
        yield pair


def transfer(
    engine: _fastpath.Engine, rank: int, data: np.ndarray[Any, Any], *, sends: bool, channel: int = 1, ranks: tuple[int, int] = (0, 1)
) -> _fastpath.Work:
    """Start to send ``data`` to the other of two ranks, or to receive it; ``ranks`` says who they are in the world."""
    make = algorithms_move.send if sends else algorithms_move.recv
    program = _fastpath.Program(make(1 - rank, data.size, 1, 8), code_of(data.dtype), Op.SUM, [int(rank == 1), int(rank == 0)])
    work = _fastpath.Work()
    x, out = (data, None) if sends else (None, data)
    engine.submit(work, program, 1, channel, bytes(64), list(ranks), 2, x, out, 1 << 16)
    return work


def ended(*works: _fastpath.Work) -> Callable[[], bool]:
    return lambda: all(work.state != _fastpath.FLYING for work in works)


@pytest.mark.parametrize("small", (False, True))
def test_order_and_partial_transfers(kind: str, small: bool) -> None:
    with closing(Pair(kind, small)) as pair:
        a, b = pair.engine(), pair.engine()
        dice = random.Random(kind)
        xs = [np.arange(dice.choice((1, 3, 100, 5000))) + i for i in range(60)]
        outs = [np.zeros_like(x) for x in xs]
        works = []
        for i, (x, out) in enumerate(zip(xs, outs, strict=True)):
            for engine, rank, data, sends in dice.sample([(a, 0, x, i % 2 == 0), (b, 1, out, i % 2 == 1)], 2):
                if i % 2:  # the other way round
                    data = x if rank else out
                works.append(transfer(engine, rank, data, sends=sends, channel=1 + i % 3))
        pair.drive(ended(*works))
        for x, out in zip(xs, outs, strict=True):
            np.testing.assert_array_equal(out, x)
        assert not any(pair.events)


def test_both_ways_at_once(pair: Pair) -> None:
    """Full in both directions: whoever only writes deadlocks."""
    engines = [pair.engine(), pair.engine()]
    xs = [np.arange(BIG) + rank for rank in range(2)]
    outs = [np.zeros_like(x) for x in xs]
    works = [transfer(engine, rank, xs[rank], sends=True, channel=1 + rank) for rank, engine in enumerate(engines)]
    works += [transfer(engine, rank, outs[rank], sends=False, channel=2 - rank) for rank, engine in enumerate(engines)]
    pair.drive(ended(*works))
    assert (outs[0] == xs[1]).all() and (outs[1] == xs[0]).all()


def test_back_pressure_blocks_and_lets_go(pair: Pair) -> None:
    a, b = pair.engine(), pair.engine()
    x, out = np.arange(8 * BIG), np.zeros(8 * BIG, np.int64)
    works = [transfer(a, 0, x, sends=True), transfer(b, 1, out, sends=False)]
    while a.progress(1 << 20) == _fastpath.BUDGET:
        pass
    stuck = a.statistics()["bytes_out"]
    assert a.progress(1 << 20) == _fastpath.BLOCKED and a.statistics()["bytes_out"] == stuck < x.nbytes
    pair.drive(ended(*works))
    np.testing.assert_array_equal(out, x)


def test_idle_and_unwanted_data_wake_nobody_twice(pair: Pair) -> None:
    """Data for which nothing is posted is read once; then the descriptor is quiet."""
    a, b = pair.engine(), pair.engine()
    work = transfer(a, 0, np.arange(1000), sends=True)
    pair.drive(ended(work))
    poll = select.poll()
    poll.register(b.fileno(), select.POLLIN)
    while poll.poll(0):
        assert b.progress(1 << 20) in (_fastpath.IDLE, _fastpath.BUDGET)
    assert b.statistics()["bytes_in"] == a.statistics()["bytes_out"] and b.progress(1 << 20) == _fastpath.IDLE
    assert not poll.poll(0)
    out = np.zeros(1000, np.int64)
    assert transfer(b, 1, out, sends=False).state == _fastpath.DONE and out[-1] == 999


def test_one_byte_at_a_time(kind: str) -> None:
    with closing(Pair(kind)) as source:
        a, raw = source.engine(), source.raw()
        sent = transfer(a, 0, np.arange(50), sends=True)
        source.drive(ended(sent))
        stream = b""
        while len(stream) < a.statistics()["bytes_out"]:
            stream += raw.recv()
        raw.end()
    with closing(Pair(kind)) as sink:
        b, raw = sink.engine(), sink.raw()
        out = np.zeros(50, np.int64)
        # The engine under test is rank 0 of its pair here; what it hears is the same.
        work = transfer(b, 0, out, sends=False)
        for i in range(len(stream)):
            assert work.state == _fastpath.FLYING
            raw.send(stream[i : i + 1])
            sink.drive(lambda: b.statistics()["bytes_in"] == i + 1)  # noqa: B023
        assert work.state == _fastpath.DONE and out.tolist() == list(range(50))
        raw.end()


@pytest.mark.parametrize("way", ("end", "reset"))
@pytest.mark.parametrize("posted", (False, True))
def test_end_without_goodbye_is_a_loss(pair: Pair, way: str, posted: bool) -> None:
    engine, raw = pair.engine(), pair.raw()
    work = transfer(engine, 0, np.zeros(BIG, np.int64), sends=False) if posted else None
    while engine.progress(1 << 20) == _fastpath.BUDGET:  # about to sleep, so what comes rings, and the end may come with the bell
        pass
    raw.send(struct.pack("=IBBHQ", 64, 1, 0, 0, 1)[:9])  # amid a header
    getattr(raw, way)()
    pair.drive(lambda: bool(pair.events[0]))
    assert [event[:2] for event in pair.events[0]] == [(LOST, 1)]
    assert work is None or work.state == _fastpath.FLYING
    assert engine.progress(1 << 20) == (_fastpath.BLOCKED if posted else _fastpath.IDLE)


def test_end_while_sending_is_a_loss(pair: Pair) -> None:
    engine, raw = pair.engine(), pair.raw()
    work = transfer(engine, 0, np.zeros(8 * BIG, np.int64), sends=True)
    raw.send(struct.pack("=IBBHQ", 64, 1, 0, 0, 1) + bytes(64))
    pair.drive(lambda: engine.statistics()["bytes_in"] == 80)
    raw.end()
    pair.drive(lambda: bool(pair.events[0]))
    assert [event[0] for event in pair.events[0]] == [LOST] and work.state == _fastpath.FLYING


def test_orderly_end(pair: Pair) -> None:
    """Everything sent before GOODBYE arrives; both hear each other's; nobody reports an error."""
    a, b = pair.engine(), pair.engine()
    x, out = np.arange(BIG), np.zeros(BIG, np.int64)
    works = [transfer(a, 0, x, sends=True), transfer(b, 1, out, sends=False)]
    pair.drive(ended(works[0]))
    a.say_goodbye()
    pair.drive(ended(works[1]))
    b.say_goodbye()
    pair.drive(lambda: not a.goodbyes_missing() and not b.goodbyes_missing())
    np.testing.assert_array_equal(out, x)
    assert not any(pair.events)


def test_garbage_is_no_frame(pair: Pair) -> None:
    _, raw = pair.engine(), pair.raw()
    raw.send(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    pair.drive(lambda: bool(pair.events[0]))
    assert [event[0] for event in pair.events[0]] == [PROTOCOL]


def test_what_a_finished_call_leaves_undone_wakes_the_others(pair: Pair) -> None:
    """Whose work ends within submit does not come back; it took the events, so it must leave the descriptor readable."""
    a, b = pair.engine(), pair.engine()
    x, out, late = np.arange(BIG), np.zeros(BIG, np.int64), np.zeros(1, np.int64)
    works = [transfer(a, 0, out, sends=False), transfer(b, 1, x, sends=True)]
    while b.progress(1 << 20) == _fastpath.BUDGET:
        pass
    poll = select.poll()
    poll.register(a.fileno(), select.POLLIN)
    small = transfer(a, 0, np.ones(1, np.int64), sends=True, channel=2)
    assert small.state == _fastpath.DONE and works[0].state == _fastpath.FLYING
    assert poll.poll(0)
    pair.drive(ended(*works, transfer(b, 1, late, sends=False, channel=2)))
    assert late[0] == 1 and (out == x).all()


def test_what_comes_behind_a_frame_that_waits_wakes(kind: str) -> None:
    """Rank 0 adds rank 2's numbers after those of rank 1, who makes the call only when rank 0 has heard from rank 2."""
    with ExitStack() as stack:
        engines = [_fastpath.Engine() for _ in range(3)]
        for low, high in ((0, 1), (0, 2), (1, 2)):
            pair = stack.enter_context(closing(Pair(kind)))
            pair.join(0, engines[low], high)
            pair.join(1, engines[high], low)
        for engine in engines:
            stack.callback(engine.close)
        group, xs, outs = [1, 2, 0], [np.arange(100) + rank for rank in range(3)], [np.zeros(100, np.int64) for _ in range(3)]

        def add(rank: int) -> _fastpath.Work:
            work, schedule = _fastpath.Work(), algorithms.direct_all_reduce(group.index(rank), 3, 100)
            program = _fastpath.Program(schedule, code_of(xs[0].dtype), Op.SUM, [int(other != rank) for other in group])
            engines[rank].submit(work, program, 1, 1, bytes(64), group, 3, xs[rank], outs[rank], 1 << 16)
            return work

        late, note = np.zeros(1, np.int64), np.ones(1, np.int64)
        works = [add(0), add(2), transfer(engines[0], 0, late, sends=False, channel=2, ranks=(0, 2))]
        while any(select.select([engine.fileno() for engine in engines], [], [], 0)[0]):
            while any([engine.progress(1 << 16) == _fastpath.BUDGET for engine in engines]):
                pass
        works.append(transfer(engines[2], 1, note, sends=True, channel=2, ranks=(0, 2)))
        assert select.select([engines[0].fileno()], [], [], PATIENCE_MS / 1e3)[0], "nobody was woken"
        drive(engines, ended(*works[2:]))
        drive(engines, ended(*works, add(1)))
        assert late[0] == 1 and all((out == sum(xs)).all() for out in outs)


def test_what_a_turn_leaves_undone_wakes_others_who_sleep(pair: Pair) -> None:
    a, b = pair.engine(), pair.engine()
    a.sleepers = 2  # a thread, and the driver of a loop, which turns again, but may compute for long before, or end
    x, out = np.arange(BIG), np.zeros(BIG, np.int64)
    works = [transfer(a, 0, out, sends=False), transfer(b, 1, x, sends=True)]
    while b.progress(1 << 20) == _fastpath.BUDGET:
        pass
    assert _fastpath.turn(a, 1 << 10, 0.0) == _fastpath.BUDGET
    assert select.select([a.fileno()], [], [], PATIENCE_MS / 1e3)[0], "nobody was woken"
    pair.drive(ended(*works))
    assert (out == x).all()


def test_a_submit_does_not_take_away_what_wakes_others_who_sleep(pair: Pair) -> None:
    a, b = pair.engine(), pair.engine()
    a.sleepers, out, other = 2, np.zeros(10, np.int64), np.zeros(10, np.int64)
    works = [transfer(a, 0, out, sends=False)]
    while a.progress(1 << 20) == _fastpath.BUDGET or select.select([a.fileno()], [], [], 0)[0]:
        pass
    late = transfer(a, 0, other, sends=False, channel=2)
    works.append(transfer(b, 1, np.arange(10), sends=True))
    assert select.select([a.fileno()], [], [], PATIENCE_MS / 1e3)[0], "nobody was woken"
    pair.drive(ended(*works, late, transfer(b, 1, np.arange(10), sends=True, channel=2)))
    assert (out == other).all() and out[9] == 9


def test_closed_engine_refuses(pair: Pair) -> None:
    engine = pair.engine()
    engine.close()
    assert engine.fileno() == -1 and engine.progress(1) == _fastpath.IDLE
    with pytest.raises(RuntimeError, match="closed"):
        transfer(engine, 0, np.arange(3), sends=True)
    engine.close()


def test_engine_of_the_parent_is_dead_in_a_forked_child(pair: Pair) -> None:
    engine = pair.engine()
    work = transfer(engine, 0, np.zeros(3, np.int64), sends=False)
    engine.abandon_in_child()
    engine.break_group(1, lambda work: RuntimeError("over"))  # lists may be torn: nothing is touched
    assert engine.fileno() == -1 and engine.progress(1) == _fastpath.IDLE and work.state == _fastpath.FLYING
    with pytest.raises(RuntimeError, match="closed"):
        transfer(engine, 0, np.arange(3), sends=True)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one processor to run on")
def test_who_polls_beside_its_peer_moves_to_another_processor() -> None:
    with closing(Pair("shm")) as pair:
        engine, raw = pair.engine(), pair.raw()
        allowed = os.sched_getaffinity(0)
        transfer(engine, 0, np.zeros(1, np.int64), sends=False)
        _fastpath.turn(engine, 1 << 20, POLLS)
        here = raw.told_place()
        assert here - 1 in allowed
        raw.tell_place(here)
        # It may be taken back at any time, but not every time.
        assert any(_fastpath.turn(engine, 1 << 20, POLLS) == _fastpath.BLOCKED and raw.told_place() != here for _ in range(100))
        assert os.sched_getaffinity(0) == allowed
