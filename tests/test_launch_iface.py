"""``rt.launch --iface`` on hosts of two cables: the bytes go over the one that is named, however the hosts are, or nothing is started.

May live here: what the option and ``RT_SOCKET_IFNAME`` do to a launcher's hosts. May not: what they may say (``test_interfaces``), ranks
that no launcher starts (``test_interfaces_hosts``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import netns
import pytest
import sshd
from far import SCRIPT, launch
from hosts import PROGRAM
from launching import launch as launch_here

pytestmark = sshd.NEEDED

SENT, NOISE = 8 << 20, 1 << 20  # of the 16 MiB that each rank sends; ssh is on the first cable in any case


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Site]:
    """Two hosts at 10.2.0.1 and 10.2.0.2, where ssh goes, with a cable ``fast``, 10.9.0.1 and 10.9.0.2, besides."""
    with sshd.site(tmp_path_factory.mktemp("site"), 2) as made:
        netns.connect(made.servers[0].host, "10.9.0.1/24", made.servers[1].host, "10.9.0.2/24", "fast")
        netns.until_running([server.host for server in made.servers])
        yield made


def hostfile(folder: Path, *ips: list[str], rdma: Sequence[list[str | None]] = ([], [])) -> str:
    path = folder / "hosts.json"
    path.write_text(json.dumps([{"ssh": f"host{number}", "ips": each, "rdma": rdma[number]} for number, each in enumerate(ips)]))
    return str(path)


BOTH = (["10.2.0.1", "10.9.0.1"], ["10.2.0.2", "10.9.0.2"])
ADDRESSES = ["10.2.0.1", "10.2.0.2"]


def used(site: sshd.Site, script: Path, *options: str, hosts: list[str] | None = None, **extra: str) -> list[str]:
    """Run ranks that reduce, and return the cables that carried it."""
    script.write_text(PROGRAM)
    machines = [server.host for server in site.servers]
    before = {cable: [machine.sent(cable) for machine in machines] for cable in ("cable", "fast")}
    done = launch(site, *options, str(script), hosts=hosts, **extra)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [line.partition("] ")[2] for line in done.stdout.splitlines()] == ["sum 3.0 of 2"] * 2
    sent = {cable: [machine.sent(cable) - first for machine, first in zip(machines, before[cable], strict=True)] for cable in before}
    assert all(amount > SENT or amount < NOISE for amounts in sent.values() for amount in amounts), sent
    return [cable for cable, amounts in sent.items() if min(amounts) > SENT]


@pytest.mark.parametrize("which", ["=fast", "10.9.0.0/16", "^cable"])
@pytest.mark.parametrize("how", ["names", "addresses", "ports", "ips"])
def test_the_bytes_go_over_the_interface_named(site: sshd.Site, tmp_path: Path, which: str, how: str) -> None:
    hosts = {"names": site.names, "addresses": ADDRESSES, "ports": site.names, "ips": []}[how]
    options = {"ports": ["-p", "7000"], "ips": ["--hostfile", hostfile(tmp_path, *BOTH)]}.get(how, [])
    assert used(site, tmp_path / "script.py", "--iface", which, *options, hosts=hosts) == ["fast"]


def test_without_a_word_it_is_what_the_hosts_are_called_by_and_the_variable_counts_as_well(site: sshd.Site, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    assert used(site, script, hosts=ADDRESSES) == ["cable"]
    assert used(site, script, "--hostfile", hostfile(tmp_path, *BOTH), hosts=[]) == ["cable", "fast"]
    assert used(site, script, hosts=ADDRESSES, RT_SOCKET_IFNAME="fast") == ["fast"]
    assert used(site, script, "--no-env", hosts=ADDRESSES, RT_SOCKET_IFNAME="fast") == ["cable"]


def test_ranks_with_different_numbers_of_addresses_use_the_first(site: sshd.Site, tmp_path: Path) -> None:
    uneven = hostfile(tmp_path, ["10.9.0.1", "10.2.0.1"], ["10.9.0.2", "10.2.0.2"])
    assert used(site, tmp_path / "script.py", "--iface", "fast,10.2.0.1/32", "--hostfile", uneven, hosts=[]) == ["fast"]


TOLD = f"""{SCRIPT}
print(*(os.environ.get(name) for name in sys.argv[1:]), sep="; ")
"""


def told(site: sshd.Site, script: Path, names: list[str], *options: str, hosts: list[str] | None = None, **extra: str) -> list[list[str]]:
    """Return per rank the variables of these names."""
    script.write_text(TOLD)
    done = launch(site, *options, str(script), *names, hosts=hosts, **extra)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [line.partition("] ")[2].split("; ") for line in sorted(done.stdout.splitlines())]


def test_libraries_are_told_of_it(site: sshd.Site, tmp_path: Path) -> None:
    script, names = tmp_path / "script.py", ["NCCL_SOCKET_IFNAME", "NCCL_HOST_IP"]
    nccl = ("--backend", "nccl")
    for which in ("=fast", "fast", "10.9.0.0/16", "^cable"):
        assert told(site, script, names, *nccl, "--iface", which) == [["=fast", "10.9.0.1"]] * 2
    assert told(site, script, names, *nccl, "--iface", "fast,cable") == [["=cable,fast", "10.9.0.1"]] * 2
    assert told(site, script, names, *nccl, "--iface", "fast", NCCL_SOCKET_IFNAME="mine") == [["mine", "10.9.0.1"]] * 2
    assert told(site, script, names, *nccl) == [["None", "10.2.0.1"]] * 2
    file = hostfile(tmp_path, *BOTH, rdma=[[None, "a"], ["a", None]])
    names = ["MLX_JACCL_COORDINATOR", "RT_JACCL_COORDINATOR"]
    options = ("--hostfile", file, "--backend", "jaccl", "--iface", "fast")
    assert told(site, script, names, *options, hosts=[]) == [["10.9.0.1:32323"] * 2] * 2


@pytest.mark.parametrize("hosts", [["host0", "host1"], ADDRESSES])
def test_an_interface_that_a_host_has_not_is_a_row_of_the_table(site: sshd.Site, hosts: list[str]) -> None:
    done = launch(site, "--iface", "=nosuch", "echo", "started", hosts=hosts)
    head, *rows, verdict = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and head.startswith("host ")
    assert verdict == "rt.launch: nothing was started: 2 of 2 hosts are not ready"
    for number, (host, row) in enumerate(zip(hosts, rows, strict=True), 1):
        found = rf"found lo \(.*\), cable \(10\.2\.0\.{number}/24.*\), fast \(10\.9\.0\.{number}/24.*\), expected one that matches"
        assert re.match(rf"{host} +RT_SOCKET_IFNAME==nosuch: {found}  +name interfaces or networks that it has: --iface", row), row


def test_ips_that_are_on_another_interface(site: sshd.Site, tmp_path: Path) -> None:
    file = hostfile(tmp_path, ["10.9.0.1"], ["10.2.0.2"])
    done = launch(site, "--hostfile", file, "--iface", "fast", "echo", "started", hosts=[])
    _, row, verdict = done.stderr.splitlines()
    assert (done.returncode, done.stdout, verdict) == (2, "", "rt.launch: nothing was started: 1 of 2 hosts is not ready")
    expected = r"expected one that matches and has one of the hostfile's ips \(10\.2\.0\.2\)  +name interfaces"
    assert row.startswith("host1 ") and re.search(expected, row), row


@pytest.mark.parametrize("options", [[], ["-p", "7000"]])
def test_ranks_of_this_host_alone(options: list[str]) -> None:
    done = launch_here("-n", "2", "--iface", "=nosuch", *options, "echo", "started")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("rt.launch: RT_SOCKET_IFNAME==nosuch: found .*, expected one that matches\n", done.stderr), done.stderr
    assert launch_here("-n", "1", "--iface", "=nosuch", "echo", "started").stdout == "started\n"  # it meets nobody
    assert launch_here("-n", "2", "--iface", "lo", *options, "true").returncode == 0
