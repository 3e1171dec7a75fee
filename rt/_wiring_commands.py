"""The commands that give ports their addresses, as a person would type them on each platform.

May live here: from wires to lines of shell. May not: running them, choosing addresses.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rt._wiring_model import Machine, Port, by_number
from rt._wiring_plan import Wire


def commands(machine: Machine, wires: Sequence[Wire], persist: bool) -> list[str]:
    """Return what to run on a host, in order; nothing where all addresses are there already.

    Args:
        machine: the host.
        wires: all of them.
        persist: keep the addresses over a restart, where the host has something that does so.
    """
    fresh = [wire for wire in wires if wire.fresh and wire.segment.port_of(machine.index)]
    fresh.sort(key=lambda wire: by_number(_port(machine, wire).name))
    if machine.system == "Darwin":
        return _macos(machine, fresh)
    if persist and machine.manager == "NetworkManager":
        return [line for wire in fresh for line in _network_manager(machine, wire)]
    if persist and machine.manager == "systemd-networkd":
        return [line for wire in fresh for line in _networkd(machine, wire)] + ([f"{_sudo(machine)}networkctl reload"] if fresh else [])
    return [line for wire in fresh for line in _ip(machine, wire)]


def not_kept(machine: Machine) -> str:
    """Say why ``--persist`` does nothing on a host; "" where it does."""
    if machine.system == "Darwin":
        return f"{machine.ssh}: macOS forgets these addresses at a restart: run this again then"
    if not machine.manager:
        return f"{machine.ssh}: neither NetworkManager nor systemd-networkd is active: a restart forgets the addresses"
    return ""


def _sudo(machine: Machine) -> str:
    return "" if machine.root else "sudo "


def _port(machine: Machine, wire: Wire) -> Port:
    port = wire.segment.port_of(machine.index)
    assert port is not None
    return port


def _own(machine: Machine, wire: Wire) -> str:
    """Return ``address/prefix`` of a host's port."""
    return f"{wire.of(machine.index)}/{wire.addresses[0].network.prefixlen}"


def _macos(machine: Machine, wires: Sequence[Wire]) -> list[str]:
    # A port that is a member of a bridge has no address of its own: macOS puts all Thunderbolt ports in bridge0.
    bridges = sorted({_port(machine, wire).bridge for wire in wires} - {""})
    lines = [f"{_sudo(machine)}ifconfig {bridge} down" for bridge in bridges]
    for wire in wires:
        port = _port(machine, wire)
        lines.append(f"{_sudo(machine)}ifconfig {port.name} inet {wire.of(machine.index)} netmask {wire.addresses[0].netmask}")
        for other in wire.segment.ports:
            if other is not port:
                lines.append(f"{_sudo(machine)}route change {wire.of(other.host)} -interface {port.name}")
    return lines


def _ip(machine: Machine, wire: Wire) -> list[str]:
    name = shlex.quote(_port(machine, wire).name)
    return [f"{_sudo(machine)}ip address replace {_own(machine, wire)} dev {name}", f"{_sudo(machine)}ip link set {name} up"]


def _network_manager(machine: Machine, wire: Wire) -> list[str]:
    port = _port(machine, wire)
    name, kind = port.name, "infiniband" if port.ipoib else "ethernet"
    profile = shlex.quote(f"rt-{name}")
    settings = f"ipv4.method manual ipv4.addresses {_own(machine, wire)} ipv4.never-default yes ipv6.method link-local"
    settings += f" infiniband.transport-mode {port.ipoib}" if port.ipoib else ""
    return [
        f"{_sudo(machine)}nmcli connection delete {profile} 2>/dev/null || true",  # of an earlier run; there need not be one
        f"{_sudo(machine)}nmcli connection add type {kind} con-name {profile} ifname {shlex.quote(name)} {settings}",
        f"{_sudo(machine)}nmcli connection up {profile}",
    ]


def _networkd(machine: Machine, wire: Wire) -> list[str]:
    name = _port(machine, wire).name
    lines = ["[Match]", f"Name={name}", "[Link]", "RequiredForOnline=no", "[Network]", f"Address={_own(machine, wire)}"]
    lines.append("LinkLocalAddressing=ipv6")  # by which the next run finds the cable again
    path = shlex.quote(f"/etc/systemd/network/10-rt-{name}.network")
    return [f"printf '%s\\n' {shlex.join(lines)} | {_sudo(machine)}tee {path} >/dev/null"]
