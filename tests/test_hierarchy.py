"""Several hosts with several ranks each, on a slow wire: what crosses it is what one rank per host would send.

May live here: real ranks on hosts of ``netns`` whose cables are rate-limited by ``tbf``, and the bytes on those cables. May not: what the
schedules promise by themselves (``test_algorithms_hierarchy``), times: those are measured (``docs/performance.md``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import netns
import numpy as np
import pytest
from ranks import FRONTS, Ranks, succeeded

pytestmark = [pytest.mark.namespaces, pytest.mark.skipif(bool(netns.no_limits()), reason=netns.no_limits() or "-")]

COUNT = 1_000_003  # items, so that neither slices nor chunks are equal
HEADERS = 1.06  # of Ethernet, IP and TCP in segments of 1448 bytes 4.6 %; acknowledgements


def own(rank: int, dtype: Any) -> Any:
    """One rank's items: small whole numbers, whose sums are exact in every order."""
    return ((np.arange(COUNT) + 3 * rank) % 5).astype(dtype)


async def reduce(rt: Any, group: Any, ctl: Any, dtypes: Sequence[str]) -> list[Any]:
    """Reduce one array after the other, each when the test says so; return who shares a host, what was chosen, and hashes of results."""
    names: list[Any] = [group._core.hosts]
    for name in dtypes:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        x = own(group.rank(), dtype)
        await rt.barrier()
        ctl.tell("ready")
        ctl.hear()
        total = await rt.all_sum(x)
        expected = sum(own(rank, np.int64) for rank in range(group.size()))
        assert (total.astype(np.int64) == expected).all()
        names += [group._core.algorithm("all_reduce", name, COUNT), hashlib.sha256(total.tobytes()).hexdigest()]
        ctl.tell("done")
        ctl.hear()
    return names


@pytest.mark.parametrize(("layout", "front"), [
    *(((0, 0, 1, 1), front) for front in FRONTS),
    ((0, 1, 0, 1), "sync"), ((0, 1, 1, 2, 1), "sync"), ((0, 1, 2, 0, 1, 2), "uvloop"),
])  # fmt: skip
def test_a_host_sends_what_one_rank_would(layout: tuple[int, ...], front: str) -> None:
    number = max(layout) + 1
    dtypes = {"float32": (4, 2), "bfloat16": (2, 3)}  # partial sums of halves travel as float32, results as halves
    with netns.switched(number) as hosts:
        for host in hosts:
            host.limit("cable", "1gbit")
        env: dict[str, str | None] = {"RT_COORDINATOR": "10.2.0.1:5000", "RT_COORDINATOR_FD": None}
        with Ranks(len(layout), reduce, front=front, args=(tuple(dtypes),), env=env, on=[hosts[h].command() for h in layout]) as ranks:
            everyone = range(len(layout))
            for itemsize, ways in dtypes.values():
                for rank in everyone:
                    ranks.hear(rank)
                before = [host.sent("cable") for host in hosts]
                for rank in everyone:
                    ranks.tell(rank, "go on")
                for rank in everyone:
                    ranks.hear(rank)
                least = ways * (number - 1) / number * COUNT * itemsize
                for host, already in zip(hosts, before, strict=True):
                    assert 0.99 * least < host.sent("cable") - already < HEADERS * least, (layout, itemsize, host.number)
                for rank in everyone:
                    ranks.tell(rank, "go on")
            found = succeeded(ranks.wait(60))
    assert len({str(each) for each in found}) == 1, "all ranks hold the same bits"
    assert found[0][0] == layout and found[0][1::2] == ["hierarchy", "hierarchy_wide"]
