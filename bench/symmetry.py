"""Which ranks do the same as which: a few stand for all, where their schedules show that they may.

May live here: candidates for a symmetry, and the proof. May not: what is simulated (``simulator.py``).

A symmetry names ranks anew, whole hosts at a time, so that every rank's schedule becomes that of the rank it is named after. Then the
ranks of host 0 stand for those of every host: what one of them hears from another host comes at the moment at which the one that stands
for the sender sent it. Two kinds are tried: turning the ring of hosts (rings, direct exchanges), and flipping bits of the host's number
(doubling). Neither is assumed: schedules are generated and compared, step by step, with what they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.program import Program

Make = Callable[[int], Program]  # rank -> its program
_HOSTS_COMPARED = 8


@dataclass(frozen=True)
class Symmetry:
    """``turned(rank, host)``: the rank of host 0 that stands for one, or the name that goes with it; ``host`` is what is renamed to 0."""

    name: str
    turned: Callable[[int, int], int]

    def image(self, per_host: int) -> Callable[[int, int], tuple[int, int]]:
        """Return what ``Simulation`` asks: which rank stands for a peer, and what it calls the rank that speaks to it."""

        def image(rank: int, peer: int) -> tuple[int, int]:
            host = peer // per_host
            return self.turned(peer, host), self.turned(rank, host)

        return image


def alone(rank: int, peer: int) -> tuple[int, int]:
    """Let every rank stand for itself."""
    return peer, rank


def candidates(hosts: int, per_host: int) -> Iterator[Symmetry]:
    """Give the symmetries that schedules on so many hosts may have."""
    size = hosts * per_host
    yield Symmetry("turn", lambda rank, host: (rank - host * per_host) % size)
    if hosts & (hosts - 1) == 0 and per_host & (per_host - 1) == 0:
        yield Symmetry("flip", lambda rank, host: rank ^ (host * per_host))


def find(make: Make, hosts: int, per_host: int) -> tuple[Symmetry, dict[int, Program]] | None:
    """Return a symmetry and the programs of host 0, or None where there is no symmetry.

    Every rank of up to eight hosts is compared; where there are more, one rank of each of eight that are spread over them.
    """
    mine = {rank: make(rank) for rank in range(per_host)}
    for symmetry in candidates(hosts, per_host):
        if all(_same(make, mine, symmetry, host, rank) for host, rank in _samples(hosts, per_host)):
            return symmetry, mine
    return None


def _samples(hosts: int, per_host: int) -> list[tuple[int, int]]:
    if hosts <= _HOSTS_COMPARED:
        return [(host, host * per_host + local) for host in range(1, hosts) for local in range(per_host)]
    spread = {1, 2, 3, hosts // 2, hosts // 2 + 1, hosts // 3, hosts - 2, hosts - 1}
    return [(host, host * per_host + index % per_host) for index, host in enumerate(sorted(spread))]


def _same(make: Make, mine: dict[int, Program], symmetry: Symmetry, host: int, rank: int) -> bool:
    return make(rank).renamed(lambda peer: symmetry.turned(peer, host)) == mine[symmetry.turned(rank, host)].moves
