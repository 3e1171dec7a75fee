"""Macs that are not there: what the tools of macOS print for given cables, and stand-ins that print it.

May live here: recordings, and the facts they make. May not: anything else of ``rt``.

They were written by hand, after the data model of Apple's tools (a bus per port of the machine with the UUID of its domain, the peer's
among its items; hardware ports; BSD's ifconfig and netstat). No Mac was asked.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rt._wiring_facts import Facts

End = tuple[int, int]  # host, number of the port, from 1

MESH = [((0, 1), (1, 1)), ((0, 2), (2, 1)), ((0, 3), (3, 1)), ((1, 2), (2, 2)), ((1, 3), (3, 2)), ((2, 3), (3, 3))]
RING = [((0, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (3, 1)), ((3, 2), (0, 2))]
CROSSED_RING = [((0, 1), (2, 1)), ((2, 2), (1, 1)), ((1, 2), (3, 1)), ((3, 2), (0, 2))]  # 0 2 1 3
TWO_RINGS = [*RING, ((0, 3), (1, 3)), ((1, 4), (2, 3)), ((2, 4), (3, 3)), ((3, 4), (0, 4))]  # two cables between all neighbours


@dataclass
class Mac:
    """One machine with 4 Thunderbolt ports, en2 to en5, Ethernet and Wi-Fi.

    Attributes:
        number: its place; the machine is called m0, m1, ...
        peers: per port number (host, port) at the other end, as the machine sees it.
        rdma: whether `rdma_ctl enable` was done.
        sudo: whether it asks for no password.
        speed: of its cables.
        silent: addresses that do not answer its pings.
        extra: more lines of ifconfig and netstat, such as a VPN's.
    """

    number: int
    peers: dict[int, End] = field(default_factory=dict)
    rdma: bool = True
    sudo: bool = True
    speed: str = "Up to 80 Gb/s"
    silent: Sequence[str] = ()
    extra_ifconfig: str = ""
    extra_routes: str = ""

    @property
    def tools(self) -> dict[str, tuple[int, str]]:
        """Return per question what the tool answers."""
        return {
            "uname": (0, "Darwin\n"),
            "user": (0, "501\n"),
            "sudo": (0, "") if self.sudo else (1, ""),
            "system_profiler": (0, json.dumps({"SPThunderboltDataType": [self._bus(port) for port in range(1, 5)] + [_OLD_BUS]}, indent=2)),
            "networksetup": (0, self._networksetup()),
            "ifconfig": (0, self._ifconfig() + self.extra_ifconfig),
            "routes": (0, self._netstat() + self.extra_routes),
            "ibv_devices": (0, self._devices()) if self.rdma else (127, ""),
        }

    def facts(self) -> Facts:
        return Facts(f"m{self.number}", self.tools)

    def _bus(self, port: int) -> dict[str, object]:
        peer = self.peers.get(port)
        bus: dict[str, object] = {
            "_name": f"thunderboltusb4_bus_{port - 1}",
            "device_name_key": "Mac Studio",
            "domain_uuid_key": _uuid(self.number, port),
            "receptacle_1_tag": {
                "current_speed_key": self.speed,
                "link_status_key": "0x2" if peer else "0x7",
                "receptacle_id_key": str(port),
                "receptacle_status_key": "receptacle_connected" if peer else "receptacle_no_devices_connected",
            },
            "route_string_key": "0",
            "switch_uid_key": f"0x05AC{self.number:08X}{port:04X}",
            "vendor_name_key": "Apple Inc.",
        }
        if peer:
            bus["_items"] = [
                {
                    "_name": "Mac Studio",
                    "device_name_key": f"m{peer[0]}",
                    "domain_uuid_key": _uuid(*peer),
                    "mode_key": "usb_four",
                    "vendor_name_key": "Apple Inc.",
                }
            ]
        return bus

    def _networksetup(self) -> str:
        listed = [("Ethernet", "en0"), *((f"Thunderbolt {port}", f"en{port + 1}") for port in range(1, 5))]
        listed += [("Thunderbolt Bridge", "bridge0"), ("Wi-Fi", "en1")]
        ports = "".join(f"\nHardware Port: {name}\nDevice: {device}\nEthernet Address: {self._mac(device)}\n" for name, device in listed)
        return ports + "\nVLAN Configurations\n===================\n"

    def _mac(self, device: str) -> str:
        return f"36:00:00:00:{self.number:02x}:{sum(device.encode()) % 256:02x}"

    def _ifconfig(self) -> str:
        lines = ["lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384", "\tinet 127.0.0.1 netmask 0xff000000"]
        lines += ["en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500", f"\tether {self._mac('en0')}"]
        lines += [f"\tinet6 fe80::{self.number}%en0 prefixlen 64 secured scopeid 0x6"]
        lines += [f"\tinet 192.168.0.{10 + self.number} netmask 0xffffff00 broadcast 192.168.0.255", "\tstatus: active"]
        lines += ["en1: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500", "\tstatus: inactive"]
        for port in range(1, 5):
            lines += [f"en{port + 1}: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500"]
            lines += [f"\tether {self._mac(f'en{port + 1}')}", "\tmedia: autoselect <full-duplex>"]
            lines += [f"\tstatus: {'active' if port in self.peers else 'inactive'}"]
        lines += ["bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500", "\tConfiguration:"]
        lines += [f"\tmember: en{port + 1} flags=3<LEARNING,DISCOVER>\n\t        ifmaxaddr 0 port {port + 7}" for port in range(1, 5)]
        return "\n".join([*lines, "\tstatus: active", ""])

    def _netstat(self) -> str:
        rows = [
            ("Destination", "Gateway", "Flags", "Netif"),
            ("default", "192.168.0.1", "UGScg", "en0"),
            ("127", "127.0.0.1", "UCS", "lo0"),
        ]
        rows += [("169.254", "link#6", "UCS", "en0"), ("192.168.0", "link#6", "UCS", "en0"), ("192.168.0.1/32", "link#6", "UCS", "en0")]
        return "\n".join(["Routing tables", "", "Internet:", *("".join(word.ljust(19) for word in row) for row in rows), ""])

    def _devices(self) -> str:
        lines = [f"    rdma_en{port + 1}            {self.number:08x}{port:08x}" for port in range(1, 5)]
        return "\n".join(["    device                 node GUID", "    ------              ----------------", *lines, ""])


# A bus without a domain: nothing of ours is behind it.
_OLD_BUS = {"_name": "thunderbolt_bus_9", "device_name_key": "Mac Studio", "vendor_name_key": "Apple Inc."}


def _uuid(host: int, port: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"m{host}.{port}")).upper()


def macs(count: int, cables: Sequence[tuple[End, End]]) -> list[Mac]:
    """Make Macs that are connected."""
    made = [Mac(number) for number in range(count)]
    for left, right in cables:
        made[left[0]].peers[left[1]] = right
        made[right[0]].peers[right[1]] = left
    return made


_TOOLS = {
    "uname": "uname",
    "id": "user",
    "system_profiler": "system_profiler",
    "networksetup": "networksetup",
    "netstat": "routes",
    "ibv_devices": "ibv_devices",
}


def stand_ins(folder: Path, mac: Mac) -> Path:
    """Write executables that answer as the Mac does, and note in ``done`` what sudo was told to run; return the folder for PATH."""
    folder.mkdir()
    tools = mac.tools
    for tool, question in _TOOLS.items():
        code, out = tools[question]
        (folder / f"{tool}.txt").write_text(out)
        executable(folder / tool, f"cat '{folder}/{tool}.txt'; exit {code}")
    (folder / "ifconfig.txt").write_text(tools["ifconfig"][1])
    executable(folder / "ifconfig", f"cat '{folder}/ifconfig.txt'")
    (folder / "silent").write_text("".join(f"{address}\n" for address in mac.silent))
    executable(folder / "ping", f'echo "$*" >> "{folder}/pinged"; for last; do :; done; ! grep -qx "$last" "{folder}/silent"')
    # What sudo runs changes nothing here: it is noted.
    refuse = "echo 'sudo: a password is required' >&2; exit 1"
    note = f'[ "$1" = -n ] || echo "$*" >> "{folder}/done"'
    executable(folder / "sudo", note if mac.sudo else refuse)
    return folder


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
