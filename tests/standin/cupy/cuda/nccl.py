"""NCCL of the stand-in for CuPy: names, constants and argument orders of ``cupy.cuda.nccl`` of CuPy 14, with real bytes between processes.

May live here: what the calls that rt makes do, fail at and leave undone. May not: anything of rt, calls that rt does not make.

Every communicator has a switch in the process that made its unique id. A collective sends this rank's items to all others, and combines
what they send in the order of the ranks, on the thread of its stream. As with NCCL: a message waits for its receiver; calls that do not
match, and those of ranks that are gone, hang until ``abort``; errors of others are told by ``check_async_error`` only. Test hooks:
``calls`` is what was called; ``communicators`` are those made, and ``gone`` is set when one is; ``fail_next`` makes the next call raise;
``async_error`` may be set.
"""

from __future__ import annotations

import os
import pickle
import queue
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cupy import cuda
from cupy.cuda import _memory

available = True
NCCL_INT8 = NCCL_CHAR = 0
NCCL_UINT8 = 1
NCCL_INT32 = NCCL_INT = 2
NCCL_UINT32 = 3
NCCL_INT64 = 4
NCCL_UINT64 = 5
NCCL_FLOAT16 = NCCL_HALF = 6
NCCL_FLOAT32 = NCCL_FLOAT = 7
NCCL_FLOAT64 = NCCL_DOUBLE = 8
NCCL_BFLOAT16 = 9
NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = range(5)

_NUMPY = [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
_COMBINE = [np.add, np.multiply, np.maximum, np.minimum, np.add]
_ERRORS = {
    1: "NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error", 2: "NCCL_ERROR_SYSTEM_ERROR: unhandled system error",
    3: "NCCL_ERROR_INTERNAL_ERROR: internal error", 4: "NCCL_ERROR_INVALID_ARGUMENT: invalid argument",
    5: "NCCL_ERROR_INVALID_USAGE: invalid usage", 6: "NCCL_ERROR_REMOTE_ERROR: remote process exited or there was a network error",
}  # fmt: skip
_LOOK_SECONDS = 0.02  # between two looks for an abort

calls: list[tuple[Any, ...]] = []
communicators: list[NcclCommunicator] = []
_failing: list[int] = []
_local = threading.local()


class NcclError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_ERRORS[status])


def fail_next(status: int) -> None:
    """Make the next call raise."""
    _failing.append(status)


def get_version() -> int:
    return 23203


def get_unique_id() -> bytes:
    """Start a switch, and return where it is."""
    name = b"\0rt stand-in nccl " + secrets.token_hex(16).encode()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    listener.listen(64)
    threading.Thread(target=_switch, args=(listener,), name="stand-in switch", daemon=True).start()
    return name.ljust(128, b"\0")


def _switch(listener: socket.socket) -> None:
    """Pass messages between the ranks of one communicator, once all have come, and tell them who goes."""
    found: dict[int, Connection] = {}
    size = 1
    while len(found) < size:
        connection = Connection(listener.accept()[0].detach())
        rank, size = connection.recv()
        found[rank] = connection
    lock = threading.Lock()

    def tell(to: int, message: bytes) -> None:
        try:
            with lock:
                found[to].send_bytes(message)
        except OSError:
            pass

    def serve(rank: int) -> None:
        try:
            while True:
                to, message = pickle.loads(found[rank].recv_bytes())
                if to is None:
                    return
                tell(to, message)
        except (EOFError, OSError):
            for other in found:
                tell(other, pickle.dumps(("lost", rank, None, b"")))

    for rank in found:
        tell(rank, pickle.dumps(("all here", rank, None, b"")))
    for rank in found:
        threading.Thread(target=serve, args=(rank,), name=f"stand-in switch {rank}", daemon=True).start()
    listener.close()


class _Aborted(Exception):
    pass


class _Part(NamedTuple):
    """A call in a group: what it sends, and what it does when all have sent."""

    comm: NcclCommunicator
    stream: int
    begin: Callable[[], None]
    end: Callable[[], None]
    last: bool = False  # a send, which waits for its receiver


