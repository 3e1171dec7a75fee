"""The whole family of collectives at once: ranks that disagree about a call of it, and long streams of random calls.

May live here: disagreement and mixtures of the collectives in ``rt/collectives_blocks.py`` with all others. May not: results of single
ones (``test_family``).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import ranks
from ranks import FRONTS, in_order, results
from test_collectives import Array, reduced, same, sample
from test_mismatch import Case, check_verdict, each_case, provoke, told_by

from rt import group
from rt.dtypes import DType, Op

# ---- disagreement -----------------------------------------------------------------------------------------------------------------------

# x has 12 rows; the odd rank is the last of two, the third of four.
EVEN, ODD = {2: [12, 0], 4: [12, 0, 0, 0]}, {2: [0, 12], 4: [0, 0, 12, 0]}


def mine(x: Array, counts: list[int], rank: int) -> Array:
    return x[: counts[rank]]


CASES = {
    "root of a reduce": Case(lambda g, x: g.reduce(x), lambda g, x: g.reduce(x, root=1), ("root 0", "root 1")),
    "op of a reduce": Case(lambda g, x: g.reduce(x), lambda g, x: g.reduce(x, "max"), (" sum ", " max ")),
    "shape of a reduce": Case(lambda g, x: g.reduce(x), lambda g, x: g.reduce(x[:6]), ("(12, 2)", "(6, 2)")),
    "root of a gather": Case(lambda g, x: g.gather(x), lambda g, x: g.gather(x, 1), ("root 0", "root 1")),
    "rows of a gather": Case(lambda g, x: g.gather(x), lambda g, x: g.gather(x[:3]), ("(12, 2)", "(3, 2)")),
    "root of a scatter": Case(lambda g, x: g.scatter(x), lambda g, x: g.scatter(x, 1), ("root 0", "root 1")),
    "root of much": Case(
        lambda g, x: g.scatter(np.resize(x, 1 << 20)), lambda g, x: g.scatter(np.resize(x, 1 << 20), 1), ("root 0", "root 1")
    ),
    "dtype of an all_to_all": Case(lambda g, x: g.all_to_all(x), lambda g, x: g.all_to_all(x.view(np.int32)), ("float32", "int32")),
    "gather against all_gather": Case(lambda g, x: g.gather(x), lambda g, x: g.all_gather(x), (" gather ", " all_gather ")),
    "scatter against broadcast": Case(lambda g, x: g.scatter(x), lambda g, x: g.broadcast(x), (" scatter ", " broadcast ")),
    "op of a scan": Case(lambda g, x: g.scan(x), lambda g, x: g.scan(x, "prod"), (" sum ", " prod ")),
    "scan against exscan": Case(lambda g, x: g.scan(x), lambda g, x: g.exscan(x), (" scan ", " exscan ")),
    "counts of an all_gather_v": Case(
        lambda g, x: g.all_gather_v(mine(x, EVEN[g.size()], g.rank()), EVEN[g.size()]),
        lambda g, x: g.all_gather_v(mine(x, ODD[g.size()], g.rank()), ODD[g.size()]),
        ("counts [12, 0", "counts [0, "),
    ),
    "counts of a gather_v": Case(
        lambda g, x: g.gather_v(mine(x, EVEN[g.size()], g.rank()), EVEN[g.size()]),
        lambda g, x: g.gather_v(mine(x, ODD[g.size()], g.rank()), ODD[g.size()]),
        ("counts [12, 0", "counts [0, "),
    ),
    "counts of a reduce_scatter_v": Case(
        lambda g, x: g.reduce_scatter_v(x, EVEN[g.size()]),
        lambda g, x: g.reduce_scatter_v(x, ODD[g.size()]),
        ("counts [12, 0", "counts [0, "),
    ),
    "counts of a scatter_v": Case(
        lambda g, x: g.scatter_v(x, EVEN[g.size()]), lambda g, x: g.scatter_v(x, ODD[g.size()]), ("counts [12, 0", "counts [0, ")
    ),
    "root of a gather_v": Case(
        lambda g, x: g.gather_v(mine(x, EVEN[g.size()], g.rank()), EVEN[g.size()]),
        lambda g, x: g.gather_v(mine(x, EVEN[g.size()], g.rank()), EVEN[g.size()], 1),
        ("root 0", "root 1"),
    ),
    "plain against counted": Case(
        lambda g, x: g.all_to_all(x), lambda g, x: g.all_to_all_v(x, [12 // g.size()] * g.size(), [12 // g.size()] * g.size()),
        (" all_to_all ", " all_to_all_v "),
    ),
}  # fmt: skip


async def disagree(rt: Any, world: Any, ctl: ranks.Ctl) -> dict[str, Any]:
    return await each_case(world, CASES)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_disagreement_about(name: str, size: int, front: str) -> None:
    check_verdict(told_by(disagree, front, size, name), CASES[name].said)


@pytest.mark.parametrize("counts", [(0, 0), (6, 2**31 - 1), (0, 1, 2, 2**15 - 1), (127, 0, 1, 2, 3, 4, 5, 6), (1,) * 63, (0,) * 100])
def test_counts_are_told_where_they_fit(counts: tuple[int, ...]) -> None:
    number = group.number_of(counts)
    assert 0 <= number < 2**64 and group.explain_counts(number, len(counts)) == f"counts {list(counts)}"


def test_counts_that_do_not_fit_are_told_apart() -> None:
    numbers = [group.number_of(counts) for counts in ((2**31, 0), (0, 2**31), (2**15, 0, 0, 0), (1,) * 64, (1,) * 65)]
    assert len(set(numbers)) == 5 and all(0 <= number < 2**64 and "a hash" in group.explain_counts(number, 2) for number in numbers)


async def wrong_counts(rt: Any, world: Any, ctl: Any) -> str:
    counts = [[1 << 40, 1], [1 << 40, 2]][world.rank()]
    with pytest.raises(rt.MismatchError) as caught:
        await world.gather_v(np.empty((counts[world.rank()], 0), np.float32), counts)
    return str(caught.value)


def test_each_rank_tells_its_own_counts() -> None:
    said = results(2, wrong_counts)
    assert [f"(float32, 0 B, counts [{1 << 40}, {last}])" in text for last, text in enumerate(said, 1)] == [True, True], said


def pairs() -> dict[str, tuple[int, int, tuple[str, str]]]:
    """Rows that rank 0 sends rank 2, rows that rank 2 expects, and the words of the error."""
    return {
        "too few": (3, 5, ("3 from the lower", "5 from the lower")),
        "too many": (200_000, 5, ("200000 from the lower", "5 from the lower")),
        "nothing expected": (4, 0, ("4 from the lower", "0 from the lower")),
        "nothing sent": (0, 4, ("0 from the lower", "4 from the lower")),
    }


async def one_pair(rt: Any, world: Any, ctl: ranks.Ctl) -> dict[str, Any]:
    """Of all pairs only ranks 0 and 2 disagree, about what goes one way; the way back holds two rows."""
    found = {}
    for name, (sent, expected, _) in pairs().items():
        group = await world.split(0)
        me = group.rank()
        send = {0: [0, 1, sent], 1: [0, 0, 0], 2: [2, 0, 1]}[me]
        receive = {0: [0, 0, 2], 1: [1, 0, 0], 2: [expected, 0, 1]}[me]
        outs = []

        async def call(group: Any, x: Array, send: Any = send, receive: Any = receive, outs: Any = outs) -> None:
            outs.append(np.full((sum(receive), 2), 77.0, np.float32))
            await group.all_to_all_v(x, send, receive, out=outs[0])
            assert group.rank() == 1, "a rank that disagrees has no result"

        told = await provoke(group, call, np.zeros((sum(send), 2), np.float32))
        theirs = {0: slice(0, None), 1: slice(0, 0), 2: slice(0, expected)}[me]
        assert (outs[0][theirs] == 77).all(), "nothing lands that comes under another signature"
        found[name] = told
    return found


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", pairs())
def test_pairs_that_disagree_about_counts(name: str, front: str) -> None:
    told = told_by(one_pair, front, 3, name)
    check_verdict(told, pairs()[name][2])
    words = told[1][1]
    assert "rank 0 called all_to_all_v" in words and "rank 2 called all_to_all_v" in words and "rows of shape (2,)" in words


# ---- long streams of anything ------------------------------------------------------------------------------------------------------------


class Stream:
    """Random calls, the same on all ranks; each gives the call of one rank and what NumPy says it must return."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.dice = size, random.Random(seed)
        self.number = 0

    def inputs(self, dtype: DType, rows: int | list[int]) -> list[Array]:
        counts = rows if isinstance(rows, list) else [rows] * self.size
        return [sample(dtype, (count, 3), r, self.number) for r, count in enumerate(counts)]

    def draw(self, group: Any, me: int) -> tuple[Any, Array | None, str]:
        """Return what starts the next call, its result on this rank, and a label."""
        dice, size = self.dice, self.size
        self.number += 1
        dtype = dice.choice((DType.FLOAT32, DType.FLOAT16, DType.INT16, DType.COMPLEX64))
        op, root = dice.choice((Op.SUM, Op.MAX, Op.MIN)), dice.randrange(size)
        most = dice.choice((1, 5, 300, 3000, 20_000))
        rows, counts = dice.randint(0, most), [dice.choice((0, dice.randint(0, most))) for _ in range(size)]
        table = [[dice.choice((0, dice.randint(0, most))) for _ in range(size)] for _ in range(size)]
        name = dice.choice((
            "all_reduce", "all_gather", "sum_scatter", "broadcast", "barrier", "reduce", "gather", "scatter", "all_to_all", "all_gather_v",
            "reduce_scatter_v", "gather_v", "scatter_v", "all_to_all_v", "scan", "exscan", "sendrecv",
        ))  # fmt: skip
        in_place = dice.random() < 0.3
        return self.make(group, me, name, dtype, op, root, rows, counts, table, in_place)

    def make(
        self, group: Any, me: int, name: str, dtype: DType, op: Op, root: int, rows: int, counts: list[int], table: list[list[int]],
        in_place: bool,
    ) -> tuple[Any, Array | None, str]:  # fmt: skip
        size, how = self.size, op.name.lower()
        label = f"call {self.number}: {name} {dtype.name} {how} root {root} rows {rows} counts {counts} in place {in_place}"
        each, whole, blocks = self.inputs(dtype, rows), self.inputs(dtype, rows * size), self.inputs(dtype, counts)
        long = self.inputs(dtype, sum(counts))
        here, there = slice(me * rows, (me + 1) * rows), slice(sum(counts[:me]), sum(counts[: me + 1]))
        right, left = (me + 1) % size, (me - 1) % size
        apart = {"out": each[me]} if in_place else {}
        match name:
            case "all_reduce":
                return lambda: group.all_reduce(each[me], how, **apart), reduced(dtype, op, self.inputs(dtype, rows)), label
            case "all_gather":
                return lambda: group.all_gather(each[me]), np.concatenate(each), label
            case "sum_scatter":
                return lambda: group.sum_scatter(whole[me], how), reduced(dtype, op, whole)[here], label
            case "broadcast":
                return lambda: group.broadcast(each[me], root, **apart), self.inputs(dtype, rows)[root], label
            case "barrier":
                return group.barrier, None, label
            case "reduce":
                expected = reduced(dtype, op, each) if me == root else None
                return lambda: group.reduce(each[me], how, root, **apart), expected, label
            case "gather":
                return lambda: group.gather(each[me], root), np.concatenate(each) if me == root else None, label
            case "scatter":
                return lambda: group.scatter(whole[me], root), whole[root][here], label
            case "all_to_all":
                expected = np.concatenate([x[here] for x in whole])
                return lambda: group.all_to_all(whole[me], **({"out": whole[me]} if in_place else {})), expected, label
            case "all_gather_v":
                return lambda: group.all_gather_v(blocks[me], counts), np.concatenate(blocks), label
            case "reduce_scatter_v":
                return lambda: group.reduce_scatter_v(long[me], counts, how), reduced(dtype, op, long)[there], label
            case "gather_v":
                return lambda: group.gather_v(blocks[me], counts, root), np.concatenate(blocks) if me == root else None, label
            case "scatter_v":
                return lambda: group.scatter_v(long[me], counts, root), long[root][there], label
            case "all_to_all_v":
                parts = [np.split(sample(dtype, (sum(row), 3), r, self.number), np.cumsum(row)[:-1]) for r, row in enumerate(table)]
                x, expected = np.concatenate(parts[me]), np.concatenate([part[me] for part in parts])
                return lambda: group.all_to_all_v(x, table[me], [row[me] for row in table]), expected, label
            case "scan":
                return lambda: group.scan(each[me], how, **apart), reduced(dtype, op, self.inputs(dtype, rows)[: me + 1]), label
            case "exscan":
                # A sum, as the identity of the others is tested elsewhere.
                expected = reduced(dtype, Op.SUM, self.inputs(dtype, rows)[:me]) if me else np.zeros_like(each[0])
                return lambda: group.exscan(each[me], **apart), expected, label
        assert name == "sendrecv"
        return lambda: group.sendrecv(each[me], right, left, tag=root, **apart), self.inputs(dtype, rows)[left], label


