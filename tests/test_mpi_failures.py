"""Groups on backend ``mpi`` that break: every rank is told why, in the words of the ring.

May live here: disagreement, death, time limits and ``abort`` there. May not: what works (``test_mpi``).

Under ``rt.sync`` a rank may be inside a call of MPI that nobody can undo: it says why, and ends. MPI's launcher ends a job of which a rank
has died, so what ranks say then is looked for in what the launcher printed.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from mpi import LIBRARIES, libraries, run
from ranks import Outcome

from rt.errors import CollectiveTimeoutError, GroupAbortedError, GroupBrokenError, GroupClosedError, MismatchError, PeerLostError
from rt.mpi_group import LAST_WORDS_SECONDS

fronts = pytest.mark.parametrize("front", ["sync", "asyncio"])


async def until_broken(call: Any) -> tuple[str, int | None, str]:
    """Call until the group breaks."""
    with pytest.raises(GroupBrokenError) as caught:
        while True:
            await call()
    return type(caught.value).__name__, caught.value.culprit, str(caught.value)


def texts(outcomes: list[Outcome]) -> list[str]:
    """What each rank got, or, of one that had to end, what all printed."""
    return [outcome.value[2] if outcome.value else outcome.stderr for outcome in outcomes]


async def other_calls(rt: Any, group: Any, ctl: Any) -> Any:
    x = np.ones(1000, np.float32)
    await rt.all_sum(x)
    if group.rank():
        await rt.all_reduce(x.view(np.int32), "max")
    else:
        await rt.all_sum(x)
    return await until_broken(lambda: rt.barrier())


@libraries
@fronts
def test_ranks_that_disagree(library: str, front: str) -> None:
    said = "ranks disagree: rank 0 called all_reduce #1 float32 sum shape (1000,) 4000 B, but rank 1 called all_reduce #1 int32 max"
    for text in texts(run(2, other_calls, library=library, front=front)):
        assert said in text, text
        assert MismatchError.__name__ in text or text.startswith("rank "), text


async def other_front(rt: Any, group: Any, ctl: Any) -> Any:
    import rt.sync as blocking

    await rt.barrier()
    if group.rank():
        blocking.all_sum(np.ones(10))
    return await until_broken(lambda: rt.all_sum(np.ones(10)))


@libraries
def test_one_that_awaits_what_the_other_blocks_in(library: str) -> None:
    outcomes = run(2, other_front, library=library, front="asyncio")
    assert "one awaits it and the other blocks in it (rt.sync)" in outcomes[1].stderr
    assert "rank 1/2: a blocking call of MPI cannot be undone: this process ends" in outcomes[1].stderr


async def dies(rt: Any, group: Any, ctl: Any, awaited: str) -> Any:
    x = np.ones(100 if awaited == "small" else 4_000_000, np.float32)
    await rt.all_sum(x)
    if group.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return await until_broken(lambda: rt.all_sum(x))


@libraries
@fronts
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_rank_that_dies_is_named(library: str, front: str, size: str) -> None:
    if library == "mpich":
        pytest.skip("MPICH's launcher kills the others within milliseconds: whether they could say why before is chance")
    outcomes = run(2, dies, library=library, front=front, args=(size,))
    assert f"[rt] {PeerLostError.__name__}: rank 0/2: " in outcomes[0].stderr, outcomes[0]
    assert "lost rank 1" in outcomes[0].stderr or "process" in outcomes[0].stderr


async def does_not_call(rt: Any, group: Any, ctl: Any) -> Any:
    await rt.barrier()
    if group.rank() == 1:
        ctl.tell("here")
        if ctl.front != "sync":  # the loop, too: nothing is answered while it stands
            await asyncio.sleep(0)
        ctl.hear()
        return await until_broken(lambda: rt.barrier())
    return await until_broken(lambda: rt.all_sum(np.ones(10), timeout=0.3))


@libraries
@fronts
def test_a_time_limit(library: str, front: str) -> None:
    from mpi import MpiRanks

    with MpiRanks(2, does_not_call, library=library, front=front) as ranks:
        ranks.hear(1)
        if front == "sync":
            ranks.processes[0].wait(30)
            ranks._collect()
            text = ranks.outcomes[0].stderr
            assert CollectiveTimeoutError.__name__ in text, text
        else:
            while ranks.outcomes[0].value is None:
                ranks._listen(0.02)
            kind, culprit, text = ranks.outcomes[0].value
            assert (kind, culprit) == (CollectiveTimeoutError.__name__, 1), text
        assert "not done 0.3 s after rank 0 called; it waits for rank 1, which did not call" in text


async def aborts(rt: Any, group: Any, ctl: Any, held: bool) -> Any:
    if group.rank() == 1:
        await rt.all_sum(np.ones(10))
        group.abort()
    caught = await until_broken(lambda: rt.all_sum(np.ones(10)))
    print(f"rank {group.rank()} caught {caught[0]} at {time.time()}", file=sys.stderr, flush=True)
    if held:
        ctl.tell(caught[:2])
        ctl.hear()
    return None


@libraries
def test_abort(library: str) -> None:
    from mpi import MpiRanks

    with MpiRanks(3, aborts, library=library, front="asyncio", args=(True,)) as ranks:
        # Nobody ends before all have told: with the first, MPI's launcher ends the others.
        assert [ranks.hear(rank) for rank in range(3)] == [(GroupAbortedError.__name__, 1)] * 3


@libraries
def test_ranks_that_end_after_abort_leave_each_other_time(library: str) -> None:
    printed = run(3, aborts, library=library, front="asyncio", args=(False,))[0].stderr
    ended = time.time()  # of MPI's launcher, which ends all ranks when one has ended
    caught = re.search(rf"rank \d caught {GroupAbortedError.__name__} at ([\d.]+)", printed)
    assert caught is not None, printed
    assert ended - float(caught[1]) > LAST_WORDS_SECONDS


async def breaks_while_one_calls(rt: Any, group: Any, ctl: Any) -> Any:
    x = np.ones(10)
    for _ in range(3):  # the first is checked, the others are found
        await rt.all_sum(x)
    core, failed = group._core, threading.Event()
    fail = core.fail
    core.fail = lambda failure: (fail(failure), failed.set())

    class Called(list[bytes]):
        def append(self, signature: bytes) -> None:  # by the call, when it has seen that the group is whole
            super().append(signature)
            group.abort()
            failed.wait()

    ctl.tell("warm")
    ctl.hear()
    if group.rank() == 1:
        core.called = Called(core.called)
    else:
        failed.wait()  # were it to call, the call of the other might end well
    caught = await until_broken(lambda: rt.all_sum(x))
    ctl.tell(caught[:2])
    ctl.hear()


@libraries
@fronts
def test_a_group_that_breaks_between_the_check_of_a_call_and_its_begin(library: str, front: str) -> None:
    from mpi import MpiRanks

    with MpiRanks(2, breaks_while_one_calls, library=library, front=front) as ranks:
        assert [ranks.hear(rank) for rank in range(2)] == ["warm"] * 2
        for rank in range(2):
            ranks.tell(rank, "go on")
        assert [ranks.hear(rank) for rank in range(2)] == [(GroupAbortedError.__name__, 1)] * 2


async def one_ends(rt: Any, group: Any, ctl: Any, count: int) -> str | None:
    x = np.ones(count, np.float32)
    await rt.all_sum(x)
    if group.rank() == 1:
        return None
    with pytest.raises(GroupClosedError) as caught:
        await rt.all_sum(x)
    return str(caught.value)


@libraries
@fronts
@pytest.mark.parametrize("count", [1000, 3_000_000])
def test_a_rank_that_ends_and_is_still_needed(library: str, front: str, count: int) -> None:
    outcomes = run(3, one_ends, library=library, front=front, args=(count,), timeout=20)
    said = [text for text in (outcomes[0].value, outcomes[2].value, outcomes[0].stderr) if text]
    assert any(": rank 1 has closed the group and is still needed" in text for text in said), outcomes[0]


async def one_ends_and_owes_a_message(rt: Any, group: Any, ctl: Any) -> str | None:
    if group.rank() == 1:
        await rt.send(np.ones(10), 0)
        await rt.send(np.ones(100_000), 2)
        return None
    if group.rank() == 2:
        ctl.hear()
        return float((await rt.recv(100_000, np.float64, 1))[-1])  # its sender waits for that at its end
    await rt.recv(10, np.float64, 1)
    ctl.tell("received")
    with pytest.raises(GroupClosedError) as caught:
        await rt.recv(10, np.float64, 1)
    return str(caught.value)


@libraries
def test_messages_of_a_rank_that_ends(library: str) -> None:
    from mpi import MpiRanks

    with MpiRanks(3, one_ends_and_owes_a_message, library=library, front="asyncio") as ranks:
        assert ranks.hear(0) == "received"
        ranks.tell(2, "go on")
        while ranks.outcomes[0].value is None or ranks.outcomes[2].value is None:
            ranks._listen(0.02)
        assert ": rank 1 has closed the group and is still needed" in ranks.outcomes[0].value
        assert ranks.outcomes[2].value == 1.0


async def ends_at_once(rt: Any, group: Any, ctl: Any) -> None:
    """End while MPI makes communicators, and calls that nobody awaits are in flight."""
    for _ in range(3):
        await group.split(group.rank() % 2)
    for count in (10, 3_000_000) if ctl.front != "sync" else ():
        for _ in range(3):
            rt.all_sum(np.ones(count, np.float32))


@libraries
@fronts
def test_ends_while_mpi_is_at_work(library: str, front: str) -> None:
    for outcome in run(4, ends_at_once, library=library, front=front):
        assert outcome.returncode == 0, outcome


FORKS = """
import os, sys
import rt.sync as rt

