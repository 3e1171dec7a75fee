"""``rt.bench --backend jaccl``: what is started, what it is held against, and what is said where it cannot be.

May live here: choosing systems and reading perftest, of a stand-in for it. May not: verbs (``rdma_suite`` runs the bench on a device).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench import measure, options, perftest
from bench.collectives import COLLECTIVES
from bench.meeting import BenchError
from bench.samples import Cell
from transports import verbs

PORT = verbs.Port("rxe0", 1, 1, "::ffff:7f00:1", 0, 5)
ANSWER = """#!/bin/sh
echo "$0 $*" >> "$(dirname "$0")/asked"
[ "${{0##*/}}" = ib_write_bw ] || exec echo " 64 300 1.0 9.0 4.0 7.0 0.5 8.0 9.0"
case "$*" in *127.0.0.1) echo " {size} 8 0.2 0.4 0.000045";; esac
"""


def parsed(*words: str, job_size: int | None = None) -> measure.Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=None)
    parser.set_defaults(command="all_reduce")
    options.add(parser, COLLECTIVES["all_reduce"])
    return options.options(parser.parse_args(words), job_size)


def result(found: measure.Options, seconds: float) -> measure.Result:
    cell = Cell((((seconds,), (seconds,)),), 0)
    rows = {name: [measure.Row(count, {"out": cell}) for count in found.counts] for name in found.systems}
    return measure.Result(found, rows, {}, {})


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for program in perftest.PROGRAMS:
        (tmp_path / program).write_text(ANSWER.format(size=1 << 20))
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(verbs, "find_port", lambda name: PORT)
    return tmp_path


def test_bandwidths_and_latencies_are_held_against_their_own_kind(stand_in: Path) -> None:
    found = perftest.rows(result(parsed("--backend", "jaccl", "-b", "64", "-e", "1M", "-f", "16384"), 0.02))
    assert [(row["system"], row["bytes"], row["program"]) for row in found] == [
        ("rt sync jaccl", 64, "ib_write_lat"), ("rt async jaccl", 64, "ib_send_lat"),
        ("rt sync jaccl", 1 << 20, "ib_write_bw"), ("rt async jaccl", 1 << 20, "ib_write_bw"),
    ]  # fmt: skip
    assert [(row["ours"], row["theirs"]) for row in found[:2]] == [(pytest.approx(20_000), 4.0)] * 2
    assert found[2]["ours"] == pytest.approx((1 << 20) / 0.02 / 1e6) and found[2]["theirs"] == pytest.approx(50.0)
    assert found[2]["ratio"] == pytest.approx(52.4288 / 50)
    asked = (stand_in / "asked").read_text().splitlines()
    assert sum("ib_write_bw" in line for line in asked) == 6  # three times a server and a client, for both front ends
    assert all("-d rxe0 -i 1 " in line and " -x 1" in line for line in asked)
    assert [" -e" in line for line in asked if "ib_send_lat" in line] == [True] * 6
    assert perftest.text(found).count("\n") == 5


def test_a_perftest_that_says_nothing_is_shown(stand_in: Path) -> None:
    (stand_in / "ib_write_bw").write_text("#!/bin/sh\necho no such device\n")
    with pytest.raises(BenchError, match=r"ib_write_bw -d rxe0 .*found no line of 1048576 bytes in what its client said: 'no such device"):
        perftest.run("ib_write_bw", 1 << 20)


@pytest.mark.timeout(20)
def test_a_server_that_ends_at_once_is_not_waited_for(stand_in: Path) -> None:
    (stand_in / "ib_write_bw").write_text("#!/bin/sh\necho $# words\nexit 1\n")
    with pytest.raises(BenchError, match=r"its client said: '15 words.*, its server: '14 words"):
        perftest.run("ib_write_bw", 1 << 20)


def test_no_perftest_says_what_to_install(stand_in: Path) -> None:
    (stand_in / "ib_send_lat").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(stand_in))
        with pytest.raises(BenchError, match="no ib_send_lat to compare with; Debian's package perftest has it"):
            perftest.require()


@pytest.mark.skipif(not verbs.missing(), reason="pyverbs is installed")
def test_no_device_says_so_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["all_reduce", "--backend", "jaccl"]) == 1
    assert "rt.bench: --backend jaccl: pyverbs cannot be loaded" in capsys.readouterr().err


def test_not_in_a_job() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="--backend jaccl starts ranks of its own; in a job RT_BACKEND=jaccl"):
        parsed("--backend", "jaccl", job_size=2)
