"""The loops of ``_kernels.h`` against NumPy: every dtype, operator and instruction set this CPU has, bit for bit.

May live here: building the header by itself and what its functions must compute. May not: the extension (a missing compiler skips
these tests, a missing extension does not).
"""

from __future__ import annotations

import ctypes
import itertools
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rt.dtypes import HALF, INEXACT, ITEMSIZE, DType, Op, numpy_dtype, op_supported

Array = npt.NDArray[Any]

HERE = Path(__file__).parent
FLAGS = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", "-shared", "-fPIC"]
COUNTS = (0, 1, 3, 7, 31, 1003)
COMPLEX = (DType.COMPLEX64, DType.COMPLEX128)
SCALED = sorted(INEXACT)
CASES = [(dtype, op) for dtype in DType for op in Op if op_supported(dtype, op)]
PART: dict[int, np.dtype[Any]] = {4: np.dtype(np.float32), 8: np.dtype(np.float64)}
BITS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's on overflow and NaN, which are the point here


# ---- building and calling -------------------------------------------------------------------------------------------------------


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile the header with its glue and load it."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    library = folder / f"kernels{''.join(flags)}.so"
    command = [compiler, *FLAGS, *flags, f"-I{HERE.parent / 'rt'}", str(HERE / "kernels_check.c"), "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"no C compiler: {compiler}")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{' '.join(command)}\n{error.stderr}")
    return ctypes.CDLL(str(library))


@dataclass
class Kernels:
    """One build of the header, held to one instruction set."""

    library: ctypes.CDLL
    isa: int

    def address(self, name: str, *codes: int) -> int | None:
        """Return the address that a function of the glue gives, None for NULL."""
        function = getattr(self.library, f"check_{name}")
        function.restype = ctypes.c_void_p
        found: int | None = function(*codes)
        return found

    def loop(self, name: str, *codes: int) -> Callable[..., None]:
        """Return a loop of this instruction set; it takes the arrays, a count, and for scale the divisor."""
        address = self.address(name, self.isa, *codes)
        assert address is not None
        pointers = {"reduce": 3, "mixed": 3}.get(name, 2)
        tail = [ctypes.c_size_t, ctypes.c_double] if name == "scale" else [ctypes.c_size_t]
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *tail)(address)
        return lambda *given: function(*[x.ctypes.data if isinstance(x, np.ndarray) else x for x in given])


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("kernels")
    return {"wide": build(folder), "plain": build(folder, "-DRT_NO_CLONES")}


@pytest.fixture(scope="module", params=["wide-0", "wide-1", "wide-2", "plain-0"])
def kernels(request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL]) -> Iterator[Kernels]:
    name, isa = request.param.split("-")
    best = libraries[name].check_isa()
    if int(isa) > best:
        pytest.skip(f"instruction set {isa} of 0 plain, 1 AVX2, 2 AVX-512: this CPU has {best}")
    yield Kernels(libraries[name], int(isa))


# ---- data -----------------------------------------------------------------------------------------------------------------------


def bits(array: Array) -> Array:
    """Return the array's bits, the parts of a complex number apart."""
    return parts(array).view(BITS[parts(array).dtype.itemsize])


