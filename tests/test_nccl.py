"""Groups on backend ``nccl`` over a stand-in for CuPy and NCCL: values, argument mapping, streams. Nothing here runs on a GPU.

May live here: what works, and what is refused. May not: failures (``test_nccl_failures``), what needs a GPU (``test_gpu``).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from expected import reduced, same, sample
from hosts import ROOT
from nccl import STAND_IN, results, to_device
from ranks import bare_environment, in_order

from rt.dtypes import DType, Op, op_supported

fronts = pytest.mark.parametrize("front", ["sync", "asyncio"])
COMPLEX = (DType.COMPLEX64, DType.COMPLEX128)


async def sums(rt: Any, group: Any, ctl: Any) -> str:
    me, size = group.rank(), group.size()
    for count in (1, 1000, 300_000):
        x = to_device(np.arange(count, dtype=np.float32) % 100 + me)
        expected = (np.arange(count, dtype=np.float32) % 100) * size + sum(range(size))
        total = await rt.all_sum(x)
        assert type(total) is type(x) and np.array_equal(total.get(), expected), count
        out = to_device(np.zeros(count, np.float32))
        assert await rt.all_sum(x, out=out) is out
        assert np.array_equal(out.get(), expected), count
        assert await rt.all_sum(x, out=x) is x
        assert np.array_equal(x.get(), expected), count
    return type(group.real._core if ctl.front == "sync" else group._core).__name__


@fronts
@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce(front: str, size: int) -> None:
    assert results(size, sums, front=front) == ["NcclGroup"] * size


def carried(dtype: DType, op: Op) -> bool:
    """Whether NCCL can do that, as the documentation has it."""
    if dtype in COMPLEX:
        return op in (Op.SUM, Op.MEAN)
    return op_supported(dtype, op) and (dtype is DType.BOOL or op not in (Op.AND, Op.OR, Op.XOR))


async def every_reduction(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for dtype in DType:
        for op in Op:
            if not carried(dtype, op):
                continue
            name, shape = op.name.lower(), (size * 2, 3)
            given = [sample(dtype, shape, rank) for rank in range(size)]
            whole, mine = reduced(dtype, op, given), to_device(given[me])
            label = dtype.name, name
            same((await rt.all_reduce(mine, name)).get(), whole, *label)
            same((await rt.sum_scatter(mine, name)).get(), whole[2 * me : 2 * me + 2], "sum_scatter", *label)
            rooted = await rt.reduce(mine, name, size - 1)
            assert (rooted is None) == (me != size - 1)
            if rooted is not None:
                same(rooted.get(), whole, "reduce", *label)
            counts = [2 * size - (size - 1), *[1] * (size - 1)]
            start = sum(counts[:me])
            same((await rt.reduce_scatter_v(mine, counts, name)).get(), whole[start : start + counts[me]], "reduce_scatter_v", *label)
            assert np.array_equal(mine.get(), given[me], equal_nan=dtype is DType.FLOAT32), "x is left alone"
            assert await rt.all_reduce(mine, name, out=mine) is mine
            same(mine.get(), whole, "in place", *label)


@pytest.mark.parametrize(("front", "size"), [("sync", 2), ("asyncio", 3)])
def test_every_operator_on_every_dtype(front: str, size: int) -> None:
    results(size, every_reduction, front=front)


async def every_move(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    for dtype in DType:
        given = [sample(dtype, (size, 2), rank) for rank in range(size)]
        mine, label = to_device(given[me]), dtype.name
        same((await rt.all_gather(mine)).get(), np.concatenate(given), label)
        same((await rt.broadcast(mine, 1)).get(), given[1], label)
        gathered = await rt.gather(mine, 1)
        assert (gathered is None) == (me != 1)
        if gathered is not None:
            same(gathered.get(), np.concatenate(given), "gather", label)
        same((await rt.scatter(mine, 1)).get(), given[1][me : me + 1], "scatter", label)
        same((await rt.all_to_all(mine)).get(), np.stack([each[me] for each in given]), "all_to_all", label)
        around = await rt.sendrecv(mine, (me + 1) % size, (me - 1) % size)
        same(around.get(), given[(me - 1) % size], "sendrecv", label)
        assert await rt.sendrecv(mine, (me + 1) % size, (me - 1) % size, out=mine) is mine
        same(mine.get(), given[(me - 1) % size], "sendrecv in place", label)
    x = to_device(np.arange(6, dtype=np.float32).reshape(3, 2))
    if me == 0:
        assert await rt.send(x, 1) is x
    elif me == 1:
        arrived = to_device(np.empty((3, 2), np.float32))
        assert await rt.recv((3, 2), np.float32, 0, out=arrived) is arrived
        same(arrived.get(), np.arange(6, dtype=np.float32).reshape(3, 2))
    await rt.barrier()


async def counted(rt: Any, group: Any, ctl: Any) -> None:
    me, size = group.rank(), group.size()
    counts = [2 * rank for rank in range(size)]
    blocks = [np.full((counts[rank], 3), rank + 1, np.int16) for rank in range(size)]
    mine, whole = to_device(blocks[me]), np.concatenate(blocks)
    same((await rt.all_gather_v(mine, counts)).get(), whole, "all_gather_v")
    gathered = await rt.gather_v(mine, counts, 0)
    if gathered is not None:
        same(gathered.get(), whole, "gather_v")
    same((await rt.scatter_v(to_device(whole), counts, size - 1)).get(), blocks[me], "scatter_v")
    empty = to_device(np.zeros((counts[me], 3), np.int16))
    assert await rt.scatter_v(to_device(whole) if me == 0 else None, counts, 0, out=empty) is empty
    same(empty.get(), blocks[me], "scatter_v out")
    sent = [[me * size + peer, 1] for peer in range(size)]
    rows = to_device(np.concatenate([np.full((1 + (me + peer) % 2, 2), sent[peer][0], np.int64) for peer in range(size)]))
    lengths = [1 + (me + peer) % 2 for peer in range(size)]
    expected = np.concatenate([np.full((1 + (me + peer) % 2, 2), peer * size + me, np.int64) for peer in range(size)])
    same((await rt.all_to_all_v(rows, lengths, lengths)).get(), expected, "all_to_all_v")
    assert await rt.all_to_all_v(rows, lengths, lengths, out=rows) is rows
    same(rows.get(), expected, "all_to_all_v in place")
    gathering = to_device(np.zeros((size, 2), np.float64))
    block = gathering[me : me + 1]
    sys.modules["cupy"].copyto(block, to_device(np.full((1, 2), me, np.float64)))
    assert await rt.all_gather(block, out=gathering) is gathering
    same(gathering.get(), np.repeat(np.arange(size, dtype=np.float64)[:, None], 2, 1), "all_gather in place")
    with pytest.raises(ValueError, match="out overlaps x"):
        await rt.all_gather(gathering[0:1] if me else gathering[1:2], out=gathering)
    same((await rt.all_sum(to_device(np.arange(12, dtype=np.float32).reshape(6, 2))[::2])).get(),
         np.arange(12, dtype=np.float32).reshape(6, 2)[::2] * size, "not contiguous")  # fmt: skip
    same((await rt.all_sum(to_device(np.zeros((0, 2), np.float32)))).get(), np.zeros((0, 2), np.float32), "nothing")


@fronts
def test_every_move(front: str) -> None:
    results(3, every_move, front=front)
    results(3, counted, front=front)


async def refused(rt: Any, group: Any, ctl: Any) -> list[str]:
    """What is refused is refused before it counts: the group goes on."""
    x, cupy = to_device(np.ones(4, np.int32)), sys.modules["cupy"]
    texts = []
    with cupy.cuda.Device(1 - group.rank()):
        elsewhere = to_device(np.ones(4, np.int32))
    for kind, call in (
        (TypeError, lambda: rt.scan(x)),
        (TypeError, lambda: rt.all_reduce(x, "xor")),
        (TypeError, lambda: rt.all_reduce(to_device(np.ones(4, np.complex64)), "max")),
        (ValueError, lambda: rt.send(x, 1 - group.rank(), tag=3)),
        (TypeError, lambda: rt.all_sum(x, out=np.ones(4, np.int32))),
        (ValueError, lambda: rt.all_sum(x, out=to_device(np.ones(8, np.int32))[::2])),
        (TypeError, lambda: rt.all_sum(x, stream=3)),
        (ValueError, lambda: rt.all_sum(elsewhere)),
        (ValueError, lambda: rt.all_sum([x, np.ones(4, np.int32)], out=[x])),
    ):
        with pytest.raises(kind) as caught:
            await call()
        texts.append(str(caught.value))
    assert (await rt.all_sum(x)).get().tolist() == [2] * 4
    return texts


async def on_my_device(rt: Any, group: Any, ctl: Any) -> list[str]:
    sys.modules["cupy"].cuda.Device(group.rank()).use()
    return await refused(rt, group, ctl)


@fronts
def test_what_nccl_cannot_do_says_what_to_do(front: str) -> None:
    said = "; pass cupy.asnumpy(x), which travels over the ring's links"
    for rank, texts in enumerate(results(2, on_my_device, front=front, env={"STANDIN_DEVICES": "2"})):
        assert texts[0] == "scan: NCCL has no prefix reductions" + said
        assert texts[1] == "all_reduce: NCCL has no operator 'xor' for int32" + said
        assert texts[2] == "all_reduce: NCCL has no operator 'max' for complex64" + said
        assert texts[3] == "send: NCCL has no tags, found tag=3, expected 0 for an array on a device; or" + said[1:]
        assert texts[4] == "all_sum: x and out must both be arrays of CuPy, or both lie in host memory"
        assert texts[5] == "all_sum: out must be C-contiguous, aligned and writeable, and is not C-contiguous"
        assert texts[6] == "all_sum: stream must be a stream of CuPy (cupy.cuda.Stream), not int"
        assert texts[7].startswith(f"all_sum: the array is on device {1 - rank}, expected {rank}, the one of this rank; make arrays under")


async def streams(rt: Any, group: Any, ctl: Any) -> None:
    """Calls are launched on the caller's stream, in order with the caller's kernels, and before the call returns."""
    cuda = sys.modules["cupy"].cuda
    nccl, me = cuda.nccl, group.rank()
    own, other = cuda.Stream(non_blocking=True), cuda.Stream(non_blocking=True)
    with own:
        x = to_device(np.full(1000, me, np.float32))
        work = rt.all_sum(x)
    assert nccl.calls[-1][0] == "allReduce" and nccl.calls[-1][-1] == own.ptr
    assert (await work).get().tolist() == [1] * 1000
    with own:
        x = to_device(np.full(1000, me + 1, np.float32))
    own.synchronize()
    assert (await rt.all_sum(x, stream=other)).get().tolist() == [3] * 1000
    assert nccl.calls[-1][-1] == other.ptr
    assert cuda.get_current_stream() is cuda.Stream.null
    y = to_device(np.zeros(1000, np.float32))
    other.begin_capture()
    assert await rt.all_sum(x, out=y, stream=other) is y
    graph = other.end_capture()
    cuda.Stream.null.synchronize()
    assert y.get().tolist() == [0] * 1000, "nothing runs while it is captured"
    for _ in range(2):
        graph.launch(other)
    other.synchronize()
    assert y.get().tolist() == [3] * 1000


@fronts
def test_streams(front: str) -> None:
    results(2, streams, front=front)


async def lists(rt: Any, group: Any, ctl: Any) -> None:
    me, nccl = group.rank(), sys.modules["cupy"].cuda.nccl
    arrays = [to_device(np.full(count, me + 1, kind)) for count, kind in ((3, np.float32), (100, np.int64), (7, np.float16))]
    before = len(nccl.calls)
    totals = await rt.all_sum(arrays)
    assert [call[0] for call in nccl.calls[before:]] == ["groupStart", *["allReduce"] * 3, "groupEnd"]
    for x, total in zip(arrays, totals, strict=True):
        same(total.get(), np.full(x.shape, 3, x.dtype))
    (one,) = await rt.all_sum(arrays[:1])
    same(one.get(), np.full(3, 3, np.float32))
    tree = {"a": arrays[0], "b": [arrays[2]]}
    for wire in (None, np.float32):
        mean = await rt.average_gradients(tree, communication_type=wire)
        same(mean["a"].get(), np.full(3, 1.5, np.float32))
        same(mean["b"][0].get(), np.full(7, 1.5, np.float16))
    with pytest.raises(ValueError, match="out must be a list of 3 arrays"):
        await rt.all_sum(arrays, out=arrays[:2])
    with pytest.raises(TypeError, match="NCCL has no operator 'xor' for int64"):
        await rt.all_reduce([to_device(np.array([True])), arrays[1]], "xor")
    same((await rt.all_sum(arrays))[0].get(), np.full(3, 3, np.float32), "the group goes on")


@fronts
def test_lists_and_trees(front: str) -> None:
    results(2, lists, front=front)


async def both_kinds(rt: Any, group: Any, ctl: Any) -> None:
    """Arrays of the host, numbers and objects beside arrays on the device, and parts of the group."""
    me, size = group.rank(), group.size()
    x = np.full(5, me, np.float32)
    for _ in range(3):  # no table of calls may carry one past the comparison
        same(await rt.all_sum(x), np.full(5, sum(range(size)), np.float32))
        same((await rt.all_sum(to_device(x))).get(), np.full(5, sum(range(size)), np.float32))
    rows = [1 + (me + peer) % 2 for peer in range(size)]
    for kind in (np.asarray, to_device):  # both are compared, though each two ranks agree on other lengths
        await rt.all_to_all_v(kind(np.zeros((sum(rows), 2))), rows, rows)
    assert float(await rt.all_sum(1.0)) == size
    if me == 0:
        await rt.send(x, 1, tag=7)
    elif me == 1:  # without an example: what comes from the host, as a program for the ring expects it
        same(await rt.recv(x.shape, x.dtype, 0, tag=7), np.zeros(5, np.float32))
    assert await rt.all_gather_objects(me) == list(range(size))
    part = await group.split(me % 2, -me)
    total = await part.all_sum(to_device(x))
    same(total.get(), np.full(5, sum(rank for rank in range(size) if rank % 2 == me % 2), np.float32))
    members = [rank for rank in range(size) if rank % 2 == me % 2]
    same((await part.all_gather(to_device(np.array([me])))).get(), np.array(members))
    around, other = size - 1 - me, np.full(3, me)
    if around != me:
        same(await rt.sendrecv(other, around, around), np.full(3, around))
        like = await in_order([rt.sendrecv(to_device(other), around, around)])
        same(like[0].get(), np.full(3, around))


@fronts
def test_arrays_of_the_host_and_parts_of_a_group(front: str) -> None:
    results(4, both_kinds, front=front)


async def crossing(rt: Any, group: Any, ctl: Any) -> None:
    """Two ranks that both send before they receive, many times, and in a chain with collectives."""
    peer = 1 - group.rank()
    for turn in range(5):
        x = to_device(np.full(300, group.rank() * 10 + turn))
        y = to_device(np.zeros(300, np.int64))
        _, got, total = await asyncio.gather(*(as_coroutine(w) for w in (rt.send(x, peer), rt.recv_like(x, peer, out=y), rt.all_sum(x))))
        assert got is y
        same(y.get(), np.full(300, peer * 10 + turn))
        same(total.get(), np.full(300, 10 + 2 * turn))
    for many in (False, True):
        y = to_device(np.zeros(300, np.int64))
        mine, out = ([x], [y]) if many else (x, y)
        if group.rank() == 0:
            task = asyncio.ensure_future(as_coroutine(rt.all_sum(mine, out=out)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done(), "the other rank has not called"
            await group.send_object("call", 1)
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await group.recv_object(0)
            await rt.all_sum(mine, out=out)
        assert y.get().tolist() == [18] * 300, "it has ended, and the memory is the caller's"


async def as_coroutine(work: Any) -> Any:
    return await work


def test_messages_of_a_turn_go_together() -> None:
    results(2, crossing, front="asyncio")


async def alone(rt: Any, group: Any, ctl: Any) -> None:
    x = to_device(np.arange(3, dtype=np.float32))
    for call in (rt.all_sum, rt.all_gather, rt.sum_scatter, rt.broadcast, rt.all_to_all):
        assert await call(x) is x
    out = to_device(np.zeros(3, np.float32))
    assert await rt.all_sum(x, out=out) is out
    same(out.get(), np.arange(3, dtype=np.float32))
    assert (await rt.all_sum([x]))[0] is x
    await rt.close()


@fronts
def test_a_group_of_one(front: str) -> None:
    results(1, alone, front=front)


async def where(rt: Any, group: Any, ctl: Any) -> tuple[int, Any]:
    return group.size(), sys.modules["cupy"].cuda.nccl.calls[0]


def test_each_rank_of_a_host_has_a_device() -> None:
    assert results(2, where, env={"STANDIN_DEVICES": "4"}) == [(2, ("init", 2, rank, rank)) for rank in range(2)]




async def from_variables(rt: Any, _: Any, ctl: Any) -> float:
    os.environ |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": os.environ.pop("RT_COORDINATOR").rpartition(":")[2]}
    os.environ |= {"MLX_RANK": os.environ.pop("RT_RANK"), "MLX_WORLD_SIZE": os.environ.pop("RT_WORLD_SIZE")}
    fd = os.environ.pop("RT_COORDINATOR_FD", None)
    if fd is not None:
        os.close(int(fd))
    group = await rt.init(strict=True)
    return float((await group.all_sum(to_device(np.ones(1, np.float32)))).get()[0])


def test_variables_of_mlx() -> None:
    assert results(2, from_variables, init=False, env={"RT_BACKEND": None}) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MLX_NCCL_TIMEOUT": "200"}, "RendezvousError rank 1/2: the group did not form within 0.2 s"),
        ({"MLX_NCCL_TIMEOUT": "200", "RT_CONNECT_TIMEOUT": "0.3"}, "RendezvousError rank 1/2: the group did not form within 0.3 s"),
        ({"MLX_NCCL_TIMEOUT": "soon"}, "ConfigError MLX_NCCL_TIMEOUT: found 'soon', expected a number of milliseconds > 0"),
    ],
)
def test_the_time_that_mlx_gives_to_connecting(given: dict[str, str], said: str) -> None:
    code = "import rt.sync as rt\ntry: rt.init(True, 'nccl')\nexcept Exception as error: print(type(error).__name__, error)"
    place = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "1", "MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}  # where nobody listens
    env = {**bare_environment(), "PYTHONPATH": os.pathsep.join([STAND_IN, ROOT]), **place, **given}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith(said), done


def declared(text: str) -> list[str]:
    """Names of the parameters in what Cython puts before a docstring."""
    inside = re.search(r"\(([^)]*)\)", text)
    assert inside is not None, text
    words = [part.partition("=")[0].split()[-1] for part in inside[1].split(",") if part.strip()]
    return [word for word in words if word != "self"]


def test_the_stand_in_has_the_names_of_cupy() -> None:
    """Where CuPy and NCCL can be imported, which needs no GPU."""
    real = pytest.importorskip("cupy.cuda.nccl", reason="no CuPy here: pip install 'rt-collectives[cuda12]' into any environment")
    if not real.available:
        pytest.skip("CuPy is here and found no libnccl.so.2")
    sys.path.insert(0, STAND_IN)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "cupy"}
    try:
        from cupy.cuda import nccl  # type: ignore[import-not-found]
    finally:
        sys.path.remove(STAND_IN)
        for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
            del sys.modules[name]
        sys.modules.update(kept)
    for name in [name for name in vars(nccl) if name.startswith("NCCL_")]:
        assert getattr(nccl, name) == getattr(real, name), name
    assert declared(real.NcclCommunicator.__doc__) == list(inspect.signature(nccl.NcclCommunicator).parameters)
    for name, function in vars(nccl.NcclCommunicator).items():
        if not name.startswith("_") and inspect.isfunction(function):
            assert declared(getattr(real.NcclCommunicator, name).__doc__) == list(inspect.signature(function).parameters)[1:], name


