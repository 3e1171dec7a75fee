"""The ranks of ``rt.launch`` as processes: what each is told by its environment, how it is started and signalled, and how it ended.

May live here: environments, processes, and the text of a dry run. May not: what a rank reads or writes (``_forward``, ``_launch_input``),
and when a rank is to end (``_launch_job``).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rt._launch_guard import Guard
from rt._launch_options import Options

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_UNBUFFERED = "PYTHONUNBUFFERED"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# What these say holds for the launcher, if for anybody: a rank that inherited them would find two answers to "who am I".
_NOT_INHERITED = (
    *("RT_HOSTFILE", "RT_SECRET", "RT_SECRET_FILE", "RT_COORDINATOR_FD", "MLX_RANK", "MLX_HOSTFILE", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "SLURM_PROCID", "SLURM_NTASKS"),
)


@dataclass(eq=False)
class Rank:
    """A started process. ``gone``: its whole group has ended, so its number may belong to a stranger and is never signalled again."""

    index: int
    process: subprocess.Popen[bytes]
    guard: Guard
    gone: bool = False

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal's number if one killed it, None while it runs."""
        return self.process.returncode  # set by whoever calls wait_for_any: one waitpid for all, so Popen never asks

    def signal(self, number: int) -> None:
        """Signal the whole group; number 0 only asks whether anybody is left in it."""
        if self.gone:
            return
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # EPERM: only zombies (macOS) or another user's processes, which are not ours to end
            if self.code is not None:
                self.gone = True
                self.guard.forget(self.process.pid)

    def describe_end(self) -> str:
        code = self.code or 0
        return f"rank {self.index} " + (f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}")


# --- what ranks are told -------------------------------------------------------------------------------------------------------------


def environment(inherited: Mapping[str, str], extra: Mapping[str, str], size: int) -> dict[str, str]:
    """Return what all ranks share: the launcher's environment, defaults where it has none, and the user's ``--env``, which wins."""
    shared = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    shared.setdefault(_UNBUFFERED, "1")  # for Python started by name: our pipe is no terminal, and lines should come at once
    if size > 1:  # else every rank starts a BLAS thread per core, and they fight
        for name in THREADS:
            shared.setdefault(name, str(max(1, cores() // size)))
    return shared | dict(extra)


def identity(rank: int, size: int, address: str) -> dict[str, str]:
    """Return what tells a rank who it is."""
    place = {"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_LOCAL_RANK": str(rank), "RT_LOCAL_SIZE": str(size)}
    return place | {"RT_COORDINATOR": address}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def dry_run(options: Options, inherited: Mapping[str, str], address: str) -> Iterator[str]:
    """Yield the lines of a shell that would start the ranks, one line for each.

    A secret is not among them: the launcher makes one for every job, and ranks that find none use their user's own.
    """
    yield f"# {options.size} ranks of: {shlex.join(options.command)}"
    yield "# Each line starts one, in a terminal of its own. rt.launch hands over a secret too, and to rank 0 the coordinator's socket."
    shared = environment(inherited, options.environment, options.size)
    gone = [word for name in _NOT_INHERITED if name in inherited and name not in options.environment for word in ("-u", name)]
    named = [name for name in (_UNBUFFERED, *THREADS, *options.environment) if name in shared and name != "RT_SECRET"]
    for rank in range(options.size):
        told = {name: shared[name] for name in named} | identity(rank, options.size, address)
        words = ["env", *gone, *(f"{name}={value}" for name, value in told.items()), *options.command]
        yield (f"cd {shlex.quote(options.cwd)} && " if options.cwd else "") + shlex.join(words)


# --- processes -----------------------------------------------------------------------------------------------------------------------


def spawn(
    options: Options, environment: Mapping[str, str], inherited: Sequence[int], tie: Callable[[], None], *, alone: bool
) -> subprocess.Popen[bytes]:
    """Start one rank; one that is alone keeps our stdin and, unless its output is wanted, stdout and stderr: nothing to tell apart."""
    direct = alone and options.prefix != "always" and options.log_dir is None
    output = None if direct else subprocess.PIPE
    return subprocess.Popen(
        options.command,
        stdin=None if alone else subprocess.PIPE,
        stdout=output,
        stderr=output,
        bufsize=0,
        env=environment,
        cwd=options.cwd,
        pass_fds=inherited,
        start_new_session=True,  # not only a group: a lone rank may read our terminal without being stopped by SIGTTIN
        preexec_fn=tie,
    )


def tie_to_this_process(guard: Guard) -> Callable[[], None]:
    """Return what a rank calls between fork and exec so that it dies with us: the guard knows it, and on Linux the kernel kills it.

    It runs in a copy of this process, so it takes no lock that a thread of ours (NumPy's BLAS has some) might have held: the function is
    looked up before the fork. We also become the ranks' subreaper: their orphans' ends wake us, so that a group's end is never polled for.
    """
    if sys.platform != "linux":
        return guard.register
    launcher = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def tie() -> None:
        guard.register()
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # we died before the kernel was told, so nobody will kill this child
            os._exit(1)

    return tie


def wait_for_any() -> tuple[int, int] | None:
    """Return (pid, status) of some child that has ended, None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
