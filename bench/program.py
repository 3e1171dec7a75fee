"""A rank's schedule, made ready to be simulated: bytes in place of items, and what each step waits for.

May live here: that translation, and when two ranks' programs are the same but for names. May not: time (``simulator.py``), which ranks
stand for which (``symmetry.py``).

The engine finds the same hazards (``rt/_program.pxi``) by comparing every pair of steps. Here, where a schedule may have 32 000 of them,
only the last write of an item and the reads since then are kept: what was before that follows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from rt.schedule import Kind, Schedule, Step

COMMUNICATING = (Kind.SEND, Kind.RECV, Kind.RECV_REDUCE)


class Move(NamedTuple):
    """One step. ``waits``: pairs of an earlier step and how many bytes of this one are allowed beyond those of it that are done."""

    kind: Kind
    peer: int
    lane: int
    nbytes: int
    waits: tuple[tuple[int, int], ...]


class Program(NamedTuple):
    """The steps of one rank; ``waiters[i]`` are the later steps that wait for step i."""

    moves: list[Move]
    waiters: list[list[int]]

    def renamed(self, name: Callable[[int], int]) -> list[Move]:
        """Return the steps as the rank would have them that ``name`` makes of this one."""
        return [move._replace(peer=name(move.peer)) if move.peer >= 0 else move for move in self.moves]


def compiled(schedule: Schedule, itemsize: int) -> Program:
    """Translate a schedule whose input and output are different memory and whose items are all of one size."""
    if any(temp.wide for temp in schedule.temps):
        raise ValueError(f"{schedule.name}: found float32 scratch of half types, expected items of one size")
    hazards = _hazards(schedule.steps)
    waiters: list[list[int]] = [[] for _ in schedule.steps]
    moves = []
    for index, step in enumerate(schedule.steps):
        waits = tuple((earlier, delta * itemsize) for earlier, delta in hazards[index].items())
        moves.append(Move(step.kind, step.peer, step.lane, step.count * itemsize, waits))
        for earlier, _ in waits:
            waiters[earlier].append(index)
    return Program(moves, waiters)


def _regions(step: Step) -> list[tuple[bool, int, int]]:
    """Return (writes, buffer, first item) of all that a step touches."""
    reads = [(False, buffer, start) for buffer, start in ((step.src, step.src_off), (step.src2, step.src2_off)) if buffer >= 0]
    return [*reads, (True, step.dst, step.dst_off)] if step.dst >= 0 else reads


def _hazards(steps: tuple[Step, ...]) -> list[dict[int, int]]:
    """Return per step: earlier step -> items allowed beyond those of it that are done, the tightest bound of each."""
    edges: dict[int, set[int]] = defaultdict(set)
    for step in steps:
        for _, buffer, start in _regions(step):
            edges[buffer] |= {start, start + step.count}
    cuts = {buffer: sorted(found) for buffer, found in edges.items()}
    wrote: dict[tuple[int, int], tuple[int, int]] = {}  # (buffer, cut) -> (step, first item of its region)
    read: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    found: list[dict[int, int]] = []
    for index, step in enumerate(steps):
        mine: dict[int, int] = {}
        regions = [
            (writes, start, [(buffer, cut) for cut in _between(cuts[buffer], start, step.count)])
            for writes, buffer, start in _regions(step)
        ]
        for writes, start, cells in regions:
            for cell in cells:
                before = [wrote[cell]] if cell in wrote else []
                for earlier, first in before + (read[cell] if writes else []):
                    mine[earlier] = min(mine.get(earlier, first - start), first - start)
        for writes, start, cells in regions:
            for cell in cells:
                if writes:
                    wrote[cell] = (index, start)
                    read[cell] = []
                else:
                    read[cell].append((index, start))
        found.append(mine)
    return found


def _between(cuts: list[int], start: int, count: int) -> list[int]:
    first = bisect_left(cuts, start)
    return cuts[first : bisect_left(cuts, start + count, first)]
