"""What a collective is: a list of steps over three kinds of buffers, as plain data.

May live here: the types a schedule is made of, and the contract between who writes schedules (``algorithms``) and who runs them (the
engine). May not: anything that decides (``choose``), computes steps (``algorithms``) or runs them (the engine).

The contract
------------
* The steps of a rank are a *sequential program*. The engine may run them concurrently and item by item; it derives every hazard
  (read-after-write, write-after-read, write-after-write) from the ranges the steps name, so schedules hold no dependency words.
* A program is right whether INPUT and OUTPUT are different memory or the same: at equal offsets (all-reduce, broadcast, reduce, scan, and
  all-to-all with equal blocks), with INPUT being this rank's block of OUTPUT (all-gather, gather), or with OUTPUT being this rank's block
  of INPUT (reduce-scatter, scatter). A COPY onto itself is void.
* Between two ranks, the k-th SEND on (peer, lane) meets the k-th RECV or RECV_REDUCE on (peer, lane): same count, same wire dtype.
* Steps are per chunk: their number depends on ranks and lanes, never on bytes. Steps of no items do not occur.
* The dtype of a buffer is that of x; only TEMPs may be *wide*, which is float32 and occurs only where x is a half type. A SEND puts the
  dtype of its buffer on the wire, a RECV takes that of its buffer. All buffers of a REDUCE, a SCALE or a COPY share one dtype, and so do
  the local operand and the destination of a RECV_REDUCE; there the wire is of x's dtype, or wide where ``wire_wide`` says so.
* A TEMP holds nothing in particular at first. (The barriers send such an item: only its arrival matters.)
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a step does; the engine switches on these numbers."""

    SEND = 0
    RECV = 1
    RECV_REDUCE = 2
    COPY = 3
    REDUCE = 4
    SCALE = 5
    CONVERT = 6


class Collective(enum.IntEnum):
    """What was called; part of the wire format (ranks compare it), so numbers never change."""

    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    BROADCAST = 4
    BARRIER = 5
    SEND = 6
    RECV = 7
    REDUCE = 8
    GATHER = 9
    SCATTER = 10
    ALL_TO_ALL = 11
    ALL_GATHER_V = 12
    REDUCE_SCATTER_V = 13
    GATHER_V = 14
    SCATTER_V = 15
    ALL_TO_ALL_V = 16
    SCAN = 17
    EXSCAN = 18


INPUT = 0
OUTPUT = 1
TEMP = 2  # TEMP + i is temps[i]


class Step(NamedTuple):
    """One move or reduction of ``count`` items. Offsets and counts are in items, never bytes.

    Attributes:
        kind: what is done (:class:`Kind`).
        peer: rank in the group of the other side; -1 in local steps.
        lane: number of the stream to that peer and direction.
        src: buffer id. SEND: sent from; RECV_REDUCE: the local operand; local steps: the first (left) operand.
        src_off: first item in ``src``.
        src2: REDUCE only: buffer id of the second (right) operand.
        src2_off: first item in ``src2``.
        dst: buffer id of the destination, of all kinds but SEND.
        dst_off: first item in ``dst``.
        count: number of items.
        wire_left: RECV_REDUCE: the received items are the left operand (dst = wire op src); else dst = src op wire.
        wire_wide: RECV_REDUCE: the received items are float32 although x is a half type.

    SCALE divides by the size of the group, which the engine knows. CONVERT goes between x's dtype and wide, as the buffers say.
    """

    kind: Kind
    peer: int = -1
    lane: int = 0
    src: int = -1
    src_off: int = 0
    src2: int = -1
    src2_off: int = 0
    dst: int = -1
    dst_off: int = 0
    count: int = 0  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a step
    wire_left: bool = False
    wire_wide: bool = False


class Temp(NamedTuple):
    """One scratch buffer of ``count`` items (possibly none), float32 if ``wide``, else of x's dtype."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    wide: bool


class Schedule(NamedTuple):
    """The program of one rank for one collective; ``name`` says which algorithm it is and is the same on all ranks."""

    steps: tuple[Step, ...]
    temps: tuple[Temp, ...]
    name: str
