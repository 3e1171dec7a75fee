"""How long a schedule takes on a machine too large to be simulated rank by rank: from one host, from fewer hosts, from fewer bytes.

May live here: which of these ways is taken, and the checks without which none may be. May not: the simulation (``simulator.py``), what
makes ranks stand for others (``symmetry.py``), options and tables (``simulate.py``).

In order: *all ranks*, where they are few. *One host*, whose ranks stand for all others, where the schedules have that symmetry. *Folded*:
the same algorithm with fewer bytes, or on fewer hosts with the same bytes per rank. There every frame, or every host, adds the same time
again and again, as it adds the same steps. So the time is followed along a line: only where the number of steps lies exactly on one, up to
the machine asked for, and times of four smaller ones do, to 5 %. (Nearer they do not come: where links are full, every second or third host
may add more than the others.) A doubling has other steps on fewer hosts, and so it is not folded that way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from statistics import linear_regression
from typing import NamedTuple

from bench.program import Program, compiled
from bench.simulator import FRAME_BYTES, Machine, Simulation
from bench.symmetry import alone, find
from rt.schedule import Kind, Schedule

ITEMSIZE = 4
EVENTS_MOST = 600_000  # of one simulation: about two seconds
_STEPS_MOST = 60_000  # of the schedules that it needs, which may take longer to prepare than to run
_FOLDED_HOSTS = 40  # the most hosts that are folded to, or as many as have so many ranks; else half as many, or a quarter
_FOLDED_RANKS = 320
_TENTHS = (5, 7, 8, 10)  # the points of a line
_FRAMES = 60  # in each message at the last of them
_TOLERANCE = 0.05
_EVEN = 64  # counts are rounded up to whole items per rank where that is less than one part in so many

Make = Callable[[int, Machine, int], Schedule]  # rank, machine, items


class Found(NamedTuple):
    """Seconds, and by which way they were found."""

    seconds: float
    way: str


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm on ``count`` items on a machine."""

    make: Make
    machine: Machine
    count: int

    def program(self, rank: int) -> Program:
        """Return the program of a rank."""
        return compiled(self.make(rank, self.machine, self.count), ITEMSIZE)

    @cached_property
    def last(self) -> Schedule:
        """The schedule of the last rank: where some have less to do, those are the first."""
        return self.make(self.machine.size - 1, self.machine, self.count)

    @cached_property
    def steps(self) -> int:
        """How many steps must be made for a rank; also if few are left, since the others are of no items."""
        whole = max(self.count, 2 * self.machine.size)
        return len((self.last if whole == self.count else self.make(self.machine.size - 1, self.machine, whole)).steps)

    @cached_property
    def events(self) -> float:
        """About how many events the steps of a rank are."""
        piece = self.machine.network.piece if self.machine.hosts > 1 else self.machine.local.piece
        return sum(3 + 4 * step.count * ITEMSIZE / piece for step in self.last.steps if step.kind is Kind.SEND)

    def fits(self, ranks: int, most: float) -> bool:
        """Say whether so many ranks can be simulated in time."""
        return self.events * ranks <= most and self.steps * ranks <= _STEPS_MOST


def seconds(make: Make, machine: Machine, count: int) -> Found | None:
    """Return how long ``count`` items take, or None where no way leads there."""
    case = Case(make, machine, count)
    found = _all_ranks(case, EVENTS_MOST)
    if found is not None:
        return found
    unit = 2 * machine.size
    if count >= _EVEN * unit:
        case = Case(make, machine, -(-count // unit) * unit)
    return _one_host(case, EVENTS_MOST) or _fewer_bytes(case) or _fewer_hosts(case)


def _all_ranks(case: Case, most: float) -> Found | None:
    size = case.machine.size
    if not case.fits(size, most):
        return None
    return Found(Simulation(case.machine, {rank: case.program(rank) for rank in range(size)}, alone).run(), "all ranks")


def _one_host(case: Case, most: float) -> Found | None:
    per_host = case.machine.ranks_per_host
    symmetric = find(case.program, case.machine.hosts, per_host) if case.machine.hosts > 1 and case.fits(per_host, most) else None
    if symmetric is None:
        return None
    symmetry, programs = symmetric
    return Found(Simulation(case.machine, programs, symmetry.image(per_host)).run(), "one host")


def _exact(case: Case) -> Found | None:
    return _one_host(case, EVENTS_MOST) or _all_ranks(case, EVENTS_MOST / 4)


def _fewer_bytes(case: Case) -> Found | None:
    """Follow the line through few frames per message."""
    if not case.fits(case.machine.ranks_per_host, float("inf")):
        return None
    messages = case.count // max(step.count for step in case.last.steps)
    whole = case.count * ITEMSIZE / FRAME_BYTES
    points = [_FRAMES * messages * tenths // 10 for tenths in _TENTHS]
    if points[-1] >= whole:
        return None
    return _line(lambda frames: _exact(dataclasses.replace(case, count=frames * FRAME_BYTES // ITEMSIZE)), points, whole)


def _fewer_hosts(case: Case) -> Found | None:
    """Follow the line through few hosts, each of which adds as many bytes."""
    each, rest = divmod(case.count, case.machine.size)
    if rest or not each:
        return None

    def smaller(hosts: int) -> Case:
        return Case(case.make, dataclasses.replace(case.machine, hosts=hosts), each * hosts * case.machine.ranks_per_host)

    for part in (1, 2, 4):
        largest = max(_FOLDED_HOSTS, _FOLDED_RANKS // case.machine.ranks_per_host) // part
        points = [largest * tenths // 10 for tenths in _TENTHS]
        if largest < case.machine.hosts and _straight(points, smaller, case):
            found = _line(lambda hosts: _exact(smaller(hosts)), points, case.machine.hosts)
            if found is not None:
                return found
    return None


def _straight(points: list[int], smaller: Callable[[int], Case], case: Case) -> bool:
    """Say whether the numbers of steps lie on a line, exactly."""
    xs = [*points, case.machine.hosts]
    ys = [*(len(smaller(hosts).last.steps) for hosts in points), len(case.last.steps)]
    return all((y - ys[0]) * (xs[1] - xs[0]) == (ys[1] - ys[0]) * (x - xs[0]) for x, y in zip(xs, ys, strict=True))


def _line(time: Callable[[int], Found | None], points: list[int], at: float) -> Found | None:
    """Follow the line (of least squares) through the times at ``points``, the largest first; None if they are on none."""
    times: list[float] = []
    for point in reversed(points):
        found = time(point)
        if found is None:
            return None
        times.insert(0, found.seconds)
    slope, start = linear_regression(points, times)
    if slope <= 0 or any(abs(start + slope * point - each) > _TOLERANCE * each for point, each in zip(points, times, strict=True)):
        return None
    return Found(start + slope * at, "folded")
