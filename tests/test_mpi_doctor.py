"""``rt.doctor --job`` on jobs whose calls MPI carries, which tells nobody who is late.

May live here: such jobs that hang, and what is said of them. May not: jobs of the ring (``test_doctor_job``).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from typing import Any

import numpy as np
import pytest
from mpi import MpiRanks, libraries
from ranks import succeeded
from test_doctor_job import PATIENCE, calling, doctor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the doors of ranks are abstract Unix sockets")
EVERY = [pytest.param(front, count, id=f"{front}-{count}") for front in ("sync", "asyncio") for count in (4, 4_000_000)]


def until_in_mpi(pid: int, *numbers: int) -> dict[str, Any]:
    """Ask about the job of a process until these ranks wait in calls: nobody tells from outside when they begin to."""
    deadline = time.monotonic() + PATIENCE
    while True:
        jobs = json.loads(doctor("--json").stdout)["jobs"]
        found: list[dict[str, Any]] = [job for job in jobs if any(rank and rank["pid"] == pid for rank in job["ranks"])]
        if found and calling(*numbers)(found[0]):
            return found[0]
        assert time.monotonic() < deadline, jobs


async def all_but_two(rt: Any, group: Any, ctl: Any, count: int) -> float:
    x = np.ones(count, np.float32)
    await group.all_sum(x)
    ctl.tell(os.getpid())
    if group.rank() == 2:
        ctl.hear()
    return float((await group.all_sum(x))[0])


@libraries
@pytest.mark.parametrize(("front", "count"), EVERY)
def test_a_rank_that_does_not_call_is_named(library: str, front: str, count: int) -> None:
    with MpiRanks(3, all_but_two, library=library, front=front, args=(count,)) as ranks:
        job = until_in_mpi(ranks.hear(0), 0, 1)
        expected = (
            rf"rank 2 has not called all_sum #1 \(float32, {4 * count} B\); rank 2 is at ranks.py:\d+ in hear; "
            r"ranks 0 and 1 wait for it since \d+\.\d s"
        )
        assert re.fullmatch(expected, job["verdict"]), job["verdict"]
        assert job["ranks"][2]["calls"] == []
        assert list(job["ranks"][2]["last"].values()) == [f"all_reduce #0 float32 sum shape ({count},) {4 * count} B"]
        ranks.tell(2, "go on")
        assert succeeded(ranks.wait(PATIENCE)) == [3.0] * 3


@libraries
def test_a_rank_that_is_stopped_is_named(library: str) -> None:
    """It cannot say how often it has called, but rank 0 was told."""
    with MpiRanks(3, all_but_two, library=library, front="asyncio", args=(4,)) as ranks:
        pid, stopped = ranks.hear(0), ranks.hear(2)
        until_in_mpi(pid, 0, 1)
        os.kill(stopped, signal.SIGSTOP)
        job = until_in_mpi(pid, 0, 1)
        expected = r"rank 2 has not called all_sum #1 .*; rank 2 did not answer: stopped, .*; ranks 0 and 1 wait for it since .* s"
        assert re.fullmatch(expected, job["verdict"]), job["verdict"]
        os.kill(stopped, signal.SIGCONT)
        ranks.tell(2, "go on")
        assert succeeded(ranks.wait(PATIENCE)) == [3.0] * 3


async def one_message(rt: Any, group: Any, ctl: Any) -> float:
    await group.barrier()
    ctl.tell(os.getpid())
    if group.rank() == 1:
        ctl.hear()
        await group.send(np.ones(3), 0)
        return 3.0
    return float((await group.recv(3, np.float64, 1)).sum())


@libraries
@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_who_does_not_send_is_named(library: str, front: str) -> None:
    with MpiRanks(2, one_message, library=library, front=front) as ranks:
        job = until_in_mpi(ranks.hear(1), 0)
        assert re.match(r"rank 1 has not called recv #0 \(float64, 24 B\); rank 1 is at ", job["verdict"]), job["verdict"]
        ranks.tell(1, "go on")
        assert succeeded(ranks.wait(PATIENCE)) == [3.0] * 2
