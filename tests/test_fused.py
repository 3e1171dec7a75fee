"""Lists of arrays in one call: results, what travels together, order, mismatch, cancelling, what is refused.

May live here: all_reduce and its short forms on lists. May not: trees (``test_gradients``), kinds of single arrays (``test_arrays``).
"""

from __future__ import annotations

import array
import asyncio
import itertools
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peers import LENT, needs_peers
from ranks import FRONTS, Ranks, results, run

import rt
import rt.sync
from rt import _fastpath
from rt.fused import ALONE_BYTES
from rt.group import Call, CoreGroup

Array = np.ndarray[Any, Any]
fronts = pytest.mark.parametrize("front", FRONTS)
loops = pytest.mark.parametrize("front", FRONTS[1:])
BIG = ALONE_BYTES // 4  # float32 items that travel alone


def some(rank: int) -> list[Array]:
    """Arrays of many shapes and dtypes, small and large, some not contiguous."""
    rng = np.random.default_rng(rank)
    shapes: list[Any] = [(), 0, 1, 7, (3, 4), (2, 0), (2, 3, 4), 300, BIG - 1, BIG, (3, BIG), 1, 5]
    dtypes = itertools.cycle(["f4", "f4", "i8", "f4", "?", "f2", "c16", ml_dtypes.bfloat16])
    made = [rng.integers(0, 5, shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    return [*made, made[4][::-1, ::2], made[10].T, np.asfortranarray(made[6])]


def total(op: Any, size: int) -> list[Array]:
    found = some(0)
    for rank in range(1, size):
        found = [np.asarray(op(a, b)).astype(a.dtype) for a, b in zip(found, some(rank), strict=True)]
    return found


def same(found: Any, expected: list[Array], *label: object) -> None:
    assert type(found) is list and len(found) == len(expected), label
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert type(a) is np.ndarray and (a.shape, a.dtype) == (b.shape, b.dtype), (*label, i, a.shape, a.dtype)
        assert np.array_equal(a, b), (*label, i, a, b)


async def sums(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    xs = some(me)
    for given in (xs, tuple(xs)):
        same(await rt.all_sum(given), total(np.add, size))
    same(await group.all_max(xs), total(np.maximum, size))
    same(await rt.all_min(xs), total(np.minimum, size))
    same(await rt.all_reduce(xs, "prod"), total(np.multiply, size))
    same(xs, some(me), "inputs never change")
    half = [x for x in xs if x.dtype.kind == "f"]
    for x, found in zip(half, await rt.all_reduce(half, "mean"), strict=True):
        assert found.dtype == x.dtype and np.allclose(found, await rt.all_reduce(x, "mean")), x.shape
    ints = [np.arange(4), np.array([[me]])]
    same(await rt.all_reduce(ints, "xor"), [ints[0] if size % 2 else 0 * ints[0], np.array([[0 ^ 1 ^ (2 if size > 2 else 0)]])])
    assert await rt.all_sum([]) == [] and await rt.all_max(()) == [] and await rt.all_reduce([], "mean") == []
    nothing: list[Any] = []
    assert await rt.all_sum([], out=nothing) is not None and nothing == []
    same(await rt.all_sum([xs[3]]), [total(np.add, size)[3]])
    assert (await rt.all_sum([array.array("d", [me, 1]), bytearray([2])]))[0] == array.array("d", [sum(range(size)), size])
    results = await rt.all_sum([np.ones(3), np.ones(4)])
    results[0][:] = 9
    assert results[1].tolist() == [size] * 4 and not np.shares_memory(*results) and results[1].flags.writeable


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_results(front: str, size: int) -> None:
    results(size, sums, front=front)


class Counting:
    """Notes every work that is submitted: items, and whether it is the callers' own memory that travels."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bool]] = []
        original = CoreGroup.submit

        def submit(group: CoreGroup, what: str, call: Call, source: Any, target: Any, work: Any, *rest: Any) -> None:
            self.calls.append((call.dtype.name.lower(), call.items, work.borrows_source))
            original(group, what, call, source, target, work, *rest)

        CoreGroup.submit = submit  # type: ignore[method-assign]


async def together(rt: Any, group: Any, ctl: Any) -> None:
    counting = Counting()
    await rt.all_sum([np.ones(256, np.float32)] * 200)
    assert counting.calls == [("float32", 256 * 200, False)], "one collective"
    counting.calls.clear()
    numbers = [np.full(256, i, np.float32) for i in range(200)]
    same(await rt.all_sum(numbers), [group.size() * each for each in numbers])
    assert counting.calls == [], "a list of that form is known"
    await rt.all_sum([np.ones(3), np.ones(BIG, np.float32), np.ones(2, np.float32), np.ones(4), np.ones(BIG - 1, np.float32)])
    expected = [("float64", 7, False), ("float32", BIG, True), ("float32", BIG + 1, False)]
    assert counting.calls == expected, counting.calls
    counting.calls.clear()
    await rt.all_sum([np.ones(BIG - 1, np.float32)] * 32)
    assert len(counting.calls) == 2 and sum(call[1] for call in counting.calls) == 32 * (BIG - 1)
    counting.calls.clear()
    await rt.all_sum([])
    assert len(counting.calls) == 1, "a call of nothing meets the other ranks' calls too"


@fronts
def test_what_travels_together(front: str) -> None:
    results(2, together, front=front)


async def outs(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    xs = some(me)
    given = [np.zeros(x.shape, x.dtype) for x in xs]
    found = await rt.all_sum(xs, out=given)
    assert all(a is b for a, b in zip(found, given, strict=True))
    same(given, total(np.add, size))
    inplace = [np.array(x, order="C") for x in xs]
    await rt.all_sum(inplace, out=tuple(inplace))
    same(inplace, total(np.add, size), "in place")
    buffer = array.array("d", [0, 0])
    (got,) = await rt.all_sum([np.array([1.0, me])], out=[buffer])
    assert got is buffer and buffer.tolist() == [size, sum(range(size))]
    whole = np.zeros(8)
    await rt.all_sum([np.ones(3), np.full(5, 2.0)], out=[whole[:3], whole[3:]])
    assert whole.tolist() == [size] * 3 + [2.0 * size] * 5, "neighbours do not overlap"
    a, b, fixed = np.zeros(4), np.zeros(BIG, np.float64), np.zeros(4)
    fixed.flags.writeable = False
    for error, words, call in (
        (TypeError, "out of a list must be a list of arrays, not ndarray", lambda: rt.all_sum([a], out=a)),
        (TypeError, "out must be an array, not list", lambda: rt.all_sum(a, out=[a])),
        (TypeError, "item 1: out must be an array, not NoneType", lambda: rt.all_sum([a, b], out=[a, None])),
        (TypeError, "bytes are immutable", lambda: rt.all_sum([b"ab"], out=[b"ab"])),
        (ValueError, "out must be a list of 2 arrays, but has 1", lambda: rt.all_sum([a, b], out=[a])),
        (ValueError, r"item 0: out must have shape \(4,\)", lambda: rt.all_sum([a, b], out=[b, a])),
        (ValueError, "item 1: out must be C-contiguous", lambda: rt.all_sum([b, a], out=[b, fixed])),
        (ValueError, "out at item 1 overlaps item 0", lambda: rt.all_sum([a, a], out=[a, a])),
        (ValueError, "overlaps", lambda: rt.all_sum([a, a + 1], out=[np.zeros(4), a])),
        (ValueError, "overlaps", lambda: rt.all_sum([b[:4], a], out=[b[1:5], a])),
        (ValueError, "overlaps", lambda: rt.all_sum([b[3::-1], a], out=[b[:4], a])),
    ):
        with pytest.raises(error, match=words):
            await call()
    assert int(await rt.all_sum(1)) == size


@fronts
def test_out(front: str) -> None:
    results(2, outs, front=front)


def test_overlaps_are_found_wherever_they_are() -> None:
    """Against the plain rule, on every way to cut two windows each for input and output out of ten items."""
    memory = np.zeros(10)
    windows = [memory[i : i + n] for n in (2, 3) for i in range(0, 10 - n, 2)]

    for a, b, c, d in itertools.product(windows, repeat=4):
        if a.shape != c.shape or b.shape != d.shape:
            continue
        pairs = [(c, d), *((x, out) for i, x in enumerate((a, b)) for j, out in enumerate((c, d)) if i != j or x is not out)]
        found = _fastpath.overlap([a, b], [c, d])
        assert (found is not None) == any(np.shares_memory(x, y) for x, y in pairs)
        if found is not None:
            mine, other = found
            out = (c, d)[mine]
            assert np.shares_memory(out, (a, b)[other]) or (mine != other and np.shares_memory(out, (c, d)[other]))


def test_outs_that_another_thread_has_let_go_of() -> None:
    with pytest.raises(ValueError, match="item 1: out is not what it was"):
        _fastpath.spread(np.ones(4), [0, 1], [np.empty(2)])


def test_overlaps_with_what_lies_scattered() -> None:
    memory, far = np.zeros(12), np.zeros(4)
    assert _fastpath.overlap([memory[3::-1]], [memory[:4]]) == (0, 0), "the same bytes in another order"
    assert _fastpath.overlap([memory[::4]], [memory[9:]]) is None and _fastpath.overlap([memory[::4]], [memory[8:11]]) == (0, 0)
    assert _fastpath.overlap([far, memory.reshape(3, 4).T], [far, np.zeros((4, 3))]) is None
    assert _fastpath.overlap([memory[4:4], memory[:4]], [memory[:0], memory[:4]]) is None, "nothing overlaps with nothing"
    assert _fastpath.overlap([far] * 100, [np.zeros(4) for _ in range(100)]) is None, "what is read may be read twice"


def test_copying_back_looks_again_at_where() -> None:
    joined, outs = np.arange(6.0), [np.zeros(2), np.zeros(9), np.zeros((2, 2))]
    _fastpath.spread(joined, [0, 2], outs)
    assert [out.tolist() for out in outs] == [[0, 1], [0] * 9, [[2, 3], [4, 5]]]
    outs[2].flags.writeable = False
    with pytest.raises(ValueError, match="item 2: out is not what it was"):
        _fastpath.spread(joined, [0, 2], outs)
    with pytest.raises(ValueError, match="item 1: out is not what it was"):
        _fastpath.spread(joined, [0, 1], outs)


async def refusals(rt: Any, group: Any, ctl: Any) -> None:
    counting, x = Counting(), np.ones(3)
    attempts: list[tuple[str, Callable[[], Any]]] = [
        ("item 0: expected a list of arrays, got a list with a int", lambda: rt.all_sum([1, 2])),
        ("item 1: expected a list of arrays, got a list with a float64", lambda: rt.all_sum([x, np.float64(1)])),
        ("item 1: expected an array or a number, got a list", lambda: rt.all_sum([x, [x]])),
        ("item 2: expected an array or a number, got str", lambda: rt.all_max([x, x, "text"])),
        ("item 1: a masked array", lambda: rt.all_sum([x, np.ma.masked_array(x)])),
        ("datetime64", lambda: rt.all_sum([x, np.zeros(3, "M8[s]")])),
        ("byte order", lambda: rt.all_sum([x, np.zeros(3, ">f4")])),
        ("op 'mean' is for floating or complex dtypes, not int64", lambda: rt.all_reduce([x, np.arange(3)], "mean")),
        ("op 'and' is for bool or integer dtypes, not float64", lambda: rt.all_reduce([np.arange(3), x], "and")),
        ("got a list", lambda: rt.all_gather([x])),
        ("got a tuple", lambda: rt.broadcast((x,))),
    ]
    for words, call in attempts:
        with pytest.raises(TypeError, match=words):
            await call()
    with pytest.raises(ValueError, match="op must be one of"):
        await rt.all_reduce([x], "average")
    assert counting.calls == [], "nothing was sent"
    same(await rt.all_sum([x]), [2 * x])


@fronts
def test_refused_lists_leave_the_group_usable(front: str) -> None:
    results(2, refusals, front=front)


async def mismatch(rt: Any, group: Any, ctl: Any, one: list[Any], other: list[Any]) -> None:
    await rt.all_sum(one if group.rank() == 0 else other)


def zeros(*shapes: Any) -> list[Array]:
    return [np.zeros(shape, np.float32) for shape in shapes]


@fronts
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (zeros(2, 3), zeros(3, 2)),
        (zeros((2, 3)), zeros((3, 2))),
        (zeros(5), np.zeros(5, np.float32)),
        (zeros(2, 3), zeros(5)),
        (zeros(BIG, BIG), zeros(BIG, BIG, 1)),
        (zeros(BIG, 1), zeros(1, BIG)),
        (zeros(), zeros(0)),
        ([], [np.zeros(0, np.uint8)]),
    ],
    ids=["order", "shape", "array", "split", "longer", "large", "empty", "as it travels"],
)
def test_other_lists_are_found_out(front: str, one: Any, other: Any) -> None:
    for outcome in run(2, mismatch, front=front, args=(one, other)):
        assert outcome.error is not None and outcome.error.kind == "MismatchError", outcome
        text = outcome.error.text
        assert "all_reduce #0" in text, text
        assert all(f"of a list of {len(given)} array" in text for given in (one, other) if isinstance(given, list)), text


async def in_flight(rt: Any, group: Any, ctl: Any) -> None:
    """Call order is wire order, whatever the order of awaits; and a call may be awaited again."""
    me, size = group.rank(), group.size()
    calls = [rt.all_sum(zeros(2, 3)), rt.all_sum(me), rt.all_max([np.full(3, me), np.full(BIG, me, np.float32)]), rt.all_sum(zeros(BIG))]
    assert all(isinstance(call, rt.Work) for call in calls)
    found = [await call for call in (calls if me else calls[::-1])]
    found = found if me else found[::-1]
    assert int(found[1]) == 1 and found[2][1][-1] == size - 1
    for call, result in zip(calls, found, strict=True):
        assert await call is result and call.done()
        assert (await asyncio.gather(awaited(call), awaited(call)))[1] is result
    assert repr(calls[2]) == "<rt.Work all_max #2 to #3 (2 arrays) done>", repr(calls[2])


async def awaited(call: Any) -> Any:
    return await call


@loops
def test_order_and_repetition(front: str) -> None:
    results(2, in_flight, front=front)


async def cancelled(rt: Any, group: Any, ctl: Any, use_out: bool) -> None:
    """When CancelledError arrives the caller's arrays are the caller's, and the others get what was called."""
    me = group.rank()
    xs = [np.full(3, me + 1.0), np.full(4, me + 1.0), np.full(8 * BIG, me + 1, np.float32), np.full((2, BIG), me + 1, np.float32)]
    if me:
        ctl.hear()
        found = await rt.all_sum(xs)
        assert all((part == 3).all() for part in found), found
        await rt.barrier()
        return
    outs = [np.zeros_like(x) for x in xs] if use_out else None
    call = rt.all_sum(xs, out=outs)
    task = asyncio.create_task(awaited(call))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await call
    for each in (*xs, *(outs or [])):
        each[...] = -7
    ctl.tell("gave up")
    found = await call
    await rt.barrier()
    if outs is None:
        assert all((part == 3).all() for part in found), found
    else:
        assert all(part is out and (out == -7).all() for part, out in zip(found, outs, strict=True))
    assert all((x == -7).all() for x in xs)


@loops
@pytest.mark.parametrize("use_out", [False, True])
def test_cancelling(front: str, use_out: bool) -> None:
    with Ranks(2, cancelled, front=front, args=(use_out,)) as ranks:
        assert ranks.hear(0) == "gave up"
        ranks.tell(1, "go")
        for outcome in ranks.wait():
            assert outcome.error is None and outcome.returncode == 0, outcome


async def timed_out(rt: Any, group: Any, ctl: Any) -> None:
    me, xs = group.rank(), zeros(3, BIG, BIG)
    if me:
        ctl.hear()
    try:
        await rt.all_sum(xs, timeout=None if me else 0.2)
    finally:
        ctl.tell("ended")


@fronts
def test_timeout_names_the_rank_that_did_not_call(front: str) -> None:
    with Ranks(2, timed_out, front=front) as ranks:
        assert ranks.hear(0) == "ended"
        ranks.tell(1, "go")
        first, second = ranks.wait()
    assert first.error is not None and (first.error.kind, first.error.culprit) == ("CollectiveTimeoutError", 1), first
    assert "it waits for rank 1, which did not call" in first.error.text, first.error.text
    assert second.error is not None and second.error.kind == "CollectiveTimeoutError", second


async def many(rt: Any, group: Any, ctl: Any) -> None:
    """A thousand works at once, of a rank that is far ahead of the others."""
    me, size = group.rank(), group.size()
    if me == 0:
        ctl.tell("started")
    else:
        ctl.hear()
    found = await rt.all_sum([np.full(BIG if i % 5 else 3, i + me, np.float32) for i in range(1000)])
    assert all((part == size * i + sum(range(size))).all() for i, part in enumerate(found))


@fronts
def test_a_thousand_arrays(front: str) -> None:
    with Ranks(3, many, front=front) as ranks:
        assert ranks.hear(0) == "started"
        for rank in (1, 2):
            ranks.tell(rank, "go")
        for outcome in ranks.wait(60):
            assert outcome.error is None and outcome.returncode == 0, outcome


async def lost(rt: Any, group: Any, ctl: Any) -> None:
    if group.rank():
        os._exit(3)
    await rt.all_sum(zeros(3, BIG))


@fronts
def test_a_lost_peer(front: str) -> None:
    outcome = run(2, lost, front=front)[0]
    assert outcome.error is not None and (outcome.error.kind, outcome.error.culprit) == ("PeerLostError", 1), outcome


async def before_init(rt: Any, group: Any, ctl: Any) -> None:
    me = int(os.environ["RT_RANK"])
    same(await rt.all_sum([np.full(3, me), np.ones(BIG)]), [np.ones(3, int), np.full(BIG, 2.0)])


@fronts
def test_before_init(front: str) -> None:
    results(2, before_init, front=front, init=False)


def test_in_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RT_RANK", "RT_WORLD_SIZE", "RT_HOSTFILE", "RT_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    xs = [np.ones(3), np.arange(4), array.array("d", [1])]
    outs = [np.zeros(3), np.zeros(4, int), array.array("d", [0])]
    for found in (rt.sync.all_sum(xs), asyncio.run(awaited(rt.all_sum(xs)))):
        assert all(a is b for a, b in zip(found, xs, strict=True))
    assert all(a is b for a, b in zip(rt.sync.all_sum(xs, out=outs), outs, strict=True))
    assert outs[1].tolist() == [0, 1, 2, 3] and outs[2].tolist() == [1.0]
    assert rt.sync.all_sum([]) == []
    with pytest.raises(TypeError, match="mean"):
        rt.sync.all_reduce([np.arange(3)], "mean")
    with pytest.raises(TypeError, match="item 0"):
        rt.sync.all_sum([1, 2])


async def every_kind(rt: Any, group: Any, ctl: Any) -> None:
    import jax
    import jax.numpy as jnp
    import mlx.core as mx
    import torch

    me = group.rank()
    xs = [
        np.full(2, me), torch.full((2, 2), me + 1.0, dtype=torch.bfloat16), mx.full((3,), me + 1.0), jnp.full((), me + 1.0),
        torch.full((BIG,), me + 1.0), mx.full((BIG,), me + 1.0, dtype=mx.float16), jnp.full((BIG,), me), bytearray([me]),
    ]  # fmt: skip
    found = await rt.all_sum(xs)
    assert [type(each) for each in found] == [type(x) for x in xs]
    assert [each.dtype for each in found[:-1]] == [x.dtype for x in xs[:-1]]
    assert [np.asarray(each).reshape(-1)[-1].item() for each in (found[0], *found[2:5], *found[6:7])] == [1, 3, 3, 3, 1]
    assert found[1].tolist() == [[3.0] * 2] * 2 and found[5][-1].item() == 3 and found[7] == bytearray([1])
    outs = [np.zeros(2, int), torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(BIG)]
    got = await rt.all_sum([xs[0], xs[1], xs[4]], out=outs)
    assert all(a is b for a, b in zip(got, outs, strict=True)) and outs[1].tolist() == [[3.0] * 2] * 2 and outs[2][-1] == 3
    with pytest.raises(TypeError, match=r"item 2: .*JAX arrays are immutable"):
        await rt.all_sum(xs[:2] + xs[3:4], out=[outs[0], outs[1], xs[3]])
    tree = {"w": xs[1], "v": [xs[2], xs[3]], "big": xs[4]}
    for how in ({}, {"communication_type": torch.float32}, {"communication_type": mx.float16}, {"all_reduce_size": 0}):
        mean = await rt.average_gradients(tree, **how)
        assert type(mean["w"]) is torch.Tensor and mean["w"].dtype == torch.bfloat16 and mean["w"].tolist() == [[1.5] * 2] * 2, how
        assert type(mean["v"][0]) is mx.array and mean["v"][0].tolist() == [1.5] * 3, how
        assert isinstance(mean["v"][1], jax.Array) and float(mean["v"][1]) == 1.5 and mean["big"][-1] == 1.5, how
    with pytest.raises(TypeError, match="communication_type"):
        await rt.average_gradients(tree, communication_type=torch.int32)


@needs_peers("jax")
@needs_peers("mlx")
@needs_peers("torch")
@fronts
def test_lists_and_trees_of_every_kind(front: str) -> None:
    results(2, every_kind, front=front, timeout=90, **LENT)


def test_the_form_of_a_list_is_told_by_dtypes_and_shapes_alone() -> None:
    def key(*items: Any) -> bytes | None:
        return _fastpath.forms_key(list(items))

    a, b = np.zeros((2, 3), "f4"), np.ones((2, 3), "f4")
    assert key(a, b) == key(b, a[:]) is not None and key() == b""
    others = [key(a), key(a, b[:1]), key(a, b.T), key(a, b.reshape(6)), key(a, b.astype("f8")), key(a, b.view("i4")), key(b, a, a)]
    assert len({key(a, b), *others}) == len(others) + 1
    assert key(a, 1.0) is None and key(np.ma.array(a)) is None  # type: ignore[no-untyped-call]


def test_arrays_are_joined_and_cut_at_the_same_places() -> None:
    xs = [np.arange(6.0).reshape(2, 3), np.array(7.0), np.empty((0, 4)), np.arange(5.0)]
    members, shapes = [3, 2, 0], [(5,), (0, 4), (2, 3)]
    joined = np.zeros(12)
    assert not _fastpath.join(xs, members, np.empty(12, "f4")), "another dtype"
    assert not _fastpath.join([xs[0].T], [0], joined), "scattered"
    with pytest.raises(ValueError, match="48 B where 24 B are left"):
        _fastpath.join(xs, members, np.empty(8))
    assert _fastpath.join(xs, members, joined) and joined.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]
    pieces: list[Any] = [None] * 4
    _fastpath.cut(joined, members, shapes, pieces)
    assert pieces[1] is None
    for index in members:
        assert pieces[index].shape == xs[index].shape and np.array_equal(pieces[index], xs[index])
        assert pieces[index].flags.writeable and pieces[index].base is joined
    with pytest.raises(ValueError, match="6 items where 3 are left"):
        _fastpath.cut(joined[:8], members, shapes, pieces)
