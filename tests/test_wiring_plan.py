"""Addresses for cables: nobody's network is taken twice, and what is good is kept.

May live here: ``rt._wiring_plan`` and ``rt._wiring_commands``. May not: running commands.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt._wiring_commands import commands, not_kept
from rt._wiring_model import ETHERNET, THUNDERBOLT, Machine, Port, Segment
from rt._wiring_plan import plan
from rt.errors import ConfigError

networks = st.builds(
    lambda pool, bits, prefix: IPv4Network(
        (int(pool.network_address) | (bits & int(pool.hostmask)), max(prefix, pool.prefixlen)), strict=False
    ),
    st.sampled_from([IPv4Network("192.168.0.0/16"), IPv4Network("10.0.0.0/8"), IPv4Network("192.168.0.0/20")]),
    st.integers(0, 2**32 - 1),
    st.integers(17, 32),
)


def machine(index: int, *ports: Port, used: Sequence[str | IPv4Network] = (), **more: object) -> Machine:
    own = {address.network for port in ports for address in port.addresses}
    given = {IPv4Network(network) for network in used}
    return Machine(index, f"m{index}", str(more.pop("system", "Linux")), ports, networks=frozenset(own | given), **more)  # type: ignore[arg-type]


def port(host: int, name: str, *addresses: str, bridge: str = "") -> Port:
    return Port(host, name, THUNDERBOLT, addresses=tuple(map(IPv4Interface, addresses)), bridge=bridge)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.lists(networks, max_size=30), st.lists(st.integers(2, 12), max_size=4))
def test_no_two_networks_overlap_and_none_is_in_use(size: int, used: list[IPv4Network], switches: list[int]) -> None:
    cables = [Segment((port(left, f"en{right}"), port(right, f"en{left}"))) for left, right in itertools.combinations(range(size), 2)]
    shared = [Segment(tuple(port(host, f"sw{number}") for host in range(min(count, size)))) for number, count in enumerate(switches)]
    machines = [machine(host, used=used if host % 2 else ()) for host in range(size)]
    wires = plan(machines, [*cables, *shared])
    found = [wire.addresses[0].network for wire in wires]
    assert not any(left.overlaps(right) for left, right in itertools.combinations(found, 2))
    assert not any(network.overlaps(other) for network in found for other in used)
    for wire in wires:
        assert wire.fresh and len(set(wire.addresses)) == len(wire.segment.ports)
        assert all(each.network == wire.addresses[0].network and each.ip in list(each.network.hosts()) for each in wire.addresses)


def test_the_first_networks_are_those_that_mlx_gives() -> None:
    wires = plan([machine(0), machine(1)], [Segment((port(0, "a"), port(1, "a"))), Segment((port(0, "b"), port(1, "b")))])
    assert [list(map(str, wire.addresses)) for wire in wires] == [
        ["192.168.0.1/30", "192.168.0.2/30"],
        ["192.168.0.5/30", "192.168.0.6/30"],
    ]


def test_addresses_that_are_there_are_kept() -> None:
    ends = port(0, "a", "10.9.0.1/24"), port(1, "a", "169.254.3.4/16", "10.9.0.7/24")
    (wire,) = plan([machine(0, ends[0]), machine(1, ends[1])], [Segment(ends)])
    assert (wire.of(0), wire.of(1), wire.fresh) == ("10.9.0.1", "10.9.0.7", False)


def six(host: int, *addresses: str, four: Sequence[str] = (), name: str = "a") -> Port:
    return replace(port(host, name, *four), ipv6=tuple(map(IPv6Interface, addresses)))


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        (six(0, "fd01::1/64", "2001:db8::1/64"), six(1, "2001:db8::2/64"), ["2001:db8::1", "2001:db8::2"]),
        (six(0, "fd01::1/64", four=["10.9.0.1/24"]), six(1, "fd01::2/64", four=["10.9.0.2/24"]), ["10.9.0.1", "10.9.0.2"]),
        (six(0, "fd01::1/64", four=["10.9.0.1/24"]), six(1, "fd01::2/64"), ["fd01::1", "fd01::2"]),  # one has no IPv4
        (six(0, "fd01::1/64"), six(1, "fd02::2/64"), ["192.168.0.1", "192.168.0.2"]),
        (six(0, "fd01::1/64"), six(1), ["192.168.0.1", "192.168.0.2"]),
        (six(0, "fd01::1/128"), six(1, "fd01::1/128"), ["192.168.0.1", "192.168.0.2"]),  # DHCPv6 says nothing of a network
    ],
)
def test_ipv6_addresses_are_kept_where_there_is_no_common_ipv4(left: Port, right: Port, found: list[str]) -> None:
    (wire,) = plan([machine(0, left), machine(1, right)], [Segment((left, right))])
    assert ([wire.of(0), wire.of(1)], wire.fresh) == (found, found[0].startswith("192"))


def test_an_ipv6_network_on_two_cables_is_kept_for_one() -> None:
    ends = [six(host, f"fd01::{host}{place}/64", name=name) for host in (0, 1) for place, name in enumerate("ab")]
    segments = [Segment((ends[place], ends[place + 2])) for place in range(2)]
    lan = [replace(segment, ports=tuple(replace(end, kind=ETHERNET) for end in segment.ports)) for segment in segments]
    assert [wire.fresh for wire in plan([machine(0, *ends[:2]), machine(1, *ends[2:])], segments)] == [True, True]  # Thunderbolt
    assert [wire.fresh for wire in plan([machine(0, *ends[:2]), machine(1, *ends[2:])], lan)] == [False, True]


def test_an_interface_beside_one_with_ipv4_is_no_way_of_its_own() -> None:
    """A router told both interfaces its IPv6 network: what is sent from one's address may leave by the other."""
    ends = [(six(host, f"fd01::{host}a/64"), six(host, f"fd01::{host}b/64", four=[f"10.9.0.{host + 1}/24"], name="b")) for host in (0, 1)]
    lan = [Segment(tuple(replace(end, kind=ETHERNET) for end in pair)) for pair in zip(*ends, strict=True)]
    assert [wire.fresh for wire in plan([machine(0, *ends[0]), machine(1, *ends[1])], lan)] == [True, False]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (port(0, "a", "10.9.0.1/24"), port(1, "a", "10.8.0.7/24")),  # two networks
        (port(0, "a", "10.9.0.1/24"), port(1, "a", "10.9.0.1/24")),  # one address twice
        (port(0, "a", "10.9.0.1/24"), port(1, "a")),
        (port(0, "a", "169.254.3.4/16"), port(1, "a", "169.254.3.5/16")),  # given by nobody
        (port(0, "a", "10.9.0.1/24", bridge="bridge0"), port(1, "a", "10.9.0.7/24")),
    ],
)
def test_addresses_that_do_not_join_two_ports_are_not_kept(left: Port, right: Port) -> None:
    (wire,) = plan([machine(0, left), machine(1, right)], [Segment((left, right))])
    assert wire.fresh


