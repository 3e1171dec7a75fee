"""Does the engine run schedules rightly, whatever the links do and whoever comes first? One thread, memory links, seeds.

May live here: right results and fair progress. May not: what goes wrong (``test_engine_faults``), real links (``test_links``).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from schedule_interpreter import Setting, exact_data, expected, in_place_offsets, lengths, memory
from simulation import NEVER, SimWorld

from rt import _fastpath, algorithms, algorithms_move
from rt.dtypes import DType, Op, code_of, op_supported
from rt.schedule import OUTPUT, Collective, Kind, Schedule, Step

Array = np.ndarray[Any, Any]
EAGER = (1 << 16) + 96
KINDS = (
    Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.BROADCAST, Collective.REDUCE, Collective.GATHER,
    Collective.SCATTER, Collective.ALL_TO_ALL, Collective.SCAN, Collective.EXSCAN,
)  # fmt: skip
TYPES = (DType.INT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.BOOL, DType.COMPLEX64, DType.UINT8)
DONE = _fastpath.DONE


class Trial:
    """One collective on all ranks of a world: started rank by rank, then compared with NumPy."""

    def __init__(self, kind: Collective, size: int, dice: random.Random, *, most_items: int = 90, mesh: bool = True) -> None:
        dtype = dice.choice(TYPES)
        self.kind, self.mesh = kind, mesh
        # NumPy divides complex numbers by complex numbers, and rounds more often than we do.
        no_mean = dtype is DType.COMPLEX64 or kind in (Collective.SCAN, Collective.EXSCAN)
        self.op = dice.choice([op for op in Op if op_supported(dtype, op) and not (no_mean and op is Op.MEAN)])
        self.s = Setting(size, dice.randint(0, most_items), root=dice.randrange(size))
        self.in_place = dice.random() < 0.5
        draw = np.random.default_rng(dice.getrandbits(32))
        self.inputs = [exact_data(dtype, self.op, lengths(kind, rank, self.s)[0], draw) for rank in range(size)]
        poison = 77 if dtype in (DType.BOOL, DType.INT64, DType.UINT8) else np.nan
        self.sides = [memory(kind, rank, x, self.s, poison, self.in_place) for rank, x in enumerate(self.inputs)]

    def submit(self, world: SimWorld, rank: int, **more: Any) -> _fastpath.Work:
        """Start one rank's part; ``rank`` is of the world, and of the group unless ``ranks`` says otherwise."""
        me = more["ranks"].index(rank) if "ranks" in more else rank
        x, out = self.sides[me]
        alias = in_place_offsets(self.kind, me, self.s) if self.in_place else None
        return world.collective(
            rank, self.kind, x, out, op=self.op, root=self.s.root, count=self.s.items, full_mesh=self.mesh, alias=alias, **more
        )

    def check(self) -> None:
        wanted = expected(self.kind, self.inputs, self.op, self.s)
        for rank, (_, out) in enumerate(self.sides):
            where = f"{self.kind!r} {self.op!r} {self.s} in place {self.in_place}, rank {rank}"
            np.testing.assert_array_equal(out, wanted[rank], err_msg=where)


@pytest.mark.parametrize("size", range(2, 10))
@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_over_every_kind_of_link(kind: Collective, size: int) -> None:
    for seed in range(14 if size < 6 else 6):
        dice = random.Random(f"{kind} {size} {seed}")
        capacity = dice.choice((1, 2, 7, 33, 1000))
        world = SimWorld(
            size, lanes=dice.randint(1, 3), capacity=capacity, seed=seed, segment=dice.choice((1, 16, 64)),
            frame=dice.choice((1, 16, 50, 1 << 18)), wakes=seed % 2 == 0,
        )  # fmt: skip
        trial = Trial(kind, size, dice, most_items=7 if capacity < 7 else 70, mesh=dice.random() < 0.5)
        works = []
        for rank in dice.sample(range(size), size):
            works.append(trial.submit(world, rank))
            world.stir(3)
        world.run(works)
        trial.check()
        assert not any(world.events)


@pytest.mark.parametrize("size", (2, 3, 4))
def test_messages_of_many_frames(size: int) -> None:
    """Also over several lanes: striped from 32 KiB up."""
    for kind in KINDS:
        for seed in range(3):
            dice = random.Random(f"{kind} {size} {seed}")
            capacity, frame = dice.choice((5000, 1 << 20)), dice.choice((999, 1 << 18))
            cache = dice.choice((0, 1))  # 1: results are written past it
            world = SimWorld(size, lanes=1 + seed % 2, capacity=capacity, seed=seed, segment=5000, frame=frame, cache=cache)
            trial = Trial(kind, size, dice, most_items=60_000, mesh=seed < 2)
            world.run([trial.submit(world, rank) for rank in range(size)])
            trial.check()


