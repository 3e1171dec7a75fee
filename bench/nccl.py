"""nccl-tests' text and JSON, of rt's first front end: people have scripts that read them.

May live here: that form, to the last column and key, and the bandwidths it shows. May not: lines of our own (``report.py``), measuring.

The form is that of nccl-tests 2.19 (https://github.com/NVIDIA/nccl-tests, ``src/util.cu``). Times are in us, bandwidths in GB/s of 1e9.
What it prints of GPUs holds for the ranks' processors: a rank is a device of its host. ``iters: 0`` stands for "as many as fit the time".
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from typing import Any

from bench.measure import Result, Row
from bench.samples import Cell

_PLACES = ("out_of_place", "in_place")  # as its JSON calls them
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def bandwidths(result: Result, count: int, seconds: float) -> tuple[float, float]:
    """Return algorithm and bus bandwidth in GB/s."""
    algorithm = result.options.nbytes(count) / seconds / 1e9
    return algorithm, algorithm * result.options.collective.factor(result.options.size)


def average_busbw(results: Sequence[Result]) -> float:
    """Return the mean bus bandwidth over everything in the table."""
    cells = [(result, row.count, row.cells[place]) for result in results for row in rows(result) for place in _PLACES if place in row.cells]
    return sum(bandwidths(result, count, cell.seconds)[1] for result, count, cell in cells) / len(cells)


def rows(result: Result) -> list[Row]:
    """Return the rows that the table shows."""
    return result.rows[result.main]


def wrong(result: Result) -> int:
    """Return the number of wrong elements in the table."""
    return sum(row.cells[place].wrong or 0 for row in rows(result) for place in _PLACES if place in row.cells)


def number(value: float, width: int) -> str:
    """Return ``value`` in ``width`` columns with two decimals, or as many as fit."""
    shown = (f"{value:{width}.{decimals}f}" for decimals in (2, 1, 0))
    return next((text for text in shown if len(text) <= width), f"{value:{width}.{int(width >= 7)}e}")


# -- text


def text(results: Sequence[Result], notes: list[str], *, stats: bool, target: str | None) -> list[str]:
    """Return the lines of nccl-tests, with the rows of all results.

    They differ in dtype and operator alone. ``notes`` are comments to put into the header, ``target`` a JSON file that is written besides.
    """
    result, count = results[0], sum(map(wrong, results))
    program = result.options.collective.program
    return [
        *([f"# Writing JSON output to {target}"] if target else []),
        f"# rt.bench version {version()}, in the form of nccl-tests",
        f"# Collective test starting: {program}",
        _config_line(result),
        *(["# Per-Iteration Report: clock of the process; i_* uses max over process rows "] if stats else []),
        *notes,
        "#",
        "# Using devices",
        *(_device_line(device) for device in devices(result)),
        "#",
        *(_titles_with_stats() if stats else _titles()),
        *(_line(each, row, stats) for each in results for row in rows(each)),
        f"# {'Out of bounds values':<20} : {count} {'FAILED' if count else 'OK'}",
        f"# {'Avg bus bandwidth':<20} : {average_busbw(results):g} ",
        "#",
        f"# Collective test concluded: {program}",
        "#",
    ]


def version() -> str:
    """Return the version of rt."""
    try:
        return metadata.version("rt-collectives")
    except metadata.PackageNotFoundError:
        return "unknown"


def _config_line(result: Result) -> str:
    options = result.options
    step = f"{options.factor}(factor)" if options.step_bytes is None else f"{options.step_bytes}(bytes)"
    return (
        f"# nThread 1 nGpus 0 minBytes {options.min_bytes} maxBytes {options.max_bytes} step: {step} warmup iters: {options.warmup} "
        f"iters: {options.iters or 0} agg iters: 1 validation: {int(options.check)} graph: 0 unalign: 0"
    )


def devices(result: Result) -> list[dict[str, Any]]:
    """Return what the header says of each rank; its device is the how manyth rank of its host it is."""
    seen: Counter[str] = Counter()
    found = []
    for rank, greeting in enumerate(result.greetings[result.main]):
        where = greeting["host"]
        found.append(
            {
                "rank": rank, "group": 0, "pid": greeting["pid"], "hostname": where, "device": seen[where], "device_hex": "cpu",
                "device_info": greeting["cpu"],
            }
        )  # fmt: skip
        seen[where] += 1
    return found


def _device_line(device: dict[str, Any]) -> str:
    start = f"#  Rank {device['rank']:2} Group {device['group']:2} Pid {device['pid']:6} on {device['hostname']:>10} "
    return f"{start}device {device['device']:2} [{device['device_hex']}] {device['device_info']}"


_BLANK = f"# {'':>10}  {'':>12}  {'':>8}  {'':>6}  {'':>6}"
_NAMES = f"# {'size':>10}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}"
_UNITS = f"# {'(B)':>10}  {'(elements)':>12}  {'':>8}  {'':>6}  {'':>6}"
_HALF_NAMES = f"  {'time':>7}  {'algbw':>6}  {'busbw':>6}  {'#wrong':>6}"
_HALF_UNITS = f"  {'(us)':>7}  {'(GB/s)':>6}  {'(GB/s)':>6}  {'':>6}"
_STATS_NAMES = f"  {'i_min':>7}  {'i_max':>7}  {'i_p99':>7}  {'i_cv%':>7}"
_STATS_UNITS = f"  {'(us)':>7}  {'(us)':>7}  {'(us)':>7}  {'(%)':>7}"


def _titles() -> list[str]:
    over = f"{_BLANK}{'':11}out-of-place{'':23}in-place{'':10}"
    return [over, f"{_NAMES}{_HALF_NAMES * 2} ", f"{_UNITS}{_HALF_UNITS * 2} "]


def _titles_with_stats() -> list[str]:
    over = f"{_BLANK}{'':14}out-of-place (+ per-iteration){'':32}in-place (+ per-iteration)"
    return [over, f"{_NAMES}{(_HALF_NAMES + _STATS_NAMES) * 2} ", f"{_UNITS}{(_HALF_UNITS + _STATS_UNITS) * 2} "]


def _line(result: Result, row: Row, stats: bool) -> str:
    kind, operator, root = _columns(result)
    start = f"{result.options.nbytes(row.count):>12}  {row.count:>12}  {kind:>8}  {operator:>6}  {root:>6}"
    return start + "".join(_half(result, row.count, row.cells.get(place), stats) for place in _PLACES)


def _columns(result: Result) -> tuple[str, str, str]:
    """Return type, operator and root as every row shows them."""
    options = result.options
    return options.dtype, redop(result), f"{options.root if options.collective.rooted else -1:6}"


def redop(result: Result) -> str:
    """Return the operator as nccl-tests calls it, "none" where nothing is reduced."""
    return result.options.op if result.options.collective.reduces else "none"


def _half(result: Result, count: int, cell: Cell | None, stats: bool) -> str:
    if cell is None:
        return f"  {'N/A':>7}  {'N/A':>6}  {'N/A':>6}    N/A" + f"  {'N/A':>7}" * (4 if stats else 0)
    algbw, busbw = bandwidths(result, count, cell.seconds)
    found = "    N/A" if cell.wrong is None else f"  {cell.wrong:6g}"  # a column less: as there
    half = f"  {number(cell.seconds * 1e6, 7)}  {number(algbw, 6)}  {number(busbw, 6)}{found}"
    if not stats:
        return half
    spread = cell.spread()
    return half + "".join(f"  {number(value, 7)}" for value in (spread.least * 1e6, spread.most * 1e6, spread.p99 * 1e6, spread.cv * 100))


# -- JSON


def as_json(results: Sequence[Result], started: datetime, *, stats: bool) -> dict[str, Any]:
    """Return nccl-tests' document, with its types: roots and truth values are strings there."""
    options, count = results[0].options, sum(map(wrong, results))
    step = {"step_factor": options.factor} if options.step_bytes is None else {"step_bytes": options.step_bytes}
    return {
        "version": 3,
        "start_time": started.strftime(_TIME_FORMAT),
        "args": sys.argv,
        "env": [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("RT_") and "SECRET" not in name],
        "nccl_version": 0,
        "config": {
            "nthreads": 1,
            "ngpus": 0,
            "minimum_bytes": options.min_bytes,
            "maximum_bytes": options.max_bytes,
            **step,
            "warmup_iters": options.warmup,
            "iterations": options.iters or 0,
            "aggregated_iterations": 1,
            "validation": int(options.check),
            "graph": 0,
            "blocking_collectives": "false",
            "per_iter_timing": _truth(stats),
            "per_iter_skip": 0,
            "parallel_init": "false",
            "devices": devices(results[0]),
        },
        "results": [result_json(result, row, stats=stats) for result in results for row in rows(result)],
        "out_of_bounds": {"count": count, "okay": _truth(count == 0)},
        "average_bus_bandwidth": {"bandwidth": average_busbw(results), "okay": "unchecked"},
        "errors": [],
        "end_time": datetime.now().strftime(_TIME_FORMAT),
    }


