"""The launcher's end of the connection to one host: its ranks, what they write and read, and whether the host is still there.

May live here: the ssh process of a host and the frames on it. May not: what is decided about the job (``_launch_job``), what is sent to
which host at the beginning (``_launch_hosts``), the far end (``_supervisor``).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from rt import _ssh
from rt._forward import BACKLOG_BYTES, READ_BYTES, Sink, Stream
from rt._frames import BEAT_SECONDS, MARK, WINDOW_BYTES, Frame, Kind, Reader, frame
from rt._launch_input import Feed
from rt._launch_plan import Crew
from rt._launch_ranks import Rank

SILENCE_SECONDS = 10.0  # of a supervisor, whose host ssh still hears: it is stopped, or its host out of memory
_NOISE_BYTES = 4096  # of what a host says besides, kept for messages
_PROGRAM = ("-P", "-m", "rt._supervisor")  # -P: a folder "rt" in the user's home is not our package

Want = tuple[int, bool, int, Callable[[], None]]


class RemoteRank(Rank):
    """A rank on another host. ``code`` 255: it was lost with its host."""

    def __init__(self, index: int, host: str, link: Link) -> None:
        super().__init__(index, host)
        self.link = link

    def signal(self, number: int) -> None:
        if self.gone or number == 0:  # a host says by itself when a group has gone
            return
        if self.link.lost or not self.link.started:
            self.code, self.gone = -number, True  # as good as ended by it
        else:
            self.link.send(Kind.SIGNAL, self.index, number)

    def describe_end(self) -> str:
        return f"{self} was lost: {self.link.lost}" if self.link.lost and self.code == _ssh.FAILED else super().describe_end()


class RemoteFeed(Feed):
    """The stdin of a rank on another host: it takes as much as there is room for in the window."""

    def __init__(self, index: int, link: Link) -> None:
        super().__init__(index, None)
        self._link = link
        self._room = WINDOW_BYTES
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def ready(self) -> bool:
        return self._link.started and self._room > 0

    def put(self, piece: memoryview) -> int:
        taken = min(self._room, len(piece))
        self._link.send(Kind.INPUT, self.index, piece[:taken])
        self._room -= taken
        return taken

    def make_room(self, nbytes: int) -> None:
        self._room += nbytes

    def close(self) -> None:
        """Say that this was all."""
        if not self._closed:
            self._closed = True
            self._link.send(Kind.INPUT, self.index)

    def refused(self) -> None:
        """The rank wants no more."""
        self._closed = True


class RemoteStream(Stream):
    """The stdout or stderr of a rank on another host; there is room for more of it when our own output keeps up."""

    def __init__(self, rank: RemoteRank, kind: Kind, prefix: bytes, sink: Sink) -> None:
        super().__init__(None, prefix, sink, -1)
        self._taken = (Kind.TAKEN_OUT if kind == Kind.OUT else Kind.TAKEN_ERR), rank.index
        self._link = rank.link
        self._owed = 0

    def arrive(self, data: bytes) -> None:
        """Take a piece, or the end."""
        if self.closed:
            return
        if data:
            self.take(data)
            self._owed += len(data)
        else:
            self.close()

    def make_room(self) -> None:
        if self._owed and len(self.sink.waiting) < BACKLOG_BYTES:
            kind, index = self._taken
            self._link.send(kind, index, self._owed)
            self._owed = 0


class Link:
    """One host.

    Attributes:
        crew: the host, and which ranks are on it.
        ranks: these.
        hello: what the supervisor said of itself, None until then.
        checked: what it said of the job, None until then.
        started: whether it has been told to start the ranks.
        lost: why the host is gone, "" while it is not; where nothing was started, what ssh found.
        ended: ranks that have ended since somebody looked.
        complaint: what went wrong with the start of a rank.
        noise: what ssh, or a supervisor that broke, said last on stderr.
        leaving: whether it has been told to end.
    """

    def __init__(self, crew: Crew, python: str, shown: bool, tie: Callable[[], None], report: Callable[[str], None]) -> None:
        self.crew = crew
        self._report = report
        self.ranks = {rank: RemoteRank(rank, crew.host.name if shown else "", self) for rank in crew.ranks}
        self.hello: dict[str, Any] | None = None
        self.checked: dict[str, Any] | None = None
        self.started = False
        self.lost = ""
        self.ended: list[RemoteRank] = []
        self.complaint = ""
        self.streams: dict[tuple[int, int], RemoteStream] = {}
        self.feeds = {rank: RemoteFeed(rank, self) for rank in crew.ranks}
        self.noise = b""
        self.leaving = False
        self._code: int | None = None
        self._marked = False
        self._before = b""  # what a login shell printed before the supervisor spoke
        self._reader = Reader()
        self._process = subprocess.Popen(
            _ssh.command(crew.host, [python, *_PROGRAM]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours to hand on
            preexec_fn=tie,
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self._fds = [pipe.fileno() for pipe in (self._stdin, self._stdout, self._stderr)]
        for fd in self._fds:
            os.set_blocking(fd, False)
        self._out = Sink(self._fds[0], BACKLOG_BYTES)
        self._heard = self._beaten = time.monotonic()

    # --- the loop

    def wants(self) -> Iterator[Want]:
        """Yield what to call when: descriptor, whether at all, event, call."""
        to, out, err = self._fds
        yield to, not self._stdin.closed and bool(self._out.waiting), select.POLLOUT, self._write
        yield out, not self._stdout.closed, select.POLLIN, self._read
        yield err, not self._stderr.closed, select.POLLIN, self._read_noise

    @property
    def due(self) -> float | None:
        """When ``attend`` has something to do."""
        return None if self._closed else min(self._beaten + BEAT_SECONDS, self._heard + SILENCE_SECONDS)

    def attend(self, now: float) -> None:
        """Do what no event calls for."""
        if self._closed:
            return
        for stream in self.streams.values():
            stream.make_room()
        if self.hello is not None and self._beaten + BEAT_SECONDS <= now:
            self.send(Kind.BEAT)
        if self._beaten + BEAT_SECONDS <= now:
            self._beaten = now
        if self.hello is not None and self._heard + SILENCE_SECONDS <= now:
            self.lose(f"no sign of life from {self.crew.host.name} for {SILENCE_SECONDS:g} seconds")

    @property
    def has_said_all(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._out.waiting

    def wake_up(self) -> None:
        """Begin to listen anew, after this process was stopped: what was said meanwhile has not been heard yet."""
        self._heard, self._beaten = time.monotonic(), 0.0

    def send(self, kind: Kind, rank: int = 0, payload: bytes | memoryview | int | dict[str, Any] = b"") -> None:
        if not self.lost and not self.leaving and self._out.broken is None:
            self._out.waiting += frame(kind, rank, payload)

    def _write(self) -> None:
        self._out.write()

    def _read(self) -> None:
        if self._stdout.closed:  # since poll() called it ready
            return
        try:
            data = os.read(self._fds[1], READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._stdout.close()
            self._see_end()
            return
        self._heard = time.monotonic()
        if not self._marked:
            data = self._after_mark(data)
        for said in self._reader.feed(data):
            self._act(said)

    def _after_mark(self, data: bytes) -> bytes:
        self._before += data
        before, mark, after = self._before.partition(MARK)
        self._marked = bool(mark)
        self._before = before if mark else self._before[-_NOISE_BYTES:]
        return after

    def _read_noise(self) -> None:
        if self._stderr.closed:
            return
        try:
            data = os.read(self._fds[2], READ_BYTES)
        except BlockingIOError:
            return
        self.noise = (self.noise + data)[-_NOISE_BYTES:]
        if not data:
            self._stderr.close()

    # --- what the supervisor says

    def _act(self, said: Frame) -> None:
        rank = self.ranks.get(said.rank)
        if said.kind == Kind.HELLO:
            self.hello = said.json
        elif said.kind == Kind.CHECKED:
            self.checked = said.json
        elif said.kind == Kind.REFUSED:
            self._refuse(said)
        elif rank is not None:
            self._about(rank, said)

    def _refuse(self, said: Frame) -> None:
        """The supervisor could not start a rank; it has not tried the ones after it."""
        self.complaint = self.complaint or f"cannot start {self.ranks[said.rank]}: {said.payload.decode(errors='replace')}"
        for rank in self.ranks.values():
            if not rank.pid:
                self._silence(rank)

    def _silence(self, rank: RemoteRank) -> None:
        """Nothing more can come of a rank, or reach it."""
        rank.gone = True
        self.feeds[rank.index].refused()
        for (index, _), stream in self.streams.items():
            if index == rank.index and not stream.closed:
                stream.close()

    def _about(self, rank: RemoteRank, said: Frame) -> None:
        if said.kind in (Kind.OUT, Kind.ERR):
            self.streams[rank.index, said.kind].arrive(said.payload)
        elif said.kind == Kind.STARTED:
            rank.pid = said.number
            self._report(f"{rank} is process {rank.pid}")
        elif said.kind == Kind.EXIT and rank.code is None:
            rank.code = said.number
            self.ended.append(rank)
        elif said.kind == Kind.GONE:
            rank.gone = True
        elif said.kind == Kind.READ and said.number < 0:
            self.feeds[rank.index].refused()
        elif said.kind == Kind.READ:
            self.feeds[rank.index].make_room(said.number)

    # --- the end

    @property
    def _closed(self) -> bool:
        return self._code is not None and self._stdout.closed

    @property
    def over(self) -> bool:
        """Whether nothing more can come of this host."""
        return bool(self.lost) or self._closed or (self.leaving and self._stdout.closed)

    def reaped(self, status: int) -> None:
        """Note how ssh ended."""
        self._code = self._process.returncode = os.waitstatus_to_exitcode(status)
        self._see_end()

    @property
    def code(self) -> int | None:
        """The exit code of ssh, None while it runs."""
        return self._code

    def _see_end(self) -> None:
        if self._closed and not self._stderr.closed:
            self._read_noise()
        if self._closed and not self.leaving:
            self.lose(self._last_words())

    def _last_words(self) -> str:
        lines = [line for line in self.noise.decode(errors="replace").splitlines() if line.strip()]
        how = f"killed by signal {-(self._code or 0)}" if (self._code or 0) < 0 else f"ended with code {self._code}"
        return lines[-1].strip() if lines else f"the connection has ended (ssh {how})"

    def lose(self, why: str) -> None:
        """Give the host up: whoever is on it will notice that we have gone."""
        if self.lost:
            return
        self.lost = why
        self.kill()
        for rank in self.ranks.values():
            if rank.code is None and self.started:
                rank.code = _ssh.FAILED
                self.ended.append(rank)
            self._silence(rank)

    def leave(self, *, sweep: bool) -> None:
        """Tell the supervisor that the job is over: to end, and with ``sweep`` to kill what is left first."""
        self.send(Kind.END, 0, int(sweep))
        self.leaving = True

    def kill(self) -> None:
        """End ssh, and with it the connection."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)  # not by Popen, which would reap it
