"""The device memory of the stand-in: host memory, at an address that only kernels can follow."""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np

_WRONG = 1 << 54  # away from what the host can touch
_lock = threading.Lock()
_blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()


class Block:
    """A piece of a device's memory."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(max(nbytes, 1), 0xA5, np.uint8)
        self.start, self.size = self.bytes.ctypes.data, nbytes


class MemoryPointer:
    """As CuPy's: an address, and what keeps the memory there."""

    def __init__(self, mem: Block, offset: int, device_id: int) -> None:
        self.mem, self._offset, self.device_id = mem, offset, device_id
        self.ptr = mem.start + _WRONG + offset

    def moved(self, by: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset + by, self.device_id)


def allocate(nbytes: int) -> MemoryPointer:
    """Return memory on the current device."""
    from cupy.cuda import Device

    block = Block(nbytes)
    with _lock:
        _blocks[block.start] = block
    return MemoryPointer(block, 0, Device().id)


def at(ptr: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Return the bytes at an address. ValueError where they are not all in one block of memory."""
    address = ptr - _WRONG
    with _lock:
        blocks = list(_blocks.values())
    for block in blocks:
        if block.start <= address and address + nbytes <= block.start + block.size:
            found = (ctypes.c_char * nbytes).from_address(address)
            found.kept = block
            return found
    if nbytes == 0:
        return (ctypes.c_char * 0)()
    raise ValueError(f"{nbytes} bytes at {ptr:#x} are not in device memory")
