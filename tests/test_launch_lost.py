"""Jobs of ``rt.launch`` whose host, cable, connection, supervisor or launcher goes: what is said, and that nothing is left anywhere.

May live here: what breaks once ranks run. May not: hosts that are not ready (``test_launch_ready``), and the rest (``test_launch_hosts``).
The deadline that is promised for the ranks of a broken job is asserted; no other time is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from far import Watch, lines, running
from hosts import ROOT
from launching import PATIENCE, last_line

pytestmark = sshd.NEEDED

# Each rank has a child of its group and one of a session of its own, and none of them listens to SIGTERM.
STUBBORN = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
children = [subprocess.Popen(["sleep", "1000"], start_new_session=apart) for apart in (False, True)]
print("ready")
while True: signal.pause()
"""
POLITE = 'print("ready")\nwhile True: signal.pause()\n'
MARK = "RT_JOB_ID="  # in the environment of ranks and of what they start


@pytest.fixture
def site(tmp_path: Path) -> Iterator[sshd.Site]:
    with sshd.site(tmp_path, 3) as made:
        yield made


@contextlib.contextmanager
def job(site: sshd.Site, folder: Path, source: str = STUBBORN, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run two ranks on each host until all have said that they are ready."""
    with running(site, folder / "script.py", source, "-n2", *options) as process:
        assert lines(process, 6) == [f"[{rank} host{rank // 2}] ready\n" for rank in range(6)]
        yield process


def processes(launcher: subprocess.Popen[bytes], name: str) -> list[int]:
    """Return the processes with this name below a launcher, as this machine numbers them."""
    found, below = [], [launcher.pid]
    while below:
        pid = below.pop()
        with contextlib.suppress(OSError):
            below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
    return found


def verdict(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    error = process.communicate(timeout=PATIENCE)[1]
    return process.returncode, last_line(error)


def nothing_is_left(servers: list[sshd.Server]) -> bool:
    """Whether no supervisor, guard or process of a job is alive."""
    return not any(server.processes(mark) for server in servers for mark in (MARK, "rt._supervisor", "_launch_guard"))


@pytest.mark.parametrize("source", [STUBBORN, POLITE])
def test_a_launcher_that_is_killed(site: sshd.Site, tmp_path: Path, source: str) -> None:
    with job(site, tmp_path, source) as process:
        watch = Watch(site.servers, MARK)
        assert watch.count == (18 if source == STUBBORN else 6)
        since = time.monotonic()
        process.send_signal(signal.SIGKILL)
        assert watch.gone(since)


def test_a_connection_that_is_killed(site: sshd.Site, tmp_path: Path) -> None:
    with job(site, tmp_path) as process:
        cut_off, others = Watch(site.servers[1:2], MARK), Watch([site.servers[0], site.servers[2]], MARK)
        (ssh, *_) = [pid for pid in processes(process, "ssh") if b"host1" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        since = time.monotonic()
        os.kill(ssh, signal.SIGKILL)
        assert cut_off.count == 6 and cut_off.gone(since)
        code, text = verdict(process)
        assert (code, text) == (255, "rt.launch: rank 2 (host1) was lost: the connection has ended (ssh killed by signal 9)")
        assert others.gone(since + 5)  # these were asked first, with the launcher's own patience


def test_a_cable_that_is_pulled(site: sshd.Site, tmp_path: Path) -> None:
    with job(site, tmp_path, STUBBORN, "--prefix", "auto") as process:
        cut_off, others = Watch(site.servers[1:2], MARK), Watch([site.servers[0], site.servers[2]], MARK)
        since = time.monotonic()
        site.servers[1].host.ip("link set cable down")
        assert cut_off.gone(since)
        code, text = verdict(process)
        assert code == 255
        assert text == "rt.launch: rank 2 (host1) was lost: Timeout, server 10.2.0.2 not responding."
        assert others.gone(time.monotonic())


def test_a_host_that_is_killed(site: sshd.Site, tmp_path: Path) -> None:
    with job(site, tmp_path, POLITE) as process:
        others = Watch([site.servers[0], site.servers[2]], MARK)
        since = time.monotonic()
        site.servers[1].kill()
        assert others.gone(since)
        code, text = verdict(process)
        assert code == 255 and text.startswith("rt.launch: rank 2 (host1) was lost: "), text
        assert nothing_is_left([site.servers[0], site.servers[2]])


REDUCING = """
import numpy as np
import rt.sync as rt
rt.init()
print("ready")
while True: rt.all_sum(np.ones(1 << 16))
"""


def private_files(*kept: str) -> list[str]:
    """Return what gives a host a /tmp and a /dev/shm of its own, with those folders that are in ours and that it needs."""
    there = sorted({path for path in kept if path.startswith("/tmp/")})
    binds = [f"mkdir -p {path} && mount --bind /run/ours/{path.removeprefix('/tmp/')} {path}" for path in there]
    return ["mkdir /run/ours && mount --bind /tmp /run/ours && mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm", *binds]


def files(server: sshd.Server) -> list[str]:
    """Return what lies in the folders for temporary files of a host."""
    return [f"{folder}/{name}" for folder in ("/tmp", "/dev/shm") for name in os.listdir(f"/proc/{server.process.pid}/root{folder}")]


@pytest.mark.parametrize("killed", ["the launcher", "the supervisors"])
def test_no_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    """Ranks of one host share memory and have a ring file; whoever had to clean up after them has no chance to do so."""
    (tmp_path / "desk").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "desk"))
    prepare = private_files(ROOT, sys.prefix, str(tmp_path))
    with sshd.site(tmp_path, 3, prepare=dict.fromkeys(range(3), prepare)) as site:
        before = [files(server) for server in site.servers]
        with job(site, tmp_path, REDUCING) as process:
            everybody = [Watch(site.servers, mark) for mark in (MARK, "rt._supervisor", "_launch_guard")]
            since = time.monotonic()
            if killed == "the launcher":
                process.send_signal(signal.SIGKILL)
            else:
                for server in site.servers:
                    for pid in server.processes("rt._supervisor"):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            assert all(watch.count and watch.gone(since) for watch in everybody)
            process.wait(PATIENCE)
        assert [files(server) for server in site.servers] == before and os.listdir(tmp_path / "desk") == []


def test_a_host_that_is_killed_is_the_cause_and_not_the_ranks_that_miss_it(site: sshd.Site, tmp_path: Path) -> None:
    with job(site, tmp_path, REDUCING) as process:
        site.servers[1].kill()
        code, text = verdict(process)
        assert code == 255 and text.startswith("rt.launch: rank 2 (host1) was lost: "), text


def test_a_host_that_loses_its_power(site: sshd.Site, tmp_path: Path) -> None:
    """Nobody sends a last word: the cable is dead before the host is."""
    with job(site, tmp_path, POLITE) as process:
        site.servers[2].host.ip("link set cable down")
        site.servers[2].kill()
        code, text = verdict(process)
        assert (code, text) == (255, "rt.launch: rank 4 (host2) was lost: Timeout, server 10.2.0.3 not responding.")
        assert nothing_is_left(site.servers[:2])


def test_a_supervisor_that_is_killed(site: sshd.Site, tmp_path: Path) -> None:
    with job(site, tmp_path) as process:
        watch = Watch(site.servers[1:2], MARK)
        since = time.monotonic()
        for pid in site.servers[1].processes("rt._supervisor"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert watch.gone(since)
        code, text = verdict(process)
        assert code == 255 and text.startswith("rt.launch: rank 2 (host1) was lost: "), text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_told_to_stop(site: sshd.Site, tmp_path: Path, number: signal.Signals) -> None:
    source = "signal.signal(signal.SIGINT, signal.SIG_DFL)\n" + POLITE
    with job(site, tmp_path, source) as process:
        process.send_signal(number)
        assert verdict(process) == (128 + number, f"rt.launch: stopped by {number.name}")
        assert nothing_is_left(site.servers)


def test_a_rank_that_fails_ends_the_job_everywhere(site: sshd.Site, tmp_path: Path) -> None:
    source = "if rank == 3: sys.stdin.readline(); raise ValueError('loss is NaN')\n" + POLITE
    with running(site, tmp_path / "script.py", source, "-n2") as process:
        lines(process, 5)
        error = process.communicate(b"go on\n", timeout=PATIENCE)[1].decode().splitlines()
        assert process.returncode == 1
        assert error[-2:] == ["[3 host1] ValueError: loss is NaN", "rt.launch: rank 3 (host1) exited with code 1"]
        assert nothing_is_left(site.servers)


def test_a_launcher_that_is_stopped_is_as_good_as_dead(site: sshd.Site, tmp_path: Path) -> None:
    """Its connections stay, but nothing comes any more: what a pulled cable looks like from the other end."""
    with job(site, tmp_path) as process:
        watch = Watch(site.servers, MARK)
        since = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        assert watch.gone(since)


# The rank that is to stay alive for longer than silence would be taken for death opens a FIFO then.
LONG = "import time\nprint('ready')\ntime.sleep(6)\nopen(sys.argv[1], 'w').close()\n"


def test_ctrl_z_is_no_death(site: sshd.Site, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with running(site, tmp_path / "script.py", LONG + "print('done')", arguments=[str(tmp_path / "fifo")], hosts=["host0"]) as process:
        assert lines(process, 1) == ["ready\n"]
        process.send_signal(signal.SIGTSTP)
        (tmp_path / "fifo").read_text()
        assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        process.send_signal(signal.SIGCONT)
        out, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, error) == (0, b"done\n", b"")


def test_output_that_nobody_reads_keeps_no_sign_of_life_back(site: sshd.Site, tmp_path: Path) -> None:
    """One rank fills every buffer on the way to a paused pager; the job lives on, and nothing is lost."""
    done = tmp_path / "done"
    for rank in (0, 2):  # one each: a pipe that two write to may end for both at once
        os.mkfifo(f"{done}{rank}")
    flood = "if rank == 1:\n    for _ in range(1 << 10): print('x' * 65535)\n    sys.exit()\n"
    source = flood + "import time\ntime.sleep(6)\nopen(sys.argv[1] + str(rank), 'w').close()\n"
    with running(site, tmp_path / "script.py", source, "--prefix", "never", arguments=[str(done)]) as process:
        for rank in (0, 2):
            Path(f"{done}{rank}").read_text()  # after more than the silence that ends a job
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) < 64 << 10  # KiB: the launcher holds a part of it only
        out, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, len(out), error) == (0, 64 << 20, b"")
