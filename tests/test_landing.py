"""Why what arrives is landed first and applied later: a model of two ranks with three rules, two of them wrong.

May live here: the model, and the proof that it can tell the rules apart. May not: the engine; that it follows the right rule is shown
in ``test_engine`` (in-place exchanges, frames in each other's way).

Both ranks run the same program: send items of their memory in the order ``outgoing``, and put the k-th item that comes where
``incoming[k]`` says, which is where items that are still to be sent may lie.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

LINK = 2  # items under way between two ranks at most
ITEMS = 12
FORWARD = list(range(ITEMS))
BACKWARD = FORWARD[::-1]


class Model:
    """One rank."""

    def __init__(self, items: list[int], outgoing: list[int], incoming: list[int], rule: str) -> None:
        self.memory = items
        self.outgoing, self.incoming, self.rule = deque(outgoing), deque(incoming), rule
        self.scratch: deque[int] = deque()

    def send(self, link: deque[int]) -> bool:
        if not self.outgoing or len(link) == LINK:
            return False
        link.append(self.memory[self.outgoing.popleft()])
        return True

    def receive(self, link: deque[int]) -> bool:
        if self.rule == "land, then apply":
            moved = bool(link)
            self.scratch.extend(link)
            link.clear()
            while self.scratch and self.incoming[0] not in self.outgoing:
                self.memory[self.incoming.popleft()] = self.scratch.popleft()
                moved = True
            return moved
        if not link or (self.rule == "leave unread" and self.incoming[0] in self.outgoing):
            return False
        self.memory[self.incoming.popleft()] = link.popleft()
        return True


def exchange(rule: str, incoming: list[int], seed: int) -> tuple[bool, bool]:
    """Run two ranks until neither can move; say whether they ended, and whether the result is right."""
    dice = random.Random(seed)
    ranks = [Model([100 * rank + i for i in range(ITEMS)], FORWARD, incoming, rule) for rank in range(2)]
    links: list[deque[int]] = [deque(), deque()]  # links[r]: towards rank r
    still = 0
    while still < 100:
        rank = dice.randrange(2)
        acts = [lambda r=rank: ranks[r].send(links[1 - r]), lambda r=rank: ranks[r].receive(links[r])]
        still = 0 if any(act() for act in dice.sample(acts, dice.randint(1, 2))) else still + 1
    ended = not any(rank.outgoing or rank.incoming for rank in ranks)
    right = [[100 * (1 - rank) + incoming.index(i) for i in FORWARD] for rank in range(2)]
    return ended, [rank.memory for rank in ranks] == right


@pytest.mark.parametrize("incoming", (FORWARD, BACKWARD), ids=("forward", "backward"))
def test_land_then_apply_is_right(incoming: list[int]) -> None:
    assert {exchange("land, then apply", incoming, seed) for seed in range(100)} == {(True, True)}


def test_leaving_unread_what_cannot_land_yet_deadlocks() -> None:
    """Each waits for the other to read before it can send what stands in the way."""
    assert {exchange("leave unread", BACKWARD, seed)[0] for seed in range(100)} == {False}


def test_landing_without_regard_to_hazards_corrupts() -> None:
    """What was still to be sent is overwritten; all ends in good order, with wrong results."""
    ends = [exchange("land at once", BACKWARD, seed) for seed in range(100)]
    assert all(ended for ended, _ in ends) and not any(right for _, right in ends)
