"""``rt.bench simulate --plot F.png``: time over size, and which algorithm is best over hosts and sizes.

May live here: the picture. May not: an import of this file where nothing is drawn, since it needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.meeting import BenchError
from bench.plot import binary
from bench.simulate import Options

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise BenchError(f"--plot needs matplotlib ({error}); pip install rt-collectives[bench]") from None

_INCHES = (13.0, 5.5)


def draw(options: Options, columns: list[tuple[int, list[dict[str, Any]]]], path: Path) -> None:
    """Write the picture; ``columns`` are numbers of hosts and their rows, the last those of the machine asked for."""
    figure = Figure(figsize=_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    model, names, rows = options.machine, options.algorithms, columns[-1][1]
    for index, name in enumerate(names):
        points = [(row["bytes"], row["times"][name] * 1e6) for row in rows if row["times"][name] is not None]
        left.plot(*zip(*points, strict=True) if points else ((), ()), "o-", markersize=4, label=name, color=f"C{index}")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(options.sizes, [binary(nbytes) for nbytes in options.sizes], rotation=60)
    left.set_xlabel("size (bytes)")
    left.set_ylabel("simulated time (us)")
    left.set_title(f"{options.collective}, {model.hosts} hosts x {model.ranks_per_host} ranks")
    left.grid(True, which="major", alpha=0.3)
    for x, (_, column) in enumerate(columns):
        for y, row in enumerate(column):
            if row["best"]:
                color = f"C{list(names).index(row['best'])}"
                right.fill((x - 0.5, x + 0.5, x + 0.5, x - 0.5), (y - 0.5, y - 0.5, y + 0.5, y + 0.5), color=color, alpha=0.6)
                right.text(x, y, f"{row['times'][row['best']] * 1e6:.3g}", ha="center", va="center", fontsize=7)
    right.set_xticks(range(len(columns)), [str(hosts) for hosts, _ in columns])
    right.set_yticks(range(len(rows)), [binary(row["bytes"]) for row in rows])
    right.set_xlabel("hosts")
    right.set_title("the best, and its time (us)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=150)
