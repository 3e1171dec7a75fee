"""Time over size, drawn: ``rt.bench COLLECTIVE --plot F.png``.

May live here: the picture. May not: an import of this file where nothing is drawn, since it needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.measure import Result
from bench.meeting import BenchError

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ImportError as error:
    raise BenchError(f"--plot needs matplotlib ({error}); pip install rt-collectives[bench]") from None

_INCHES = (9.0, 5.0)
_MARKS = "osD^vPX*"


def check(path: str) -> None:
    """Raise ArgumentTypeError if a file's name ends in no kind of picture."""
    kinds = Figure().canvas.get_supported_filetypes()
    if (found := Path(path).suffix[1:]) and found.lower() not in kinds:
        raise argparse.ArgumentTypeError(f"--plot {path}: found a name that ends in .{found}, expected one of {', '.join(sorted(kinds))}")


def draw(result: Result, path: Path) -> None:
    """Write the picture: one line per system, dotted where every call makes its result."""
    options = result.options
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    sizes = [options.nbytes(row.count) for row in result.rows[result.main]]
    marks = dict(zip(options.systems, _MARKS, strict=False))
    for name in options.systems:
        ours = name not in options.peers
        for place, label in (("out_of_place", name), ("fresh", f"{name} (no out=)")):
            if all(place in row.cells for row in result.rows[name]):
                times = [row.cells[place].seconds * 1e6 for row in result.rows[name]]
                style = ":" if place == "fresh" else "-" if ours else "--"
                axes.plot(sizes, times, style, marker=marks[name], markersize=4, label=label, color=f"C{options.systems.index(name)}")
    if options.collective.moves:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary(value)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("size (bytes)")
    axes.set_ylabel("median time (us)")
    dtype = f" of {options.dtype}" if options.collective.moves else ""
    hosts = len({greeting["host"] for greeting in result.greetings[result.main]})
    where = "one host" if hosts == 1 else f"{hosts} hosts"
    axes.set_title(f"{options.collective.name}{dtype}, {options.size} ranks on {where}")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper")  # beside the lines, not over them
    figure.savefig(path, dpi=150)


def binary(nbytes: float) -> str:
    """Return a size as people say it: 64 KiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes:g} B"
