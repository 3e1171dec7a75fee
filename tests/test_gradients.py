"""``average_gradients``: which leaves travel together, what comes back, and what is refused.

May live here: the rules of bucketing and the results, counted and compared on real ranks. May not: the arithmetic of a mean
(``test_collectives``).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import optree
import pytest
from ranks import FRONTS, results, run

import rt
import rt.sync
from rt import fused
from rt.group import CoreGroup

Array = np.ndarray[Any, Any]
fronts = pytest.mark.parametrize("front", FRONTS)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Layer(NamedTuple):
    """A node of its own kind in a tree."""

    weight: Any
    bias: Any


class Counting:
    """Notes what every collective that is started carries."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._original = fused._submit
        fused._submit = lambda *submitted: self._count(*submitted)

    def _count(self, group: CoreGroup, layout: fused.Layout, bucket: fused.Bucket, *rest: Any) -> Any:
        self.calls.append((bucket.code.name.lower(), bucket.items))
        return self._original(group, layout, bucket, *rest)

    def take(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


def leaf(count: Any, rank: int, dtype: Any = F32, seed: int = 0) -> Array:
    return np.random.default_rng([seed, rank]).integers(-8, 8, count).astype(dtype)


def mean(count: Any, size: int, dtype: Any = F32, seed: int = 0) -> Array:
    total = sum(leaf(count, r, np.float64, seed) for r in range(size))
    return np.asarray(np.asarray(total / size).astype(dtype))


def same(found: Any, expected: Array, *label: object) -> None:
    assert isinstance(found, np.ndarray), (*label, type(found))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (*label, found.dtype, found.shape)
    assert np.array_equal(found, expected), (*label, found, expected)


async def buckets(rt: Any, group: Any, ctl: Any) -> None:
    me, size, counting = group.rank(), group.size(), Counting()

    async def average(counts: list[int], **how: Any) -> list[tuple[str, int]]:
        tree = [leaf(count, me, F32, i) for i, count in enumerate(counts)]
        found = await rt.average_gradients(tree, **how)
        for i, count in enumerate(counts):
            same(found[i], mean(count, size, F32, i), counts, how, i)
            same(tree[i], leaf(count, me, F32, i), "input", counts, how, i)
        return counting.take()

    f = "float32"
    assert await average([4, 4, 4, 4, 4], all_reduce_size=40) == [(f, 12), (f, 8)], "the leaf that crosses the line is included"
    assert await average([4, 6, 4], all_reduce_size=40) == [(f, 10), (f, 4)], "exactly full is full"
    assert await average([4, 5, 4], all_reduce_size=40) == [(f, 13)], "almost full is not"
    assert await average([1, 100, 1], all_reduce_size=40) == [(f, 101), (f, 1)]
    assert await average([100, 100], all_reduce_size=40) == [(f, 100), (f, 100)]
    assert await average([3, 4, 5], all_reduce_size=0) == [(f, 3), (f, 4), (f, 5)], "one collective per leaf"
    assert await average([3, 4], all_reduce_size=-1) == [(f, 3), (f, 4)]
    assert await average([3, 4, 100_000]) == [(f, 100_007)], "32 MiB by default"
    assert await average([3, 0, 4]) == [(f, 7)]
    assert await average([4, 4, 4], all_reduce_size=16, communication_type=np.float16) == [("float16", 8), ("float16", 4)], "bytes as sent"


@fronts
def test_buckets(front: str) -> None:
    results(2, buckets, front=front)


async def mixed(rt: Any, group: Any, ctl: Any) -> None:
    """One bucket per dtype, however the dtypes take turns; each is closed when it is full."""
    me, size, counting = group.rank(), group.size(), Counting()
    dtypes = [F32, F64, F32, F64, np.dtype(ml_dtypes.bfloat16), F32]
    tree = {f"{i}": leaf(4, me, dtype, i) for i, dtype in enumerate(dtypes)}
    found = await rt.average_gradients(tree)
    assert counting.take() == [("float32", 12), ("float64", 8), ("bfloat16", 4)]
    for i, dtype in enumerate(dtypes):
        same(found[f"{i}"], mean(4, size, dtype, i), i, dtype)
    await rt.average_gradients(tree, all_reduce_size=32)
    assert counting.take() == [("float32", 8), ("float64", 4), ("float64", 4), ("bfloat16", 4), ("float32", 4)]
    found = await rt.average_gradients(tree, None, 0, np.float32)
    assert counting.take() == [("float32", 4)] * 6
    for i, dtype in enumerate(dtypes):
        same(found[f"{i}"], mean(4, size, F32, i).astype(dtype), "communicated as float32", i, dtype)


@fronts
def test_mixed_dtypes(front: str) -> None:
    results(3, mixed, front=front)


async def trees(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    tree = {"a": [leaf((2, 3), me), (leaf((), me, F64), None)], "b": Layer(leaf((3, 0), me), {"c": leaf(5, me)}), "e": []}
    for size_of_bucket in (0, 1 << 20):
        found = await rt.average_gradients(tree, all_reduce_size=size_of_bucket)
        assert set(found) == {"a", "b", "e"} and found["e"] == [] and found["a"][1][1] is None
        assert isinstance(found["a"][1], tuple) and isinstance(found["b"], Layer)
        same(found["a"][0], mean((2, 3), size))
        same(found["a"][1][0], mean((), size, F64))
        same(found["b"].weight, mean((3, 0), size))
        same(found["b"].bias["c"], mean(5, size))
    empty: Any
    for empty in ({}, [], None, {"a": ()}):
        assert await rt.average_gradients(empty) == empty
    odd = leaf((4, 6), me)[::2, ::-1]
    same((await rt.average_gradients([odd]))[0], mean((4, 6), size)[::2, ::-1], "not contiguous")
    same(await rt.average_gradients(leaf(7, me)), mean(7, size), "a leaf is a tree")
    for kind in (list, tuple):
        found = await rt.average_gradients(kind([leaf(3, me), leaf((2, 2), me)]))
        assert type(found) is kind and len(found) == 2
        same(found[0], mean(3, size), kind)
        same(found[1], mean((2, 2), size), kind)


@fronts
def test_trees(front: str) -> None:
    results(2, trees, front=front)


async def disagreement(rt: Any, group: Any, ctl: Any, one: Any, other: Any) -> None:
    await rt.average_gradients((one, other)[group.rank()])


@fronts
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"bias": leaf(2, 0), "zeta": leaf(2, 0)}, {"alpha": leaf(2, 0), "bias": leaf(2, 0)}),
        ({"a": [leaf(2, 0)]}, {"a": {"b": leaf(2, 0)}}),
        ([leaf(2, 0)], {"a": leaf(2, 0)}),
        ({}, {"a": leaf(2, 0)}),
    ],
    ids=["other names", "deeper", "none", "empty"],
)
def test_leaves_of_other_names_are_found_out(front: str, one: Any, other: Any) -> None:
    for outcome in run(2, disagreement, front=front, args=(one, other)):
        assert outcome.error is not None and outcome.error.kind == "MismatchError", outcome
        assert "dtypes, shapes and names" in outcome.error.text, outcome.error.text


