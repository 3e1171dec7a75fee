"""Ranks that disagree about a call: every rank inside one learns it, in the same words, and nobody gets a wrong result.

May live here: disagreements of real processes, under every front end. May not: how signatures are compared (the engine's own tests).

One world per front end and size goes through all disagreements, each on a group of its own made by ``split``: a group that broke must
not touch the next.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks

from rt.errors import GroupBrokenError, MismatchError

AT_ONCE = 0.1  # seconds
SHAPE = (12, 2)


class Case(NamedTuple):
    """What most ranks call, what the odd one calls, and the words by which the error tells the two apart."""

    usual: Callable[[Any, np.ndarray[Any, Any]], Any]
    odd: Callable[[Any, np.ndarray[Any, Any]], Any]
    said: tuple[str, str]


CASES = {
    "dtype at equal bytes": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x.view(np.int32)), ("float32", "int32")),
    "dtype at equal shape": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x.astype(np.float64)), ("96 B", "192 B")),
    "dtype of a broadcast": Case(lambda g, x: g.broadcast(x), lambda g, x: g.broadcast(x.view(np.uint32)), ("float32", "uint32")),
    "dtype of an all_gather": Case(lambda g, x: g.all_gather(x), lambda g, x: g.all_gather(x.view(np.int32)), ("float32", "int32")),
    "shape at equal bytes": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x.reshape(6, 4)), ("shape (12, 2)", "shape (6, 4)")),
    "dimensions at equal bytes": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x.reshape(24)), ("(12, 2)", "(24,)")),
    "five dimensions": Case(
        lambda g, x: g.all_sum(x.reshape(1, 2, 2, 2, 3)), lambda g, x: g.all_sum(x.reshape(1, 2, 2, 3, 2)), ("5 dimensions", "5 dimensions")
    ),
    "bytes": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x[:3]), ("96 B", "24 B")),
    "bytes by far": Case(lambda g, x: g.all_sum(np.resize(x, 1 << 20)), lambda g, x: g.all_sum(x), ("4194304 B", "96 B")),
    "nothing against something": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_sum(x[:0]), ("96 B", "shape (0, 2)")),
    "shape of a sum_scatter": Case(lambda g, x: g.sum_scatter(x), lambda g, x: g.sum_scatter(x.reshape(24, 1)), ("(12, 2)", "(24, 1)")),
    "op": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_max(x), (" sum ", " max ")),
    "sum against mean": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_reduce(x, "mean"), (" sum ", " mean ")),
    "op of a sum_scatter": Case(lambda g, x: g.sum_scatter(x), lambda g, x: g.sum_scatter(x, "min"), (" sum ", " min ")),
    "root": Case(lambda g, x: g.broadcast(x, 0), lambda g, x: g.broadcast(x, 1), ("root 0", "root 1")),
    "two roots": Case(lambda g, x: g.broadcast(x, 0), lambda g, x: g.broadcast(x, g.rank()), ("root 0", "root ")),
    "two roots of much": Case(
        lambda g, x: g.broadcast(np.resize(x, 1 << 20), 0), lambda g, x: g.broadcast(np.resize(x, 1 << 20), g.rank()), ("root 0", "root ")
    ),
    "kind": Case(lambda g, x: g.all_sum(x), lambda g, x: g.all_gather(x), ("all_reduce", "all_gather")),
    "kind of one root": Case(lambda g, x: g.all_sum(x), lambda g, x: g.broadcast(x), ("all_reduce", "broadcast")),
    "barrier against all_sum": Case(lambda g, x: g.barrier(), lambda g, x: g.all_sum(x), ("barrier", "all_reduce")),
}


async def disagree(rt: Any, world: Any, ctl: ranks.Ctl) -> dict[str, Any]:
    """Go through all cases; the odd rank is the second of two, the third of four."""
    size = world.size()
    odd_rank = min(size - 1, 2)
    found = await each_case(world, CASES)
    found["order"] = await provoke_in_order(await world.split(0), world.rank() == odd_rank)
    total = await world.all_sum(np.float64(world.rank()))
    assert total == size * (size - 1) / 2, "the world outlives its groups"
    return found


async def each_case(world: Any, cases: dict[str, Case]) -> dict[str, Any]:
    odd_rank = min(world.size() - 1, 2)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        group = await world.split(0)
        mine = np.arange(24, dtype=np.float32).reshape(SHAPE) + world.rank()
        try:
            found[name] = await provoke(group, case.odd if world.rank() == odd_rank else case.usual, mine)
        except BaseException as error:
            error.add_note(f"in the case {name!r}")
            raise
    return found


async def provoke(group: Any, call: Callable[[Any, Any], Any], mine: np.ndarray[Any, Any]) -> tuple[Any, str, str, float, int | None]:
    """Make the call, go on until the group breaks, and try again: (result, first words, later words, seconds of that, culprit)."""
    result = None
    with pytest.raises(MismatchError) as first:
        result = await call(group, mine)
        await group.barrier()  # a rank that had finished already learns here
    began = time.monotonic()
    with pytest.raises(MismatchError) as later:
        await group.all_sum(mine)
    return result, str(first.value), str(later.value), time.monotonic() - began, first.value.culprit


async def provoke_in_order(group: Any, odd: bool) -> tuple[Any, str, str, float, int | None]:
    """Two calls in two orders, both submitted before either is awaited where that is possible."""
    x = np.ones(3, np.float32)

    async def both(group: Any, x: np.ndarray[Any, Any]) -> None:
        calls = [lambda: group.all_sum(x), lambda: group.broadcast(x)]
        await ranks.in_order([call() for call in (calls[::-1] if odd else calls)])

    return await provoke(group, both, x)


@functools.cache
def found_by(body: Callable[..., Any], front: str, size: int) -> list[dict[str, Any]] | AssertionError:
    """What the ranks of one world found in all cases, or how they failed."""
    try:
        return ranks.results(size, body, front=front, timeout=60)
    except AssertionError as error:
        return error


def told_by(body: Callable[..., Any], front: str, size: int, name: str) -> list[Any]:
    found = found_by(body, front, size)
    if isinstance(found, AssertionError):
        raise found
    return [each[name] for each in found]


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*CASES, "order"])
def test_disagreement_about(name: str, size: int, front: str) -> None:
    check_verdict(told_by(disagree, front, size, name), CASES[name].said if name in CASES else ("all_reduce", "broadcast"))


def check_verdict(told: list[Any], said: tuple[str, str]) -> None:
    """All ranks told the same of both sides, now and later, at once."""
    verdicts = {words[words.index("ranks disagree") :].split(" after ")[0] for _, first, later, _, _ in told for words in (first, later)}
    assert len(verdicts) == 1, "all ranks tell the same, and go on telling it"
    sides = verdicts.pop().removeprefix("ranks disagree: ").split(", but ")
    assert len(sides) == 2 and all(side.startswith(f"rank {'0123456789'[int(side[5])]} called ") for side in sides)
    assert any(said[0] in a and said[1] in b for a, b in (sides, sides[::-1])), sides
    assert len({culprit for *_, culprit in told}) == 1
    assert all(seconds < AT_ONCE for _, _, _, seconds, _ in told)


def send_shape() -> dict[str, tuple[Any, Any, tuple[str, str]]]:
    """What rank 0 sends, what rank 1 expects, and the words of the error."""
    small, large = np.zeros((4, 6), np.float32), np.zeros((1 << 10, 1 << 10), np.float32)
    return {
        "shape at equal bytes": (small, small.reshape(6, 4), ("(4, 6)", "(6, 4)")),
        "dtype at equal bytes": (small, small.view(np.int32), ("float32", "int32")),
        "bytes": (small, small[:2], ("96 B", "48 B")),
        "shape of much": (large, large.reshape(1 << 11, 1 << 9), ("(1024, 1024)", "(2048, 512)")),
        "nothing": (small[:0], small, ("0 B", "96 B")),
    }


async def mismatched_send(rt: Any, world: Any, ctl: ranks.Ctl) -> dict[str, Any]:
    found = {}
    for name, (sent, expected, _) in send_shape().items():
        group = await world.split(0)
        if world.rank() == 0:
            found[name] = await provoke(group, lambda g, x: g.send(x, 1, tag=5), sent)
        elif world.rank() == 1:
            found[name] = await provoke(group, lambda g, x: g.recv_like(x, 0, tag=5), expected)
        else:
            found[name] = await provoke(group, lambda g, x: g.barrier(), expected)
    return found


@pytest.mark.parametrize("front", ranks.FRONTS)
@pytest.mark.parametrize("name", send_shape())
def test_send_against_recv(name: str, front: str) -> None:
    told = told_by(mismatched_send, front, 3, name)
    verdicts = {words[words.index("ranks disagree") :].split(" after ")[0] for _, first, later, _, _ in told for words in (first, later)}
    assert len(verdicts) == 1
    sides = verdicts.pop().removeprefix("ranks disagree: ").split(", but ")
    assert all(word in side for word, side in zip(send_shape()[name][2], sides, strict=True)), sides
    assert told[1][0] is None, "nothing is received under a differing signature"
    assert all(seconds < AT_ONCE for _, _, _, seconds, _ in told)


async def odd_receiver(rt: Any, world: Any, ctl: ranks.Ctl) -> list[Any]:
    """A broadcast whose last rank differs: the others may have finished, and then with what the root sent."""
    results = []
    for count in (3, 1 << 18):
        group = await world.split(0)
        out = np.full(count, -1.0, np.float32)
        x = np.full(count, 7.0 if world.rank() == 0 else world.rank(), np.float32)
        odd = world.rank() == world.size() - 1
        try:
            got = await group.broadcast(x.view(np.int32) if odd else x, 0, out=out.view(np.int32) if odd else out)
        except GroupBrokenError:
            got = None
        with pytest.raises(MismatchError):
            await group.barrier()
        results.append((None if got is None else bool((got == 7.0).all()), bool((out == -1.0).all())))
    return results


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_never_a_wrong_result(front: str) -> None:
    for rank, found in enumerate(ranks.results(4, odd_receiver, front=front)):
        for right, untouched in found:
            if rank == 3:
                assert right is None and untouched, "what came under a differing signature was not even looked at"
            else:
                assert right in (None, True)


async def late_comer(rt: Any, world: Any, ctl: ranks.Ctl) -> tuple[str, float]:
    """Rank 0 disagrees with rank 1 while rank 2, which needs neither, computes."""
    group = await world.split(0)
    if world.rank() == 2:
        ctl.tell("computing")
        ctl.hear()
        began = time.monotonic()
        with pytest.raises(MismatchError) as caught:
            await group.barrier()
        return str(caught.value), time.monotonic() - began
    with pytest.raises(MismatchError) as caught:
        if world.rank() == 0:
            await group.send(np.zeros(4, np.float32), 1)
        else:
            await group.recv((2,), np.float64, 0)
        await group.barrier()
    ctl.tell("broken")
    return str(caught.value), 0.0


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_rank_outside_learns_at_its_next_call(front: str) -> None:
    with ranks.Ranks(3, late_comer, front=front) as world:
        for rank in range(3):
            world.hear(rank)
        world.tell(2, "go on")
        outcomes = world.wait()
    assert all(outcome.error is None for outcome in outcomes), "\n".join(map(str, outcomes))
    assert len({outcome.value[0].split("ranks disagree")[1].split(" after ")[0] for outcome in outcomes}) == 1
    assert outcomes[2].value[1] < AT_ONCE


async def other_hosts(rt: Any, world: Any, ctl: ranks.Ctl) -> str:
    """Rank 1 takes the two for ranks of two hosts. Both choose one algorithm all the same, but for a larger call would not."""
    assert world._core.hosts == (0, 0)
    world._core.hosts = (0, world.rank())
    with pytest.raises(MismatchError) as caught:
        await world.all_sum(np.ones(4, np.float32))
    return str(caught.value)


def test_ranks_must_agree_on_who_shares_a_host() -> None:
    assert all("ranks disagree" in said for said in ranks.results(2, other_hosts))
