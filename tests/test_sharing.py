"""Shared memory between ranks: who shares, who does not, what a rank leaves behind, and networks where some pairs share.

May live here: memory from its making to its end, over tasks of one loop and over real processes. May not: the ring (``test_ring``), what
every link must do (``test_links``); collectives and failures as such run over shared memory in their own tests (``ranks.FRONTS``).
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
from ranks import FRONTS, Ranks, results
from test_bootstrap import check, dismantle, form
from test_links import Pair, transfer
from worlds import coordinated, only_neighbours, ring

from rt import _fastpath
from rt.errors import PeerLostError
from transports import shm

pytestmark = pytest.mark.skipif(not shm.SUPPORTED, reason="memory is shared on Linux only")


SIZE = shm.stride(1 << 16)

# --- passing memory ------------------------------------------------------------------------------------------------------------------


def exchange(offered: Any, accepted: Any) -> list[Any]:
    """Run both ends of a Unix socket pair."""

    async def main() -> list[Any]:
        with closing(near), closing(far):
            async with asyncio.timeout(20):
                return await asyncio.gather(offered(near), accepted(far), return_exceptions=True)

    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    return asyncio.run(main())


def test_both_ends_hold_the_same_memory_all_zero() -> None:
    fds = exchange(lambda sock: shm.offer(sock, SIZE), lambda sock: shm.accept(sock, SIZE))
    with mmap.mmap(fds[0], 0) as here, mmap.mmap(fds[1], 0) as there:
        assert len(here) == len(there) == SIZE and not any(there[:4096])
        here[5] = 7
        assert there[5] == 7
    for fd in fds:
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)  # who maps it would be killed
        os.close(fd)


@pytest.mark.parametrize("wrong", ["size", "no descriptor", "another memory", "silence"])
def test_what_is_no_shared_memory_is_refused_and_closed(wrong: str) -> None:
    async def dishonest(sock: socket.socket) -> None:
        fd = shm.make(2 * SIZE if wrong == "size" else SIZE)
        proof = os.urandom(32)
        if wrong == "size":
            os.pwrite(fd, proof, 0)
        if wrong == "silence":
            sock.close()
        else:
            socket.send_fds(sock, [b"rtSM" + proof], [] if wrong == "no descriptor" else [fd])
        os.close(fd)

    before = set(os.listdir("/proc/self/fd"))
    _, found = exchange(dishonest, lambda sock: shm.accept(sock, SIZE))
    assert isinstance(found, OSError), found
    assert set(os.listdir("/proc/self/fd")) <= before


def test_an_acceptor_that_answers_wrongly_gets_no_memory() -> None:
    async def wrong(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(sock, 100)
        sock.send(b"rtOK")

    found, _ = exchange(lambda sock: shm.offer(sock, SIZE), wrong)
    assert isinstance(found, OSError)


@pytest.mark.parametrize(
    ("ranks", "links", "expected"), [(2, 1, 1 << 20), (8, 1, 1 << 20), (16, 1, 1 << 18), (8, 4, 1 << 18), (200, 1, 1 << 16)]
)
def test_the_rings_of_a_host_stay_within_bounds(ranks: int, links: int, expected: int) -> None:
    assert shm.ring_bytes(ranks, links) == expected


# --- who shares ----------------------------------------------------------------------------------------------------------------------


def form_and_check(configs: list[Any], connections: int = 1, reachable: Any = None) -> list[set[int]]:
    """Form a world; return for each rank the peers with which it shares memory, after a look into it."""

    async def main() -> list[set[int]]:
        wirings = await form(configs, reachable)
        await check(wirings, set(wirings[0].direct), connections)
        shared = [set(wiring.memory) for wiring in wirings]
        for a, peers in enumerate(shared):
            for b in peers:
                (mine, first), (theirs, second) = wirings[a].memory[b], wirings[b].memory[a]
                assert first != second
                with mmap.mmap(mine, 0) as here, mmap.mmap(theirs, 0) as there:
                    assert len(here) == connections * shm.stride(wirings[a].ring_bytes)
                    here[100 + a] = 1
                    assert there[100 + a] == 1
        for wiring in wirings:
            for fd, _ in wiring.memory.values():
                os.close(fd)
        await dismantle(wirings)
        return shared

    return asyncio.run(main())


def test_ranks_of_one_host_share() -> None:
    before = set(os.listdir("/proc/self/fd"))
    assert form_and_check(ring(4, shm=True)) == [{0, 1, 2, 3} - {rank} for rank in range(4)]
    assert set(os.listdir("/proc/self/fd")) <= before


def test_several_connections_share_one_memory() -> None:
    assert form_and_check(ring(2, connections=3, shm=True), 3) == [{1}, {0}]


def test_only_connected_ranks_share() -> None:
    shared = form_and_check(ring(5, shm=True), reachable=only_neighbours(5))
    assert shared == [{(rank - 1) % 5, (rank + 1) % 5} for rank in range(5)]


def test_a_rank_that_does_not_want_to_share() -> None:
    configs = coordinated(3, shm=True)
    configs[1] = replace(configs[1], shm=False)
    assert form_and_check(configs) == [{2}, set(), {0}]


def test_an_acceptor_that_is_deaf_means_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(sock: socket.socket, nbytes: int) -> int:
        raise OSError("this rank can not map it")

    monkeypatch.setattr(shm, "accept", deaf)
    assert form_and_check(coordinated(2, shm=True)) == [set(), set()]


async def links(rt: Any, group: Any, ctl: Any) -> list[str]:
    await rt.all_sum(np.ones(1000))
    return [link.split()[0] for _, link in sorted(group._core.world.links().items())]


@pytest.mark.parametrize(("value", "expected"), [(None, "shm"), ("1", "shm"), ("0", "tcp")])
def test_rt_shm(value: str | None, expected: str) -> None:
    assert results(3, links, env={"RT_SHM": value}) == [[expected] * 2] * 3


async def without(rt: Any, group: Any, ctl: Any) -> list[str]:
    return await links(rt, await rt.init(shm=False), ctl)


def test_init_can_turn_it_off() -> None:
    assert results(2, without, init=False, env={"RT_SHM": None}) == [["tcp"]] * 2


# --- what is left behind -------------------------------------------------------------------------------------------------------------


def holdings() -> tuple[int, int]:
    """Descriptors, and mappings of shared memory."""
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:rt")


async def again_and_again(rt: Any, group: Any, ctl: Any, times: int) -> list[Any]:
    found = []
    for _ in range(times):
        await rt.close()
        await rt.init()
        assert (await rt.all_sum(np.ones(100_000)))[-1] == 2
        assert holdings()[1] == 1
        found.append(holdings()[0])
    await rt.close()
    return [found, holdings()[1]]


def test_closing_gives_memory_and_descriptors_back() -> None:
    """The coordinator's inherited socket is taken anew each time."""
    for found, maps in results(2, again_and_again, args=(5,), env={"RT_SHM": "1"}):
        assert len(set(found)) == 1 and maps == 0


