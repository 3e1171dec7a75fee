"""What is wrong with what ``rt.doctor`` has seen, and what to do about it.

May live here: judgement: pure functions from reports to findings. May not: finding things out, output.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rt._doctor_network import HostReport, LinkReport

ERROR, WARNING = "error", "warning"
SLOW = 0.5  # of the median bandwidth
LATE = 3.0  # times the median round trip
_LATE_SECONDS = 100e-6  # below which a late link is only a busy host
_SKEW_SECONDS = 0.5
_AGAIN = 10


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: ``error`` if ranks cannot form a group so, or would get wrong; ``warning`` if they are slow.
        about: the kind of finding, one word, for programs.
        where: host, or ``host -> host``.
        what: was found.
        advice: what to do.
    """

    level: str
    about: str
    where: str
    what: str
    advice: str


def judge(hosts: Sequence[HostReport], links: Sequence[LinkReport]) -> list[Finding]:
    """Return what is wrong, errors first."""
    found = [*_unreached(hosts), *_versions(hosts), *_clocks(hosts), *_addresses(hosts), *_connections(hosts, links)]
    found += [*_mtu(hosts, links), *_slow(hosts, links), *_late(hosts, links)]
    return sorted(found, key=lambda finding: finding.level != ERROR)


def slowest(links: Sequence[LinkReport]) -> LinkReport | None:
    """Return the way with the least bandwidth, None where none was measured."""
    return min((link for link in links if link.bandwidth is not None), key=lambda link: link.bandwidth or 0.0, default=None)


def name(hosts: Sequence[HostReport], link: LinkReport) -> str:
    """Return ``host0 -> host1``, with the address where the target has several."""
    target = hosts[link.target]
    return f"{hosts[link.source].name} -> {target.name}" + (f" ({link.address})" if len(target.addresses) > 1 else "")


