"""What can be called, how, and what is refused: the same in both front ends.

May live here: signatures, arguments, ``init`` and ``close``, works as objects, threads and loops, what ``import rt`` loads. May not: the
results of collectives (``test_collectives``), failures of ranks.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, Ranks, in_order, results

import rt
import rt.sync
from rt.world import GOODBYE_SECONDS

OPS = (
    "all_reduce", "all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "broadcast", "barrier", "send", "recv", "recv_like",
    "reduce", "gather", "scatter", "all_to_all", "all_gather_v", "reduce_scatter_v", "gather_v", "scatter_v", "all_to_all_v", "scan",
    "exscan", "sendrecv",
)  # fmt: skip
OBJECTS = ("send_object", "recv_object", "broadcast_object", "gather_objects", "all_gather_objects")
CALLS = (*OPS, *OBJECTS, "init", "is_available", "rank", "size", "close", "abort", "average_gradients")
LOOPS = FRONTS[1:]
fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", LOOPS)


# ---- signatures -----------------------------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any], *without: str) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", *without)]


@pytest.mark.parametrize("name", CALLS)
def test_both_front_ends_take_the_same_arguments(name: str) -> None:
    assert parameters(getattr(rt, name)) == parameters(getattr(rt.sync, name))


@pytest.mark.parametrize("name", [*OPS, *OBJECTS, "average_gradients"])
def test_methods_of_groups_take_the_same_arguments(name: str) -> None:
    expected = parameters(getattr(rt, name), "group")
    assert parameters(getattr(rt.Group, name)) == parameters(getattr(rt.sync.Group, name)) == expected


def test_both_groups_have_the_same_methods() -> None:
    def public(group: type) -> dict[str, Any]:
        return {name: parameters(member) for name, member in inspect.getmembers(group, callable) if not name.startswith("_")}

    assert public(rt.Group) == public(rt.sync.Group)
    assert set(public(rt.Group)) == {*OPS, *OBJECTS, "average_gradients", "rank", "size", "split", "abort"}


def test_what_is_exported() -> None:
    errors = {name for name in rt.__all__ if name.endswith("Error")}
    assert set(rt.__all__) - {"Work", "run"} == set(rt.sync.__all__) == {*CALLS, *errors, "Group"}
    assert errors == {name for name in vars(rt.errors) if name.endswith("Error")}
    assert all(getattr(rt, name) is getattr(rt.sync, name) for name in errors)
    assert all(hasattr(rt, name) for name in rt.__all__) and all(hasattr(rt.sync, name) for name in rt.sync.__all__)


@pytest.mark.parametrize("name", OPS)
def test_what_every_operation_takes_by_keyword_only(name: str) -> None:
    found = {p.name: p for p in inspect.signature(getattr(rt, name)).parameters.values()}
    expected = {"group", "stream", "timeout", "key"}
    expected |= {"out"} if name not in ("barrier", "send") else set()
    expected |= {"tag"} if name in ("send", "recv", "recv_like", "sendrecv") else set()
    assert {p.name for p in found.values() if p.kind is p.KEYWORD_ONLY} == expected
    assert all(found[each].default is None for each in expected - {"tag"})
    assert "tag" not in expected or found["tag"].default == 0


@pytest.mark.parametrize("name", OBJECTS)
def test_what_every_call_with_objects_takes_by_keyword_only(name: str) -> None:
    found = {p.name: p.default for p in inspect.signature(getattr(rt, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert found == {"group": None, "timeout": None} | ({"tag": 0} if name in ("send_object", "recv_object") else {})


def test_average_gradients_has_the_arguments_of_mlx() -> None:
    names = ["gradients", "group", "all_reduce_size", "communication_type", "communication_stream"]
    assert list(inspect.signature(rt.average_gradients).parameters) == names
    assert inspect.signature(rt.average_gradients).parameters["all_reduce_size"].default == 32 * 1024**2


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("init", "rank", "size")])
def test_every_call_is_documented(name: str) -> None:
    assert getattr(rt, name).__doc__ and getattr(rt.sync, name).__doc__


# ---- one process: init and groups of one ----------------------------------------------------------------------------------------------


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in list(os.environ):
        if name.startswith(("RT_", "MLX_", "TORCHELASTIC_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    yield monkeypatch


def every_init(*args: Any, **keywords: Any) -> Iterator[Any]:
    yield lambda: rt.sync.init(*args, **keywords)
    yield lambda: asyncio.run(rt.init(*args, **keywords))


@pytest.mark.usefixtures("unconfigured")
def test_nothing_configured_is_a_group_of_one() -> None:
    for backend in ("any", "ring", "mpi", "nccl", "jaccl"):
        for init in every_init(backend=backend):
            group = init()
            assert (group.rank(), group.size()) == (0, 1), backend


@pytest.mark.usefixtures("unconfigured")
def test_strict_refuses_a_group_of_one() -> None:
    for backend in ("any", "ring", "mpi"):
        for init in every_init(True, backend):
            with pytest.raises(rt.ConfigError, match=r"RT_RANK|does not have"):
                init()
    assert rt.sync.init().size() == 1, "and later calls are not spoilt"


@pytest.mark.usefixtures("unconfigured")
def test_unknown_backend() -> None:
    for init in every_init(backend="bogus"):
        with pytest.raises(ValueError, match=r"The only valid values for backend are 'any', .* but 'bogus' was provided"):
            init()


@pytest.mark.usefixtures("unconfigured")
def test_strict_that_is_no_bool() -> None:
    for init in every_init("mpi"):
        with pytest.raises(TypeError, match="did you mean backend='mpi'"):
            init()


def test_is_available() -> None:
    for module in (rt, rt.sync):
        assert module.is_available() is True and module.is_available("ring") is True  # type: ignore[attr-defined]
        assert module.is_available("bogus") is False  # type: ignore[attr-defined]


def test_groups_are_made_by_init_and_split() -> None:
    for group in (rt.Group, rt.sync.Group):
        with pytest.raises(TypeError):
            group()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="made by init"):
            group(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unconfigured")
def test_a_group_of_one_returns_x() -> None:
    x, scalar = np.arange(6.0).reshape(3, 2), np.asarray(1.5)
    group = rt.sync.init()
    for each in (x, scalar):
        for call in (
            group.all_sum, group.all_max, group.all_min, group.all_reduce, group.all_gather, group.sum_scatter, group.broadcast,
            group.reduce, group.gather, group.scatter, group.all_to_all, group.scan,
        ):  # fmt: skip
            assert call(each) is each, call
    for call in (group.all_gather_v, group.reduce_scatter_v, group.gather_v, group.scatter_v):
        assert call(x, [3]) is x, call
    assert group.all_to_all_v(x, [3], [3]) is x
    assert np.array_equal(group.exscan(x, "prod"), np.ones_like(x))
    out = np.empty_like(x)
    assert group.all_sum(x, out=out) is out and np.array_equal(out, x)
    assert group.barrier() is None  # type: ignore[func-returns-value]
    assert group.all_sum(2).shape == ()
    assert (group.split(3).size(), group.split(3, 5).rank()) == (1, 0)
    with pytest.raises(ValueError, match="Cannot send to a singleton group"):
        group.send(x, 0)
    with pytest.raises(ValueError, match="Cannot send to a singleton group"):
        group.sendrecv(x, 0, 0)
    for call in (lambda: group.recv((2,), np.float32, 0), lambda: group.recv_like(x, 0)):
        with pytest.raises(ValueError, match="Cannot recv from a singleton group"):
            call()
    with pytest.raises(TypeError, match="mean"):
        group.all_reduce(np.arange(3), "mean")
    with pytest.raises(TypeError, match="list"):
        group.all_sum([1, 2])


@pytest.mark.usefixtures("unconfigured")
def test_a_group_of_one_in_a_loop() -> None:
    async def main() -> None:
        x = np.arange(3)
        assert await rt.all_sum(x) is x
        group = await rt.init()
        assert await group.all_gather(x) is x and (await group.split(0)).size() == 1
        assert (rt.rank(), rt.size()) == (0, 1)
        await rt.close()
        assert await rt.all_sum(x) is x

    asyncio.run(main())


# ---- arguments that are refused -------------------------------------------------------------------------------------------------------


async def refused_arguments(face: Any, group: Any, ctl: Any) -> None:
    me, x, i = group.rank(), np.ones((4, 3), np.float32), np.arange(4)
    fixed = np.ones((4, 3), np.float32)
    fixed.flags.writeable = False
    attempts: list[tuple[Any, str, Callable[[], Any]]] = [
        (TypeError, "list", lambda: face.all_sum([1, 2])),
        (TypeError, "tuple", lambda: face.all_gather((1, 2))),
        (TypeError, "NoneType", lambda: face.all_sum(None)),
        (TypeError, "str", lambda: face.all_sum("text")),
        (TypeError, "not supported", lambda: face.all_sum(np.array(["text"]))),
        (TypeError, "not supported", lambda: face.all_sum(np.array([None]))),
        (TypeError, "not supported", lambda: face.all_sum(np.zeros(3, np.longdouble))),
        (TypeError, "not supported", lambda: face.all_sum(np.zeros(3, "M8[s]"))),
        (TypeError, "byte order", lambda: face.all_sum(np.zeros(3, ">i4"))),
        (TypeError, "float32", lambda: face.all_reduce(x, "and")),
        (TypeError, "int64", lambda: face.all_reduce(i, "mean")),
        (TypeError, "int64", lambda: face.sum_scatter(i, "mean")),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, "average")),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, None)),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, ["sum"])),
        (ValueError, r"\[sum_scatter\] Invalid shape=\(3, 2\) for a group of size 2", lambda: face.sum_scatter(np.ones((3, 2)))),
        (ValueError, r"\[sum_scatter\] Invalid shape=\(\)", lambda: face.sum_scatter(1.0)),
        (ValueError, "Invalid root=2", lambda: face.broadcast(x, 2)),
        (ValueError, "Invalid root=-1", lambda: face.broadcast(x, -1)),
        (TypeError, "root must be an integer", lambda: face.broadcast(x, 0.5)),
        (ValueError, "Invalid destination=99 for a group of size 2", lambda: face.send(x, 99)),
        (ValueError, "Invalid destination=-1", lambda: face.send(x, -1)),
        (ValueError, "itself", lambda: face.send(x, me)),
        (ValueError, "Invalid source=99 for a group of size 2", lambda: face.recv(3, np.float32, 99)),
        (ValueError, "itself", lambda: face.recv_like(x, me)),
        (TypeError, "tag", lambda: face.send(x, 1 - me, tag="a")),
        (ValueError, "64 bits", lambda: face.send(x, 1 - me, tag=2**64)),
        (ValueError, "negative", lambda: face.recv((3, -1), np.float32, 1 - me)),
        (TypeError, "shape", lambda: face.recv("ab", np.float32, 1 - me)),
        (TypeError, ".", lambda: face.recv((3,), "no dtype", 1 - me)),
        (ValueError, "shape", lambda: face.all_sum(x, out=np.empty((3, 4), np.float32))),
        (ValueError, "dtype", lambda: face.all_sum(x, out=np.empty((4, 3), np.float64))),
        (ValueError, "writeable", lambda: face.all_sum(x, out=fixed)),
        (ValueError, "contiguous", lambda: face.all_sum(x, out=np.empty((3, 4), np.float32).T)),
        (ValueError, "shape", lambda: face.all_gather(x, out=np.empty((4, 3), np.float32))),
        (ValueError, "shape", lambda: face.sum_scatter(x, out=np.empty((4, 3), np.float32))),
        (ValueError, "shape", lambda: face.recv((3,), np.float32, 1 - me, out=np.empty(4, np.float32))),
        (ValueError, r"has shape \(48,\) and dtype uint8", lambda: face.all_sum(x, out=bytearray(48))),
        (TypeError, "out must be an array, not list", lambda: face.all_sum(x, out=[x])),
        (TypeError, "group must be a Group", lambda: face.all_sum(x, group=0)),
        (TypeError, "group must be a Group", lambda: face.barrier(group="world")),
        (rt.ConfigError, "stream=None", lambda: face.all_sum(x, stream="gpu")),
        (rt.ConfigError, "key=", lambda: face.all_sum(x, key="a")),
        (ValueError, "timeout", lambda: face.all_sum(x, timeout=0)),
        (ValueError, "timeout", lambda: face.barrier(timeout=-1.0)),
        (ValueError, "timeout", lambda: face.send(x, 1 - me, timeout=float("nan"))),
        (TypeError, ".", lambda: face.all_sum(x, timeout="1")),
        (TypeError, "positional", lambda: face.all_sum(x, group)),
        (TypeError, "color", lambda: group.split("red")),
        (TypeError, "key", lambda: group.split(0, 0.5)),
        (ValueError, "64 bits", lambda: group.split(2**63)),
    ]
    for number, (error, words, call) in enumerate(attempts):
        with pytest.raises(error, match=words):
            await call()
            raise AssertionError(f"attempt {number} ({words}) was accepted")
    assert (await face.all_sum(np.full(3, me + 1.0))).tolist() == [3.0] * 3
    assert (await group.split(0)).size() == 2


@fronts
def test_bad_arguments_leave_the_group_usable(front: str) -> None:
    results(2, refused_arguments, front=front)


# ---- init, close ----------------------------------------------------------------------------------------------------------------------


async def cached(face: Any, group: Any, ctl: Any) -> None:
    again, ring = await face.init(), await face.init(backend="ring")
    assert again._core is ring._core is group._core
    assert (face.rank(), face.size()) == (group.rank(), group.size())
    assert int(await face.all_sum(1)) == int(await again.all_sum(1)) == 2
    # Groups of one front end are accepted by the other.
    other = rt.sync.Group(group._core) if ctl.front != "sync" else rt.Group(group._core)
    assert int(await face.all_sum(1, group=other)) == 2


@fronts
def test_init_returns_the_group_that_is_there(front: str) -> None:
    results(2, cached, front=front)


async def concurrent_init(rt: Any, group: Any, ctl: Any) -> None:
    first, second, third = await asyncio.gather(rt.init(), rt.init(), rt.init())
    assert first._core is second._core is third._core
    assert int(await rt.all_sum(1)) == 2


@loops
def test_init_twice_at_once(front: str) -> None:
    results(2, concurrent_init, front=front, init=False)


async def init_in_threads(rt: Any, group: Any, ctl: Any) -> None:
    groups: list[Any] = []
    threads = [threading.Thread(target=lambda: groups.append(rt.init().__await__)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(groups) == 3
    assert int(await rt.all_sum(1)) == 2


def test_init_in_three_threads() -> None:
    results(2, init_in_threads, init=False)


async def cancelled_init(rt: Any, group: Any, ctl: Any) -> None:
    """Who gives up waiting harms nobody else who waits, nor a later init."""
    if os.environ["RT_RANK"] == "0":
        impatient, patient, early = asyncio.create_task(rt.init()), asyncio.create_task(rt.init()), rt.all_sum(1)
        waiting = asyncio.ensure_future(_value(early))
        await asyncio.sleep(0)
        impatient.cancel()
        waiting.cancel()
        assert [type(e) for e in await asyncio.gather(impatient, waiting, return_exceptions=True)] == [asyncio.CancelledError] * 2
        ctl.tell("gave up")
        assert (await patient).size() == 2
        assert int(await early) == 2, "the call was made, whoever waits for it"
    else:
        ctl.hear()
        assert int(await rt.all_sum(1)) == 2
    assert int(await rt.all_sum(10)) == 20


async def _value(work: Any) -> Any:
    return await work


@loops
def test_cancelled_init(front: str) -> None:
    with Ranks(2, cancelled_init, front=front, init=False) as ranks:
        assert ranks.hear(0) == "gave up"
        ranks.tell(1, "go")
        for outcome in ranks.wait():
            assert outcome.error is None and outcome.returncode == 0, outcome


async def closing(rt: Any, group: Any, ctl: Any) -> None:
    sub = await group.split(0)
    await rt.barrier()
    await rt.close()
    await rt.close()
    for call in (lambda: rt.all_sum(1), lambda: group.barrier(), lambda: sub.all_sum(1), lambda: group.split(0)):
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                await call()
            assert type(caught.value).__name__ == "GroupClosedError" and "closed" in str(caught.value)
    # A new world may follow, on the same inherited socket.
    again = await rt.init()
    assert again._core is not group._core and int(await rt.all_sum(1)) == 2
    with pytest.raises(RuntimeError):
        await group.barrier()
    await rt.close()


@fronts
def test_close_and_init_again(front: str) -> None:
    results(2, closing, front=front)


async def close_often(rt: Any, group: Any, ctl: Any) -> list[float]:
    seconds = []
    for _ in range(6):
        await (await rt.init()).barrier()
        before = time.monotonic()
        await rt.close()
        seconds.append(time.monotonic() - before)
    return seconds


@fronts
def test_close_of_all_ranks_does_not_wait_for_its_limit(front: str) -> None:
    """Every rank says goodbye, so none may wait until the 5 s for those that do not are over."""
    for seconds in results(2, close_often, front=front, init=False, timeout=60):
        assert max(seconds) < GOODBYE_SECONDS - 1, seconds


async def close_first(rt: Any, group: Any, ctl: Any) -> None:
    await rt.close()
    rt.abort()
    assert (await rt.init()).size() == 2


@fronts
def test_close_and_abort_before_init_do_nothing(front: str) -> None:
    results(2, close_first, front=front, init=False)


# ---- works ----------------------------------------------------------------------------------------------------------------------------


async def work_object(rt: Any, group: Any, ctl: Any) -> None:
    work = rt.all_sum(np.ones(4, np.float32))
    assert isinstance(work, rt.Work)
    first, second = await work, await work
    assert first is second and work.done()
    both = await asyncio.gather(_value(work), _value(work))
    assert both[0] is both[1] is first
    assert repr(work) == f"<rt.Work {work.describe()} done>" and work.describe() == "all_sum #0 (float32, 16 B)"
    if group.rank():
        await rt.barrier()
        await rt.send(np.ones(3, np.float32), 0)
        return
    waiting = rt.recv(3, np.float32, 1)
    assert not waiting.done() and repr(waiting) == "<rt.Work recv #0 (float32, 12 B) in flight>", waiting
    found = await asyncio.gather(_value(waiting), _value(waiting), rt.barrier())
    assert found[0] is found[1]


@loops
def test_a_work_may_be_awaited_again(front: str) -> None:
    results(2, work_object, front=front)


async def names(rt: Any, group: Any, ctl: Any) -> list[str]:
    sub = await group.split(5)
    return [repr(group), repr(sub), repr(await sub.split(group.rank()))]


@fronts
def test_what_groups_are_called(front: str) -> None:
    module = "rt.sync" if front == "sync" else "rt"
    for rank, found in enumerate(results(2, names, front=front)):
        assert found[0] == f"<{module}.Group world: rank {rank} of 2>"
        assert found[1] == f"<{module}.Group world.split(color=5): rank {rank} of 2>"
        assert found[2] == f"<{module}.Group world.split(color=5).split(color={rank}): rank 0 of 1>"


async def early_calls(rt: Any, group: Any, ctl: Any) -> None:
    """Rank 0 calls before the group has formed, rank 1 after: only the order of the calls can match them."""
    me = int(os.environ["RT_RANK"])
    if me:
        await rt.init()
    works = [rt.all_sum(np.full(1, i)) for i in range(3)]
    wrong = None if me else rt.all_sum([1, 2])
    works.append(rt.broadcast(np.full(1, 7 + me), 1))
    group = await rt.init()
    works.append(group.all_sum(np.full(1, 100)))
    if me:
        found = await in_order(works)
    else:
        found = (await in_order(works[::-1]))[::-1]
        with pytest.raises(TypeError, match="list"):
            await wrong
    assert [int(x[0]) for x in found] == [0, 2, 4, 8, 200]
    assert await works[0] is found[0]


@loops
def test_calls_before_init_keep_their_order(front: str) -> None:
    results(2, early_calls, front=front, init=False)


async def never_formed(rt: Any, group: Any, ctl: Any) -> None:
    """Calls that waited for a group that never formed fail with its error and are forgotten."""
    work = rt.all_sum(np.ones(3))
    for _ in range(2):
        with pytest.raises(rt.RendezvousError):
            await work
    with pytest.raises(rt.RendezvousError):
        await rt.init()


def test_calls_for_a_group_that_never_forms() -> None:
    results(1, never_formed, front="debug", init=False, env={"RT_WORLD_SIZE": "2", "RT_CONNECT_TIMEOUT": "0.3"})


# ---- loops and threads ----------------------------------------------------------------------------------------------------------------


async def blocking_inside(art: Any, group: Any, ctl: Any) -> None:
    me = group.rank()
    if me == 0:
        work = art.all_sum(np.ones(3))
        face = rt.sync.Group(group._core)
        for call in (lambda: rt.sync.all_sum(1), lambda: face.split(0), lambda: face.average_gradients([np.ones(2)])):
            with pytest.raises(RuntimeError, match=r"await rt"):
                call()
        ctl.tell("refused")
    else:
        ctl.hear()
        work = art.all_sum(np.ones(3))
    assert (await work).tolist() == [2.0] * 3
    assert int(rt.sync.all_sum(1)) == 2, "nothing is in flight: allowed"


@loops
def test_blocking_call_inside_a_loop_with_works_in_flight(front: str) -> None:
    with Ranks(2, blocking_inside, front=front) as ranks:
        assert ranks.hear(0) == "refused"
        ranks.tell(1, "go")
        for outcome in ranks.wait():
            assert outcome.error is None and outcome.returncode == 0, outcome


async def two_loops(face: Any, group: Any, ctl: Any) -> None:
    """This body runs without a loop, so it may make its own: a work outlives its loop and is finished by the next."""
    me, left = face.rank(), []
    core_group = rt.Group(group._core)

    async def first() -> None:
        assert int(await core_group.all_sum(1)) == 2
        left.append(core_group.recv_like(np.ones(70_000), 1 - me))
        left.append(core_group.all_sum(np.ones(300_000)))

    async def second() -> None:
        sent = core_group.send(np.ones(70_000), 1 - me)
        assert (await left[1])[-1] == 2 and (await left[0])[-1] == 1
        await sent

    asyncio.run(first())
    asyncio.run(second())
    assert int(await face.all_sum(3)) == 6
    asyncio.run(_run_again(core_group))


async def _run_again(group: Any) -> None:
    assert int(await group.all_sum(2)) == 4


def test_asyncio_run_twice_with_one_group() -> None:
    results(2, two_loops)


def _in_threads(count: int, target: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            target(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


async def threads_blocking(face: Any, group: Any, ctl: Any) -> None:
    """Three threads on one group: messages are told apart by tag, and equal collectives may meet in any order."""
    me = group.rank()

    def work(index: int) -> None:
        for i in range(60):
            count = (1, 500, 40_000)[i % 3]
            assert rt.sync.all_sum(np.ones(100))[-1] == 2
            mine = np.full(count, index * 1000 + i * 2 + me)
            if me == 0:
                rt.sync.send(mine, 1, tag=index)
                got = rt.sync.recv_like(mine, 1, tag=index)
            else:
                got = rt.sync.recv_like(mine, 0, tag=index)
                rt.sync.send(mine, 0, tag=index)
            assert (got == mine + 1 - 2 * me).all(), (index, i)

    _in_threads(3, work)
    assert int(await face.all_sum(1)) == 2


def test_three_threads_on_one_group() -> None:
    results(2, threads_blocking)


async def threads_beside_a_loop(face: Any, group: Any, ctl: Any) -> None:
    """Two blocking threads and the loop, each on tags and groups of its own, over the same links."""
    me = group.rank()
    groups = [await group.split(0) for _ in range(2)]

    def work(index: int) -> None:
        for i in range(40):
            x = np.full((3, 20_000)[i % 2], float(index + i))
            assert (rt.sync.all_sum(x, group=groups[index]) == 2 * x).all(), (index, i)

    threads = [asyncio.to_thread(work, index) for index in range(2)]

    async def in_loop() -> None:
        for i in range(40):
            x = np.full((5, 30_000)[i % 2], float(i))
            assert (await face.all_sum(x) == 2 * x).all(), i
            got, _ = await asyncio.gather(face.recv_like(x, 1 - me, tag=i), face.send(x, 1 - me, tag=i))
            assert (got == x).all()

    await asyncio.gather(in_loop(), *threads)


@loops
def test_threads_beside_a_loop(front: str) -> None:
    results(2, threads_beside_a_loop, front=front)


# ---- import ---------------------------------------------------------------------------------------------------------------------------


def test_import_loads_nothing_it_may_not_need() -> None:
    program = "\n".join([
        "import sys, asyncio",  # which loads ssl itself
        "before = set(sys.modules)",
        "import rt, rt.sync",
        "print(*{'optree', 'ssl', 'ml_dtypes', 'rich', 'uvloop'} & (set(sys.modules) - before))",
    ])  # fmt: skip
    found = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


@pytest.mark.parametrize("theirs", ["rest1.py", None])
def test_import_tells_of_the_other_package_called_rt(tmp_path: Path, theirs: str | None) -> None:
    assert rt.__file__ is not None
    package = tmp_path / "rt"
    package.mkdir()
    for source in Path(rt.__file__).parent.iterdir():
        if source.suffix in (".py", ".so"):
            (package / source.name).symlink_to(source)
    if theirs is not None:
        (package / theirs).touch()
    path = os.pathsep.join([str(tmp_path), str(Path(rt.__file__).parent.parent)])
    program = "import sys, rt; print(rt.__file__)"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "default", "-c", program]  # whatever PYTHONWARNINGS says
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert found.stdout.startswith(str(tmp_path)), found.stderr
    assert ("RuntimeWarning: PyPI's `rt`" in found.stderr) == (theirs is not None), found.stderr
