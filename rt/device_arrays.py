"""Arrays of CuPy as the collectives see them: their form and address, without the items, which only the device can read.

May live here: what stands for such an array while a call is checked, and the few things that are done with it on its device. May not: which
groups take such arrays (``nccl_group``), NCCL (``transports.nccl``).

The checks of a call ask for shape, dtype and which memory is shared, and nothing of that needs the items. So an array on a device passes
through them as an ``OnDevice``: a NumPy array at the device's address. Whatever would read it there raises instead.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_OF_ADDRESSES = (np.may_share_memory, np.shares_memory)


class OnDevice(np.ndarray[Any, Any]):
    """Form and address of an array in a device's memory.

    Attributes:
        owner: the array of CuPy.
    """

    owner: Any = None
    __array_ufunc__ = None  # type: ignore[assignment]

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function in _OF_ADDRESSES:
            return super().__array_function__(function, types, args, kwargs)
        if function is np.copyto and all(isinstance(each, OnDevice) for each in args):
            target, source = args
            return _cupy().copyto(target.owner, source.owner, casting="unsafe")
        raise TypeError(f"numpy.{function.__name__} cannot read an array on a device")


def on_device(x: Any) -> OnDevice | None:
    """Return what stands for an array of CuPy, None for anything else."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(x, cupy.ndarray):
        return None
    low = sum((side - 1) * step for side, step in zip(x.shape, x.strides, strict=True) if step < 0) if x.size else 0
    high = sum((side - 1) * step for side, step in zip(x.shape, x.strides, strict=True) if step > 0) + x.itemsize if x.size else 0
    memory: Any = (ctypes.c_char * (high - low)).from_address(x.data.ptr + low if x.size else 1)
    found = OnDevice(x.shape, x.dtype, memory, -low, x.strides if x.size else None)
    found.owner = x
    return found


def owner(found: Any) -> Any:
    """Return the array of CuPy that something stands for."""
    return found.owner


def fresh(shape: tuple[int, ...], dtype: Any) -> OnDevice:
    """Return new memory on the current device."""
    found = on_device(_cupy().empty(shape, dtype))
    assert found is not None
    return found


def packed(found: OnDevice, dtype: Any = None) -> OnDevice:
    """Return a copy on the same device, C-contiguous, made in the order of the current stream."""
    with found.owner.device:
        copy = fresh(found.shape, found.dtype if dtype is None else dtype)
        _cupy().copyto(copy.owner, found.owner, casting="unsafe")
    return copy


def _cupy() -> Any:
    return sys.modules["cupy"]
