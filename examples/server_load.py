"""Drive the server of ``server.py``, and the same server on torch's gloo beside it: how many requests, how late, at what cost.

    python examples/server_load.py                      4 ranks; gloo too if .venv-peers has torch (``make peers``)
    python examples/server_load.py -n 2 --clients 1,64 --seconds 10 --json

Three tables: requests per second and latency with several numbers of clients, each sending its next request when it has the answer, the
systems in turns; latency of ``/health`` while the ranks all-reduce 64 MiB again and again; and the CPU of waiting workers. The clients run
in this process and on the same cores, and their own time is in every latency.

May live here: clients, servers to start, tables. May not: anything that runs in a rank.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import uvloop
from _server_parts import WIDTH

from bench import host

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
EXERCISE_BYTES = 64 << 20
START_SECONDS = 60.0
PROBE_PAUSE = 2e-3  # seconds between an answer of /health and the next question

Row = dict[str, Any]


@dataclass
class System:
    """A running server."""

    name: str
    client: httpx.AsyncClient
    workers: list[psutil.Process]

    async def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/stats")).json()
        return found


@contextlib.asynccontextmanager
async def serving(name: str, command: list[str], clients: int) -> AsyncIterator[System]:
    """Start a server, and end it as a terminal would."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"serving on (http://\S+)", line)
        if found is None:
            raise SystemExit(f"{name}: the server did not start: {line}")
        limits = httpx.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)
        async with httpx.AsyncClient(base_url=found[1], timeout=60, limits=limits) as client:
            system = System(name, client, [])
            system.workers = [psutil.Process(pid) for pid in (await system.stats())["processes"][1:]]
            yield system
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def percentiles(seconds: list[float]) -> Row:
    """p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


async def predict(system: System, clients: int, seconds: float) -> Row:
    """Requests from that many clients for that long."""
    content = json.dumps(np.random.default_rng(0).normal(0, 1, WIDTH).tolist()).encode()
    until = time.perf_counter() + seconds
    took: list[float] = []

    async def ask() -> None:
        while (begin := time.perf_counter()) < until:
            response = await system.client.post("/predict", content=content)
            response.raise_for_status()
            took.append(time.perf_counter() - begin)

    before, began = await system.stats(), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(clients)))
    spent, after = time.perf_counter() - began, await system.stats()
    counts = {name: after[name] - before[name] for name in ("requests", "batches", "collective_seconds")}
    return {
        "system": system.name, "clients": clients, "requests": len(took), "per_second": len(took) / spent, **percentiles(took),
        "batch": counts["requests"] / counts["batches"], "collective_us": counts["collective_seconds"] / counts["requests"] * 1e6,
    }  # fmt: skip


async def health(system: System, seconds: float, nbytes: int) -> Row:
    """One client asks ``/health`` while the ranks reduce ``nbytes`` again and again (0: while they wait)."""
    until = time.perf_counter() + seconds
    reductions = 0
    took: list[float] = []

    async def exercise() -> None:
        nonlocal reductions
        while nbytes and time.perf_counter() < until:
            (await system.client.post("/exercise", params={"bytes": nbytes})).raise_for_status()
            reductions += 1

    exercising = asyncio.ensure_future(exercise())
    while (begin := time.perf_counter()) < until:
        (await system.client.get("/health")).raise_for_status()
        took.append(time.perf_counter() - begin)
        await asyncio.sleep(PROBE_PAUSE)
    await exercising
    return {"system": system.name, "bytes": nbytes, "all_reduces": reductions, "probes": len(took), **percentiles(took)}


async def idle(system: System, seconds: float) -> Row:
    """The largest share of a core that a waiting worker takes."""
    def spent() -> list[float]:
        return [sum(worker.cpu_times()[:2]) for worker in system.workers]

    before, began = spent(), time.perf_counter()
    await asyncio.sleep(seconds)
    shares = [(now - was) / (time.perf_counter() - began) for now, was in zip(spent(), before, strict=True)]
    return {"system": system.name, "seconds": seconds, "worst_share": max(shares, default=0.0)}


def table(title: str, rows: Iterable[Row]) -> str:
    """Return rows of equal keys as a table; numbers with three digits."""
    listed = [{key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in listed)) for key in listed[0]}
    lines = ["  ".join(row[key].rjust(width) for key, width in widths.items()) for row in ({key: key for key in widths}, *listed)]
    return "\n".join([f"# {title}", *lines, ""])


async def measure(options: argparse.Namespace) -> dict[str, list[Row]]:
    """Start the servers and measure them in turns."""
    launch = [sys.executable, "-m", "rt.launch", "-n", str(options.n)]
    most = max(options.clients)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        commands = {"rt": [*launch, str(HERE / "server.py"), "--port", "0"]}
        if options.peers:
            gloo = [str(HERE / "_server_gloo.py"), "--port", "0", "--store", f"{folder}/store"]
            commands["gloo"] = [*launch, "--python", options.peers, *gloo]
        systems = [await stack.enter_async_context(serving(name, command, most)) for name, command in commands.items()]
        for system in systems:
            await predict(system, most, 0.5)  # connections, plans, caches
        found: dict[str, list[Row]] = {"idle": [await idle(system, options.seconds) for system in systems]}
        found["predict"] = [await predict(system, clients, options.seconds) for clients in options.clients for system in systems]
        found["health"] = [await health(system, options.seconds, n) for n in (0, options.bytes) for system in systems]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Drive the example server, on rt and on gloo.")
    parser.add_argument("-n", type=int, default=4, help="ranks (4)")
    parser.add_argument("--clients", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8, 32], help="loads (1,8,32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number (5)")
    parser.add_argument("--bytes", type=int, default=EXERCISE_BYTES, help="of the all-reduces under /health (64 MiB)")
    parser.add_argument("--peers", default=str(PEERS) if PEERS.exists() else "", help="interpreter with torch; '': measure rt alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(options))
    if options.json:
        print(json.dumps({"host": host.facts(), "ranks": options.n, **found}))
        return
    print("\n".join([f"# {options.n} ranks", *host.lines(), ""]))
    print(table("requests; collective_us: per request, from each call of a collective on rank 0 until its result", found["predict"]))
    print(table("/health while the ranks all-reduce", found["health"]))
    print(table("workers that wait: the worst one's share of a core", found["idle"]))


if __name__ == "__main__":
    main()
