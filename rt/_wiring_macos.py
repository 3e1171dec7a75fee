"""A Mac's own words, read: ``system_profiler``, ``networksetup``, ``ifconfig``, ``netstat``, ``ibv_devices``.

May live here: what these tools print. May not: asking them (``_wiring_facts``), other hosts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from typing import Any

from rt._wiring_facts import Facts
from rt._wiring_model import ETHERNET, THUNDERBOLT, WIRELESS, Machine, Port, by_number


@dataclass
class _Interface:
    """A paragraph of ifconfig."""

    flags: str = ""
    mac: str = ""
    active: bool = True
    addresses: list[IPv4Interface] = field(default_factory=list)
    members: list[str] = field(default_factory=list)


def machine(index: int, facts: Facts) -> Machine:
    """Describe a Mac."""
    interfaces = _ifconfig(facts.text("ifconfig"))
    hardware = _hardware_ports(facts.text("networksetup"))
    rdma = set(re.findall(r"\brdma_(\S+)", facts.text("ibv_devices")))
    bridges = {member: name for name, interface in interfaces.items() for member in interface.members}
    buses, remarks = _buses(facts)
    ports = [
        _port(index, name, what, buses.get(what, {}), interfaces.get(name, _Interface(active=False)), name in rdma, bridges.get(name, ""))
        for name, what in hardware.items()
    ]
    routes, default = _routes(facts.text("routes"))
    own = {address.network for interface in interfaces.values() for address in interface.addresses}
    root = facts.text("user").strip() == "0"
    return Machine(
        index=index,
        ssh=facts.ssh,
        system="Darwin",
        ports=tuple(sorted(ports, key=lambda port: by_number(port.name))),
        address=_address(interfaces, default),
        routed=bool(default in interfaces and interfaces[default].addresses),
        networks=frozenset(own | routes),
        root=root,
        sudo=root or facts.went_well("sudo"),
        remarks=tuple(remarks),
    )


def _port(index: int, name: str, what: str, bus: dict[str, str], seen: _Interface, rdma: bool, bridge: str) -> Port:
    return Port(
        host=index,
        name=name,
        kind=THUNDERBOLT if what.isdigit() else what,
        speed=float(bus.get("speed", 0.0)),
        up=seen.active,
        mac=seen.mac,
        addresses=tuple(seen.addresses),
        rdma=f"rdma_{name}" if rdma else "",
        uuid=bus.get("uuid", ""),
        peer=bus.get("peer", ""),
        bridge=bridge,
    )


def _buses(facts: Facts) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return per port number what system_profiler knows of it, and remarks."""
    text = facts.text("system_profiler")
    try:
        listed = json.loads(text)["SPThunderboltDataType"]
        found = [_bus(bus) for bus in listed if "domain_uuid_key" in bus]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [f"system_profiler said nothing of Thunderbolt that can be read: {text[:60]!r}"]
    return {number: bus for number, bus in found if number}, []


def _bus(bus: dict[str, Any]) -> tuple[str, dict[str, str]]:
    receptacle = bus.get("receptacle_1_tag", {})
    # A dock or a disk is attached as well, but has no domain of its own.
    peers = [item["domain_uuid_key"] for item in bus.get("_items", []) if "domain_uuid_key" in item]
    speed = re.search(r"([\d.]+)\s*Gb/s", str(receptacle.get("current_speed_key", "")))
    return str(receptacle.get("receptacle_id_key", "")), {
        "uuid": str(bus["domain_uuid_key"]).upper(),
        "peer": str(peers[0]).upper() if peers else "",
        "speed": speed[1] if speed and peers else "0",
    }


def _hardware_ports(text: str) -> dict[str, str]:
    """Return per interface the number of its Thunderbolt port, or ``ETHERNET`` or ``WIRELESS``; bridges and telephones are left out."""
    ports: dict[str, str] = {}
    for label, device in re.findall(r"^Hardware Port: (.*)\nDevice: (\S+)$", text, re.M):
        number = re.fullmatch(r"Thunderbolt (\d+)", label)
        if number:
            ports[device] = number[1]
        elif not re.search(r"Bridge|Bluetooth|iPhone|iPad", label):
            ports[device] = WIRELESS if re.search(r"Wi-Fi|AirPort", label) else ETHERNET
    return ports


def _ifconfig(text: str) -> dict[str, _Interface]:
    found: dict[str, _Interface] = {}
    current = _Interface()
    for line in text.splitlines():
        if heading := re.match(r"(\S+): flags=\w+<(.*?)>", line):
            current = found.setdefault(heading[1], _Interface(flags=heading[2]))
        elif match := re.match(r"\s+ether ([0-9a-f:]+)", line):
            current.mac = match[1]
        elif match := re.match(r"\s+inet ([\d.]+)(?: -->? [\d.]+)? netmask 0x([0-9a-f]{8})", line):
            current.addresses.append(IPv4Interface(f"{match[1]}/{int(match[2], 16).bit_count()}"))
        elif match := re.match(r"\s+member: (\S+) ", line):
            current.members.append(match[1])
        elif match := re.match(r"\s+status: (\S+)", line):
            current.active = match[1] == "active"
    return found


def _routes(text: str) -> tuple[set[IPv4Network], str]:
    """Return the networks that netstat lists, and the interface of the default route."""
    networks, default = set(), ""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == "default":
            default = default or words[3]
        elif network := _short_network(words[0] if words else ""):
            networks.add(network)
    return networks, default


def _short_network(word: str) -> IPv4Network | None:
    """Read a destination as BSD shortens it: ``10`` is 10.0.0.0/8, ``192.168.1`` 192.168.1.0/24, ``172.16/12`` as it says."""
    address, _, prefix = word.partition("/")
    if not re.fullmatch(r"\d+(\.\d+){0,3}", address):
        return None
    parts = address.split(".")
    try:
        return IPv4Network(".".join([*parts, *["0"] * (4 - len(parts))]) + f"/{prefix or 8 * len(parts)}", strict=False)
    except ValueError:
        return None


def _address(interfaces: dict[str, _Interface], default: str) -> str:
    """Return the first address of the interface with the default route, else of the first active one that has one."""
    named = [interfaces[default]] if default in interfaces else []
    others = [interfaces[name] for name in sorted(interfaces, key=by_number)]
    for interface in [*named, *(each for each in others if each.active and "LOOPBACK" not in each.flags)]:
        for address in interface.addresses:
            if not address.is_link_local:
                return str(address.ip)
    return ""
