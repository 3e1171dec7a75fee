"""Backend ``jaccl`` beside perftest on the same RDMA device, in the same run.

May live here: running perftest's programs, what of theirs is held against what of ours. May not: how ours is measured (``measure.py``).

perftest moves bytes between two processes by single verbs, and reduces nothing. ``ib_write_bw`` is held against our bus bandwidth at 64 KiB
and more. A latency of perftest's is half a round trip, the typical one (a median, as ours is); a call of ours takes at least that, because
every rank waits for a message. ``ib_write_lat``, which polls, is held against the blocking front end, ``ib_send_lat -e``, which sleeps,
against asyncio's.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import subprocess
import time
from typing import Any

from bench import measure
from bench.meeting import BenchError

_BANDWIDTH_LEAST, _BANDWIDTH_MOST = 64 << 10, 8 << 20  # bytes; above, perftest registers more than small limits allow
_LATENCY_MOST = 1 << 10
_MESSAGES = 64 << 20  # bytes that a bandwidth is measured over
_ROUND_TRIPS = 300
_RUNS = 3  # of each program at each size, of which the median counts
_START_SECONDS = 30.0
_RUN_SECONDS = 60.0
PROGRAMS = ("ib_write_bw", "ib_write_lat", "ib_send_lat")


def require() -> None:
    """Make sure that there is a device and perftest.

    Raises:
        BenchError: there is not; the message says what to do.
    """
    from transports import verbs

    try:
        verbs.find_port("auto")
    except verbs.VerbsError as error:
        raise BenchError(f"--backend jaccl: {error.strerror}") from None
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise BenchError(f"--backend jaccl: no {program} to compare with; Debian's package perftest has it")


def rows(result: measure.Result) -> list[dict[str, Any]]:
    """Run perftest at the sizes of a result that both can be compared at; return one row per size and front end of ours.

    Raises:
        BenchError: perftest failed.
    """
    options, found = result.options, []
    for index, count in enumerate(options.counts):
        nbytes = options.nbytes(count)
        programs: tuple[str, ...] = ()
        if nbytes >= _BANDWIDTH_LEAST:
            programs = ("ib_write_bw", "ib_write_bw")
        elif nbytes <= _LATENCY_MOST:
            programs = ("ib_write_lat", "ib_send_lat")
        known: dict[str, float] = {}
        for front, program in zip(("sync", "async"), programs, strict=False):
            system = f"rt {front} jaccl"
            if system not in result.rows:
                continue
            if program not in known:
                measure.progress(f"running {program} at {nbytes} bytes")
                known[program] = statistics.median(run(program, nbytes) for _ in range(_RUNS))
            seconds = min(cell.seconds for cell in result.rows[system][index].cells.values())
            if program == "ib_write_bw":
                ours = nbytes / seconds * options.collective.factor(options.size) / 1e6
                found.append(_row(system, nbytes, program, "MB/s", ours, known[program], ours / known[program]))
            else:
                ours = seconds * 1e6
                found.append(_row(system, nbytes, program, "us", ours, known[program], ours / known[program]))
    measure.progress("")
    return found


def _row(system: str, nbytes: int, program: str, unit: str, ours: float, theirs: float, ratio: float) -> dict[str, Any]:
    return {"system": system, "bytes": nbytes, "program": program, "unit": unit, "ours": ours, "theirs": theirs, "ratio": ratio}


def run(program: str, nbytes: int) -> float:
    """Run a server and a client of perftest; return the average in MB/s (10**6 B/s), or the typical half of a round trip in us.

    Raises:
        BenchError: it said nothing that can be read.
    """
    from transports.verbs import find_port

    port = find_port("auto")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        meeting = str(probe.getsockname()[1])
    bandwidth = program == "ib_write_bw"
    times = max(_MESSAGES // min(nbytes, _BANDWIDTH_MOST), 5) if bandwidth else _ROUND_TRIPS
    size = str(min(nbytes, _BANDWIDTH_MOST))
    words = [program, "-d", port.device, "-i", str(port.number), "-p", meeting, "-s", size, "-n", str(times), "-F"]
    if port.gid_index >= 0:
        words += ["-x", str(port.gid_index)]
    words += ["--report_gbits"] if bandwidth else ["-e"] if program == "ib_send_lat" else []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            said = _client([*words, "127.0.0.1"], server)
            server_said = server.communicate(timeout=_RUN_SECONDS)[0]
        finally:
            server.kill()
    numbers = [line.split() for line in said.splitlines() if line.split()[:1] == [size]]
    if not numbers:
        told = f"its client said: {said[-500:]!r}, its server: {server_said[-500:]!r}"
        raise BenchError(f"{' '.join(words)}: found no line of {nbytes} bytes in what {told}")
    return float(numbers[-1][3]) * 1e3 / 8 if bandwidth else float(numbers[-1][4])


def _client(words: list[str], server: subprocess.Popen[str]) -> str:
    """Run the client once the server listens, which that does not tell."""
    until = time.monotonic() + _START_SECONDS
    while True:
        ended = server.poll() is not None  # asked first: one that serves a client ends with it
        done = subprocess.run(words, capture_output=True, text=True, timeout=_RUN_SECONDS)
        if done.returncode == 0 or ended or time.monotonic() > until:
            return done.stdout if done.returncode == 0 else done.stdout + done.stderr
        time.sleep(0.1)


def text(found: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "# beside perftest on the same device: our bus bandwidth over ib_write_bw's, our time over half a round trip of theirs",
        f"# {'system':<16}  {'bytes':>10}  {'perftest':<12}  {'unit':<5}  {'ours':>10}  {'theirs':>10}  {'ratio':>6}",
    ]
    for row in found:
        figures = f"{row['unit']:<5}  {row['ours']:>10.1f}  {row['theirs']:>10.1f}  {row['ratio']:>6.2f}"
        lines.append(f"  {row['system']:<16}  {row['bytes']:>10}  {row['program']:<12}  {figures}")
    return "\n".join(lines)
