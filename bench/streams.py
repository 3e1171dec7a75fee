"""One rank that streams memory beside others, to find out what a link within this host costs: for ``rt.bench simulate --here``.

May live here: what the ranks of that measurement do. May not: an import of ``rt``, since nothing of what the numbers are to foretell may be
in them; what is made of them (``here.py``). Run as ``python -m bench.streams`` by ``conductor.py``; the protocol is ``worker.py``'s.

The ranks stand in a circle, and each passes pieces to its right and takes those of its left, as the ranks of an all-reduce do, with the
same arrays: half of x goes out and what comes is added to the other half, then the result goes out and the rest of it comes. Either
through rings in memory of 1 MiB, or through TCP. Only the copies and additions are timed, not the waiting, while the others do the same:
so cores, caches and memory are as busy as they will be.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import numpy.typing as npt

from bench.worker import Answer, Channel, Floats, place

RING_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_FRAME_BYTES = 261_904
_HEAD = 16  # numbers of 8 bytes before each ring: what was written and what was read, on lines of their own
_SECONDS = 0.1
_INTERRUPTED = 5.0  # a piece that takes so many times longer than most was not alone on its core

Times = dict[str, list[tuple[int, float]]]  # what -> (bytes, seconds) per piece


class Memory:
    """A ring to the right and one from the left, in memory that all ranks have."""

    piece = _PIECE_BYTES

    def __init__(self, path: str, rank: int, size: int) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size * stride())
        rings = []
        for owner in (rank, (rank - 1) % size):
            at = owner * stride()
            heads = np.frombuffer(self._memory, np.int64, _HEAD, at)
            rings.append((heads[:1], heads[8:9], np.frombuffer(self._memory, np.float32, RING_BYTES // 4, at + 8 * _HEAD)))
        (self._written, self._read, self._out), (self._left_written, self._left_read, self._in) = rings

    def send(self, source: Floats) -> float:
        """Pass a piece on; return the seconds, 0 if there is no room."""
        at = int(self._written[0])
        if at + source.size - int(self._read[0]) > self._out.size:
            return 0.0
        target = self._out[at % self._out.size :][: source.size]
        spent = copied(target, source)
        self._written[0] = at + source.size
        return spent

    def receive(self, target: Floats, operand: Floats | None) -> float:
        """Take a piece, and add it to an operand if there is one; return the seconds, 0 if none has come."""
        at = int(self._left_read[0])
        if at == int(self._left_written[0]):
            return 0.0
        source = self._in[at % self._in.size :][: target.size]
        spent = copied(target, source) if operand is None else added(source, operand, target)
        self._left_read[0] = at + target.size
        return spent


class Sockets:
    """A connection to the right and one from the left."""

    piece = _FRAME_BYTES // 4 * 4

    def __init__(self, right: socket.socket, left: socket.socket) -> None:
        self._right, self._left = right, left
        for sock in (self._right, self._left):
            sock.setblocking(False)
        self._scratch = np.empty(self.piece // 4, np.float32)
        self._sent = self._got = 0  # of the piece that is under way
        self._spent = [0.0, 0.0]

    def send(self, source: Floats) -> float:
        """As ``Memory.send``; a piece may take several calls, whose seconds are returned with the last."""
        return self._move(0, self._right.send, source)

    def receive(self, target: Floats, operand: Floats | None) -> float:
        """As ``Memory.receive``: what is added lands in a scratch first."""
        landing = target if operand is None else self._scratch[: target.size]
        spent = self._move(1, self._left.recv_into, landing)
        if spent and operand is not None:
            spent += added(landing, operand, target)
        return spent

    def _move(self, which: int, call: Callable[[memoryview], int], piece: Floats) -> float:
        done = self._got if which else self._sent
        start = time.perf_counter()
        try:
            moved = call(piece.data.cast("B")[done:])
        except BlockingIOError:
            return 0.0
        self._spent[which] += time.perf_counter() - start
        if which and not moved:
            raise ConnectionError("the left neighbour has gone")
        done += moved
        whole = done == piece.nbytes
        if which:
            self._got = 0 if whole else done
        else:
            self._sent = 0 if whole else done
        if not whole:
            return 0.0
        spent, self._spent[which] = self._spent[which], 0.0
        return spent


def copied(target: Floats, source: Floats) -> float:
    """Copy as C does it, and return the seconds: NumPy's own loop takes ten times as long for what another core has in its caches."""
    to, origin = target.ctypes.data, source.ctypes.data
    start = time.perf_counter()
    ctypes.memmove(to, origin, source.nbytes)
    return time.perf_counter() - start


