"""Groups over real networks where hosts see only their neighbours: everything works, and who is lost or missing is named.

May live here: four hosts in a ring. May not: making the hosts (``netns``) and the ranks (``hosts``), the larger family of collectives
(``test_family_neighbours``).

Deadlines that the project promises (a death is known within 1 s) are asserted; no other time is.
"""

from __future__ import annotations

import errno
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import netns
import numpy as np
import pytest
from hosts import PATIENCE, ends, ranks_on, ring_as_mlx_writes_it, ring_file, start
from ranks import FRONTS, Ranks, succeeded

from rt.errors import GroupBrokenError

pytestmark = hosts.NEEDED
fronts = pytest.mark.parametrize("front", FRONTS)


@pytest.fixture(scope="module")
def ring_of_four() -> Iterator[list[netns.Host]]:
    with netns.ring_of_hosts(4) as made:
        yield made


# --- every rank is there --------------------------------------------------------------------------------------------------------------


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


def test_these_hosts_reach_their_neighbours_only(ring_of_four: list[netns.Host]) -> None:
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
def test_every_collective_where_only_neighbours_connect(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, everything, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
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
def test_a_large_send_between_ranks_without_a_cable(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, send_far, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
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
def test_a_killed_rank_is_named_beyond_its_neighbours(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, reduce_until_it_breaks, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
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
def test_the_death_of_a_rank_beyond_the_neighbours_ends_a_wait(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, wait_for_far_rank, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
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
def test_a_killed_rank_that_only_forwards_is_named(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    """Ranks 0 and 2 are a group of their own, and all that they say passes through the others."""
    with ranks_on(ring_of_four, reduce_across_until_it_breaks, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
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
def test_orderly_exits_lose_nothing(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, leave_while_others_talk, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
        for rank in range(4):
            ranks.hear(rank)
        for rank in (0, 2):
            ranks.tell(rank, "go on")
        succeeded(ranks.wait(PATIENCE))


# --- ranks that are not there, and hosts that swallow ---------------------------------------------------------------------------------


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
def test_a_missing_rank_is_named_with_the_addresses_tried(first: int, tried: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    """Whoever gives up first tells the others, and knows, though it sees only its neighbours, that nobody else is missing."""
    present = (0, 1, 3)
    env = {"RT_HOSTFILE": ring_file(tmp_path, ring_as_mlx_writes_it(4)), "RT_INSECURE": "1"}
    limits = {rank: "1.5" if rank == first else "60" for rank in present}
    for status, _, text in ends([start(ring_of_four[rank], RT_RANK=str(rank), RT_CONNECT_TIMEOUT=limits[rank], **env) for rank in present]):
        assert status == 1
        *_, error, missing = text.splitlines()
        assert error == f"rt.errors.RendezvousError: rank {first}/4: the group did not form within 1.5 s; missing:"
        assert missing == f"  rank 2: {tried}"


async def reduce_and_tell_links(rt: Any, group: Any, ctl: Any, since: float) -> tuple[float, float]:
    formed = time.monotonic() - since
    return formed, float((await group.all_sum(np.ones(100_000, np.float32))).sum())


def test_a_silent_black_hole_delays_the_start_by_seconds_only(tmp_path: Path) -> None:
    ring = ring_file(tmp_path, ring_as_mlx_writes_it(4))
    with netns.ring_of_hosts(4) as made:
        for rank, host in enumerate(made):
            # The neighbour gets everything and does not forward: it drops without a word.
            host.ip(f"route add default via 10.0.{rank}.2")
        with ranks_on(made, reduce_and_tell_links, ring, args=(time.monotonic(),), RT_LOG="info") as ranks:
            outcomes = ranks.wait(PATIENCE)
    for rank, (formed, total) in enumerate(succeeded(outcomes)):
        assert total == 400_000
        assert formed < 10
        assert log_of_links(outcomes[rank].stderr) == {(rank - 1) % 4, (rank + 1) % 4}
