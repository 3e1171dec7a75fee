"""What a server of a network needs besides collectives: the network, a queue of requests, and HTTP in front of it.

May live here: everything that ``server.py`` (on rt) and ``_server_gloo.py`` (on torch, to compare with) share. May not: collectives;
``forward`` is told how to sum over the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Array = npt.NDArray[np.float32]
Sum = Callable[[Array], Awaitable[Array]]

WIDTH, HIDDEN, BLOCKS = 64, 512, 2
_CLIENT_GONE = 499  # nginx' word for it; nobody reads it
BATCH_MOST = 64  # requests that are computed together
NICE = 10  # of all ranks but the first: where ranks are more than cores, the one that clients wait for comes first
LARGEST = 1e6  # of the numbers in a request: those of no size would make answers that JSON has no words for
EXERCISE_MOST = 1 << 30  # bytes
QUIET_TURNS = 4  # of the loop, in which no request is queued, before a batch is taken: what a handler takes to read its request


# --- the network -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One rank's part of ``h + relu(h @ up + up_bias) @ down + down_bias``: some of the hidden units, hence some columns of ``up`` and the
    same rows of ``down``. The products of all ranks' rows add up to the whole layer's."""

    up: Array
    up_bias: Array
    down: Array
    down_bias: Array


def shard(rank: int, size: int, seed: int = 0) -> list[Block]:
    """Return rank's part of all blocks. (A large network would have each rank load its part only.)"""
    random = np.random.default_rng(seed)
    mine = np.array_split(np.arange(HIDDEN), size)[rank]
    blocks = []
    for _ in range(BLOCKS):
        up = random.normal(0, WIDTH**-0.5, (WIDTH, HIDDEN)).astype(np.float32)
        down = random.normal(0, HIDDEN**-0.5, (HIDDEN, WIDTH)).astype(np.float32)
        up_bias, down_bias = random.normal(0, 1, HIDDEN).astype(np.float32), random.normal(0, 1, WIDTH).astype(np.float32)
        blocks.append(Block(up[:, mine].copy(), up_bias[mine], down[mine].copy(), down_bias))
    return blocks


async def forward(blocks: list[Block], x: Array, all_sum: Sum) -> Array:
    """Return the network's answers (n, WIDTH) to the rows of x (n, WIDTH): one sum over all ranks per block.

    The products here take less than a millisecond. Longer ones belong into ``asyncio.to_thread``, or the loop cannot answer meanwhile.
    """
    for block in blocks:
        partial = np.maximum(x @ block.up + block.up_bias, 0) @ block.down
        x = x + await all_sum(partial) + block.down_bias
    return x


