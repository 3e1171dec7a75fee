"""What goes wrong, and what the engine makes of it: an event, never a hang, a crash or wrong data. Memory links and seeds.

May live here: disagreements, broken groups, links that end anywhere, garbage, misuse. May not: what a whole runtime makes of the events
(``test_failures``), right results (``test_engine``).
"""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
from simulation import NEVER, SimWorld

from rt import _fastpath, algorithms, algorithms_move
from rt.dtypes import Op, code_of
from rt.schedule import INPUT, TEMP, Collective, Kind, Schedule, Step, Temp

FLYING, DONE, FAILED = _fastpath.FLYING, _fastpath.DONE, _fastpath.FAILED
LOST, CLOSED, MISMATCH, PROTOCOL = _fastpath.LOST, _fastpath.CLOSED, _fastpath.MISMATCH, _fastpath.PROTOCOL
HEADER = struct.Struct("=IBBHQ")
OPEN, DATA, GOODBYE = 1, 2, 4


def kinds(world: SimWorld, rank: int) -> set[int]:
    return {event[0] for event in world.events[rank]}


def settle(world: SimWorld) -> None:
    """Let all engines go on until none moves any more."""
    for _ in range(100_000):
        before = [engine.statistics() for engine in world.engines]
        for _ in range(30):
            for rank in range(world.size):
                world.step(rank)
        if before == [engine.statistics() for engine in world.engines]:
            return
    raise AssertionError("it never comes to rest")


def oops(work: _fastpath.Work) -> Exception:
    return RuntimeError("broken on purpose")


# -- disagreement -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_differing_signatures_are_seen_by_both_and_nothing_lands(order: tuple[int, int]) -> None:
    for capacity in (1, 50, 1 << 16):
        world = SimWorld(2, capacity=capacity, wakes=True)
        outs = [np.full(5, -7) for _ in range(2)]
        works = [
            world.collective(rank, Collective.ALL_REDUCE, np.arange(5), outs[rank], mark=b"first" if rank else b"other") for rank in order
        ]
        settle(world)
        for rank in range(2):
            (event,) = world.events[rank]
            assert event[0] == MISMATCH and event[1] == 1 - rank and event[5] == 0
            assert event[6][4:9] == (b"first" if rank else b"other") and event[7][4:9] == (b"other" if rank else b"first")
        assert all((out == -7).all() for out in outs)
        assert all(work.state == FLYING for work in works)
        for engine in world.engines:
            engine.break_group(1, oops)
        assert all(work.state == FAILED for work in works)


def test_third_rank_does_not_finish_on_one_sides_data() -> None:
    """Rank 1 disagrees with rank 0, from which the broadcast comes; rank 2 agrees and is done; the root must not be."""
    world = SimWorld(3, capacity=1 << 16, wakes=True)
    x = np.arange(5)
    outs = [np.full(5, -7) for _ in range(3)]
    late = world.collective(1, Collective.BROADCAST, x, outs[1], mark=b"differs")
    root = world.collective(0, Collective.BROADCAST, x, outs[0], mark=b"agreed")
    other = world.collective(2, Collective.BROADCAST, x, outs[2], mark=b"agreed")
    settle(world)
    assert late.state == FLYING and (outs[1] == -7).all()
    assert root.state == FLYING and MISMATCH in kinds(world, 0)
    assert other.state == DONE


def test_a_call_that_ended_is_still_compared() -> None:
    """A sender whose data fit the link is done before the receiver posts; it hears of the disagreement later."""
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    x, out = np.arange(3), np.full(3, -7)
    sent = world.submit(0, algorithms_move.send(1, 3, 1, 8), x, None, mark=b"a")
    assert sent.state == DONE
    world.submit(1, algorithms_move.recv(0, 3, 1, 8), None, out, mark=b"b")
    settle(world)
    assert kinds(world, 0) == kinds(world, 1) == {MISMATCH} and (out == -7).all()
    assert world.events[0][0][6][4:5] == b"a"


