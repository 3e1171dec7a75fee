"""``rt.launch``: start the ranks of a job on this host, show what they write, and end them all together.

May live here: the command line, the environment of a rank, and the processes. May not: the handling of lines (``_forward``), anything
that talks to a group (a rank finds its own way with the variables it is given), and threads: one loop sleeps in ``poll`` until a pipe,
a signal or a deadline calls. Three rules:

- **No orphans.** A rank leads its own session, so that its children are ended with it, and the kernel kills it should we be killed.
- **Never block.** An output that nobody reads (a paused pager) holds back the ranks that write, but not signals and deadlines.
- **The first to fail is named**, its exit code is ours, and the message is the last line.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rt._forward import BACKLOG_BYTES, Sink, Stream
from rt.secret import make_secret_fd

GRACE = 5.0  # seconds between asking a process to end and killing it

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What these say holds for the launcher, if for anybody: a rank that inherited them would find two answers to "who am I".
_NOT_INHERITED = (
    *("RT_HOSTFILE", "RT_SECRET", "RT_SECRET_FILE", "RT_COORDINATOR_FD", "MLX_RANK", "MLX_HOSTFILE", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "SLURM_PROCID", "SLURM_NTASKS"),
)

_DESCRIPTION = """\
Start N copies of a program on this host and join them to one group: in each, rt.init() finds its rank and its peers."""

_EXAMPLES = """\
options end at the program: what follows belongs to it.

examples:
  rt.launch -n 4 train.py --epochs 10           train.py runs under this Python; --epochs is its own option
  rt.launch -n 2 python -m package.module       anything else is looked up on PATH
  rt.launch -n 2 --env RT_LOG=info train.py     one more variable for every rank
  rt.launch -n 2 --verbose -- ./-odd-name       say what is started; "--" ends the options

Lines of the ranks are shown as "[rank] line", stdout and stderr apart; rank 0 reads our stdin. When a rank fails the others get
SIGTERM, and SIGKILL 5 seconds later. The exit code is 0 if all ranks returned 0, else that of the rank that failed first (128 plus
the signal if one killed it), or 2 if the command line is wrong. Ctrl-C is handed to the ranks; a second one kills them."""


# --- the command line ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, *, grace: float = GRACE) -> int:
    """Run the launcher and return its exit code; wrong usage raises SystemExit(2).

    It takes over the signal handlers and the children of the process, so it is for processes that do nothing else.

    Args:
        argv: the command line without the program's name; None stands for ``sys.argv[1:]``.
        grace: seconds from asking a rank to end to killing it (for tests).
    """
    ours, command = _split(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(ours)
    try:
        command = _executable(command, options.python)
    except ValueError as error:
        parser.error(str(error))
    with _Job(grace, options.verbose) as job:
        return job.run(command, options.n, dict(options.env))


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the command line in ours and the program's. Not left to argparse: its REMAINDER treats options and "--" in too many ways."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        if argv[at] == "--":
            return list(argv[:at]), list(argv[at + 1 :])
        at += 2 if argv[at] in ("-n", "--python", "--env") else 1
    return list(argv[:at]), list(argv[at:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rt.launch",
        usage="rt.launch -n N [--python PY] [--env NAME=VALUE] [--verbose] program [args ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-n", type=_count, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--python", default=sys.executable, metavar="PY", help="interpreter for .py programs (default: this one)")
    parser.add_argument("--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="for every rank; repeatable")
    parser.add_argument("--verbose", action="store_true", help="say what is started, with which settings, and how it ended")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of ranks from 1 up")
    return int(text)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
    return name, value


def _executable(command: Sequence[str], python: str) -> list[str]:
    """Return the command with what runs it in front; ValueError says what is missing, before anything has been started."""
    if not command:
        raise ValueError("no program given; expected for example: rt.launch -n 2 train.py")
    if not command[0].endswith(".py"):
        return [_found(command[0], "program"), *command[1:]]
    if not os.path.isfile(command[0]):
        raise ValueError(f"program {command[0]!r} not found: no such file")
    return [_found(python, "--python"), "-u", *command]


def _found(name: str, what: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"{what} {name!r} not found: {'no such executable file' if os.sep in name else 'not on PATH'}")
    return path


def _environment(inherited: Mapping[str, str], extra: Mapping[str, str], size: int, cores: int) -> dict[str, str]:
    """Return what all ranks share: the launcher's environment, defaults where it has none, and the user's ``--env``, which wins."""
    shared = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    shared.setdefault("PYTHONUNBUFFERED", "1")  # for Python started by name: our pipe is no terminal, and lines should come at once
    if size > 1:  # else every rank starts a BLAS thread per core, and they fight
        for name in _THREADS:
            shared.setdefault(name, str(max(1, cores // size)))
    return shared | dict(extra)


def _identity(rank: int, size: int, address: str, listener: int, secret: int) -> dict[str, str]:
    """Return what tells a rank who it is. Rank 0 inherits the listening socket: nobody can take its port in between."""
    identity = {"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_LOCAL_RANK": str(rank), "RT_LOCAL_SIZE": str(size)}
    identity |= {"RT_COORDINATOR": address, "RT_SECRET_FD": str(secret)}
    return identity if rank else identity | {"RT_COORDINATOR_FD": str(listener)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# --- processes -----------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Rank:
    """A started process. ``gone``: its whole group has ended, so its number may belong to a stranger and is never signalled again."""

    index: int
    process: subprocess.Popen[bytes]
    gone: bool = False

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal's number if one killed it, None while it runs."""
        return self.process.returncode  # set by _Job._reap: one waitpid for all, so Popen never asks

    def signal(self, number: int) -> None:
        """Signal the whole group; number 0 only asks whether anybody is left in it."""
        if self.gone:
            return
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # EPERM: only zombies (macOS) or another user's processes, which are not ours to end
            self.gone = self.code is not None

    def describe_end(self) -> str:
        code = self.code or 0
        return f"rank {self.index} " + (f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}")


