"""How long collectives take, for rt's front ends and for peers, measured in turns.

May live here: what is measured, how often, in which order. May not: processes (``conductor.py``, ``job.py``), what tells collectives from
each other (``collectives.py``), text.

The method, the same for every system:

* Each sample starts at a barrier over all ranks (the system's own); each rank times its own call; the slowest rank's time is the sample.
  (Windows that are not aligned hide the wait for a late rank, and report more than the wire can carry.)
* All groups are started once and stay up. Size by size, round by round, the systems take turns, so a host that slows down or speeds up
  does so for all. A ratio is the median over the rounds of that round's ratio.
* How often: so that a size takes about 0.4 s per system, found out by the warm-up; or ``--iters``.
* A turn after the first begins with one call that is not counted: the others' turns have emptied the caches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.adapters import ADAPTERS, MPI_PEERS
from bench.collectives import Collective
from bench.data import DTYPES, OPS
from bench.samples import Cell
from bench.worker import Answer

ROUNDS = 5
_SIZE_SECONDS = 0.4
_MIN_SAMPLES = 3 * ROUNDS
_MAX_SAMPLES = 20_000
_PROBES = 3
_ITEMSIZE = {"int8": 1, "uint8": 1, "half": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "float": 4, "int64": 8, "uint64": 8, "double": 8}


@dataclass(frozen=True)
class Options:
    """What to measure; ``iters`` None means as many as fit the time. Names of dtype and operator are nccl-tests'."""

    collective: Collective
    size: int
    min_bytes: int = 4
    max_bytes: int = 64 << 20
    factor: int = 4
    step_bytes: int | None = None
    iters: int | None = None
    warmup: int = 5
    dtype: str = "float"
    op: str = "sum"
    root: int = 0
    fronts: tuple[str, ...] = ("sync", "async")
    peers: tuple[str, ...] = ()
    check: bool = True
    backend: str = "ring"

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of all systems, rt's front ends first: on backend mpi those on each MPI library among the peers."""
        libraries = {"ring": [""], "jaccl": [" jaccl"], "mpi": [f" {peer}" for peer in self.peers if peer in MPI_PEERS]}[self.backend]
        return (*(f"rt {front}{library}" for library in libraries for front in self.fronts), *self.peers)

    @property
    def itemsize(self) -> int:
        """Bytes of an item."""
        return _ITEMSIZE[self.dtype]

    @property
    def counts(self) -> list[int]:
        """Counts to measure, as nccl-tests has them, ascending; one 0 where nothing moves. Sizes that leave nothing are left out."""
        if not self.collective.moves:
            return [0]
        counts = []
        nbytes = self.min_bytes
        while nbytes <= self.max_bytes:
            counts.append(self.collective.count(nbytes, self.itemsize, self.size))
            nbytes = nbytes * self.factor if self.step_bytes is None else nbytes + self.step_bytes
        return [count for count in dict.fromkeys(counts) if count]

    def nbytes(self, count: int) -> int:
        """Return the size of nccl-tests for a count: bytes of the larger buffer."""
        return max(self.collective.items(count, self.size)) * self.itemsize


@dataclass(frozen=True)
class Row:
    """One count of one system; a place that the system does not offer is missing."""

    count: int
    cells: dict[str, Cell]
    algorithm: str | None = None


@dataclass(frozen=True)
class Result:
    """Everything that was measured: per system its rows, what its ranks said of themselves, its CPU share between turns."""

    options: Options
    rows: dict[str, list[Row]]
    greetings: dict[str, list[Answer]]
    idle_shares: dict[str, float]

    @property
    def wrong(self) -> int:
        """Wrong elements over everything that was checked."""
        return sum(cell.wrong or 0 for rows in self.rows.values() for row in rows for cell in row.cells.values())

    @property
    def main(self) -> str:
        """The system whose numbers stand in the table: rt's first front end."""
        return self.options.systems[0]


