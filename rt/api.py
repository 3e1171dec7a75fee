"""The calls users make, written once for both front ends.

May live here: names, signatures and documentation of the public calls. May not: anything that differs between ``rt`` and ``rt.sync``
beyond the hook below, argument checks (``collectives``), waiting.

A front end is an ``Api`` whose ``_run`` finds the group of a call and hands out the work that the call starts: an awaitable, or its result.
``Api``'s bound methods are the functions of the modules ``rt`` and ``rt.sync``; ``faces.Group`` offers the same as methods.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rt import collectives, collectives_blocks
from rt.aio import Work
from rt.errors import ConfigError
from rt.group import CoreGroup

R = TypeVar("R")  # what a call returns: an awaitable of the array, or the array
Start = Callable[[CoreGroup, Any, Any], Work]  # group, x, out


def _objects() -> Any:
    """Return the module ``rt.objects``, loaded when first used: with pickle it takes 5 ms."""
    from rt import objects

    return objects


class Api(Generic[R]):
    """Collectives on the world or on ``group``: ``rt``'s return an awaitable of the result, ``rt.sync``'s block and return the result.

    Keyword arguments that calls take:

    Args:
        group: a ``Group`` of either front end; None: the world, formed now if it was not (as ``init()`` does).
        stream: of CuPy, on which the call is made, instead of the current one (backend ``nccl``); None elsewhere.
        out: C-contiguous array, of the result's shape and dtype, that receives the result and is returned: of NumPy, a torch tensor, or a
            writable buffer (``bytearray``, ``array.array``, ``memoryview``, ...). It may be x itself or, for the gathers and scatters, in
            place by NCCL's rules (x is this rank's block of out, or out is this rank's block of x). Any other overlap with x is a
            ValueError.
        timeout: seconds until the call fails with ``CollectiveTimeoutError`` and breaks the group; None: the group's, default for ever.
        key: kept for order-free matching; must be None.
        tag: of messages: an integer of 64 bits with sign. Those under different tags do not wait for each other.

    Arrays may be NumPy's, torch's, MLX's or JAX's, on the CPU, or of whatever speaks DLPack or the buffer protocol. They are read where
    they lie (what is not contiguous is copied once), and the result is of x's kind; what has no kind of its own to give back gives
    NumPy's. Python's numbers are arrays of shape ``()``. Refused with a TypeError that says what to do: memory of other devices, masked
    arrays, subclasses, torch tensors that require grad (unless under ``torch.no_grad()``), arrays that JAX is tracing. Groups of backend
    ``nccl`` also take arrays of CuPy on their rank's device, and answer with such.

    Every call may raise ``GroupBrokenError`` (one of its kinds: ``PeerLostError``, ``MismatchError``, ``CollectiveTimeoutError``, ...),
    ``GroupClosedError``, and TypeError or ValueError for bad arguments, which leave the group usable.
    Calls are matched between ranks in the order in which each rank makes them: call order is wire order.
    """

    def _run(
        self, what: str, group: Any, start: Start, x: Any, out: Any, timeout: float | None, stream: Any, key: Any
    ) -> R:
        raise NotImplementedError

    def _all_reduce(self, group: Any, what: str, op: str, x: Any, out: Any, timeout: float | None, stream: Any, key: Any) -> R:
        return self._run(what, group, lambda core, x, out: collectives.all_reduce(core, x, op, out, what), x, out, timeout, stream, key)

    def all_reduce(
        self, x: Any, op: str = "sum", *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Combine x of all ranks elementwise; every rank gets the result, bit-identical, of x's shape and dtype.

        Args:
            x: array or Python number, of the same shape and dtype on all ranks. Or a list or tuple of arrays: one call, in few
                collectives, whose result (and ``out=``) is the list of theirs. Arrays under 64 KiB of one dtype travel together; the
                results of those lie in one block of memory. All ranks pass lists of the same shapes and dtypes, else MismatchError.
            op: ``sum prod min max`` on every dtype; ``mean`` on floating and complex dtypes; ``and or xor`` on bool and integers. Integers
                wrap; on bool, sum is or, prod is and; half types accumulate in float32 and round once; min and max propagate NaN and
                order complex numbers lexicographically.
        """
        return self._all_reduce(group, "all_reduce", op, x, out, timeout, stream, key)

    def all_sum(
        self, x: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Sum x over all ranks: ``all_reduce(x, "sum")``."""
        return self._all_reduce(group, "all_sum", "sum", x, out, timeout, stream, key)

    def all_max(
        self, x: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Elementwise maximum of x over all ranks: ``all_reduce(x, "max")``."""
        return self._all_reduce(group, "all_max", "max", x, out, timeout, stream, key)

    def all_min(
        self, x: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Elementwise minimum of x over all ranks: ``all_reduce(x, "min")``."""
        return self._all_reduce(group, "all_min", "min", x, out, timeout, stream, key)

    def all_gather(
        self, x: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Concatenate x of all ranks along axis 0, in rank order.

        ``(d0, ...)`` becomes ``(size * d0, ...)``, ``()`` becomes ``(size,)``.
        """
        return self._run("all_gather", group, lambda core, x, out: collectives.all_gather(core, x, out), x, out, timeout, stream, key)

    def sum_scatter(
        self, x: Any, op: str = "sum", *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Reduce-scatter along axis 0: of the reduction of x, ``(d0, ...)``, rank r gets block r, ``(d0 / size, ...)``.

        Raises:
            ValueError: x has no axis 0, or its length is not a multiple of the group's size.
        """
        return self._run("sum_scatter", group, lambda core, x, out: collectives.sum_scatter(core, x, op, out), x, out, timeout, stream, key)

    def broadcast(
        self, x: Any, root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Return the root's x on every rank. The others pass an array of the same shape and dtype; only its form counts."""
        return self._run("broadcast", group, lambda core, x, out: collectives.broadcast(core, x, root, out), x, out, timeout, stream, key)

    def reduce(
        self, x: Any, op: str = "sum", root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Combine x of all ranks as ``all_reduce`` does, for the root only. The others get None, and their ``out`` is left alone."""
        return self._run(
            "reduce", group, lambda core, x, out: collectives_blocks.reduce(core, x, op, root, out), x, out, timeout, stream, key
        )

    def gather(
        self, x: Any, root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None,
        key: Any = None,
    ) -> R:  # fmt: skip
        """Concatenate x of all ranks as ``all_gather`` does, for the root only. The others get None, and their ``out`` is left alone.

        In place on the root: x is its block of ``out``.
        """
        return self._run("gather", group, lambda core, x, out: collectives_blocks.gather(core, x, root, out), x, out, timeout, stream, key)

    def scatter(
        self, x: Any, root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None,
        key: Any = None,
    ) -> R:  # fmt: skip
        """Cut the root's x, ``(d0, ...)``, along axis 0: rank r gets block r, ``(d0 / size, ...)``.

        The others pass an array of the same shape and dtype, of which only the form counts, or ``x=None`` and ``out``. In place on the
        root: ``out`` is its block of x.

        Raises:
            ValueError: x has no axis 0, or its length is not a multiple of the group's size.
            TypeError: neither x nor ``out`` says what is received.
        """
        return self._run(
            "scatter", group, lambda core, x, out: collectives_blocks.scatter(core, x, root, out), x, out, timeout, stream, key
        )

    def all_to_all(
        self, x: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Exchange blocks along axis 0: block j of x goes to rank j, and block i of the result, of x's shape, comes from rank i.

        Raises:
            ValueError: x has no axis 0, or its length is not a multiple of the group's size.
        """
        return self._run(
            "all_to_all", group, lambda core, x, out: collectives_blocks.all_to_all(core, x, out), x, out, timeout, stream, key
        )

    def all_gather_v(
        self, x: Any, counts: Any, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None, key: Any = None
    ) -> R:
        """Concatenate x of all ranks along axis 0, where rank r has ``counts[r]`` rows.

        Args:
            x: array of shape ``(counts[rank], ...)``; the sides after the first, and the dtype, are the same on all ranks.
            counts: rows of every rank, 0 or more; the same on all ranks, else MismatchError.
        """
        return self._run(
            "all_gather_v", group, lambda core, x, out: collectives_blocks.all_gather_v(core, x, counts, out), x, out, timeout, stream, key
        )

    def reduce_scatter_v(
        self, x: Any, counts: Any, op: str = "sum", *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Reduce-scatter along axis 0: of the reduction of x, ``(sum(counts), ...)``, rank r gets its block of ``counts[r]`` rows.

        ``counts`` is the same on all ranks, else MismatchError; ``op`` as for ``all_reduce``.
        """
        def start(core: CoreGroup, x: Any, out: Any) -> Work:
            return collectives_blocks.reduce_scatter_v(core, x, counts, op, out)

        return self._run("reduce_scatter_v", group, start, x, out, timeout, stream, key)

    def gather_v(
        self, x: Any, counts: Any, root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Concatenate x of all ranks as ``all_gather_v`` does, for the root only. The others get None, and their ``out`` is left alone."""
        return self._run(
            "gather_v", group, lambda core, x, out: collectives_blocks.gather(core, x, root, out, counts), x, out, timeout, stream, key
        )

    def scatter_v(
        self, x: Any, counts: Any, root: int = 0, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Cut the root's x, ``(sum(counts), ...)``, along axis 0: rank r gets its block of ``counts[r]`` rows.

        ``counts`` is the same on all ranks, else MismatchError. What the others pass is said at ``scatter``.
        """
        return self._run(
            "scatter_v", group, lambda core, x, out: collectives_blocks.scatter(core, x, root, out, counts), x, out, timeout, stream, key
        )

    def all_to_all_v(
        self, x: Any, send_counts: Any, recv_counts: Any, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Exchange blocks of any lengths along axis 0: ``send_counts[j]`` rows of x go to rank j, ``recv_counts[i]`` come from rank i.

        The result has shape ``(sum(recv_counts), ...)``. What a rank sends to another must be what that one expects, else MismatchError
        says what both called; nothing is received then. In place (``out=x``) where both counts are the same.
        """
        def start(core: CoreGroup, x: Any, out: Any) -> Work:
            return collectives_blocks.all_to_all_v(core, x, send_counts, recv_counts, out)

        return self._run("all_to_all_v", group, start, x, out, timeout, stream, key)

    def scan(
        self, x: Any, op: str = "sum", *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Combine x of ranks 0 to this one, lower ranks left, elementwise: the inclusive prefix.

        ``op`` as for ``all_reduce``, without mean.
        """
        return self._run("scan", group, lambda core, x, out: collectives.scan(core, x, op, out), x, out, timeout, stream, key)

    def exscan(
        self, x: Any, op: str = "sum", *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None,
    ) -> R:  # fmt: skip
        """Combine x of the ranks before this one, lower ranks left, elementwise: the exclusive prefix. ``op`` as for ``scan``.

        Rank 0 gets what changes nothing: 0 for sum, or, xor; 1 for prod (on bool False and True); all bits set for and; the highest
        value for min and the lowest for max, which is infinite in floating and complex dtypes.
        """
        return self._run("exscan", group, lambda core, x, out: collectives.scan(core, x, op, out, "exscan"), x, out, timeout, stream, key)

    def barrier(self, *, group: Any = None, stream: Any = None, timeout: float | None = None, key: Any = None) -> R:
        """Return None once every rank has called."""
        return self._run("barrier", group, lambda core, _x, _out: collectives.barrier(core), None, None, timeout, stream, key)

    def send(
        self, x: Any, dst: int, *, group: Any = None, stream: Any = None, timeout: float | None = None, key: Any = None, tag: int = 0
    ) -> R:
        """Send x to rank ``dst``; returns x when its memory is free: for a little under 64 KiB at once, for more when it is received.

        The k-th send to a rank under a tag meets the k-th recv there from this rank under that tag, whatever else is under way.
        """
        return self._run("send", group, lambda core, x, _: collectives.send(core, x, dst, tag), x, None, timeout, stream, key)

    def recv(
        self, shape: Any, dtype: Any, src: int, *, group: Any = None, stream: Any = None, out: Any = None, timeout: float | None = None,
        key: Any = None, tag: int = 0,
    ) -> R:  # fmt: skip
        """Receive a NumPy array of ``shape`` and ``dtype`` from rank ``src``; a sender with another shape or dtype is a MismatchError.

        ``dtype`` may also be torch's, MLX's or JAX's. Who wants their arrays passes ``out=`` or calls ``recv_like``.
        """
        return self._run(
            "recv", group, lambda core, _, out: collectives.recv(core, shape, dtype, src, out, tag), None, out, timeout, stream, key
        )

    def recv_like(
        self, x: Any, src: int, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None, tag: int = 0,
    ) -> R:  # fmt: skip
        """Receive an array of x's shape, dtype and kind from rank ``src``."""
        return self._run(
            "recv_like", group, lambda core, x, out: collectives.recv_like(core, x, src, out, tag), x, out, timeout, stream, key
        )

    def sendrecv(
        self, x: Any, dst: int, src: int, *, group: Any = None, stream: Any = None, out: Any = None,
        timeout: float | None = None, key: Any = None, tag: int = 0,
    ) -> R:  # fmt: skip
        """Send x to rank ``dst`` and receive from rank ``src``, both at once, so that ranks in a ring may all call it and block.

        What arrives, and is returned when x is free too, has x's shape and dtype or those of ``out``, which may be x. The two halves are
        matched like ``send`` and ``recv`` under ``tag``, also with ranks that call those.
        """
        return self._run(
            "sendrecv", group, lambda core, x, out: collectives.sendrecv(core, x, dst, src, out, tag), x, out, timeout, stream, key
        )

    # Objects. Receiving one unpickles it, and a pickle makes its receiver run what its sender chose: every call here trusts all ranks of
    # the group. Where nothing proves who they are (RT_INSECURE=1) the calls are refused, unless RT_INSECURE_OBJECTS=1.

    def send_object(self, obj: Any, dst: int, *, group: Any = None, timeout: float | None = None, tag: int = 0) -> R:
        """Send a Python object of any size to rank ``dst``; returns it when its memory is free.

        It is pickled here (protocol 5): an object that cannot be raises here what pickle raises, and nothing is sent. Buffers of 64 KiB
        and more that it gives out of band, as NumPy arrays do, are sent from where they lie: leave them alone until this returns.

        Meets ``recv_object`` there, in the order of ``send`` and ``recv`` under the same tag. **The receiver runs code that the sender
        chooses**: pickles are for ranks that trust each other. Without a secret (RT_INSECURE=1) it is a ConfigError, unless
        RT_INSECURE_OBJECTS=1 is set on all ranks.
        """
        return self._run("send_object", group, lambda core, x, _: _objects().send_object(core, x, dst, tag), obj, None, timeout, None, None)

    def recv_object(self, src: int, *, group: Any = None, timeout: float | None = None, tag: int = 0) -> R:
        """Receive the object that rank ``src`` sends by ``send_object``. **This runs code that the sender chooses**; see there.

        Large arrays in it keep the memory into which they were received. What unpickling raises, this raises, and the group goes on.
        """
        return self._run("recv_object", group, lambda core, _x, _: _objects().recv_object(core, src, tag), None, None, timeout, None, None)

    def broadcast_object(self, obj: Any, root: int = 0, *, group: Any = None, timeout: float | None = None) -> R:
        """Return the root's object on every rank; what the others pass does not matter. See ``send_object``, also about trust.

        Waiting for it may last for ever and costs nothing. Pickles of less than 4 KiB take one collective, others two rounds.
        """
        return self._run(
            "broadcast_object", group, lambda core, x, _: _objects().broadcast_object(core, x, root), obj, None, timeout, None, None
        )

    def gather_objects(self, obj: Any, root: int = 0, *, group: Any = None, timeout: float | None = None) -> R:
        """Return the list of the ranks' objects, in rank order, on the root, and None elsewhere. See ``send_object``, also about trust."""
        return self._run(
            "gather_objects", group, lambda core, x, _: _objects().gather_objects(core, x, root), obj, None, timeout, None, None
        )

    def all_gather_objects(self, obj: Any, *, group: Any = None, timeout: float | None = None) -> R:
        """Return the list of the ranks' objects, in rank order; this rank's own is ``obj``. See ``send_object``, also about trust."""
        return self._run(
            "all_gather_objects", group, lambda core, x, _: _objects().all_gather_objects(core, x), obj, None, timeout, None, None
        )


_SAID = {name: inspect.cleandoc(call.__doc__ or "") for name, call in vars(Api).items() if not name.startswith("_")}


def complete(calls: type) -> None:
    """Have the documentation of a class' calls say all that ``Api``'s says, of each and of all of them: ``help()`` shows one at a time."""
    if Api.__doc__ is None:  # python -OO
        return
    *_, keywords, of_arrays, of_errors = inspect.cleandoc(Api.__doc__).split("\n\n")
    entries = dict(re.findall(r"^ {4}((\w+):.*(?:\n {8}.*)*)", keywords, re.M))
    for name, said in _SAID.items():
        call = vars(calls)[name]
        takes = [entry for entry, keyword in entries.items() if keyword in call.__kwdefaults__]
        about = [of_arrays, of_errors] if "stream" in call.__kwdefaults__ and name != "barrier" else [of_errors]
        call.__doc__ = "\n\n".join([said, "\n    ".join(["Keyword Args:", *takes]), *about])


complete(Api)
for _name in _SAID:  # what Python calls a function in its TypeErrors: users call none of Api's
    vars(Api)[_name].__module__, vars(Api)[_name].__qualname__ = "rt", _name


def check_common(what: str, timeout: float | None, key: Any) -> None:
    """Refuse what cannot be honoured rather than ignore it; ``what`` names the call."""
    if key is not None:
        raise ConfigError(f"{what}: key= (order-free matching) is not available yet; use a sub-group or tag= to order calls independently")
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"{what}: timeout must be a number of seconds, not {type(timeout).__name__}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"{what}: timeout must be a positive number of seconds, not {timeout!r}")
