"""The asynchronous server among the examples: right answers whatever clients do, an end that every rank agrees on, and no cost at rest.

May live here: whole servers of real processes, and clients. May not: collectives as such; how fast the server is (``server_load.py``).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pytest
import ranks

httpx = pytest.importorskip("httpx", reason="the extra `server` is not installed")
psutil = pytest.importorskip("psutil", reason="the extra `server` is not installed")
pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _server_parts  # noqa: E402

SIZE = 4
TOLD_SECONDS = 1.0  # promised: until /health says who was lost
IDLE_SHARE = 0.005  # promised: of a core, per worker
TOLERANCE = 1e-4  # float32 sums taken in another order
T = TypeVar("T")


class Server:
    """Context manager: the ranks of the server, started by their environment alone; ``url`` is where rank 0 listens."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Server:
        secret = secrets.token_hex(32)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(SIZE):
                env = ranks._environment(rank, SIZE, listener, secret, {})
                command = [sys.executable, "-W", "error", str(EXAMPLES / "server.py"), "--port", "0"]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if rank == 0 else {"stderr": subprocess.PIPE}
                fds = [listener.fileno()] if rank == 0 else []
                self.processes.append(subprocess.Popen(command, env=env, pass_fds=fds, text=True, start_new_session=True, **pipes))
        assert self.processes[0].stdout is not None
        self.url = find_url(self.processes[0].stdout.readline())
        return self

    def end(self) -> tuple[list[int], list[str]]:
        """Wait for the end of all ranks; return exit codes and what they wrote to stderr."""
        errors = [process.communicate(timeout=30)[1] for process in self.processes]
        return [process.returncode for process in self.processes], errors

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def find_url(line: str) -> str:
    found = re.search(r"serving on (http://\S+)", line)
    assert found, line
    return found[1]


def requests(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows, and what a single process computes of them."""
    rows = np.random.default_rng(7).normal(0, 1, (count, _server_parts.WIDTH)).astype(np.float32)

    async def alone(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x

    return rows, asyncio.run(_server_parts.forward(_server_parts.shard(0, 1), rows, alone))


def drive(clients: Coroutine[Any, Any, T]) -> T:
    """Run clients in a loop of their own.

    On a loaded machine httpcore may forget connections whose requests are cancelled while they are made. The collector finds them at some
    time, and its warnings would fail whatever test runs then: so let it look here, where they are known.
    """
    outcome = asyncio.run(clients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return outcome


async def ask_all(url: str, rows: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Fifty clients at a time; every tenth request is given up at some moment. Returns how many were answered and given up."""
    dice = random.Random(3)
    answered = given_up = 0
    at_once = asyncio.Semaphore(50)

    async def ask(client: Any, number: int) -> None:
        nonlocal answered, given_up
        async with at_once:
            if number % 100 == 50:  # all wait for this one, and some of them give up
                assert (await client.post("/exercise", params={"bytes": 32 << 20})).status_code == 200
            patience = dice.random() * 0.1 if number % 10 == 0 else None
            try:
                async with asyncio.timeout(patience):
                    response = await client.post("/predict", json=rows[number].tolist())
            except TimeoutError:
                given_up += 1
                return
        assert response.status_code == 200
        assert np.allclose(response.json(), expected[number], rtol=TOLERANCE, atol=TOLERANCE), f"request {number}"
        answered += 1

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=50)) as client:
        await asyncio.gather(*(ask(client, number) for number in range(len(rows))))
    return answered, given_up


def test_a_thousand_requests_of_which_every_tenth_is_given_up() -> None:
    rows, expected = requests(1000)
    with Server() as server:
        answered, given_up = drive(ask_all(server.url, rows, expected))
        assert answered + given_up == 1000 and answered >= 900 and given_up > 10
        stats = httpx.get(server.url + "/stats").json()
        assert stats["requests"] >= answered and stats["batches"] < stats["requests"], "what waits together is computed together"
        assert stats["collective_seconds"] > 0
        assert httpx.get(server.url + "/health").json() == {"ok": True}
        assert httpx.post(server.url + "/predict", json=[1, 2]).status_code == 400
        assert httpx.post(server.url + "/predict", content=b"{").status_code == 400
        assert httpx.post(server.url + "/predict", json={"a": 1}).status_code == 400
        server.processes[0].send_signal(signal.SIGTERM)
        codes, errors = server.end()
    assert codes == [0] * SIZE and errors == [""] * SIZE


async def give_up_one(server: Server, row: list[float]) -> Any:
    """An all-reduce is held up by a rank that does not run, two requests wait behind it, and one of their clients goes."""
    server.processes[1].send_signal(signal.SIGSTOP)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        work = asyncio.ensure_future(client.post("/exercise", params={"bytes": 1 << 20}))
        asking = [asyncio.ensure_future(client.post("/predict", json=row)) for _ in range(2)]
        while (await client.get("/stats")).json()["waiting"] < 3:
            pass
        asking[0].cancel()
        while (stats := (await client.get("/stats")).json())["disconnected"] == 0:
            pass
        server.processes[1].send_signal(signal.SIGCONT)
        return stats["waiting"], (await work).status_code, (await asking[1]).json()


def test_a_client_that_goes_takes_its_own_request_with_it_and_no_other() -> None:
    rows, expected = requests(1)
    with Server() as server:
        waiting, status, answer = drive(give_up_one(server, rows[0].tolist()))
    assert waiting == 2 and status == 200
    assert np.allclose(answer, expected[0], rtol=TOLERANCE, atol=TOLERANCE)


