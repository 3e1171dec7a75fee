"""Are the algorithms right? All of them against NumPy, in one thread, for sizes 2 to 17, by ``schedule_interpreter``.

May live here: what holds for one algorithm, whoever chooses it. May not: the choice (``test_choose``), links, engines, processes.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from schedule_interpreter import (
    DTYPES,
    UFUNCS,
    Array,
    Net,
    Rank,
    Setting,
    accumulated,
    assert_matched,
    exact_data,
    expected,
    lengths,
    numbers,
    simulate,
    wire_is_wide,
    words,
)

from rt import algorithms as reduce
from rt import algorithms_exchange as exchange
from rt import algorithms_move as move
from rt import algorithms_rooted as rooted
from rt import algorithms_scan as scan
from rt.dtypes import HALF, DType, Op, numpy_dtype, op_supported
from rt.schedule import Collective, Kind, Schedule

SIZES = range(2, 18)
MANY_PARTS = move.PART_BYTES  # an item this big is worth a message of its own, so even few items are cut into all the parts there are
Build = Callable[[int, Setting], Schedule]


def ringlike(make: Callable[..., Schedule]) -> Build:
    return lambda r, s: make(r, s.size, s.items, s.lanes, s.itemsize, mean=s.mean)


def scattering(make: Callable[..., Schedule]) -> Build:
    return lambda r, s: make(r, s.blocks, s.lanes, s.itemsize, mean=s.mean)


def through_root(make: Callable[..., Schedule]) -> Build:
    return lambda r, s: make(r, s.blocks, s.root, s.lanes, s.itemsize)


def to_root(make: Callable[..., Schedule], wide: bool) -> Build:
    return lambda r, s: make(r, s.size, s.items, s.root, s.lanes, s.itemsize, mean=s.mean, wide=wide)


def prefixes(doubling: Callable[..., Schedule], pipelined: Callable[..., Schedule]) -> dict[str, Build]:
    return {
        "doubling": lambda r, s: doubling(r, s.size, s.items),
        "doubling, wide": lambda r, s: doubling(r, s.size, s.items, wide=True),
        "pipeline": lambda r, s: pipelined(r, s.size, s.items, s.lanes, s.itemsize),
        "pipeline_wide": lambda r, s: pipelined(r, s.size, s.items, s.lanes, s.itemsize, wide=True),
    }


ALL_REDUCE: dict[str, Build] = {
    "ring": ringlike(reduce.ring_all_reduce),
    "ring_wide": ringlike(reduce.ring_all_reduce_wide),
    "direct": lambda r, s: reduce.direct_all_reduce(r, s.size, s.items, mean=s.mean, wide=False),
    "direct, wide": lambda r, s: reduce.direct_all_reduce(r, s.size, s.items, mean=s.mean, wide=True),
    "doubling": lambda r, s: reduce.doubling_all_reduce(r, s.size, s.items, mean=s.mean),
    "owner": ringlike(functools.partial(reduce.owner_all_reduce, wide=False)),
    "owner, wide": ringlike(functools.partial(reduce.owner_all_reduce, wide=True)),
}
REDUCE_SCATTER: dict[str, Build] = {
    "ring": scattering(reduce.ring_reduce_scatter),
    "ring_wide": scattering(reduce.ring_reduce_scatter_wide),
    "direct": scattering(functools.partial(reduce.direct_reduce_scatter, wide=False)),
    "direct, wide": scattering(functools.partial(reduce.direct_reduce_scatter, wide=True)),
}
ALL_GATHER: dict[str, Build] = {
    "ring": lambda r, s: move.ring_all_gather(r, s.blocks, s.lanes, s.itemsize),
    "direct": lambda r, s: move.direct_all_gather(r, s.blocks),
}
BROADCAST: dict[str, Build] = {
    "binomial": lambda r, s: move.binomial_broadcast(r, s.size, s.items, s.root),
    "pipeline": lambda r, s: move.pipelined_broadcast(r, s.size, s.items, s.root, s.lanes, s.itemsize),
}
BARRIER: dict[str, Build] = {
    "dissemination": lambda r, s: move.barrier(r, s.size),
    "ring": lambda r, s: move.ring_barrier(r, s.size),
}
REDUCE: dict[str, Build] = {
    "binomial": lambda r, s: rooted.binomial_reduce(r, s.size, s.items, s.root, mean=s.mean),
    "owner": to_root(rooted.owner_reduce, False),
    "owner, wide": to_root(rooted.owner_reduce, True),
    "pipeline": to_root(rooted.pipelined_reduce, False),
    "pipeline_wide": to_root(rooted.pipelined_reduce, True),
}
GATHER: dict[str, Build] = {
    "binomial": lambda r, s: rooted.binomial_gather(r, s.blocks, s.root),
    "direct": through_root(rooted.direct_gather),
    "ring": through_root(rooted.ring_gather),
}
SCATTER: dict[str, Build] = {
    "binomial": lambda r, s: rooted.binomial_scatter(r, s.blocks, s.root),
    "direct": through_root(rooted.direct_scatter),
    "ring": through_root(rooted.ring_scatter),
}
ALL_TO_ALL: dict[str, Build] = {
    "direct": lambda r, s: exchange.direct_all_to_all(r, s.blocks, s.blocks, s.lanes, s.itemsize),
    "ring": lambda r, s: exchange.ring_all_to_all(r, s.size, s.items, s.lanes, s.itemsize),
}
SCAN = prefixes(scan.doubling_scan, scan.pipelined_scan)
EXSCAN = prefixes(scan.doubling_exscan, scan.pipelined_exscan)
FAMILIES = {
    Collective.ALL_REDUCE: ALL_REDUCE,
    Collective.REDUCE_SCATTER: REDUCE_SCATTER,
    Collective.ALL_GATHER: ALL_GATHER,
    Collective.BROADCAST: BROADCAST,
    Collective.BARRIER: BARRIER,
    Collective.REDUCE: REDUCE,
    Collective.GATHER: GATHER,
    Collective.SCATTER: SCATTER,
    Collective.ALL_TO_ALL: ALL_TO_ALL,
    Collective.SCAN: SCAN,
    Collective.EXSCAN: EXSCAN,
}
SUMS = (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE)
SCANS = (Collective.SCAN, Collective.EXSCAN)
EVERY = [(kind, name) for kind, family in FAMILIES.items() for name in family]
REDUCERS = [(kind, name) for kind, name in EVERY if kind in SUMS + SCANS]
MOVERS = [(kind, name) for kind, name in EVERY if kind not in (*SUMS, *SCANS, Collective.BARRIER)]
ROOTED = [(kind, name) for kind, name in EVERY if kind in (Collective.BROADCAST, Collective.REDUCE, Collective.GATHER, Collective.SCATTER)]
UNEVEN = {
    Collective.ALL_GATHER: Collective.ALL_GATHER_V,
    Collective.REDUCE_SCATTER: Collective.REDUCE_SCATTER_V,
    Collective.GATHER: Collective.GATHER_V,
    Collective.SCATTER: Collective.SCATTER_V,
}


def programs(kind: Collective, name: str, setting: Setting) -> list[Schedule]:
    return [FAMILIES[kind][name](rank, setting) for rank in range(setting.size)]


def counts(size: int) -> list[int]:
    return [0, 1, 2, size - 1, size, size + 1, 37, 1000]


def operators(kind: Collective, dtype: DType, name: str) -> list[Op]:
    """List the operators an algorithm may be asked for: narrow ones do not divide halves, wide ones only sum and multiply."""
    found = [op for op in Op if op_supported(dtype, op) and not (op is Op.MEAN and kind in SCANS)]
    if "wide" in name:
        return [op for op in found if op in (Op.SUM, Op.PROD, Op.MEAN)]
    return [op for op in found if op is not Op.MEAN or dtype not in HALF]


def dtypes(name: str) -> list[DType]:
    return [dtype for dtype in DTYPES if dtype in HALF or "wide" not in name]


def check(kind: Collective, name: str, s: Setting, dtype: DType, op: Op, rng: random.Random, in_place: bool) -> None:
    draw = np.random.default_rng(rng.getrandbits(32))
    inputs = [exact_data(dtype, op, lengths(kind, rank, s)[0], draw) for rank in range(s.size)]
    outputs = simulate(kind, programs(kind, name, s), s, inputs, numbers(dtype, op), rng, in_place)
    for rank, (found, wanted) in enumerate(zip(outputs, expected(kind, inputs, op, s), strict=True)):
        np.testing.assert_array_equal(found, wanted, err_msg=f"rank {rank}, {s}, {dtype!r}, {op!r}, in place: {in_place}")


def samples(kind: Collective, name: str) -> Iterator[tuple[Setting, random.Random]]:
    """All sizes and counts; lanes and the size of items vary with a seed."""
    for size in SIZES:
        for count in counts(size):
            rng = random.Random(f"{kind} {name} {size} {count}")
            yield Setting(size, count, rng.choice((1, 2, 3)), rng.choice((1, MANY_PARTS)), root=rng.randrange(size)), rng


# --- results --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), REDUCERS)
def test_reductions_agree_with_numpy(kind: Collective, name: str) -> None:
    for s, rng in samples(kind, name):
        dtype = rng.choice(dtypes(name))
        op = rng.choice(operators(kind, dtype, name))
        check(kind, name, s._replace(mean=op is Op.MEAN), dtype, op, rng, rng.random() < 0.5)


@pytest.mark.parametrize(("kind", "name"), REDUCERS)
def test_every_dtype_and_operator(kind: Collective, name: str) -> None:
    for size, dtype, in_place in itertools.product((2, 3, 6), dtypes(name), (False, True)):
        for op in operators(kind, dtype, name):
            rng = random.Random(f"{kind} {name} {size} {dtype} {in_place} {op}")
            check(kind, name, Setting(size, 13, 2, MANY_PARTS // 2, op is Op.MEAN), dtype, op, rng, in_place)


@pytest.mark.parametrize(("kind", "name"), MOVERS)
def test_moves_agree_with_numpy(kind: Collective, name: str) -> None:
    for s, rng in samples(kind, name):
        for in_place in (False, True):
            check(kind, name, s, rng.choice(DTYPES), Op.SUM, rng, in_place)


@pytest.mark.parametrize(("kind", "name"), ROOTED)
def test_every_root(kind: Collective, name: str) -> None:
    for size in SIZES:
        for root in range(size):
            rng = random.Random(f"{kind} {name} {size} {root}")
            dtype = rng.choice(tuple(HALF)) if "wide" in name else DType.INT64
            check(kind, name, Setting(size, 5, 2, MANY_PARTS, root=root), dtype, Op.SUM, rng, root % 2 == 0)


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


@pytest.mark.parametrize("count", [0, 1, 2, 37])
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("itemsize", [1, MANY_PARTS])
def test_send_meets_recv(count: int, lanes: int, itemsize: int) -> None:
    plans = [move.send(1, count, lanes, itemsize), move.recv(0, count, lanes, itemsize)]
    s = Setting(2, count)
    inputs = [np.arange(count), np.zeros(count, np.int64)]
    outputs = simulate(Collective.SEND, plans, s, inputs, numbers(DType.INT64, Op.SUM), random.Random(1))
    np.testing.assert_array_equal(outputs[1], inputs[0])
    assert len({step.lane for step in plans[0].steps}) == min(count, lanes if itemsize == MANY_PARTS else 1)


@pytest.mark.parametrize("name", BARRIER)
def test_nobody_leaves_a_barrier_before_all_have_come(name: str) -> None:
    for size in SIZES:
        for late in range(size):
            plans = programs(Collective.BARRIER, name, Setting(size, 0))
            none = np.zeros(0, np.uint8)
            ranks = [Rank(i, size, plan, none, none, numbers(DType.UINT8, Op.SUM)) for i, plan in enumerate(plans)]
            net = Net(ranks, random.Random(late), in_order=False, held=late)
            net.run()
            assert all(net.left), f"size {size}: some rank did not wait for rank {late}"
            net.held = -1
            net.finish()


# --- bits and order -------------------------------------------------------------------------------------------------------------------


BITS = [
    (name, dtype) for name in ALL_REDUCE for dtype in (DType.FLOAT32, DType.FLOAT16, DType.COMPLEX64) if dtype in HALF or "wide" not in name
]


@pytest.mark.parametrize(("name", "dtype"), BITS)
def test_same_bits_on_all_ranks(name: str, dtype: DType) -> None:
    draw = np.random.default_rng(5)
    for size in SIZES:
        s = Setting(size, 53, 2, MANY_PARTS)
        inputs = [draw.standard_normal(106).astype(np.float32).view(np.complex64)[:53] for _ in range(size)]
        inputs = inputs if dtype is DType.COMPLEX64 else [x.real.astype(numpy_dtype(dtype)) for x in inputs]
        outputs = simulate(
            Collective.ALL_REDUCE, programs(Collective.ALL_REDUCE, name, s), s, inputs, numbers(dtype, Op.SUM), random.Random(size)
        )
        assert len({x.tobytes() for x in outputs}) == 1


LETTERS = "abcdefghijklmnopq"


def spelled_by_rank(kind: Collective, name: str, size: int, form: str, root: int = 0) -> list[set[str]]:
    """Return, for each rank, all results of combining the names of the ranks."""
    s = Setting(size, size + 1, 2, MANY_PARTS, root=root)
    inputs = [np.full(lengths(kind, rank, s)[0], LETTERS[rank], object) for rank in range(size)]
    return [set(x) for x in simulate(kind, programs(kind, name, s), s, inputs, words(form), random.Random(size), True)]


def spelled(kind: Collective, name: str, size: int, form: str) -> set[str]:
    return set().union(*spelled_by_rank(kind, name, size, form, root=size // 2))


LEFT_FOLDS = [(kind, name) for kind, name in REDUCERS if kind not in SCANS and name.startswith(("direct", "owner"))]


@pytest.mark.parametrize(("kind", "name"), LEFT_FOLDS)
def test_reduced_in_rank_order_from_the_left(kind: Collective, name: str) -> None:
    for size in SIZES:
        letters = [chr(ord("a") + rank) for rank in range(size)]
        assert spelled(kind, name, size, "({}{})") == {functools.reduce("({}{})".format, letters)}


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("name", SCAN)
def test_scans_keep_lower_ranks_left(kind: Collective, name: str) -> None:
    for size in SIZES:
        ends = [rank + 1 if kind is Collective.SCAN else rank for rank in range(size)]
        assert spelled_by_rank(kind, name, size, "{}{}") == [{LETTERS[:end]} if end else set() for end in ends]
        if name.startswith("pipeline"):
            folds = [functools.reduce("({}{})".format, LETTERS[:end]) if end else "" for end in ends]
            assert spelled_by_rank(kind, name, size, "({}{})") == [{fold} - {""} for fold in folds]


@pytest.mark.parametrize("name", REDUCE)
def test_reduce_keeps_lower_ranks_left_whatever_the_root(name: str) -> None:
    for size in SIZES:
        for root in range(size):
            assert spelled_by_rank(Collective.REDUCE, name, size, "{}{}", root)[root] == {LETTERS[:size]}
    assert "wide" in name or spelled_by_rank(Collective.REDUCE, "binomial", 6, "({}{})", 4)[4] == {"(((ab)c)((de)f))"}


def test_doubling_keeps_lower_ranks_left() -> None:
    for size in SIZES:
        assert spelled(Collective.ALL_REDUCE, "doubling", size, "{}{}") == {"".join(chr(ord("a") + rank) for rank in range(size))}
    assert spelled(Collective.ALL_REDUCE, "doubling", 6, "({}{})") == {"(((ab)(cd))(ef))"}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in REDUCERS if kind in SUMS])
def test_every_rank_counts_once(kind: Collective, name: str) -> None:
    for size in SIZES:
        assert {"".join(sorted(word)) for word in spelled(kind, name, size, "{}{}")} == {
            "".join(chr(ord("a") + rank) for rank in range(size))
        }


# --- halves ---------------------------------------------------------------------------------------------------------------------------

UNIT = {DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-7}
WIDE = [(kind, name) for kind, name in REDUCERS if "wide" in name]


def half_sum(kind: Collective, name: str, inputs: list[Array], dtype: DType, op: Op) -> Array:
    """Reduce and return the whole result: the last rank's, put together from the blocks where it was scattered."""
    if kind is Collective.EXSCAN:
        inputs = [*inputs, inputs[0]]
    size = len(inputs)
    scattered = kind is Collective.REDUCE_SCATTER
    s = Setting(size, len(inputs[0]) // (size if scattered else 1), 2, MANY_PARTS // 8, op is Op.MEAN, root=size - 1)
    outputs = simulate(kind, programs(kind, name, s), s, inputs, numbers(dtype, op), random.Random(size))
    return np.concatenate(outputs) if scattered else outputs[-1]


@pytest.mark.parametrize(
    ("kind", "name", "op"), [(*pair, op) for pair in WIDE for op in (Op.SUM, Op.PROD, Op.MEAN) if op is not Op.MEAN or pair[0] in SUMS]
)
@pytest.mark.parametrize("dtype", sorted(HALF))
def test_halves_are_rounded_once(kind: Collective, name: str, dtype: DType, op: Op) -> None:
    half = numpy_dtype(dtype)
    draw = np.random.default_rng(7)
    for size in (2, 3, 8, 17):
        inputs = [(draw.random(4 * size) / 2 + (op is Op.PROD)).astype(half) for _ in range(size)]
        found = half_sum(kind, name, inputs, dtype, op)
        if (kind, name) in LEFT_FOLDS or name.startswith("pipeline"):
            np.testing.assert_array_equal(found, accumulated(inputs, op))
        exact = functools.reduce(UFUNCS[op], [x.astype(np.float64) for x in inputs]) / (size if op is Op.MEAN else 1)
        bound = UNIT[dtype] / 2 * (1 + 1e-2)  # half a unit of the half type, whatever the size; the rest is float32's
        assert np.all(np.abs(found.astype(np.float64) - exact) <= bound * exact)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in REDUCERS if pair[1] != "ring"])
