"""Does the engine move blocks of different lengths rightly, over links of any kind? One thread, memory links, seeds.

May live here: the kinds of collectives with counts. May not: those without (``test_engine``), what goes wrong (``test_engine_faults``).
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from schedule_interpreter import Setting, exact_data, expected, in_place_offsets, lengths, memory
from simulation import SimWorld

from rt.dtypes import DType, Op
from rt.schedule import Collective

KINDS = (Collective.ALL_GATHER_V, Collective.REDUCE_SCATTER_V, Collective.GATHER_V, Collective.SCATTER_V)


def world_for(size: int, seed: int, dice: random.Random) -> SimWorld:
    capacity, frame = dice.choice((1, 2, 33, 1000)), dice.choice((1, 16, 1 << 18))
    return SimWorld(size, lanes=dice.randint(1, 3), capacity=capacity, seed=seed, segment=16, frame=frame, wakes=seed % 2 == 0)


@pytest.mark.parametrize("size", range(2, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_lengths(kind: Collective, size: int) -> None:
    for seed in range(8):
        dice = random.Random(f"{kind} {size} {seed}")
        counts = tuple(dice.choice((0, 0, 1, 2, 9, 30)) for _ in range(size))
        s = Setting(size, sum(counts), root=dice.randrange(size), counts=counts)
        dtype, in_place, mesh = dice.choice((DType.INT64, DType.BFLOAT16, DType.UINT8)), dice.random() < 0.5, dice.random() < 0.5
        draw = np.random.default_rng(seed)
        inputs = [exact_data(dtype, Op.SUM, lengths(kind, rank, s)[0], draw) for rank in range(size)]
        sides = [memory(kind, rank, x, s, 77, in_place) for rank, x in enumerate(inputs)]
        world, works = world_for(size, seed, dice), []
        for rank in dice.sample(range(size), size):
            alias = in_place_offsets(kind, rank, s) if in_place else None
            works.append(
                world.collective(rank, kind, *sides[rank], root=s.root, count=s.items, counts=counts, full_mesh=mesh, alias=alias)
            )
            world.stir(3)
        world.run(works)
        for rank, wanted in enumerate(expected(kind, inputs, Op.SUM, s)):
            np.testing.assert_array_equal(sides[rank][1], wanted, err_msg=f"{kind!r} {s} rank {rank} in place {in_place} mesh {mesh}")
        assert not any(world.events)


@pytest.mark.parametrize("size", range(2, 8))
def test_all_to_all_of_any_lengths(size: int) -> None:
    """A symmetric table may be exchanged in place."""
    for seed in range(12):
        dice = random.Random(f"{size} {seed}")
        table = np.array([[dice.choice((0, 0, 1, 5, 40)) for _ in range(size)] for _ in range(size)])
        in_place = dice.random() < 0.5
        table = table + table.T if in_place else table
        blocks = [[np.full(count, 100 * i + j) for j, count in enumerate(row)] for i, row in enumerate(table)]
        xs = [np.concatenate(row) for row in blocks]
        outs = xs if in_place else [np.full(column.sum(), -1) for column in table.T]
        world, works = world_for(size, seed, dice), []
        for rank in dice.sample(range(size), size):
            counts = [*table[rank].tolist(), *table[:, rank].tolist()]
            alias = (0, 0) if in_place and len(xs[rank]) else None
            works.append(world.collective(rank, Collective.ALL_TO_ALL_V, xs[rank], outs[rank], counts=counts, alias=alias))
            world.stir(3)
        world.run(works)
        for rank, out in enumerate(outs):
            np.testing.assert_array_equal(out, np.concatenate([row[rank] for row in blocks]))
        assert not any(world.events)
