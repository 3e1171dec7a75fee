"""Streams, events and devices of the stand-in for CuPy; see ``cupy``.

May live here: what is launched, where, and when it has ended. May not: arrays (``cupy``), NCCL (``cupy.cuda.nccl``).

Each stream is a thread that does what was launched on it, in that order. As many devices as ``STANDIN_DEVICES`` says (1) share the memory.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_local = threading.local()


def _count() -> int:
    """Count the devices that CUDA_VISIBLE_DEVICES allows; which they are is nothing to the stand-in."""
    there, allowed = int(os.environ.get("STANDIN_DEVICES", "1")), os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if allowed is None else min(there, len(allowed.split(",")) if allowed else 0)


runtime = SimpleNamespace(getDeviceCount=_count, getDevice=lambda: Device().id)


class Device:
    """As CuPy's: the device that is current in a thread."""

    def __init__(self, device: Any = None) -> None:
        current = getattr(_local, "device", 0)
        self.id: int = current if device is None else getattr(device, "id", device)
        if not 0 <= self.id < runtime.getDeviceCount():
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def use(self) -> None:
        _local.device = self.id

    def __enter__(self) -> Device:
        _local.devices = [*getattr(_local, "devices", []), getattr(_local, "device", 0)]
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        _local.device = _local.devices.pop()


class Stream:
    """As CuPy's: kernels are launched on it and run in their order."""

    null: Stream
    _made = 0

    def __init__(self, null: bool = False, ptds: bool = False, non_blocking: bool = False) -> None:
        Stream._made += 1
        self.ptr = 0 if null else Stream._made
        self.device_id = getattr(_local, "device", 0)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._captured: list[Callable[[], None]] | None = None
        _streams[self.ptr] = self

    def _launch(self, job: Callable[[], None]) -> None:
        if self._captured is not None:
            self._captured.append(job)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"stand-in stream {self.ptr}", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:
                traceback.print_exc()
            del job

    def synchronize(self) -> None:
        ended = threading.Event()
        self._launch(ended.set)
        ended.wait()

    def wait_event(self, event: Event) -> None:
        ended = event._ended
        self._launch(lambda: ended.wait() and None)

    def is_capturing(self) -> bool:
        return self._captured is not None

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> Graph:
        jobs, self._captured = self._captured or [], None
        return Graph(jobs)

    def __enter__(self) -> Stream:
        _local.streams = [*getattr(_local, "streams", []), self]
        return self

    def __exit__(self, *_: object) -> None:
        _local.streams.pop()


class Graph:
    """What was captured."""

    def __init__(self, jobs: list[Callable[[], None]]) -> None:
        self._jobs = jobs

    def launch(self, stream: Stream | None = None) -> None:
        for job in self._jobs:
            (stream or get_current_stream())._launch(job)


_streams: dict[int, Stream] = {}
Stream.null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Stream:
    return next(reversed(getattr(_local, "streams", [])), Stream.null)


class Event:
    """As CuPy's: a mark in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._ended = threading.Event()
        self._ended.set()
        self._in_graph = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.null
        self._in_graph = stream.is_capturing()
        self._ended = threading.Event()
        stream._launch(self._ended.set)

    @property
    def done(self) -> bool:
        if self._in_graph:
            raise RuntimeError("cudaErrorCapturedEvent: operation not permitted on an event last recorded in a capturing stream")
        return self._ended.is_set()

    def synchronize(self) -> None:
        self._ended.wait()
