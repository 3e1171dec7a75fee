"""Linux hosts that are not there: what ``ip -j``, ``rdma -j`` and sysfs say for given interfaces.

May live here: recordings, and the facts they make. May not: anything else of ``rt``. Written by hand after real output of ``ip`` and the
kernel's documentation of sysfs (Documentation/ABI/testing/sysfs-bus-thunderbolt).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rt._wiring_facts import Facts

TB = "/sys/bus/thunderbolt/devices"


@dataclass
class Nic:
    """An interface; ``heard`` are MAC addresses, ``far`` the UUID at the other end of a Thunderbolt cable on port ``number``."""

    name: str
    mac: str = ""
    address: str = ""
    speed: int = -1
    heard: Sequence[str] = ()
    rdma: str = ""
    kind: str = ""
    up: bool = True
    master: str = ""
    far: str = ""
    number: int = 1


def facts(
    name: str, nics: Sequence[Nic], *, default: str = "", uuid: str = "", managers: str = "inactive\ninactive\n", user: str = "0"
) -> Facts:
    """Return what such a host says."""
    routes: list[dict[str, Any]] = [{"dst": "default", "gateway": "10.0.0.254", "dev": default, "flags": []}] if default else []
    routes.append({"type": "local", "dst": "127.0.0.0/8", "dev": "lo", "table": "local", "scope": "host", "flags": []})
    heard = [{"dst": "fe80::1", "dev": nic.name, "lladdr": mac, "state": ["STALE"]} for nic in nics for mac in nic.heard]
    heard.append({"dst": "10.0.0.77", "dev": "eth0", "state": ["FAILED"]})
    devices = [
        {"ifindex": 0, "ifname": nic.rdma, "port": 1, "state": "ACTIVE" if nic.up else "DOWN", "netdev": nic.name}
        for nic in nics
        if nic.rdma
    ]
    return Facts(
        name,
        {
            "uname": (0, "Linux\n"),
            "user": (0, f"{user}\n"),
            "sudo": (1, ""),
            "addresses": (0, json.dumps([_LO, *map(_link, nics)])),
            "routes": (0, json.dumps(routes)),
            "rdma": (0, json.dumps(devices)),
            "sysfs": (0, "\n".join(_sysfs(nics, uuid)) + "\n"),
            "neighbours": (0, json.dumps(heard)),
            "managers": (3, managers),
        },
    )


_LO = {
    "ifname": "lo",
    "flags": ["LOOPBACK", "UP", "LOWER_UP"],
    "link_type": "loopback",
    "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8, "scope": "host"}],
}


def _link(nic: Nic) -> dict[str, Any]:
    local, _, prefix = nic.address.partition("/")
    link: dict[str, Any] = {
        "ifname": nic.name,
        "flags": ["BROADCAST", "MULTICAST", "UP", *(["LOWER_UP"] if nic.up else [])],
        "link_type": "ether",
        "address": nic.mac,
        "addr_info": [{"family": "inet6", "local": "fe80::2", "prefixlen": 64, "scope": "link"}],
    }
    if nic.address:
        link["addr_info"].insert(0, {"family": "inet", "local": local, "prefixlen": int(prefix), "scope": "global"})
    if nic.kind:
        link["linkinfo"] = {"info_kind": nic.kind}
    if nic.master:
        link["master"] = nic.master
    return link


def _sysfs(nics: Sequence[Nic], uuid: str) -> list[str]:
    lines = [f"{TB}/0-0/unique_id:{uuid}"] if uuid else []
    for nic in nics:
        if nic.far:
            lines += [f"{TB}/0-{nic.number}/unique_id:{nic.far}", f"{TB}/0-{nic.number}/device_name:other"]
            lines += [f"{TB}/0-{nic.number}/rx_speed:20.0 Gb/s", f"{TB}/0-{nic.number}/rx_lanes:2"]
        lines.append(f"/sys/class/net/{nic.name}/speed:{nic.speed}")
        lines.append(f"/sys/class/net/{nic.name}/device:" + (f"../../../0-{nic.number}.0" if nic.far else "../../../0000:01:00.0"))
    return lines
