"""``rt.doctor --job``: real jobs that are stuck in every way, and who is named.

May live here: ranks that hang, the doctor beside them, its verdict as a function. May not: hosts to be examined (``test_doctor_hosts``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
from hosts import PATIENCE, ROOT, ranks_on, ring_as_mlx_writes_it, ring_file
from hypothesis import given
from hypothesis import strategies as st
from ranks import FRONTS, Ranks, succeeded

from rt import _doctor_job, _doors
from rt._doctor_job import JobReport, verdict
from rt._doors import listed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the doors of ranks are abstract Unix sockets")
_NOT_YET: dict[str, Any] = {"ranks": [None] * 9, "verdict": "", "size": 0, "silent": []}
fronts = pytest.mark.parametrize("front", FRONTS)


def doctor(*words: str, on: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*on, sys.executable, "-m", "rt.doctor", "--job", *words]
    env = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)


def job_of(ranks: Ranks, on: Sequence[str] = ()) -> dict[str, Any]:
    """What the doctor finds out about the job of these ranks; there may be others on this machine."""
    told = json.loads(doctor("--json", on=on).stdout)
    pids = {process.pid for process in ranks.processes}
    found = [job for job in told["jobs"] if on or any(rank and rank["pid"] in pids for rank in job["ranks"])]
    return found[0] if found else _NOT_YET


def until(ranks: Ranks, happened: Callable[[dict[str, Any]], bool], on: Sequence[str] = ()) -> dict[str, Any]:
    """Ask until the ranks are where the test wants them: nobody tells from outside that a call has begun to wait."""
    deadline = time.monotonic() + PATIENCE
    while not happened(found := job_of(ranks, on)):
        assert time.monotonic() < deadline, found
    return found


def told(job: dict[str, Any]) -> bool:
    """Whether all ranks say something: the group has formed."""
    return bool(job["size"]) and all(job["ranks"]) and not job["missing"]


def calling(*numbers: int) -> Callable[[dict[str, Any]], bool]:
    """Whether these ranks are in calls, and sleep there."""

    def sleeping(rank: dict[str, Any] | None) -> bool:
        return bool(rank and rank.get("calls")) and all(call["seconds"] is not None for call in rank["calls"])

    return lambda job: all(sleeping(job["ranks"][number]) for number in numbers)


# --- real jobs ------------------------------------------------------------------------------------------------------------------------


async def all_but_one(rt: Any, group: Any, ctl: Any, absent: int) -> float:
    x = np.ones(4, np.float32)
    await group.all_sum(x)
    if group.rank() == absent:
        ctl.hear()
    return float((await group.all_sum(x)).sum())


@fronts
def test_a_rank_that_does_not_call_is_named(front: str) -> None:
    with Ranks(4, all_but_one, front=front, args=(2,)) as ranks:
        job = until(ranks, calling(0, 1, 3))
        assert job["size"] == 4
        assert re.fullmatch(
            r"rank 2 has not called all_sum #1 \(float32, 16 B\); rank 2 is at ranks.py:\d+ in hear; "
            r"ranks 0, 1 and 3 wait for it since \d+\.\d s", job["verdict"]
        ), job["verdict"]  # fmt: skip
        waiting = [job["ranks"][rank]["calls"] for rank in (0, 1, 3)]
        assert all(0 < call["seconds"] < PATIENCE and call["what"].startswith("all_sum #1") for (call,) in waiting)
        assert {rank for (call,) in waiting for rank in call["absent"]} == {2}
        assert job["ranks"][2]["calls"] == []
        assert list(job["ranks"][2]["last"].values()) == ["all_reduce #0 float32 sum shape (4,) 16 B"]
        assert [rank["pid"] for rank in job["ranks"]] == [process.pid for process in ranks.processes]
        shown = doctor(job["job"])
        assert job["verdict"].partition(";")[0] in shown.stdout
        assert re.search(r"^\s*0 .* all_sum #1 \(float32, 16 B\) +\d+\.\d s +rank 2 to call", shown.stdout, re.M), shown.stdout
        ranks.tell(2, "go on")
        assert succeeded(ranks.wait(PATIENCE)) == [16.0] * 4
    assert job["job"] not in doctor("--json").stdout  # it has ended, and its doors with it


def test_a_rank_that_is_stopped_is_named() -> None:
    with Ranks(3, all_but_one, args=(1,)) as ranks:
        until(ranks, calling(0, 2))
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        job = until(ranks, lambda job: job["silent"] == [1])  # on a busy machine another one may be late at first
        expected = r"rank 1 has not called all_sum #1 .*; rank 1 did not answer: stopped, .*; ranks 0 and 2 wait for it since .* s"
        assert re.fullmatch(expected, job["verdict"]), job["verdict"]
        os.kill(ranks.processes[0].pid, signal.SIGSTOP)  # at whose door one would knock first
        assert job_of(ranks)["ranks"][0] is None
        for rank in (0, 1):
            os.kill(ranks.processes[rank].pid, signal.SIGCONT)
        ranks.tell(1, "go on")
        assert succeeded(ranks.wait(PATIENCE)) == [12.0] * 3


def test_a_rank_at_whose_door_too_many_wait_is_there_all_the_same() -> None:
    """It is stopped, and was asked often before."""
    with socket.socket(socket.AF_UNIX) as door, contextlib.ExitStack() as waiting:
        door.bind("\0" + _doors.new_name("0123456789", 3))
        door.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                knocking = waiting.enter_context(socket.socket(socket.AF_UNIX))
                knocking.setblocking(False)
                knocking.connect(door.getsockname())
        assert _doors.ask("01234567") == {"01234567": {3: {}}}


async def never_called(rt: Any, group: Any, ctl: Any) -> None:
    ctl.hear()


def test_a_group_that_does_not_form() -> None:
    with Ranks(2, never_called, env={"RT_WORLD_SIZE": "3"}) as ranks:
        job = until(ranks, lambda job: job["verdict"] == "the group has not formed: rank 0 waits for rank 2: not heard of")
        assert job["size"] == 3
        shown = doctor(job["job"]).stdout
        assert re.search(r"^\s*0 .* init +2 ", shown, re.M), shown
        assert re.search(r"^\s*2 +not here", shown, re.M), shown
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)  # which is here, and says nothing
        shown = doctor(job["job"]).stdout
        assert re.search(r"^\s*1 +no answer", shown, re.M) and re.search(r"^\s*2 +not here", shown, re.M), shown
        os.kill(ranks.processes[1].pid, signal.SIGCONT)


async def sends_only(rt: Any, group: Any, ctl: Any) -> None:
    work = group.recv((4,), np.float32, 1 - group.rank(), tag=group.rank())
    await work


def test_ranks_that_wait_for_each_other() -> None:
    with Ranks(2, sends_only, front="asyncio") as ranks:
        job = until(ranks, calling(0, 1))
        assert job["verdict"] == (
            "ranks wait for each other in different calls: rank 0 in recv #0 (float32, 16 B) for rank 1; "
            "rank 1 in recv #0 (float32, 16 B) for rank 0"
        )


async def forks_and_waits(rt: Any, group: Any, ctl: Any) -> None:
    reading, _ = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)  # for ever: nobody writes
    ctl.tell(child)
    ctl.hear()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_is_left_of_a_rank_that_was_killed_also_while_a_child_of_it_lives() -> None:
    with Ranks(2, forks_and_waits) as ranks:
        children = [ranks.hear(rank) for rank in range(2)]
        try:
            job = until(ranks, told)["job"]
            assert sorted(listed(Path("/proc/net/unix").read_text())[job]) == [0, 1]
            os.kill(ranks.processes[0].pid, signal.SIGKILL)
            ranks.processes[0].wait()
            assert 0 not in listed(Path("/proc/net/unix").read_text()).get(job, {})
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_told_nothing() -> None:
    with Ranks(2, never_called) as ranks:
        job = until(ranks, told)["job"]
        (name,) = listed(Path("/proc/net/unix").read_text())[job][0]
        asked = "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        asked += "s.connect('\\0' + sys.argv[1]); print(len(s.recv(9)))"
        answers = [subprocess.run([sys.executable, "-c", text, name], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
                   for text in (asked, asked.replace("os.setuid(65534)", "pass"))]  # fmt: skip
        assert answers == ["0\n", "9\n"]
        for rank in range(2):
            ranks.tell(rank, "end")
        succeeded(ranks.wait(PATIENCE))


def test_no_job_at_all() -> None:
    found = doctor("none of that name")
    assert found.returncode == 1
    assert "no job of yours whose identity begins with none of that name has a rank on this host" in found.stderr


@pytest.mark.namespaces
@pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")
def test_every_host_is_asked_from_one_also_along_a_ring_of_cables(tmp_path: Path) -> None:
    with netns.ring_of_hosts(5) as made:
        ring = ring_file(tmp_path, ring_as_mlx_writes_it(5))
        with ranks_on(made, all_but_one, ring, args=(3,)) as ranks:
            for host in (made[0], made[2]):
                job = until(ranks, calling(0, 1, 2, 4), on=host.command())
                expected = r"rank 3 has not called all_sum #1 .*; ranks 0, 1, 2 and 4 wait for it since .* s"
                assert re.fullmatch(expected, job["verdict"]), job["verdict"]
                assert job["ranks"][0]["links"]["2"] == "relayed"
            ranks.tell(3, "go on")
            assert succeeded(ranks.wait(PATIENCE)) == [20.0] * 5


# --- the verdict as a function -----------------------------------------------------------------------------------------------------------


def facts(*calls: tuple[str, Sequence[int], Sequence[int]], at: str = "", group: str = "world") -> dict[str, Any]:
    told = [
        {"what": what, "absent": list(absent), "late": list(late), "seconds": 1.0 + n, "group": group, "name": group}
        for n, (what, absent, late) in enumerate(calls)
    ]
    return {"calls": told, "broken": [], "at": at, "last": {}, "host": "h", "pid": 1}


def report(*ranks: dict[str, Any] | None, gone: dict[int, str] | None = None) -> JobReport:
    silent = [rank for rank, told in enumerate(ranks) if told is None and rank not in (gone or {})]
    return JobReport("j", len(ranks), list(ranks), gone or {}, {}, silent)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (report(facts(), facts()), "no rank waits for another"),
        (report(facts(), None), f"no rank waits for another; rank 1 {_doctor_job._SILENT}"),
        (
            report(facts(("all_sum #3", [1, 2], [])), facts(at="a.py:1 in f"), facts()),
            "ranks 1 and 2 have not called all_sum #3; rank 1 is at a.py:1 in f; rank 0 waits for them since 1.0 s",
        ),
        (
            report(facts(("send #0", [1], [])), None, gone={1: "left"}),
            "rank 1 has not called send #0; rank 1 has left; rank 0 waits for it since 1.0 s",
        ),
        # 0 waits for 1, which waits for 2 in something else: 2 is to blame, whatever 0 calls
        (
            report(facts(("all_sum #3", [1], [])), facts(("recv #0", [2], [])), facts()),
            "rank 2 has not called recv #0; ranks 0 and 1 wait for it since 1.0 s",
        ),
        (report(facts(("all_sum #3", [], [1])), facts()), "rank 1 has called all_sum #3 and owes data; rank 0 waits for it since 1.0 s"),
        (
            report(facts(("all_sum #3", [], [1])), facts(("all_sum #3", [], [0]))),
            "ranks 0 and 1 are all in all_sum #3: its data is on the way; ask again to see whether it moves",
        ),
        (
            report(facts(("recv #0", [1], [])), facts(("barrier #2", [0], []))),
            "ranks wait for each other in different calls: rank 0 in recv #0 for rank 1; rank 1 in barrier #2 for rank 0",
        ),
        (
            report(facts(("all_sum #0", [1], []), group="a"), facts(("all_sum #0", [0], []), group="b")),
            "ranks wait for each other in different calls: rank 0 in all_sum #0 of a for rank 1; rank 1 in all_sum #0 of b for rank 0",
        ),
        (report({**facts(), "broken": ["lost rank 2"]}), "the group is broken: lost rank 2"),
    ],
)
def test_verdicts(seen: JobReport, expected: str) -> None:
    assert verdict(seen) == expected


others = st.lists(st.integers(0, 3), unique=True)
waiting = st.builds(lambda what, absent, late: (f"call #{what}", absent, late), st.integers(0, 2), others, others)


@given(st.lists(st.none() | st.lists(waiting, max_size=2).map(lambda calls: facts(*calls)), min_size=4, max_size=4))
def test_there_is_always_a_verdict_and_whoever_is_blamed_waits_for_nobody(ranks: list[dict[str, Any] | None]) -> None:
    said = verdict(report(*ranks))
    blamed = re.match(r"ranks? ([\d, and]+) ha(?:s|ve) (?:not )?called", said)
    for rank in map(int, re.findall(r"\d+", blamed[1])) if blamed else ():
        told = ranks[rank]
        assert told is None or not any(call["absent"] or call["late"] for call in told["calls"])
