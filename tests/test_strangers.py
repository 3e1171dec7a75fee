"""Strangers on a rank's port, end to end: the job forms and computes all the same.

May live here: real ranks with strangers connected while they wait. May not: the handshake itself (``test_bootstrap``).
"""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import pytest
import ranks

from rt.errors import RendezvousError


async def meet_late(api: Any, group: Any, ctl: Any) -> float:
    """Rank 0 waits at its port; rank 1 comes when it is told to. Then they reduce 1 MiB."""
    if os.environ["RT_RANK"] == "0":
        ctl.tell(os.environ["RT_COORDINATOR"])
    else:
        ctl.hear()
    await api.init()
    total = await api.all_sum(np.full(1 << 18, 1.5, np.float32))
    return float(total.min() + total.max())


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_garbage_half_hellos_and_200_silent_connections_and_the_job_goes_on(front: str) -> None:
    strangers = []
    with ranks.Ranks(2, meet_late, front=front, init=False) as world:
        host, port = world.hear(0, 20).rsplit(":", 1)
        for words in [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"rtHI\x01"] + [b""] * 200:
            stranger = socket.create_connection((host, int(port)))
            stranger.sendall(words)
            strangers.append(stranger)
        world.tell(1, "come")
        outcomes = world.wait(30)
        assert [outcome.value for outcome in outcomes] == [6.0, 6.0], outcomes
    for stranger in strangers:
        stranger.close()


async def knock_with_another_secret(api: Any, group: Any, ctl: Any) -> tuple[str, str]:
    """Rank 1 comes with a secret of its own first, and then with the right one."""
    if os.environ["RT_RANK"] == "0":
        await api.init()
        return "", str(float(await api.all_sum(1.0)))
    told = ""
    try:
        await api.init(secret="the secret of somebody else", connect_timeout=5)
    except RendezvousError as error:
        told = str(error)
    await api.init()
    return told, str(float(await api.all_sum(1.0)))


@pytest.mark.parametrize("front", ranks.FRONTS)
def test_a_wrong_secret_is_refused_and_the_job_goes_on(front: str) -> None:
    with ranks.Ranks(2, knock_with_another_secret, front=front, init=False) as world:
        outcomes = [outcome.value for outcome in world.wait(30)]
    assert [total for _, total in outcomes] == ["2.0", "2.0"]
    assert "secret" in outcomes[1][0] and "somebody" not in outcomes[1][0]
