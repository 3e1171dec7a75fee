"""Do all ranks choose the same algorithm, the one that ``rt/choose.py`` says, and is every choice right?

May live here: thresholds, reachability, hosts and dtypes as inputs of the choice. May not: what holds for an algorithm by itself
(``test_algorithms``).
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from schedule_interpreter import DTYPES, Setting, assert_matched, exact_data, expected, lengths, numbers, simulate

from rt.choose import choose
from rt.dtypes import ITEMSIZE, DType, Op, op_supported
from rt.schedule import Collective, Kind
from rt.tuning import ALGORITHMS, LINKS, Table, parse, shipped

KIB = 1024
CHOICES = [
    # kind, size, bytes, dtype, op, mesh -> name, wide
    (Collective.ALL_REDUCE, 2, 512 * KIB, DType.FLOAT32, Op.MEAN, True, "doubling", False),
    (Collective.ALL_REDUCE, 2, 512 * KIB + 4, DType.FLOAT32, Op.SUM, True, "ring", False),
    (Collective.ALL_REDUCE, 2, 4 * KIB, DType.FLOAT16, Op.SUM, True, "doubling", False),
    (Collective.ALL_REDUCE, 2, 4 * KIB, DType.FLOAT16, Op.MEAN, True, "direct", True),
    (Collective.ALL_REDUCE, 4, 16 * KIB, DType.INT64, Op.SUM, True, "doubling", False),
    (Collective.ALL_REDUCE, 4, 256 * KIB, DType.INT64, Op.SUM, True, "owner", False),
    (Collective.ALL_REDUCE, 4, 256 * KIB + 8, DType.INT64, Op.SUM, True, "ring", False),
    (Collective.ALL_REDUCE, 4, 4 * KIB, DType.INT64, Op.SUM, False, "ring", False),
    (Collective.ALL_REDUCE, 3, 4 * KIB, DType.INT64, Op.SUM, False, "doubling", False),
    (Collective.ALL_REDUCE, 4, 4 * KIB, DType.BFLOAT16, Op.PROD, True, "direct", True),
    (Collective.ALL_REDUCE, 4, 4 * KIB + 2, DType.BFLOAT16, Op.SUM, True, "owner", True),
    (Collective.ALL_REDUCE, 4, 4 * KIB, DType.BFLOAT16, Op.SUM, False, "ring_wide", True),
    (Collective.ALL_REDUCE, 4, 4 * KIB, DType.BFLOAT16, Op.MAX, True, "doubling", False),
    (Collective.ALL_GATHER, 4, 64 * KIB, DType.FLOAT32, Op.SUM, True, "direct", False),
    (Collective.ALL_GATHER, 4, 64 * KIB + 4, DType.FLOAT32, Op.SUM, True, "ring", False),
    (Collective.ALL_GATHER, 4, 4, DType.FLOAT32, Op.SUM, False, "ring", False),
    (Collective.REDUCE_SCATTER, 4, 64 * KIB, DType.FLOAT32, Op.SUM, True, "direct", False),
    (Collective.REDUCE_SCATTER, 4, 64 * KIB + 4, DType.FLOAT32, Op.MEAN, True, "ring", False),
    (Collective.REDUCE_SCATTER, 4, 256 * KIB, DType.FLOAT16, Op.SUM, True, "direct", True),
    (Collective.REDUCE_SCATTER, 4, 256 * KIB, DType.FLOAT16, Op.MEAN, False, "ring_wide", True),
    (Collective.REDUCE_SCATTER, 4, 256 * KIB, DType.FLOAT16, Op.MIN, True, "ring", False),
    (Collective.BROADCAST, 4, 64 * KIB, DType.UINT8, Op.SUM, True, "binomial", False),
    (Collective.BROADCAST, 4, 64 * KIB + 1, DType.UINT8, Op.SUM, True, "pipeline", False),
    (Collective.BROADCAST, 4, 1, DType.UINT8, Op.SUM, False, "pipeline", False),
    (Collective.BARRIER, 4, 0, DType.UINT8, Op.SUM, True, "dissemination", False),
    (Collective.BARRIER, 4, 0, DType.UINT8, Op.SUM, False, "ring", False),
    (Collective.REDUCE, 2, 64 * KIB, DType.FLOAT32, Op.MEAN, True, "binomial", False),
    (Collective.REDUCE, 2, 64 * KIB + 4, DType.FLOAT32, Op.SUM, True, "pipeline", False),
    (Collective.REDUCE, 4, 16 * KIB, DType.FLOAT16, Op.MAX, True, "binomial", False),
    (Collective.REDUCE, 4, 16 * KIB + 4, DType.FLOAT32, Op.SUM, True, "owner", False),
    (Collective.REDUCE, 4, 256 * KIB + 4, DType.FLOAT32, Op.MEAN, True, "pipeline", False),
    (Collective.REDUCE, 4, 4, DType.FLOAT32, Op.MEAN, False, "pipeline", False),
    (Collective.REDUCE, 4, 16, DType.FLOAT16, Op.MEAN, True, "owner", True),
    (Collective.REDUCE, 4, 1024 * KIB, DType.BFLOAT16, Op.SUM, True, "owner", True),
    (Collective.REDUCE, 4, 16, DType.FLOAT16, Op.SUM, False, "pipeline_wide", True),
    (Collective.GATHER, 4, 4 * KIB, DType.FLOAT32, Op.SUM, True, "binomial", False),
    (Collective.GATHER, 4, 4 * KIB + 4, DType.FLOAT32, Op.SUM, True, "direct", False),
    (Collective.GATHER, 4, 4, DType.FLOAT32, Op.SUM, False, "ring", False),
    (Collective.SCATTER, 4, 4 * KIB, DType.FLOAT32, Op.SUM, True, "binomial", False),
    (Collective.SCATTER, 4, 4 * KIB + 4, DType.FLOAT32, Op.SUM, True, "direct", False),
    (Collective.SCATTER, 4, 4, DType.FLOAT32, Op.SUM, False, "ring", False),
    (Collective.ALL_TO_ALL, 4, 4, DType.FLOAT32, Op.SUM, True, "direct", False),
    (Collective.ALL_TO_ALL, 4, 4, DType.FLOAT32, Op.SUM, False, "ring", False),
    (Collective.SCAN, 4, 16 * KIB, DType.FLOAT32, Op.SUM, True, "doubling", False),
    (Collective.SCAN, 4, 16 * KIB + 4, DType.FLOAT32, Op.SUM, True, "pipeline", False),
    (Collective.SCAN, 4, 16, DType.FLOAT16, Op.SUM, True, "doubling", True),
    (Collective.SCAN, 4, 16, DType.FLOAT16, Op.SUM, False, "pipeline_wide", True),
    (Collective.EXSCAN, 3, 16, DType.FLOAT16, Op.SUM, True, "doubling", False),
    (Collective.EXSCAN, 4, 16, DType.FLOAT16, Op.PROD, True, "doubling", True),
    (Collective.EXSCAN, 4, 4, DType.FLOAT32, Op.SUM, False, "pipeline", False),
]
KINDS = (
    Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.ALL_GATHER, Collective.BROADCAST, Collective.REDUCE, Collective.GATHER,
    Collective.SCATTER, Collective.ALL_TO_ALL, Collective.SCAN, Collective.EXSCAN,
)  # fmt: skip


@pytest.mark.parametrize(("kind", "size", "nbytes", "dtype", "op", "mesh", "name", "wide"), CHOICES)
def test_choice(kind: Collective, size: int, nbytes: int, dtype: DType, op: Op, mesh: bool, name: str, wide: bool) -> None:
    count = nbytes // ITEMSIZE[dtype]
    plans = [choose(kind, rank=r, size=size, count=count, dtype=dtype, op=op, lanes=2, full_mesh=mesh, root=1) for r in range(size)]
    assert {plan.name for plan in plans} == {name}
    assert {any(temp.wide for temp in plan.temps) for plan in plans} == {wide}
    assert any(step.kind is Kind.SCALE for plan in plans for step in plan.steps) == (op is Op.MEAN)
    assert_matched(plans)
    if not mesh:
        assert all(step.peer in (-1, (r + 1) % size, (r - 1) % size) for r, plan in enumerate(plans) for step in plan.steps)


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_right(kind: Collective) -> None:
    for size, mesh, nbytes in itertools.product((2, 3, 5, 8), (True, False), (8, 6 * KIB, 100 * KIB, 600 * KIB)):
        rng = random.Random(f"{kind} {size} {mesh} {nbytes}")
        dtype = rng.choice(DTYPES)
        scans = kind in (Collective.SCAN, Collective.EXSCAN)
        op = rng.choice([op for op in Op if op_supported(dtype, op) and not (scans and op is Op.MEAN)])
        s = Setting(size, nbytes // ITEMSIZE[dtype], rng.choice((1, 3)), root=rng.randrange(size))
        plans = [
            choose(kind, rank=r, size=size, count=s.items, dtype=dtype, op=op, lanes=s.lanes, full_mesh=mesh, root=s.root)
            for r in range(size)
        ]
        draw = np.random.default_rng(rng.getrandbits(32))
        inputs = [exact_data(dtype, op, lengths(kind, rank, s)[0], draw) for rank in range(size)]
        outputs = simulate(kind, plans, s, inputs, numbers(dtype, op), rng, rng.random() < 0.5)
        for found, wanted in zip(outputs, expected(kind, inputs, op, s), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=f"{plans[0].name}, {s}, {dtype!r}, {op!r}")


def preferring(row: str, name: str) -> Table:
    """The table that is shipped, but for one collective for which it always names one algorithm."""
    return parse({"version": 1, row: {links: {"2": {"above": name}, "99": {"above": name}} for links in LINKS}}, "a table").over(shipped())


FALLS = [
    # row, named, dtype, op, mesh -> what is used
    ("all_reduce", "direct", DType.FLOAT32, Op.SUM, True, "direct"),
    ("all_reduce", "doubling", DType.FLOAT32, Op.SUM, False, "ring"),
    ("all_reduce_wide", "ring", DType.FLOAT16, Op.SUM, True, "owner"),
    ("all_reduce_wide", "direct", DType.FLOAT16, Op.SUM, False, "ring_wide"),
    ("all_reduce_wide", "direct", DType.FLOAT16, Op.MAX, False, "ring"),
    ("reduce_scatter", "ring", DType.BFLOAT16, Op.MEAN, True, "direct"),
    ("reduce", "binomial", DType.BFLOAT16, Op.SUM, True, "owner"),
    ("reduce", "pipeline", DType.BFLOAT16, Op.SUM, True, "owner"),
    ("reduce", "binomial", DType.BFLOAT16, Op.SUM, False, "pipeline_wide"),
    ("all_gather", "ring", DType.FLOAT16, Op.SUM, True, "ring"),
    ("gather", "direct", DType.FLOAT32, Op.SUM, False, "ring"),
    ("barrier", "ring", DType.UINT8, Op.SUM, True, "ring"),
]


@pytest.mark.parametrize(("row", "named", "dtype", "op", "mesh", "used"), FALLS)
def test_what_the_table_names_is_used_where_it_fits(row: str, named: str, dtype: DType, op: Op, mesh: bool, used: str) -> None:
    kind, table = Collective[row.removesuffix("_wide").upper()], preferring(row, named)
    plans = [choose(kind, rank=r, size=4, count=8, dtype=dtype, op=op, lanes=1, full_mesh=mesh, root=1, table=table) for r in range(4)]
    assert {plan.name for plan in plans} == {used}
    assert_matched(plans)


def test_the_row_is_that_of_the_links() -> None:
    rules = {"version": 1, "all_gather": {"shm": {"2": {"above": "ring"}}}}
    table = parse(rules, "a table").over(shipped())
    how = {"rank": 0, "size": 2, "count": 1, "dtype": DType.INT8, "op": Op.SUM, "lanes": 1, "full_mesh": True, "table": table}
    plans = [choose(Collective.ALL_GATHER, links=links, **how) for links in LINKS]  # type: ignore[arg-type]
    assert [plan.name for plan in plans] == ["ring", "direct", "direct"]


@pytest.mark.parametrize("row", ALGORITHMS)
def test_every_algorithm_of_a_table_is_right_where_all_are_connected(row: str) -> None:
    """Whatever a person writes into a table, the results are right."""
    kind = Collective[row.removesuffix("_wide").upper()]
    if kind is Collective.BARRIER:
        return  # nothing comes of it; the algorithms have tests of their own
    for name, size, nbytes in itertools.product(ALGORITHMS[row], (2, 3, 5), (8, 100 * KIB)):
        rng = random.Random(f"{row} {name} {size} {nbytes}")
        dtype, op = DType.FLOAT16 if row.endswith("_wide") else rng.choice([DType.FLOAT32, DType.INT16]), Op.SUM
        s = Setting(size, nbytes // ITEMSIZE[dtype], rng.choice((1, 3)), root=rng.randrange(size))
        how = {"size": size, "count": s.items, "dtype": dtype, "op": op, "lanes": s.lanes, "full_mesh": True, "root": s.root}
        plans = [choose(kind, rank=r, table=preferring(row, name), **how) for r in range(size)]  # type: ignore[arg-type]
        draw = np.random.default_rng(rng.getrandbits(32))
        inputs = [exact_data(dtype, op, lengths(kind, rank, s)[0], draw) for rank in range(size)]
        outputs = simulate(kind, plans, s, inputs, numbers(dtype, op), rng, rng.random() < 0.5)
        for found, wanted in zip(outputs, expected(kind, inputs, op, s), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=f"{plans[0].name}, {s}")


HOSTS = [
    # hosts, bytes, dtype, op, mesh -> name
    ((0, 0, 1, 1), 16 * KIB, DType.FLOAT32, Op.SUM, True, "doubling"),
    ((0, 0, 1, 1), 16 * KIB + 4, DType.FLOAT32, Op.MEAN, True, "hierarchy"),
    ((0, 1, 0, 1), 1024 * KIB, DType.FLOAT16, Op.MAX, True, "hierarchy"),
    ((0, 1, 0, 1), 1024 * KIB, DType.FLOAT16, Op.MEAN, True, "hierarchy_wide"),
    ((0, 0, 1), 1024 * KIB, DType.BFLOAT16, Op.SUM, False, "hierarchy_wide"),  # in a ring of three all are neighbours
    ((0, 0, 1, 1), 1024 * KIB, DType.FLOAT32, Op.SUM, False, "ring"),
    ((0, 1, 2, 3), 1024 * KIB, DType.FLOAT32, Op.SUM, True, "ring"),
    ((0, 0, 0, 0), 1024 * KIB, DType.FLOAT32, Op.SUM, True, "ring"),
    ((0, 1), 1024 * KIB, DType.FLOAT32, Op.SUM, True, "ring"),
]


@pytest.mark.parametrize(("hosts", "nbytes", "dtype", "op", "mesh", "name"), HOSTS)
def test_choice_where_ranks_share_hosts(hosts: tuple[int, ...], nbytes: int, dtype: DType, op: Op, mesh: bool, name: str) -> None:
    size, count = len(hosts), nbytes // ITEMSIZE[dtype]
    given = {"size": size, "count": count, "dtype": dtype, "op": op, "lanes": 1, "full_mesh": mesh, "hosts": hosts, "links": "mixed"}
    plans = [choose(Collective.ALL_REDUCE, rank=rank, **given) for rank in range(size)]  # type: ignore[arg-type]
    assert {plan.name for plan in plans} == {name}
    assert any(step.kind is Kind.SCALE for plan in plans for step in plan.steps) == (op is Op.MEAN)
    assert_matched(plans)


def test_blocks_of_different_lengths_go_by_the_largest() -> None:
    def names(kind: Collective, counts: list[int], mesh: bool = True) -> set[str]:
        size, given = len(counts), {"count": sum(counts), "counts": counts, "dtype": DType.UINT8, "op": Op.SUM, "lanes": 1}
        plans = [choose(kind, rank=r, size=size, full_mesh=mesh, root=1, **given) for r in range(size)]  # type: ignore[arg-type]
        assert_matched(plans)
        for rank, plan in enumerate(plans):
            assert {step.peer for step in plan.steps} >= {(rank + 1) % size, (rank - 1) % size}, "neighbours always compare their calls"
        return {plan.name for plan in plans}

    for kind in (Collective.ALL_GATHER_V, Collective.REDUCE_SCATTER_V):
        assert names(kind, [0, 64 * KIB, 1, 64 * KIB]) == {"direct"}
        assert names(kind, [0, 64 * KIB + 1, 1, 0]) == names(kind, [1, 0, 0, 0], False) == {"ring"}
    for kind in (Collective.GATHER_V, Collective.SCATTER_V):
        assert names(kind, [4 * KIB, 0, 1, 0]) == {"binomial"}
        assert names(kind, [4 * KIB + 1, 0, 1, 0]) == {"direct"}
        assert names(kind, [1, 0, 0, 0], False) == {"ring"}
        assert names(kind, [0, 9]) == names(kind, [0, 0, 0, 9, 0]) == {"binomial"}, "nothing but the root's own"
    assert choose(
        Collective.ALL_TO_ALL_V, rank=0, size=2, count=0, dtype=DType.INT8, op=Op.SUM, lanes=1, full_mesh=True, counts=[0] * 4
    ).steps, "those that exchange nothing are compared, too"


def test_point_to_point_asks_for_the_peer_only() -> None:
    there = choose(Collective.SEND, rank=0, size=9, count=10, dtype=DType.INT8, op=Op.SUM, lanes=2, full_mesh=False, root=5)
    back = choose(Collective.RECV, rank=5, size=9, count=10, dtype=DType.INT8, op=Op.SUM, lanes=2, full_mesh=False, root=0)
    assert [step.peer for step in there.steps] == [5] and [step.peer for step in back.steps] == [0]