class Ranks(Protocol):
    """All ranks of a system, as ``conductor.System`` and ``job.Member`` are."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def greetings(self) -> list[Answer]:
        """What each rank said of itself."""

    @property
    def idle_share(self) -> float:
        """CPU seconds per second that a rank used while nothing was asked of it."""

    def ask(self, command: Answer) -> list[Answer]:
        """Have all ranks run a command at the same time; return their answers in rank order."""


class Lane:
    """One system and place at one count, which takes its turn in every round."""

    def __init__(self, system: Ranks, count: int, place: str, options: Options) -> None:
        self.algorithm: str | None = None
        self._system = system
        self._command = {
            "do": "measure",
            "collective": options.collective.name,
            "count": count,
            "dtype": DTYPES[options.dtype],
            "op": OPS[options.op],
            "root": options.root,
            "place": place,
            "check": options.check,
        }
        self._rounds: list[tuple[tuple[float, ...], ...]] = []
        self._wrong: int | None = 0  # None: nobody looked
        self._options = options
        self._plan: list[int] = []

    def warm_up(self) -> None:
        """Run the warm-up, and plan how many samples each round takes."""
        probes = Cell((self._run(self._options.warmup, _PROBES),), None)
        self._plan = share_out(self._options.iters or affordable(probes.seconds))

    def turn(self, index: int) -> None:
        """Take the samples of round ``index``, if there are any for it."""
        if index < len(self._plan):
            self._rounds.append(self._run(1, self._plan[index]))

    def cell(self) -> Cell:
        """Return what was measured."""
        return Cell(tuple(self._rounds), self._wrong)

    def _run(self, warmup: int, samples: int) -> tuple[tuple[float, ...], ...]:
        answers = self._system.ask({**self._command, "warmup": warmup, "samples": samples})
        for answer in answers:
            self._wrong = None if self._wrong is None or answer["wrong"] is None else self._wrong + answer["wrong"]
        self.algorithm = answers[0]["algorithm"]
        return tuple(tuple(nanoseconds / 1e9 for nanoseconds in answer["ns"]) for answer in answers)


def affordable(seconds: float) -> int:
    """Return how many samples of ``seconds`` each fill the time that a size may take."""
    return min(_MAX_SAMPLES, max(_MIN_SAMPLES, math.ceil(_SIZE_SECONDS / seconds)))


def share_out(samples: int) -> list[int]:
    """Return how many samples each round takes: evenly, at least one, hence fewer rounds for fewer samples."""
    rounds = min(ROUNDS, samples)
    return [samples * (index + 1) // rounds - samples * index // rounds for index in range(rounds)]


def places(system: str, collective: Collective) -> tuple[str, ...]:
    """Return where a system can put the results of a collective."""
    return collective.places(ADAPTERS[system].kind)


def measure_count(systems: Sequence[Ranks], count: int, options: Options) -> list[Row]:
    """Measure one count on all systems in turns; return a row per system."""
    lanes: dict[str, dict[str, Lane]] = {
        system.name: {place: Lane(system, count, place, options) for place in places(system.name, options.collective)} for system in systems
    }
    every = [lane for of_system in lanes.values() for lane in of_system.values()]
    for lane in every:
        lane.warm_up()
    take_turns(every)
    return [
        Row(count, {place: lane.cell() for place, lane in of_system.items()}, next(iter(of_system.values())).algorithm)
        for of_system in lanes.values()
    ]


def take_turns(lanes: Sequence[Lane]) -> None:
    """Measure lanes that are warm, round by round."""
    for index in range(ROUNDS):
        for lane in lanes:
            lane.turn(index)


def run(options: Options, systems: Sequence[Ranks]) -> Result:
    """Measure every count on systems that stand.

    Raises:
        BenchError: a system broke.
    """
    rows: dict[str, list[Row]] = {system.name: [] for system in systems}
    for count in options.counts:
        progress(f"measuring {options.nbytes(count)} bytes of {options.dtype}" if options.collective.moves else "measuring")
        for row, system in zip(measure_count(systems, count, options), systems, strict=True):
            rows[system.name].append(row)
    progress("")
    greetings = {system.name: system.greetings for system in systems}
    return Result(options, rows, greetings, {system.name: system.idle_share for system in systems})


def progress(text: str) -> None:
    """Show a person who waits what is going on: the tables can only be printed at the end, since the systems are measured in turns."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
