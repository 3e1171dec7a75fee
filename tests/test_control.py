"""Tests of ``rt.control``, ``rt.blame`` and ``transports.relay``: control threads in one process, and real processes that are killed.

May live here: what happens to a group that has formed. May not: forming one (``test_bootstrap``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from worlds import PATIENCE, Member, config, coordinated, free_ports, only_neighbours, ring, world

from rt.blame import Judge
from rt.bootstrap import bootstrap
from rt.control import Control, Report, Verdict
from transports import tcp
from transports.relay import WINDOW, Relay, RelayPipe

# One rank in a process of its own. Reads commands from stdin, so that the test decides when things happen.
RANK = """
import os, sys
sys.path[:0] = {path!r}
from worlds import Member, only_neighbours, ring
from rt.config import RingConfig
import dataclasses, json

addresses = tuple(tuple((host, port) for host, port in entry) for entry in json.loads(sys.argv[2]))
configs = ring(len(addresses))
near = only_neighbours(len(addresses)) if sys.argv[3] == "near" else None
member = Member(dataclasses.replace(configs[int(sys.argv[1])], addresses=addresses), near)
member.wiring()
print("ready", flush=True)
for command in sys.stdin:
    if command == "fork\\n" or command == "fork and let go\\n":
        if os.fork() == 0:
            if "let go" in command:
                member.control.after_fork_in_child()
            print("forked", flush=True)
            os.read(int(sys.argv[4]), 1)  # longer than its parent: until the test ends it
            os._exit(0)
    elif command == "verdict\\n":
        print(member.verdicts.get(timeout=20).culprit, flush=True)
    elif command == "close\\n":
        member.end()
        print("closed", flush=True)
