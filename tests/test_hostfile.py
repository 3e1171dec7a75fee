"""The launcher's hostfile and the list of ``--hosts``: both forms, what is wrong with others, and the way back.

May live here: ``rt.hostfile``. May not: launching.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rt.errors import ConfigError
from rt.hostfile import Host, Hostfile, parse_hosts, read_hostfile, repeated, write_hostfile


def read(tmp_path: Path, content: object) -> Hostfile:
    path = tmp_path / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_hostfile(path)


def test_both_forms(tmp_path: Path) -> None:
    hosts = [{"ssh": "a", "ips": ["10.0.0.1", "fe80::1%eth0"], "rdma": [None, "rdma_en2", ["x", "y"]]}, {"ssh": "me@b"}]
    expected = (Host("a", ("10.0.0.1", "fe80::1%eth0"), (None, "rdma_en2", ("x", "y"))), Host("me@b"))
    assert read(tmp_path, hosts) == Hostfile(expected)
    assert read(tmp_path, {"hosts": hosts, "backend": "jaccl", "envs": ["A=1", "B="]}) == Hostfile(expected, "jaccl", ("A=1", "B="))
    assert read(tmp_path, {"hosts": hosts, "backend": ""}) == Hostfile(expected)


def test_what_is_written_is_read_and_is_json_a_person_can_read(tmp_path: Path) -> None:
    hostfile = Hostfile((Host("a", ("10.0.0.1",), (None, ("x", "y"))), Host("b")), "ring", ("A=1",))
    write_hostfile(tmp_path / "out.json", hostfile)
    assert read_hostfile(tmp_path / "out.json") == hostfile
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["backend", "envs", "hosts"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([["10.0.0.1:5000"], ["10.0.0.2:5000"]], "found a ring file .* ranks read a ring file by themselves: RT_HOSTFILE takes this one"),
        ({"hosts": [["10.0.0.1:5000"]]}, "found a ring file"),
        ([], r"found \[\], expected a JSON list of hosts"),
        ({"backend": "ring"}, r'found \{"backend": "ring"\}, expected a JSON list of hosts'),
        ("[", "found no JSON at line 1 column 2"),
        ([{"ips": []}], r'host \[0\]: "ssh": found null, expected the name that ssh knows'),
        (["a"], r'host \[0\]: found "a", expected an object such as \{"ssh": "node1"\}'),
        ([{"ssh": "a"}, {"ssh": ""}], r'host \[1\]: "ssh": found \'\', expected a host'),
        ([{"ssh": "-oProxyCommand=evil"}], r'host \[0\]: "ssh": found .-oProxyCommand=evil., expected a host'),
        ([{"ssh": "a", "ips": "10.0.0.1"}], r'host \[0\]: "ips": found "10.0.0.1", expected a list of IP addresses'),
        ([{"ssh": "a", "ips": ["node1"]}], r'host \[0\]: "ips"\[0\]: found .node1., expected an IP address'),
        ([{"ssh": "a", "rdma": [1]}], r'host \[0\]: "rdma"\[0\]: found 1, expected null, the name of a device'),
        ([{"ssh": "a", "ip": []}], r'host \[0\]: found "ip", expected nothing but "ssh", "ips", "rdma"'),
        ({"hosts": [{"ssh": "a"}], "backend": "gloo"}, '"backend": found "gloo", expected one of ring, mpi, nccl, jaccl, jaccl-ring'),
        ({"hosts": [{"ssh": "a"}], "envs": {"A": "1"}}, '"envs": found .* expected a list of "NAME=VALUE"'),
        ({"hosts": [{"ssh": "a"}], "envs": ["1=A"]}, r'"envs"\[0\]: found .1=A., expected NAME=VALUE'),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(f"hostfile {tmp_path}/hosts.json: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*nothing\.json: found 'No such file or directory', expected a JSON list of hosts"):
        read_hostfile(tmp_path / "nothing.json")


def test_a_list_of_hosts() -> None:
    assert parse_hosts("a, me@b,10.0.0.3,me@10.0.0.4,fd00::5,[fd00::6],me@[fd00::7]") == (
        Host("a"),
        Host("me@b"),
        Host("10.0.0.3", ("10.0.0.3",)),
        Host("me@10.0.0.4", ("10.0.0.4",)),
        Host("fd00::5", ("fd00::5",)),
        Host("fd00::6", ("fd00::6",)),
        Host("me@fd00::7", ("fd00::7",)),
    )
    assert [host.ssh for host in parse_hosts("a,b", 2)] == ["a", "a", "b", "b"]
    assert repeated([Host("a"), Host("b")], 2) == parse_hosts("a,b", 2)


@pytest.mark.parametrize("text", ["", "a,,b", "a b", "-oProxyCommand=x", "me@-x", "@a", "a;reboot", "$(reboot)", "a\nb"])
def test_what_can_be_no_host(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--hosts: entry \[\d\] of {re.escape(repr(text))}: found .* expected a host's name"):
        parse_hosts(text)


def test_which_hosts_need_no_ssh() -> None:
    assert [host.is_local for host in parse_hosts("localhost,127.0.0.1,::1,10.0.0.1,a,me@localhost")] == [True] * 3 + [False] * 3
    assert [host.name for host in parse_hosts("a,me@b,me@fd00::7")] == ["a", "b", "fd00::7"]
