"""Addresses for the ports of segments: what they have is kept where it is good, else each segment gets a network of its own.

May live here: arithmetic on networks. May not: commands (``_wiring_commands``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Network, collapse_addresses

from rt._wiring_model import LINK_LOCAL, THUNDERBOLT, Address, Machine, Port, Segment
from rt.errors import ConfigError

_POOLS = tuple(map(IPv4Network, ("192.168.0.0/16", "10.0.0.0/8", "172.16.0.0/12")))  # RFC 1918
# VPNs split the default route in two or four: that is no network in use.
_SHORTEST = 8


@dataclass(frozen=True)
class Wire:
    """A segment with the address of each of its ports.

    Attributes:
        segment: the ports.
        addresses: in order of ``segment.ports``, all of one network.
        fresh: the ports do not have these addresses yet.
    """

    segment: Segment
    addresses: tuple[Address, ...]
    fresh: bool

    def of(self, host: int) -> str:
        """Return the address of a host's port."""
        return next(str(address.ip) for port, address in zip(self.segment.ports, self.addresses, strict=True) if port.host == host)


def plan(machines: Sequence[Machine], segments: Sequence[Segment]) -> list[Wire]:
    """Return wires in order of the segments.

    Networks that any host has an address in or a route to are left alone: what one host can reach there, it shall go on reaching.

    Raises:
        ConfigError: the private networks are used up.
    """
    kept = addressed(machines, segments)
    busy = {network for machine in machines for network in machine.networks if network.prefixlen >= _SHORTEST}
    new = _networks([len(segment.ports) for segment in segments if segment not in kept], busy)
    return [kept.get(segment) or _fresh(segment, next(new)) for segment in segments]


def addressed(machines: Sequence[Machine], segments: Sequence[Segment]) -> dict[Segment, Wire]:
    """Return wires for the segments whose ports have addresses that can stay; of several in one network the first; IPv4 before IPv6."""
    kept: dict[Segment, Wire] = {}
    kinds: tuple[Callable[[Port], Sequence[Address]], ...] = (lambda port: port.addresses, lambda port: port.ipv6)
    for of in kinds:
        taken: list[IPv4Network | IPv6Network] = [address.network for segment in kept for port in segment.ports for address in port.ipv6]
        for segment in segments:
            wire = None if segment in kept else _kept(segment, machines, taken, of)
            if wire is not None:
                kept[segment] = wire
                taken.append(wire.addresses[0].network)
    return kept


def _kept(
    segment: Segment, machines: Sequence[Machine], taken: Iterable[IPv4Network | IPv6Network], of: Callable[[Port], Sequence[Address]]
) -> Wire | None:
    if any(port.bridge for port in segment.ports):
        return None
    for first in of(segment.ports[0]):
        network = first.network
        here = [next((each for each in of(port) if each.network == network), None) for port in segment.ports]
        addresses = tuple(each for each in here if each is not None)
        if len(addresses) < len(here) or len(set(addresses)) < len(here) or network.overlaps(LINK_LOCAL) or network.num_addresses == 1:
            continue
        # Another interface in the network of a Thunderbolt cable takes packets away from it. In that of a LAN it is none of our business:
        # a laptop is in one network by cable and by radio, and whoever gives the addresses there is not us.
        others = [
            address.network
            for port in segment.ports
            for other in machines[port.host].ports
            if port.kind == THUNDERBOLT and other not in segment.ports
            for address in other.all_addresses
        ]
        if not any(network.overlaps(other) for other in [*others, *taken]):
            return Wire(segment, addresses, fresh=False)
    return None


def _fresh(segment: Segment, network: IPv4Network) -> Wire:
    first = int(network.network_address) + 1
    addresses = tuple(IPv4Interface((first + place, network.prefixlen)) for place in range(len(segment.ports)))
    return Wire(segment, addresses, fresh=True)


def _networks(ports: Sequence[int], busy: Iterable[IPv4Network]) -> Iterator[IPv4Network]:
    """Yield a network with room for so many ports, one after the other, none of them ``busy``."""
    used = sorted(collapse_addresses(busy))
    pools = iter(_POOLS)
    pool = next(pools)
    at, end = int(pool.network_address), int(pool.broadcast_address)
    for count in ports:
        prefix = 32 - max(2, (count + 1).bit_length())  # the network's own address and the broadcast address are nobody's
        while True:
            size = 1 << (32 - prefix)
            at = -(-at // size) * size
            if at + size - 1 > end:
                later = next(pools, None)
                if later is None:
                    raise ConfigError(f"no private network is left for {count} ports: the hosts use {', '.join(map(str, used[:8]))} ...")
                at, end = int(later.network_address), int(later.broadcast_address)
                continue
            found = IPv4Network((at, prefix))
            blocking = next((network for network in used if network.overlaps(found)), None)
            if blocking is None:
                break
            at = max(at + size, int(blocking.broadcast_address) + 1)
        yield found
        at += size