def test_what_later_steps_read_is_told_from_results() -> None:
    """Only results are written past the caches. Rank 1 of 3 gathers: its own block, what it passes on, and what ends there."""
    schedule = algorithms_move.ring_all_gather(1, (10, 10, 10), 1, 8)
    program = _fastpath.Program(schedule, code_of(np.dtype(np.int64)), Op.SUM, [1, 0, 1])
    sent = {(step.src, step.src_off) for step in schedule.steps if step.kind is Kind.SEND}
    written = [(step.dst, step.dst_off) for step in schedule.steps]
    assert program.last_writes == [i for i, step in enumerate(schedule.steps) if step.dst >= 0 and written[i] not in sent]
    assert 1 < len(program.last_writes) < len([step for step in schedule.steps if step.dst >= 0])


@pytest.mark.parametrize("budget", (1, 100, 5000))
def test_small_budgets_end_in_blocked_only_where_nothing_can_move(budget: int) -> None:
    for seed in range(25):
        dice = random.Random(seed)
        size = dice.randint(2, 5)
        world = SimWorld(size, capacity=dice.choice((50, 700, 1 << 20)), seed=seed, frame=dice.choice((40, 1 << 18)), wakes=True)
        world.submit_budget = budget
        orders = [dice.sample(range(size), size) for _ in range(4)]
        trials = [Trial(dice.choice(KINDS), size, dice, most_items=300) for _ in orders]
        works = []
        for rank in range(size):
            for i in dice.sample(range(4), 4):
                works.append(trials[i].submit(world, rank, ranks=orders[i], group=i + 1, channel=i + 1))
        world.run(works, budget=budget)
        for trial in trials:
            trial.check()


@pytest.mark.parametrize("mesh", (True, False))
def test_barrier_waits_for_the_last_rank(mesh: bool) -> None:
    for size in range(2, 10):
        world = SimWorld(size, capacity=3, seed=size)
        late = size // 2
        works = [world.collective(rank, Collective.BARRIER, None, None, full_mesh=mesh) for rank in range(size) if rank != late]
        world.stir(40 * size)
        assert all(work.state == _fastpath.FLYING for work in works)
        world.run([*works, world.collective(late, Collective.BARRIER, None, None, full_mesh=mesh)])


def test_two_groups_used_in_opposite_order() -> None:
    for seed in range(40):
        dice = random.Random(seed)
        size = dice.randint(2, 5)
        world = SimWorld(size, capacity=dice.choice((9, 20, 300)), seed=seed, frame=dice.choice((8, 100)), wakes=seed % 2 == 0)
        orders = [dice.sample(range(size), size) for _ in range(2)]
        trials = [Trial(dice.choice(KINDS), size, dice) for _ in range(2)]
        works = []
        for rank in range(size):
            for which in (0, 1) if rank % 2 else (1, 0):
                works.append(trials[which].submit(world, rank, ranks=orders[which], group=which + 1, channel=which + 1))
                world.stir(2)
        world.run(works)
        for trial in trials:
            trial.check()


@pytest.mark.parametrize("repeats", (1, 40))
@pytest.mark.parametrize("count", (1, 8, 300, 500, 60_000))  # 500: the waiting frame ends where the read-ahead ends
def test_frames_of_two_groups_in_each_others_way(count: int, repeats: int) -> None:
    """Rank 0 needs for A what lies behind B's frame on one link, and for B what lies behind A's frame on the other."""
    world = SimWorld(3, capacity=1 << 20, wakes=True)
    groups = {1: [1, 2, 0], 2: [2, 1, 0]}  # in both, rank 0 comes last and reduces in the order of the group
    xs = [np.arange(count) + rank for rank in range(3)]
    outs: list[Array] = []

    def start(rank: int, group: int) -> _fastpath.Work:
        outs.append(np.zeros(count, np.int64))
        schedule = algorithms.direct_all_reduce(groups[group].index(rank), 3, count)
        return world.submit(rank, schedule, xs[rank], outs[-1], group=group, channel=group, ranks=groups[group])

    order = ((0, 1), (0, 2), (1, 2), (2, 1), (1, 1), (2, 2))
    world.run([start(*who) for who in order for _ in range(repeats if count < 1000 else min(repeats, 5))])
    assert all((out == sum(xs)).all() for out in outs)
    assert not any(world.events)


