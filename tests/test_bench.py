"""``rt.bench`` as its users meet it: the command line, the conductor and its workers, and what is watched rather than timed.

May live here: tests of ``bench/__main__.py``, ``options.py``, ``conductor.py``, ``worker.py`` and of the commands that watch. May not:
collectives (``test_bench_collectives``), tables (``test_bench_report``), jobs (``test_bench_job``). No test here looks at how fast
anything is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import ranks

import rt
from bench import __main__ as command_line
from bench import conductor, fused, idle, imports, local, loop_lag, measure, meeting, options, probe, simulate, tune
from bench.collectives import COLLECTIVES
from bench.samples import Cell

ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+\w+\s+\w+\s+-?\d+\s+([\d.]+)", re.M)


def made_up(wanted: measure.Options, wrong: int = 0) -> measure.Result:
    """A result as if every size had taken 1 ms in every place."""
    cells = {place: Cell((((1e-3,),) * wanted.size,), wrong) for place in wanted.collective.places("rt")}
    greeting = {"pid": 1, "host": "here", "cpu": "A CPU", "kernel": "Linux", "uses": {}, "links": {}}
    rows = {name: [measure.Row(count, cells, "ring") for count in wanted.counts] for name in wanted.systems}
    return measure.Result(wanted, rows, dict.fromkeys(rows, [greeting] * wanted.size), dict.fromkeys(rows, 0.0))


def parsed(*words: str, job_size: int | None = None) -> measure.Options:
    return options.options(command_line.parser().parse_args(words), job_size)


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


# Starts two ranks as MPI's mpiexec does: it tells each its number, and ends all on SIGTERM or when one fails.
_LAUNCHER = """
import os, signal, subprocess, sys, time
ranks = [subprocess.Popen(sys.argv[1:], env={**os.environ, "FAKE_RANK": str(rank)}) for rank in range(2)]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
try:
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.01)
    sys.exit(max(rank.poll() or 0 for rank in ranks))
finally:
    for rank in ranks:
        rank.kill()
