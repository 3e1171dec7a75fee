"""``rt.bench loop_lag``: how late a 1 ms timer fires on an event loop whose program is reducing.

May live here: which scenes are watched, and the table. May not: what ranks do in a scene (``probe.py``).
"""

from __future__ import annotations

from typing import Any

from bench import host
from bench.conductor import PROBE, running

SMALL_SECONDS = 3.0
BASELINE_SECONDS = 1.0
SMALL_BYTES = 16


def loops() -> list[str]:
    """Return the loops to watch: uvloop where it is installed, and asyncio's own."""
    return (["uvloop"] if host.facts()["uvloop"] != "not installed" else []) + ["asyncio"]


def run(size: int, nbytes: int, small_seconds: float = SMALL_SECONDS) -> list[dict[str, Any]]:
    """Watch rank 0's loop; return one row per loop and scene.

    Args:
        size: number of ranks.
        nbytes: bytes of the large all-reduce; each rank holds twice as many.
        small_seconds: how long small all-reduces are awaited in a tight loop.

    Raises:
        BenchError: the group could not be started or broke.
    """
    scenes: list[dict[str, Any]] = [
        {"scene": "baseline", "bytes": 0, "seconds": min(BASELINE_SECONDS, small_seconds)},
        {"scene": "busy", "bytes": 0, "seconds": min(BASELINE_SECONDS, small_seconds)},
        {"scene": "large", "bytes": nbytes, "seconds": small_seconds},  # again and again: one call is too short for a 99th percentile
        {"scene": "small", "bytes": SMALL_BYTES, "seconds": small_seconds},
    ]
    rows = []
    for loop in loops():
        with running(f"rt async on {loop}", "rt", size, [*PROBE, "async", loop]) as system:
            for scene in scenes:
                rows.append({"loop": system.uses["loop"], **scene, **system.ask({"do": "lag", **scene})[0]})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "# How late a 1 ms timer fires on rank 0's loop, in us",
        *host.lines(),
        f"# {'loop':<16}  {'while':<37}  {'fired':>7}  {'p50':>9}  {'p99':>9}  {'max':>9}",
    ]
    for row in rows:
        late = "".join(f"  {'-' if row[key] is None else round(row[key]):>9}" for key in ("p50_us", "p99_us", "max_us"))
        lines.append(f"  {row['loop']:<16}  {_describe(row):<37}  {row['fired']:>7}{late}")
    return "\n".join(lines)


def _describe(row: dict[str, Any]) -> str:
    if row["scene"] == "large":
        return f"{row['calls']} all_reduce of {row['bytes'] / 2**20:.0f} MiB, {row['took']:.2f} s"
    if row["scene"] == "small":
        return f"{row['calls']} all_reduce of {row['bytes']} bytes, awaited"
    if row["scene"] == "busy":
        return "turns of 0.3 ms without rt (the host)"
    return "nothing (the timer itself)"
