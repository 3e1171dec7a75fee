"""The doors of the ranks of a host: Unix sockets with abstract names, at which ``rt.doctor --job`` knocks.

May live here: how doors are called, finding them, knocking. May not: what a rank answers (``_status``), what follows from it
(``_doctor_job``); of ``rt`` anything: this file is sent to hosts of another version (``_doctor_probes``).

An abstract name goes with the process however that ends. The kernel tells both sides who is at the other end, and each talks with its own
user only, or with root.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import time
from typing import Any

SUPPORTED = sys.platform == "linux"  # nobody else has names that vanish
PREFIX = "rt-job"

_ANSWER_SECONDS = 4.0
_ALL_SECONDS = 20.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_NAME = re.compile(rf"@({PREFIX}/([0-9a-f]+)/(\d+)/[0-9a-f]+)$", re.M)

Facts = dict[str, Any]


def new_name(job: str, rank: int) -> str:
    """Return how the door of a rank is called. Not after the process' number: that of another container may be the same."""
    return f"{PREFIX}/{job[:8]}/{rank}/{os.urandom(4).hex()}"


def listed(text: str) -> dict[str, dict[int, list[str]]]:
    """Return from the text of ``/proc/net/unix`` the names of doors, per job and rank."""
    found: dict[str, dict[int, list[str]]] = {}
    for name, job, rank in _NAME.findall(text):
        found.setdefault(job, {}).setdefault(int(rank), []).append(name)
    return found


def user_of(sock: socket.socket) -> int:
    """Return the user at the other end of a connected Unix socket."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[1])


def ask(wanted: str = "") -> dict[str, dict[int, Facts]]:
    """Ask the ranks of every job of this host and user, or of those whose identity begins with ``wanted``.

    A rank of a group that has formed speaks for all, so it is the last of its job to be asked; before that each speaks for itself only.

    Returns:
        Per job and rank what was answered, in the words of ``rt.control``; an empty answer is that of a rank which said nothing in time.

    Raises:
        OSError: this system has no such doors.
    """
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        jobs = listed(file.read())
    until = time.monotonic() + _ALL_SECONDS
    found = {job: _ask_job(ranks, until) for job, ranks in sorted(jobs.items()) if job.startswith(wanted)}
    return {job: answers for job, answers in found.items() if answers}


def _ask_job(ranks: dict[int, list[str]], until: float) -> dict[int, Facts]:
    answers: dict[int, Facts] = {}
    for rank, names in sorted(ranks.items()):
        said = [answer for answer in (_knock(name, until) for name in names) if answer is not None]
        if said:
            answers[rank] = next(filter(None, said), {})
            if answers[rank].get("formed"):
                break
    return answers


def _knock(name: str, until: float) -> Facts | None:
    """Return what a rank answers, nothing where nothing comes in time; None where it is another user's, or has gone."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(max(0.1, min(_ANSWER_SECONDS, until - time.monotonic())))
            sock.connect(f"\0{name}")
            if os.geteuid() not in (0, user_of(sock)):
                return None
            return _answer(sock)
    except BlockingIOError:  # so many have knocked that no more can wait: it is stopped
        return {}
    except OSError:
        return None


def _answer(sock: socket.socket) -> Facts:
    pieces = []
    try:
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
        found = json.loads(b"".join(pieces))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