class _Job:
    """The ranks, their output, and the decision when and how they end.

    An end is a plan: pairs of a signal for all groups and the seconds to wait for it to work. Failure: SIGTERM, then SIGKILL.
    """

    def __init__(self, grace: float, verbose: bool) -> None:
        self._grace = grace
        self._verbose = verbose
        self._ranks: list[_Rank] = []
        self._streams: list[Stream] = []
        self._selector = selectors.PollSelector()  # not epoll: it refuses regular files, and stdout may be one
        self._out = Sink(1)
        self._err = self._out if os.path.sameopenfile(1, 2) else Sink(2)  # one queue per file, or lines would be cut in each other
        self._plan: list[tuple[int, float]] | None = None  # None: nothing is ending
        self._deadline: float | None = None
        self._abandoned = False  # the plan is used up
        self._stopped_by: int | None = None
        self._verdict: tuple[int, str] | None = None  # exit code and last line

    def __enter__(self) -> _Job:
        """Have signals wake the loop, from before the first rank exists."""
        self._wakeup, write_end = socket.socketpair()
        self._wakeup_writer = write_end
        for end in (self._wakeup, write_end):
            end.setblocking(False)
        signal.set_wakeup_fd(write_end.fileno())
        for number in (*_STOP_SIGNALS, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:  # nohup and "&" ignore some: so do we
                signal.signal(number, _wake)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signals)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.signal(signal.SIGKILL)  # reaches somebody only if the loop broke
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wakeup.close()
        self._wakeup_writer.close()

    def run(self, command: Sequence[str], size: int, extra: Mapping[str, str]) -> int:
        """Start ``size`` ranks, wait for all, and return the exit code."""
        try:
            self._start(command, size, extra)
        except OSError as error:
            self._fail(2, f"cannot start rank {len(self._ranks)}: {command[0]}: {error.strerror}")
        while not (self._abandoned or (self._all_ended() and self._all_quiet())):
            self._arm()
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._attend(time.monotonic())
        return self._conclude()

    # --- starting

    def _start(self, command: Sequence[str], size: int, extra: Mapping[str, str]) -> None:
        shared = _environment(os.environ, extra, size, _cores())
        tie = _tie_to_this_process()
        secret = make_secret_fd()
        with os.fdopen(secret, "rb"), socket.create_server(("127.0.0.1", 0), backlog=max(128, size)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            self._report(f"{size} ranks of {shlex.join(command)}; coordinator {address}")
            self._report(f"{_cores()} cores; " + ", ".join(f"{name}={shared.get(name, 'unset')}" for name in _THREADS))
            for rank in range(size):
                environment = shared | _identity(rank, size, address, listener.fileno(), secret)
                inherited = (secret,) if rank else (secret, listener.fileno())
                self._ranks.append(_Rank(rank, _spawn(command, environment, inherited, tie, first=rank == 0, alone=size == 1)))
                self._forward(self._ranks[-1])

    def _forward(self, rank: _Rank) -> None:
        self._report(f"rank {rank.index} is process {rank.process.pid}")
        for pipe, sink in ((rank.process.stdout, self._out), (rank.process.stderr, self._err)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._streams.append(Stream(pipe, b"[%d] " % rank.index, sink, pipe.fileno()))

    # --- the loop

    def _arm(self) -> None:
        """Ask for what can be used: sinks that have something to write, pipes whose sink is not too far behind."""
        for sink in (self._out, self._err):
            self._want(sink.fd, bool(sink.waiting), selectors.EVENT_WRITE, sink.write)
        for stream in self._streams:
            ready = not stream.pipe.closed and len(stream.sink.waiting) < BACKLOG_BYTES
            self._want(stream.fd, ready, selectors.EVENT_READ, stream.read)

    def _want(self, fd: int, wanted: bool, event: int, callback: Callable[[], None]) -> None:
        registered = fd in self._selector.get_map()
        if wanted and not registered:
            self._selector.register(fd, event, callback)
        elif registered and not wanted:
            self._selector.unregister(fd)

    def _open_streams(self) -> list[Stream]:
        return [stream for stream in self._streams if not stream.pipe.closed]

    def _all_ended(self) -> bool:
        return all(rank.code is not None for rank in self._ranks)

    def _all_quiet(self) -> bool:
        return all(rank.gone for rank in self._ranks) and not self._open_streams()

    def _patience(self) -> float | None:
        """Return the seconds to the next deadline, None if there is none."""
        times = [stream.due for stream in self._streams if stream.due is not None]
        if self._deadline is not None:
            times.append(self._deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _attend(self, now: float) -> None:
        """Do what no event calls for: deadlines, unfinished lines, lost outputs, processes left behind."""
        for stream in self._streams:
            if stream.due is not None and stream.due <= now:
                stream.flush()
        if self._out.broken or self._err.broken:
            self._fail(128 + signal.SIGPIPE, "the reader of our output has gone")
        if self._plan is None and self._all_ended() and not self._all_quiet() and not self._out.waiting and not self._err.waiting:
            # Helpers of ranks (multiprocessing's resource tracker, tee in a shell) may finish their work, but not for ever.
            self._end((0, self._grace), (signal.SIGTERM, self._grace), (signal.SIGKILL, self._grace))
        if self._deadline is not None and self._deadline <= now:
            self._advance()

    def _on_signals(self) -> None:
        for number in set(self._wakeup.recv(4096)):
            if number == signal.SIGCHLD:
                self._reap()
            elif number in _STOP_SIGNALS:
                self._stop(number)

    def _reap(self) -> None:
        ended = []
        by_pid = {rank.process.pid: rank for rank in self._ranks}
        while (found := _wait_for_any()) is not None:
            pid, status = found
            if pid in by_pid:  # else an orphan of a rank, which came to us because we are its subreaper
                by_pid[pid].process.returncode = os.waitstatus_to_exitcode(status)
                ended.append(by_pid[pid])
        for rank in ended:
            self._report(rank.describe_end())
        for rank in self._ranks:
            if rank.code is not None:
                rank.signal(0)
        if failed := [rank for rank in ended if rank.code]:
            # Several at once: a lost peer makes a rank exit with 1, but never kills it; so look for another cause first.
            first = min(failed, key=lambda rank: ((rank.code or 0) > 0, rank.code == 1, rank.index))
            code = first.code or 0
            self._fail(code if code > 0 else 128 - code, first.describe_end())

    # --- ending

    def _fail(self, code: int, why: str) -> None:
        if self._plan is None:
            self._verdict = code, why
            self._end((signal.SIGTERM, self._grace), (signal.SIGKILL, self._grace))

    def _stop(self, number: int) -> None:
        """Hand the signal on; a second one, or one while we are ending the ranks already, kills."""
        if self._plan is not None:
            self._end((signal.SIGKILL, self._grace))
            return
        self._stopped_by = number
        self._end((number, self._grace), (signal.SIGKILL, self._grace))

    def _end(self, *plan: tuple[int, float]) -> None:
        self._plan = list(plan)
        self._advance()

    def _advance(self) -> None:
        """Take the next step of the plan; nobody left to signal, or no step left, means that open pipes are not waited for."""
        if not self._plan or all(rank.gone for rank in self._ranks):
            self._abandoned = True
            return
        number, patience = self._plan.pop(0)
        for rank in self._ranks:
            if number == signal.SIGKILL and rank.code is None:
                self._say(f"killing rank {rank.index} (process {rank.process.pid}), which has not ended")
            rank.signal(number)
        self._deadline = time.monotonic() + patience

    def _conclude(self) -> int:
        """Write what is left, then the verdict, and return the exit code. Nobody is left to be ended: writing may block, Ctrl-C ends us."""
        for stream in self._open_streams():
            stream.drain()
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self._verdict is None and self._stopped_by is not None and any(rank.code for rank in self._ranks):
            self._verdict = 128 + self._stopped_by, f"stopped by {_signal_name(self._stopped_by)}"
        code, why = self._verdict or (0, "")
        if why:
            self._say(why)
        for sink in (self._out, self._err):
            while sink.waiting and self._taken(sink):
                sink.write()
        return code or (128 + signal.SIGPIPE if self._out.broken or self._err.broken else 0)

    def _taken(self, sink: Sink) -> bool:
        """Wait until a sink takes more: as long as it needs, but not for a reader that sleeps when we were told to stop."""
        poll = select.poll()
        poll.register(sink.fd, select.POLLOUT)
        return bool(poll.poll(None if self._stopped_by is None else self._grace * 1000))

    def _say(self, text: str) -> None:
        self._err.put(self, b"rt.launch: ", text.encode(errors="surrogateescape") + b"\n", finished=True)

    def _report(self, text: str) -> None:
        if self._verbose:
            self._say(text)


def _spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherited: Sequence[int],
    tie: Callable[[], None] | None,
    *,
    first: bool,
    alone: bool,
) -> subprocess.Popen[bytes]:
    output = None if alone else subprocess.PIPE  # a lone rank keeps our terminal: there is nothing to tell apart
    return subprocess.Popen(
        command,
        stdin=None if first else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        bufsize=0,
        env=environment,
        pass_fds=inherited,
        start_new_session=True,  # not only a group: rank 0 may read our terminal without being stopped by SIGTTIN
        preexec_fn=tie,
    )


def _tie_to_this_process() -> Callable[[], None] | None:
    """Return what a rank calls between fork and exec so that it dies with us, or None where only Linux can do it.

    It runs in a copy of this process, so it takes no lock that a thread of ours (NumPy's BLAS has some) might have held: the function is
    looked up before the fork. We also become the ranks' subreaper: their orphans' ends wake us, so that a group's end is never polled for.
    """
    if sys.platform != "linux":
        return None
    launcher = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # we died before the kernel was told, so nobody will kill this child
            os._exit(1)

    return tie


def _wait_for_any() -> tuple[int, int] | None:
    """Return (pid, status) of some child that has ended, None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _wake(number: int, frame: object) -> None:
    """Handle no signal: the loop reads its number from the wakeup socket."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main())
