"""``rt.launch --backend mpi`` over hosts, under each MPI library: what is looked at before, and a job that MPI's launcher starts there.

May live here: real ssh, real hosts, real MPI. May not: one host (``test_mpi_launch``), jobs of our own launcher (``test_launch_*``).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import far
import sshd
from hosts import ROOT
from mpi import LIBRARIES, PREFIX, libraries

import rt
from rt._launch_mpi_hosts import _fit
from rt._mpirun import Launcher

pytestmark = sshd.NEEDED

# MPICH's first choice, UCX, sees that these hosts are one, and uses memory in place of the cable.
# Open MPI's is what MLX's guide says of interfaces.
OVER_CABLES = {
    "mpich": ("--env", "MPIR_CVAR_CH4_NETMOD=ofi", "--env", "FI_PROVIDER=tcp"),
    "openmpi": ("--mpi-arg", "--mca btl_tcp_if_include cable"),
}
SONAMES = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}
PROGRAM = """
import os, socket, sys
import numpy as np, rt.sync as rt
group = rt.init()
assert type(group._core).__name__ == "MpiGroup"
total = rt.all_sum(np.full(4 << 20, group.rank() + 1, np.float32))
names = rt.all_gather_objects(socket.gethostname())  # over the ring's links
assert (total == 10).all() and names == ["host0"] * 2 + ["host1"] * 2, (total, names)
told = [os.environ.get(name) for name in ("RT_OF_THE_CALLER", "OTHER", "OWN")]
sys.stdout.write(f"rank {group.rank()} of {group.size()} in {os.getcwd()}: {told}\\n")
"""


def launch(made: sshd.Site, library: str, *words: str, hosts: Sequence[str] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return far.launch(made, "--backend", "mpi", "--env", f"RT_MPI_LIBNAME={SONAMES[library]}", *words, hosts=hosts, **env)


@libraries
def test_two_hosts(library: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with sshd.site_for_mpi(tmp_path, 2) as made:
        before = [server.host.sent("cable") for server in made.servers]
        words = ["-n", "2", *OVER_CABLES[library], "--env", "OWN=1", "--cwd", str(tmp_path), "program.py"]
        done = launch(made, library, *words, RT_OF_THE_CALLER="2", OTHER="3")
        sent = [server.host.sent("cable") - first for server, first in zip(made.servers, before, strict=True)]
    expected = [f"rank {rank} of 4 in {tmp_path}: ['2', None, '1']" for rank in range(4)]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, expected), done.stderr
    assert min(sent) > 4 << 20, "16 MiB were reduced between the hosts"


def hidden(path: Path) -> str:
    return f"mount --bind /dev/null {path}"


@libraries
def test_one_table_says_what_is_wrong_where(library: str, tmp_path: Path) -> None:
    """Each host has a fault of its own but the last one, and nothing is started there either."""
    launcher = PREFIX / "bin" / LIBRARIES[library].launcher
    another = {"mpich": "openmpi", "openmpi": "mpich"}[library]
    (tmp_path / "other").write_text('#!/bin/sh\necho "HYDRA build details"; echo "Version: 4.1.2"\n')
    (tmp_path / "other").chmod(0o755)
    program = tmp_path / "program" / "program.py"
    program.parent.mkdir()
    program.write_text("print('started')")
    binary = PREFIX / "bin"
    prepare = {
        0: [hidden(binary / name) for name in ("mpirun", "mpiexec", LIBRARIES[library].launcher)],
        1: [f"mount --bind {tmp_path}/other {binary / name}" for name in ("mpirun", "mpiexec", LIBRARIES[library].launcher)],
        2: [hidden(path) for path in (PREFIX / "lib" / SONAMES[library], *Path("/usr").glob(f"lib*/**/{SONAMES[library]}"))],
        3: [f"mount -t tmpfs tmpfs {program.parent}"],
        4: [f"mount --bind {PREFIX}/lib/{SONAMES[another]} {PREFIX}/lib/{SONAMES[library]}"],
    }
    with sshd.site_for_mpi(tmp_path, 6, prepare) as made:
        done = launch(made, library, "--json", str(program), hosts=[*made.names, "nowhere"])
        shown = launch(made, library, str(program), hosts=made.names[:2])
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert report["failure"] == "nothing was started: 6 of 7 hosts are not ready"
    assert done.stderr == f"rt.launch: {report['failure']}\n"
    found = {problem["host"]: (problem["found"], problem["advice"]) for problem in report["problems"]}
    assert len(found) == len(report["problems"]) == 6, report
    path, here = found["host0"][0].removeprefix("no ").split(", here ")
    assert Path(path).parent == launcher.parent and here.startswith({"mpich": "MPICH 5", "openmpi": "Open MPI 5"}[library])
    assert found["host0"][1] == "MPI's launcher needs the same MPI in the same place on all hosts"
    assert found["host1"] == (f"{path} is MPICH 4.1.2, here {here}", "install the same version on all hosts")
    assert found["host2"][0].startswith("backend mpi, which needs an MPI library: found no libmpi that can be loaded")
    assert "`pip install 'rt-collectives[mpi]'` installs mpi4py" in found["host2"][1]
    assert found["host3"][0] == f"program '{program}' not found: no such file"
    kind, of = re.fullmatch(r"the MPI library is (.+) [\d.]+, the launcher (.+)", found["host4"][0]).groups()  # type: ignore[union-attr]
    assert (kind, of) == ({"mpich": "MPICH", "openmpi": "Open MPI"}[another], here)
    assert found["host4"][1] == "set RT_MPI_LIBNAME to the libmpi of that launcher"
    assert "Could not resolve hostname nowhere" in found["nowhere"][0]
    assert shown.stdout == "" and shown.stderr.splitlines()[0].split() == ["host", "found", "what", "to", "do"], shown.stderr
    assert shown.stderr.splitlines()[-1] == "rt.launch: nothing was started: 2 of 2 hosts are not ready"


def test_which_libraries_fit_a_launcher() -> None:
    for launcher, library, fits in (
        (("Open MPI", "5.0.11"), "Open MPI 5.0.3", True), (("Open MPI", "5.0.11"), "Open MPI 4.1.4", False),
        (("Open MPI", ""), "Open MPI 4.1.4", True), (("Open MPI", "5.0.11"), "MPICH 5.0.2", False),
        (("MPICH", "4.1.2"), "MPICH 5.0.2", True),
        (("MPICH", "2021.11"), "MPICH 5.0.2", True), (("MPICH", "4.1.2"), "Open MPI 4.1.4", False), (("", ""), "MPICH 5.0.2", True),
    ):  # fmt: skip
        assert _fit(library, Launcher("mpirun", *launcher)) == fits, (launcher, library)


def test_a_host_with_another_rt(tmp_path: Path) -> None:
    init = Path(ROOT, "rt", "__init__.py").read_text()
    (tmp_path / "init.py").write_text(init.replace(f'"{rt.__version__}"', '"0.0.9"'))
    with sshd.site_for_mpi(tmp_path, 1, {0: [f"mount --bind {tmp_path}/init.py {ROOT}/rt/__init__.py"]}) as made:
        done = launch(made, "mpich", "true")
    assert done.returncode == 2 and f"host0  rt 0.0.9, here {rt.__version__}  `" in done.stderr, done.stderr


@libraries
def test_nobody_but_the_launcher_needs_ssh(library: str, tmp_path: Path) -> None:
    """Where there are many hosts Open MPI would have them start the next ones; here two are many."""
    program = tmp_path / "program.py"  # not `hostname`: the daemons of Open MPI 5.0 can miss that a program ended which did so at once
    program.write_text("import socket, sys\nimport numpy\nsys.stdout.write(socket.gethostname() + '\\n')  # in one piece")
    few = {"mpich": (), "openmpi": ("--mpi-arg", "--prtemca rml_base_radix 1")}[library]
    with sshd.site_for_mpi(tmp_path, 3) as made:
        done = launch(made, library, *few, str(program))
        callers = {line.split()[2] for server in made.servers for line in server.log.read_text().splitlines() if "Connection from" in line}
    assert (done.returncode, sorted(done.stdout.split())) == (0, made.names), done.stderr
    assert callers == {"10.2.0.4"}, "the desk"
