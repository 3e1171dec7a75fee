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
            took = {way: median(map(max, zip(*(answer[way] for answer in answers), strict=True))) for way in ("one", "fused", "average")}
            rows.append({"front": front, "ranks": size, "arrays": arrays, "bytes": nbytes, **took, **system.uses})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    first = rows[0]
    lines = [
        f"# {first['arrays']} float32 arrays of {first['bytes']} bytes over {first['ranks']} ranks, median us; ratio: one by one over it",
        *host.lines(),
        f"# {'front end':<16}  {'one by one':>10}  {'all_sum(list)':>13}  {'ratio':>6}  {'average_gradients':>17}  {'ratio':>6}",
    ]
    for row in rows:
        front = f"{row['front']} ({row['loop']})" if "loop" in row else row["front"]
        fused, average = (f"{row['one'] / row[way]:>6.1f}" for way in ("fused", "average"))
        times = (row[way] * 1e6 for way in ("one", "fused", "average"))
        one, together, gradients = (round(each) for each in times)
        lines.append(f"  {front:<16}  {one:>10}  {together:>13}  {fused}  {gradients:>17}  {average}")
    return "\n".join(lines)
