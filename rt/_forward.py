"""The output of ranks on its way to ours: cut into lines, each with its rank in front, never mixed and never lost.

May live here: lines, prefixes, the two queues in front of our stdout and stderr, and the copies in log files. May not: processes, input,
and waiting: ``rt.launch`` calls when a descriptor is ready or a line is due.
"""

from __future__ import annotations

import os
import re
import select
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from typing import IO

UNFINISHED = 0.05  # seconds after which the beginning of a line is shown without its end
BACKLOG_BYTES = 1 << 20  # unwritten output at which ranks are no longer read from, and the most that is kept of a line
READ_BYTES = 1 << 16
TAIL_BYTES, TAIL_LINES = 4096, 10  # of what a rank wrote last, repeated when it fails

_LINE = re.compile(rb"[^\r\n]*(?:\r?\n|\r(?=[^\n]))")  # a last "\r" waits: it may be half of "\r\n"


def reopened(fd: int, flags: int) -> int | None:
    """Open the pipe behind ``fd`` once more, non-blocking; None if it is no pipe or the system cannot.

    To set O_NONBLOCK on ``fd`` itself would change it for all who share it, the user's shell among them.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK)
    except OSError:  # no /proc, another user's pipe, or nobody at its other end: it is used as it is
        return None


@dataclass(eq=False)
class Sink:
    """One of our own outputs. Lines of many sources wait here until it takes them.

    Attributes:
        piece_bytes: how much one write may try. So much as PIPE_BUF a descriptor that poll() calls writable takes without blocking.
        source: who has shown a line without its end.
        latest: who wrote last.
    """

    fd: int
    piece_bytes: int = select.PIPE_BUF
    waiting: bytearray = field(default_factory=bytearray)
    source: object = None
    latest: object = None
    broken: OSError | None = None

    @classmethod
    def to(cls, fd: int) -> Sink:
        """Return a sink that writes as much at once as ``fd`` can take without ever blocking."""
        if (pipe := reopened(fd, os.O_WRONLY)) is not None:
            return cls(pipe, BACKLOG_BYTES)
        mode = os.fstat(fd).st_mode
        at_once = stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(fd))  # a file, /dev/null
        return cls(fd, BACKLOG_BYTES if at_once else select.PIPE_BUF)

    def put(self, source: object, prefix: bytes, text: bytes, *, finished: bool) -> None:
        """Queue whole lines or a piece of one; the prefix goes in front unless the text goes on where ``source`` stopped."""
        if self.broken:
            return
        if source is not self.source:
            if self.source is not None:
                self.waiting += b"\n"  # another source's unfinished line: break it, never mix it
            if text != b"\r":  # back to the beginning of an empty line: a progress line is about to follow
                self.waiting += prefix
        self.waiting += text
        self.latest, self.source = source, None if finished else source

    def answered(self, *, echoed: bool) -> None:
        """End an unfinished line, because it was a prompt and the input has its answer; ``echoed``: the terminal has shown the newline."""
        if self.source is not None and not echoed and not self.broken:
            self.waiting += b"\n"
        self.source = None

    def write(self) -> None:
        """Write what fits; a sink whose reader has gone is ``broken`` and swallows the rest."""
        try:
            with memoryview(self.waiting) as whole, whole[: self.piece_bytes] as piece:
                written = os.write(self.fd, piece)
        except BlockingIOError:
            return
        except OSError as error:  # the reader has gone
            self.broken = error
            self.waiting.clear()
        else:
            del self.waiting[:written]


@dataclass(eq=False)
class Stream:
    """The stdout or stderr of one rank: cuts what arrives into lines, ended by a newline or by the carriage return of a progress line.

    Attributes:
        pipe: where it comes from, None if it comes by ``take``.
        prefix: what stands in front of each line.
        log: a file that gets a copy of everything, as it came.
        complain: told when the log cannot be written; the job goes on without it.
        due: when the pending beginning of a line is to be shown.
    """

    pipe: IO[bytes] | None
    prefix: bytes
    sink: Sink
    fd: int
    log: FileIO | None = None
    complain: Callable[[str], None] = print
    pending: bytearray = field(default_factory=bytearray)
    due: float | None = None
    recent: bytes = b""
    closed: bool = False

    def read(self) -> None:
        """Take what is there; at the end of file show the rest and close."""
        if self.closed:  # since poll() called it ready
            return
        try:
            text = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal that nobody has any more
            text = b""
        if text:
            self.take(text)
        else:
            self.close()

    def take(self, text: bytes) -> None:
        """Show a piece, and remember it."""
        self._copy(text)
        self.feed(text, time.monotonic())

    def catch_up(self) -> None:
        """Take what is there, as much as fits in a pipe."""
        for _ in range(BACKLOG_BYTES // READ_BYTES):
            if self.pipe is not None and not self.closed:
                self.read()

    def drain(self) -> None:
        """Take what is there, and close: whoever still holds the other end is not waited for."""
        self.catch_up()
        self.close()

    def close(self) -> None:
        """Show what is kept and close the pipe."""
        self.flush()
        self.closed = True
        if self.pipe is not None:
            self.pipe.close()
        if self.log is not None:
            self.log.close()

    def feed(self, text: bytes, now: float) -> None:
        """Pass whole lines on and keep the rest until it is ``due``."""
        if b"\r" in text or self.pending.endswith(b"\r"):
            self._feed_progress(text, now)
            return
        end = text.rfind(b"\n") + 1
        if end:  # all whole lines at once: a flood costs a search and a replace, not a call for each line
            lines = bytes(self.pending) + text[: end - 1]
            self.sink.put(self, self.prefix, lines.replace(b"\n", b"\n" + self.prefix) + b"\n", finished=True)
            self.pending.clear()
        self._keep(text[end:], now, anew=bool(end))

    def _feed_progress(self, text: bytes, now: float) -> None:
        whole, at = bytes(self.pending) + text, 0
        while found := _LINE.match(whole, at):
            self.sink.put(self, self.prefix, found[0], finished=True)
            at = found.end()
        anew = bool(at) or not self.pending
        self.pending.clear()
        self._keep(whole[at:], now, anew=anew)

    def _keep(self, text: bytes, now: float, *, anew: bool) -> None:
        if anew or not self.pending:
            self.due = now + UNFINISHED
        self.pending += text
        if not self.pending:
            self.due = None
        elif len(self.pending) >= BACKLOG_BYTES:
            self.flush()

    def flush(self) -> None:
        """Show the beginning of a line without its end."""
        if self.pending:
            self.sink.put(self, self.prefix, bytes(self.pending), finished=self.pending.endswith(b"\r"))
        self.pending.clear()
        self.due = None

    def tail(self) -> list[bytes]:
        """Return the last lines, without their ends; the first of them may lack its beginning, if it is a long one."""
        lines = self.recent.splitlines()
        if len(self.recent) == TAIL_BYTES and len(lines) > 1:
            del lines[0]
        return lines[-TAIL_LINES:]

    def _copy(self, text: bytes) -> None:
        self.recent = (self.recent + text)[-TAIL_BYTES:]
        try:
            left = text
            while self.log is not None and left:
                left = left[self.log.write(left) :]
        except OSError as error:
            assert self.log is not None
            self.complain(f"cannot write {os.fspath(self.log.name)!r}: {error.strerror}; it is not complete")
            self.log.close()
            self.log = None
