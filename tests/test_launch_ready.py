"""Hosts that ``rt.launch`` cannot start on: one table says what is wrong where and what to do, and nothing is started anywhere.

May live here: what is found before the start. May not: anything that goes wrong later (``test_launch_lost``).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import sshd
from far import SCRIPT, launch, running
from hosts import ROOT
from launching import PATIENCE, last_line

import rt

pytestmark = sshd.NEEDED


def rows(error: str, count: int, of: int) -> dict[str, str]:
    """Return the lines of a table by host, after a look at what is around it."""
    head, *found, verdict = error.splitlines()
    assert head.split() == ["host", "found", "what", "to", "do"], error
    assert verdict == f"rt.launch: nothing was started: {count} of {of} hosts {'is' if count == 1 else 'are'} not ready"
    return {line.split()[0]: line for line in found}


def other_version(folder: Path) -> list[str]:
    """Return what makes one host have another version of rt in the same place."""
    init = Path(ROOT, "rt", "__init__.py").read_text()
    (folder / "init.py").write_text(init.replace(f'"{rt.__version__}"', '"0.0.9"'))
    return [f"mount --bind {folder}/init.py {ROOT}/rt/__init__.py"]


def test_one_table_says_what_is_wrong_where(tmp_path: Path) -> None:
    """Each host has a fault of its own but the last one; it starts nothing either."""
    script = tmp_path / "program" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT + "print('started')")
    hidden = f"mount -t tmpfs tmpfs {script.parent}"
    prepare = {1: [hidden], 2: other_version(tmp_path), 3: [f"mount --bind /dev/null {os.path.realpath(sys.executable)}"]}
    password = {0: ["PubkeyAuthentication no", "PasswordAuthentication yes"]}
    nowhere = ["Host nowhere", "  HostName 10.2.0.77"]
    with sshd.site(tmp_path, 5, prepare=prepare, options=password, config=nowhere) as site:
        done = launch(site, str(script), hosts=["host0", "host1", "host2", "host3", "host4", "nowhere"])
    assert (done.returncode, done.stdout) == (2, "")
    found = rows(done.stderr, 5, 6)
    expected = {
        "host0": r"Permission denied .*  it asks for a password: `ssh-copy-id host0`",
        "host1": rf"program '{script}' not found: no such file  +copy it there, or let --sync-code do so",
        "host2": rf"rt 0\.0\.9, here {re.escape(rt.__version__)}  +`\S+ -m pip install rt-collectives=={re.escape(rt.__version__)}` there",
        "host3": rf"no Python at {sys.executable}  +install it there, or name one that all hosts have: --python",
        "nowhere": r"(timed out|No route to host)  +no answer: is it on",
    }
    assert found.keys() == expected.keys()
    for host, pattern in expected.items():
        assert re.search(pattern, found[host]), found[host]


@pytest.mark.parametrize(
    ("arguments", "found", "advice"),
    [
        (["--cwd", "/no/such/folder", "true"], "--cwd '/no/such/folder': no such folder", "make that folder there"),
        (["no-such-program"], "program 'no-such-program' not found: not on PATH", "install it there, or give its whole path"),
        (["--python", "/no/python", "true"], "no Python at /no/python", "name one that all hosts have: --python"),
        (["--python", "/usr/bin/env", "true"], "env", "try `/usr/bin/env -c 'import rt'` there"),
    ],
)
def test_what_is_missing_on_a_host(tmp_path: Path, arguments: list[str], found: str, advice: str) -> None:
    with sshd.site(tmp_path, 1) as site:
        done = launch(site, *arguments)
    head, row, verdict = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and head.startswith("host")
    assert found in row and advice in row
    assert verdict == "rt.launch: nothing was started: the host is not ready"


def test_the_same_for_programs(tmp_path: Path) -> None:
    """stdout has what was found, in the order of the hosts, and stderr the verdict as ever; a job that starts has stdout for itself."""
    with sshd.site(tmp_path, 2) as site:
        hosts = ["host1", "no-such-name.invalid", "host0"]
        done = launch(site, "--json", "no-such-program", hosts=hosts)
        verdict = "nothing was started: 3 of 3 hosts are not ready"
        assert (done.returncode, done.stderr) == (2, f"rt.launch: {verdict}\n")
        found = json.loads(done.stdout)
        assert (found["version"], found["failure"]) == (1, verdict)
        assert [problem["host"] for problem in found["problems"]] == hosts
        assert found["problems"][0] == {
            "host": "host1",
            "found": "program 'no-such-program' not found: not on PATH",
            "advice": "install it there, or give its whole path",
        }
        assert found["problems"][1]["found"].startswith("ssh: Could not resolve hostname")
        done = launch(site, "--json", "--sync-code", str(tmp_path), "true", hosts=["no-such-name.invalid", "host0"])
        (problem,) = json.loads(done.stdout)["problems"]
        assert (done.returncode, problem["host"]) == (2, "no-such-name.invalid") and done.stderr.startswith("rt.launch: --sync-code")
        done = launch(site, "--json", "echo", "started")
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(done.stdout.splitlines()) == ["[0 host0] started", "[1 host1] started"]


def test_a_python_without_rt(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 1) as site:
        base = os.path.realpath(sys.executable)
        done = launch(site, "--python", base, "true")
    assert done.returncode == 2
    assert re.search(rf"{re.escape(base)}: No module named '?rt.*pip install rt-collectives==", done.stderr)


def hostfile(folder: Path, content: object) -> str:
    path = folder / "hosts.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_addresses_that_are_of_no_use(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2) as site:
        wrong = hostfile(tmp_path, [{"ssh": "host0", "ips": ["10.2.0.1"]}, {"ssh": "host1", "ips": ["10.2.0.9"]}])
        done = launch(site, "--hostfile", wrong, "true", hosts=[])
        found = rows(done.stderr, 1, 2)
        assert re.search(r'10\.2\.0\.9 is no address of this host  correct "ips" in the hostfile', found["host1"])
        loopback = hostfile(tmp_path, [{"ssh": "host0", "ips": ["127.0.0.1"]}, {"ssh": "host1"}])
        done = launch(site, "--hostfile", loopback, "true", hosts=[])
        assert re.search(r'at 127\.0\.0\.1, which other hosts cannot  give it "ips" in a hostfile', rows(done.stderr, 1, 2)["host0"])
        uneven = hostfile(tmp_path, [{"ssh": "host0", "ips": ["10.2.0.1"]}, {"ssh": "host1", "ips": ["10.2.0.2", "10.2.0.2"]}])
        done = launch(site, "--hostfile", uneven, "true", hosts=[])
        assert re.search("2 ips, host0 has 1  +give each host as many", rows(done.stderr, 1, 2)["host1"])


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 1) as site:
        done = launch(site, "--backend", "nccl", "-n2", "true", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES=3 for 2 ranks  allow one GPU per rank, or start fewer" in done.stderr


def test_one_host_under_several_names(tmp_path: Path) -> None:
    """It would be counted as several: each of its ranks would be the first there, with the first GPU and all cores."""
    with sshd.site(tmp_path, 2) as site:
        done = launch(site, "--backend", "nccl", "echo", "started", hosts=["host0", "root@host0", "host1", "10.2.0.1"])
        head, *found, verdict = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (2, "") and head.startswith("host ")
        advice = "write host0 once for each rank, or once with -n"
        assert [re.split("  +", row) for row in found] == [
            ["host0", "root@host0 and host0 are one host", advice],
            ["10.2.0.1", "10.2.0.1 and host0 are one host", advice],
        ]
        assert verdict == "rt.launch: nothing was started: 2 of 4 hosts are not ready"
        done = launch(site, "sh", "-c", "echo $RT_LOCAL_RANK of $RT_LOCAL_SIZE", hosts=["root@host0", "host1", "root@host0"])
        assert sorted(done.stdout.splitlines()) == ["[0 host0] 0 of 2", "[1 host1] 0 of 1", "[2 host0] 1 of 2"]


SLOW = ["Host slow", "  ProxyCommand sleep 1000", "  ConnectTimeout 1000"]


def test_a_time_limit_holds_while_hosts_are_waited_for(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 1, config=SLOW) as site:
        done = launch(site, "--timeout", "2", "true", hosts=["slow", "host0"])
    assert (done.returncode, done.stderr) == (124, "rt.launch: ended by --timeout 2: no answer yet from slow, host0\n")


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 1, config=SLOW) as site:
        with running(site, tmp_path / "script.py", "", "--verbose", hosts=["slow", "host0"]) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == b"rt.launch: connecting to slow, host0\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
            assert last_line(process.stderr.read()) == "rt.launch: stopped by SIGINT"
