"""Groups on backend ``nccl`` that break, over a stand-in for CuPy and NCCL: every rank gets the ring's errors, and the process lives.

May live here: disagreement, death, time limits, errors of NCCL, ``abort`` there. May not: what works (``test_nccl``).

The stand-in lets calls that do not match, or whose peers are gone, hang until their communicator is aborted, as NCCL does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from nccl import ranks, results, run, to_device

from rt.errors import CollectiveTimeoutError, GroupAbortedError, GroupBrokenError, GroupClosedError, PeerLostError

fronts = pytest.mark.parametrize("front", ["sync", "asyncio"])


async def until_broken(call: Any, communicator: int = 0) -> tuple[str, int | None, str]:
    """Call until the group breaks; then its communicator must be aborted, and so what hangs on the device ends."""
    with pytest.raises(GroupBrokenError) as caught:
        while True:
            await call()
    cuda = sys.modules["cupy"].cuda
    assert cuda.nccl.communicators[communicator].gone.wait(20)
    assert ("abort",) in cuda.nccl.calls and ("destroy",) not in cuda.nccl.calls
    cuda.Stream.null.synchronize()
    return type(caught.value).__name__, caught.value.culprit, str(caught.value)


async def other_calls(rt: Any, group: Any, ctl: Any) -> Any:
    x = to_device(np.ones(1000, np.float32))
    await rt.all_sum(x)
    if group.rank():
        return await until_broken(lambda: rt.all_reduce(to_device(np.ones(1000, np.int32)), "max"))
    return await until_broken(lambda: rt.all_sum(x))


@fronts
def test_ranks_that_disagree(front: str) -> None:
    said = "ranks disagree: rank 0 called all_reduce #1 float32 sum shape (1000,) 4000 B, but rank 1 called all_reduce #1 int32 max"
    found = results(2, other_calls, front=front)
    assert found[0][1] == found[1][1], "whoever told later, alike on all ranks"
    for kind, _, text in found:
        assert kind == "MismatchError" and said in text, text


async def other_places(rt: Any, group: Any, ctl: Any) -> Any:
    x = np.ones(1000, np.float32)
    await rt.all_sum(x)
    return await until_broken(lambda: rt.all_sum(to_device(x) if group.rank() else x))


@fronts
def test_one_on_the_device_and_one_not(front: str) -> None:
    for kind, _, text in results(2, other_places, front=front):
        assert kind == "MismatchError", text
        assert "but rank 1 called all_reduce #1 float32 sum shape (1000,) 4000 B; one passes arrays of the host" in text, text


async def never_calls(rt: Any, group: Any, ctl: Any) -> Any:
    x = to_device(np.ones(10, np.float32))
    await rt.all_sum(x)
    if group.rank() == 1:
        ctl.hear()
        return await until_broken(lambda: rt.all_sum(x))
    found = await until_broken(lambda: rt.all_sum(x, timeout=0.3))
    ctl.tell(found)
    return found


@fronts
def test_a_rank_that_never_calls(front: str) -> None:
    with ranks(2, never_calls, front=front) as running:
        kind, culprit, text = running.hear(0)
        running.tell(1, "go on")
        outcomes = running.wait()
    assert (kind, culprit) == (CollectiveTimeoutError.__name__, 1), text
    assert "all_sum #1 (float32, 40 B): not done 0.3 s after rank 0 called; it waits for rank 1, which did not call" in text, text
    assert [outcome.value[:2] for outcome in outcomes] == [(CollectiveTimeoutError.__name__, 1)] * 2
    assert [outcome.returncode for outcome in outcomes] == [0, 0]


async def dies(rt: Any, group: Any, ctl: Any) -> Any:
    x = to_device(np.ones(10, np.float32))
    await rt.all_sum(x)
    if group.rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return await until_broken(lambda: rt.all_sum(x))


@fronts
def test_a_rank_that_dies(front: str) -> None:
    for outcome in run(3, dies, front=front)[:2]:
        assert outcome.value is not None, str(outcome)
        kind, culprit, text = outcome.value
        assert (kind, culprit) == (PeerLostError.__name__, 2), text


async def errors(rt: Any, group: Any, ctl: Any, at_once: bool) -> Any:
    """NCCL raises on one rank: when it is called, or later, when somebody looks."""
    x, nccl = to_device(np.ones(10, np.float32)), sys.modules["cupy"].cuda.nccl
    await rt.all_sum(x)
    if group.rank() == 1:
        if at_once:
            nccl.fail_next(2)
        else:
            nccl.communicators[0].async_error = 3
        return await until_broken(lambda: rt.all_sum(x))
    return await until_broken(lambda: rt.all_sum(x) if at_once else rt.recv_object(1))


@fronts
def test_an_error_of_nccl_in_a_call(front: str) -> None:
    for kind, culprit, text in results(2, errors, front=front, args=(True,)):
        assert (kind, culprit) == ("ProtocolError", None), text
        assert "NCCL on rank 1: NCCL_ERROR_SYSTEM_ERROR: unhandled system error" in text, text


@fronts
def test_an_error_of_nccl_that_comes_later(front: str) -> None:
    for kind, culprit, text in results(2, errors, front=front, args=(False,)):
        assert (kind, culprit) == ("ProtocolError", None), text
        assert "NCCL on rank 1: NCCL_ERROR_INTERNAL_ERROR: internal error" in text, text


async def aborts(rt: Any, group: Any, ctl: Any) -> Any:
    """What hangs on the device ends, and its memory is given back once the communicator is gone."""
    x = to_device(np.ones(10, np.float32))
    await rt.all_sum(x)
    await rt.barrier()
    if group.rank() == 0:
        gone = weakref.ref(x)
        work = rt.all_sum(x)
        del x
        group.abort()
        found = await until_broken(lambda: work)
        del work
        with pytest.raises(GroupAbortedError):
            await rt.all_sum(to_device(np.ones(1, np.float32)))
        await rt.close()
        gc.collect()
        assert gone() is None
        return found
    return await until_broken(lambda: rt.all_sum(x))


def test_abort() -> None:
    for kind, culprit, text in results(2, aborts, front="asyncio"):
        assert (kind, culprit) == (GroupAbortedError.__name__, 0), text


async def a_part_breaks(rt: Any, group: Any, ctl: Any) -> Any:
    """The world goes on with a communicator of its own."""
    part = await group.split(0)
    await rt.barrier()  # NCCL has connected both ranks of the part
    x = to_device(np.ones(10, np.float32))
    if group.rank() == 0:
        part.abort()
    found = await until_broken(lambda: part.all_sum(x), 1)
    assert (await rt.all_sum(x)).get().tolist() == [2] * 10
    return found[0]


@fronts
def test_a_part_of_the_world_that_breaks(front: str) -> None:
    assert results(2, a_part_breaks, front=front) == [GroupAbortedError.__name__] * 2


async def closes(rt: Any, group: Any, ctl: Any) -> list[tuple[Any, ...]]:
    x = to_device(np.ones(10, np.float32))
    await rt.all_sum(x)
    await rt.close()
    with pytest.raises(GroupClosedError):
        await group.all_sum(x)
    return [call for call in sys.modules["cupy"].cuda.nccl.calls if call in (("destroy",), ("abort",))][:1]


@fronts
def test_an_orderly_end(front: str) -> None:
    assert results(2, closes, front=front) == [[("destroy",)]] * 2


async def one_ends(rt: Any, group: Any, ctl: Any) -> str | None:
    x = to_device(np.ones(10, np.float32))
    await rt.all_sum(x)
    if group.rank() == 1:
        return None
    with pytest.raises(GroupClosedError) as caught:
        await rt.all_sum(x)
    assert sys.modules["cupy"].cuda.nccl.communicators[0].gone.wait(20)
    return str(caught.value)


@fronts
def test_a_rank_that_ends_and_is_still_needed(front: str) -> None:
    found = results(3, one_ends, front=front)
    assert found[1] is None
    for text in (found[0], found[2]):
        assert ": rank 1 has closed the group and is still needed" in text, text


async def just_ends(rt: Any, group: Any, ctl: Any) -> None:
    await rt.all_sum(to_device(np.ones(10, np.float32)))


@fronts
def test_a_program_that_just_ends(front: str) -> None:
    results(2, just_ends, front=front)


async def cannot_connect(rt: Any, _: Any, ctl: Any, absent: bool) -> str:
    """One rank's NCCL fails, or never comes back, when ranks connect."""
    from cupy.cuda import nccl  # type: ignore[import-not-found]

    if int(os.environ["RT_RANK"]):
        if absent:
            import threading

            nccl.NcclCommunicator = lambda *_: threading.Event().wait()
        else:
            nccl.fail_next(5)
    with pytest.raises(RuntimeError) as caught:
        await rt.init(connect_timeout=1.5 if absent else 60.0)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_a_device_that_cannot_be_connected(front: str) -> None:
    for text in results(2, cannot_connect, front=front, init=False, args=(False,)):
        assert text.startswith("ProtocolError: rank "), text
        assert text.endswith(
            "NCCL on rank 1 could not connect device 0: NCCL_ERROR_INVALID_USAGE: invalid usage; this host has 2 ranks, and this one sees "
            "1 device: ranks that share one need NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1; NCCL_DEBUG=WARN has NCCL say more, and "
            "backend 'ring' does without it"
        ), text


def test_an_nccl_that_never_connects() -> None:
    for rank, text in enumerate(results(2, cannot_connect, front="asyncio", init=False, args=(True,))):
        assert text == f"RendezvousError: rank {rank}/2: NCCL did not connect the ranks of group world within 1.5 s", text


async def late(rt: Any, group: Any, ctl: Any) -> int:
    """A loop stays free while its rank waits for another one."""
    x, turns = to_device(np.ones(10, np.float32)), 0
    if group.rank() == 1:
        ctl.hear()
        await rt.all_sum(x)
        return 0
    work = asyncio.ensure_future(as_coroutine(rt.all_sum(x)))
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
        if turns == 100:
            ctl.tell("free")
    await work
    return turns


async def as_coroutine(work: Any) -> Any:
    return await work


def test_a_loop_that_waits_is_free() -> None:
    with ranks(2, late, front="asyncio") as running:
        assert running.hear(0) == "free"
        running.tell(1, "call")
        outcomes = running.wait()
    assert [outcome.returncode for outcome in outcomes] == [0, 0], "\n".join(map(str, outcomes))
