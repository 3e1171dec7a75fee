"""Blocking ranks that wait for each other in different calls are told so, and nobody else is.

May live here: what ``rt/_deadlock.pxi`` promises, over real processes. May not: disagreements within one channel (``test_mismatch``).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import ranks

from rt.errors import GroupBrokenError

LARGE = 100_000  # float32: more than may be sent before the receiver has called


async def crossed(api: Any, group: Any, ctl: Any, calls: tuple[str, str]) -> tuple[str, str]:
    """Make this rank's call of two that wait for each other; return the error's type and text without the part about this rank."""
    x = np.ones(LARGE, np.float32)
    peer = 1 - group.rank()
    a, b = await group.split(0), await group.split(0)
    kinds = {
        "send tag 1": lambda: group.send(x, peer, tag=1),
        "send tag 2": lambda: group.send(x, peer, tag=2),
        "recv tag 1": lambda: group.recv_like(x, peer, tag=1),
        "recv tag 2": lambda: group.recv_like(x, peer, tag=2),
        "all_sum": lambda: group.all_sum(x),
        "all_sum in a": lambda: a.all_sum(x),
        "all_sum in b": lambda: b.all_sum(x),
    }
    try:
        await kinds[calls[group.rank()]]()
    except GroupBrokenError as error:
        return type(error).__name__, str(error).split(": ", 2)[2]
    return "nothing", ""


@pytest.mark.parametrize(
    "calls",
    [
        ("send tag 1", "recv tag 2"),
        ("recv tag 1", "send tag 2"),
        ("send tag 1", "send tag 1"),
        ("recv tag 1", "recv tag 1"),
        ("send tag 1", "all_sum"),
        ("all_sum", "recv tag 1"),
        ("all_sum in a", "all_sum in b"),
    ],
)
def test_two_blocked_ranks_that_wait_for_each_other_are_told_so(calls: tuple[str, str]) -> None:
    outcomes = [outcome.value for outcome in ranks.run(2, crossed, front="sync", args=(calls,))]
    assert [kind for kind, _ in outcomes] == ["MismatchError", "MismatchError"]
    (_, first), (_, second) = outcomes
    assert first == second and "each waits for the other" in first
    hints = {
        ("send tag 1", "send tag 1"): "receive first, or use sendrecv",
        ("recv tag 1", "recv tag 1"): "neither sends",
        ("all_sum in a", "all_sum in b"): "in two groups",
    }
    assert hints.get(calls, "") in first and "different tables" not in first
    for rank, call in enumerate(calls):
        assert f"rank {rank} called {call.split()[0].replace('all_sum', 'all_reduce')}" in first


async def late(api: Any, group: Any, ctl: Any) -> float:
    """Rank 1 blocks long before rank 0 makes its calls, which come in another order of tags than rank 1 would like."""
    x = np.full(LARGE, 3.0, np.float32)
    if group.rank() == 0:
        ctl.hear()  # rank 1 has been blocked for longer than it takes to say so
        await group.send(x[:100], 1, tag=5)
        await group.send(x, 1, tag=2)
        return 3.0
    ctl.tell("blocks")
    got = await group.recv_like(x, 0, tag=2)
    await group.recv_like(x[:100], 0, tag=5)
    return float(got.max())


def test_a_blocked_rank_whose_peer_comes_late_is_not_accused() -> None:
    with ranks.Ranks(2, late, front="sync") as world:
        assert world.hear(1, 20) == "blocks"
        time.sleep(1.5)  # the passing of time is what is tested
        world.tell(0, "go")
        assert [outcome.value for outcome in world.wait(20)] == [3.0, 3.0]
