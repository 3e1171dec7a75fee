"""The ring's own tests over backend ``jaccl``: a plugin of pytest, for the guest, that changes how ``ranks.Ranks`` starts ranks.

May live here: forking them, because an import takes seconds there, with what makes a rank one of jaccl; more time. May not: tests; which
modules are run this way, which ``rdma_guest`` says.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import IO, Any

import pytest
import ranks
import rdma_ranks  # noqa: F401  # loads all that ranks need

import rt.world

_PATIENCE = 10  # times as long as elsewhere: the processor is emulated, so deadlines say little here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the deadlines of the modules' own constants more time."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for name in ("AT_ONCE", "DEATH_SECONDS"):
            if hasattr(module, name):
                setattr(module, name, _PATIENCE * getattr(module, name))


class Forked:
    """What tests use of a ``Popen``, of a child that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class ForkedRanks(ranks.Ranks):
    """As ``Ranks``, over jaccl; ranks are forked from this process, which has loaded what they need."""

    def _spawn(self, rank: int, env: dict[str, str], files: tuple[IO[bytes], IO[bytes]], fds: list[int]) -> Any:
        pid = os.fork()
        if pid == 0:
            _live({"RT_BACKEND": "jaccl", **env}, files, fds)
        return Forked(pid)


def _live(env: dict[str, str], files: tuple[IO[bytes], IO[bytes]], fds: list[int]) -> None:
    """Be a rank as if by a fresh interpreter, then end."""
    status = 1
    try:
        os.setsid()
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), files[0].fileno(), files[1].fileno())):
            os.dup2(file, number)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in fds:
                os.closerange(fd, fd + 1)  # the one that listed them is closed already
        os.environ.clear()
        os.environ.update(env)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # for its life
        logging.getLogger().handlers.clear()  # pytest's
        faulthandler.enable()
        warnings.simplefilter("error")
        ranks.live(Connection(fds[0]))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        rt.world.end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


ranks.Ranks = ForkedRanks  # type: ignore[misc]
