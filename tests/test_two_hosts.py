"""Groups over real networks of two hosts: two cables, IPv6, what the guide promises of secrets; cables that swallow or are cut.

May live here: two hosts. May not: making the hosts (``netns``) and the ranks (``hosts``), hosts that only forward (``test_neighbours``).

Deadlines that the project promises (a time limit holds) are asserted; no other time is.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hosts
import netns
import numpy as np
import pytest
from hosts import PATIENCE, PORT, Ring, ends, last_line, ranks_on, ring_file, start
from ranks import FRONTS, succeeded

from rt.errors import CollectiveTimeoutError, PeerLostError

pytestmark = hosts.NEEDED
fronts = pytest.mark.parametrize("front", FRONTS)

ONE_CABLE: Ring = [[f"10.1.0.1:{PORT}"], [f"10.1.0.2:{PORT}"]]
TWO_CABLES: Ring = [[f"10.1.0.1:{PORT}", f"10.1.1.1:{PORT}"], [f"10.1.0.2:{PORT}", f"10.1.1.2:{PORT}"]]


@pytest.fixture
def one_cable() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30")) as both:
        yield both


@pytest.fixture
def two_cables() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30"), ("10.1.1.1/30", "10.1.1.2/30")) as both:
        yield both


# --- the environment only -------------------------------------------------------------------------------------------------------------


def both_ranks(both: Sequence[netns.Host], **env: str) -> list[tuple[int, str, str]]:
    return ends([start(host, RT_RANK=str(rank), **env) for rank, host in enumerate(both)])


def succeeds_over_both_cables(both: Sequence[netns.Host], **env: str) -> None:
    before = [[host.sent(cable) for cable in ("cable0", "cable1")] for host in both]
    for status, output, errors in both_ranks(both, **env):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors
    for host, sent in zip(both, before, strict=True):
        for cable, already in zip(("cable0", "cable1"), sent, strict=True):
            assert host.sent(cable) - already > 4 << 20  # of 16 MiB


def test_the_guides_ring_with_a_secret_file(two_cables: list[netns.Host], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that two hosts share\n")
    secret.chmod(0o600)
    succeeds_over_both_cables(two_cables, RT_HOSTFILE=ring_file(tmp_path, TWO_CABLES), RT_SECRET_FILE=str(secret))


def test_the_guides_ring_without_any_secret_if_told_so(two_cables: list[netns.Host], tmp_path: Path) -> None:
    succeeds_over_both_cables(two_cables, RT_HOSTFILE=ring_file(tmp_path, TWO_CABLES), RT_INSECURE="1")


def test_the_guides_ring_with_neither_is_an_error_that_is_the_fix(two_cables: list[netns.Host], tmp_path: Path) -> None:
    ring = ring_file(tmp_path, TWO_CABLES)
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


def test_different_secrets_are_told_apart_on_both_sides(two_cables: list[netns.Host], tmp_path: Path) -> None:
    env = {"RT_HOSTFILE": ring_file(tmp_path, TWO_CABLES), "RT_CONNECT_TIMEOUT": "2"}
    processes = [start(host, RT_RANK=str(rank), RT_SECRET=f"the secret of host {rank} only", **env) for rank, host in enumerate(two_cables)]
    (status0, _, dialler), (status1, _, acceptor) = ends(processes)
    assert status0 == status1 == 1
    assert "the secrets differ" in last_line(dialler)
    assert "rank 0: it has not connected to 10.1.0.2:5000" in acceptor
    # Behind it may stand what came of the connection that the dialler was making when its own time was up.
    assert re.search(r"^  a connection from 10\.1\.[01]\.1:\d+ was dropped: the secrets differ", acceptor, re.MULTILINE), acceptor


def test_mlx_names(two_cables: list[netns.Host], tmp_path: Path) -> None:
    env = {"MLX_HOSTFILE": ring_file(tmp_path, TWO_CABLES), "RT_INSECURE": "1"}
    for status, output, errors in ends([start(host, MLX_RANK=str(rank), **env) for rank, host in enumerate(two_cables)]):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors


def test_a_ring_over_ipv6(tmp_path: Path) -> None:
    with netns.two_hosts(("fd00::1/64", "fd00::2/64"), ("fd01::1/64", "fd01::2/64")) as both:
        ring = [[f"[fd0{cable}::{rank + 1}]:{PORT}" for cable in range(2)] for rank in range(2)]
        succeeds_over_both_cables(both, RT_HOSTFILE=ring_file(tmp_path, ring), RT_INSECURE="1")


def test_a_coordinator_on_another_host(two_cables: list[netns.Host]) -> None:
    env = {"RT_COORDINATOR": f"10.1.1.1:{PORT}", "RT_WORLD_SIZE": "2", "RT_CONNECTIONS_PER_IP": "2", "RT_INSECURE": "1"}
    for status, output, errors in both_ranks(two_cables, **env):
        assert (status, output) == (0, "sum 3.0 of 2\n"), errors


# --- cables that swallow or are cut ---------------------------------------------------------------------------------------------------


def swallow(host: netns.Host, address: str, cable: str) -> None:
    """What ``host`` sends to ``address`` from here on is lost without a word: the other end takes it for somebody else's."""
    host.ip(f"neighbour replace {address} lladdr 02:00:00:00:00:99 dev {cable}")


def test_a_rank_whose_host_is_dark_is_named_with_the_addresses_tried(one_cable: list[netns.Host], tmp_path: Path) -> None:
    swallow(one_cable[0], "10.1.0.2", "cable0")
    env = {"RT_HOSTFILE": ring_file(tmp_path, ONE_CABLE), "RT_CONNECT_TIMEOUT": "1.5", "RT_INSECURE": "1"}
    ((status, _, text),) = ends([start(one_cable[0], RT_RANK="0", **env)])
    assert status == 1
    assert "rank 1: 10.1.0.2:5000: no answer" in last_line(text)


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


@fronts
def test_a_cut_cable_is_no_death_but_the_time_limit_holds(front: str, one_cable: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(one_cable, reduce_twice, ring_file(tmp_path, ONE_CABLE), front=front, args=(1.0,)) as ranks:
        for rank in range(2):
            ranks.hear(rank)
        one_cable[0].ip("link set cable0 down")
        for rank in range(2):
            ranks.tell(rank, "go on")
        for end, seconds in succeeded(ranks.wait(PATIENCE)):
            assert end == "timeout"
            assert 1 <= seconds < 2


def test_a_cable_that_comes_back_in_time_has_done_no_harm(one_cable: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(one_cable, reduce_twice, ring_file(tmp_path, ONE_CABLE), args=(None,)) as ranks:
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
