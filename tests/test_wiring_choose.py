"""Cables between hosts, and what is made of them.

May live here: ``rt._wiring_segments``, ``rt._wiring_choose``. May not: command lines, addresses.
"""

from __future__ import annotations

from ipaddress import IPv6Interface

import linuxes
import macs
import pytest
from linuxes import Nic
from macs import Mac

from rt import _wiring_linux, _wiring_macos
from rt import _wiring_rings as rings
from rt._wiring_choose import Layout, choose, chosen_over, usable
from rt._wiring_facts import Facts
from rt._wiring_model import ETHERNET, Machine, Port, Segment
from rt._wiring_plan import plan
from rt._wiring_segments import segments
from rt.errors import ConfigError


def machines(told: list[Facts]) -> list[Machine]:
    read = {"Darwin": _wiring_macos.machine, "Linux": _wiring_linux.machine}
    return [read[each.system](index, each) for index, each in enumerate(told)]


def chosen(told: list[Facts], over: str = "thunderbolt", backend: str = "") -> Layout:
    made = machines(told)
    return choose(made, segments(made), over, backend)


def ends(segment: Segment) -> list[str]:
    return [f"{port.host}.{port.name}" for port in segment.ports]


def facts(made: list[Mac]) -> list[Facts]:
    return [mac.facts() for mac in made]


def without_rdma(made: list[Mac]) -> list[Facts]:
    for mac in made:
        mac.rdma = False
    return facts(made)


# --- Thunderbolt -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cables", "backend", "order", "ways"),
    [
        (macs.MESH, "jaccl", (0, 1, 2, 3), 1),
        (macs.RING, "jaccl-ring", (0, 1, 2, 3), 1),
        (macs.CROSSED_RING, "jaccl-ring", (0, 2, 1, 3), 1),
        (macs.TWO_RINGS, "jaccl-ring", (0, 1, 2, 3), 2),
    ],
)
def test_the_best_that_the_cables_allow(cables: list[tuple[macs.End, macs.End]], backend: str, order: tuple[int, ...], ways: int) -> None:
    made = macs.macs(4, cables)
    layout = chosen(facts(made))
    assert (layout.over, layout.backend, layout.order, layout.ways) == ("thunderbolt", backend, order, ways)
    assert len(layout.set_up) == len(cables)
    plain = chosen(without_rdma(made))
    assert (plain.backend, plain.order, plain.ways) == ("ring", order, ways)
    assert "no RDMA device" in plain.remarks[0] and "m0, m1, m2, m3" in plain.remarks[0]


def test_a_backend_that_was_asked_for() -> None:
    mesh = facts(macs.macs(4, macs.MESH))
    assert [chosen(mesh, backend=backend).backend for backend in ("ring", "jaccl-ring", "jaccl")] == ["ring", "jaccl-ring", "jaccl"]
    with pytest.raises(ConfigError, match=r"incomplete mesh:\n  m0 is not connected to m2\n  m1 is not connected to m3\n"):
        chosen(facts(macs.macs(4, macs.RING)), backend="jaccl")
    with pytest.raises(ConfigError, match="m1: no RDMA device"):
        made = macs.macs(2, [((0, 1), (1, 1))])
        made[1].rdma = False
        chosen(facts(made), backend="jaccl-ring")
    with pytest.raises(ConfigError, match="--over rdma"):
        chosen(mesh, "ethernet", "jaccl")


def test_two_hosts_and_all_cables_between_them() -> None:
    layout = chosen(facts(macs.macs(2, [((0, 1), (1, 2)), ((0, 3), (1, 1))])))
    assert (layout.backend, layout.ways) == ("jaccl", 2)
    assert [ends(segment) for segment in layout.between(1, 0)] == [["0.en2", "1.en3"], ["0.en4", "1.en2"]]
    assert layout.between(1, 1) == []


def test_a_cable_of_which_one_end_knows_nothing_is_broken() -> None:
    made = macs.macs(4, macs.MESH)
    del made[0].peers[3]
    (broken,) = [segment for segment in segments(machines(facts(made))) if segment.fault]
    assert broken.fault == "m3 en2 sees m0 en4, which does not see it"
    assert chosen(facts(made)).backend == "jaccl-ring"


def test_what_leads_to_strangers_or_back_is_no_cable() -> None:
    made = macs.macs(3, [((0, 1), (1, 1)), ((1, 2), (2, 1)), ((0, 3), (0, 4))])[:2]
    assert [ends(segment) for segment in usable(segments(machines(facts(made))), "thunderbolt")] == [["0.en2", "1.en2"]]


