"""What ``rt.bench`` prints and writes, held against the programs whose forms it takes and against the scripts that read those.

May live here: tests of ``bench/report.py``, ``nccl.py``, ``formats.py``, ``plot.py`` and ``readme.py``, on made-up numbers. May not:
measuring.

The readers are what people run on nccl-tests' output, each written from the source it names; what they find there they must find here.
"""

# ruff: noqa: UP031  # the forms are printf formats, and are held against as such

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bench import formats, measure, nccl, plot, readme, report, samples
from bench.collectives import COLLECTIVES

# printf formats of nccl-tests 2.19.6, src/util.cu, by which its lines are made
CONFIG = (
    "# nThread %d nGpus %d minBytes %d maxBytes %d step: %d(%s) warmup iters: %d iters: %d agg iters: %d validation: %d graph: %d "
    "unalign: %d"
)
DEVICE = "#  Rank %2d Group %2d Pid %6d on %10s device %2d [%s] %s"
PREAMBLE = "%12d  %12d  %8s  %6s  %6s"
BODY = "  %7s  %6s  %6s  %6g"
BODY_UNCHECKED = "  %7s  %6s  %6s    N/A"
PER_ITER = "  %7s  %7s  %7s  %7s"
TITLES = (
    "# %10s  %12s  %8s  %6s  %6s           out-of-place                       in-place          " % (("",) * 5),
    "# %10s  %12s  %8s  %6s  %6s  %7s  %6s  %6s  %6s  %7s  %6s  %6s  %6s %0s"
    % ("size", "count", "type", "redop", "root", *("time", "algbw", "busbw", "#wrong") * 2, ""),
    "# %10s  %12s  %8s  %6s  %6s  %7s  %6s  %6s  %6s  %7s  %6s  %6s  %6s %0s"
    % ("(B)", "(elements)", "", "", "", *("(us)", "(GB/s)", "(GB/s)", "") * 2, ""),
)
STATS_TITLE = "# %10s  %12s  %8s  %6s  %6s  " % ("size", "count", "type", "redop", "root") + "  ".join(
    ["%7s  %6s  %6s  %6s  %7s  %7s  %7s  %7s" % ("time", "algbw", "busbw", "#wrong", "i_min", "i_max", "i_p99", "i_cv%")] * 2
)


def cell(*rounds: tuple[float, ...], wrong: int | None = 0) -> samples.Cell:
    """Two ranks, the second a little ahead of the first."""
    return samples.Cell(tuple((samples, tuple(sample * 0.9 for sample in samples)) for samples in rounds), wrong)


def made_up(
    name: str = "all_reduce", *, wrong: int | None = 0, peers: tuple[str, ...] = ("gloo",), count: int = 1 << 18, **options: Any
) -> measure.Result:
    """Two ranks on two hosts; ours in 1 ms out of place, 0.5 ms in place and 2 ms without out=, the async front end in twice that."""
    wanted = measure.Options(COLLECTIVES[name], 2, min_bytes=1 << 20, max_bytes=1 << 20, peers=peers, **options)
    cells = {"out_of_place": cell((1e-3, 1e-3), (1e-3,), wrong=wrong), "in_place": cell((5e-4,), (5e-4,)), "fresh": cell((2e-3,))}
    offered = wanted.collective.places("rt")
    ours = {place: cells[place] for place in offered}
    slower = {place: samples.Cell(_doubled(found.rounds), found.wrong) for place, found in ours.items()}
    theirs = {"out_of_place": cell((3e-3,), (3e-3,)), "in_place": cell((2e-3,), (2e-3,))}
    rows = {"rt sync": [measure.Row(count, ours, "ring")], "rt async": [measure.Row(count, slower, "ring")]}
    rows |= {peer: [measure.Row(count, theirs, None)] for peer in peers}
    about = {"cpu": "A CPU", "kernel": "Linux 6", "uses": {"python": "3"}}
    greetings = [{"pid": 70 + rank, "host": f"node{rank}", "links": {str(1 - rank): "tcp 10.0.0.1:5"}, **about} for rank in range(2)]
    return measure.Result(wanted, rows, dict.fromkeys(rows, greetings), dict.fromkeys(rows, 0.0))


def _doubled(rounds: tuple[tuple[tuple[float, ...], ...], ...]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(2 * sample for sample in samples) for samples in ranks) for ranks in rounds)


# --- nccl-tests, to the column ------------------------------------------------------------------------------------------------------------