def added(left: Floats, right: Floats, target: Floats) -> float:
    """Add, and return the seconds."""
    start = time.perf_counter()
    np.add(left, right, out=target)
    return time.perf_counter() - start


def stride() -> int:
    """Return the bytes that a ring takes, its head included."""
    return (8 * _HEAD + RING_BYTES + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE


def _pieces(array: Floats, nbytes: int) -> Iterator[Floats]:
    return (array[at : at + nbytes // 4] for at in range(0, array.size, nbytes // 4))


def stream(link: Memory | Sockets, nbytes: int, crowded: bool) -> Times:
    """Pass ``nbytes`` round once and again for a while; return what each piece took. Every rank does it equally often."""
    half = max(nbytes // 8, link.piece // 4) // (link.piece // 4) * (link.piece // 4)
    x, out = (np.full(2 * half, 1.0, np.float32) for _ in range(2))
    times: Times = {"send": [], "receive": [], "reduce": []}
    rounds = max(2, round(_SECONDS * 5e9 / (8 * half)))
    for index in range(rounds):
        if index == rounds // 4:
            times = {"send": [], "receive": [], "reduce": []}  # by now all are at it, and all pages there
        _exchange(link, times, "reduce", x[:half], out[half:], x[half:], crowded)
        _exchange(link, times, "receive", out[half:], out[:half], None, crowded)
    return times


def _exchange(
    link: Memory | Sockets, times: Times, name: str, source: Floats, target: Floats, operand: Floats | None, crowded: bool
) -> None:
    out = list(_pieces(source, link.piece))
    into = list(_pieces(target, link.piece))
    beside = [None] * len(into) if operand is None else list(_pieces(operand, link.piece))
    sent = got = 0
    while sent < len(out) or got < len(into):
        moved = False
        if got < len(into):
            spent = link.receive(into[got], beside[got])
            if spent:
                times[name].append((into[got].nbytes, spent))
                got, moved = got + 1, True
        if sent < len(out):
            spent = link.send(out[sent])
            if spent:
                times["send"].append((out[sent].nbytes, spent))
                sent, moved = sent + 1, True
        if not moved and crowded:
            os.sched_yield()


def per_byte(pieces: list[tuple[int, float]], overhead: float) -> float:
    """Return seconds per byte: the mean over pieces that were not interrupted."""
    each = [(spent - overhead) / nbytes for nbytes, spent in pieces]
    usual = median(each)
    kept = [value for value in each if value < _INTERRUPTED * usual]
    return sum(kept) / len(kept)


def overheads() -> tuple[float, float]:
    """Return the seconds that a copy and an addition of next to nothing take: what Python spends on them."""
    few: npt.NDArray[np.float32] = np.zeros(4, np.float32)
    return median(copied(few, few) for _ in range(1000)), median(added(few, few, few) for _ in range(1000))


def _circle() -> tuple[socket.socket, socket.socket]:
    """Return the connections to the right and to the left that the conductor made."""
    right, left = (socket.socket(fileno=int(os.environ[name])) for name in ("BENCH_RIGHT", "BENCH_LEFT"))
    right.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return right, left


def main() -> None:
    """Serve as the rank that the environment says."""
    channel = Channel()
    rank, size = place()
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size * stride())
    links: dict[str, Memory | Sockets] = {}
    copying, adding = overheads()

    def measure(command: Answer) -> Answer:
        kind = command["link"]
        if kind not in links:
            links[kind] = Memory(command["memory"], rank, size) if kind == "shm" else Sockets(*_circle())
        times = stream(links[kind], command["bytes"], command["crowded"])
        once = copying if kind == "shm" else 0.0  # a system call is no overhead: rt makes it, too
        spare = {"send": once, "receive": once, "reduce": adding}
        return {what: per_byte(pieces, spare[what]) for what, pieces in times.items()}

    try:
        channel.say({"pid": os.getpid(), "memory": f"/proc/{os.getpid()}/fd/{fd}", "uses": {}})
        channel.serve({"stream": measure})
    except Exception:
        channel.say({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
