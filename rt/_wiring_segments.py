"""Which ports hear each other: Thunderbolt by the names at both ends, Ethernet by who was heard.

May live here: from machines to segments. May not: which segments are used (``_wiring_choose``), tools' output.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network

from rt._wiring_model import THUNDERBOLT, Address, Machine, Port, Segment

# Bridges for containers and virtual machines: every host has one of the same address, and none leads out of it.
_WITHIN_A_HOST = re.compile(r"docker|virbr|br-[0-9a-f]{12}|cni|flannel|lxc|lxdbr|podman")


def segments(machines: Sequence[Machine]) -> tuple[Segment, ...]:
    """Return all of them, broken ones among them, in order of their ports."""
    ports = [port for machine in machines for port in machine.ports]
    thunderbolt = [port for port in ports if port.kind == THUNDERBOLT]
    others = [port for port in ports if port.kind != THUNDERBOLT and port.up]
    found = [*_cables(thunderbolt, {machine.index: machine.ssh for machine in machines}), *_heard(others)]
    place = {port: number for number, port in enumerate(ports)}
    return tuple(sorted(found, key=lambda segment: [place[port] for port in segment.ports]))


def _cables(ports: Sequence[Port], names: dict[int, str]) -> list[Segment]:
    """Match the two ends of each Thunderbolt cable; one whose ends disagree is broken, and whatever is attached else is no host of ours."""
    ends: dict[tuple[str, str], list[Port]] = defaultdict(list)
    for port in ports:
        if port.uuid and port.peer:
            ends[port.uuid, port.peer].append(port)
    cables = []
    for (uuid, peer), near in ends.items():
        far = ends.get((peer, uuid), [])
        if uuid < peer:
            cables += [Segment(_sorted(pair)) for pair in zip(near, far, strict=False) if pair[0].host != pair[1].host]
        for port in near[len(far) :]:
            cables += _broken(port, [other for other in ports if other.uuid == peer and other.host != port.host], names)
    return cables


def _broken(port: Port, others: list[Port], names: dict[int, str]) -> list[Segment]:
    if not others:
        return []
    host = names[others[0].host]
    ports = _sorted((port, others[0])) if len(others) == 1 else (port,)
    where = f"{host} {others[0].name}" if len(others) == 1 else host
    fault = f"{names[port.host]} {port.name} sees {where}, which does not see it"
    return [Segment(ports, fault)]


def _sorted(ports: Iterable[Port]) -> tuple[Port, ...]:
    return tuple(sorted(ports, key=lambda port: port.host))


# --- Ethernet ----------------------------------------------------------------------------------------------------------------------------


def _heard(ports: Sequence[Port]) -> list[Segment]:
    """Join ports of which one was heard on the other, then those that nothing else is known of by their networks."""
    joined = _Joined(ports)
    owners: dict[str, list[Port]] = defaultdict(list)
    for port in ports:
        owners[port.mac].append(port)
    for port in ports:
        for mac in port.neighbours - {""}:
            others = [other for other in owners.get(mac, ()) if other.host != port.host]
            # Interfaces of a host may share an address (a bridge and its member): then the one of the same name is the likeliest.
            for other in sorted(others, key=lambda other: other.name != port.name)[:1]:
                joined.join(port, other)
    groups = joined.groups()
    found = [segment for group in groups if len(group) > 1 for segment in _split(group, guessed=False)]
    unheard = [group[0] for group in groups if len(group) == 1 and not _WITHIN_A_HOST.match(group[0].name)]
    return found + [segment for group in _networks(unheard) for segment in _split(group, guessed=True)]


class _Joined:
    """Disjoint sets of ports."""

    def __init__(self, ports: Sequence[Port]) -> None:
        self._above = {port: port for port in ports}

    def _top(self, port: Port) -> Port:
        while self._above[port] is not port:
            port = self._above[port]
        return port

    def join(self, left: Port, right: Port) -> None:
        self._above[self._top(right)] = self._top(left)

    def groups(self) -> list[list[Port]]:
        found: dict[Port, list[Port]] = defaultdict(list)
        for port in self._above:
            found[self._top(port)].append(port)
        return list(found.values())


def _networks(ports: Sequence[Port]) -> list[list[Port]]:
    """Group ports by the networks of their addresses, of IPv6 where they have no other; those of one host only are left out.

    An address that several hosts have is one that something on each of them gave itself (VirtualBox's networks): it joins nobody.
    """
    found: dict[IPv4Network | IPv6Network, list[Port]] = defaultdict(list)
    holders: dict[Address, set[int]] = defaultdict(set)
    for port in ports:
        for address in port.addresses or port.ipv6:
            holders[address].add(port.host)
    for port in ports:
        for address in port.addresses or port.ipv6:
            if not address.is_link_local and address.network.num_addresses > 1 and len(holders[address]) == 1:
                found[address.network].append(port)
    return [group for group in found.values() if len({port.host for port in group}) > 1]


def _split(group: Sequence[Port], guessed: bool) -> list[Segment]:
    """Make segments with one port per host: two interfaces on one switch are two ways, told apart by their networks where they have any."""
    left, found = list(group), []
    for ports in sorted(_networks(group), key=len, reverse=True):
        found += _deal([port for port in ports if port in left], guessed)
        left = [port for port in left if not any(port in segment.ports for segment in found)]
    return found + _deal(left, guessed)


def _deal(ports: Sequence[Port], guessed: bool) -> list[Segment]:
    """Put the first port of each host in one segment, the second in the next; what is left alone leads nowhere."""
    per_host: dict[int, list[Port]] = defaultdict(list)
    for port in ports:
        per_host[port.host].append(port)
    found = []
    for turn in range(max(map(len, per_host.values()), default=0)):
        members = [of_host[turn] for of_host in per_host.values() if turn < len(of_host)]
        if len(members) > 1:
            found.append(Segment(_sorted(members), guessed=guessed))
    return found
