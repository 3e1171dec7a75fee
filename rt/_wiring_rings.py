"""Meshes and rings in a graph of hosts: is every pair joined, and is there a way through all hosts and back?

May live here: graphs as sets of neighbours, nothing of hosts, cables or files. May not: what is done with a ring.

A ring through all hosts is a Hamiltonian cycle, and nobody knows a quick way to find one in every graph, or to show that there is none.
What people plug together is kind: a host has few cables, or is joined with everybody. So three ways are tried, each bounded: the order that
was given; search in which every edge that must be in a ring, or cannot be, is settled at once (after Rubin, "A Search Procedure for
Hamilton Paths and Circuits", J. ACM 21, 1974), which also shows that there is none; and rotations of a path (after Posa, "Hamiltonian
circuits in random graphs", Discrete Mathematics 14, 1976), which find one where there are many.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

Graph = Sequence[frozenset[int]]

_BRANCHES = 2000  # of the search, each a fraction of a millisecond
_ROTATIONS = 20000


class GaveUp(Exception):
    """Neither a ring was found nor that there is none."""


def graph(size: int, pairs: Sequence[tuple[int, int]]) -> Graph:
    """Make a graph of hosts 0 to size - 1."""
    neighbours: list[set[int]] = [set() for _ in range(size)]
    for left, right in pairs:
        neighbours[left].add(right)
        neighbours[right].add(left)
    return [frozenset(each - {host}) for host, each in enumerate(neighbours)]


def missing_pairs(joined: Graph) -> list[tuple[int, int]]:
    """Return the pairs that a mesh lacks."""
    return [(left, right) for left in range(len(joined)) for right in range(left + 1, len(joined)) if right not in joined[left]]


def ring(joined: Graph) -> list[int] | None:
    """Return all hosts in the order of a ring, from host 0 on, or None if there is none.

    The order that was given is taken if it is one. Two hosts need one edge, a lone one none.

    Raises:
        GaveUp: the graph is one of the rare ones that would take too long.
    """
    size = len(joined)
    if all((host + 1) % size in joined[host] for host in range(size) if size > 1):
        return list(range(size))
    if size == 2 or hopeless(joined):
        return None
    try:
        found = _search(joined)
    except GaveUp:
        found = _rotate(joined)
    return None if found is None else _from_zero(found)


def _from_zero(order: list[int]) -> list[int]:
    at = order.index(0)
    order = order[at:] + order[:at]
    return order if order[1] < order[-1] else [0, *reversed(order[1:])]


# --- why there is none -------------------------------------------------------------------------------------------------------------------


def hopeless(joined: Graph) -> bool:
    """Say whether it can be seen without a search that there is no ring through 3 or more hosts."""
    return any(len(each) < 2 for each in joined) or len(components(joined)) > 1 or bool(cuts(joined)) or _uneven(joined)


def components(joined: Graph) -> list[list[int]]:
    """Return the hosts that are joined with each other somehow, each list sorted."""
    seen: set[int] = set()
    found = []
    for start in range(len(joined)):
        if start in seen:
            continue
        group, todo = {start}, [start]
        while todo:
            new = joined[todo.pop()] - group
            group |= new
            todo += new
        seen |= group
        found.append(sorted(group))
    return found


def cuts(joined: Graph) -> list[int]:
    """Return the hosts without which a component falls apart."""
    whole = len(components(joined))
    found = []
    for host in range(len(joined)):
        rest = [each - {host} if other != host else frozenset[int]() for other, each in enumerate(joined)]
        if len(components(rest)) - 1 > whole - (not joined[host]):
            found.append(host)
    return found


def _uneven(joined: Graph) -> bool:
    """Say whether hosts fall in two sets of different size and edges only lead from one to the other: a ring would alternate."""
    side = {0: 0}
    todo = [0]
    while todo:
        host = todo.pop()
        for other in joined[host]:
            if other not in side:
                side[other] = 1 - side[host]
                todo.append(other)
            elif side[other] == side[host]:
                return False
    return 2 * sum(side.values()) != len(joined)


def rings_of_parts(joined: Graph) -> list[list[int]]:
    """Return a ring of each part that has one, longest first: what to offer where there is none through all."""
    found = []
    for part in _parts(joined):
        number = {host: index for index, host in enumerate(part)}
        inner = [frozenset(number[other] for other in joined[host] if other in number) for host in part]
        try:
            order = ring(inner)
        except GaveUp:
            continue
        if order is not None:
            found.append([part[index] for index in order])
    return sorted(found, key=lambda order: (-len(order), order))


def _parts(joined: Graph) -> list[list[int]]:
    """Cut components at hosts that hold them together, and drop hosts with one edge, until rings can be looked for."""
    todo, found = components(joined), []
    while todo:
        part = todo.pop()
        inside = set(part)
        local = [joined[host] & inside if host in inside else frozenset[int]() for host in range(len(joined))]
        cut = next(iter(cuts(local)), None)
        if cut is None:
            if len(part) > 1:
                found.append(part)
            continue
        without = [each - {cut} if host in inside and host != cut else frozenset[int]() for host, each in enumerate(local)]
        todo += [sorted([*piece, cut]) for piece in components(without) if inside >= set(piece) and cut not in piece]
    return found


# --- search ------------------------------------------------------------------------------------------------------------------------------


class _State:
    """Which edges may be in the ring and which must, as sets of bits per host; ``end`` of an end of a path is its other end."""

    def __init__(self, may: list[int], must: list[int], end: list[int], chosen: int) -> None:
        self.may, self.must, self.end, self.chosen = may, must, end, chosen

    def copy(self) -> _State:
        return _State(self.may[:], self.must[:], self.end[:], self.chosen)

    def choose(self, left: int, right: int) -> bool:
        """Put an edge in the ring and settle what follows."""
        return self._put(left, right) and self.settle([left, right])

    def forbid(self, left: int, right: int) -> bool:
        self._drop(left, right)
        return self.settle([left, right])

    def _put(self, left: int, right: int) -> bool:
        far, farther = self.end[left], self.end[right]
        self.chosen += 1
        if far == right and self.chosen < len(self.may):
            return False  # the path would close before it has been everywhere
        self.must[left] |= 1 << right
        self.must[right] |= 1 << left
        self.end[far], self.end[farther] = farther, far
        if self.chosen < len(self.may) - 1 and self.may[far] >> farther & 1 and not self.must[far] >> farther & 1:
            self._drop(far, farther)
        return True

    def _drop(self, left: int, right: int) -> None:
        self.may[left] &= ~(1 << right)
        self.may[right] &= ~(1 << left)

    def settle(self, hosts: list[int]) -> bool:
        """Draw conclusions until there are none; False if a host can no longer have two edges."""
        todo = set(hosts) | {self.end[host] for host in hosts}
        while todo:
            host = todo.pop()
            may, must = self.may[host], self.must[host]
            if must.bit_count() == 2 and may != must:
                for other in _bits(may & ~must):
                    self._drop(host, other)
                    todo.add(other)
            elif may.bit_count() < 2 or must.bit_count() > 2:
                return False
            elif may.bit_count() == 2 and may != must:
                for other in _bits(may & ~must):
                    if not self._put(host, other):  # choosing the first may have closed the way of the second
                        return False
                    todo |= {host, other, self.end[host], self.end[other]}
        return True

    def order(self) -> list[int]:
        order, before = [0], -1
        while len(order) < len(self.may):
            here = order[-1]
            before, after = here, next(other for other in _bits(self.must[here]) if other != before)
            order.append(after)
        return order


def _bits(bits: int) -> list[int]:
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def _search(joined: Graph) -> list[int] | None:
    size = len(joined)
    state = _State([sum(1 << other for other in each) for each in joined], [0] * size, list(range(size)), 0)
    left = _BRANCHES
    stack = [state] if state.settle(list(range(size))) else []
    while stack:
        state = stack.pop()
        if state.chosen == size:
            return state.order()
        left -= 1
        if not left:
            raise GaveUp
        edge = _undecided(state)
        other = state.copy()
        if other.forbid(*edge):
            stack.append(other)
        if state.choose(*edge):  # on top: paths grow first
            stack.append(state)
    return None


def _undecided(state: _State) -> tuple[int, int]:
    """Return an edge to decide on: at the end of a path, and where there is least to choose from."""
    open_hosts = [host for host in range(len(state.may)) if state.must[host].bit_count() < 2]
    host = min(open_hosts, key=lambda host: (not state.must[host], state.may[host].bit_count()))
    others = _bits(state.may[host] & ~state.must[host])
    return host, min(others, key=lambda other: state.may[other].bit_count())


def _rotate(joined: Graph) -> list[int]:
    """Grow a path; at a dead end turn its tail around, so that it ends elsewhere. Always the same, for the dice are."""
    dice = random.Random(0)
    size = len(joined)
    path = [0]
    within = {0}
    for _ in range(_ROTATIONS):
        fresh = [other for other in sorted(joined[path[-1]]) if other not in within]
        if fresh:
            after = min(fresh, key=lambda other: (len(joined[other] - within), dice.random()))
            path.append(after)
            within.add(after)
            continue
        if len(path) == size and path[0] in joined[path[-1]]:
            return path
        turn = path.index(dice.choice(sorted(joined[path[-1]])))
        path[turn + 1 :] = reversed(path[turn + 1 :])
    raise GaveUp
