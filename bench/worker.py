"""The worker's end of the conductor's protocol, and what every worker needs: its rank, a loop.

May live here: what all kinds of workers share (``rank.py`` is timed, ``probe.py`` is watched). May not: systems under test; an import of
``rt``, of a peer or of anything but NumPy's types, since peers' interpreters run this too.

Protocol, JSON lines (``conductor.py`` is the other end) over standard input and output, or the socket that BENCH_ENDS has for the rank::

    worker     {"pid": 17, "uses": {...}, ...}                                                      once the group stands
    conductor  {"do": "measure", ...}
    worker     {..., "idle": [cpu seconds, seconds] since the last answer}                          or {"error": "..."}
    conductor  end of file: leave
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Answer = dict[str, Any]
Handler = Callable[[Answer], Answer]


def loop_factory(loop: str) -> tuple[Callable[[], asyncio.AbstractEventLoop], str]:
    """Return a loop factory and the loop's name. ``auto`` is uvloop where it is installed."""
    if loop != "asyncio":
        try:
            import uvloop
        except ImportError:
            if loop == "uvloop":
                raise
        else:
            return uvloop.new_event_loop, f"uvloop {metadata.version('uvloop')}"
    return asyncio.new_event_loop, "asyncio"


class Channel:
    """The worker's end of the protocol, on the descriptors it was started with: where a launcher stands between us, on a socket instead.

    Standard output is given away before any library is loaded: what those print goes to standard error instead.
    """

    def __init__(self) -> None:
        self._in: TextIO = sys.stdin
        if "BENCH_ENDS" in os.environ:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(os.path.join(os.environ["BENCH_ENDS"], str(place()[0])))
                self._in, out = sock.makefile("r", encoding="utf-8"), os.dup(sock.fileno())
        else:
            out = os.dup(1)
        self._out: TextIO = os.fdopen(out, "w", encoding="utf-8")
        os.dup2(2, 1)
        self._cpu = self._wall = 0.0

    def say(self, answer: Answer) -> None:
        """Send one line and start counting how much CPU this process uses while nothing is asked of it."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Answer commands until the conductor closes the pipe. An exception is an answer too."""
        for line in self._in:
            idle = [time.process_time() - self._cpu, time.monotonic() - self._wall]
            command = json.loads(line)
            try:
                answer = handlers[command["do"]](command)
            except Exception:
                answer = {"error": traceback.format_exc()}
            self.say({**answer, "idle": idle})


def place() -> tuple[int, int]:
    """Return rank and size, as the conductor says them; where a launcher stands between us, the rank as that one says it."""
    return int(os.environ[os.environ.get("BENCH_RANK_IN", "BENCH_RANK")]), int(os.environ["BENCH_SIZE"])
