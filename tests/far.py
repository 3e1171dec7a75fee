"""What the tests of ``rt.launch`` on many hosts share: a launcher at the desk of a site, and what is left of a job on its hosts.

May live here: starting launchers there, and looking at processes. May not: making hosts (``sshd``), assertions about the launcher.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sshd
from launching import PATIENCE, environment, launcher

SCRIPT = "import os, signal, sys\nrank = int(os.environ['RT_RANK'])\n"
DEADLINE = 5.0  # seconds in which the ranks of a broken job are to have gone


def command(site: sshd.Site, *arguments: str, hosts: Sequence[str] | None = None) -> list[str]:
    """Return the command line of a launcher at the desk; ``hosts`` None stands for all of the site, an empty one for none."""
    names = site.names if hosts is None else hosts
    return site.command(*launcher(*(["--hosts", ",".join(names)] if names else []), *arguments))


def launch(
    site: sshd.Site, *arguments: str, hosts: Sequence[str] | None = None, stdin: bytes = b"", **extra: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(site, *arguments, hosts=hosts), capture_output=True, timeout=PATIENCE, env=environment(**extra), input=stdin
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextlib.contextmanager
def running(
    site: sshd.Site, script: Path, source: str, *options: str, hosts: Sequence[str] | None = None, arguments: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a launcher of ``source`` and leave it running."""
    script.write_text(SCRIPT + source)
    pipe, line = subprocess.PIPE, command(site, *options, str(script), *arguments, hosts=hosts)
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment(), start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    """Return the next lines of a launcher's stdout, sorted."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().decode() for _ in range(count))


class Watch:
    """Processes of some hosts that live now; ``gone`` says whether they end in time."""

    def __init__(self, servers: Sequence[sshd.Server], mark: str) -> None:
        self._fds = {os.pidfd_open(pid) for server in servers for pid in server.processes(mark)}
        self.count = len(self._fds)

    def gone(self, since: float) -> bool:
        """Wait until all have ended, at the longest until ``DEADLINE`` after ``since``."""
        poll, left = select.poll(), set(self._fds)
        for fd in left:
            poll.register(fd, select.POLLIN)
        while left and (patience := since + DEADLINE - time.monotonic()) > 0:
            for fd, _ in poll.poll(patience * 1000):
                poll.unregister(fd)
                left.remove(fd)
        for fd in self._fds:
            os.close(fd)
        return not left