def test_hundred_works_in_flight_at_once() -> None:
    for seed, channels in ((1, 1), (2, 7), (3, 100)):
        dice = random.Random(seed)
        world = SimWorld(3, capacity=100, seed=seed, wakes=True)
        trials = [Trial(dice.choice(KINDS), 3, dice, most_items=30) for _ in range(100)]
        works = [trial.submit(world, rank, channel=1 + i % channels) for rank in range(3) for i, trial in enumerate(trials)]
        assert sum(engine.in_flight() for engine in world.engines) > 100
        world.run(works)
        for trial in trials:
            trial.check()


def test_more_works_than_sequence_numbers_on_the_wire() -> None:
    """16 bits of the sequence travel; the channel lives longer."""
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    a, b = world.engines
    x, out = np.zeros(1, np.int64), np.zeros(1, np.int64)
    there, back = _pair_programs(1, x.dtype)
    for i in range(66_000):
        x[0] = i
        a.submit(first := _fastpath.Work(), there, 1, 1, bytes(64), [0, 1], 2, x, None, NEVER)
        b.submit(second := _fastpath.Work(), back, 1, 1, bytes(64), [0, 1], 2, None, out, NEVER)
        if i % 50 == 0:
            a.progress(NEVER)
        assert first.state == second.state == DONE and out[0] == i


def _pair_programs(count: int, dtype: Any) -> tuple[_fastpath.Program, _fastpath.Program]:
    there, back = algorithms_move.send(1, count, 1, 8), algorithms_move.recv(0, count, 1, 8)
    code = code_of(np.dtype(dtype))
    return _fastpath.Program(there, code, Op.SUM, [0, 1]), _fastpath.Program(back, code, Op.SUM, [1, 0])


def _send(world: SimWorld, x: Array, channel: int, **more: Any) -> _fastpath.Work:
    return world.submit(0, algorithms_move.send(1, x.size, world.lanes, x.itemsize), x, None, channel=channel, **more)


def _recv(world: SimWorld, out: Array, channel: int, **more: Any) -> _fastpath.Work:
    return world.submit(1, algorithms_move.recv(0, out.size, world.lanes, out.itemsize), None, out, channel=channel, **more)


def test_point_to_point_channels_do_not_wait_for_each_other() -> None:
    world = SimWorld(2, capacity=1 << 16, wakes=True)
    xs = [np.arange(5 + i) for i in range(20)]
    outs = [np.zeros_like(x) for x in xs]
    sent = [_send(world, x, channel=i + 1) for i, x in enumerate(xs)]
    for i in reversed(range(20)):
        work = _recv(world, outs[i], channel=i + 1)
        world.run([work])
        np.testing.assert_array_equal(outs[i], xs[i])
    world.run(sent)


def test_small_work_overtakes_a_huge_one() -> None:
    world = SimWorld(2, capacity=1 << 12, wakes=True, frame=1 << 12)
    huge, small = np.arange(1 << 18), np.arange(3)
    out, out_small = np.zeros_like(huge), np.zeros_like(small)
    works = [_send(world, huge, 1), _recv(world, out, 1)]
    world.stir(20)
    first = [_send(world, small, 2), _recv(world, out_small, 2)]
    world.run(first, budget=1 << 14)
    assert out_small.tolist() == [0, 1, 2] and works[1].state == _fastpath.FLYING
    assert sum(engine.statistics()["bytes_in"] for engine in world.engines) < huge.nbytes // 4
    world.run(works)
    np.testing.assert_array_equal(out, huge)


@pytest.mark.parametrize("lanes", (1, 2))
def test_work_submitted_while_its_peers_early_frame_is_half_read(lanes: int) -> None:
    total = 80 + 16 + 5 * 8
    for cut in range(1, total + 1):
        world = SimWorld(2, capacity=cut, wakes=True, lanes=lanes)
        x, out = np.arange(5), np.zeros(5, np.int64)
        sent = _send(world, x, 1)
        world.step(1)  # reads what the link holds: the first bytes of the peer's frames
        assert world.engines[1].statistics()["bytes_in"] == cut
        world.run([sent, _recv(world, out, 1)])
        assert out.tolist() == [0, 1, 2, 3, 4]


