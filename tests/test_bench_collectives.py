"""What ``rt.bench`` measures: descriptions of collectives, their right results, a rank's timed loop, and real ranks of every system.

May live here: tests of ``bench/collectives.py``, ``adapters.py``, ``exchange.py``, ``rank.py`` and ``measure.py``. May not: text
(``test_bench_report``), the command line (``test_bench``). No test here looks at how fast anything is.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks

import rt
from bench import __main__ as command_line
from bench import adapters, conductor, exchange, local, measure, meeting, rank, samples
from bench.collectives import COLLECTIVES, Bind, Bound, Buffers
from bench.data import DTYPES, OPS, Array, Data
from rt.world import World

MPI = ("mpich", "openmpi")
FEW = {"iters": 2, "warmup": 1}
HERE = [pytest.param(name, marks=pytest.mark.skipif(not hasattr(rt, each.needs), reason=f"rt has no {each.needs} yet"))
        for name, each in COLLECTIVES.items()]  # fmt: skip


def have_peers() -> bool:
    try:
        return Path(meeting.peers_python()).is_file()
    except meeting.BenchError:
        return False


def missing_mpi() -> str:
    """Return why MPI cannot be measured, "" if it can."""
    try:
        meeting.require(MPI)
    except meeting.BenchError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def standing(options: measure.Options) -> Iterator[list[conductor.System]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(conductor.running(name, adapters.ADAPTERS[name].kind, options.size, [*conductor.RANK, name]))
            for name in options.systems
        ]


@pytest.fixture(scope="module")
def both_fronts() -> Iterator[list[conductor.System]]:
    """Three ranks of each front end, which serve all tests that ask for them."""
    with standing(measure.Options(COLLECTIVES["all_reduce"], 3)) as systems:
        yield systems


@pytest.fixture(scope="module")
def beside_gloo() -> Iterator[list[conductor.System]]:
    with standing(measure.Options(COLLECTIVES["all_reduce"], 2, fronts=("sync",), peers=("gloo",))) as systems:
        yield systems


@pytest.fixture(scope="module")
def beside_mpi() -> Iterator[list[conductor.System]]:
    if missing_mpi():
        pytest.skip(missing_mpi())
    with standing(measure.Options(COLLECTIVES["all_reduce"], 3, fronts=("sync",), peers=MPI)) as systems:
        yield systems


# --- sizes and bandwidths, as nccl-tests has them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "items", "factor"),
    [  # of 1000 bytes of float over 4 ranks: paramcount, (sendcount, recvcount) and factor of each nccl-tests program
        ("all_reduce", 250, (250, 250), 1.5),
        ("all_gather", 60, (60, 240), 0.75),
        ("reduce_scatter", 60, (240, 60), 0.75),
        ("broadcast", 250, (250, 250), 1.0),
        ("reduce", 250, (250, 250), 1.0),
        ("gather", 60, (60, 240), 0.75),
        ("scatter", 60, (240, 60), 0.75),
        ("all_to_all", 60, (240, 240), 0.75),
        ("send_recv", 250, (250, 250), 1.0),
    ],
)
def test_sizes_and_factors_are_nccl_tests(name: str, count: int, items: tuple[int, int], factor: float) -> None:
    collective = COLLECTIVES[name]
    assert collective.count(1000, 4, 4) == count
    assert collective.items(count, 4) == items
    assert collective.factor(4) == factor


def test_every_collective_is_described() -> None:
    assert {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter", "all_to_all", "send_recv",
            "barrier"} == set(COLLECTIVES)  # fmt: skip
    for collective in COLLECTIVES.values():
        assert {"rt", "gloo"} <= set(collective.binds)
        assert set(collective.in_place) <= set(collective.binds)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_blocks_are_whole_16_bytes_of_every_dtype(itemsize: int) -> None:
    for nbytes in range(0, 400, 7):
        count = COLLECTIVES["all_gather"].count(nbytes, itemsize, 3)
        assert count * itemsize % 16 == 0
        assert count * itemsize * 3 <= nbytes < (count * itemsize + 16) * 3


def test_steps_and_factors_give_sizes_once_each_and_none_empty() -> None:
    gather = COLLECTIVES["all_gather"]
    by_factor = measure.Options(gather, 2, min_bytes=4, max_bytes=256, factor=2)
    assert [by_factor.nbytes(count) for count in by_factor.counts] == [32, 64, 128, 256]
    by_step = measure.Options(gather, 2, min_bytes=10, max_bytes=100, step_bytes=10)
    assert [by_step.nbytes(count) for count in by_step.counts] == [32, 64, 96]
    odd = measure.Options(COLLECTIVES["all_reduce"], 2, min_bytes=9, max_bytes=1000, factor=10, dtype="double")
    assert [odd.nbytes(count) for count in odd.counts] == [8, 88, 896]
    assert measure.Options(COLLECTIVES["barrier"], 2).counts == [0]


# --- right results ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "op"), [(dtype, op) for dtype in DTYPES.values() for op in OPS.values() if op != "mean" or "float" in dtype]
)
def test_reductions_are_those_of_the_ranks_inputs(dtype: str, op: str) -> None:
    size, items = 3, 2500
    data = Data(size, items, dtype, op)
    rows = [data.of(rank) for rank in range(size)]
    # One after the other in the dtype itself: integers wrap, and the inputs are small enough that nothing is rounded on the way.
    total = rows[0].copy()
    for row in rows[1:]:
        with np.errstate(over="ignore"):
            total = {"sum": np.add, "mean": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op](total, row)
    if op == "mean":
        total = (total.astype(np.float64) / size).astype(total.dtype)
    assert np.array_equal(data.reduced(), total)
    assert data.reduced().dtype == total.dtype == rows[0].dtype


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_inputs_tell_ranks_and_places_apart(dtype: str) -> None:
    data = Data(4, 5000, dtype)
    rows = [data.of(rank) for rank in range(4)]
    for shift in (1, 4, 64, 1024, 4096):
        assert all(rank.count_wrong(np.roll(row, shift), row) > 0 for row in rows)
        assert rank.count_wrong(np.roll(data.reduced(), shift), data.reduced()) > 0
    assert all(rank.count_wrong(rows[a], rows[b]) > 0 for a in range(4) for b in range(a))


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # rank 1 of 3, blocks b<owner><number>
        ("all_gather", ["b0", "b1", "b2"]),
        ("gather", ["b0", "b1", "b2"]),
        ("scatter", ["b21"]),
        ("all_to_all", ["b01", "b11", "b21"]),
        ("broadcast", ["b2"]),
        ("send_recv", ["b0"]),
    ],
)
def test_who_gets_what(name: str, expected: list[str]) -> None:
    collective = COLLECTIVES[name]
    sends, receives = collective.items(8, 3)
    data = Data(3, sends, "int64", root=2)
    pieces = []
    for word in expected:
        owner = data.of(int(word[1]))
        pieces.append(owner if len(word) == 2 else owner[int(word[2]) * 8 : int(word[2]) * 8 + 8])
    assert np.array_equal(collective.expected(1, data), np.concatenate(pieces))
    assert len(collective.expected(1, data)) == receives


def test_in_place_a_block_lies_where_its_rank_is() -> None:
    for name, (sends, receives) in (("all_gather", (8, 24)), ("reduce_scatter", (24, 8)), ("all_reduce", (8, 8))):
        x, out = COLLECTIVES[name].memory(1, 3, 8, np.dtype("int32"), "in_place")
        assert (len(x), len(out)) == (sends, receives)
        x[...] = 7
        assert np.count_nonzero(out == 7) == 8
        if name == "all_gather":
            assert list(np.flatnonzero(out)) == list(range(8, 16))


# --- the timed loop -----------------------------------------------------------------------------------------------------------------------


class Alone(adapters.Adapter):
    """A system of one rank, whose all_reduce is what the test says; called as gloo is."""

    kind = "gloo"

    def __init__(self, reduce: Callable[[Array, Array], Any]) -> None:
        super().__init__(0, 1)
        self.reduce = reduce

    def barrier(self) -> None:
        pass

    def bind(self, bind: Bind, buffers: Buffers) -> Bound:
        return lambda: self.reduce(buffers.x, buffers.out)

    def result(self, returned: Any, out: Array) -> Array:
        return out if returned is None else returned


def timed(reduce: Callable[[Array, Array], Any], place: str = "out_of_place", **more: Any) -> dict[str, Any]:
    command = {"collective": "all_reduce", "count": 1024, "dtype": "float32", "op": "sum", "root": 0, "place": place, "warmup": 2}
    return rank.measure(Alone(reduce), {**command, "samples": 3, "check": True, **more})


def copy(x: Array, out: Array) -> None:
    out[...] = x


@pytest.mark.parametrize("place", ["out_of_place", "in_place"])
def test_right_result_has_nothing_wrong_and_warm_up_is_not_counted(place: str) -> None:
    answer = timed(copy, place)
    assert answer["wrong"] == 0
    assert len(answer["ns"]) == 3


@pytest.mark.parametrize("place", ["out_of_place", "in_place"])
def test_one_wrong_element_is_found(place: str) -> None:
    def off_by_one(x: Array, out: Array) -> None:
        out[...] = x
        out[17] += 1

    assert timed(off_by_one, place)["wrong"] == 1


def test_nan_is_wrong() -> None:
    assert timed(lambda x, out: out.fill(np.nan))["wrong"] == 1024


def test_result_of_another_shape_or_dtype_is_wrong() -> None:
    assert timed(lambda x, out: x[:-1].copy(), "fresh")["wrong"] == 1024
    assert timed(lambda x, out: x.astype(np.float64), "fresh")["wrong"] == 1024
    assert timed(lambda x, out: x.copy(), "fresh")["wrong"] == 0


def test_result_left_by_an_earlier_call_is_wrong() -> None:
    calls = []

    def only_first(x: Array, out: Array) -> None:
        if not calls:
            out[...] = x
        calls.append(1)

    assert timed(only_first)["wrong"] == 1024


def test_in_place_starts_from_fresh_values_each_time() -> None:
    def doubled(x: Array, out: Array) -> None:
        assert x[0] == 1
        x *= 2

    assert timed(doubled, "in_place")["wrong"] == 1024


def test_unchecked_is_none() -> None:
    assert timed(copy, check=False)["wrong"] is None


# --- real ranks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
def test_both_front_ends_are_right_in_every_place(name: str, both_fronts: list[conductor.System]) -> None:
    collective = COLLECTIVES[name]
    root = 1 if collective.rooted else 0
    options = measure.Options(collective, 3, min_bytes=192, max_bytes=192 << 10, factor=1 << 10, root=root, **FEW)
    result = measure.run(options, both_fronts)
    assert result.wrong == 0
    for rows in result.rows.values():
        assert [result.options.nbytes(row.count) for row in rows] == ([192, 192 << 10] if collective.moves else [0])
        for row in rows:
            assert tuple(row.cells) == collective.places("rt")
            assert all(len(cell.samples) == 2 and cell.wrong == 0 and cell.seconds > 0 for cell in row.cells.values())
            assert row.algorithm
    greetings = result.greetings["rt sync"]
    assert [sorted(greeting["links"]) for greeting in greetings] == [["1", "2"], ["0", "2"], ["0", "1"]]
    assert all(link == "shm" for greeting in greetings for link in greeting["links"].values())


@pytest.mark.parametrize(("dtype", "op"), [("half", "avg"), ("bfloat16", "sum"), ("int8", "prod"), ("uint64", "min"), ("double", "max")])
def test_dtypes_and_operators(dtype: str, op: str) -> None:
    result = local.run(
        measure.Options(COLLECTIVES["reduce_scatter"], 2, min_bytes=64, max_bytes=64, dtype=dtype, op=op, fronts=("sync",), **FEW)
    )
    assert result.wrong == 0 and result.rows["rt sync"][0].cells["fresh"].wrong == 0


@pytest.mark.parametrize(
    ("words", "expected"), [("all_reduce -o all -d all", 10 * 4 + 4), ("all_gather -d all", 10), ("all_reduce -o avg -d all", 4)]
)
def test_all_dtypes_and_all_operators(words: str, expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([*words.split(), "-b", "64", "-e", "64", "--front", "sync", "--iters", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert len({(row[2], row[3]) for row in rows}) == len(rows) == expected
    assert {row[0] for row in rows} == {"64"} and {row[8] for row in rows} == {row[12] for row in rows} == {"0"}


def test_samples_are_those_asked_for_and_lie_in_rounds() -> None:
    result = local.run(measure.Options(COLLECTIVES["all_reduce"], 2, min_bytes=4, max_bytes=4, iters=7, warmup=1))
    for rows in result.rows.values():
        for cell in rows[0].cells.values():
            assert len(cell.samples) == 7 and len(cell.rounds) == measure.ROUNDS
            assert [len(samples) for samples in cell.of_ranks] == [7, 7]
            assert cell.samples == [max(both) for both in zip(*cell.of_ranks, strict=True)]
    assert result.greetings["rt async"][0]["uses"]["loop"].split()[0] in ("uvloop", "asyncio")


@pytest.mark.skipif(not have_peers(), reason="no peers here: `make peers` installs them")
@pytest.mark.parametrize("name", HERE)
def test_gloo_is_right_beside_us(name: str, beside_gloo: list[conductor.System]) -> None:
    collective = COLLECTIVES[name]
    options = measure.Options(collective, 2, min_bytes=64, max_bytes=64, fronts=("sync",), peers=("gloo",), **FEW)
    result = measure.run(options, beside_gloo)
    assert result.wrong == 0
    (row,) = result.rows["gloo"]
    assert set(row.cells) == {"out_of_place"} | ({"in_place"} if "gloo" in collective.in_place else set())


@pytest.mark.skipif(not have_peers(), reason="no peers here: `make peers` installs them")
@pytest.mark.parametrize("name", ["all_reduce", "all_gather"])
def test_mlx_is_right_beside_us(name: str) -> None:
    result = local.run(measure.Options(COLLECTIVES[name], 2, min_bytes=64, max_bytes=64, fronts=("sync",), peers=("mlx",), **FEW))
    assert result.wrong == 0
    assert set(result.rows["mlx"][0].cells) == {"out_of_place"}


@pytest.mark.parametrize("name", HERE)
def test_mpi_is_right_beside_us(name: str, beside_mpi: list[conductor.System]) -> None:
    collective = COLLECTIVES[name]
    root = 1 if collective.rooted else 0
    options = measure.Options(collective, 3, min_bytes=192, max_bytes=192 << 10, factor=1 << 10, root=root, fronts=("sync",), **FEW)
    result = measure.run(options, beside_mpi)
    assert result.wrong == 0
    for peer in MPI:
        for row in result.rows[peer]:
            assert set(row.cells) == {"out_of_place"} | ({"in_place"} if peer in collective.in_place else set())
            assert all(cell.wrong == 0 for cell in row.cells.values())
        (uses,) = {greeting["uses"][peer] for greeting in result.greetings[peer]}
        assert re.fullmatch(r"\d+\.\d+\.\d+", uses)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_mpi_moves_every_dtype_and_reduces_all_but_one(dtype: str, beside_mpi: list[conductor.System]) -> None:
    for name, op in (("all_gather", "sum"), *(("all_reduce", op) for op in ("sum", "prod", "max", "min") if dtype != "bfloat16")):
        options = measure.Options(COLLECTIVES[name], 3, min_bytes=96, max_bytes=96, dtype=dtype, op=op, fronts=("sync",), **FEW)
        result = measure.run(options, beside_mpi)
        saturates = {"openmpi"} if op == "sum" and "int8" in dtype else set()  # depends on the processor, see docs/measuring.md
        for system in set(result.rows) - saturates:
            assert all(cell.wrong == 0 for row in result.rows[system] for cell in row.cells.values()), (system, op)


@pytest.mark.parametrize("peer", MPI)
@pytest.mark.parametrize(
    ("op", "dtype", "said"), [("avg", "float", "MPI has no mean; it has sum"), ("sum", "bfloat16", "MPI libraries reduce no bfloat16")]
)
def test_what_mpi_cannot_reduce_is_said_and_nothing_is_left_running(op: str, dtype: str, said: str, peer: str) -> None:
    if missing_mpi():
        pytest.skip(missing_mpi())
    with pytest.raises(conductor.BenchError, match=rf"{peer}: rank \d failed\n(.*\n)*ValueError: .*{said}"):
        with standing(measure.Options(COLLECTIVES["all_reduce"], 2, fronts=(), peers=(peer,))) as systems:
            measure.run(measure.Options(COLLECTIVES["all_reduce"], 2, max_bytes=4, dtype=dtype, op=op, **FEW), systems)
    assert ranks.end_soon(systems[0].pids)


@pytest.mark.parametrize("size", [2, 3])
def test_what_ours_are_held_against_needs_no_peers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_PEERS_PYTHON", "/nowhere/python")
    options = measure.Options(
        COLLECTIVES["all_reduce"], size, min_bytes=4, max_bytes=1 << 20, factor=1 << 9, fronts=("sync",), peers=("nospin", "tcp"), **FEW
    )
    result = local.run(options)
    assert result.wrong == 0
    assert [row.cells["out_of_place"].wrong for row in result.rows["tcp"]] == [None, None, None]
    assert [set(row.cells) for row in result.rows["tcp"]] == [{"out_of_place"}] * 3


@pytest.mark.parametrize(("size", "share"), [(2, 300_000), (3, 400_000)])
def test_the_bare_exchange_moves_the_bytes_of_an_all_reduce(size: int, share: int) -> None:
    ends = socket.socketpair(), socket.socketpair()
    ring = exchange.Ring(size, ends[0][0], ends[1][0])
    source, target = np.arange(75_000, dtype=np.float32), np.zeros(75_000, np.float32)
    arrived = bytearray()

    def neighbours() -> None:
        ends[1][1].sendall((source.tobytes() * 2)[:share])
        while len(arrived) < share:
            arrived.extend(ends[0][1].recv(1 << 16))

    thread = threading.Thread(target=neighbours)
    thread.start()
    ring(source, target)
    thread.join()
    assert arrived == (source.tobytes() * 2)[:share]
    assert np.array_equal(target, source)
    for pair in ends:
        for end in pair:
            end.close()


def test_what_ranks_are_reached_by() -> None:
    world = World.__new__(World)
    world.rank, world.size, world.rdma = 1, 4, None
    world.addresses, world.shared = {0: "10.0.0.1:5", 3: "127.0.0.1:9"}, {(1, 3)}
    assert world.links() == {0: "tcp 10.0.0.1:5", 2: "relayed", 3: "shm"}


# --- statistics ---------------------------------------------------------------------------------------------------------------------------


def cell(*rounds: tuple[float, ...]) -> samples.Cell:
    """Of one rank."""
    return samples.Cell(tuple((samples,) for samples in rounds), 0)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The host is ten times slower in the second round, and hits both: medians over all samples would compare different moments.
    ours = cell((1.0, 1.0, 1.0), (10.0,), (1.0,))
    theirs = cell((2.0,), (20.0, 20.0, 20.0), (3.0,))
    assert theirs.ratio(ours) == 2.0
    assert theirs.seconds / ours.seconds == 20.0


def test_slowest_rank_counts_per_sample() -> None:
    both = samples.Cell((((1e-6, 5e-6), (3e-6, 2e-6)),), 0)
    assert both.samples == [3e-6, 5e-6]
    with pytest.raises(ValueError, match="shorter"):
        _ = samples.Cell((((1.0, 2.0), (1.0,)),), 0).samples


def test_spread_is_nccl_tests() -> None:
    spread = samples.Spread.of([float(number) for number in range(200, 0, -1)])
    assert (spread.least, spread.most, spread.p50, spread.p95, spread.p99) == (1.0, 200.0, 101.0, 190.0, 198.0)
    assert spread.mean == 100.5
    assert spread.stdev == pytest.approx(57.734, abs=1e-3)
    assert spread.cv == pytest.approx(0.57447, abs=1e-5)
    assert samples.Spread.of([2.0]).p99 == 2.0


@pytest.mark.parametrize("samples", [1, 3, 5, 7, 1000])
def test_samples_are_shared_out_without_loss(samples: int) -> None:
    shares = measure.share_out(samples)
    assert sum(shares) == samples
    assert len(shares) == min(samples, measure.ROUNDS)
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_slow_sizes_still_get_samples_and_fast_ones_not_too_many() -> None:
    assert measure.affordable(10.0) >= 5
    assert measure.affordable(4e-3) == 100
    assert measure.affordable(1e-9) == measure.affordable(1e-8) == 20_000
