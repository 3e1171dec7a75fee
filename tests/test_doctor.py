"""``rt.doctor`` without a network: the schedule of its measurements, its judgement, its command line, and hosts that do not answer.

May live here: what needs no other host. May not: real hosts (``test_doctor_hosts``), running jobs (``test_doctor_job``).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hosts import PATIENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st
from launching import Terminal, read_until
from macs import executable

from rt import _doctor_probes, doctor
from rt._doctor_findings import Finding, judge, show_rate, show_time, slowest
from rt._doctor_network import HostReport, LinkReport, rounds
from rt._doctor_probes import RemoteProbe, Silent
from rt._doctor_show import show
from rt.hostfile import Host
from rt.interfaces import Interface

# --- rounds ----------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 65))
def test_every_pair_meets_once_and_no_host_is_in_two_pairs_at_a_time(count: int) -> None:
    found = rounds(count)
    assert len(found) <= count
    pairs = Counter(pair for each in found for pair in each)
    assert pairs == Counter({(a, b): 1 for b in range(count) for a in range(b)})
    for each in found:
        hosts = [host for pair in each for host in pair]
        assert len(hosts) == len(set(hosts))


# --- judgement -------------------------------------------------------------------------------------------------------------------------

FACTS = {"rt": "1.0", "python": "3.11.2", "executable": "/py", "wireless": []}


def host(number: int, **fields: Any) -> HostReport:
    there = [Interface("lo", ("127.0.0.1/8",), 65536, loopback=True), Interface("eth0", (f"10.0.0.{number + 1}/24",), 1500)]
    facts = {**FACTS, **fields.pop("facts", {})}
    return HostReport(
        **{"name": f"h{number}", "facts": facts, "interfaces": there, "addresses": [f"10.0.0.{number + 1}"], "why": "ssh", **fields}
    )


def links(count: int, **fields: Any) -> list[LinkReport]:
    """All ways between hosts, healthy but for ``fields``, which are those of the way from 0 to 1."""
    found = [
        LinkReport(a, b, f"10.0.0.{b + 1}", local=f"10.0.0.{a + 1}", seen=f"10.0.0.{a + 1}", latency=20e-6, bandwidth=1e9)
        for a in range(count)
        for b in range(count)
        if a != b
    ]
    for name, value in fields.items():
        setattr(found[0], name, value)
    return found


def only(findings: list[Finding]) -> Finding:
    (found,) = findings
    return found


def test_healthy_hosts() -> None:
    assert judge([host(number) for number in range(4)], links(4)) == []


@pytest.mark.parametrize(
    ("fields", "level", "about", "what"),
    [
        ({"facts": {}, "problem": "no such host", "advice": "look"}, "error", "host", "no such host"),
        ({"facts": {"rt": "2.0"}}, "error", "rt", "it has rt 2.0; h0, h1 have 1.0"),
        ({"facts": {"rt": "", "rt_problem": "no module"}}, "error", "rt", "/py cannot import rt: no module"),
        ({"facts": {"python": "3.12.0"}}, "warning", "python", "it has python 3.12.0; h0, h1 have 3.11"),
        ({"skew": (90.0, 0.01)}, "warning", "clock", "its clock is 90.0 s ahead of the others"),
        ({"skew": (-90.0, 0.01)}, "warning", "clock", "its clock is 90.0 s behind the others"),
        ({"addresses": ["127.0.1.1"]}, "error", "loopback", "others are told to reach it at 127.0.1.1, which is loopback"),
        ({"addresses": ["1.2.3.4"]}, "error", "nat", "it does not have the address 1.2.3.4 (ssh), but 10.0.0.3"),
        ({"facts": {"wireless": ["eth0"]}}, "warning", "wireless", "10.0.0.3 is on eth0, which is wireless"),
    ],
)
def test_what_is_wrong_with_a_host(fields: dict[str, Any], level: str, about: str, what: str) -> None:
    finding = only(judge([host(0), host(1), host(2, **fields)], []))
    assert (finding.level, finding.about, finding.where) == (level, about, "h2")
    assert finding.what.startswith(what)
    assert finding.advice


def test_what_is_not_wrong_with_a_host() -> None:
    small = [{"facts": {"python": "3.11.9"}}, {"skew": (90.0, 90.0)}, {"skew": (0.3, 0.01)}]
    assert [judge([host(0), host(1), host(2, **fields)], []) for fields in small] == [[], [], []]
    assert judge([host(0, addresses=["127.0.0.1"])], []) == []  # alone, loopback is as good as anything


@pytest.mark.parametrize(
    ("fields", "level", "about", "what"),
    [
        ({"outcome": "silent", "shut": "refused"}, "error", "firewall", "no answer from the port on 10.0.0.2 where the probe listens, a "),
        ({"outcome": "silent", "shut": "silent"}, "error", "firewall", "no answer from 10.0.0.2, neither from an open nor from a shut"),
        ({"outcome": "refused"}, "error", "firewall", "10.0.0.2 refuses the port where the probe listens"),
        ({"outcome": "unreachable", "why": "No route"}, "error", "route", "10.0.0.2 cannot be reached: No route"),
        ({"outcome": "stranger", "why": "closed"}, "error", "nat", "somebody else answers at 10.0.0.2: closed"),
        ({"outcome": "broke", "why": "reset"}, "error", "broken", "the connection to 10.0.0.2 broke: reset"),
        ({"seen": "10.0.0.254"}, "warning", "nat", "it goes out as 10.0.0.1 and comes in as 10.0.0.254"),
        ({"large": False}, "error", "mtu", "small packets come through, large ones do not; eth0 of h0 has MTU 1500"),
        ({"bandwidth": 1e8}, "warning", "slow", "800 Mbit/s, where the median is 8 Gbit/s"),
        ({"latency": 1e-3}, "warning", "late", "a round trip takes 1 ms, the median is 20 us"),
    ],
)
def test_what_is_wrong_with_a_way(fields: dict[str, Any], level: str, about: str, what: str) -> None:
    finding = only(judge([host(number) for number in range(3)], links(3, **fields)))
    assert (finding.level, finding.about, finding.where) == (level, about, "h0 -> h1")
    assert finding.what.startswith(what)
    assert finding.advice


def test_the_end_that_slow_ways_have_in_common_is_to_blame() -> None:
    ways = links(4)
    for link in ways:
        if link.target == 2:
            link.bandwidth, link.retransmitted = 1e8, 99
    finding = only(judge([host(number) for number in range(4)], ways))
    assert (finding.about, finding.where) == ("slow", "h2")
    assert finding.what == "all ways to it are slow, 800 Mbit/s, where the median is 8 Gbit/s; up to 99 segments had to be sent again"
    worst = slowest(ways)
    assert worst is not None and worst.target == 2


def test_different_mtus_matter_on_one_network_only() -> None:
    other = host(1, interfaces=[Interface("eth0", ("10.0.0.2/24",), 9000)])
    finding = only(judge([host(0), other], links(2)))
    assert (finding.about, finding.where) == ("mtu", "h0 -> h1")
    assert finding.what == "on one network, eth0 of h0 has MTU 1500, eth0 of h1 9000"
    elsewhere = host(0, interfaces=[Interface("eth0", ("10.0.0.1/32",), 1500)])
    assert judge([elsewhere, other], links(2)) == []


def test_units() -> None:
    assert [show_rate(rate) for rate in (1.25e9, 5.9e6, 1e3)] == ["10 Gbit/s", "47.2 Mbit/s", "8 kbit/s"]
    assert [show_time(seconds) for seconds in (12.34e-6, 0.0456)] == ["12.3 us", "45.6 ms"]


def test_what_is_shown() -> None:
    from rich.console import Console

    written = io.StringIO()
    reports = [host(0), host(1), host(2, facts={}, problem="no [such] host", advice="look", addresses=[])]
    reports[2].facts = {}
    ways = links(2, outcome="silent", shut="refused", bandwidth=None, latency=None)
    show(Console(file=written, width=150), reports, ways, judge(reports, ways))
    text = written.getvalue()
    for expected in (
        r"h0 +1\.0 +3\.11\.2 +\+0 ms +10\.0\.0\.1 +eth0 +1500 +ssh",
        r"h2 +not reached",
        r"h0 +- +silent",
        r"h1 +8 Gbit/s +-",
        r"h1 +20 us +-",
        r"h1 +eth0 / eth0 +-",
        r"error h2: no \[such\] host\n    look",
        r"error h0 -> h1: no answer from the port",
    ):
        assert re.search(expected, text), text


# --- hosts that do not answer ------------------------------------------------------------------------------------------------------------


def start(*words: str) -> str:
    """What is said of a host on which the probe is started so."""
    probe = RemoteProbe(Host("h"), "/a/python", words)
    try:
        with pytest.raises(Silent) as caught:
            probe.start()
        return f"{caught.value} / {caught.value.advice}"
    finally:
        probe.end()


def test_one_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor_probes, "START_SECONDS", 0.2)
    assert start("sleep", "100").startswith("waited 0 s for /a/python to start / is it overloaded")


def test_one_that_has_no_such_python() -> None:
    assert start("sh", "-c", "/a/python").startswith("no Python at /a/python: sh: ")
    assert "name its Python with --python" in start("sh", "-c", "exit 127")


def test_one_whose_python_is_too_old() -> None:
    said = start("sh", "-c", "echo motd; echo rt-probe 3 8 10; read answer")
    assert said == "/a/python is Python 3.8.10; rt needs 3.11 / name another with --python"


def test_one_that_dies() -> None:
    assert start("sh", "-c", "echo alas >&2; exit 3") == "the probe ended with exit code 3: alas / "


def test_one_that_stops_answering() -> None:
    probe = RemoteProbe(Host("localhost"), sys.executable)
    try:
        probe.start()
        assert probe.ask("clock", PATIENCE)["clock"] > 0
        with pytest.raises(Silent, match="waited 0 s for the answer to 'facts'"):
            probe.ask("facts", 0.0)
        with pytest.raises(Silent, match="stopped answering"):  # the late answer must not be taken for that to another question
            probe.ask("clock", PATIENCE)
    finally:
        probe.end()


def test_a_probe_that_cannot_do_what_it_is_asked() -> None:
    probe = RemoteProbe(Host("localhost"), sys.executable)
    try:
        probe.start()
        with pytest.raises(Silent, match="dance: KeyError"):
            probe.ask("dance", PATIENCE)
    finally:
        probe.end()


# --- the command line ------------------------------------------------------------------------------------------------------------------


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rt.doctor", *words]
    return subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_nothing_is_cut_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    address = "2001:db8:1111:2222:3333:4444:5555:6666"
    there = [Interface("enp0s31f6np0", (f"{address}/64",), 1500)]

    reports = [host(0, name="a-host-with-a-long-name.example.org", addresses=[address], interfaces=there)]
    found = types.SimpleNamespace(hosts=reports, links=[], run=lambda: None)
    monkeypatch.setattr(doctor, "RemoteProbe", lambda *_: None)
    monkeypatch.setattr(doctor, "Examination", lambda *_: contextlib.nullcontext(found))
    assert doctor.main(["--hosts", "h0"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"a-host-with-a-long-name.example.org .* {address} +enp0s31f6np0 +1500 +ssh", said), said


def test_this_host_alone() -> None:
    done = run("--hosts", "localhost,127.0.0.1", "--json")
    told = json.loads(done.stdout)
    assert [each["name"] for each in told["hosts"]] == ["localhost", "127.0.0.1"]
    assert all(each["facts"]["python"] == told["hosts"][0]["facts"]["python"] for each in told["hosts"])
    assert "rt.doctor: reaching 2 hosts" in done.stderr
    done = run("--hosts", "localhost")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing found that is wrong")


@pytest.mark.parametrize("more", [[], ["--job"]], ids=["hosts", "job"])
def test_ctrl_c_ends_the_waiting(more: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    executable(tmp_path / "ssh", f"echo up >{tmp_path}/started; exec sleep 1000")
    started = os.open(tmp_path / "started", os.O_RDWR)
    with Terminal("env", f"PATH={tmp_path}:{os.environ['PATH']}", sys.executable, "-m", "rt.doctor", "--hosts", "a,b", *more) as terminal:
        read_until(started, "up\n", 2)
        terminal.type("\x03")
        assert "Traceback" not in terminal.until("rt.doctor: stopped")
        assert terminal.process.wait(PATIENCE) == 130
    os.close(started)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one of the arguments --hostfile --hosts --job --rdma is required"),
        (("--hosts", "a", "--hostfile", "F"), "not allowed with argument"),
        (("--hosts", "a,,b", "--job"), "entry [1] of 'a,,b'"),
        (("--rdma", "--job"), "--rdma: not allowed with argument --job"),
        (("--rdma", "--hosts", "a"), "not allowed with argument"),
        (("--hostfile", "/nowhere.json"), "hostfile /nowhere.json: found 'No such file or directory', expected a JSON list of hosts"),
        (("--hosts", "a,,b"), "entry [1] of 'a,,b'"),
        (("--hosts", "a", "--iface", "eth0,"), "--iface: found an empty entry in 'eth0,', expected names or networks"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_hosts_ranks_are_one_host(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([{"ssh": "localhost", "ips": ["127.0.0.1"]}] * 3))
    assert len(json.loads(run("--hostfile", str(path), "--json").stdout)["hosts"]) == 1


def test_help_teaches() -> None:
    said = run("--help").stdout
    assert "why is it stuck" in said and "rt.doctor --hosts node1,node2" in said and "exit code" in said
