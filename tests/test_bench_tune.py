"""``rt.bench tune``: where one algorithm gives way to another, what is measured on real ranks, and what is written and shown.

May live here: tests of ``bench/tune.py`` and of its command. May not: tables by themselves (``test_tuning``). No test here looks at how
fast anything is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import tune
from rt.tuning import ALGORITHMS, LINKS, parse, read, shipped

ABOVE = math.inf
SIZES = [1 << 10, 1 << 12, 1 << 14, 1 << 16]


# --- thresholds ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "rule"),
    [
        ({"a": [1, 1, 1, 1], "b": [2, 2, 2, 2]}, ((ABOVE, "a"),)),
        ({"a": [1, 1, 2, 2], "b": [2, 2, 1, 1]}, ((1 << 13, "a"), (ABOVE, "b"))),
        ({"a": [1, 1, 1, 1], "b": [1.05, 0.97, 1.05, 0.97]}, ((ABOVE, "a"),)),  # noise makes no thresholds
        ({"a": [1, 1, 1, 1], "b": [1.2, 1.2, 1.2, 0.95]}, ((ABOVE, "a"),)),  # what one saves is less than what it costs
        ({"a": [1, 1, 1, 1], "b": [1.2, 1.2, 0.9, 0.9]}, ((1 << 13, "a"), (ABOVE, "b"))),  # what it saves at two sizes is more
        ({"a": [1, 9, 1, 1], "b": [9, 1, 9, 9]}, ((ABOVE, "a"),)),  # one size makes none, however slow it was
        ({"a": [9, 1, 1, 1], "b": [1, 9, 9, 9]}, ((ABOVE, "a"),)),
        ({"a": [1, 1, 1, 9], "b": [9, 9, 9, 1]}, ((ABOVE, "a"),)),
        ({"a": [9, 9, 1, 1], "b": [1, 1, 9, 9]}, ((1 << 13, "b"), (ABOVE, "a"))),
        ({"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}, ((ABOVE, "a"),)),
    ],
)
def test_thresholds_must_pay(ratios: dict[str, list[float]], rule: Any) -> None:
    assert tune.thresholds(SIZES, ratios) == rule


def test_there_may_be_several_thresholds() -> None:
    ratios = {"a": [1, 1, 3, 3, 9, 9], "b": [3, 3, 1, 1, 3, 3], "c": [9, 9, 3, 3, 1, 1]}
    assert tune.thresholds([1 << shift for shift in range(4, 16, 2)], ratios) == ((1 << 7, "a"), (1 << 11, "b"), (ABOVE, "c"))


def test_a_threshold_lies_between_the_sizes_that_were_measured() -> None:
    for low, high, between in ((4096, 16384, 8192), (4096, 8192, 4096), (5456, 10912, 5456), (5456, 21840, 8192), (4, 64, 16)):
        sizes = [low - 1, low, high, high + 1]
        assert tune.thresholds(sizes, {"a": [1, 1, 9, 9], "b": [9, 9, 1, 1]}) == ((between, "a"), (ABOVE, "b"))


def test_one_size_is_enough() -> None:
    assert tune.thresholds([0], {"dissemination": [2.0], "ring": [1.0]}) == ((ABOVE, "ring"),)


# --- ranks ---------------------------------------------------------------------------------------------------------------------------


def test_tables_that_name_one_algorithm_name_each_somewhere() -> None:
    for row, names in ALGORITHMS.items():
        found = [tune.forced(turn, 3).over(shipped()) for turn in range(len(names))]
        assert [table.prefers(row, links, 3, 1 << 30) for table in found for links in LINKS] == [name for name in names for _ in LINKS]


def run(*words: str) -> int:
    return command_line.main(["tune", *words])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.affordable", lambda seconds: 5)


@pytest.mark.usefixtures("quick")
def test_every_algorithm_that_can_be_used_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_SHM", "0")
    data, path = tmp_path / "data.json", tmp_path / "table.json"
    words = ["all_reduce", "all_reduce_wide", "all_gather", "barrier", "-n", "3", "-b", "1K", "-e", "4K", "-J", str(data)]
    assert run(*words, "--output", str(path)) == 0
    measured = json.loads(data.read_text())["measured"]
    assert {row: list(found["seconds"]) for row, found in measured.items()} == {
        "all_reduce": ["doubling", "direct", "owner", "ring"],
        "all_reduce_wide": ["direct", "owner"],  # where all are connected no wide ring fits
        "all_gather": ["direct", "ring"],
        "barrier": ["dissemination", "ring"],
    }
    assert {row: found["bytes"] for row, found in measured.items()} == {
        "all_reduce": [1024, 4096], "all_reduce_wide": [1024, 4096], "all_gather": [336, 1360], "barrier": [0],
    }  # fmt: skip
    for found in measured.values():
        assert found["wrong"] == 0
        assert all(seconds > 0 for times in found["seconds"].values() for seconds in times)
        assert set(next(iter(found["ratios"].values()))) == {1.0}
    table = read(path, "F")
    assert {row: {links: list(rules) for links, rules in by_links.items()} for row, by_links in table.rules.items()} == {
        row: {"tcp": [3]} for row in measured
    }
    assert table.about.startswith("tcp, 3 ranks: ")


@pytest.mark.usefixtures("quick")
def test_a_table_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    path.write_text('{"version": 1, "about": "before", "scan": {"tcp": {"9": {"above": "pipeline"}}}}')
    assert run("broadcast", "-e", "4", "--into", str(path)) == 0
    assert "# broadcast: " in capsys.readouterr().out
    table = read(path, "F")
    assert set(table.rules) == {"scan", "broadcast"}
    assert next(iter(table.rules["broadcast"].values())).keys() == {2}


@pytest.mark.usefixtures("quick")
def test_without_a_file_the_table_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("barrier") == 0
    said = capsys.readouterr()
    assert list(parse(json.loads(said.out), "stdout").rules) == ["barrier"]
    assert "dissemination" in said.err


# --- the command line ----------------------------------------------------------------------------------------------------------------


def test_the_table_in_force_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--show") == 0
    assert f"# shipped with rt, fingerprint {shipped().fingerprint}\n" in capsys.readouterr().out
    path = tmp_path / "mine.json"
    rules = {"2": {"64K": "direct", "above": "owner"}, "3": {"above": "owner"}, "8": {"above": "owner"}, "9": {"above": "ring"}}
    path.write_text(json.dumps({"version": 1, "all_reduce": {"shm": rules}}))
    expected = read(path, "F").over(shipped())
    monkeypatch.setenv("RT_TUNING", str(path))
    for words, source in ((["--show"], f"RT_TUNING {path}"), (["--show", str(path)], str(path))):
        assert run(*words) == 0
        said = capsys.readouterr().out
        assert f"# {source}, fingerprint {expected.fingerprint}\n" in said
        assert "  all_reduce       shm    2           up to 64K direct, above owner\n" in said
        assert "  all_reduce       shm    4 to 8      owner\n" in said
        assert "  all_reduce       shm    9 and more  ring\n" in said
        assert "  barrier          tcp    2 and more  dissemination" in said
    assert run("--show", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"source": f"RT_TUNING {path}", "fingerprint": expected.fingerprint, "table": expected.document()}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["scan"], "'scan' cannot be tuned; expected some of all_reduce, "),
        (["--show", "/nowhere"], "/nowhere: found 'No such file or directory', expected a table of algorithms"),
        (["barrier", "--into", "F", "--output", "F"], "not allowed with"),
    ],
)
def test_mistakes(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2 and found in capsys.readouterr().err
