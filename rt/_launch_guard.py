"""The guard of ``rt.launch``: a small process that kills what is left of a job whose launcher was killed, or failed.

May live here: both ends of the pipe between the launcher and its guard, and the search for a job's processes. May not: anything else of
``rt``, because the guard runs this file as a script in a bare interpreter (``-I -S``: 15 ms, no packages), and anything that acts on a job
that ended well.

The kernel kills a rank with its launcher (``PR_SET_PDEATHSIG``), but not the rank's children. The guard waits for the end of a pipe
whose only writer is the launcher; the kernel closes it however the launcher dies. The guard has a session and a command line of its own, so
that what kills the launcher by group or by name does not hit both. A process belongs to the job if it is in the group of a rank, or if
its environment has the job's ``RT_JOB_ID``: that is how children are found that made a group or a session of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from typing import BinaryIO

PATIENCE = 5.0  # seconds for killed processes to go; one in uninterruptible sleep may stay longer
_DONE = b"done\n"


class Guard:
    """The launcher's end."""

    def __init__(self, job: str) -> None:
        # The launcher keeps the reading end too: a rank that registers with a guard that somebody killed must not die of SIGPIPE.
        self._reader, self._writer = os.pipe()
        environment = {name: value for name, value in os.environ.items() if name != "RT_JOB_ID"}  # of a job around us: we outlive it
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", __file__, job],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, self._reader, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),  # a reader of our output must not wait for the guard
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setsid=True,
        )

    def register(self) -> None:
        """Tell the guard of the calling process, a rank between fork and exec; from the launcher it could come too late."""
        os.write(self._writer, b"+%d\n" % os.getpid())

    def forget(self, pid: int) -> None:
        """Tell the guard that a rank's group is empty: its number may belong to a stranger from now on."""
        os.write(self._writer, b"-%d\n" % pid)

    def end(self, *, sweep: bool) -> None:
        """Wait until the guard has ended; with ``sweep`` it kills what is left of the job first."""
        if self._writer < 0:
            return
        if not sweep:
            os.write(self._writer, _DONE)
        os.close(self._writer)
        os.close(self._reader)
        self._writer = -1
        with contextlib.suppress(ChildProcessError):  # somebody killed it, and the launcher has reaped it
            os.waitpid(self.pid, 0)


def guard(commands: BinaryIO, job: str) -> None:
    """Be the guard: note the ranks that come and go, and when the launcher has gone without a word, kill what is left."""
    ranks: set[int] = set()
    for line in commands:
        if line == _DONE:
            return
        (ranks.add if line.startswith(b"+") else ranks.discard)(int(line[1:]))
    deadline = time.monotonic() + PATIENCE
    while (found := members(ranks, job)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # the next look finds what these had just started


def members(ranks: Collection[int], job: str) -> list[int]:
    """Return what to kill: the living processes of a job, or, where there is no /proc, the groups of its ranks as negative numbers."""
    if sys.platform != "linux":
        return [-rank for rank in ranks if _has_members(rank)]
    mark = f"RT_JOB_ID={job}".encode()
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_member(f"/proc/{name}", ranks, mark)]


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # nobody, or only zombies
        return False
    return True


def _is_member(folder: str, ranks: Collection[int], mark: bytes) -> bool:
    try:
        with open(f"{folder}/stat", "rb") as file:
            state, _, group, *_ = file.read().rpartition(b")")[2].split()
        if state in (b"Z", b"X"):
            return False
        if int(group) in ranks:
            return True
        with open(f"{folder}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:  # it has ended meanwhile, or is another user's
        return False


if __name__ == "__main__":
    os.chdir("/")  # not to keep a file system busy
    guard(sys.stdin.buffer, sys.argv[1])
