"""``rt.bench idle``: how much CPU an open group costs while nothing moves.

May live here: which scenes are watched, and the table. May not: what ranks do in a scene (``probe.py``).
"""

from __future__ import annotations

from typing import Any

from bench import host
from bench.conductor import PROBE, running

SECONDS = 5.0
SCENES = {
    "nothing": "nothing posted",
    "ahead": "rank 0 awaits an all_reduce that rank 1 joins later",
    "broadcast": "the others wait in a broadcast from rank 0",
}


def run(size: int, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Let every scene pass for ``seconds`` in both front ends; return one row each, with every rank's share of a core.

    Raises:
        BenchError: the group could not be started or broke.
    """
    rows = []
    for front in ("sync", "async"):
        with running(f"rt {front}", "rt", size, [*PROBE, front, "auto"]) as system:
            for scene in SCENES:
                answers = system.ask({"do": "idle", "scene": scene, "seconds": seconds})
                shares = [answer["share"] for answer in answers]
                spent = max(answer["seconds"] for answer in answers)
                rows.append({"front": front, "scene": scene, "worst": max(shares), "shares": shares, "seconds": spent, **system.uses})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "# CPU that an open group costs while nothing moves: the worst rank, in % of a core",
        *host.lines(),
        f"# {'front end':<24}  {'what it waits for':<52}  {'seconds':>7}  {'% of a core':>11}",
    ]
    for row in rows:
        front = f"{row['front']} ({row['loop']})" if "loop" in row else row["front"]
        lines.append(f"  {front:<24}  {SCENES[row['scene']]:<52}  {row['seconds']:>7.1f}  {row['worst'] * 100:>11.3f}")
    return "\n".join(lines)