def test_fast_cables_alone_if_they_are_enough() -> None:
    made = macs.macs(4, macs.MESH)
    made[1].speed = "Up to 40 Gb/s"
    assert {segment.speed for segment in chosen(facts(made), backend="ring").used} == {40.0, 80.0}  # m1 must be in it
    two = macs.macs(2, [((0, 1), (1, 1))])
    told = facts(two)
    assert chosen(told).used[0].speed == 80.0


def test_no_ring_says_why_and_which_there_are() -> None:
    triangle = [((0, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (0, 2))]
    with pytest.raises(ConfigError) as caught:
        chosen(facts(macs.macs(5, [*triangle, ((2, 3), (3, 1))])))
    assert str(caught.value).splitlines() == [
        "no ring through all 5 hosts over Thunderbolt:",
        "  not connected to any other: m4",
        "  m3 is connected to m2 only",
        "  every way between some hosts goes through m2",
        "  rings found:",
        "    --hosts m0,m1,m2",
        "    --hosts m2,m3",
        "  --over ethernet goes over the network instead; --dot or --svg F shows what is connected",
    ]
    again = [((left + 3, port), (right + 3, other)) for (left, port), (right, other) in triangle]
    with pytest.raises(ConfigError, match=r"not connected with each other: m0 m1 m2 \| m3 m4 m5\n(.*\n)*.*m0,m1,m2\n.*m3,m4,m5\n"):
        chosen(facts(macs.macs(6, triangle + again)))


def test_a_search_that_gives_up_is_an_error_only_if_nothing_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rings.ring

    def gives_up(fewest: int) -> None:
        """Let the search give up on graphs of so few edges or fewer."""

        def ring(joined: rings.Graph) -> list[int] | None:
            if sum(map(len, joined)) // 2 <= fewest:
                raise rings.GaveUp
            return real(joined)

        monkeypatch.setattr(rings, "ring", ring)

    gives_up(4)
    with pytest.raises(ConfigError, match="in the time allowed"):
        chosen(facts(macs.macs(4, macs.RING)))
    extra = macs.macs(4, [*macs.MESH, ((0, 4), (1, 4)), ((1, 3), (3, 2)), ((2, 4), (3, 4))])  # 2 pairs with 2 cables
    assert (chosen(facts(extra), backend="ring").ways, chosen(facts(extra), backend="jaccl-ring").ways) == (1, 1)
    made = macs.macs(4, macs.MESH)
    made[0].speed = made[1].speed = "Up to 40 Gb/s"  # of the fast cables, one, there is no ring that could be found
    assert chosen(facts(made), backend="ring").ways == 1


def test_linux_hosts_with_two_cables_from_one_controller() -> None:
    left = linuxes.facts("n0", [Nic("thunderbolt0", far="b", number=1), Nic("thunderbolt1", far="b", number=3)], uuid="a")
    right = linuxes.facts("n1", [Nic("thunderbolt0", far="a", number=1), Nic("thunderbolt1", far="a", number=3)], uuid="b")
    layout = chosen([left, right])
    assert (layout.backend, layout.ways, layout.used[0].speed) == ("ring", 2, 40.0)


# --- Ethernet and RDMA -------------------------------------------------------------------------------------------------------------------


def mac(host: int, cable: int) -> str:
    return f"02:00:00:00:{host:02x}:{cable:02x}"


def ring_of_nics(count: int, *, heard: bool = True, rdma: bool = False) -> list[Facts]:
    """eth1 of each is cabled to eth0 of the next."""

    def nics(host: int) -> list[Nic]:
        left, right = (host - 1) % count, (host + 1) % count
        names = [f"mlx5_{number}" if rdma else "" for number in (0, 1)]
        return [
            Nic("eth0", mac(host, 0), speed=10_000, heard=[mac(left, 1)] if heard else [], rdma=names[0]),
            Nic("eth1", mac(host, 1), speed=10_000, heard=[mac(right, 0)] if heard else [], rdma=names[1]),
        ]

    return [linuxes.facts(f"n{host}", nics(host)) for host in range(count)]


def on_one_switch(count: int, *, heard: bool = True, rdma: bool = False, speed: int = 10_000) -> list[Facts]:
    def nic(host: int) -> Nic:
        others = [mac(other, 0) for other in range(count) if other != host] if heard else []
        return Nic("eth0", mac(host, 0), f"10.5.0.{host + 1}/24", speed, others, rdma="mlx5_0" if rdma else "")

    docker = Nic("docker0", "02:42:00:00:00:01", "172.17.0.1/16", kind="bridge")
    return [linuxes.facts(f"n{host}", [nic(host), docker], default="eth0") for host in range(count)]


def test_cables_between_neighbours_are_found_before_they_have_addresses() -> None:
    layout = chosen(ring_of_nics(4), "ethernet")
    assert (layout.backend, layout.order) == ("ring", (0, 1, 2, 3))
    assert sorted(map(ends, layout.used)) == [["0.eth0", "3.eth1"], ["0.eth1", "1.eth0"], ["1.eth1", "2.eth0"], ["2.eth1", "3.eth0"]]
    assert layout.set_up == layout.used
    with pytest.raises(ConfigError, match="not connected to any other: n0, n1, n2, n3"):
        chosen(ring_of_nics(4, heard=False), "ethernet")


@pytest.mark.parametrize("heard", [True, False])
def test_one_network_is_one_segment_with_any_backend(heard: bool) -> None:
    layout = chosen(on_one_switch(3, heard=heard), "ethernet")
    (segment,) = layout.used
    assert (ends(segment), layout.backend, segment.guessed) == (["0.eth0", "1.eth0", "2.eth0"], "", not heard)
    assert bool(layout.remarks) != heard  # docker0 is on every host, and joins none
    assert chosen(on_one_switch(3), "ethernet", "ring").backend == "ring"


def test_an_address_that_several_hosts_have_joins_nobody() -> None:
    """As VirtualBox gives each host 192.168.56.1 on an interface of its own."""
    own = Nic("vboxnet0", "0a:00:27:00:00:00", "192.168.56.1/24")
    nics = [Nic("eth0", f"02:00:00:00:00:0{host}", f"10.0.{host}.1/24") for host in range(2)]
    layout = chosen([linuxes.facts(f"n{host}", [nics[host], own], default="eth0") for host in range(2)], "ethernet")
    assert (layout.used, layout.remarks[0].partition(":")[0]) == ((), "no network is common to all hosts")


def test_two_interfaces_on_one_switch_are_two_ways() -> None:
    def told(host: int, addresses: bool) -> Facts:
        others = [mac(other, rail) for other in range(3) for rail in range(2) if other != host]
        networks = [f"10.{5 + rail}.0.{host + 1}/24" if addresses else "" for rail in range(2)]
        names = ["eth0", "eth1"] if host else ["eth1", "eth0"]  # the network says what belongs together, not the name
        return linuxes.facts(f"n{host}", [Nic(names[rail], mac(host, rail), networks[rail], heard=others) for rail in range(2)])

    layout = chosen([told(host, True) for host in range(3)], "ethernet")
    assert (layout.ways, [ends(segment)[0] for segment in layout.used]) == (2, ["0.eth0", "0.eth1"])
    assert sorted(ends(segment) for segment in layout.used) == [["0.eth0", "1.eth1", "2.eth1"], ["0.eth1", "1.eth0", "2.eth0"]]
    assert chosen([told(host, False) for host in range(3)], "ethernet").ways == 2


def test_the_fast_network_and_not_the_one_for_logging_in() -> None:
    def told(host: int) -> Facts:
        slow = Nic("eth0", mac(host, 0), f"10.5.0.{host + 1}/24", 1000, [mac(1 - host, 0)])
        fast = Nic("eth1", mac(host, 1), f"10.6.0.{host + 1}/24", 100_000, [mac(1 - host, 1)])
        wireless = Nic("wlan0", mac(host, 2), f"10.7.0.{host + 1}/24", -1, [mac(1 - host, 2)])
        return linuxes.facts(f"n{host}", [slow, fast, wireless], default="eth0")

    layout = chosen([told(0), told(1)], "ethernet")
    assert [ends(segment) for segment in layout.used] == [["0.eth1", "1.eth1"]]


def test_the_cable_and_not_the_radio_where_no_speed_is_known() -> None:
    def told(host: int) -> Facts:
        nics = [Nic(name, mac(host, at), f"10.{at}.0.{host + 1}/24", heard=[mac(1 - host, at)]) for at, name in enumerate(("wlp1", "eth0"))]
        return linuxes.facts(f"n{host}", nics)

    assert [ends(segment) for segment in chosen([told(0), told(1)], "ethernet").used] == [["0.eth0", "1.eth0"]]


def test_an_interface_that_is_down_joins_nobody() -> None:
    told = [linuxes.facts(f"n{host}", [Nic("eth0", mac(host, 0), f"10.5.0.{host + 1}/24", up=host > 0)]) for host in range(2)]
    with pytest.raises(ConfigError, match="not connected to any other: n0, n1"):
        chosen(told, "ethernet")


def test_a_lan_is_left_as_it_is() -> None:
    """By cable and by radio in one network; and of equal cables those that have addresses."""

    def told(host: int) -> Facts:
        others = [mac(1 - host, number) for number in range(3)]
        wired = Nic("eth0", mac(host, 0), f"10.5.0.{host + 1}/24", 1000, others)
        second = Nic("eth1", mac(host, 1), speed=1000, heard=[mac(1 - host, 1)])
        wireless = Nic("wlan0", mac(host, 2), f"10.5.0.{host + 11}/24", heard=others)
        return linuxes.facts(f"n{host}", [wired, second, wireless], default="eth0")

    made = machines([told(0), told(1)])
    layout = choose(made, segments(made), "ethernet", "")
    assert [ends(segment) for segment in layout.used] == [["0.eth0", "1.eth0"]]
    assert [wire.fresh for wire in plan(made, layout.set_up)] == [False]


def test_hosts_in_networks_of_their_own_are_reached_through_routers() -> None:
    docker = Nic("docker0", "", "172.17.0.1/16", kind="bridge")  # a network that all have and that joins none
    told = [linuxes.facts(f"n{host}", [Nic("eth0", mac(host, 0), f"10.{host}.0.1/24"), docker], default="eth0") for host in range(3)]
    layout = chosen(told, "ethernet")
    assert (layout.used, layout.backend) == ((), "") and "not tried" in layout.remarks[0]
    told[1] = linuxes.facts("n1", [Nic("eth0", mac(1, 0), "10.1.0.1/24")])
    with pytest.raises(ConfigError, match="no ring through all 3 hosts over Ethernet"):
        chosen(told, "ethernet")


def test_macs_on_ethernet_go_by_their_addresses() -> None:
    layout = chosen(facts(macs.macs(3, [])), "ethernet")
    assert [ends(segment) for segment in layout.used] == [["0.en0", "1.en0", "2.en0"]]


def test_rdma_over_a_switch_is_a_mesh_and_over_cables_a_ring() -> None:
    layout = chosen(on_one_switch(3, rdma=True), "rdma")
    assert (layout.backend, layout.order, len(layout.used)) == ("jaccl", (0, 1, 2), 1)
    layout = chosen(ring_of_nics(4, rdma=True), "rdma")
    assert (layout.backend, layout.order, len(layout.used)) == ("jaccl-ring", (0, 1, 2, 3), 4)
    assert chosen(ring_of_nics(3, rdma=True), "rdma", "ring").backend == "ring"
    with pytest.raises(ConfigError, match="n0, n1, n2: no RDMA device"):
        chosen(on_one_switch(3), "rdma")


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring", "ring"])
def test_rdma_ports_that_are_not_needed_are_not_set_up(backend: str) -> None:
    def told(host: int) -> Facts:
        ready = Nic("eth0", mac(host, 0), f"10.5.0.{host + 1}/24", 100_000, [mac(1 - host, 0)], rdma="mlx5_0")
        bare = Nic("eth1", mac(host, 1), speed=100_000, heard=[mac(1 - host, 1)], rdma="mlx5_1")
        return linuxes.facts(f"n{host}", [bare, ready])

    layout = chosen([told(0), told(1)], "rdma", backend)
    assert ([ends(segment) for segment in layout.used], layout.set_up) == ([["0.eth0", "1.eth0"]], layout.used)


def test_auto_goes_over_thunderbolt_then_rdma_then_ethernet() -> None:
    def over(told: list[Facts]) -> str:
        made = machines(told)
        return chosen_over(made, segments(made))

    everywhere = on_one_switch(3, rdma=True)
    assert [over(told) for told in (facts(macs.macs(4, macs.RING)), everywhere, on_one_switch(3))] == ["thunderbolt", "rdma", "ethernet"]
    assert over([*everywhere[:2], on_one_switch(3)[2]]) == "ethernet"  # not all have a device
    made = macs.macs(2, [((0, 1), (1, 1))])
    del made[0].peers[1]
    assert over(facts(made)) == "thunderbolt"  # broken, and to be mended


def test_one_host_needs_no_cable() -> None:
    assert chosen(facts(macs.macs(1, [])), "thunderbolt").order == (0,)
    assert chosen(on_one_switch(1), "ethernet").backend == ""


def test_ports_that_nobody_heard_are_joined_by_their_ipv6_networks() -> None:
    ports = [Port(host, "eth0", ETHERNET, mac=f"02::0{host}", ipv6=(IPv6Interface(f"fd01::{host}/64"),)) for host in range(3)]
    (segment,) = segments([Machine(host, f"m{host}", "Linux", (port,)) for host, port in enumerate(ports)])
    assert segment.guessed and segment.ports == tuple(ports)
