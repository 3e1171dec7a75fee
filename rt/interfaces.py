"""Network interfaces: which this host has, what ``RT_SOCKET_IFNAME`` says of them, and which of them a rank uses.

May live here: listing, parsing, choosing. May not: sockets, what is announced to whom (``rt.rendezvous``). ``rt.doctor`` sends this file to
hosts that have no ``rt``: of the package it imports the errors only.

The syntax is that of ``NCCL_SOCKET_IFNAME`` (NCCL's user guide, environment variables), with networks beside names::

    eth,ib          interfaces whose names begin with eth or ib
    =eth0,eth1      interfaces of just these names
    ^docker,lo      none whose name begins with docker or lo
    ^=docker0       none of just this name
    10.0.0.0/8      those with an address in this network; fd00::/8 likewise. Stands wherever a name may
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rt.errors import ConfigError

VARIABLE = "RT_SOCKET_IFNAME"
_EXPECTED = "expected names or networks with commas between, such as eth0 or =eth0,eth1 or ^docker,lo or 10.0.0.0/8"

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        name: the system's.
        addresses: each with the length of its network's prefix: ``10.0.0.1/24``, ``fd00::1/64``.
        mtu: bytes of the largest packet, 0 where unknown.
        up: whether it is switched on and its cable plugged in.
        loopback: whether it leads back to this host.
    """

    name: str
    addresses: tuple[str, ...]
    mtu: int = 0
    up: bool = True
    loopback: bool = False

    @property
    def hosts(self) -> list[str]:
        """The addresses alone, without those that mean something on one cable only (IPv6's link-local ones)."""
        found = [ipaddress.ip_interface(address).ip for address in self.addresses]
        return [str(ip) for ip in found if not (ip.version == 6 and ip.is_link_local)]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.addresses) or 'no address'}{'' if self.up else ', down'})"


@dataclass(frozen=True)
class Choice:
    """What the variable says.

    Attributes:
        entries: prefixes of names (whole names if ``exact``) and networks, in the order given.
        exclude: whether they say what not to use.
        text: how it was written.
    """

    entries: tuple[str | _Network, ...]
    exclude: bool
    exact: bool
    text: str

    def rank(self, interface: Interface) -> int | None:
        """Return the place in the list of the first entry that an interface matches, None if none does."""
        return next((place for place, entry in enumerate(self.entries) if self._matches(entry, interface)), None)

    def _matches(self, entry: str | _Network, interface: Interface) -> bool:
        if isinstance(entry, str):
            return interface.name == entry if self.exact else interface.name.startswith(entry)
        return any(ipaddress.ip_address(host) in entry for host in interface.hosts)

    def prefers(self, host: str) -> bool:
        """Whether an address lies in one of the networks."""
        return any(not isinstance(entry, str) and ipaddress.ip_address(host) in entry for entry in self.entries)


def asked(option: str | None, environ: Mapping[str, str] = os.environ) -> Choice | None:
    """Read what a command line says (``--iface``), else the variable; None where neither does. An empty variable is unset, as for NCCL.

    Raises:
        ConfigError: see :func:`parse`; it names the one that was read.
    """
    if option is not None:
        return parse(option, "--iface")
    return parse(environ[VARIABLE]) if environ.get(VARIABLE) else None


def parse(text: str, where: str = VARIABLE) -> Choice:
    """Read the variable.

    Raises:
        ConfigError: an empty entry, or something with a slash or a colon that is no network.
    """
    exclude = text.startswith("^")
    rest = text.removeprefix("^")
    exact = rest.startswith("=")
    entries = tuple(_entry(entry, text, where) for entry in rest.removeprefix("=").split(","))
    return Choice(entries, exclude, exact, text)


def _entry(entry: str, text: str, where: str) -> str | _Network:
    entry = entry.strip()
    if not entry or entry[0] in "^=":
        what = f"{entry[0]!r} within the list, where it may only stand before all of it" if entry else "an empty entry"
        raise ConfigError(f"{where}: found {what} in {text!r}, {_EXPECTED}")
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        if "/" in entry:  # in no interface's name
            raise ConfigError(f"{where}: found {entry!r} in {text!r}, which is no network, {_EXPECTED}") from None
        return entry


def listing() -> list[Interface]:
    """Return the interfaces of this host, in the system's order."""
    import psutil  # when asked for: most ranks never do

    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    found = []
    for name, each in addresses.items():
        texts = tuple(text for text in (_with_prefix(one.address, one.netmask) for one in each) if text)
        state = states.get(name)
        loopback = bool(texts) and all(ipaddress.ip_interface(text).is_loopback for text in texts)
        found.append(Interface(name, texts, state.mtu if state else 0, bool(state and state.isup), loopback))
    return found


