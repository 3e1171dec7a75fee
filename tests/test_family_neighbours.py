"""The family of collectives where only neighbours are connected: over real networks of four hosts in a ring.

May live here: results of the calls of ``test_family`` on such a network. May not: making the hosts (``netns``), whole worlds on one host.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import netns
import pytest
from hosts import PATIENCE, ranks_on, ring_as_mlx_writes_it, ring_file
from ranks import FRONTS, succeeded
from test_family import around, counted, long_prefixes, plain
from test_family_together import chaos

pytestmark = hosts.NEEDED


@pytest.fixture(scope="module")
def ring_of_four() -> Iterator[list[netns.Host]]:
    with netns.ring_of_hosts(4) as made:
        yield made


async def family(rt: Any, group: Any, ctl: Any) -> None:
    await plain(rt, group, ctl, (0, 1, 37, 4097, 30_000), 0)
    await counted(rt, group, ctl, 1)
    await long_prefixes(rt, group, ctl)
    await around(rt, group, ctl)
    await chaos(rt, group, ctl, 4, 100)


@pytest.mark.parametrize("front", FRONTS)
def test_the_family_where_only_neighbours_connect(front: str, ring_of_four: list[netns.Host], tmp_path: Path) -> None:
    with ranks_on(ring_of_four, family, ring_file(tmp_path, ring_as_mlx_writes_it(4)), front=front) as ranks:
        succeeded(ranks.wait(3 * PATIENCE))
