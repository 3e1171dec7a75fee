"""Hosts, their ports and what joins the ports: the words that ``rt.distributed_config`` thinks in.

May live here: frozen descriptions, and reading the small texts that both platforms share. May not: what a tool of one platform prints
(``_wiring_macos``, ``_wiring_linux``), decisions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface

THUNDERBOLT = "thunderbolt"
ETHERNET = "ethernet"
WIRELESS = "wireless"
Address = IPv4Interface | IPv6Interface  # of a port, with its network
LINK_LOCAL = IPv4Network("169.254.0.0/16")  # what a host gives itself where nobody gives it an address: it names nobody


@dataclass(frozen=True)
class Port:
    """A network interface that a cable can end in.

    Attributes:
        host: the index of its host.
        name: of the interface, for example ``en2``.
        kind: ``THUNDERBOLT``, ``ETHERNET`` or ``WIRELESS``.
        speed: Gbit/s, or 0.0 where the host does not know.
        up: whether the host sees a carrier.
        mac: in lower case with colons, or "".
        addresses: IPv4, with their networks.
        ipv6: IPv6 addresses that others may know and that last: not link-local, temporary or deprecated ones. Of Linux only.
        rdma: the RDMA device on it, or "".
        uuid: Thunderbolt: of the port (macOS) or of the controller (Linux), in upper case.
        peer: Thunderbolt: the ``uuid`` at the other end of the cable, or "".
        ipoib: Linux: how IP goes over it if it is InfiniBand, ``datagram`` or ``connected``, else "".
        bridge: macOS: the bridge that it is a member of, or "": a member has no address of its own.
        neighbours: MAC addresses that were heard on it.
    """

    host: int
    name: str
    kind: str
    speed: float = 0.0
    up: bool = True
    mac: str = ""
    addresses: tuple[IPv4Interface, ...] = ()
    ipv6: tuple[IPv6Interface, ...] = ()
    rdma: str = ""
    uuid: str = ""
    peer: str = ""
    ipoib: str = ""
    bridge: str = ""
    neighbours: frozenset[str] = frozenset()

    @property
    def all_addresses(self) -> tuple[Address, ...]:
        """Of both kinds."""
        return (*self.addresses, *self.ipv6)


@dataclass(frozen=True)
class Machine:
    """One host as its tools describe it.

    Attributes:
        index: its place in the list of hosts that was given.
        ssh: what to give to ssh.
        system: ``Darwin`` or ``Linux``.
        ports: sorted by name, numbers by value.
        address: that others reach it by: IPv4, on the interface that routes to everybody else, or the first; else the first of IPv6; or "".
        routed: ``address`` is on an interface that routes to everybody else.
        networks: every IPv4 network that it has an address in or a route to, but the default.
        root: ``ssh`` gives us root there.
        sudo: root may be had without a password.
        manager: what keeps network settings over a restart: ``NetworkManager``, ``systemd-networkd`` or "".
        remarks: what its tools could not say, for people.
    """

    index: int
    ssh: str
    system: str
    ports: tuple[Port, ...]
    address: str = ""
    routed: bool = False
    networks: frozenset[IPv4Network] = frozenset()
    root: bool = False
    sudo: bool = False
    manager: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Ports that hear each other: the two ends of a cable, or all that are plugged into a switch.

    Attributes:
        ports: of two hosts at least, in order of hosts; a broken cable may have one end only.
        fault: what is wrong with it, so that nothing is sent over it; "" for a good one.
        guessed: nobody heard anybody, only the addresses say that the ports belong together.
    """

    ports: tuple[Port, ...]
    fault: str = ""
    guessed: bool = False

    @property
    def speed(self) -> float:
        """Gbit/s of the slowest port, 0.0 where one is not known."""
        return min(port.speed for port in self.ports)

    def port_of(self, host: int) -> Port | None:
        """Return where a host is plugged in."""
        return next((port for port in self.ports if port.host == host), None)


def by_number(name: str) -> tuple[str | int, ...]:
    """Sort key that puts en2 before en10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))
