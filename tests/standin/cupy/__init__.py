"""A stand-in for CuPy, for tests on machines without a GPU: the few names of it that rt uses, over host memory.

May live here: arrays "on a device". May not: streams, events and devices (``cupy.cuda``), NCCL (``cupy.cuda.nccl``), anything of rt.

It is no CuPy: it has the names and argument orders of CuPy 14, and what they mean as far as rt relies on it. Device memory is host memory
at a wrong address: who touches it on the host, as nobody can touch a GPU's, dies by SIGSEGV. Kernels run later, in their stream's order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupy import cuda
from cupy.cuda import _memory


class ndarray:
    """An array in device memory, C-contiguous unless it is a step through another."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.data = memptr if memptr is not None else _memory.allocate(self.nbytes)
        self.strides = self._packed() if strides is None else strides
        self.device = cuda.Device(self.data.device_id)

    def _packed(self) -> tuple[int, ...]:
        return tuple(self.dtype.itemsize * math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    @property
    def flags(self) -> Any:
        """As much of them as rt asks for."""
        packed = self.size < 2 or all(
            side == 1 or step == due for side, step, due in zip(self.shape, self.strides, self._packed(), strict=True)
        )
        return type("Flags", (), {"c_contiguous": packed})()

    def _host(self) -> np.ndarray[Any, Any]:
        """Return the items, for kernels: in the thread of a stream only."""
        extent = sum((side - 1) * step for side, step in zip(self.shape, self.strides, strict=True)) + self.itemsize if self.size else 0
        found = np.frombuffer(_memory.at(self.data.ptr, extent), np.uint8)
        return np.ndarray(self.shape, self.dtype, found, 0, self.strides)

    def __getitem__(self, key: Any) -> ndarray:
        """Cut along axis 0."""
        start, stop, step = key.indices(self.shape[0])
        count = len(range(start, stop, step))
        part = self.data.moved(start * self.strides[0])
        return ndarray((count, *self.shape[1:]), self.dtype, part, (self.strides[0] * step, *self.strides[1:]))

    def get(self) -> np.ndarray[Any, Any]:
        """Return a copy on the host, when the current stream has come here."""
        found: list[Any] = []
        stream = cuda.get_current_stream()
        stream._launch(lambda: found.append(self._host().copy()))
        stream.synchronize()
        return found[0]

    def astype(self, dtype: Any) -> ndarray:
        fresh = empty(self.shape, dtype)
        copyto(fresh, self, casting="unsafe")
        return fresh

    def view(self, dtype: Any) -> ndarray:
        assert np.dtype(dtype).itemsize == self.itemsize
        return ndarray(self.shape, dtype, self.data, self.strides)

    def copy(self) -> ndarray:
        return self.astype(self.dtype)

    def reshape(self, *shape: Any) -> ndarray:
        assert self.flags.c_contiguous
        return ndarray(np.empty(self.shape, np.uint8).reshape(*shape).shape, self.dtype, self.data)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("a stand-in")


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def asarray(items: Any) -> ndarray:
    """Copy an array of the host to the current device."""
    if isinstance(items, ndarray):
        return items
    given = np.array(items, order="C")
    fresh = empty(given.shape, given.dtype)
    cuda.get_current_stream()._launch(lambda: np.copyto(fresh._host(), given))
    return fresh


def ascontiguousarray(a: ndarray) -> ndarray:
    return a if a.flags.c_contiguous else a.copy()


def asnumpy(a: ndarray) -> np.ndarray[Any, Any]:
    return a.get()


def copyto(dst: ndarray, src: ndarray, casting: str = "same_kind") -> None:
    cuda.get_current_stream()._launch(lambda: np.copyto(dst._host(), src._host(), casting=casting))


def bitwise_and(a: ndarray, b: int, out: ndarray) -> ndarray:
    cuda.get_current_stream()._launch(lambda: np.bitwise_and(a._host(), np.uint8(b), out=out._host()))
    return out
