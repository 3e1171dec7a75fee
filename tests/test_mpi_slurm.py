"""Groups on backend ``mpi`` whose ranks ``srun`` starts.

May live here: which of Slurm's ways of starting MPI works with which library, and what is said where none does. May not: the ring's ranks
under srun (``test_launchers``).

Not here: Open MPI under ``srun --mpi=pmix``, for which Debian's Slurm needs packages that our list does not have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import netns
import pytest
import slurm
from hosts import ROOT
from mpi import PREFIX, missing
from ranks import bare_environment

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "-")
PATIENCE = 60
PROGRAM = """
import sys
import numpy as np, rt.sync as rt
try:
    group = rt.init(backend="mpi")
except rt.ConfigError as error:
    sys.exit(f"{error}\\n")
assert type(group._core).__name__ == "MpiGroup"
total = rt.all_sum(np.full(4 << 20, group.rank() + 1, np.float32))
sys.stdout.write(f"rank {group.rank()} of {group.size()}: {total.min()} {total.max()}\\n")
"""
MPICH = {"RT_MPI_LIBNAME": "libmpi.so.12"}
needs_mpich = pytest.mark.skipif(bool(missing("mpich")), reason=missing("mpich") or "-")
needs_openmpi = pytest.mark.skipif(bool(missing("openmpi")), reason=missing("openmpi") or "-")


def srun(told: dict[str, str], *words: str, prefix: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, "srun", *words, sys.executable, "-c", PROGRAM]
    environ = {**bare_environment(), "PYTHONPATH": ROOT, **told, **env}
    return subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as told:
        yield told


@needs_mpich
def test_mpich_by_pmi2(cluster: dict[str, str]) -> None:
    done = srun(cluster, "--mpi=pmi2", "-n", "3", **MPICH)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"rank {rank} of 3: 6.0 6.0" for rank in range(3)]), done.stderr


@needs_mpich
@pytest.mark.namespaces
@pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")
def test_mpich_by_pmi2_on_two_hosts(tmp_path: Path) -> None:
    with netns.switched(3) as (*nodes, desk), slurm.cluster(tmp_path, [*nodes, desk]) as told:
        before = [host.sent("cable") for host in nodes]
        # UCX, MPICH's first choice, sees that these hosts are one, and uses memory in place of the cable.
        words = ("--mpi=pmi2", "-N", "2", "-n", "4")
        done = srun(told, *words, prefix=desk.command_among_others(), MPIR_CVAR_CH4_NETMOD="ofi", FI_PROVIDER="tcp", **MPICH)
        sent = [host.sent("cable") - first for host, first in zip(nodes, before, strict=True)]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"rank {rank} of 4: 10.0 10.0" for rank in range(4)]), done.stderr
    assert min(sent) > 4 << 20, "16 MiB were reduced between the hosts"


@pytest.mark.parametrize(
    ("offered", "library"),
    [
        pytest.param("none", {**MPICH}, marks=needs_mpich, id="MPICH"),
        pytest.param("none", {"RT_MPI_LIBNAME": "libmpi.so.40", "OPAL_PREFIX": str(PREFIX)}, marks=needs_openmpi, id="Open MPI"),
        pytest.param("pmi2", {"RT_MPI_LIBNAME": "libmpi.so.40", "OPAL_PREFIX": str(PREFIX)}, marks=needs_openmpi, id="Open MPI by pmi2"),
    ],
)
def test_ranks_that_do_not_find_each_other_say_what_srun_has_to_offer(
    cluster: dict[str, str], offered: str, library: dict[str, str]
) -> None:
    done = srun(cluster, f"--mpi={offered}", "-n", "2", **library)
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("backend 'mpi': a launcher started 2 processes, but ")]
    assert len(said) == 2, done.stderr
    assert "MPICH asks for `srun --mpi=pmi2`, Open MPI 5 for `srun --mpi=pmix`, which `srun --mpi=list` must know" in said[0]
