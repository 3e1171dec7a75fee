"""The loops that ``rt.bench kernels`` compares rt's with: building ``hand_loops.c``, and which of its functions does what.

May live here: the compiler, loading, the table of names. May not: timing and text (``kernels.py``).
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.meeting import BenchError
from rt.dtypes import INEXACT, ITEMSIZE, DType, Op

SOURCE = Path(__file__).parent / "hand_loops.c"
# As rt's extension is compiled, but for the instructions: these loops are for one processor, and know it.
FLAGS = ("-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-shared", "-fPIC")
WIDTHS = {
    256: ("-mavx2", "-mf16c"),
    512: ("-mavx2", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
UNROLLS = (1, 4)
_FLOATS = {DType.FLOAT16: "f16", DType.BFLOAT16: "bf16", DType.FLOAT32: "f32", DType.FLOAT64: "f64", DType.COMPLEX64: "c64",
           DType.COMPLEX128: "c128"}  # fmt: skip
_PARTS = {DType.COMPLEX64: "f32", DType.COMPLEX128: "f64"}
_BOOL = {Op.SUM: "or", Op.MAX: "or", Op.OR: "or", Op.PROD: "and", Op.MIN: "and", Op.AND: "and", Op.XOR: "xor"}


def name_of(code: DType, op: Op) -> str:
    """Return the function for an operator and dtype, without its prefix: several combinations are one loop."""
    if code is DType.BOOL:
        return f"{_BOOL[op]}_bool"
    if op in (Op.AND, Op.OR, Op.XOR):
        return f"{op.name.lower()}_bits"
    word = "sum" if op is Op.MEAN else op.name.lower()
    if code in INEXACT:
        return f"{word}_{_PARTS.get(code, _FLOATS[code]) if word == 'sum' else _FLOATS[code]}"
    unsigned = code.name.startswith("U") and op in (Op.MIN, Op.MAX)  # elsewhere the sign makes no difference
    return f"{word}_{'u' if unsigned else 'i'}{8 * ITEMSIZE[code]}"


class HandLoops:
    """The compiled loops of one width.

    Args:
        bits: of a vector, a key of ``WIDTHS``.

    Raises:
        BenchError: there is no compiler, it refused, or the machine is none that the loops are written for.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        with tempfile.TemporaryDirectory(prefix="rt-bench-") as folder:
            library = Path(folder) / "hand_loops.so"
            _compile(bits, library)
            self._library = ctypes.CDLL(str(library))

    @property
    def run_here(self) -> bool:
        """Whether this processor has the instructions."""
        return bool(self._library.hand_runs_here())

    def address(self, code: DType, op: Op, unroll: int) -> int:
        """Return the address of a loop ``(dst, left, right, bytes)`` that takes ``unroll`` vectors at a time, one of ``UNROLLS``."""
        found = ctypes.cast(getattr(self._library, f"hand_{name_of(code, op)}_x{unroll}"), ctypes.c_void_p).value
        assert found is not None
        return found

    def repeat(self, loop: int, addresses: tuple[int, int, int], count: int, times: int) -> None:
        """Call a loop, of ours or of rt's, ``times`` times on the addresses of dst, left and right."""
        self._library.hand_repeat(
            ctypes.c_void_p(loop), *map(ctypes.c_void_p, addresses), ctypes.c_size_t(count), ctypes.c_size_t(times)
        )


def build() -> list[HandLoops]:
    """Return the loops of every width that this processor has, narrow ones first.

    Raises:
        BenchError: as ``HandLoops``; or the processor has no AVX2.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BenchError(f"kernels: the loops to compare with are written for x86-64 with AVX2, and this machine is {platform.machine()}")
    found = [loops for loops in map(HandLoops, WIDTHS) if loops.run_here]
    if not found:
        raise BenchError("kernels: the loops to compare with need AVX2, which this processor does not have")
    return found


def _compile(bits: int, library: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("kernels: the loops to compare with are compiled when they are needed, and there is no `cc` on PATH; "
                         "install a C compiler (Debian: apt-get install gcc libc6-dev)")  # fmt: skip
    command = [compiler, *FLAGS, *WIDTHS[bits], f"-DHAND_BITS={bits}", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"kernels: {' '.join(command)} ended with exit code {done.returncode}\n{done.stderr.strip()}")
