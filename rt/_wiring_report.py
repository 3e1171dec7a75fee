"""What was found and chosen, for people and for programs: tables, one line of summary, JSON.

May live here: words and columns. May not: decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rt._wiring_choose import Layout
from rt._wiring_draw import speed
from rt._wiring_model import Machine, Port, Segment
from rt._wiring_plan import Wire
from rt.hostfile import Hostfile

_SPELLED = {"thunderbolt": "Thunderbolt", "rdma": "RDMA", "ethernet": "Ethernet"}


def summary(layout: Layout, machines: Sequence[Machine]) -> str:
    """Say in one line what was chosen."""
    speeds = {segment.speed for segment in layout.used}
    fast = f" of {speed(max(speeds))}" if len(speeds) == 1 and max(speeds) else ""
    count = len(layout.used)
    cables = f", {count} cable{'s' * (count != 1)}{fast}" if all(len(segment.ports) == 2 for segment in layout.used) and count else ""
    shape = {"jaccl": "mesh", "": "all to all"}.get(layout.backend, "ring")
    several = f", {layout.ways} cables between neighbours: as many rings" if layout.ways > 1 and shape == "ring" else ""
    names = " ".join(machines[index].ssh for index in layout.order)
    backend = f"backend {layout.backend}" if layout.backend else "any backend"
    return f"over {_SPELLED[layout.over]}, {backend}: {shape} {names}{cables}{several}"


def tables(machines: Sequence[Machine], segments: Sequence[Segment], wires: Sequence[Wire]) -> str:
    """Return hosts with their ports, then cables with their networks."""
    ports = [["host", "system", "port", "kind", "speed", "addresses", "rdma", "root"]]
    for machine in machines:
        first = [machine.ssh, machine.system]
        for port in machine.ports or (None,):
            root = "yes" if machine.sudo else "no"
            ports.append([*first, *(_port_row(port) if port else ["-"] * 5), root if first[0] else ""])
            first = ["", ""]
    networks = {wire.segment: f"{wire.addresses[0].network}{' (new)' if wire.fresh else ''}" for wire in wires}
    cables = [["cable", "speed", "network", ""]]
    for segment in segments:
        state = segment.fault or ("not heard, by its addresses" if segment.guessed else "")
        state = f"broken: {state}" if segment.fault else state
        cables.append([ends(segment, machines), speed(segment.speed) or "-", networks.get(segment, "-"), state])
    return "\n".join([_columns(ports), "", _columns(cables)])


def ends(segment: Segment, machines: Sequence[Machine]) -> str:
    """Name the ports of a cable: ``m1 en2 - m2 en3``."""
    return " - ".join(f"{machines[port.host].ssh} {port.name}" for port in segment.ports)


def _port_row(port: Port) -> list[str]:
    name = f"{port.name}{'' if port.up else ' (down)'}"
    return [name, port.kind, speed(port.speed) or "-", " ".join(map(str, port.all_addresses)) or "-", port.rdma or "-"]


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def report(
    machines: Sequence[Machine],
    segments: Sequence[Segment],
    layout: Layout,
    wires: Sequence[Wire],
    reached: Mapping[Segment, str],
    setup: Mapping[str, Sequence[str]],
    hostfile: Hostfile,
    remarks: Sequence[str],
) -> dict[str, Any]:
    """Return everything as JSON has it; speeds in Gbit/s, 0 where unknown; ``unreached`` null where it was not tried."""
    networks = {wire.segment: wire for wire in wires}
    return {
        "over": layout.over,
        "backend": layout.backend,
        "ways": layout.ways,
        "hosts": [_machine(machine) for machine in machines],
        "cables": [_cable(segment, machines, networks.get(segment)) | {"unreached": reached.get(segment)} for segment in segments],
        "setup": setup,
        "remarks": list(remarks),
        "hostfile": {
            "backend": hostfile.backend,
            "envs": hostfile.envs,
            "hosts": [{"ssh": host.ssh, "ips": host.ips, "rdma": host.rdma} for host in hostfile.hosts],
        },
    }


def _machine(machine: Machine) -> dict[str, Any]:
    ports = [
        {
            "name": port.name,
            "kind": port.kind,
            "speed": port.speed,
            "up": port.up,
            "addresses": [str(address) for address in port.all_addresses],
            "rdma": port.rdma,
        }
        for port in machine.ports
    ]
    return {"ssh": machine.ssh, "system": machine.system, "address": machine.address, "sudo": machine.sudo, "ports": ports}


def _cable(segment: Segment, machines: Sequence[Machine], wire: Wire | None) -> dict[str, Any]:
    return {
        "ends": [{"host": machines[port.host].ssh, "port": port.name} for port in segment.ports],
        "speed": segment.speed,
        "fault": segment.fault,
        "heard": not segment.guessed,
        "addresses": [str(address) for address in wire.addresses] if wire else [],
        "new": bool(wire and wire.fresh),
    }