"""


class Process:
    """A rank in a process of its own."""

    def __init__(self, rank: int, addresses: object, near: bool) -> None:
        here = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
        fd, self._alive = os.pipe()
        arguments = [str(rank), json.dumps(addresses), "near" if near else "all", str(fd)]
        command = [sys.executable, "-W", "ignore", "-c", RANK.format(path=here), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, pass_fds=[fd])
        os.close(fd)

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)


@contextmanager
def mixed_world(size: int, outside: set[int], near: bool = False) -> Iterator[tuple[list[Member], dict[int, Process]]]:
    """A world in which the ranks ``outside`` are processes of their own."""
    configs = ring(size)
    processes = {rank: Process(rank, configs[0].addresses, near) for rank in outside}
    try:
        inside = [each for each in configs if each.rank not in outside]
        with world(inside, only_neighbours(size) if near else None) as members:
            assert all(process.hear() == "ready" for process in processes.values())
            for member in members:
                member.wiring()
            yield members, processes
            for process in processes.values():
                process.end()
    finally:
        for process in processes.values():
            process.end()


def mismatch(group: int, sequence: int = 1, culprit: int = 0) -> Report:
    return Report("mismatch", group, sequence, culprit, f"all_sum #{sequence}", f"rank {culprit} called something else")


def verdicts(members: list[Member]) -> list[Verdict]:
    return [member.verdicts.get(timeout=PATIENCE) for member in members]


def quiet(members: list[Member], group: int) -> None:
    """Assert that the members hear of nothing before the verdict on a report made now."""
    members[0].control.report(mismatch(group))
    assert [verdict.group for verdict in verdicts(members)] == [group] * len(members)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_report_becomes_everybodys_verdict(size: int) -> None:
    with world(coordinated(size) if size > 1 else [config(0, 1)]) as members:
        for member in members:
            assert member.wiring().rank == member.rank
        members[-1].control.report(mismatch(5, culprit=size - 1))
        assert verdicts(members) == [Verdict("mismatch", 5, 1, size - 1, "all_sum #1", f"rank {size - 1} called something else")] * size


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_is_named_by_all_within_a_second(near: bool, victim: int) -> None:
    with mixed_world(4, {victim}, near) as (members, processes):
        processes[victim].signal(signal.SIGKILL)
        killed = time.monotonic()
        found = verdicts(members)
        assert time.monotonic() - killed < 1
        assert [(verdict.kind, verdict.culprit, verdict.group) for verdict in found] == [("lost", victim, 0)] * 3
        assert all(member.byes.empty() for member in members)


@pytest.mark.parametrize("near", [False, True])
def test_ranks_that_die_of_a_verdict_do_not_hide_its_cause(near: bool) -> None:
    """Rank 0 is killed; each survivor but one ends, without a word, on its verdict: the last must blame rank 0 first."""
    with mixed_world(4, {0, 1, 2}, near) as (members, processes):
        processes[0].signal(signal.SIGKILL)
        for rank in (1, 2):
            processes[rank].tell("verdict")
        for rank in (1, 2):
            assert processes[rank].hear() == "0"
            processes[rank].signal(signal.SIGKILL)
        assert verdicts(members)[0].culprit == 0


def test_death_is_seen_while_a_forked_child_keeps_the_sockets_open() -> None:
    with mixed_world(3, {1}) as (members, processes):
        processes[1].tell("fork")
        assert processes[1].hear() == "forked"
        processes[1].signal(signal.SIGKILL)
        killed = time.monotonic()
        found = verdicts(members)
        assert time.monotonic() - killed < 1
        assert [(verdict.kind, verdict.culprit) for verdict in found] == [("lost", 1)] * 2
        assert all(verdict.text.startswith("process ") for verdict in found)


def test_forked_child_that_lets_go_does_not_disturb_its_parent() -> None:
    with mixed_world(3, {1}) as (members, processes):
        processes[1].tell("fork and let go")
        assert processes[1].hear() == "forked"
        processes[1].tell("verdict")
        quiet(members, group=5)
        assert processes[1].hear() == "0"
        processes[1].signal(signal.SIGKILL)  # the child lives on, but the connections end with the parent
        assert all(re.fullmatch(r"lost rank \d+ \(tcp 127.0.0.1:\d+\): connection closed", verdict.text) for verdict in verdicts(members))


def test_stopped_rank_is_not_lost() -> None:
    with mixed_world(3, {2}) as (members, processes):
        processes[2].signal(signal.SIGSTOP)
        quiet(members, group=5)
        processes[2].signal(signal.SIGCONT)
        processes[2].tell("verdict")
        assert processes[2].hear() == "0"


@pytest.mark.parametrize("near", [False, True])
def test_leaving_in_order_is_no_loss(near: bool) -> None:
    with mixed_world(4, {3}, near) as (members, processes):
        processes[3].tell("close")
        assert processes[3].hear() == "closed"
        processes[3].end()
        assert [member.byes.get(timeout=PATIENCE) for member in members] == [3, 3, 3]
        quiet(members, group=5)


def test_two_reports_at_once_have_one_verdict() -> None:
    with world(ring(4), only_neighbours(4)) as members:
        for member in members:
            member.wiring()
        for group in range(1, 40):
            members[1].control.report(mismatch(group, sequence=7, culprit=3))
            members[2].control.report(mismatch(group, sequence=6, culprit=1))
            found = verdicts(members)
            assert len(set(found)) == 1 and found[0].group == group


def test_without_rank_0_the_smallest_report_counts() -> None:
    configs = ring(4)
    with world(configs) as members:
        for member in members:
            member.wiring()
        members[0].control.close(PATIENCE)
        rest = members[1:]
        assert [member.byes.get(timeout=PATIENCE) for member in rest] == [0, 0, 0]
        members[1].control.report(mismatch(5, sequence=7, culprit=3))
        members[3].control.report(mismatch(5, sequence=6, culprit=1))
        assert {(verdict.sequence, verdict.culprit) for verdict in verdicts(rest)} == {(6, 1)}


class Clock(asyncio.SelectorEventLoop):
    """Hands to the judge what it needs of a loop, and tells the time that the test says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay, callback, *args, context=None):  # type: ignore[no-untyped-def, override]
        self.timers.append((self.now + delay, lambda: callback(*args)))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, run in due:
            run()


@pytest.fixture
def clock() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    loop.close()


def test_judge_ignores_consequences(clock: Clock) -> None:
    decided: list[Report] = []
    judge = Judge(False, clock, decided.append)
    judge.hear(Report.of_rank("lost", 3, "the cause"))
    clock.advance(0.15)
    judge.hear(Report.of_rank("lost", 1, "gave up"))
    judge.hear(mismatch(5))
    clock.advance(0.06)
    assert [report.culprit for report in decided] == [3]
    clock.advance(0.2)
    assert [(report.kind, report.culprit) for report in decided[1:]] == [("mismatch", 0), ("lost", 1)]
    judge.hear(mismatch(5, sequence=0))
    clock.advance(1)
    assert len(decided) == 3


def test_judge_ignores_late_reports_of_a_case(clock: Clock) -> None:
    decided: list[Report] = []
    judge = Judge(False, clock, decided.append)
    judge.hear(mismatch(5, sequence=7))
    clock.advance(0.05)
    judge.hear(mismatch(5, sequence=6))
    clock.advance(0.1)
    judge.hear(mismatch(5, sequence=1))
    clock.advance(0.06)
    assert decided == [mismatch(5, sequence=6)]


