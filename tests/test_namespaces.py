"""Groups over real networks: hosts that see only their neighbours, two cables, IPv6, black holes, cut cables.

May live here: tests that need more than one host. May not: making the hosts (``netns``) and the ranks (``ranks``).

Deadlines that the project promises (a death is known within 1 s) are asserted; no other time is.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
from ranks import FRONTS, Outcome, Ranks

from rt.errors import CollectiveTimeoutError, GroupBrokenError, PeerLostError

pytestmark = [pytest.mark.namespaces, pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")]
fronts = pytest.mark.parametrize("front", FRONTS)

PATIENCE = 30.0
PORT = 5000  # nobody else lives on these hosts
ROOT = str(Path(__file__).parents[1])
Ring = list[list[str]]


@pytest.fixture(scope="module")
def ring_of_four() -> Iterator[list[netns.Host]]:
    with netns.ring_of_hosts(4) as hosts:
        yield hosts


@pytest.fixture
def two_cables() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30"), ("10.1.1.1/30", "10.1.1.2/30")) as hosts:
        yield hosts


TWO_CABLES: Ring = [[f"10.1.0.1:{PORT}", f"10.1.1.1:{PORT}"], [f"10.1.0.2:{PORT}", f"10.1.1.2:{PORT}"]]


def ring_as_mlx_writes_it(size: int) -> Ring:
    """Per rank the address that faces its left neighbour."""
    return [[f"10.0.{(rank - 1) % size}.2:{PORT}"] for rank in range(size)]


Write = Callable[[Ring], str]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(ring: Ring) -> str:
        path = tmp_path / "ring.json"
        path.write_text(json.dumps(ring))
        return str(path)

    return write


def ranks_on(
    hosts: Sequence[netns.Host], body: Callable[..., Any], ring_file: str, *, front: str = "sync", args: Sequence[Any] = (), **env: str
) -> Ranks:
    """One rank per host, with nothing but a ring file; the job's secret comes with the harness."""
    where: dict[str, str | None] = {"RT_HOSTFILE": ring_file, "RT_WORLD_SIZE": None, "RT_COORDINATOR": None, "RT_COORDINATOR_FD": None}
    return Ranks(len(hosts), body, front=front, args=args, env={**where, **env}, on=[host.command() for host in hosts])


def succeeded(outcomes: Sequence[Outcome]) -> list[Any]:
    """The values that the bodies returned, if no rank raised, failed at exit or left a trace."""
    bad = [str(each) for each in outcomes if each.error or each.returncode or "Traceback" in each.stderr]
    assert not bad, "\n".join(bad)
    return [each.value for each in outcomes]


# --- programs instead of bodies, where the environment is the matter ------------------------------------------------------------------

PROGRAM = """
import numpy as np
import rt.sync as rt
group = rt.init()
total = rt.all_sum(np.full(4 << 20, group.rank() + 1.0, np.float32))
print("sum", *np.unique(total), "of", group.size())
"""


