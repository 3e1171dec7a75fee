"""Starts the ranks of a system on this host, tells them what to run and reads what they measured.

May live here: processes and the lines to them. May not: how ranks find each other (``meeting.py``), what is measured (the command's own
file), statistics and tables (``report.py``).

Every rank has its own line to the conductor, so commands need no collective of the system under test, and between commands a rank is
blocked in a read: the systems that are not being measured cost nothing. The line is a pair of sockets, one of which is the rank's standard
input and output; ranks that a launcher starts (MPI's) connect to a socket in our folder, since launchers use those streams themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from bench.meeting import BenchError, Launcher, Meeting, meet

RANK = ("-m", "bench.rank")
PROBE = ("-m", "bench.probe")
_ANSWER_SECONDS = 180.0
_LEAVE_SECONDS = 5.0
_GRACE_SECONDS = 1.0  # for launched ranks that can still leave by themselves
_GLANCE_SECONDS = 0.1  # between looks at whether a launcher still lives
# What would make a worker join another job, or contradict what the conductor says. Tuning variables pass through.
_FOREIGN = ("MASTER_", "MLX_", "OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "TORCHELASTIC_")
_FOREIGN_NAMES = {"RANK", "WORLD_SIZE", "RT_RANK", "RT_WORLD_SIZE", "RT_COORDINATOR", "RT_COORDINATOR_FD", "RT_HOSTFILE", "RT_SECRET_FD"}

Answer = dict[str, Any]


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN) and name not in _FOREIGN_NAMES}


class System:
    """All ranks of one system, as long as they live.

    Args:
        name: what the tables call it.
        meeting: how its ranks find each other.
        arguments: the worker's module (``-m`` and its name) and its arguments.

    Attributes:
        greetings: what each rank said of itself, once started.
    """

    def __init__(self, name: str, meeting: Meeting, arguments: list[str]) -> None:
        self.name = name
        self.size = len(meeting.ranks)
        self.greetings: list[Answer] = []
        self._meeting = meeting
        # -P: the folder that we were started in stays off sys.path.
        self._command = [meeting.python, "-P", *arguments]
        self._processes: list[subprocess.Popen[bytes]] = []  # the ranks, or the one that starts them
        self._lines: list[socket.socket] = []
        self._log: IO[bytes] = tempfile.TemporaryFile()  # what all ranks write to standard error
        self._idle = [0.0, 0.0]

    def start(self) -> None:
        """Start the ranks and return when their group stands.

        Raises:
            BenchError: a rank could not join.
        """
        shared = {**_own_environment(), **self._meeting.environ, "BENCH_SIZE": str(self.size)}
        if self._meeting.launcher is None:
            for rank in range(self.size):
                self._spawn(shared, rank)
        else:
            self._launch(shared, self._meeting.launcher)
        self.greetings = self._answers()
        self._release_ports()

    @property
    def pids(self) -> list[int]:
        """Process id per rank."""
        return [greeting["pid"] for greeting in self.greetings]

    @property
    def uses(self) -> dict[str, str]:
        """What rank 0 said about versions."""
        uses: dict[str, str] = self.greetings[0]["uses"]
        return uses

    def _spawn(self, shared: Mapping[str, str], rank: int) -> None:
        ours, theirs = socket.socketpair()
        self._lines.append(ours)
        with theirs:
            process = subprocess.Popen(
                self._command,
                env={**shared, "BENCH_RANK": str(rank), **self._meeting.ranks[rank]},
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._log,
                pass_fds=self._meeting.inherited[rank] if self._meeting.inherited else (),
                # Ctrl-C is the conductor's to handle; a worker would answer it with a traceback. No session each: Linux shares the
                # processor between sessions first, and the ranks of an mpirun have one together.
                process_group=0,
            )
        self._processes.append(process)

    def _launch(self, shared: Mapping[str, str], launcher: Launcher) -> None:
        with contextlib.ExitStack() as stack:
            listeners = []
            for rank in range(self.size):
                listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                listeners[rank].bind(str(launcher.ends / str(rank)))
                listeners[rank].listen(1)
                listeners[rank].settimeout(_GLANCE_SECONDS)
            process = subprocess.Popen(
                [*launcher.command, *self._command],
                env={**shared, "BENCH_ENDS": str(launcher.ends), "BENCH_RANK_IN": launcher.rank_in},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
            self._processes.append(process)
            deadline = time.monotonic() + _ANSWER_SECONDS
            for rank, listener in enumerate(listeners):
                self._lines.append(self._accept(listener, rank, deadline))

    def _accept(self, listener: socket.socket, rank: int, deadline: float) -> socket.socket:
        while True:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if self._processes[0].poll() is not None:
                raise BenchError(f"{self.name}: rank {rank} did not start\n{self._said()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: rank {rank} did not start within {_ANSWER_SECONDS:.0f} s\n{self._said()}")

    def ask(self, command: Answer) -> list[Answer]:
        """Have all ranks run a command at the same time; return their answers in rank order.

        Raises:
            BenchError: a rank answered with an error, ended, or gave no answer for three minutes.
        """
        line = json.dumps(command).encode() + b"\n"
        for sock in self._lines:
            with contextlib.suppress(ConnectionError):  # it has ended: reading its answer says so, and why
                sock.sendall(line)
        answers = self._answers()
        for answer in answers:
            cpu, wall = answer.pop("idle")
            self._idle[0] += cpu
            self._idle[1] += wall
        return answers

    @property
    def idle_share(self) -> float:
        """CPU seconds per second that a rank used, on average, while nothing was asked of it."""
        return self._idle[0] / self._idle[1] if self._idle[1] else 0.0

    def _answers(self) -> list[Answer]:
        deadline = time.monotonic() + _ANSWER_SECONDS
        received = [b""] * self.size
        with selectors.DefaultSelector() as selector:
            for rank, sock in enumerate(self._lines):
                selector.register(sock, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(key.data for key in selector.get_map().values())
                    raise BenchError(f"{self.name}: no answer from rank(s) {missing} within {_ANSWER_SECONDS:.0f} s\n{self._said()}")
                for key, _ in ready:
                    received[key.data] += self._read(key.data)
                    if received[key.data].endswith(b"\n"):
                        selector.unregister(key.fileobj)
                        self._refuse_error(key.data, received[key.data])
        return [json.loads(line) for line in received]

    def _read(self, rank: int) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):  # it ended before it read what we asked
            data = self._lines[rank].recv(1 << 16)
        if not data:
            raise BenchError(f"{self.name}: rank {rank} ended{self._how(rank)}\n{self._said()}")
        return data

    def _how(self, rank: int) -> str:
        if self._meeting.launcher is None:
            return f" with exit code {self._processes[rank].wait(_LEAVE_SECONDS)}"
        with contextlib.suppress(subprocess.TimeoutExpired):  # it ends the other ranks first, and says which one was to blame
            return f", and its launcher with exit code {self._processes[0].wait(_LEAVE_SECONDS)}"
        return ""

    def _refuse_error(self, rank: int, line: bytes) -> None:
        # At once, not when all have answered: the others may wait for this rank for ever.
        error = json.loads(line).get("error")
        if error is not None:
            raise BenchError(f"{self.name}: rank {rank} failed\n{error}")

    def _said(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2000))
        return self._log.read().decode(errors="replace").strip()

    def close(self) -> None:
        """Let the ranks leave together, and end those that do not within five seconds."""
        self._hang_up()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
        for sock in self._lines:
            sock.close()
        self._release_ports()
        self._log.close()

    def _hang_up(self) -> None:
        for sock in self._lines:
            with contextlib.suppress(OSError):  # it has ended
                sock.shutdown(socket.SHUT_WR)

    def _release_ports(self) -> None:
        for sock in self._meeting.reserved:
            sock.close()

    def kill(self) -> None:
        """End all ranks now."""
        if self._meeting.launcher is not None:
            self._kill_launched()
        for process in self._processes:
            process.kill()
            process.wait()

    def _kill_launched(self) -> None:
        """Have the launcher end its ranks, which are nobody's once it is killed; end them ourselves where it does not.

        Those that can leave by themselves first do so: MPICH's, killed, leave their shared memory behind.
        """
        self._hang_up()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            process.terminate()
            try:
                process.wait(_LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in self.pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running(
    name: str, system: str, size: int, arguments: list[str], environ: Mapping[str, str] | None = None
) -> Iterator[System]:
    """Start ``size`` ranks of ``system``, with ``environ`` besides our own, and end them on the way out: together if all went well, else
    at once."""
    with tempfile.TemporaryDirectory(prefix="rt-bench-") as folder:
        meeting = meet(system, size, Path(folder))
        meeting.environ = {**meeting.environ, **(environ or {})}
        with standing(name, meeting, arguments) as ranks:
            yield ranks


@contextlib.contextmanager
def standing(name: str, meeting: Meeting, arguments: list[str]) -> Iterator[System]:
    """As ``running``, of the ranks that meet as ``meeting`` says."""
    ranks = System(name, meeting, arguments)
    try:
        ranks.start()
        yield ranks
    except BaseException:
        ranks.kill()
        raise
    finally:
        ranks.close()
