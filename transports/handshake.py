"""The handshake that every connection begins with, and the acceptor that insists on it.

May live here: what two processes tell each other before either believes the other, and the limits on strangers. May not: opening
sockets (``transports.tcp``), which rank connects to which (``rt.bootstrap``), what travels after the handshake.

Four messages of 56 bytes; nothing else is believed before they are through::

    dialler -> acceptor   HELLO   who I am, whom I want, a nonce
    dialler <- acceptor   HELLO   the same from the other side        or  REFUSAL
    dialler -> acceptor   PROOF   mac("dial",   both HELLOs)
    dialler <- acceptor   PROOF   mac("accept", both HELLOs)          or  REFUSAL

Both nonces are inside the HELLOs, so no proof fits a second connection; the roles differ, so none can be sent back to its author.
Whoever dials shows nothing but a MAC. Later versions must keep the length and the place of magic and version: that is how an
old and a new process can tell each other what is wrong.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import hashlib
import hmac
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transports.tcp import show

if TYPE_CHECKING:
    from rt.secret import Secret

VERSION = 1
UNAUTHENTICATED_LIMIT = 64
HANDSHAKE_SECONDS = 5.0
_DROPPED_MOST = 4

_log = logging.getLogger("rt")

_HELLO = struct.Struct("!4sBBBBHxxIII16s16s")
_PROOF = struct.Struct("!4s32s20x")
_REFUSAL = struct.Struct("!4sHxxI44x")
_HELLO_MAGIC, _PROOF_MAGIC, _REFUSAL_MAGIC = b"rtHI", b"rtPR", b"rtNO"
_BYTE_ORDERS = {"little": 1, "big": 2}
_BYTE_ORDER = _BYTE_ORDERS[sys.byteorder]  # frames on data sockets are in native order


class Purpose(enum.IntEnum):
    """What a connection is for."""

    RENDEZVOUS = 1
    CONTROL = 2
    DATA = 3
    SHARED = 4


class Reason(enum.IntEnum):
    """Why a connection was refused; numbers are part of the wire format."""

    VERSION = 1
    BYTE_ORDER = 2
    SIZE = 3
    JOB = 4
    RECEIVER = 5
    SENDER = 6
    PURPOSE = 7
    KEYED = 8
    SECRET = 9


# One line each; {theirs} is the value of the side that refuses, {ours} that of the side that is told.
_REASONS = {
    Reason.VERSION: "it speaks protocol version {theirs}, this process version {ours}: install the same release of rt on every host",
    Reason.BYTE_ORDER: "its byte order is another one: hosts of different byte order cannot form a group",
    Reason.SIZE: "it has world size {theirs}, this process {ours}",
    Reason.JOB: "it belongs to another job (coordinator, ring addresses or job id differ)",
    Reason.RECEIVER: "it is rank {theirs}, not the rank that was expected at this address",
    Reason.SENDER: "it does not expect a connection from this rank",
    Reason.PURPOSE: "it does not expect this kind of connection (does it have the same number of connections per pair?)",
    Reason.KEYED: "one side has a secret and the other has none (RT_INSECURE=1 on only one of them?)",
    Reason.SECRET: "the secrets differ: give every rank the same RT_SECRET_FILE or RT_SECRET",
}


class Refused(Exception):
    """The handshake ended with a definite no; trying again cannot help.

    Attributes:
        reason: the code.
        value: what the refusing side has where this side has something else (version, world size, rank), else 0.
    """

    def __init__(self, reason: Reason, value: int = 0, ours: int = 0) -> None:
        super().__init__(_REASONS[reason].format(theirs=value, ours=ours))
        self.reason = reason
        self.value = value


@dataclass(frozen=True)
class Identity:
    """Who this process is in the handshake: what all of its connections have in common."""

    rank: int
    size: int
    job: str
    secret: Secret

    @property
    def job_hash(self) -> bytes:
        return hashlib.sha256(self.job.encode()).digest()[:16]


@dataclass(frozen=True)
class Hello:
    """The first message of either side, unpacked."""

    version: int
    byte_order: int
    purpose: int
    keyed: bool
    index: int
    sender: int
    receiver: int
    size: int
    job_hash: bytes
    nonce: bytes

    @classmethod
    def of(cls, me: Identity, receiver: int, purpose: int, index: int) -> Hello:
        """Make this process's HELLO to rank ``receiver``, with a fresh nonce."""
        keyed = me.secret.key is not None
        return cls(VERSION, _BYTE_ORDER, purpose, keyed, index, me.rank, receiver, me.size, me.job_hash, os.urandom(16))

    @classmethod
    def unpack(cls, message: bytes) -> Hello:
        """Read a HELLO. Raises ConnectionAbortedError where the bytes are none."""
        magic, *fields = _HELLO.unpack(message)
        if magic != _HELLO_MAGIC:
            raise ConnectionAbortedError("the other side does not speak the protocol of rt")
        return cls(fields[0], fields[1], fields[2], bool(fields[3]), *fields[4:])

    def pack(self) -> bytes:
        return _HELLO.pack(
            _HELLO_MAGIC,
            self.version,
            self.byte_order,
            self.purpose,
            self.keyed,
            self.index,
            self.sender,
            self.receiver,
            self.size,
            self.job_hash,
            self.nonce,
        )

    def objection(self, me: Identity) -> Reason | None:
        """What process ``me`` has against this HELLO, the most telling difference first, or None."""
        keyed = me.secret.key is not None
        differences = (
            (Reason.VERSION, self.version != VERSION),
            (Reason.BYTE_ORDER, self.byte_order != _BYTE_ORDER),
            (Reason.SIZE, self.size != me.size),
            (Reason.JOB, self.job_hash != me.job_hash),
            (Reason.KEYED, self.keyed != keyed),
            (Reason.RECEIVER, self.receiver != me.rank),
        )
        return next((reason for reason, differs in differences if differs), None)


