"""What ``rt.bench COLLECTIVE`` prints and writes: a table people know, and what it has no place for.

May live here: which form is shown, and our own comments beside it: where it ran, all systems side by side, algorithms. May not: the
tables of others (``nccl.py``, ``formats.py``), measuring.

Every line of ours begins with ``#``, and none has the words by which readers of nccl-tests find their table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from bench import formats, host, nccl
from bench.collectives import PLACES
from bench.measure import ROUNDS, Result
from bench.samples import Cell

FORMATS = ("nccl", "osu", "gloo")
# Above this share of a core, a system that waits for its turn disturbs the one that is measured.
_BUSY = 0.05
_WIDTH = 13
_HEADINGS = {
    "out_of_place": "Out of place, into an array that is there already",
    "in_place": "In place",
    "fresh": "Without out=: every call makes its result",
}
_REMARKS = {
    "gloo": "gloo does this in place only: out of place its users copy first, and that is timed with it.",
    "mlx": "mlx returns an array of its own, from its cache of buffers; building the expression is part of the call.",
    "mpich": "mpich uses shared memory between ranks of a host, not TCP, and polls as long as it waits.",
    "openmpi": "openmpi uses shared memory between ranks of a host, not TCP, and polls as long as it waits.",
    "nospin": "nospin is the blocking front end of rt that sleeps at once instead of polling briefly.",
    "tcp": "tcp is no system: the bytes of an all-reduce passed round a ring by send and recv alone, nothing reduced.",
}


def text(results: Sequence[Result], shape: str = "nccl", *, stats: bool = False, target: str | None = None) -> str:
    """Return everything that is printed, in one of ``FORMATS``; only nccl-tests' has room for several dtypes and operators."""
    if shape == "osu":
        return "\n".join(formats.osu(results[0], stats=stats))
    if shape == "gloo":
        return "\n".join(formats.gloo(results[0]))
    ours = [line for result in results for line in (*_what(result, results), *side_by_side(result, stats=stats))]
    return "\n".join([*nccl.text(results, notes(results[0]), stats=stats, target=target), *ours, ""])


def _what(result: Result, results: Sequence[Result]) -> list[str]:
    """Return what is measured in the tables that follow, where there are others."""
    reduced = f" {result.options.op}" if result.options.collective.reduces else ""
    title = [f"# {result.options.dtype}{reduced}"] if len(results) > 1 else []
    return title if result is results[0] else ["#", *title]


def notes(result: Result) -> list[str]:
    """Return where and how it was measured, as comments."""
    options = result.options
    per_size = f"{options.iters} samples" if options.iters else "as many samples as fit 0.4 s"
    lines = [
        *_where(result),
        f"# load average {host.facts()['load']} on the host of rank 0",
        f"# this table: {result.main}; time: median over samples, the slowest rank counts; per size {per_size}, in {ROUNDS} rounds in "
        "turns between systems",
    ]
    for name in options.systems:
        uses = result.greetings[name][0]["uses"]
        lines.append(f"# {name}: {', '.join(f'{label} {value}' for label, value in uses.items())}")
    busy = {name: share for name, share in result.idle_shares.items() if share > _BUSY}
    return lines + [f"# warning: {name} used {share:.0%} of a core per rank between its turns" for name, share in busy.items()]


def _where(result: Result) -> list[str]:
    greetings = result.greetings[result.main]
    places: dict[tuple[str, str, str], list[int]] = {}
    for rank, greeting in enumerate(greetings):
        places.setdefault((greeting["host"], greeting["cpu"], greeting["kernel"]), []).append(rank)
    lines = [f"# host {name}: ranks {_list(ranks)}; {cpu}; {kernel}" for (name, cpu, kernel), ranks in places.items()]
    kinds: dict[str, list[str]] = {}
    for a, b in itertools.combinations(range(len(greetings)), 2):
        kind = greetings[a]["links"].get(str(b), "unknown").split()[0]
        local = greetings[a]["host"] == greetings[b]["host"] and kind == "tcp"
        kinds.setdefault("tcp within a host" if local else kind, []).append(f"{a}-{b}")
    return lines + [f"# links, {kind}: {'all pairs' if len(kinds) == 1 else _list(pairs)}" for kind, pairs in kinds.items()]


