"""Verbs through pyverbs: devices and their ports, and one connected queue pair with memory that its peer may write.

May live here: what pyverbs is asked for, the differences between its versions, errors in words that help. May not: the stream that is
made of it (``transports.rdma``), which rank connects to which (``rt.queue_pairs``), configuration.

pyverbs 44 (Debian 12) and 59 (PyPI) are both in use: the module of constants has another name, and another form.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import ipaddress
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

MESSAGES = 64  # data writes of one direction that the peer has not consumed, at most
CREDITS = 8  # messages that only say what was consumed: one per quarter of the ring, or of MESSAGES, so never more than these
KINDS = ("RC", "UC")  # of connections, the best first
_INLINE_BYTES = 220  # asked for; what the device grants counts
_LEAST_DEPTH = 16
_ACK_TIMEOUT = 16  # 4.096 us * 2 ** 16 = 0.27 s; eight of those without an answer end the connection
_RETRIES = 7
_RETRY_FOR_EVER = 7  # where the peer has no receive posted: a stopped process is not a lost one
_RNR_TIMER = 12  # 0.64 ms
_HOPS = 64
_MOST_GIDS = 2000  # to ask for at once: the kernel takes a buffer below 64 KiB, 32 B each
_PAIR_QUEUE, _PAIR_NUMBER, _QUEUE_CHANNEL, _CHANNEL_FD = 24, 52, 8, 8  # offsets of send_cq, qp_num, channel and fd: part of the ABI
_ETHERNET = 2  # IBV_LINK_LAYER_ETHERNET
_ACTIVE = 4  # IBV_PORT_ACTIVE
_PORT_STATES = {0: "has no state", 1: "is down", 2: "is initialising", 3: "is armed, not active", 4: "is active", 5: "is deferred"}
_HINTS = {
    errno.ENOMEM: "too little memory may be locked: raise the limit (`ulimit -l`, LimitMEMLOCK= of systemd), see docs/rdma.md",
    errno.EPERM: "permission denied: /dev/infiniband/uverbs* must be readable and writable for this user",
    errno.EACCES: "permission denied: /dev/infiniband/uverbs* must be readable and writable for this user",
    errno.ENOSYS: "the kernel has no verbs: load ib_uverbs",
    errno.ENODEV: "the device is gone",
    errno.ETIMEDOUT: "the peer's address does not answer: the GIDs of both ends must be able to reach each other",
    errno.ENETUNREACH: "no way to the peer's address: the GIDs of both ends must be in one network",
}


class VerbsError(OSError):
    """What a device cannot do; its text names the device, the port, the verb, the errno and what may help."""


@dataclass(frozen=True)
class Port:
    """A port that can be used.

    Attributes:
        device: its name, for example ``rxe0``.
        number: of the port, from 1.
        gid_index: which of its GIDs is used; -1 on InfiniBand, where the LID says enough.
        gid: that one, as an IPv6 address, or "".
        lid: of InfiniBand, else 0.
        mtu: the active path MTU, as verbs number it (1: 256 B ... 5: 4096 B).
    """

    device: str
    number: int
    gid_index: int
    gid: str
    lid: int
    mtu: int


@dataclass(frozen=True)
class End:
    """What a peer must know of a queue pair: its number and where it is, and the memory that may be written."""

    lid: int
    gid: str
    mtu: int
    number: int
    psn: int
    rkey: int
    address: int
    ring_bytes: int
    messages: int
    reliable: bool


@contextmanager
def _saying(where: str, verb: str, hint: str = "") -> Iterator[None]:
    """Turn pyverbs' errors into ours."""
    from pyverbs.pyverbs_error import PyverbsError

    try:
        yield
    except PyverbsError as error:
        code = getattr(error, "error_code", -1)
        code = abs(code) if isinstance(code, int) and code not in (-1, 0) else errno.EIO
        advice = hint or _HINTS.get(code, "")
        raise VerbsError(code, f"{where}: {verb} failed: {os.strerror(code)} (errno {code})" + (f"; {advice}" if advice else "")) from error