def test_lines_are_what_nccl_tests_printf_makes() -> None:
    lines = report.text([made_up()]).split("\n")
    assert CONFIG % (1, 0, 1 << 20, 1 << 20, 4, "factor", 5, 0, 1, 1, 0, 0) in lines
    assert DEVICE % (1, 0, 71, "node1", 0, "cpu", "A CPU") in lines
    at = lines.index(TITLES[0])
    assert tuple(lines[at : at + 3]) == TITLES
    half = BODY % ("1000.00", "  1.05", "  1.05", 0)
    assert lines[at + 3] == PREAMBLE % (1 << 20, 1 << 18, "float", "sum", "%6i" % -1) + half + BODY % (" 500.00", "  2.10", "  2.10", 0)
    assert lines[at + 4] == "# %-20s : %d %s" % ("Out of bounds values", 0, "OK")
    assert lines[at + 5] == "# %-20s : %g %s" % ("Avg bus bandwidth", 1.572864, "")
    assert lines[at + 6 : at + 9] == ["#", "# Collective test concluded: all_reduce_perf", "#"]
    assert lines[-1] == ""
    assert lines[lines.index("# Using devices") - 1] == "#" == lines[at - 1]


def test_a_line_of_nccl_tests_comes_out_again() -> None:
    # an all_reduce_perf of 2 ranks, as a computing centre shows it in its guide
    real = "     2097152        524288     float     sum      -1   355.53    5.90    5.90       0   361.77    5.80    5.80       0"
    result = made_up(count=524288)
    result.rows["rt sync"][0] = measure.Row(524288, {"out_of_place": cell((355.53e-6,)), "in_place": cell((361.77e-6,))})
    assert real in report.text([result]).splitlines()


@pytest.mark.parametrize("check", [True, False])
def test_rooted_unreduced_and_unchecked_rows(check: bool) -> None:
    result = made_up("broadcast", wrong=0 if check else None, check=check, root=1, dtype="half", count=1 << 19)
    body = (BODY % ("1000.00", "  1.05", "  1.05", 0)) if check else (BODY_UNCHECKED % ("1000.00", "  1.05", "  1.05"))
    row = PREAMBLE % (1 << 20, 1 << 19, "half", "none", "%6i" % 1) + body
    assert row in [line[: len(row)] for line in report.text([result]).splitlines()]
    assert f"validation: {int(check)} " in report.text([result])


def test_stats_are_nccl_tests_per_iteration_columns() -> None:
    lines = report.text([made_up()], stats=True).splitlines()
    assert STATS_TITLE + " " in lines
    row = next(line for line in lines if re.match(r"\s+1048576 ", line))
    assert row.endswith(BODY % (" 500.00", "  2.10", "  2.10", 0) + PER_ITER % (" 500.00", " 500.00", " 500.00", "   0.00"))
    assert len(row.split()) == 21


@pytest.mark.parametrize(
    ("value", "width", "shown"),
    [  # getFloatStr of src/util.cu: %.2f, %.1f, %.0f, whichever fits first, else an exponent
        (93.349, 7, "  93.35"), (9999.99, 7, "9999.99"), (12345.6, 7, "12345.6"), (123456.7, 7, " 123457"), (99999999.0, 7, "1.0e+08"),
        (999.99, 6, "999.99"), (1234.56, 6, "1234.6"), (12345678.0, 6, " 1e+07"),
    ],
)  # fmt: skip
def test_numbers_fit_their_column(value: float, width: int, shown: str) -> None:
    assert nccl.number(value, width) == shown


def test_what_is_not_offered_is_not_a_number() -> None:
    (row,) = [line for line in report.text([made_up("barrier", count=0)]).splitlines() if re.match(r"\s+0 ", line)]
    assert row.split()[9:] == ["N/A"] * 4
    assert row.endswith(BODY_UNCHECKED % (("N/A",) * 3))


def test_wrong_elements_fail() -> None:
    text = report.text([made_up(wrong=3)])
    assert "# Out of bounds values : 3 FAILED" in text.splitlines()
    assert "# warning: rt sync returned 3 wrong elements" in text


# --- the readers of nccl-tests' text ------------------------------------------------------------------------------------------------------

Found = list[tuple[int, float, float]]  # size, busbw out of place, busbw in place


