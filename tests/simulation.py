"""Ranks as engines in one thread, joined by memory links: every interleaving is decided by a seed.

May live here: what the engine tests need to build such a world and run it. May not: assertions about results.
"""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from rt import _fastpath
from rt.choose import choose
from rt.dtypes import DType, Op, code_of
from rt.schedule import Collective, Schedule
from transports.memory import MemoryLink, memory_pair

NEVER = 1 << 40


class SimWorld:
    """``size`` engines, every pair joined by ``lanes`` links.

    Args:
        seed: decides who progresses when, and how much of what is possible a link moves.
        cache: bytes of the processors' last level; 0: what it is here.
        wakes: links move all that is possible and tell their peers, and an engine goes on only if it said that it could or was woken:
            a forgotten wake-up is a deadlock.
    """

    def __init__(
        self, size: int, *, lanes: int = 1, capacity: int = 64, seed: int = 0, segment: int = 64, frame: int = 1 << 18, wakes: bool = False,
        cache: int = 0,
    ) -> None:  # fmt: skip
        self.dice = random.Random(seed)
        self.wakes = wakes
        self.awake = set(range(size))
        self.submit_budget = 1 << 20
        dice = None if wakes else self.dice
        self.size, self.lanes = size, lanes
        self.engines = [_fastpath.Engine(pollable=False, segment=segment, frame_most=frame, cache_bytes=cache) for _ in range(size)]
        self.indexes: list[list[int]] = [[] for _ in range(size)]
        self.links: dict[tuple[int, int, int], MemoryLink] = {}
        self.events: list[list[Any]] = [[] for _ in range(size)]
        for rank, engine in enumerate(self.engines):
            engine.set_event_handler(self.events[rank].extend)
        for a in range(size):
            for b in range(a + 1, size):
                for lane in range(lanes):
                    ends = memory_pair(capacity, dice)
                    for rank, peer, end in ((a, b, ends[0]), (b, a, ends[1])):
                        index = self.engines[rank].add_link(peer, end)
                        self.indexes[rank].append(index)
                        self.links[rank, peer, lane] = end
                        end.wake = functools.partial(self._wake, rank, index)
                    ends[0].wake_peer, ends[1].wake_peer = ends[1].wake, ends[0].wake

    def submit(
        self, rank: int, schedule: Schedule, x: np.ndarray | None, out: np.ndarray | None, *, op: Op = Op.SUM, group: int = 1,
        channel: int = 1, ranks: list[int] | None = None, alias: tuple[int, int] | None = None, mark: bytes | list[bytes] = b"",
        dtype: Any = None,
    ) -> _fastpath.Work:
        """Start one rank's part; ``mark`` is what peers compare, or one for every rank of the group."""
        ranks = list(range(self.size)) if ranks is None else ranks
        me = ranks.index(rank)
        links = [0 if r == rank else self.lanes for r in ranks]
        code = code_of(dtype if dtype is not None else (x if x is not None else out).dtype)  # type: ignore[union-attr]
        program = _fastpath.Program(schedule, code, Op.SUM if op is Op.MEAN else op, links, alias)
        work = _fastpath.Work()
        signature = b"".join(struct.pack("<I60s", 0, each) for each in ([mark] if isinstance(mark, bytes) else mark))
        assert me >= 0
        status = self.engines[rank].submit(work, program, group, channel, signature, ranks, len(ranks), x, out, self.submit_budget)
        self._follow(rank, status)
        return work

    def collective(self, rank: int, kind: Collective, x: np.ndarray | None, out: np.ndarray | None, *, op: Op = Op.SUM, root: int = 0,
                   ranks: list[int] | None = None, full_mesh: bool = True, count: int | None = None, counts: Sequence[int] = (),
                   **more: Any) -> _fastpath.Work:
        ranks = list(range(self.size)) if ranks is None else ranks
        array = x if x is not None else out
        dtype = DType.UINT8 if array is None else code_of(array.dtype)
        if count is None:
            count = 0 if array is None else (out.size if kind is Collective.REDUCE_SCATTER and out is not None else array.size)
        schedule = choose(kind, rank=ranks.index(rank), size=len(ranks), count=count, dtype=dtype, op=op, lanes=self.lanes,
                          full_mesh=full_mesh, root=root, counts=counts)
        return self.submit(rank, schedule, x, out, op=op, ranks=ranks, dtype=np.uint8 if array is None else None, **more)

    def step(self, rank: int, budget: int = NEVER) -> int:
        """Let one engine progress once, if it may."""
        if not self.wakes:
            for index in self.indexes[rank]:
                self.engines[rank].ready(index)
        elif rank not in self.awake:
            return _fastpath.BLOCKED
        self.awake.discard(rank)
        return self._follow(rank, self.engines[rank].progress(budget))

    def say_goodbye(self, rank: int) -> None:
        self.engines[rank].say_goodbye()
        self.awake.add(rank)

    def _follow(self, rank: int, status: int) -> int:
        if status == _fastpath.BUDGET:
            self.awake.add(rank)
        return status

    def _wake(self, rank: int, index: int) -> None:
        self.engines[rank].ready(index)
        self.awake.add(rank)

    def stir(self, most: int) -> None:
        """Let random engines progress a few times."""
        for _ in range(self.dice.randint(0, most)):
            self.step(self.dice.randrange(self.size), self.dice.choice((1, 100, NEVER)))

    def run(self, works: list[_fastpath.Work], *, rounds: int = 2_000_000, budget: int = NEVER) -> None:
        """Let engines progress in random order until all works ended; fail if nobody can move any more."""
        still = 0
        before: Any = None
        for _ in range(rounds):
            if all(work.state != 0 for work in works):
                return
            for rank in self.dice.sample(range(self.size), self.size):
                self.step(rank, budget)
            now = [engine.statistics() for engine in self.engines]
            still = still + 1 if now == before else 0
            before = now
            asleep = not self.awake and any(work.state == 0 for work in works) if self.wakes else still > 200
            if asleep:
                stuck = [(rank, engine.in_flight()) for rank, engine in enumerate(self.engines)]
                raise AssertionError(f"deadlock: works in flight per rank {stuck}")
        raise AssertionError("too many rounds")
