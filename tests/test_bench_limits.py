"""``rt.bench limits``: the formula with given rates, which passes count, and what is printed.

May live here: tests of ``bench/limits.py`` and ``bench/stream.py``, and of that command. No test here looks at how fast anything is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench import conductor, host, limits, measure
from bench.collectives import COLLECTIVES

PASSES = [[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], [[0.5, 1.5], [1.5, 3.0], [3.0, 4.0]]]


@pytest.mark.parametrize(
    ("ranks", "rates", "seconds"),
    [
        (2, [10.0, 10.0], 20.0),  # 200 bytes at 10 a second
        (2, [10.0, 5.0], 40.0),  # the slower core
        (4, [10.0, 5.0], 80.0),  # which has two ranks
        (3, [10.0, 8.0], 40.0),  # the core with two, though it is the faster one
        (2, [10.0, 8.0, 1.0], 25.0),  # the third has none
    ],
)
def test_bound_is_that_of_the_core_that_needs_longest(ranks: int, rates: list[float], seconds: float) -> None:
    assert limits.bound(100, ranks, rates) == seconds


def test_only_passes_during_which_all_stream_count() -> None:
    assert limits.together(PASSES) == [[1.0, 1.0], [1.0, 1.5]]
    assert limits.rates_of(100, "copy", PASSES) == [200.0, 160.0]
    assert limits.rates_of(100, "add", PASSES) == [300.0, 240.0]


def test_streams_that_do_not_meet_are_an_error() -> None:
    with pytest.raises(conductor.BenchError, match="2 processes that stream 100 bytes did not run at the same time"):
        limits.rates_of(100, "copy", [[[0.0, 1.0], [1.0, 2.0]], [[5.0, 6.0], [6.0, 7.0]]])


def test_streams_are_pinned_one_per_core() -> None:
    cores = limits.cores_of(2)
    with conductor.running("stream", "rt", len(cores), [*limits.STREAM]) as streams:
        answers = streams.ask({"do": "prepare", "bytes": 4096, "cores": cores})
        if hasattr(os, "sched_getaffinity"):
            assert [os.sched_getaffinity(pid) for pid in streams.pids] == [{core} for core in cores]
        assert [answer["pinned"] for answer in answers] == [hasattr(os, "sched_getaffinity")] * len(cores)
        for kind in limits.KINDS:
            for answer in streams.ask({"do": "stream", "kind": kind, "seconds": 0.0}):
                assert len(answer["passes"]) == 3
                assert all(first <= last for first, last in answer["passes"])


def test_percent_is_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lane:
        def cell(self) -> measure.Cell:
            return measure.Cell((((8.0, 8.0), (10.0, 9.0)), ((20.0,), (10.0,)), ((40.0,), (40.0,))), 0)

    size = limits.Size(100, 2, [3, 5])
    size.bounds = [4.5, 10.0, 30.0]  # of 9.5, 20 and 40: the slowest rank of each sample
    size.lanes = {"rt sync": Lane()}  # type: ignore[dict-item]
    size._rates = {"copy": [[1.0, 2.0], [3.0, 2.0]], "add": [[4.0, 4.0]]}
    row = size.row()
    assert row["bound"] == 10.0 and row["must_move"] == 200
    assert row["measured"]["rt sync"]["percent"] == 50.0
    assert row["cores"] == [{"core": 3, "copy": 2.0, "add": 4.0}, {"core": 5, "copy": 2.0, "add": 4.0}]


def test_rows_measure_what_they_say() -> None:
    wanted = measure.Options(COLLECTIVES["all_reduce"], 2, 1 << 16, 1 << 18, 4, iters=limits.ROUNDS, warmup=1)
    rows = limits.run(wanted, measured=True)
    assert [row["bytes"] for row in rows] == [1 << 16, 1 << 18]
    for row in rows:
        assert row["must_move"] == 2 * row["bytes"]
        assert all(core[kind] > 0 for core in row["cores"] for kind in limits.KINDS)
        assert list(row["measured"]) == ["rt sync", "rt async"]
        for found in row["measured"].values():
            assert found["seconds"] > 0 and len(found["percents"]) == limits.ROUNDS
    lines = limits.text(rows).splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith("#")] == [["65536", "131072"], ["262144", "524288"]]
    assert "rt sync us" in limits.text(rows) and "% of bound" in limits.text(rows)


def test_command_prints_bounds_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "ROUNDS", 1)
    target = tmp_path / "found.json"
    assert command_line.main(["limits", "-n", "3", "-b", "4K", "-e", "8K", "-f", "2", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert [(row["bytes"], row["ranks"], row["measured"]) for row in rows] == [(4096, 3, {}), (8192, 3, {})]
    assert len(rows[0]["cores"]) == min(3, host.cores())
    printed = capsys.readouterr().out
    assert "between 3 ranks" in printed and "% of bound" not in printed
    for row in rows:
        assert f"{row['bound'] * 1e6:.1f}" in printed


def test_help_has_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["limits", "--help"])
    assert "bound = max over cores of (bytes the ranks on it must read and write once) / (rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("-n 1", "at least 2"),
        ("-b 2M -e 1M", "-e 1048576 is below -b 2097152"),
        ("-b 1 -e 3", "-e 3 leaves no float"),
        ("-d int8", "unrecognized"),
    ],
)
def test_mistakes_exit_2_and_say_what_was_expected(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["limits", *argv.split()])
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err
