"""Ranks of backend ``jaccl`` for the guest: forked from the test, because an import takes seconds there.

May live here: starting and ending them. May not: assertions about collectives.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import rt.choose
import rt.control
import rt.queue_pairs
import rt.sync  # noqa: F401  # all that ranks load, once, before the fork
from transports import verbs

if not verbs.missing():
    import pyverbs.addr
    import pyverbs.cq
    import pyverbs.mr
    import pyverbs.pd
    import pyverbs.qp
    import pyverbs.wr  # noqa: F401

_FORK = multiprocessing.get_context("fork")


def environment(size: int) -> dict[str, str]:
    """What tells ranks where to meet: a port that is free now, and a secret."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {"RT_BACKEND": "jaccl", "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"127.0.0.1:{port}", "RT_SECRET": secrets.token_hex(32)}


def start(
    size: int, body: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, without: tuple[str, ...] = ()
) -> tuple[list[BaseProcess], list[Connection]]:
    """Start ``body(rank, *args)`` in ``size`` processes, each with ``RT_RANK``; ``without`` names variables that they do not get."""
    told = {**environment(size), **(env or {})}
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = _FORK.Pipe()
        mine = {name: value for name, value in {**told, "RT_RANK": str(rank)}.items() if name not in without}
        process = _FORK.Process(target=_live, args=(theirs, body, rank, mine, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    return processes, ends


def _live(end: Connection, body: Callable[..., Any], rank: int, env: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    try:
        end.send((True, body(rank, *args)))
    except BaseException:
        end.send((False, f"rank {rank}: {traceback.format_exc()}"))


def collect(processes: list[BaseProcess], ends: list[Connection], seconds: float, missing: tuple[int, ...] = ()) -> list[Any]:
    """Return what the bodies returned, None for the ranks in ``missing``; AssertionError if one failed or is late. All have ended then."""
    found: list[Any] = [None] * len(ends)
    left = {end: rank for rank, end in enumerate(ends) if rank not in missing}
    faults = []
    until = time.monotonic() + seconds
    try:
        while left and time.monotonic() < until and not faults:
            for end in wait(list(left), max(until - time.monotonic(), 0)):
                rank = left.pop(end)  # type: ignore[arg-type]
                try:
                    good, found[rank] = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, found[rank] = False, f"rank {rank} ended without a word"
                if not good:
                    faults.append(found[rank])
        assert not faults, "\n".join(faults)
        assert not left, f"ranks {sorted(left.values())} did not end within {seconds:g} s"
        for rank, process in enumerate(processes):
            if rank not in missing:
                process.join(max(until - time.monotonic(), 1))
                assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"
    finally:
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        for end in ends:
            end.close()
    return found


def run(size: int, body: Callable[..., Any], *args: Any, seconds: float = 60, **how: Any) -> list[Any]:
    """Run ``body(rank, *args)`` on ``size`` ranks and return what they returned."""
    return collect(*start(size, body, *args, **how), seconds)
