"""What to use of the cables that are there: over what, with which backend, in which order of hosts.

May live here: choices, and why one is impossible, said in words. May not: addresses (``_wiring_plan``), searching (``_wiring_rings``).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rt import _wiring_rings as rings
from rt._wiring_model import ETHERNET, THUNDERBOLT, WIRELESS, Machine, Segment
from rt._wiring_plan import addressed
from rt.errors import ConfigError

OVERS = ("auto", "thunderbolt", "ethernet", "rdma")
BACKENDS = ("ring", "jaccl", "jaccl-ring")
_SPELLED = {"thunderbolt": "Thunderbolt", "rdma": "RDMA", "ethernet": "Ethernet"}


@dataclass(frozen=True)
class Layout:
    """What was chosen.

    Attributes:
        over: one of ``OVERS`` but auto.
        backend: one of ``BACKENDS``, or "" where the launcher may choose.
        order: indices of machines in order of ranks.
        ways: how many segments each pair of neighbours (jaccl: each pair) has at least.
        used: the segments that carry data, in order.
        set_up: the segments whose ports should have addresses.
        remarks: what a person should know about the choice.
    """

    over: str
    backend: str
    order: tuple[int, ...]
    ways: int
    used: tuple[Segment, ...]
    set_up: tuple[Segment, ...]
    remarks: tuple[str, ...] = ()

    def between(self, left: int, right: int) -> list[Segment]:
        """Return the segments of a pair, ``ways`` at most; none for a host and itself."""
        return joining(self.used, left, right)[: self.ways] if left != right else []


def joining(segments: Sequence[Segment], left: int, right: int) -> list[Segment]:
    return [segment for segment in segments if segment.port_of(left) and segment.port_of(right)]


def usable(segments: Sequence[Segment], over: str) -> tuple[Segment, ...]:
    """Return the good segments of a kind. RDMA goes over cables of either kind, between the ports that have a device."""
    good = [segment for segment in segments if not segment.fault]
    if over == "rdma":
        bare = [Segment(tuple(port for port in segment.ports if port.rdma), guessed=segment.guessed) for segment in good]
        return tuple(segment for segment in bare if len(segment.ports) > 1)
    kinds = (THUNDERBOLT,) if over == "thunderbolt" else (ETHERNET, WIRELESS)
    return tuple(segment for segment in good if segment.ports[0].kind in kinds)


def shown(segments: Sequence[Segment], over: str) -> tuple[Segment, ...]:
    """Return the segments of a kind, broken ones among them."""
    broken = [segment for segment in segments if segment.fault] if over == "thunderbolt" else []
    return (*usable(segments, over), *broken)


def chosen_over(machines: Sequence[Machine], segments: Sequence[Segment]) -> str:
    """Return what auto stands for. A broken Thunderbolt cable counts: else it would be passed over in silence. RDMA is for all or none."""
    if shown(segments, "thunderbolt"):
        return "thunderbolt"
    return "rdma" if usable(segments, "rdma") and not _without_rdma(machines) else "ethernet"


def choose(machines: Sequence[Machine], segments: Sequence[Segment], over: str, backend: str) -> Layout:
    """Choose.

    Args:
        machines: whose index is their place here.
        segments: all of them.
        over: one of ``OVERS`` but auto.
        backend: one of ``BACKENDS``, or "" for the best.

    Raises:
        ConfigError: the cables do not allow it; the message says what is missing, over more than one line.
    """
    there = usable(segments, over)
    remarks: list[str] = []
    if over == "ethernet" and backend.startswith("jaccl"):
        raise ConfigError(f"--backend {backend} needs RDMA devices: use --over rdma or --over thunderbolt, or --backend ring")
    if over != "ethernet" and backend != "ring" and len(machines) > 1:
        layout = _over_rdma(machines, there, over, backend, remarks)
        if layout is not None:
            return layout
    size, spelled = len(machines), _SPELLED[over]
    try:
        found = _fastest(there, lambda some: _ring(size, some), _ready(machines, there, over))
    except rings.GaveUp:
        raise ConfigError(_gave_up(size, spelled)) from None
    if found is None and over == "ethernet" and not backend and all(machine.routed for machine in machines):
        remarks.append("no network is common to all hosts: taking the address of each that routes to everybody else, which was not tried")
        return Layout(over, "", tuple(range(size)), 1, (), (), tuple(remarks))
    if found is None:
        raise ConfigError(_no_ring(machines, there, spelled))
    order, ways, fast = found
    used = _used(_neighbours(order), ways, fast)
    if over == "ethernet" and any(segment.guessed for segment in used):
        remarks.append("hosts are taken to be joined where their addresses are of one network: nobody heard anybody")
    joined_by_all = size == 1 or any(len(segment.ports) == size for segment in used)
    name = backend or ("" if over == "ethernet" and joined_by_all else "ring")
    return Layout(over, name, tuple(order), ways, used, there if over == "thunderbolt" else used, tuple(remarks))


def _neighbours(order: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(order, [*order[1:], order[0]], strict=True)) if len(order) > 1 else []


def _used(pairs: Sequence[tuple[int, int]], ways: int, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    used = {segment for left, right in pairs for segment in joining(segments, left, right)[:ways]}
    return tuple(segment for segment in segments if segment in used)


def _over_rdma(machines: Sequence[Machine], there: Sequence[Segment], over: str, backend: str, remarks: list[str]) -> Layout | None:
    """Return a layout for jaccl or jaccl-ring, or None where the backend is ours to choose and neither is possible."""
    size = len(machines)
    fit = usable(there, "rdma")
    ready = _ready(machines, fit, over)
    without = _without_rdma(machines)
    if without:
        text = f"{', '.join(without)}: no RDMA device (macOS: `rdma_ctl enable` in Recovery, then see `ibv_devices`; Linux: `rdma link`)"
        if backend or over == "rdma":
            raise ConfigError(f"{text}; --over ethernet, or --over thunderbolt --backend ring, does without")
        remarks.append(f"{text}; so the backend is ring")
        return None
    if backend != "jaccl-ring":
        mesh = _fastest(fit, lambda some: _mesh(size, some), ready)
        if mesh is not None:
            order, ways, fast = mesh
            used = _used(list(itertools.combinations(order, 2)), ways, fast)
            return Layout(over, "jaccl", tuple(order), ways, used, tuple(there) if over == "thunderbolt" else used)
        if backend == "jaccl":
            raise ConfigError(_no_mesh(machines, fit))
    try:
        found = _fastest(fit, lambda some: _ring(size, some), ready)
    except rings.GaveUp:
        raise ConfigError(_gave_up(size, "RDMA")) from None
    if found is None:
        if backend or over == "rdma":
            raise ConfigError(_no_ring(machines, fit, "RDMA"))
        return None
    order, ways, fast = found
    used = _used(_neighbours(order), ways, fast)
    return Layout(over, "jaccl-ring", tuple(order), ways, used, tuple(there) if over == "thunderbolt" else used)


def _without_rdma(machines: Sequence[Machine]) -> list[str]:
    return [machine.ssh for machine in machines if not any(port.rdma for port in machine.ports)]


# --- graphs of segments ------------------------------------------------------------------------------------------------------------------


def counts(segments: Sequence[Segment]) -> Counter[tuple[int, int]]:
    """Return how many segments each pair of hosts has, the lower host first."""
    return Counter(pair for segment in segments for pair in itertools.combinations([port.host for port in segment.ports], 2))


_Found = tuple[list[int], int]  # the order of hosts, and how many segments there are between two of them at least


def _ready(machines: Sequence[Machine], segments: Sequence[Segment], over: str) -> set[Segment]:
    """Return the segments to be preferred among those of a speed: outside Thunderbolt, those that have their addresses."""
    return set(segments) if over == "thunderbolt" else set(addressed(machines, segments))


def _fastest(
    segments: Sequence[Segment], find: Callable[[Sequence[Segment]], _Found | None], ready: set[Segment]
) -> tuple[list[int], int, tuple[Segment, ...]] | None:
    """Use the fast cables alone if they are enough, and the slower ones only if not; wireless last of all."""

    def rank(segment: Segment) -> tuple[bool, float, bool]:
        return all(port.kind != WIRELESS for port in segment.ports), segment.speed, segment in ready

    gave_up: rings.GaveUp | None = None
    for least in sorted(set(map(rank, segments)), reverse=True) or [(False, 0.0, False)]:
        fast = tuple(segment for segment in segments if rank(segment) >= least)
        try:
            found = find(fast)
        except rings.GaveUp as error:
            gave_up = error
            continue
        if found is not None:
            return *found, fast
    if gave_up is not None:
        raise gave_up
    return None


def _mesh(size: int, segments: Sequence[Segment]) -> _Found | None:
    pairs = counts(segments)
    least = min((pairs[pair] for pair in itertools.combinations(range(size), 2)), default=1)
    return (list(range(size)), least) if least else None


def _ring(size: int, segments: Sequence[Segment]) -> _Found | None:
    """Find the ring with the most parallel cables between all neighbours: as many rings over the same hosts."""
    pairs = counts(segments)
    best = None
    for ways in range(1, max(pairs.values(), default=1) + 1):
        try:
            order = rings.ring(rings.graph(size, [pair for pair, count in pairs.items() if count >= ways]))
        except rings.GaveUp:
            if best is None:
                raise
            break  # one ring is found, and more of them are not worth an error
        if order is None:
            break
        best = order, ways
    return best


# --- why not -----------------------------------------------------------------------------------------------------------------------------


def _gave_up(size: int, spelled: str) -> str:
    return (
        f"no ring through all {size} hosts over {spelled} was found in the time allowed, though there may be one: "
        "give the hosts in its order with --hosts"
    )


def _no_mesh(machines: Sequence[Machine], segments: Sequence[Segment]) -> str:
    missing = rings.missing_pairs(rings.graph(len(machines), list(counts(segments))))
    pairs = [f"{machines[left].ssh} is not connected to {machines[right].ssh}" for left, right in missing]
    more = [f"and {len(pairs) - 8} pairs more"] if len(pairs) > 8 else []
    return "\n".join(["incomplete mesh:", *(f"  {pair}" for pair in pairs[:8] + more), "  --dot or --svg F shows what is connected"])


def _no_ring(machines: Sequence[Machine], segments: Sequence[Segment], spelled: str) -> str:
    joined = rings.graph(len(machines), list(counts(segments)))
    names = [machine.ssh for machine in machines]
    lines = [f"no ring through all {len(machines)} hosts over {spelled}:"]
    parts = rings.components(joined)
    lonely = [names[part[0]] for part in parts if len(part) == 1]
    if lonely:
        lines.append(f"  not connected to any other: {', '.join(lonely)}")
    groups = [" ".join(names[host] for host in part) for part in parts if len(part) > 1]
    if len(groups) > 1:
        lines.append(f"  not connected with each other: {' | '.join(groups)}")
    if len(machines) > 2:
        lines += [f"  {names[host]} is connected to {names[min(each)]} only" for host, each in enumerate(joined) if len(each) == 1]
    lines += [f"  every way between some hosts goes through {names[host]}" for host in rings.cuts(joined)]
    found = rings.rings_of_parts(joined)
    if found:
        lines += ["  rings found:", *(f"    --hosts {','.join(names[host] for host in order)}" for order in found)]
    others = "--over ethernet goes over the network instead; " if spelled != "Ethernet" else ""
    return "\n".join([*lines, f"  {others}--dot or --svg F shows what is connected"])