def superbench(text: str, *, in_place: bool) -> dict[int, tuple[float, float, float]]:
    """microsoft/superbenchmark, cuda_nccl_bw_performance.py: between two lines, columns by their titles, counted from the end."""
    lines = text.splitlines()
    start = max(index for index, line in enumerate(lines) if "out-of-place" in line)
    end = max(index for index, line in enumerate(lines) if "Out of bounds values" in line)
    body = lines[start + 1 : end]
    titles = re.sub(r" +", " ", next(line for line in body if "time" in line and "busbw" in line)[1:].strip(" ")).split(" ")
    size = titles.index("size")
    if in_place:
        wanted = [-1 - titles[::-1].index(title) for title in ("busbw", "algbw", "time")]
    else:
        wanted = [titles.index(title) - len(titles) for title in ("busbw", "algbw", "time")]
    found = {}
    for line in body:
        words = re.sub(r" +", " ", line.strip(" ")).split(" ")
        if re.match(r"\d+", words[0]):
            found[int(words[size])] = tuple(float(words[index]) for index in wanted)
    return found  # type: ignore[return-value]


def cloudai(text: str) -> tuple[Found, dict[str, int]]:
    """NVIDIA/cloudai, nccl_test/performance_report_generation_strategy.py: lines of 13 words that begin with a digit; devices by host."""
    rows = [re.split(r"\s+", line.strip()) for line in text.splitlines() if re.match(r"^\d", line.strip())]
    hosts = [re.search(r"on\s+([\w\d\-.]+)\s+device\s+(\d+)", line) for line in text.splitlines() if "Rank" in line and "device" in line]
    devices = {match[1]: int(match[2]) for match in hosts if match}
    return [(int(row[0]), float(row[7]), float(row[11])) for row in rows if len(row) == 13], devices


def node_agent(text: str) -> Found:
    """A node agent's reader in TypeScript: N/A is possible among #wrong only."""
    row = re.compile(
        r"^\s*(\d+)\s+(\d+)\s+\w+\s+\w+\s+[-\d]+\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\d+|N\/A)"
        r"\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\d+|N\/A)",
        re.M,
    )
    return [(int(match[1]), float(match[5]), float(match[9])) for match in row.finditer(text)]


def probe_report(text: str) -> Found:
    """A cluster probe's reader in Python."""
    row = (
        r"^\s*(\d+)\s+(\d+)\s+(\w+)\s+(\w+)\s+(-?\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\S+)"
        r"\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\S+)"
    )
    matches = [match for line in text.splitlines() if (match := re.match(row, line))]
    return [(int(match[1]), float(match[8]), float(match[12])) for match in matches]


AVERAGES = {
    "GoogleCloudPlatform/PerfKitBenchmarker, nccl_benchmark.py": r"Avg bus bandwidth\s+: ([0-9\.]+)",
    "a health check of GPU clusters on Kubernetes": r"# Avg bus bandwidth\s*:\s*(\d+)",
    "ROCm/cvs, rccl_lib.py": r"#\sAvg bus bandwidth\s+:\s+([0-9\.]+)",
    "a sweep over NCCL's algorithms": r"Avg bus bandwidth\s*:\s*([\d.]+)",
}


@pytest.mark.parametrize("name", [name for name in COLLECTIVES if name != "barrier"])
def test_readers_of_rows_find_ours_and_nothing_else(name: str) -> None:
    collective = COLLECTIVES[name]
    count = (1 << 17) if any(collective.blocks) else 1 << 18
    result = made_up(name, count=count, peers=("gloo", "nospin"))
    text = report.text([result])
    busbw = [round(nccl.bandwidths(result, count, seconds)[1], 2) for seconds in (1e-3, 5e-4)]
    expected = [(1 << 20, *busbw)]
    assert cloudai(text) == (expected, {"node0": 0, "node1": 0})
    assert node_agent(text) == probe_report(text) == expected
    assert {size: numbers[0] for size, numbers in superbench(text, in_place=False).items()} == {1 << 20: busbw[0]}
    assert superbench(text, in_place=True) == {1 << 20: (busbw[1], 2.1, 500.0)}
    assert len([line for line in text.splitlines() if "device" in line and "Rank" in line]) == 2  # how an agent counts devices


@pytest.mark.parametrize("where", list(AVERAGES))
def test_readers_of_the_average_find_it_once(where: str) -> None:
    text = report.text([made_up(peers=("gloo", "nospin"))])
    assert [float(found) for found in re.findall(AVERAGES[where], text)] in ([1.57286], [1.0])
    assert [line.split()[-1] for line in text.splitlines() if "# Avg bus bandwidth" in line] == ["1.57286"]  # FlagPerf: awk '{print $NF}'


