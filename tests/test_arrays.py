"""Arrays of every kind, in and out: the caller's kind comes back, nothing is copied that need not be, the rest is refused with a reason.

May live here: what may be passed as an array and what comes back. May not: the arithmetic (``test_collectives``), lists of arrays
(``test_fused``).

torch, MLX and JAX live in ``.venv-peers`` (``make peers``): bodies that need them run under its Python, lent this environment's packages.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peers import LENT, needs_peers
from ranks import FRONTS, Ranks, results

import rt
import rt.sync
from rt import arrays, collectives

fronts = pytest.mark.parametrize("front", FRONTS)
BF16 = np.dtype(ml_dtypes.bfloat16)


# ---- buffers and NumPy's own ------------------------------------------------------------------------------------------------------------


class Exotic:
    """An array of a library that rt has never heard of."""

    def __init__(self, items: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.items, self.device = np.asarray(items), device

    def __dlpack__(self, **how: Any) -> Any:
        return self.items.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __array_namespace__(self) -> Any:
        return Exotic

    from_dlpack: Callable[[Any], Exotic]


Exotic.from_dlpack = staticmethod(Exotic)


class Series:
    """What only ``__array__`` reads, as a column of a table."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.items, dtype)


async def buffers(rt: Any, group: Any, ctl: Any) -> None:
    me = group.rank()
    for x, expected in (
        (array.array("f", [1.5, me]), array.array("f", [3, 1])),
        (array.array("q", [me] * 3), array.array("q", [1] * 3)),
        (bytearray([1, 250 + me]), bytearray([2, 245])),
        (bytes([7, me]), bytes([14, 1])),
        (Exotic([1.0, me]), [2.0, 1.0]),
    ):
        before = bytes(memoryview(x)) if not isinstance(x, Exotic) else b""
        total = await rt.all_sum(x)
        assert type(total) is type(x)
        assert total.items.tolist() == expected if isinstance(x, Exotic) else total == expected, (total, expected)
        assert isinstance(x, Exotic) or bytes(memoryview(x)) == before, "inputs never change"
    total = await rt.all_sum(memoryview(np.full((2, 3), 1 + me, np.int16)))
    assert isinstance(total, memoryview) and (total.tolist(), total.format) == ([[3] * 3] * 2, "h") and not total.readonly
    strided = await rt.all_sum(memoryview(np.arange(6.0))[::-2])
    assert strided.tolist() == [10.0, 6.0, 2.0]
    # Results that have another length than x, and calls that return x.
    assert await rt.all_gather(array.array("i", [me, 7])) == array.array("i", [0, 7, 1, 7])
    assert await rt.all_gather(b"ab"[me : me + 1]) == b"ab"
    assert await rt.sum_scatter(bytearray([1, 2, 3, 4])) == (bytearray([6, 8]) if me else bytearray([2, 4]))
    assert await rt.broadcast(bytearray([me, 9])) == bytearray([0, 9])
    mine = array.array("d", [me])
    sent, like = rt.send(mine, 1 - me), rt.recv_like(mine, 1 - me)
    assert await sent is mine and await like == array.array("d", [1 - me])
    # What has no kind of its own to give back gives NumPy arrays.
    for x in ((ctypes.c_int32 * 2)(me, 3), Series(np.array([me, 3], np.int32)), np.int32([me, 3]).__array__()):
        total = await rt.all_sum(x)
        assert type(total) is np.ndarray and total.tolist() == [1, 6] and total.dtype == np.int32
    for number, dtype in ((True, "bool"), (3, "int64"), (1.5, "float64"), (1j, "complex128"), (np.float32(2), "float32")):
        total = await rt.all_sum(number)
        assert type(total) is np.ndarray and (total.shape, total.dtype.name) == ((), dtype)


@fronts
def test_buffers(front: str) -> None:
    results(2, buffers, front=front)


