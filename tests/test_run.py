"""``rt.run``: the loop it gives, and what the other ranks learn of a main that ends well, badly, or by Ctrl-C.

May live here: processes that call ``rt.run``. May not: how asyncio runs coroutines; what ``close`` and ``abort`` do (``test_exit``,
``test_failures``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import ranks

import rt

TOLD_SECONDS = 1.0  # promised: until every other rank's calls raise


# The bodies here run under the front end "sync", which has no loop: ``rt.run`` makes its own.


async def report_and_wait(ctl: ranks.Ctl, how: str) -> Any:
    """Rank 1 ends in some way while the others wait in the world, or in a group without rank 0."""
    group = await rt.init()
    part = await group.split(0 if group.rank() == 0 else 1)
    await group.barrier()
    if group.rank() == 1:
        ctl.hear()  # the others have left the barrier, too
        other = asyncio.ensure_future(stubborn(group))
        other.add_done_callback(asyncio.Task.exception)  # fetched: what it raises is the abort
        await asyncio.sleep(0)
        ctl.tell(time.monotonic())
        if how == "exception":
            raise LookupError("rank 1 cannot go on")
        if how == "exit":
            sys.exit(7)
        if how == "cancelled":
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(0)
        raise AssertionError(how)
    ctl.tell("waits")
    with pytest.raises(rt.GroupAbortedError) as caught:
        await (group.all_sum(np.ones(3)) if group.rank() == 0 else part.broadcast_object(None, 0))
    ctl.tell((time.monotonic(), caught.value.culprit, str(caught.value)))


async def stubborn(group: Any) -> None:
    """A task that, when the loop cancels it, waits for the others once more."""
    try:
        await asyncio.sleep(3600)
    finally:
        await group.barrier()


async def body_that_fails(_rt: Any, _group: Any, ctl: ranks.Ctl, how: str) -> Any:
    return rt.run(report_and_wait(ctl, how))


@pytest.mark.parametrize("how", ["exception", "exit", "cancelled"])
def test_the_others_raise_within_a_second_and_name_the_culprit(how: str) -> None:
    with ranks.Ranks(3, body_that_fails, args=(how,), init=False) as world:
        assert [world.hear(rank) for rank in (0, 2)] == ["waits", "waits"]
        world.tell(1, "go")
        ended = world.hear(1)
        for rank in (0, 2):
            told, culprit, text = world.hear(rank)
            assert told - ended < TOLD_SECONDS
            assert culprit == 1
            assert "the program of rank 1 " in text
            assert {"exception": "raised LookupError", "exit": "raised SystemExit", "cancelled": "was interrupted"}[how] in text
        outcomes = world.wait()
    assert [outcome.returncode for outcome in outcomes] == [0, 1, 0]
    error = outcomes[1].error
    assert error is not None and error.kind == {"exception": "LookupError", "exit": "SystemExit", "cancelled": "CancelledError"}[how]


async def use_the_loop() -> tuple[str, bool, float]:
    loop = asyncio.get_running_loop()
    total = float(await rt.all_sum(1.0))
    return type(loop).__module__, loop.get_debug(), total


async def body_of_loops(_rt: Any, _group: Any, ctl: ranks.Ctl, debug: bool | None) -> Any:
    found = rt.run(use_the_loop(), debug=debug)
    return (*found, rt.world.worlds()[0].closed)  # type: ignore[attr-defined]


@pytest.mark.parametrize("debug", [None, True])
def test_it_runs_on_uvloop_and_closes_in_order(debug: bool | None) -> None:
    pytest.importorskip("uvloop", reason="uvloop is not installed")
    assert ranks.results(2, body_of_loops, args=(debug,), init=False) == [("uvloop", bool(debug), 2.0, True)] * 2


async def leave_early(ctl: ranks.Ctl) -> None:
    group = await rt.init()
    if group.rank() == 1:
        sys.exit()
    with pytest.raises(rt.GroupClosedError):
        await group.barrier()


async def body_that_leaves(_rt: Any, _group: Any, ctl: ranks.Ctl) -> None:
    try:
        rt.run(leave_early(ctl))
    except SystemExit as error:
        assert error.code is None


def test_an_exit_with_code_0_is_orderly() -> None:
    ranks.results(2, body_that_leaves, init=False)


async def lose(ctl: ranks.Ctl) -> Any:
    """Rank 2 dies; rank 0's program ends by that, while rank 1 waits in a group of the two alone."""
    group = await rt.init()
    pair = await group.split(int(group.rank() == 2))
    await group.barrier()
    if group.rank() == 2:
        ctl.tell(os.getpid())
        ctl.hear()
    if group.rank() == 0:
        await group.barrier()
    try:
        await pair.barrier()
    except rt.GroupAbortedError as error:
        return error.culprit
    return None


async def body_that_loses(_rt: Any, _group: Any, ctl: ranks.Ctl) -> Any:
    return rt.run(lose(ctl))


def test_who_ends_by_anothers_fault_blames_the_other() -> None:
    with ranks.Ranks(3, body_that_loses, init=False) as world:
        os.kill(world.hear(2), signal.SIGKILL)
        outcomes = world.wait()
    assert outcomes[0].error is not None and outcomes[0].error.kind == "PeerLostError"
    assert outcomes[1].value == 2, outcomes[1]


INTERRUPTED = """
import asyncio, rt
async def main():
    try:
        print("here", flush=True)
        await asyncio.sleep(60)
    finally:
        print("cleaned up", flush=True)
rt.run(main())
"""


def test_ctrl_c_is_a_keyboard_interrupt_after_cleaning_up() -> None:
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert out == "cleaned up\n" and err.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode in (-signal.SIGINT, 130)


async def nothing() -> int:
    return 7


def test_what_it_takes() -> None:
    assert rt.run(nothing()) == 7
    with pytest.raises(ValueError, match=r"takes a coroutine, for example main\(\)"):
        rt.run(nothing)  # type: ignore[arg-type]


async def inside() -> None:
    coroutine = nothing()
    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        rt.run(coroutine)
    assert await coroutine == 7


def test_it_does_not_nest() -> None:
    asyncio.run(inside())