def test_memory_stays_while_another_thread_polls_it() -> None:
    """A read of memory that is gone kills the process."""
    with closing(Pair("shm")) as pair:
        engine = pair.engine()
        work = transfer(engine, 0, np.zeros(10, np.int64), sends=False)
        engine.progress(1)  # after this nothing but the memory can end a poll

        def alone() -> bool:
            raise AssertionError("the poll was to outlast the test")

        def poll() -> None:
            _fastpath.wait(engine, work, _fastpath.Sleeper(), -1.0, 1.0, alone)

        thread = threading.Thread(target=poll)
        thread.start()
        while not engine.watching:
            pass
        engine.break_group(1, lambda _: RuntimeError("over"))
        engine.close()
        thread.join()
        assert holdings()[1] == 0 and work.state == _fastpath.FAILED


async def killed_at_random(rt: Any, group: Any, ctl: Any) -> str:
    x = np.ones(1 << 20, np.float32)
    ctl.tell("started")
    try:
        while True:
            await rt.all_sum(x)
    except PeerLostError as error:
        return f"{error.culprit}"


KILLS = 20


@pytest.mark.parametrize("front", FRONTS)
def test_random_kills_are_noticed(front: str) -> None:
    """Of 2 or 3 ranks; the others notice within a second."""
    dice = random.Random(front)
    for _ in range(KILLS):
        size = dice.choice((2, 3))
        victim = dice.randrange(size)
        with Ranks(size, killed_at_random, front=front, env={"RT_SHM": "1"}) as ranks:
            for rank in range(size):
                ranks.hear(rank)
            until = time.monotonic() + dice.random() * 0.02
            while time.monotonic() < until:
                pass
            killed = time.monotonic()
            ranks.processes[victim].send_signal(signal.SIGKILL)
            outcomes = [outcome for outcome in ranks.wait(20) if outcome.rank != victim]
            assert time.monotonic() - killed < 3  # the survivors' exit and the way of the news included
        assert [outcome.value for outcome in outcomes] == [str(victim)] * (size - 1), outcomes