def _value_of(reason: Reason, hello: Hello) -> int:
    """The number that makes a refusal readable, taken from the HELLO of one side."""
    return {Reason.VERSION: hello.version, Reason.SIZE: hello.size, Reason.RECEIVER: hello.sender}.get(reason, 0)


def _proof(secret: Secret, role: bytes, dialler: bytes, acceptor: bytes) -> bytes:
    # Without a key the message keeps its place: its answer also tells the dialler that it was let in.
    mac = secret.mac(role, dialler, acceptor) if secret.key is not None else bytes(32)
    return _PROOF.pack(_PROOF_MAGIC, mac)


async def _receive(sock: socket.socket) -> bytes:
    """Read one handshake message and not a byte more: what follows belongs to somebody else."""
    loop, message = asyncio.get_running_loop(), b""
    while len(message) < _HELLO.size:
        more = await loop.sock_recv(sock, _HELLO.size - len(message))
        if not more:
            raise ConnectionAbortedError(f"closed by the other side after {len(message)} B of the handshake")
        message += more
    return message


async def greet(sock: socket.socket, me: Identity, receiver: int, purpose: Purpose, index: int) -> None:
    """Shake hands on a connection that this process dialled.

    Raises:
        Refused: the other side is none of ours, or says that we are none of theirs.
        OSError: the connection broke or the other side does not speak this protocol.
    """
    loop = asyncio.get_running_loop()
    mine = Hello.of(me, receiver, purpose, index)
    await loop.sock_sendall(sock, mine.pack())
    answer = await _reply(sock, mine)
    theirs = Hello.unpack(answer)
    reason = theirs.objection(me) or (Reason.RECEIVER if theirs.sender != receiver else None)
    if reason is not None:
        raise Refused(reason, _value_of(reason, theirs), _value_of(reason, mine))
    await loop.sock_sendall(sock, _proof(me.secret, b"dial", mine.pack(), answer))
    if not hmac.compare_digest(await _reply(sock, mine), _proof(me.secret, b"accept", mine.pack(), answer)):
        raise Refused(Reason.SECRET)