def _unreached(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    for host in hosts:
        if host.problem:
            yield Finding(ERROR, "host", host.name, host.problem, host.advice)


def _versions(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    asked = [host for host in hosts if host.facts]
    for host in asked:
        if not host.facts["rt"]:
            what = f"{host.facts['executable']} cannot import rt: {host.facts['rt_problem']}"
            yield Finding(ERROR, "rt", host.name, what, "install rt-collectives there for this Python, or name another with --python")
    for about, level, advice in (
        ("rt", ERROR, "install the same release of rt on every host"),
        ("python", WARNING, "use one Python version: what is pickled by one may not be read by another"),
    ):
        versions = Counter(_release(about, host.facts[about]) for host in asked if host.facts[about])
        if len(versions) > 1:
            usual = versions.most_common(1)[0][0]
            for host in asked:
                if host.facts[about] and _release(about, host.facts[about]) != usual:
                    others = ", ".join(each.name for each in asked if _release(about, each.facts[about]) == usual)
                    what = f"it has {about} {host.facts[about]}; {others} {'has' if ',' not in others else 'have'} {usual}"
                    yield Finding(level, about, host.name, what, advice)


def _release(about: str, version: str) -> str:
    return version if about == "rt" else ".".join(version.split(".")[:2])


def _clocks(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    asked = [host for host in hosts if host.facts]
    if not asked:
        return
    usual = statistics.median(host.skew[0] for host in asked)
    for host in asked:
        off = host.skew[0] - usual
        if abs(off) - host.skew[1] > _SKEW_SECONDS:
            what = f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the others"
            yield Finding(WARNING, "clock", host.name, what, "nothing in rt depends on it, but logs do not fit together: switch on NTP")


def _addresses(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    several = len(hosts) > 1
    for host in hosts:
        for address in host.addresses:
            interface = host.interface(address)
            if ipaddress.ip_address(address).is_loopback and several:
                what = f"others are told to reach it at {address}, which is loopback: they would reach themselves"
                yield Finding(ERROR, "loopback", host.name, what, "give it ips in the hostfile, or set RT_SOCKET_IFNAME (--iface)")
            elif interface is None and host.interfaces:
                there = ", ".join(ip for each in host.interfaces if not each.loopback for ip in each.hosts)
                what = f"it does not have the address {address} ({host.why}), but {there}: mistyped, or translated on the way (NAT)"
                yield Finding(ERROR, "nat", host.name, what, "give it ips in the hostfile at which others reach it without translation")
            elif interface is not None and interface.name in host.facts["wireless"]:
                what = f"{address} is on {interface.name}, which is wireless"
                yield Finding(WARNING, "wireless", host.name, what, "use a cable: name its interface with RT_SOCKET_IFNAME (--iface)")


def _connections(hosts: Sequence[HostReport], links: Sequence[LinkReport]) -> Iterator[Finding]:
    for link in links:
        where = name(hosts, link)
        if link.outcome != "ok":
            yield Finding(ERROR, *_no_connection(hosts, link, where))
        elif link.seen != link.local:
            what = f"it goes out as {link.local} and comes in as {link.seen}: translated on the way (NAT)"
            advice = f"ranks on {hosts[link.source].name} are reached at what they announce, {link.local}: is that possible from there?"
            yield Finding(WARNING, "nat", where, what, advice)


def _no_connection(hosts: Sequence[HostReport], link: LinkReport, where: str) -> tuple[str, str, str, str]:
    to, target = link.address, hosts[link.target].name
    if link.outcome == "silent" and link.shut == "refused":
        what = f"no answer from the port on {to} where the probe listens, a shut one refuses: a firewall drops connections to high ports"
        return "firewall", where, what, f"open TCP between the hosts of the job on {target} (ports 1024 and up)"
    if link.outcome == "silent":
        what = f"no answer from {to}, neither from an open nor from a shut port: a firewall drops everything, or packets get lost"
        return "firewall", where, what, f"look at the firewall of {target}, and at the routes of both (`ip route get {to}`)"
    if link.outcome == "refused":
        what = f"{to} refuses the port where the probe listens: a firewall rejects it, or another machine has this address"
        return "firewall", where, what, f"open TCP between the hosts of the job on {target}; does {to} belong to it?"
    if link.outcome == "unreachable":
        return "route", where, f"{to} cannot be reached: {link.why}", f"look at `ip route get {to}` on {hosts[link.source].name}"
    if link.outcome == "stranger":
        what = f"somebody else answers at {to}: {link.why}"
        return "nat", where, what, f"does {to} belong to {target}? Two hosts with one address, or a proxy between them, look so"
    return "broken", where, f"the connection to {to} broke: {link.why}", "try again; is the cable or the switch failing?"


def _mtu(hosts: Sequence[HostReport], links: Sequence[LinkReport]) -> Iterator[Finding]:
    for link in links:
        source, target = hosts[link.source].interface(link.local), hosts[link.target].interface(link.address)
        if link.outcome != "ok" or source is None or target is None:
            continue
        sizes = f"{source.name} of {hosts[link.source].name} has MTU {source.mtu}, {target.name} of {hosts[link.target].name} {target.mtu}"
        if not link.large:
            what = f"small packets come through, large ones do not; {sizes}: something between takes less, and nobody is told"
            yield Finding(ERROR, "mtu", name(hosts, link), what, "set the same MTU on hosts and switches (`ip link set DEV mtu 1500`)")
        elif source.mtu != target.mtu and link.source < link.target and _neighbours(hosts[link.source], link.local, link.address):
            advice = "set the same MTU on both (`ip link set DEV mtu N`), the larger only if the switch takes it"
            yield Finding(WARNING, "mtu", name(hosts, link), f"on one network, {sizes}", advice)


def _neighbours(host: HostReport, local: str, address: str) -> bool:
    """Whether an address lies in the network of this host's own."""
    interface = host.interface(local)
    texts = [text for text in interface.addresses if text.partition("/")[0] == local] if interface is not None else []
    return any(ipaddress.ip_address(address) in ipaddress.ip_interface(text).network for text in texts)


def _slow(hosts: Sequence[HostReport], links: Sequence[LinkReport]) -> Iterator[Finding]:
    rates = {link: link.bandwidth for link in links if link.bandwidth is not None}
    if len(rates) > 2:
        usual = statistics.median(rates.values())
        slow = {link for link, rate in rates.items() if rate < SLOW * usual}
        for end in ("from", "to"):  # where all ways of a host are slow, that host is to blame
            for number, host in enumerate(hosts):
                ways = [link for link in rates if number == (link.source if end == "from" else link.target)]
                if len(ways) > 1 and slow.issuperset(ways):
                    slow.difference_update(ways)
                    least = min(rates[way] for way in ways)
                    what = f"all ways {end} it are slow, {show_rate(least)}, where the median is {show_rate(usual)}"
                    advice = "look at its cable, its switch port, and the speed agreed on (`ethtool DEV`)"
                    yield Finding(WARNING, "slow", host.name, what + _lossy(ways), advice)
        for link in sorted(slow, key=lambda link: rates[link]):
            what = f"{show_rate(rates[link])}, where the median is {show_rate(usual)}"
            advice = "only this way is slow: look at what is between these two, and whether another interface would do (--iface)"
            yield Finding(WARNING, "slow", name(hosts, link), what + _lossy([link]), advice)


def _late(hosts: Sequence[HostReport], links: Sequence[LinkReport]) -> Iterator[Finding]:
    times = {link: link.latency for link in links if link.latency is not None}
    if len(times) > 2:
        usual = statistics.median(times.values())
        for link, seconds in times.items():
            if seconds > max(LATE * usual, _LATE_SECONDS):
                what = f"a round trip takes {show_time(seconds)}, the median is {show_time(usual)}"
                yield Finding(WARNING, "late", name(hosts, link), what, "another network or site, a busy host, or power saving on its way?")


def _lossy(links: Sequence[LinkReport]) -> str:
    again = max(link.retransmitted for link in links)
    return f"; up to {again} segments had to be sent again" if again > _AGAIN else ""


def show_rate(rate: float | None) -> str:
    """Return bytes per second as bits, three digits: ``9.41 Gbit/s``."""
    bits = (rate or 0.0) * 8
    scale, unit = (1e9, "Gbit/s") if bits >= 1e9 else (1e6, "Mbit/s") if bits >= 1e6 else (1e3, "kbit/s")
    return f"{bits / scale:.3g} {unit}"


def show_time(seconds: float | None) -> str:
    """Return a time, three digits: ``45.1 us``."""
    seconds = seconds or 0.0
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
