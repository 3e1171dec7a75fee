"""What needs a CUDA device: backend ``nccl`` on NCCL itself.

May live here: tests marked ``gpu``. May not: anything that the stand-in can show (``test_nccl*``). ``docs/gpu.md`` says which of these have
ever run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expected import reduced, same, sample
from ranks import Ranks
from test_nccl import carried

from rt import device_arrays
from rt.dtypes import DType, Op
from rt.errors import CollectiveTimeoutError
from rt.group import Call
from rt.schedule import Collective
from transports import nccl

_MULTI_RANK = 23000  # NCCL 2.30, the first that lets ranks share a device
_WHY_NOT = nccl.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_WHY_NOT), reason=f"backend 'nccl', {_WHY_NOT}")]


class Alone:
    """A communicator of one rank, and calls on it as a group of one makes none: NCCL is to carry them."""

    def __init__(self) -> None:
        self.cupy, self.nccl = nccl.load()
        self.comm = self.nccl.NcclCommunicator(1, self.nccl.get_unique_id(), 0)
        self.wording = nccl.Wording(self.cupy, self.nccl, 0, 1)
        self.stream = self.cupy.cuda.Stream(non_blocking=True)

    def call(self, call: Call, x: Any) -> Any:
        """Carry out a call and return its result, which is as large as its input."""
        source = device_arrays.on_device(x)
        with self.stream:
            target = device_arrays.fresh(x.shape, x.dtype)
            self.wording.launch(self.comm, [self.wording.say(call, source, target)], self.stream)
        self.stream.synchronize()
        return target.owner


def test_one_rank() -> None:
    alone = Alone()
    for dtype in DType:
        x = sample(dtype, (4, 3), 0)
        mine = alone.cupy.asarray(x)
        for op in Op:
            for kind in (Collective.ALL_REDUCE, Collective.REDUCE, Collective.REDUCE_SCATTER):
                if carried(dtype, op):
                    found = alone.call(Call(kind, dtype, op, x.shape, x.size, root=0), mine)
                    same(found.get(), reduced(dtype, op, [x]), kind.name, dtype.name, op.name)
        for kind in (Collective.ALL_GATHER, Collective.BROADCAST, Collective.ALL_TO_ALL, Collective.SCATTER, Collective.GATHER):
            same(alone.call(Call(kind, dtype, Op.SUM, x.shape, x.size, root=0), mine).get(), x, kind.name, dtype.name)
    alone.comm.destroy()


def test_a_graph() -> None:
    alone = Alone()
    x = alone.cupy.asarray(np.arange(1000, dtype=np.float32))
    call = Call(Collective.ALL_REDUCE, DType.FLOAT32, Op.SUM, x.shape, x.size)
    alone.call(call, x)  # what NCCL sets up at the first call must not be captured
    source = device_arrays.on_device(x)
    with alone.stream:
        target = device_arrays.fresh(x.shape, x.dtype)
        alone.stream.begin_capture()
        alone.wording.launch(alone.comm, [alone.wording.say(call, source, target)], alone.stream)
        graph = alone.stream.end_capture()
        graph.launch(alone.stream)
    alone.stream.synchronize()
    same(target.owner.get(), np.arange(1000, dtype=np.float32))
    alone.comm.destroy()


async def two(rt: Any, group: Any, ctl: Any) -> list[str]:
    import cupy

    me = group.rank()
    x = cupy.asarray(np.full(1 << 20, me + 1, np.float32))
    assert (await rt.all_sum(x)).get()[0] == 3
    around = await rt.sendrecv(x, 1 - me, 1 - me)
    assert around.get()[-1] == 2 - me
    if me:
        ctl.hear()
        with pytest.raises(CollectiveTimeoutError) as caught:
            await rt.all_sum(x)
    else:
        with pytest.raises(CollectiveTimeoutError) as caught:
            await rt.all_sum(x, timeout=2.0)
        ctl.tell("timed out")
    return [type(caught.value).__name__, str(caught.value.culprit)]


@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_two_ranks_on_one_gpu(front: str) -> None:
    _, library = nccl.load()
    if library.get_version() < _MULTI_RANK:
        pytest.skip(f"NCCL {library.get_version()}, and ranks can share a device from {_MULTI_RANK} on")
    env = {
        "RT_BACKEND": "nccl", "CUDA_VISIBLE_DEVICES": "0", "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4",
        "NCCL_NVLS_ENABLE": "0",
    }  # fmt: skip
    with Ranks(2, two, front=front, env=env) as ranks:
        assert ranks.hear(0, 90) == "timed out"
        ranks.tell(1, "go on")
        outcomes = ranks.wait(60)
    assert [outcome.value for outcome in outcomes] == [[CollectiveTimeoutError.__name__, "1"]] * 2, "\n".join(map(str, outcomes))


