"""Backend ``jaccl`` on real verbs: what ``make test-rdma`` runs in its guest (see ``rdma_guest``).

May live here: what ranks can do and how they fail over RDMA. May not: what a link must do (``test_links`` runs in the guest too), booting.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from linuxes import Nic, facts
from rdma_ranks import collect, environment, run, start

import rt
import rt.sync
from rt import world
from rt._wiring_facts import save
from rt.dtypes import OPS, DType, numpy_dtype, op_supported
from transports.rdma import RdmaLink
from transports.verbs import Device, QueuePair, VerbsError, find_port

pytestmark = pytest.mark.skipif("RT_RDMA_GUEST" not in os.environ, reason="runs in the guest: make test-rdma")

REDUCE = {
    "sum": np.add,
    "prod": np.multiply,
    "min": lambda a, b: np.where(_comes_first(a, b), a, b),
    "max": lambda a, b: np.where(_comes_first(a, b), b, a),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def links() -> dict[int, str]:
    return next(iter(world.worlds())).links()


def items(rank: int, count: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Small whole numbers, so that sums are exact in every dtype."""
    x = ((np.arange(count) * 7 + rank) % 3).astype(dtype)
    return x + (1j * ((np.arange(count) + rank) % 2)).astype(dtype) if np.iscomplexobj(x) else x


def _comes_first(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whether items come before those of another array, complex ones by their real part first."""
    return (a.real < b.real) | ((a.real == b.real) & (a.imag < b.imag)) if np.iscomplexobj(a) else a < b


def reduced(op: str, xs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if op == "mean":  # divided before rounding
        total = np.sum([x.astype(np.float32 if x.itemsize < 4 else x.dtype) for x in xs], axis=0)
        if np.iscomplexobj(total):
            return (total.view(total.real.dtype) / total.real.dtype.type(len(xs))).view(total.dtype)
        return (total / total.dtype.type(len(xs))).astype(xs[0].dtype)
    out = xs[0]
    for x in xs[1:]:
        out = REDUCE[op](out, x).astype(out.dtype)
    return out


def verbs_objects() -> int:
    """How many queue pairs, completion queues, regions and domains there are, of whatever process."""
    lines = [line for kind in ("qp", "cq", "mr", "pd") for line in sh(f"rdma resource show {kind}").splitlines()]
    return sum("[ib_core]" not in line for line in lines)


def open_files() -> list[str]:
    """What this process has open, without numbers of sockets; a descriptor may end between two looks."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{fd}")))
    return sorted(found)


# -- every collective