def start(host: netns.Host, **env: str) -> subprocess.Popen[str]:
    """Start PROGRAM with exactly these variables of ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RT_", "MLX_"))}
    command, pipe = host.command(sys.executable, "-c", PROGRAM), subprocess.PIPE
    env = {**inherited, "PYTHONPATH": ROOT, **env}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and error output of each."""
    try:
        return [(process.returncode, *said) for process, said in [(each, each.communicate(timeout=PATIENCE)) for each in processes]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def last_line(text: str) -> str:
    return (text.splitlines() or [""])[-1]


# --- four hosts, one cable per pair of neighbours -------------------------------------------------------------------------------------


async def look_around(rt: Any, group: Any, ctl: Any, addresses: list[str]) -> list[str]:
    import socket

    found = []
    for address in addresses:
        host, _, port = address.partition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            found.append("connected")
        except OSError as error:
            found.append(errno.errorcode.get(error.errno or 0, str(error)))
    return found


def test_these_hosts_reach_their_neighbours_only(ring_of_four: list[netns.Host], file: Write) -> None:
    """What the other tests rely on."""
    ring = [addresses[0] for addresses in ring_as_mlx_writes_it(4)]
    with Ranks(4, look_around, args=(ring,), on=[host.command() for host in ring_of_four], init=False) as ranks:
        found = succeeded(ranks.wait())
    for rank, reached in enumerate(found):
        assert reached[(rank + 1) % 4] == "ECONNREFUSED"
        assert reached[(rank + 2) % 4] == "ENETUNREACH"


def pattern(count: int, rank: int, dtype: str) -> Any:
    """Small integers, exact in every dtype, different on every rank."""
    return (np.arange(count) % 7 + rank).astype(dtype)


async def reductions(group: Any, count: int, dtype: str) -> None:
    rank, size = group.rank(), group.size()
    every = np.stack([pattern(count, each, dtype) for each in range(size)])
    x = every[rank]
    np.testing.assert_array_equal(await group.all_reduce(x), every.sum(0, dtype=dtype))
    np.testing.assert_array_equal(await group.all_reduce(x, "prod"), every.prod(0, dtype=dtype))
    np.testing.assert_array_equal(await group.all_max(x), every.max(0))
    np.testing.assert_array_equal(await group.all_min(x), every.min(0))
    if dtype.startswith("int"):
        np.testing.assert_array_equal(await group.all_reduce(x, "xor"), np.bitwise_xor.reduce(every, 0))
    blocks = np.stack([pattern(count * size, each, dtype) for each in range(size)])
    np.testing.assert_array_equal(await group.sum_scatter(blocks[rank]), blocks.sum(0, dtype=dtype)[rank * count : (rank + 1) * count])


async def moves(group: Any, count: int, dtype: str) -> None:
    rank, size = group.rank(), group.size()
    every = [pattern(count, each, dtype) for each in range(size)]
    np.testing.assert_array_equal(await group.all_gather(every[rank]), np.concatenate(every))
    for root in range(size):
        np.testing.assert_array_equal(await group.broadcast(every[rank], root), every[root])
    for source, target in itertools.permutations(range(size), 2):
        if rank == source:
            await group.send(every[source], target, tag=target)
        elif rank == target:
            np.testing.assert_array_equal(await group.recv((count,), dtype, source, tag=target), every[source])
    await group.barrier()


async def everything(rt: Any, group: Any, ctl: Any) -> None:
    halves = await group.split(group.rank() // 2)  # neighbours
    across = await group.split(group.rank() % 2, -group.rank() % 4)  # none of them connected
    sizes = (0, "float32"), (1, "int32"), (1000, "float16"), (70_001, "float32"), (300_000, "int64")
    for each, some in ((group, sizes), (halves, sizes[:4]), (across, sizes)):
        for count, dtype in some:
            await reductions(each, count, dtype)
            await moves(each, count, dtype)
    gradients = {"w": np.full((300, 7), group.rank(), np.float32), "b": [np.float64(group.rank()) * np.ones(3)]}
    averaged = await rt.average_gradients(gradients)
    assert np.all(averaged["w"] == 1.5) and np.all(averaged["b"][0] == 1.5)


@fronts
def test_every_collective_where_only_neighbours_connect(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    with ranks_on(ring_of_four, everything, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        succeeded(ranks.wait(PATIENCE))


LARGE = 1 << 20  # float64: 8 MiB


async def send_far(rt: Any, group: Any, ctl: Any) -> None:
    rank = group.rank()
    x = np.random.default_rng(rank % 2).random(LARGE)
    if rank < 2:  # both directions of the ring at once, through each other's hosts
        await group.send(x, rank + 2)
        np.testing.assert_array_equal(await group.recv_like(x, rank + 2), x[::-1])
    else:
        np.testing.assert_array_equal(await group.recv_like(x, rank - 2), x)
        await group.send(x[::-1], rank - 2)


@fronts
def test_a_large_send_between_ranks_without_a_cable(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    with ranks_on(ring_of_four, send_far, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        succeeded(ranks.wait(PATIENCE))


async def reduce_until_it_breaks(rt: Any, group: Any, ctl: Any) -> tuple[str, int | None, float, float]:
    x = np.ones(16 << 20, np.float32)
    try:
        for count in itertools.count():
            await group.all_sum(x)
            if count == 0:
                ctl.tell("under way")
    except GroupBrokenError as error:
        broken = error
    at = time.monotonic()
    with pytest.raises(type(broken)):
        await group.all_sum(x)
    return type(broken).__name__, broken.culprit, at, time.monotonic() - at


@fronts
def test_a_killed_rank_is_named_beyond_its_neighbours(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    with ranks_on(ring_of_four, reduce_until_it_breaks, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        for rank in range(4):
            ranks.hear(rank)
        killed = time.monotonic()
        ranks.processes[2].kill()
        outcomes = ranks.wait(PATIENCE)
    for kind, culprit, at, again in succeeded([outcomes[0], outcomes[1], outcomes[3]]):
        assert (kind, culprit) == ("PeerLostError", 2)
        assert at - killed < 1
        assert again < 0.1


async def wait_for_far_rank(rt: Any, group: Any, ctl: Any) -> tuple[str, int | None, float]:
    across = await group.split(group.rank() % 2)
    ctl.tell("about to wait")
    if group.rank() == 2:
        ctl.hear()  # never told
    try:
        if group.rank() == 0:
            await across.recv((1,), "float32", 1)
        else:
            await group.barrier()
    except GroupBrokenError as error:
        return type(error).__name__, error.culprit, time.monotonic()
    raise AssertionError("a call that needs a dead rank returned")


@fronts
def test_the_death_of_a_rank_beyond_the_neighbours_ends_a_wait(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    with ranks_on(ring_of_four, wait_for_far_rank, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        for rank in range(4):
            ranks.hear(rank)
        killed = time.monotonic()
        ranks.processes[2].kill()
        outcomes = ranks.wait(PATIENCE)
    for kind, culprit, at in succeeded([outcomes[0], outcomes[1], outcomes[3]]):
        assert (kind, culprit) == ("PeerLostError", 2)
        assert at - killed < 1


async def reduce_across_until_it_breaks(rt: Any, group: Any, ctl: Any) -> tuple[str, int | None, str]:
    across = await group.split(group.rank() % 2)
    x = np.ones(LARGE // 4)
    try:
        for count in itertools.count():
            await (group if group.rank() % 2 else across).all_sum(x)
            if count == 2:
                ctl.tell("under way")
    except GroupBrokenError as error:
        return type(error).__name__, error.culprit, str(error)


@fronts
def test_a_killed_rank_that_only_forwards_is_named(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    """Ranks 0 and 2 are a group of their own, and all that they say passes through the others."""
    with ranks_on(ring_of_four, reduce_across_until_it_breaks, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        for rank in (0, 2):
            ranks.hear(rank)
        ranks.processes[1].kill()
        outcomes = ranks.wait(PATIENCE)
    for kind, culprit, text in succeeded([outcomes[0], outcomes[2], outcomes[3]]):
        assert (kind, culprit) == ("PeerLostError", 1), text


async def leave_while_others_talk(rt: Any, group: Any, ctl: Any) -> None:
    rank = group.rank()
    x = np.random.default_rng(7).random(LARGE)
    await group.barrier()
    ctl.tell("through")
    if rank in (1, 3):
        return  # what the others say from here on passes through this rank, on its way out
    ctl.hear()
    if rank == 0:
        await group.send(x, 2)
    else:
        np.testing.assert_array_equal(await group.recv_like(x, 0), x)


@fronts
def test_orderly_exits_lose_nothing(front: str, ring_of_four: list[netns.Host], file: Write) -> None:
    with ranks_on(ring_of_four, leave_while_others_talk, file(ring_as_mlx_writes_it(4)), front=front) as ranks:
        for rank in range(4):
            ranks.hear(rank)
        for rank in (0, 2):
            ranks.tell(rank, "go on")
        succeeded(ranks.wait(PATIENCE))


# --- ranks that are not there, and networks that swallow ------------------------------------------------------------------------------


def swallow(host: netns.Host, address: str, cable: str) -> None:
    """What ``host`` sends to ``address`` from here on is lost without a word: the other end takes it for somebody else's."""
    host.ip(f"neighbour replace {address} lladdr 02:00:00:00:00:99 dev {cable}")


def log_of_links(text: str) -> set[int]:
    return {int(peer) for peer in re.findall(r"rank \d+: rank (\d+) over tcp", text)}


@pytest.mark.parametrize(
    ("first", "tried"),
    [
        (0, "10.0.1.2:5000: Network is unreachable"),
        (1, "10.0.1.2:5000: Connection refused"),
        (3, "it has not connected to 10.0.2.2:5000"),
    ],
)
def test_a_missing_rank_is_named_with_the_addresses_tried(first: int, tried: str, ring_of_four: list[netns.Host], file: Write) -> None:
    """Whoever gives up first tells the others, and knows, though it sees only its neighbours, that nobody else is missing."""
    present = (0, 1, 3)
    env = {"RT_HOSTFILE": file(ring_as_mlx_writes_it(4)), "RT_INSECURE": "1"}
    limits = {rank: "1.5" if rank == first else "60" for rank in present}
    for status, _, text in ends([start(ring_of_four[rank], RT_RANK=str(rank), RT_CONNECT_TIMEOUT=limits[rank], **env) for rank in present]):
        assert status == 1
        *_, error, missing = text.splitlines()
        assert error == f"rt.errors.RendezvousError: rank {first}/4: the group did not form within 1.5 s; missing:"
        assert missing == f"  rank 2: {tried}"


def test_a_rank_whose_host_is_dark_is_named_with_the_addresses_tried(file: Write) -> None:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30")) as hosts:
        swallow(hosts[0], "10.1.0.2", "cable0")
        ring = [[f"10.1.0.1:{PORT}"], [f"10.1.0.2:{PORT}"]]
        env = {"RT_HOSTFILE": file(ring), "RT_CONNECT_TIMEOUT": "1.5", "RT_INSECURE": "1"}
        ((status, _, text),) = ends([start(hosts[0], RT_RANK="0", **env)])
    assert status == 1
    assert "rank 1: 10.1.0.2:5000: no answer" in last_line(text)


async def reduce_and_tell_links(rt: Any, group: Any, ctl: Any, since: float) -> tuple[float, float]:
    formed = time.monotonic() - since
    return formed, float((await group.all_sum(np.ones(100_000, np.float32))).sum())


def test_a_silent_black_hole_delays_the_start_by_seconds_only(file: Write) -> None:
    with netns.ring_of_hosts(4) as hosts:
        for rank, host in enumerate(hosts):
            # The neighbour gets everything and does not forward: it drops without a word.
            host.ip(f"route add default via 10.0.{rank}.2")
        with ranks_on(hosts, reduce_and_tell_links, file(ring_as_mlx_writes_it(4)), args=(time.monotonic(),), RT_LOG="info") as ranks:
            outcomes = ranks.wait(PATIENCE)
    for rank, (formed, total) in enumerate(succeeded(outcomes)):
        assert total == 400_000
        assert formed < 10
        assert log_of_links(outcomes[rank].stderr) == {(rank - 1) % 4, (rank + 1) % 4}


# --- two hosts, the environment only --------------------------------------------------------------------------------------------------


def bytes_sent(host: netns.Host, cable: str) -> int:
    (found,) = json.loads(host.ip(f"-s -j link show {cable}"))
    return int(found["stats64"]["tx"]["bytes"])


def both_ranks(hosts: Sequence[netns.Host], **env: str) -> list[tuple[int, str, str]]:
    return ends([start(host, RT_RANK=str(rank), **env) for rank, host in enumerate(hosts)])


def succeeds_over_both_cables(hosts: Sequence[netns.Host], **env: str) -> None:
    before = [[bytes_sent(host, cable) for cable in ("cable0", "cable1")] for host in hosts]
    for status, output, errors in both_ranks(hosts, **env):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors
    for host, sent in zip(hosts, before, strict=True):
        for cable, already in zip(("cable0", "cable1"), sent, strict=True):
            assert bytes_sent(host, cable) - already > 4 << 20  # of 16 MiB


def test_the_guides_ring_with_a_secret_file(two_cables: list[netns.Host], file: Write, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that two hosts share\n")
    secret.chmod(0o600)
    succeeds_over_both_cables(two_cables, RT_HOSTFILE=file(TWO_CABLES), RT_SECRET_FILE=str(secret))


def test_the_guides_ring_without_any_secret_if_told_so(two_cables: list[netns.Host], file: Write) -> None:
    succeeds_over_both_cables(two_cables, RT_HOSTFILE=file(TWO_CABLES), RT_INSECURE="1")


def test_the_guides_ring_with_neither_is_an_error_that_is_the_fix(two_cables: list[netns.Host], file: Write, tmp_path: Path) -> None:
    ring = file(TWO_CABLES)
    for status, _, text in both_ranks(two_cables, RT_HOSTFILE=ring):
        assert status == 1
        assert re.match(r"rt\.errors\.ConfigError: no secret for a job across hosts", last_line(text))
        command, copy = re.findall(r"`([^`]+)`", last_line(text))
        setting = re.findall(r"set (RT_\w+)=(\S+) on all", last_line(text))
        assert copy.startswith("scp ")
    # Do what it says, word for word; the two hosts share their disk, so there is nothing to copy.
    home = {"HOME": str(tmp_path)}
    subprocess.run(command, shell=True, check=True, env={**os.environ, **home}, timeout=PATIENCE)
    assert dict(setting).keys() == {"RT_SECRET_FILE", "RT_INSECURE"}
    for name, value in setting:
        succeeds_over_both_cables(two_cables, RT_HOSTFILE=ring, **home, **{name: value})


def test_different_secrets_are_told_apart_on_both_sides(two_cables: list[netns.Host], file: Write) -> None:
    env = {"RT_HOSTFILE": file(TWO_CABLES), "RT_CONNECT_TIMEOUT": "2"}
    processes = [start(host, RT_RANK=str(rank), RT_SECRET=f"the secret of host {rank} only", **env) for rank, host in enumerate(two_cables)]
    (status0, _, dialler), (status1, _, acceptor) = ends(processes)
    assert status0 == status1 == 1
    assert "the secrets differ" in last_line(dialler)
    assert "rank 0: it has not connected to 10.1.0.2:5000" in acceptor
    assert re.match(r"  a connection from 10.1.[01].1:\d+ was dropped: the secrets differ", last_line(acceptor))


def test_mlx_names(two_cables: list[netns.Host], file: Write) -> None:
    env = {"MLX_HOSTFILE": file(TWO_CABLES), "RT_INSECURE": "1"}
    for status, output, errors in ends([start(host, MLX_RANK=str(rank), **env) for rank, host in enumerate(two_cables)]):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors


def test_a_ring_over_ipv6(file: Write) -> None:
    with netns.two_hosts(("fd00::1/64", "fd00::2/64"), ("fd01::1/64", "fd01::2/64")) as hosts:
        ring = [[f"[fd0{cable}::{rank + 1}]:{PORT}" for cable in range(2)] for rank in range(2)]
        succeeds_over_both_cables(hosts, RT_HOSTFILE=file(ring), RT_INSECURE="1")


def test_a_coordinator_on_another_host(two_cables: list[netns.Host]) -> None:
    env = {"RT_COORDINATOR": f"10.1.1.1:{PORT}", "RT_WORLD_SIZE": "2", "RT_CONNECTIONS_PER_IP": "2", "RT_INSECURE": "1"}
    for status, output, errors in both_ranks(two_cables, **env):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors


# --- a cable that is cut --------------------------------------------------------------------------------------------------------------


async def reduce_twice(rt: Any, group: Any, ctl: Any, limit: float | None) -> tuple[str, float]:
    x = np.ones(4 << 20, np.float32)
    await group.all_sum(x)
    ctl.tell("formed")
    ctl.hear()
    ctl.tell("calling")
    since = time.monotonic()
    try:
        total = await group.all_sum(x, timeout=limit)
    except CollectiveTimeoutError:
        return "timeout", time.monotonic() - since
    except PeerLostError:
        return "lost", time.monotonic() - since
    return str(total.sum() / total.size), time.monotonic() - since


@pytest.fixture
def one_cable() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30")) as hosts:
        yield hosts


@fronts
def test_a_cut_cable_is_no_death_but_the_time_limit_holds(front: str, one_cable: list[netns.Host], file: Write) -> None:
    ring = [[f"10.1.0.1:{PORT}"], [f"10.1.0.2:{PORT}"]]
    with ranks_on(one_cable, reduce_twice, file(ring), front=front, args=(1.0,)) as ranks:
        for rank in range(2):
            ranks.hear(rank)
        one_cable[0].ip("link set cable0 down")
        for rank in range(2):
            ranks.tell(rank, "go on")
        for end, seconds in succeeded(ranks.wait(PATIENCE)):
            assert end == "timeout"
            assert 1 <= seconds < 2


def test_a_cable_that_comes_back_in_time_has_done_no_harm(one_cable: list[netns.Host], file: Write) -> None:
    ring = [[f"10.1.0.1:{PORT}"], [f"10.1.0.2:{PORT}"]]
    with ranks_on(one_cable, reduce_twice, file(ring), args=(None,)) as ranks:
        for rank in range(2):
            ranks.hear(rank)
        swallow(one_cable[0], "10.1.0.2", "cable0")
        before = one_cable[0].retransmitted()
        for rank in range(2):
            ranks.tell(rank, "go on")
        until = time.monotonic() + PATIENCE
        while one_cable[0].retransmitted() == before:  # the cable has been needed and was not there
            assert time.monotonic() < until
        one_cable[0].ip("neighbour delete 10.1.0.2 dev cable0")
        assert [end for end, _ in succeeded(ranks.wait(PATIENCE))] == ["2.0", "2.0"]
