"""One rank of one system under test: joins its group, then runs what its conductor asks for.

May live here: one adapter per system, the timed loop, the check of what it left behind, and the worker's end of the protocol. May not:
an import of ``rt``, of this package or of a peer at module level. Peers run this file by its path, under an interpreter that has neither.

Protocol, JSON lines (``conductor.py`` is the other end)::

    worker     {"pid": 17, "uses": {...}}                                                           once the group stands
    conductor  {"do": "all_reduce", "bytes": 64, "in_place": false, "warmup": 5, "samples": 9, "check": true}
    worker     {"ns": [...], "wrong": 0, "idle": [cpu seconds, seconds] since the last answer}      or {"error": "..."}
    conductor  end of file: leave

Every system is timed by the same loop: all ranks meet at a barrier, then each times its own call. The barrier is the system's own. One
that is the same for all and spins on shared memory releases the ranks more evenly, but takes the cores from systems that work in
threads (tried: with another job on a 2-core host, gloo's 2 KiB took 3.5 ms after it and 0.4 ms after gloo's own).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Answer = dict[str, Any]
Handler = Callable[[Answer], Answer]

_PERIOD = 1021  # prime, so a chunk or segment that lands in the wrong place does not look right


class Adapter:
    """A system under test. ``bind`` gives one call of the collective, ready to be timed; the loop round it is the same for all."""

    reduces = True  # else there is no result to check

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def setup(self) -> dict[str, str]:
        """Join the group; return what the reader of a table should know about versions."""
        raise NotImplementedError

    def barrier(self) -> Any:
        """Return when every rank has come here (``RtAsync``: an awaitable of that)."""
        raise NotImplementedError

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        """Return a call that reduces ``x`` into ``out`` (or, where the system cannot, into a result of its own)."""
        raise NotImplementedError

    def result(self, out: Floats) -> Floats:
        """Return what the last call produced."""
        return out

    def close(self) -> None:
        """Leave the group, where a system wants to be told."""

    def samples(self, call: Callable[[], Any], prepare: Callable[[int], None], number: int) -> list[int]:
        """Return the nanoseconds of each call, before which ``prepare`` gets the number of calls that remain after it."""
        spent = []
        for left in reversed(range(number)):
            prepare(left)
            self.barrier()
            start = time.perf_counter_ns()
            call()
            spent.append(time.perf_counter_ns() - start)
        return spent


class RtSync(Adapter):
    """The blocking front end."""

    def setup(self) -> dict[str, str]:
        import rt.sync

        rt.sync.init()
        return {}

    def barrier(self) -> Any:
        import rt.sync

        rt.sync.barrier()

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        import rt.sync

        return lambda: rt.sync.all_reduce(x, "sum", out=out)


class RtNoSpin(RtSync):
    """The blocking front end without its brief polling before it sleeps: what is left to an event loop, which must not poll either."""

    def setup(self) -> dict[str, str]:
        import rt.world

        rt.world.SPIN_SECONDS = 0.0
        return super().setup()


class RtAsync(Adapter):
    """The asyncio front end, inside one loop that lives as long as the worker: uvloop's where it is installed."""

    def setup(self) -> dict[str, str]:
        import rt

        factory, loop = loop_factory("auto")
        self._runner = asyncio.Runner(loop_factory=factory)

        async def join() -> None:
            await rt.init()

        self._runner.run(join())
        return {"loop": loop}

    def barrier(self) -> Any:
        import rt

        return rt.barrier()

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        import rt

        return lambda: rt.all_reduce(x, op="sum", out=out)

    def samples(self, call: Callable[[], Any], prepare: Callable[[int], None], number: int) -> list[int]:
        return self._runner.run(self._samples(call, prepare, number))

    async def _samples(self, call: Callable[[], Any], prepare: Callable[[int], None], number: int) -> list[int]:
        spent = []
        for left in reversed(range(number)):
            prepare(left)
            await self.barrier()
            start = time.perf_counter_ns()
            await call()
            spent.append(time.perf_counter_ns() - start)
        return spent

    def close(self) -> None:
        self._runner.close()


class Gloo(Adapter):
    """torch.distributed on gloo. Its all_reduce works in place only; out of place its users copy first, and that is timed with it."""

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

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(out)
        if x is out:
            return lambda: dist.all_reduce(tensor)
        source = torch.from_numpy(x)

        def call() -> None:
            tensor.copy_(source)
            dist.all_reduce(tensor)

        return call

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class Mlx(Adapter):
    """The TCP ring of ``mx.distributed``. It always makes its own result, from MLX's cache of buffers."""

    def setup(self) -> dict[str, str]:
        import mlx.core as mx

        mx.distributed.init(strict=True, backend="ring")
        return {"mlx": mx.__version__}

    def barrier(self) -> Any:
        import mlx.core as mx

        mx.eval(mx.distributed.all_sum(mx.ones(1)))  # MLX has no barrier; its users write this

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        import mlx.core as mx

        array = mx.array(x)
        mx.eval(array)

        def call() -> None:
            # First the last result goes, so that the cache has its memory to give; keeping both would cost MLX page faults.
            self._result: Any = None
            self._result = mx.distributed.all_sum(array)
            mx.eval(self._result)

        return call

    def result(self, out: Floats) -> Floats:
        return np.asarray(self._result)