async def agreement(rt: Any, group: Any, ctl: Any) -> None:
    """Names are what counts: not the order, the kind of a list, or keys that are objects, which read otherwise on each rank."""
    me, size = group.rank(), group.size()
    x, y, key = leaf(2, me), leaf(3, me), object()
    for one, other in (({"a": x, "b": y}, {"b": y, "a": x}), ([x, (y,)], (x, [y])), ({key: x}, {key: x}), ([x, y], (x, y))):
        found: Any = await rt.average_gradients((one, other)[me])
        optree.tree_map(lambda each: same(each, mean(each.shape, size)), found)


@fronts
def test_equal_names_are_enough(front: str) -> None:
    results(2, agreement, front=front)


async def ownership(rt: Any, group: Any, ctl: Any) -> None:
    """What comes back belongs to the caller: writable, and no leaf shares memory with another, an input or a later result."""
    me, size = group.rank(), group.size()
    for how in ({}, {"all_reduce_size": 0}, {"communication_type": np.float64}, {"communication_type": np.float32}):
        tree = [leaf(4, me), leaf(6, me)]
        first = await rt.average_gradients(tree, **how)
        second = await rt.average_gradients(tree, **how)
        first[0][:] = 1e9
        same(first[1], mean(6, size), "another leaf", how)
        same(tree[0], leaf(4, me), "the input", how)
        same(second[0], mean(4, size), "another result", how)
        arrays = [*tree, *first, *second]
        assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i]), how


