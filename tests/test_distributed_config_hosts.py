"""``rt.distributed_config`` over real ssh: Linux hosts with real cables, and Macs whose tools are stand-ins on real hosts.

May live here: discovery, set-up, and a job over what was written. May not: what needs no host (``test_distributed_config``).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import documents
import macs
import netns
import pytest
import sshd
from hosts import PORT, PROGRAM, ROOT, ends, last_line, start
from macs import Mac

from rt.hostfile import Hostfile, read_hostfile

pytestmark = sshd.NEEDED

PATIENCE = 60.0


def config(site: sshd.Site, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the tool at the desk, in ``folder``."""
    program = f"cd '{folder}' && PYTHONPATH='{ROOT}' exec \"$0\" -m rt.distributed_config \"$@\""
    return subprocess.run(site.command("sh", "-c", program, sys.executable, *words), capture_output=True, text=True, timeout=PATIENCE)


def at_the_desk(site: sshd.Site, folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash there, as a user would type it."""
    words = site.command("bash", "-c", f"set -eo pipefail; cd '{folder}'; {line}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(words, env={**os.environ, "PATH": path, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=PATIENCE)


def at_once(host: netns.Host) -> None:
    """Let IPv6 addresses of new interfaces be used without the second in which a host asks whether they are its own."""
    host._run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")


def cable(left: netns.Host, left_name: str, right: netns.Host, right_name: str) -> None:
    """Lay a cable whose ends have no addresses."""
    left.ip(f"link add {left_name} type veth peer name {right_name} netns {right.holder}")
    left.ip(f"link set {left_name} up")
    right.ip(f"link set {right_name} up")


@contextlib.contextmanager
def neighbours(folder: Path, count: int, *, ways: int = 1, options: Mapping[int, Sequence[str]] = {}) -> Iterator[sshd.Site]:
    """Hosts in a ring of cables without addresses: ``right<n>`` of each leads to ``left<n>`` of the next."""
    with sshd.site(folder, count, options=options) as site:
        hosts = [server.host for server in site.servers]
        for host in hosts:
            at_once(host)
        for number, host in enumerate(hosts):
            for way in range(ways):
                cable(host, f"right{way}", hosts[(number + 1) % count], f"left{way}")
        yield site


def addresses(host: netns.Host) -> dict[str, list[str]]:
    links: list[dict[str, Any]] = json.loads(host.ip("-4 -j address show"))
    return {link["ifname"]: [f"{info['local']}/{info['prefixlen']}" for info in link["addr_info"]] for link in links}


def job(hosts: Sequence[netns.Host], written: Hostfile, folder: Path) -> list[str]:
    """Run a rank per host over the addresses of a hostfile, as a ring file has them."""
    ring = [[f"{ip}:{PORT + way}" for way, ip in enumerate(host.ips)] for host in written.hosts]
    (folder / "ring.json").write_text(json.dumps(ring))
    ranks = [
        start(hosts[int(host.ssh.removeprefix("host"))], RT_RANK=str(rank), RT_HOSTFILE=str(folder / "ring.json"), RT_INSECURE="1")
        for rank, host in enumerate(written.hosts)
    ]
    return [last_line(out) or err for _, out, err in ends(ranks)]


# --- Linux -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2])
def test_cables_without_addresses_become_a_ring_over_which_ranks_reduce(ways: int, tmp_path: Path) -> None:
    with neighbours(tmp_path, 4, ways=ways) as site:
        hosts = [server.host for server in site.servers]
        names = "host0,host2,host1,host3"  # not the order of the cables
        done = config(site, tmp_path, "--hosts", names, "--iface", "left,right", "--auto-setup", "--output", "hosts.json")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "over Ethernet, backend ring: ring host0 host1 host2 host3" in done.stderr and "set up: host0, host2" in done.stderr
        assert f"tried: {4 * ways} of {4 * ways} cables answer at both ends" in done.stderr
        written = read_hostfile(tmp_path / "hosts.json")
        assert [host.ssh for host in written.hosts] == ["host0", "host1", "host2", "host3"]
        assert [len(host.ips) for host in written.hosts] == [ways] * 4
        for rank, host in enumerate(written.hosts):
            there = addresses(hosts[rank])
            assert [f"{ip}/30" for ip in host.ips] == [there[f"left{way}"][0] for way in range(ways)]
        assert job(hosts, written, tmp_path) == ["sum 10.0 of 4"] * 4
        # A second run finds all as it should be and changes nothing.
        again = config(site, tmp_path, "--hosts", names, "--iface", "left,right", "--output", "again.json")
        assert "Setup for" not in again.stderr and read_hostfile(tmp_path / "again.json") == written


def test_from_cables_to_a_job_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with neighbours(tmp_path, 3, ways=2) as site:
        hosts = [server.host for server in site.servers]
        tool = "rt.distributed_config --hosts host0,host1,host2 --iface left,right --auto-setup --output hosts.json"
        done = at_the_desk(site, tmp_path, f"{tool} && rt.launch --hostfile hosts.json program.py")
        assert done.returncode == 0, done.stderr
        for host in hosts:  # 16 MiB were reduced, over the cables and not over the switch
            sent = {name: host.sent(name) for name in ("left0", "left1", "right0", "right1", "cable")}
            assert min(sent[name] for name in ("right0", "right1")) > 1 << 20 and sent["cable"] < 1 << 20, sent
    assert sorted(done.stdout.splitlines()) == [f"[{rank} host{rank}] sum 6.0 of 3" for rank in range(3)]


def test_a_cable_that_leads_elsewhere_is_named(tmp_path: Path) -> None:
    """Two ports have addresses of one network, but other ends: nobody hears anybody, so only the pings after the set-up can find it."""
    with sshd.site(tmp_path, 3) as site:
        hosts = [server.host for server in site.servers]
        for host in hosts:
            at_once(host)
        for number in range(2):
            cable(hosts[number], "right0", hosts[number + 1], "left0")
        for host, name, address in ((hosts[0], "left0", "192.168.7.1/30"), (hosts[2], "right0", "192.168.7.2/30")):
            host.ip(f"link add {name} type veth peer name nobody")
            host.ip(f"address add {address} dev {name}")
            host.ip(f"link set {name} up")
            host.ip("link set nobody up")
        words = ["--hosts", "host0,host1,host2", "--iface", "left,right", "--auto-setup", "--json"]
        done = config(site, tmp_path, *words, "--output", "hosts.json")
        fault = "host0 left0 (192.168.7.1) and host2 right0 (192.168.7.2) do not reach each other"
        assert done.returncode == 1 and f"no way through: {fault}: is it the cable, a firewall, or" in done.stderr
        assert "tried: 2 of 3 cables answer at both ends" in done.stderr
        found = {cable["ends"][0]["host"] + cable["ends"][1]["host"]: cable["unreached"] for cable in json.loads(done.stdout)["cables"]}
        assert found == {"host0host1": "", "host1host2": "", "host0host2": fault}
        assert len(read_hostfile(tmp_path / "hosts.json").hosts) == 3  # it may be the pings only that do not come through


def test_one_way_without_an_answer_and_hosts_without_ping(tmp_path: Path) -> None:
    without = {number: ["mount --bind /dev/null $(readlink -f $(command -v ping))"] for number in (1, 2)}
    with sshd.site(tmp_path, 3, prepare=without) as site:
        hosts = [server.host for server in site.servers]
        hosts[1]._run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all")
        done = config(site, tmp_path, "--hosts", "host0,host1", "--auto-setup")
        assert done.returncode == 1 and "no way through: host0 cable (10.2.0.1) gets no answer from host1 cable (10.2.0.2)" in done.stderr
        done = config(site, tmp_path, "--hosts", "host0,host2", "--auto-setup")
        assert done.returncode == 0 and "tried: 1 of 1 cable answers at both ends" in done.stderr
        done = config(site, tmp_path, "--hosts", "host1,host2", "--auto-setup")
        assert done.returncode == 0 and "not tried, as no end has a ping or is set up: host1 cable - host2 cable" in done.stderr


def test_networks_that_any_host_uses_are_left_alone(tmp_path: Path) -> None:
    with neighbours(tmp_path, 2) as site:
        hosts = [server.host for server in site.servers]
        hosts[1].ip("link add name other type bridge")
        hosts[1].ip("address add 192.168.0.1/24 dev other")
        hosts[1].ip("link set other up")
        hosts[0].ip("route add blackhole 192.168.2.0/24")
        hosts[0].ip("route add 192.168.1.0/24 via 10.2.0.2 table 7")  # as VPNs do
        done = config(site, tmp_path, "--hosts", "host0,host1", "--iface", "left,right", "--auto-setup", "--output", "hosts.json")
        assert done.returncode == 0, done.stderr
        written = read_hostfile(tmp_path / "hosts.json")
        assert [[ip.rpartition(".")[0] for ip in host.ips] for host in written.hosts] == [["192.168.3", "192.168.3"]] * 2
        assert job(hosts, written, tmp_path) == ["sum 3.0 of 2"] * 2


def test_hosts_on_one_switch_keep_their_addresses(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site:
        twice = config(site, tmp_path, "--hosts", "host0,10.2.0.1")
        assert twice.returncode == 1 and "host0 and 10.2.0.1: found one host of two names" in twice.stderr
        done = config(site, tmp_path, "--hosts", "host2,10.2.0.1,host1", "--auto-setup", "--output", "hosts.json")
        assert done.returncode == 0, done.stderr
        written = read_hostfile(tmp_path / "hosts.json")
        assert [(host.ssh, host.ips) for host in written.hosts] == [
            ("host2", ("10.2.0.3",)), ("10.2.0.1", ("10.2.0.1",)), ("host1", ("10.2.0.2",)),
        ]  # fmt: skip
        assert written.backend == "" and "set up" not in done.stderr


def test_hosts_without_ipv4_keep_their_ipv6_addresses(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with sshd.site(tmp_path, 3, ipv6=True) as site:
        for server in site.servers:
            server.host.ip("-4 address flush dev cable")
        tool = "rt.distributed_config --hosts fd02::1,fd02::2,fd02::3 --iface fd02::/16 --auto-setup --json --output hosts.json"
        done = at_the_desk(site, tmp_path, f"{tool} > told.json && rt.launch --hostfile hosts.json program.py")
        assert done.returncode == 0, done.stderr
        written = read_hostfile(tmp_path / "hosts.json")
        assert [(host.ssh, host.ips) for host in written.hosts] == [(f"fd02::{number}", (f"fd02::{number}",)) for number in (1, 2, 3)]
        assert "tried: 1 of 1 cable answers at both ends" in done.stderr and "Setup for" not in done.stderr
        assert sorted(done.stdout.splitlines()) == [f"[{rank} fd02::{rank + 1}] sum 6.0 of 3" for rank in range(3)]
        told = json.loads((tmp_path / "told.json").read_text())
        assert [host["ports"][0]["addresses"] for host in told["hosts"]] == [[f"fd02::{number}/64"] for number in (1, 2, 3)]
        assert all(list(addresses(server.host).values()) == [["127.0.0.1/8"]] for server in site.servers)  # no host was given any


def test_rdma_devices_make_a_mesh_on_a_switch(tmp_path: Path) -> None:
    """The devices are a stand-in of rdma's; which cable each is on is asked of the real hosts."""
    options = {number: [f"SetEnv PATH={tmp_path}/bin{number}:/usr/bin:/bin:/usr/sbin:/sbin"] for number in range(3)}
    for number in range(3):
        (tmp_path / f"bin{number}").mkdir()
        device = {"ifindex": 0, "ifname": f"mlx5_{number}", "port": 1, "state": "ACTIVE", "physical_state": "LINK_UP", "netdev": "cable"}
        macs.executable(tmp_path / f"bin{number}" / "rdma", f"echo '{json.dumps([device])}'")
    with sshd.site(tmp_path, 3, options=options) as site:
        done = config(site, tmp_path, "--hosts", "host0,host1,host2")
    assert "over RDMA, backend jaccl: mesh host0 host1 host2" in done.stderr
    assert [host["rdma"] for host in json.loads(done.stdout)["hosts"]] == [
        [None, "mlx5_0", "mlx5_0"], ["mlx5_1", None, "mlx5_1"], ["mlx5_2", "mlx5_2", None],
    ]  # fmt: skip


def test_a_cable_that_is_pulled_is_missing_from_the_ring(tmp_path: Path) -> None:
    with neighbours(tmp_path, 3) as site:
        names = ["--hosts", "host0,host1,host2", "--iface", "left,right"]
        site.servers[0].host.ip("link set right0 down")
        done = config(site, tmp_path, *names, "--verbose", "--output", "hosts.json")
        assert done.returncode == 1 and not (tmp_path / "hosts.json").exists()
        for said in ("host0 is connected to host2 only", "host1 is connected to host2 only", "right0 (down)", "--hosts host0,host2"):
            assert said in done.stderr, done.stderr


def test_a_file_of_facts_says_the_same_again_without_the_hosts(tmp_path: Path) -> None:
    with neighbours(tmp_path, 3) as site:
        done = config(site, tmp_path, "--hosts", "host0,host1,host2", "--iface", "left,right", "--json", "--save-facts", "facts.json")
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "rt.distributed_config", "--facts", str(tmp_path / "facts.json"), "--iface", "left,right", "--json"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert again.stdout == done.stdout and json.loads(again.stdout)["setup"]["host0"][0].startswith("ip address replace 192.168.")


def test_hosts_that_do_not_answer(tmp_path: Path) -> None:
    password = ["PubkeyAuthentication no", "PasswordAuthentication yes"]
    with sshd.site(tmp_path, 3, options={1: password}) as site:
        site.servers[2].kill()
        done = config(site, tmp_path, "--hosts", "host0,host1,host2,localhost")
        assert (done.returncode, done.stdout) == (1, "")
        assert "host1: " in done.stderr and "ssh-copy-id host1" in done.stderr and "host2: " in done.stderr
        assert "--ignore-unreachable goes on without" in done.stderr and "localhost" not in done.stderr
        done = config(site, tmp_path, "--hosts", "host0,host1,localhost", "--ignore-unreachable")
        assert [host["ssh"] for host in json.loads(done.stdout)["hosts"]] == ["host0", "localhost"], done.stderr


def test_a_command_that_fails_is_said_and_no_hostfile_written(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2, options={1: [f"SetEnv PATH={tmp_path}/bin:/usr/bin:/bin:/usr/sbin:/sbin"]}) as site:
        hosts = [server.host for server in site.servers]
        for host in hosts:
            at_once(host)
        cable(hosts[0], "right0", hosts[1], "left0")
        (tmp_path / "bin").mkdir()
        macs.executable(tmp_path / "bin" / "ip", '[ "$2" != replace ] || { echo "ip: broken" >&2; exit 9; }; exec /usr/sbin/ip "$@"')
        done = config(site, tmp_path, "--hosts", "host0,host1", "--iface", "left,right", "--auto-setup", "--output", "hosts.json")
        assert done.returncode == 1 and "host1: a command ended with 9: ip: broken" in done.stderr
        assert not (tmp_path / "hosts.json").exists()


@pytest.mark.parametrize("manager", ["NetworkManager", "systemd-networkd"])
def test_addresses_that_outlive_a_restart(manager: str, tmp_path: Path) -> None:
    """The managers are stand-ins that note and do what they are told, networkd's in its own time: neither runs without a system bus.

    The file for networkd is real.
    """
    bins = [tmp_path / f"bin{number}" for number in range(2)]
    options = {number: [f"SetEnv PATH={folder}:/usr/bin:/bin:/usr/sbin:/sbin"] for number, folder in enumerate(bins)}
    prepare = {
        number: ["mkdir -p /etc/systemd/network", f"mount --bind {folder}/network /etc/systemd/network"]
        for number, folder in enumerate(bins)
    }
    for folder in bins:
        (folder / "network").mkdir(parents=True)
        states = ["active" if manager == name else "inactive" for name in ("NetworkManager", "systemd-networkd")]
        macs.executable(folder / "systemctl", f"printf '{states[0]}\\n{states[1]}\\n'; exit 3")
        note, setting = f'echo "$*" >> "{folder}/done"', "sed -n s/^Address=//p /etc/systemd/network/10-rt-"
        macs.executable(folder / "nmcli", f'{note}; [ "$2" != delete ] && if [ "$2" = add ]; then ip address add "${{12}}" dev "$8"; fi')
        apply = f'for i in left0 right0; do ip address add "$({setting}$i.network)" dev $i; done'
        macs.executable(folder / "networkctl", f"{note}; (sleep 1; {apply}) >/dev/null 2>&1 &")
    with sshd.site(tmp_path, 2, options=options, prepare=prepare) as site:
        hosts = [server.host for server in site.servers]
        for host in hosts:
            at_once(host)
        cable(hosts[0], "right0", hosts[1], "left0")
        words = ["--hosts", "host0,host1", "--iface", "left,right", "--auto-setup", "--persist", "--output", "hosts.json"]
        done = config(site, tmp_path, *words)
        assert done.returncode == 0, done.stderr
    told = (bins[1] / "done").read_text().splitlines()
    if manager == "NetworkManager":
        assert told[0] == "connection delete rt-left0" and told[2] == "connection up rt-left0"
        assert "ifname left0 ipv4.method manual ipv4.addresses 192.168.0.2/30" in told[1]
    else:
        assert told == ["reload"]
        lines = (bins[1] / "network" / "10-rt-left0.network").read_text().splitlines()
        assert lines[:2] == ["[Match]", "Name=left0"] and "Address=192.168.0.2/30" in lines


# --- Macs --------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def site_of_macs(folder: Path, made: Sequence[Mac], config: Sequence[str] = ()) -> Iterator[sshd.Site]:
    """Hosts whose ssh sessions find the tools of Macs first."""
    bins = [macs.stand_ins(folder / f"bin{mac.number}", mac) for mac in made]
    options = {number: [f"SetEnv PATH={path}:/usr/bin:/bin"] for number, path in enumerate(bins)}
    with sshd.site(folder, len(made), options=options, config=config) as site:
        yield site


NAMES = ["--hosts", "host0,host1,host2,host3"]


def done_on(folder: Path, mac: Mac) -> list[str]:
    noted = folder / f"bin{mac.number}" / "done"
    return noted.read_text().splitlines() if noted.exists() else []


def test_the_recipe_for_jaccl(tmp_path: Path) -> None:
    made = macs.macs(4, macs.MESH)
    with site_of_macs(tmp_path, made) as site:
        drawn = config(site, tmp_path, "--verbose", *NAMES, "--over", "thunderbolt", "--dot")
        picture = subprocess.run(["dot", "-Tpng"], input=drawn.stdout.encode(), capture_output=True, timeout=PATIENCE, check=True)
        assert picture.stdout.startswith(b"\x89PNG")
        words = ["--verbose", *NAMES, "--over", "thunderbolt", "--backend", "jaccl", "--auto-setup", "--output", "m.json"]
        done = config(site, tmp_path, *words)
        assert done.returncode == 0, done.stderr
    written = read_hostfile(tmp_path / "m.json")
    assert (written.backend, [host.ips for host in written.hosts]) == ("jaccl", [(f"192.168.0.{10 + number}",) for number in range(4)])
    assert written.hosts[1].rdma == ("rdma_en2", None, "rdma_en3", "rdma_en4")
    assert done_on(tmp_path, made[0])[:3] == [
        "ifconfig bridge0 down", "ifconfig en2 inet 192.168.1.1 netmask 255.255.255.252", "route change 192.168.1.2 -interface en2",
    ]  # fmt: skip
    assert [len(done_on(tmp_path, mac)) for mac in made] == [7] * 4


def test_the_recipe_for_a_ring(tmp_path: Path) -> None:
    made = macs.macs(4, macs.CROSSED_RING)
    for mac in made:
        mac.rdma = False
    with site_of_macs(tmp_path, made) as site:
        done = config(site, tmp_path, "--verbose", *NAMES, "--auto-setup", "--output", "hosts.json")
        assert done.returncode == 0, done.stderr
    assert "no RDMA device" in done.stderr
    written = read_hostfile(tmp_path / "hosts.json")
    assert (written.backend, [host.ssh for host in written.hosts]) == ("ring", ["host0", "host2", "host1", "host3"])
    for rank, host in enumerate(written.hosts):
        here, left = (made[int(written.hosts[each].ssh[-1])] for each in (rank, rank - 1))
        port = next(port for port, (peer, _) in here.peers.items() if peer == left.number)
        assert f"ifconfig en{port + 1} inet {host.ips[0]} netmask 255.255.255.252" in done_on(tmp_path, here)


def lay(site: sshd.Site, folder: Path, made: Sequence[Mac], laid: Sequence[tuple[macs.End, macs.End]]) -> None:
    """Lay the cables of Macs between their hosts, and have ``sudo ifconfig`` give them the addresses, besides noting what it was told."""
    for (left, left_port), (right, right_port) in laid:
        cable(site.servers[left].host, f"en{left_port + 1}", site.servers[right].host, f"en{right_port + 1}")
    for mac in made:
        sudo = folder / f"bin{mac.number}" / "sudo"
        give = '[ "$1 $3 $5" != "ifconfig inet netmask" ] || exec /usr/sbin/ip address replace "$4/$6" dev "$2"'
        sudo.write_text(f"{sudo.read_text()}{give}\n")


def test_the_guide_as_it_is_printed(tmp_path: Path) -> None:
    """Line by line, in its order. The tools of the Macs are stand-ins; hosts, ssh, cables and ranks are real."""
    page = (Path(ROOT) / "docs" / "distributed_config.md").read_text(encoding="utf-8")
    blocks = [block for block in documents.blocks(page) if Path(__file__).name in block.why_not]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.code.splitlines()]
    assert [line.split()[0] for line in lines] == ["rt.distributed_config", "rt.launch", *["rt.distributed_config"] * 3]
    made = macs.macs(4, macs.MESH)
    known = [
        f"Host m{number}\n  HostName 10.2.0.{number}\n  Port {2199 + number}\n  HostKeyAlias host{number - 1}" for number in range(1, 5)
    ]
    (tmp_path / "train.py").write_text(PROGRAM)
    with site_of_macs(tmp_path, made, known) as site:
        lay(site, tmp_path, made, macs.MESH)
        said = {}
        for line in lines:
            done = at_the_desk(site, tmp_path, line)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            said[line] = sorted(done.stdout.splitlines())
        sent = [server.host.sent("cable") for server in site.servers]
    ranks = [f"[{rank} {host.ssh}] sum 10.0 of 4" for rank, host in enumerate(read_hostfile(tmp_path / "ring.json").hosts)]
    assert [*said.values()] == [[], ranks, [], [], []]
    assert max(sent) < 1 << 20  # 16 MiB were reduced, over the cables and not over the switch
    backends = [read_hostfile(tmp_path / name).backend for name in ("ring.json", "jaccl.json", "hosts.json")]
    assert backends == ["ring", "jaccl", ""]
    assert (tmp_path / "cables.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_mesh(tmp_path: Path) -> None:
    made = macs.macs(4, macs.MESH)
    del made[0].peers[3]
    with site_of_macs(tmp_path, made) as site:
        strict = config(site, tmp_path, *NAMES, "--backend", "jaccl", "--svg", "cables.svg", "--save-facts", "facts.json")
        assert strict.returncode == 1 and "host0 is not connected to host3" in strict.stderr
        assert "broken cable: host3 en2 sees host0 en4, which does not see it" in strict.stderr
        assert "broken: host3 en2 sees host0 en4" in (tmp_path / "cables.svg").read_text()
        best = config(site, tmp_path, *NAMES)
        assert json.loads(best.stdout)["backend"] == "jaccl-ring"


def test_two_rings(tmp_path: Path) -> None:
    made = macs.macs(4, macs.TWO_RINGS)
    with site_of_macs(tmp_path, made) as site:
        done = config(site, tmp_path, *NAMES, "--backend", "ring")
    assert "2 cables between neighbours: as many rings" in done.stderr
    assert [len(host["ips"]) for host in json.loads(done.stdout)["hosts"]] == [2] * 4


def test_one_mac_without_sudo_gets_its_commands_printed(tmp_path: Path) -> None:
    made = macs.macs(4, macs.RING)
    made[2].sudo = False
    with site_of_macs(tmp_path, made) as site:
        done = config(site, tmp_path, *NAMES, "--auto-setup", "--output", "hosts.json")
    assert done.returncode == 1 and "set up: host0, host1, host3" in done.stderr
    assert "Setup for host2 (its sudo wants a password: run them yourself)" in done.stderr
    assert "sudo ifconfig en2 inet 192.168.1.10 netmask 255.255.255.252" in done.stderr
    assert done_on(tmp_path, made[2]) == [] and len(done_on(tmp_path, made[1])) == 5
    assert len(read_hostfile(tmp_path / "hosts.json").hosts) == 4


def test_a_mac_that_gets_no_answer(tmp_path: Path) -> None:
    made = macs.macs(4, macs.RING)
    made[1].silent = ["192.168.1.1"]
    with site_of_macs(tmp_path, made) as site:
        done = config(site, tmp_path, *NAMES, "--auto-setup", "--output", "hosts.json")
    assert done.returncode == 1
    assert "no way through: host1 en2 (192.168.1.2) gets no answer from host0 en2 (192.168.1.1): is it the cable" in done.stderr
    assert "tried: 3 of 4 cables answer at both ends" in done.stderr
    assert "-n -c 1 -t 1 -S 192.168.1.2 192.168.1.1" in (tmp_path / "bin1" / "pinged").read_text().splitlines()


def test_one_connection_per_host_and_nothing_is_changed_unless_asked(tmp_path: Path) -> None:
    made = macs.macs(2, [((0, 1), (1, 1))])
    with site_of_macs(tmp_path, made) as site:
        assert config(site, tmp_path, "--hosts", "host0,host1").returncode == 0
        assert [server.log.read_text().count("Accepted publickey") for server in site.servers] == [1, 1]  # nobody is asked twice
    assert [done_on(tmp_path, mac) for mac in made] == [[], []]


def test_macs_on_one_network_go_by_their_addresses(tmp_path: Path) -> None:
    made = macs.macs(2, [])
    with site_of_macs(tmp_path, made) as site:
        done = config(site, tmp_path, "--hosts", "host0,host1", "--over", "ethernet")
    assert [host["ips"] for host in json.loads(done.stdout)["hosts"]] == [["192.168.0.10"], ["192.168.0.11"]]
    assert "nobody heard anybody" in done.stderr
