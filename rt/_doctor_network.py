"""What ``rt.doctor`` finds out about hosts and the ways between them.

May live here: which host is asked what, when, and what came back. May not: how a probe is reached (``_doctor_probes``), what is good or bad
(``_doctor_findings``), output other than progress.

Pairs are measured in rounds in which each host is in one pair, first everything that is small, then bandwidth, one way after the other: so
no two measurements share a host, and queues that a bulk transfer leaves behind are in the way of bulk transfers only.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rt import interfaces
from rt._doctor_probes import RemoteProbe, Silent
from rt.errors import ConfigError
from rt.interfaces import Choice, Interface

_STREAM_SECONDS = 0.5
_FACTS_SECONDS = 25.0
_SHORT_SECONDS = 8.0
_LONG_SECONDS = 20.0
_CLOCK_TRIES = 5

Say = Callable[[str], None]


@dataclass
class HostReport:
    """What was found out about a host.

    Attributes:
        name: as the user calls it.
        problem: why nothing more is known, or "".
        advice: what to do about that.
        facts: what its probe said of it (``rt._probe.facts``).
        interfaces: its network interfaces.
        skew: seconds by which its clock is ahead of the doctor's, and how much of that may be the way there.
        addresses: where others are to reach it.
        why: how these were chosen.
    """

    name: str
    problem: str = ""
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    interfaces: list[Interface] = field(default_factory=list)
    skew: tuple[float, float] = (0.0, 0.0)
    addresses: list[str] = field(default_factory=list)
    why: str = ""

    def interface(self, address: str) -> Interface | None:
        """Return the interface that has an address, None if this host does not have it."""
        return next((each for each in self.interfaces if address in (one.partition("/")[0] for one in each.addresses)), None)


@dataclass(eq=False)
class LinkReport:
    """What was found out about the way from one host to an address of another.

    Attributes:
        source, target: numbers of the hosts.
        address: of the target.
        outcome: ``ok``; ``refused``, ``silent``, ``unreachable``: what a connection met; ``stranger``: somebody else answered; ``broke``.
        why: the system's words for that.
        shut: where the port is ``silent``, what a connection to one met on which nobody listens.
        local: the address from which the source came.
        seen: the address from which it came for the target.
        latency: seconds of a round trip of one byte, median; None where not measured.
        bandwidth: bytes per second of one TCP stream, this way; None where not measured.
        mss, pmtu: bytes of TCP's largest segment, and of the largest packet on the way, as the source knows them; 0 where not.
        large: whether packets of full size came through.
        retransmitted: segments that were sent again during the stream.
    """

    source: int
    target: int
    address: str
    outcome: str = "ok"
    why: str = ""
    shut: str = ""
    local: str = ""
    seen: str = ""
    latency: float | None = None
    bandwidth: float | None = None
    mss: int = 0
    pmtu: int = 0
    large: bool = True
    retransmitted: int = 0

    def take(self, answer: dict[str, Any]) -> None:
        """Take note of what a probe answered."""
        for name, value in answer.items():
            if name != "at":
                setattr(self, name, value)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return every pair of ``count`` hosts once, in rounds in which no host comes twice: the circle method of tournaments."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


class Examination:
    """The probes of all hosts, and what they found; use it as a context manager.

    Attributes:
        hosts: one report per host.
        links: one per ordered pair of hosts and address.
    """

    def __init__(self, probes: Sequence[RemoteProbe], say: Say, choice: Choice | None = None) -> None:
        self._probes = list(probes)
        self._say = say
        self._choice = choice
        self._ports: dict[int, dict[str, int]] = {}
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self._probes)))
        self.hosts = [HostReport(probe.host.name) for probe in probes]
        self.links: list[LinkReport] = []

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for probe in self._probes:
            probe.end()

    def run(self) -> None:
        """Find out everything. Takes about a second per round and address; never much more than the time limits in this file."""
        self._say(f"reaching {_count(len(self._probes), 'host')}")
        self._on_all(self._reach)
        token = secrets.token_hex(16)
        self._on_all(lambda number: self._listen(number, token))
        self._on_all(self._find_addresses)
        schedule = [[pair for pair in each if self._known(*pair)] for each in rounds(len(self._probes))]
        self._in_rounds("latency", schedule, self._touch)
        self._in_rounds("bandwidth", schedule, self._stream)
        self.links.sort(key=lambda link: (link.source, link.target))

    def _in_rounds(self, what: str, schedule: list[list[tuple[int, int]]], measure: Callable[[int, int, str], None]) -> None:
        for number, pairs in enumerate(schedule):
            if pairs:
                names = ", ".join(f"{self.hosts[a].name} - {self.hosts[b].name}" for a, b in pairs[:4])
                more = f" and {_count(len(pairs) - 4, 'other pair')}" if len(pairs) > 4 else ""
                self._say(f"{what}, round {number + 1} of {len(schedule)}: {names}{more}")
                list(self._threads.map(lambda pair: self._both_ways(pair, measure), pairs))

    def _on_all(self, function: Callable[[int], None]) -> None:
        list(self._threads.map(lambda number: self._guarded(number, function), self._left()))

    def _left(self) -> list[int]:
        return [number for number, host in enumerate(self.hosts) if not host.problem]

    def _guarded(self, number: int, function: Callable[[int], None]) -> None:
        try:
            function(number)
        except Silent as silence:
            self.hosts[number].problem, self.hosts[number].advice = str(silence), silence.advice
            self._say(f"{self.hosts[number].name}: {silence}")

    # Hosts

    def _reach(self, number: int) -> None:
        probe, host = self._probes[number], self.hosts[number]
        probe.start()
        host.skew = self._skew(probe)
        host.facts = probe.ask("facts", _FACTS_SECONDS)
        host.interfaces = [Interface(**{**each, "addresses": tuple(each["addresses"])}) for each in host.facts.pop("interfaces")]

    @staticmethod
    def _skew(probe: RemoteProbe) -> tuple[float, float]:
        """As NTP does: a clock is read halfway between question and answer, and the fastest of several questions knows best."""
        best = (0.0, float("inf"))
        for _ in range(_CLOCK_TRIES):
            asked = time.time()
            there = probe.ask("clock", _SHORT_SECONDS)["clock"]
            answered = time.time()
            best = min(best, (there - (asked + answered) / 2, (answered - asked) / 2), key=lambda each: each[1])
        return best

    def _listen(self, number: int, token: str) -> None:
        self._ports[number] = self._probes[number].ask("listen", _SHORT_SECONDS, token=token)["ports"]

    def _find_addresses(self, number: int) -> None:
        host, ssh = self.hosts[number], self.hosts[number].facts["ssh"]
        here, why = (ssh[2], "ssh came in there") if len(ssh) == 4 else self._towards_others(number)
        ips = self._probes[number].host.chosen_ips
        if self._choice is not None:
            try:
                host.addresses = interfaces.reached(host.interfaces, self._choice, here, ips)
            except ConfigError as error:
                raise Silent(str(error), "name an interface or network that this host has, or give it ips in the hostfile") from None
            host.why = f"{interfaces.VARIABLE}={self._choice.text}"
        elif self._probes[number].host.ips:
            host.addresses, host.why = list(self._probes[number].host.ips), "the hostfile's ips"
        else:
            host.addresses, host.why = [here.partition("%")[0]], why

    def _towards_others(self, number: int) -> tuple[str, str]:
        """The address of the doctor's own host."""
        others = [host.facts["ssh"][2] for host in self.hosts if len(host.facts.get("ssh", ())) == 4]
        others += [ip for probe in self._probes if probe is not self._probes[number] for ip in probe.host.ips]
        for other in others:
            found = self._probes[number].ask("route", _SHORT_SECONDS, address=other)
            if "local" in found:
                return str(found["local"]), f"the way to {other} begins there"
        return "127.0.0.1", "it is the only host"

    # Ways

    def _known(self, a: int, b: int) -> bool:
        return not self.hosts[a].problem and not self.hosts[b].problem

    def _both_ways(self, pair: tuple[int, int], measure: Callable[[int, int, str], None]) -> None:
        for source, target in (pair, pair[::-1]):
            for address in self.hosts[target].addresses:
                if self._known(*pair):  # one of them may just have failed
                    self._guarded(source, lambda s, t=target, at=address: measure(s, t, at))  # type: ignore[misc]

    def _port(self, target: int, address: str) -> int:
        return self._ports[target].get("6" if ":" in address else "4", 9)

    def _touch(self, source: int, target: int, address: str) -> None:
        port = self._port(target, address)
        link = LinkReport(source, target, address)
        link.take(self._probes[source].ask("touch", _LONG_SECONDS, address=address, port=port, shut=1))
        self.links.append(link)

    def _stream(self, source: int, target: int, address: str) -> None:
        link = next(each for each in self.links if (each.source, each.target, each.address) == (source, target, address))
        if link.outcome == "ok" and link.large:
            port = self._port(target, address)
            link.take(self._probes[source].ask("stream", _LONG_SECONDS, address=address, port=port, duration=_STREAM_SECONDS))


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
