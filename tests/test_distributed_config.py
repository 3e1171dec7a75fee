"""``rt.distributed_config`` as a program, on facts from files: what goes to stdout and stderr, what is written, what is refused.

May live here: command lines. May not: hosts (``test_distributed_config_hosts``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import linuxes
import macs
import pytest
from hosts import ROOT
from launching import Terminal, read_until
from linuxes import Nic
from macs import executable

from rt._wiring_facts import Facts, save
from rt.hostfile import Hostfile, read_hostfile


def config(folder: Path, *words: str, told: list[Facts] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    if told is not None:
        save(str(folder / "facts.json"), told, {})
        words = ("--facts", "facts.json", *words)
    command = [sys.executable, "-m", "rt.distributed_config", *words]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RT_")}
    env = {**inherited, "PYTHONPATH": ROOT, **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def hostfile(folder: Path, *words: str, told: list[Facts]) -> Hostfile:
    done = config(folder, *words, "--output", "hosts.json", told=told)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return read_hostfile(folder / "hosts.json")


def mesh() -> list[Facts]:
    return [mac.facts() for mac in macs.macs(4, macs.MESH)]


def ring(cables: list[tuple[macs.End, macs.End]], *, rdma: bool = False) -> list[Facts]:
    made = macs.macs(4, cables)
    for mac in made:
        mac.rdma = rdma
    return [mac.facts() for mac in made]


def test_the_hostfile_of_a_mesh(tmp_path: Path) -> None:
    written = hostfile(tmp_path, told=mesh())
    assert (written.backend, written.envs) == ("jaccl", ())
    assert [(host.ssh, host.ips) for host in written.hosts] == [(f"m{number}", (f"192.168.0.{10 + number}",)) for number in range(4)]
    assert written.hosts[0].rdma == (None, "rdma_en2", "rdma_en3", "rdma_en4")
    assert written.hosts[3].rdma == ("rdma_en2", "rdma_en3", "rdma_en4", None)


def test_the_hostfile_of_a_ring_has_the_addresses_that_face_the_left_neighbour(tmp_path: Path) -> None:
    written = hostfile(tmp_path, told=ring(macs.CROSSED_RING))
    assert [host.ssh for host in written.hosts] == ["m0", "m2", "m1", "m3"]
    # 192.168.0.0/24 is in use: m0 en2 - m2 en2 is 192.168.1.0/30, m0 en3 - m3 en3 .4/30, m1 en2 - m2 en3 .8/30, m1 en3 - m3 en2 .12/30
    assert [host.ips for host in written.hosts] == [("192.168.1.5",), ("192.168.1.2",), ("192.168.1.9",), ("192.168.1.14",)]
    assert all(host.rdma == () for host in written.hosts)


def test_two_cables_between_neighbours_are_two_rings(tmp_path: Path) -> None:
    written = hostfile(tmp_path, told=ring(macs.TWO_RINGS))
    assert [len(host.ips) for host in written.hosts] == [2] * 4
    assert len({ip for host in written.hosts for ip in host.ips}) == 8
    written = hostfile(tmp_path, told=ring(macs.TWO_RINGS, rdma=True))
    assert written.backend == "jaccl-ring"
    assert written.hosts[0].rdma == (None, ("rdma_en2", "rdma_en4"), None, ("rdma_en3", "rdma_en5"))


def test_the_hostfile_of_a_network(tmp_path: Path) -> None:
    nics = [[Nic("eth0", f"02:00:00:00:00:0{number}", f"10.5.0.{number}/24", heard=["02:00:00:00:00:01"])] for number in (1, 2)]
    told = [linuxes.facts(f"user@n{number}", each) for number, each in enumerate(nics)]
    written = hostfile(tmp_path, "--env", "A=1", "--env", "B=", told=told)
    assert (written.backend, written.envs) == ("", ("A=1", "B="))
    assert [(host.ssh, host.ips) for host in written.hosts] == [("user@n0", ("10.5.0.1",)), ("user@n1", ("10.5.0.2",))]


def test_stdout_is_the_hostfile_and_nothing_else(tmp_path: Path) -> None:
    done = config(tmp_path, "--verbose", told=mesh())
    assert json.loads(done.stdout)["backend"] == "jaccl"
    for said in ("over Thunderbolt, backend jaccl", "Setup for m3", "sudo ifconfig bridge0 down", "80 Gb/s  192.168.1.0/30 (new)"):
        assert said in done.stderr
    (tmp_path / "out.json").write_text(done.stdout)
    assert len(read_hostfile(tmp_path / "out.json").hosts) == 4


def test_stdout_is_the_graph_and_nothing_else(tmp_path: Path) -> None:
    done = config(tmp_path, "--verbose", "--dot", told=mesh())
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[0], lines[-1]) == (0, "graph G {", "}") and sum("--" in line for line in lines) == 6
    assert "Setup for" not in done.stderr
    both = config(tmp_path, "--dot", "--output", "hosts.json", told=mesh())
    assert both.stdout == done.stdout and (tmp_path / "hosts.json").exists()


def test_stdout_is_the_report_and_nothing_else(tmp_path: Path) -> None:
    told = mesh()
    told[0].answers["system_profiler"] = macs.Mac(0, {1: (1, 1), 2: (2, 1)}).tools["system_profiler"]
    report = json.loads(config(tmp_path, "--json", told=told).stdout)
    assert (report["over"], report["backend"], report["ways"]) == ("thunderbolt", "jaccl-ring", 1)
    (broken,) = [cable for cable in report["cables"] if cable["fault"]]
    assert broken["ends"] == [{"host": "m0", "port": "en4"}, {"host": "m3", "port": "en2"}]
    assert report["setup"]["m0"][0] == "sudo ifconfig bridge0 down"
    assert report["hostfile"]["backend"] == "jaccl-ring" and report["remarks"] == [f"broken cable: {broken['fault']}"]
    assert report["hosts"][0]["ports"][2] == {
        "name": "en2", "kind": "thunderbolt", "speed": 80.0, "up": True, "addresses": [], "rdma": "rdma_en2",
    }  # fmt: skip


def test_a_picture_is_drawn_where_no_ring_is_found_too(tmp_path: Path) -> None:
    told = mesh()[:2]
    told[0].answers["system_profiler"] = macs.Mac(0).tools["system_profiler"]
    done = config(tmp_path, "--svg", "cables.svg", "--dot", told=told)
    assert (done.returncode, "color=red" in done.stdout) == (0, True)
    done = config(tmp_path, "--svg", "cables.svg", told=told)
    assert (done.returncode, done.stdout) == (1, "")
    assert "broken cable: m1 en2 sees m0 en2, which does not see it" in done.stderr and "no ring through all 2 hosts" in done.stderr
    assert tree.parse(tmp_path / "cables.svg").getroot().tag.endswith("svg")


def test_only_the_ports_that_are_allowed(tmp_path: Path) -> None:
    by_option = config(tmp_path, "--iface", "^=en2,en5", "--json", told=ring(macs.TWO_RINGS))
    assert by_option.returncode == 1 and "no ring through all 4 hosts" in by_option.stderr  # m0 - m1 is left, and m3 - m0
    by_variable = config(tmp_path, "--json", told=ring(macs.TWO_RINGS), RT_SOCKET_IFNAME="=en0")
    report = json.loads(by_variable.stdout)
    assert (report["over"], report["hostfile"]["hosts"][0]["ips"]) == ("ethernet", ["192.168.0.10"])


def test_some_of_the_hosts_of_a_file(tmp_path: Path) -> None:
    written = hostfile(tmp_path, "--hosts", "m3,m1", told=mesh())
    assert [(host.ssh, host.rdma) for host in written.hosts] == [("m3", (None, "rdma_en3")), ("m1", ("rdma_en4", None))]
    done = config(tmp_path, "--hosts", "m3,m7", told=mesh())
    assert done.returncode == 1 and "found nothing of m7, expected one of m0, m1, m2, m3" in done.stderr


def test_hosts_that_were_unreachable_then_are_so_now(tmp_path: Path) -> None:
    save(str(tmp_path / "facts.json"), mesh()[:2], {"m9": "no answer: is it on?"})
    done = config(tmp_path, "--facts", "facts.json")
    assert (done.returncode, done.stdout) == (1, "") and "m9: no answer: is it on?" in done.stderr
    done = config(tmp_path, "--facts", "facts.json", "--ignore-unreachable")
    assert [host["ssh"] for host in json.loads(done.stdout)["hosts"]] == ["m0", "m1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--over", "tokenring"], "invalid choice: 'tokenring'"),
        (["--backend", "nccl"], "invalid choice: 'nccl'"),
        (["--dot", "--json"], "each wants stdout for itself"),
        (["--facts", "f", "--auto-setup"], "--facts touches no host"),
        (["--hosts", "a,,b"], "entry [1]"),
        (["--hosts", "a", "--hostfile", "f"], "found both"),
        (["--hostfile", "nothing.json"], "No such file"),
        (["--env", "1A=2"], "expected NAME=VALUE"),
        (["--iface", "eth0,,en1"], "--iface: found an empty entry"),
        (["--outpu", "f"], "unrecognized arguments"),
        (["--verbose", "m1"], "unrecognized arguments: m1"),
    ],
)
def test_wrong_usage(words: list[str], said: str, tmp_path: Path) -> None:
    done = config(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]


def test_a_ring_file_in_place_of_a_hostfile_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "ring.json").write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"]]')
    done = config(tmp_path, "--hostfile", "ring.json")
    assert done.returncode == 2 and "found a ring file" in done.stderr


@pytest.mark.parametrize("option", ["--output", "--svg", "--save-facts"])
def test_files_that_cannot_be_written_are_said_before_a_host_is_asked(option: str, tmp_path: Path) -> None:
    executable(tmp_path / "ssh", f"touch {tmp_path}/asked; exit 255")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = config(tmp_path, "--hosts", "a", option, "no/such folder/file", PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"rt.distributed_config: error: argument {option}: found 'no/such folder/file' (No such file or directory), "
        "expected a file that can be written: `mkdir -p 'no/such folder'`, or name another"
    )
    (tmp_path / "folder").mkdir()
    done = config(tmp_path, "--hosts", "a", option, "folder", PATH=path)
    assert "found 'folder' (Is a directory), expected a file that can be written: name another" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "asked").exists()
    assert config(tmp_path, "--hosts", "a", option, "folder/file", PATH=path).returncode == 1
    assert (tmp_path / "asked").exists()
    assert list((tmp_path / "folder").iterdir()) == [tmp_path / "folder" / "file"] * (option == "--save-facts")  # of who did not answer


def test_a_system_that_is_neither(tmp_path: Path) -> None:
    done = config(tmp_path, told=[Facts("bsd", {"uname": (0, "FreeBSD\n")})])
    assert done.returncode == 1 and "bsd: found system 'FreeBSD', expected one of Darwin, Linux" in done.stderr


def test_answers_that_nobody_understands_are_said(tmp_path: Path) -> None:
    told = linuxes.facts("n", [Nic("eth0", "02:00:00:00:00:01", "10.0.0.1/24")])
    told.answers["routes"] = (0, '[{"dst": "10.0.0.0/99", "dev": "eth0"}]')
    done = config(tmp_path, told=[told])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "n: its tools print something that is not understood (" in done.stderr and "--save-facts F.json keeps it" in done.stderr


def test_interfaces_of_which_a_host_has_none(tmp_path: Path) -> None:
    done = config(tmp_path, "--over", "ethernet", "--iface", "=en0,en9", told=mesh())
    assert done.returncode == 0
    done = config(tmp_path, "--iface", "fd00::/8", told=mesh())
    assert done.returncode == 1
    assert "rt.distributed_config: m0: interfaces fd00::/8: found en0 (192.168.0.10/24), en1 (no address, down), " in done.stderr
    assert done.stderr.endswith("expected one that matches\n")


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    executable(tmp_path / "ssh", f"echo up >{tmp_path}/started; exec sleep 1000")
    started = os.open(tmp_path / "started", os.O_RDWR)
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    with Terminal("env", path, sys.executable, "-m", "rt.distributed_config", "--hosts", "a,b") as terminal:
        read_until(started, "up\n", 2)
        terminal.type("\x03")
        terminal.until("rt.distributed_config: stopped")
        assert terminal.process.wait(20) == 130
    os.close(started)


def test_a_terminal_shows_who_is_waited_for() -> None:
    with Terminal(sys.executable, "-m", "rt.distributed_config", "--over", "ethernet") as terminal:
        terminal.until("asked 1 host, waiting for 1: 127.0.0.1")
        terminal.until(r'"ssh": "127.0.0.1"')


def test_help_teaches(tmp_path: Path) -> None:
    said = config(tmp_path, "--help").stdout
    for word in ("--auto-setup", "--persist", "--save-facts", "| dot -Tpng", "rt.launch --hostfile hosts.json", "exit code:"):
        assert word in said


def test_this_host_alone(tmp_path: Path) -> None:
    done = config(tmp_path, "--over", "ethernet", "--save-facts", "facts.json")
    assert [host["ssh"] for host in json.loads(done.stdout)["hosts"]] == ["127.0.0.1"], done.stderr
    assert config(tmp_path, "--over", "ethernet", "--facts", "facts.json").stdout == done.stdout
