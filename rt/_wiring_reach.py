"""Do the two ends of a cable reach each other, once they have their addresses?

May live here: what each host tries, and what follows from what it says. May not: running it, choosing addresses (``_wiring_plan``).

A ping that is answered has been there and back, so one end that can try is enough. It leaves from the port's own address, as the
connections of ranks do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rt._wiring_model import Machine, Segment
from rt._wiring_plan import Wire

_TRIES = 5  # of a second and a pause: an address may take a moment (networkd), and so may a link that was just switched on
_SILENT, _NO_PING = "rt-no-answer", "rt-no-ping"
_SHOWN = 4
_Pair = tuple[int, int]

# Busybox's ping, iputils' and the BSDs' share these words only.
_PINGS = {"Linux": 'ping -n -c 1 -W 1 -I "$1" "$2"', "Darwin": 'ping -n -c 1 -t 1 -S "$1" "$2"'}


def script(machine: Machine, wires: Sequence[Wire], others: Sequence[Machine]) -> str:
    """Return what a POSIX shell runs on a host: it names the addresses that gave no answer. "" where there is nothing to try.

    Args:
        machine: the host.
        wires: all of them.
        others: the hosts that have their addresses.
    """
    there = {other.index for other in others} - {machine.index}
    pairs = [
        (wire.of(machine.index), wire.of(port.host))
        for wire in wires
        if wire.segment.port_of(machine.index)
        for port in wire.segment.ports
        if port.host in there
    ]
    if not pairs:
        return ""
    return "\n".join([
        'PATH="$PATH:/usr/sbin:/sbin:/usr/bin:/bin"',
        f"command -v ping >/dev/null || {{ echo {_NO_PING}; exit 0; }}",
        f'reach() {{ until {_PINGS[machine.system]} >/dev/null 2>&1; do t=$((t + 1)); [ $t -lt {_TRIES} ] || '
        f'{{ echo {_SILENT} "$2"; break; }}; sleep 1; done; }}',
        *(f"t=0; reach {own} {other} &" for own, other in pairs),
        "wait",
    ])  # fmt: skip


def judge(machines: Sequence[Machine], wires: Sequence[Wire], said: Mapping[int, str]) -> dict[Segment, str]:
    """Return per segment that was tried what is wrong with it, "" for one whose ports all answer each other.

    Args:
        machines: all hosts.
        wires: all wires.
        said: per host that ran its script what it printed.
    """
    lines = {index: text.splitlines() for index, text in said.items()}
    able = {index for index, each in lines.items() if _NO_PING not in each}
    silent = {(index, line.split()[1]) for index, each in lines.items() for line in each if line.startswith(f"{_SILENT} ")}
    found = {}
    for wire in wires:
        pairs = [(left.host, right.host) for left, right in itertools.combinations(wire.segment.ports, 2)]
        tried = [pair for pair in pairs if able & {*pair} and {*pair} <= lines.keys()]
        if tried:
            faults = [text for pair in tried if (text := _fault(machines, wire, pair, silent))]
            more = [f"and {len(faults) - _SHOWN} pairs more"] if len(faults) > _SHOWN else []
            found[wire.segment] = "; ".join(faults[:_SHOWN] + more)
    return found


def _fault(machines: Sequence[Machine], wire: Wire, pair: _Pair, silent: set[tuple[int, str]]) -> str:
    ways = [way for way in (pair, pair[::-1]) if (way[0], wire.of(way[1])) in silent]
    if not ways:
        return ""
    source, target = (_end(machines, wire, host) for host in ways[0])
    return f"{source} and {target} do not reach each other" if len(ways) == 2 else f"{source} gets no answer from {target}"


def _end(machines: Sequence[Machine], wire: Wire, host: int) -> str:
    port = wire.segment.port_of(host)
    assert port is not None
    return f"{machines[host].ssh} {port.name} ({wire.of(host)})"