async def _reply(sock: socket.socket, mine: Hello) -> bytes:
    message = await _receive(sock)
    magic, code, value = _REFUSAL.unpack(message)
    if magic != _REFUSAL_MAGIC:
        return message
    if code not in list(Reason):
        raise ConnectionAbortedError(f"refused with unknown reason {code}")
    raise Refused(Reason(code), value, _value_of(Reason(code), mine))


async def answer(sock: socket.socket, me: Identity, admit: Callable[[Hello], Reason | None]) -> Hello:
    """Shake hands on an accepted connection and return the dialler's HELLO, now proven.

    Raises:
        Refused: the dialler was refused (and told why).
        OSError: it went away, or does not speak this protocol.
    """
    loop = asyncio.get_running_loop()
    message = await _receive(sock)
    theirs = Hello.unpack(message)
    mine = Hello.of(me, theirs.sender, theirs.purpose, theirs.index)
    reason = theirs.objection(me) or admit(theirs)
    if reason is None:
        await loop.sock_sendall(sock, mine.pack())
        expected = _proof(me.secret, b"dial", message, mine.pack())
        reason = None if hmac.compare_digest(await _receive(sock), expected) else Reason.SECRET
    if reason is not None:
        await loop.sock_sendall(sock, _REFUSAL.pack(_REFUSAL_MAGIC, reason, _value_of(reason, mine)))
        raise Refused(reason, _value_of(reason, theirs), _value_of(reason, mine))
    await loop.sock_sendall(sock, _proof(me.secret, b"accept", message, mine.pack()))
    return theirs


class Acceptor:
    """Accepts on listeners, shakes hands, and delivers those connections that proved to be ours.

    Strangers cost little: at most ``UNAUTHENTICATED_LIMIT`` connections wait in the handshake (the oldest makes room), each for at most
    ``HANDSHAKE_SECONDS``; each is logged with its address and the reason, and closed.
    """

    def __init__(self, me: Identity, admit: Callable[[Hello], Reason | None], deliver: Callable[[Hello, socket.socket], None]) -> None:
        self._me = me
        self._admit = admit
        self._deliver = deliver
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._strangers: dict[asyncio.Task[None], None] = {}
        self.dropped: dict[str, str] = {}  # what happened to the last few connections that came to nothing: reason, and who came last

    def add(self, listeners: Iterable[socket.socket]) -> None:
        """Start accepting on ``listeners``, which belong to the acceptor from now on."""
        for listener in listeners:
            self._listeners.append(listener)
            self._accepting.append(asyncio.create_task(self._accept(listener)))

    async def close(self) -> None:
        """Close the listeners and all connections still in the handshake."""
        tasks = [*self._accepting, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the caller was gone before we came: neither ends the rendezvous
                _log.info("rank %d: accept failed: %s", self._me.rank, error)
                await asyncio.sleep(0.05)
                continue
            if len(self._strangers) >= UNAUTHENTICATED_LIMIT:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._handshake(sock, show(address)))
            self._strangers[task] = None
            task.add_done_callback(functools.partial(self._ended, sock, show(address)))

    def _ended(self, sock: socket.socket, address: str, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        if task.cancelled():  # maybe before its first step, so it could not do this itself
            self._drop(sock, address, "too many unfinished handshakes, or the rendezvous is over")

    async def _handshake(self, sock: socket.socket, address: str) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                hello = await answer(sock, self._me, self._admit)
        except TimeoutError:
            self._drop(sock, address, f"no complete handshake within {HANDSHAKE_SECONDS:g} s")
        except (Refused, OSError) as error:
            self._drop(sock, address, str(error))
        else:
            self._deliver(hello, sock)

    def _drop(self, sock: socket.socket, address: str, why: str) -> None:
        sock.close()
        self.dropped.pop(why, None)
        self.dropped[why] = address
        if len(self.dropped) > _DROPPED_MOST:
            del self.dropped[next(iter(self.dropped))]
        _log.info("rank %d: dropped a connection from %s: %s", self._me.rank, address, why)
