"""``rt.bench fused``: what one call for many small arrays saves.

May live here: which arrays are reduced, and the table. May not: what ranks do (``probe.py``).
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import host
from bench.conductor import PROBE, running

ARRAYS = 200
BYTES = 1024
REPEATS = 50
WAYS = {"one": "one by one", "fused": "all_sum(list)", "in_place": "with out=list", "average": "average_gradients"}


def run(size: int, arrays: int = ARRAYS, nbytes: int = BYTES, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Reduce the same arrays one by one, in one call and as gradients, in turns; return one row per front end, times in seconds.

    Raises:
        BenchError: the group could not be started or broke.
    """
    rows = []
    for front in ("sync", "async"):
        with running(f"rt {front}", "rt", size, [*PROBE, front, "auto"]) as system:
            answers = system.ask({"do": "fused", "arrays": arrays, "bytes": nbytes, "repeats": repeats})
            # Ranks start together; the slowest counts, as in all_reduce.
            took = {way: median(map(max, zip(*(answer[way] for answer in answers), strict=True))) for way in WAYS}
            rows.append({"front": front, "ranks": size, "arrays": arrays, "bytes": nbytes, **took, **system.uses})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    first = rows[0]
    lines = [
        f"# {first['arrays']} float32 arrays of {first['bytes']} bytes over {first['ranks']} ranks, median us; ratio: one by one over it",
        *host.lines(),
        f"# {'front end':<16}  {WAYS['one']:>10}" + "".join(f"  {WAYS[way]:>17}  {'ratio':>6}" for way in list(WAYS)[1:]),
    ]
    for row in rows:
        front = f"{row['front']} ({row['loop']})" if "loop" in row else row["front"]
        cells = "".join(f"  {round(row[way] * 1e6):>17}  {row['one'] / row[way]:>6.1f}" for way in list(WAYS)[1:])
        lines.append(f"  {front:<16}  {round(row['one'] * 1e6):>10}{cells}")
    return "\n".join(lines)
