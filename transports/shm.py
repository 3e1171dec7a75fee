"""Shared memory between two ranks of one host: how both come to hold the same memory, and know that they do.

May live here: making, passing and probing memory. May not: what is done with it (``rt/_shared.pxi``, ``rt/_ring.h``), which pairs share
(``rt.bootstrap``).

The memory has no name: ``memfd_create``, and the descriptor goes over a Unix socket whose own name is abstract. Nothing can be left behind,
and no limit of a container on /dev/shm counts. Whether two ranks can share is tried, not guessed: the name is looked up in the network
namespace, the descriptor must arrive, and each must find in the memory what the other wrote.

Before any descriptor is passed the two shake hands as on every connection (``transports.handshake``). Then::

    dialler -> acceptor   the descriptor, with MAGIC and the bytes that make up a proof, which also stand in the memory
    dialler <- acceptor   YES, after it found them there and wrote its answer beside them

It is settled by what the dialler tells all ranks afterwards: an acceptor that said YES and is not named forgets the memory.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import mmap
import os
import socket
import sys
from contextlib import suppress

RING_BYTES = 1024 * 1024  # each way; half as much is slower between 256 KiB and 4 MiB, twice as much where four ranks share a cache
_LEAST_RING_BYTES = 64 * 1024
_ALL_RINGS_BYTES = 64 * 1024 * 1024  # of a host
SUPPORTED = sys.platform == "linux"

_MAGIC = b"rtSM"
_YES = b"rtOK"
_PROOF_BYTES = 32
_HEAD_BYTES = 512  # of a ring, as in rt/_ring.h


def ring_bytes(ranks: int, links: int) -> int:
    """Return the capacity of a ring where so many ranks share memory, with so many links per pair: a power of two."""
    capacity = RING_BYTES
    while capacity > _LEAST_RING_BYTES and ranks * (ranks - 1) * links * capacity > _ALL_RINGS_BYTES:
        capacity //= 2
    return capacity


def stride(capacity: int) -> int:
    """Return how many bytes the two rings of one link take: a multiple of the page size."""
    page = mmap.PAGESIZE
    return (2 * (_HEAD_BYTES + capacity) + page - 1) // page * page


def make(nbytes: int) -> int:
    """Return the descriptor of new memory, all zero. Its size can not be changed: a peer that did would kill us."""
    fd = os.memfd_create("rt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def listen() -> socket.socket:
    """Return a listening socket with a name of the kernel's choice, which goes with the socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind("")  # only in abstract names does Linux choose
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock


def name_of(listener: socket.socket) -> str:
    """Return the abstract name of a listener, in hexadecimal digits."""
    return bytes(listener.getsockname()).hex()


async def connect(name: str) -> socket.socket:
    """Connect to a listener by ``name_of`` it. Raises OSError where nobody of that name listens in this network namespace."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, bytes.fromhex(name))
    except BaseException:
        sock.close()
        raise
    return sock


async def offer(sock: socket.socket, nbytes: int) -> int:
    """Make memory, pass it to the acceptor, and return its descriptor once both hold it. Raises OSError if they do not."""
    fd = make(nbytes)
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            proof = os.urandom(_PROOF_BYTES)
            memory[:_PROOF_BYTES] = proof
            socket.send_fds(sock, [_MAGIC + proof], [fd])
            answer = await asyncio.get_running_loop().sock_recv(sock, len(_YES))
            if answer != _YES or memory[_PROOF_BYTES : 2 * _PROOF_BYTES] != proof[::-1]:
                raise OSError(errno.EPROTO, "the other side does not see this memory")
            memory[: 2 * _PROOF_BYTES] = bytes(2 * _PROOF_BYTES)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def accept(sock: socket.socket, nbytes: int) -> int:
    """Take what ``offer`` passes, and return its descriptor. Raises OSError if it is not such memory."""
    await _readable(sock)
    message, passed = _receive(sock)
    fd = passed[0] if passed else -1
    try:
        if fd < 0 or len(message) != len(_MAGIC) + _PROOF_BYTES or not message.startswith(_MAGIC):
            raise OSError(errno.EPROTO, "no shared memory was passed")
        if os.fstat(fd).st_size != nbytes:
            raise OSError(errno.EPROTO, f"{os.fstat(fd).st_size} B of memory were passed, not {nbytes}")
        proof = message[len(_MAGIC) :]
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            if memory[:_PROOF_BYTES] != proof:
                raise OSError(errno.EPROTO, "the other side does not see this memory")
            memory[_PROOF_BYTES : 2 * _PROOF_BYTES] = proof[::-1]
        sock.send(_YES)
    except BaseException:
        for each in passed:
            os.close(each)
        raise
    return fd


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """As ``socket.recv_fds``, which would leave the descriptors open to programs that we start."""
    room = array.array("i").itemsize
    message, ancillary, _, _ = sock.recvmsg(256, socket.CMSG_SPACE(room), socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // room * room])
    return message, list(found)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        with suppress(OSError):
            loop.remove_reader(sock)