@fronts
def test_results_belong_to_the_caller(front: str) -> None:
    results(2, ownership, front=front)


async def refusals(rt: Any, group: Any, ctl: Any) -> None:
    good, counting = leaf(3, group.rank()), Counting()
    for error, tree, how in (
        (TypeError, [good, np.arange(3)], {}),
        (TypeError, {"a": good, "b": np.array([True])}, {}),
        (TypeError, [good, "text"], {}),
        (TypeError, [good, good.astype(">f4")], {}),
        (TypeError, [good], {"communication_type": np.int32}),
        (TypeError, [good, good.astype(np.complex64)], {"communication_type": np.float32}),
        (TypeError, [good], {"communication_type": "no type"}),
        (TypeError, [good], {"group": 3}),
        (rt.ConfigError if hasattr(rt, "ConfigError") else RuntimeError, [good], {"communication_stream": "gpu"}),
    ):
        with pytest.raises(error):
            await rt.average_gradients(tree, **how)
    assert counting.take() == [], "nothing was sent"
    same(await rt.average_gradients(good), mean(3, group.size()))


@fronts
def test_refused_trees_leave_the_group_usable(front: str) -> None:
    results(2, refusals, front=front)


async def of_groups(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    pair = await group.split(int(me == 0))
    expected = mean(5, 3) if me == 0 and pair.size() == 3 else leaf(5, 0) if me == 0 else (leaf(5, 1) + leaf(5, 2)) / np.float32(2)
    tree = [leaf(5, me)]
    for found in (await pair.average_gradients(tree), await rt.average_gradients(tree, pair), await rt.average_gradients(tree, group=pair)):
        same(found[0], expected, me)
        assert me or found is tree, "a group of one gives back what it got"
    whole = await group.average_gradients(tree, 0, np.float64)
    same(whole[0], mean(5, size))


@fronts
def test_groups(front: str) -> None:
    results(3, of_groups, front=front)


async def several(rt: Any, group: Any, ctl: Any) -> None:
    """The call submits: two averages, awaited in either order, and a collective between them."""
    me, size = group.rank(), group.size()
    one, total, two = rt.average_gradients([leaf(9, me)], all_reduce_size=0), rt.all_sum(me), rt.average_gradients([leaf(5, me, seed=1)])
    if me:
        found = [await two, await total, await one]
        found.reverse()
    else:
        found = [await one, await total, await two]
    same(found[0][0], mean(9, size))
    assert int(found[1]) == sum(range(size))
    same(found[2][0], mean(5, size, seed=1))


@fronts
def test_the_call_submits(front: str) -> None:
    results(2, several, front=front)


async def before_init(rt: Any, group: Any, ctl: Any) -> None:
    me = int(os.environ["RT_RANK"])
    same((await rt.average_gradients([leaf(5, me)]))[0], mean(5, 2))


@fronts
def test_before_init(front: str) -> None:
    results(2, before_init, front=front, init=False)


def test_group_of_one_returns_the_same_object(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RT_RANK", "RT_WORLD_SIZE", "RT_HOSTFILE", "RT_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    tree = {"a": np.ones(3), "b": [np.arange(3)]}
    assert rt.sync.average_gradients(tree) is tree
    assert rt.sync.init().average_gradients(tree) is tree

    async def awaited() -> None:
        assert await rt.average_gradients(tree) is tree
        assert await (await rt.init()).average_gradients(tree) is tree

    asyncio.run(awaited())
