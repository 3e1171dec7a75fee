"""One process of ``rt.bench limits``: goes over its arrays again and again, on one core.

May live here: what such a process does. May not: which cores, for how long, what follows from it (``limits.py``); an import of ``rt``.
Run as ``python -m bench.stream`` by ``conductor.py``; the protocol is ``worker.py``'s::

    {"do": "prepare", "bytes": 67108864, "cores": [0, 1]}   arrays of so many bytes; rank i runs on the i-th of the cores
    {"pinned": true}                                       false: this system cannot pin
    {"do": "stream", "kind": "copy", "seconds": 0.3}
    {"passes": [[start, end], ...]}                        in seconds of a clock that all processes of this host share
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bench.worker import Answer, Channel, place

KINDS = {"copy": 2, "add": 3}  # how many times its array's bytes a pass reads and writes


class Stream:
    """The arrays of one process."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._arrays: list[npt.NDArray[np.float32]] = []

    def prepare(self, command: Answer) -> Answer:
        """Go to a core, and make arrays whose pages are there."""
        pinned = hasattr(os, "sched_setaffinity")
        if pinned:
            os.sched_setaffinity(0, {command["cores"][self._rank]})
        self._arrays = [np.full(command["bytes"] // 4, number, np.float32) for number in (0.0, 1.0, 2.0)]
        return {"pinned": pinned}

    def run(self, command: Answer) -> Answer:
        """Stream for so many seconds, at least three passes; say when each began and ended."""
        a, b, c = self._arrays
        kinds: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(a, b), "add": lambda: np.add(b, c, out=a)}
        go = kinds[command["kind"]]
        passes: list[tuple[float, float]] = []
        deadline = time.monotonic() + command["seconds"]
        while len(passes) < 3 or passes[-1][1] < deadline:
            start = time.monotonic()
            go()
            passes.append((start, time.monotonic()))
        return {"passes": passes}


def main() -> None:
    """Serve as the process that the environment says."""
    channel = Channel()
    stream = Stream(place()[0])
    channel.say({"pid": os.getpid(), "uses": {}})
    channel.serve({"prepare": stream.prepare, "stream": stream.run})


if __name__ == "__main__":
    main()