async def outs(rt: Any, group: Any, ctl: Any) -> None:
    me, x = group.rank(), np.array([1.0, 2.0])
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), 0) as mapped:
            whole = np.ones(mmap.PAGESIZE, np.uint8)
            assert await rt.all_sum(whole, out=mapped) is mapped and mapped[:3] == b"\2\2\2"
    for out in (array.array("d", [0, 0]), memoryview(np.zeros(2)), Exotic(np.zeros(2)), (ctypes.c_double * 2)()):
        assert await rt.all_sum(x, out=out) is out
        assert (out.items if isinstance(out, Exotic) else np.asarray(out)).tolist() == [2.0, 4.0], out
    inplace = array.array("d", [me, 5])
    assert await rt.all_sum(inplace, out=inplace) is inplace and inplace.tolist() == [1.0, 10.0]
    other = np.zeros(2)
    assert await rt.all_sum(array.array("d", [1, 2]), out=other) is other and other.tolist() == [2.0, 4.0]
    received = bytearray(4)
    sent, got = rt.send(b"abcd", 1 - me), rt.recv(4, np.uint8, 1 - me, out=received)
    assert await sent == b"abcd" and await got is received and received == b"abcd"
    block = np.arange(4.0)
    gathered = await rt.all_gather(block.data[2 * me : 2 * me + 2], out=block)
    assert gathered is block and block.tolist() == [0, 1, 2, 3], "in place through a memoryview"
    for error, words, call in (
        (TypeError, "bytes are immutable", lambda: rt.all_sum(b"ab", out=b"ab")),
        (TypeError, "copy of its items", lambda: rt.all_sum(x, out=Series(np.zeros(2)))),
        (TypeError, "no memory to write to", lambda: rt.all_sum(1.0, out=np.float64(1))),
        (TypeError, "out must be an array, not tuple", lambda: rt.all_sum(x, out=(1.0, 2.0))),
        (TypeError, "out: expected an array or a number, got str", lambda: rt.all_sum(x, out="ab")),
        (TypeError, "masked", lambda: rt.all_sum(x, out=np.ma.masked_array([1.0, 2.0]))),
        (ValueError, "writeable", lambda: rt.all_sum(x, out=memoryview(np.zeros(2)).toreadonly())),
        (ValueError, "dtype float64, but has shape", lambda: rt.all_sum(x, out=array.array("f", [0, 0]))),
        (ValueError, "contiguous", lambda: rt.all_sum(x, out=memoryview(np.zeros(4))[::2])),
        (ValueError, "overlaps x", lambda: rt.all_sum(block.data[::2], out=block[:2])),
        (ValueError, "overlaps x", lambda: rt.all_sum(block.data[:2], out=block[1:3])),
    ):
        with pytest.raises(error, match=words):
            await call()
    assert int(await rt.all_sum(1)) == 2


@fronts
def test_out_of_every_kind(front: str) -> None:
    results(2, outs, front=front)