def test_readers_of_stats_find_the_same_numbers_by_title() -> None:
    assert superbench(report.text([made_up()], stats=True), in_place=False) == {1 << 20: (1.05, 1.05, 1000.0)}


def test_every_line_that_nccl_tests_lacks_is_a_comment() -> None:
    text = report.text([made_up(peers=("gloo", "tcp"))], stats=True)
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) == 1
    assert re.findall(r"^# Out of bounds values\s*:\s*(\d+) (OK|FAILED)", text, re.M) == [("0", "OK")]


def test_device_lines_are_read_back_as_nccl_tests_reads_its_own() -> None:
    # parseRankInfo of src/util.cu, a sscanf
    line = re.compile(r"#\s*Rank\s*(\d+)\s*Group\s*(\d+)\s*Pid\s*(\d+)\s*on\s*(\S+)\s*device\s*(\d+)\s*\[([^\]]+)\]\s*([^\n]+)")
    rest = ("0", "cpu", "A CPU")
    assert line.findall(report.text([made_up()])) == [("0", "0", "70", "node0", *rest), ("1", "0", "71", "node1", *rest)]


def test_rows_of_several_dtypes_stand_in_one_table() -> None:
    results = [made_up(peers=(), wrong=2), made_up(peers=(), dtype="half", op="max", count=1 << 19)]
    lines = report.text(results).splitlines()
    rows = [line.split()[:5] for line in lines if line.startswith(" ")]
    assert rows == [["1048576", "262144", "float", "sum", "-1"], ["1048576", "524288", "half", "max", "-1"]]
    assert "# Out of bounds values : 2 FAILED" in lines and "# Avg bus bandwidth    : 1.57286 " in lines
    assert [line for line in lines if line in ("# float sum", "# half max")] == ["# float sum", "# half max"]
    found = json.loads(json.dumps(report.as_json(results, datetime(2026, 1, 2, 3, 4, 5))))
    assert [(row["type"], row["redop"]) for row in found["results"]] == [("float", "sum"), ("half", "max")]
    assert [(row["type"], row["redop"]) for row in found["rt"]["systems"]["rt async"]["results"]] == [("float", "sum"), ("half", "max")]


# --- nccl-tests' JSON ---------------------------------------------------------------------------------------------------------------------


def document(result: measure.Result, *, stats: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(report.as_json([result], datetime(2026, 1, 2, 3, 4, 5), stats=stats)))
    return found


def test_json_has_nccl_tests_keys_in_its_order_and_its_types() -> None:
    found = document(made_up(wrong=3))
    keys = ["version", "start_time", "args", "env", "nccl_version", "config", "results", "out_of_bounds", "average_bus_bandwidth", "errors"]
    assert list(found) == [*keys, "end_time", "rt"]
    assert found["start_time"] == "2026-01-02 03:04:05"
    assert list(found["config"]) == [
        "nthreads", "ngpus", "minimum_bytes", "maximum_bytes", "step_factor", "warmup_iters", "iterations", "aggregated_iterations",
        "validation", "graph", "blocking_collectives", "per_iter_timing", "per_iter_skip", "parallel_init", "devices",
    ]  # fmt: skip
    assert list(found["config"]["devices"][1]) == ["rank", "group", "pid", "hostname", "device", "device_hex", "device_info"]
    (row,) = found["results"]
    assert list(row) == ["size", "count", "type", "redop", "root", "out_of_place", "in_place", "actual_iterations", "experiment_name"]
    assert (row["size"], row["count"], row["type"], row["redop"], row["root"]) == (1 << 20, 1 << 18, "float", "sum", "    -1")
    assert row["out_of_place"] == pytest.approx({"time": 1000.0, "alg_bw": 1.048576, "bus_bw": 1.048576, "nwrong": 3.0})
    assert found["out_of_bounds"] == {"count": 3, "okay": "false"}
    assert found["average_bus_bandwidth"] == {"bandwidth": pytest.approx(1.572864), "okay": "unchecked"}


def test_readers_of_json_find_what_they_ask_for() -> None:
    found = document(made_up())
    # profilers of training runs: a curve of bus bandwidth, and the number of devices
    assert [(row["size"], round(row["out_of_place"]["bus_bw"], 3)) for row in found["results"]] == [(1 << 20, 1.049)]
    assert len(found["config"]["devices"]) == 2
    assert all(row["out_of_place"]["nwrong"] == 0 for row in found["results"])


