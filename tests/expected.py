"""Data for tests of collectives, and what NumPy makes of them.

May live here: inputs, expected results, and how the two are compared. May not: tests, ranks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np

from rt.dtypes import HALF, INEXACT, DType, Op, numpy_dtype

Array = np.ndarray[Any, Any]


def sample(dtype: DType, shape: Any, rank: int, seed: int = 0) -> Array:
    """Items whose sums and products are exact in float32, so that the order of a reduction does not show; integers of any size."""
    rng = np.random.default_rng([seed, rank])
    to = numpy_dtype(dtype)
    if dtype in INEXACT:
        x = rng.integers(-7, 8, shape)
        return np.asarray(x + 1j * rng.integers(-7, 8, shape) if to.kind == "c" else x).astype(to)
    if dtype is DType.BOOL:
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    low, high = np.iinfo(to).min, np.iinfo(to).max
    return np.asarray(rng.integers(low, high, shape, to, endpoint=True))


def reduced(dtype: DType, op: Op, arrays: list[Array]) -> Array:
    """The reduction, rounded once."""
    to = arrays[0].dtype
    with np.errstate(all="ignore"):
        if dtype in HALF:
            return reduced(DType.FLOAT32, op, [x.astype(np.float32) for x in arrays]).astype(to)
        stack = np.stack(arrays)
        if op is Op.MEAN:
            total = np.asarray(stack.sum(axis=0, dtype=to))
            parts = total.reshape(-1).view(total.real.dtype)  # NumPy divides complex numbers by complex numbers, and rounds twice
            return (parts / parts.dtype.type(len(arrays))).view(to).reshape(total.shape)
        if dtype is DType.BOOL and op in (Op.SUM, Op.PROD):
            op = Op.OR if op is Op.SUM else Op.AND
        ufunc = {
            Op.SUM: np.add, Op.PROD: np.multiply, Op.MIN: np.minimum, Op.MAX: np.maximum,
            Op.AND: np.bitwise_and, Op.OR: np.bitwise_or, Op.XOR: np.bitwise_xor,
        }[op]  # fmt: skip
        return np.asarray(ufunc.reduce(stack, axis=0, dtype=to))


def same(found: Any, expected: Array, *label: object) -> None:
    """Equal in kind, dtype, shape and every item; NaN equals NaN."""
    assert isinstance(found, np.ndarray), (*label, type(found))
    forms = (found.dtype, found.shape), (expected.dtype, expected.shape)
    assert forms[0] == forms[1], (*label, *forms)
    a, b = (x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for x in (found, expected))
    if not np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"):
        wrong = np.flatnonzero((a != b).reshape(-1))
        first = a.reshape(-1)[wrong[0]], b.reshape(-1)[wrong[0]]
        raise AssertionError(f"{label}: {len(wrong)} of {a.size} differ, first [{wrong[0]}]: {first[0]!r}, not {first[1]!r}")


class Digest:
    """What ranks compare at the end: every bit of everything they got."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, array: Array) -> None:
        self._hash.update(array.tobytes())

    def value(self) -> str:
        return self._hash.hexdigest()

