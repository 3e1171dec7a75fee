"""The supervisor: ``python -m rt._supervisor`` on each host of a job, at the end of the launcher's ssh connection.

May live here: starting the ranks of one host, their input and output as frames, and their end. May not: decisions about the job (they are
the launcher's, ``_launch_job``), ssh, groups. It is told everything on its stdin, the secret too: nothing that matters is on a command
line, and no file is written. Two rules:

- **No orphans.** When its stdin ends, or the launcher is not heard of for ``SILENCE_SECONDS`` (a pulled cable ends nothing), or a signal
  comes, the groups of all ranks are ended, first by SIGTERM. Should it be killed itself, its guard does so, as the launcher's does.
- **Never block.** It reads what the launcher says, whatever becomes of output: see ``_frames`` for who waits for what.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import rt
from rt._forward import BACKLOG_BYTES, READ_BYTES, Sink
from rt._frames import BEAT_SECONDS, MARK, WINDOW_BYTES, Frame, Kind, Reader, frame
from rt._launch_backend import Found, Question, ask
from rt._launch_guard import Guard
from rt._launch_handed import Handed
from rt._launch_loop import Loop
from rt._launch_options import executable
from rt._launch_ranks import Child, LocalRank, environment, spawn, tie_to_this_process, wait_for_any
from rt.bootstrap import HostInfo
from rt.errors import ConfigError
from rt.interfaces import VARIABLE
from rt.secret import make_secret_fd

SILENCE_SECONDS = 3.5  # of the launcher, after which it has gone
_LAST_SECONDS = 1.0  # between SIGTERM and SIGKILL then: with the silence before less than the 5 seconds that are promised
_EOF_SECONDS = 3.0  # the same, when the connection has ended and there was no silence
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(eq=False)
class _Flow:
    """The stdout or stderr of a rank, and how much of it the launcher has room for."""

    rank: int
    kind: Kind
    pipe: IO[bytes]
    room: int = WINDOW_BYTES


@dataclass(eq=False)
class _Feed:
    """The stdin of a rank, and what it has not taken yet."""

    pipe: IO[bytes]
    waiting: bytearray
    ended: bool = False


class Supervisor:
    """One host's part of a job."""

    def __init__(self) -> None:
        self._loop = Loop()
        self._reader = Reader()
        self._out = Sink(1, BACKLOG_BYTES)
        self._ranks: dict[int, LocalRank] = {}
        self._flows: list[_Flow] = []
        self._feeds: dict[int, _Feed] = {}
        self._handed = Handed()
        self._command: list[str] = []
        self._folder: str | None = None
        self._guard: Guard | None = None
        self._question: Question | None = None
        self._plan: list[tuple[int, float]] | None = None  # as the launcher's: signals, and seconds to wait for each to work
        self._deadline = 0.0
        self._ended = False
        self._heard = self._beaten = time.monotonic()
        self._paused = False

    def run(self) -> int:
        """Serve until the launcher says that it is over, or has gone; return an exit code."""
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        self._loop.watch_signals((*_SIGNALS, signal.SIGCHLD), self._on_signals)
        self._out.waiting += MARK
        self._say(Kind.HELLO, 0, _about_this_host())
        while not self._ended:
            self._arm()
            self._loop.wait(self._patience())
            self._attend(time.monotonic())
        return self._conclude()

    # --- the loop

    def _arm(self) -> None:
        want = self._loop.want
        want(0, self._plan is None, select.POLLIN, self._hear)
        want(1, bool(self._out.waiting), select.POLLOUT, self._out.write)
        for flow in self._flows:
            want(flow.pipe.fileno(), flow.room > 0, select.POLLIN, partial(self._forward, flow))
        for rank, feed in self._feeds.items():
            want(feed.pipe.fileno(), bool(feed.waiting), select.POLLOUT, partial(self._feed, rank))

    def _patience(self) -> float:
        now = time.monotonic()
        if self._plan is not None:
            return max(0.0, self._deadline - now)
        asked = self._question.due if self._question is not None else math.inf
        return max(0.0, min(self._beaten + BEAT_SECONDS, self._heard + SILENCE_SECONDS, asked) - now)

    def _attend(self, now: float) -> None:
        if self._plan is not None:
            if self._deadline <= now or all(rank.gone for rank in self._ranks.values()):
                self._advance(now)
            return
        if self._question is not None:
            self._question.attend(now)
        if self._out.broken is not None:
            self._lose(_EOF_SECONDS)
        elif self._heard + SILENCE_SECONDS <= now and not self._paused:
            self._lose(_LAST_SECONDS)
        elif self._beaten + BEAT_SECONDS <= now:
            self._say(Kind.BEAT)
            self._beaten = now

    def _say(self, kind: Kind, rank: int = 0, payload: bytes | int | dict[str, Any] = b"") -> None:
        self._out.waiting += frame(kind, rank, payload)

    def _hear(self) -> None:
        try:
            data = os.read(0, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(_EOF_SECONDS)
            return
        self._heard = time.monotonic()
        self._paused = False
        for said in self._reader.feed(data):
            if (act := self._acts.get(said.kind)) is not None:
                act(self, said)

    # --- what the launcher says

    def _check(self, said: Frame) -> None:
        job, problems = said.json, []
        try:
            self._folder = _folder(job["cwd"], job["default_cwd"])
            self._command = executable(job["command"], sys.executable, self._folder)
        except ValueError as error:
            problems.append(str(error))
        answer: dict[str, Any] = {"problems": problems}
        try:
            if job["here"]:
                answer["ground"] = self._handed.look(job, os.environ if job["iface"] is None else {VARIABLE: job["iface"]})
        except ConfigError as error:
            problems.append(str(error))
        if problems or job["asks"] is None:
            self._say(Kind.CHECKED, 0, answer)
            return
        environ = environment(os.environ, job["asks"], job["size"])
        self._question = ask(self._loop, self._command, self._folder, environ, lambda found: self._say_found(answer, found))

    def _say_found(self, answer: dict[str, Any], found: Found) -> None:
        self._question = None
        self._say(Kind.CHECKED, 0, answer | {"found": found})

    def _start(self, said: Frame) -> None:
        job = said.json
        self._guard = Guard(job["job"])
        tie = tie_to_this_process(self._guard)
        shared = environment(os.environ, job["environment"], len(job["ranks"])) | {"RT_JOB_ID": job["job"]}
        self._handed.let_go()
        secret = make_secret_fd(job["secret"])
        with os.fdopen(secret, "rb"):
            for name, told in job["ranks"].items():
                rank = int(name)
                variables = shared | told["variables"] | self._handed.variables(rank, told["files"]) | {"RT_SECRET_FD": str(secret)}
                try:
                    child = spawn(self._command, self._folder, variables, [secret, *self._handed.inherited(rank)], tie, job["files"])
                except OSError as error:
                    self._say(Kind.REFUSED, rank, f"{self._command[0]}: {error.strerror}".encode())
                    break
                self._add(LocalRank(rank, child.process, self._guard), child)
        self._handed.started()

    def _add(self, rank: LocalRank, child: Child) -> None:
        self._ranks[rank.index] = rank
        self._flows += [_Flow(rank.index, kind, pipe) for kind, pipe in ((Kind.OUT, child.out), (Kind.ERR, child.err)) if pipe is not None]
        for pipe in (child.out, child.err, child.input):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        if child.input is not None:
            self._feeds[rank.index] = _Feed(child.input, bytearray())
        if child.err is None:
            self._say(Kind.ERR, rank.index)  # a terminal has no stderr of its own
        self._say(Kind.STARTED, rank.index, rank.pid)

    def _take_input(self, said: Frame) -> None:
        if (feed := self._feeds.get(said.rank)) is not None:
            feed.waiting += said.payload
            feed.ended = not said.payload
            self._feed(said.rank)

    def _make_room(self, said: Frame) -> None:
        kind = Kind.OUT if said.kind == Kind.TAKEN_OUT else Kind.ERR
        for flow in self._flows:
            if flow.rank == said.rank and flow.kind == kind:
                flow.room += said.number

    def _signal(self, said: Frame) -> None:
        if (rank := self._ranks.get(said.rank)) is not None:
            rank.signal(said.number)

    def _pause(self, said: Frame) -> None:
        self._paused = True

    def _end(self, said: Frame) -> None:
        """The job is over, here at least: hand over what is still in the pipes, and go."""
        for flow in list(self._flows):
            flow.room = 1 << 30
            self._catch_up(flow)
        if self._guard is not None:
            self._guard.end(sweep=bool(said.number))
        self._ended = True

    _acts: Mapping[int, Callable[[Supervisor, Frame], None]]

    # --- input and output

    def _feed(self, rank: int) -> None:
        """Give a rank what it takes, and say how much that was."""
        feed = self._feeds[rank]
        try:
            taken = os.write(feed.pipe.fileno(), feed.waiting) if feed.waiting else 0
        except BlockingIOError:
            return
        except OSError:  # it has ended, or closed its stdin
            self._say(Kind.READ, rank, -1)
            self._close_feed(rank)
            return
        del feed.waiting[:taken]
        if taken:
            self._say(Kind.READ, rank, taken)
        if feed.ended and not feed.waiting:
            self._close_feed(rank)

    def _close_feed(self, rank: int) -> None:
        feed = self._feeds.pop(rank)
        self._loop.want(feed.pipe.fileno(), False, 0, self._hear)
        feed.pipe.close()

    def _forward(self, flow: _Flow) -> None:
        self._send_on(flow)

    def _send_on(self, flow: _Flow) -> bool:
        """Send on what is there, as far as there is room; False if that was all."""
        if flow.pipe.closed or flow.room <= 0:
            return False
        try:
            data = os.read(flow.pipe.fileno(), min(READ_BYTES, flow.room))
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal any more
            data = b""
        self._say(flow.kind, flow.rank, data)
        flow.room -= len(data)
        if not data:
            self._loop.want(flow.pipe.fileno(), False, 0, self._hear)
            flow.pipe.close()
            self._flows.remove(flow)
        return bool(data)

    def _catch_up(self, flow: _Flow) -> None:
        for _ in range(BACKLOG_BYTES // READ_BYTES):  # as much as fits in a pipe
            if not self._send_on(flow):
                return

    # --- the end

    def _on_signals(self, numbers: set[int]) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        if numbers & set(_SIGNALS):
            self._lose(_EOF_SECONDS)

    def _reap(self) -> None:
        ended = []
        by_pid = {rank.pid: rank for rank in self._ranks.values()}
        while (found := wait_for_any()) is not None:
            pid, status = found
            if os.WIFSTOPPED(status):
                if pid in by_pid:
                    by_pid[pid].stopped(status)
            elif pid in by_pid:  # else the guard, or an orphan of a rank, which came to us because we are its subreaper
                by_pid[pid].ended(status)
                ended.append(by_pid[pid])
        for rank in ended:
            for flow in [flow for flow in self._flows if flow.rank == rank.index]:
                self._catch_up(flow)  # its last words come before its end
            assert rank.code is not None
            self._say(Kind.EXIT, rank.index, rank.code)
        for rank in self._ranks.values():
            if rank.code is not None and not rank.gone:
                rank.signal(0)
                if rank.gone:
                    self._say(Kind.GONE, rank.index)

    def _lose(self, patience: float) -> None:
        """Nobody is there any more to decide: end all."""
        if self._plan is None:
            self._plan = [(signal.SIGTERM, patience), (signal.SIGKILL, _LAST_SECONDS)]
            self._advance(time.monotonic())

    def _advance(self, now: float) -> None:
        if not self._plan or all(rank.gone for rank in self._ranks.values()):
            self._ended = True
            return
        number, patience = self._plan.pop(0)
        for rank in self._ranks.values():
            rank.signal(number)
        self._deadline = now + patience

    def _conclude(self) -> int:
        if self._question is not None:
            self._question.stop()
        if self._guard is not None:
            self._guard.end(sweep=True)  # does nothing where the launcher's END has ended it
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(1, select.POLLOUT)
            while self._out.waiting and self._plan is None and poll.poll(_LAST_SECONDS * 1000):
                self._out.write()
        self._loop.close()
        return 0 if self._plan is None else 1


Supervisor._acts = {
    Kind.CHECK: Supervisor._check,
    Kind.START: Supervisor._start,
    Kind.INPUT: Supervisor._take_input,
    Kind.TAKEN_OUT: Supervisor._make_room,
    Kind.TAKEN_ERR: Supervisor._make_room,
    Kind.SIGNAL: Supervisor._signal,
    Kind.PAUSE: Supervisor._pause,
    Kind.END: Supervisor._end,
}


def _about_this_host() -> dict[str, Any]:
    """Say what a launcher of any version understands."""
    client, _, server, *_ = [*os.environ.get("SSH_CONNECTION", "").split(), "", "", "", ""]
    about = {"version": rt.__version__, "client": client, "server": server, "hostname": socket.gethostname()}
    return about | {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "machine": HostInfo.mine().machine}


def _folder(asked: str | None, default: str) -> str | None:
    """Return where to run: as asked, else as the launcher runs, else where ssh has put us."""
    if asked is not None and not os.path.isdir(asked):
        raise ValueError(f"--cwd {asked!r}: no such folder")
    if asked is None and not os.path.isdir(default):
        return None
    return asked or default


def main() -> int:
    return Supervisor().run()


if __name__ == "__main__":
    sys.exit(main())
