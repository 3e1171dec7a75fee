"""Rank processes for tests of backend ``nccl``, over a stand-in for CuPy and NCCL.

May live here: starting such ranks. May not: assertions about collectives, the stand-in (``standin/cupy``).

Nothing that these ranks show has run on a GPU. Tests that need one are marked ``gpu`` (``test_gpu``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import Outcome, Ranks, succeeded
from ranks import run as run_ranks

STAND_IN = str(Path(__file__).parent / "standin")


def environment(**more: str | None) -> dict[str, str | None]:
    """Return what makes ranks take the stand-in for CuPy."""
    path = os.pathsep.join([STAND_IN, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "RT_BACKEND": "nccl", **more}


def ranks(n: int, body: Callable[..., Any], *, env: dict[str, str | None] | None = None, **how: Any) -> Ranks:
    """Return running ranks; ``how`` is for ``Ranks``."""
    return Ranks(n, body, env=environment(**(env or {})), **how)


def run(n: int, body: Callable[..., Any], *, env: dict[str, str | None] | None = None, **how: Any) -> list[Outcome]:
    """Run ``body`` on ``n`` ranks to the end and return how each ended."""
    return run_ranks(n, body, env=environment(**(env or {})), **how)


def results(n: int, body: Callable[..., Any], **how: Any) -> list[Any]:
    """As ``run``, for bodies that must succeed: return their values."""
    return succeeded(run(n, body, **how))


def to_device(items: Any) -> Any:
    """Copy an array to this rank's device."""
    return sys.modules["cupy"].asarray(items)
