"""``rt.bench kernels``: how fast rt's reduction loops are, beside loops vectorised by hand and beside memory itself.

May live here: what is timed, and the table. May not: the loops (``hand_loops.c``), compiling them (``hand_loops.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import host
from bench.hand_loops import UNROLLS, build
from bench.measure import progress
from rt import _fastpath
from rt.dtypes import ITEMSIZE, DType, Op, numpy_dtype, op_supported

# Bytes per operand. Three operands of 8 KiB lie in every first-level cache (32 KiB or more), so nothing hides slow arithmetic; three of
# 32 KiB, the piece in which ranks share memory, in every second-level cache.
CACHES = {"L1": 8 << 10, "L2": 32 << 10}
MEMORY_BYTES = 64 << 20
DTYPES = tuple(code.name.lower() for code in DType)
OPS = tuple(op.name.lower() for op in Op if op is not Op.MEAN)  # a mean is a sum, and a division elsewhere
SWEEPS = 5  # over the whole table: a neighbour on the host slows the loops down for seconds, and not all alike
ROUNDS = 15  # per sweep
MEMORY_ROUNDS = 3
_SAMPLE_SECONDS = 0.15e-3
_STREAM = (DType.INT64, Op.SUM)  # whatever the bits, an integer is no slower than another

Loop = Callable[[int], None]  # called with how often to go over the arrays


class Arrays:
    """Three operands that lie apart and aligned, and their addresses."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._store = np.zeros(3 * nbytes + 64, np.uint8)
        start = -self._store.ctypes.data % 64
        self.operands = [self._store[start + index * nbytes : start + (index + 1) * nbytes] for index in range(3)]
        dst, left, right = (operand.ctypes.data for operand in self.operands)
        self.addresses = (dst, left, right)

    def fill(self, code: DType) -> None:
        """Put ordinary numbers of a dtype into both sources: 1, 2 and 3, so that nothing overflows or is subnormal."""
        dtype = numpy_dtype(code)
        period: npt.NDArray[Any] = (np.arange(3 * 64) % 3 + 1).astype(dtype)
        for operand in self.operands[1:]:
            operand.view(dtype)[...] = np.resize(period, self.nbytes // dtype.itemsize)


def turns(loops: Sequence[Loop], rounds: int, seconds: float) -> list[list[float]]:
    """Time the loops in turns; return per loop and round the seconds that one pass takes.

    Each sample lasts about ``seconds``, at least one pass, after a pass that is not timed.
    """
    passes = [_passes(loop, seconds) for loop in loops]
    took: list[list[float]] = [[] for _ in loops]
    for _ in range(rounds):
        for index, loop in enumerate(loops):
            loop(1)
            took[index].append(_spent(loop, passes[index]) / passes[index])
    return took


def _passes(loop: Loop, seconds: float) -> int:
    """Return how many passes take about ``seconds``. The least of three trials counts: one that was interrupted would say far too few."""
    passes = 1
    while True:
        spent = min(_spent(loop, passes) for _ in range(3))
        if spent >= seconds / 2:
            return max(1, round(passes * seconds / spent))
        passes *= 2


def _spent(loop: Loop, passes: int) -> float:
    start = time.perf_counter()
    loop(passes)
    return time.perf_counter() - start


def best_of(took: Sequence[Sequence[float]]) -> int:
    """Return which loop is fastest, by its median."""
    return min(range(len(took)), key=lambda index: median(took[index]))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return our speed over theirs: the median over rounds, each against its neighbour."""
    return median(other / mine for mine, other in zip(ours, theirs, strict=True))


def rate(nbytes: int, took: Sequence[float]) -> float:
    """Return GB/s: both sources are read, dst is written (that a cache also reads what is to be written is not counted)."""
    return 3 * nbytes / median(took) / 1e9


def cases(ops: Sequence[str] = OPS, dtypes: Sequence[str] = DTYPES) -> list[tuple[DType, Op]]:
    """Return the combinations that exist, dtype by dtype."""
    pairs = [(DType[dtype.upper()], Op[op.upper()]) for dtype in dtypes for op in ops]
    return [(code, op) for code, op in pairs if op_supported(code, op)]


class Memory:
    """What the loops run on, and the loops by hand."""

    def __init__(self) -> None:
        self.hands = build()
        self.levels = {level: Arrays(nbytes) for level, nbytes in {**CACHES, "memory": MEMORY_BYTES}.items()}
        self.forms = [(hand, unroll) for hand in self.hands for unroll in UNROLLS]

    def ours(self, arrays: Arrays, code: DType, op: Op) -> Loop:
        """Return rt's loop, bound to arrays."""
        found, count = _fastpath.reduce_kernel(code, op), arrays.nbytes // ITEMSIZE[code]
        assert found is not None
        return partial(self.hands[0].repeat, found, arrays.addresses, count)

    def by_hand(self, arrays: Arrays, code: DType, op: Op) -> list[Loop]:
        """Return the loops by hand, bound to arrays, in the order of ``forms``."""
        return [partial(hand.repeat, hand.address(code, op, unroll), arrays.addresses, arrays.nbytes) for hand, unroll in self.forms]


class Case:
    """One combination, and what all sweeps found: per level the seconds of rt's loop, then those of the loops beside it."""

    def __init__(self, memory: Memory, code: DType, op: Op) -> None:
        self.name = f"{op.name.lower()} of {code.name.lower()}"
        self._memory = memory
        self._what = code, op
        self._took: dict[str, list[list[float]]] = {}

    def sweep(self) -> None:
        """Measure it once more, on every level."""
        code, op = self._what
        for level, arrays in self._memory.levels.items():
            arrays.fill(code)
            cached = level in CACHES
            beside = self._memory.by_hand(arrays, code, op) if cached else self._memory.by_hand(arrays, *_STREAM)[-1:]
            loops = [self._memory.ours(arrays, code, op), *beside]
            found = turns(loops, ROUNDS, _SAMPLE_SECONDS) if cached else turns(loops, MEMORY_ROUNDS, 0.0)
            for so_far, more in zip(self._took.setdefault(level, [[] for _ in loops]), found, strict=True):
                so_far += more

    def row(self) -> dict[str, Any]:
        """Return what was found."""
        code, op = self._what
        row: dict[str, Any] = {"dtype": code.name.lower(), "op": op.name.lower()}
        for level, (ours, *others) in self._took.items():
            nbytes, best = self._memory.levels[level].nbytes, best_of(others)
            beside = "hand" if level in CACHES else "stream"
            row[level] = {"bytes": nbytes, "rt": rate(nbytes, ours), beside: rate(nbytes, others[best]), "ratio": ratio(ours, others[best])}
            if level in CACHES:
                hand, unroll = self._memory.forms[best]
                row[level] |= {"hand_bits": hand.bits, "hand_unroll": unroll}
        return row


def run(ops: Sequence[str] = OPS, dtypes: Sequence[str] = DTYPES) -> list[dict[str, Any]]:
    """Measure every combination of operators and dtypes that exists; return a row each, rates in GB/s.

    Raises:
        BenchError: there is nothing to compare with, and why.
    """
    memory = Memory()
    found = [Case(memory, code, op) for code, op in cases(ops, dtypes)]
    for sweep in range(SWEEPS):
        for case in found:
            progress(f"sweep {sweep + 1} of {SWEEPS}: {case.name}")
            case.sweep()
    progress("")
    return [case.row() for case in found]


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    head = "".join(f" | {f'{level}: rt':>8} {'hand':>7} {'by':>5} {'ratio':>5}" for level in CACHES)
    lines = [
        "# rt's reduction loops in GB/s (bytes read and written), and their speed over that of a loop by hand and of memory",
        *host.lines()[:2],
        f"# per operand: L1 {CACHES['L1'] >> 10} KiB, L2 {CACHES['L2'] >> 10} KiB, memory {MEMORY_BYTES >> 20} MiB",
        "# by: bits of a vector, and how many vectors at a time, of the fastest loop by hand; stream: int64 a = b + c by hand",
        f"# {'dtype':<10} {'op':<4}{head} | {'mem: rt':>8} {'stream':>7} {'ratio':>5}",
    ]
    for row in rows:
        line = f"  {row['dtype']:<10} {row['op']:<4}"
        for level in CACHES:
            cell = row[level]
            line += f" | {cell['rt']:>8.1f} {cell['hand']:>7.1f} {cell['hand_bits']:>3}x{cell['hand_unroll']} {cell['ratio']:>5.2f}"
        memory = row["memory"]
        lines.append(f"{line} | {memory['rt']:>8.1f} {memory['stream']:>7.1f} {memory['ratio']:>5.2f}")
    least = [f"{level} {min(row[level]['ratio'] for row in rows):.2f}" for level in (*CACHES, "memory")]
    return "\n".join([*lines, f"# least ratio: {', '.join(least)}"])
