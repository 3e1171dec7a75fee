"""Memory of results: used again when arrays die, bounded, and given back when a program stops calling.

May live here: the pool, its keeper, and what both mean for arrays that users hold, in this process and over real ranks. May not: results
as such (``test_collectives``), cancelling as such (``test_cancel``).
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import ranks
from peers import LENT, needs_peers
from worlds import coordinated, listening_to_log, world

from rt import _fastpath, pool
from rt.errors import GroupAbortedError

FLOAT = np.dtype(np.float32)
MIB = 1 << 20
KEPT_BYTES = 64 * MIB  # as in _pool.pxi


def floats(nbytes: int) -> Any:
    return _fastpath.empty((nbytes // 4,), FLOAT)


def address(array: Any) -> int:
    return int(array.ctypes.data)


def idle() -> int:
    return _fastpath.pool_statistics()["idle"]


def live() -> int:
    return _fastpath.pool_statistics()["live"]


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def kept() -> Iterator[int]:
    """Memory is kept, and only the test gives it back."""
    gc.collect()
    before = live()
    fd = _fastpath.pool_open()
    assert fd is not None
    try:
        yield fd
    finally:
        _fastpath.pool_close()
        gc.collect()
        assert (live(), idle()) == (before, 0)


# -- slabs --------------------------------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_dead_array_is_used_again(kept: int) -> None:
    first = floats(MIB)
    first.fill(1)
    where, times = address(first), _fastpath.pool_statistics()["reused"]
    del first
    again = floats(MIB)
    assert address(again) == where and _fastpath.pool_statistics()["reused"] == times + 1
    assert address(floats(MIB)) != where


def test_memory_is_for_arrays_of_about_the_size(kept: int) -> None:
    where = address(floats(100 * MIB))
    assert address(floats(99 * MIB)) == where
    assert address(floats(80 * MIB)) != where
    assert idle() < 2 * 104 * MIB


def test_the_last_view_of_an_array_keeps_its_memory(kept: int) -> None:
    array = floats(MIB)
    array.fill(3)
    where, view = address(array), array[1000:2000].reshape(10, 100).T
    buffer = memoryview(array)
    del array
    other = floats(MIB)
    other.fill(5)
    assert address(other) != where and (view == 3).all()
    del view
    assert address(floats(MIB)) != where
    del buffer
    assert address(floats(MIB)) == where


def test_small_results_are_no_business_of_the_pool(kept: int) -> None:
    before = live()
    arrays = [floats(MIB - 4), _fastpath.empty((), FLOAT), _fastpath.empty((0, 1 << 40), FLOAT)]
    assert live() == before
    assert [array.shape for array in arrays] == [((MIB - 4) // 4,), (), (0, 1 << 40)]


def test_memory_that_there_is_not_is_a_memory_error_as_numpys(kept: int) -> None:
    large = floats(8 * MIB)
    before = live()
    del large
    with pytest.raises(MemoryError, match="Unable to allocate"):
        _fastpath.empty((1 << 58,), FLOAT)
    assert live() < before and idle() == 0  # what was idle might have been what was missing
    with pytest.raises(ValueError, match="too big"):
        _fastpath.empty((1 << 62, 1 << 62), FLOAT)


def test_arrays_are_like_any_others(kept: int) -> None:
    array = floats(8 * MIB)
    array[:] = np.arange(len(array))
    assert type(array) is np.ndarray and array.base is None and array.flags.owndata and array.flags.carray
    assert address(array) % mmap.PAGESIZE == 0
    array.flags.writeable = False
    array.flags.writeable = True
    assert np.array_equal(pickle.loads(pickle.dumps(array, protocol=5)), array)
    taken = np.from_dlpack(array)
    assert address(taken) == address(array)
    del taken
    gc.collect()
    array.resize(len(array) - 4)
    assert array[-1] == len(array) - 1
    array.resize(3 * len(array))
    assert array[len(array) // 3 - 1] == len(array) // 3 - 1 and not array[len(array) // 3 :].any()
    array.resize(1000)
    assert np.array_equal(array, np.arange(1000, dtype=np.float32))
    array.resize(0)


def test_so_much_is_kept_as_was_in_use_at_once_and_64_mib(kept: int) -> None:
    sizes = [(32 + 4 * number) * MIB for number in range(8)]  # a class each
    where = [address(floats(nbytes)) for nbytes in sizes]
    most = max(sizes) + KEPT_BYTES
    assert sum(sizes) > most >= idle() > most - max(sizes)
    assert address(floats(sizes[-1])) == where[-1]
    assert idle() + sizes[0] > most  # so the array of the first size, which lay longest, must have gone
    together = [floats(nbytes) for nbytes in sizes]
    del together
    assert idle() == sum(sizes)


def test_what_lies_unused_from_one_turn_to_the_next_goes(kept: int) -> None:
    sizes = 3 * MIB, 5 * MIB
    first, second = (floats(nbytes) for nbytes in sizes)
    rooms = live()
    del first
    assert _fastpath.pool_turn() == (0, idle())
    del second
    small = rooms - idle()
    gone, left = _fastpath.pool_turn()
    assert gone and left and gone + left == rooms and small < rooms
    assert _fastpath.pool_turn() == (left, 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="nothing tells what is in memory here")
def test_what_goes_goes_back_to_the_system(kept: int) -> None:
    nbytes = 128 * MIB
    array = floats(nbytes)
    before = resident()
    array.fill(1)
    assert resident() - before > 0.9 * nbytes
    del array
    assert resident() - before > 0.9 * nbytes
    _fastpath.pool_turn()
    _fastpath.pool_turn()
    assert resident() - before < 0.1 * nbytes


def test_where_nobody_watches_nothing_is_kept() -> None:
    before = live()
    assert _fastpath.pool_open() is not None
    array = floats(MIB)
    array.fill(1)
    _fastpath.pool_close()
    assert live() > before and (floats(MIB) is not None) and (array == 1).all()
    del array
    assert (live(), idle()) == (before, 0)


def test_arrays_live_and_die_in_many_threads(kept: int) -> None:
    wrong: list[int] = []

    def churn(number: int) -> None:
        held: list[Any] = []
        for turn in range(300):
            array = floats((1 + (turn + number) % 3) * MIB)
            array[::1024] = value = number * 1000 + turn
            held.append((array, value))
            if len(held) > 3:
                array, value = held.pop(turn % 3)
                wrong.extend([value] * bool((array[::1024] != value).any()))
            if turn % 100 == 0:
                _fastpath.pool_turn()

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- the keeper ----------------------------------------------------------------------------------------------------------------------------


class Clock:
    """What a Keeper needs of a loop; the test says when a timer ends."""

    def __init__(self) -> None:
        self.readers: dict[int, Any] = {}
        self.timers: list[Any] = []

    def add_reader(self, fd: int, callback: Any) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]

    def call_later(self, seconds: float, callback: Any) -> Any:
        assert seconds == pool.PERIOD_SECONDS
        self.timers.append(callback)
        return self

    def cancel(self) -> None:
        self.timers.clear()


def readable(fd: int) -> bool:
    try:
        return bool(os.read(fd, 8))
    except BlockingIOError:
        return False


def test_there_is_a_timer_only_while_memory_is_kept() -> None:
    clock = Clock()
    keeper = pool.Keeper(clock)  # type: ignore[arg-type]
    (fd,) = clock.readers
    array = floats(MIB)
    assert not readable(fd) and not clock.timers
    del array
    clock.readers[fd]()
    for _ in range(10):
        floats(MIB)  # it dies at once
    assert not readable(fd)  # one word is enough
    for looks in (1, 2):
        assert len(clock.timers) == 1, looks
        clock.timers.pop()()
    assert not clock.timers and idle() == 0
    floats(MIB)
    clock.readers[fd]()
    assert len(clock.timers) == 1
    keeper.close()
    assert not clock.readers and not clock.timers and idle() == 0


def test_one_keeper_is_enough_for_a_process() -> None:
    clocks = Clock(), Clock()
    keepers = [pool.Keeper(clock) for clock in clocks]  # type: ignore[arg-type]
    assert [len(clock.readers) for clock in clocks] == [1, 0]
    floats(MIB)
    keepers[1].close()
    assert idle() > 0
    keepers[0].close()
    assert idle() == 0


def test_the_control_thread_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PERIOD_SECONDS", 0.01)
    with listening_to_log() as messages, world(coordinated(2)) as members:
        for member in members:
            member.wiring()
        for times in (1, 2):
            array = floats(64 * MIB)
            array.fill(1)
            del array
            messages.wait_for("; 0 B are kept", times)
            assert idle() == 0
    assert _fastpath.pool_open() is not None  # nobody watches any more
    _fastpath.pool_close()


# -- real ranks ----------------------------------------------------------------------------------------------------------------------------

COUNT = 1 << 20  # of float32: 4 MiB, and 2 MiB for one of two blocks


async def calling_twice(rt: Any, group: Any, ctl: ranks.Ctl) -> list[str]:
    """Names of the calls whose result was not in memory that is kept, or that needed new memory when they were made again."""
    x, other = np.full(COUNT, 2.0, np.float32), 1 - group.rank()
    half, rows, strided = x[: COUNT // 2], [COUNT // 2] * 2, np.full((COUNT, 2), 2.0, np.float32)[:, 0]
    calls: dict[str, Callable[[], Any]] = {
        "all_sum": lambda: group.all_sum(x),
        "of what is not contiguous": lambda: group.all_sum(strided),
        "all_gather": lambda: group.all_gather(half),
        "all_gather_v": lambda: group.all_gather_v(half, rows),
        "sum_scatter": lambda: group.sum_scatter(x),
        "reduce_scatter_v": lambda: group.reduce_scatter_v(x, rows),
        "broadcast": lambda: group.broadcast(x),
        "scatter": lambda: group.scatter(x),
        "all_to_all": lambda: group.all_to_all(x),
        "all_to_all_v": lambda: group.all_to_all_v(x, rows, rows),
        "scan": lambda: group.scan(x),
        "exscan": lambda: group.exscan(x),
        "sendrecv": lambda: group.sendrecv(x, other, other),
        "list": lambda: group.all_sum([x, x[:5]]),
        "gradients": lambda: group.average_gradients([half, half]),
        "gradients, converted": lambda: group.average_gradients([x], communication_type=np.float64),
        "objects": lambda: group.broadcast_object(x, root=1),
        "reduce": lambda: group.reduce(x),
        "gather": lambda: group.gather(half),
    }
    bad = []
    for name, call in calls.items():
        all_bytes = []
        for _ in range(2):
            result = await call()
            if result is not None and result is not x and live() < COUNT // 2 * 4:
                bad.append(f"{name}: {live()} B")
            del result
            all_bytes.append(live() + idle())
        if all_bytes[1] > all_bytes[0]:
            bad.append(f"{name}: {all_bytes}")
    gc.collect()
    return bad if live() == 0 else [*bad, f"in use: {live()} B"]


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_every_collective_uses_memory_again(front: str) -> None:
    assert ranks.results(2, calling_twice, front=front) == [[], []]


async def in_another_library(rt: Any, group: Any, ctl: ranks.Ctl, library: str) -> tuple[bool, bool]:
    """Whether tensors keep what they hold while results of their size come and go, and whether the memory comes back after them."""
    if library == "torch":
        import torch

        x = torch.ones(COUNT)
    else:
        import jax.numpy as jnp

        x = jnp.ones(COUNT, jnp.float32)
    held = [await group.all_sum(x) for _ in range(3)]
    for _ in range(5):
        await group.all_sum(np.full(COUNT, 50, np.float32))
    right = all(bool((each == 2).all()) for each in held)
    del held
    gc.collect()
    return right, live() == 0


@pytest.mark.parametrize("library", [pytest.param(name, marks=needs_peers(name)) for name in ("torch", "jax")])
def test_tensors_of_other_libraries_keep_the_memory_of_results(library: str) -> None:
    assert ranks.results(2, in_another_library, args=(library,), timeout=60, **LENT) == [(True, True)] * 2


async def pausing(rt: Any, group: Any, ctl: ranks.Ctl) -> tuple[int, int]:
    """Bytes that are kept, and by how much more memory is in use, some time after a large result died."""
    pool.PERIOD_SECONDS = 0.01
    x = np.full(16 << 20, 1.0, np.float32)
    await group.all_sum(x[: 1 << 20])  # the links' own memory is there from here on
    with listening_to_log() as messages:
        before = resident()
        result = await group.all_sum(x)
        assert resident() - before > 0.9 * x.nbytes
        times = messages.count("; 0 B are kept")
        del result
        messages.wait_for("; 0 B are kept", times + 1)
        return idle(), resident() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="nothing tells what is in memory here")
@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_a_program_that_stops_calling_gets_small_again(front: str) -> None:
    for left, more in ranks.results(2, pausing, front=front):
        assert left == 0 and more < 8 * MIB


async def cancelling(rt: Any, group: Any, ctl: ranks.Ctl) -> bool:
    """Cancel calls that the peer has not made, and use memory of that size while their works go on."""
    x, out = np.full(COUNT, group.rank() + 1.0, np.float32), np.full(COUNT, 9.0, np.float32)
    held: list[Any] = []
    for options in ({}, {"out": out}):
        if group.rank():
            await group.recv((), np.float32, 0)
            assert (await group.all_sum(x) == 3).all()
            await group.barrier()
            continue
        task = asyncio.ensure_future(group.all_sum(x, **options))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        del task
        out.fill(9)
        held += [floats(x.nbytes) for _ in range(3)]
        for array in held:
            array.fill(7)
        assert live() == (len(held) + 2) * x.nbytes  # the work's source and target are its own now
        await group.send(np.float32(1), 1)
        await group.barrier()
    return bool((out == 9).all()) and all((array == 7).all() for array in held) and live() == len(held) * x.nbytes


@pytest.mark.parametrize("front", ["asyncio", "uvloop"])
def test_memory_of_a_cancelled_call_is_not_used_again_while_its_work_goes_on(front: str) -> None:
    assert ranks.results(2, cancelling, front=front) == [True, True]


async def aborting(rt: Any, group: Any, ctl: ranks.Ctl, rounds: int) -> tuple[bool, int]:
    """Abort groups in the middle of a call, and use the memory of its result for another over the same links."""
    x, wrong, aborted = np.full(2 * COUNT, 1.0, np.float32), 0, 0
    for number in range(rounds):
        part = await group.split(0)
        try:
            task = asyncio.ensure_future(part.all_sum(x * 100))  # the other may have aborted already
            for _ in range(number % 5):
                await asyncio.sleep(0)
            if number % 2 == group.rank():
                part.abort()
            await task
        except GroupAbortedError:
            aborted += 1
        task = None
        wrong += int(np.count_nonzero(await group.all_sum(x) != 2))
    return wrong == 0 and _fastpath.pool_statistics()["reused"] >= rounds, aborted


@pytest.mark.parametrize("front", ["asyncio", "uvloop"])
def test_memory_of_a_failed_call_is_written_by_nobody(front: str) -> None:
    for right, aborted in ranks.results(2, aborting, front=front, args=(20,)):
        assert right and aborted > 5


async def forking(rt: Any, group: Any, ctl: ranks.Ctl) -> tuple[int, bool]:
    """Fork on rank 0, with an array in use and another kept; how the child ended, and whether the parent found its memory again."""
    result, x = None, np.full(COUNT, 1.0, np.float32)
    result = await group.all_sum(x)
    where = address(await group.all_sum(x))
    status = 0
    if group.rank() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist, as the documentation of rt allows
            child = os.fork()
        if child == 0:
            right = idle() == 0 and bool((result == 2).all())
            del result
            floats(x.nbytes).fill(5)
            os._exit(7 if right and live() == 0 and idle() == 0 else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222
    again = await group.all_sum(x)
    return status, address(again) == where and bool((again == 2).all() and (result == 2).all())


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_forked_child_keeps_nothing_and_takes_nothing(front: str) -> None:
    assert ranks.results(2, forking, front=front) == [(7, True), (0, True)]


held_at_exit: list[Any] = []


async def leaving(rt: Any, group: Any, ctl: ranks.Ctl) -> None:
    """End with results in use: in a module, in a circle, and in a thread that goes on making more."""
    held_at_exit.extend([await group.all_sum(np.ones(COUNT, np.float32)), held_at_exit])

    def churn() -> None:
        while True:
            floats(2 * MIB)[0] = 1

    threading.Thread(target=churn, daemon=True).start()


@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_arrays_may_live_to_the_end_of_the_interpreter(front: str) -> None:
    assert ranks.results(2, leaving, front=front) == [None, None]
