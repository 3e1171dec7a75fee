"""A Linux host's own words, read: ``ip -j``, ``rdma -j``, ``/sys/bus/thunderbolt``.

May live here: what these tools and files print. May not: asking them (``_wiring_facts``), other hosts.
"""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface
from pathlib import PurePosixPath
from typing import Any

from rt._wiring_facts import Facts
from rt._wiring_model import ETHERNET, LINK_LOCAL, THUNDERBOLT, WIRELESS, Machine, Port, by_number

# Made by software and leading nowhere that a cable leads.
_NO_CABLE = ("dummy", "ifb", "tun", "wireguard", "vxlan", "geneve", "gre", "gretap", "ipip", "sit", "macvlan", "ipvlan", "vlan", "vrf")
Item = dict[str, Any]
_Sysfs = dict[tuple[str, str], str]


def machine(index: int, facts: Facts) -> Machine:
    """Describe a Linux host."""
    links, remarks = _listed(facts, "addresses")
    routes, more = _listed(facts, "routes")
    heard, _ = _listed(facts, "neighbours")
    devices, _ = _listed(facts, "rdma")
    sysfs = _sysfs(facts.text("sysfs"))
    if "no ping" in facts.said:
        remarks.append("it has no ping (Debian: iputils-ping), so cables whose ends have no addresses are not found from here")
    ports = [_port(index, link, sysfs, heard, devices) for link in links if _is_port(link)]
    default = next((str(route["dev"]) for route in _made(routes) if _leads_everywhere(route)), "")
    own = {address.network for link in links for address in _addresses(link)}
    root = facts.text("user").strip() == "0"
    return Machine(
        index=index,
        ssh=facts.ssh,
        system="Linux",
        ports=tuple(sorted(ports, key=lambda port: by_number(port.name))),
        address=_address(links, default),
        routed=any(link.get("ifname") == default and _addresses(link) for link in links),
        networks=frozenset(own | _routed(routes)),
        root=root,
        sudo=root or facts.went_well("sudo"),
        manager=_manager(facts),
        remarks=tuple(remarks + more),
    )


def _listed(facts: Facts, question: str) -> tuple[list[Item], list[str]]:
    """Return what a tool with -j printed, and a remark if that was nothing."""
    text = facts.text(question).strip()
    try:
        found = json.loads(text) if text else []
        if (text or facts.went_well(question)) and isinstance(found, list):
            return [item for item in found if item], []  # `ip -j -d` prints {} for what it filtered away
    except ValueError:
        pass
    return [], [f"`ip -j` said nothing of {question} that can be read: {text[:60]!r} (iproute2 5.0 or later is needed)"]


def _is_port(link: Item) -> bool:
    kind = link.get("linkinfo", {}).get("info_kind", "")
    cabled = link.get("link_type") in ("ether", "infiniband") and kind not in _NO_CABLE
    return cabled and "master" not in link  # the bond or bridge stands for its members


def _port(index: int, link: Item, sysfs: _Sysfs, heard: list[Item], devices: list[Item]) -> Port:
    name = str(link["ifname"])
    service = PurePosixPath(sysfs.get((f"/sys/class/net/{name}", "device"), "")).name
    wireless = name.startswith("wl") or (f"/sys/class/net/{name}", "phy80211") in sysfs
    far = re.fullmatch(r"((\d+)-\w+)\.\d+", service)  # thunderbolt-net sits on service n of the peer ("XDomain") d-r
    folder = "/sys/bus/thunderbolt/devices"
    uuid = sysfs.get((f"{folder}/{far[2]}-0", "unique_id"), "") if far else ""
    peer = sysfs.get((f"{folder}/{far[1]}", "unique_id"), "") if far else ""
    rdma = [str(each["ifname"]) for each in devices if each.get("netdev") == name and each.get("state") == "ACTIVE"]
    return Port(
        host=index,
        name=name,
        kind=THUNDERBOLT if far else WIRELESS if wireless else ETHERNET,
        speed=_lanes(sysfs, f"{folder}/{far[1]}") if far else max(0.0, _number(sysfs.get((f"/sys/class/net/{name}", "speed"), "0")) / 1000),
        up="LOWER_UP" in link.get("flags", ()),
        mac=str(link.get("address", "")).lower(),
        addresses=tuple(_addresses(link)),
        ipv6=tuple(_ipv6(link)),
        rdma=rdma[0] if rdma else "",
        uuid=uuid.upper(),
        peer=peer.upper(),
        ipoib=sysfs.get((f"/sys/class/net/{name}", "mode"), "datagram") if link["link_type"] == "infiniband" else "",
        neighbours=frozenset(str(each["lladdr"]).lower() for each in heard if each.get("dev") == name and _was_heard(each)),
    )