@functools.cache
def memory(nbytes: int) -> Array:
    """Return the array that an exercise of the ranks reduces in place. It is kept: to give 64 MiB back to the system takes some 10 ms, in
    which no loop turns, so servers should reuse large arrays."""
    return np.zeros(nbytes // 4, np.float32)


# --- requests and HTTP -----------------------------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """Counts since the start; ``collective_seconds`` from each call of a collective on rank 0 until its result."""

    requests: int = 0
    batches: int = 0
    disconnected: int = 0
    collective_seconds: float = 0.0

    @contextlib.contextmanager
    def in_collective(self) -> Iterator[None]:
        """Count the time until the end of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.collective_seconds += time.perf_counter() - start


@dataclass(eq=False)
class Job:
    """One request in the queue: a row for the network or, with ``nbytes``, an all-reduce of that size to exercise the ranks."""

    row: Array
    answer: asyncio.Future[Any]
    nbytes: int = 0


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: uvicorn's own handlers end the process before the other ranks could be told."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front:
    """HTTP on rank 0. Handlers only put jobs into the queue and wait for answers; **they never call collectives**, so a client that
    disconnects cancels its own request and leaves the ranks in step.

    Args:
        facts: shown by ``/stats`` beside the counts.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.stats = Stats()
        self._queue: asyncio.Queue[Job | None] = asyncio.Queue()
        self._waiting: set[Job] = set()
        self._failure: dict[str, Any] | None = None
        routes = [
            Route("/predict", self._predict, methods=["POST"]), Route("/exercise", self._exercise, methods=["POST"]),
            Route("/health", self._health), Route("/stats", self._stats),
        ]  # fmt: skip
        config = uvicorn.Config(Starlette(routes=routes), lifespan="off", log_level="warning", access_log=False)
        self._uvicorn = _Uvicorn(config)

    async def serve(self, host: str, port: int) -> None:
        """Answer requests until ``stop``; then finish those that have begun. SIGINT and SIGTERM close the queue."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.close_queue)
        with socket.create_server((host, port)) as listener:
            print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
            await self._uvicorn.serve(sockets=[listener])

    def stop(self) -> None:
        """End ``serve``."""
        self._uvicorn.should_exit = True

    def close_queue(self) -> None:
        """Have ``batch`` return an empty list when all that is queued is done, and refuse what comes from here on."""
        self._failure = self._failure or {"ok": False, "culprit": None, "error": "the server is stopping"}
        self._queue.put_nowait(None)

    async def batch(self) -> list[Job]:
        """Wait for requests and return those that wait together: what came while the last batch was computed."""
        jobs: list[Job] = []
        while not jobs:
            found = await self._queue.get()
            await self._settle()
            while found is not None:
                if not found.answer.cancelled():
                    jobs.append(found)
                if self._queue.empty() or len(jobs) == BATCH_MOST:
                    break
                found = self._queue.get_nowait()
            if found is None:
                if jobs:
                    self.close_queue()  # for the next call
                return jobs
        return jobs

    async def _settle(self) -> None:
        """Wait while handlers that are ready to run put their jobs into the queue: larger batches, fewer collectives per request."""
        quiet = 0
        while quiet < QUIET_TURNS and self._queue.qsize() < BATCH_MOST:
            before = self._queue.qsize()
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._queue.qsize() == before else 0

    def answer(self, job: Job, answer: Any) -> None:
        """Give a job its answer, unless its client has gone."""
        if not job.answer.done():
            self.stats.requests += 1
            job.answer.set_result(answer)

    def fail(self, why: str, culprit: int | None) -> None:
        """From here on ``/health`` says why nothing works any more, and so is told who waits or asks."""
        self._failure = {"ok": False, "culprit": culprit, "error": why}
        for job in self._waiting:
            if not job.answer.done():
                job.answer.set_exception(RuntimeError(why))

    async def _ask(self, request: Request, row: Array, nbytes: int = 0) -> Response:
        job = Job(row, asyncio.get_running_loop().create_future(), nbytes)
        if self._failure is None:
            self._queue.put_nowait(job)
            self._waiting.add(job)
            gone = asyncio.ensure_future(request.receive())  # the body was read: what is left to come is the end of the connection
            await asyncio.wait({job.answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            self._waiting.discard(job)
            if not job.answer.done():
                job.answer.cancel()
                self.stats.disconnected += 1
                return Response(status_code=_CLIENT_GONE)
            if job.answer.exception() is None:
                return JSONResponse(job.answer.result())
        return JSONResponse(self._failure, 503)

    async def _predict(self, request: Request) -> Response:
        try:
            row = np.asarray(await request.json(), np.float64)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except (ValueError, TypeError, OverflowError, RecursionError):
            row = np.empty(0)
        if row.shape != (WIDTH,) or not (np.abs(row) <= LARGEST).all():
            return JSONResponse({"error": f"expected a list of {WIDTH} numbers from {-LARGEST:g} to {LARGEST:g}"}, 400)
        return await self._ask(request, row.astype(np.float32))

    async def _exercise(self, request: Request) -> Response:
        await request.body()
        asked = request.query_params.get("bytes", "")
        if not asked.isascii() or not asked.isdigit() or len(asked) > 20 or not 0 < int(asked) <= EXERCISE_MOST:
            return JSONResponse({"error": f"expected ?bytes=N from 1 to {EXERCISE_MOST}"}, 400)
        return await self._ask(request, np.empty(0, np.float32), int(asked))

    async def _health(self, request: Request) -> Response:
        return JSONResponse(self._failure or {"ok": True}, 503 if self._failure else 200)

    async def _stats(self, request: Request) -> Response:
        return JSONResponse({**asdict(self.stats), "waiting": len(self._waiting), **self.facts})
