"""NCCL through CuPy: what it needs, and how a collective of ours is said in its words.

May live here: finding CuPy and a device, NCCL's types and operators, the calls with their arguments. May not: groups, waiting, threads
(``rt.nccl_group``), how the ranks meet (``rt.nccl_world``). Nothing of CuPy is loaded before it is asked for.

A call of ours becomes calls of a communicator and what is done on the same stream before and after them (:class:`Exchange`). What moves
and is not combined moves as bytes. Names and argument orders are those of ``cupy.cuda.nccl``; the operations are NCCL's
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html), and gathers and scatters are its grouped messages
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/p2p.html).
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rt import device_arrays
from rt.device_arrays import OnDevice
from rt.dtypes import ITEMSIZE, DType, Op
from rt.schedule import Collective

if TYPE_CHECKING:
    from rt.group import Call

_INSTALL = "`pip install 'rt-collectives[cuda12]'` (or [cuda13], by the CUDA of the driver) installs CuPy and NCCL"
_BY_HOST = "pass cupy.asnumpy(x), which travels over the ring's links"


# -- the library --------------------------------------------------------------------------------------------------------------------------


def missing() -> str:
    """Return what keeps NCCL from being used here and what to do about it, "" if nothing does. Uses no device."""
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return f"which needs CuPy, and this Python ({sys.executable}) has none: {_INSTALL}"
    try:
        cupy, nccl = load()
    except Exception as error:  # CuPy says by many kinds that a library of CUDA's is not there
        return f"which needs a CuPy that can be loaded: {str(error).strip().splitlines()[0]}; {_INSTALL}"
    if not nccl.available:
        return f"which needs NCCL, and CuPy {getattr(cupy, '__version__', '')} found no libnccl.so.2: {_INSTALL}"
    try:
        found, why = cupy.cuda.runtime.getDeviceCount(), ""
    except Exception as error:
        found, why = 0, f" ({error})"
    return "" if found else f"which needs a CUDA device, and CuPy found none here{why}; expected 'ring' or 'mpi'"


def load() -> tuple[Any, Any]:
    """Return the modules ``cupy`` and ``cupy.cuda.nccl``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where libnccl is not there, which ``missing`` says
        import cupy
        from cupy.cuda import nccl
    return cupy, nccl


# -- types and operators ------------------------------------------------------------------------------------------------------------------

_TYPES = {
    DType.BOOL: "UINT8", DType.INT8: "INT8", DType.UINT8: "UINT8", DType.INT16: "INT32", DType.UINT16: "UINT32", DType.INT32: "INT32",
    DType.UINT32: "UINT32", DType.INT64: "INT64", DType.UINT64: "UINT64", DType.FLOAT16: "FLOAT16", DType.BFLOAT16: "BFLOAT16",
    DType.FLOAT32: "FLOAT32", DType.FLOAT64: "FLOAT64", DType.COMPLEX64: "FLOAT32", DType.COMPLEX128: "FLOAT64",
}  # fmt: skip
_WIDE = {DType.INT16: "int32", DType.UINT16: "uint32"}  # NCCL has none of 16 bits; what wraps there wraps the same when it is cut
_COMPLEX = (DType.COMPLEX64, DType.COMPLEX128)
_OPS = {Op.SUM: "SUM", Op.PROD: "PROD", Op.MIN: "MIN", Op.MAX: "MAX", Op.MEAN: "AVG"}
# Of 0 and 1 as bytes. A sum of bytes wraps at 256, which leaves its lowest bit.
_BOOLS = {Op.SUM: "MAX", Op.MAX: "MAX", Op.OR: "MAX", Op.PROD: "MIN", Op.MIN: "MIN", Op.AND: "MIN", Op.XOR: "SUM"}
_PARTS_OF_COMPLEX = {Op.SUM: "SUM", Op.MEAN: "AVG"}
_REDUCING = {Collective.ALL_REDUCE, Collective.REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE_SCATTER_V}


