"""What hosts say of themselves, and what is understood of it.

May live here: ``rt._wiring_facts``, ``rt._wiring_macos``, ``rt._wiring_linux``. May not: more than one host.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import linuxes
import macs
import pytest
from linuxes import Nic

from rt import _wiring_facts as facts
from rt import _wiring_linux, _wiring_macos
from rt._wiring_facts import Facts
from rt._wiring_model import ETHERNET, THUNDERBOLT, WIRELESS, by_number
from rt.errors import ConfigError


def test_a_mac() -> None:
    mac = macs.macs(2, [((0, 1), (1, 3))])[0]
    mac.extra_ifconfig = "utun3: flags=8051<UP,POINTOPOINT,RUNNING> mtu 1380\n\tinet 100.64.0.9 --> 100.64.0.9 netmask 0xffffffff\n"
    mac.extra_routes = (
        "10                 utun3              USc                 utun3\n172.16/12          utun3  USc  utun3\n0/1 utun3 USc utun3\n"
    )
    machine = _wiring_macos.machine(7, mac.facts())
    assert (machine.index, machine.ssh, machine.system, machine.address, machine.routed) == (7, "m0", "Darwin", "192.168.0.10", True)
    assert (machine.root, machine.sudo, machine.remarks) == (False, True, ())
    assert [(port.name, port.kind) for port in machine.ports] == [
        ("en0", ETHERNET), ("en1", WIRELESS), *((f"en{port}", THUNDERBOLT) for port in range(2, 6)),
    ]  # fmt: skip
    first, second = machine.ports[2:4]
    assert (first.speed, first.up, first.rdma, first.bridge, bool(first.peer)) == (80.0, True, "rdma_en2", "bridge0", True)
    assert (second.speed, second.up, second.peer) == (0.0, False, "")
    wanted = ("192.168.0.0/24", "10.0.0.0/8", "172.16.0.0/12", "127.0.0.0/8", "100.64.0.9/32")
    assert {IPv4Network(network) for network in wanted} <= machine.networks


def test_a_mac_without_rdma_or_sudo_or_words() -> None:
    mac = macs.Mac(0, rdma=False, sudo=False)
    machine = _wiring_macos.machine(0, mac.facts())
    assert not machine.sudo and not any(port.rdma for port in machine.ports)
    mute = _wiring_macos.machine(0, Facts("m", {"uname": (0, "Darwin\n"), "system_profiler": (0, "crash\n")}))
    assert mute.ports == () and "system_profiler" in mute.remarks[0]


def test_a_linux_host() -> None:
    nics = [
        Nic("enp10s0", "02:00:00:00:00:0A", "10.1.0.1/24", 100_000, ["02:00:00:00:00:0b"], rdma="mlx5_0"),
        Nic("enp2s0", "02:00:00:00:00:02", up=False, rdma="mlx5_1"),
        Nic("thunderbolt0", "02:00:00:00:00:03", far="bbbb", number=3),
        Nic("wlp3s0", "02:00:00:00:00:04", "192.168.7.2/24"),
        Nic("br0", "02:00:00:00:00:05", "192.168.8.2/24", kind="bridge"),
        Nic("enp9s0", "02:00:00:00:00:05", master="br0"),
        Nic("wg0", "02:00:00:00:00:06", "10.200.0.1/16", kind="wireguard"),
    ]
    machine = _wiring_linux.machine(0, linuxes.facts("n", nics, default="br0", uuid="aaaa", managers="inactive\nactive\n"))
    assert [port.name for port in machine.ports] == ["br0", "enp2s0", "enp10s0", "thunderbolt0", "wlp3s0"]
    _, down, fast, thunderbolt, wireless = machine.ports
    assert (fast.speed, fast.rdma, fast.mac, fast.neighbours) == (100.0, "mlx5_0", "02:00:00:00:00:0a", frozenset({"02:00:00:00:00:0b"}))
    assert (down.up, down.speed, down.rdma, wireless.kind) == (False, 0.0, "", WIRELESS)
    assert (thunderbolt.kind, thunderbolt.uuid, thunderbolt.peer, thunderbolt.speed) == (THUNDERBOLT, "AAAA", "BBBB", 40.0)
    assert (machine.address, machine.routed, machine.root, machine.sudo, machine.manager) == (
        "192.168.8.2",
        True,
        True,
        True,
        "systemd-networkd",
    )
    assert IPv4Network("10.200.0.0/16") in machine.networks
    assert machine.remarks == ()


def with_answer(told: Facts, question: str, *items: dict[str, Any], text: str = "") -> Facts:
    """Add entries, or lines, to what a tool of a Linux host said."""
    code, out = told.answers[question]
    more = json.dumps([*json.loads(out), *items]) if items else out + text
    return replace(told, answers={**told.answers, question: (code, more)})


def test_the_default_route_is_that_of_the_main_table() -> None:
    nics = [Nic("eth0", "02:00:00:00:00:01", "192.168.8.2/24"), Nic("wg0", "02:00:00:00:00:02", "10.200.0.1/16", kind="wireguard")]
    vpn = {"dst": "default", "dev": "wg0", "table": "51820", "scope": "link", "flags": []}
    told = with_answer(linuxes.facts("n", nics, default="eth0"), "routes", {**vpn, "metric": 0})
    code, out = told.answers["routes"]
    first = replace(told, answers={**told.answers, "routes": (code, json.dumps(json.loads(out)[::-1]))})  # the kernel's order of tables
    assert [_wiring_linux.machine(0, each).address for each in (told, first)] == ["192.168.8.2"] * 2
    # Without a way to everybody else there is at times one that only refuses, on the loopback interface.
    alone = with_answer(linuxes.facts("n", nics), "routes", {"type": "unreachable", "dst": "default", "dev": "lo", "metric": 4294967295})
    assert (_wiring_linux.machine(0, alone).routed, _wiring_linux.machine(0, alone).address) == (False, "192.168.8.2")


def test_ipv6_addresses_that_last_are_those_of_a_port() -> None:
    infos = [
        {"family": "inet6", "local": "2001:db8::99", "prefixlen": 64, "scope": "global", "temporary": True, "dynamic": True},
        {"family": "inet6", "local": "2001:db8::1", "prefixlen": 64, "scope": "global", "dynamic": True, "mngtmpaddr": True},
        {"family": "inet6", "local": "fd01::1", "prefixlen": 64, "scope": "global"},
        {"family": "inet6", "local": "fd02::1", "prefixlen": 64, "scope": "global", "deprecated": True},
        {"family": "inet6", "local": "fd03::1", "prefixlen": 64, "scope": "global", "tentative": True, "dadfailed": True},
        {"family": "inet6", "local": "fe80::1", "prefixlen": 64, "scope": "link"},
    ]
    link = {"ifname": "eth1", "flags": ["UP", "LOWER_UP"], "link_type": "ether", "address": "02:00:00:00:00:01", "addr_info": infos}
    machine = _wiring_linux.machine(0, with_answer(linuxes.facts("n", []), "addresses", link))
    (port,) = machine.ports
    assert (port.addresses, list(map(str, port.ipv6))) == ((), ["2001:db8::1/64", "fd01::1/64"])
    assert (machine.address, machine.networks) == ("2001:db8::1", {IPv4Network("127.0.0.0/8")})
    both = with_answer(linuxes.facts("n", [Nic("eth2", "02:00:00:00:00:02", "10.0.0.5/24")]), "addresses", link)
    assert _wiring_linux.machine(0, both).address == "10.0.0.5"


def test_a_radio_is_known_by_more_than_its_name_and_infiniband_is_a_cable() -> None:
    told = linuxes.facts("n", [Nic("radio0", "02:00:00:00:00:01"), Nic("eth0", "02:00:00:00:00:02")])
    told = with_answer(told, "sysfs", text="/sys/class/net/radio0/phy80211:yes\n")
    mac = "80:00:02:08:fe:80:00:00:00:00:00:00:00:11:22:33:44:55:66:77"
    told = with_answer(told, "addresses", {"ifname": "ib0", "flags": ["UP", "LOWER_UP"], "link_type": "infiniband", "address": mac})
    told = with_answer(told, "rdma", {"ifname": "mlx5_0", "port": 1, "state": "ACTIVE", "netdev": "ib0"})
    ports = {port.name: port for port in _wiring_linux.machine(0, told).ports}
    assert {name: port.kind for name, port in ports.items()} == {"radio0": WIRELESS, "eth0": ETHERNET, "ib0": ETHERNET}
    assert (ports["ib0"].mac, ports["ib0"].rdma) == (mac, "mlx5_0")
    assert {name: port.ipoib for name, port in ports.items()} == {"radio0": "", "eth0": "", "ib0": "datagram"}
    told = with_answer(told, "sysfs", text="/sys/class/net/ib0/mode:connected\n")  # Documentation/infiniband/ipoib.rst
    assert [port.ipoib for port in _wiring_linux.machine(0, told).ports if port.name == "ib0"] == ["connected"]


def test_a_linux_host_without_tools() -> None:
    machine = _wiring_linux.machine(0, Facts("n", {"uname": (0, "Linux\n"), "addresses": (127, "")}, said="sh: ip: not found\nno ping\n"))
    assert [remark.split()[0] for remark in machine.remarks] == ["`ip", "it", "`ip"]


def test_this_host_answers_every_question() -> None:
    mark = facts.new_mark()
    done = subprocess.run(["sh", "-s"], input=facts.script(mark), capture_output=True, text=True, timeout=60, check=True)
    told = facts.read("here", mark, done.stdout, done.stderr)
    assert told.system == subprocess.run(["uname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
    if sys.platform == "linux":
        assert set(told.answers) == {"uname", "user", "sudo", "addresses", "routes", "rdma", "sysfs", "neighbours", "managers"}
        assert any(link.get("ifname") == "lo" for link in json.loads(told.text("addresses")))


def test_answers_that_end_anywhere_are_kept_as_they_are() -> None:
    told = facts.read("n", "mark", "banner\nmark one\na\nno end\nmark = 0\nmark two\n\nmark = 3\nmark cut\nhalf", "")
    assert told.answers == {"one": (0, "a\nno end"), "two": (3, "")}
    assert (told.text("one"), told.text("two"), told.text("three")) == ("a\nno end", "", "")


def test_facts_come_back_from_a_file(tmp_path: Path) -> None:
    hosts = [mac.facts() for mac in macs.macs(2, [((0, 1), (1, 3))])]
    facts.save(str(tmp_path / "f.json"), hosts, {"m9": "no answer"})
    assert facts.replay(str(tmp_path / "f.json")) == (hosts, {"m9": "no answer"})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", r"found \[\]"),
        ('{"format": "rt.distributed_config facts 9"}', "facts 9"),
        ('{"format": "rt.distributed_config facts 1"}', 'no list "hosts"'),
        ('{"format": "rt.distributed_config facts 1", "hosts": [{"ssh": "a"}]}', r"hosts\[0\]: found .*expected"),
        ('{"format": "rt.distributed_config facts 1", "hosts": []}', "found no host in it"),
        ('{"hosts": [', "no JSON at line 1"),
    ],
)
def test_a_file_that_is_no_facts(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ConfigError, match=found):
        facts.replay(str(tmp_path / "f.json"))


def test_numbers_in_names_sort_as_numbers() -> None:
    assert sorted(["en10", "en2", "bridge0", "en2a"], key=by_number) == ["bridge0", "en2", "en2a", "en10"]
    assert by_number("\u00b2") == ("\u00b2",)  # a digit, but none that can be counted with