def test_signatures_of_pairs_are_compared_by_pairs() -> None:
    """Each rank says something else to each peer; only the two that disagree notice, and what they sent each other does not land."""
    size = 4
    for odd in (False, True):
        world = SimWorld(size, capacity=1 << 16, wakes=True)
        outs = [np.full(size, -7) for _ in range(size)]
        for rank in range(size):
            marks = [b"%d to %d" % (min(rank, peer), max(rank, peer)) for peer in range(size)]
            if odd and rank == 2:
                marks[1] = b"differs"
            world.collective(rank, Collective.ALL_TO_ALL, np.arange(size) + 10 * rank, outs[rank], mark=marks, count=1)
        settle(world)
        assert [kinds(world, rank) for rank in range(size)] == ([set(), {MISMATCH}, {MISMATCH}, set()] if odd else [set()] * size)
        assert not odd or (world.events[1][0][6][4:10], world.events[1][0][7][4:11]) == (b"1 to 2", b"differs")
        assert (outs[1][2], outs[2][1]) == ((-7, -7) if odd else (21, 12))
        assert outs[0].tolist() == [0, 10, 20, 30]


# -- broken groups ----------------------------------------------------------------------------------------------------------------------


def test_a_group_breaks_and_its_neighbour_on_the_same_links_goes_on() -> None:
    for seed in range(80):
        dice = random.Random(seed)
        size = dice.randint(2, 4)
        world = SimWorld(size, capacity=dice.choice((7, 30, 200)), seed=seed, frame=dice.choice((16, 1 << 18)), wakes=seed % 2 == 0)
        xs = [np.arange(40) + rank for rank in range(size)]
        outs = [[np.zeros(40, np.int64) for _ in range(size)] for _ in range(2)]
        works = []
        for rank in range(size):
            names = [{"group": group, "channel": group} for group in (1, 2)]
            works.append([world.collective(rank, Collective.ALL_REDUCE, xs[rank].copy(), outs[i][rank], **names[i]) for i in range(2)])
        world.stir(12)
        for rank, engine in enumerate(world.engines):
            engine.break_group(1, oops)
            assert works[rank][0].state != FLYING
            outs[0][rank][:] = -9  # the memory is ours again
            world.stir(4)
        world.run([work for pair in works for work in pair])
        assert all((out == sum(xs)).all() for out in outs[1])
        assert all((out == -9).all() for out in outs[0])
        assert not any(world.events)
        for first, _ in works:
            if first.state == FAILED:
                with pytest.raises(RuntimeError, match="on purpose"):
                    first.outcome()


def test_more_groups_can_fail_at_once_than_anyone_expected() -> None:
    world = SimWorld(2, capacity=1 << 20, wakes=True)
    for group in range(1, 200):
        for rank in range(2):
            world.collective(rank, Collective.BARRIER, None, None, group=group, channel=group, mark=b"%d" % rank)
    settle(world)
    assert {event[3] for event in world.events[0]} == {event[3] for event in world.events[1]} == set(range(1, 200))


def test_goodbye_is_told_apart_from_a_death() -> None:
    for lanes in (1, 2):
        world = SimWorld(2, capacity=100, wakes=True, lanes=lanes)
        out = np.zeros(3, np.int64)
        world.say_goodbye(0)
        work = world.submit(1, algorithms_move.recv(0, 3, 1, 8), None, out)
        settle(world)
        assert kinds(world, 1) == {CLOSED} and work.state == FLYING
        world.engines[1].break_group(1, oops)
        world.say_goodbye(1)
        settle(world)
        assert [engine.goodbyes_missing() for engine in world.engines] == [[], []]


def test_what_was_sent_before_goodbye_is_received() -> None:
    for capacity in (1, 9, 1000):
        world = SimWorld(2, capacity=capacity, wakes=True)
        x, out = np.arange(100), np.zeros(100, np.int64)
        sent = world.submit(0, algorithms_move.send(1, 100, 1, 8), x, None)
        world.say_goodbye(0)
        got = world.submit(1, algorithms_move.recv(0, 100, 1, 8), None, out)
        world.run([sent, got])
        np.testing.assert_array_equal(out, x)
        assert not any(world.events)


