"""``rt.bench import``: how long ``import rt`` takes in a fresh interpreter.

May live here: that measurement and its table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from bench import host
from bench.meeting import ROOT

REPEATS = 9
_EMPTY = "pass"
STATEMENTS = ("import rt", "import numpy")


def run(repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Time each statement in ``repeats`` fresh interpreters, less what one that imports nothing takes; return one row each.

    Raises:
        subprocess.CalledProcessError: a statement failed; what Python said is on standard error.
    """
    for statement in STATEMENTS:
        _seconds(statement)  # compiles what is not compiled yet and fills the file cache
    rounds = [{statement: _seconds(statement) for statement in (_EMPTY, *STATEMENTS)} for _ in range(repeats)]
    return [{"statement": statement, "seconds": median(took[statement] - took[_EMPTY] for took in rounds)} for statement in STATEMENTS]


def _seconds(statement: str) -> float:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", statement], check=True, env={**os.environ, "PYTHONPATH": path})
    return time.perf_counter() - start


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [f"# Wall time in a fresh interpreter, median of {REPEATS}, less that of one that imports nothing", *host.lines()]
    lines += [f"  {row['statement']:<16}  {row['seconds'] * 1e3:>8.1f} ms" for row in rows]
    return "\n".join(lines)
