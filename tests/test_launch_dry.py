"""``rt.launch --dry-run`` for other hosts: the commands it shows really run, and tell ranks what a real run does.

May live here: that. May not: a dry run for this host alone (``test_launch_groups``), MPI's own launcher (``test_mpi_launch``).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from far import SCRIPT, launch
from launching import PATIENCE

pytestmark = sshd.NEEDED


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Site]:
    """Two hosts that put temporary files into the test's folder."""
    folder = tmp_path_factory.mktemp("site")
    with sshd.site(folder, 2, ipv6=True, options={number: [f"SetEnv TMPDIR={folder}"] for number in range(2)}) as made:
        yield made


EVERYTHING = """
import json
own = ("RT_JOB_ID", "RT_SECRET_FD", "RT_COORDINATOR_FD")  # of a real job; all else is to be the same
found = {name: os.environ[name] for name in os.environ if name.startswith(("RT_", "MLX_", "NCCL_", "CUDA_", "OMP_")) and name not in own}
for name in [name for name in found if name.endswith(("HOSTFILE", "IBV_DEVICES"))]:
    found[name] = json.load(open(found[name]))
print(json.dumps([rank, sys.argv[1:], found], sort_keys=True))
"""
RING = ["-p 6000 --connections-per-ip 2", "--connections-per-ip 2", "--backend nccl", "--backend ring -n2"]
WAYS = [(how, options) for how in ("names", "addresses", "ips") for options in RING]
WAYS += [("ips", "--backend jaccl"), ("ips", "--backend jaccl-ring")]


@pytest.mark.parametrize(("how", "options"), WAYS)
def test_the_lines_tell_ranks_what_a_run_tells_them(site: sshd.Site, tmp_path: Path, how: str, options: str) -> None:
    """The ranks of both say the same of their environment, but for ports that are free, and names where nobody was asked for an address."""
    hosts = {"names": ["host0", "host1"], "addresses": ["10.2.0.1", "10.2.0.2"], "ips": []}[how]
    file, script, rdma = tmp_path / "hosts.json", tmp_path / "script.py", [[None, "left"], ["right", None]]
    entries = [{"ssh": f"host{each}", "ips": [f"10.2.0.{each + 1}", f"fd02::{each + 1}"], "rdma": rdma[each]} for each in range(2)]
    file.write_text(json.dumps(entries))
    script.write_text(SCRIPT + EVERYTHING)
    words = [*(["--hostfile", str(file)] if not hosts else []), *options.split(), "--env", "RT_X=a b", str(script), "$HOME"]
    here = {"NCCL_X": "1", "CUDA_VISIBLE_DEVICES": "4,7"}
    shown = launch(site, "--dry-run", *words, hosts=hosts, **here)
    assert (shown.returncode, shown.stderr) == (0, "")
    commands = [site.command("sh", "-c", line) for line in shown.stdout.splitlines() if not line.startswith("#")]
    typed = [subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE) for command in commands]
    assert [(each.returncode, each.stderr) for each in typed] == [(0, "")] * (4 if "-n2" in words else 2)
    done = launch(site, "--prefix", "never", *words, hosts=hosts, **here)
    assert (done.returncode, done.stderr) == (0, "")

    def alike(said: str) -> str:
        named = re.sub(r"10\.2\.0\.(\d)", lambda found: f"host{int(found[1]) - 1}", said)
        return named if "-p" in words else re.sub(r':\d{4,5}"', ':free"', named)

    assert [alike(each.stdout.strip()) for each in typed] == [alike(line) for line in sorted(done.stdout.splitlines())]


def test_a_dry_run_shows_what_to_type(site: sshd.Site) -> None:
    words = ["--dry-run", "--env", "A=b c", "--env", "RT_SECRET=not this", "train.py"]
    done = launch(site, *words, hosts=["10.2.0.1", "me@host1"], NCCL_X="1")
    *notes, near, far = done.stdout.splitlines()
    assert all(note.startswith("# ") for note in notes) and "RT_SECRET_FILE" in notes[1] and "not this" not in done.stdout
    assert shlex.split(near)[:2] == ["ssh", "10.2.0.1"]
    ssh, host, line = shlex.split(far)
    assert (ssh, host) == ("ssh", "me@host1") and line.endswith(f"{sys.executable} -u train.py")
    assert {"RT_RANK=1", "A=b c", "NCCL_X=1", "RT_COORDINATOR=10.2.0.1:32324"} < set(shlex.split(line))


def test_a_dry_run_asks_nobody_for_the_address_of_this_host(site: sshd.Site, tmp_path: Path) -> None:
    for hosts in (["localhost", "host1"], ["host1", "localhost"]):
        done = launch(site, "--dry-run", "train.py", hosts=hosts)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("rt.launch: --dry-run: found no address of localhost that other hosts could use"), done.stderr
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([{"ssh": "localhost", "ips": ["10.2.0.5"]}, {"ssh": "host1"}]))
    done = launch(site, "--dry-run", "--hostfile", str(file), "train.py", hosts=[])
    near, far = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert "RT_COORDINATOR=10.2.0.5:32324" in shlex.split(near) and "RT_COORDINATOR=10.2.0.5:32324" in far and far.startswith("ssh host1 ")
    options = ["--hostfile", str(file), "--no-env", "--backend", "nccl"]
    done = launch(site, "--dry-run", *options, "train.py", hosts=[], CUDA_VISIBLE_DEVICES="4")
    near, far = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert "CUDA_VISIBLE_DEVICES=4" in near and "CUDA_VISIBLE_DEVICES=0" in far, "each host's own say, which of others nobody knows"
