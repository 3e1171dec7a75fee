"""The ring in shared memory (``rt/_ring.h``) by itself: two threads, under ThreadSanitizer.

May live here: building and running ``ring_stress.c``. May not: links (``test_links``), processes (``test_sharing``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HEADER = HERE.parent / "rt" / "_ring.h"
BUILD = ["gcc", "-std=gnu17", "-O2", "-g", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", str(HERE / "ring_stress.c"), "-lpthread"]


def build(folder: Path, header: str, capacity: int = 4096) -> str:
    """Compile the stress against this text of the header."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, whose ThreadSanitizer this needs")
    (folder / "_ring.h").write_text(header, encoding="utf-8")
    program = folder / "ring_stress"
    built = subprocess.run(
        [*BUILD, f"-I{folder}", f"-DCAPACITY={capacity}", "-o", str(program)], capture_output=True, text=True, timeout=100
    )
    if "libtsan" in built.stderr or "-ltsan" in built.stderr:
        pytest.skip("gcc comes without ThreadSanitizer here (Debian: libtsan2)")
    assert built.returncode == 0, built.stderr
    return str(program)


def run(program: str, nbytes: int, seed: int) -> subprocess.CompletedProcess[str]:
    # Without randomised addresses: ThreadSanitizer refuses some of the layouts that newer kernels choose.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, program, str(nbytes), str(seed)], capture_output=True, text=True, timeout=100)


def test_every_byte_arrives_and_nobody_sleeps_for_ever(tmp_path: Path) -> None:
    program = build(tmp_path, HEADER.read_text(encoding="utf-8"))
    for seed in range(20):
        done = run(program, 1_000_000, seed)
        assert (done.returncode, done.stderr) == (0, ""), f"seed {seed}"
        slept = re.findall(r"slept (\d+) times", done.stdout) + re.findall(r"writer (\d+) times", done.stdout)
        assert all(map(int, slept)) and len(slept) == 2, f"seed {seed}: nobody had to be woken: {done.stdout}"


def test_pieces_arrive_past_the_caches_too(tmp_path: Path) -> None:
    program = build(tmp_path, HEADER.read_text(encoding="utf-8"), 1 << 17)
    for seed in range(5):
        done = run(program, 5_000_000, seed)
        assert (done.returncode, done.stderr) == (0, ""), f"seed {seed}"
        past = re.search(r"(\d+) pieces past", done.stdout)
        assert past and int(past[1]) > 10, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ring->fastest > RT_RING_FAR_NS", "ns > RT_RING_FAR_NS"),
        ("if (++ring->timed < RT_RING_TIMED)", "if (++ring->timed < 2)"),
        ("ring->past--;", ""),
        ("(from + i + 32)), d", "(from + i)), d"),
    ],
    ids=["by the last", "too soon", "for ever", "wrong bytes"],
)
def test_wrong_ways_past_the_caches_are_found(right: str, wrong: str, tmp_path: Path) -> None:
    header = HEADER.read_text(encoding="utf-8")
    assert header.count(right) == 1
    assert run(build(tmp_path, header.replace(right, wrong), 1 << 17), 1_000_000, 1).returncode


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("&ring->shared->written, memory_order_acquire", "&ring->shared->written, memory_order_relaxed"),
        ("&ring->shared->consumed, memory_order_acquire", "&ring->shared->consumed, memory_order_relaxed"),
        ("ring->seen = atomic_load_explicit(&ring->shared->consumed, memory_order_acquire)", "ring->seen = ring->at"),
    ],
    ids=["data before they are there", "room before it is free", "no regard for the reader"],
)
def test_the_stress_finds_what_is_wrong(right: str, wrong: str, tmp_path: Path) -> None:
    header = HEADER.read_text(encoding="utf-8")
    assert right in header
    program = build(tmp_path, header.replace(right, wrong))
    assert any(run(program, 1_000_000, seed).returncode for seed in range(10))


def test_a_forgotten_wake_up_is_found(tmp_path: Path) -> None:
    header = HEADER.read_text(encoding="utf-8")
    program = build(tmp_path, header.replace("reader_sleeps, 1, memory_order_seq_cst", "reader_sleeps, 0, memory_order_seq_cst"))
    found = run(program, 1_000_000, 1)
    assert found.returncode == 2 and "nobody woke the reader" in found.stderr
