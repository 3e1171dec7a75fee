"""Jobs that other people's launchers start across hosts, with the secret that the design page asks for there.

May live here: torchrun, mpirun, srun, ``mlx.launch`` over real hosts. May not: one host (``test_launchers``), ``rt.launch``
(``test_launch_hosts``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import hosts
import netns
import pytest
import slurm
import sshd
from hosts import PORT, PROGRAM, ROOT, ends
from peers import BIN, needs_peers

pytestmark = hosts.NEEDED
PEERS_PATIENCE = 60.0  # torch is slow to import
_FOREIGN = ("RT_", "MLX_", "TORCHELASTIC_", "MASTER_", "OMPI_", "PMI_", "SLURM_")


@pytest.fixture
def two_cables() -> Iterator[list[netns.Host]]:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30"), ("10.1.1.1/30", "10.1.1.2/30")) as both:
        yield both


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def environment(**extra: str) -> dict[str, str]:
    """A shell's environment in which no launcher has been."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([ROOT, sysconfig.get_path("platlib")]), **extra}


def torchrun(
    both: list[netns.Host], program: str, where: str = "10.1.0.1", each: int = 2, **env: str
) -> list[tuple[int, str, str]]:
    """Run ``each`` ranks on each of two hosts; torchrun's agents meet at ``where``.

    To the first host ``node0`` means loopback, as Debian has it.
    """
    processes = []
    for number, host in enumerate(both):
        names = Path(program).with_name(f"names{number}")
        names.write_text("127.0.0.1 localhost\n" + ("127.0.1.1 node0\n" if number == 0 else "10.1.0.1 node0\n"))
        words = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(each)]
        words += ["--master-addr", where, "--master-port", str(PORT)]
        named = ["unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh"]
        command, pipe = host.command(*named, str(BIN / "torchrun"), *words, program), subprocess.PIPE
        told = environment(RT_CONNECT_TIMEOUT="15", **env)
        processes.append(subprocess.Popen(command, env=told, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True))
    return ends(processes, PEERS_PATIENCE)


def assert_reduced(ended: list[tuple[int, str, str]]) -> None:
    for status, output, errors in ended:
        assert status == 0 and output.count("10.0 of 4") == 2, errors  # lines of two ranks may be mixed


@needs_peers("torchrun")
def test_torchrun(two_cables: list[netns.Host], program: str) -> None:
    assert_reduced(torchrun(two_cables, program, RT_SECRET="that two hosts share"))


@needs_peers("torchrun")
def test_torchrun_without_a_secret_is_told_how_to_make_one(two_cables: list[netns.Host], program: str) -> None:
    for status, _, errors in torchrun(two_cables, program):
        assert status == 1 and errors.count("ConfigError: no secret for a job across hosts") == 2, errors


@needs_peers("torchrun")
def test_torchrun_where_ranks_may_use_the_named_interface_only(two_cables: list[netns.Host], program: str) -> None:
    """On the cable where the agents meet nothing but their port is open; rank 0 is to be met on the other one, too."""
    two_cables[1].ip("rule add to 10.1.0.1 ipproto tcp dport 5001-65534 unreachable")
    before = [host.sent("cable1") for host in two_cables]
    assert_reduced(torchrun(two_cables, program, RT_INSECURE="1", RT_SOCKET_IFNAME="=cable1"))
    assert all(host.sent("cable1") - sent > 4 << 20 for host, sent in zip(two_cables, before, strict=True))


@needs_peers("torchrun")
def test_torchrun_by_a_name_that_means_loopback_on_the_first_host(two_cables: list[netns.Host], program: str) -> None:
    ended = torchrun(two_cables, program, "node0", each=1, RT_INSECURE="1")
    assert [(status, output) for status, output, _ in ended] == [(0, "sum 3.0 of 2\n")] * 2, ended
    for status, _, errors in torchrun(two_cables, program, "node0", RT_INSECURE="1"):
        assert status == 1 and "since the master's name means loopback on its host, but another rank comes from 10.1.0.2" in errors
    assert_reduced(torchrun(two_cables, program, "node0", RT_INSECURE="1", RT_SOCKET_IFNAME="cable0"))  # what the error says


# --- mpirun, srun, mlx.launch --------------------------------------------------------------------------------------------------------


OPEN_MPI = ["--bind-to", "none", "-x", "RT_COORDINATOR", "-x", "RT_SECRET_FILE", "-x", "PYTHONPATH"]


