"""``rt.bench simulate``: the modelled machine against closed forms, and a part of it against the whole.

May live here: tests of ``bench/program.py``, ``simulator.py``, ``symmetry.py``, ``fold.py`` and ``simulate.py``. May not: how near the
model comes to this host, which only a measurement says.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import fold, simulate, streams, symmetry
from bench.program import compiled
from bench.simulate import ALGORITHMS
from bench.simulator import Deadlock, Link, Machine, Simulation
from rt import _fastpath
from rt.algorithms_move import Span, recv_step, send_step
from rt.dtypes import DType, Op
from rt.schedule import INPUT, OUTPUT, Schedule, Step

hierarchy = ALGORITHMS["all_reduce"]["hierarchy"]
FREE = Link(0.0, 0.0, 0.0, 0.0, 0.0, 1 << 16, 1 << 22)
LATENCY, BANDWIDTH = 20e-6, 12.5e9
EVERY = [(collective, name) for collective, known in ALGORITHMS.items() for name in known]


def cluster(hosts: int, per_host: int = 1, *, cores: int | None = None, **changed: float) -> Machine:
    """A machine whose every part costs something."""
    costs = {"latency": LATENCY, "bandwidth": BANDWIDTH, "local_latency": 1e-6, "local_bandwidth": 10e9, "reduce_bandwidth": 8e9, **changed}
    return simulate.machine(hosts, per_host, cores=cores, **costs)


def wires(hosts: int) -> Machine:
    """A machine of which only the network costs anything."""
    return Machine(hosts, 1, 1, BANDWIDTH, FREE, dataclasses.replace(FREE, latency=LATENCY), 0.0)


def all_ranks(make: fold.Make, machine: Machine, count: int) -> float:
    case = fold.Case(make, machine, count)
    return Simulation(machine, {rank: case.program(rank) for rank in range(machine.size)}, symmetry.alone).run()


# --- programs ---------------------------------------------------------------------------------------------------------------------------


def reaches(waits: dict[int, set[int]], later: int, earlier: int) -> bool:
    """Whether a step waits for another, or for one that does."""
    return later == earlier or any(reaches(waits, each, earlier) for each in waits[later] if each >= earlier)


@pytest.mark.parametrize(("collective", "name"), EVERY)
@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_a_program_waits_for_what_the_engine_waits_for(collective: str, name: str, hosts: int) -> None:
    size = 2 * hosts
    for rank in range(size):
        schedule = ALGORITHMS[collective][name](rank, cluster(hosts, 2), 100 * size)
        program = compiled(schedule, 4)
        links = [int(peer != rank) for peer in range(size)]
        theirs = {(i, j): delta * 4 for i, j, delta in _fastpath.Program(schedule, DType.FLOAT32, Op.SUM, links).dependencies}
        ours = {(i, j): delta for i, move in enumerate(program.moves) for j, delta in move.waits}
        assert ours.items() <= theirs.items()
        waits = {i: {j for j, _ in move.waits} for i, move in enumerate(program.moves)}
        assert all(reaches(waits, i, j) for i, j in theirs)
        assert {(i, j) for j, later in enumerate(program.waiters) for i in later} == set(ours)


def test_wide_scratch_is_refused() -> None:
    with pytest.raises(ValueError, match="found float32 scratch of half types"):
        compiled(simulate.algorithms.direct_all_reduce(0, 3, 8, wide=True), 2)


# --- closed forms -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_doubling_takes_a_latency_per_round(rounds: int) -> None:
    machine = wires(1 << rounds)
    found = all_ranks(ALGORITHMS["all_reduce"]["doubling"], machine, 1)
    assert found == pytest.approx(rounds * (LATENCY + 4 / BANDWIDTH), rel=1e-9)


@pytest.mark.parametrize("size", [2, 3, 8, 17])
def test_ring_takes_a_latency_and_a_chunk_per_hop(size: int) -> None:
    chunk = 4096  # too small to be cut into two directions
    found = all_ranks(ALGORITHMS["all_reduce"]["ring"], wires(size), size * chunk // 4)
    assert found == pytest.approx(2 * (size - 1) * (LATENCY + chunk / BANDWIDTH), rel=1e-9)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_large_ring_fills_the_wire(size: int) -> None:
    nbytes = size << 24
    found = all_ranks(ALGORITHMS["all_reduce"]["ring"], wires(size), nbytes // 4)
    wire = 2 * (size - 1) / size * nbytes / BANDWIDTH
    fill = 2 * (size - 1) * (LATENCY + 2 * (1 << 16) / BANDWIDTH)  # once per hop, a piece of each direction
    assert wire < found < wire + fill


def test_ranks_of_a_host_share_its_interface() -> None:
    nbytes = 64 << 20
    one, four = (
        Machine(2, per_host, per_host, BANDWIDTH, FREE, dataclasses.replace(FREE, latency=LATENCY), 0.0) for per_host in (1, 4)
    )
    times = [all_ranks(ALGORITHMS["all_to_all"]["direct"], machine, nbytes // 4) for machine in (one, four)]
    # Each rank sends half of its bytes across, whatever their number; four ranks are four times as many bytes.
    assert times[0] == pytest.approx(nbytes / 2 / BANDWIDTH, rel=0.05)
    assert times[1] == pytest.approx(4 * nbytes / 2 / BANDWIDTH, rel=0.05)


def test_a_core_does_one_thing_at_a_time() -> None:
    nbytes = 16 << 20
    copy = 1 / 10e9
    link = Link(0.0, copy, copy, copy, 0.0, 1 << 15, 1 << 20)
    two, one = (Machine(1, 2, cores, BANDWIDTH, link, link, 0.0) for cores in (2, 1))
    times = [all_ranks(ALGORITHMS["all_reduce"]["ring"], machine, nbytes // 4) for machine in (two, one)]
    # Each rank writes as many bytes as x has, and receives as many.
    assert times[0] == pytest.approx(2 * nbytes * copy, rel=0.05)
    assert times[1] == pytest.approx(4 * nbytes * copy, rel=0.05)


def test_beyond_64_kib_a_sender_waits_for_the_receivers_open() -> None:
    def seconds(nbytes: int) -> float:
        span = Span(INPUT, 0, nbytes // 4)
        programs = {
            0: compiled(Schedule((send_step(1, 0, span),), (), "one"), 4),
            1: compiled(Schedule((recv_step(0, 0, span.on(OUTPUT)),), (), "one"), 4),
        }
        return Simulation(wires(2), programs, symmetry.alone).run()

    assert seconds(64 << 10) == pytest.approx(LATENCY + (64 << 10) / BANDWIDTH, rel=1e-9)
    assert seconds(65 << 10) == pytest.approx(2 * LATENCY + (1 << 10) / BANDWIDTH, rel=1e-9)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    programs = {
        rank: compiled(Schedule((recv_step(1 - rank, 0, Span(OUTPUT, 0, 1)), send_step(1 - rank, 0, Span(OUTPUT, 0, 1))), (), "stuck"), 4)
        for rank in range(2)
    }
    with pytest.raises(Deadlock, match=r"ranks \[0, 1\] wait for each other"):
        Simulation(cluster(2), programs, symmetry.alone).run()


@pytest.mark.parametrize(("collective", "name"), EVERY)
@pytest.mark.parametrize(("hosts", "per_host", "cores"), [(3, 1, 1), (1, 5, 2), (3, 2, 2), (4, 4, 3)])
def test_every_algorithm_ends_and_no_part_of_the_machine_is_free(
    collective: str, name: str, hosts: int, per_host: int, cores: int
) -> None:
    if name not in simulate.usable(cluster(hosts, per_host), collective):
        pytest.skip("a hierarchy of one level")
    make = ALGORITHMS[collective][name]
    worse = {"local_bandwidth": 5e9}
    if hosts > 1:
        worse["bandwidth"] = BANDWIDTH / 8
    if collective in ("all_reduce", "reduce_scatter"):
        worse["reduce_bandwidth"] = 1e9
    small, large = (items * hosts * per_host for items in (100, 600_000))
    before = all_ranks(make, cluster(hosts, per_host, cores=cores), large)
    for part, value in worse.items():
        assert all_ranks(make, cluster(hosts, per_host, cores=cores, **{part: value}), large) > before, part
    before = all_ranks(make, cluster(hosts, per_host, cores=cores), small)
    for part in ("local_latency",) if hosts == 1 else ("latency",):
        assert all_ranks(make, cluster(hosts, per_host, cores=cores, **{part: 1e-3}), small) > before, part


# --- few ranks that stand for many ------------------------------------------------------------------------------------------------------


def symmetries() -> Iterator[tuple[str, fold.Make, str | None]]:
    yield "ring", ALGORITHMS["all_reduce"]["ring"], "turn"
    yield "hierarchy", hierarchy, None  # hosts send different parts of their sums first, and so begin at different times
    yield "doubling", ALGORITHMS["all_reduce"]["doubling"], "flip"
    yield "direct", ALGORITHMS["all_to_all"]["direct"], "turn"
    yield "gather", ALGORITHMS["all_gather"]["ring"], "turn"
    yield "owner", ALGORITHMS["all_reduce"]["owner"], None  # reduces in the order of ranks: who has the first rank's data is ahead


@pytest.mark.parametrize(("make", "expected"), [pytest.param(make, name, id=label) for label, make, name in symmetries()])
@pytest.mark.parametrize(("hosts", "per_host"), [(4, 1), (4, 4), (16, 2), (32, 2)])
@pytest.mark.parametrize("chunk", [2, 3000, 40_000])
def test_one_host_stands_for_all(make: fold.Make, expected: str | None, hosts: int, per_host: int, chunk: int) -> None:
    machine, count = cluster(hosts, per_host), 2 * chunk * hosts * per_host
    if chunk > 3000 and machine.size > 16:
        count //= 8
    case = fold.Case(make, machine, count)
    found = symmetry.find(case.program, hosts, per_host)
    if make is hierarchy and per_host == 1:
        pytest.skip("a hierarchy of one level")
    assert (found and found[0].name) == expected
    if expected:
        one = fold._one_host(case, float("inf"))
        assert one is not None and one.seconds == pytest.approx(all_ranks(make, machine, count), rel=1e-9)


def test_ranks_that_do_not_do_the_same_are_no_symmetry() -> None:
    def with_an_odd_one_out(rank: int, machine: Machine, count: int) -> Schedule:
        schedule = ALGORITHMS["all_reduce"]["ring"](rank, machine, count)
        return schedule._replace(steps=schedule.steps[1:]) if rank == 6 else schedule

    case = fold.Case(with_an_odd_one_out, cluster(4, 2), 4096 * 8)
    assert symmetry.find(case.program, 4, 2) is None
    uneven = fold.Case(ALGORITHMS["all_reduce"]["ring"], cluster(4, 2), 4096 * 8 + 3)
    assert symmetry.find(uneven.program, 4, 2) is None


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        pytest.param(ALGORITHMS["all_reduce"]["ring"], 0.02, id="ring"),
        # Whether a rank copies within its host while a hop waits for it is luck: one host more may take a quarter more time or less.
        pytest.param(hierarchy, 0.35, id="hierarchy"),
        pytest.param(ALGORITHMS["all_reduce"]["owner"], 0.02, id="owner"),
    ],
)
@pytest.mark.parametrize(("hosts", "per_host"), [(64, 1), (32, 2), (24, 4)])
@pytest.mark.parametrize("chunk", [16, 6000, 40_000])
def test_folding_gives_the_time_of_all_ranks(
    make: fold.Make, tolerance: float, hosts: int, per_host: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make is hierarchy and per_host == 1:
        pytest.skip("a hierarchy of one level")
    monkeypatch.setattr(fold, "_FOLDED_HOSTS", 20)
    monkeypatch.setattr(fold, "_FOLDED_RANKS", 32)
    case = fold.Case(make, cluster(hosts, per_host), chunk * hosts * per_host)
    folded = fold._fewer_hosts(case)
    assert folded is not None and folded.way == "folded"
    one = fold._one_host(case, float("inf"))  # which is the time of all ranks, see above
    seconds = one.seconds if one else all_ranks(make, case.machine, case.count)
    assert folded.seconds == pytest.approx(seconds, rel=tolerance)


def test_what_has_other_steps_on_fewer_hosts_is_not_folded() -> None:
    assert fold._fewer_hosts(fold.Case(ALGORITHMS["all_reduce"]["doubling"], cluster(64), 64 * 64)) is None


@pytest.mark.parametrize("hosts", [2, 8])
def test_fewer_bytes_give_the_time_of_all(hosts: int) -> None:
    make, count = ALGORITHMS["all_reduce"]["doubling"], 16 << 20
    folded = fold._fewer_bytes(fold.Case(make, cluster(hosts), count))
    assert folded is not None and folded.seconds == pytest.approx(all_ranks(make, cluster(hosts), count), rel=0.01)


def test_times_that_lie_on_no_line_are_not_followed() -> None:
    points = [10, 14, 16, 20]
    for wrong in (lambda x: x**2, lambda x: 2.0, lambda x: 40.0 if x == 16 else 20.0 + x):
        assert fold._line(lambda point, wrong=wrong: fold.Found(wrong(point), ""), points, 100) is None
    found = fold._line(lambda point: fold.Found(3.0 + 2 * point, ""), points, 100)
    assert found is not None and found.seconds == pytest.approx(203)


# --- the command ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(110)
def test_a_thousand_hosts_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    words = "simulate --hosts 1024 --ranks-per-host 8 --latency 20e-6 --bandwidth 12.5e9 -b 64K -e 1G -f 16384 --json"
    assert command_line.main([*words.split(), str(target)]) == 0
    small, large = json.loads(target.read_text())["rows"]
    assert small["best"] == "doubling" and large["best"] == "hierarchy"
    assert all(row["times"][name] > 0 for row in (small, large) for name in ALGORITHMS["all_reduce"])
    assert large["times"]["ring"] > 2 * (1 << 30) / 12.5e9  # the bytes that pass each interface
    shown = capsys.readouterr().out
    assert "1024 hosts x 8 ranks" in shown and "folded" in shown


def test_what_cannot_be_found_out_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main("simulate --hosts 4096 --algorithm ring -b 4 -e 4".split()) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["4", "-", "-", "doubling", "-"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("--hosts 1", "found 1 host of 1 rank, expected at least 2 ranks"),
        ("--hosts few", "found 'few'"),
        ("--latency -1", "expected seconds above 0, as in 20e-6 or 12.5e9, found '-1'"),
        ("--latency 0", "found '0'"),
        ("--bandwidth fast", "expected bytes per second above 0"),
        ("--cores 0", "expected an integer of at least 1"),
        ("-b 64 -e 16", "-e 16 is below -b 64"),
        ("-b 1 -e 3", "expected at least 4"),
        ("--collective all_gather --hosts 4 -e 15", "leaves no float32 for each of 4: expected at least 16"),
        ("--collective broadcast", "invalid choice"),
        ("--collective all_gather --algorithm owner", "all_gather of 8 x 1 ranks has no owner; it has direct, ring"),
        ("--algorithm hierarchy", "all_reduce of 8 x 1 ranks has no hierarchy; it has doubling, owner, ring"),
        ("-n 4", "-n: found it without --here, expected --hosts and --ranks-per-host"),
        ("--here --hosts 2", "--hosts: found it beside --here, which measures all_reduce on this host"),
        ("--here --plot F.png", "--plot: found it beside --here"),
        ("--here -n 1", "expected an integer of at least 2"),
        ("--algorithm best", "'best' is unknown; known: doubling"),
        ("-f 2 -i 64", "not allowed with"),
    ],
)
def test_mistakes_exit_2_and_say_what_was_expected(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["simulate", *argv.split()])
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_sizes_and_what_rt_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main("simulate --hosts 3 --collective reduce_scatter -b 1000 -e 1M -i 400K".split()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [(int(row[0]), row[-2]) for row in rows] == [(996, "direct"), (410592, "ring"), (820200, "ring")]


def test_steps_are_those_of_rt() -> None:
    step = ALGORITHMS["all_reduce"]["ring"](0, cluster(2), 8).steps[0]
    assert isinstance(step, Step) and step == simulate.algorithms.ring_all_reduce(0, 2, 8, 1, 4).steps[0]


def test_a_picture_is_drawn_over_hosts_and_sizes(tmp_path: Path) -> None:
    target = tmp_path / "found.png"
    assert command_line.main(["simulate", "--hosts", "5", "--ranks-per-host", "2", "-e", "64K", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = simulate.Options(cluster(4, 2), "all_reduce", ("ring", "hierarchy"), [1024, 65536])
    alone = simulate.run(wanted)
    monkeypatch.setattr(simulate, "_ALONE_RANKS", 1)
    assert simulate.run(wanted) == alone


# --- against this host ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shm", ["0", "1"])
def test_the_model_is_held_against_real_calls(
    shm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RT_SHM", shm)
    monkeypatch.setattr("bench.measure._SIZE_SECONDS", 0.01)
    target = tmp_path / "found.json"
    assert command_line.main(["simulate", "--here", "-n", "3", "-b", "64K", "-e", "1M", "-f", "16", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert (found["ranks"], found["links"]) == (3, "shm" if shm == "1" else "tcp")
    assert [(row["bytes"], row["algorithm"], len(row["rounds"])) for row in found["rows"]] == [(65536, "owner", 5), (1 << 20, "ring", 5)]
    for row in found["rows"]:
        for each in row["rounds"]:
            assert each["modelled"] / each["measured"] == pytest.approx(each["ratio"])
            assert min(each["send"], each["receive"], each["reduce"], each["call"]) > 0
    assert "3 ranks, blocking, over" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_streams_pass_on_whole_pieces_and_add(kind: str) -> None:
    here, there = socket.socketpair()
    with tempfile.NamedTemporaryFile() as file, here, there:
        file.truncate(streams.stride())
        link: streams.Memory | streams.Sockets
        if kind == "shm":
            link = streams.Memory(file.name, 0, 1)  # alone in the circle: its own right and left
        else:
            link = streams.Sockets(here, there)
        piece = np.arange(link.piece // 4, dtype=np.float32)
        got = np.zeros_like(piece)
        for operand, expected in ((None, piece), (piece, 2 * piece)):
            assert link.receive(got, operand) == 0.0
            sent = received = 0.0
            while not received:
                sent = sent or link.send(piece)
                received = link.receive(got, operand)
            assert sent > 0 and np.array_equal(got, expected)


def test_pieces_that_were_interrupted_do_not_count() -> None:
    assert streams.per_byte([(100, 3e-6), (100, 3e-6), (100, 5e-6), (100, 900e-6)], 1e-6) == pytest.approx((2 + 2 + 4) / 300 * 1e-6)
