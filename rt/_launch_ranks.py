"""The ranks of a host as processes: how they are started and signalled, and how they ended.

May live here: environments and processes. May not: who a rank is (``_launch_plan``), what it reads or writes (``_forward``,
``_launch_input``), and when it is to end (``_launch_job``). The launcher uses it for its own host, ``_supervisor`` on others.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

from rt._launch_guard import Guard

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

UNBUFFERED = "PYTHONUNBUFFERED"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# What these say holds for the launcher, if for anybody: a rank that inherited them would find two answers to "who am I".
NOT_INHERITED = (
    *("RT_HOSTFILE", "RT_SECRET", "RT_SECRET_FILE", "RT_COORDINATOR_FD", "MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES"),
    *("MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "JACCL_RANK", "JACCL_IBV_DEVICES", "JACCL_COORDINATOR", "JACCL_RING"),
    *("RT_IBV_DEVICES", "RT_JACCL_COORDINATOR", "RT_JACCL_RING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "SLURM_PROCID", "SLURM_NTASKS"),
)


class Files(enum.Enum):
    """What a rank has as stdin, stdout and stderr."""

    PIPES = "pipes"
    OUR_INPUT = "our input"  # pipes for stdout and stderr
    OURS = "ours"
    TERMINAL = "terminal"  # of its own


class Child(NamedTuple):
    """A started process and our ends of its standard files, None where there is none."""

    process: subprocess.Popen[bytes]
    input: IO[bytes] | None
    out: IO[bytes] | None
    err: IO[bytes] | None


@dataclass(eq=False)
class Rank:
    """A rank, wherever it runs.

    Attributes:
        index: its number.
        host: the name of its host, "" if all ranks are on one.
        pid: the number of its process, 0 while there is none.
        code: exit code, minus the signal's number if one killed it, None while it runs.
        gone: nobody is left in its process group, and nobody will be.
    """

    index: int
    host: str = ""
    pid: int = 0
    code: int | None = None
    gone: bool = False

    def signal(self, number: int) -> None:
        """Signal the whole group; number 0 only asks whether anybody is left in it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"rank {self.index}" + (f" ({self.host})" if self.host else "")

    def describe_end(self) -> str:
        code = self.code or 0
        return f"{self} " + (f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}")


class LocalRank(Rank):
    """A rank that is a child of this process. A group that is ``gone`` has left its number to strangers, and is never signalled again."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], guard: Guard) -> None:
        super().__init__(index, pid=process.pid)
        self.process = process
        self._guard = guard

    def ended(self, status: int) -> None:
        """Note what ``wait_for_any`` found: one waitpid for all, so Popen never asks."""
        self.code = self.process.returncode = os.waitstatus_to_exitcode(status)

    def stopped(self, status: int, *, on_terminal: bool = False) -> None:
        """Continue a rank that ``wait_for_any`` found stopped, as nobody else would: it is ourselves that a shell can continue.

        So it is with Ctrl-Z in an editor, say; if it has our terminal, we stop first, and the shell has it meanwhile. Who sends SIGSTOP
        means it and will send SIGCONT.
        """
        if os.WSTOPSIG(status) != signal.SIGSTOP:
            if on_terminal:
                os.kill(0, signal.SIGTSTP)  # ignored by the kernel where no shell could continue us
            self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        if self.gone:
            return
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # EPERM: only zombies (macOS) or another user's processes, which are not ours to end
            if self.code is not None:
                self.gone = True
                self._guard.forget(self.pid)


# --- what ranks are told -------------------------------------------------------------------------------------------------------------


def environment(inherited: Mapping[str, str], extra: Mapping[str, str], size: int) -> dict[str, str]:
    """Return what all ranks of a host share: the environment there, defaults where it has none, and what the user chose, which wins.

    Args:
        inherited: the environment of the launcher, or of its supervisor there.
        extra: the hostfile's ``envs`` and ``--env``, and before them what came along from the launcher's host.
        size: number of ranks on this host.
    """
    shared = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
    shared.setdefault(UNBUFFERED, "1")  # for Python started by name: our pipe is no terminal, and lines should come at once
    if size > 1:  # else every rank starts a BLAS thread per core, and they fight
        for name in THREADS:
            shared.setdefault(name, str(max(1, cores() // size)))
    return shared | dict(extra)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# --- processes -----------------------------------------------------------------------------------------------------------------------


def spawn(
    command: Sequence[str],
    cwd: str | None,
    environment: Mapping[str, str],
    inherited: Sequence[int],
    tie: Callable[[], None],
    files: Files | str = Files.PIPES,
) -> Child:
    """Start one rank.

    Args:
        command: absolute, or relative to ``cwd``.
        cwd: the folder to run in.
        environment: all of it.
        inherited: descriptors that it gets, under their own numbers.
        tie: called between fork and exec, see :func:`tie_to_this_process`.
        files: its standard files.
    """
    files = Files(files)

    def start(stdin: int | None, out: int | None, err: int | None, prepare: Callable[[], None]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=out,
            stderr=err,
            bufsize=0,
            env=environment,
            cwd=cwd,
            pass_fds=inherited,
            start_new_session=files is Files.TERMINAL,
            process_group=None if files is Files.TERMINAL else 0,
            preexec_fn=prepare,
        )

    if files is Files.TERMINAL:
        return _on_a_terminal(start, tie)

    def prepare() -> None:
        _leave_terminal()
        tie()

    output = None if files is Files.OURS else subprocess.PIPE
    process = start(subprocess.PIPE if files is Files.PIPES else None, output, output, prepare)
    return Child(process, process.stdin, process.stdout, process.stderr)


def _leave_terminal() -> None:
    """Have no controlling terminal from now on, as a new session would: a lone rank may read ours without being stopped by SIGTTIN.

    But not by a new session: Linux shares the processor between sessions first (sched_autogroup), so that a rank which yields would make
    room for nobody, and where ranks are more than cores those that have work would get no more than those that wait.
    """
    fds = [0, 1, 2]  # a chroot may have no /dev/tty, and who passes us no terminal may still have one
    with contextlib.suppress(OSError):
        fds.append(os.open("/dev/tty", os.O_RDWR))  # exec closes it
    for fd in fds:
        with contextlib.suppress(OSError):  # it is no terminal, or has been left
            fcntl.ioctl(fd, termios.TIOCNOTTY)


def _on_a_terminal(start: Callable[..., subprocess.Popen[bytes]], tie: Callable[[], None]) -> Child:
    """Start a rank on a terminal of its own, which neither echoes nor changes what is written."""
    ours, its = os.openpty()
    mode = termios.tcgetattr(its)
    mode[1] &= ~termios.OPOST
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(its, termios.TCSANOW, mode)

    def prepare() -> None:
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        tie()

    try:
        process = start(its, its, its, prepare)
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(its)
    return Child(process, os.fdopen(os.dup(ours), "wb", 0), os.fdopen(ours, "rb", 0), None)


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
    """Return (pid, status) of some child that has ended or stopped, None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
