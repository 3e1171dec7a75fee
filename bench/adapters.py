"""The systems under test: how each one's ranks join, meet at a barrier, and are called.

May live here: one adapter per system, and the loop that times a call. May not: what tells collectives from each other
(``collectives.py``); an import of ``rt`` or of a peer at module level: each system's interpreter lacks the others.

Every system is timed by the same loop: all ranks meet at a barrier, then each times its own call. The barrier is the system's own. One
that is the same for all and spins on shared memory releases the ranks more evenly, but takes the cores from systems that work in
threads (tried: with another job on a 2-core host, gloo's 2 KiB took 3.5 ms after it and 0.4 ms after gloo's own).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.collectives import Bind, Bound, Buffers
from bench.data import Array
from bench.worker import Answer, loop_factory

Prepare = Callable[[int], None]


class Adapter:
    """A system under test; ``bind`` readies one call, ``samples`` times it."""

    kind = ""  # which of a collective's ``binds`` is called
    meeting = ""  # how its ranks meet, if not as the kind says
    reduces = True  # else there is no result to check

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def setup(self) -> dict[str, str]:
        """Join the group; return what the reader of a table should know about versions."""
        raise NotImplementedError

    def links(self) -> dict[int, str]:
        """Return how this rank reaches each other one, where the system tells."""
        return {}

    def algorithm(self, command: Answer) -> str | None:
        """Return the name of the algorithm by which it did what a command asked for, where the system tells."""
        return None

    def barrier(self) -> Any:
        """Return when every rank has come here (``RtAsync``: an awaitable of that)."""
        raise NotImplementedError

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        """Return a call on those buffers, ready to be timed."""
        raise NotImplementedError

    def result(self, returned: Any, out: Array) -> Array:
        """Return what the last call produced, from what it returned and the memory it was given."""
        return out

    def close(self) -> None:
        """Leave the group, where a system wants to be told."""

    def samples(self, call: Bound, prepare: Prepare, number: int) -> tuple[list[int], Any]:
        """Return the nanoseconds of each call, before which ``prepare`` gets the number of calls after it, and the last result."""
        spent, returned = [], None
        for left in reversed(range(number)):
            returned = None  # its memory is there for the next call, and giving it back is not timed
            prepare(left)
            self.barrier()
            start = time.perf_counter_ns()
            returned = call()
            spent.append(time.perf_counter_ns() - start)
        return spent, returned


class _Rt(Adapter):
    kind = "rt"

    def links(self) -> dict[int, str]:
        world = self._group._core.world
        return {} if world is None else world.links()

    def algorithm(self, command: Answer) -> str | None:
        kind = "send" if command["collective"] == "send_recv" else command["collective"]
        dtype = "uint8" if kind == "barrier" else command["dtype"]  # of the nothing that barriers send
        name: str | None = self._group._core.algorithm(kind, dtype, command["count"])
        return name

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        return bind(self._module(), buffers)

    def result(self, returned: Any, out: Array) -> Array:
        return out if returned is None else np.asarray(returned)

    _group: Any

    def _module(self) -> Any:
        raise NotImplementedError


class RtSync(_Rt):
    """The blocking front end."""

    def setup(self) -> dict[str, str]:
        self._group = self._module().init()
        return {}

    def _module(self) -> Any:
        import rt.sync

        return rt.sync

    def barrier(self) -> Any:
        self._module().barrier()


class RtSyncOnMpich(RtSync):
    """The blocking front end on backend mpi, with the library that ``Mpich`` calls."""

    meeting = "rt mpich"


class RtSyncOnOpenMpi(RtSync):
    """The blocking front end on backend mpi, with the library that ``OpenMpi`` calls."""

    meeting = "rt openmpi"


class RtSyncOnVerbs(RtSync):
    """The blocking front end on backend jaccl, on this host's RDMA device."""

    meeting = "rt jaccl"


class RtNoSpin(RtSync):
    """The blocking front end without its brief polling before it sleeps: what is left to an event loop, which must not poll either."""

    def setup(self) -> dict[str, str]:
        import rt.world

        rt.world.SPIN_SECONDS = 0.0
        return super().setup()


class RtAsync(_Rt):
    """The asyncio front end, inside one loop that lives as long as the worker: uvloop's where it is installed."""

    def setup(self) -> dict[str, str]:
        factory, loop = loop_factory("auto")
        self._runner = asyncio.Runner(loop_factory=factory)

        async def join() -> Any:
            return await self._module().init()

        self._group = self._runner.run(join())
        return {"loop": loop}

    def _module(self) -> Any:
        import rt

        return rt

    def barrier(self) -> Any:
        return self._module().barrier()

    def samples(self, call: Bound, prepare: Prepare, number: int) -> tuple[list[int], Any]:
        return self._runner.run(self._samples(call, prepare, number))

    async def _samples(self, call: Bound, prepare: Prepare, number: int) -> tuple[list[int], Any]:
        spent, returned = [], None
        for left in reversed(range(number)):
            returned = None
            prepare(left)
            await self.barrier()
            start = time.perf_counter_ns()
            returned = await call()
            spent.append(time.perf_counter_ns() - start)
        return spent, returned

    def close(self) -> None:
        self._runner.close()


