"""``rt.doctor --rdma``: the RDMA devices of this host, and why one cannot be used.

May live here: gathering and showing that. May not: verbs (``transports.verbs``), other hosts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transports import verbs
from transports.verbs import Port, VerbsError

if TYPE_CHECKING:
    from rich.console import Console


def survey() -> tuple[list[dict[str, Any]], str]:
    """Return what is known of each port, and why there is none at all, or ""."""
    try:
        names = verbs.device_names()
    except VerbsError as error:
        return [], str(error.strerror)
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            found += [_entry(name, number, port) for number, port in enumerate(verbs.ports(name), 1)]
        except VerbsError as error:
            found.append({"device": name, "port": None, "usable": False, "why": error.strerror})
    return found, "" if found else "this host has no RDMA device; docs/rdma.md says how to get one"


def _entry(name: str, number: int, port: Port | str) -> dict[str, Any]:
    if isinstance(port, str):
        return {"device": name, "port": number, "usable": False, "why": port}
    mtu = 128 << port.mtu
    where = {"gid": port.gid, "gid_index": port.gid_index} if port.gid else {"lid": port.lid}
    return {"device": name, "port": number, "usable": True, "mtu_bytes": mtu, **where}


def as_json(found: list[dict[str, Any]], why: str) -> str:
    """Return the report for programs."""
    return json.dumps({"ports": found, "why_none": why}, indent=2)


def show(console: Console, found: list[dict[str, Any]], why: str) -> None:
    """Print a line per port."""
    for port in found:
        if port["usable"]:
            at = f"GID {port['gid']} (index {port['gid_index']})" if "gid" in port else f"LID {port['lid']}"
            line = f"{port['device']} port {port['port']}: usable, {at}, path MTU {port['mtu_bytes']} B"
        else:
            line = f"{port['device']}: not usable: {port['why']}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if why:
        console.print(why, highlight=False, markup=False, soft_wrap=True)
