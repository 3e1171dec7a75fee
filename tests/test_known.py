"""Calls that were made before and are found in a group's table: they must differ from first calls in nothing but time.

May live here: collectives that are repeated, and what must not be taken for a repetition. May not: what a first call checks
(``test_collectives``, ``test_api``).
"""

from __future__ import annotations

import concurrent.futures
import inspect
import os
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, Ranks, results, run

import rt
import rt.sync
from rt import deferred

fronts = pytest.mark.parametrize("front", FRONTS)


async def alike_but_not_the_same(rt: Any, group: Any, ctl: Any) -> None:
    """Each of these calls is warmed up by another one that looks like it."""
    me = group.rank()
    x = np.arange(6, dtype=np.float32) + me
    total = 2 * np.arange(6, dtype=np.float32) + 1
    for _ in range(3):
        assert await rt.barrier() is None and await group.barrier() is None
        assert np.array_equal(await rt.all_sum(x), total)
        assert np.array_equal(await rt.all_max(x), np.arange(6) + 1)
        assert np.array_equal(await rt.all_reduce(x, "sum"), total)
        assert np.array_equal(await rt.all_sum(x.reshape(2, 3)), total.reshape(2, 3))
        assert np.array_equal(await rt.all_sum(x.astype(np.float64)), total)
        assert np.array_equal(await rt.all_sum(x.astype(">f4").astype("<f4")), total)
        assert np.array_equal(await rt.all_sum(x[::-1]), total[::-1]), "not contiguous"
        assert np.array_equal(await rt.all_sum(x.reshape(1, 1, 1, 1, 1, 6)), total.reshape(1, 1, 1, 1, 1, 6)), "six sides"
        fixed = x.copy()
        fixed.flags.writeable = False
        assert np.array_equal(await rt.all_sum(fixed), total) and np.array_equal(fixed, x)
        own, out = x.copy(), np.empty_like(x)
        assert await rt.all_sum(own, out=own) is own and np.array_equal(own, total)
        assert await rt.all_sum(x, out=out) is out and np.array_equal(out, total)
        first, second = await rt.all_sum(x), await rt.all_sum(x)
        assert not np.shares_memory(first, second) and first.flags.writeable and first.flags.owndata
    assert repr(group) and np.array_equal(x, np.arange(6) + me)


@fronts
def test_calls_that_look_alike_are_told_apart(front: str) -> None:
    results(2, alike_but_not_the_same, front=front)


async def refusals(rt: Any, group: Any, ctl: Any) -> None:
    x, out = np.ones(8, np.float32), np.empty(8, np.float32)
    for _ in range(3):
        await rt.all_sum(x, out=out)
        await rt.all_sum(x, out=x)
    memory = np.ones(12, np.float32)
    fixed = np.empty(8, np.float32)
    fixed.flags.writeable = False
    wrong = [(memory[2:10], "overlaps x"), (fixed, "writeable"), (np.empty(8), "dtype float32"), (np.empty(7, np.float32), "shape")]
    for bad, words in wrong:
        with pytest.raises(ValueError, match=words):
            await rt.all_sum(memory[:8], out=bad)
    with pytest.raises(ValueError, match="writeable"):
        await rt.all_sum(fixed, out=fixed)
    with pytest.raises(ValueError, match="op must be one of"):
        await rt.all_reduce(x, "Sum")
    with pytest.raises(TypeError, match="timeout must be a number of seconds, not str"):
        await rt.all_sum(x, timeout="soon")
    with pytest.raises(rt.ConfigError, match="stream"):
        await rt.all_sum(x, stream=1)
    assert (await rt.all_sum(np.ones(8, np.float32)))[0] == 2


@fronts
def test_what_a_first_call_refuses_a_later_one_does_too(front: str) -> None:
    results(2, refusals, front=front)


