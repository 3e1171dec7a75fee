"""Groups over hosts of two cables: the bytes go over those that ``RT_SOCKET_IFNAME`` names.

May live here: ranks with a coordinator on hosts. May not: making hosts (``netns``), what the variable may say (``test_interfaces``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts
import netns
import pytest
from hosts import PORT, PROGRAM, ROOT, ends, last_line, start

pytestmark = hosts.NEEDED

SENT = 4 << 20  # of the 16 MiB that each rank sends, at least so much over a cable that is used
NOISE = 256 << 10


@pytest.fixture
def two_cables() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30"), ("10.1.1.1/30", "10.1.1.2/30")) as both:
        yield both


def used(both: list[netns.Host], texts: list[str | None], **more: str) -> tuple[list[tuple[int, str, str]], list[str]]:
    """How the ranks ended, and which cables carried data; ranks meet over cable0."""
    netns.until_running(both)
    env = {"RT_COORDINATOR": f"10.1.0.1:{PORT}", "RT_WORLD_SIZE": "2", "RT_INSECURE": "1", "RT_CONNECT_TIMEOUT": "20", **more}
    cables = ("cable0", "cable1")
    before = {cable: both[0].sent(cable) for cable in cables}
    named = [{} if text is None else {"RT_SOCKET_IFNAME": text} for text in texts]
    ended = ends([start(host, RT_RANK=str(rank), **env, **named[rank]) for rank, host in enumerate(both)])
    sent = {cable: both[0].sent(cable) - before[cable] for cable in cables}
    assert all(amount > SENT or amount < NOISE for amount in sent.values()), sent
    return ended, [cable for cable in cables if sent[cable] > SENT]


@pytest.mark.parametrize(
    ("text", "cables"),
    [
        (None, ["cable0"]),
        ("cable1", ["cable1"]),
        ("=cable1,lo", ["cable1"]),
        ("^=cable0", ["cable1"]),
        ("^cable1", ["cable0"]),
        ("10.1.1.0/24", ["cable1"]),
        ("cable", ["cable0", "cable1"]),
    ],
)
def test_the_bytes_go_over_the_cables_named(text: str | None, cables: list[str], two_cables: list[netns.Host]) -> None:
    ended, carried = used(two_cables, [text, text])
    assert [(status, output) for status, output, _ in ended] == [(0, "sum 3.0 of 2\n")] * 2, ended
    assert carried == cables


def test_ranks_that_find_different_numbers_of_interfaces_use_the_first(two_cables: list[netns.Host]) -> None:
    ended, carried = used(two_cables, ["cable1,cable0", "=cable1"], RT_LOG="info")
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert carried == ["cable1"]
    assert "different numbers of interfaces (rank 0: 2, rank 1: 1): connections go over the first only" in ended[0][2]


def test_several_connections_per_interface(two_cables: list[netns.Host]) -> None:
    ended, carried = used(two_cables, ["cable", "cable"], RT_CONNECTIONS_PER_IP="2", RT_LOG="info")
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert carried == ["cable0", "cable1"]
    (links,) = re.findall(r"rank 0: rank 1 over tcp: (.*)", ended[0][2])
    assert re.findall(r"- (10\.1\.\d)", links) == ["10.1.0", "10.1.1", "10.1.0", "10.1.1"]


def test_a_rank_without_such_an_interface_says_what_it_has(two_cables: list[netns.Host]) -> None:
    ended, _ = used(two_cables, [None, "lo"], RT_CONNECT_TIMEOUT="3")
    status, _, errors = ended[1]
    assert status == 1
    found = r"found lo \(127\.0\.0\.1/8.*\), cable0 \(10\.1\.0\.2/30.*\), cable1 \(10\.1\.1\.2/30.*\), expected one that matches"
    assert re.search(rf"ConfigError: RT_SOCKET_IFNAME=lo: {found}; loopback does not count", last_line(errors)), errors


def test_ipv6_and_a_network_of_it() -> None:
    with netns.two_hosts(("fd00::1/64", "fd00::2/64"), ("fd01::1/64", "fd01::2/64")) as both:
        ended, carried = used(both, ["fd01::/16"] * 2, RT_COORDINATOR=f"[fd00::1]:{PORT}")
        assert [status for status, _, _ in ended] == [0, 0], ended
        assert carried == ["cable1"]


# --- a coordinator's name that means loopback on its own host -----------------------------------------------------------------------------


def named(both: list[netns.Host], folder: Path, ranks: list[tuple[int, int]], **env: str) -> list[tuple[int, str, str]]:
    """Run ranks, (number, host) each, with a coordinator ``node0``: there 127.0.1.1, as Debian has it, and 10.1.0.1 elsewhere."""
    processes = []
    for rank, number in ranks:
        names = folder / f"names{number}"
        names.write_text("127.0.0.1 localhost\n" + ("127.0.1.1 node0\n" if number == 0 else "10.1.0.1 node0\n"))
        script = f'mount --bind {names} /etc/hosts && exec "$@"'
        command = both[number].command("unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RT_", "MLX_"))}
        told = {"RT_RANK": str(rank), "RT_WORLD_SIZE": str(len(ranks)), "RT_COORDINATOR": f"node0:{PORT}", "RT_CONNECT_TIMEOUT": "20"}
        environ = {**clean, "PYTHONPATH": ROOT, "RT_INSECURE": "1", **told, **env}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True))
    return ends(processes)


def test_rank_0_is_reached_by_a_name_that_means_loopback_on_its_host(two_cables: list[netns.Host], tmp_path: Path) -> None:
    ended = named(two_cables, tmp_path, [(0, 0), (1, 1)])
    assert [(status, output) for status, output, _ in ended] == [(0, "sum 3.0 of 2\n")] * 2, ended


def test_loopback_is_never_told_to_another_host(two_cables: list[netns.Host], tmp_path: Path) -> None:
    ranks = [(0, 0), (1, 0), (2, 1)]
    for status, _, errors in named(two_cables, tmp_path, ranks):
        assert status == 1
        expected = r"rank 1 is reached at 127\.0\.\d\.1:\d+ only, .* another rank comes from 10\.1\.0\.2:\d+: give RT_COORD"
        assert re.search(expected, last_line(errors)), errors
    netns.until_running(two_cables)
    ended = named(two_cables, tmp_path, ranks, RT_SOCKET_IFNAME="cable0")  # what the error says
    assert [(status, output) for status, output, _ in ended] == [(0, "sum 6.0 of 3\n")] * 3, ended
