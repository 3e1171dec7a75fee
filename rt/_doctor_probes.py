"""The probes of ``rt.doctor``: one process per host, started through ssh, asked by lines of JSON, with a time limit on everything.

May live here: starting, asking, ending. May not: what is asked (``_doctor_network``), what a probe does (``_probe``).

A host need not have this version of ``rt``, nor any: the probe's source goes there on its stdin. The interpreter is named on the command
line, all else comes on stdin: no shell needs to be known, and no token is seen by other users of the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import rt._doors
import rt._probe
import rt.errors
import rt.interfaces
from rt._ssh import FAILED, command, explain
from rt.hostfile import Host

START_SECONDS = 15.0
_END_SECONDS = 2.0
_OLDEST = (3, 11)

_SENT = (rt.errors, rt.interfaces, rt._doors, rt._probe)  # in the order in which they import each other
_FIRST = "import sys,json;exec(json.loads(sys.stdin.buffer.readline()))"
_LOADER = """\
import types
print("\\nrt-probe", *sys.version_info[:3], flush=True)
for name, source in json.loads(sys.stdin.buffer.readline()):
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.modules["rt._probe"].main()
"""


class Silent(Exception):
    """A host did not do what was asked.

    Attributes:
        advice: what to do about it, or "".
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.advice = advice


class RemoteProbe:
    """A probe on a host; ``start`` it, ``ask`` it, ``end`` it."""

    def __init__(self, host: Host, python: str, words: Sequence[str] | None = None) -> None:
        """Prepare.

        Args:
            host: where.
            python: the interpreter there.
            words: for tests: the whole command line instead of ssh's.
        """
        self.host = host
        self._python = python
        self._words = list(words) if words is not None else command(host, [python, "-c", _FIRST])
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()
        self._heard = b""
        self._late = False

    def start(self) -> None:
        """Start it and wait until it is ready. Raises Silent: with the reason and what to do."""
        try:
            # In our session: Ctrl-C ends all of them with us.
            self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0)
        except OSError as error:
            raise Silent(f"cannot run {self._words[0]}: {error.strerror}") from None
        until = time.monotonic() + START_SECONDS
        self._write(json.dumps(_LOADER))
        while True:  # the login shell may have things to say
            line = self._line(until, f"{self._python} to start").split()
            if line[:1] == [b"rt-probe"]:
                break
        version = tuple(int(each) for each in line[1:4])
        if version < _OLDEST:
            found = ".".join(map(str, version))
            raise Silent(f"{self._python} is Python {found}; rt needs {_OLDEST[0]}.{_OLDEST[1]}", "name another with --python")
        self._write(json.dumps([["rt", ""], *([module.__name__, _source(module)] for module in _SENT)]))

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Return the answer to one request. Raises Silent: none came within ``seconds``, or the probe could not."""
        if self._late:  # its answer may still come
            raise Silent("it has stopped answering")
        self._write(json.dumps({"do": do, **arguments}))
        try:
            answer = json.loads(self._line(time.monotonic() + seconds, f"the answer to {do!r}"))
        except ValueError:
            raise Silent(f"the probe wrote something else than an answer to {do!r}") from None
        if "problem" in answer:
            raise Silent(f"{do}: {answer['problem']}")
        return dict(answer)

    def end(self) -> None:
        """End it; on the other side it ends with its input."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def _write(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # whoever reads the answer will say why
            self._process.stdin.write(line.encode() + b"\n")

    def _line(self, until: float, what: str) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        began = time.monotonic()
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            rest = until - time.monotonic()
            if rest <= 0 or not select.select([pipe], [], [], rest)[0]:
                self._late = True
                raise Silent(f"waited {time.monotonic() - began:.0f} s for {what}", "is it overloaded, or its disk or home folder gone?")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise self._died()
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _died(self) -> Silent:
        assert self._process is not None
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        said = self._errors.read()
        if code == FAILED and not self.host.is_local:
            return Silent(*explain(self.host, said))
        last = (said.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        if code in (126, 127):
            return Silent(f"no Python at {self._python}: {last}", "install rt there, in the same place, or name its Python with --python")
        return Silent(f"the probe ended with exit code {code}: {last}")


def _source(module: Any) -> str:
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()
