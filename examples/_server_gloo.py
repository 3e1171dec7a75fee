"""The server of ``server.py`` on torch's gloo, to compare with: blocking collectives, so all of them run in one thread beside the loop.

    rt.launch -n 4 --python .venv-peers/bin/python examples/_server_gloo.py --port 0 --store FILE

Started by ``server_load.py``. May live here: what differs from ``server.py``, in the same shape. May not: ``rt``; torch's interpreter needs
nothing of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import uvloop
from _server_parts import NICE, WIDTH, Array, Block, Front, forward, memory, shard

STOP, EXERCISE = -1, -2  # instead of a number of rows: a command is two numbers (what, bytes), and rows may follow


def broadcast(numbers: Array | np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Broadcast an array from rank 0, in place."""
    dist.broadcast(torch.from_numpy(numbers), 0)


def total(x: Array) -> Array:
    """Sum an array over all ranks, in place."""
    dist.all_reduce(torch.from_numpy(x))
    return x


async def lead(front: Front, blocks: list[Block], thread: ThreadPoolExecutor) -> None:
    """Rank 0: as ``lead`` of ``server.py``."""
    loop = asyncio.get_running_loop()
    stats = front.stats

    async def command(what: int, nbytes: int = 0, rows: Array | None = None) -> None:
        await loop.run_in_executor(thread, broadcast, np.array([what, nbytes], np.int64))
        if rows is not None:
            await loop.run_in_executor(thread, broadcast, rows)

    async def all_sum(x: Array) -> Array:
        with stats.in_collective():
            return await loop.run_in_executor(thread, total, x)

    while jobs := await front.batch():
        asked = [job for job in jobs if not job.nbytes]
        if asked:
            stats.batches += 1
            rows = np.stack([job.row for job in asked])
            with stats.in_collective():
                await command(len(rows), 0, rows)
            for job, answer in zip(asked, await forward(blocks, rows, all_sum), strict=True):
                front.answer(job, answer.tolist())
        for job in jobs:
            if job.nbytes:
                await command(EXERCISE, job.nbytes)
                await loop.run_in_executor(thread, total, memory(job.nbytes))
                front.answer(job, job.nbytes)
    await command(STOP)


async def serve(front: Front, blocks: list[Block], port: int) -> None:
    """Rank 0: HTTP beside the task that leads the ranks."""
    with ThreadPoolExecutor(1) as thread:
        leader = asyncio.ensure_future(lead(front, blocks, thread))
        web = asyncio.ensure_future(front.serve("127.0.0.1", port))
        await asyncio.wait({leader, web}, return_when=asyncio.FIRST_COMPLETED)
        front.close_queue()
        await leader
        front.stop()
        await web


async def follow(blocks: list[Block]) -> None:
    """Every other rank: blocking calls one after the other, for it has nothing else to do."""
    async def all_sum(x: Array) -> Array:
        return total(x)

    while True:
        command = np.empty(2, np.int64)
        broadcast(command)
        what, nbytes = command
        if what == STOP:
            return
        if what == EXERCISE:
            total(memory(int(nbytes)))
        else:
            rows = np.empty((what, WIDTH), np.float32)
            broadcast(rows)
            await forward(blocks, rows, all_sum)


def main() -> None:
    parser = argparse.ArgumentParser(description="The server of server.py on torch's gloo.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", required=True, help="a file that does not exist yet, where the ranks meet")
    options = parser.parse_args()
    rank, size = int(os.environ["RT_RANK"]), int(os.environ["RT_WORLD_SIZE"])
    if rank != 0:
        os.nice(NICE)  # before gloo starts its threads: each has its own
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=rank, world_size=size)
    blocks = shard(rank, size)
    if rank != 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    processes: list[int] = [0] * size
    dist.all_gather_object(processes, os.getpid())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Front({"ranks": size, "processes": processes}), blocks, options.port) if rank == 0 else follow(blocks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