def parts(array: Array) -> Array:
    return array.view(PART[array.dtype.itemsize // 2]) if array.dtype.kind == "c" else array


def floats(dtype: np.dtype[Any], count: int, rng: np.random.Generator) -> Array:
    """Return a third of any bits at all, a third of ordinary numbers, a third of corner cases: equal pairs and pairs of corners abound."""
    unsigned = BITS[dtype.itemsize]
    anything = rng.integers(0, np.iinfo(unsigned).max, count, unsigned, endpoint=True).view(dtype)
    one = np.ones(1, dtype).view(unsigned)[0]
    inf = np.full(1, np.inf, dtype).view(unsigned)[0]
    quiet = np.full(1, np.nan, dtype).view(unsigned)[0] | unsigned.type(5)
    corners = np.array([0, 1, 2, one, one + 1, inf - 1, inf, inf + 1, quiet], unsigned)  # inf + 1 is a signalling NaN
    corners = np.concatenate([corners, corners | unsigned.type(1 << (8 * dtype.itemsize - 1))]).view(dtype)
    choice = rng.integers(0, 3, count)
    return np.where(choice == 0, anything, np.where(choice == 1, rng.normal(size=count).astype(dtype), rng.choice(corners, count)))


def sample(code: DType, count: int, seed: int) -> Array:
    """Return items of a dtype: any bits for bool and integers, see ``floats`` for the rest."""
    rng = np.random.default_rng([seed, code])
    dtype = numpy_dtype(code)
    if code is DType.BOOL:
        return rng.choice(np.array([0, 0, 1, 2, 0x80, 0xFF], np.uint8), count)  # as bytes: any byte but 0 is true
    if code in COMPLEX:
        return floats(PART[dtype.itemsize // 2], 2 * count, rng).view(dtype)
    if code in INEXACT:
        return floats(dtype, count, rng)
    info = np.iinfo(dtype)
    corners = rng.choice(np.array([info.min, info.max, 0, 1], dtype), count)
    return np.where(rng.random(count) < 0.8, rng.integers(info.min, info.max, count, dtype, endpoint=True), corners)


# ---- what is expected -----------------------------------------------------------------------------------------------------------


def zero_of(a: Array, b: Array, op: Op) -> Array:
    """The zero that min or max of two zeros gives: +0 is above -0."""
    negative = np.signbit(a) & np.signbit(b) if op is Op.MAX else np.signbit(a) | np.signbit(b)
    return np.where(negative, np.array(-0.0, a.dtype), np.array(0.0, a.dtype))


def extreme(a: Array, b: Array, op: Op) -> Array:
    """Min or max of real floats: the canonical NaN if either is one."""
    found = np.where(a > b if op is Op.MAX else a < b, a, b)
    found = np.where((a == 0) & (b == 0), zero_of(a, b, op), found)
    return np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), found)


def complex_extreme(a: Array, b: Array, op: Op) -> Array:
    """Min or max in lexicographic order: the canonical NaN in both parts if any part is one, equal numbers part by part."""
    (are, aim), (bre, bim) = parts(a).reshape(-1, 2).T, parts(b).reshape(-1, 2).T
    ahead = (are > bre) | ((are == bre) & (aim > bim)) if op is Op.MAX else (are < bre) | ((are == bre) & (aim < bim))
    equal = (are == bre) & (aim == bim)
    nan = np.isnan(are) | np.isnan(aim) | np.isnan(bre) | np.isnan(bim)
    both = [np.where(equal, extreme(x, y, op), np.where(ahead, x, y)) for x, y in ((are, bre), (aim, bim))]
    return np.where(nan, np.array(np.nan, are.dtype), np.stack(both)).T.reshape(-1).view(a.dtype)


def complex_product(a: Array, b: Array) -> Array:
    (are, aim), (bre, bim) = parts(a).reshape(-1, 2).T, parts(b).reshape(-1, 2).T
    return np.stack([are * bre - aim * bim, are * bim + aim * bre], axis=1).reshape(-1).view(a.dtype)


def expected(code: DType, op: Op, a: Array, b: Array) -> Array:
    """What the kernel of a dtype and operator must leave in dst."""
    if code is DType.BOOL:
        logical = {Op.SUM: np.logical_or, Op.MAX: np.logical_or, Op.OR: np.logical_or, Op.XOR: np.logical_xor}.get(op, np.logical_and)
        return logical(a, b).astype(np.uint8)
    if op in (Op.MIN, Op.MAX) and code in INEXACT:
        return complex_extreme(a, b, op) if code in COMPLEX else extreme(a, b, op)
    if code in HALF:
        return expected(DType.FLOAT32, op, a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
    if op is Op.PROD and code in COMPLEX:
        return complex_product(a, b)
    ufunc = {Op.SUM: np.add, Op.MEAN: np.add, Op.PROD: np.multiply, Op.MIN: np.minimum, Op.MAX: np.maximum}
    bitwise = {Op.AND: np.bitwise_and, Op.OR: np.bitwise_or, Op.XOR: np.bitwise_xor}
    found: Array = (ufunc | bitwise)[op](a, b)
    return found


def assert_same(found: Array, wanted: Array, *, any_nan: bool) -> None:
    """Compare bit for bit; with ``any_nan`` one NaN is as good as another."""
    same = bits(found) == bits(wanted)
    if any_nan:
        same |= np.isnan(parts(found)) & np.isnan(parts(wanted))
    where = np.flatnonzero(~same)[:5]
    assert same.all(), f"at {where}: found {parts(found)[where]} {bits(found)[where]}, wanted {parts(wanted)[where]} {bits(wanted)[where]}"


def free_nan(code: DType, op: Op) -> bool:
    """Say whether sign and payload of a NaN result are left open."""
    return code in INEXACT and op not in (Op.MIN, Op.MAX)


# ---- reduce ---------------------------------------------------------------------------------------------------------------------


def placed(array: Array, shift: int) -> Array:
    """Copy an array to ``shift`` bytes after an aligned address, with canary bytes behind it."""
    store = np.full(array.nbytes + shift + 128, 0xA5, np.uint8)
    start = -store.ctypes.data % 64 + shift
    view = store[start : start + array.nbytes].view(array.dtype)
    view[...] = array
    return view


def canary(view: Array) -> bool:
    """Say whether the bytes just outside of a ``placed`` array are as they were."""
    store: Any = view.base
    start = view.ctypes.data - store.ctypes.data
    return bool((store[:start] == 0xA5).all() and (store[start + view.nbytes :] == 0xA5).all())


@pytest.mark.parametrize(("code", "op"), CASES, ids=lambda code: code.name)
def test_reduce(kernels: Kernels, code: DType, op: Op) -> None:
    loop = kernels.loop("reduce", code, op)
    shifts = (0, 1, ITEMSIZE[code])
    for count, shift, target in itertools.product(COUNTS, shifts, ("separate", "left", "right", "both")):
        left = placed(sample(code, count, 1), shift)
        right = left if target == "both" else placed(sample(code, count, 2), 0)
        dst = {"separate": placed(np.zeros_like(left), shift), "left": left}.get(target, right)
        wanted = expected(code, op, left.copy(), right.copy())
        loop(dst, left, right, count)
        assert_same(dst.copy(), wanted, any_nan=free_nan(code, op))
        assert canary(dst) and canary(left) and canary(right)


@pytest.mark.parametrize(("code", "op"), CASES, ids=lambda code: code.name)
def test_reduce_commutes_bit_for_bit(kernels: Kernels, code: DType, op: Op) -> None:
    loop = kernels.loop("reduce", code, op)
    a, b = sample(code, 5000, 3), sample(code, 5000, 4)
    ab, ba = np.zeros_like(a), np.zeros_like(a)
    loop(ab, a, b, a.size)
    loop(ba, b, a, a.size)
    assert_same(ab, ba, any_nan=free_nan(code, op))


@pytest.mark.parametrize("code", sorted(HALF), ids=lambda code: code.name)
@pytest.mark.parametrize("op", [Op.SUM, Op.PROD, Op.MIN, Op.MAX, Op.MEAN], ids=lambda op: op.name)
def test_mixed(kernels: Kernels, code: DType, op: Op) -> None:
    loop = kernels.loop("mixed", code, op)
    for count, shift, in_place in itertools.product(COUNTS, (0, 1, 4), (False, True)):
        acc = placed(sample(DType.FLOAT32, count, 5), shift)
        half = placed(sample(code, count, 6), shift)
        dst = acc if in_place else placed(np.zeros_like(acc), shift)
        wanted = expected(DType.FLOAT32, op, acc.copy(), half.astype(np.float32))
        loop(dst, acc, half, count)
        assert_same(dst.copy(), wanted, any_nan=free_nan(code, op))
        assert canary(dst) and canary(acc) and canary(half)


# ---- convert and scale ----------------------------------------------------------------------------------------------------------


def every_half(code: DType) -> Array:
    return np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(code))


def awkward_floats(code: DType) -> Array:
    """Return every tie between two neighbouring half numbers with its neighbours, every half number, and a quarter million of any bits."""
    finite = every_half(code)[np.isfinite(every_half(code))].astype(np.float64)
    ladder = np.sort(np.unique(np.append(np.abs(finite), 2.0 * np.max(finite) - np.sort(finite)[-2])))  # one step beyond the largest
    ties = ((ladder[1:] + ladder[:-1]) / 2).astype(np.float32).view(np.uint32)
    exact = every_half(code).astype(np.float32).view(np.uint32)
    anything = np.random.default_rng(7).integers(0, 1 << 32, 1 << 18, np.uint32)
    positive = np.concatenate([ties - np.uint32(1), ties, ties + np.uint32(1)])
    return np.concatenate([positive, positive | np.uint32(1 << 31), exact, anything]).view(np.float32)


@pytest.mark.parametrize("code", sorted(HALF), ids=lambda code: code.name)
def test_widen_every_value(kernels: Kernels, code: DType) -> None:
    source = every_half(code)
    found = np.zeros(source.size, np.float32)
    kernels.loop("widen", code)(found, source, source.size)
    assert_same(found, source.astype(np.float32), any_nan=True)


@pytest.mark.parametrize("code", sorted(HALF), ids=lambda code: code.name)
def test_narrow_ties_and_random_bits(kernels: Kernels, code: DType) -> None:
    source = awkward_floats(code)
    found = np.zeros(source.size, numpy_dtype(code))
    kernels.loop("narrow", code)(found, source, source.size)
    assert_same(found, source.astype(found.dtype), any_nan=True)


@pytest.mark.parametrize("code", sorted(HALF), ids=lambda code: code.name)
def test_convert_odd_counts_anywhere(kernels: Kernels, code: DType) -> None:
    for count, shift in itertools.product(COUNTS, (0, 1, 2)):
        half = placed(sample(code, count, 8), shift)
        single = placed(np.zeros(count, np.float32), shift)
        back = placed(np.zeros_like(half), shift)
        kernels.loop("widen", code)(single, half, count)
        kernels.loop("narrow", code)(back, single, count)
        assert_same(back.copy(), half.copy(), any_nan=True)
        assert canary(half) and canary(single) and canary(back)


@pytest.mark.parametrize("code", sorted(HALF), ids=lambda code: code.name)
def test_instruction_sets_agree_on_every_nan(kernels: Kernels, code: DType) -> None:
    plain = Kernels(kernels.library, 0)
    for way, source in (("widen", every_half(code)), ("narrow", awkward_floats(code))):
        dtype = np.dtype(np.float32) if way == "widen" else numpy_dtype(code)
        here, there = np.zeros(source.size, dtype), np.zeros(source.size, dtype)
        kernels.loop(way, code)(here, source, source.size)
        plain.loop(way, code)(there, source, source.size)
        assert_same(here, there, any_nan=False)


@pytest.mark.parametrize("way", ["widen", "narrow"])
def test_float16_survives_flush_to_zero(kernels: Kernels, way: str) -> None:
    source = every_half(DType.FLOAT16)
    if way == "narrow":
        source = source.astype(np.float32)
    found = np.zeros(source.size, np.float32 if way == "widen" else np.float16)
    address = ctypes.c_void_p(kernels.address(way, kernels.isa, DType.FLOAT16))
    flushed = kernels.library.check_convert_flushed
    flushed(address, ctypes.c_void_p(found.ctypes.data), ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.size))
    assert_same(found, source.astype(found.dtype), any_nan=True)


@pytest.mark.parametrize("code", SCALED, ids=lambda code: code.name)
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 1000])
def test_scale(kernels: Kernels, code: DType, divisor: int) -> None:
    loop = kernels.loop("scale", code)
    for count, shift, in_place in itertools.product(COUNTS, (0, 1, ITEMSIZE[code]), (False, True)):
        source = placed(sample(code, count, 9), shift)
        dst = source if in_place else placed(np.zeros_like(source), shift)
        real = source.astype(np.float32) if code in HALF else parts(source.copy())
        wanted = (real / real.dtype.type(divisor)).astype(parts(source).dtype).view(source.dtype)
        loop(dst, source, count, float(divisor))
        assert_same(dst.copy(), wanted, any_nan=True)
        assert canary(dst) and canary(source)


