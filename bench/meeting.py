"""How the ranks of each system find each other on this host.

May live here: rendezvous of rt, gloo, MLX and the bare exchange over TCP loopback. May not: processes (``conductor.py``).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_OURS = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


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
    ranks = [{"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"{_LOOPBACK}:{port}"} for rank in range(size)]
    ranks[0]["RT_COORDINATOR_FD"] = str(listener.fileno())
    return Meeting(sys.executable, _OURS, ranks, [listener], [(listener.fileno(),), *[()] * (size - 1)])


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
    return Meeting(sys.executable, _OURS, ranks, right + left, list(ends))


def _bench_alone(folder: Path) -> dict[str, str]:
    """Let a peer's interpreter import this package and nothing that lies beside it: installed, those are other versions of its own."""
    (folder / "bench").symlink_to(ROOT / "bench")
    return {"PYTHONPATH": str(folder)}
