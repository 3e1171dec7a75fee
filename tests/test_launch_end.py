"""How jobs of ``rt.launch`` are ended, and that nothing stays.

May live here: signals, deadlines, orphans, and what waiting costs. May not: groups and collectives; the ranks here are small scripts that
never import ``rt``, so that a failure is the launcher's own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import (
    PATIENCE,
    WAIT_FOR_EVER,
    last_line,
    launch,
    lines,
    linux,
    running,
    wait_for_death,
)

from rt._launch_guard import guard, members
from rt._launch_job import Job
from rt._launch_options import parse


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


# --- signals and orphans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handed_on(script: Path, number: signal.Signals) -> None:
    with running(script, "signal.signal(signal.SIGINT, signal.SIG_DFL)\nprint('ready')\n" + WAIT_FOR_EVER) as process:
        lines(process, 2)
        process.send_signal(number)
        error = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, last_line(error)) == (128 + number, f"rt.launch: stopped by {number.name}")


def test_ranks_that_end_in_order_when_told_to_are_no_failure(script: Path) -> None:
    source = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('ready')\n"
    with running(script, source + WAIT_FOR_EVER) as process:
        lines(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=PATIENCE)[1] == b""
        assert process.returncode == 0


def test_a_second_sigint_kills(script: Path) -> None:
    source = "signal.signal(signal.SIGINT, lambda *_: print('not yet'))\nprint('ready')\n"
    with running(script, source + WAIT_FOR_EVER, grace=10 * PATIENCE) as process:
        lines(process, 2)
        process.send_signal(signal.SIGINT)
        assert lines(process, 2) == ["[0] not yet\n", "[1] not yet\n"]
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, last_line(error)) == (130, "rt.launch: stopped by SIGINT")


CHILDREN = """
import subprocess
sleep = ["sleep", "1000"]
ways = {"env": {"PATH": os.environ["PATH"]}}, {"process_group": 0}, {"start_new_session": True}  # not both: such a one would escape
same, own_group, own_session = (subprocess.Popen(sleep, **way).pid for way in ways)
daemon = int(subprocess.check_output(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"]))
print(os.getpid(), same, own_group, own_session, daemon)
"""


@contextlib.contextmanager
def watched(line: str) -> Iterator[list[int]]:
    """Open pidfds of the processes whose numbers a rank has printed."""
    pids = [int(word) for word in line.split()[1:]]
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield pidfds
    finally:
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def guard_of(launcher: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if b"_launch_guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


@linux
@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_outlives_a_killed_launcher(script: Path, whole_group: bool) -> None:
    with running(script, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILDREN + WAIT_FOR_EVER) as process:
        first, second = lines(process, 2)
        with watched(first) as a, watched(second) as b:
            guard = os.pidfd_open(guard_of(process.pid))
            if whole_group:  # as timeout -s KILL does
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            assert [wait_for_death(pidfd) for pidfd in (*a, *b, guard)] == [True] * 11
            os.close(guard)


@linux
def test_without_its_guard_a_job_goes_on_and_its_ranks_die_with_the_launcher(script: Path) -> None:
    with running(script, "print(os.getpid())\nprint(sys.stdin.readline())\n" + WAIT_FOR_EVER) as process:
        first, second = lines(process, 2)
        with watched(first) as a, watched(second) as b:
            guard = os.pidfd_open(guard_of(process.pid))
            signal.pidfd_send_signal(guard, signal.SIGKILL)
            assert wait_for_death(guard)
            os.close(guard)
            assert process.stdin is not None
            process.stdin.write(b"still there?\n")
            assert "[0] still there?\n" in lines(process, 4)
            process.kill()
            assert all(wait_for_death(pidfd) for pidfd in (*a, *b))


@linux
def test_after_a_failure_nothing_is_left(script: Path) -> None:
    with running(script, CHILDREN + "sys.stdin.readline()\nif rank == 1: sys.exit(3)\n" + WAIT_FOR_EVER) as process:
        first, second = lines(process, 2)
        with watched(first) as a, watched(second) as b:
            process.communicate(b"go on\n", timeout=PATIENCE)
            assert process.returncode == 3
            assert [bool(select.select([pidfd], [], [], 0)[0]) for pidfd in (*a, *b)] == [True] * 10


@linux
def test_after_success_a_daemon_may_stay(script: Path) -> None:
    with running(script, CHILDREN + "os.kill(own_group, 9)\nsys.stdin.readline()", size=2, grace=0.5) as process:
        first, second = lines(process, 2)
        with watched(first) as a, watched(second) as b:
            process.communicate(b"go on\n", timeout=PATIENCE)
            assert process.returncode == 0
            ended = [[bool(select.select([pidfd], [], [], 0)[0]) for pidfd in pidfds] for pidfds in (a, b)]
            assert ended == [[True, True, True, False, False]] * 2


@linux
def test_waiting_costs_nothing(script: Path) -> None:
    with running(script, "print('ready')\n" + WAIT_FOR_EVER, size=4) as process:
        lines(process, 4)
        pids = (process.pid, guard_of(process.pid))

        def used() -> int:  # nanoseconds of processor time
            return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids)

        before = used()
        time.sleep(2)
        assert used() - before < 0.005 * 2e9


def test_a_guard_leaves_alone_who_has_the_number_of_a_rank_that_is_gone() -> None:
    with subprocess.Popen(["sleep", "1000"], process_group=0) as stranger:
        guard(io.BytesIO(b"+%d\n-%d\n" % (stranger.pid, stranger.pid)), "job")
        assert stranger.poll() is None
        guard(io.BytesIO(b"+%d\n" % stranger.pid), "job")
        assert stranger.wait(PATIENCE) == -signal.SIGKILL


def test_without_proc_a_guard_finds_the_groups_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with subprocess.Popen(["sleep", "1000"], process_group=0) as rank:
        assert members([rank.pid], "job") == [-rank.pid]
        rank.kill()
        rank.wait()
        assert members([rank.pid], "job") == []


# --- deadlines -----------------------------------------------------------------------------------------------------------------------


def test_timeout_ends_the_job() -> None:
    done = launch("-n", "3", "--timeout", "2.5", "sh", "-c", "echo ready; test $RT_RANK = 2 || exec sleep 1000")
    assert (done.returncode, last_line(done.stderr)) == (124, "rt.launch: ended by --timeout 2.5: ranks 0, 1 were still running")
    assert sorted(done.stdout.splitlines()) == ["[0] ready", "[1] ready", "[2] ready"]


def test_a_timeout_that_passes_while_only_output_is_left_does_not_wake_the_loop() -> None:
    job = Job(parse(["-n", "2", "--timeout", "5", "true"]), grace=5.0)
    job._limit = 0.0  # long ago, and no rank runs
    assert job._patience() is None


def test_a_job_within_its_timeout_is_left_alone(script: Path) -> None:
    script.write_text("import sys; sys.exit(5)")
    done = launch("-n", "2", "--timeout", "1000", str(script))
    assert (done.returncode, re.sub("[01]", "N", last_line(done.stderr))) == (5, "rt.launch: rank N exited with code 5")


@linux
@pytest.mark.parametrize("ending", ["exit 0", "exit 5"])
def test_children_of_ranks_are_ended_too(ending: str) -> None:
    child = f"sleep 1000 >/dev/null 2>&1 & echo $!; {ending}"
    done = launch("-n", "1", "sh", "-c", child, grace=0.2)
    assert done.returncode == int(ending.split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_ranks_helper_may_finish_its_work() -> None:
    done = launch("-n", "2", "sh", "-c", "(sleep 0.3; echo late) & exit 0", grace=PATIENCE)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["[0] late", "[1] late"])