# -- links that end ---------------------------------------------------------------------------------------------------------------------


def test_a_link_cut_at_every_byte() -> None:
    """Both ranks end with the right result or hear of the loss."""
    ends = set()
    for cut in range(260):
        for side in range(2):
            world = SimWorld(2, capacity=1 + cut % 50, wakes=True, frame=24)
            end = world.links[side, 1 - side, 0]
            end.outgoing.cut_after = cut
            outs = [np.full(5, -7) for _ in range(2)]
            works = [world.collective(rank, Collective.ALL_REDUCE, np.arange(5) + rank, outs[rank]) for rank in range(2)]
            for _ in range(200):
                for rank in range(2):
                    world.step(rank)
                if end.outgoing.closed and not end.incoming.closed:
                    end.incoming.closed = True  # a cable has two directions
                    for wake in (end.wake, end.wake_peer):
                        wake()
            for rank, work in enumerate(works):
                ends.add(work.state)
                if work.state == DONE:
                    assert outs[rank].tolist() == [1, 3, 5, 7, 9]
                else:
                    assert kinds(world, rank) == {LOST}, f"cut after {cut} bytes from rank {side}, rank {rank}"
    assert ends == {FLYING, DONE}


def test_a_work_does_not_end_well_because_its_peer_died() -> None:
    """What is left to send to a dead peer is not sent, and must not count as sent."""
    world = SimWorld(2, capacity=100, wakes=True)
    work = world.submit(0, algorithms_move.send(1, 1000, 1, 8), np.arange(1000), None)
    for link in (world.links[0, 1, 0], world.links[1, 0, 0]):
        link.outgoing.closed = True
    world.engines[0].ready(0)
    settle(world)
    assert kinds(world, 0) == {LOST} and work.state == FLYING


class Wire:
    """A Python link that delivers given bytes, then ends if ``ends``, and swallows what is sent."""

    def __init__(self, data: bytes, piece: int = 1 << 20, ends: bool = True) -> None:
        self.data, self.piece, self.ends = bytearray(data), piece, ends

    def send(self, data: memoryview) -> int:
        return len(data)

    def recv_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), self.piece, len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return -1 if self.ends and not count else count


def receiver(wire: Any) -> tuple[_fastpath.Engine, list[Any], _fastpath.Work, np.ndarray[Any, Any]]:
    """An engine (rank 1) with an all-reduce of five numbers in flight with whatever is behind ``wire``."""
    engine, events, out = _fastpath.Engine(pollable=False), list[Any](), np.full(5, -7)
    engine.set_event_handler(events.extend)
    engine.add_link(0, wire)
    work = _fastpath.Work()
    program = _fastpath.Program(algorithms.ring_all_reduce(1, 2, 5, 1, 8), code_of(out.dtype), Op.SUM, [1, 0])
    engine.submit(work, program, 1, 1, bytes(64), [0, 1], 2, np.arange(5), out, NEVER)
    for _ in range(1000):
        if engine.progress(NEVER) != _fastpath.BUDGET:
            return engine, events, work, out
    raise AssertionError("it goes round in circles")


def recorded() -> bytes:
    """What rank 0 sends to rank 1 in a whole all-reduce."""
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    heard = bytearray()
    link = world.links[0, 1, 0]
    write = link.outgoing.write
    link.outgoing.write = lambda data: heard.extend(data[: (n := write(data))]) or n  # type: ignore[method-assign, func-returns-value]
    works = []
    for rank in range(2):
        schedule = algorithms.ring_all_reduce(rank, 2, 5, 1, 8)
        works.append(world.submit(rank, schedule, np.arange(5), np.zeros(5, np.int64)))
    world.run(works)
    return bytes(heard)


def test_a_recorded_stream_in_pieces_of_any_size() -> None:
    stream = recorded()
    for piece in range(1, len(stream) + 1):
        _, _, work, out = receiver(Wire(stream, piece))
        assert work.state == DONE and out.tolist() == [0, 2, 4, 6, 8]


