"""How ranks leave: in order without a word, with an exception, by Ctrl-C, or as a forked child that is none of them.

May live here: the end of real processes. May not: ends that break a group (``test_failures``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks

from rt.errors import GroupBrokenError, GroupClosedError

CTRL_C_SECONDS = 1.0  # promised are 0.1; the rest is for a busy machine
AT_ONCE = 0.1
LARGE = 16 << 20

# -- orderly exits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", ["sync", "asyncio"])
@pytest.mark.parametrize("last", ["broadcast", "send", "one way", "all_reduce"])
def test_orderly_exits_with_random_delays_and_no_close(last: str, front: str) -> None:
    """Eight times 9 worlds of 3 ranks: 216 exits."""
    worlds, size = 9, 3
    command = [sys.executable, str(Path(__file__).with_name("exits.py")), front, last, str(worlds), str(size)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RT_")} | {"RT_SECRET": "0123456789abcdef" * 4}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "arrived\n" * (worlds * size)


async def leave(rt: Any, group: Any, ctl: ranks.Ctl, how: str) -> str:
    """Rank 1 ends early; the others still want something of it."""
    await group.barrier()
    if group.rank() == 1:
        if how == "exception":
            raise ArithmeticError("the program of rank 1 is wrong")
        if how == "sys.exit":
            sys.exit(3)
        return "left"
    with pytest.raises((GroupClosedError, GroupBrokenError)) as caught:
        while True:
            await group.all_sum(np.ones(1000))
    began = time.monotonic()
    with pytest.raises((GroupClosedError, GroupBrokenError)):
        await group.barrier()
    assert time.monotonic() - began < AT_ONCE
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("how", ["return", "exception", "sys.exit"])
def test_a_rank_that_ends_early_is_named(how: str, front: str) -> None:
    outcomes = ranks.run(3, leave, front=front, args=(how,))
    assert outcomes[1].returncode == (0 if how == "return" else 1)
    for rank in (0, 2):
        assert outcomes[rank].error is None and outcomes[rank].returncode == 0, str(outcomes[rank])
        assert outcomes[rank].value.startswith("GroupClosedError: ") and "rank 1 has closed the group" in outcomes[rank].value
        assert outcomes[rank].stderr == ""


# -- Ctrl-C -------------------------------------------------------------------------------------------------------------------------------


async def interrupted(rt: Any, group: Any, ctl: ranks.Ctl, call: str) -> Any:
    """Rank 0 waits for rank 1, is interrupted, spoils its array, and goes on."""
    x = np.full(LARGE, group.rank() + 1, np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "all_sum": lambda: group.all_sum(x),
        "in place": lambda: group.all_sum(x, out=x),
        "barrier": group.barrier,
        "broadcast": lambda: group.broadcast(x, 1),
    }
    await group.barrier()
    if group.rank() == 1:
        ctl.tell(None)
        ctl.hear()
        result = await calls[call]()
        expected = {"all_sum": 3.0, "in place": 3.0, "broadcast": 2.0, "barrier": None}[call]
        right = result is None if expected is None else bool((result == expected).all())
        return right and float(await group.all_sum(1.0)) == 2
    ctl.tell(None)
    try:
        await calls[call]()
    except (KeyboardInterrupt, asyncio.CancelledError):
        at = time.monotonic()
        x.fill(1e30)
        ctl.tell(at)
    else:
        raise AssertionError("the call ended by itself")
    right = float(await group.all_sum(1.0)) == 2
    await rt.close()
    return right


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("call", ["all_sum", "in place", "barrier", "broadcast"])
def test_ctrl_c_ends_a_call_and_the_group_goes_on(call: str, front: str) -> None:
    with ranks.Ranks(2, interrupted, front=front, args=(call,)) as world:
        world.hear(1)
        world.hear(0)
        while "S" not in Path(f"/proc/{world.processes[0].pid}/stat").read_text().rpartition(")")[2][:3]:
            pass  # until it sleeps: in its call
        sent = time.monotonic()
        world.processes[0].send_signal(signal.SIGINT)
        took = world.hear(0) - sent
        world.tell(1, "go on")
        outcomes = world.wait()
    assert took < CTRL_C_SECONDS
    # Under asyncio the signal cancels the main task, which is free to go on as this one does.
    assert [(outcome.value, outcome.returncode) for outcome in outcomes] == [(True, 0)] * 2, "\n".join(map(str, outcomes))


# -- fork ---------------------------------------------------------------------------------------------------------------------------------


async def forking(rt: Any, group: Any, ctl: ranks.Ctl, ending: str) -> tuple[int, float, float]:
    """Fork on rank 0; returns how the child ended, and sums before and after."""
    before = float(await group.all_sum(1.0))
    status = 0
    if group.rank() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist, as the documentation of rt allows
            child = os.fork()
        if child == 0:
            code = await in_the_child(rt, group)
            os._exit(code) if ending == "os._exit" else sys.exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222
    large = await group.all_sum(np.ones(1 << 20, np.float32))
    return status, before, float(large[-1])


async def in_the_child(rt: Any, group: Any) -> int:
    """7 if every call raised at once."""
    for call in (lambda: group.all_sum(1.0), group.barrier, lambda: rt.all_sum(np.ones(5)), lambda: group.send(np.ones(5), 1)):
        began = time.monotonic()
        try:
            await call()
        except GroupClosedError as error:
            if "forked" not in str(error) or time.monotonic() - began > AT_ONCE:
                return 2
        else:
            return 3
    return 7


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_fork_leaves_the_parent_alone(front: str) -> None:
    assert ranks.results(2, forking, front=front, args=("os._exit",)) == [(7, 2.0, 2.0), (0, 2.0, 2.0)]


PROGRAM = """
import os, sys
import numpy as np
import rt.sync as rt
from rt.errors import GroupClosedError

group = rt.init()
group.barrier()
if group.rank() == 0:
    child = os.fork()
    if child == 0:
        try:
            group.all_sum(1.0)
        except GroupClosedError:
            rt.close()
            sys.exit(7)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("sum", group.all_sum(np.ones(1 << 20, np.float32))[-1])
"""


def test_a_forked_child_that_ends_like_a_program_leaves_the_parent_alone(tmp_path: Path) -> None:
    """Not under a loop: that one shares its selector with the parent's, whoever made it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", "-m", "rt.launch", "-n", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done
    assert sorted(line.split()[-2:] for line in done.stdout.splitlines()) == [["child", "7"], ["sum", "2.0"], ["sum", "2.0"]]
