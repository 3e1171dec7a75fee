"""``rt.bench --backend mpi``: rt beside mpi4py on the same library.

May live here: that systems are chosen and started. May not: figures.
"""

from __future__ import annotations

import argparse

import pytest
from peers import needs_peers

from bench import local, measure, options
from bench.collectives import COLLECTIVES


def parsed(*words: str) -> measure.Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=2)
    parser.set_defaults(command="all_reduce")
    options.add(parser, COLLECTIVES["all_reduce"])
    return options.options(parser.parse_args(words))


def test_every_library_has_both_front_ends() -> None:
    found = parsed("--backend", "mpi", "--peers", "mpich,openmpi").systems
    assert found == ("rt sync mpich", "rt async mpich", "rt sync openmpi", "rt async openmpi", "mpich", "openmpi")


def test_a_library_must_be_among_the_peers() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="--backend mpi: found no MPI library among --peers"):
        parsed("--backend", "mpi", "--peers", "gloo")


@needs_peers("mpiexec.hydra")
@needs_peers("ompirun_wrapper")
def test_results_are_right() -> None:
    result = local.run(parsed("--backend", "mpi", "--peers", "mpich,openmpi", "-b", "1K", "-e", "1K", "--iters", "3"))
    assert result.wrong == 0 and len(result.rows) == 6
