"""Groups under ``rt.launch``: debugging them, and starting their ranks by hand.

May live here: ranks that import ``rt`` and form a group. May not: what can be shown without one (the other ``test_launch`` files).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import PATIENCE, Terminal, environment, last_line, launch, launch_source, launcher, read_until, running

DEBUGGED = """
import rt.sync
group = rt.sync.init()
rank = group.rank()
breakpoint()
rt.sync.barrier()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_pdb_over_a_pipe(script: Path) -> None:
    with running(script, DEBUGGED, size=4) as process:
        assert process.stdin is not None and process.stdout is not None
        shown = read_until(process.stdout.fileno(), r"\(Pdb\) ", 4)
        assert {f"[{rank}] (Pdb) " in shown for rank in range(4)} == {True}
        process.stdin.write(b"p rank\n")
        shown = read_until(process.stdout.fileno(), r"\(Pdb\) ", 4)
        assert sorted(re.findall(r"^\[\d\] \d$", shown, re.MULTILINE)) == [f"[{rank}] {rank}" for rank in range(4)]
        errors = process.communicate(b"c\n", timeout=PATIENCE)[1]
        assert (process.returncode, errors) == (0, b"")


def test_pdb_on_a_terminal(script: Path) -> None:
    script.write_text(DEBUGGED)
    with Terminal(*launcher("-n", "4", str(script))) as terminal:
        shown = terminal.until(r"\(Pdb\) ", 4)
        assert {f"[{rank}] (Pdb) " in shown for rank in range(4)} == {True}
        terminal.type("p rank\n")
        shown = terminal.until(r"\(Pdb\) ", 4)
        assert sorted(re.findall(r"^\[\d\] \d\r$", shown, re.MULTILINE)) == [f"[{rank}] {rank}\r" for rank in range(4)]
        terminal.type("c\n")
        assert terminal.process.wait(PATIENCE) == 0


FAILING = """
import asyncio, sys
import numpy as np, rt, rt.sync

async def main():
    group = await rt.init()
    if group.rank() == 1:
        {cause}
    await rt.all_sum(np.ones(4))

def blocking():
    group = rt.sync.init()
    if group.rank() == 1:
        {cause}
    rt.sync.all_sum(np.ones(4))

{run}
"""


@pytest.mark.parametrize(("cause", "code"), [("raise ValueError('why')", 1), ("sys.exit(7)", 7)])
@pytest.mark.parametrize("run", ["asyncio.run(main())", "rt.run(main())", "blocking()"])
def test_the_cause_is_named_and_not_its_consequence(script: Path, run: str, cause: str, code: int) -> None:
    # The rank that waits for the one that fails may well end before it.
    script.write_text(FAILING.format(run=run, cause=cause))
    for _ in range(5):
        done = launch("-n", "3", str(script))
        assert (done.returncode, last_line(done.stderr)) == (code, f"rt.launch: rank 1 exited with code {code}"), done.stderr


def test_if_all_failed_by_an_error_of_ours_one_of_them_is_named(script: Path) -> None:
    script.write_text("import numpy as np, rt.sync as rt\nrt.all_sum(np.ones(4 + rt.rank()))\n")
    done = launch("-n", "2", str(script))
    assert done.returncode == 1 and re.fullmatch(r"rt.launch: rank [01] exited with code 1", last_line(done.stderr)), done.stderr


HELLO = """
import os, sys
import numpy as np, rt.sync as rt
group = rt.init()
print(rt.all_sum(np.float32(group.rank() + 1)).item(), os.getcwd(), os.environ["COLOR"], os.environ.get("MLX_RANK"), sys.argv[1:])
"""


def test_the_lines_of_a_dry_run_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "hello.py").write_text(HELLO)
    options = ["-n", "2", "--dry-run", "--cwd", str(folder), "--env", "COLOR=light blue", "--env", "RT_SECRET=do not show"]
    done = launch(*options, "hello.py", "$HOME", MLX_RANK="7", RT_SECRET="nor this secret")
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search("do not show|nor this|SECRET=|SECRET_FD=", done.stdout)
    ranks = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert len(ranks) == 2 and all(f"RT_RANK={rank}" in shlex.split(line) for rank, line in enumerate(ranks))
    pipe = subprocess.PIPE
    environ = environment(MLX_RANK="7", TMPDIR=str(tmp_path))
    shells = [subprocess.Popen(line, shell=True, stdout=pipe, stderr=pipe, text=True, env=environ) for line in ranks]
    for rank, shell in enumerate(shells):
        output, errors = shell.communicate(timeout=PATIENCE)
        assert (output, errors) == (f"3.0 {folder} light blue {rank} ['$HOME']\n", "")


def test_a_dry_run_starts_nothing(script: Path, tmp_path: Path) -> None:
    script.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    done = launch("-n", "3", "--dry-run", "--log-dir", str(tmp_path / "logs"), str(script))
    assert (done.returncode, len(re.findall(f"^file0=.* env .* -u {script}$", done.stdout, re.MULTILINE))) == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_ranks_of_this_host_meet_whatever_addresses_its_hostfile_has(tmp_path: Path) -> None:
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.2"]}, {"ssh": "127.0.0.1", "ips": ["127.0.0.3"]}]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    (tmp_path / "hello.py").write_text(HELLO)
    done = launch("--hostfile", str(tmp_path / "hosts.json"), str(tmp_path / "hello.py"), COLOR="red")
    assert (done.returncode, sorted(line[:7] for line in done.stdout.splitlines())) == (0, ["[0] 3.0", "[1] 3.0"]), done.stderr


def test_a_script_without_a_loop_is_told_to_use_the_blocking_calls(script: Path) -> None:
    done = launch_source(script, "import numpy, rt\nrt.all_sum(numpy.ones(2))\n")
    assert done.returncode == 1 and "RuntimeError: no event loop is running" in done.stderr and "use rt.sync" in done.stderr
