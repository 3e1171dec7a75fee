"""TCP: addresses, listening, dialling, socket options, and the frames of control connections.

May live here: what concerns one socket, whoever holds it. May not: how two ends learn to trust each other (``transports.handshake``),
which rank connects to which (``rt.bootstrap``), what the frames mean (``rt.control``), data sockets after they are connected (the engine).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

Address = tuple[str, int]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MAX_FRAME = 256 * 1024
JSON = 1  # the frame type of the bootstrap; the others are rt.control's

_FRAME = struct.Struct("!IB3x")  # length of what follows, type
_T = TypeVar("_T")


async def in_thread(function: Callable[[], _T]) -> _T:
    """Run a blocking call in a daemon thread of its own.

    Not the loop's executor: the interpreter joins executor threads at exit, so one look-up that hangs would hang the exit too.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: Exception | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]  # None only where T admits it

    def body() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, name="rt-blocking", daemon=True).start()
    return await outcome


async def resolve(address: Address) -> list[tuple[int, Any]]:
    """Return ``(family, socket address)`` candidates; only host names cost a thread. Raises OSError where the name is unknown."""
    host, port = address

    def look_up(flags: int = 0) -> list[tuple[int, Any]]:
        return [(family, where) for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]

    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return await in_thread(look_up)
    return look_up(socket.AI_NUMERICHOST)


async def host_towards(target: Address) -> str:
    """Return the local address from which ``target`` is reached; nothing is sent."""
    family, where = (await resolve(target))[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def listen(family: int, where: Any) -> socket.socket:
    """Return a non-blocking listening socket. Raises OSError as ``bind`` does."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(256)
    except OSError:
        sock.close()
        raise
    return sock


async def connect(address: Address, seconds: float) -> socket.socket:
    """Connect to the first candidate of ``address`` that answers within ``seconds``. Raises the last candidate's OSError."""
    loop = asyncio.get_running_loop()
    last: OSError = OSError(f"{address[0]!r} has no address")
    for family, where in await resolve(address):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # So that the port which the kernel lends to this attempt can still be bound by a rank that starts later.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            async with asyncio.timeout(seconds):
                await loop.sock_connect(sock, where)
            if sock.getsockname() == sock.getpeername():  # TCP's simultaneous open: nobody listens and we reached ourselves
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except TimeoutError:
            sock.close()
            last = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        except OSError as error:
            sock.close()
            last = error
        except asyncio.CancelledError:
            sock.close()
            raise
    raise last


def no_delay(sock: socket.socket) -> None:
    """Send small messages at once. Nothing else is set on data sockets: their sizes are the kernel's to tune."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def keep_alive(sock: socket.socket, *, relays: bool) -> None:
    """Let the kernel notice within about 25 s that the other *host* is gone; only for control sockets.

    TCP_USER_TIMEOUT also ends connections whose peer lives but does not read, so it is only set where the socket carries
    nothing that could fill the peer's buffer (``relays=False``): a stopped process is not a lost one.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = [("TCP_KEEPIDLE", 10), ("TCP_KEEPALIVE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)]
    if not relays:
        options.append(("TCP_USER_TIMEOUT", 20_000))
    for name, value in options:
        if hasattr(socket, name):  # Linux has KEEPIDLE and USER_TIMEOUT, macOS calls the former KEEPALIVE
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def show(address: Any) -> str:
    """Write a socket address as people do: ``10.0.0.1:80``, ``[::1]:80``."""
    if not isinstance(address, (tuple, list)) or len(address) < 2:
        return str(address) or "?"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


async def streams(sock: socket.socket) -> Streams:
    """Wrap a connected socket, which belongs to the streams from now on."""
    return await asyncio.open_connection(sock=sock, limit=MAX_FRAME)


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one frame. Raises ValueError on an impossible length, IncompleteReadError at EOF, OSError when the connection broke."""
    length, kind = _FRAME.unpack(await reader.readexactly(_FRAME.size))
    if length > MAX_FRAME:
        raise ValueError(f"a control message of {length} B; the most is {MAX_FRAME} B")
    return kind, await reader.readexactly(length) if length else b""


def write_frame(writer: asyncio.StreamWriter, kind: int, payload: bytes) -> None:
    """Queue one frame; what the kernel takes at once is on its way when this returns. Does nothing on a closed connection."""
    if not writer.is_closing():
        writer.write(_FRAME.pack(len(payload), kind) + payload)


async def read_json(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Read one JSON object. Raises ConnectionAbortedError for anything else, and what ``read_frame`` does at EOF."""
    try:
        kind, payload = await read_frame(reader)
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ConnectionAbortedError(str(error)) from None
    if kind != JSON or not isinstance(value, dict):
        raise ConnectionAbortedError(f"unexpected control message of type {kind}")
    return value


def write_json(writer: asyncio.StreamWriter, value: Any) -> None:
    """Queue one JSON object."""
    write_frame(writer, JSON, json.dumps(value).encode())
