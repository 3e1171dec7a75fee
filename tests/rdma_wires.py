"""Backend ``jaccl`` over devices of the guest that are joined by a wire: several per rank, and what a wire does that loses messages.

May live here: tests that need such devices. May not: what one device is enough for (``rdma_suite``).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdma_ranks import collect, run, start
from rdma_suite import items, sh, the_rest

import rt
import rt.sync
from rt import world
from transports import verbs

pytestmark = pytest.mark.skipif("RT_RDMA_GUEST" not in os.environ, reason="runs in the guest: make test-rdma")


@pytest.fixture
def veth() -> Iterator[None]:
    sh("sysctl -qw net.core.netdev_max_backlog=100000")  # at the default acknowledgements get lost, and rxe hangs
    sh("ip link add rt-v0 mtu 4200 type veth peer name rt-v1 mtu 4200")
    for number in (0, 1):
        sh(f"ip address add 10.78.0.{number + 1}/24 dev rt-v{number}; ip link set rt-v{number} up")
        sh(f"sysctl -qw net.ipv4.conf.rt-v{number}.accept_local=1 net.ipv4.conf.rt-v{number}.rp_filter=0 net.ipv4.conf.all.rp_filter=0")
        sh(f"rdma link add rxev{number} type rxe netdev rt-v{number}")
    yield
    sh("rdma link delete rxev0; rdma link delete rxev1; ip link delete rt-v0")


def striped(rank: int) -> tuple[int, list[int]]:
    rt.sync.init(strict=True)
    x = items(rank, 1_000_000, np.int64)
    assert np.array_equal(rt.sync.all_sum(x), x + items(1 - rank, x.size, np.int64))
    here = next(iter(world.worlds()))
    assert here.rdma is not None
    carried = [link.bytes_sent for link in here.rdma.links[1 - rank]]
    rt.sync.close()
    return here.lanes, carried


def test_two_devices_between_two_ranks(veth: None, tmp_path: Path) -> None:
    (tmp_path / "devices.json").write_text(json.dumps([[None, ["rxe0", "rxev0"]], [["rxe0", "rxev1"], None]]))
    for lanes, carried in run(2, striped, env={"RT_IBV_DEVICES": str(tmp_path / "devices.json")}):
        assert lanes == 2 and min(carried) > 1_000_000


# -- connections of devices that repeat nothing


@pytest.fixture
def only_uc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the devices had nothing else."""
    monkeypatch.setattr(verbs, "KINDS", ("UC",))


@pytest.mark.parametrize("ring", ("0", "1"))
def test_unreliable_connections_carry_everything(only_uc: None, ring: str) -> None:
    run(4, the_rest, env={"RT_JACCL_RING": ring})


def over_lossy_wires(rank: int, together: Any) -> str:
    rt.sync.init(strict=True)
    here = next(iter(world.worlds()))
    assert here.rdma is not None
    assert not here.rdma.links[1 - rank][0].reliable
    rt.sync.barrier()
    together.wait(60)  # now the test makes the wire lossy
    together.wait(60)
    x = np.ones(1 << 20, np.float32)
    with pytest.raises(rt.PeerLostError) as caught:
        for _ in range(1000):
            assert rt.sync.all_sum(x)[-1] == 2
    rt.sync.close()
    return str(caught.value)


@pytest.mark.parametrize("percent", (1, 100))
def test_a_lost_message_is_noticed(only_uc: None, veth: None, tmp_path: Path, percent: int) -> None:
    """By the next one that comes; or, where nothing comes any more, because the two sides compare."""
    (tmp_path / "devices.json").write_text(json.dumps([[None, "rxev0"], ["rxev1", None]]))
    sh("modprobe sch_netem")
    together = multiprocessing.get_context("fork").Barrier(3)
    processes, ends = start(2, over_lossy_wires, together, env={"RT_IBV_DEVICES": str(tmp_path / "devices.json")})
    together.wait(60)
    sh(f"tc qdisc add dev rt-v0 root netem loss {percent}%")
    together.wait(60)
    found = collect(processes, ends, 60)
    for said in found:
        assert re.search(r"lost rank [01] \(rdma rxev[01] port 1\): .*messages? from rank [01] (was|were) lost: the connection", said), said