class Tcp(Adapter):
    """No system at all: the ranks pass round a ring, through the kernel's TCP, the bytes that an all-reduce must move; nothing is reduced.

    What is faster than this at large sizes saves copies by not sending; what is slower pays for more than its bytes.
    """

    reduces = False
    _MOST_BYTES = 1 << 18  # of one system call: the best out of 64 KiB, 256 KiB and 1 MiB

    def setup(self) -> dict[str, str]:
        self._right = socket.socket(fileno=int(os.environ["BENCH_RIGHT"]))
        self._left = socket.socket(fileno=int(os.environ["BENCH_LEFT"]))
        self._right.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sock in (self._right, self._left):
            sock.setblocking(False)
        return {"sends": f"{self._MOST_BYTES} B at a time"}

    def barrier(self) -> Any:
        for _ in range(2):  # once round says that the last has come, once more tells the others
            self._pass_on(memoryview(bytes(1)), memoryview(bytearray(1)), 1)

    def bind(self, x: Floats, out: Floats) -> Callable[[], Any]:
        source, target = x.data.cast("B"), out.data.cast("B")
        share = 2 * (self.size - 1) * source.nbytes // self.size
        return lambda: self._pass_on(source, target, share)

    def _pass_on(self, source: memoryview, target: memoryview, nbytes: int) -> None:
        """Send ``nbytes`` of source, over and over if it is shorter, and receive as many into target."""
        sent = received = 0
        poll = select.poll()
        while sent < nbytes or received < nbytes:
            moved = 0
            with contextlib.suppress(BlockingIOError):
                if sent < nbytes:
                    moved += self._right.send(self._piece(source, sent, nbytes))
                    sent += moved
            with contextlib.suppress(BlockingIOError):
                if received < nbytes:
                    got = self._left.recv_into(self._piece(target, received, nbytes))
                    if not got:
                        raise ConnectionError("the left neighbour has gone")
                    received += got
                    moved += got
            if not moved:
                poll.register(self._right, select.POLLOUT if sent < nbytes else 0)
                poll.register(self._left, select.POLLIN if received < nbytes else 0)
                poll.poll()

    def _piece(self, memory: memoryview, start: int, end: int) -> memoryview:
        at = start % memory.nbytes
        return memory[at : min(at + self._MOST_BYTES, at + end - start, memory.nbytes)]


ADAPTERS: dict[str, type[Adapter]] = {
    "rt-sync": RtSync,
    "rt-nospin": RtNoSpin,
    "rt-async": RtAsync,
    "gloo": Gloo,
    "mlx": Mlx,
    "tcp": Tcp,
}


def loop_factory(loop: str) -> tuple[Callable[[], asyncio.AbstractEventLoop], str]:
    """Return a loop factory and the loop's name. ``auto`` is uvloop where it is installed."""
    if loop != "asyncio":
        try:
            import uvloop
        except ImportError:
            if loop == "uvloop":
                raise
        else:
            return uvloop.new_event_loop, f"uvloop {metadata.version('uvloop')}"
    return asyncio.new_event_loop, "asyncio"


def pattern(scale: int, count: int) -> Floats:
    """Return ``count`` float32 that depend on the index and are ``scale`` times those of scale 1; exact while ``scale`` < 2**14."""
    return np.resize(np.arange(1, _PERIOD + 1, dtype=np.float32) * np.float32(scale), count)


def count_wrong(result: Floats, size: int) -> int:
    """Return how many elements differ from the sum over ranks r of ``pattern(r + 1)``; exactly, since nothing was rounded."""
    return int(np.count_nonzero(result != pattern(size * (size + 1) // 2, result.size)))


def measure(adapter: Adapter, command: Answer) -> Answer:
    """Time one collective ``warmup + samples`` times; return the samples and the number of wrong elements on the measured buffers."""
    count = command["bytes"] // 4
    in_place = command["in_place"]
    source = pattern(adapter.rank + 1, count)
    x = source.copy()
    out = x if in_place else np.full_like(x, 0)  # full, not zeros: its pages are there before the clock runs
    call = adapter.bind(x, out)

    def prepare(left: int) -> None:
        if in_place:
            np.copyto(x, source)
        elif left == 0:
            out.fill(0)  # what an earlier call left there must not pass the check of the last one

    spent = adapter.samples(call, prepare, command["warmup"] + command["samples"])
    wrong = count_wrong(adapter.result(out), adapter.size) if command["check"] and adapter.reduces else None
    return {"ns": spent[command["warmup"] :], "wrong": wrong}


class Channel:
    """The worker's end of the protocol, on the descriptors it was started with.

    Standard output is given away before any library is loaded: what those print goes to standard error instead.
    """

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._cpu = self._wall = 0.0

    def say(self, answer: Answer) -> None:
        """Send one line and start counting how much CPU this process uses while nothing is asked of it."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Answer commands until the conductor closes the pipe. An exception is an answer too."""
        for line in sys.stdin:
            idle = [time.process_time() - self._cpu, time.monotonic() - self._wall]
            command = json.loads(line)
            try:
                answer = handlers[command["do"]](command)
            except Exception:
                answer = {"error": traceback.format_exc()}
            self.say({**answer, "idle": idle})


def place() -> tuple[int, int]:
    """Return rank and size, as the conductor says them."""
    return int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_SIZE"])


def main() -> None:
    """Serve as the rank that the environment says, of the system named by the first argument."""
    channel = Channel()
    gc.disable()  # a collection inside a window would be charged to whoever is measured; workers make no garbage worth it
    rank, size = place()
    try:
        adapter = ADAPTERS[sys.argv[1]](rank, size)
        uses = adapter.setup()
    except Exception:
        channel.say({"error": traceback.format_exc()})
        raise
    channel.say({"pid": os.getpid(), "uses": {"python": sys.version.split()[0], "numpy": np.__version__, **uses}})
    channel.serve({"all_reduce": lambda command: measure(adapter, command)})
    adapter.close()


if __name__ == "__main__":
    main()
