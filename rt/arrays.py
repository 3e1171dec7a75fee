"""Arrays of whatever library: their memory as NumPy arrays on the way in, results in the caller's own kind on the way out.

May live here: what may be passed as an array, for input and for ``out=``, and why anything else is refused. May not: what a collective
does with it (``collectives``), which dtypes it carries (``dtypes``).

No library but NumPy is imported: an array of another one can only exist where that library has been loaded.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rt import _fastpath, device_arrays
from rt.aio import Work
from rt.device_arrays import OnDevice
from rt.dtypes import DType, code_of, numpy_dtype

if TYPE_CHECKING:
    from rt.group import CoreGroup

Array = np.ndarray[Any, Any]
Wrap = Callable[[Array], Any]

SCALARS = (bool, int, float, complex, np.generic)
_HOST_DEVICES = (1, 3, 11, 13)  # of DLPack: CPU, and memory of CUDA and ROCm that the host can read
_64_BITS = 8


class View(NamedTuple):
    """How an array is read and answered.

    Attributes:
        array: its items, in its own memory wherever that can be read.
        wrap: makes of a result the caller's kind of array; None: results are NumPy arrays.
        fixed: why results cannot be written to it, "" where they can.
    """

    array: Array
    wrap: Wrap | None = None
    fixed: str = ""


def view(x: Any, what: str, group: CoreGroup | None = None) -> View:
    """Return the view of any array or number; of one on a device only where it is for a ``group`` that takes them.

    Raises:
        TypeError: x is none, lies where the host cannot read it, or means more than its items; the message says which, and what to do.
    """
    if type(x) is np.ndarray:
        return View(x)
    if isinstance(x, np.ndarray):
        return View(_plain(x, what))
    if isinstance(x, SCALARS):
        return View(np.asarray(x), None, "a number has no memory to write to")
    if isinstance(x, (list, tuple)):
        raise TypeError(f"{what}: expected an array or a number, got a {type(x).__name__}; use numpy.array(...) first")
    there = group.on_device(x, what) if group is not None else None
    if there is not None:
        return View(there, device_arrays.owner)
    for module, name, read in _LIBRARIES:
        library = sys.modules.get(module)
        if library is not None and isinstance(x, getattr(library, name, ())):
            return read(library, x, what)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _dlpack(x, what)
    try:
        buffer = memoryview(x)
    except TypeError:
        if not hasattr(x, "__array__") and not hasattr(x, "__array_interface__"):
            raise TypeError(f"{what}: expected an array or a number, got {type(x).__name__}") from None
        return View(np.asarray(x), None, f"a {type(x).__name__} may hand out a copy of its items")
    try:
        items = np.asarray(buffer)
    except ValueError as error:
        raise TypeError(f"{what}: items of format {buffer.format!r} are not supported: {error}") from None
    if isinstance(x, array.array):
        code = x.typecode
        return View(items, lambda result: array.array(code, result.tobytes()))
    return View(items, _BUFFERS.get(type(x)), "bytes are immutable" if isinstance(x, bytes) else "")


_BUFFERS: dict[type, Wrap] = {bytes: lambda r: r.tobytes(), bytearray: lambda r: bytearray(r), memoryview: lambda r: r.data}


def _plain(x: Array, what: str) -> Array:
    """Return an array of a subclass as what it is without it, where nothing is lost."""
    if isinstance(x, np.memmap):
        return np.asarray(x)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what}: a masked array would lose its mask; pass x.filled(value), or x.data and x.mask in two calls")
    raise TypeError(
        f"{what}: a {type(x).__module__}.{type(x).__name__} is more than its items, which is all that would travel; pass numpy.asarray(x)"
    )


def _torch(torch: Any, x: Any, what: str) -> View:
    if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
        raise TypeError(f"{what}: a {type(x).__module__}.{type(x).__name__} is more than its items; pass a plain torch.Tensor")
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{what}: the tensor requires grad, and collectives are not differentiated: pass x.detach(), or call it under torch.no_grad()"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{what}: a tensor of layout {x.layout} is not supported; pass x.to_dense()")
    if x.device.type != "cpu":
        raise TypeError(_elsewhere(what, f"tensor is on {x.device}", "x.cpu(), and result.to(x.device) afterwards"))
    if x.is_conj() or x.is_neg():
        raise TypeError(f"{what}: the tensor is a lazy conjugate or negative; pass x.resolve_conj().resolve_neg()")
    dtype = dtype_of(x.dtype, what)
    if dtype.kind == "V":  # bfloat16, which torch does not show to NumPy
        return View(x.detach().view(torch.int16).numpy().view(dtype), lambda r: torch.from_numpy(r.view(np.int16)).view(torch.bfloat16))
    return View(x.detach().numpy(), torch.from_numpy)


def _mlx(mx: Any, x: Any, what: str) -> View:
    dtype = x.dtype
    if dtype == mx.bfloat16:
        items = np.asarray(memoryview(x.view(mx.uint16))).view(numpy_dtype(DType.BFLOAT16))
    else:
        items = np.asarray(memoryview(x))
    return View(items, lambda result: mx.array(result, dtype=dtype), "MLX arrays are values that other, lazy ones may be computed from")


def _jax(jax: Any, x: Any, what: str) -> View:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{what}: the array is being traced (jax.jit, grad, vmap, ...); collectives run outside of traced functions")
    devices = list(x.devices())
    if len(devices) != 1 or devices[0].platform != "cpu":
        names = ", ".join(map(str, devices))
        raise TypeError(_elsewhere(what, f"array is on {names}", "jax.device_put(x, jax.devices('cpu')[0])"))
    items = np.asarray(x)
    if items.itemsize >= _64_BITS and jax.dtypes.canonicalize_dtype(items.dtype) != items.dtype:
        raise TypeError(f"{what}: JAX would round the {items.dtype} result: jax_enable_x64 is off here")
    return View(items, lambda result: jax.device_put(result, devices[0]), "JAX arrays are immutable")


_LIBRARIES: tuple[tuple[str, str, Callable[[Any, Any, str], View]], ...] = (
    ("torch", "Tensor", _torch),
    ("mlx.core", "array", _mlx),
    ("jax", "Array", _jax),
)


def _dlpack(x: Any, what: str) -> View:
    """Any other library: results are made by the ``from_dlpack`` of its array API namespace, where it has one."""
    kind, number = x.__dlpack_device__()
    if kind not in _HOST_DEVICES:
        raise TypeError(_elsewhere(what, f"{type(x).__name__} is on DLPack device ({int(kind)}, {number})", "a copy in host memory"))
    try:
        items = np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"{what}: a {type(x).__name__} that NumPy cannot read through DLPack: {error}") from None
    return View(items, x.__array_namespace__().from_dlpack if hasattr(x, "__array_namespace__") else None)


def _elsewhere(what: str, where: str, remedy: str) -> str:
    return f"{what}: the {where}, and this backend moves host memory: pass {remedy}"


def dtype_of(dtype: Any, what: str) -> np.dtype[Any]:
    """Return a dtype of NumPy's, torch's or MLX's as NumPy's (JAX's are NumPy's).

    Raises:
        TypeError: it is none; one of torch's or MLX's that collectives do not carry.
    """
    if type(dtype).__module__ not in ("torch", "mlx.core"):
        try:
            found: np.dtype[Any] = np.dtype("nothing" if dtype is None else dtype)  # NumPy takes None for float64
        except TypeError:
            raise TypeError(f"{what}: expected a dtype of NumPy's, torch's, MLX's or JAX's, got {dtype!r}") from None
        return found
    name = str(dtype).rpartition(".")[2]
    if name.upper() not in DType.__members__:
        known = ", ".join(code.name.lower() for code in DType)
        raise TypeError(f"{what}: dtype {dtype} is not supported by collectives; supported: {known}")
    return numpy_dtype(DType[name.upper()])


def source(x: Any, what: str, work: Work | None) -> Array:
    """Return x as a C-contiguous, aligned array: its own memory where it is that, else a copy; ``work`` will answer in x's kind."""
    if type(x) is np.ndarray:
        items = x
    else:
        items, wrap, _ = view(x, what, None if work is None else work.group)
        if work is not None:
            work.hand_out = wrap
    found = contiguous(items)
    if work is not None:
        work.borrows_source = found is items
    return found


