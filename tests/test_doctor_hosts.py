"""``rt.doctor`` over real hosts with sshd: what is made wrong with them is found, and named.

May live here: whole runs at the desk. May not: making hosts (``sshd``, ``netns``), judgement in detail (``test_doctor``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sshd
from hosts import ROOT

import rt

pytestmark = sshd.NEEDED
PATIENCE = 60.0


def doctor(site: sshd.Site, *words: str) -> tuple[int, str, str]:
    command = site.command("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "rt.doctor", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def seen(site: sshd.Site, *words: str) -> dict[str, Any]:
    """All that the doctor saw."""
    _, output, errors = doctor(site, *words, "--json")
    assert "Traceback" not in errors, errors
    return json.loads(output)  # type: ignore[no-any-return]


def hostfile(folder: Path, *entries: tuple[str, list[str]]) -> str:
    path = folder / "hosts.json"
    path.write_text(json.dumps([{"ssh": name, "ips": ips} for name, ips in entries]))
    return str(path)


def findings(told: dict[str, Any], about: str) -> dict[str, str]:
    """Where there is something of a kind, and what."""
    return {each["where"]: each["what"] for each in told["findings"] if each["about"] == about}


def names(site: sshd.Site, *more: str) -> str:
    return ",".join([*site.names, *more])


def test_healthy_hosts_and_everything_that_is_shown(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site:
        told = seen(site, "--hosts", names(site))
        kinds = {each["about"] for each in told["findings"]}
        assert kinds <= {"slow", "late"}, told["findings"]  # which a busy machine may be
        assert [(each["name"], each["addresses"], each["why"]) for each in told["hosts"]] == [
            (f"host{number}", [f"10.2.0.{number + 1}"], "ssh came in there") for number in range(3)
        ]
        assert {each["facts"]["rt"] for each in told["hosts"]} == {rt.__version__}
        ways = {(each["source"], each["target"]): each for each in told["links"]}
        assert ways.keys() == {(a, b) for a in range(3) for b in range(3) if a != b}
        for (source, target), way in ways.items():
            assert (way["outcome"], way["large"], way["interfaces"]) == ("ok", True, ["cable", "cable"])
            assert (way["local"], way["seen"], way["address"]) == (f"10.2.0.{source + 1}", f"10.2.0.{source + 1}", f"10.2.0.{target + 1}")
            assert 0 < way["latency"] < 1 and way["bandwidth"] > 1e6 and way["pmtu"] == 1500
        _, output, errors = doctor(site, "--hosts", names(site))
        for shown in ("host0  ", "10.2.0.3", "bandwidth (one TCP stream)", "latency (round", "bit/s", "slowest: host", "cable / cable"):
            assert shown in output
        for progress in ("reaching 3 hosts", "latency, round 1 of 3: host1 - host2", "bandwidth, round 3 of 3: host0 - host1"):
            assert f"rt.doctor: {progress}" in errors


def test_a_slow_cable_is_named(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 4) as site:
        site.servers[2].host.limit("cable", "20mbit")
        status, output, _ = doctor(site, "--hosts", names(site))
        assert status == 1
        assert "slowest: host2 -> host" in output
        assert "warning host2: all ways from it are slow, 1" in output  # 19.1 Mbit/s: tbf counts headers
        assert "look at its cable" in output


def test_mtu(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site:
        for server in site.servers[:2]:  # the switch goes on taking 1500; TCP must cut by itself what it would leave to the card
            server.host.ip("link set dev cable gso_max_segs 1 mtu 9000")
        told = seen(site, "--hosts", names(site))
        found = findings(told, "mtu")
        assert found["host0 -> host1"].startswith("small packets come through, large ones do not; cable of host0 has MTU 9000")
        assert found["host1 -> host0"].startswith("small packets come through, large ones do not")
        assert found["host0 -> host2"] == "on one network, cable of host0 has MTU 9000, cable of host2 1500"
        ways = {(each["source"], each["target"]): each for each in told["links"]}
        assert ways[0, 1]["latency"] is not None and ways[0, 1]["bandwidth"] is None
        assert ways[2, 0]["bandwidth"] is not None


def test_firewalls_and_routes(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 4) as site:
        # No answer leaves host1 for host0 from the ports that programs get; from others it does: "connection refused".
        site.servers[1].host.ip("rule add to 10.2.0.1 ipproto tcp sport 32768-65534 blackhole")
        site.servers[2].host.ip("route add blackhole 10.2.0.1")
        site.servers[3].host.ip("route add unreachable 10.2.0.2")
        found = {**findings(told := seen(site, "--hosts", names(site)), "firewall"), **findings(told, "route")}
        assert found["host0 -> host1"].startswith("no answer from the port on 10.2.0.2 where the probe listens, a shut one refuses:")
        assert found["host0 -> host2"].startswith("no answer from 10.2.0.3, neither from an open nor from a shut port: a firewall")
        assert found["host3 -> host1"] == "10.2.0.2 cannot be reached: No route to host"
        assert not {"host2 -> host1", "host1 -> host2", "host0 -> host3"} & found.keys()


def test_hosts_that_cannot_be_asked_do_not_keep_the_others_from_it(tmp_path: Path) -> None:
    locked = tmp_path / "nobody.pub"
    locked.write_text("")
    with sshd.site(tmp_path, 4, options={1: [f"AuthorizedKeysFile {locked}", "PasswordAuthentication yes"]}) as site:
        site.servers[2].host.ip("link set cable down")
        told = seen(site, "--hosts", names(site, "host9"))
        found = findings(told, "host")
        assert "Permission denied" in found["host1"]
        assert "timed out" in found["host2"] or "No route" in found["host2"]
        assert "Could not resolve" in found["host9"]
        assert all(each["advice"] for each in told["findings"] if each["about"] == "host")
        assert {(each["source"], each["target"]) for each in told["links"] if each["bandwidth"]} == {(0, 3), (3, 0)}


def test_no_python_there(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 1) as site:
        told = seen(site, "--hosts", names(site), "--python", "/nowhere/python")
        assert findings(told, "host")["host0"].startswith("no Python at /nowhere/python: ")


def test_other_versions_and_clocks(tmp_path: Path) -> None:
    package = Path(rt.__file__).parent
    newer = tmp_path / "newer.py"
    newer.write_text((package / "__init__.py").read_text().replace(rt.__version__, "7.8.9"))
    (tmp_path / "ahead").mkdir()
    ahead = tmp_path / "ahead" / "sitecustomize.py"
    ahead.write_text("import time\nclock = time.time\ntime.time = lambda: clock() + 90\n")
    prepare = {1: [f"mount --bind {newer} {package}/__init__.py"], 2: [f"mount -t tmpfs tmpfs {package}"]}
    with sshd.site(tmp_path, 4, prepare=prepare, options={3: [f"SetEnv PYTHONPATH={ahead.parent}"]}) as site:
        told = seen(site, "--hosts", names(site))
        assert findings(told, "rt")["host1"] == f"it has rt 7.8.9; host0, host3 have {rt.__version__}"
        assert "cannot import rt" in findings(told, "rt")["host2"]
        assert findings(told, "clock") == {"host3": "its clock is 90.0 s ahead of the others"}
        assert {(each["source"], each["target"]) for each in told["links"] if each["bandwidth"]} >= {(2, 1), (1, 2)}  # all the same


def test_addresses_that_are_none(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site:
        file = hostfile(tmp_path, ("host0", ["10.2.0.1"]), ("host1", ["127.0.0.1"]), ("host2", ["10.2.0.77"]))
        told = seen(site, "--hostfile", file)
        assert findings(told, "loopback").keys() == {"host1"}
        assert findings(told, "nat")["host2"].startswith("it does not have the address 10.2.0.77 (the hostfile's ips), but 10.2.0.3")
        assert {each["why"] for each in told["hosts"]} == {"the hostfile's ips"}


def test_interfaces_by_name_and_two_addresses(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2) as site:
        for number, server in enumerate(site.servers):
            server.host.ip(f"address add 10.77.0.{number + 1}/24 dev cable")
        told = seen(site, "--hosts", names(site), "--iface", "10.77.0.0/16")
        assert [each["addresses"] for each in told["hosts"]] == [["10.77.0.1"], ["10.77.0.2"]]
        assert {each["address"] for each in told["links"]} == {"10.77.0.1", "10.77.0.2"}
        file = hostfile(tmp_path, *((f"host{number}", [f"10.{net}.0.{number + 1}" for net in (2, 77)]) for number in range(2)))
        told = seen(site, "--hostfile", file)
        assert len([each for each in told["links"] if each["bandwidth"]]) == 4
        for which, nets in (("cable", (2, 77)), ("10.77.0.0/16", (77,))):  # of the ips those that lie there, as for rt.launch
            told = seen(site, "--hostfile", file, "--iface", which)
            assert [each["addresses"] for each in told["hosts"]] == [[f"10.{net}.0.{number}" for net in nets] for number in (1, 2)]
        told = seen(site, "--hosts", names(site), "--iface", "eth7")
        assert "RT_SOCKET_IFNAME=eth7: found lo (127.0.0.1/8" in findings(told, "host")["host0"]


def test_a_host_that_goes_while_it_is_examined(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site:
        command = site.command("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "rt.doctor", "--hosts", names(site), "--json")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stderr:
                if "latency, round 1" in line:
                    break
            site.servers[1].kill()
            output, errors = process.communicate(timeout=PATIENCE)
        told = json.loads(output)
        assert "host1" in findings(told, "host") or any("host1" in where for where in findings(told, "broken")), errors
        assert {(0, 2), (2, 0)} <= {(each["source"], each["target"]) for each in told["links"] if each["bandwidth"]}


@pytest.mark.parametrize("front", ["--hosts", "--hostfile"])
def test_nothing_is_left_on_the_hosts(front: str, tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2) as site:
        value = names(site) if front == "--hosts" else hostfile(tmp_path, *((name, []) for name in site.names))
        doctor(site, front, value)
        assert [server.processes("rt-probe") + server.processes("readline") for server in site.servers] == [[], []]
