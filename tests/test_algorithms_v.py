"""Are the algorithms right for blocks of different lengths? Against NumPy, by ``schedule_interpreter``.

May live here: what ``test_algorithms`` proves for blocks of one length, for blocks of any. May not: the choice (``test_choose``), links.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from schedule_interpreter import Net, Rank, Setting, assert_matched, exact_data, expected, lengths, numbers, simulate
from test_algorithms import EVERY, MANY_PARTS, SIZES, dtypes, programs

from rt import algorithms_exchange as exchange
from rt.dtypes import DType, Op
from rt.schedule import Collective

UNEVEN = {
    Collective.ALL_GATHER: Collective.ALL_GATHER_V,
    Collective.REDUCE_SCATTER: Collective.REDUCE_SCATTER_V,
    Collective.GATHER: Collective.GATHER_V,
    Collective.SCATTER: Collective.SCATTER_V,
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in EVERY if kind in UNEVEN])
def test_blocks_of_any_lengths(kind: Collective, name: str) -> None:
    """Among them blocks of nothing and ranks that have everything."""
    for size, in_place in itertools.product(SIZES, (False, True)):
        for seed in range(4):
            rng = random.Random(f"{kind} {name} {size} {in_place} {seed}")
            counts = [rng.choice((0, 1, 2, 37)) for _ in range(size)]
            if seed == 0:
                counts = [0] * size
                counts[rng.randrange(size)] = 50
            lanes, itemsize, root = rng.choice((1, 2, 3)), rng.choice((1, MANY_PARTS)), rng.randrange(size)
            s = Setting(size, sum(counts), lanes, itemsize, root=root, counts=tuple(counts))
            plans = programs(kind, name, s)
            assert_matched(plans)
            assert max(len(plan.steps) for plan in plans) <= 10 * size * s.lanes
            dtype = rng.choice(dtypes(name))
            draw = np.random.default_rng(seed)
            inputs = [exact_data(dtype, Op.SUM, lengths(UNEVEN[kind], rank, s)[0], draw) for rank in range(size)]
            outputs = simulate(UNEVEN[kind], plans, s, inputs, numbers(dtype, Op.SUM), rng, in_place)
            for rank, (found, wanted) in enumerate(zip(outputs, expected(UNEVEN[kind], inputs, Op.SUM, s), strict=True)):
                np.testing.assert_array_equal(found, wanted, err_msg=f"rank {rank}, {s}, {dtype!r}, in place: {in_place}")


def test_all_to_all_of_any_lengths() -> None:
    for size in SIZES:
        for seed in range(6):
            rng = random.Random(f"{size} {seed}")
            table = np.array([[rng.choice((0, 0, 1, 5, 37)) for _ in range(size)] for _ in range(size)])
            lanes, itemsize = rng.choice((1, 3)), rng.choice((1, MANY_PARTS))
            plans = [exchange.direct_all_to_all(r, table[r].tolist(), table[:, r].tolist(), lanes, itemsize) for r in range(size)]
            assert_matched(plans)
            blocks = [[np.full(count, 1000 * i + j) for j, count in enumerate(row)] for i, row in enumerate(table)]
            sides = [(np.concatenate(row), np.full(table[:, rank].sum(), -1)) for rank, row in enumerate(blocks)]
            kind = numbers(DType.INT64, Op.SUM)
            ranks = [Rank(i, size, plan, *side, kind) for i, (plan, side) in enumerate(zip(plans, sides, strict=True))]
            Net(ranks, rng, in_order=rng.random() < 0.5).finish()
            for rank, (_, out) in enumerate(sides):
                np.testing.assert_array_equal(out, np.concatenate([row[rank] for row in blocks]))
            asked = [{step.peer for step in plan.steps} - {-1} for plan in plans]
            assert asked == [{*range(size)} - {rank} for rank in range(size)], "all pairs compare their calls"