def load() -> Any:
    """Import pyverbs and return its module of constants. Raises VerbsError where it is not installed or finds no libibverbs."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        import pyverbs.device  # noqa: F401

        try:
            import pyverbs.libibverbs_enums as enums
        except ImportError:
            import pyverbs.enums as enums
    except ImportError as error:
        raise VerbsError(
            errno.ENOSYS, f"pyverbs cannot be loaded ({error}); install rt-collectives[rdma], or Debian's python3-pyverbs, see docs/rdma.md"
        ) from None
    finally:
        # Importing pyverbs configures the root logger of the whole program; that is the program's to do.
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
    return constants(enums)


@functools.cache
def constants(module: Any) -> SimpleNamespace:
    """Return the constants of a module: side by side in Debian's pyverbs, in a class per C enumeration where a newer Cython built it."""
    found = {name: value for name, value in vars(module).items() if name.startswith("IBV_")}
    for kind in vars(module).values():
        if isinstance(kind, enum.EnumMeta):
            members: dict[str, int] = dict(kind.__members__)
            found |= members
    return SimpleNamespace(**found)


def missing() -> str:
    """Return why verbs cannot be used by this Python and what to do about it, "" if they can; devices are not looked at."""
    try:
        load()
    except VerbsError as error:
        return error.strerror or "pyverbs cannot be loaded"
    return ""


def device_names() -> list[str]:
    """Return the names of the devices of this host, sorted. Raises VerbsError."""
    load()
    from pyverbs.device import get_device_list

    with _saying("verbs", "ibv_get_device_list"):
        return sorted(device.name.decode() for device in get_device_list())


def find_port(name: str) -> Port:
    """Return the first usable port of a device, or of any device if ``name`` is ``auto``.

    Raises:
        VerbsError: there is none; the text says why for each port that was looked at.
    """
    names = device_names()
    if not names:
        raise VerbsError(errno.ENODEV, "this host has no RDMA device; docs/rdma.md says how to get one, Soft-RoCE among them")
    if name != "auto" and name not in names:
        raise VerbsError(errno.ENODEV, f"there is no RDMA device {name!r}; this host has {', '.join(names)}")
    reasons = []
    for candidate in names if name == "auto" else [name]:
        for port in ports(candidate):
            if isinstance(port, Port):
                return port
            reasons.append(port)
    raise VerbsError(errno.ENETDOWN, "; ".join(reasons))


def ports(name: str) -> list[Port | str]:
    """Return the ports of a device; for one that cannot be used why not, in words. Raises VerbsError if the device cannot be opened."""
    context = _open(name)
    try:
        with _saying(name, "ibv_query_device"):
            count = context.query_device().phys_port_cnt
        return [_port(context, name, number) for number in range(1, count + 1)]
    finally:
        context.close()


def _open(name: str) -> Any:
    load()
    from pyverbs.device import Context

    with _saying(name, "ibv_open_device", ""):
        return Context(name=name)


def _port(context: Any, name: str, number: int) -> Port | str:
    where = f"{name} port {number}"
    with _saying(where, "ibv_query_port"):
        attributes = context.query_port(number)
    if attributes.state != _ACTIVE:
        state = _PORT_STATES.get(attributes.state, f"is in state {attributes.state}")
        return f"{where} {state}; is the cable in, and the network interface up (`ip link`, `rdma link`)?"
    if attributes.link_layer != _ETHERNET:
        return Port(name, number, -1, "", attributes.lid, attributes.active_mtu)
    found = gids(context, number)
    best = _best(found)
    if best is None:
        listed = ", ".join(str(gid) for _, gid, _ in found) or "none at all"
        return f"{where} has no IPv4 GID, only {listed}; give its network interface an IPv4 address (`ip address add`)"
    return Port(name, number, best[0], str(best[1]), attributes.lid, attributes.active_mtu)


def gids(context: Any, number: int) -> list[tuple[int, ipaddress.IPv6Address, int]]:
    """Return the GIDs of a port that are not empty: index, address, and type (0 InfiniBand, 1 RoCE v1, 2 RoCE v2)."""
    with _saying(f"port {number}", "ibv_query_gid_table"):
        entries = context.query_gid_table(_MOST_GIDS)
    found = []
    for entry in entries:
        address = ipaddress.IPv6Address(entry.gid_str())
        if entry.port_num == number and int(address):
            found.append((entry.gid_index, address, entry.gid_type))
    return found


def _best(found: list[tuple[int, ipaddress.IPv6Address, int]]) -> tuple[int, ipaddress.IPv6Address, int] | None:
    """IPv4 only, rather routable than link-local, rather RoCE v2 than v1."""
    usable = [entry for entry in found if entry[1].ipv4_mapped is not None]
    return min(usable, key=lambda entry: (entry[1].ipv4_mapped.is_link_local, -entry[2], entry[0]), default=None)  # type: ignore[union-attr]


