"""One rank of an rt group for the commands that have no peers: ``rt.bench loop_lag``, ``idle`` and ``fused``.

May live here: what the ranks of those commands do. May not: choosing what to watch and printing it (``loop_lag.py``, ``idle.py``,
``fused.py``).
Run as ``python -m bench.probe FRONT LOOP`` by ``conductor.py``; the protocol is ``worker.py``'s.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

import rt
import rt.sync
from bench.worker import Answer, Channel, Floats, loop_factory, place

_TURN_SECONDS = 0.3e-3
TICK_SECONDS = 0.001


class Ticker:
    """A timer of 1 ms on the running loop that notes how late it fires.

    The clock is ``perf_counter``, not the loop's: uvloop's has milliseconds and stands still during a callback, which is what is to be
    seen. uvloop also counts whole milliseconds and may fire early; that is lateness 0.
    """

    def __init__(self) -> None:
        self.late: list[float] = []

    def start(self) -> None:
        """Arm the timer."""
        self._due = time.perf_counter() + TICK_SECONDS
        self._handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._fire)

    def _fire(self) -> None:
        self.late.append(max(0.0, time.perf_counter() - self._due))
        self.start()

    def stop(self) -> None:
        """Disarm it. A firing that is overdue counts: the loop was late for it too."""
        self._handle.cancel()
        overdue = time.perf_counter() - self._due
        if overdue > 0:
            self.late.append(overdue)


def summary(late: list[float]) -> Answer:
    """Return how often the timer fired, and p50, p99 and max of its lateness in us (None where it never came to fire)."""
    if not late:
        return {"fired": 0, "p50_us": None, "p99_us": None, "max_us": None}
    p50, p99, most = np.percentile(late, [50, 99, 100]) * 1e6
    return {"fired": len(late), "p50_us": float(p50), "p99_us": float(p99), "max_us": float(most)}


async def _lag(command: Answer, rank: int, size: int) -> Answer:
    """Watch the loop while all-reduces of ``bytes`` are awaited one after the other, at least one, or while it sleeps if bytes is 0."""
    go_on = np.full(command["bytes"] // 4, 1.0, dtype=np.float32)
    out = np.full_like(go_on, 0.0)  # its pages are there before the timer runs: page faults are no business of the loop's
    await rt.barrier()
    ticker = Ticker()
    ticker.start()
    start = time.perf_counter()
    if command["bytes"]:
        calls = await _reduce_for(command["seconds"], go_on, out, rank, size)
    else:
        calls = 0
        await (_compute_for(command["seconds"]) if command["scene"] == "busy" else asyncio.sleep(command["seconds"]))
    took = time.perf_counter() - start
    ticker.stop()
    return {**summary(ticker.late), "calls": calls, "took": took}


async def _compute_for(seconds: float) -> None:
    """Keep the core as busy as a large all-reduce does, in turns as short: what the timer suffers then is the host's doing."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        turn = time.perf_counter() + _TURN_SECONDS
        while time.perf_counter() < turn:
            continue
        await asyncio.sleep(0)


async def _reduce_for(seconds: float, go_on: Floats, out: Floats, rank: int, size: int) -> int:
    """Await all-reduces until rank 0's time is up, which the others learn from the number that is reduced; return how many."""
    deadline = time.perf_counter() + seconds
    calls = 0
    while True:
        if rank == 0 and time.perf_counter() >= deadline:
            go_on[0] = 0.0
        await rt.all_reduce(go_on, op="sum", out=out)
        calls += 1
        if out[0] < size:
            return calls


def sleeps(scene: str, rank: int) -> bool:
    """Say whether a rank lets the window pass before it does what the others may already be waiting for."""
    return scene == "nothing" or (scene == "ahead" and rank == 1) or (scene == "broadcast" and rank == 0)


def _idle_sync(command: Answer, rank: int) -> Answer:
    x = np.ones(4, dtype=np.float32)
    rt.sync.barrier()
    start = _used()
    if sleeps(command["scene"], rank):
        time.sleep(command["seconds"])
    if command["scene"] == "ahead":
        rt.sync.all_reduce(x)
    elif command["scene"] == "broadcast":
        rt.sync.broadcast(x, 0)
    return _share(start)


async def _idle_async(command: Answer, rank: int) -> Answer:
    x = np.ones(4, dtype=np.float32)
    await rt.barrier()
    start = _used()
    if sleeps(command["scene"], rank):
        await asyncio.sleep(command["seconds"])
    if command["scene"] == "ahead":
        await rt.all_reduce(x)
    elif command["scene"] == "broadcast":
        await rt.broadcast(x, 0)
    return _share(start)


def _used() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.monotonic()


def _share(start: tuple[float, float]) -> Answer:
    cpu, now = _used()
    return {"share": (cpu - start[0]) / (now - start[1]), "seconds": now - start[1]}


def _arrays(command: Answer) -> list[Floats]:
    return [np.ones(command["bytes"] // 4, dtype=np.float32) for _ in range(command["arrays"])]


def _fused_sync(command: Answer) -> Answer:
    """Time each way to reduce the same arrays, in turns, each from a barrier on."""
    xs = _arrays(command)

    def one_by_one() -> None:
        for x in xs:
            rt.sync.all_sum(x)

    ways: dict[str, Callable[[], Any]] = {"one": one_by_one}
    ways |= {"fused": lambda: rt.sync.all_sum(xs), "average": lambda: rt.sync.average_gradients(xs)}
    outs = _arrays(command)
    ways |= {"in_place": lambda: rt.sync.all_max(outs, out=outs)}
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(command["repeats"]):
        for way, call in ways.items():
            rt.sync.barrier()
            start = time.perf_counter()
            call()
            took[way].append(time.perf_counter() - start)
    return took


async def _fused_async(command: Answer) -> Answer:
    """As ``_fused_sync``."""
    xs = _arrays(command)

    async def one_by_one() -> None:
        for x in xs:
            await rt.all_sum(x)

    ways: dict[str, Callable[[], Any]] = {"one": one_by_one}
    ways |= {"fused": lambda: rt.all_sum(xs), "average": lambda: rt.average_gradients(xs)}
    outs = _arrays(command)
    ways |= {"in_place": lambda: rt.all_max(outs, out=outs)}
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(command["repeats"]):
        for way, call in ways.items():
            await rt.barrier()
            start = time.perf_counter()
            await call()
            took[way].append(time.perf_counter() - start)
    return took


def _serve_sync(channel: Channel, rank: int) -> None:
    rt.sync.init()
    channel.say({"pid": os.getpid(), "uses": {}})
    channel.serve({"idle": lambda command: _idle_sync(command, rank), "fused": _fused_sync})


def _serve_async(channel: Channel, rank: int, size: int, loop: str) -> None:
    factory, name = loop_factory(loop)
    with asyncio.Runner(loop_factory=factory) as runner:

        def run(work: Coroutine[Any, Any, Answer]) -> Answer:
            return runner.run(work)

        async def join() -> Answer:
            await rt.init()
            return {"pid": os.getpid(), "uses": {"loop": name}}

        channel.say(run(join()))
        channel.serve(
            {
                "lag": lambda command: run(_lag(command, rank, size)),
                "idle": lambda command: run(_idle_async(command, rank)),
                "fused": lambda command: run(_fused_async(command)),
            }
        )


def main() -> None:
    """Serve as the rank that the environment says, on the front end and loop named by the arguments."""
    channel = Channel()
    rank, size = place()
    front, loop = sys.argv[1:]
    try:
        if front == "sync":
            _serve_sync(channel, rank)
        else:
            _serve_async(channel, rank, size, loop)
    except Exception:
        channel.say({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
