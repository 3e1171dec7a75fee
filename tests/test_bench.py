"""The benchmark measures what it says: protocol, checks, statistics and formats. No test here looks at how fast anything is.

May live here: tests of ``bench``. Those that start peers are skipped where ``make peers`` has not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import all_reduce, conductor, fused, idle, imports, loop_lag, probe, report, worker

OPTIONS = all_reduce.Options(
    size=2, min_bytes=4, max_bytes=256, factor=8, iters=7, warmup=1, fronts=("sync", "async"), peers=(), check=True
)
# What scripts written for nccl-tests look for: size count type redop root, then time algbw busbw #wrong twice.
ROW = re.compile(
    r"^\s*(\d+)\s+(\d+)\s+(\w+)\s+(\w+)\s+(-?\d+)" + r"\s+([\d.]+|N/A)\s+([\d.]+|N/A)\s+([\d.]+|N/A)\s+(\d+|N/A)" * 2 + "$", re.M
)
AVERAGE = re.compile(r"^# Avg bus bandwidth\s*:\s*([\d.]+)", re.M)
OUT_OF_BOUNDS = re.compile(r"^# Out of bounds values\s*:\s*(\d+) (OK|FAILED)", re.M)


def cell(*rounds: tuple[float, ...], wrong: int | None = 0) -> all_reduce.Cell:
    return all_reduce.Cell(rounds, wrong)


def made_up(wrong: int = 0, peers: tuple[str, ...] = ("gloo",)) -> all_reduce.Result:
    """A result whose numbers are known: 1 MiB in 1 ms out of place and 0.5 ms in place, gloo in 3 and 2 ms."""
    size = 1 << 20
    options = all_reduce.Options(4, size, size, 2, None, 5, ("sync",), peers, True)
    ours = all_reduce.Row(size, cell((1e-3, 1e-3), (1e-3,), wrong=wrong), cell((5e-4,), (5e-4,)))
    theirs = all_reduce.Row(size, cell((3e-3,), (3e-3,)), cell((2e-3,), (2e-3,)))
    rows = {"rt sync": [ours], **{peer: [theirs] for peer in peers}}
    return all_reduce.Result(options, rows, {name: [1, 2, 3, 4] for name in rows}, {name: {} for name in rows}, dict.fromkeys(rows, 0.0))


# --- what the worker does ---------------------------------------------------------------------------------------------------------------


class Alone(worker.Adapter):
    """A system of one rank, whose all-reduce is what the test says."""

    def __init__(self, reduce: Callable[[worker.Floats, worker.Floats], None]) -> None:
        super().__init__(0, 1)
        self.reduce = reduce

    def barrier(self) -> None:
        pass

    def bind(self, x: worker.Floats, out: worker.Floats) -> Callable[[], Any]:
        return lambda: self.reduce(x, out)


def measured(reduce: Callable[[worker.Floats, worker.Floats], None], in_place: bool = False) -> worker.Answer:
    command = {"bytes": 4096, "in_place": in_place, "warmup": 2, "samples": 3, "check": True}
    return worker.measure(Alone(reduce), command)


def copy(x: worker.Floats, out: worker.Floats) -> None:
    out[...] = x


@pytest.mark.parametrize("in_place", [False, True])
def test_right_result_has_nothing_wrong_and_warm_up_is_not_counted(in_place: bool) -> None:
    answer = measured(copy, in_place)
    assert answer["wrong"] == 0
    assert len(answer["ns"]) == 3


@pytest.mark.parametrize("in_place", [False, True])
def test_one_wrong_element_is_found(in_place: bool) -> None:
    def off_by_one(x: worker.Floats, out: worker.Floats) -> None:
        out[...] = x
        out[17] += 1

    assert measured(off_by_one, in_place)["wrong"] == 1


def test_nan_is_wrong() -> None:
    assert measured(lambda x, out: out.fill(np.nan))["wrong"] == 1024


def test_result_left_by_an_earlier_call_is_wrong() -> None:
    calls = []

    def only_first(x: worker.Floats, out: worker.Floats) -> None:
        if not calls:
            out[...] = x
        calls.append(1)

    assert measured(only_first)["wrong"] == 1024


def test_in_place_starts_from_fresh_values_each_time() -> None:
    def doubled(x: worker.Floats, out: worker.Floats) -> None:
        assert x[0] == 1
        x *= 2

    assert measured(doubled, in_place=True)["wrong"] == 1024


def test_unchecked_is_none() -> None:
    command = {"bytes": 64, "in_place": False, "warmup": 0, "samples": 1, "check": False}
    assert worker.measure(Alone(copy), command)["wrong"] is None


def test_expected_sum_is_exact_and_tells_swapped_chunks_apart() -> None:
    total = sum(worker.pattern(rank + 1, 5000) for rank in range(4))
    assert worker.count_wrong(np.asarray(total), 4) == 0
    assert worker.count_wrong(np.roll(np.asarray(total), 1024), 4) > 0


# --- conductor and worker ---------------------------------------------------------------------------------------------------------------

_GREET = """
import json, os, sys
def say(answer): print(json.dumps(answer), flush=True)
rank = int(os.environ["BENCH_RANK"])
say({"pid": os.getpid(), "uses": {}})
for line in sys.stdin:
"""


def test_answers_come_in_rank_order_and_surroundings_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_HOSTFILE", "/nowhere")
    monkeypatch.setenv("MLX_RANK", "5")
    monkeypatch.setenv("RT_TIMEOUT", "9")
    script = _GREET + """    say({"idle": [0.0, 1.0], "rank": os.environ["RT_RANK"], "seen": sorted(os.environ)})"""
    with conductor.running("echo", "rt", 3, ["-c", script]) as system:
        answers = system.ask({"do": "anything"})
    assert [answer["rank"] for answer in answers] == ["0", "1", "2"]
    for answer in answers:
        assert not {"RT_HOSTFILE", "MLX_RANK"} & set(answer["seen"])
        assert {"RT_COORDINATOR", "RT_TIMEOUT"} <= set(answer["seen"])


def test_failing_rank_is_named_and_those_that_wait_are_ended() -> None:
    script = _GREET + """    say({"error": "out of luck"}) if rank == 1 else sys.stdin.read()"""
    with pytest.raises(conductor.BenchError, match=r"broken: rank 1 failed\nout of luck"):
        with conductor.running("broken", "rt", 2, ["-c", script]) as system:
            system.ask({"do": "anything"})
    for pid in system.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_rank_that_ends_is_named_with_its_last_words() -> None:
    script = _GREET + """    sys.exit("no room") if rank == 1 else sys.stdin.read()"""
    with pytest.raises(conductor.BenchError, match=r"rank 1 ended with exit code 1\nno room"):
        with conductor.running("broken", "rt", 2, ["-c", script]) as system:
            system.ask({"do": "anything"})


def test_rank_that_never_starts_is_an_error() -> None:
    with pytest.raises(conductor.BenchError, match=r"rank 0 ended with exit code 3"):
        with conductor.running("broken", "rt", 1, ["-c", "raise SystemExit(3)"]):
            pass


def test_worker_answers_an_exception_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os; from bench import worker; channel = worker.Channel(); print('noise'); channel.say({'pid': os.getpid(), 'uses': {}});"
        "channel.serve({'good': lambda command: {'x': command['x']}, 'bad': lambda command: {'x': 1 / 0}})"
    )
    with pytest.raises(conductor.BenchError, match="ZeroDivisionError"):
        with conductor.running("worker", "rt", 1, ["-c", script]) as system:
            assert system.ask({"do": "good", "x": 4}) == [{"x": 4}]
            system.ask({"do": "bad"})


def test_both_front_ends_are_measured_over_real_ranks() -> None:
    result = all_reduce.run(OPTIONS)
    assert list(result.rows) == ["rt sync", "rt async"]
    for rows in result.rows.values():
        assert [row.nbytes for row in rows] == [4, 32, 256]
        for row in rows:
            assert [sum(map(len, each.rounds)) for each in row.cells] == [7, 7]
            assert [len(each.rounds) for each in row.cells] == [all_reduce.ROUNDS] * 2
            assert all(each.wrong == 0 and each.seconds > 0 for each in row.cells)
    assert len(set(result.pids["rt sync"] + result.pids["rt async"])) == 4
    assert result.uses["rt async"]["loop"].split()[0] in ("uvloop", "asyncio")
    assert len(ROW.findall(report.text(result))) == 6


@pytest.mark.skipif(not (conductor.ROOT / ".venv-peers").exists(), reason="no peers here: `make peers` installs them")
def test_peers_are_measured_beside_us_and_return_right_sums() -> None:
    options = all_reduce.Options(2, 64, 64, 2, 5, 1, ("sync",), ("gloo", "mlx"), True)
    result = all_reduce.run(options)
    assert result.wrong == 0
    assert result.rows["mlx"][0].in_place is None
    (compared,) = report.as_json(result)["comparison"]
    assert set(compared["out_of_place"]["ratio"]) == {"gloo", "mlx"}
    assert set(compared["in_place"]["ratio"]) == {"gloo"}


@pytest.mark.parametrize("size", [2, 3])
def test_what_ours_are_held_against_needs_no_peers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_PEERS_PYTHON", "/nowhere/python")
    result = all_reduce.run(all_reduce.Options(size, 4, 1 << 20, 1 << 9, 5, 1, ("sync",), ("nospin", "tcp"), True))
    assert result.wrong == 0
    assert [row.in_place for row in result.rows["tcp"]] == [None, None, None]
    for row in report.as_json(result)["comparison"]:
        assert set(row["out_of_place"]["ratio"]) == {"nospin", "tcp"}
        assert row["out_of_place"]["nwrong"] == {"rt sync": 0, "nospin": 0, "tcp": None}


@pytest.mark.parametrize(("size", "share"), [(2, 300_000), (3, 400_000)])
def test_the_bare_exchange_moves_the_bytes_of_an_all_reduce(size: int, share: int) -> None:
    ends = socket.socketpair(), socket.socketpair()
    lane = worker.Tcp(0, size)
    lane._right, lane._left = ends[0][0], ends[1][0]
    source, target = np.arange(75_000, dtype=np.float32), np.zeros(75_000, np.float32)
    arrived = bytearray()

    def neighbours() -> None:
        ends[1][1].sendall((source.tobytes() * 2)[:share])
        while len(arrived) < share:
            arrived.extend(ends[0][1].recv(1 << 16))

    for end in (lane._right, lane._left):
        end.setblocking(False)
    thread = threading.Thread(target=neighbours)
    thread.start()
    lane.bind(source, target)()
    thread.join()
    assert arrived == (source.tobytes() * 2)[:share]
    assert np.array_equal(target, source)
    for pair in ends:
        for end in pair:
            end.close()


# --- statistics -------------------------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The host is ten times slower in the second round, and hits both: medians over all samples would compare different moments.
    ours = cell((1.0, 1.0, 1.0), (10.0,), (1.0,))
    theirs = cell((2.0,), (20.0, 20.0, 20.0), (3.0,))
    assert theirs.ratio(ours) == 2.0
    assert theirs.seconds / ours.seconds == 20.0


def test_slowest_rank_counts_per_sample() -> None:
    assert all_reduce.slowest([[1_000, 5_000], [3_000, 2_000]]) == (3e-6, 5e-6)
    with pytest.raises(ValueError, match="shorter"):
        all_reduce.slowest([[1, 2], [1]])


@pytest.mark.parametrize("samples", [1, 3, 5, 7, 1000])
def test_samples_are_shared_out_without_loss(samples: int) -> None:
    shares = all_reduce.share_out(samples)
    assert sum(shares) == samples
    assert len(shares) == min(samples, all_reduce.ROUNDS)
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_slow_sizes_still_get_samples_and_fast_ones_not_too_many() -> None:
    assert all_reduce.affordable(10.0) >= 5
    assert all_reduce.affordable(4e-3) == 100
    assert all_reduce.affordable(1e-9) == all_reduce.affordable(1e-8) == 20_000


def test_bus_bandwidth_is_nccl_tests_definition() -> None:
    assert report.bandwidths(2097152, 113.2e-6, 2) == pytest.approx((18.53, 18.53), abs=5e-3)
    assert report.bandwidths(10**9, 1.0, 4) == pytest.approx((1.0, 1.5))


# --- formats ----------------------------------------------------------------------------------------------------------------------------


def test_text_is_read_by_what_reads_nccl_tests() -> None:
    text = report.text(made_up())
    (row,) = ROW.findall(text)
    assert row == ("1048576", "262144", "float", "sum", "-1", "1000.0", "1.05", "1.57", "0", "500.0", "2.10", "3.15", "0")
    assert OUT_OF_BOUNDS.findall(text) == [("0", "OK")]
    assert [float(average) for average in AVERAGE.findall(text)] == pytest.approx([2.359296], abs=1e-4)
    assert "# Collective test concluded: all_reduce_perf" in text.splitlines()


def test_columns_end_below_their_titles() -> None:
    lines = report.text(made_up()).splitlines()
    assert f"#{' ' * 62}out-of-place{' ' * 23}in-place" in lines
    titles = next(line for line in lines if re.match(r"#\s+size\s+count", line))
    row = next(line for line in lines if ROW.match(line))
    assert [match.end() for match in re.finditer(r"\S+", titles[1:])] == [match.end() - 1 for match in re.finditer(r"\S+", row)]


@pytest.mark.parametrize(("value", "shown"), [(93.349, "  93.35"), (113.24, "  113.2"), (9999.4, " 9999.4"), (12345.6, "  12346")])
def test_numbers_keep_their_column(value: float, shown: str) -> None:
    assert report.number(value, 7) == shown


def test_what_a_system_cannot_do_is_not_a_number() -> None:
    result = made_up(peers=())
    result.rows["rt sync"][0] = all_reduce.Row(1 << 20, None, cell((1e-3,), wrong=None))
    (row,) = ROW.findall(report.text(result))
    assert row[5:] == ("N/A", "N/A", "N/A", "N/A", "1000.0", "1.05", "1.57", "N/A")


def test_comparison_shows_medians_and_ratios() -> None:
    lines = report.comparison(made_up())
    for heading, numbers in (("# Out of place", [1048576, 1000.0, 3000.0, 3.0]), ("# In place", [1048576, 500.0, 2000.0, 4.0])):
        start = next(index for index, line in enumerate(lines) if line.startswith(heading))
        titles, row = [line for line in lines[start:] if not line.startswith("# gloo")][1:3]
        assert re.split(r"\s{2,}", titles) == ["#", "size (B)", "rt sync (us)", "gloo (us)", "gloo/sync"]
        assert [float(word) for word in row.split()] == numbers
    assert any("gloo reduces in place only" in line for line in lines)


def test_peer_that_burns_the_core_between_turns_is_reported() -> None:
    result = made_up()
    result.idle_shares["gloo"] = 0.9
    assert "# warning: gloo used 90% of a core per rank between its turns" in report.text(result)


def test_json_mirrors_the_table() -> None:
    found = json.loads(json.dumps(report.as_json(made_up(wrong=3))))
    assert {"config", "devices", "results", "out_of_bounds", "average_bus_bandwidth", "errors"} <= set(found)
    assert found["out_of_bounds"] == {"count": 3, "okay": False}
    assert found["average_bus_bandwidth"]["bandwidth"] == pytest.approx(2.359296)
    assert [device["rank"] for device in found["devices"]] == [0, 1, 2, 3]
    (row,) = found["results"]
    assert (row["size"], row["count"], row["type"], row["redop"], row["root"]) == (1048576, 262144, "float", "sum", -1)
    assert row["out_of_place"]["time"] == pytest.approx(1000.0)
    assert row["out_of_place"]["nwrong"] == 3
    assert row["in_place"]["alg_bw"] == pytest.approx(2.097152)
    assert found["comparison"][0]["out_of_place"]["ratio"] == {"gloo": {"rt sync": pytest.approx(3.0)}}
    assert found["comparison"][0]["in_place"]["ratio"] == {"gloo": {"rt sync": pytest.approx(4.0)}}


# --- command line -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "count"), [("4", 4), ("64K", 65536), ("1m", 1 << 20), ("2G", 2 << 30), ("8KB", 8192)])
def test_byte_counts(word: str, count: int) -> None:
    assert command_line.byte_count(word) == count


@pytest.mark.parametrize("word", ["", "x", "3", "-4", "1.5M", "64T"])
def test_wrong_byte_counts_are_refused(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        command_line.byte_count(word)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["all_reduce", "-n", "1"], "at least 2"),
        (["all_reduce", "-b", "64", "-e", "16"], "-e 16 is below -b 64"),
        (["all_reduce", "--front", "sync,both"], "'both' is unknown; known: sync, async"),
        (["all_reduce", "--iters", "few"], "found 'few'"),
        (["nothing"], "invalid choice"),
        ([], "required"),
    ],
)
def test_mistakes_exit_2_and_say_what_was_expected(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(argv)
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["all_reduce", "loop_lag", "idle", "fused", "import"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_missing_peers_are_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RT_PEERS_PYTHON", "/nowhere/python")
    monkeypatch.setattr(all_reduce, "run", lambda options: pytest.fail("started"))
    assert command_line.main(["all_reduce", "--peers", "gloo"]) == 1
    assert re.search(r"/nowhere/python does not exist; `make peers`", capsys.readouterr().err)


def test_wrong_results_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(all_reduce, "run", lambda options: made_up(wrong=2))
    assert command_line.main(["all_reduce"]) == 1
    assert OUT_OF_BOUNDS.findall(capsys.readouterr().out) == [("2", "FAILED")]


def test_json_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(all_reduce, "run", lambda options: made_up())
    assert command_line.main(["all_reduce", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["results"][0]["size"] == 1048576
    assert ROW.search(printed.err)
    assert command_line.main(["all_reduce", "--json", str(tmp_path / "found.json")]) == 0
    assert ROW.search(capsys.readouterr().out)
    assert json.loads((tmp_path / "found.json").read_text())["out_of_bounds"]["okay"] is True


def test_defaults_are_what_the_help_says() -> None:
    arguments = command_line.parser().parse_args(["all_reduce"])
    options = command_line._options(arguments)
    assert options == all_reduce.Options(2, 4, 64 << 20, 4, None, 5, ("sync", "async"), (), True)
    assert options.sizes[0] == 4 and options.sizes[-1] == 64 << 20


# --- what is watched rather than timed --------------------------------------------------------------------------------------------------


def test_ticker_sees_a_callback_that_holds_the_loop() -> None:
    async def held() -> list[float]:
        ticker = probe.Ticker()
        ticker.start()
        done = asyncio.Event()

        def hold() -> None:
            time.sleep(0.05)  # what is measured, not a way to wait
            done.set()

        asyncio.get_running_loop().call_soon(hold)
        await done.wait()
        ticker.stop()
        return ticker.late

    late = asyncio.run(held())
    assert max(late) >= 0.045
    assert probe.summary(late)["max_us"] >= 45_000


def test_who_sleeps_in_which_scene() -> None:
    who = {scene: [rank for rank in range(3) if probe.sleeps(scene, rank)] for scene in idle.SCENES}
    assert who == {"nothing": [0, 1, 2], "ahead": [1], "broadcast": [0]}


def test_idle_covers_every_scene_in_both_front_ends() -> None:
    rows = idle.run(2, seconds=0.1)
    assert [(row["front"], row["scene"]) for row in rows] == [(front, scene) for front in ("sync", "async") for scene in idle.SCENES]
    assert all(row["worst"] == max(row["shares"]) and len(row["shares"]) == 2 and row["seconds"] >= 0.1 for row in rows)
    assert idle.text(rows).count("\n  ") == 6


def test_loop_lag_covers_every_scene_on_every_loop() -> None:
    rows = loop_lag.run(2, 1 << 16, small_seconds=0.1)
    assert [row["scene"] for row in rows] == ["baseline", "busy", "large", "small"] * len(loop_lag.loops())
    assert all(row["calls"] > 1 and row["fired"] > 0 for row in rows if row["scene"] == "small")
    assert "asyncio" in {row["loop"] for row in rows}
    assert all(row["calls"] >= 1 for row in rows if row["scene"] == "large")
    assert loop_lag.text(rows).count("\n  ") == len(rows)


def test_reduction_too_short_for_the_timer_has_no_lateness() -> None:
    row = {"loop": "asyncio", "scene": "large", "bytes": 1 << 20, "seconds": 0.0, **probe.summary([]), "calls": 1, "took": 1e-4}
    assert loop_lag.text([row]).splitlines()[-1].split()[-4:] == ["0", "-", "-", "-"]


def test_fused_compares_three_ways_in_both_front_ends() -> None:
    rows = fused.run(2, arrays=3, repeats=2)
    assert [row["front"] for row in rows] == ["sync", "async"]
    assert all(row[way] > 0 for row in rows for way in ("one", "fused", "average"))
    assert fused.text(rows).count("\n  ") == 2 and "3 float32 arrays of 1024 bytes over 2 ranks" in fused.text(rows)


def test_import_is_timed_in_fresh_interpreters() -> None:
    rows = imports.run(repeats=1)
    assert [row["statement"] for row in rows] == list(imports.STATEMENTS)
    assert " ms" in imports.text(rows)