def groupStart() -> None:
    _local.depth = getattr(_local, "depth", 0) + 1
    calls.append(("groupStart",))


def groupEnd() -> None:
    calls.append(("groupEnd",))
    _local.depth -= 1
    if _local.depth == 0:
        parts, _local.parts = getattr(_local, "parts", []), []
        for stream in dict.fromkeys(part.stream for part in parts):
            _launch([part for part in parts if part.stream == stream])


def _launch(parts: list[_Part]) -> None:
    comm = parts[0].comm
    comm._running += 1

    def kernel() -> None:
        try:
            for part in parts:
                part.begin()
            for part in sorted(parts, key=lambda part: part.last):
                part.end()
        except (_Aborted, OSError):
            pass
        finally:
            comm._running -= 1

    cuda._streams[parts[0].stream]._launch(kernel)


class NcclCommunicator:
    """As CuPy's, of one device and one process."""

    def __init__(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> None:
        calls.append(("init", ndev, rank, cuda.Device().id))
        _maybe_fail()
        assert isinstance(commId, bytes) and len(commId) == 128 and 0 <= rank < ndev
        self._rank, self._size = rank, ndev
        self._came: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in range(ndev)}
        self._heard: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in range(ndev)}
        self.gone = threading.Event()
        self._lock = threading.Lock()
        self._running = 0
        self.async_error = 0
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(commId.rstrip(b"\0"))
        self._link = Connection(sock.detach())
        self._link.send((rank, ndev))
        self._link.recv_bytes()  # all are here
        communicators.append(self)
        threading.Thread(target=self._listen, name="stand-in nccl", daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                kind, source, header, body = pickle.loads(self._link.recv_bytes())
                if kind == "lost":
                    self.async_error = self.async_error or 6
                else:
                    (self._heard if kind == "heard" else self._came)[source].put((header, body))
        except (EOFError, OSError, TypeError):  # the last where it was closed meanwhile
            pass

    def _post(self, to: int, kind: str, header: Any, body: bytes = b"") -> None:
        message = (kind, self._rank, header, body)
        if to == self._rank:
            (self._heard if kind == "heard" else self._came)[to].put((header, body))
            return
        with self._lock:
            self._link.send_bytes(pickle.dumps((to, pickle.dumps(message))))

    def _take(self, queues: dict[int, queue.SimpleQueue[Any]], peer: int, header: Any) -> bytes:
        """Return the next message of a peer; for ever if it is another one than expected."""
        while not self.gone.is_set():
            try:
                found, body = queues[peer].get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if found == header:
                return body
            print(f"stand-in: rank {self._rank} expected {header} of {peer}, got {found}", file=sys.stderr, flush=True)
            self.gone.wait()
        raise _Aborted

    def _call(self, name: str, arguments: tuple[Any, ...], begin: Callable[[], None], end: Callable[[], None], last: bool = False) -> None:
        calls.append((name, *arguments))
        _maybe_fail()
        if self.gone.is_set():
            raise NcclError(5)
        part = _Part(self, arguments[-1], begin, end, last)
        if getattr(_local, "depth", 0):
            _local.parts = [*getattr(_local, "parts", []), part]
        else:
            _launch([part])

    def _to_all(self, header: Any, ptr: int, nbytes: int) -> Callable[[], None]:
        memory = _memory_at(ptr, nbytes)

        def begin() -> None:
            for peer in range(self._size):
                self._post(peer, "came", header, bytes(memory))

        return begin

    def _combined(self, header: Any, datatype: int, op: int) -> Any:
        dtype = np.dtype(_NUMPY[datatype])
        with np.errstate(all="ignore"):
            parts = [np.frombuffer(self._take(self._came, peer, header), dtype) for peer in range(self._size)]
            total = parts[0].copy()
            for part in parts[1:]:
                total = _COMBINE[op](total, part)
            return (total / dtype.type(self._size)).astype(dtype) if op == NCCL_AVG else total.astype(dtype)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        header, nbytes = ("allReduce", count, datatype, op), count * np.dtype(_NUMPY[datatype]).itemsize
        result = _memory_at(recvbuf, nbytes)
        begin = self._to_all(header, sendbuf, nbytes)
        arguments = (sendbuf, recvbuf, count, datatype, op, stream)
        self._call("allReduce", arguments, begin, lambda: _write(result, self._combined(header, datatype, op)))

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        header, nbytes = ("reduce", count, datatype, op, root), count * np.dtype(_NUMPY[datatype]).itemsize
        result = _memory_at(recvbuf, nbytes) if self._rank == root else None
        sent = _memory_at(sendbuf, nbytes)

        def end() -> None:
            if result is not None:
                _write(result, self._combined(header, datatype, op))

        arguments = (sendbuf, recvbuf, count, datatype, op, root, stream)
        self._call("reduce", arguments, lambda: self._post(root, "came", header, bytes(sent)), end)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        header, nbytes = ("broadcast", count, datatype, root), count * np.dtype(_NUMPY[datatype]).itemsize
        result = _memory_at(recvbuff, nbytes)
        begin = self._to_all(header, sendbuff, nbytes) if self._rank == root else lambda: None
        arguments = (sendbuff, recvbuff, count, datatype, root, stream)
        self._call("broadcast", arguments, begin, lambda: _write(result, self._take(self._came, root, header)))

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        header, nbytes = ("reduceScatter", recvcount, datatype, op), recvcount * np.dtype(_NUMPY[datatype]).itemsize
        result = _memory_at(recvbuf, nbytes)
        sent = _memory_at(sendbuf, nbytes * self._size)

        def begin() -> None:
            for peer in range(self._size):
                self._post(peer, "came", header, bytes(sent)[peer * nbytes : (peer + 1) * nbytes])

        arguments = (sendbuf, recvbuf, recvcount, datatype, op, stream)
        self._call("reduceScatter", arguments, begin, lambda: _write(result, self._combined(header, datatype, op)))

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        header, nbytes = ("allGather", count, datatype), count * np.dtype(_NUMPY[datatype]).itemsize
        result = _memory_at(recvbuf, nbytes * self._size)
        begin = self._to_all(header, sendbuf, nbytes)

        def end() -> None:
            _write(result, b"".join(self._take(self._came, peer, header) for peer in range(self._size)))

        self._call("allGather", (sendbuf, recvbuf, count, datatype, stream), begin, end)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        nbytes = count * np.dtype(_NUMPY[datatype]).itemsize
        memory = _memory_at(sendbuf, nbytes)

        def end() -> None:
            self._take(self._heard, peer, None)

        arguments = (sendbuf, count, datatype, peer, stream)
        self._call("send", arguments, lambda: self._post(peer, "came", ("message", nbytes), bytes(memory)), end, last=True)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        nbytes = count * np.dtype(_NUMPY[datatype]).itemsize
        memory = _memory_at(recvbuf, nbytes)

        def end() -> None:
            _write(memory, self._take(self._came, peer, ("message", nbytes)))
            self._post(peer, "heard", None)

        self._call("recv", (recvbuf, count, datatype, peer, stream), lambda: None, end)

    def check_async_error(self) -> None:
        if self.async_error:
            raise NcclError(self.async_error)

    def abort(self) -> None:
        calls.append(("abort",))
        self._link.close()
        self.gone.set()

    def destroy(self) -> None:
        """As NCCL's, wait for what was launched."""
        calls.append(("destroy",))
        while self._running and not self.gone.is_set():
            self.gone.wait(_LOOK_SECONDS)
        with self._lock:
            self._link.send_bytes(pickle.dumps((None, b"")))
        self.abort()


def _maybe_fail() -> None:
    if _failing:
        raise NcclError(_failing.pop())


def _memory_at(ptr: int, nbytes: int) -> Any:
    try:
        return _memory.at(ptr, nbytes)
    except ValueError as error:
        print(f"stand-in, process {os.getpid()}: {error}", flush=True)
        raise NcclError(4) from None


def _write(memory: Any, items: Any) -> None:
    np.frombuffer(memory, np.uint8)[:] = np.frombuffer(items, np.uint8) if isinstance(items, bytes) else items.view(np.uint8)
