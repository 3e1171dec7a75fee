"""What the tests of ``rt.launch`` share: to start a launcher, feed it, read it, and say what became of it.

May live here: starting launchers and waiting for processes. May not: assertions about the launcher itself.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rt.launch

ROOT = str(Path(rt.launch.__file__).parents[1])
PATIENCE = 40.0  # seconds no test needs; a hang fails after them
linux = pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals, pidfds and /proc are Linux")

PREAMBLE = "import os, signal, sys\nrank = int(os.environ['RT_RANK'])\n"
WAIT_FOR_EVER = "while True: signal.pause()\n"


def launcher(*arguments: str, grace: float = 5.0) -> list[str]:
    return [sys.executable, "-c", f"import sys; from rt.launch import main; sys.exit(main(grace={grace}))", *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, **extra}


def launch(*arguments: str, grace: float = 5.0, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    command = launcher(*arguments, grace=grace)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(**extra), input=stdin)


def launch_source(script: Path, source: str, size: int = 2, grace: float = 5.0, **extra: str) -> subprocess.CompletedProcess[str]:
    script.write_text(PREAMBLE + source)
    return launch("-n", str(size), str(script), grace=grace, **extra)


@contextlib.contextmanager
def running(script: Path, source: str, *options: str, size: int = 2, grace: float = 5.0) -> Iterator[subprocess.Popen[bytes]]:
    script.write_text(PREAMBLE + source)
    pipe = subprocess.PIPE
    command = launcher("-n", str(size), *options, str(script), grace=grace)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment(), start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().decode() for _ in range(count))


def last_line(text: str | bytes) -> str:
    return (text if isinstance(text, str) else text.decode()).splitlines()[-1]


def read_until(fd: int, pattern: str, count: int = 1, shown: str = "") -> str:
    """Read until what was shown has ``count`` matches."""
    while len(re.findall(pattern, shown)) < count:
        assert select.select([fd], [], [], PATIENCE)[0], shown
        shown += os.read(fd, 4096).decode()
    return shown


class Terminal:
    """A launcher on a terminal of its own, as a person has it."""

    def __init__(self, *command: str) -> None:
        self.screen, user = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=user, stdout=user, stderr=user, env=environment(), preexec_fn=lambda: os.login_tty(os.dup(0))
        )
        os.close(user)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def until(self, pattern: str, count: int = 1) -> str:
        return read_until(self.screen, pattern, count)


def wait_for_death(pidfd: int) -> bool:
    """Wait the 5 seconds that are promised."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(5000))
