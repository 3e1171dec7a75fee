"""``rt.launch`` on many hosts as its users meet it: what ranks are told, what they read and write, and how a job ends in order.

May live here: hosts that are well. May not: hosts, cables and launchers that break (``test_launch_lost``), hosts that are not ready
(``test_launch_ready``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from far import SCRIPT, launch
from hosts import ROOT

pytestmark = sshd.NEEDED
DEMO = f"{ROOT}/examples/train_digits.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Site]:
    with sshd.site(tmp_path_factory.mktemp("site"), 4, ipv6=True) as made:
        yield made


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def run_source(site: sshd.Site, script: Path, source: str, *options: str, hosts: list[str] | None = None, **extra: str) -> list[str]:
    """Run a script that is to succeed and return what its ranks wrote, sorted."""
    script.write_text(SCRIPT + source)
    done = launch(site, *options, str(script), hosts=hosts, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(done.stdout.splitlines())


def test_ranks_are_where_they_should_be(site: sshd.Site, script: Path) -> None:
    names = ("RT_WORLD_SIZE", "RT_LOCAL_RANK", "RT_LOCAL_SIZE")
    source = f"import socket\nprint(socket.gethostname(), *(os.environ[name] for name in {names}))"
    assert run_source(site, script, source) == [f"[{rank} host{rank}] host{rank} 4 0 1" for rank in range(4)]
    twice = [f"[{rank} host{rank // 2}] host{rank // 2} 4 {rank % 2} 2" for rank in range(4)]
    assert run_source(site, script, source, "-n2", hosts=["host0", "host1"]) == twice


@pytest.mark.parametrize("size", [1, 2])
def test_the_demo_trains_on_four_hosts(site: sshd.Site, size: int) -> None:
    done = launch(site, "-n", str(size), DEMO)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{4 * size} ranks, 20 epochs" in done.stdout and done.stdout.count(" ok ") == 3