def _was_heard(neighbour: Item) -> bool:
    return "lladdr" in neighbour and not {"FAILED", "INCOMPLETE", "NOARP", "PERMANENT"} & set(neighbour.get("state", ()))


def _lanes(sysfs: _Sysfs, device: str) -> float:
    return _number(sysfs.get((device, "rx_speed"), "")) * (_number(sysfs.get((device, "rx_lanes"), "")) or 1)


def _number(text: str) -> float:
    found = re.match(r"-?[\d.]+", text)
    return float(found[0]) if found else 0.0


def _sysfs(text: str) -> _Sysfs:
    """Read lines ``folder/file:content``."""
    pairs = [line.partition(":") for line in text.splitlines()]
    return {(str(PurePosixPath(path).parent), PurePosixPath(path).name): content.strip() for path, _, content in pairs}


def _addresses(link: Item) -> list[IPv4Interface]:
    infos = link.get("addr_info", ())
    return [IPv4Interface(f"{info['local']}/{info['prefixlen']}") for info in infos if info.get("family") == "inet" and "local" in info]


def _ipv6(link: Item) -> list[IPv6Interface]:
    """Return the addresses that others may know and that last."""
    infos = [info for info in link.get("addr_info", ()) if info.get("family") == "inet6" and info.get("scope") == "global"]
    lasting = [info for info in infos if "local" in info and not any(info.get(flag) for flag in ("temporary", "deprecated", "dadfailed"))]
    return [IPv6Interface(f"{info['local']}/{info['prefixlen']}") for info in lasting]


def _made(routes: list[Item]) -> list[Item]:
    """Return the IPv4 routes that somebody made, the preferred first; what is to be unreachable is in use as well."""
    ours = [route for route in routes if ":" not in route.get("dst", "") + route.get("gateway", "")]
    made = [route for route in ours if route.get("type") not in ("local", "broadcast", "multicast", "anycast")]
    return sorted(made, key=lambda route: int(route.get("metric", 0)))


def _leads_everywhere(route: Item) -> bool:
    """Whether it is the default route; not that of a VPN's own table, nor one that only refuses."""
    ours = route.get("table", "main") == "main" and route.get("type", "unicast") == "unicast"
    return ours and route.get("dst") == "default" and "dev" in route


def _routed(routes: list[Item]) -> set[IPv4Network]:
    return {IPv4Network(route["dst"], strict=False) for route in _made(routes) if route.get("dst", "default") != "default"}


def _address(links: list[Item], default: str) -> str:
    for link in sorted(links, key=lambda link: (link.get("ifname") != default, by_number(str(link.get("ifname", ""))))):
        for address in _addresses(link):
            if not address.is_loopback and IPv4Address(address.ip) not in LINK_LOCAL:
                return str(address.ip)
    return next((str(address.ip) for link in links for address in _ipv6(link)), "")


def _manager(facts: Facts) -> str:
    # One line each, in the order of the question; the status is not 0 where one of them is not active.
    _, out = facts.answers.get("managers", (127, ""))
    active = dict(zip(("NetworkManager", "systemd-networkd"), out.splitlines(), strict=False))
    return next((name for name, state in active.items() if state == "active"), "")