class RtAsyncOnMpich(RtAsync):
    """The asyncio front end on backend mpi, with the library that ``Mpich`` calls."""

    meeting = "rt mpich"


class RtAsyncOnOpenMpi(RtAsync):
    """The asyncio front end on backend mpi, with the library that ``OpenMpi`` calls."""

    meeting = "rt openmpi"


class RtAsyncOnVerbs(RtAsync):
    """The asyncio front end on backend jaccl, on this host's RDMA device."""

    meeting = "rt jaccl"


class Gloo(Adapter):
    """torch.distributed on gloo."""

    kind = "gloo"

    def setup(self) -> dict[str, str]:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)  # its copies would spin on every core, beside the ranks that wait for them
        # A file as the store needs no port, so nobody can take it.
        dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCH_STORE']}", rank=self.rank, world_size=self.size)
        return {"torch": torch.__version__}

    def barrier(self) -> Any:
        import torch.distributed as dist

        dist.barrier()

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        import torch.distributed as dist

        return bind(dist, dataclasses.replace(buffers, x=self._tensor(buffers.x), out=self._tensor(buffers.out)))

    def _tensor(self, array: Array) -> Any:
        import torch

        if array.dtype.name == "bfloat16":  # torch knows its own only
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class Mlx(Adapter):
    """The TCP ring of ``mx.distributed``. It always makes its own result, from MLX's cache of buffers."""

    kind = "mlx"

    def setup(self) -> dict[str, str]:
        import mlx.core as mx

        mx.distributed.init(strict=True, backend="ring")
        return {"mlx": mx.__version__}

    def barrier(self) -> Any:
        import mlx.core as mx

        mx.eval(mx.distributed.all_sum(mx.ones(1)))  # MLX has no barrier; its users write this

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        import mlx.core as mx

        array = mx.array(buffers.x)
        mx.eval(array)
        build = bind(mx, dataclasses.replace(buffers, x=array))

        def call() -> Any:
            result = build()
            mx.eval(result)
            return result

        return call

    def result(self, returned: Any, out: Array) -> Array:
        return np.asarray(returned)


class _Mpi(Adapter):
    """An MPI library under mpi4py, initialized as mpi4py does by itself: for threads that call at the same time."""

    vendor = ""  # what mpi4py calls it

    def setup(self) -> dict[str, str]:
        import mpi4py
        from mpi4py import MPI

        self._mpi: Any = MPI
        vendor, version = MPI.get_vendor()
        found, expected = (vendor, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size), (self.vendor, self.rank, self.size)
        if found != expected:
            raise RuntimeError(f"found library, rank and size {found}, expected {expected}")
        return {self.kind: ".".join(map(str, version)), "mpi4py": mpi4py.__version__}

    def barrier(self) -> Any:
        self._mpi.COMM_WORLD.Barrier()

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        return bind(self._mpi, dataclasses.replace(buffers, x=self._typed(buffers.x), out=self._typed(buffers.out)))

    def _typed(self, array: Array) -> list[Any]:
        """Return an array with its type in MPI; one that neither library has goes as whole numbers of its size."""
        name = array.dtype.name
        if name == "bfloat16":
            return [array.view(np.uint16), self._mpi.UINT16_T]
        known = {"float16": self._mpi.FLOAT16_T, "float32": self._mpi.FLOAT, "float64": self._mpi.DOUBLE}
        return [array, known[name] if name in known else getattr(self._mpi, f"{name.upper()}_T")]


class Mpich(_Mpi):
    """MPICH, between the ranks of a host over shared memory."""

    kind = "mpich"
    vendor = "MPICH"


class OpenMpi(_Mpi):
    """Open MPI, between the ranks of a host over shared memory."""

    kind = "openmpi"
    vendor = "Open MPI"


class Tcp(Adapter):
    """No system at all: see ``exchange.py``."""

    kind = "tcp"
    reduces = False

    def setup(self) -> dict[str, str]:
        from bench.exchange import Ring

        right, left = (socket.socket(fileno=int(os.environ[name])) for name in ("BENCH_RIGHT", "BENCH_LEFT"))
        right.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ring = Ring(self.size, right, left)
        return {}

    def barrier(self) -> Any:
        self._ring.barrier()

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        return bind(self._ring, buffers)


ADAPTERS: dict[str, type[Adapter]] = {
    "rt sync": RtSync,
    "rt async": RtAsync,
    "rt sync mpich": RtSyncOnMpich,
    "rt async mpich": RtAsyncOnMpich,
    "rt sync openmpi": RtSyncOnOpenMpi,
    "rt async openmpi": RtAsyncOnOpenMpi,
    "rt sync jaccl": RtSyncOnVerbs,
    "rt async jaccl": RtAsyncOnVerbs,
    "nospin": RtNoSpin,
    "gloo": Gloo,
    "mlx": Mlx,
    "mpich": Mpich,
    "openmpi": OpenMpi,
    "tcp": Tcp,
}
MPI_PEERS = ("mpich", "openmpi")
PEERS = ("gloo", "mlx", "mpich", "openmpi", "nospin", "tcp")  # the last two are no systems but what ours are held against
