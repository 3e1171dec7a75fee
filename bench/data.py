"""The numbers that ranks put into collectives when they are measured, and what must come out of reducing them.

May live here: those numbers. May not: who gets which of them (``collectives.py``); an import of more than NumPy, at module level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES = {  # nccl-tests' name -> NumPy's
    "int8": "int8", "uint8": "uint8", "int32": "int32", "uint32": "uint32", "int64": "int64", "uint64": "uint64",
    "half": "float16", "float": "float32", "double": "float64", "bfloat16": "bfloat16",
}  # fmt: skip
OPS = {"sum": "sum", "prod": "prod", "max": "max", "min": "min", "avg": "mean"}  # nccl-tests' name -> rt's
_PERIOD = 1021  # prime, so a chunk or segment that lands in the wrong place does not look right
_SMALL = 61  # of half types: their sums stay exact for four ranks, whatever the order


class Data:
    """What all ranks put in, and what comes of reducing it. Small whole numbers, so every right result is exact (see ``_SMALL``).

    Args:
        size: number of ranks.
        sends: items of each rank's input.
        dtype: of the input, by name.
        op: rt's name of the operator.
    """

    def __init__(self, size: int, sends: int, dtype: str, op: str = "sum", root: int = 0) -> None:
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: F401  # which gives NumPy the name
        self.size = size
        self.root = root
        self._sends = sends
        self._dtype = np.dtype(dtype)
        self._op = op

    def _period(self, rank: int) -> Array:
        numbers = np.arange(_PERIOD) * (rank % (_PERIOD - 1) + 1) % _PERIOD
        if self._dtype.itemsize == 2:
            numbers = numbers % _SMALL
        return (1 + (numbers % 2 if self._op == "prod" else numbers)).astype(self._dtype)  # powers of 2 stay exact for long

    def of(self, rank: int) -> Array:
        """Return the input of a rank."""
        return np.resize(self._period(rank), self._sends)

    def block(self, array: Array, rank: int) -> Array:
        """Return a rank's block of an array that holds one per rank."""
        length = len(array) // self.size
        return array[rank * length : (rank + 1) * length]

    def together(self, pieces: list[Array]) -> Array:
        """Return arrays one behind the other."""
        return np.concatenate(pieces)

    def reduced(self) -> Array:
        """Return the reduction of all inputs: integers wrap, floating results are rounded once."""
        rows = np.array([self._period(rank).astype(np.int64) for rank in range(self.size)])
        if self._op == "mean":
            period = (rows.sum(axis=0) / self.size).astype(self._dtype)
        else:
            period = getattr(rows, self._op)(axis=0).astype(self._dtype)
        return np.resize(period, self._sends)
