"""A world whose arrays a library moves: what the ranks called is told and compared, and its failures become the world's.

May live here: comparing calls, time limits of works that a library carries out, leaving when they have ended. May not: a library's words,
how its ranks meet (``mpi_world``, ``nccl_world``), its groups (``library_group``).

Nothing of ours is on a library's wire. So each rank tells rank 0, over the control connections, what it called, and rank 0 compares.
"""

from __future__ import annotations

import concurrent.futures
import json
import time
import weakref
from typing import Any, cast

from rt import _fastpath, config, library_calls
from rt import world as worlds
from rt.aio import Work
from rt.blame import Report
from rt.errors import GroupBrokenError, MismatchError, ProtocolError
from rt.group import CoreGroup
from rt.library_group import LibraryGroup
from rt.library_waiting import Requests, patiently

_PATIENCE_SECONDS = 0.5  # until an error of the library is taken for the cause of a failure: a death is heard of within that
_COMPARE_SECONDS = 0.05  # between a call and its comparison: one message then tells of all calls meanwhile
_LATE, _LEFT = b"late ", b"left "


class LibraryWorld(worlds.World):
    """One engine, one control thread, a library, and the groups on them.

    Attributes:
        library: its name, for messages.
        unsaid: what may differ between calls that are the same in words, for messages.
    """

    library = ""
    unsaid = ""
    leave_seconds = 5.0  # for which a rank that leaves waits for its own works

    def __init__(self, settings: config.RingConfig) -> None:
        super().__init__(settings)
        self._left: dict[tuple[int, int], library_calls.Left] = {}  # by group and rank
        self.requests = Requests()
        self.library_drivers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._comparing = False
        self._comparison = library_calls.Comparison(self.unsaid)
        self.whole = True  # when it was left: no failure keeps ranks from ending the library together

    # -- comparing

    def _meet(self, ring: config.RingConfig, future: concurrent.futures.Future[CoreGroup]) -> None:
        super()._meet(ring, future)
        assert self.control is not None
        self.control.on_calls = self._hear_calls

    def compare_soon(self) -> None:
        """Have rank 0 compare what this rank called with what the others did, in a while and all at once."""
        if self.control is not None and not self._comparing:
            self._comparing = True
            self.control.later(_COMPARE_SECONDS, self._compare)

    def _compare(self) -> None:
        """In the control thread: tell rank 0 what was called since the last time."""
        assert self.control is not None
        self._comparing = False
        for group in list(self.groups.values()):
            if isinstance(group, LibraryGroup):
                for message in group.take_called().pack():
                    self.control.tell_calls(message)
                if group.called:
                    self.compare_soon()

    def _hear_calls(self, payload: bytes) -> None:
        """In the control thread: a rank has left; or, on rank 0, told what it called, or that something it called is late."""
        if payload.startswith(_LEFT):
            self._hear_left(payload)
            return
        if payload.startswith(_LATE):
            self.control.later(2 * _COMPARE_SECONDS, self._blame, *json.loads(payload[len(_LATE) :]))  # type: ignore[union-attr]
            return
        found = self._comparison.hear(library_calls.Told.unpack(payload))
        if found is not None:
            known = self.groups.get(found.group)
            culprit = known.ranks[found.ranks[1]] if known is not None else -1
            self._report(Report("mismatch", found.group, found.sequence, culprit, "", found.text))

    def heard(self, group: int) -> list[int]:
        """Return how many calls each rank of a group has told rank 0 of; [] on other ranks."""
        return self._comparison.told(group)

    def left(self, group: int) -> list[library_calls.Left]:
        """Return what the ranks of a group that have left told of it."""
        return [left for (identity, _), left in list(self._left.items()) if identity == group]

    # -- failures

    def limit(self, work: Work, seconds: float) -> None:
        """Give a work that blocks that many seconds."""
        assert self.control is not None
        self.control.later(seconds, self.timed_out, work, seconds)

    def timed_out(self, work: Work, seconds: float) -> None:
        """A time limit expired. Who has not called only rank 0 can know; without it nobody is blamed."""
        late = cast(Work, work.pending())
        if not late.lent:
            super().timed_out(work, seconds)
        elif late.state == _fastpath.FLYING and self.control is not None:
            facts = [late.group.identity, late.sequence, late.describe(), f"not done {seconds:g} s after rank {late.group.rank} called"]
            self.control.later(0, self.control.tell_calls, _LATE + json.dumps(facts).encode())
            self.control.later(_PATIENCE_SECONDS, self._still_late, late, facts)

    def _still_late(self, work: Work, facts: list[Any]) -> None:
        if work.state == _fastpath.FLYING and work.group.failure is None:
            self._report(Report("timeout", facts[0], facts[1], -1, facts[2], facts[3]))

    def _blame(self, group: int, sequence: int, work: str, text: str) -> None:
        """On rank 0: say who is late, as far as ranks told."""
        known = self.groups.get(group)
        absent = self._comparison.behind(group, sequence) if known is not None else []
        if absent:
            text += f"; it waits for rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}, which did not call"
        self._report(Report("timeout", group, sequence, known.ranks[absent[0]] if known is not None and absent else -1, work, text))

    def library_failed(self, group: CoreGroup, work: Work, error: Exception, differs: bool) -> None:
        """The library raised in a call; all ranks of the group are told. ``differs``: because ranks called different things."""
        # The death of a rank, and a disagreement, are heard of by themselves, and say more.
        until = time.monotonic() + _PATIENCE_SECONDS
        while group.failure is None and time.monotonic() < until:
            time.sleep(0.01)
        kind: type[GroupBrokenError] = MismatchError if differs else ProtocolError
        text = f"{self.library} on rank {self.rank}: {str(error).strip()}"
        self._report(Report("mismatch" if differs else "protocol", group.identity, work.sequence, -1, work.describe(), text))
        group.fail(group.broken(kind, None, text))

    # -- leaving

    def leave(self) -> None:
        """Leave in order, when own works have ended, which the library may limit. Idempotent."""
        if not (self.closed or self.orphan):
            self._tell_left()
            until = time.monotonic() + self.leave_seconds
            if not self.broken:
                patiently(self._nothing_open, lambda: self.broken or time.monotonic() > until)
            self.whole = not self.broken
            if self.whole:
                self._end_library()
        super().leave()

    def _tell_left(self) -> None:
        """Tell all ranks how often this one has called: who waits for one more call of it would do so for ever."""
        for group in list(self.groups.values()):
            if isinstance(group, LibraryGroup) and self.control is not None:
                self.control.later(0, self.control.tell_all, _LEFT + group.last_calls().pack())

    def _hear_left(self, payload: bytes) -> None:
        """In the control thread: a rank leaves. Those that are connected with it pass it on to those that are not."""
        left = library_calls.Left.unpack(payload[len(_LEFT) :])
        if (left.group, left.rank) in self._left or self.control is None:
            return
        self._left[left.group, left.rank] = left
        self.control.tell_all(payload)
        self._miss(left)
        self.control.later(_COMPARE_SECONDS, self._miss, left)  # a call may have been on its way

    def _miss(self, left: library_calls.Left) -> None:
        group = self.groups.get(left.group)
        if isinstance(group, LibraryGroup) and left.rank != group.rank:
            group.miss(left)

    def _end_library(self) -> None:
        """Do what the library wants done at the end, when nothing is in flight."""

    def _nothing_open(self) -> bool:
        self.requests.poll()
        groups = [group for group in list(self.groups.values()) if isinstance(group, LibraryGroup)]
        return not len(self.requests) and all(group.idle() for group in groups)
