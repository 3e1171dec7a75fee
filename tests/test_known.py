"""Calls that were made before and are found in a group's table: they must differ from first calls in nothing but time.

May live here: all-reduces that are repeated, and what must not be taken for a repetition. May not: what a first call checks
(``test_collectives``, ``test_api``).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, results

import rt
import rt.sync

fronts = pytest.mark.parametrize("front", FRONTS)


async def alike_but_not_the_same(rt: Any, group: Any, ctl: Any) -> None:
    """Each of these calls is warmed up by another one that looks like it."""
    me = group.rank()
    x = np.arange(6, dtype=np.float32) + me
    total = 2 * np.arange(6, dtype=np.float32) + 1
    for _ in range(3):
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