# ---- getters --------------------------------------------------------------------------------------------------------------------


def test_a_kernel_exists_exactly_where_the_operator_is_defined(kernels: Kernels) -> None:
    for code, op in itertools.product(DType, Op):
        assert (kernels.address("reduce_kernel", code, op) is not None) == op_supported(code, op)
        if code in HALF:
            assert (kernels.address("mixed_kernel", code, op) is not None) == op_supported(code, op)
    for dst, src in itertools.product(DType, DType):
        defined = (dst in HALF and src is DType.FLOAT32) or (src in HALF and dst is DType.FLOAT32)
        assert (kernels.address("convert_kernel", dst, src) is not None) == defined
    assert {code for code in DType if kernels.address("scale_kernel", code) is not None} == INEXACT


@pytest.mark.parametrize(("dtype", "op"), [(-1, 0), (15, 0), (0, -1), (0, 8), (9, -1), (9, 8), (1 << 30, 1 << 30)])
def test_unknown_codes_have_no_kernel(kernels: Kernels, dtype: int, op: int) -> None:
    assert kernels.address("reduce_kernel", dtype, op) is None
    assert kernels.address("mixed_kernel", dtype, op) is None


def test_mean_is_sum(kernels: Kernels) -> None:
    for code in INEXACT:
        assert kernels.address("reduce_kernel", code, Op.MEAN) == kernels.address("reduce_kernel", code, Op.SUM)


def test_getters_give_the_widest_set(kernels: Kernels) -> None:
    best = kernels.library.check_isa()
    for code, op in CASES:
        assert kernels.address("reduce_kernel", code, op) == kernels.address("reduce", best, code, op)


def test_item_sizes(kernels: Kernels) -> None:
    kernels.library.check_itemsize.restype = ctypes.c_size_t
    assert tuple(kernels.library.check_itemsize(code) for code in DType) == ITEMSIZE
