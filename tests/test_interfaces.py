"""Interfaces: what ``RT_SOCKET_IFNAME`` may say, and what is chosen by it, held against a plain reading of NCCL's rules.

May live here: the parts that need no network. May not: groups that use what was chosen (``test_interfaces_hosts``).
"""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt import config
from rt.errors import ConfigError
from rt.interfaces import VARIABLE, Interface, asked, between, choose, listing, nccl_names, parse, reachable, reached

LO = Interface("lo", ("127.0.0.1/8", "::1/128"), 65536, loopback=True)
ETH0 = Interface("eth0", ("10.0.0.1/24", "fe80::1/64", "fd00::1/64"), 1500)
ETH1 = Interface("eth1", ("10.1.0.1/24", "10.9.0.1/24"), 1500)
ETH10 = Interface("eth10", ("10.2.0.1/24",), 1500)
DOCKER = Interface("docker0", ("172.17.0.1/16",), 1500)
DOWN = Interface("eth2", ("10.3.0.1/24",), 1500, up=False)
BARE = Interface("eth3", ("fe80::3/64",), 1500)
ALL = [LO, DOCKER, ETH0, ETH1, ETH10, DOWN, BARE]


def chosen(text: str, here: str = "10.0.0.1") -> list[str]:
    return choose(ALL, parse(text), here)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eth", ["10.0.0.1", "10.1.0.1", "10.2.0.1"]),
        ("eth1", ["10.1.0.1", "10.2.0.1"]),
        ("=eth1", ["10.1.0.1"]),
        ("=eth1,eth0", ["10.1.0.1", "10.0.0.1"]),  # the order of the list
        ("eth1, eth0", ["10.1.0.1", "10.2.0.1", "10.0.0.1"]),
        ("^docker", ["10.0.0.1"]),  # the way to the coordinator
        ("^=eth0", ["172.17.0.1"]),
        ("^eth0,docker", ["10.1.0.1"]),
        ("^10.0.0.0/24,172.16.0.0/12", ["10.1.0.1"]),
        ("10.1.0.0/16", ["10.1.0.1"]),
        ("10.9.0.0/16", ["10.9.0.1"]),  # the address that was meant, not the interface's first
        ("10.9.0.1", ["10.9.0.1"]),
        ("fd00::/8", ["fd00::1"]),
        ("10.0.0.0/8", ["10.0.0.1", "10.1.0.1", "10.2.0.1"]),
        ("10.2.0.0/24,=eth0", None),
    ],
)
def test_what_is_chosen(text: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError):
            chosen(text)
    else:
        assert chosen(text) == expected


def test_an_interfaces_address_is_of_the_kind_of_the_way_to_the_coordinator() -> None:
    assert chosen("eth0", "fd00::9") == ["fd00::1"]
    assert chosen("eth", "10.9.0.1") == ["10.0.0.1", "10.9.0.1", "10.2.0.1"]


def test_loopback_only_where_the_coordinator_is() -> None:
    assert chosen("lo", "127.0.0.1") == ["127.0.0.1"]
    assert chosen("^docker", "127.0.0.1") == ["127.0.0.1"]
    assert chosen("^lo", "127.0.0.1") == ["172.17.0.1"]
    with pytest.raises(ConfigError, match=r"RT_SOCKET_IFNAME=lo: found lo \(.*expected one that matches; loopback does not count"):
        chosen("lo")


