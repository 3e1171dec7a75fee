"""Rank processes that an MPI launcher starts, under each MPI library that pip has.

May live here: starting ``mpiexec``, and what tests need to hear such ranks as they hear others. May not: assertions about collectives.

``test_mpi*.py`` run bodies of other test modules this way. ``make`` installs mpi4py and both libraries into ``.venv`` (extra ``dev``);
they fit into one environment, where only the names ``mpirun`` and ``mpiexec`` belong to whichever was installed last.
"""

from __future__ import annotations

import importlib.util
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from ranks import Outcome, Ranks, bare_environment, changed, live, succeeded

from rt._launch_mpi import EXCHANGE_HALVES, FEW

PREFIX = Path(sys.prefix)
_PATIENCE = 30.0  # until the next rank has called back


@dataclass(frozen=True)
class Library:
    """An MPI library: its launcher with its options, how it numbers ranks, and what its wheel must be told."""

    launcher: str
    options: tuple[str, ...]
    rank_in: str
    environ: dict[str, str]

    def command(self, n: int) -> list[str]:
        """Return the words before the interpreter."""
        halves = EXCHANGE_HALVES if self.rank_in.startswith("OMPI") and n in FEW else ()  # as `rt.launch --backend mpi` does
        return [str(PREFIX / "bin" / self.launcher), *self.options, *halves, "-n", str(n)]


LIBRARIES = {
    "mpich": Library("mpiexec.hydra", (), "PMI_RANK", {}),
    "openmpi": Library(
        "ompirun_wrapper", ("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--allow-run-as-root"), "OMPI_COMM_WORLD_RANK",
        {"OPAL_PREFIX": str(PREFIX)},
    ),
}  # fmt: skip


def missing(name: str) -> str:
    """Say why a library cannot be used here, "" if it can."""
    if importlib.util.find_spec("mpi4py") is None:
        return "no mpi4py here: pip install -e '.[dev]'"
    if not (PREFIX / "bin" / LIBRARIES[name].launcher).exists():
        return f"no {name} wheel in {PREFIX}: pip install -e '.[dev]'"
    return ""


libraries = pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name) or "-")) for name in LIBRARIES]
)


class MpiRanks(Ranks):
    """As ``Ranks``, started by one process, MPI's launcher: ``processes`` is that one, and what ranks print comes out of it."""

    def __init__(self, n: int, body: Callable[..., Any], *, library: str, **how: Any) -> None:
        self._library = LIBRARIES[library]
        self._folder = tempfile.TemporaryDirectory()
        super().__init__(n, body, **how)

    def _begin(self, n: int, env: dict[str, str | None], job: Any) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._files.append(files)
        with socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(self._folder.name, "s")
            listener.bind(path)
            listener.listen(n)
            program = f"import sys; sys.path.insert(0, {here!r}); import mpi; mpi.rank({path!r}, {self._library.rank_in!r})"
            # Open MPI's launcher names a folder by its process ID, and cannot start where one that was killed has left the same.
            extra = {"RT_BACKEND": "mpi", "PRTE_MCA_prte_tmpdir_base": self._folder.name, **self._library.environ, **env}
            process = subprocess.Popen(
                [*self._library.command(n), self._python, "-X", "faulthandler", "-W", "error", "-c", program],
                env=changed(bare_environment(), extra), stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1], start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            found = dict(self._called_back(listener) for _ in range(n))
        self._connections = [found[rank] for rank in range(n)]
        for connection in self._connections:
            connection.send(job)

    def _called_back(self, listener: socket.socket) -> tuple[int, Connection]:
        until = time.monotonic() + _PATIENCE
        while not select.select([listener], [], [], 0.05)[0]:
            if self.processes[0].poll() is not None:
                raise AssertionError(f"the launcher ended before all ranks had called back\n{self._autopsy()}")
            if time.monotonic() > until:
                raise AssertionError(f"not all ranks called back within {_PATIENCE} s\n{self._autopsy()}")
        connection = Connection(listener.accept()[0].detach())
        return connection.recv(), connection

    def _collect(self) -> None:
        for file in self._files[0]:
            file.seek(0)
        stdout, stderr = (file.read().decode(errors="replace") for file in self._files[0])
        for outcome in self.outcomes:
            outcome.returncode, outcome.stdout, outcome.stderr = self.processes[0].poll(), stdout, stderr

    def _kill(self) -> None:
        for process in self.processes:
            process.terminate()  # the launcher ends the ranks, which need not be of its process group
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        super()._kill()
        self._folder.cleanup()


def rank(path: str, rank_in: str) -> None:
    """The whole life of a rank process."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    connection = Connection(sock.detach())
    connection.send(int(os.environ[rank_in]))
    live(connection)


def run(n: int, body: Callable[..., Any], *, library: str, timeout: float = 60, **how: Any) -> list[Outcome]:
    """Run ``body`` on ``n`` ranks to the end and return how each ended; ``how`` is for ``Ranks``."""
    with MpiRanks(n, body, library=library, **how) as ranks:
        return ranks.wait(timeout)


def results(n: int, body: Callable[..., Any], **how: Any) -> list[Any]:
    """As ``run``, for bodies that must succeed: return their values."""
    return succeeded(run(n, body, **how))
