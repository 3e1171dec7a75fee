"""The numbers that dtypes and operators have on the wire and in the kernels.

May live here: the tables that tie NumPy dtypes and operator names to the codes of ``_kernels.h``, and questions answered by those
tables alone. May not: argument checking (``collectives``), arithmetic (``_kernels.h``).
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import numpy as np
import numpy.typing as npt


class DType(enum.IntEnum):
    """Codes of the dtypes the kernels know; part of the wire format, so numbers never change."""

    BOOL = 0
    INT8 = 1
    UINT8 = 2
    INT16 = 3
    UINT16 = 4
    INT32 = 5
    UINT32 = 6
    INT64 = 7
    UINT64 = 8
    FLOAT16 = 9
    BFLOAT16 = 10
    FLOAT32 = 11
    FLOAT64 = 12
    COMPLEX64 = 13
    COMPLEX128 = 14


class Op(enum.IntEnum):
    """Codes of the reduction operators. MEAN travels as SUM and divides once, before rounding."""

    SUM = 0
    PROD = 1
    MIN = 2
    MAX = 3
    AND = 4
    OR = 5
    XOR = 6
    MEAN = 7


ITEMSIZE = (1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 8, 16)
HALF = frozenset({DType.FLOAT16, DType.BFLOAT16})
INEXACT = frozenset({DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64, DType.COMPLEX64, DType.COMPLEX128})
OPS = {op.name.lower(): op for op in Op}

_BY_DTYPE: dict[Any, DType] = {np.dtype(code.name.lower()): code for code in DType if code is not DType.BFLOAT16}


def code_of(dtype: npt.DTypeLike, what: str = "") -> DType:
    """Return the code of ``dtype``; ``what`` names the call, in messages.

    Raises:
        TypeError: the dtype is none that collectives carry; the message lists those that are.
    """
    found = np.dtype(dtype)
    try:
        return _BY_DTYPE[found]
    except KeyError:
        pass
    native = found.newbyteorder("=")
    if native.name == "bfloat16":  # ml_dtypes is the only one to register that name, so it is loaded by now
        _BY_DTYPE[native] = DType.BFLOAT16
        if found.isnative:
            return DType.BFLOAT16
    where = f"{what}: " if what else ""
    if native in _BY_DTYPE:
        raise TypeError(f"{where}{found.name} in foreign byte order is not supported; convert with x.astype(x.dtype.newbyteorder('='))")
    known = ", ".join(code.name.lower() for code in DType)
    raise TypeError(f"{where}dtype {found.name!r} is not supported by collectives; supported: {known}")


@functools.cache
def numpy_dtype(code: int) -> np.dtype[Any]:
    """Return the NumPy dtype of a code (bfloat16 comes from ml_dtypes, loaded when first asked for)."""
    if code == DType.BFLOAT16:
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(DType(code).name.lower())


def op_supported(code: DType, op: Op) -> bool:
    """Say whether ``op`` is defined on a dtype: bitwise operators need bool or integers, mean needs floating or complex."""
    if op is Op.MEAN:
        return code in INEXACT
    if op in (Op.AND, Op.OR, Op.XOR):
        return code not in INEXACT
    return True


def check_op(code: DType, op: Op, what: str) -> None:
    """Raise TypeError if ``op`` is not defined on a dtype."""
    if not op_supported(code, op):
        needed = "floating or complex dtypes" if op is Op.MEAN else "bool or integer dtypes"
        raise TypeError(f"{what}: op {op.name.lower()!r} is for {needed}, not {code.name.lower()}")