SURVIVOR = """
import os, random, socket, subprocess, sys, threading
import numpy as np
import rt.sync as rt

x = np.ones(1 << 18)
victim = "import numpy, rt.sync as rt; rt.init(); x = numpy.ones(1 << 18)\\nwhile True: rt.all_sum(x)"
dice = random.Random(5)
listener = socket.create_server(("127.0.0.1", 0))
os.environ |= {"RT_WORLD_SIZE": "2", "RT_COORDINATOR": f"127.0.0.1:{listener.getsockname()[1]}", "RT_SHM": "1"}
for _ in range(int(sys.argv[1])):
    process = subprocess.Popen([sys.executable, "-c", victim], env={**os.environ, "RT_RANK": "1"})
    os.environ |= {"RT_RANK": "0", "RT_COORDINATOR_FD": str(listener.fileno())}
    group = rt.init()
    assert group._core.world.shared == {(0, 1)}
    del os.environ["RT_COORDINATOR_FD"]
    timer = threading.Timer(dice.random() * 0.02, process.kill)
    timer.start()
    try:
        while True:
            rt.all_sum(x)
    except rt.PeerLostError as error:
        assert error.culprit == 1
    timer.join()
    process.wait()
    rt.close()
    with open("/proc/self/maps") as maps:
        print(len(os.listdir("/proc/self/fd")), maps.read().count("memfd:rt"))
"""


def test_who_survives_random_kills_holds_what_it_held_before() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RT_")} | {"RT_SECRET": "0123456789abcdef" * 4}
    done = subprocess.run([sys.executable, "-c", SURVIVOR, str(KILLS)], env=environ, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == KILLS and set(lines[1:]) == {lines[0]} and lines[0].endswith(" 0"), lines


# --- two hosts with two ranks each ---------------------------------------------------------------------------------------------------


async def mixed(rt: Any, group: Any, ctl: Any) -> list[str]:
    x = np.arange(100_003, dtype=np.float64) + group.rank()
    total = await rt.all_sum(x)
    assert (total == 4 * np.arange(100_003) + 6).all()
    assert (await rt.all_gather(x[:1000])).shape == (4000,)
    assert (await rt.broadcast(x, 3))[0] == 3
    small = await rt.all_sum(np.ones(3, np.int32))
    assert small.tolist() == [4] * 3
    return await links(rt, group, ctl)


@pytest.mark.namespaces
@pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")
@pytest.mark.parametrize("front", FRONTS)
def test_ranks_share_within_a_host_and_use_tcp_across(front: str) -> None:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30")) as (left, right):
        on = [left.command(), left.command(), right.command(), right.command()]
        env: dict[str, str | None] = {"RT_COORDINATOR": "10.1.0.1:5000", "RT_COORDINATOR_FD": None, "RT_SHM": "1"}
        with Ranks(4, mixed, front=front, on=on, env=env) as ranks:
            found = [outcome.value or str(outcome) for outcome in ranks.wait(60)]
    assert found == [["shm", "tcp", "tcp"]] * 2 + [["tcp", "tcp", "shm"]] * 2