def contiguous(items: Array) -> Array:
    """Return the array itself where it is C-contiguous and aligned, else a copy."""
    flags = items.flags
    if flags.c_contiguous and flags.aligned:
        return items
    return copy(items)  # np.ascontiguousarray would turn 0-d into 1-d


def copy(items: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the items, converted if ``dtype`` says to what, C-contiguous and in memory of ours."""
    if isinstance(items, OnDevice):
        return device_arrays.packed(items, dtype)
    fresh = _fastpath.empty(items.shape, items.dtype if dtype is None else dtype)
    np.copyto(fresh, items, casting="unsafe")
    return fresh


def target(out: Any, shape: tuple[int, ...], like_array: Array | None, what: str, work: Work, dtype: Any = None) -> Array:
    """Return the array results go to, of ours or the caller's ``out``, which is then what ``work`` answers."""
    if like_array is not None:
        dtype = like_array.dtype
    if out is None:
        # A NumPy array's result is one; what else it may be the group knows.
        return _fastpath.empty(shape, dtype) if type(like_array) is np.ndarray else work.group.memory(shape, dtype, like_array)
    if like_array is not None and like_array.shape == shape and _fastpath.lies_like(out, like_array):
        work.hand_out, work.borrows_target = None, True
        return out  # type: ignore[no-any-return]
    items = written(out, shape, dtype, what, work.group)
    work.hand_out = None if items is out else lambda _: out
    work.borrows_target = True
    return items


def written(out: Any, shape: tuple[int, ...], dtype: Any, what: str, group: CoreGroup | None = None) -> Array:
    """Return the memory of an ``out`` of the caller's; see ``view``.

    Raises:
        TypeError: it is of a kind that cannot be written to.
        ValueError: it has another shape or dtype, or its memory is read-only or not contiguous.
    """
    if type(out) is np.ndarray:
        items = out
    else:
        if out is None or isinstance(out, (list, tuple)):
            raise TypeError(f"{what}: out must be an array, not {type(out).__name__}")
        items, _, fixed = view(out, f"{what}: out", group)
        if fixed:
            raise TypeError(f"{what}: results cannot be written to out: {fixed}; take what the call returns")
    if items.dtype != dtype or items.shape != shape:
        raise ValueError(f"{what}: out must have shape {shape} and dtype {dtype}, but has shape {items.shape} and dtype {items.dtype}")
    flags = items.flags
    if not (flags.c_contiguous and flags.aligned and flags.writeable):
        has = {"C-contiguous": flags.c_contiguous, "aligned": flags.aligned, "writeable": flags.writeable}
        lacks = [word for word, there in has.items() if not there]
        raise ValueError(f"{what}: out must be C-contiguous, aligned and writeable, and is not {' and not '.join(lacks)}")
    torch = sys.modules.get("torch")
    if torch is not None and items is not out and isinstance(out, torch.Tensor) and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that autograd finds out if it had saved the old items
    return items


def aliasing(x: Any, items: Array, out: Array, what: str, allowed: set[tuple[int, int]]) -> tuple[int, int] | None:
    """Return where ``items`` and ``out`` start, in items, if they share memory in an allowed way; None if they share none.

    Args:
        x: what the caller passed; ``items`` may be a copy of it, and still the call would change what x holds.
    """
    if items is x and _fastpath.lie_apart(items, out):
        return None
    given = items if items is x or items.base is not None else view(x, what).array  # what is not x and has no base is a copy
    if not np.may_share_memory(given, out):
        return None
    if given is items:
        distance, rest = divmod(out.ctypes.data - items.ctypes.data, items.itemsize)
        found = (max(0, -distance), max(0, distance))
        if rest == 0 and found in allowed:
            return found
    if not np.shares_memory(given, out):
        return None
    raise ValueError(f"{what}: out overlaps x; it may be x itself or this rank's block, or share no memory with it")


def form(x: Any, what: str, group: CoreGroup) -> tuple[Array, Wrap | None]:
    """Return an array of whose form results are to be, and what makes of them arrays of x's kind."""
    items, wrap, _ = view(x, what, group)
    code_of(items.dtype, what)
    return items, wrap


def private(x: Any) -> Any:
    """Return a copy of what a call was given, an array or a tree of them, whose memory goes back to the caller."""
    import optree  # here, not above: importing it costs more than the rest of rt

    def private_leaf(leaf: Any) -> Any:
        try:
            items, wrap, _ = view(leaf, "")
        except TypeError:
            return leaf  # no array: the call will say so itself
        return copy(items) if wrap is None else wrap(copy(items))

    return optree.tree_map(private_leaf, x)
