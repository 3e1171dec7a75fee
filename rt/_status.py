"""What a rank says when ``rt.doctor --job`` asks what it is doing.

May live here: opening the door at which the doctor knocks, and what one rank knows about itself. May not: knocking (``_doors``), passing
questions on to other ranks (``rt.control``), judgement (``_doctor_job``).

The door costs nothing while nobody knocks.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from rt import _doors, _fastpath
from rt._doors import Facts
from rt.aio import Work

if TYPE_CHECKING:
    from rt.world import World

_QUESTION_SECONDS = 5.0
_CALLS_MOST = 20
_OWN_FOLDERS = tuple(os.path.dirname(os.path.abspath(each)) + os.sep for each in (__file__, asyncio.__file__, threading.__file__))


class Door:
    """Answers whoever knocks and may ask; its methods belong to the thread of the loop.

    Args:
        loop: answers in it.
        job: identity of the job; a part of it is in the name, for the doctor to tell jobs apart.
        rank: this rank.
        answer: makes the answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, job: str, rank: int, answer: Callable[[], Awaitable[Facts]]) -> None:
        self._loop = loop
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind("\0" + _doors.new_name(job, rank))
        self._listener.listen(4)
        self._tasks = {loop.create_task(self._open())}

    def fileno(self) -> int:
        """The descriptor on which it listens."""
        return self._listener.fileno()

    def close(self) -> None:
        """Answer nobody any more."""
        for task in self._tasks:
            task.cancel()
        self._listener.close()

    async def _open(self) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(self._listener)
            self._tasks.add(task := self._loop.create_task(self._serve(sock)))
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError, TimeoutError):
            if _doors.user_of(sock) in (os.geteuid(), 0):
                answer = await self._answer()
                async with asyncio.timeout(_QUESTION_SECONDS):
                    await self._loop.sock_sendall(sock, json.dumps(answer).encode())


def process() -> Facts:
    """What this process is, and where its main thread stands."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "at": place()}


def place() -> str:
    """Return where the program's own code stands in the main thread: ``train.py:42 in load``, "" if nowhere."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def describe(world: World) -> Facts:
    """What a rank of a formed world is doing: the calls in flight and for whom each waits; ranks are those of the world."""
    works = _fastpath.works_of(world.engine)
    libraries = {f"{group.identity:x}": (group, found) for group in world.groups.values() if (found := group.in_library()) is not None}
    calls = [_call(world, work) for work in works[:_CALLS_MOST]]
    calls += [_call_of_library(*call) for _, found in libraries.values() for call in found.works[:_CALLS_MOST]]
    broken = [str(group.failure(Work(group))) for group in world.groups.values() if group.failure is not None]
    return {
        **process(),
        "rank": world.rank,
        "calls": calls,
        "calls_more": max(0, len(works) - _CALLS_MOST),
        "libraries": {
            identity: {"ranks": list(group.ranks), "called": found.called, "heard": found.heard}
            for identity, (group, found) in libraries.items()
        },
        "last": {f"{group.identity:x}": group.latest() for group in world.groups.values() if group.latest()},
        "broken": broken[:1],
        "timeout": world.timeout,
        "links": world.links(),
        "moved": sum(world.engine.statistics()[way] for way in ("bytes_in", "bytes_out")),
    }


def _call(world: World, work: Any) -> Facts:
    absent, late = world.engine.waiting_for(work)
    return {
        "what": work.describe(),
        "group": f"{work.group.identity:x}",
        "name": work.group.name,
        "seconds": time.monotonic() - work.since if work.since else None,
        "absent": absent,
        "late": late,
    }


def _call_of_library(work: Work, since: float | None) -> Facts:
    """Whom it waits for only all ranks together know (``_doctor_job``)."""
    return {
        "what": work.describe(),
        "group": f"{work.group.identity:x}",
        "name": work.group.name,
        "seconds": time.monotonic() - since if since is not None else None,
        "absent": [],
        "late": [],
        "library": True,
        "sequence": work.sequence,
        "peer": None if work.peer is None else work.group.ranks[work.peer],
    }
