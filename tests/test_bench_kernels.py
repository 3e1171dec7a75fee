"""``rt.bench kernels``: the loops by hand compute what rt's compute, and the table says what was measured.

May live here: tests of ``bench/kernels.py`` and ``bench/hand_loops.py``, and of that command. May not: rt's own loops
(``test_kernels.py``). No test here looks at how fast anything is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_kernels import assert_same, expected, free_nan, sample

from bench import __main__ as command_line
from bench import hand_loops, kernels, meeting
from rt import _fastpath
from rt.dtypes import DType, Op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's on overflow and NaN, which are the point here


@pytest.fixture(scope="module")
def hands() -> list[hand_loops.HandLoops]:
    try:
        return hand_loops.build()
    except meeting.BenchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("unroll", hand_loops.UNROLLS)
@pytest.mark.parametrize(("code", "op"), kernels.cases(), ids=lambda code: code.name)
def test_loops_by_hand_compute_what_rt_computes(hands: list[hand_loops.HandLoops], code: DType, op: Op, unroll: int) -> None:
    """Else the comparison is not fair: corner cases of every dtype, bit for bit."""
    arrays = kernels.Arrays(16 << 10)
    dst, *sources = (operand.view(sample(code, 1, 0).dtype) for operand in arrays.operands)
    for seed, source in enumerate(sources):
        source[...] = sample(code, source.size, seed)
    wanted = expected(code, op, *sources)
    for hand in hands:
        dst.view(np.uint8)[...] = 0xA5
        hand.repeat(hand.address(code, op, unroll), arrays.addresses, arrays.nbytes, 1)
        assert_same(dst, wanted, any_nan=free_nan(code, op))


def test_extension_hands_out_the_loop_that_reduces(hands: list[hand_loops.HandLoops]) -> None:
    arrays = kernels.Arrays(4096)
    arrays.fill(DType.INT16)
    dst, left, right = (operand.view(np.int16) for operand in arrays.operands)
    loop = _fastpath.reduce_kernel(DType.INT16, Op.PROD)
    assert loop is not None
    hands[0].repeat(loop, arrays.addresses, dst.size - 1, 2)
    assert (dst[:-1] == left[:-1] * right[:-1]).all() and dst[-1] == 0
    assert _fastpath.reduce_kernel(DType.FLOAT32, Op.XOR) is None
    assert _fastpath.reduce_kernel(99, Op.SUM) is None


def test_every_combination_but_means_is_measured() -> None:
    assert len(kernels.cases()) == 9 * 7 + 6 * 4
    assert kernels.cases(["xor", "sum"], ["float32", "bool"]) == [(DType.FLOAT32, Op.SUM), (DType.BOOL, Op.XOR), (DType.BOOL, Op.SUM)]


def test_rates_and_ratios() -> None:
    assert kernels.rate(1000, [2e-6, 1e-6, 9e-6]) == pytest.approx(3 * 1000 / 2e-6 / 1e9)
    assert kernels.ratio([1.0, 2.0, 4.0], [3.0, 2.0, 2.0]) == 1.0  # of 3, 1 and 0.5: each round against its neighbour
    assert kernels.best_of([[5.0, 5.0, 1.0], [4.0, 9.0, 4.0]]) == 1


def test_turns_alternate_and_count_what_is_timed() -> None:
    calls: list[tuple[str, int]] = []
    took = kernels.turns([lambda times: calls.append(("a", times)), lambda times: calls.append(("b", times))], 2, 0.0)
    assert [len(each) for each in took] == [2, 2]
    trials = [("a", 1)] * 3 + [("b", 1)] * 3
    assert calls == [*trials, *[("a", 1), ("a", 1), ("b", 1), ("b", 1)] * 2]  # of each turn, the second is timed


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, hands: list[hand_loops.HandLoops]) -> None:
    monkeypatch.setattr(kernels, "MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "SWEEPS", 2)
    monkeypatch.setattr(kernels, "ROUNDS", 1)
    monkeypatch.setattr(kernels, "MEMORY_ROUNDS", 1)
    monkeypatch.setattr(kernels, "build", lambda: hands)


def test_table_and_json(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    assert command_line.main(["kernels", "-o", "sum,xor", "-d", "uint8,bfloat16", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert [(row["dtype"], row["op"]) for row in rows] == [("uint8", "sum"), ("uint8", "xor"), ("bfloat16", "sum")]
    for row in rows:
        assert {level: row[level]["bytes"] for level in ("L1", "L2", "memory")} == {"L1": 8 << 10, "L2": 32 << 10, "memory": 1 << 16}
        assert all(row[level][key] > 0 for level in ("L1", "L2") for key in ("rt", "hand", "ratio"))
        assert row["L1"]["hand_bits"] in hand_loops.WIDTHS and row["L1"]["hand_unroll"] in hand_loops.UNROLLS
        assert all(row["memory"][key] > 0 for key in ("rt", "stream", "ratio"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith("#")] == [["uint8", "sum"], ["uint8", "xor"], ["bfloat16", "sum"]]
    least = min(row["L1"]["ratio"] for row in rows)
    assert lines[-1].startswith(f"# least ratio: L1 {least:.2f}, L2 ")


# --- what can be wrong ------------------------------------------------------------------------------------------------------------------


def test_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hand_loops.platform, "machine", lambda: "x86_64")
    assert command_line.main(["kernels"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rt.bench: kernels: ") and "there is no `cc` on PATH" in said and said.count("\n") == 1


def test_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho unrecognized option -mavx2 >&2\nexit 4\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hand_loops.platform, "machine", lambda: "x86_64")
    assert command_line.main(["kernels"]) == 1
    assert "ended with exit code 4\nunrecognized option -mavx2" in capsys.readouterr().err


def test_other_machines_are_told_what_the_loops_are_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hand_loops.platform, "machine", lambda: "aarch64")
    assert command_line.main(["kernels"]) == 1
    assert "written for x86-64 with AVX2, and this machine is aarch64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("-d float", "'float' is unknown; known: bool, int8"),
        ("-o avg", "'avg' is unknown; known: sum, prod, min, max, and, or, xor"),
        ("-o and,xor -d float32", "-o and,xor: found dtypes float32, expected bool or integers"),
        ("-n 2", "unrecognized"),
    ],
)
def test_mistakes_exit_2_and_say_what_was_expected(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["kernels", *argv.split()])
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err
