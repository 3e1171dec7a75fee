"""That the hosts which other tests use by ssh are what they say: reachable by name, apart from each other, and gone afterwards.

May live here: ``sshd``'s own promises. May not: anything of ``rt``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import sshd

pytestmark = sshd.NEEDED


def run(site: sshd.Site, *words: str) -> str:
    return subprocess.run(site.command(*words), capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL).stdout


def test_hosts_have_names_networks_and_files_of_their_own(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "file").touch()
    with sshd.site(tmp_path, 2, prepare={1: [f"mount -t tmpfs tmpfs {hidden}"]}, options={1: ["SetEnv PATH=/stand/ins:/usr/bin"]}) as site:
        assert site.names == ["host0", "host1"]
        said = [run(site, "ssh", name, f'hostname; echo "$PATH"; ls {hidden}').splitlines() for name in site.names]
        assert said[0][0] == "host0" and said[0][2:] == ["file"]
        assert said[1] == ["host1", "/stand/ins:/usr/bin"]
        assert run(site, "ssh", "10.2.0.2", "hostname") == "host1\n"
        assert run(site, "ssh", "host0", "ssh host1 hostname") == "host1\n"  # from each to each
        assert len(site.servers[0].processes("sshd")) == 1
        servers = site.servers
    assert not any(os.path.exists(f"/proc/{server.process.pid}") for server in servers)


def test_a_host_can_be_killed_and_a_cable_pulled(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2, ipv6=True) as site:
        assert run(site, "ssh", "fd02::2", "hostname") == "host1\n"
        site.servers[0].kill()
        site.servers[1].host.ip("link set cable down")
        for name in site.names:
            command = site.command("ssh", "-o", "ConnectTimeout=1", name, "true")
            assert subprocess.run(command, capture_output=True, timeout=30, stdin=subprocess.DEVNULL).returncode == 255