def every_dtype(rank: int, sizes: list[int]) -> int:
    """Arrays of so many bytes."""
    group = rt.sync.init(strict=True)
    size, done = group.size(), 0
    for code in DType:
        dtype = numpy_dtype(code)
        for count in sorted({max(nbytes // np.dtype(dtype).itemsize, 1) for nbytes in sizes}):
            xs = [items(each, count, dtype) for each in range(size)]
            for op in (op for op, number in OPS.items() if op_supported(code, number)):
                np.testing.assert_array_equal(rt.sync.all_reduce(xs[rank], op=op), reduced(op, xs), f"{op} {dtype} {count}")
                done += 1
            np.testing.assert_array_equal(rt.sync.all_gather(xs[rank]), np.concatenate(xs))
            rows = [items(each, size * count, dtype).reshape(size, count) for each in range(size)]
            np.testing.assert_array_equal(rt.sync.sum_scatter(rows[rank])[0], reduced("sum", [each[rank] for each in rows]))
            np.testing.assert_array_equal(rt.sync.all_to_all(rows[rank]), np.stack([each[rank] for each in rows]))
            np.testing.assert_array_equal(rt.sync.broadcast(xs[rank], root=size - 1), xs[-1])
    rt.sync.close()
    return done


@pytest.mark.parametrize("size", (2, 3, 4))
def test_collectives_of_every_dtype(size: int) -> None:
    counts = run(size, every_dtype, [1, 24_000, 1 << 20] if size == 2 else [6216], seconds=110)
    assert len(set(counts)) == 1 and counts[0] > 20


def the_rest(rank: int) -> list[str]:
    group = rt.sync.init(strict=True)
    size = group.size()
    found = links()
    for a in range(size):
        for b in range(size):
            if a != b and rank in (a, b):
                x = np.arange(10_000) * (a + 1) + b
                if rank == a:
                    rt.sync.send(x, b)
                else:
                    np.testing.assert_array_equal(rt.sync.recv_like(x, a), x)
    half = group.split(rank % 2, key=size - rank)
    mates = [each for each in reversed(range(size)) if each % 2 == rank % 2]
    assert (half.rank(), half.size()) == (mates.index(rank), len(mates))
    np.testing.assert_array_equal(rt.sync.all_gather(np.array([rank]), group=half), mates)
    np.testing.assert_array_equal(rt.sync.all_sum(np.full(1000, rank), group=half), np.full(1000, sum(mates)))
    assert rt.sync.all_gather_objects({"rank": rank}) == [{"rank": each} for each in range(size)]
    x = np.arange(300_000, dtype=np.float32)
    np.testing.assert_array_equal(rt.sync.all_sum(x + rank), x * size + sum(range(size)))
    rt.sync.barrier()
    rt.sync.close()
    return [found[peer] for peer in sorted(found)]


def test_mesh() -> None:
    for rank, found in enumerate(run(4, the_rest)):
        assert found == ["rdma rxe0 port 1"] * 3, rank


def test_ring() -> None:
    """Only neighbours have queue pairs; what others say to each other is forwarded."""
    for rank, found in enumerate(run(4, the_rest, env={"RT_JACCL_RING": "1"})):
        others = [peer for peer in range(4) if peer != rank]
        assert [("relayed" if (peer - rank) % 4 == 2 else "rdma rxe0 port 1") for peer in others] == found


def large(rank: int) -> None:
    rt.sync.init(strict=True)
    count = 1 << 20
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        x, expected = items(rank, count, dtype), reduced("sum", [items(each, count, dtype) for each in range(2)])
        repeats = (64 << 20) // x.nbytes
        for part in np.split(rt.sync.all_sum(np.tile(x, repeats)), repeats):
            np.testing.assert_array_equal(part, expected)
    rt.sync.close()


def test_large_arrays() -> None:
    run(2, large, seconds=110)


def awaited(rank: int) -> None:
    async def body() -> None:
        await rt.init(strict=True)
        xs = [np.full(50_000, 10 * rank + tag) for tag in range(6)]
        sent = [rt.send(x, 1 - rank, tag=tag) for tag, x in enumerate(xs)]
        got = await asyncio.gather(*(rt.recv_like(x, 1 - rank, tag=tag) for tag, x in enumerate(xs)))
        await asyncio.gather(*sent)
        assert [int(x[-1]) for x in got] == [10 * (1 - rank) + tag for tag in range(6)]
        sums = await asyncio.gather(*(rt.all_sum(np.full(n, rank + 1.0)) for n in (1, 1000, 200_000)))
        assert all((each == 3.0).all() for each in sums)
        await rt.close()

    asyncio.run(body())


def test_event_loop() -> None:
    run(2, awaited)


def at_random(rank: int, calls: int) -> list[tuple[list[str], int, int]]:
    """What is open, how many verbs objects there are, and the pages in memory, after a tenth of the calls and after the last."""
    rt.sync.init(strict=True)
    dice, seen = random.Random(4), []
    for call in range(calls):
        count, kind = dice.choice((1, 3, 17, 300, 5000)), dice.randrange(4)
        xs = [np.arange(count) * (call % 9) + each for each in range(2)]
        if kind == 0:
            assert np.array_equal(rt.sync.all_sum(xs[rank]), xs[0] + xs[1]), call
        elif kind == 1:
            assert np.array_equal(rt.sync.all_gather(xs[rank]), np.concatenate(xs)), call
        elif kind == 2:
            assert np.array_equal(rt.sync.broadcast(xs[rank], root=call % 2), xs[call % 2]), call
        elif rank == call % 2:
            rt.sync.send(xs[rank], 1 - rank)
        else:
            assert np.array_equal(rt.sync.recv_like(xs[rank], 1 - rank), xs[1 - rank]), call
        if call + 1 in (calls // 10, calls):
            seen.append((open_files(), verbs_objects(), int(Path("/proc/self/statm").read_text().split()[1])))
    rt.sync.close()
    return seen


def test_random_collectives() -> None:
    for (files, objects, pages), after in run(2, at_random, 10_000, seconds=110):
        assert after[:2] == (files, objects) and objects > 0
        assert after[2] - pages < 1000, "9000 calls kept memory: 4 KiB each would be nine times as much"


# -- beginning and ending


def again_and_again(rank: int, cycles: int) -> tuple[list[list[str]], int]:
    """What is open after the third cycle and after the last; and how many verbs objects are left of all ranks."""
    seen = []
    for cycle in range(cycles):
        rt.sync.init(strict=True)
        # First more than a call moves before it waits: what a thread sleeps on is made then, once.
        assert rt.sync.all_sum(np.ones(3 if cycle else 1 << 19))[0] == 2
        rt.sync.close()
        if cycle in (2, cycles - 1):
            seen.append(open_files())
    rt.sync.init(strict=True, backend="ring")  # the other rank has closed, too, when it is here
    left = verbs_objects()
    rt.sync.barrier()
    rt.sync.close()
    return seen, left


@pytest.mark.timeout(300)
def test_many_lives_leave_nothing_behind() -> None:
    for (before, after), left in run(2, again_and_again, 500, seconds=280):
        assert before == after and left == 0


def forks(rank: int) -> int:
    rt.sync.init(strict=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rt.sync.all_sum(np.ones(3))
        except rt.GroupClosedError:
            world._started.clear()  # what the parent holds is thrown away here, destructors of pyverbs included
            gc.collect()
            code = 0
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert np.array_equal(rt.sync.all_sum(np.arange(200_000)), 2 * np.arange(200_000))
    rt.sync.close()
    return status


def test_a_forked_child_leaves_the_connections_alone() -> None:
    assert run(2, forks) == [0, 0]


def configured_by_mlx(rank: int, file: str, coordinator: str) -> list[str]:
    os.environ.update({"MLX_RANK": str(rank), "MLX_IBV_DEVICES": file, "MLX_JACCL_COORDINATOR": coordinator})
    assert rt.sync.init(strict=True).size() == 2
    assert rt.sync.all_sum(np.ones(1))[0] == 2
    found = list(links().values())
    rt.sync.close()
    return found


def test_what_mlx_is_configured_by(tmp_path: Path) -> None:
    (tmp_path / "devices.json").write_text(json.dumps([[None, "rxe0"], ["rxe0", None]]))
    address = environment(2)["RT_COORDINATOR"]
    found = run(
        2, configured_by_mlx, str(tmp_path / "devices.json"), address, without=("RT_RANK", "RT_WORLD_SIZE", "RT_COORDINATOR", "RT_BACKEND")
    )
    assert found == [["rdma rxe0 port 1"]] * 2


def with_factory(rank: int, folder: str) -> int:
    calls = []

    def factory(me: int, size: int) -> Any:
        def gather(mine: bytes, nbytes: int) -> bytes:
            number = len(calls)
            calls.append(nbytes)
            Path(folder, f"{number}.{me}.tmp").write_bytes(mine)
            Path(folder, f"{number}.{me}.tmp").rename(Path(folder, f"{number}.{me}"))
            files = [Path(folder, f"{number}.{each}") for each in range(size)]
            while not all(file.exists() for file in files):
                time.sleep(0.01)
            return b"".join(file.read_bytes() for file in files)

        return gather

    rt.sync.init(strict=True, backend="jaccl", all_gather_factory=factory)
    assert rt.sync.all_sum(np.ones(1))[0] == 2
    rt.sync.close()
    return len(calls)


def test_an_exchange_of_the_users(tmp_path: Path) -> None:
    assert run(2, with_factory, str(tmp_path)) == [2, 2]


# -- failures


def until_lost(rank: int, ready: str) -> tuple[str, int | None, float]:
    rt.sync.init(strict=True)
    rt.sync.all_sum(np.ones(1))
    Path(f"{ready}.{rank}").touch()
    try:
        while True:
            rt.sync.all_sum(np.ones(100_000))
    except rt.PeerLostError as error:
        return str(error), error.culprit, time.time()


def test_kill_9(tmp_path: Path, record_property: Any) -> None:
    processes, ends = start(3, until_lost, str(tmp_path / "ready"))
    while len(list(tmp_path.glob("ready.*"))) < 3:
        time.sleep(0.02)
    killed = time.time()
    os.kill(processes[1].pid, signal.SIGKILL)  # type: ignore[arg-type]
    for outcome in collect(processes, ends, 30, missing=(1,)):
        if outcome is not None:
            text, culprit, when = outcome
            assert culprit == 1 and "lost rank 1" in text
            record_property("seconds", f"{when - killed:.2f}")


def around_a_stop(rank: int, ready: str) -> None:
    rt.sync.init(strict=True)
    for round in range(200):
        assert rt.sync.all_sum(np.full(20_000, rank + 1))[0] == 3
        if round == 20:
            Path(f"{ready}.{rank}").touch()
    rt.sync.close()


def test_a_stopped_rank_is_not_lost(tmp_path: Path) -> None:
    """For longer than the device repeats what nobody answers: it is the device that answers, not the process."""
    processes, ends = start(2, around_a_stop, str(tmp_path / "ready"))
    while len(list(tmp_path.glob("ready.*"))) < 2:
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGSTOP)  # type: ignore[arg-type]
    time.sleep(4)  # the passing of time is what is tested
    assert processes[0].is_alive()
    os.kill(processes[1].pid, signal.SIGCONT)  # type: ignore[arg-type]
    collect(processes, ends, 90)


def test_a_wrong_key_ends_the_link_and_says_so() -> None:
    device = Device(find_port("auto"))
    pairs = [QueuePair(device, 4096) for _ in range(2)]
    ends = [pair.end() for pair in pairs]
    pairs[1].connect(ends[0])
    pairs[0].connect(type(ends[1])(**{**ends[1].__dict__, "rkey": ends[1].rkey ^ 0x5500}))
    links = [RdmaLink(pair, 1 - rank) for rank, pair in enumerate(pairs)]
    links[0].ending()  # so that the write completes
    assert links[0].send(b"hello") == 5
    with pytest.raises(OSError, match="Input/output error"):
        while links[0].recv_into(bytearray(9)) == 0:
            pass
    assert re.match(r"rxe0 port 1: writing to rank 1: the peer's memory refused the access .*status 10", links[0].failure)
    for link in links:
        link.close()
    device.close()


@pytest.fixture
def other_device() -> Iterator[str]:
    sh("ip link add rt-d0 type dummy; ip link set rt-d0 up; rdma link add rxe9 type rxe netdev rt-d0")
    yield "rxe9"
    sh("rdma link delete rxe9; ip link delete rt-d0")


def test_what_makes_a_port_useless(other_device: str) -> None:
    with pytest.raises(VerbsError, match=r"rxe9 port 1 has no IPv4 GID, only fe80:.*ip address add"):
        find_port(other_device)
    sh("ip address add 10.77.0.1/24 dev rt-d0")
    assert find_port(other_device).gid == "::ffff:a4d:1"
    sh("ip link set rt-d0 down")
    with pytest.raises(VerbsError, match=r"rxe9 port 1 is down; .*ip link"):
        find_port(other_device)
    with pytest.raises(VerbsError, match=r"there is no RDMA device 'mlx5_0'; this host has rxe0, rxe9"):
        find_port("mlx5_0")


def refused(rank: int) -> str:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.setuid(65534)
    try:
        rt.sync.init(strict=True)
    except rt.RendezvousError as error:
        return str(error)
    return "it formed"


def test_too_little_memory_may_be_locked() -> None:
    sh("chmod 666 /dev/infiniband/uverbs*")
    for text in run(2, refused):
        assert "rxe0 port 1: ibv_reg_mr of 1048576 B failed" in text and "ulimit -l" in text


# -- programs


def test_the_doctor_lists_devices(other_device: str) -> None:
    done = subprocess.run([sys.executable, "-m", "rt.doctor", "--rdma", "--json"], capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)["ports"]
    assert (first["device"], first["usable"], first["gid"], first["mtu_bytes"]) == ("rxe0", True, "::ffff:7f00:1", 4096)
    assert (second["device"], second["usable"]) == ("rxe9", False) and "has no IPv4 GID" in second["why"]


def test_the_bench_stands_beside_perftest(tmp_path: Path) -> None:
    words = ["all_reduce", "--backend", "jaccl", "--front", "sync", "-b", "64", "-e", "64K", "-f", "1024", "--iters", "3"]
    words += ["--json", str(tmp_path / "found")]
    done = subprocess.run([sys.executable, "-m", "bench", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found").read_text())["perftest"]
    assert [(row["system"], row["bytes"], row["program"]) for row in rows] == [
        ("rt sync jaccl", 64, "ib_write_lat"),
        ("rt sync jaccl", 65536, "ib_write_bw"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["theirs"] > 0
        assert f"{row['program']:<12}" in done.stdout and f"{row['ratio']:.2f}" in done.stdout


PROGRAM = """
import os
import numpy as np
import rt.sync as rt
from rt import world
group = rt.init(strict=True)
assert rt.all_sum(np.ones(5))[0] == 2
print(group.rank(), os.environ["K"], sorted(next(iter(world.worlds())).links().values()))
"""


@pytest.fixture
def recorded_mesh(tmp_path: Path) -> Iterator[Path]:
    """What two hosts with a cable between them said; both are this one."""
    macs = "02:00:00:00:00:01", "02:00:00:00:00:02"
    nics = [Nic("eth0", macs[n], f"10.78.1.{n + 1}/24", speed=100_000, heard=[macs[1 - n]], rdma="rxe0") for n in (0, 1)]
    save(str(tmp_path / "recorded-mesh.json"), [facts("localhost", nics[:1]), facts("127.0.0.1", nics[1:])], {})
    sh("ip address add 10.78.1.1/32 dev lo; ip address add 10.78.1.2/32 dev lo")
    yield tmp_path
    sh("ip address delete 10.78.1.1/32 dev lo; ip address delete 10.78.1.2/32 dev lo")


@pytest.mark.parametrize("backend", ("jaccl", "jaccl-ring"))
def test_a_recorded_mesh_becomes_a_hostfile_and_a_job(recorded_mesh: Path, backend: str) -> None:
    (recorded_mesh / "prog.py").write_text(PROGRAM)
    choose = ["--facts", "recorded-mesh.json", "--over", "rdma", "--backend", backend, "--output", "hosts.json"]
    subprocess.run([sys.executable, "-m", "rt.distributed_config", *choose], cwd=recorded_mesh, check=True)
    words = ["--verbose", "--backend", backend, "--hostfile", "hosts.json", "--env", "K=V", "--cwd", str(recorded_mesh)]
    done = subprocess.run(
        [sys.executable, "-m", "rt.launch", *words, "--", sys.executable, "-m", "prog"],
        cwd=recorded_mesh, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    said = sorted(line for line in done.stdout.splitlines() if " V " in line)
    assert done.returncode == 0 and len(said) == 2, done.stdout + done.stderr
    assert all(line.endswith("V ['rdma rxe0 port 1']") for line in said)


def test_both_ends_must_be_of_a_kind() -> None:
    device = Device(find_port("auto"))
    pair = QueuePair(device, 4096)
    with pytest.raises(VerbsError, match=r"rxe0 port 1 connects by RC, the peer's device by UC; both must be of a kind"):
        pair.connect(dataclasses.replace(pair.end(), reliable=False))
    pair.close()
    device.close()
