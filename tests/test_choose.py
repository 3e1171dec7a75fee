"""Do all ranks choose the same algorithm, the one that ``rt/choose.py`` says, and is every choice right?

May live here: thresholds, reachability and dtypes as inputs of the choice. May not: what holds for an algorithm by itself
(``test_algorithms``).
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from schedule_interpreter import DTYPES, Setting, assert_matched, exact_data, expected, numbers, simulate

from rt.choose import choose
from rt.dtypes import ITEMSIZE, DType, Op, op_supported
from rt.schedule import Collective, Kind

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
]


@pytest.mark.parametrize(("kind", "size", "nbytes", "dtype", "op", "mesh", "name", "wide"), CHOICES)
def test_choice(kind: Collective, size: int, nbytes: int, dtype: DType, op: Op, mesh: bool, name: str, wide: bool) -> None:
    count = nbytes // ITEMSIZE[dtype]
    plans = [choose(kind, rank=r, size=size, count=count, dtype=dtype, op=op, lanes=2, full_mesh=mesh, root=1) for r in range(size)]
    assert {plan.name for plan in plans} == {name}
    assert {any(temp.wide for temp in plan.temps) for plan in plans} == {wide}
    assert any(step.kind is Kind.SCALE for step in plans[0].steps) == (op is Op.MEAN)
    assert_matched(plans)
    if not mesh:
        assert all(step.peer in (-1, (r + 1) % size, (r - 1) % size) for r, plan in enumerate(plans) for step in plan.steps)


@pytest.mark.parametrize("kind", [Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.ALL_GATHER, Collective.BROADCAST])
def test_every_choice_is_right(kind: Collective) -> None:
    for size, mesh, nbytes in itertools.product((2, 3, 5, 8), (True, False), (8, 6 * KIB, 100 * KIB, 600 * KIB)):
        rng = random.Random(f"{kind} {size} {mesh} {nbytes}")
        dtype = rng.choice(DTYPES)
        op = rng.choice([op for op in Op if op_supported(dtype, op)])
        s = Setting(size, nbytes // ITEMSIZE[dtype], rng.choice((1, 3)), root=rng.randrange(size))
        plans = [
            choose(kind, rank=r, size=size, count=s.items, dtype=dtype, op=op, lanes=s.lanes, full_mesh=mesh, root=s.root)
            for r in range(size)
        ]
        draw = np.random.default_rng(rng.getrandbits(32))
        length = s.items * (size if kind is Collective.REDUCE_SCATTER else 1)
        inputs = [exact_data(dtype, op, length, draw) for _ in range(size)]
        outputs = simulate(kind, plans, s, inputs, numbers(dtype, op), rng, rng.random() < 0.5)
        for found, wanted in zip(outputs, expected(kind, inputs, op, s), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=f"{plans[0].name}, {s}, {dtype!r}, {op!r}")


def test_point_to_point_asks_for_the_peer_only() -> None:
    there = choose(Collective.SEND, rank=0, size=9, count=10, dtype=DType.INT8, op=Op.SUM, lanes=2, full_mesh=False, root=5)
    back = choose(Collective.RECV, rank=5, size=9, count=10, dtype=DType.INT8, op=Op.SUM, lanes=2, full_mesh=False, root=0)
    assert [step.peer for step in there.steps] == [5] and [step.peer for step in back.steps] == [0]
