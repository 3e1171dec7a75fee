"""``rt.launch`` on many hosts where something is unusual: names that few hosts have, limits, a user who insists, tools that are missing.

May live here: hosts that are well. May not: the usual job (``test_launch_hosts``), what breaks (``test_launch_lost``), hosts that are not
ready (``test_launch_ready``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import sshd
from far import SCRIPT, Watch, launch, lines, running
from launching import PATIENCE, environment, last_line, launcher

pytestmark = sshd.NEEDED

READY = "print('ready')\nwhile True: signal.pause()\n"
REDUCES = "import numpy as np\nimport rt.sync as rt\nprint(int(rt.all_sum(np.ones(1))[0]))"
MARK = "RT_JOB_ID="


# --- names ---------------------------------------------------------------------------------------------------------------------------


ALIASES = ["Node_1.x-y", "a%b", "a+b", "a:b"]


@pytest.mark.parametrize("how", ["--hosts", "--hostfile"])
def test_names_that_only_the_ssh_configuration_knows(how: str, tmp_path: Path) -> None:
    config = []
    for number, alias in enumerate(ALIASES):
        config += [f"Host {alias}", f"  HostName 10.2.0.{number + 1}", f"  Port {2200 + number}", f"  HostKeyAlias host{number}"]
    (tmp_path / "hosts.json").write_text(json.dumps([{"ssh": alias} for alias in ALIASES]))
    (tmp_path / "script.py").write_text(SCRIPT + REDUCES)
    given = ",".join(ALIASES) if how == "--hosts" else str(tmp_path / "hosts.json")
    with sshd.site(tmp_path, len(ALIASES), config=config) as site:
        done = launch(site, how, given, str(tmp_path / "script.py"), hosts=[])
    expected = [f"[{rank} {alias}] 4" for rank, alias in enumerate(ALIASES)]
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, expected, "")


# --- ends ----------------------------------------------------------------------------------------------------------------------------


def test_a_time_limit_ends_ranks_on_other_hosts(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 2) as site, running(site, tmp_path / "script.py", READY, "--timeout", "10") as process:
        assert lines(process, 2) == [f"[{rank} host{rank}] ready\n" for rank in range(2)]
        watch = Watch(site.servers, MARK)
        error = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, last_line(error)) == (124, "rt.launch: ended by --timeout 10: ranks 0, 1 were still running")
        assert watch.count == 2 and not any(server.processes(MARK) for server in site.servers)


def test_a_second_ctrl_c_kills_ranks_on_other_hosts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "signal.signal(signal.SIGINT, lambda *_: print('not yet'))\n" + READY)
    pipe, env = subprocess.PIPE, environment()
    with sshd.site(tmp_path, 2) as site:
        # Left to itself the launcher would be patient for much longer than this test.
        command = site.command(*launcher("--hosts", "host0,host1", str(script), grace=10 * PATIENCE))
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env, start_new_session=True) as process:
            try:
                assert lines(process, 2) == [f"[{rank} host{rank}] ready\n" for rank in range(2)]
                process.send_signal(signal.SIGINT)
                assert lines(process, 2) == [f"[{rank} host{rank}] not yet\n" for rank in range(2)]
                process.send_signal(signal.SIGINT)
                error = process.communicate(timeout=PATIENCE)[1]
            finally:
                process.kill()
        assert (process.returncode, last_line(error)) == (130, "rt.launch: stopped by SIGINT")
        assert not any(server.processes(MARK) for server in site.servers)


def test_nothing_stays_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that ends in order, and of one whose launcher is killed; ranks have read their files by then."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    source = "import tempfile\nprint(tempfile.gettempdir(), len(open(os.environ['MLX_HOSTFILE']).read()) > 9)\n"
    expected = [f"[{rank} host{rank}] {folder} True\n" for rank in range(2)]
    with sshd.site(tmp_path, 2, options={number: [f"SetEnv TMPDIR={folder}"] for number in range(2)}) as site:
        (tmp_path / "script.py").write_text(SCRIPT + source)
        done = launch(site, str(tmp_path / "script.py"))
        assert (done.returncode, sorted(done.stdout.splitlines(keepends=True)), done.stderr) == (0, expected, "")
        with running(site, tmp_path / "script.py", source + "while True: signal.pause()") as process:
            assert lines(process, 2) == expected
            watch = Watch(site.servers, MARK)
            process.kill()
            assert watch.count == 2 and watch.gone(time.monotonic())
    assert os.listdir(folder) == []


# --- --sync-code without rsync --------------------------------------------------------------------------------------------------------


def only(folder: Path, *programs: str) -> str:
    """Make a folder for PATH that has these programs alone."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    return str(folder)


def test_code_cannot_be_copied_without_rsync(tmp_path: Path) -> None:
    """There, then here; the host that has it gets its copy, and nothing is started anywhere."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "script.py").write_text("print('started')")
    words = ["--sync-code", str(code), str(code / "script.py")]
    elsewhere = {number: [f"mount -t tmpfs tmpfs '{code}'"] for number in range(2)}
    without = {1: [f"SetEnv PATH={only(tmp_path / 'there', 'mkdir')}"]}
    verdict = f"rt.launch: --sync-code {code}: not copied everywhere, nothing was started"
    with sshd.site(tmp_path, 2, prepare=elsewhere, options=without) as site:
        done = launch(site, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert [line.split() for line in done.stderr.splitlines()[1:-1]] == ["host1 no rsync there install rsync on all hosts".split()]
        assert done.stderr.splitlines()[-1] == verdict
        path = only(tmp_path / "here", "ssh")
        command = site.command("env", f"PATH={path}", *launcher("--hosts", "host0", *words))
        here = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (here.returncode, here.stdout) == (2, "")
    assert [line.split() for line in here.stderr.splitlines()[1:-1]] == ["host0 no rsync here install rsync on all hosts".split()]
    assert here.stderr.splitlines()[-1] == verdict
