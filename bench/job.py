"""``rt.bench`` inside a job: each process is a rank of it, and they agree on what to measure by collectives of their own.

May live here: joining the job that the environment describes, what takes the conductor's place there, and groups beside the job's, with a
process beside each of its ranks. May not: how processes are started (``conductor.py``), what is measured.

Every rank asks for the same measurements in the same order, because each decides from the same numbers: all answers go to all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import rt.sync
from bench import measure, rank
from bench.adapters import ADAPTERS
from bench.conductor import RANK, System, standing
from bench.meeting import OURS, BenchError, Meeting
from bench.worker import Answer

_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def join() -> Any:
    """Return the group of all ranks if the environment describes a job of several, else None.

    Raises:
        ConfigError: it describes one wrongly.
        BenchError: MPI's launcher says who this rank is, and nobody where the ranks meet.
    """
    _refuse_half_a_job()
    group = rt.sync.init()
    return group if group.size() > 1 else None


def _refuse_half_a_job() -> None:
    """MPI's launchers number ranks but do not say where to meet. ``init`` makes groups of one of that; each would measure itself."""
    for number, size in _MPI:
        if number in os.environ and "RT_RANK" not in os.environ and int(os.environ.get(size, "1")) > 1:
            if "RT_HOSTFILE" not in os.environ and "RT_COORDINATOR" not in os.environ:
                found = f"rank {os.environ[number]} of {os.environ[size]}"
                raise BenchError(f"{number}: found {found}, but no RT_COORDINATOR=host:port beside it, where rank 0 listens")


def run_each(wanted: Sequence[measure.Options], group: Any) -> list[measure.Result]:
    """Measure as a rank of the group, the same systems each time; every rank returns the same."""
    with contextlib.ExitStack() as stack:
        systems = [stack.enter_context(contextlib.closing(Member(name, group))) for name in wanted[0].systems]
        return [measure.run(each, systems) for each in wanted]


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
        self.greetings = shared(group, rank.greeting(self._adapter))

    def ask(self, command: Answer) -> list[Answer]:
        """Run a command here, as all ranks do; return all answers in rank order."""
        return shared(self._group, rank.measure(self._adapter, command))

    def close(self) -> None:
        """Let go of what the front end holds; the group stays."""
        self._adapter.close()


class Beside:
    """A process beside each rank of the job, together a group; to the measuring code it looks like all of them.

    Args:
        group: all ranks of the job.
        child: the process of this rank.
    """

    idle_share = 0.0

    def __init__(self, group: Any, child: System) -> None:
        self.name = child.name
        self._group = group
        self._child = child
        self.greetings = shared(group, child.greetings[0])

    def ask(self, command: Answer) -> list[Answer]:
        """Have the process here run a command, as all do; return all answers in rank order."""
        return shared(self._group, self._child.ask(command)[0])


@contextlib.contextmanager
def beside(name: str, group: Any, environ: Mapping[str, str]) -> Iterator[Beside]:
    """Start a rank of one of rt's front ends beside each rank of the job, with ``environ`` besides our own, and end them on the way out.

    They meet where rank 0 is known to be reached: at the address by which rank 1, which is always connected to it, does.

    Raises:
        BenchError: one could not join.
    """
    number, size = group.rank(), group.size()
    host = shared(group, group._core.world.addresses.get(0, "").rpartition(":")[0])[1]
    with contextlib.ExitStack() as stack:
        listeners = []
        if number == 0:
            bare = host.strip("[]")
            family = socket.AF_INET6 if ":" in bare else socket.AF_INET
            listeners = [stack.enter_context(socket.create_server((bare, 0), family=family, backlog=size))]
        port = shared(group, [each.getsockname()[1] for each in listeners])[0][0]
        mine = {"RT_RANK": str(number), "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"{host}:{port}"}
        mine |= {"BENCH_RANK": str(number), "BENCH_SIZE": str(size)}
        inherited = [each.fileno() for each in listeners]
        if inherited:
            mine["RT_COORDINATOR_FD"] = str(inherited[0])
        meeting = Meeting(sys.executable, {**OURS, **environ}, [mine], listeners, [tuple(inherited)])
        child = stack.enter_context(standing(name, meeting, [*RANK, name]))
        yield Beside(group, child)


def shared(group: Any, mine: Any) -> list[Any]:
    """Return what every rank says, in rank order; anything that JSON can hold."""
    said = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = group.all_gather(np.array([len(said)]))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(said)] = said
    rows = group.all_gather(padded).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