def test_small_halves_are_not_lost(kind: Collective, name: str) -> None:
    """In float16 2048 + 1 is 2048, so only a wide sum sees the ones; the narrow algorithms prove that the test can fail."""
    inputs = [np.full(17, 2048 if rank == 1 else 1, np.float16) for rank in range(17)]
    found = half_sum(kind, name, inputs, DType.FLOAT16, Op.SUM)
    assert np.all(found == 2064) if "wide" in name else np.any(found != 2064)


# --- shape of the schedules -----------------------------------------------------------------------------------------------------------


def settings(size: int) -> Iterator[Setting]:
    for count, lanes, itemsize in itertools.product((0, 1, size - 1, size + 1, 1000), (1, 3), (1, MANY_PARTS)):
        yield Setting(size, count, lanes, itemsize, mean=True, root=count % size)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_sends_match_receives_and_steps_are_few(kind: Collective, name: str) -> None:
    for size in SIZES:
        for s in settings(size):
            plans = programs(kind, name, s)
            assert_matched(plans)
            assert max(len(plan.steps) for plan in plans) <= 10 * size * s.lanes
            lanes = s.lanes * (2 if size == 2 else 1)
            assert all(0 <= step.lane < lanes for plan in plans for step in plan.steps)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_number_of_steps_does_not_depend_on_bytes(kind: Collective, name: str) -> None:
    some, more = (programs(kind, name, Setting(8, items, 2)) for items in (1 << 20, 1 << 30))
    assert [len(plan.steps) for plan in some] == [len(plan.steps) for plan in more]


