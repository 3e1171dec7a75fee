"""Ranks on hosts: what the tests over real networks share.

May live here: starting ranks and programs on hosts, the ring files they are given. May not: making the hosts (``netns``), tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import netns
import pytest
from ranks import Ranks

# The marks of tests that make hosts.
NEEDED = [pytest.mark.namespaces, pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")]
PATIENCE = 30.0
PORT = 5000  # nobody else lives on these hosts
ROOT = str(Path(__file__).parents[1])
Ring = list[list[str]]


def ring_as_mlx_writes_it(size: int) -> Ring:
    """Per rank the address that faces its left neighbour."""
    return [[f"10.0.{(rank - 1) % size}.2:{PORT}"] for rank in range(size)]


def ring_file(folder: Path, ring: Ring) -> str:
    """Write a ring file and return its path."""
    path = folder / "ring.json"
    path.write_text(json.dumps(ring))
    return str(path)


def ranks_on(
    hosts: Sequence[netns.Host], body: Callable[..., Any], ring: str, *, front: str = "sync", args: Sequence[Any] = (), **env: str
) -> Ranks:
    """One rank per host, with nothing but the ring file ``ring``; the job's secret comes with the harness."""
    where: dict[str, str | None] = {"RT_HOSTFILE": ring, "RT_WORLD_SIZE": None, "RT_COORDINATOR": None, "RT_COORDINATOR_FD": None}
    return Ranks(len(hosts), body, front=front, args=args, env={**where, **env}, on=[host.command() for host in hosts])


# --- programs instead of bodies, where the environment is the matter ------------------------------------------------------------------

PROGRAM = """
import numpy as np
import rt.sync as rt
group = rt.init()
total = rt.all_sum(np.full(4 << 20, group.rank() + 1.0, np.float32))
print(" ".join(["sum", *map(str, np.unique(total)), "of", str(group.size())]))  # one write: MPICH mixes those of several ranks
"""


def start(host: netns.Host, **env: str) -> subprocess.Popen[str]:
    """Start PROGRAM with exactly these variables of ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RT_", "MLX_"))}
    command, pipe = host.command(sys.executable, "-c", PROGRAM), subprocess.PIPE
    env = {**inherited, "PYTHONPATH": ROOT, **env}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def ends(processes: Sequence[subprocess.Popen[str]], patience: float = PATIENCE) -> list[tuple[int, str, str]]:
    """Exit status, output and error output of each."""
    try:
        return [(process.returncode, *said) for process, said in [(each, each.communicate(timeout=patience)) for each in processes]]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def last_line(text: str) -> str:
    return (text.splitlines() or [""])[-1]