class Device:
    """An open device: its context and protection domain, shared by all queue pairs of the process."""

    def __init__(self, port: Port) -> None:
        from pyverbs.pd import PD

        self.port = port
        self.where = f"{port.device} port {port.number}"
        self.context = _open(port.device)
        try:
            with _saying(self.where, "ibv_query_device"):
                self.limits = self.context.query_device()
            with _saying(self.where, "ibv_alloc_pd"):
                self.domain = PD(self.context)
        except BaseException:
            self.context.close()
            raise

    def close(self) -> None:
        """Give everything back, queue pairs that are still open included."""
        self.context.close()

    def let_go(self) -> None:
        """In a forked child: make sure that nothing here reaches the kernel, where it would end the parent's connections."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self.context.cmd_fd, inheritable=False)
        os.close(null)


class QueuePair:
    """One connection: a queue pair, its completion queue with a channel, a ring that the peer writes and one to send from.

    Args:
        device: where.
        ring_bytes: capacity of either ring.

    Attributes:
        messages: how many data messages may be under way to the peer, once connected.
        fd: of the completion channel.
        reliable: RC. False: UC, because the device has nothing else; what gets lost is not sent again.
    """

    def __init__(self, device: Device, ring_bytes: int) -> None:
        enums = load()
        from pyverbs.cq import CQ, CompChannel
        from pyverbs.mr import MR
        from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr

        self._enums, self._device, self.where = enums, device, device.where
        self._psn = secrets.randbits(24)
        self.ring_bytes = ring_bytes
        depth = min(MESSAGES + CREDITS, device.limits.max_qp_wr, device.limits.max_cqe // 2)
        if depth < _LEAST_DEPTH:
            raise VerbsError(errno.ENOSPC, f"{self.where}: its queues hold {depth} work requests, expected at least {_LEAST_DEPTH}")
        self.depth, self.messages = depth, depth - CREDITS
        self._memory = [mmap.mmap(-1, ring_bytes) for _ in range(2)]
        addresses = [_address_of(memory) for memory in self._memory]
        self._open: list[Any] = []
        try:
            with _saying(self.where, "ibv_create_comp_channel"):
                self._channel = self._keep(CompChannel(device.context))
            self.fd = ctypes.c_int.from_address(_pointer(self._channel) + _CHANNEL_FD).value
            os.set_blocking(self.fd, False)
            with _saying(self.where, "ibv_create_cq"):
                self._completions = self._keep(CQ(device.context, 2 * depth, None, self._channel, 0))
            regions = []
            for address, access in zip(addresses, (enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE, 0), strict=True):
                with _saying(self.where, f"ibv_reg_mr of {ring_bytes} B"):
                    regions.append(self._keep(MR(device.domain, ring_bytes, access, address=address)))
            self._incoming_key, self._incoming_address = regions[0].rkey, addresses[0]
            self._outgoing_key, self._outgoing_address = regions[1].lkey, addresses[1]
            self._pair = self._keep(self._make(QP, QPCap, QPInitAttr, depth))
            attributes = QPAttr(port_num=device.port.number)
            attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            with _saying(self.where, "ibv_modify_qp to INIT"):
                self._pair.to_init(attributes)
        except BaseException:
            self.close()
            raise

    def _keep(self, made: Any) -> Any:
        self._open.append(made)
        return made

    def _make(self, pair: Any, capacity: Any, request: Any, depth: int) -> Any:
        """Return a queue pair of the best kind that the device has; sets ``reliable`` and ``inline_bytes``. Raises VerbsError."""
        refused: VerbsError | None = None
        for kind in KINDS:
            for inline in (_INLINE_BYTES, 0):  # some devices have no inline data and say so by refusing
                cap = capacity(max_send_wr=depth, max_recv_wr=depth, max_send_sge=1, max_recv_sge=1, max_inline_data=inline)
                number = getattr(self._enums, f"IBV_QPT_{kind}")
                wanted = request(qp_type=number, scq=self._completions, rcq=self._completions, cap=cap, sq_sig_all=0)
                self.reliable, self.inline_bytes = kind == "RC", inline
                try:
                    with _saying(self.where, "ibv_create_qp"):
                        return pair(self._device.domain, wanted)
                except VerbsError as error:
                    refused = refused or error
        assert refused is not None
        raise refused

    def end(self) -> End:
        """Return what the peer must know."""
        port = self._device.port
        number = self._pair.qp_num
        return End(
            port.lid, port.gid, port.mtu, number, self._psn, self._incoming_key, self._incoming_address, self.ring_bytes, self.messages,
            self.reliable,
        )  # fmt: skip

    def connect(self, peer: End) -> None:
        """Connect with the peer's end, ready to receive and to send. Raises VerbsError."""
        from pyverbs.addr import GID, AHAttr, GlobalRoute
        from pyverbs.qp import QPAttr

        port = self._device.port
        if peer.reliable != self.reliable:
            kinds = ["RC" if each else "UC" for each in (self.reliable, peer.reliable)]
            raise VerbsError(errno.ENOTSUP, f"{self.where} connects by {kinds[0]}, the peer's device by {kinds[1]}; both must be of a kind")
        self.messages = min(self.messages, peer.messages)
        self.ring_bytes = min(self.ring_bytes, peer.ring_bytes)
        self._peer_key, self._peer_address = peer.rkey, peer.address
        attributes = QPAttr(port_num=port.number)
        attributes.path_mtu = min(port.mtu, peer.mtu)
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = peer.number, peer.psn, self._psn
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.timeout = _RNR_TIMER, _ACK_TIMEOUT
        attributes.retry_cnt, attributes.rnr_retry = _RETRIES, _RETRY_FOR_EVER
        if port.gid_index >= 0:
            route = GlobalRoute(dgid=GID(ipaddress.IPv6Address(peer.gid).exploded), sgid_index=port.gid_index, hop_limit=_HOPS)
            attributes.ah_attr = AHAttr(is_global=1, gr=route, port_num=port.number, dlid=peer.lid)
        else:
            attributes.ah_attr = AHAttr(is_global=0, port_num=port.number, dlid=peer.lid)
        towards = f"{self.where} ({port.gid or port.lid}) to {peer.gid or peer.lid}"
        with _saying(towards, "ibv_modify_qp to RTR"):
            self._pair.to_rtr(attributes)
        with _saying(towards, "ibv_modify_qp to RTS"):
            self._pair.to_rts(attributes)

    def for_stream(self) -> dict[str, int]:
        """Return what ``RdmaStream`` needs of a connected queue pair: addresses, keys and limits."""
        pair, completions, channel = (_pointer(each) for each in (self._pair, self._completions, self._channel))
        found = ctypes.c_uint32.from_address(pair + _PAIR_NUMBER).value
        related = ctypes.c_void_p.from_address(pair + _PAIR_QUEUE).value, ctypes.c_void_p.from_address(completions + _QUEUE_CHANNEL).value
        if found != self._pair.qp_num or related != (completions, channel):
            raise VerbsError(errno.ENOTSUP, f"{self.where}: this pyverbs keeps its objects otherwise than 44 to 64 do")
        verbs = _libibverbs()
        return {
            "qp": pair, "cq": completions, "channel": channel,
            "get_event": _address_of_function(verbs.ibv_get_cq_event), "ack_events": _address_of_function(verbs.ibv_ack_cq_events),
            "outgoing": self._outgoing_address, "incoming": self._incoming_address, "capacity": self.ring_bytes,
            "outgoing_key": self._outgoing_key, "inline_bytes": self.inline_bytes,
            "peer_address": self._peer_address, "peer_key": self._peer_key, "messages": self.messages, "credits": CREDITS,
        }  # fmt: skip

    def close(self) -> None:
        """Give everything back; idempotent."""
        for made in reversed(self._open):
            made.close()
        self._open.clear()
        for memory in self._memory:
            with suppress(BufferError):  # where an error's traceback still holds an address of it
                memory.close()


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _pointer(made: Any) -> int:
    """Return the address of the verbs object behind one of pyverbs'.

    Each keeps it as its first field, behind those of the class it is derived from; ``for_stream`` checks what is found there.
    """
    from pyverbs.base import PyverbsCM

    return ctypes.c_size_t.from_address(id(made) + PyverbsCM.__basicsize__).value


def _address_of_function(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _libibverbs() -> ctypes.CDLL:
    """The library that pyverbs was linked with: a symbol is also looked for in what an extension depends on."""
    import pyverbs.cq

    return ctypes.CDLL(pyverbs.cq.__file__)