def test_per_iteration_json_is_what_nccl_tests_own_analysis_reads() -> None:
    # tools/analyze_perf_json.py of nccl-tests: spread per size, and stragglers and spikes from the rows of the processes
    (row,) = document(made_up(), stats=True)["results"]
    times = row["out_of_place_per_iter"]
    assert times["max_us"] / times["avg_us"] == pytest.approx(1.0)
    assert {"min_us", "p50_us", "p95_us", "p99_us", "stdev_us", "cv_pct", "skipped_iterations"} < set(times)
    assert times["times_us"] == [max(samples) for samples in zip(*times["per_process_max_times_us"], strict=True)]
    assert len(times["per_process_max_times_us"]) == 2


def test_json_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_SECRET", "hush, hush, hush, hush")
    monkeypatch.setenv("RT_TIMEOUT", "9")
    monkeypatch.setenv("PRIVATE", "mine")
    text = json.dumps(document(made_up()))
    assert "hush" not in text and "PRIVATE" not in text
    assert "RT_TIMEOUT=9" in text


def test_what_nccl_tests_has_no_place_for_stands_under_one_key() -> None:
    ours = document(made_up())["rt"]
    assert ours["systems"].keys() == {"rt sync", "rt async", "gloo"}
    (row,) = ours["systems"]["gloo"]["results"]
    assert row["out_of_place"]["ratio"] == {"rt sync": pytest.approx(3.0), "rt async": pytest.approx(1.5)}
    assert row["in_place"]["ratio"]["rt sync"] == pytest.approx(4.0)
    (row,) = ours["systems"]["rt sync"]["results"]
    assert row["fresh"]["time"] == pytest.approx(2000.0)
    assert row["algorithm"] == "ring"
    assert ours["systems"]["rt sync"]["links"] == [{"1": "tcp 10.0.0.1:5"}, {"0": "tcp 10.0.0.1:5"}]


# --- our own lines ------------------------------------------------------------------------------------------------------------------------


def test_systems_stand_side_by_side_with_ratios_and_algorithm() -> None:
    lines = report.text([made_up()]).splitlines()
    for heading, titles, numbers in (
        ("# Out of place", ["rt sync (us)", "rt async (us)", "gloo (us)", "gloo/sync", "gloo/async"], [1000.0, 2000.0, 3000.0, 3.0, 1.5]),
        ("# In place", ["rt sync (us)", "rt async (us)", "gloo (us)", "gloo/sync", "gloo/async"], [500.0, 1000.0, 2000.0, 4.0, 2.0]),
        ("# Without out=", ["rt sync (us)", "rt async (us)"], [2000.0, 4000.0]),
    ):
        start = next(index for index, line in enumerate(lines) if line.startswith(heading))
        assert re.split(r"\s{2,}", lines[start + 1]) == ["#", "size (B)", *titles, "algorithm"]
        assert lines[start + 2].split()[:2] == ["#", "1048576"]
        assert [float(word) for word in lines[start + 2].split()[2:-1]] == numbers
        assert lines[start + 2].split()[-1] == "ring"
    assert any("gloo does this in place only" in line for line in lines)


def test_header_says_hosts_and_links() -> None:
    lines = report.text([made_up()]).splitlines()
    assert "# host node1: ranks 1; A CPU; Linux 6" in lines
    assert "# links, tcp: all pairs" in lines


def test_links_that_differ_are_told_apart() -> None:
    result = made_up()
    links = [{"1": "tcp 127.0.0.1:1", "2": "relayed"}, {"0": "tcp 127.0.0.1:1", "2": "tcp 10.0.0.2:1"}, {}]
    template = result.greetings["rt sync"][0]
    result.greetings["rt sync"] = [{**template, "host": f"h{rank // 2}", "links": links[rank]} for rank in range(3)]
    notes = report.notes(result)
    assert ["# links, tcp within a host: 0-1", "# links, relayed: 0-2", "# links, tcp: 1-2"] == [note for note in notes if "links" in note]
    assert "# host h0: ranks 0 1; A CPU; Linux 6" in notes


def test_peer_that_burns_the_core_between_turns_is_reported() -> None:
    result = made_up()
    result.idle_shares["gloo"] = 0.9
    assert "# warning: gloo used 90% of a core per rank between its turns" in report.text([result])


# --- OSU and gloo -------------------------------------------------------------------------------------------------------------------------


