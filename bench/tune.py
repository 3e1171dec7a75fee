"""``rt.bench tune``: which algorithm is fastest here, as a table for ``RT_TUNING``; ``--show``: the table in force.

May live here: what is measured for which row of a table, where one algorithm gives way to another, the text of both. May not: how calls
are timed (``measure.py``), what a table is and what it may hold (``rt.tuning``).

One group of ranks per algorithm is started under a table that names it everywhere, so what is timed is what users get. The groups take
turns at every size. An algorithm that cannot be used here shows by another one's name, and is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from bench import host, job, measure
from bench.collectives import COLLECTIVES
from bench.conductor import RANK, running
from bench.measure import Lane, Options, Ranks
from rt import config, tuning
from rt.tuning import ALGORITHMS, LINKS, Rule, Table, show_bytes

FRONT = "rt sync"
# What one more threshold must save, of the time at one size or spread over several; and what one size counts for at most. That is less, so
# no single size makes a threshold, however long something else held the machine up while it was measured.
_WORTH, _MOST = math.log(1.2), math.log(1.19)


class _Measured(NamedTuple):
    """How the bench calls what a row of a table is about."""

    collective: str
    dtype: str = "float"
    op: str = "sum"


# Scans are no command of the bench. A mean of halves is accumulated in float32 for any number of ranks.
ROWS = {name: _Measured(name) for name in ALGORITHMS if name in COLLECTIVES} | {"all_reduce_wide": _Measured("all_reduce", "half", "avg")}


@dataclass(frozen=True)
class Found:
    """What was measured for one row.

    Attributes:
        row: of a table.
        sizes: bytes as tables count them, ascending.
        seconds: per algorithm and size the median.
        ratios: per algorithm and size how many times longer it takes than the first: the median over rounds of the rounds' ratios.
        wrong: wrong elements of everything that was checked.
    """

    row: str
    sizes: list[int]
    seconds: dict[str, list[float]]
    ratios: dict[str, list[float]]
    wrong: list[int]

    @property
    def rule(self) -> Rule:
        """What a table should say."""
        return thresholds(self.sizes, self.ratios)


def thresholds(sizes: Sequence[int], ratios: Mapping[str, Sequence[float]]) -> Rule:
    """Return the rule that takes the least time over all sizes, where every threshold has a price: noise then makes none.

    Args:
        sizes: bytes, ascending.
        ratios: per algorithm its time at each size, in any unit that the algorithms share at that size.
    """
    # Per algorithm the least that a choice for every size so far costs which ends with it, and that choice.
    best: dict[str, tuple[float, tuple[str, ...]]] = {name: (0.0, ()) for name in ratios}
    for index in range(len(sizes)):
        cheapest = min(best.values(), key=lambda found: found[0])
        least = min(times[index] for times in ratios.values())
        for name, (cost, path) in list(best.items()):
            if cheapest[0] + _WORTH < cost:
                cost, path = cheapest[0] + _WORTH, cheapest[1]
            best[name] = (cost + min(_MOST, math.log(ratios[name][index] / least)), (*path, name))
    _, chosen = min(best.values(), key=lambda found: found[0])
    changes = [index for index, (before, after) in enumerate(itertools.pairwise(chosen)) if before != after]
    return (*((_between(sizes[index], sizes[index + 1]), chosen[index]) for index in changes), (math.inf, chosen[-1]))


def _between(low: int, high: int) -> int:
    """Return the power of two about halfway between two sizes, for a logarithm; the lower one where there is none."""
    power = 1 << math.isqrt(low * high).bit_length() - 1
    return max(low, power)


def forced(turn: int, size: int) -> Table:
    """Return a table by which ``size`` ranks use the algorithm of number ``turn`` for everything, the last one where there are fewer."""
    rules = {row: {size: ((math.inf, names[min(turn, len(names) - 1)]),)} for row, names in ALGORITHMS.items()}
    return Table({row: dict.fromkeys(LINKS, rule) for row, rule in rules.items()})


@contextlib.contextmanager
def _standing(rows: Sequence[str], size: int, group: Any) -> Iterator[list[Ranks]]:
    """Start a group per number of an algorithm: on this host, or beside the ranks of a job."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rt-tune-")))
        systems: list[Ranks] = []
        for turn in range(max(len(ALGORITHMS[row]) for row in rows)):
            measure.progress(f"starting {size} ranks, {turn + 1}")
            path = folder / f"{turn}.json"
            path.write_text(forced(turn, size).text(), encoding="utf-8")
            environ = {"RT_TUNING": str(path)}
            if group is None:
                systems.append(stack.enter_context(running(FRONT, "rt", size, [*RANK, FRONT], environ)))
            else:
                systems.append(stack.enter_context(job.beside(FRONT, group, environ)))
        yield systems