LINES = (Collective.REDUCE, Collective.GATHER, Collective.SCATTER, *SCANS)  # the ring is cut somewhere: its ends have one neighbour


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in EVERY if name.startswith(("ring", "pipeline"))])
def test_rings_talk_to_neighbours_in_both_directions(kind: Collective, name: str) -> None:
    size = 7
    plans = programs(kind, name, Setting(size, 1000, 2, MANY_PARTS, root=3))
    ends = 0
    for rank, plan in enumerate(plans):
        peers = {step.peer for step in plan.steps if step.peer >= 0}
        assert peers and peers <= {(rank + 1) % size, (rank - 1) % size}
        ends += len(peers) == 1
    assert ends == (2 if kind in LINES else 0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name in EVERY if name in ("ring", "ring_wide") and kind in (*SUMS, Collective.ALL_GATHER)],
)
def test_rings_use_all_lanes_both_ways(kind: Collective, name: str) -> None:
    """In a group of two both ways lead to the same peer, so there are twice as many streams to it."""
    for size, lanes in ((2, 6), (5, 3)):
        for rank, plan in enumerate(programs(kind, name, Setting(size, 1000, 3, MANY_PARTS))):
            used = {(step.peer, step.lane) for step in plan.steps if step.kind is Kind.SEND}
            assert used == {(peer, lane) for peer in ((rank + 1) % size, (rank - 1) % size) for lane in range(lanes)}