rt.init(strict=True, backend="mpi")
rt.all_sum(1.0)
child = os.fork()
if child == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert rt.all_sum(1.0) == 2.0
"""


@libraries
def test_a_forked_child_that_ends_leaves_mpi_to_its_parent(library: str) -> None:
    found = LIBRARIES[library]
    command = [*found.command(2), sys.executable, "-c", FORKS]
    with subprocess.Popen(command, env={**os.environ, **found.environ}, stderr=subprocess.PIPE, start_new_session=True) as launcher:
        try:
            assert launcher.communicate(timeout=20)[1] == b""
            assert launcher.returncode == 0
        finally:
            launcher.terminate()  # it ends the ranks


class NoMore:
    """A communicator of a library that can make no more of them."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Too many communicators")


async def no_communicator(rt: Any, group: Any, ctl: Any) -> tuple[str, str, float]:
    world = (group.real._core if ctl.front == "sync" else group._core).world
    comms, world._comms = world._comms, (NoMore(), NoMore())
    part = await group.split(0)
    kind, _, text = await until_broken(lambda: part.all_sum(1.0))
    world._comms = comms
    return kind, text, float(await rt.all_sum(1.0))


@libraries
@fronts
def test_a_library_that_makes_no_more_communicators(library: str, front: str) -> None:
    for outcome in run(2, no_communicator, library=library, front=front):
        assert outcome.value is not None, outcome
        kind, text, total = outcome.value
        assert kind == "ProtocolError" and "Too many communicators" in text, text
        assert total == 2.0, "the world is whole"


async def closes(rt: Any, group: Any, ctl: Any) -> str:
    await rt.barrier()
    await rt.close()
    with pytest.raises(GroupClosedError):
        await group.all_sum(1.0)
    again = await rt.init()
    return str(await again.all_sum(1.0))


@libraries
@fronts
def test_close_and_init_again(library: str, front: str) -> None:
    assert [outcome.value for outcome in run(2, closes, library=library, front=front)] == ["2.0", "2.0"]