def run(rows: Sequence[str], size: int, min_bytes: int, max_bytes: int, factor: int, group: Any = None) -> tuple[list[Found], Table]:
    """Measure the algorithms of some rows on ranks of our own; return what was found, and the table that follows.

    Args:
        rows: of a table.
        size: number of ranks.
        min_bytes, max_bytes, factor: which sizes, as ``measure.Options`` has them.
        group: the job that we are in; every rank of it returns the same. None: there is none.

    Raises:
        BenchError: a group could not be started or broke.
    """
    with _standing(rows, size, group) as systems:
        found = []
        for row in rows:
            name, dtype, op = ROWS[row]
            options = Options(COLLECTIVES[name], size, min_bytes, max_bytes, factor, dtype=dtype, op=op, fronts=("sync",))
            found.append(_row(row, options, systems[: len(ALGORITHMS[row])]))
        links = _links(systems[0])
    measure.progress("")
    about = f"{links}, {size} ranks: {host.cpu_model()}, {host.cores()} cores, {date.today()}"
    return found, Table({each.row: {links: {size: each.rule}} for each in found}, about)


def _row(row: str, options: Options, systems: Sequence[Ranks]) -> Found:
    found = Found(row, [count * options.itemsize for count in options.counts], {}, {}, [])
    able = dict(zip(ALGORITHMS[row], systems, strict=True))
    for number, count in enumerate(options.counts):
        measure.progress(f"{row}: {options.nbytes(count)} bytes ({number + 1} of {len(options.counts)})")
        lanes = {name: Lane(system, count, "out_of_place", options) for name, system in able.items()}
        for lane in lanes.values():
            lane.warm_up()
        lanes = {name: lane for name, lane in lanes.items() if (lane.algorithm or "").removesuffix("_wide") == name}
        able = {name: able[name] for name in lanes}
        measure.take_turns(list(lanes.values()))
        cells = {name: lane.cell() for name, lane in lanes.items()}
        first = next(iter(cells.values()))
        for name, cell in cells.items():
            found.seconds.setdefault(name, []).append(cell.seconds)
            found.ratios.setdefault(name, []).append(cell.ratio(first))
            found.wrong.append(cell.wrong or 0)
    return found


def _links(system: Ranks) -> str:
    """Return the kind of what joins the ranks, as tables call it."""
    used = {link for greeting in system.greetings for link in greeting["links"].values()}
    return "shm" if used == {"shm"} else "mixed" if "shm" in used else "tcp"


# --- text -------------------------------------------------------------------------------------------------------------------------------


def report(found: Sequence[Found], table: Table) -> str:
    """Return what was measured; the choice of the table, which may be another than the fastest at a size, has a star."""
    lines = [f"# {table.about}", *host.lines(), "# median us, blocking calls, out of place; *: the choice"]
    for each in found:
        lines.append(f"#\n# {each.row}: {_rule(each.rule)}")
        lines.append(f"# {'bytes':>12}" + "".join(f"  {name:>13} " for name in each.seconds))
        for index, nbytes in enumerate(each.sizes):
            choice = next(name for most, name in each.rule if nbytes <= most)
            cells = (f"  {times[index] * 1e6:13.2f}{'*' if name == choice else ' '}" for name, times in each.seconds.items())
            lines.append(f"  {nbytes:>12}" + "".join(cells))
    return "\n".join(lines)


def as_json(found: Sequence[Found], table: Table) -> dict[str, Any]:
    """Return the table, and what was measured: times in seconds per algorithm, in the order of the sizes."""
    rows = {each.row: {"bytes": each.sizes, "seconds": each.seconds, "ratios": each.ratios, "wrong": sum(each.wrong)} for each in found}
    return {"table": table.document(), "about": table.about, "host": host.facts(), "measured": rows}


def in_force(path: str | None) -> tuple[Table, str]:
    """Return the complete table of a file, or the one that rank 0 of a job would bring along from here, and where it comes from.

    Raises:
        ConfigError: the file holds no table.
    """
    if path is not None:
        return tuning.read(path, path).over(tuning.shipped()), path
    tuned = config.tuned()
    return (tuning.shipped(), "shipped with rt") if tuned is None else (tuned, f"RT_TUNING {os.environ['RT_TUNING']}")


def show(table: Table, source: str) -> str:
    """Return a table for people."""
    lines = [f"# {source}, fingerprint {table.fingerprint}", f"# {'collective':<15}  {'links':<5}  {'ranks':<10}  algorithm"]
    for collective, by_links in table.rules.items():
        for links, by_ranks in by_links.items():
            least = 2
            for ranks, rule in sorted(by_ranks.items()):
                span = f"{least} and more" if ranks == max(by_ranks) else f"{least} to {ranks}" if least < ranks else f"{ranks}"
                least = ranks + 1
                lines.append(f"  {collective:<15}  {links:<5}  {span:<10}  {_rule(rule)}")
    return "\n".join(lines)


def _rule(rule: Rule) -> str:
    if len(rule) == 1:
        return rule[0][1]
    return ", ".join(f"above {name}" if most == math.inf else f"up to {show_bytes(int(most))} {name}" for most, name in rule)
