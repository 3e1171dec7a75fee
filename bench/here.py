"""``rt.bench simulate --here``: the model held against real all-reduces on this host, with this host's numbers.

May live here: which numbers are measured, the model made of them, both times side by side. May not: the streams (``streams.py``), the model
(``simulator.py``), how collectives are timed (``measure.py``).

Nothing of ``rt`` is used to foretell large sizes: copies and additions are timed with arrays of the same size while the other ranks do
the same. Only what a call of 4 bytes takes, which is Python's and the engine's start and end, is taken from a real call.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from bench import host, measure
from bench.collectives import COLLECTIVES
from bench.conductor import RANK, System, running
from bench.fold import ITEMSIZE, seconds
from bench.measure import progress
from bench.simulate import ALGORITHMS
from bench.simulator import Link, Machine
from transports.shm import ring_bytes

_SMALL_BYTES = 4
_FRONT = "rt sync"
# What streams do not show, because they are long: seconds per frame, and until the other side sees it. A window of TCP is the kernel's.
_FIXED = {
    "shm": {"latency": 0.2e-6, "frame": 0.2e-6, "piece": 1 << 15},
    "tcp": {"latency": 3e-6, "frame": 1e-6, "piece": 1 << 16, "window": 4 << 20},
}
_WAKE_SECONDS = 2e-6


def run(ranks: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Measure, foretell and compare; return what was found: of every round the rates and both times, in seconds.

    Raises:
        BenchError: a rank broke.
    """
    rows = []
    with running("streams", "tcp", ranks, ["-m", "bench.streams"]) as streams, running(_FRONT, "rt", ranks, [*RANK, _FRONT]) as ours:
        kind = str(next(iter(ours.greetings[0]["links"].values()))).split()[0]
        small = _lane(ours, _SMALL_BYTES)
        small.warm_up()
        for nbytes in sizes:
            progress(f"measuring {nbytes} bytes")
            rows.append(_size(streams, small, _lane(ours, nbytes), kind, nbytes))
    progress("")
    return {"ranks": ranks, "links": kind, "host": host.facts(), "rows": rows}


def _lane(system: System, nbytes: int) -> measure.Lane:
    options = measure.Options(COLLECTIVES["all_reduce"], system.size, nbytes, nbytes, check=False)
    return measure.Lane(system, nbytes // ITEMSIZE, "out_of_place", options)


def _size(streams: System, small: measure.Lane, lane: measure.Lane, kind: str, nbytes: int) -> dict[str, Any]:
    """Take a size: in every round a call of 4 bytes, the streams, and the real thing, one after the other."""
    lane.warm_up()
    rounds = []
    for index in range(measure.ROUNDS):
        small.turn(index)
        rates = stream(streams, kind, nbytes)
        lane.turn(index)
        found = small.cell(), lane.cell()
        call, measured = (median(cell.round(len(cell.rounds) - 1)) for cell in found)
        model = foretold(kind, streams.size, nbytes, lane.algorithm, rates, call)
        rounds.append({**rates, "call": call, "modelled": model, "measured": measured, "ratio": model / measured})
    return {"bytes": nbytes, "algorithm": lane.algorithm, "rounds": rounds}


def stream(streams: System, kind: str, nbytes: int) -> dict[str, float]:
    """Return what a byte costs a core: to send, to receive, to receive and reduce."""
    command = {"do": "stream", "link": kind, "memory": streams.greetings[0]["memory"], "bytes": nbytes}
    answers = streams.ask({**command, "crowded": streams.size > host.cores()})
    return {what: fmean(answer[what] for answer in answers) for what in ("send", "receive", "reduce")}


def machine(kind: str, ranks: int, rates: dict[str, float]) -> Machine:
    """Describe this host."""
    known: dict[str, Any] = {"window": ring_bytes(ranks, 1), **_FIXED[kind], **rates}
    link = Link(**known)
    return Machine(1, ranks, host.cores(), 1.0, link, link, _WAKE_SECONDS)


def foretold(kind: str, ranks: int, nbytes: int, algorithm: str | None, rates: dict[str, float], call: float) -> float:
    """Return the seconds that the model gives an all-reduce, if one of 4 bytes takes ``call``."""
    bare = machine(kind, ranks, rates)
    known = ALGORITHMS["all_reduce"]
    small = seconds(known["doubling"], bare, _SMALL_BYTES // ITEMSIZE)
    found = seconds(known[algorithm or ""], bare, nbytes // ITEMSIZE)
    assert small is not None and found is not None  # few ranks are all simulated
    return found.seconds + max(0.0, call - small.seconds)


def text(found: dict[str, Any]) -> str:
    """Return the table: medians over the rounds, and the rounds' least and largest ratio."""
    lines = [
        f"# all_reduce of float32 on this host, {found['ranks']} ranks, blocking, over {found['links']}: modelled and measured, us",
        *host.lines(),
        f"# ratio: modelled over measured, the median of {measure.ROUNDS} rounds and their range; a core's GB/s while the others are busy",
        f"# {'size (B)':>12}  {'algorithm':>10}  {'modelled':>10}  {'measured':>10}  {'ratio':>6}  {'range':>11}  "
        f"{'send':>6}  {'receive':>7}  {'reduce':>6}",
    ]
    for row in found["rows"]:
        middle = {key: median(each[key] for each in row["rounds"]) for key in row["rounds"][0]}
        ratios = [each["ratio"] for each in row["rounds"]]
        lines.append(
            f"  {row['bytes']:>12}  {row['algorithm']:>10}  {middle['modelled'] * 1e6:>10.1f}  {middle['measured'] * 1e6:>10.1f}  "
            f"{middle['ratio']:>6.2f}  {f'{min(ratios):.2f}-{max(ratios):.2f}':>11}  {1 / middle['send'] / 1e9:>6.1f}  "
            f"{1 / middle['receive'] / 1e9:>7.1f}  {1 / middle['reduce'] / 1e9:>6.1f}"
        )
    return "\n".join(lines)
