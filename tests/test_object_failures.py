"""Python objects between ranks when things go wrong: cancelled awaits, objects that cannot travel, disagreement, death, strangers.

May live here: failures of the object calls over real processes, under every front end. May not: what arrives when nothing fails
(``test_objects``), failures as such (``test_failures``, ``test_mismatch``).
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import signal
import time
from typing import Any

import numpy as np
import pytest
import ranks
from test_objects import fronts, loops, pattern

import rt
from rt.objects import HEADER_BYTES, OUT_OF_BAND_BYTES

# ---- cancelling -----------------------------------------------------------------------------------------------------------------------


async def long_run(rt: Any, group: Any, ctl: ranks.Ctl, steps: int) -> tuple[int, int]:
    """Some calls in flight; some awaits cancelled at some time, and their arrays overwritten at once. Returns (right, cancelled)."""
    common, dice = random.Random(1), random.Random(group.rank())
    rank, size = group.rank(), group.size()
    right = cancelled = 0
    for first in range(0, steps, 4):
        calls = []
        for number in range(first, first + 4):
            nbytes = common.choice((10, 3000, 6000, 70_000, 1 << 20, 3 << 20))
            mine = pattern(nbytes, number + rank)
            root = common.randrange(size)
            kind = common.choice(("broadcast", "gather", "all_gather", "p2p"))
            if kind == "broadcast":
                work, seeds = rt.broadcast_object(mine if rank == root else None, root), [number + root]
            elif kind == "p2p":
                peer = (root + 1) % size
                seeds = [number + root]
                if rank not in (root, peer):
                    continue
                work = rt.send_object(mine, peer) if rank == root else rt.recv_object(root)
            else:
                work = rt.gather_objects(mine, root) if kind == "gather" else rt.all_gather_objects(mine)
                seeds = [number + r for r in range(size)] if kind == "all_gather" or rank == root else []
            calls.append((work, seeds, nbytes, mine))
        for work, seeds, nbytes, mine in calls:
            try:
                async with asyncio.timeout(dice.choice((None, None, 0, 1e-4, 1e-3))):
                    found = await work
            except TimeoutError:
                mine.fill(0)
                cancelled += 1
                continue
            for seed, one in zip(seeds, found if len(seeds) > 1 else [found], strict=True) if seeds else ():
                assert np.array_equal(one, pattern(nbytes, seed))
            right += 1
    await rt.barrier()
    return right, cancelled


@loops
@pytest.mark.parametrize("size", [2, 3])
def test_500_steps_with_many_awaits_cancelled(size: int, front: str) -> None:
    for right, cancelled in ranks.results(size, long_run, front=front, args=(500,), timeout=90):
        assert right > 50 and cancelled > 50


async def cancel_before_the_body(rt: Any, group: Any, ctl: ranks.Ctl) -> Any:
    """Rank 0 calls and is cancelled before rank 1 comes, so that only its header can have gone; then it overwrites the arrays."""
    arrays = [np.full(1 << 20, 5, np.uint8), np.full(OUT_OF_BAND_BYTES, 6, np.uint8)]
    found = None
    for kind in ("broadcast", "send", "gather"):
        if group.rank() == 0:
            things = [array.copy() for array in arrays]
            calls = {"broadcast": rt.broadcast_object, "send": lambda x: rt.send_object(x, 1), "gather": lambda x: rt.gather_objects(x, 1)}
            task = asyncio.ensure_future(as_coroutine(calls[kind](things)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for thing in things:
                thing.fill(0)
            ctl.tell("cancelled")
        else:
            ctl.hear()
            call = {"broadcast": lambda: rt.broadcast_object(None), "send": lambda: rt.recv_object(0)}
            found = (await rt.gather_objects(None, 1))[0] if kind == "gather" else await call[kind]()
            assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))
    await rt.barrier()


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


@loops
def test_a_call_cancelled_between_header_and_body_still_moves_its_body(front: str) -> None:
    with ranks.Ranks(2, cancel_before_the_body, front=front) as world:
        for _ in range(3):
            world.hear(0)
            world.tell(1, "go on")
        outcomes = world.wait()
    assert [outcome.returncode for outcome in outcomes] == [0, 0], "\n".join(map(str, outcomes))


async def never_awaited(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    """The call counts, awaited or not; who awaits later, or again, gets its result."""
    works = [rt.broadcast_object(pattern(1 << 20, i), 0) for i in range(3)]
    works[0] = None
    gc.collect()
    second = await works[1]
    assert np.array_equal(second, pattern(1 << 20, 1)) and await works[1] is second
    await rt.barrier()
    assert "done" in repr(works[2]) and "broadcast_object #2" in repr(works[2])


@loops
def test_a_call_that_is_not_awaited_counts(front: str) -> None:
    ranks.results(2, never_awaited, front=front)


async def before_init(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    found = await ranks.in_order([rt.broadcast_object(("early", np.ones(100_000)), 0), rt.all_gather_objects(7)])
    assert found[0][0] == "early" and found[1] == [7, 7]


@fronts
def test_a_call_before_init_initialises(front: str) -> None:
    ranks.results(2, before_init, front=front, init=False)


# ---- errors ---------------------------------------------------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("I stay here")


class Explosive:
    """Can be pickled, but not unpickled."""

    def __init__(self, payload: Any = None) -> None:
        self.payload = payload

    def __reduce__(self) -> Any:
        return explode, (self.payload,)


def explode(payload: Any) -> Any:
    raise ZeroDivisionError("no such thing here")


async def fail_alone(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    rank = group.rank()
    for call in (
        lambda x: rt.broadcast_object(x, rank), lambda x: rt.gather_objects(x), lambda x: rt.all_gather_objects(x),
        lambda x: rt.send_object(x, 1 - rank),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="I stay here") as failed:
            await call(Unpicklable())
        (note,) = failed.value.__notes__
        assert re.fullmatch(r"(broadcast|gather|all_gather|send)_objects?: the Unpicklable could not be pickled; nothing was sent", note)
    for payload in (None, np.ones(100_000)):
        for start in (rt.broadcast_object, rt.all_gather_objects):
            if rank == 0:
                await start(Explosive(payload))  # its own object is not unpickled
            else:
                with pytest.raises(ZeroDivisionError, match="no such thing here") as failed:
                    await start(None)
                (note,) = failed.value.__notes__
                assert re.fullmatch(r"(broadcast_object|all_gather_objects): the object of rank 0 could not be unpickled", note)
    assert await rt.all_gather_objects(rank) == [0, 1]


@fronts
def test_what_pickling_raises_concerns_one_call_only(front: str) -> None:
    ranks.results(2, fail_alone, front=front)


def calls_of(rt: Any, group: Any) -> dict[str, tuple[Any, Any, str, str]]:
    """What rank 0 calls, what rank 1 calls, and the words for both."""
    x = np.zeros(HEADER_BYTES, np.uint8)
    return {
        "send against recv": (lambda g: g.send_object(1, 1), lambda g: g.recv((3,), np.float32, 0), "send/recv_object #0", "float32"),
        "like a header": (lambda g: g.send_object(1, 1), lambda g: g.recv_like(x, 0), "send/recv_object #0", "uint8"),
        "array to object": (lambda g: g.send(x, 1), lambda g: g.recv_object(0), "uint8", "send/recv_object #0"),
        "broadcast": (lambda g: g.broadcast_object(1), lambda g: g.broadcast(x), "broadcast_object #", "broadcast #"),
        "roots": (lambda g: g.broadcast_object(1), lambda g: g.broadcast_object(1, 1), "broadcast_object #1 root 0", "root 1"),
        "gathers": (lambda g: g.gather_objects(1), lambda g: g.all_gather_objects(1), "gather_objects #", "all_gather_objects #"),
        "all_gather": (lambda g: g.all_gather_objects(x), lambda g: g.all_gather(x), "all_gather_objects #", "all_gather #"),
        "sum": (lambda g: g.broadcast_object(np.ones(1 << 20)), lambda g: g.all_sum(np.ones(9)), "broadcast_object #", "all_reduce #"),
    }


async def disagree(rt_face: Any, world: Any, ctl: ranks.Ctl) -> None:
    for name, (first, second, said, other) in calls_of(rt_face, world).items():
        group = await world.split(0)
        await group.barrier()
        with pytest.raises(rt.MismatchError) as caught:
            await (first, second)[world.rank()](group)
            await group.barrier()
        text = str(caught.value)
        assert said in text and other in text, f"{name}: {text}"
    assert (await world.all_gather_objects("still here"))[1] == "still here"


@fronts
def test_disagreement_is_found(front: str) -> None:
    ranks.results(2, disagree, front=front)


async def wait_in_different_calls(rt_face: Any, group: Any, ctl: ranks.Ctl) -> None:
    with pytest.raises(rt.MismatchError, match=r"send_object #0 tag 1.*each waits for the other"):
        await (group.send_object(np.ones(1 << 20), 1, tag=1) if group.rank() == 0 else group.recv_object(0, tag=2))


def test_blocked_ranks_that_wait_for_each_other_are_told() -> None:
    ranks.results(2, wait_in_different_calls, front="sync")


async def lose_a_peer(rt_face: Any, group: Any, ctl: ranks.Ctl, how: str) -> Any:
    if group.rank() == 1:
        ctl.tell(os.getpid())
        if how == "body":
            await group.broadcast_object(pattern(1 << 20, 0), 0)
        ctl.hear()
        raise AssertionError("killed by now")
    thing: Any = np.ones(8 << 20) if how == "body" else None
    with pytest.raises(rt.PeerLostError) as caught:
        if how == "body":
            await group.broadcast_object(pattern(1 << 20, 0), 0)
            await group.send_object(thing, 1)
        else:
            await group.broadcast_object(None, 1)
    return caught.value.culprit, str(caught.value)


@fronts
@pytest.mark.parametrize("how", ["header", "body"])
def test_a_peer_that_dies_is_named(how: str, front: str) -> None:
    with ranks.Ranks(2, lose_a_peer, front=front, args=(how,)) as world:
        pid = world.hear(1)
        os.kill(pid, signal.SIGKILL)
        outcome = world.wait()[0]
    assert outcome.value is not None, outcome
    assert outcome.value[0] == 1
    assert re.search(r"_object( #\d+)? \(object\b", outcome.value[1]), outcome.value  # without a number if it died before the call


async def time_out(rt_face: Any, group: Any, ctl: ranks.Ctl) -> Any:
    if group.rank() == 1:
        ctl.hear()
        return None
    began = time.monotonic()
    with pytest.raises(rt.CollectiveTimeoutError) as caught:
        await group.broadcast_object(None, 1, timeout=0.2)
    ctl.tell("timed out")
    return time.monotonic() - began, caught.value.culprit, str(caught.value)


@fronts
def test_a_timeout_names_who_did_not_call(front: str) -> None:
    with ranks.Ranks(2, time_out, front=front) as world:
        world.hear(0)
        world.tell(1, "end")
        outcomes = world.wait()
    assert outcomes[0].value is not None, outcomes[0]
    seconds, culprit, text = outcomes[0].value
    assert seconds >= 0.2 and culprit == 1 and "broadcast_object #0" in text and "which did not call" in text


async def refuse(rt_face: Any, group: Any, ctl: ranks.Ctl) -> list[str]:
    texts = []
    for call in (
        lambda: group.send_object(1, 1 - group.rank()), lambda: group.recv_object(1 - group.rank()), lambda: group.broadcast_object(1),
        lambda: group.gather_objects(1), lambda: group.all_gather_objects(1),
    ):  # fmt: skip
        with pytest.raises(rt.ConfigError) as caught:
            await call()
        texts.append(str(caught.value))
    await group.barrier()
    return texts


async def trust(rt_face: Any, group: Any, ctl: ranks.Ctl) -> Any:
    return await group.all_gather_objects(group.rank())


def test_objects_of_strangers_are_refused() -> None:
    for texts in ranks.results(2, refuse, env={"RT_SECRET": None, "RT_INSECURE": "1"}):
        assert all("RT_SECRET_FILE" in text and "RT_INSECURE_OBJECTS=1" in text for text in texts)
    assert ranks.results(2, trust, env={"RT_SECRET": None, "RT_INSECURE": "1", "RT_INSECURE_OBJECTS": "1"}) == [[0, 1]] * 2