def items_sent(plans: list[Schedule]) -> int:
    return sum(step.count * (2 if wire_is_wide(plan, step) else 1) for plan in plans for step in plan.steps if step.kind is Kind.SEND)


@pytest.mark.parametrize("size", SIZES)
def test_items_on_the_wire(size: int) -> None:
    """What ``docs/algorithms.md`` promises, added up over the ranks; a wide item counts twice."""
    s = Setting(size, 1000, 2, MANY_PARTS)
    core = 1 << (size.bit_length() - 1)
    around = sum(range(size // 2 + 1)) + sum(range((size - 1) // 2 + 1))

    def doubled(members: int) -> int:
        return sum(members - (1 << i) for i in range((members - 1).bit_length()))

    totals = {
        (Collective.ALL_REDUCE, "ring"): 2 * (size - 1),
        (Collective.ALL_REDUCE, "ring_wide"): 3 * (size - 1),
        (Collective.ALL_REDUCE, "direct"): size * (size - 1),
        (Collective.ALL_REDUCE, "doubling"): core * (core.bit_length() - 1) + 2 * (size - core),
        (Collective.ALL_REDUCE, "owner, wide"): 2 * (size - 1),
        (Collective.REDUCE_SCATTER, "ring"): size * (size - 1),
        (Collective.REDUCE_SCATTER, "ring_wide"): 2 * size * (size - 1),
        (Collective.REDUCE_SCATTER, "direct, wide"): size * (size - 1),
        (Collective.ALL_GATHER, "ring"): size * (size - 1),
        (Collective.ALL_GATHER, "direct"): size * (size - 1),
        (Collective.BROADCAST, "binomial"): size - 1,
        (Collective.BROADCAST, "pipeline"): size - 1,
        (Collective.REDUCE, "binomial"): size - 1,
        (Collective.REDUCE, "pipeline"): size - 1,
        (Collective.REDUCE, "pipeline_wide"): 2 * (size - 1),
        (Collective.GATHER, "direct"): size - 1,
        (Collective.GATHER, "ring"): around,
        (Collective.SCATTER, "direct"): size - 1,
        (Collective.SCATTER, "ring"): around,
        (Collective.ALL_TO_ALL, "direct"): size * (size - 1),
        (Collective.ALL_TO_ALL, "ring"): size * around,
        (Collective.SCAN, "doubling"): doubled(size),
        (Collective.SCAN, "pipeline"): size - 1,
        (Collective.SCAN, "pipeline_wide"): 2 * (size - 1),
        (Collective.EXSCAN, "doubling"): size - 1 + doubled(size - 1),
        (Collective.EXSCAN, "doubling, wide"): size - 1 + 2 * doubled(size - 1),
        (Collective.EXSCAN, "pipeline"): size - 1,
    }
    found = {(kind, name): items_sent(programs(kind, name, s)) for kind, name in totals}
    assert found == {key: total * s.items for key, total in totals.items()}