async def ask_then_interrupt(server: Server, row: list[float]) -> Any:
    """Signal all ranks, as a terminal does, while an all-reduce waits for a rank that does not run, and a request waits behind it."""
    server.processes[1].send_signal(signal.SIGSTOP)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        work = asyncio.ensure_future(client.post("/exercise", params={"bytes": 1 << 20}))
        asking = asyncio.ensure_future(client.post("/predict", json=row))
        while (await client.get("/stats")).json()["waiting"] < 2:
            pass
        for process in server.processes:
            process.send_signal(signal.SIGINT)
        server.processes[1].send_signal(signal.SIGCONT)
        return (await work).status_code, (await asking).json()


def test_ctrl_c_finishes_what_has_begun_and_ends_all_ranks() -> None:
    rows, expected = requests(1)
    with Server() as server:
        status, answer = drive(ask_then_interrupt(server, rows[0].tolist()))
        codes, errors = server.end()
    assert status == 200 and np.allclose(answer, expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert codes == [0] * SIZE and errors == [""] * SIZE


def test_health_names_a_worker_that_died_and_the_server_ends() -> None:
    with Server() as server:
        assert httpx.get(server.url + "/health").json() == {"ok": True}
        began = time.monotonic()
        server.processes[2].kill()
        while (health := httpx.get(server.url + "/health")).status_code == 200:
            assert time.monotonic() - began < TOLD_SECONDS
        assert time.monotonic() - began < TOLD_SECONDS
        assert health.json()["culprit"] == 2 and "lost rank 2" in health.json()["error"]
        refused = httpx.post(server.url + "/predict", json=[0.0] * _server_parts.WIDTH)
        assert refused.status_code == 503 and refused.json()["culprit"] == 2
        codes, errors = server.end()
    assert codes[2] == -signal.SIGKILL and [codes[rank] for rank in (0, 1, 3)] == [1, 1, 1]
    for rank in (0, 1, 3):
        assert errors[rank].splitlines()[-1].startswith("server: ") and "lost rank 2" in errors[rank].splitlines()[-1]


NUMBERS = _server_parts.WIDTH - 1  # of a row that is right but for what is added
ODD_NUMBERS = ["NaN", "1e400", "1e38", "-1e38", "9" * 400]
ODD_ROWS = ["", "null", "{}", "[1]", "[" * 100_000, *("[" + "0," * NUMBERS + odd + "]" for odd in ODD_NUMBERS)]
ODD_SIZES: list[dict[str, Any]] = [{}, {"bytes": "many"}, {"bytes": 0}, {"bytes": -4}, {"bytes": 1 << 60}]


def test_no_request_ends_the_server() -> None:
    rows, expected = requests(1)
    with Server() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        answers = [client.post("/predict", content=odd) for odd in ODD_ROWS] + [client.post("/exercise", params=odd) for odd in ODD_SIZES]
        found = client.post("/predict", json=rows[0].tolist())
        server.processes[0].send_signal(signal.SIGTERM)
        codes, errors = server.end()
    assert [answer.status_code for answer in answers] == [400] * len(answers)
    assert all("expected" in answer.json()["error"] for answer in answers)
    assert np.allclose(found.json(), expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert codes == [0] * SIZE and errors == [""] * SIZE


def test_workers_that_wait_cost_nothing() -> None:
    with Server() as server:
        httpx.post(server.url + "/predict", json=[0.0] * _server_parts.WIDTH)
        workers = [psutil.Process(process.pid) for process in server.processes[1:]]
        before, began = [sum(worker.cpu_times()[:2]) for worker in workers], time.monotonic()
        time.sleep(4)  # the time that is measured; the clock of processes ticks in 10 ms
        spent = [sum(worker.cpu_times()[:2]) - was for worker, was in zip(workers, before, strict=True)]
        assert max(spent) / (time.monotonic() - began) <= IDLE_SHARE


def test_the_load_generator() -> None:
    options = "-n 2 --clients 1,3 --seconds 0.3 --bytes 65536 --json --peers".split()
    command = [sys.executable, str(EXAMPLES / "server_load.py"), *options, ""]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert [(row["system"], row["clients"]) for row in found["predict"]] == [("rt", 1), ("rt", 3)]
    assert all(row["requests"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] and row["collective_us"] > 0 for row in found["predict"])
    assert [row["all_reduces"] > 0 for row in found["health"]] == [False, True]
    assert found["idle"][0]["worst_share"] >= 0 and found["ranks"] == 2


def test_under_the_launcher() -> None:
    command = [sys.executable, "-m", "rt.launch", "-n", "2", str(EXAMPLES / "server.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        url = find_url(launcher.stdout.readline())
        assert httpx.get(url + "/stats").json()["ranks"] == 2
        launcher.send_signal(signal.SIGINT)
        assert launcher.communicate(timeout=30) == ("", "")
    assert launcher.returncode == 0


def test_health_names_a_worker_that_died_under_the_launcher_too() -> None:
    command = [sys.executable, "-m", "rt.launch", "-n", "3", str(EXAMPLES / "server.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        url = find_url(launcher.stdout.readline())
        os.kill(httpx.get(url + "/stats").json()["processes"][1], signal.SIGKILL)
        began = time.monotonic()
        while httpx.get(url + "/health").json().get("culprit") != 1:
            assert time.monotonic() - began < TOLD_SECONDS
        output, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "lost rank 1" in output.splitlines()[-1]
    assert "[0] server: " in errors and errors.splitlines()[-1] == "rt.launch: rank 1 was killed by SIGKILL"
