"""``rt.bench`` inside a job: its ranks measure together, and rank 0 alone tells.

May live here: jobs as launchers start them. May not: what the tables look like (``test_bench_report``).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0
_FOREIGN = ("RT_", "MLX_", "TORCHELASTIC_", "MASTER_", "OMPI_", "PMI_", "SLURM_")
BENCH = [sys.executable, "-m", "bench"]
FEW = ["--iters", "2", "-w", "1"]


def environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**clean, "PYTHONPATH": str(ROOT), **extra}


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)


def test_ranks_of_rt_launch_are_measured_and_rank_0_tells(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    words = ["broadcast", "-b", "64", "-e", "64K", "-f", "1024", *FEW, "-J", str(target), "--stats"]
    done = run([sys.executable, "-m", "rt.launch", "-n", "4", *BENCH, *words])
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"[0]"}
    assert len(re.findall(r"^\[0\] #  Rank +\d Group", done.stdout, re.M)) == 4
    found = json.loads(target.read_text())
    assert len({device["pid"] for device in found["config"]["devices"]}) == 4
    assert [(row["size"], row["out_of_place"]["nwrong"], row["in_place"]["nwrong"]) for row in found["results"]] == [
        (64, 0.0, 0.0), (65536, 0.0, 0.0)
    ]  # fmt: skip
    assert set(found["rt"]["systems"]) == {"rt sync", "rt async"}
    for system in found["rt"]["systems"].values():  # and not that of what the ranks tell each other meanwhile
        assert [row["algorithm"] for row in system["results"]] == ["binomial", "binomial"]
    assert len(found["results"][0]["out_of_place_per_iter"]["per_process_max_times_us"]) == 4


@pytest.mark.parametrize(
    "names", [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("RT_RANK", "RT_WORLD_SIZE")]
)
def test_ranks_that_the_environment_numbers_meet_at_the_coordinator(names: tuple[str, str], tmp_path: Path) -> None:
    # Rank 0 inherits the listener, so the port is nobody else's.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        fd = listener.fileno()
        ranks = []
        for rank in range(2):
            extra = {names[0]: str(rank), names[1]: "2", "RT_COORDINATOR": address, **({} if rank else {"RT_COORDINATOR_FD": str(fd)})}
            command = [*BENCH, "barrier", *FEW, "--format", "osu"]
            pipe = subprocess.PIPE
            ranks.append(
                subprocess.Popen(command, env=environment(**extra), stdout=pipe, stderr=pipe, text=True, pass_fds=[] if rank else [fd])
            )
    try:
        said = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "# OSU MPI-style Barrier Latency Test" in said[0][0]
    assert said[1][0] == ""


def test_mpi_without_a_place_to_meet_is_an_error() -> None:
    done = run([*BENCH, "barrier"], OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 1
    assert "OMPI_COMM_WORLD_RANK: found rank 1 of 2, but no RT_COORDINATOR=host:port" in done.stderr


def test_environment_that_is_wrong_is_a_usage_error() -> None:
    done = run([*BENCH, "barrier"], RT_RANK="1")
    assert done.returncode == 2
    assert "RT_RANK: found no RT_HOSTFILE or RT_COORDINATOR beside it" in done.stderr


def test_mistakes_are_found_on_every_rank() -> None:
    done = run([sys.executable, "-m", "rt.launch", "-n", "2", *BENCH, "barrier", "-n", "3"])
    assert done.returncode == 2
    assert "-n 3: found a job of 2 ranks" in done.stderr


def test_a_file_that_rank_0_cannot_write_ends_every_rank_before_it_measures(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "rt.launch", "-n", "2", *BENCH, "barrier", "--json", str(tmp_path)])
    assert done.returncode == 2
    assert f"--json {tmp_path}: found 'Is a directory'" in done.stderr and "Traceback" not in done.stderr


def test_algorithms_are_measured_beside_the_ranks_of_a_job(tmp_path: Path) -> None:
    path, data = tmp_path / "table.json", tmp_path / "found.json"
    words = ["tune", "broadcast", "barrier", "-b", "1K", "-e", "1K", "--output", str(path), "-J", str(data)]
    done = run([sys.executable, "-m", "rt.launch", "-n", "3", *BENCH, *words], RT_SHM="0")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"[0]"}
    table = json.loads(path.read_text())
    assert {row: {links: list(rules) for links, rules in table[row].items()} for row in ("broadcast", "barrier")} == {
        "broadcast": {"tcp": ["3"]}, "barrier": {"tcp": ["3"]},
    }  # fmt: skip
    measured = json.loads(data.read_text())["measured"]
    assert [list(found["seconds"]) for found in measured.values()] == [["binomial", "pipeline"], ["dissemination", "ring"]]