def _list(items: list[Any]) -> str:
    return " ".join(map(str, items))


def side_by_side(result: Result, *, stats: bool) -> list[str]:
    """Return the tables of all systems, and how many times longer than rt each peer takes."""
    options = result.options
    lines = ["# All systems: median us per size, and how many times longer a peer takes than rt (median over the rounds' ratios)."]
    remarks = {peer: _REMARKS[peer] for peer in options.peers if peer != "gloo" or "gloo" in options.collective.in_place}
    lines += [f"# {remark}" for remark in remarks.values()]
    for place in PLACES:
        systems = [name for name in options.systems if all(place in row.cells for row in result.rows[name])]
        if systems:
            lines += ["#", f"# {_HEADINGS[place]}.", *_comments(result, place, systems, _times)]
            if stats:
                lines += [f"# {_HEADINGS[place]}: p99, and standard deviation over mean.", *_comments(result, place, systems, _spreads)]
    wrong = {name: sum(cell.wrong or 0 for row in result.rows[name] for cell in row.cells.values()) for name in options.systems}
    return lines + [f"# warning: {name} returned {count} wrong elements" for name, count in wrong.items() if count]


_Cells = dict[str, Cell]  # by system


def _times(result: Result, cells: _Cells) -> dict[str, float]:
    """Return title -> number of one line: medians, then the peers' ratios."""
    fronts = [name for name in cells if name not in result.options.peers]
    peers = [name for name in cells if name in result.options.peers]
    ratios = {f"{peer}/{front.removeprefix('rt ')}": cells[peer].ratio(cells[front]) for peer in peers for front in fronts}
    return {**{f"{name} (us)": cell.seconds * 1e6 for name, cell in cells.items()}, **ratios}


def _spreads(result: Result, cells: _Cells) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, cell in cells.items():
        spread = cell.spread()
        numbers |= {f"{name} p99": spread.p99 * 1e6, f"{name} CV%": spread.cv * 100}
    return numbers


def _comments(result: Result, place: str, systems: list[str], compute: Callable[[Result, _Cells], dict[str, float]]) -> list[str]:
    lines: list[str] = []
    for index, row in enumerate(result.rows[result.main]):
        numbers = compute(result, {name: result.rows[name][index].cells[place] for name in systems})
        if not lines:
            lines.append(f"# {'size (B)':>12}" + "".join(f"  {title:>{_WIDTH}}" for title in numbers) + "  algorithm")
        shown = "".join(f"  {number:{_WIDTH}.2f}" for number in numbers.values())
        lines.append(f"# {result.options.nbytes(row.count):>12}{shown}  {row.algorithm}")
    return lines


def as_json(results: Sequence[Result], started: datetime, *, stats: bool = False) -> dict[str, Any]:
    """Return nccl-tests' document with one key more, ``rt``: the host, and per system everything that was measured of it."""
    return {**nccl.as_json(results, started, stats=stats), "rt": _ours(results)}


def _ours(results: Sequence[Result]) -> dict[str, Any]:
    result = results[0]
    return {
        "host": host.facts(),
        "collective": result.options.collective.name,
        "ranks": result.options.size,
        "systems": {
            name: {
                "uses": result.greetings[name][0]["uses"],
                "links": [greeting["links"] for greeting in result.greetings[name]],
                "idle_share": result.idle_shares[name],
                "results": [_row(each, name, index) for each in results for index in range(len(each.rows[name]))],
            }
            for name in result.options.systems
        },
    }


def _row(result: Result, name: str, index: int) -> dict[str, Any]:
    row = result.rows[name][index]
    fronts = [front for front in result.options.systems if front not in result.options.peers]
    places = {}
    for place, cell in row.cells.items():
        bases = {front: result.rows[front][index].cells.get(place) for front in fronts if front != name}
        spread = cell.spread()
        places[place] = {
            **nccl.cell_json(result, row.count, cell),
            "p99": spread.p99 * 1e6,
            "cv": spread.cv,
            "samples": len(cell.samples),
            "ratio": {front: cell.ratio(base) for front, base in bases.items() if base is not None},
        }
    what = {"size": result.options.nbytes(row.count), "count": row.count, "type": result.options.dtype, "redop": nccl.redop(result)}
    return {**what, "algorithm": row.algorithm, **places}
