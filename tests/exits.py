"""Many small worlds that end in order, for ``test_exit``: one process that has imported everything forks the ranks of world after world.

May live here: programs of ranks that never call ``close()``. May not: assertions of tests; what goes wrong here is written to stderr, which
must stay empty.

Run as ``exits.py front last_operation worlds ranks``; prints ``worlds * ranks`` lines, one per rank that saw everything arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
import time
from typing import Any

import numpy as np

import rt
import rt.sync

COUNT = 3000


def check(result: Any, expected: float) -> None:
    if not (result.shape == (COUNT,) and (result == expected).all()):
        raise AssertionError(f"found {result}, expected {expected}")
    os.write(1, b"arrived\n")  # one write: lines of many processes must not mix


async def last_operation(api: Any, name: str, rank: int, size: int) -> None:
    """Do something whose last bytes may still be on their way when the first rank exits."""
    x = np.full(COUNT, rank + 1.0)
    await api.barrier()
    if name == "broadcast":
        check(await api.broadcast(x, 0), 1.0)
    elif name == "send":  # from each to the next, small enough not to wait for the receiver
        await api.send(x, (rank + 1) % size)
        check(await api.recv_like(x, (rank - 1) % size), float((rank - 1) % size + 1))
    elif name == "one way":
        if rank == 0:
            for other in range(1, size):
                await api.send(x, other)
            check(x, 1.0)
        else:
            time.sleep(random.random() * 0.02)  # noqa: ASYNC251 (also under no loop)
            check(await api.recv_like(x, 0), 1.0)
    else:
        check(await api.all_sum(x), size * (size + 1) / 2)


class Ready:
    """Blocking calls as awaitables whose result is there."""

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            return getattr(rt.sync, name)(*args)

        return call


async def main(front: str, name: str, rank: int, size: int) -> None:
    api: Any = rt if front == "asyncio" else Ready()
    await api.init()
    await last_operation(api, name, rank, size)
    if front == "asyncio":
        await asyncio.sleep(random.random() * 0.02)
    else:
        time.sleep(random.random() * 0.02)  # noqa: ASYNC251 (also under no loop)


def be_a_rank(front: str, name: str, rank: int, size: int) -> None:
    if front == "asyncio":
        asyncio.run(main(front, name, rank, size))
    else:
        coroutine = main(front, name, rank, size)
        with contextlib.suppress(StopIteration):
            coroutine.send(None)
    if random.random() < 0.3:
        sys.exit(0)


def world(front: str, name: str, size: int) -> bool:
    """Fork the ranks of one world; True in a child, which is to end like any program."""
    children = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.environ["RT_COORDINATOR"] = f"127.0.0.1:{listener.getsockname()[1]}"
        for rank in range(size):
            child = os.fork()
            if child == 0:
                random.seed(f"{os.environ['RT_COORDINATOR']} {rank}")
                os.environ["RT_RANK"] = str(rank)
                if rank == 0:
                    os.environ["RT_COORDINATOR_FD"] = str(os.dup(listener.fileno()))
                be_a_rank(front, name, rank, size)
                return True
            children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            os.write(2, f"a rank ended with status {status}\n".encode())
    return False


def run(front: str, name: str, worlds: str, size: str) -> None:
    os.environ["RT_WORLD_SIZE"] = size
    for _ in range(int(worlds)):
        if world(front, name, int(size)):
            return


if __name__ == "__main__":
    run(*sys.argv[1:])
