"""``rt.bench limits``: the least time in which this host's memory lets an all-reduce in shared memory end, and how near ``rt`` comes.

May live here: what a core must move, the bound that follows, and the table. May not: the processes that stream (``stream.py``), how
collectives are timed (``measure.py``).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench import host, measure
from bench.adapters import ADAPTERS
from bench.conductor import RANK, System, running
from bench.meeting import BenchError
from bench.stream import KINDS

ROUNDS = measure.ROUNDS
SECONDS = 0.2  # of one kind of stream, per round
STREAM = ("-m", "bench.stream")

Passes = Sequence[Sequence[float]]


def must_move(nbytes: int) -> int:
    """Return the bytes that each rank's core must read and write for an all-reduce of ``nbytes``, whatever the algorithm and the ranks.

    No byte of the n inputs can be left unread, and every byte of the n results must be written, for each rank has memory of its own: n
    inputs and n results, shared evenly by n cores.
    """
    return 2 * nbytes


def bound(nbytes: int, ranks: int, rates: Sequence[float]) -> float:
    """Return the bound in seconds: the core that needs longest for what its ranks must move.

    Args:
        nbytes: of each rank's input.
        ranks: how many; they go round the cores.
        rates: of each core in bytes per second, read and written, with the others busy.
    """
    return max(math.ceil((ranks - core) / len(rates)) * must_move(nbytes) / rate for core, rate in enumerate(rates[:ranks]))


def together(passes: Sequence[Passes]) -> list[list[float]]:
    """Return per process the seconds of those passes during which all the others streamed too."""
    start, end = max(each[0][0] for each in passes), min(each[-1][1] for each in passes)
    return [[last - first for first, last in each if first >= start and last <= end] for each in passes]


def rates_of(nbytes: int, kind: str, passes: Sequence[Passes]) -> list[float]:
    """Return each core's rate in bytes per second: the median over its passes.

    Raises:
        BenchError: the processes did not run at the same time.
    """
    spent = together(passes)
    if not all(spent):
        raise BenchError(f"limits: {len(passes)} processes that stream {nbytes} bytes did not run at the same time; is there other load?")
    return [KINDS[kind] * nbytes / median(each) for each in spent]


class Size:
    """One size: what its rounds found."""

    def __init__(self, nbytes: int, ranks: int, cores: Sequence[int]) -> None:
        self.nbytes = nbytes
        self.bounds: list[float] = []
        self.lanes: dict[str, measure.Lane] = {}
        self._ranks = ranks
        self._cores = cores
        self._rates: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}

    def turn(self, streams: System) -> None:
        """Let all cores stream, one kind after the other; the faster kind makes the bound."""
        found = {}
        for kind in KINDS:
            answers = streams.ask({"do": "stream", "kind": kind, "seconds": SECONDS})
            found[kind] = rates_of(self.nbytes, kind, [answer["passes"] for answer in answers])
            self._rates[kind].append(found[kind])
        self.bounds.append(bound(self.nbytes, self._ranks, [max(rates) for rates in zip(*found.values(), strict=True)]))

    def row(self) -> dict[str, Any]:
        """Return the medians over the rounds; how near a front end comes is the median of each round's percent."""
        rates = {kind: [median(of_core) for of_core in zip(*rounds, strict=True)] for kind, rounds in self._rates.items()}
        cores = [{"core": core, **{kind: rates[kind][index] for kind in KINDS}} for index, core in enumerate(self._cores)]
        measured = {}
        for name, lane in self.lanes.items():
            cell = lane.cell()
            percents = [100 * least / median(cell.round(index)) for index, least in enumerate(self.bounds)]
            measured[name] = {"seconds": cell.seconds, "percent": median(percents), "percents": percents}
        return {"bytes": self.nbytes, "ranks": self._ranks, "must_move": must_move(self.nbytes), "cores": cores,
                "bound": median(self.bounds), "measured": measured}  # fmt: skip


def cores_of(ranks: int) -> list[int]:
    """Return the cores to stream on: one per rank as far as they go."""
    allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(host.cores()))
    return allowed[:ranks]


def run(options: measure.Options, *, measured: bool = False) -> list[dict[str, Any]]:
    """Return a row per size: every core's rates in bytes per second, the bound in seconds, and with ``measured`` what ``rt`` takes.

    Raises:
        BenchError: a process could not be started or broke.
    """
    cores = cores_of(options.size)
    rows = []
    with contextlib.ExitStack() as stack:
        streams = stack.enter_context(running("stream", "rt", len(cores), [*STREAM]))
        names = options.systems if measured else ()
        systems = [stack.enter_context(running(name, ADAPTERS[name].kind, options.size, [*RANK, name])) for name in names]
        for count in options.counts:
            size = Size(options.nbytes(count), options.size, cores)
            measure.progress(f"streaming {size.nbytes} bytes")
            streams.ask({"do": "prepare", "bytes": size.nbytes, "cores": cores})
            size.lanes = {system.name: measure.Lane(system, count, "out_of_place", options) for system in systems}
            for lane in size.lanes.values():
                lane.warm_up()
            for index in range(ROUNDS):
                size.turn(streams)
                for lane in size.lanes.values():
                    lane.turn(index)
            rows.append(size.row())
    measure.progress("")
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table."""
    first = rows[0]
    names = list(first["measured"])
    head = "".join(f"  {name + ' us':>13}  {'% of bound':>10}" for name in names)
    lines = [
        f"# The bound of an all-reduce between {first['ranks']} ranks in shared memory; `rt.bench limits --help` has the formula",
        *host.lines(),
        "# cores: GB/s read and written while all of them stream, copy / add",
        f"# {'size (B)':>12}  {'must move (B)':>13}  {'bound us':>10}{head}  cores",
    ]
    for row in rows:
        line = f"  {row['bytes']:>12}  {row['must_move']:>13}  {row['bound'] * 1e6:>10.1f}"
        for name in names:
            line += f"  {row['measured'][name]['seconds'] * 1e6:>13.1f}  {row['measured'][name]['percent']:>9.0f}%"
        cores = ", ".join(f"{core['core']}: {core['copy'] / 1e9:.1f} / {core['add'] / 1e9:.1f}" for core in row["cores"])
        lines.append(f"{line}  {cores}")
    return "\n".join(lines)
