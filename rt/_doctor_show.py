"""How ``rt.doctor`` shows what it found: tables in the terminal, or JSON.

May live here: columns, colours, units. May not: judgement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rt._doctor_findings import ERROR, Finding, name, show_rate, show_time, slowest
from rt._doctor_network import HostReport, LinkReport

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1
_MOST_INTERFACES = 8  # hosts


def as_json(hosts: Sequence[HostReport], links: Sequence[LinkReport], findings: Sequence[Finding]) -> str:
    """Return everything; hosts in ``links`` are numbers into ``hosts``, times are seconds, rates bytes per second."""
    worst = slowest(links)
    ways = [{**asdict(link), "interfaces": [_device(hosts[link.source], link.local), _device(hosts[link.target], link.address)]}
            for link in links]  # fmt: skip
    told: dict[str, Any] = {
        "version": VERSION,
        "hosts": [asdict(host) for host in hosts],
        "links": ways,
        "slowest": None if worst is None else name(hosts, worst),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(told, indent=2)


def show(console: Console, hosts: Sequence[HostReport], links: Sequence[LinkReport], findings: Sequence[Finding]) -> None:
    """Print the tables, the slowest way, and the findings."""
    _hosts(console, hosts)
    if links:
        _matrix(console, hosts, links, "bandwidth", "one TCP stream")
        _matrix(console, hosts, links, "latency", "round trip")
        if len(hosts) <= _MOST_INTERFACES:
            _matrix(console, hosts, links, "interfaces", "it leaves by / comes in at")
    worst = slowest(links)
    if worst is not None and len(links) > 1:
        console.print(f"slowest: {name(hosts, worst)}, {show_rate(worst.bandwidth)}\n", highlight=False)
    for finding in findings:
        colour = "red" if finding.level == ERROR else "yellow"
        console.print(f"[{colour}]{finding.level}[/] [bold]{finding.where}[/]: {_plain(finding.what)}", highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"    {_plain(finding.advice)}", highlight=False, soft_wrap=True)
    if not findings:
        console.print("nothing found that is wrong", style="green", highlight=False)


def _hosts(console: Console, hosts: Sequence[HostReport]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="hosts", title_justify="left", box=box.SIMPLE)
    for column in ("host", "rt", "python", "clock", "address", "interface", "mtu", "why"):
        table.add_column(column)
    for host in hosts:
        if not host.facts:
            table.add_row(host.name, *[""] * 6, "not reached")
            continue
        used = [host.interface(address) for address in host.addresses]
        table.add_row(
            host.name,
            host.facts["rt"] or "none",
            host.facts["python"],
            f"{host.skew[0] * 1e3:+.0f} ms",
            "\n".join(host.addresses),
            "\n".join(each.name if each is not None else "?" for each in used),
            "\n".join(str(each.mtu) if each is not None else "?" for each in used),
            host.why,
        )
    console.print(table)


def _matrix(console: Console, hosts: Sequence[HostReport], links: Sequence[LinkReport], what: str, title: str) -> None:
    """Rows are sources; of several ways between two hosts the worst stands there: work is spread over them evenly."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{what} ({title}), from row to column", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for host in hosts:
        table.add_column(host.name, justify="right", no_wrap=True)
    worst = slowest(links)
    for source, host in enumerate(hosts):
        cells = []
        for target in range(len(hosts)):
            ways = [link for link in links if (link.source, link.target) == (source, target)]
            cell = "-" if source == target else _cell(ways, what, worst)
            cells.append(_devices(hosts, ways) if what == "interfaces" and ways else cell)
        table.add_row(host.name, *cells)
    console.print(table)


def _cell(ways: Sequence[LinkReport], what: str, worst: LinkReport | None) -> str:
    failed = [way for way in ways if way.outcome != "ok" or not way.large]
    if failed:
        return f"[red]{failed[0].outcome if failed[0].outcome != 'ok' else 'mtu'}[/]"
    if what == "latency":
        return show_time(max((way.latency or 0.0) for way in ways)) if ways else ""
    measured = [way for way in ways if way.bandwidth is not None]
    if not measured:
        return ""
    least = min(measured, key=lambda way: way.bandwidth or 0.0)
    text = show_rate(least.bandwidth)
    return f"[bold yellow]{text}[/]" if least is worst else text


def _devices(hosts: Sequence[HostReport], ways: Sequence[LinkReport]) -> str:
    found = [(_device(hosts[way.source], way.local), _device(hosts[way.target], way.address)) for way in ways if way.local]
    return "\n".join(f"{leaving or '?'} / {arriving or '?'}" for leaving, arriving in found)


def _device(host: HostReport, address: str) -> str:
    interface = host.interface(address)
    return interface.name if interface is not None else ""


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
