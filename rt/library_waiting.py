"""How calls of a library are waited for: requests that are tested by a loop, by a thread, or by who blocks; and a thread for large calls.

May live here: everything that waits for MPI or NCCL, and how little it costs. May not: what a call is (``transports.mpi``,
``transports.nccl``), groups (``rt.library_group``).

MPI makes progress only inside its functions, tells nobody when something has ended, and its own waiting burns a core. So a **small**
call is a request that a running loop tests in each turn, for a bounded time; who needs longer is tested by one thread of the process,
which sleeps in between, the longer the longer nothing has ended. A single test of a **large** call takes up to 70 ms, as long as the
piece of work that it does: such calls are made by a thread of their group, blocking, once all ranks have come. What NCCL has launched
ends with an event of CUDA's, which is looked at in the same way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from rt.aio import LoopDriver

LOOP_BYTES = 4 << 20  # a test takes up to 0.6 ms with both libraries; at 16 MiB it takes 3
_TURNING_SECONDS = 2e-3  # for which a loop tests a call of few bytes
_TURNING_PER_BYTE = 1.5e-9
_TURN_SECONDS = 3e-5  # of testing per turn of a loop: a turn itself takes several microseconds, a test one
_BURST_SECONDS = 1e-4
_NAP_SHORTEST, _NAP_LONGEST = 5e-5, 1e-2
_NAP_SHARE = 16  # who has waited for so long sleeps for a sixteenth of it: that is what the wait may last longer for it


def nap(waited: float) -> None:
    """Sleep, as long as fits who has waited for that many seconds."""
    time.sleep(min(max(waited / _NAP_SHARE, _NAP_SHORTEST), _NAP_LONGEST))


def patiently(test: Callable[[], bool], give_up: Callable[[], bool]) -> bool:
    """Test until it is True, which costs a core for a moment and little after that; False if ``give_up`` was True first."""
    began = time.monotonic()
    while not give_up():
        until = time.monotonic() + _BURST_SECONDS
        while True:
            if test():
                return True
            now = time.monotonic()
            if now > until:
                break
        nap(now - began)
    return False


class Request:
    """A non-blocking call that has not ended.

    Args:
        test: MPI's test of it; True once, when it has ended.
        end: called then, in whatever thread tested.
        fail: called with what ``test`` or ``end`` raised.
        nbytes: that it moves.
        owner: the group, by which requests are given up together.
        memory: what MPI reads and writes until then, which a request of mpi4py does not keep alive.
    """

    def __init__(
        self, test: Callable[[], bool], end: Callable[[], None], fail: Callable[[Exception], None], nbytes: int, owner: object,
        memory: object,
    ) -> None:  # fmt: skip
        self.test, self.end, self.fail, self.owner, self.memory = test, end, fail, owner, memory
        self.turning_until = time.monotonic() + _TURNING_SECONDS + nbytes * _TURNING_PER_BYTE


class Requests:
    """All requests of a process. Only one thread tests at a time: MPI forbids to test a request from two."""

    def __init__(self) -> None:
        self._open: list[Request] = []
        self._given_up: list[Request] = []  # MPI may still use their memory
        self._testing = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._changed = 0.0  # when one was added or ended

    def add(self, request: Request) -> None:
        """Take note of a request; somebody must drive it (``turn``, ``watch`` or ``patiently``)."""
        self._changed = time.monotonic()
        self._open.append(request)

    def __len__(self) -> int:
        return len(self._open)

    def turn(self) -> None:
        """Test for a moment, or until something has ended."""
        until = time.monotonic() + _TURN_SECONDS
        while self._open and not self.poll() and time.monotonic() < until:
            pass

    def poll(self) -> bool:
        """Test every request once, and end those that have; say whether there were any."""
        if not self._testing.acquire(blocking=False):
            return False
        ended: list[tuple[Request, Exception | None]] = []
        try:
            for request in list(self._open):
                try:
                    if request.test():
                        ended.append((request, None))
                except Exception as error:
                    ended.append((request, error))
            for request, _ in ended:
                if request in self._open:
                    self._open.remove(request)
        finally:
            self._testing.release()
        for request, found in ended:  # without the lock: this tells waiters, who may do anything
            self._changed = time.monotonic()
            try:
                if found is None:
                    request.end()
            except Exception as error:
                found = error
            if found is not None:
                request.fail(found)
        return bool(ended)

    def turning(self) -> bool:
        """Say whether a loop should test again in its next turn; if not, see to it that a thread does."""
        if not self._open:
            return False
        now = time.monotonic()
        if any(request.turning_until > now for request in self._open):
            return True
        self.watch()
        return False

    def watch(self) -> None:
        """Have the thread test what is open."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="rt-mpi", daemon=True)
            self._thread.start()
        self._news.set()

    def _watch(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            while self._open:
                until = time.monotonic() + _BURST_SECONDS
                while self._open and (now := time.monotonic()) < until:
                    self.poll()
                nap(now - self._changed)

    def give_up(self, owner: object) -> None:
        """Stop testing the requests of a group that failed; their memory stays MPI's."""
        mine = [request for request in self._open if request.owner is owner]
        self._given_up += mine
        self._open = [request for request in self._open if request not in mine]


class Driver:
    """What a loop does for an MPI group: its turns for requests, besides the ring's driver for what goes over the links."""

    def __init__(self, ring: LoopDriver, requests: Requests) -> None:
        self._ring = ring
        self._requests = requests
        self._asked = False
        self.waiter = ring.waiter
        self.follow = ring.follow

    @property
    def turned(self) -> float:
        """When the loop had its last turn, see ``Work.__await__``."""
        return self._ring.turned

    @turned.setter
    def turned(self, value: float) -> None:
        self._ring.turned = value

    def spin(self) -> None:
        """Test, and go on in the next turn if that is worth while; the ring's links have theirs."""
        if len(self._requests):
            self._requests.turn()
            self.ask()
        if self._ring.engine.in_flight():  # else it would only poll, for longer than a small call of MPI takes
            self._ring.spin()

    def ask(self) -> None:
        """Have the loop test in its next turn."""
        if not self._asked and self._requests.turning():
            self._asked = True
            self._ring.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._asked = False
        self._requests.turn()
        self.ask()


class Worker:
    """Makes the large calls of a group, one after the other, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting = 0

    def put(self, job: Callable[[], None]) -> None:
        """Have ``job`` called, which raises nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"rt-mpi {self._name}", daemon=True)
            self._thread.start()
        self._waiting += 1
        self._jobs.put(job)

    @property
    def busy(self) -> bool:
        """Whether a job has not ended."""
        return self._waiting > 0

    def _run(self) -> None:
        while True:
            self._jobs.get()()
            self._waiting -= 1