@pytest.mark.parametrize("text", ["wlan", "eth2", "eth3", "=eth", "192.168.0.0/16", "^eth,docker", "^0.0.0.0/0"])
def test_nothing_matches(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(text)
    message = str(caught.value)
    assert message.startswith(f"RT_SOCKET_IFNAME={text}: found lo (127.0.0.1/8, ::1/128), docker0 (172.17.0.1/16), eth0 (10.0.0.1/24,")
    assert "eth2 (10.3.0.1/24, down)" in message
    assert "expected one that" in message


@pytest.mark.parametrize("text", [",", "eth0,", "^", "=", "^=", "=^eth0", "eth0,^lo", "eth0,=lo", "10.0.0.0/99", "eth0/24", "10.0/8"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^RT_SOCKET_IFNAME: found .* expected names or networks with commas between"):
        parse(text)


names = st.from_regex(r"[a-z]{1,3}[0-9]?", fullmatch=True)
addresses = st.builds(lambda a, b: f"10.{a}.0.{b}/24", st.integers(0, 3), st.integers(1, 3))
interfaces = st.lists(st.builds(Interface, names, st.lists(addresses, max_size=2).map(tuple)), max_size=5, unique_by=lambda i: i.name)
networks = st.builds(lambda a: f"10.{a}.0.0/16", st.integers(0, 3))


@given(interfaces, st.lists(names | networks, min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 3))
def test_against_a_plain_reading_of_the_rules(found: list[Interface], entries: list[str], exclude: bool, exact: bool, way: int) -> None:
    def matches(each: Interface, entry: str) -> bool:
        if "/" in entry:
            return any(ipaddress.ip_address(host) in ipaddress.ip_network(entry) for host in each.hosts)
        return each.name == entry if exact else each.name.startswith(entry)

    choice = parse("^" * exclude + "=" * exact + ",".join(entries))
    fitting = [each for each in found if each.hosts and any(matches(each, entry) for entry in entries) != exclude]
    here = f"10.{way}.0.1"
    if not fitting:
        with pytest.raises(ConfigError):
            choose(found, choice, here)
        return
    result = choose(found, choice, here)
    owners = [next(each for each in fitting if host in each.hosts) for host in result]  # each address belongs to one that fits
    if exclude:
        assert len(result) == 1
        assert result == [here] or not any(here in each.hosts for each in fitting)
    else:
        assert len(result) == len(fitting)
        places = [min(place for place, entry in enumerate(entries) if matches(each, entry)) for each in owners]
        assert places == sorted(places) or len({host for each in found for host in each.hosts}) < sum(len(each.hosts) for each in found)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("RT_SOCKET_IFNAME: found ")


def test_the_interfaces_of_this_host() -> None:
    found = {each.name: each for each in listing()}
    assert {name for _, name in socket.if_nameindex()} >= found.keys()
    loopback = next(each for each in found.values() if "127.0.0.1" in each.hosts)
    assert loopback.loopback and loopback.up and loopback.mtu > 0 and "127.0.0.1/8" in loopback.addresses


def test_the_variable_in_the_configuration() -> None:
    env = {"RT_RANK": "0", "RT_WORLD_SIZE": "2", "RT_COORDINATOR": "127.0.0.1:1", "RT_INSECURE": "1"}

    def found(text: str) -> object:
        ring = config.resolve_ring(environ={**env, "RT_SOCKET_IFNAME": text})
        assert ring is not None
        return ring.interfaces

    assert found("^lo") == parse("^lo")
    assert found("") is None  # as NCCL reads it
    with pytest.raises(ConfigError, match="RT_SOCKET_IFNAME: found an empty entry in 'eth0,,'"):
        found("eth0,,")


def test_a_command_line_wins_over_the_variable_and_an_empty_variable_says_nothing() -> None:
    assert asked("=a", {VARIABLE: "=b"}) == parse("=a")
    assert asked(None, {VARIABLE: "=b"}) == parse("=b")
    assert asked(None, {VARIABLE: ""}) is None and asked(None, {}) is None
    for option, environ, named in (("", {}, "--iface"), (None, {VARIABLE: "a,,b"}, VARIABLE)):
        with pytest.raises(ConfigError, match=f"^{named}: found an empty entry"):
            asked(option, environ)


def test_an_address_in_a_network_of_all_other_hosts() -> None:
    mine = ["172.17.0.1/16", "10.0.0.1/24", "192.168.0.1/24", "fd00::1/64"]
    bridge = "172.17.0.1/16"  # for containers, with one address on every host
    assert between(mine, [["10.0.0.2/24"], [bridge, "10.0.0.3/24", "192.168.0.3/24"]]) == "10.0.0.1"
    assert between(mine, [[bridge, "192.168.0.2/24"], ["10.0.0.3/24", "192.168.0.3/24"]]) == "192.168.0.1"
    assert between(mine, [["10.9.0.2/24", "fd00::2/64"]]) == "fd00::1"
    assert between(mine, [[bridge, "10.9.0.2/24"]]) == ""


def test_addresses_that_others_may_reach() -> None:
    found = [
        Interface("lo", ("127.0.0.1/8",), loopback=True),
        Interface("eth0", ("10.0.0.1/24", "fe80::1/64", "fd00::1/64")),
        Interface("eth1", ("10.0.1.1/24",), up=False),
    ]
    assert reachable(found) == ["10.0.0.1/24", "fd00::1/64"]


@pytest.mark.parametrize(
    ("text", "given_ips", "expected"),
    [
        (None, ["10.7.7.7"], ["10.7.7.7"]),
        (None, [], ["10.0.0.1"]),
        ("eth1", [], ["10.1.0.1"]),
        ("eth1", ["10.0.0.1", "10.9.0.1", "10.1.0.1"], ["10.9.0.1", "10.1.0.1"]),
        ("10.9.0.0/16", ["10.9.0.1", "10.1.0.1"], ["10.9.0.1"]),
        ("^eth1", ["10.1.0.1", "fd00:0::1", "fe80::1%eth0"], ["fd00:0::1", "fe80::1%eth0"]),
    ],
)
def test_the_ips_of_a_hostfile_as_far_as_they_lie_on_an_interface_asked_for(
    text: str | None, given_ips: list[str], expected: list[str]
) -> None:
    choice = None if text is None else parse(text)
    assert reached([LO, ETH0, ETH1], choice, "10.0.0.1", given_ips) == expected


def test_ips_of_which_none_lies_there_and_interfaces_as_nccl_names_them() -> None:
    message = r"=eth1: found .*, expected one that matches and has one of the hostfile's ips \(10\.0\.0\.1, 10\.8\.0\.1\)"
    with pytest.raises(ConfigError, match=message):
        reached([ETH0, ETH1], parse("eth1"), "10.0.0.1", ["10.0.0.1", "10.8.0.1"])
    assert nccl_names([ETH0, ETH1, ETH10], ["10.2.0.1", "fe80::1%eth0"]) == "=eth0,eth10"
