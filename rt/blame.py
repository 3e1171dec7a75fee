"""Who is to blame: reports, and how every rank comes to the same verdict.

May live here: the two messages and the rules of judgement. May not: sockets and threads (``rt.control`` floods what is decided here),
what a verdict does to a group.

Whoever sees something wrong *reports* it; each distinct report is flooded once on all control connections, so it reaches
everyone, over a ring of neighbours too. Rank 0 turns the first report of a case into a *verdict* at once and floods that. Others
wait 200 ms for it and then take the smallest (sequence, culprit) they know. A flood is on its way before the verdict is handed to
this process, which may end on it: so on every path the cause arrives before its consequences (the EOFs of ranks that gave up).
Without rank 0, consequences come at least 200 ms after their cause and independent reports of one accident within milliseconds of
each other: only reports of the first 100 ms compete, and only with each other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Literal, get_args

Kind = Literal["lost", "mismatch", "timeout", "aborted", "protocol"]
Key = tuple[int, int]

_NO_SEQUENCE = 2**63 - 1  # a closed connection knows of no call, and says less than a report that does
_TEXT_LIMIT = 4000  # characters; keeps a message well within a frame
_SETTLE_SECONDS = 0.2
_CONCURRENT_SECONDS = 0.1
_TYPES = [str, int, int, int, str, str]


@dataclass(frozen=True)
class Report:
    """A suspicion.

    Attributes:
        kind: what went wrong.
        group: 64-bit id of the group it concerns; 0 = every group that contains ``culprit``.
        sequence: the call it concerns, in that group's count.
        culprit: rank in the world, -1 where unknown.
        work: the call in words, or "".
        text: one line for people.
    """

    kind: Kind
    group: int
    sequence: int
    culprit: int
    work: str
    text: str

    @classmethod
    def of_rank(cls, kind: Kind, culprit: int, text: str) -> Report:
        """A report that concerns a rank and no call in particular."""
        return cls(kind, 0, _NO_SEQUENCE, culprit, "", text)

    @property
    def key(self) -> Key:
        """What gets one verdict: a group, or one rank."""
        return self.group, self.culprit if self.group == 0 else -1

    def verdict(self) -> Verdict:
        """The same, as the one to blame the failure on."""
        return Verdict(*astuple(self))

    def pack(self) -> bytes:
        """Write the message."""
        fields = astuple(self)
        return json.dumps([*fields[:4], *(text[:_TEXT_LIMIT] for text in fields[4:])]).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Report:
        """Read the message. Raises ValueError where the bytes are none."""
        try:
            fields = json.loads(payload)
        except RecursionError:
            fields = None
        if not isinstance(fields, list) or [type(each) for each in fields] != _TYPES or fields[0] not in get_args(Kind):
            raise ValueError("a malformed report")
        return cls(*fields)


@dataclass(frozen=True)
class Verdict(Report):
    """The report that all ranks blame the failure on."""


def _precedence(report: Report) -> tuple[int, int, int, str]:
    """The smallest wins where rank 0 does not decide; the last two fields only make the order total."""
    return report.sequence, report.culprit, report.group, report.text


@dataclass
class _Case:
    """What is known under one key before its verdict."""

    opened: float
    reports: list[Report]


class Judge:
    """Turns reports into verdicts: the rules of this file's docstring.

    Args:
        at_once: whether this is rank 0.
        loop: tells the time and calls back.
        decide: called once per key with the chosen report.
    """

    def __init__(self, at_once: bool, loop: asyncio.AbstractEventLoop, decide: Callable[[Report], None]) -> None:
        self._at_once = at_once
        self._loop = loop
        self._decide = decide
        self._open: dict[Key, _Case] = {}
        self._closed: set[Key] = set()

    def hear(self, report: Report) -> None:
        """Take note of a report."""
        if report.key in self._closed:
            return
        if self._at_once:
            self.settle(report)
            return
        now = self._loop.time()
        case = self._open.get(report.key)
        if case is None:
            self._open[report.key] = _Case(now, [report])
            self._loop.call_later(_SETTLE_SECONDS, self._expire, report.key)
        elif now - case.opened <= _CONCURRENT_SECONDS:
            case.reports.append(report)

    def settle(self, report: Report) -> None:
        """Make ``report`` the verdict of its key, unless that has one."""
        if report.key not in self._closed:
            self._closed.add(report.key)
            self._open.pop(report.key, None)
            self._decide(report)

    def _expire(self, key: Key) -> None:
        case = self._open.get(key)
        if case is None:
            return
        # Cases of the same accident go together, in an order that does not depend on who heard of which first.
        together = [other.reports for other in self._open.values() if other.opened - case.opened <= _CONCURRENT_SECONDS]
        chosen = [min(reports, key=_precedence) for reports in together]
        for report in sorted(chosen, key=_precedence):
            self.settle(report)