def _with_prefix(address: str, netmask: str | None) -> str:
    """Return ``10.0.0.1/24``; "" for what is no IP address, as that of an Ethernet card."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
        bits = ip.max_prefixlen if netmask is None else int(ipaddress.ip_address(netmask)).bit_count()
    except ValueError:
        return ""
    return f"{ip}/{bits}"


def reachable(found: Sequence[Interface]) -> list[str]:
    """Return the addresses at which others may reach this host, with their networks: ``10.0.0.1/24``."""
    usable = [each for each in found if each.up and not each.loopback]
    return [address for each in usable for address in each.addresses if str(ipaddress.ip_interface(address).ip) in each.hosts]


def between(mine: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """Return an address of this host in a network that all other hosts are in, too; "" if there is none.

    An address that another host has as well leads nowhere: the bridges for containers have the same one on every host.

    Args:
        mine: addresses with their networks.
        others: likewise, of each other host.
    """
    for candidate in map(ipaddress.ip_interface, mine):
        theirs = [[ipaddress.ip_interface(address).ip for address in host] for host in others]
        if all(candidate.ip not in host and any(ip in candidate.network for ip in host) for host in theirs):
            return str(candidate.ip)
    return ""


def choose(found: Sequence[Interface], choice: Choice, here: str) -> list[str]:
    """Return the addresses at which a rank of this host is to be reached.

    Names and networks that are asked for give one address of every interface that matches, in the order of the list; exclusions give one:
    that of the way to the coordinator, if it is not excluded, else the first that is left. Interfaces that are down, and loopback for a
    coordinator that is elsewhere, are never used.

    Args:
        found: the interfaces of this host.
        choice: what was asked for.
        here: this host's address on the way to the coordinator; of several addresses of an interface one of its kind is taken.

    Raises:
        ConfigError: none matches; it lists what there is.
    """
    here = here.partition("%")[0]
    usable = [each for each in found if each.up and each.hosts and (not each.loopback or ipaddress.ip_address(here).is_loopback)]
    ranked = [(choice.rank(each), each) for each in usable]
    if choice.exclude:
        left = [each for rank, each in ranked if rank is None]
        left.sort(key=lambda each: (here not in each.hosts, each.loopback))
        matching = left[:1]
    else:
        matching = [each for _, each in sorted(((rank, each) for rank, each in ranked if rank is not None), key=lambda pair: pair[0])]
    if not matching:
        raise ConfigError(_nothing(found, choice, here))
    return [_address(each, choice, here) for each in matching]


def reached(found: Sequence[Interface], choice: Choice | None, here: str, given: Sequence[str]) -> list[str]:
    """Return the addresses at which a host of a job is to be reached: those that a hostfile gives, as far as ``choice`` has them.

    Args:
        found: the interfaces of that host; not looked at without a choice.
        choice: what was asked for, None if nothing was.
        here: the host's address on the way to others, for where none is given: see :func:`choose`.
        given: its ``ips`` in the hostfile.

    Raises:
        ConfigError: no interface matches, or none with a given address does; it lists what there is.
    """
    if choice is None:
        return list(given) or [here]
    if not given:
        return choose(found, choice, here)
    each_alone = [dataclasses.replace(each, addresses=(address,)) for each in found for address in each.addresses]
    matching = {_ip(each.addresses[0]) for each in each_alone if (choice.rank(each) is None) == choice.exclude}
    kept = [host for host in given if _ip(host) in matching]
    if not kept:
        raise ConfigError(f"{_nothing(found, choice, here)} and has one of the hostfile's ips ({', '.join(given)})")
    return kept


def nccl_names(found: Sequence[Interface], addresses: Sequence[str]) -> str:
    """Return the interfaces that have these addresses as ``NCCL_SOCKET_IFNAME`` names them, which knows no networks: ``=eth0,eth1``."""
    wanted = {_ip(address) for address in addresses}
    return "=" + ",".join(each.name for each in found if wanted & {_ip(address) for address in each.addresses})


def _ip(address: str) -> str:
    """Return an address in its usual form, without the length of a prefix and without a zone."""
    return str(ipaddress.ip_interface(address.partition("%")[0]).ip)


def _address(interface: Interface, choice: Choice, here: str) -> str:
    version = ipaddress.ip_address(here).version

    def worse(host: str) -> tuple[bool, bool, bool]:
        named = not choice.exclude and choice.prefers(host)
        return not named, host != here, ipaddress.ip_address(host).version != version

    return min(interface.hosts, key=worse)


def _nothing(found: Sequence[Interface], choice: Choice, here: str) -> str:
    there = ", ".join(map(str, found)) or "no interface at all"
    text = f"{VARIABLE}={choice.text}: found {there}, expected {'one that is left' if choice.exclude else 'one that matches'}"
    if any(each.loopback and (choice.rank(each) is None) == choice.exclude for each in found):
        text += f"; loopback does not count, since the coordinator is reached from {here}"
    return text