"""
_LAUNCHED = (
    "import os, sys, time; from bench import worker; rank, size = worker.place(); channel = worker.Channel(); print('noise')\n"
    "channel.say({'pid': os.getpid(), 'uses': {}})\n"
    "channel.serve({'rank': lambda command: {'rank': rank, 'size': size}, 'end': lambda command: sys.exit('no room') if rank else {},"
    " 'stay': lambda command: time.sleep(60) if rank else {'error': 'out of luck'}})"
)


def launched(folder: Path, launcher: str = _LAUNCHER) -> conductor.System:
    how = meeting.Launcher((sys.executable, "-c", launcher), "FAKE_RANK", folder)
    return conductor.System("launched", meeting.Meeting(sys.executable, {"PYTHONPATH": str(meeting.ROOT)}, [{}, {}], launcher=how),
                            ["-c", _LAUNCHED])  # fmt: skip


def test_launched_ranks_answer_in_rank_order_and_leave(tmp_path: Path) -> None:
    system = launched(tmp_path)
    try:
        system.start()
        assert system.ask({"do": "rank"}) == [{"rank": 0, "size": 2}, {"rank": 1, "size": 2}]
    finally:
        system.close()
    assert ranks.end_soon(system.pids)


@pytest.mark.parametrize(
    ("command", "match"), [("stay", r"launched: rank 0 failed\nout of luck"), ("end", r"rank 1 ended, and its launcher with exit code 1\n")]
)
def test_launched_ranks_that_fail_are_said_and_all_are_ended(command: str, match: str, tmp_path: Path) -> None:
    system = launched(tmp_path)
    try:
        system.start()
        with pytest.raises(conductor.BenchError, match=match):
            system.ask({"do": command})
        system.kill()
    finally:
        system.close()
    assert ranks.end_soon(system.pids)


def test_launcher_that_cannot_start_is_said_with_its_last_words(tmp_path: Path) -> None:
    system = launched(tmp_path, "import sys; sys.exit('no such option')")
    try:
        with pytest.raises(conductor.BenchError, match=r"launched: rank 0 did not start\nno such option"):
            system.start()
    finally:
        system.close()


def test_worker_answers_an_exception_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os; from bench import worker; channel = worker.Channel(); print('noise'); channel.say({'pid': os.getpid(), 'uses': {}});"
        "channel.serve({'good': lambda command: {'x': command['x']}, 'bad': lambda command: {'x': 1 / 0}})"
    )
    with pytest.raises(conductor.BenchError, match="ZeroDivisionError"):
        with conductor.running("worker", "rt", 1, ["-c", script]) as system:
            assert system.ask({"do": "good", "x": 4}) == [{"x": 4}]
            system.ask({"do": "bad"})


# --- command line -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "count"), [("4", 4), ("64K", 65536), ("1m", 1 << 20), ("2G", 2 << 30), ("8KB", 8192)])
def test_byte_counts(word: str, count: int) -> None:
    assert options.byte_count(word) == count


@pytest.mark.parametrize("word", ["", "x", "0", "-4", "1.5M", "64T"])
def test_wrong_byte_counts_are_refused(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.byte_count(word)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("all_reduce -n 1", "at least 2"),
        ("all_reduce -b 64 -e 16", "-e 16 is below -b 64"),
        ("all_reduce -b 1 -e 3", "-e 3 leaves no float"),
        ("all_gather -n 4 -e 63", "-e 63 leaves no float in each of 4 blocks of whole 16 bytes"),
        ("all_reduce --front sync,both", "'both' is unknown; known: sync, async"),
        ("all_reduce --iters few", "found 'few'"),
        ("all_reduce -f 2 -i 64", "not allowed with"),
        ("all_reduce -d float32", "invalid choice: 'float32'"),
        ("all_reduce -o mean", "invalid choice: 'mean'"),
        ("all_reduce -o avg -d int8", "-o avg: found dtype int8, expected one of half"),
        ("all_reduce -o all --peers nospin,tcp", "-o all: found --peers beside it, expected one dtype and operator there"),
        ("all_gather -d all --format osu", "-d all: found --format osu beside it, expected one dtype and operator there"),
        ("all_reduce -d all -b 4 -e 4", "-e 4 leaves no int64"),
        ("all_reduce -r 0", "unrecognized"),
        ("broadcast -r 2", "-r 2: expected a rank below 2"),
        ("barrier -b 4", "unrecognized"),
        ("broadcast --peers tcp", "--peers: tcp has no broadcast; of the peers, gloo, mpich, openmpi, nospin have"),
        ("nothing", "invalid choice"),
        ("", "required"),
    ],
)
def test_mistakes_exit_2_and_say_what_was_expected(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(argv.split())
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hint"), [("-n 3", "-n 3: found a job of 4 ranks"), ("--peers gloo", "--peers gloo starts ranks of its own")]
)
def test_what_a_job_decides_cannot_be_asked_for(argv: str, hint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(hint)):
        parsed("all_reduce", *argv.split(), job_size=4)
    assert parsed("all_reduce", "-n", "4", job_size=4).size == parsed("all_reduce", job_size=4).size == 4


@pytest.mark.parametrize("command", [*COLLECTIVES, "loop_lag", "idle", "import", "kernels", "limits"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown) > 300
    if command in COLLECTIVES:
        assert COLLECTIVES[command].program in shown
        assert "-n is the number of ranks and --iters that of iterations" in " ".join(shown.split())


def test_nccl_tests_letters_mean_what_they_mean_there() -> None:
    found = parsed(*"reduce_scatter -n 3 -b 1K -e 3K -i 1K -d half -o max -w 2 -c 0 --iters 9 --front async".split())
    assert found == measure.Options(
        COLLECTIVES["reduce_scatter"], 3, 1024, 3072, 4, 1024, 9, 2, "half", "max", 0, ("async",), (), False
    )
    assert [found.nbytes(count) for count in found.counts] == [1008, 2016, 3072]
    assert parsed(*"broadcast -r 1 -f 2".split()).root == 1


def test_defaults_are_what_the_help_says() -> None:
    found = parsed("all_reduce")
    assert found == measure.Options(COLLECTIVES["all_reduce"], 2, 4, 64 << 20, 4, None, None, 5, "float", "sum", 0, ("sync", "async"))
    assert [found.nbytes(count) for count in (found.counts[0], found.counts[-1])] == [4, 64 << 20]


def test_missing_peers_are_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RT_PEERS_PYTHON", "/nowhere/python")
    monkeypatch.setattr(local, "run_each", lambda wanted: pytest.fail("started"))
    assert command_line.main(["all_reduce", "--peers", "gloo"]) == 1
    assert re.search(r"/nowhere/python does not exist; `make peers`", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("peer", "there", "missing"),
    [
        ("mpich", [], "bin/mpiexec.hydra"),
        ("openmpi", [], "bin/ompirun_wrapper"),
        ("mpich", ["bin/mpiexec.hydra"], "lib/libmpi"),
        ("mpich", ["bin/mpiexec.hydra", "lib/libmpi.so.12", "lib/libmpi.12.dylib"], "lib/python*/*-packages/mpi4py"),
    ],
)
def test_missing_mpi_is_said_in_one_line(
    peer: str, there: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ["bin/python", *there]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("RT_PEERS_PYTHON", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(local, "run_each", lambda wanted: pytest.fail("started"))
    assert command_line.main(["all_reduce", "--peers", f"tcp,{peer}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"rt.bench: no {peer} to compare with: there is no {tmp_path}/{missing}")
    assert said.endswith("`make peers` installs it\n") and said.count("\n") == 1


def test_collective_that_this_version_lacks_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(rt, "broadcast")
    assert command_line.main(["broadcast"]) == 1
    assert "this version of rt has no broadcast" in capsys.readouterr().err


def test_wrong_results_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "run_each", lambda wanted: [made_up(*wanted, wrong=2)])
    assert command_line.main(["all_reduce", "-e", "4"]) == 1
    assert "# Out of bounds values : 4 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--json", "-J"])
def test_json_goes_where_it_is_told(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "run_each", lambda wanted: [made_up(*wanted)])
    assert command_line.main(["all_reduce", flag, "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["results"][0]["size"] == 4
    assert ROW.search(printed.err)
    target = tmp_path / "found.json"
    assert command_line.main(["all_reduce", flag, str(target)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"# Writing JSON output to {target}\n")
    assert json.loads(target.read_text())["out_of_bounds"]["okay"] == "true"


@pytest.mark.parametrize(("shape", "hint"), [("nccl", "busbw"), ("osu", "# OSU MPI-style Allreduce"), ("gloo", "BENCHMARK RESULTS")])
def test_formats_are_told_apart(shape: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "run_each", lambda wanted: [made_up(*wanted)])
    assert command_line.main(["all_reduce", "--format", shape, "-e", "4"]) == 0
    assert hint in capsys.readouterr().out


def test_plot_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "run_each", lambda wanted: [made_up(*wanted)])
    assert command_line.main(["all_reduce", "--plot", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("all_reduce --json {}/no/f.json", "--json {}/no/f.json: found 'No such file or directory', expected a file that can be written"),
        ("all_reduce -J {}", "--json {}: found 'Is a directory'"),
        ("all_reduce --plot {}/no/f.png", "--plot {}/no/f.png: found 'No such file or directory'"),
        ("all_reduce --plot {}/f.what", "--plot {}/f.what: found a name that ends in .what, expected one of "),
        ("simulate --plot {}/no/f.png", "--plot {}/no/f.png: found 'No such file or directory'"),
        ("idle --json {}/no/f.json", "--json {}/no/f.json: found 'No such file or directory'"),
        ("tune barrier --into {}/no/f.json", "--into {}/no/f.json: found 'No such file or directory'"),
        ("tune barrier --output {}/no/f.json", "--output {}/no/f.json: found 'No such file or directory'"),
    ],
)
def test_files_that_cannot_be_written_are_said_before_anything_is_measured(
    words: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, start in ((local, "run_each"), (simulate, "run"), (idle, "run"), (tune, "run")):
        monkeypatch.setattr(module, start, lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit) as caught:
        command_line.main(words.format(tmp_path).split())
    assert caught.value.code == 2
    assert hint.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_looking_at_files_leaves_them_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.png"
    there.write_text("of before")
    monkeypatch.setattr(local, "run_each", lambda _: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        command_line.main(["all_reduce", "-J", str(there), "--plot", str(new)])
    assert there.read_text() == "of before" and not new.exists()


def test_whole_runs_print_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main("all_reduce -b 4 -e 64 -f 4 --iters 2 -w 0 --front sync".split()) == 0
    assert [match[1] for match in ROW.finditer(capsys.readouterr().out)] == ["4", "16", "64"]


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


def test_fused_compares_all_ways_in_both_front_ends() -> None:
    rows = fused.run(2, arrays=3, repeats=2)
    assert [row["front"] for row in rows] == ["sync", "async"]
    assert all(row[way] > 0 for row in rows for way in fused.WAYS)
    assert fused.text(rows).count("\n  ") == 2 and "3 float32 arrays of 1024 bytes over 2 ranks" in fused.text(rows)


def test_import_is_timed_in_fresh_interpreters() -> None:
    rows = imports.run(repeats=1)
    assert [row["statement"] for row in rows] == list(imports.STATEMENTS)
    assert " ms" in imports.text(rows)
