"""Which backend a job gets that names none: NCCL where every rank can have it, else the ring.

May live here: the question to the Python of a host's ranks, both ends of it, and the decision by all answers. May not: what NCCL needs
(``transports.nccl``), what ranks are told (``_launch_plan``).

Nobody asked for NCCL, so nothing that is broken on the way to it is an error, and where our Python has no CuPy nothing is started to find
that out. CuPy is loaded in a process of its own: it takes a second, may hang or crash, and its libraries do not bear a fork.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from rt._forward import READ_BYTES
from rt._launch_loop import Loop

_SECONDS = 10  # for an answer; less than all hosts have to become ready
# Python that has no CuPy need not load rt to say so. The alarm ends it even inside of a library.
_QUESTION = f"""
import importlib.util, signal
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm({_SECONDS})
if importlib.util.find_spec("cupy") is None:
    print('[false, 0, "has no CuPy"]')
else:
    from rt import _launch_backend
    _launch_backend.answer()
"""


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
    """A Python that is finding out what it has for NCCL."""

    def __init__(self, python: str, cwd: str | None, environ: Mapping[str, str]) -> None:
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

    def watch(self, loop: Loop, call: Callable[[Found], None]) -> None:
        """Have the loop read the answer, and then ``call``."""
        loop.want(self._out.fileno(), True, select.POLLIN, partial(self._read, loop, call))

    def _read(self, loop: Loop, call: Callable[[Found], None]) -> None:
        data = os.read(self._out.fileno(), READ_BYTES)
        self._said += data
        if not data:
            loop.want(self._out.fileno(), False, 0, self.stop)
            self.stop()
            call(self._answer())

    def _answer(self) -> Found:
        try:
            cupy, gpus, lacks = json.loads(self._said.splitlines()[-1])  # CuPy may have printed something before
            return Found(cupy, gpus, lacks)
        except (IndexError, ValueError):
            return Found(True, 0, f"did not say within {_SECONDS} seconds whether CuPy can be used")

    def stop(self) -> None:
        """End it; does nothing where it has ended, also where its end was reaped by others."""
        self._process.kill()
        self._process.wait()
        self._out.close()


def ask(
    loop: Loop, command: Sequence[str], cwd: str | None, environ: Mapping[str, str], call: Callable[[Found], None]
) -> Question | None:
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
    elif python != sys.executable and not os.path.basename(python).startswith("python"):
        call(Found(False, 0, f"runs {os.path.basename(python)}, of which nobody knows whether it is Python"))
    elif _is_ours(python, environ) and importlib.util.find_spec("cupy") is None:
        call(_NO_CUPY)
    else:
        try:
            question = Question(python, cwd, environ)
        except OSError:  # the ranks will not start either, and say so
            call(_NO_CUPY)
        else:
            question.watch(loop, call)
            return question
    return None


def _is_ours(python: str, environ: Mapping[str, str]) -> bool:
    """Whether what this process would import is what ``python`` would. One file may be the Python of several environments."""
    same = os.path.isabs(python) and os.path.dirname(python) == os.path.dirname(sys.executable) and os.path.samefile(python, sys.executable)
    return same and environ.get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def answer() -> None:
    """Print what this Python, which has CuPy, has for NCCL."""
    from transports import nccl

    why = nccl.missing()
    gpus = 0 if why else nccl.load()[0].cuda.runtime.getDeviceCount()
    print(json.dumps(Found(True, gpus, why and f"cannot have nccl, {why}")))