def test_garbage_and_mutated_frames() -> None:
    stream = recorded()
    seen = set()
    for seed in range(3000):
        dice = random.Random(seed)
        data = bytearray(stream)
        if seed % 10 == 0:
            data = bytearray(dice.randbytes(dice.randint(0, 300)))
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(data) + 1)
            match dice.randrange(4):
                case 0:
                    data[at : at + 1] = dice.randbytes(1)
                case 1:
                    del data[at : at + dice.randint(1, 40)]
                case 2:
                    data[at:at] = data[at : at + dice.choice((1, 16, 56, 80))]
                case 3:
                    length = dice.choice((0, 8, 64, 1 << 18, 1 << 31))
                    data[at:at] = HEADER.pack(length, dice.randrange(8), dice.randrange(3), dice.randrange(3), 1)
        _, events, work, _ = receiver(Wire(data, dice.choice((1, 17, 1 << 20))))
        seen |= {event[0] for event in events}
        assert work.state == DONE or events
    assert seen == {LOST, CLOSED, MISMATCH, PROTOCOL}


def frame(kind: int, payload: bytes, sequence: int = 0, *, lane: int = 0, channel: int = 1) -> bytes:
    return HEADER.pack(len(payload), kind, lane, sequence, channel) + payload


SIGNATURE = bytes(64)


@pytest.mark.parametrize(
    "stream",
    [
        frame(DATA, bytes(40)),  # before any OPEN
        frame(OPEN, SIGNATURE) * 2,
        frame(OPEN, SIGNATURE[:60]),
        frame(OPEN, SIGNATURE) + frame(DATA, bytes(0)),
        frame(OPEN, SIGNATURE) + frame(DATA, bytes(7)),  # not whole items
        frame(OPEN, SIGNATURE) + frame(DATA, bytes(48)),  # more than the step
        frame(OPEN, SIGNATURE) + frame(DATA, bytes(24)) + frame(DATA, bytes(24)),  # a step and a half
        frame(OPEN, SIGNATURE) + frame(DATA, bytes(40), lane=9),
        frame(DATA, bytes(8), 5) * 5000,  # more unposted data than allowed
        frame(GOODBYE, b"") + frame(OPEN, SIGNATURE),
        frame(GOODBYE, b"x"),
        frame(3, b""),
        HEADER.pack((1 << 18) + 1, DATA, 0, 0, 1),
    ],
    ids=[f"stream{i}" for i in range(13)],
)
def test_frames_that_no_peer_of_this_version_sends(stream: bytes) -> None:
    for piece in (1, 1 << 20):
        _, events, work, out = receiver(Wire(stream, piece))
        assert events[0][0] == PROTOCOL
        assert work.state == FLYING and (out[3:] == -7).all()


def test_early_frames_are_checked_like_all_others() -> None:
    """They wait for their work unread; a wrong length among them must not wait for ever."""
    for wrong in (b"", bytes(7), bytes(48)):
        wire = Wire(frame(OPEN, struct.pack("=I", 1) + SIGNATURE[4:], 1) + frame(DATA, wrong, 1), ends=False)
        engine, events, _, _ = receiver(wire)
        program = _fastpath.Program(algorithms.ring_all_reduce(1, 2, 5, 1, 8), code_of(np.dtype(np.int64)), Op.SUM, [1, 0])
        engine.submit(_fastpath.Work(), program, 1, 1, bytes(64), [0, 1], 2, np.arange(5), np.zeros(5, np.int64), NEVER)
        assert [event[0] for event in events] == [PROTOCOL]


# -- links and callers that misbehave ----------------------------------------------------------------------------------------------------


class Boasting(Wire):
    def send(self, data: memoryview) -> int:
        return len(data) + 1


class Keeping(Wire):
    def send(self, data: memoryview) -> int:
        self.kept = data
        return len(data)


class Failing(Wire):
    def send(self, data: memoryview) -> int:
        raise ZeroDivisionError


class Calling(Wire):
    engine: _fastpath.Engine

    def recv_into(self, buffer: memoryview) -> int:
        self.engine.progress(1)
        return 0


