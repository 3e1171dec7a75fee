"""The tables of the OSU micro-benchmarks and of gloo's benchmark, for those who read them every day.

May live here: those two forms. May not: nccl-tests' (``nccl.py``), measuring. Both show rt's first front end, out of place.
Sources: ``print_preamble`` and ``print_stats`` of OSU's ``osu_util_mpi.c``; ``printHeader`` and ``printDistribution`` of gloo's
``benchmark/runner.cc``.
"""

from __future__ import annotations

from statistics import fmean

from bench.measure import Result
from bench.nccl import rows, version, wrong
from bench.samples import Cell

_FIELD = 20
_S, _M, _L = 11, 13, 19  # gloo's widths of columns
_TOTAL = 6 * _S + _M + _L


def osu(result: Result, *, stats: bool) -> list[str]:
    """Return OSU's two columns; with ``stats`` those of its option -f as well.

    Its size is what one rank contributes for one other: the block where buffers hold a block per rank, but the whole input where
    something is reduced. Its time is a mean, here of the slowest rank's.
    """
    options = result.options
    lines = ["", f"# OSU MPI-style {options.collective.title} Latency Test v{version()}"]
    more = f"{'Min Latency(us)':>{_FIELD}}{'Max Latency(us)':>{_FIELD}}{'Iterations':>12}" if stats else ""
    moves = options.collective.moves
    lines.append((f"{'# Size':<10}{'Avg Latency(us)':>{_FIELD}}" if moves else "# Avg Latency(us)") + more)
    for row in rows(result):
        samples = row.cells["out_of_place"].samples
        items = options.collective.items(row.count, options.size)[0] if options.collective.reduces else row.count
        mean = fmean(samples) * 1e6
        line = f"{items * options.itemsize:<10}{mean:{_FIELD}.2f}" if moves else f"{mean:17.2f}"
        spread = f"{min(samples) * 1e6:{_FIELD}.2f}{max(samples) * 1e6:{_FIELD}.2f}{len(samples):12}" if stats else ""
        lines.append(line + spread)
    return [*lines, *_complaint(result)]


def gloo(result: Result) -> list[str]:
    """Return the table of gloo's benchmark: distribution in whole us, bandwidth in GB/s of 2**30."""
    options = result.options
    line, half = "=" * (_TOTAL + 2), _TOTAL // 2
    name, title = options.collective.name, "BENCHMARK RESULTS"
    links = {found.split()[0] for greeting in result.greetings[result.main] for found in greeting["links"].values()}
    uses = f"{' and '.join(sorted(links)) or 'unknown'}, {result.main}"
    columns = ("size (B)", "elements", "min (us)", "p50 (us)", "p99 (us)", "max (us)")
    head = "".join(f"{column:>{_S}}" for column in columns) + f"{'bandwidth (GB/s)':>{_L}}{'iterations':>{_M}}"
    return [
        line,
        f"{name.upper():>{half + len(name) // 2}}",
        "",
        f"{'Device:':<{_M}}{uses}",
        f"{'Options:':<{_M}}processes={options.size}, inputs=1, threads=1, verify={str(options.check).lower()}",
        "",
        line,
        f"{title:>{half + len(title) // 2}}",
        "",
        head,
        *(_gloo_line(options.nbytes(row.count), options.itemsize, row.cells["out_of_place"]) for row in rows(result)),
        "",
        line,
        *_complaint(result),
    ]


def _gloo_line(nbytes: int, itemsize: int, cell: Cell) -> str:
    spread, samples = cell.spread(), cell.samples
    times = (spread.least, spread.p50, spread.p99, spread.most)
    speed = nbytes * len(samples) / sum(samples) / (1 << 30)
    start = f"{nbytes:{_S}}{nbytes // itemsize:{_S}}" + "".join(f"{int(time * 1e6):{_S}}" for time in times)
    return f"{start}{speed:{_L}.3f}{len(samples):{_M}}"


def _complaint(result: Result) -> list[str]:
    return [f"# {wrong(result)} wrong elements"] if wrong(result) else []
