"""``rt.bench`` inside a job: each process is a rank of it, and they agree on what to measure by collectives of their own.

May live here: joining the job that the environment describes, and what takes the conductor's place there. May not: starting processes,
what is measured.

Every rank asks for the same measurements in the same order, because each decides from the same numbers: all answers go to all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import numpy as np

import rt.sync
from bench import measure, rank
from bench.adapters import ADAPTERS
from bench.meeting import BenchError
from bench.worker import Answer

_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def join() -> Any:
    """Return the group of all ranks if the environment describes a job of several, else None.

    Raises:
        ConfigError: it describes one wrongly.
        BenchError: MPI's launcher says who this rank is, and nobody where the ranks meet.
    """
    group = rt.sync.init(**_of_mpi())
    return group if group.size() > 1 else None


def _of_mpi() -> dict[str, Any]:
    """MPI's launchers number their ranks but do not say where to meet, so ``init`` does not take their word for a job; mpirun is one."""
    for number, size in _MPI:
        if number in os.environ and "RT_RANK" not in os.environ and int(os.environ.get(size, "1")) > 1:
            if "RT_HOSTFILE" in os.environ:
                return {"rank": int(os.environ[number])}
            if "RT_COORDINATOR" not in os.environ:
                found = f"rank {os.environ[number]} of {os.environ[size]}"
                raise BenchError(f"{number}: found {found}, but no RT_COORDINATOR=host:port beside it, where rank 0 listens")
            return {"rank": int(os.environ[number]), "world_size": int(os.environ[size])}
    return {}


def run(options: measure.Options, group: Any) -> measure.Result:
    """Measure as a rank of the group; every rank returns the same."""
    with contextlib.ExitStack() as stack:
        return measure.run(options, [stack.enter_context(contextlib.closing(Member(name, group))) for name in options.systems])


class Member:
    """This rank's part in one of rt's front ends; to the measuring code it looks like all of them.

    Args:
        name: ``rt sync`` or ``rt async``.
        group: all ranks.
    """

    idle_share = 0.0  # the front ends share a process, so nothing can be said of each

    def __init__(self, name: str, group: Any) -> None:
        self.name = name
        self._group = group
        self._adapter = ADAPTERS[name](group.rank(), group.size())
        self.greetings = self._shared(rank.greeting(self._adapter))

    def ask(self, command: Answer) -> list[Answer]:
        """Run a command here, as all ranks do; return all answers in rank order."""
        return self._shared(rank.measure(self._adapter, command))

    def _shared(self, mine: Answer) -> list[Answer]:
        said = np.frombuffer(json.dumps(mine).encode(), np.uint8)
        lengths = self._group.all_gather(np.array([len(said)]))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(said)] = said
        rows = self._group.all_gather(padded).reshape(len(lengths), -1)
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def close(self) -> None:
        """Let go of what the front end holds; the group stays."""
        self._adapter.close()