def test_unposted_data_is_bounded_per_channel() -> None:
    world = SimWorld(2, capacity=1 << 24, wakes=True, frame=1 << 14)
    xs = [np.arange(1 << 15) + i for i in range(3)]
    works = [_send(world, x, i + 1) for i, x in enumerate(xs)]
    for _ in range(20):
        world.step(0)
        world.step(1)
    sent = world.engines[0].statistics()["bytes_out"]
    assert sent == world.engines[1].statistics()["bytes_in"]
    assert 3 * (EAGER - (1 << 14)) < sent <= 3 * EAGER
    outs = [np.zeros_like(x) for x in xs]
    works += [_recv(world, out, i + 1) for i, out in enumerate(outs)]
    world.run(works)
    for x, out in zip(xs, outs, strict=True):
        np.testing.assert_array_equal(out, x)


def test_many_unposted_works_are_bounded_too() -> None:
    """Their OPENs alone are data that nobody asked for yet."""
    world = SimWorld(2, capacity=1 << 24, wakes=True)
    x, out = np.arange(3), np.zeros(3, np.int64)
    works = [_send(world, x, 1) for _ in range(2000)]
    world.step(1)
    assert world.engines[1].statistics()["bytes_in"] <= EAGER
    assert works[-1].state == _fastpath.FLYING
    for _ in range(2000):
        out[:] = 0
        world.run([_recv(world, out, 1)])
        assert out.tolist() == [0, 1, 2]
    world.run(works)


def _swap(rank: int, count: int, steps: int) -> Schedule:
    """An all-to-all of two ranks in place: what comes goes where what is sent away still lies."""
    pieces = [(i * count // steps, count // steps) for i in range(steps)]
    sends = [Step(Kind.SEND, 1 - rank, 0, src=OUTPUT, src_off=start, count=length) for start, length in pieces]
    receives = [Step(Kind.RECV, 1 - rank, 0, dst=OUTPUT, dst_off=start, count=length) for start, length in pieces]
    return Schedule((*sends, *receives), (), "swap")


def test_in_place_exchange_keeps_what_is_still_to_be_sent() -> None:
    for seed in range(60):
        world = SimWorld(2, capacity=1 + seed % 40, seed=seed, frame=8 * (1 + seed % 5), wakes=seed % 2 == 0)
        data = [np.arange(60) + 1000 * rank for rank in range(2)]
        works = []
        for rank in range(2):
            works.append(world.submit(rank, _swap(rank, 60, 1 + seed % 3), data[rank], data[rank], alias=(0, 0)))
            world.stir(5)
        world.run(works)
        assert data[0].tolist() == list(range(1000, 1060)) and data[1].tolist() == list(range(60))


@pytest.mark.parametrize("which", ("source", "target", "both"))
def test_memory_moved_away_in_the_middle(which: str) -> None:
    for seed in range(30):
        dice = random.Random(seed)
        size = dice.randint(2, 4)
        world = SimWorld(size, capacity=dice.choice((9, 30, 100)), seed=seed, frame=dice.choice((8, 40, 1 << 18)), wakes=seed % 2 == 0)
        xs = [np.arange(37) * (rank + 1) for rank in range(size)]
        wanted = sum(xs)
        outs = [np.zeros(37, np.int64) for _ in range(size)]
        works = [world.collective(rank, Collective.ALL_REDUCE, xs[rank], outs[rank]) for rank in range(size)]
        world.stir(12)
        if works[0].state == _fastpath.FLYING:
            if which != "target":
                _fastpath.move_memory(world.engines[0], works[0], xs[0], xs[0].copy(), False)
                xs[0][:] = -1
            if which != "source":
                fresh = np.full(37, -5)
                _fastpath.move_memory(world.engines[0], works[0], outs[0], fresh, True)
                outs[0][:] = -2
                outs[0] = fresh
        world.run(works)
        assert all((out == wanted).all() for out in outs)


def test_a_call_is_bounded_by_its_budget() -> None:
    """Also with many links that all have much to move."""
    size, budget = 6, 1 << 18
    world = SimWorld(size, capacity=1 << 20, wakes=True)
    for rank in range(size):
        world.collective(rank, Collective.ALL_GATHER, np.zeros(1 << 20, np.uint8), np.zeros(size << 20, np.uint8))
    over = 3 * (1 << 18) + 8192  # one read, and one write of a queue that a frame may exceed
    for turn in range(60):
        engine = world.engines[turn % size]
        before = engine.statistics()
        engine.progress(budget)
        after = engine.statistics()
        assert after["bytes_in"] + after["bytes_out"] - before["bytes_in"] - before["bytes_out"] <= budget + over