def test_judge_orders_simultaneous_cases_alike(clock: Clock) -> None:
    reports = [mismatch(9, 4, 2), mismatch(8, 3, 1), Report.of_rank("lost", 0, "x"), mismatch(9, 5, 1)]
    outcomes = set()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        decided: list[Report] = []
        judge = Judge(False, clock, decided.append)
        for index in order:
            judge.hear(reports[index])
            clock.advance(0.02)
        clock.advance(1)
        outcomes.add(tuple(decided))
    assert outcomes == {(reports[1], reports[0], reports[2])}


def test_rank_0s_verdict_overrules(clock: Clock) -> None:
    decided: list[Report] = []
    judge = Judge(False, clock, decided.append)
    judge.hear(mismatch(5, 1, 1))
    judge.settle(mismatch(5, 2, 2))
    clock.advance(1)
    assert decided == [mismatch(5, 2, 2)]


@pytest.mark.parametrize(
    "junk", [b"\xff" * 8, bytes([0, 0, 0, 1, 99, 0, 0, 0, 0]), bytes([0, 0, 0, 2, 2, 0, 0, 0]) + b"[]", b"\0\0\0\1\6\0\0\0\0"]
)
def test_malformed_message_is_a_protocol_error(junk: bytes) -> None:
    configs = ring(3)

    async def stranger() -> None:
        wiring = await bootstrap(configs[2])
        wiring.control[1][1].write(junk)
        await asyncio.to_thread(lambda: found.extend(verdicts(members)))
        for _, writer in wiring.control.values():
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        for sock in (sock for socks in wiring.data.values() for sock in socks):
            sock.close()

    found: list[Verdict] = []
    with world(configs[:2]) as members:
        asyncio.run(stranger())
    assert {(verdict.kind, verdict.culprit) for verdict in found} == {("protocol", 2)}


def test_failing_callback_is_logged_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    heard: concurrent.futures.Future[Verdict] = concurrent.futures.Future()

    def callback(verdict: Verdict) -> None:
        if verdict.group == 1:
            raise ZeroDivisionError
        heard.set_result(verdict)

    control = Control.start(config(0, 1), on_verdict=callback)
    control.ready.result(PATIENCE)
    control.report(mismatch(1))
    control.report(mismatch(2))
    assert heard.result(PATIENCE).group == 2
    control.close(PATIENCE)
    assert "a callback of the control thread failed" in caplog.text


def test_close_again_from_callbacks_and_before_ready() -> None:
    (port,) = free_ports(1)
    lonely = Control.start(config(1, 2, coordinator=("127.0.0.1", port)), on_verdict=lambda verdict: None)
    lonely.close(PATIENCE)
    assert lonely.ready.cancelled()
    lonely.close(PATIENCE)
    lonely.report(mismatch(1))

    given_up = Control.start(config(1, 2, coordinator=("127.0.0.1", port)), on_verdict=lambda verdict: None)
    assert given_up.ready.cancel()
    given_up.close(PATIENCE)

    closed = threading.Event()
    own = Control.start(config(0, 1), on_verdict=lambda verdict: (own.close(PATIENCE), closed.set())[0])
    own.ready.result(PATIENCE)
    own.report(mismatch(1))
    assert closed.wait(PATIENCE)
    own.close(PATIENCE)


@pytest.mark.parametrize("near", [False, True])
def test_close_is_quick_among_the_living(near: bool) -> None:
    with world(ring(4), only_neighbours(4) if near else None) as members:
        for member in members:
            member.wiring()
        for member in members:
            began = time.monotonic()
            member.control.close(PATIENCE)
            assert time.monotonic() - began < 1
        assert all(member.verdicts.empty() for member in members)


def test_close_does_not_wait_for_a_stopped_rank_longer_than_it_was_told() -> None:
    with mixed_world(2, {1}) as (members, processes):
        processes[1].signal(signal.SIGSTOP)
        members[0].end(timeout=0.1)
        processes[1].signal(signal.SIGCONT)
        processes[1].tell("close")
        assert processes[1].hear() == "closed"


