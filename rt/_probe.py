"""What ``rt.doctor`` runs on each host: it tells what the host is like, and measures the way to others.

May live here: what must happen on that host. May not: judgement (``_doctor_findings``, ``_doctor_job``); of ``rt`` anything but
``rt.interfaces``, ``rt._doors`` and the errors, which are sent along with this file (``_doctor_probes``): a host may have no ``rt``, or
another version, which is to be found out.

Requests come as lines of JSON on stdin, ``{"do": name, ...}``; each gets one line on stdout. The end of stdin ends it. Connections of other
probes prove that they are meant by a token, which came on stdin too; nothing else is answered.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from rt import _doors
from rt.interfaces import listing

_CONNECT_SECONDS = 4.0  # TCP asks again after one second and after three
_SHUT_SECONDS = 2.0
_SILENCE_SECONDS = 4.0  # within a connection
_PINGS_SECONDS = 0.2
_PINGS_MOST = 200
_LARGE_BYTES = 16 << 10  # more than any packet, and little enough for a slow link
_PIECE_BYTES = 256 << 10
_LINE_MOST = 4096
_IMPORT_SECONDS = 15.0
_PMTU_AT, _RETRANSMITTED_AT = 60, 100  # in Linux' struct tcp_info
_VERSION = "import json, rt; print(json.dumps([rt.__version__, rt.__file__]))"

Answer = dict[str, Any]


class Probe:
    """The state of one probe: its token and its listeners."""

    def __init__(self) -> None:
        self._token = ""

    def answer(self, do: str, **arguments: Any) -> Answer:
        """Carry out one request."""
        actions: dict[str, Callable[..., Answer]] = {
            "facts": facts,
            "clock": clock,
            "route": route,
            "listen": self.listen,
            "touch": self.touch,
            "stream": self.stream,
            "jobs": jobs,
        }
        return actions[do](**arguments)

    def listen(self, token: str) -> Answer:
        """Wait for other probes on ports of the system's choice, at all addresses: also at those that a host has only by translation."""
        self._token = token
        ports = {}
        for version, family, everywhere in (("4", socket.AF_INET, "0.0.0.0"), ("6", socket.AF_INET6, "::")):
            with contextlib.suppress(OSError):  # a host without IPv6, or without IPv4
                listener = socket.socket(family, socket.SOCK_STREAM)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((everywhere, 0))
                listener.listen(16)
                ports[version] = listener.getsockname()[1]
                threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return {"ports": ports}

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, ValueError, KeyError):
            sock.settimeout(_SILENCE_SECONDS)
            asked = json.loads(_line(sock))
            if not hmac.compare_digest(str(asked["token"]), self._token):
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _say(sock, {"seen": sock.getpeername()[0], "at": sock.getsockname()[0]})
            if asked["what"] == "echo":
                while piece := sock.recv(_PIECE_BYTES):
                    sock.sendall(piece)
            else:
                _say(sock, _sink(sock, float(asked["duration"])))
                while sock.recv(_PIECE_BYTES):  # closing it with bytes unread would throw away what was just said
                    pass

    def touch(self, address: str, port: int, shut: int) -> Answer:
        """Connect to another probe: does it answer, how fast, and do large packets get through?

        Args:
            address, port: where it listens.
            shut: a port there on which nobody listens, to tell a host that is not reached from a port that is blocked.
        """
        sock, found = self._connect(address, port, "echo")
        if sock is None:
            return found | ({"shut": _outcome(address, shut)} if found["outcome"] == "silent" else {})
        with sock:
            found["mss"] = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            try:
                found["latency"] = _ping(sock)
            except OSError as error:
                return {**found, "outcome": "broke", "why": str(error)}
            try:
                _echo(sock, bytes(_LARGE_BYTES))
                found["large"] = True
            except OSError:
                found["large"] = False
            return {**found, **_kernels_view(sock)}

    def stream(self, address: str, port: int, duration: float) -> Answer:
        """Send as much as another probe takes in ``duration`` seconds; the rate is counted there."""
        sock, found = self._connect(address, port, "sink", duration)
        if sock is None:
            return found
        with sock:
            piece, until = bytes(_PIECE_BYTES), time.monotonic() + duration + 2 * _SILENCE_SECONDS
            sock.setblocking(False)
            while time.monotonic() < until:
                said, free, _ = select.select([sock], [sock], [], _SILENCE_SECONDS)
                if said:
                    break
                if free:
                    with contextlib.suppress(BlockingIOError):
                        sock.send(piece)
            sock.settimeout(_SILENCE_SECONDS)
            try:
                found |= json.loads(_line(sock)) | _kernels_view(sock)
            except (OSError, ValueError) as error:
                found |= {"outcome": "broke", "why": str(error)}
            # What is still queued for a slow link would be in the way of whatever is measured next.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return found

    def _connect(self, address: str, port: int, what: str, duration: float = 0.0) -> tuple[socket.socket | None, Answer]:
        try:
            sock = socket.create_connection((address, port), _CONNECT_SECONDS)
        except OSError as error:
            return None, _failure(error)
        try:
            sock.settimeout(_SILENCE_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _say(sock, {"token": self._token, "what": what, "duration": duration})
            return sock, {"outcome": "ok", "local": sock.getsockname()[0], **json.loads(_line(sock))}
        except (OSError, ValueError) as error:
            sock.close()
            return None, {"outcome": "stranger", "why": str(error)}


def facts() -> Answer:
    """Return what this host is like."""
    found: Answer = {
        "hostname": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "executable": sys.executable,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "ssh": os.environ.get("SSH_CONNECTION", "").split(),
        "wireless": [],
        "interfaces": [],
    }
    try:
        found["interfaces"] = [vars(each) for each in listing()]
    except ImportError as error:  # psutil, which comes with rt
        found["interfaces_problem"] = str(error)
    for each in found["interfaces"]:
        folder = f"/sys/class/net/{each['name']}"
        if os.path.exists(f"{folder}/wireless") or os.path.exists(f"{folder}/phy80211"):
            found["wireless"].append(each["name"])
    if sys.platform == "darwin":
        found["wireless"] += _wireless_of_macos()
    return found | _rt()


def _rt() -> Answer:
    """Which ``rt`` a rank would import: asked of a process of its own, since this one has the files that were sent."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _VERSION], capture_output=True, text=True, timeout=_IMPORT_SECONDS, stdin=subprocess.DEVNULL
        )
        version, path = json.loads(done.stdout.splitlines()[-1])
        return {"rt": version, "rt_path": path}
    except subprocess.TimeoutExpired:
        return {"rt": "", "rt_problem": f"`import rt` took more than {_IMPORT_SECONDS:g} s"}
    except (IndexError, ValueError, AttributeError):
        return {"rt": "", "rt_problem": (done.stderr.strip().splitlines() or ["`import rt` failed"])[-1]}


def _wireless_of_macos() -> list[str]:
    try:
        done = subprocess.run(["networksetup", "-listallhardwareports"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    ports = [dict(line.split(": ", 1) for line in port.splitlines() if ": " in line) for port in done.stdout.split("\n\n")]
    return [port["Device"] for port in ports if port.get("Hardware Port") in ("Wi-Fi", "AirPort") and "Device" in port]


def clock() -> Answer:
    """Return this host's time, in seconds since 1970."""
    return {"clock": time.time()}


def jobs(wanted: str) -> Answer:
    """Return what the ranks of this host's jobs say."""
    if not _doors.SUPPORTED:
        return {"no_doors": platform.system()}
    return {"jobs": _doors.ask(wanted)}


def route(address: str) -> Answer:
    """Return the address from which this host reaches another; nothing is sent."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return {"local": probe.getsockname()[0]}
    except OSError as error:
        return _failure(error)


def _failure(error: OSError) -> Answer:
    kinds = {"ConnectionRefusedError": "refused", "TimeoutError": "silent"}
    return {"outcome": kinds.get(type(error).__name__, "unreachable"), "why": error.strerror or str(error)}


def _outcome(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), _SHUT_SECONDS).close()
    except OSError as error:
        return str(_failure(error)["outcome"])
    return "ok"


def _ping(sock: socket.socket) -> float:
    """Return the median of round trips of one byte, in seconds."""
    times: list[float] = []
    until = time.monotonic() + _PINGS_SECONDS
    while len(times) < 3 or (time.monotonic() < until and len(times) < _PINGS_MOST):
        since = time.perf_counter()
        _echo(sock, b".")
        times.append(time.perf_counter() - since)
    return statistics.median(times[1:])  # the first may have waited for a neighbour's hardware address


def _echo(sock: socket.socket, message: bytes) -> None:
    sock.sendall(message)
    left = len(message)
    while left:
        piece = sock.recv(left)
        if not piece:
            raise ConnectionResetError("the other side closed the connection")
        left -= len(piece)


def _sink(sock: socket.socket, seconds: float) -> Answer:
    """Count what comes in ``seconds`` from the first byte; the first fifth, in which senders find their pace, is left out."""
    total, since, bytes_before, time_before = 0, 0.0, 0, 0.0
    buffer = bytearray(_PIECE_BYTES)
    now = 0.0
    with contextlib.suppress(TimeoutError):
        while count := sock.recv_into(buffer):
            now = time.monotonic()
            total += count
            since = since or now
            if not time_before and now - since > seconds / 5:
                bytes_before, time_before = total, now
            if now - since > seconds:
                break
    if not since or not time_before or now == time_before:
        return {"outcome": "broke", "why": f"{total} B came, then nothing for {_SILENCE_SECONDS:g} s"}
    return {"bandwidth": (total - bytes_before) / (now - time_before)}


def _kernels_view(sock: socket.socket) -> Answer:
    """What Linux has found out about the way: bytes of the largest packet, and segments sent again."""
    if sys.platform != "linux":
        return {}
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    at = [info[place : place + 4] for place in (_PMTU_AT, _RETRANSMITTED_AT)]
    return {name: int.from_bytes(each, sys.byteorder) for name, each in zip(("pmtu", "retransmitted"), at, strict=True)}


def _line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = sock.recv(1)
        if not piece or len(line) > _LINE_MOST:
            raise ConnectionResetError("the other side closed the connection")
        line += piece
    return line


def _say(sock: socket.socket, thing: Answer) -> None:
    sock.sendall(json.dumps(thing).encode() + b"\n")


def main(requests: BinaryIO = sys.stdin.buffer, answers: BinaryIO = sys.stdout.buffer) -> None:
    """Answer requests until their end; one that goes wrong is answered with what went wrong."""
    probe = Probe()
    for line in requests:
        try:
            answer = probe.answer(**json.loads(line))
        except Exception as error:
            answer = {"problem": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
