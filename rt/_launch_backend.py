"""Which backend a job gets that names none: NCCL where every rank can have it, else the ring.

May live here: the question to the Python of a host's ranks, both ends of it, and the decision by all answers. May not: what NCCL needs
(``transports.nccl``), what ranks are told (``_launch_plan``).

Nobody asked for NCCL, so nothing that is broken on the way to it is an error, and where our Python has no CuPy nothing is started to find
that out. CuPy is loaded in a process of its own: it takes a second, may hang or crash, and its libraries do not bear a fork. That process
gets a time, and a second to go when it is killed: a driver that hangs may keep it for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rt._forward import READ_BYTES
from rt._launch_loop import Loop

SECONDS = 10  # for an answer
_LAST_SECONDS = 1  # for a process that was killed to go
# Python that has no CuPy need not load rt to say so. What CuPy prints is nobody's, and what it starts does not hold the pipe of the answer.
# The alarm is for a launcher that was killed meanwhile.
_QUESTION = f"""
import importlib.util, os, signal
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm({SECONDS})
told = os.dup(1)
os.dup2(2, 1)
if importlib.util.find_spec("cupy") is None:
    os.write(told, b'rt-found [false, 0, "has no CuPy"]\\n')
else:
    from rt import _launch_backend
    _launch_backend.answer(told)
"""
_ANSWER = re.compile(rb"rt-found (.*)\n")  # whatever a wrapper around Python may have printed before


class Found(NamedTuple):
    """What there is for NCCL on a host.

    Attributes:
        cupy: whether CuPy is installed, though perhaps broken.
        gpus: how many GPUs CUDA shows to a process with the ranks' environment, as CUDA_VISIBLE_DEVICES allows.
        lacks: why the ranks there cannot have NCCL, as what follows the host's name in a sentence; "" if they can.
    """

    cupy: bool
    gpus: int
    lacks: str


_NO_CUPY = Found(False, 0, "has no CuPy")


def decide(hosts: Sequence[tuple[str, int, Found]]) -> tuple[str, str]:
    """Return the backend, "" for what ranks take by themselves, which is the ring, and why it is that one.

    Args:
        hosts: of each its name, the number of its ranks, and what it has found.

    Returns:
        The reason is "" where CuPy is nowhere: nobody will wonder.
    """
    short = [f"{name} {found.lacks or _too_few(found.gpus, ranks)}" for name, ranks, found in hosts if found.lacks or found.gpus < ranks]
    if not short:
        return "nccl", "backend nccl: CuPy, NCCL and a GPU for each rank are there; --backend ring is without"
    return "", f"backend ring: {'; '.join(short)}" if any(found.cupy for _, _, found in hosts) else ""


def _too_few(gpus: int, ranks: int) -> str:
    return f"has {gpus} GPU{'' if gpus == 1 else 's'} for {ranks} ranks"


class Question:
    """A Python that is finding out what it has for NCCL.

    Attributes:
        due: when it is given up, which ``attend`` does.
    """

    def __init__(self, loop: Loop, python: str, cwd: str | None, environ: Mapping[str, str], call: Callable[[Found], None]) -> None:
        none = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [python, "-P", "-c", _QUESTION],
            stdin=none,
            stdout=subprocess.PIPE,
            stderr=none,
            bufsize=0,
            cwd=cwd,
            env=environ,
            start_new_session=True,  # Ctrl-C is ours
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        self._said = b""
        self._loop, self._call = loop, call
        self.due = time.monotonic() + SECONDS
        loop.want(self._out.fileno(), True, select.POLLIN, self._read)

    def attend(self, now: float) -> None:
        """Give up what is too late."""
        if self.due <= now:
            self._end()

    def _read(self) -> None:
        data = os.read(self._out.fileno(), READ_BYTES)
        self._said += data
        if not data or _ANSWER.search(self._said):
            self._end()

    def _end(self) -> None:
        said = _ANSWER.search(self._said)
        self.stop()
        self._call(Found(*json.loads(said[1])) if said else Found(True, 0, f"crashed, or took {SECONDS} seconds, when asked for CuPy"))

    def stop(self) -> None:
        """End it, with what it started; does nothing where it has ended, also where its end was reaped by others."""
        self._loop.want(self._out.fileno(), False, 0, self._read)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody, or only zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_SECONDS)
        self._out.close()


def ask(loop: Loop, command: Sequence[str], cwd: str | None, environ: Mapping[str, str], call: Callable[[Found], None]) -> Question | None:
    """Find out what the ranks of this host have for NCCL, and ``call`` with it: at once where that is plain, else from the loop.

    Args:
        loop: reads the answer.
        command: the ranks' program, with what runs it in front.
        cwd: where they run.
        environ: their environment.
        call: gets the answer, once.

    Returns:
        What is to be stopped if the answer is not waited for; None if it has been given.
    """
    python = command[0]
    if "RT_BACKEND" in environ:
        call(Found(False, 0, f"has RT_BACKEND={environ['RT_BACKEND']}"))
    elif python != sys.executable and not re.fullmatch(r"python[\d.]*t?", os.path.basename(python)):  # it may be any program
        call(Found(False, 0, f"runs {os.path.basename(python)}, of which nobody knows whether it is Python"))
    elif _is_ours(python, environ) and not _has_cupy():
        call(_NO_CUPY)
    else:
        try:
            return Question(loop, python, cwd, environ, call)
        except OSError:  # the ranks will not start either, and say so
            call(_NO_CUPY)
    return None


def _is_ours(python: str, environ: Mapping[str, str]) -> bool:
    """Whether what this process would import is what ``python`` would. One file may be the Python of several environments."""
    same = all(of(python) == of(sys.executable) for of in (os.path.dirname, os.path.realpath))
    return same and environ.get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def _has_cupy() -> bool:
    """Whether this Python may have it."""
    try:
        return importlib.util.find_spec("cupy") is not None
    except Exception:  # of somebody's finder of modules: let it break a process of its own
        return True


def answer(told: int) -> None:
    """Write to a descriptor what this Python, which has CuPy, has for NCCL."""
    from transports import nccl

    why = nccl.missing()
    gpus = 0 if why else nccl.load()[0].cuda.runtime.getDeviceCount()
    os.write(told, b"rt-found %s\n" % json.dumps(Found(True, gpus, why and f"cannot have nccl, {why}")).encode())
