"""``rt.bench all_reduce``: how long one all-reduce takes, for rt's two front ends and for peers, measured in turns.

May live here: what is measured, how often, in which order. May not: processes (``conductor.py``), text (``report.py``).

The method, the same for every system:

* Each sample starts at a barrier over all ranks (the system's own); each rank times its own call; the slowest rank's time is the sample.
  (Windows that are not aligned hide the wait for a late rank, and report more than the wire can carry.)
* All groups are started once and stay up. Size by size, round by round, the systems take turns, so a host that slows down or speeds up
  does so for all. A ratio is the median over the rounds of that round's ratio.
* How often: so that a size takes about 0.4 s per system, found out by the warm-up; or ``--iters``.
* A turn after the first begins with one call that is not counted: the others' turns have emptied the caches.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.conductor import WORKER, System, running

ITEM_BYTES = 4  # float32, the one dtype that all systems reduce at full speed
ROUNDS = 5
_SIZE_SECONDS = 0.4
_MIN_SAMPLES = 3 * ROUNDS
_MAX_SAMPLES = 20_000
_PROBES = 3
# system -> (what meets, worker's adapter, reduces out of place, reduces in place)
_KINDS = {
    "rt sync": ("rt", "rt-sync", True, True),
    "rt async": ("rt", "rt-async", True, True),
    "gloo": ("gloo", "gloo", True, True),
    "mlx": ("mlx", "mlx", True, False),
    "nospin": ("rt", "rt-nospin", True, True),
    "tcp": ("tcp", "tcp", True, False),
}


@dataclass(frozen=True)
class Options:
    """What to measure; ``iters`` None means as many as fit the time."""

    size: int
    min_bytes: int
    max_bytes: int
    factor: int
    iters: int | None
    warmup: int
    fronts: tuple[str, ...]
    peers: tuple[str, ...]
    check: bool

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of all systems, rt's front ends first."""
        return (*(f"rt {front}" for front in self.fronts), *self.peers)

    @property
    def sizes(self) -> list[int]:
        """Bytes to measure, ascending, whole items."""
        sizes = []
        nbytes = self.min_bytes
        while nbytes <= self.max_bytes:
            sizes.append(nbytes // ITEM_BYTES * ITEM_BYTES)
            nbytes *= self.factor
        return sizes


@dataclass(frozen=True)
class Cell:
    """What was measured for one size, one system, in place or not.

    Attributes:
        rounds: per round the samples in seconds, slowest rank each.
        wrong: number of wrong elements over all ranks and rounds; None when unchecked.
    """

    rounds: tuple[tuple[float, ...], ...]
    wrong: int | None

    @property
    def seconds(self) -> float:
        """Median over all samples."""
        return median(sample for samples in self.rounds for sample in samples)

    def ratio(self, base: Cell) -> float:
        """How many times longer than ``base``: the median over rounds of the ratio of the rounds' medians."""
        return median(median(mine) / median(other) for mine, other in zip(self.rounds, base.rounds, strict=True))


@dataclass(frozen=True)
class Row:
    """One size of one system; a placement that the system does not offer is None."""

    nbytes: int
    out_of_place: Cell | None
    in_place: Cell | None

    @property
    def cells(self) -> list[Cell]:
        """The placements that were measured."""
        return [cell for cell in (self.out_of_place, self.in_place) if cell is not None]

    def cell(self, in_place: bool) -> Cell | None:
        """One of the placements."""
        return self.in_place if in_place else self.out_of_place


@dataclass(frozen=True)
class Result:
    """Everything that was measured: per system its rows, its ranks' process ids, versions and CPU share between turns."""

    options: Options
    rows: dict[str, list[Row]]
    pids: dict[str, list[int]]
    uses: dict[str, dict[str, str]]
    idle_shares: dict[str, float]

    @property
    def wrong(self) -> int:
        """Wrong elements over everything that was checked."""
        return sum(cell.wrong or 0 for rows in self.rows.values() for row in rows for cell in row.cells)


class Lane:
    """One system and placement at one size, which takes its turn in every round."""

    def __init__(self, system: System, nbytes: int, in_place: bool, options: Options) -> None:
        self._system = system
        self._command = {"do": "all_reduce", "bytes": nbytes, "in_place": in_place, "check": options.check}
        self._rounds: list[tuple[float, ...]] = []
        self._wrong: int | None = 0  # None: nobody looked
        self._options = options
        self._plan: list[int] = []

    def warm_up(self) -> None:
        """Run the warm-up, and plan how many samples each round takes."""
        probes = self._run(self._options.warmup, _PROBES)
        self._plan = share_out(self._options.iters or affordable(median(probes)))

    def turn(self, index: int) -> None:
        """Take the samples of round ``index``, if there are any for it."""
        if index < len(self._plan):
            self._rounds.append(self._run(1, self._plan[index]))

    def cell(self) -> Cell:
        """Return what was measured."""
        return Cell(tuple(self._rounds), self._wrong)

    def _run(self, warmup: int, samples: int) -> tuple[float, ...]:
        answers = self._system.ask({**self._command, "warmup": warmup, "samples": samples})
        for answer in answers:
            self._wrong = None if self._wrong is None or answer["wrong"] is None else self._wrong + answer["wrong"]
        return slowest([answer["ns"] for answer in answers])


def affordable(seconds: float) -> int:
    """Return how many samples of ``seconds`` each fill the time that a size may take."""
    return min(_MAX_SAMPLES, max(_MIN_SAMPLES, math.ceil(_SIZE_SECONDS / seconds)))


def share_out(samples: int) -> list[int]:
    """Return how many samples each round takes: evenly, at least one, hence fewer rounds for fewer samples."""
    rounds = min(ROUNDS, samples)
    return [samples * (index + 1) // rounds - samples * index // rounds for index in range(rounds)]


def slowest(ranks: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Return per sample the slowest rank's time in seconds, from per-rank lists of nanoseconds."""
    return tuple(max(sample) / 1e9 for sample in zip(*ranks, strict=True))


def measure_size(systems: Sequence[System], nbytes: int, options: Options) -> list[Row]:
    """Measure one size on all systems in turns; return a row per system."""
    lanes: dict[tuple[str, bool], Lane] = {}
    for system in systems:
        for in_place, offered in enumerate(_KINDS[system.name][2:]):
            if offered:
                lanes[system.name, bool(in_place)] = Lane(system, nbytes, bool(in_place), options)
    for lane in lanes.values():
        lane.warm_up()
    for index in range(ROUNDS):
        for lane in lanes.values():
            lane.turn(index)
    cells = {key: lane.cell() for key, lane in lanes.items()}
    return [Row(nbytes, cells.get((system.name, False)), cells.get((system.name, True))) for system in systems]


def run(options: Options) -> Result:
    """Start every system, measure every size, end the systems.

    Raises:
        BenchError: a system could not be started or broke.
    """
    rows: dict[str, list[Row]] = {name: [] for name in options.systems}
    with contextlib.ExitStack() as stack:
        systems = []
        for name in options.systems:
            kind, adapter = _KINDS[name][:2]
            _progress(f"starting {options.size} ranks of {name}")
            systems.append(stack.enter_context(running(name, kind, options.size, [*WORKER, adapter])))
        for nbytes in options.sizes:
            _progress(f"measuring {nbytes} bytes")
            for row, name in zip(measure_size(systems, nbytes, options), options.systems, strict=True):
                rows[name].append(row)
        _progress("")
        return Result(
            options,
            rows,
            {system.name: system.pids for system in systems},
            {system.name: system.uses for system in systems},
            {system.name: system.idle_share for system in systems},
        )


def _progress(text: str) -> None:
    # For a person who waits: the tables can only be printed at the end, since the front ends are measured in turns.
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