def result_json(result: Result, row: Row, *, stats: bool) -> dict[str, Any]:
    """Return one row as an entry of ``results``."""
    kind, operator, root = _columns(result)
    halves: dict[str, Any] = {}
    for place in _PLACES:
        cell = row.cells.get(place)
        halves[place] = None if cell is None else cell_json(result, row.count, cell)
        if stats and cell is not None:
            halves[f"{place}_per_iter"] = _per_iter(cell)
    return {
        "size": result.options.nbytes(row.count), "count": row.count, "type": kind, "redop": operator, "root": root, **halves,
        "actual_iterations": max(len(cell.samples) for cell in row.cells.values()), "experiment_name": "",
    }  # fmt: skip


def cell_json(result: Result, count: int, cell: Cell) -> dict[str, Any]:
    """Return what one place of a row shows."""
    algbw, busbw = bandwidths(result, count, cell.seconds)
    return {"time": cell.seconds * 1e6, "alg_bw": algbw, "bus_bw": busbw, "nwrong": None if cell.wrong is None else float(cell.wrong)}


def _per_iter(cell: Cell) -> dict[str, Any]:
    spread = cell.spread()
    return {
        "skipped_iterations": 0,
        "min_us": spread.least * 1e6,
        "max_us": spread.most * 1e6,
        "avg_us": spread.mean * 1e6,
        "p50_us": spread.p50 * 1e6,
        "p95_us": spread.p95 * 1e6,
        "p99_us": spread.p99 * 1e6,
        "stdev_us": spread.stdev * 1e6,
        "cv_pct": spread.cv * 100,
        "times_us": [sample * 1e6 for sample in cell.samples],
        "per_process_max_times_us": [[sample * 1e6 for sample in samples] for samples in cell.of_ranks],
    }


def _truth(value: bool) -> str:
    return "true" if value else "false"
