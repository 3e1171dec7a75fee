"""Are the algorithms for several hosts right, and do no more bytes cross between hosts than they promise? In one thread, by simulation.

May live here: what ``test_algorithms`` proves of the others, for every layout of ranks on hosts; ``schedule_interpreter`` runs whole steps,
``simulation`` engines over links of a byte. May not: the choice (``test_choose``), real hosts (``test_hierarchy``).
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from schedule_interpreter import (
    DTYPES,
    UFUNCS,
    Setting,
    assert_matched,
    exact_data,
    expected,
    in_place_offsets,
    lengths,
    memory,
    numbers,
    simulate,
    wire_is_wide,
    words,
)
from simulation import SimWorld

from rt import algorithms_hierarchy as hierarchy
from rt.algorithms_move import PART_BYTES
from rt.dtypes import HALF, DType, Op, numpy_dtype, op_supported
from rt.schedule import OUTPUT, Collective, Kind, Schedule

KIND = Collective.ALL_REDUCE
MANY_PARTS = PART_BYTES  # an item this big is worth a message of its own, so even few items are cut into all the parts there are
Layout = tuple[int, ...]  # of each rank the number of its host
EQUAL: list[Layout] = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 0, 0, 0, 1, 1, 1, 1), tuple(rank // 2 for rank in range(10))]
UNEQUAL: list[Layout] = [(0, 0, 1), (0, 1, 1), (0, 1, 0), (0, 0, 0, 0, 0, 1), (0, 1, 1, 2, 0, 1), (0, 1, 1, 2, 2, 2), (0, 1, 2, 3, 2)]


def layouts() -> Iterator[Layout]:
    """Those above, and for every size up to 17 some at random."""
    yield from EQUAL + UNEQUAL
    for size in range(3, 18):
        dice = random.Random(size)
        for number in {2, dice.randint(2, size - 1), size - 1}:
            names = [*range(number), *(dice.randrange(number) for _ in range(size - number))]
            dice.shuffle(names)
            yield tuple(names)


def programs(layout: Layout, s: Setting, *, wide: bool = False) -> list[Schedule]:
    return [hierarchy.all_reduce(rank, layout, s.items, s.lanes, s.itemsize, mean=s.mean, wide=wide) for rank in range(s.size)]


def operators(dtype: DType, wide: bool) -> list[Op]:
    """List what may be asked for: narrow programs do not divide halves, wide ones only sum and multiply."""
    if wide:
        return [Op.SUM, Op.PROD, Op.MEAN]
    return [op for op in Op if op_supported(dtype, op) and not (op is Op.MEAN and dtype in HALF)]


def check(layout: Layout, s: Setting, dtype: DType, op: Op, wide: bool, rng: random.Random, in_place: bool) -> None:
    draw = np.random.default_rng(rng.getrandbits(32))
    s = s._replace(mean=op is Op.MEAN)
    plans = programs(layout, s, wide=wide)
    assert_matched(plans)
    inputs = [exact_data(dtype, op, lengths(KIND, rank, s)[0], draw) for rank in range(s.size)]
    outputs = simulate(KIND, plans, s, inputs, numbers(dtype, op), rng, in_place)
    for rank, (found, wanted) in enumerate(zip(outputs, expected(KIND, inputs, op, s), strict=True)):
        np.testing.assert_array_equal(found, wanted, err_msg=f"rank {rank}, {layout}, {s}, {dtype!r}, {op!r}, in place: {in_place}")


@pytest.mark.parametrize("wide", [False, True])
def test_agrees_with_numpy_on_every_layout(wide: bool) -> None:
    for layout in layouts():
        for count in (0, 1, 2, len(layout), 37, 1000):
            rng = random.Random(f"{layout} {count} {wide}")
            dtype = rng.choice([dtype for dtype in DTYPES if dtype in HALF or not wide])
            s = Setting(len(layout), count, rng.choice((1, 2, 3)), rng.choice((1, MANY_PARTS)))
            check(layout, s, dtype, rng.choice(operators(dtype, wide)), wide, rng, rng.random() < 0.5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layout", [(0, 1, 0, 1), (0, 1, 1, 2, 0, 1)])
def test_every_dtype_and_operator(layout: Layout, wide: bool) -> None:
    for dtype, in_place in itertools.product(DTYPES, (False, True)):
        for op in operators(dtype, wide) if dtype in HALF or not wide else ():
            rng = random.Random(f"{layout} {dtype} {in_place} {op}")
            check(layout, Setting(len(layout), 53, 2, MANY_PARTS // 2), dtype, op, wide, rng, in_place)


@pytest.mark.parametrize("wakes", [False, True])
def test_engines_over_links_of_a_byte(wakes: bool) -> None:
    """Nobody waits for ever, in place or not, however little a link takes and whoever comes first."""
    for layout in [layout for layout in layouts() if len(layout) < 9]:
        for seed in range(4):
            dice = random.Random(f"{layout} {seed} {wakes}")
            wide = dice.random() < 0.5
            dtype = dice.choice((DType.FLOAT16, DType.BFLOAT16)) if wide else dice.choice((DType.INT64, DType.FLOAT32, DType.BOOL))
            op = dice.choice(operators(dtype, wide))
            s = Setting(len(layout), dice.choice((1, 7, 40)), dice.randint(1, 2), MANY_PARTS, mean=op is Op.MEAN)
            capacity, frame = dice.choice((1, 2, 33)), dice.choice((1, 16, 1 << 18))
            world = SimWorld(s.size, lanes=s.lanes, capacity=capacity, seed=seed, segment=dice.choice((1, 64)), frame=frame, wakes=wakes)
            draw = np.random.default_rng(seed)
            inputs = [exact_data(dtype, op, s.items, draw) for _ in layout]
            in_place = dice.random() < 0.5
            sides = [memory(KIND, rank, x, s, 1, in_place) for rank, x in enumerate(inputs)]
            plans, works = programs(layout, s, wide=wide), []
            for rank in dice.sample(range(s.size), s.size):
                alias = in_place_offsets(KIND, rank, s) if in_place else None
                works.append(world.submit(rank, plans[rank], *sides[rank], op=op, alias=alias))
                world.stir(3)
            world.run(works)
            for (_, out), wanted in zip(sides, expected(KIND, inputs, op, s), strict=True):
                np.testing.assert_array_equal(out, wanted, err_msg=f"{layout} {s} {dtype!r} {op!r} in place {in_place}")
            assert not any(world.events)


# --- what crosses ---------------------------------------------------------------------------------------------------------------------


def crossing(layout: Layout, plans: list[Schedule], itemsize: int) -> list[int]:
    """Count the bytes that each host sends to others."""
    sent = [0] * (max(layout) + 1)
    for rank, plan in enumerate(plans):
        for step in plan.steps:
            if step.kind is Kind.SEND and layout[step.peer] != layout[rank]:
                sent[layout[rank]] += step.count * (4 if wire_is_wide(plan, step) else itemsize)
    return sent


def test_a_host_sends_what_one_rank_would() -> None:
    """Where all cuts are even, exactly; elsewhere a message is rounded up to whole items."""
    for layout in layouts():
        number, rings = max(layout) + 1, max(map(layout.count, layout))
        even = number * rings * 4 * MANY_PARTS  # four parts
        for lanes, count in ((2, even), (1, 1000), (3, 10 * even + 17)):
            s = Setting(len(layout), count, lanes, 2)
            least = 2 * (number - 1) / number * count * s.itemsize
            rounding = 0 if count == even else 2 * 2 * lanes * rings * s.itemsize
            for sent in crossing(layout, programs(layout, s), s.itemsize):
                assert least - rounding <= sent <= least + rounding, (layout, s)
            for sent in crossing(layout, programs(layout, s, wide=True), s.itemsize):
                assert 1.5 * least - 2 * rounding <= sent <= 1.5 * least + 2 * rounding, (layout, s)


def test_on_equal_hosts_all_ranks_send_alike() -> None:
    """To other hosts, and within their own: that is what a ring of its own for every rank is for."""
    for layout in EQUAL:
        number, each = max(layout) + 1, layout.count(0)
        s = Setting(len(layout), number * each * 2 * MANY_PARTS, 1, 4)
        for rank, plan in enumerate(programs(layout, s)):
            sends = [step for step in plan.steps if step.kind is Kind.SEND]
            across = sum(step.count for step in sends if layout[step.peer] != layout[rank])
            within = sum(step.count for step in sends if layout[step.peer] == layout[rank])
            assert across == 2 * (number - 1) * s.items // number // each
            assert within == 2 * (each - 1) * s.items // each


def test_what_is_finished_first_is_handed_on_first() -> None:
    """Else a host would wait for the last hop before it hands on anything: its phases would not overlap."""
    for layout in EQUAL:
        for rank, plan in enumerate(programs(layout, Setting(len(layout), 64 * len(layout), 1, MANY_PARTS))):
            beside = [peer for peer, host in enumerate(layout) if host == layout[rank] and peer != rank]
            received = [step for step in plan.steps if step.kind is Kind.RECV and step.peer not in beside]
            for lane in {step.lane for step in plan.steps}:
                handed_on = [step for step in plan.steps if step[:3] == (Kind.SEND, beside[0], lane) and step.src == OUTPUT]
                last = {step.dst_off + step.count for step in received}
                assert handed_on[0].src_off not in {step.dst_off for step in received}, "its own chunk, which it need not wait for"
                assert handed_on[-1].src_off + handed_on[-1].count in last


def test_steps_are_few_and_do_not_depend_on_bytes() -> None:
    for layout in layouts():
        number, rings = max(layout) + 1, max(map(layout.count, layout))
        some, more = (programs(layout, Setting(len(layout), items, 2)) for items in (1 << 22, 1 << 30))
        for rank, (few, same) in enumerate(zip(some, more, strict=True)):
            assert len(few.steps) == len(same.steps)
            led = -(-rings // layout.count(layout[rank]))
            parts = 4
            # A ring: a hop sends and receives, twice. Within the host: two messages each way with every other rank.
            assert len(few.steps) <= parts * (led * 4 * number + 4 * (led + 1) * rings)


# --- bits and order -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_same_bits_on_all_ranks(dtype: DType) -> None:
    draw = np.random.default_rng(5)
    for layout in layouts():
        s = Setting(len(layout), 53, 2, MANY_PARTS)
        inputs = [draw.standard_normal(53).astype(numpy_dtype(dtype)) for _ in layout]
        plans = programs(layout, s, wide=dtype in HALF)
        outputs = simulate(KIND, plans, s, inputs, numbers(dtype, Op.SUM), random.Random(len(layout)))
        assert len({x.tobytes() for x in outputs}) == 1


def spelled(layout: Layout, form: str, wide: bool) -> list[str]:
    """Combine the names of the ranks; one word for every item, the same on all ranks."""
    s = Setting(len(layout), 4 * len(layout), 1, MANY_PARTS)
    inputs = [np.full(s.items, "abcdefghijklmnopq"[rank], object) for rank in range(s.size)]
    outputs = simulate(KIND, programs(layout, s, wide=wide), s, inputs, words(form), random.Random(1), True)
    assert all((out == outputs[0]).all() for out in outputs)
    return list(outputs[0])


@pytest.mark.parametrize("wide", [False, True])
def test_every_rank_counts_once_and_a_host_is_reduced_before_others_see_it(wide: bool) -> None:
    for layout in layouts():
        names = "abcdefghijklmnopq"[: len(layout)]
        hosts = [{names[rank] for rank in range(len(layout)) if layout[rank] == host} for host in range(max(layout) + 1)]
        for word in spelled(layout, "({}{})", wide):
            assert sorted(word.replace("(", "").replace(")", "")) == list(names)
            for host in hosts:  # its letters stand in brackets of their own
                assert any(set(inner) == host for inner in bracketed(word)), (layout, word)


def test_leaders_begin_with_their_own_and_keep_lower_ranks_left() -> None:
    assert set(spelled((0, 1, 0, 1, 0), "({}{})", False)) == {"(((ac)e)(bd))", "((bd)(c(ae)))"}


def bracketed(word: str) -> list[str]:
    """Return the letters within each pair of brackets, and each letter by itself."""
    found, opened = [letter for letter in word if letter.isalpha()], []
    for at, letter in enumerate(word):
        if letter == "(":
            opened.append(at)
        elif letter == ")":
            found.append(word[opened.pop() : at].replace("(", "").replace(")", ""))
    return found


@pytest.mark.parametrize("op", [Op.SUM, Op.PROD, Op.MEAN])
@pytest.mark.parametrize("dtype", sorted(HALF))
def test_halves_are_rounded_once(dtype: DType, op: Op) -> None:
    unit = {DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-7}[dtype]
    draw = np.random.default_rng(7)
    for layout in layouts():
        s = Setting(len(layout), 64, 2, MANY_PARTS, mean=op is Op.MEAN)
        inputs = [(draw.random(64) / 2 + (op is Op.PROD)).astype(numpy_dtype(dtype)) for _ in layout]
        found = simulate(KIND, programs(layout, s, wide=True), s, inputs, numbers(dtype, op), random.Random(1))[0]
        exact = functools.reduce(UFUNCS[op], [x.astype(np.float64) for x in inputs]) / (s.size if op is Op.MEAN else 1)
        assert np.all(np.abs(found.astype(np.float64) - exact) <= unit / 2 * 1.01 * exact)