def test_one_network_on_two_cables_is_kept_for_none_that_would_be_ambiguous() -> None:
    ports = [port(0, "a", "10.0.0.1/30"), port(1, "a", "10.0.0.2/30"), port(2, "a", "10.0.0.1/30"), port(3, "a", "10.0.0.2/30")]
    wires = plan([machine(each.host, each) for each in ports], [Segment((ports[0], ports[1])), Segment((ports[2], ports[3]))])
    assert [wire.fresh for wire in wires] == [False, True]
    elsewhere = port(0, "wlan0", "10.0.0.9/24")
    (wire,) = plan([machine(0, ports[0], elsewhere), machine(1, ports[1])], [Segment((ports[0], ports[1]))])
    assert wire.fresh


def test_no_network_is_left() -> None:
    used = ["192.168.0.0/16", "10.0.0.0/8", "172.16.0.0/12"]
    with pytest.raises(ConfigError, match="no private network is left"):
        plan([machine(0, used=used), machine(1)], [Segment((port(0, "a"), port(1, "a")))])
    (wire,) = plan([machine(0, used=used[:1]), machine(1, used=["0.0.0.0/1", "128.0.0.0/1"])], [Segment((port(0, "a"), port(1, "a")))])
    assert wire.of(0) == "10.0.0.1"


def cable(**more: object) -> list[list[str]]:
    persist = bool(more.pop("persist", False))
    ends = port(0, "en2", bridge=str(more.pop("bridge", ""))), port(1, "en10")
    machines = [machine(0, ends[0], **more), machine(1, ends[1], **more)]  # type: ignore[arg-type]
    wires = plan(machines, [Segment(ends)])
    return [commands(each, wires, persist) for each in machines]


def test_commands_on_a_mac() -> None:
    assert cable(system="Darwin", bridge="bridge0")[0] == [
        "sudo ifconfig bridge0 down",
        "sudo ifconfig en2 inet 192.168.0.1 netmask 255.255.255.252",
        "sudo route change 192.168.0.2 -interface en2",
    ]


def test_commands_on_linux() -> None:
    assert cable()[1] == ["sudo ip address replace 192.168.0.2/30 dev en10", "sudo ip link set en10 up"]
    assert cable(root=True)[1] == ["ip address replace 192.168.0.2/30 dev en10", "ip link set en10 up"]


def test_commands_that_outlive_a_restart() -> None:
    manager = cable(manager="NetworkManager", persist=True)[0]
    assert "con-name rt-en2 ifname en2 ipv4.method manual ipv4.addresses 192.168.0.1/30" in manager[1]
    assert manager[2] == "sudo nmcli connection up rt-en2"
    networkd = cable(manager="systemd-networkd", persist=True)[1]
    assert "Address=192.168.0.2/30" in networkd[0] and "/etc/systemd/network/10-rt-en10.network" in networkd[0]
    assert networkd[1] == "sudo networkctl reload"
    assert cable(manager="systemd-networkd")[0] == cable()[0]  # only if asked for
    assert "neither" in not_kept(machine(0)) and "macOS" in not_kept(machine(0, system="Darwin"))
    assert not_kept(machine(0, manager="NetworkManager")) == ""


def test_infiniband_outlives_a_restart_as_infiniband() -> None:
    """NetworkManager refuses a profile of Ethernet on it; the mode is the one that it has now."""
    ends = Port(0, "ib0", ETHERNET, ipoib="connected"), Port(1, "ib0", ETHERNET, ipoib="datagram")
    machines = [machine(end.host, end, manager="NetworkManager") for end in ends]
    wires = plan(machines, [Segment(ends)])
    for host, end in enumerate(ends):
        _, added, _ = commands(machines[host], wires, persist=True)
        assert added.startswith("sudo nmcli connection add type infiniband con-name rt-ib0 ifname ib0 ipv4.method manual ")
        assert added.endswith(f" infiniband.transport-mode {end.ipoib}")
    ethernet = cable(manager="NetworkManager", persist=True)[0][1]
    assert "add type ethernet con-name" in ethernet and "infiniband" not in ethernet


def test_nothing_to_do_where_all_is_there() -> None:
    ends = port(0, "a", "10.9.0.1/30"), port(1, "a", "10.9.0.2/30")
    machines = [machine(0, ends[0]), machine(1, ends[1])]
    wires = plan(machines, [Segment(ends)])
    assert [commands(each, wires, persist=True) for each in machines] == [[], []]