def secret(folder: Path) -> dict[str, str]:
    """Variables with a secret as it is given to jobs across hosts; these hosts share their disk."""
    path = folder / "secret"
    path.write_text("a secret that two hosts share\n")
    path.chmod(0o600)
    return {"RT_SECRET_FILE": str(path)}


def assert_spread(made: Sequence[netns.Host], command: list[str], **env: str) -> None:
    """Run a launcher, and see that two ranks on each of two hosts reduce 16 MiB."""
    before = [host.sent("cable") for host in made]
    pipe = subprocess.PIPE
    told = environment(RT_CONNECT_TIMEOUT="15", **env)
    process = subprocess.Popen(command, env=told, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    ((status, output, errors),) = ends([process], PEERS_PATIENCE)
    assert (status, output.count("10.0 of 4")) == (0, 4), errors  # lines of several ranks may be mixed
    assert all(host.sent("cable") - sent > 4 << 20 for host, sent in zip(made, before, strict=True))


REFUSED = """
import sys
import rt.sync as rt
try:
    rt.init(backend="ring", connect_timeout=10)
except Exception as error:
    sys.stdout.write(f"{type(error).__name__} {error}\\n"[:200])  # at once: launchers may mix what takes two writes
"""
MPIRUN = [
    ["ompirun_wrapper", "--host", "10.2.0.1:2,10.2.0.2:2", "--prefix", str(BIN.parent), "--allow-run-as-root", *OPEN_MPI],
    ["mpiexec.hydra", "-hosts", "10.2.0.1,10.2.0.2", "-ppn", "2", "-iface", "cable"],
]


def assert_refused(command: list[str], **env: str) -> None:
    """Run a launcher without a secret, and see that ranks on rank 0's host are told of it as the others are, and at once."""
    done = subprocess.run(command, env=environment(**env), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PEERS_PATIENCE)
    assert done.stdout.count("ConfigError no secret for a job across hosts") == 4, (done.stdout, done.stderr)


@pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-")
@needs_peers("ompirun_wrapper")
@needs_peers("mpiexec.hydra")
@pytest.mark.parametrize("launcher", MPIRUN, ids=["Open MPI", "MPICH"])
def test_mpirun_without_a_secret(launcher: list[str], tmp_path: Path) -> None:
    place = {"RT_COORDINATOR": f"10.2.0.1:{PORT}", "OPAL_PREFIX": str(BIN.parent)}
    with sshd.site_for_mpi(tmp_path, 2) as site:
        assert_refused(site.command(str(BIN / launcher[0]), *launcher[1:], "-n", "4", sys.executable, "-c", REFUSED), **place)


@pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-")
@needs_peers("ompirun_wrapper")
@needs_peers("mpiexec.hydra")
@pytest.mark.parametrize("launcher", MPIRUN, ids=["Open MPI", "MPICH"])
def test_mpirun(launcher: list[str], tmp_path: Path, program: str) -> None:
    place = {"RT_COORDINATOR": f"10.2.0.1:{PORT}", "OPAL_PREFIX": str(BIN.parent)}
    with sshd.site_for_mpi(tmp_path, 2) as site:
        words = [str(BIN / launcher[0]), *launcher[1:], "-n", "4", sys.executable, program]
        assert_spread([server.host for server in site.servers], site.command(*words), **place, **secret(tmp_path))


@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "-")
def test_srun(tmp_path: Path, program: str) -> None:
    with netns.switched(3) as (*nodes, desk), slurm.cluster(tmp_path, [*nodes, desk]) as told:
        refused = desk.command_among_others("srun", "-N", "2", "-n", "4", sys.executable, "-c", REFUSED)
        assert_refused(refused, RT_COORDINATOR=f"10.2.0.1:{PORT}", **told)
        command = desk.command_among_others("srun", "-N", "2", "-n", "4", sys.executable, program)
        assert_spread(nodes, command, RT_COORDINATOR=f"10.2.0.1:{PORT}", **secret(tmp_path), **told)


@pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-")
@needs_peers("mlx.launch")
def test_mlx_launch(tmp_path: Path, program: str) -> None:
    """It takes nothing of the environment to other hosts: the secret's place has to be told to it."""
    told = [word for name, value in {**secret(tmp_path), "PYTHONPATH": ROOT}.items() for word in ("--env", f"{name}={value}")]
    with sshd.site(tmp_path, 2) as site:
        words = [str(BIN / "mlx.launch"), "--backend", "ring", "--hosts", "10.2.0.1,10.2.0.2", "-n", "2", *told]
        assert_spread([server.host for server in site.servers], site.command(*words, "--python", sys.executable, program))