@pytest.mark.parametrize("kind", (Boasting, Failing))
def test_a_faulty_python_link_is_a_lost_link(kind: type[Wire], caplog: pytest.LogCaptureFixture) -> None:
    _, events, _, _ = receiver(kind(b"", ends=False))
    assert [event[0] for event in events] == [LOST] and kind.__name__ in caplog.text


def test_a_view_that_a_python_link_keeps_is_dead() -> None:
    wire = Keeping(b"", ends=False)
    receiver(wire)
    with pytest.raises(ValueError, match="released"):
        bytes(wire.kept)


def test_calling_the_engine_from_its_own_link_is_an_error_not_a_deadlock(caplog: pytest.LogCaptureFixture) -> None:
    engine, events = _fastpath.Engine(pollable=False), list[Any]()
    engine.set_event_handler(events.extend)
    wire = Calling(b"")
    wire.engine = engine
    engine.add_link(0, wire)
    engine.progress(NEVER)
    assert [event[0] for event in events] == [LOST] and "from inside itself" in caplog.text


def test_one_waiter_that_raises_does_not_silence_the_others() -> None:
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    works = [world.collective(0, Collective.BARRIER, None, None, channel=channel) for channel in (1, 2)]
    told = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    works[0].add_waiter(interrupted)
    for i, work in enumerate(works):
        work.add_waiter(lambda i=i: told.append(i))
    for channel in (1, 2):
        world.collective(1, Collective.BARRIER, None, None, channel=channel)
    with pytest.raises(KeyboardInterrupt):
        while True:
            world.step(0)
            world.step(1)
    assert told == [0, 1]


def test_misuse_is_refused_and_leaves_the_engine_usable() -> None:
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    x = np.arange(5)
    work = world.collective(0, Collective.ALL_REDUCE, x, np.zeros(5, np.int64))
    engine, schedule = world.engines[0], algorithms.ring_all_reduce(0, 2, 5, 1, 8)
    program = _fastpath.Program(schedule, code_of(x.dtype), Op.SUM, [0, 1])

    def submit(work: Any, source: Any, target: Any, ranks: list[int]) -> None:
        engine.submit(work, program, 1, 1, bytes(64), ranks, 2, source, target, NEVER)

    with pytest.raises(RuntimeError, match="once"):
        submit(work, x, x.copy(), [0, 1])
    for source, target in ((x[:4], x.copy()), (x, None), (np.arange(10)[::2], x.copy()), (x, list(x))):
        with pytest.raises(ValueError, match="contiguous array of 40 bytes"):
            submit(_fastpath.Work(), source, target, [0, 1])
    for ranks in ([0, 7], [0, -1], [1, 0]):
        with pytest.raises(ValueError, match="no link"):
            submit(_fastpath.Work(), x, x.copy(), ranks)
    with pytest.raises(RuntimeError, match="before anything is sent"):
        engine.add_link(1, Wire(b""))
    bad = Schedule((Step(Kind.SEND, 1, 256, src=INPUT, count=1),), (), "bad")
    with pytest.raises(ValueError, match="lane"):
        _fastpath.Program(bad, code_of(x.dtype), Op.SUM, [0, 1])
    with pytest.raises(ValueError, match="scratch"):
        copy = Step(Kind.COPY, src=INPUT, dst=TEMP, count=9)
        _fastpath.Program(Schedule((copy,), (Temp(8, False),), "bad"), code_of(x.dtype), Op.SUM, [0, 1])
    out = np.zeros(5, np.int64)
    world.run([work, world.collective(1, Collective.ALL_REDUCE, x, out)])
    assert out.tolist() == [0, 2, 4, 6, 8]


def test_an_engine_that_vanishes_fails_its_works() -> None:
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    work = world.collective(0, Collective.ALL_REDUCE, np.arange(5), np.zeros(5, np.int64))
    for link in world.links.values():
        link.wake = link.wake_peer = None
    world.engines.clear()
    with pytest.raises(RuntimeError, match="does not exist any more"):
        work.outcome()