async def odd_arrays(rt: Any, group: Any, ctl: Any) -> None:
    x = np.arange(12.0).reshape(3, 4)
    fixed = x.copy()
    fixed.flags.writeable = False
    moved = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float64).reshape(3, 4)
    assert not moved.flags.aligned
    for good in (x[::-1], x[:, ::-2], x.T, fixed, moved, np.broadcast_to(x[0], (3, 4)), x[:0], np.zeros((0, 3)), np.array(3.0)):
        found = await rt.all_sum(good)
        assert type(found) is np.ndarray and np.array_equal(found, 2 * good) and found.flags.c_contiguous
    with tempfile.NamedTemporaryFile() as file:
        mapped = np.memmap(file.name, np.float32, "w+", shape=(2, 2))
        mapped[:] = 3
        total = await rt.all_sum(mapped)
        assert type(total) is np.ndarray and total.tolist() == [[6.0] * 2] * 2
        assert await rt.all_sum(mapped, out=mapped) is mapped and mapped.tolist() == [[6.0] * 2] * 2
    low = [np.zeros(2, getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2", "int4", "uint4")]
    for error, words, bad in (
        (TypeError, "lose its mask", np.ma.masked_array([1.0], [True])),
        (TypeError, r"numpy.matrix is more than its items", np.ones((1, 1)).view(np.matrix)),
        (TypeError, r"recarray is more than its items", np.rec.array([(1, 2.0)])),
        (TypeError, "structured|void|supported", np.zeros(2, "i4,f4")),
        (TypeError, "byte order", np.zeros(2, ">f8")),
        (TypeError, "byte order", memoryview(np.zeros(2, ">f8"))),
        (TypeError, "byte order", np.zeros(2, np.dtype(ml_dtypes.bfloat16).newbyteorder())),
        (TypeError, "not supported", np.zeros(2, "M8[s]")),
        (TypeError, "not supported", np.array(["text"])),
        (TypeError, "not supported", np.array([None])),
        (TypeError, "not supported", array.array("u", "ab")),
        *((TypeError, "not supported by collectives", each) for each in low),
        (TypeError, r"on DLPack device \(2, 0\).*copy in host memory", Exotic([1.0], (2, 0))),
        (TypeError, "expected an array or a number, got dict", {}),
        (TypeError, "expected an array or a number, got object", object()),
        (TypeError, "cannot read through DLPack", Exotic(np.zeros(2, ">f4"))),
    ):
        for call in (rt.all_sum, rt.all_gather, lambda x: rt.recv_like(x, 1 - group.rank())):
            with pytest.raises(error, match=words):
                await call(bad)
    assert int(await rt.all_sum(1)) == 2


@fronts
def test_odd_arrays(front: str) -> None:
    results(2, odd_arrays, front=front)


def test_buffers_are_read_where_they_lie() -> None:
    for x in (array.array("f", [1, 2]), bytearray(8), bytes(8), memoryview(bytearray(8)), Exotic(np.ones(3)), (ctypes.c_int * 3)()):
        items = arrays.source(x, "test", None)
        start = x.items.ctypes.data if isinstance(x, Exotic) else np.frombuffer(x, np.uint8).ctypes.data
        assert items.ctypes.data == start, x


def test_in_a_group_of_one_every_kind_comes_back_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RT_RANK", "RT_WORLD_SIZE", "RT_HOSTFILE", "RT_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    group = rt.sync.init()
    for x in (array.array("f", [1, 2]), bytearray(8), b"ab", Exotic(np.ones(3))):
        assert group.all_sum(x) is x and group.all_gather(x) is x and group.broadcast(x) is x
    assert group.all_sum(Series([1.0])).tolist() == [1.0]
    out = bytearray(2)
    assert group.all_sum(b"ab", out=out) is out and out == b"ab"


async def cancelled_early(rt: Any, group: Any, ctl: Any) -> None:
    """Calls made and given up before the group has formed count with what they were given then, whatever becomes of the memory."""
    x, y = array.array("d", [1, 2]), np.ones(2)
    if os.environ["RT_RANK"] == "1":
        ctl.hear()
    calls = [rt.all_sum(x), rt.all_sum([y, x]), rt.average_gradients({"a": (y, None)})]
    if os.environ["RT_RANK"] == "0":
        tasks = [asyncio.ensure_future(awaited(call)) for call in calls]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 3
        x[:] = array.array("d", [9, 9])
        y[:] = 9
        ctl.tell("gave up")
    assert await calls[0] == array.array("d", [2, 4])
    first, second = await calls[1]
    assert first.tolist() == [2, 2] and second == array.array("d", [2, 4])
    (mean, nothing) = (await calls[2])["a"]
    assert mean.tolist() == [1, 1] and nothing is None


async def awaited(call: Any) -> Any:
    return await call


@pytest.mark.parametrize("front", FRONTS[1:])
def test_memory_of_a_call_cancelled_before_the_group_has_formed(front: str) -> None:
    with Ranks(2, cancelled_early, front=front, init=False) as ranks:
        assert ranks.hear(0) == "gave up"
        ranks.tell(1, "go")
        for outcome in ranks.wait():
            assert outcome.error is None and outcome.returncode == 0, outcome


# ---- torch, MLX, JAX --------------------------------------------------------------------------------------------------------------------

NAMES = tuple(code.name.lower() for code in collectives.DType)


async def of_torch(rt: Any, group: Any, ctl: Any) -> None:
    import torch

    me = group.rank()
    for name in NAMES:
        dtype = getattr(torch, name)
        x = torch.tensor([[0, 1, 1], [me, me, 0]]).to(dtype)
        for found, expected in (
            (await rt.all_max(x), torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)),
            (await rt.all_gather(x[1:]), torch.tensor([[0, 0, 0], [1, 1, 0]]).to(dtype)),
            (await rt.broadcast(x[1], 1), torch.tensor([1, 1, 0]).to(dtype)),
            (await rt.all_max(x.T), torch.tensor([[0, 1], [1, 1], [1, 0]]).to(dtype)),
            (await rt.all_max(x[1, 0]), torch.tensor(1).to(dtype)),
            (await rt.all_max(x[:0]), x[:0]),
        ):
            assert type(found) is torch.Tensor and found.dtype == dtype and found.shape == expected.shape and not found.requires_grad, name
            assert bool((found == expected).all()), (name, found, expected)
        sent, again = rt.send(x, 1 - me), rt.send(x, 1 - me)
        got, by_dtype = rt.recv_like(x, 1 - me), rt.recv((2, 3), dtype, 1 - me)
        assert await sent is x and await again is x
        assert type(await got) is torch.Tensor and bool((await got)[1, 0] == (1 - me))
        assert type(await by_dtype) is np.ndarray and (await by_dtype)[1, 0] == 1 - me
        out = torch.zeros_like(x)
        assert await rt.all_max(x, out=out) is out and bool((out == (await rt.all_max(x))).all())
        assert await rt.all_max(x, out=x) is x and bool((x == out).all())
    # requires_grad
    weight = torch.nn.Parameter(torch.ones(3))
    for call in (lambda: rt.all_sum(weight), lambda: rt.all_sum(torch.ones(3), out=weight), lambda: rt.all_sum(weight * 2)):
        with pytest.raises(TypeError, match=r"requires grad.*x.detach"):
            await call()
    with torch.no_grad():
        total = rt.broadcast(weight, out=weight)
        assert await total is weight and weight.requires_grad
        found = await rt.all_sum(weight)
    assert type(found) is torch.Tensor and not found.requires_grad and found.tolist() == [2.0] * 3
    # What autograd has saved may not change behind its back.
    saved = torch.ones(3)
    product = (weight * saved).sum()
    await rt.all_sum(saved, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        quiet = torch.ones(2)
        assert await rt.all_sum(quiet, out=quiet) is quiet and quiet.tolist() == [2.0, 2.0]
    # In the tensor's own memory, both ways.
    tensor = torch.arange(4.0)
    assert arrays.source(tensor, "", None).ctypes.data == tensor.data_ptr()
    assert arrays.written(tensor, (4,), np.dtype(np.float32), "").ctypes.data == tensor.data_ptr()

    class Own(torch.Tensor):
        pass

    imaginary = torch.ones(2, dtype=torch.complex64)
    for words, bad in (
        ("torch.float8_e4m3fn is not supported", torch.ones(2).to(torch.float8_e4m3fn)),
        ("is on meta.*result.to", torch.ones(2, device="meta")),
        ("to_dense", torch.ones(2).to_sparse()),
        ("resolve_conj", imaginary.conj()),
        ("resolve_neg", imaginary.conj().imag),
        ("Own is more than its items", torch.ones(2).as_subclass(Own)),
    ):
        with pytest.raises(TypeError, match=words):
            await rt.all_sum(bad)
    with pytest.raises(ValueError, match="contiguous"):
        await rt.all_sum(torch.ones(3), out=torch.ones(6)[::2])
    assert int(await rt.all_sum(1)) == 2


async def of_mlx(rt: Any, group: Any, ctl: Any) -> None:
    import mlx.core as mx

    me = group.rank()
    for name in NAMES:
        if name == "complex128":
            continue  # MLX has none
        dtype = mx.bool_ if name == "bool" else getattr(mx, name)
        x = mx.array([[0, 1, 1], [me, me, 0]]).astype(dtype, stream=mx.cpu)
        for found, expected in (
            (await rt.all_max(x), [[0, 1, 1], [1, 1, 0]]),
            (await rt.all_gather(x[1:]), [[0, 0, 0], [1, 1, 0]]),
            (await rt.all_max(x.T), [[0, 1], [1, 1], [1, 0]]),
            (await rt.all_max(x[1, 0]), 1),
            (await rt.all_max(x[:0]), []),
            (await rt.all_max(mx.maximum(x, x)), [[0, 1, 1], [1, 1, 0]]),
        ):
            assert type(found) is mx.array and found.dtype == dtype, (name, found)
            assert found.astype(mx.int32, stream=mx.cpu).tolist() == expected, (name, found)
        sent, again = rt.send(x, 1 - me), rt.send(x, 1 - me)
        got, by_dtype = rt.recv_like(x, 1 - me), rt.recv((2, 3), dtype, 1 - me)
        assert await sent is x and await again is x and type(await got) is mx.array
        assert type(await by_dtype) is np.ndarray and (await by_dtype)[1, 0] == 1 - me
    third = mx.array([1 / 3], dtype=mx.float64)
    assert (await rt.all_max(third)).item() == 1 / 3, "no detour through float32"
    lazy = mx.ones(3) * 2 + 1
    assert (await rt.all_sum(lazy)).tolist() == [6.0] * 3
    x = mx.arange(4)
    assert arrays.source(x, "", None).ctypes.data == np.asarray(memoryview(x)).ctypes.data
    with pytest.raises(TypeError, match=r"out: MLX arrays are values .* take what the call returns"):
        await rt.all_sum(x, out=x)
    out = np.zeros(4, np.int32)
    assert await rt.all_sum(x, out=out) is out and out.tolist() == [0, 2, 4, 6]
    assert int(await rt.all_sum(1)) == 2


async def of_jax(rt: Any, group: Any, ctl: Any) -> None:
    import jax
    import jax.numpy as jnp

    me = group.rank()
    jax.config.update("jax_enable_x64", True)
    for name in NAMES:
        dtype = getattr(jnp, name)
        x = jnp.array([[0, 1, 1], [me, me, 0]]).astype(dtype)
        for found, expected in (
            (await rt.all_max(x), [[0, 1, 1], [1, 1, 0]]),
            (await rt.all_gather(x[1:]), [[0, 0, 0], [1, 1, 0]]),
            (await rt.all_max(x.T), [[0, 1], [1, 1], [1, 0]]),
            (await rt.all_max(x[1, 0]), 1),
            (await rt.all_max(x[:0]), []),
        ):
            assert isinstance(found, jax.Array) and found.dtype == dtype and found.devices() == x.devices(), (name, found)
            assert np.asarray(found).real.astype(int).tolist() == expected, (name, found)
        sent, again = rt.send(x, 1 - me), rt.send(x, 1 - me)
        got, by_dtype = rt.recv_like(x, 1 - me), rt.recv((2, 3), dtype, 1 - me)
        assert await sent is x and await again is x and isinstance(await got, jax.Array)
        assert type(await by_dtype) is np.ndarray and (await by_dtype)[1, 0] == 1 - me
    x = jnp.arange(4.0)
    assert arrays.source(x, "", None).ctypes.data == x.unsafe_buffer_pointer()
    with pytest.raises(TypeError, match="JAX arrays are immutable"):
        await rt.all_sum(x, out=x)
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda y: rt.all_sum(y))(x)
    with pytest.raises(TypeError, match="key_data"):
        await rt.all_sum(jax.random.key(0))
    with pytest.raises(TypeError, match=r"float8_e4m3fn.* not supported"):
        await rt.all_sum(x.astype(jnp.float8_e4m3fn))
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(TypeError, match="jax_enable_x64 is off"):
        await rt.all_sum(x)
    many = jax.sharding.PositionalSharding if hasattr(jax.sharding, "PositionalSharding") else None
    assert many is None or jax.device_count() == 2
    split = jax.device_put(jnp.arange(4, dtype=jnp.float32), jax.NamedSharding(jax.make_mesh((2,), ("i",)), jax.P("i")))
    with pytest.raises(TypeError, match=r"on .*, .*and this backend moves host memory: pass jax.device_put"):
        await rt.all_sum(split)
    assert int(await rt.all_sum(1)) == 2


@needs_peers("torch")
@fronts
def test_torch(front: str) -> None:
    results(2, of_torch, front=front, timeout=60, **LENT)


@needs_peers("mlx")
@fronts
def test_mlx(front: str) -> None:
    results(2, of_mlx, front=front, timeout=60, **LENT)


@needs_peers("jax")
@fronts
def test_jax(front: str) -> None:
    how = {**LENT, "env": {**LENT["env"], "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}}
    results(2, of_jax, front=front, timeout=60, **how)
