"""Serve a neural network that is spread over ranks, by HTTP: what an asynchronous server on ``rt`` looks like.

    rt.launch -n 4 examples/server.py --port 8000
    curl -d "[$(seq -s, 64)]" http://127.0.0.1:8000/predict

**Tensor-parallel**: every rank holds some hidden units of each layer and computes with those; one ``all_sum`` per block makes the whole.
Rank 0 answers HTTP. The loop is free while ranks reduce, so it goes on taking requests, and what has come meanwhile is the next batch.

Three rules make it robust, and are worth copying:

1. **One task per rank makes the collectives** (``lead`` on rank 0, ``follow`` on the others). Handlers put requests into a queue. A client
   that disconnects cancels its handler and nothing else.
2. **The others wait in a command loop**: ``broadcast_object`` waits for ever at no cost, and takes commands of any size.
3. **One barrier is joined at the end only.** Rank 0 calls it when it starts; it fails the moment a rank is lost, also while nobody asks.

``/predict`` takes a list of 64 numbers and returns as many, ``/health`` says whether all ranks are there, ``/stats`` counts. SIGINT or
SIGTERM to rank 0 ends all ranks with exit code 0. If a rank dies, ``/health`` says which for two more seconds, then the rest ends with
code 1. That is so under ``rt.launch``, too, which sends SIGTERM as soon as one rank fails: a signal asks the ranks to stop first, while
HTTP goes on, and so finds out who is lost.

May live here: what a user would write. May not: anything of ``rt`` that is not public; HTTP and the network (``_server_parts.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable
from typing import Any

import numpy as np
from _server_parts import NICE, Array, Block, Front, forward, memory, shard

import rt

DRAIN_SECONDS = 2.0  # for which a server that has lost a rank still answers, so that whoever watches /health learns why
Command = tuple[str, Any]  # ("predict", rows), ("exercise", nbytes), ("stop", None)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a network spread over ranks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one; what it is stands in the first line of output")
    options = parser.parse_args()

    group = await rt.init()
    end = await group.split(0)  # a second group of all ranks: its barrier does not stand in the way of the calls of the first
    blocks = shard(group.rank(), group.size())
    if group.rank() != 0:  # before rank 0 can serve: a terminal or launcher sends its signals to all ranks, and they are for rank 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.nice(NICE)
    try:
        processes = await rt.gather_objects(os.getpid())
        if group.rank() == 0:
            await serve(Front({"ranks": group.size(), "processes": processes}), blocks, end, options.host, options.port)
        else:
            await follow(blocks, end)
    except rt.RTError as error:
        sys.exit(f"server: {error}")


async def serve(front: Front, blocks: list[Block], end: rt.Group, host: str, port: int) -> None:
    """Rank 0: HTTP beside the one task that leads the ranks, until a signal or a failure."""
    web = asyncio.ensure_future(front.serve(host, port))
    leader = asyncio.ensure_future(lead(front, blocks))
    watcher = asyncio.ensure_future(until(end.barrier()))
    await asyncio.wait({web, leader, watcher}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if web.done():
            front.close_queue()
        await asyncio.gather(leader, watcher)
    except Exception as error:
        front.fail(str(error), getattr(error, "culprit", None))
        print(f"server: {error}; ending in {DRAIN_SECONDS:g} s", flush=True)
        await asyncio.wait({web}, timeout=DRAIN_SECONDS)
        raise
    finally:
        front.stop()
        await web


async def lead(front: Front, blocks: list[Block]) -> None:
    """Rank 0: take what waits in the queue, tell the others what comes, and compute with them."""
    stats = front.stats

    async def all_sum(x: Array) -> Array:
        with stats.in_collective():
            total: Array = await rt.all_sum(x)
        return total

    while jobs := await front.batch():
        asked = [job for job in jobs if not job.nbytes]
        if asked:
            stats.batches += 1
            rows = np.stack([job.row for job in asked])
            with stats.in_collective():
                await rt.broadcast_object(("predict", rows))
            for job, answer in zip(asked, await forward(blocks, rows, all_sum), strict=True):
                front.answer(job, answer.tolist())
        for job in jobs:
            if job.nbytes:
                await rt.broadcast_object(("exercise", job.nbytes))
                await exercise(job.nbytes)
                front.answer(job, job.nbytes)
    await rt.broadcast_object(("stop", None))


async def follow(blocks: list[Block], end: rt.Group) -> None:
    """Every other rank: do what rank 0 says."""
    while True:
        command: Command = await rt.broadcast_object(None)
        match command:
            case ("predict", rows):
                await forward(blocks, rows, rt.all_sum)
            case ("exercise", nbytes):
                await exercise(nbytes)
            case _:
                await end.barrier()
                return


async def exercise(nbytes: int) -> None:
    """Reduce that many bytes, so that one can see what the server does meanwhile."""
    await rt.all_sum(memory(nbytes), out=memory(nbytes))


async def until(call: Awaitable[Any]) -> None:
    """Make a task of a call."""
    await call


if __name__ == "__main__":
    rt.run(main())
