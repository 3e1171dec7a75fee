"""Starts the ranks of a system on this host, tells them what to run and reads what they measured.

May live here: processes, pipes, and how each system's ranks are told to find each other. May not: what is measured (the command's own
file), statistics and tables (``report.py``).

Every rank has its own pipe to the conductor, so commands need no collective of the system under test, and between commands a rank is
blocked in a read: the systems that are not being measured cost nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("gloo", "mlx", "nospin", "tcp")  # the last two are no systems but what ours are held against
WORKER = (str(ROOT / "bench" / "worker.py"),)  # by its path: peers' interpreters know no package of ours
PROBE = ("-m", "bench.probe")
_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_ANSWER_SECONDS = 180.0
_LEAVE_SECONDS = 5.0
# What would make a worker join another job, or contradict what the conductor says. Tuning variables pass through.
_FOREIGN = ("MASTER_", "MLX_", "OMPI_", "PMI_", "SLURM_", "TORCHELASTIC_")
_FOREIGN_NAMES = {"RANK", "WORLD_SIZE", "RT_RANK", "RT_WORLD_SIZE", "RT_COORDINATOR", "RT_COORDINATOR_FD", "RT_HOSTFILE", "RT_SECRET_FD"}

Answer = dict[str, Any]


class BenchError(RuntimeError):
    """A system could not be started, or broke while it was measured. The message says which, and what its ranks wrote."""


@dataclass
class Meeting:
    """How the ranks of one system find each other.

    Attributes:
        python: the interpreter that has the system installed.
        environ: what every rank's environment gets besides ``ranks``.
        ranks: per rank, what only its environment gets.
        reserved: sockets that keep the ports ours until the group stands.
        inherited: per rank, the descriptors it inherits; empty: nobody inherits any.
    """

    python: str
    environ: dict[str, str]
    ranks: list[dict[str, str]]
    reserved: list[socket.socket] = field(default_factory=list)
    inherited: list[tuple[int, ...]] = field(default_factory=list)


def peers_python() -> str:
    """Return the interpreter that has the peers.

    Raises:
        BenchError: there is none; the message says how to make it.
    """
    python = os.environ.get("RT_PEERS_PYTHON") or str(ROOT / ".venv-peers" / "bin" / "python")
    if not Path(python).is_file():
        raise BenchError(f"no peers to compare with: {python} does not exist; `make peers` makes it, or set RT_PEERS_PYTHON")
    return python


def meet(system: str, size: int, folder: Path) -> Meeting:
    """Prepare the meeting of ``size`` ranks of ``system`` (``rt``, ``gloo``, ``mlx`` or ``tcp``) over TCP loopback."""
    return {"rt": _meet_rt, "gloo": _meet_gloo, "mlx": _meet_mlx, "tcp": _meet_tcp}[system](size, folder)


def _meet_rt(size: int, folder: Path) -> Meeting:
    listener = socket.create_server((_LOOPBACK, 0), backlog=size)
    port = listener.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ranks = [{"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"{_LOOPBACK}:{port}"} for rank in range(size)]
    ranks[0]["RT_COORDINATOR_FD"] = str(listener.fileno())
    return Meeting(sys.executable, {"PYTHONPATH": path}, ranks, [listener], [(listener.fileno(),), *[()] * (size - 1)])


def _meet_gloo(size: int, folder: Path) -> Meeting:
    environ = {"BENCH_STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE}
    return Meeting(peers_python(), environ, [{} for _ in range(size)])


def _meet_mlx(size: int, folder: Path) -> Meeting:
    # MLX binds with SO_REUSEPORT: a bound socket that never listens keeps the port from others and does not stand in MLX's way.
    reserved = []
    for _ in range(size):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((_LOOPBACK, 0))
        reserved.append(sock)
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"{_LOOPBACK}:{sock.getsockname()[1]}"] for sock in reserved]), encoding="utf-8")
    return Meeting(peers_python(), {"MLX_HOSTFILE": str(hostfile)}, [{"MLX_RANK": str(rank)} for rank in range(size)], reserved)


def _meet_tcp(size: int, folder: Path) -> Meeting:
    right, left = [], []  # of each rank; the connection from rank r to its right is the left one of rank r + 1
    with socket.create_server((_LOOPBACK, 0), backlog=size) as listener:
        for _ in range(size):
            right.append(socket.create_connection(listener.getsockname()))
            left.append(listener.accept()[0])
    left = left[-1:] + left[:-1]
    ends = [(mine.fileno(), other.fileno()) for mine, other in zip(right, left, strict=True)]
    ranks = [{"BENCH_RIGHT": str(mine), "BENCH_LEFT": str(other)} for mine, other in ends]
    return Meeting(sys.executable, {}, ranks, right + left, list(ends))


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN) and name not in _FOREIGN_NAMES}


class System:
    """All ranks of one system, as long as they live.

    Args:
        name: what the tables call it.
        meeting: how its ranks find each other.
        arguments: the worker's script (or ``-m`` and a module) and its arguments.

    Attributes:
        pids: process id per rank, once started.
        uses: what the workers said about versions, once started.
    """

    def __init__(self, name: str, meeting: Meeting, arguments: list[str]) -> None:
        self.name = name
        self.size = len(meeting.ranks)
        self.pids: list[int] = []
        self.uses: dict[str, str] = {}
        self._meeting = meeting
        # -P: the script's own folder stays off sys.path, where its neighbours could shadow a peer's modules.
        self._command = [meeting.python, "-P", *arguments]
        self._workers: list[subprocess.Popen[bytes]] = []
        self._log: IO[bytes] = tempfile.TemporaryFile()  # what all ranks write to standard error
        self._idle = [0.0, 0.0]

    def start(self) -> None:
        """Start the ranks and return when their group stands.

        Raises:
            BenchError: a rank could not join.
        """
        shared = {**_own_environment(), **self._meeting.environ, "BENCH_SIZE": str(self.size)}
        for rank in range(self.size):
            self._workers.append(self._spawn(shared, rank))
        greetings = self._answers()
        self._release_ports()
        self.pids = [greeting["pid"] for greeting in greetings]
        self.uses = greetings[0]["uses"]

    def _spawn(self, shared: Mapping[str, str], rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            bufsize=0,
            env={**shared, "BENCH_RANK": str(rank), **self._meeting.ranks[rank]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            pass_fds=self._meeting.inherited[rank] if self._meeting.inherited else (),
            start_new_session=True,  # Ctrl-C is the conductor's to handle; a worker would answer it with a traceback
        )

    def ask(self, command: Answer) -> list[Answer]:
        """Have all ranks run a command at the same time; return their answers in rank order.

        Raises:
            BenchError: a rank answered with an error, ended, or gave no answer for three minutes.
        """
        line = json.dumps(command).encode() + b"\n"
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: reading its answer says so, and why
                worker.stdin.write(line)
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
            for rank, worker in enumerate(self._workers):
                assert worker.stdout is not None
                selector.register(worker.stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(key.data for key in selector.get_map().values())
                    raise BenchError(f"{self.name}: no answer from rank(s) {missing} within {_ANSWER_SECONDS:.0f} s\n{self._said()}")
                for key, _ in ready:
                    received[key.data] += self._read(key.fd, key.data)
                    if received[key.data].endswith(b"\n"):
                        selector.unregister(key.fileobj)
                        self._refuse_error(key.data, received[key.data])
        return [json.loads(line) for line in received]

    def _read(self, fd: int, rank: int) -> bytes:
        data = os.read(fd, 1 << 16)
        if not data:
            raise BenchError(f"{self.name}: rank {rank} ended with exit code {self._workers[rank].wait(_LEAVE_SECONDS)}\n{self._said()}")
        return data

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
        for worker in self._workers:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.close()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for worker in self._workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
        for worker in self._workers:
            assert worker.stdout is not None
            worker.stdout.close()
        self._release_ports()
        self._log.close()

    def _release_ports(self) -> None:
        for sock in self._meeting.reserved:
            sock.close()

    def kill(self) -> None:
        """End all ranks now."""
        for worker in self._workers:
            worker.kill()
            worker.wait()


@contextlib.contextmanager
def running(name: str, system: str, size: int, arguments: list[str]) -> Iterator[System]:
    """Start ``size`` ranks of ``system``, and end them on the way out: together if all went well, else at once."""
    with tempfile.TemporaryDirectory(prefix="rt-bench-") as folder:
        ranks = System(name, meet(system, size, Path(folder)), arguments)
        try:
            ranks.start()
            yield ranks
        except BaseException:
            ranks.kill()
            raise
        finally:
            ranks.close()