def test_osu_form() -> None:
    # print_preamble and print_stats of osu_util_mpi.c: "%-*s%*s" and "%-*d%*.*f" in fields of 10 and 20
    lines = report.text([made_up()], "osu").split("\n")
    assert lines[0] == ""
    assert re.fullmatch(r"# OSU MPI-style Allreduce Latency Test v\S+", lines[1])
    assert lines[2:] == ["%-10s%20s" % ("# Size", "Avg Latency(us)"), "%-10d%20.2f" % (1 << 20, 1000.0)]
    full = report.text([made_up()], "osu", stats=True).split("\n")
    assert full[2].split("  ")[-1] == "Iterations"
    assert full[3] == "%-10d%20.2f%20.2f%20.2f%12d" % (1 << 20, 1000.0, 1000.0, 1000.0, 3)
    # how ReFrame's checks read it
    assert re.search(r"^1048576\s+(?P<latency>\S+)", report.text([made_up()], "osu"), re.M)


@pytest.mark.parametrize("name", ["all_gather", "all_to_all", "gather", "scatter", "reduce_scatter"])
def test_osu_sizes_are_osus(name: str) -> None:
    size = 1 << 20 if name == "reduce_scatter" else 1 << 19
    assert report.text([made_up(name, count=1 << 17)], "osu").split("\n")[-1].split()[0] == str(size)


def test_osu_barrier_has_no_size() -> None:
    assert report.text([made_up("barrier", count=0)], "osu").split("\n")[2:] == ["# Avg Latency(us)", "%17.2f" % 1000.0]


def test_the_table_of_gloo_names_the_links_there_were() -> None:
    result = made_up()
    assert "Device:      tcp, rt sync" in report.text([result], "gloo")
    result.greetings["rt sync"] = [{"links": {"1": "shm", "2": "tcp 10.0.0.2:1"}}, {"links": {"0": "shm"}}]
    assert "Device:      shm and tcp, rt sync" in report.text([result], "gloo")


def test_gloo_form() -> None:
    lines = report.text([made_up()], "gloo").split("\n")
    assert lines[0] == "=" * 100 == lines[6]
    assert lines[1] == "%54s" % "ALL_REDUCE"
    assert lines[7] == "%57s" % "BENCHMARK RESULTS"
    titles = ("size (B)", "elements", "min (us)", "p50 (us)", "p99 (us)", "max (us)", "bandwidth (GB/s)", "iterations")
    assert lines[9] == "%11s%11s%11s%11s%11s%11s%19s%13s" % titles
    assert lines[10] == "%11d%11d%11d%11d%11d%11d%19.3f%13d" % (1 << 20, 1 << 18, 1000, 1000, 1000, 1000, 1e3 / 1024, 3)


@pytest.mark.parametrize("shape", ["osu", "gloo"])
def test_wrong_elements_show_in_other_forms(shape: str) -> None:
    assert report.text([made_up(wrong=3)], shape).endswith("# 3 wrong elements")
    assert formats.osu(made_up(), stats=False)[-1] != "# 0 wrong elements"


# --- the picture --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all_reduce", "barrier"])
def test_picture_is_drawn(name: str, tmp_path: Path) -> None:
    plot.draw(made_up(name), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


# --- README -------------------------------------------------------------------------------------------------------------------------------


def test_readme_has_the_markers_and_only_what_is_between_changes() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    changed = readme.replaced(page, "new")
    before, _, after = changed.partition("<!-- results -->\nnew\n<!-- /results -->")
    assert page.startswith(before) and page.endswith(after) and after
    assert readme.replaced(changed, "new") == changed


@pytest.mark.parametrize(
    "page", ["", "<!-- results -->", "<!-- /results --> <!-- results -->", "<!-- results --> <!-- /results -->" * 2]
)
def test_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        readme.replaced(page, "new")


def test_readme_table_shows_medians_and_ratios() -> None:
    lines = readme.section([made_up(), made_up(peers=())], "docs/all_reduce.png").splitlines()
    assert lines[-3:] == [
        "| bytes | sync, 2 ranks | async | gloo | best/sync | best/async | sync, 2 ranks | async |",
        "|---|---|---|---|---|---|---|---|",
        "| 1 MiB | 1 000 | 2 000 | 3 000 | 3.00 | 1.50 | 1 000 | 2 000 |",
    ]
    assert "![time over size, logarithmic, rt and peers](docs/all_reduce.png)" in lines
