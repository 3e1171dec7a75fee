"""What ends a group before its time: a killed rank, a time limit, ``abort()``; and what must not: a rank that merely does nothing.

May live here: real processes that are killed, stopped or late, under every front end, and the promised deadlines. May not: orderly exits
(``test_exit``), disagreements (``test_mismatch``), the control thread alone (``test_control``).

Times are of one clock for all processes of a host, so the test says when it killed and the ranks say when they knew.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks

from rt.aio import within
from rt.errors import CollectiveTimeoutError, GroupAbortedError, GroupBrokenError, PeerLostError

LARGE = 16 << 20  # items: 64 MiB of float32
DEATH_SECONDS = 1.0
AT_ONCE = 0.1

Told = tuple[str, int | None, str, float, list[tuple[str, int | None, float]]]


async def until_broken(step: Callable[[], Any]) -> GroupBrokenError:
    """Make calls until the group breaks."""
    with pytest.raises(GroupBrokenError) as caught:
        while True:
            await step()
    return caught.value


async def later_calls(group: Any) -> list[tuple[str, int | None, float]]:
    """Kind, culprit and seconds of calls on a broken group."""
    x = np.ones(1000, np.float32)
    found = []
    for call in (lambda: group.all_sum(x), group.barrier, lambda: group.send(x, (group.rank() + 1) % group.size())):
        began = time.monotonic()
        with pytest.raises(GroupBrokenError) as caught:
            await call()
        found.append((type(caught.value).__name__, caught.value.culprit, time.monotonic() - began))
        assert re.match(r"rank \d+/\d+( of [^:]+)?: \w+ \([^)]*\): the group failed earlier: ", str(caught.value)), "not this call's fault"
    return found


async def told(error: GroupBrokenError, group: Any) -> Told:
    at = time.monotonic()
    return type(error).__name__, error.culprit, str(error), at, await later_calls(group)


def check(found: Told, kind: str, culprit: int, since: float, within: float) -> None:
    name, named, text, at, later = found
    assert (name, named) == (kind, culprit), text
    assert at - since < within, f"{at - since:.3f} s: {text}"
    assert all((name, named) == (kind, culprit) and seconds < AT_ONCE for name, named, seconds in later), later


def fork_a_sleeper() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist; the child does nothing
        child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    return child


# -- kill -9 ------------------------------------------------------------------------------------------------------------------------------


async def reduce_for_ever(rt: Any, group: Any, ctl: ranks.Ctl, forking: int | None, absent: int | None) -> Told:
    """All-reduce 64 MiB until somebody dies; ``forking`` has a child alive, ``absent`` is in user code and comes back when told."""
    x, out = np.ones(LARGE, np.float32), np.empty(LARGE, np.float32)
    assert (await group.all_sum(x, out=out))[-1] == group.size()
    if group.rank() == forking:
        fork_a_sleeper()
    ctl.tell("go")
    began = 0.0
    if group.rank() == absent:
        ctl.hear()
        began = time.monotonic()
    found = await told(await until_broken(lambda: group.all_sum(x, out=out)), group)
    return (*found[:3], found[3] - began, found[4]) if began else found


def kill_in_all_reduce(front: str, victim: int, *, size: int = 3, forked: bool = False, absent: int | None = None) -> None:
    with ranks.Ranks(size, reduce_for_ever, front=front, args=(victim if forked else None, absent)) as world:
        for rank in range(size):
            world.hear(rank)
        killed = time.monotonic()
        world.processes[victim].kill()
        if absent is None:
            outcomes = world.wait()
        else:
            for rank in set(range(size)) - {victim, absent}:
                assert world.processes[rank].wait(30) == 0
            world.tell(absent, "wake up")
            outcomes = world.wait()
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None and outcome.returncode == 0, "\n".join(map(str, outcomes))
            since, within = (0.0, AT_ONCE) if outcome.rank == absent else (killed, DEATH_SECONDS)
            check(outcome.value, "PeerLostError", victim, since, within)
            assert outcome.stderr == ""


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_in_a_64_mib_all_reduce(victim: int, front: str) -> None:
    kill_in_all_reduce(front, victim)


@pytest.mark.parametrize("front", ["sync", "asyncio"])
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_one_of_two(victim: int, front: str) -> None:
    kill_in_all_reduce(front, victim, size=2)


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("victim", [0, 2])
def test_kill_with_a_forked_child_alive(victim: int, front: str) -> None:
    kill_in_all_reduce(front, victim, forked=True)


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("victim", [1, 2])
def test_kill_while_rank_0_is_in_user_code(victim: int, front: str) -> None:
    kill_in_all_reduce(front, victim, absent=0)


async def wait_for_the_lost(rt: Any, group: Any, ctl: ranks.Ctl, call: str) -> Told:
    """Be idle in the middle of a call when the peer dies."""
    ctl.tell("go")
    if group.rank() == 1:
        ctl.hear()
    large = np.ones(LARGE, np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "barrier": group.barrier,
        "broadcast": lambda: group.broadcast(large[:4], 1),
        "recv": lambda: group.recv((4,), np.float32, 1),
        "send": lambda: group.send(large, 1),
    }
    return await told(await until_broken(calls[call]), group)


@pytest.mark.parametrize("front", ["sync", "asyncio", "uvloop"])
@pytest.mark.parametrize("call", ["barrier", "broadcast", "recv", "send"])
def test_kill_of_a_rank_that_is_waited_for(call: str, front: str) -> None:
    with ranks.Ranks(2, wait_for_the_lost, front=front, args=(call,)) as world:
        for rank in range(2):
            world.hear(rank)
        killed = time.monotonic()
        world.processes[1].kill()
        outcome = world.wait()[0]
    assert outcome.error is None, str(outcome)
    check(outcome.value, "PeerLostError", 1, killed, DEATH_SECONDS)


async def lose_a_subgroup(rt: Any, group: Any, ctl: ranks.Ctl) -> Any:
    """Ranks 0, 1 and ranks 2, 3 have groups; rank 3 dies."""
    half = await group.split(group.rank() // 2)
    pair = await group.split(group.rank() % 2)  # 0, 2 and 1, 3
    x = np.full(1000, group.rank(), np.float32)
    await half.all_sum(x)
    ctl.tell("go")
    if group.rank() == 3:
        ctl.hear()
    if group.rank() == 2:
        found = await told(await until_broken(half.barrier), half)
    else:
        found = await told(await until_broken(group.barrier), group)
    sums = []
    for mine in (half, pair):
        try:
            sums.append([float((await mine.all_sum(x))[0]) for _ in range(100)][-1])
        except PeerLostError as error:
            sums.append(error.culprit)
    return found, sums


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_group_without_the_lost_rank_goes_on(front: str) -> None:
    with ranks.Ranks(4, lose_a_subgroup, front=front) as world:
        for rank in range(4):
            world.hear(rank)
        killed = time.monotonic()
        world.processes[3].kill()
        outcomes = world.wait()[:3]
    assert all(outcome.error is None and outcome.returncode == 0 for outcome in outcomes), "\n".join(map(str, outcomes))
    for outcome in outcomes:
        check(outcome.value[0], "PeerLostError", 3, killed, DEATH_SECONDS)
    assert [outcome.value[1] for outcome in outcomes] == [[1.0, 2.0], [1.0, 3], [3, 2.0]]


# -- a rank that does nothing is not lost -------------------------------------------------------------------------------------------------


async def send_to_the_silent(rt: Any, group: Any, ctl: ranks.Ctl) -> bool:
    """Ranks 0 and 2 send to rank 1 what does not fit on the way."""
    large = np.arange(LARGE, dtype=np.float32)
    ctl.tell("go")
    if group.rank() == 1:
        ctl.hear()
        right = all([bool((await group.recv_like(large, source) == large).all()) for source in (0, 2)])
    else:
        right = (await group.send(large, 1)) is large
    return right and (await group.all_sum(np.float32(1))) == 3


# No time limit of the runtime that judges ranks is longer than a second; what TCP itself may do is set on the control connections only.
SILENCE_SECONDS = 3.0


@pytest.mark.parametrize("front", ["sync", "asyncio"])
@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_sleeps_is_not_lost(how: str, front: str) -> None:
    with ranks.Ranks(3, send_to_the_silent, front=front) as world:
        for rank in range(3):
            world.hear(rank)
        if how == "stopped":
            world.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(SILENCE_SECONDS)
        assert all(process.poll() is None for process in world.processes), "a rank gave up"
        world.processes[1].send_signal(signal.SIGCONT)
        world.tell(1, "go on")
        outcomes = world.wait()
    assert [outcome.value for outcome in outcomes] == [True] * 3, "\n".join(map(str, outcomes))


# -- timeout ------------------------------------------------------------------------------------------------------------------------------


async def time_limit(rt: Any, group: Any, ctl: ranks.Ctl, own: float | None) -> Told:
    """Rank 1 does not come; only rank 0 has a limit of its own."""
    x = np.ones(LARGE, np.float32)
    await group.barrier(timeout=30)
    began = time.monotonic()
    if group.rank() == 1:
        ctl.tell("computing")
        ctl.hear()
        began = time.monotonic()
    limit = {"timeout": own} if group.rank() == 0 and own else {}
    with pytest.raises(TimeoutError) as caught:
        await group.all_sum(x, **limit)
    assert isinstance(caught.value, CollectiveTimeoutError)
    found = await told(caught.value, group)
    return (*found[:3], found[3] - began, found[4])


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("whose", ["call", "group"])
def test_timeout(whose: str, front: str) -> None:
    limit = 0.4
    env = {"RT_TIMEOUT": str(limit)} if whose == "group" else {}
    with ranks.Ranks(3, time_limit, front=front, args=(limit if whose == "call" else None,), env=env) as world:
        world.hear(1)
        for rank in (0, 2):
            assert world.processes[rank].wait(30) == 0, str(world.wait()[rank])
        world.tell(1, "go on")
        outcomes = world.wait()
    assert all(outcome.error is None for outcome in outcomes), "\n".join(map(str, outcomes))
    for outcome in outcomes:
        check(outcome.value, "CollectiveTimeoutError", 1, 0.0, AT_ONCE if outcome.rank == 1 else limit + 1.0)
        assert "waits for rank" in outcome.value[2] and f"not done {limit:g} s after rank" in outcome.value[2]
    assert min(outcome.value[3] for outcome in outcomes[::2]) >= limit * 0.9, "not before its time"


async def ample_time(rt: Any, group: Any, ctl: ranks.Ctl) -> float:
    """Limits that are kept leave nothing behind."""
    total = 0.0
    for _ in range(300):
        total += float(await group.all_sum(np.float32(1), timeout=0.2))
    until = time.monotonic() + 0.3
    while float(await group.all_min(until - time.monotonic(), timeout=30)) > 0:
        pass
    return total


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_timeout_that_is_kept_leaves_nothing_behind(front: str) -> None:
    assert ranks.results(2, ample_time, front=front) == [600.0, 600.0]


# -- abort --------------------------------------------------------------------------------------------------------------------------------


async def aborted(rt: Any, group: Any, ctl: ranks.Ctl, how: str) -> Told:
    """Ranks 0 and 1 wait for rank 2, which never calls; rank 1 aborts from another thread, rank 2 from where it is."""
    x = np.ones(LARGE, np.float32)
    await group.barrier()
    ctl.tell("go")
    if (group.rank() == 1) == (how == "thread"):
        if how == "thread":
            threading.Thread(target=lambda: (ctl.hear(), group.abort())).start()
    if group.rank() == 2:
        ctl.hear()
        if how == "caller":
            group.abort()
        elif how == "module":
            rt.abort()
    found = await told(await until_broken(lambda: group.all_sum(x)), group)
    return found


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("how", ["thread", "caller", "module"])
def test_abort(how: str, front: str) -> None:
    with ranks.Ranks(3, aborted, front=front, args=(how,)) as world:
        for rank in range(3):
            world.hear(rank)
        began = time.monotonic()
        culprit = 1 if how == "thread" else 2
        world.tell(culprit, "abort")
        if how == "thread":
            for rank in (0, 1):
                assert world.processes[rank].wait(30) == 0
            world.tell(2, "go on")
        outcomes = world.wait()
    assert all(outcome.error is None for outcome in outcomes), "\n".join(map(str, outcomes))
    for outcome in outcomes:
        late = how == "thread" and outcome.rank == 2
        check(outcome.value, "GroupAbortedError", culprit, outcome.value[3] if late else began, DEATH_SECONDS)
        assert f"rank {culprit} called abort()" in outcome.value[2]


async def nobody_awaits(rt: Any, group: Any, ctl: ranks.Ctl, then: str) -> None:
    """Rank 1 dies; rank 0 has called and awaits nothing, or it does, or it calls once more, on this group or another, or has called
    abort() itself."""
    other = await group.split(0)
    await group.barrier()
    if group.rank() == 1:
        if then != "abort":
            os._exit(1)
        with pytest.raises(GroupAbortedError):
            await group.recv(3, np.float64, 0)
        return
    work = group.all_sum(np.ones(3))
    if then == "abort":
        group.abort()
    ended = asyncio.Event()
    if work.add_waiter(within(asyncio.get_running_loop(), ended.set)):
        await ended.wait()
    if then in ("await", "call", "other"):
        with pytest.raises(PeerLostError):
            await (work if then == "await" else (group if then == "call" else other).barrier())


@pytest.mark.parametrize("then", ["nothing", "await", "call", "other", "abort"])
def test_a_failure_that_nobody_awaits_is_logged_at_the_end(then: str) -> None:
    first, _ = ranks.run(2, nobody_awaits, front="asyncio", args=(then,))
    assert first.error is None and first.returncode == 0, str(first)
    said = r"rank 0/2: all_sum #2 \(float64, 24 B\): lost rank 1 .* \(nobody awaited the call\)\n"
    assert re.fullmatch(said if then == "nothing" else "", first.stderr), first.stderr


async def abort_a_part(rt: Any, group: Any, ctl: ranks.Ctl) -> tuple[str, float]:
    part = await group.split(0)
    if group.rank() == 0:
        part.abort()
    with pytest.raises(GroupAbortedError) as caught:
        await part.all_sum(np.ones(10))
    return caught.value.group, float(await group.all_sum(1.0))


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_abort_of_one_group_leaves_the_others(front: str) -> None:
    assert ranks.results(3, abort_a_part, front=front) == [("world.split(color=0)", 3.0)] * 3


async def leave_after_a_part_failed(rt: Any, group: Any, ctl: ranks.Ctl) -> str:
    part = await group.split(0)  # of all ranks, and yet not the world
    if group.rank() == 0:
        part.abort()
    with pytest.raises(GroupAbortedError):
        await part.all_sum(np.ones(10))
    until, over = time.monotonic() + 0.5, group.rank() == 2
    while not over:  # rank 2 leaves meanwhile
        late = float(time.monotonic() > until)
        over = bool(late + await group.sendrecv(np.full((), late), 1 - group.rank(), 1 - group.rank()))
    return "well"


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_rank_whose_part_failed_leaves_the_world_in_order(front: str) -> None:
    assert ranks.results(3, leave_after_a_part_failed, front=front) == ["well"] * 3
