"""What the documentation says to do with several hosts is done as it is printed, in its order, on hosts with real sshd.

May live here: pages whose blocks name this file as what runs them (``<!-- not run: ...; tests/test_docs_hosts.py has them -->``). May not:
hosts with cables (``test_distributed_config_hosts``), MPI (``test_mpi_hosts``), others' launchers (``test_launchers_hosts``).

A command is run at the desk, where a user sits, unless its comment says on which host: such commands, one after the other, run at the same
time, each on its host. Hosts have the names and addresses of all pages at once, and share their folders with the desk.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest
import sshd
from hosts import PROGRAM, ROOT, ends
from test_docs import PAGES

pytestmark = sshd.NEEDED
PATIENCE = 60.0
_ON = re.compile(r"# on (.+)$")
_HOSTS = {"10.0.0.1": 0, "the first": 0, "the other": 1}

BY_HAND = [[], ["rank 0 of 2: [3. 3. 3.]"], ["rank 1 of 2: [3. 3. 3.]"]]
MEASURED = ["slowest"]  # of the hosts; which one is chance
WRITTEN = {  # of each command the lines that matter
    "README.md": [
        [f"[{rank} {('mac1', 'mac2', '10.0.0.3')[rank // 2]}] sum 21.0 of 6" for rank in range(6)],
        [],
        ["[0 mac1] sum 3.0 of 2", "[1 mac2] sum 3.0 of 2"],
        MEASURED,
        *BY_HAND,
    ],
    "docs/index.md": [[f"[{rank} 10.0.0.{rank + 1}] rank {rank} of 2: [3. 3. 3.]" for rank in range(2)], *BY_HAND],
    "docs/launching.md": [[f"[{rank} node{rank // 2 + 1}] rank {rank} of 4" for rank in range(4)]],
    "docs/doctor.md": [MEASURED, MEASURED, []],
}
_MATTERS = re.compile(r"\[.*|rank .*|slowest(?=:)")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[sshd.Site]:
    """Hosts that have the names, addresses and users of the pages."""
    users = "".join(f"{name}:x:0:0::{os.path.expanduser('~')}:/bin/sh\n" for name in ("me", "user"))
    (tmp_path / "passwd").write_text(Path("/etc/passwd").read_text() + users)
    known = []
    for number in range(3):
        known += [f"Host mac{number + 1} node{number + 1}", f"  HostName 10.2.0.{number + 1}"]
        known += [f"Host mac{number + 1} node{number + 1} 10.0.0.{number + 1}", f"  Port {2200 + number}", f"  HostKeyAlias host{number}"]
    prepare = {number: [f"mount --bind '{tmp_path}/passwd' /etc/passwd"] for number in range(3)}
    with sshd.site(tmp_path, 3, prepare=prepare, config=known) as made:
        for number, host in enumerate([*(server.host for server in made.servers), made.desk]):
            host.ip(f"address add 10.0.0.{number + 1}/24 dev cable")
        yield made


def environment(folder: Path) -> dict[str, str]:
    """A user's, whose home is the folder that a page is read in."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RT_", "MLX_"))}
    return {**clean, "PATH": path, "PYTHONPATH": ROOT, "HOME": str(folder)}


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Return each command that this file runs, with what the page shows of its output."""
    found = []
    for block in documents.blocks(page):
        if Path(__file__).name in block.why_not:
            parts = re.split(r"^\$ ", block.code, flags=re.M)[1:] if block.language == "console" else block.code.splitlines()
            found += [(first, shown) for first, *shown in map(str.splitlines, parts)]
    return found


def start(site: sshd.Site, folder: Path, line: str) -> subprocess.Popen[str]:
    host, pipe = _ON.search(line), subprocess.PIPE
    words = ("bash", "-c", f"cd '{folder}'; {line}")
    command = site.servers[_HOSTS[host[1]]].host.command(*words) if host else site.command(*words)
    return subprocess.Popen(command, env=environment(folder), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def follow(site: sshd.Site, folder: Path, name: str) -> list[list[str]]:
    """Do what a page says, look for what it shows, and return the sorted lines that each command wrote."""
    page = (Path(ROOT) / name).read_text(encoding="utf-8")
    for block in documents.blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
    written = []
    for at_once, group in itertools.groupby(commands(page), lambda command: _ON.search(command[0]) is not None):
        given = list(group)
        for some in [given] if at_once else [[each] for each in given]:
            processes = [start(site, folder, line) for line, _ in some]
            for (line, shown), (code, out, error) in zip(some, ends(processes, PATIENCE), strict=True):
                busy = code == 1 and line.startswith("rt.doctor")  # which finds this machine late or slow then
                assert code == 0 or busy, f"$ {line}\n{out}{error}"
                assert not shown or sorted(shown) == sorted(out.splitlines()), line
                written.append(sorted(out.splitlines()))
    return written


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_as_it_is_printed(name: str, site: sshd.Site, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    if name == "docs/doctor.md":  # hostfiles are other pages' matter
        (tmp_path / "hosts.json").write_text('[{"ssh": "node1"}, {"ssh": "node2"}]')
    written = follow(site, tmp_path, name)
    assert [[match[0] for line in lines if (match := _MATTERS.match(line))] for lines in written] == WRITTEN[name]


def test_all_pages_that_leave_it_to_this_file_are_followed() -> None:
    assert set(WRITTEN) == {str(page.relative_to(ROOT)) for page in PAGES if commands(page.read_text(encoding="utf-8"))}