async def chaos(rt: Any, world: Any, ctl: ranks.Ctl, seed: int, calls: int) -> int:
    """Calls on two groups in different orders of ranks; under a loop several are in flight, awaited in another order on each rank."""
    me, size = world.rank(), world.size()
    backwards = await world.split(0, size - me)
    common, own = random.Random(seed), random.Random(1000 * seed + me)
    streams = {0: (world, Stream(size, seed)), 1: (backwards, Stream(size, seed + 1))}
    flying: list[tuple[Any, Array | None, str]] = []

    async def land(number: int) -> None:
        work, expected, label = flying.pop(number)
        (found,) = await in_order([work])
        if expected is None:
            assert found is None, label
        else:
            same(found, expected, label)

    for _ in range(calls):
        group, stream = streams[common.randrange(2)]
        start, expected, label = stream.draw(group, group.rank())
        flying.append((start(), expected, label))
        while len(flying) > (0 if ctl.front == "sync" else own.randint(0, 8)):
            await land(own.randrange(len(flying)))
    while flying:
        await land(0)
    return calls


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_three_hundred_random_calls(front: str, size: int) -> None:
    assert results(size, chaos, front=front, args=(size * 10 + FRONTS.index(front), 300), timeout=100) == [300] * size


def test_random_calls_over_several_sockets() -> None:
    results(4, chaos, front="uvloop", args=(7, 300), env={"RT_CONNECTIONS_PER_IP": "2"}, timeout=100)