async def others_alike_but_not_the_same(rt: Any, group: Any, ctl: Any) -> None:
    """As ``alike_but_not_the_same``, of the other collectives that are remembered."""
    me = group.rank()
    x = np.arange(8, dtype=np.float32).reshape(4, 2) + 10 * me
    both = [np.arange(8, dtype=np.float32).reshape(4, 2) + 10 * rank for rank in range(2)]
    all_rows, total, largest = np.concatenate(both), both[0] + both[1], both[1]
    half = slice(2 * me, 2 * me + 2)
    swapped = np.concatenate([rows[half] for rows in both])
    for _ in range(3):
        assert np.array_equal(await rt.all_gather(x), all_rows)
        assert np.array_equal(await rt.all_gather(x.reshape(2, 4)), all_rows.reshape(4, 4))
        assert np.array_equal(await rt.all_gather(x.astype(np.int32)), all_rows)
        assert np.array_equal(await rt.all_gather(np.asfortranarray(x)), all_rows), "not contiguous"
        out, memory = np.empty((8, 2), np.float32), np.zeros((8, 2), np.float32)
        assert await rt.all_gather(x, out=out) is out and np.array_equal(out, all_rows)
        memory[4 * me : 4 * me + 4] = x
        assert await rt.all_gather(memory[4 * me : 4 * me + 4], out=memory) is memory and np.array_equal(memory, all_rows), "in place"
        assert np.array_equal(await rt.sum_scatter(x), total[half])
        assert np.array_equal(await rt.sum_scatter(x, "max"), largest[half])
        own = x.copy()
        assert np.array_equal(await rt.sum_scatter(own, out=own[half]), total[half]), "in place"
        assert np.array_equal(await rt.broadcast(x), both[0]) and np.array_equal(await rt.broadcast(x, 1), both[1])
        assert np.array_equal(await rt.broadcast(x, np.int64(1)), both[1])
        own = x.copy()
        assert await rt.broadcast(own, 1, out=own) is own and np.array_equal(own, both[1])
        assert np.array_equal(await rt.all_to_all(x), swapped)
        own = x.copy()
        assert await rt.all_to_all(own, out=own) is own and np.array_equal(own, swapped)
        first, second = await rt.all_gather(x), await rt.all_gather(x)
        assert not np.shares_memory(first, second) and first.flags.writeable
    assert np.array_equal(x, both[me])
    for call, bad, words in (
        (rt.all_gather, np.empty((4, 4), np.float32), "shape"), (rt.all_gather, np.empty((8, 2)), "dtype float32"),
        (rt.sum_scatter, np.empty(4, np.float32), "shape"), (rt.all_to_all, x.reshape(-1)[:8].reshape(2, 4), "shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            await call(x, out=bad)
    memory = np.zeros((10, 2), np.float32)
    for call, given, bad in ((rt.all_gather, memory[1:5], memory[:8]), (rt.all_to_all, memory[1:5], memory[:4])):
        with pytest.raises(ValueError, match="overlaps x"):
            await call(given, out=bad)
    for root in (-1, -2, 2, 1 << 70):
        with pytest.raises(ValueError, match="root"):
            await rt.broadcast(x, root)
    with pytest.raises(ValueError, match="op must be one of"):
        await rt.sum_scatter(x, "Sum")


@fronts
def test_other_calls_that_look_alike_are_told_apart(front: str) -> None:
    results(2, others_alike_but_not_the_same, front=front)


async def messages_alike_but_not_the_same(rt: Any, group: Any, ctl: Any) -> None:
    """Every message is met by one that looks like it, in both directions, again and again."""
    me = group.rank()
    other = 1 - me
    big = 1 << 40

    async def swap(x: Any, shape: Any, dtype: Any, tag: int = 0, out: Any = None) -> Any:
        sent = rt.send(x, other, tag=tag)  # small, so that it does not block
        found = await rt.recv(shape, dtype, other, tag=tag, out=out)
        assert (await sent if front_awaits else sent) is x
        return found

    front_awaits = not isinstance(rt.send(np.ones(1), other), np.ndarray)
    await rt.recv(1, np.float64, other)
    for turn in range(3):
        x = np.arange(6, dtype=np.float32) + 10 * me + turn
        theirs = np.arange(6, dtype=np.float32) + 10 * other + turn
        for tag in (0, 1, 32767, 32768, -1, big):
            found = await swap(x + tag % 5, 6, np.float32, tag)
            assert np.array_equal(found, theirs + tag % 5) and found.dtype == np.float32, tag
        for dtype in ("float32", np.dtype(np.float32), "f4"):
            assert np.array_equal(await swap(x, (6,), dtype), theirs)
        assert (await swap(x.reshape(2, 3), (2, 3), np.float32)).shape == (2, 3)
        assert (await swap(x.astype(int), [6], int)).dtype == int
        assert np.array_equal(await swap(x[::-1], (6,), np.float32), theirs[::-1]), "not contiguous"
        six = x.reshape(1, 1, 1, 1, 1, 6)
        assert np.array_equal(await swap(six, six.shape, np.float32), theirs.reshape(six.shape)), "six sides"
        out, scattered = np.empty(6, np.float32), np.empty((6, 2), np.float32)[:, 0]
        assert await swap(x, (6,), np.float32, out=out) is out and np.array_equal(out, theirs)
        rt_send = rt.send(x, other)
        with pytest.raises(ValueError, match="C-contiguous"):
            await rt.recv(6, np.float32, other, out=scattered)
        for wrong in (np.empty(5, np.float32), np.empty(6)):
            with pytest.raises(ValueError, match="out must have shape"):
                await rt.recv_like(x, other, out=wrong)
        assert np.array_equal(await rt.recv_like(x, other), theirs)
        await rt_send if front_awaits else None
        first, second = await swap(x, 6, np.float32), await swap(x, 6, np.float32)
        assert not np.shares_memory(first, second) and first.flags.writeable and first.flags.owndata
        own = x.copy()
        for where in (None, out, own):
            found = await rt.sendrecv(own, other, other, out=where)
            assert np.array_equal(found, theirs) and (where is None or found is where)
            assert where is own or np.array_equal(own, x), "what is sent does not change"
        found = await rt.sendrecv(x, other, other, out=np.empty(6, np.float32) if me else None, tag=turn)
        assert np.array_equal(found, theirs)
    for peer, words in ((me, "cannot send to itself"), (2, "destination=2"), (-1, "destination=-1"), (1 << 70, "destination")):
        with pytest.raises(ValueError, match=words):
            await rt.send(x, peer)
    with pytest.raises(TypeError, match="tag must be an integer, not float"):
        await rt.send(x, other, tag=0.0)
    with pytest.raises(ValueError, match="itself"):
        await rt.sendrecv(x, other, me)
    await rt.barrier()


@fronts
def test_messages_that_look_alike_are_told_apart(front: str) -> None:
    results(2, messages_alike_but_not_the_same, front=front)


async def another_message(rt: Any, group: Any, ctl: Any) -> None:
    x, y = np.ones(6, np.float32), np.ones((3, 2), np.float32)
    for each in (x, y, x, y):
        await (rt.recv_like(each, 0) if group.rank() else rt.send(each, 1))
    await (rt.recv_like(x, 0) if group.rank() else rt.send(y, 1))
    await rt.barrier()


@fronts
def test_a_message_that_is_known_is_compared(front: str) -> None:
    for outcome in run(2, another_message, front=front):
        assert outcome.error is not None and outcome.error.kind == "MismatchError", outcome
        assert "shape (6,)" in outcome.error.text and "shape (3, 2)" in outcome.error.text, outcome


async def barrier_against_sum(rt: Any, group: Any, ctl: Any) -> None:
    for _ in range(3):
        await rt.barrier()
        await rt.all_sum(np.ones(4))
    with pytest.raises(rt.MismatchError, match="barrier"):
        await (rt.barrier() if group.rank() else rt.all_sum(np.ones(4)))


@fronts
def test_a_barrier_that_is_known_is_compared(front: str) -> None:
    results(2, barrier_against_sum, front=front)


async def too_large_to_be_found(rt: Any, group: Any, ctl: Any) -> None:
    """Calls that are known and go the long way all the same, for the memory of their results, are not kept again and again."""
    x = np.zeros(1 << 20, np.uint16)
    held = []
    for _ in range(30):
        await rt.all_sum(x)
        await rt.sendrecv(x, 1 - group.rank(), 1 - group.rank())
        held.append(sys.getrefcount(x.dtype))
    assert held[-1] < held[9] + 10, held


@fronts
def test_calls_that_are_never_found_are_kept_once(front: str) -> None:
    results(2, too_large_to_be_found, front=front)


async def interrupted(rt: Any, group: Any, ctl: Any) -> Any:
    """Rank 0 is interrupted in a send that has begun, by what is told of another work; its array is its own again."""
    x = np.zeros(1 << 20)  # more than a receiver is sent unasked
    for _ in range(2):
        await (rt.recv_like(x, 0) if group.rank() else rt.send(x, 1))
    if group.rank():
        ctl.hear()
        await rt.send(np.ones(1), 0, tag=1)
        ctl.tell("sent")
        ctl.hear()
        arrived = await rt.recv_like(x, 0)
        await rt.barrier()
        return float(arrived.max())
    work = rt.recv(1, np.float64, 1, tag=1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert work.add_waiter(interrupt), "nothing has come so far"
    ctl.tell("listening")
    ctl.hear()
    with pytest.raises(KeyboardInterrupt):
        rt.send(x, 1)
    x[:] = 1
    ctl.tell("interrupted")
    await rt.barrier()


def test_an_interrupted_send_gives_the_array_back() -> None:
    with Ranks(2, interrupted, front="asyncio") as world:
        for teller, told in ((0, 1), (1, 0), (0, 1)):
            world.tell(told, world.hear(teller))
        first, second = world.wait()
    assert first.error is None and second.value == 0.0, f"{first}\n{second}"


async def many_shapes(rt: Any, group: Any, ctl: Any) -> None:
    """More than the table holds, so that it is emptied now and then; in two orders, so that entries of before are met."""
    for order in (range(150), range(149, -1, -1)):
        for count in order:
            for dtype in (np.int32, np.int64):
                found = await rt.all_sum(np.full((count, 2), group.rank() + 1, dtype))
                assert found.shape == (count, 2) and found.dtype == dtype and (found == 3).all()


@fronts
def test_more_calls_than_the_table_holds(front: str) -> None:
    results(2, many_shapes, front=front)


async def after_the_end(rt: Any, group: Any, ctl: Any) -> None:
    x = np.ones(4)
    sub = await group.split(0)
    for _ in range(3):
        await sub.all_sum(x)
        await rt.all_sum(x)
    sub.abort()
    with pytest.raises(rt.GroupAbortedError):
        while True:  # until the abort of the other rank, or ours, has come
            await sub.all_sum(x)
    with pytest.raises(rt.GroupAbortedError, match=r"all_sum \(float64, 32 B\): the group failed earlier"):
        await sub.all_sum(x)
    assert (await rt.all_sum(x))[0] == 2, "another group goes on"
    in_a_forked_child(x)
    await rt.barrier()


def in_a_forked_child(x: Any) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rt_sync_all_sum(x)
        except rt.GroupClosedError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def rt_sync_all_sum(x: Any) -> Any:
    return rt.sync.all_sum(x)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@fronts
def test_a_group_that_has_ended_finds_no_call_any_more(front: str) -> None:
    results(2, after_the_end, front=front)


async def mixed_with_tasks(rt: Any, group: Any, ctl: Any) -> None:
    """A blocking call in a loop that drives a collective is refused, found in the table or not."""
    x = np.ones(4)
    assert rt_sync_all_sum(x)[0] == 2, "nothing is in flight"
    waiting = rt.recv(1, np.float64, 1 - group.rank())
    with pytest.raises(RuntimeError, match="would block the event loop"):
        rt_sync_all_sum(x)
    await rt.barrier()  # before that nothing arrives, and the recv is in flight
    await rt.send(np.ones(1), 1 - group.rank())
    await waiting


@pytest.mark.parametrize("front", FRONTS[1:])
def test_a_blocking_call_in_a_loop_is_still_refused(front: str) -> None:
    results(2, mixed_with_tasks, front=front)



async def the_next_world(rt: Any, group: Any, ctl: Any) -> None:
    """A call without ``group=`` takes the short way of the world of the day, and none where the world has a limit to watch."""
    x = np.ones(4)
    for _ in range(3):
        assert (await rt.all_sum(x))[0] == 2
    await rt.close()
    for _ in range(3):
        with pytest.raises(rt.GroupClosedError, match=r"all_sum \(float64, 32 B\): the group was closed here"):
            await rt.all_sum(x)
    group = await rt.init(timeout=1.0)
    for _ in range(3):
        assert (await rt.all_sum(x))[0] == 2
    if group.rank() == 0:
        with pytest.raises(rt.CollectiveTimeoutError):
            await rt.all_sum(x)
        ctl.tell("timed out")
    else:
        ctl.hear()


@fronts
def test_the_next_world_has_a_table_and_a_limit_of_its_own(front: str) -> None:
    with Ranks(2, the_next_world, front=front) as ranks:
        assert ranks.hear(0) == "timed out"
        ranks.tell(1, "go")
        assert all(outcome.error is None for outcome in ranks.wait())


@pytest.mark.parametrize("module", [rt, rt.sync])
def test_calls_refuse_arguments_by_their_name(module: Any) -> None:
    for name in ("all_reduce", "all_sum", "all_max", "all_min", "all_gather", "all_to_all", "sum_scatter", "scan"):
        call = getattr(module, name)
        assert call.__name__ == name and next(iter(inspect.signature(call).parameters)) == "x" and call.__doc__
        for arguments, keywords, words in (
            ((), {}, "missing 1 required positional argument: 'x'"), ((1, "sum", 2), {}, "positional arguments but"),
            ((1,), {"copy": True}, "unexpected keyword argument 'copy'"),
        ):  # fmt: skip
            with pytest.raises(TypeError, match=rf"^{name}\(\) .*{words}"):
                call(*arguments, **keywords)


class Earlier:
    """Stands for a call that was made while the world formed, and which nobody has started so far."""

    def __init__(self) -> None:
        self.formed: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.formed.set_result(None)
        self.started = 0

    def start(self) -> None:
        self.started += 1


async def others_go_first(rt: Any, group: Any, ctl: Any) -> None:
    x = np.ones(4)
    for call in (lambda: rt.all_sum(x), rt.barrier):
        for _ in range(3):
            await call()
        earlier = Earlier()
        deferred._waiting.append(earlier)  # type: ignore[arg-type]
        await call()
        assert earlier.started == 1 and not deferred._waiting


@fronts
def test_a_call_that_is_known_goes_after_those_that_wait_for_the_world(front: str) -> None:
    results(2, others_go_first, front=front)


@pytest.mark.parametrize("module", [rt, rt.sync])
def test_calls_can_be_pickled(module: Any) -> None:
    for name in ("all_reduce", "all_sum", "all_gather", "sum_scatter", "barrier"):
        call = getattr(module, name)
        assert pickle.loads(pickle.dumps(call)) is call
