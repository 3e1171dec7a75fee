"""The job of ``rt.launch``: one loop that sleeps in ``poll`` until a pipe, a signal or a deadline calls, and decides how the ranks end.

May live here: the loop, signals, deadlines, and the verdict. May not: threads, the handling of text (``_forward``, ``_launch_input``), how
a process is made (``_launch_ranks``), and anything that talks to a group: a rank finds its own way. Three rules:

- **No orphans.** A rank leads a process group, so that its children are ended with it, and a guard kills what is left should we be killed.
- **Never block.** An output that nobody reads (a paused pager) holds back the ranks that write, but not signals and deadlines.
- **The first to fail is named**, its exit code is ours, and the message is the last line.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import secrets
import select
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from io import FileIO
from types import TracebackType
from typing import IO

from rt._forward import BACKLOG_BYTES, Sink, Stream
from rt._frames import Kind
from rt._launch_backend import Found, Question, ask, decide
from rt._launch_guard import Guard
from rt._launch_handed import Handed
from rt._launch_hosts import Hosts, Row, as_json, table
from rt._launch_input import Feed, Input
from rt._launch_link import RemoteStream
from rt._launch_loop import Loop
from rt._launch_options import Options
from rt._launch_plan import Ground, Told, crews, even_out, nth_gpu, question, show_address, told
from rt._launch_ranks import (
    THREADS,
    Files,
    LocalRank,
    Rank,
    cores,
    environment,
    signal_name,
    spawn,
    tie_to_this_process,
    wait_for_any,
)
from rt.errors import ConfigError
from rt.secret import make_secret_fd

TIMED_OUT = 124  # the exit code of timeout(1)
CAUSE_SECONDS = 2.0  # for which a rank that failed with an error of ours waits for another that failed for its own reason
LOSS_SECONDS = 4.0  # more, where there are other hosts: so long it takes to notice that one has gone

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Job:
    """The ranks, their input and output, and the decision when and how they end.

    An end is a plan: pairs of a signal for all groups and the seconds to wait for it to work. Failure: SIGTERM, then SIGKILL.
    """

    def __init__(self, options: Options, grace: float) -> None:
        self._options = options
        self._grace = grace
        self._ranks: list[Rank] = []
        self._streams: list[Stream] = []
        self._errors: dict[int, Stream] = {}  # the stderr of each rank, unless it has ours
        self._input: Input | None = None
        self._hosts: Hosts | None = None  # None: all ranks are children of ours
        self._question: Question | None = None  # whether they can have NCCL
        self._loop = Loop()
        self._out = Sink.to(1)
        self._err = self._out if os.path.sameopenfile(1, 2) else Sink.to(2)  # one queue per file, or lines would be cut in each other
        self._plan: list[tuple[int, float]] | None = None  # None: nothing is ending
        self._deadline: float | None = None  # of the plan's present step
        self._limit: float | None = None  # of the whole job
        self._abandoned = False  # the plan is used up
        self._stopped_by: int | None = None
        self._verdict: tuple[int, str] | None = None  # exit code and last line
        self._culprit: Rank | None = None
        self._failures: list[tuple[bool, bool, bool, int]] = []  # the worst is the least: a cause, a signal, a code of its own; the rank
        self._judgement: float | None = None  # when one of them is chosen at the latest

    def __enter__(self) -> Job:
        """Have signals wake the loop, from before the first rank exists."""
        ignored = [number for number in _STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN]  # nohup and "&" do so: so do we
        watched = (*_STOP_SIGNALS, signal.SIGCHLD, *([signal.SIGTSTP] if self._options.remote else []))
        self._loop.watch_signals([number for number in watched if number not in ignored], self._on_signals)
        self._job_id = secrets.token_hex(8)
        self._guard = Guard(self._job_id)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.signal(signal.SIGKILL)  # reaches somebody only if the loop broke
        self._guard.end(sweep=True)  # does nothing if it has ended
        self._loop.close()

    def run(self) -> int:
        """Start the ranks, wait for all, and return the exit code."""
        if self._options.timeout is not None:
            self._limit = time.monotonic() + self._options.timeout
        try:
            logs = self._open_logs()
        except OSError as error:
            self._fail(2, f"--log-dir: cannot write {error.filename!r}: {error.strerror}")
        else:
            (self._start_elsewhere if self._options.remote else self._begin)(logs)
        while not (self._abandoned or (self._all_ended() and self._all_quiet())):
            self._arm()
            self._loop.wait(self._patience())
            self._attend(time.monotonic())
        return self._conclude()

    # --- starting

    def _open_logs(self) -> list[tuple[FileIO, FileIO]]:
        folder = self._options.log_dir
        if folder is None:
            return []
        os.makedirs(folder, exist_ok=True)
        names = [os.path.join(folder, f"rank{rank}") for rank in range(self._options.size)]
        return [(FileIO(f"{name}.out", "w"), FileIO(f"{name}.err", "w")) for name in names]

    def _begin(self, logs: list[tuple[FileIO, FileIO]]) -> None:
        """Start the ranks of this host, as soon as it is known on which backend."""
        options = self._options
        if options.backend:
            self._start(logs)
            return
        environ = environment(os.environ, options.environment, options.size) | {"RT_JOB_ID": self._job_id}
        self._question = ask(self._loop, options.command, options.cwd, environ, partial(self._choose, logs))

    def _choose(self, logs: list[tuple[FileIO, FileIO]], found: Found) -> None:
        self._question = None
        if self._plan is not None:  # told to stop meanwhile
            return
        backend, why = decide([("this host", self._options.size, found)])
        if why:
            self._report(why)
        self._options = dataclasses.replace(self._options, backend=backend)
        self._start(logs)

    def _start(self, logs: list[tuple[FileIO, FileIO]]) -> None:
        options, command = self._options, self._options.command
        shared = environment(os.environ, options.environment, options.size)
        tie = tie_to_this_process(self._guard)
        handed = Handed()
        variables = {**os.environ, **options.environment}
        gpus = variables.get("CUDA_VISIBLE_DEVICES")
        if options.backend == "nccl" and not nth_gpu(gpus, options.size - 1):
            self._fail(2, f"CUDA_VISIBLE_DEVICES: found {gpus!r} for {options.size} ranks, expected a GPU for each")
            return
        try:
            words, place = self._tell(handed, variables)
        except ConfigError as error:
            self._fail(2, str(error))
            return
        self._report(f"{options.size} ranks of {shlex.join(command)}; {place}")
        self._report(f"{cores()} cores; " + ", ".join(f"{name}={shared.get(name, 'unset')}" for name in THREADS))
        feeds: list[Feed] = []
        secret = make_secret_fd()
        with os.fdopen(secret, "rb"):
            for rank, told in enumerate(words):
                variables = shared | told.variables | handed.variables(rank, told.files)
                variables |= {"RT_JOB_ID": self._job_id, "RT_SECRET_FD": str(secret)}
                try:
                    child = spawn(command, options.cwd, variables, [secret, *handed.inherited(rank)], tie, self._files())
                except OSError as error:
                    self._fail(2, f"cannot start rank {rank}: {command[0]}: {error.strerror}")
                    break
                self._ranks.append(LocalRank(rank, child.process, self._guard))
                self._report(f"rank {rank} is process {child.process.pid}")
                self._forward(self._ranks[-1], child.out, child.err, logs)
                if child.input is not None:
                    feeds.append(Feed(rank, child.input))
        handed.started()
        if feeds and self._plan is None:
            self._input = Input(0, feeds, self._grace, self._say)

    def _tell(self, handed: Handed, variables: Mapping[str, str]) -> tuple[list[Told], str]:
        """Return what each rank is told, and where they meet. Raises ConfigError: nowhere, as things are."""
        crewed = crews(self._options.hosts)
        ground = Ground("127.0.0.1")
        ground.learn(handed.look(question(self._options, crewed[0], ground.address), variables))
        even_out([ground], self._options.connections_per_ip)
        handed.let_go()
        place = f"coordinator {show_address(ground.address, ground.listening)}" if ground.listening else "a ring file"
        return told(self._options, crewed, [ground], variables), place

    def _files(self) -> Files:
        """Return what ranks here have as standard files: one that is alone keeps ours, there is nothing to tell apart."""
        if self._options.tty:
            return Files.TERMINAL
        if self._options.size > 1:
            return Files.PIPES
        return Files.OUR_INPUT if self._options.prefix == "always" or self._options.log_dir is not None else Files.OURS

    def _start_elsewhere(self, logs: list[tuple[FileIO, FileIO]]) -> None:
        """Begin to connect to all hosts; the rest comes when they have answered."""
        tie = tie_to_this_process(self._guard)
        self._hosts = hosts = Hosts(self._options, self._job_id, os.environ, tie, self._report)
        self._ranks = [*hosts.ranks]
        for rank in hosts.ranks:
            out_log, err_log = logs[rank.index] if logs else (None, None)
            for kind, sink, log in ((Kind.OUT, self._out, out_log), (Kind.ERR, self._err, err_log)):
                rank.link.streams[rank.index, kind] = stream = RemoteStream(rank, kind, self._prefix(rank), sink)
                stream.log, stream.complain = log, self._say
                self._streams.append(stream)
            self._errors[rank.index] = self._streams[-1]

    def _forward(self, rank: Rank, out: IO[bytes] | None, err: IO[bytes] | None, logs: list[tuple[FileIO, FileIO]]) -> None:
        out_log, err_log = logs[rank.index] if logs else (None, None)
        for pipe, sink, log in ((out, self._out, out_log), (err, self._err, err_log)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._streams.append(Stream(pipe, self._prefix(rank), sink, pipe.fileno(), log, self._say))
        if err is not None:
            self._errors[rank.index] = self._streams[-1]

    def _prefix(self, rank: Rank) -> bytes:
        if self._options.prefix == "never" or (self._options.prefix == "auto" and self._options.size == 1):
            return b""
        return f"[{rank.index} {rank.host}] ".encode() if rank.host else b"[%d] " % rank.index

    # --- the loop

    def _arm(self) -> None:
        """Ask for what can be used: sinks that have something to write, pipes whose sink is not too far behind, input there is room for."""
        want = self._loop.want
        for sink in (self._out, self._err):
            want(sink.fd, bool(sink.waiting), select.POLLOUT, sink.write)
        for stream in self._streams:
            if stream.pipe is not None:
                want(stream.fd, not stream.closed and len(stream.sink.waiting) < BACKLOG_BYTES, select.POLLIN, stream.read)
        if self._input is not None:
            want(self._input.fd, self._input.wanted(), select.POLLIN, self._read_input)
            for feed in self._input.feeds:
                if feed.pipe is not None:
                    want(feed.fd, self._input.has_more_for(feed), select.POLLOUT, partial(self._input.write, feed))
                elif feed.ready and self._input.has_more_for(feed):
                    self._input.write(feed)
        if self._hosts is not None:
            for wanted in self._hosts.wants():
                want(*wanted)

    def _read_input(self) -> None:
        assert self._input is not None
        if self._input.read():
            for sink in (self._out, self._err):
                sink.answered(echoed=self._input.is_terminal and os.isatty(sink.fd))

    def _open_streams(self) -> list[Stream]:
        return [stream for stream in self._streams if not stream.closed]

    def _all_ended(self) -> bool:
        return self._question is None and all(rank.code is not None for rank in self._ranks)

    def _all_quiet(self) -> bool:
        return all(rank.gone for rank in self._ranks) and not self._open_streams()

    def _patience(self) -> float | None:
        """Return the seconds to the next deadline, None if there is none."""
        now = time.monotonic()
        times = [stream.due for stream in self._streams]
        times += [self._deadline, self._input.due(now) if self._input else None, self._hosts.due if self._hosts else None]
        times += [self._question.due if self._question else None]
        if self._plan is None and not self._all_ended():
            times += [self._limit, self._judgement]
        return min((max(0.0, due - now) for due in times if due is not None), default=None)

    def _attend(self, now: float) -> None:
        """Do what no event calls for: deadlines, unfinished lines, lost outputs, processes left behind."""
        for stream in self._streams:
            if stream.due is not None and stream.due <= now:
                stream.flush()
        if self._question is not None:
            self._question.attend(now)
        if self._input is not None:
            self._input.attend(now)
        if self._hosts is not None:
            self._attend_hosts(self._hosts, now)
        if broken := self._out.broken or self._err.broken:
            gone = broken.errno == errno.EPIPE
            why = "the reader of our output has gone" if gone else f"cannot write our output: {broken.strerror}"
            self._fail(128 + signal.SIGPIPE if gone else 1, why)
        self._judge()
        if self._limit is not None and self._limit <= now and not self._all_ended():
            awaited = "a Python that was asked for CuPy" if self._question is not None else ""
            awaited = self._hosts.awaited if self._hosts is not None else awaited
            late = [str(rank.index) for rank in self._ranks if rank.code is None]
            running = f"rank {late[0]} was" if len(late) == 1 else f"ranks {', '.join(late)} were"
            found = f"no answer yet from {awaited}" if awaited else f"{running} still running"
            self._fail(TIMED_OUT, f"ended by --timeout {self._options.timeout:g}: {found}")
        if self._plan is None and self._all_ended() and not self._all_quiet() and not self._out.waiting and not self._err.waiting:
            # Helpers of ranks (multiprocessing's resource tracker, tee in a shell) may finish their work, but not for ever.
            self._end((0, self._grace), (signal.SIGTERM, self._grace), (signal.SIGKILL, self._grace))
        if self._deadline is not None and self._deadline <= now:
            self._advance()
        if self._failed() and all(rank.gone for rank in self._ranks):
            self._abandoned = True  # who still holds a pipe has left the ranks' groups; the guard will find it

    def _attend_hosts(self, hosts: Hosts, now: float) -> None:
        hosts.attend(now)
        if hosts.ready and self._input is None:
            self._input = Input(0, hosts.feeds, self._grace, self._say)
        if hosts.failure and self._plan is None:
            self._show(hosts.failure, hosts.report())
        if hosts.failure or hosts.complaint:
            self._fail(2, hosts.failure or hosts.complaint)
        if ended := hosts.ended():
            self._take_ends(ended)

    def _show(self, failure: str, rows: Sequence[Row]) -> None:
        sink, text = (self._out, as_json(failure, rows)) if self._options.json else (self._err, table(rows))
        sink.put(self, b"", f"{text}\n".encode(errors="surrogateescape"), finished=True)

    def _on_signals(self, numbers: set[int]) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGTSTP and self._hosts is not None:
                self._hosts.sleep()  # Ctrl-Z: the hosts would else take us for dead
            elif number in _STOP_SIGNALS:
                self._stop(number)

    def _reap(self) -> None:
        ended: list[Rank] = []
        by_pid = {rank.pid: rank for rank in self._ranks if isinstance(rank, LocalRank)}
        while (found := wait_for_any()) is not None:
            pid, status = found
            if os.WIFSTOPPED(status):
                if pid in by_pid:
                    by_pid[pid].stopped(status, on_terminal=self._files() is Files.OURS and os.isatty(0))
            elif pid in by_pid:  # else a connection, the guard, or an orphan of a rank, which came to us because we are its subreaper
                by_pid[pid].ended(status)
                ended.append(by_pid[pid])
            elif self._hosts is not None:
                self._hosts.reaped(pid, status)
        self._take_ends(ended)

    def _take_ends(self, ended: Sequence[Rank]) -> None:
        for rank in ended:
            self._report(rank.describe_end())
        for rank in self._ranks:
            if rank.code is not None:
                rank.signal(0)
        for rank in ended:
            if rank.code and self._plan is None:
                self._failures.append((self._is_consequence(rank), rank.code > 0, rank.code == 1, rank.index))
                patience = CAUSE_SECONDS + (LOSS_SECONDS if self._hosts is not None else 0)
                self._judgement = min(self._judgement or math.inf, time.monotonic() + patience)
        self._judge()

    # --- ending

    def _is_consequence(self, rank: Rank) -> bool:
        """Say whether a rank ended with an error of ours that nobody caught: it may have failed only because another one did."""
        stream = self._errors.get(rank.index)
        if rank.code != 1 or stream is None:
            return False
        stream.catch_up()
        return any(line.startswith(b"rt.errors.") for line in stream.tail()[-1:])

    def _judge(self) -> None:
        """Say which rank's failure it is that ends the job, unless what we have may be a consequence of one that is still to come."""
        if self._judgement is None or self._plan is not None:
            return
        worst = min(self._failures)
        if worst[0] and time.monotonic() < self._judgement and not self._all_ended():
            return
        first = self._ranks[worst[-1]]
        code = first.code or 0
        self._fail(code if code > 0 else 128 - code, first.describe_end(), first)

    def _failed(self) -> bool:
        return self._verdict is not None or self._stopped_by is not None

    def _fail(self, code: int, why: str, culprit: Rank | None = None) -> None:
        if self._plan is None:
            self._verdict, self._culprit = (code, why), culprit
            self._end((signal.SIGTERM, self._grace), (signal.SIGKILL, self._grace))

    def _stop(self, number: int) -> None:
        """Hand the signal on; a second one, or one while we are ending the ranks already, kills."""
        if self._plan is not None:
            self._end((signal.SIGKILL, self._grace))
            return
        self._stopped_by = number
        if number == signal.SIGINT and os.isatty(0) and os.isatty(self._err.fd):
            self._err.source = None  # the terminal has shown "^C", whatever stood there before
            self._err.put(self, b"", b"\n", finished=True)
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
                self._say(f"killing {rank} (process {rank.pid}), which has not ended")
            rank.signal(number)
        self._deadline = time.monotonic() + patience

    def _conclude(self) -> int:
        """Write what is left, then the verdict, and return the exit code. Nobody is left to be ended: writing may block, Ctrl-C ends us."""
        if self._hosts is not None:
            self._hosts.leave(sweep=self._failed())
        if self._question is not None:
            self._question.stop()
        self._guard.end(sweep=self._failed())  # after success a process that left its rank's group on purpose, a daemon, may stay
        for stream in self._open_streams():
            stream.drain()
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self._verdict is None and self._stopped_by is not None and (not self._ranks or any(rank.code for rank in self._ranks)):
            self._verdict = 128 + self._stopped_by, f"stopped by {signal_name(self._stopped_by)}"
        code, why = self._verdict or (0, "")
        if self._culprit is not None:
            self._repeat_errors(self._culprit)
        if why:
            self._say(why)
        for sink in (self._out, self._err):
            while sink.waiting and self._taken(sink):
                sink.write()
        return code or (128 + signal.SIGPIPE if self._out.broken or self._err.broken else 0)

    def _repeat_errors(self, rank: Rank) -> None:
        """Show what a rank wrote to stderr last, unless that is just above."""
        stream = self._errors.get(rank.index)
        lines = stream.tail() if stream is not None else []
        if stream is None or not lines or self._err.latest is stream:
            return
        self._say(f"rank {rank.index} ended its stderr with:")
        for line in lines:
            self._err.put(self, stream.prefix, line + b"\n", finished=True)

    def _taken(self, sink: Sink) -> bool:
        """Wait until a sink takes more: as long as it needs, but not for a reader that sleeps when we were told to stop."""
        poll = select.poll()
        poll.register(sink.fd, select.POLLOUT)
        return bool(poll.poll(None if self._stopped_by is None else self._grace * 1000))

    def _say(self, text: str) -> None:
        self._err.put(self, b"rt.launch: ", text.encode(errors="surrogateescape") + b"\n", finished=True)

    def _report(self, text: str) -> None:
        if self._options.verbose:
            self._say(text)
