"""How groups come to be and end: one process alone, ``init``, calls before it, ``close``.

May live here: those, under every front end. May not: how ranks find each other (``test_bootstrap``), what configures them
(``test_config``), ends of whole processes (``test_exit``).
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, Ranks, in_order, results, succeeded

import rt
import rt.sync
from rt.world import GOODBYE_SECONDS

fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", FRONTS[1:])


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
    for backend in ("any", "ring", "nccl", "jaccl"):  # mpi, which would initialise it here: test_mpi
        for init in every_init(backend=backend):
            group = init()
            assert (group.rank(), group.size()) == (0, 1), backend


@pytest.mark.usefixtures("unconfigured")
def test_strict_refuses_a_group_of_one() -> None:
    for backend in ("any", "ring", "nccl"):
        for init in every_init(True, backend):
            with pytest.raises(rt.ConfigError, match=r"RT_RANK|which needs"):
                init()
    assert rt.sync.init().size() == 1, "and later calls are not spoilt"


_LAUNCHED = [
    ({"RANK": "1", "WORLD_SIZE": "4"}, "any", "RANK=1 of WORLD_SIZE=4 processes, .* set MASTER_ADDR and MASTER_PORT$"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "ring", "where they meet: set MASTER_PORT$"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "any", "SLURM_STEP_NUM_TASKS=2 .* set RT_COORDINATOR=host:port"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "any", "PMI_SIZE=2 .* RT_COORDINATOR=host:port.*, or take backend 'mpi', which needs mpi4py"),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "mpi", "backend 'mpi' cannot be used here, which needs mpi4py"),
    ({"RT_RANK": "1", "RT_WORLD_SIZE": "2", "RT_COORDINATOR": "a:1"}, "mpi", "backend 'mpi' cannot be used here, which needs mpi4py"),
]


@pytest.fixture
def without_mpi(unconfigured: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        unconfigured.delenv(name, raising=False)
    unconfigured.setattr("transports.mpi.missing", lambda: "which needs mpi4py, and this Python has none")
    unconfigured.setattr("rt.backends._warned", False)
    return unconfigured


@pytest.mark.parametrize(("environ", "backend", "said"), _LAUNCHED)
def test_one_of_several_that_settles_for_a_group_of_one_says_so(
    environ: dict[str, str], backend: str, said: str, without_mpi: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        without_mpi.setenv(name, value)
    for init in every_init(backend=backend):
        without_mpi.setattr("rt.backends._warned", False)
        with pytest.warns(RuntimeWarning, match=f"^this process is a group of one, but found .*{said}") as caught:
            assert init().size() == 1
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
        assert init().size() == 1, "once per process: here a warning is an error"
    for init in every_init(True, backend):
        with pytest.raises(rt.ConfigError, match=f"cannot be used|mpi4py|nothing configures a group .found .*{said.rstrip('$')}"):
            init()


def test_the_warning_points_at_who_called(without_mpi: pytest.MonkeyPatch) -> None:
    without_mpi.setenv("RANK", "0")
    without_mpi.setenv("WORLD_SIZE", "2")

    async def main() -> None:
        await rt.init()

    for call in (rt.sync.init, lambda: rt.sync.all_sum(1), lambda: asyncio.run(main())):
        without_mpi.setattr("rt.backends._warned", False)
        with pytest.warns(RuntimeWarning, match="RANK=0") as caught:
            call()
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "many"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_one_that_is_alone_says_nothing(environ: dict[str, str], without_mpi: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        without_mpi.setenv(name, value)
    assert rt.sync.init().size() == 1


_WRONG = {
    "RT_TIMEOUT": "abc", "RT_CONNECT_TIMEOUT": "-1", "RT_SHM": "maybe", "RT_CONNECTIONS_PER_IP": "0", "RT_SPIN_US": "1.5",
    "RT_TUNING": "/nowhere", "RT_SOCKET_IFNAME": "^", "RT_LOG": "all", "RT_VERBOSE": "yes",
}  # fmt: skip


@pytest.mark.parametrize("name", _WRONG)
def test_a_group_of_one_says_of_settings_what_one_of_many_says(name: str, unconfigured: pytest.MonkeyPatch) -> None:
    many = {"rank": 0, "world_size": 2, "coordinator": "127.0.0.1:1"}
    unconfigured.setenv(name, _WRONG[name])
    unconfigured.setattr("rt.backends._checked", False)

    async def main() -> None:
        await rt.all_sum(1)

    with pytest.raises(rt.ConfigError, match=f"^{name}.*: found|^{name} /nowhere: ") as expected:
        rt.sync.init(**many)
    for call in (rt.sync.init, lambda: rt.sync.all_sum(1), lambda: asyncio.run(main())):
        with pytest.raises(rt.ConfigError) as found:
            call()
        assert str(found.value) == str(expected.value)
    unconfigured.delenv(name)
    assert rt.sync.all_sum(1) == 1


@pytest.mark.usefixtures("unconfigured")
def test_a_group_of_one_checks_keywords_as_one_of_many() -> None:
    assert rt.sync.init(timeout=1.0).size() == 1
    for init in every_init(timeout="soon"):
        with pytest.raises(rt.ConfigError, match="keyword timeout: found 'soon', expected a number of seconds > 0"):
            init()


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
        waiting = asyncio.ensure_future(in_order([early]))
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
            assert type(caught.value).__name__ == "GroupClosedError"
            assert re.fullmatch(r"rank [01]/2( of [^:]+)?: \w+ \([^)]*\): the group was closed here", str(caught.value)), caught.value
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


# ---- calls before init ----------------------------------------------------------------------------------------------------------------


async def early_calls(rt: Any, group: Any, ctl: Any) -> None:
    """Rank 0 calls before the group has formed, rank 1 after: only the order of the calls can match them."""
    me = int(os.environ["RT_RANK"])
    if me:
        ctl.hear()  # that rank 0 has called
        await rt.init()
    works = [rt.all_sum(np.full(1, i)) for i in range(3)]
    wrong = None if me else rt.all_sum([1, 2])
    works.append(rt.broadcast(np.full(1, 7 + me), 1))
    ctl.tell("called")
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
    with Ranks(2, early_calls, front=front, init=False) as ranks:
        ranks.tell(1, ranks.hear(0))
        succeeded(ranks.wait())


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