def _operator(dtype: DType, op: Op) -> str | None:
    return (_BOOLS if dtype is DType.BOOL else _PARTS_OF_COMPLEX if dtype in _COMPLEX else _OPS).get(op)


def check(what: str, call: Call) -> None:
    """Refuse what NCCL cannot carry.

    Raises:
        TypeError: the operation, or its operator on this dtype.
        ValueError: a tag.
    """
    if call.kind in (Collective.SCAN, Collective.EXSCAN):
        raise TypeError(f"{what}: NCCL has no prefix reductions; {_BY_HOST}")
    if call.kind in _REDUCING and _operator(call.dtype, call.op) is None:
        raise TypeError(f"{what}: NCCL has no operator {call.op.name.lower()!r} for {call.dtype.name.lower()}; {_BY_HOST}")
    if call.kind in (Collective.SEND, Collective.RECV) and call.tag:
        raise ValueError(f"{what}: NCCL has no tags, found tag={call.tag}, expected 0 for an array on a device; or {_BY_HOST}")


# -- calls --------------------------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """A call of ours as calls of NCCL.

    Attributes:
        calls: of a communicator, in NCCL's group where there are several: method, and its arguments but for the stream.
        after: what is left to do on the stream; None: nothing.
        kept: arrays that must live until the end.
    """

    calls: list[tuple[Any, ...]]
    after: Callable[[], None] | None = None
    kept: tuple[Any, ...] = ()


class Wording:
    """Says the calls of one group in NCCL's words.

    Args:
        cupy, nccl: what ``load`` returns.
        rank, size: of the group.
    """

    def __init__(self, cupy: Any, nccl: Any, rank: int, size: int) -> None:
        self._cupy, self._nccl = cupy, nccl
        self._rank, self._size = rank, size

    def say(self, call: Call, source: OnDevice | None, target: OnDevice | None) -> Exchange:
        """Return what carries out a call. Conversions of the input are launched here, on the current stream."""
        if call.kind in _REDUCING:
            assert source is not None
            return self._reduction(call, source, target)
        return self._moved(call, source, target)

    def launch(self, comm: Any, exchanges: Sequence[Exchange], stream: Any) -> None:
        """Launch calls on a stream, which must be the current one; several together, in one group of NCCL's."""
        calls = [call for exchange in exchanges for call in exchange.calls]
        together = len(calls) > 1
        if together:
            self._nccl.groupStart()
        try:
            for name, *arguments in calls:
                getattr(comm, name)(*arguments, stream.ptr)
        finally:
            if together:
                self._nccl.groupEnd()
        for exchange in exchanges:
            if exchange.after is not None:
                exchange.after()

    # Reductions

    def _reduction(self, call: Call, source: OnDevice, target: OnDevice | None) -> Exchange:
        """Widen what must be, and cut the result."""
        dtype, result = call.dtype, target
        wide = _WIDE.get(dtype)
        if wide is not None:
            source = device_arrays.packed(source, wide)
            result = device_arrays.fresh(target.shape, wide) if target is not None else None
        op = getattr(self._nccl, f"NCCL_{_operator(dtype, call.op)}")
        calls = self._combined(call, source, result, getattr(self._nccl, f"NCCL_{_TYPES[dtype]}"), op)

        def after() -> None:
            assert target is not None and result is not None
            if wide is not None:
                self._cupy.copyto(target.owner, result.owner, casting="unsafe")
            else:  # the parity of a number of trues
                flags = target.owner.view("uint8")
                self._cupy.bitwise_and(flags, 1, out=flags)

        finishes = target is not None and (wide is not None or (dtype is DType.BOOL and call.op is Op.XOR))
        return Exchange(calls, after if finishes else None, (source, result))

    def _combined(self, call: Call, source: OnDevice, result: OnDevice | None, of: int, op: int) -> list[tuple[Any, ...]]:
        kind, given, got = call.kind, _address(source), _address(result)
        parts = 2 if call.dtype in _COMPLEX else 1
        if kind is Collective.ALL_REDUCE:
            return [("allReduce", given, got, source.size * parts, of, op)]
        if kind is Collective.REDUCE:
            return [("reduce", given, got, source.size * parts, of, op, call.root)]
        if kind is Collective.REDUCE_SCATTER:
            return [("reduceScatter", given, got, source.size // self._size * parts, of, op)]
        calls = []
        for root, (start, items) in enumerate(_blocks(call.counts, call.shape)):
            mine = got if root == self._rank else 0
            calls.append(("reduce", given + start * source.itemsize, mine, items * parts, of, op, root))
        return calls

    # Movements

    def _moved(self, call: Call, source: OnDevice | None, target: OnDevice | None) -> Exchange:
        kind, size, me = call.kind, self._size, self._rank
        byte = self._nccl.NCCL_UINT8
        if kind is Collective.BROADCAST:
            assert source is not None
            return Exchange([("broadcast", _address(source), _address(target), source.nbytes, byte, call.root)])
        if kind is Collective.ALL_GATHER:
            assert source is not None
            return Exchange([("allGather", _address(source), _address(target), source.nbytes, byte)])
        if kind in (Collective.SEND, Collective.RECV):
            sends = kind is Collective.SEND
            array = source if sends else target
            assert array is not None
            return Exchange([("send" if sends else "recv", _address(array), array.nbytes, byte, call.root)])
        kept: tuple[Any, ...] = ()
        if kind in (Collective.ALL_TO_ALL, Collective.ALL_TO_ALL_V) and call.alias is not None:
            assert source is not None
            source = device_arrays.packed(source)  # what comes would be written over what is still to go
            kept = (source,)
        there, back = self._pieces(call)
        calls = []
        for peer in range(size):
            own = peer == me and call.alias is not None and not kept  # it lies there already
            for name, array, pieces in (("send", source, there), ("recv", target, back)):
                start, nbytes = pieces.get(peer, (0, 0))
                if nbytes and not own:
                    calls.append((name, _address(array) + start, nbytes, byte, peer))
        return Exchange(calls, None, kept)

    def _pieces(self, call: Call) -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]:
        """Return where in the input begins what each rank is sent, and its bytes, and the same of the output and what each sends."""
        kind, size, root, me = call.kind, self._size, call.root, self._rank
        if kind in (Collective.ALL_TO_ALL, Collective.SCATTER):
            blocks = _blocks((call.shape[0] // size,) * size, call.shape)
        elif kind is Collective.GATHER:
            blocks = _blocks((1,) * size, (size, *call.shape))
        else:
            blocks = _blocks(call.counts[:size], (0, *call.shape[1:]))
        sent = back = _bytes(blocks, call.dtype)
        if kind is Collective.ALL_TO_ALL_V:
            back = _bytes(_blocks(call.counts[size:], (0, *call.shape[1:])), call.dtype)
        everybody = range(size)
        if kind in (Collective.SCATTER, Collective.SCATTER_V):
            return {peer: sent[peer] for peer in everybody if me == root}, {root: (0, sent[me][1])}
        if kind in (Collective.GATHER, Collective.GATHER_V):
            return {root: (0, sent[me][1])}, {peer: sent[peer] for peer in everybody if me == root}
        if kind is Collective.ALL_GATHER_V:
            return {peer: (0, sent[me][1]) for peer in everybody}, dict(enumerate(back))
        return dict(enumerate(sent)), dict(enumerate(back))


def _address(array: OnDevice | None) -> int:
    return 0 if array is None else int(array.owner.data.ptr)


def _blocks(rows: Sequence[int], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return where each block begins and its items, from its rows and the shape of an array of them."""
    of_row, found, start = math.prod(shape[1:]), [], 0
    for count in rows:
        found.append((start, count * of_row))
        start += count * of_row
    return found


def _bytes(blocks: list[tuple[int, int]], dtype: DType) -> list[tuple[int, int]]:
    return [(start * ITEMSIZE[dtype], items * ITEMSIZE[dtype]) for start, items in blocks]