def exchange(pipe: RelayPipe, outgoing: bytes, expected: int) -> bytes:
    """Send and receive at once over one pipe, sleeping when neither is possible; what came is returned."""
    awake = threading.Event()
    pipe.wake = awake.set
    rest, arrived = memoryview(outgoing), bytearray()
    while rest or len(arrived) < expected:
        awake.clear()
        sent = pipe.send(rest) if rest else 0
        rest = rest[sent:]
        buffer = memoryview(bytearray(50_000))
        count = pipe.recv_into(buffer) if len(arrived) < expected else 0
        arrived += buffer[: max(count, 0)]
        if not sent and count <= 0:
            assert awake.wait(PATIENCE)
    return bytes(arrived)


@pytest.mark.parametrize(("size", "a", "b"), [(4, 0, 2), (5, 3, 0), (5, 0, 1)])
def test_relay_carries_both_ways(size: int, a: int, b: int) -> None:
    source = random.Random(size)
    there, back = source.randbytes(3 * WINDOW + 12345), source.randbytes(2 * WINDOW + 1)
    with world(ring(size), only_neighbours(size)) as members, concurrent.futures.ThreadPoolExecutor() as threads:
        for member in members:
            member.wiring()
        one = threads.submit(exchange, members[a].control.relay(b), there, len(back))
        other = threads.submit(exchange, members[b].control.relay(a), back, len(there))
        assert other.result(PATIENCE) == there
        assert one.result(PATIENCE) == back


def test_relay_window_end_and_rest() -> None:
    with world(ring(4), only_neighbours(4)) as members:
        for member in members:
            member.wiring()
        woken, landed = threading.Event(), threading.Event()
        out, back = members[1].control.relay(3), members[3].control.relay(1)
        out.wake, back.wake = woken.set, landed.set
        data = memoryview(bytes(range(256)) * (WINDOW // 128))
        assert back.recv_into(memoryview(bytearray(9))) == 0
        assert out.send(data) == WINDOW
        assert out.send(data) == 0
        assert landed.wait(PATIENCE)
        buffer, filled = memoryview(bytearray(WINDOW)), 0
        while filled < WINDOW:
            landed.clear()
            filled += (got := back.recv_into(buffer[filled:]))
            assert got or landed.wait(PATIENCE)
        assert buffer == data[:WINDOW]
        assert woken.wait(PATIENCE)
        assert out.send(data[:1000]) == 1000
        members[1].control.close(PATIENCE)  # what was sent arrives before the end
        rest = bytearray()
        while (got := back.recv_into(buffer)) >= 0:
            landed.clear()
            rest += buffer[:got]
            assert got or landed.wait(PATIENCE)
        assert rest == data[:1000]
        with pytest.raises(BrokenPipeError):
            back.send(data)
        with pytest.raises(ValueError, match="rank 3 is none of the other ranks of a world of 4"):
            members[3].control.relay(3)


def test_relay_ends_when_the_rank_between_is_lost() -> None:
    with mixed_world(4, {1}, near=True) as (members, processes):
        pipe = members[0].control.relay(2)
        ended = threading.Event()
        pipe.wake = ended.set
        processes[1].signal(signal.SIGKILL)
        assert ended.wait(PATIENCE)
        assert pipe.recv_into(memoryview(bytearray(1))) == -1
        with pytest.raises(BrokenPipeError, match="rank 2 has left, or a rank on the way"):
            pipe.send(memoryview(b"x"))
        assert members[0].control.relay(3).send(memoryview(b"x")) == 1


def test_relay_refuses_more_than_its_window() -> None:
    sent: list[tuple[int, int, bytes]] = []
    a, b = (Relay(rank, 4, lambda *frame: sent.append(frame), lambda run, *args: run(*args), None) for rank in (0, 2))
    a.pipe(2).send(memoryview(bytes(WINDOW)))
    for _, kind, payload in sent:
        b.on_frame(kind, payload)
    with pytest.raises(ValueError, match="rank 0 relayed more than"):
        b.on_frame(*sent[0][1:])
    a.end([2])
    b.on_frame(*sent[-1][1:])
    with pytest.raises(ValueError, match="in a world of 4"):
        b.on_frame(sent[0][1], b"\0\0\0\7" + sent[0][2][4:])


def test_report_survives_the_wire_and_nothing_else_does() -> None:
    report = mismatch(2**64 - 1, 2**63 - 1, -1)
    assert Report.unpack(report.pack()) == report
    assert len(Report("lost", 0, 0, 0, "w", "x" * 10**6).pack()) < tcp.MAX_FRAME
    for payload in (b"", b"{}", b"[]", b'["lost",0,0,0,"",0]', b'["odd",0,0,0,"",""]', b'["lost",true,0,0,"",""]', b"\xff"):
        with pytest.raises(ValueError):
            Report.unpack(payload)
