"""The output of ranks on its way to ours: cut into lines, each with its rank in front, never mixed and never lost.

May live here: lines, prefixes, and the two queues in front of our stdout and stderr. May not: processes, and waiting: ``rt.launch`` calls
when a descriptor is ready or a line is due.
"""

from __future__ import annotations

import os
import re
import select
import time
from dataclasses import dataclass, field
from typing import IO

UNFINISHED = 0.05  # seconds after which the beginning of a line is shown without its end
BACKLOG_BYTES = 1 << 20  # unwritten output at which ranks are no longer read from
READ_BYTES = 1 << 16

_LINE = re.compile(rb"[^\r\n]*(?:\r?\n|\r(?=[^\n]))")  # a last "\r" waits: it may be half of "\r\n"


@dataclass(eq=False)
class Sink:
    """One of our own outputs. Lines of many sources wait here until it takes them; ``source`` has shown a line without its end."""

    fd: int
    waiting: bytearray = field(default_factory=bytearray)
    source: object = None
    broken: OSError | None = None

    def put(self, source: object, prefix: bytes, text: bytes, *, finished: bool) -> None:
        """Queue a piece of a line; the prefix goes in front unless the piece goes on where ``source`` stopped."""
        if self.broken:
            return
        if source is not self.source:
            if self.source is not None:
                self.waiting += b"\n"  # another source's unfinished line: break it, never mix it
            if text != b"\r":  # back to the beginning of an empty line: a progress line is about to follow
                self.waiting += prefix
        self.waiting += text
        self.source = None if finished else source

    def write(self) -> None:
        """Write what fits; a sink whose reader has gone is ``broken`` and swallows the rest."""
        try:
            written = os.write(self.fd, self.waiting[: select.PIPE_BUF])  # so much a pipe that poll() calls writable takes without blocking
        except OSError as error:  # the reader has gone
            self.broken = error
            self.waiting.clear()
        else:
            del self.waiting[:written]


@dataclass(eq=False)
class Stream:
    """The stdout or stderr of one rank: cuts what arrives into lines, ended by a newline or by the carriage return of a progress line."""

    pipe: IO[bytes]
    prefix: bytes
    sink: Sink
    fd: int
    pending: bytes = b""
    due: float | None = None  # when the pending beginning of a line is to be shown

    def read(self) -> None:
        """Take what is there; at the end of file show the rest and close."""
        try:
            text = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return
        if text:
            self.feed(text, time.monotonic())
        else:
            self.close()

    def drain(self) -> None:
        """Take what fits in a pipe, and close: whoever still holds the other end is not waited for."""
        for _ in range(BACKLOG_BYTES // READ_BYTES):
            if not self.pipe.closed:
                self.read()
        self.close()

    def close(self) -> None:
        """Show what is kept and close the pipe."""
        self.flush()
        self.pipe.close()

    def feed(self, text: bytes, now: float) -> None:
        """Pass whole lines on and keep the rest until it is ``due``."""
        text, at = self.pending + text, 0
        while found := _LINE.match(text, at):
            self.sink.put(self, self.prefix, found[0], finished=True)
            at = found.end()
        if at or not self.pending:
            self.due = now + UNFINISHED
        self.pending = text[at:]
        if not self.pending:
            self.due = None

    def flush(self) -> None:
        """Show the beginning of a line without its end."""
        if self.pending:
            self.sink.put(self, self.prefix, self.pending, finished=self.pending.endswith(b"\r"))
        self.pending, self.due = b"", None
