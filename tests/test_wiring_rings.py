"""The search for rings: finds one where there is one, and none where there is none.

May live here: ``rt._wiring_rings``. May not: hosts and cables.
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt._wiring_rings import GaveUp, Graph, components, cuts, graph, missing_pairs, ring, rings_of_parts


def is_ring(order: list[int] | None, joined: Graph) -> bool:
    if order is None or sorted(order) != list(range(len(joined))):
        return False
    return len(order) == 1 or all(right in joined[left] for left, right in zip(order, [*order[1:], order[0]], strict=True))


def circle(*hosts: int) -> list[tuple[int, int]]:
    return list(zip(hosts, [*hosts[1:], hosts[0]], strict=True))


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 64), st.integers(0, 200), st.randoms(use_true_random=False))
def test_a_ring_that_was_planted_is_found(size: int, more: int, dice: random.Random) -> None:
    hosts = list(range(size))
    dice.shuffle(hosts)
    joined = graph(size, circle(*hosts) + [(dice.randrange(size), dice.randrange(size)) for _ in range(more)])
    found = ring(joined)
    assert is_ring(found, joined)
    assert found is not None and found[0] == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7), st.data())
def test_there_is_one_exactly_where_trying_all_orders_finds_one(size: int, data: st.DataObject) -> None:
    pairs = list(itertools.combinations(range(size), 2))
    joined = graph(size, data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else [])
    expected = any(is_ring([0, *order], joined) for order in itertools.permutations(range(1, size)))
    found = ring(joined)
    assert is_ring(found, joined) if expected else found is None


def test_the_order_that_was_given_is_kept_where_it_is_a_ring() -> None:
    assert ring(graph(64, list(itertools.combinations(range(64), 2)))) == list(range(64))
    assert ring(graph(4, circle(0, 2, 1, 3))) == [0, 2, 1, 3]


@pytest.mark.parametrize(("size", "pairs", "expected"), [(1, [], [0]), (2, [(0, 1)], [0, 1]), (2, [], None)])
def test_few_hosts(size: int, pairs: list[tuple[int, int]], expected: list[int] | None) -> None:
    assert ring(graph(size, pairs)) == expected


def petersen(outer: int) -> Graph:
    """The generalised Petersen graph with steps of 2: no ring if ``outer`` leaves 5 when divided by 6 (Robertson 1969)."""
    spokes = [(host, outer + host) for host in range(outer)]
    return graph(2 * outer, circle(*range(outer)) + spokes + [(outer + host, outer + (host + 2) % outer) for host in range(outer)])


def grid(width: int, height: int) -> Graph:
    right = [(row * width + column, row * width + column + 1) for row in range(height) for column in range(width - 1)]
    down = [(row * width + column, (row + 1) * width + column) for row in range(height - 1) for column in range(width)]
    return graph(width * height, right + down)


def mesh_of(*hosts: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(hosts, 2))


def test_rings_through_64_hosts_that_a_plain_search_would_not_find_in_a_lifetime() -> None:
    for joined in (grid(8, 8), petersen(32), graph(64, [pair for pair in mesh_of(*range(64)) if pair[1] - pair[0] != 1])):
        assert is_ring(ring(joined), joined)


def test_that_there_is_none_is_found_out_as_well() -> None:
    halves = mesh_of(*range(32)) + mesh_of(*range(32, 64))
    for joined in (
        grid(9, 7),
        petersen(29),
        graph(64, halves),
        graph(64, [*halves, (0, 63)]),
        graph(64, [(0, host) for host in range(64)]),
    ):
        assert ring(joined) is None


def test_a_search_that_would_take_too_long_says_so() -> None:
    groups = [mesh_of(0, 1, *hosts) for hosts in (range(2, 22), range(22, 42), range(42, 64))]  # joined at two hosts only
    with pytest.raises(GaveUp):
        ring(graph(64, list(itertools.chain(*groups))))


def test_parts() -> None:
    joined = graph(9, [*circle(0, 1, 2, 3), (3, 4), *circle(5, 7, 6)])
    assert components(joined) == [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
    assert cuts(joined) == [3]
    assert rings_of_parts(joined) == [[0, 1, 2, 3], [5, 6, 7], [3, 4]]
    assert missing_pairs(graph(3, [(0, 1), (1, 2)])) == [(0, 2)]
