"""Messages that get lost where the device repeats nothing (UC connections): the two sides compare what was sent with what came.

May live here: that comparison, over the control connection. May not: loss that the stream sees by itself, because a later message came
(``rt/_rdma.h``); how a loss ends the group (``rt.blame``).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rt.blame import Report

if TYPE_CHECKING:
    from rt.control import Control
    from transports.rdma import RdmaLink

LOOK_SECONDS = 0.5


class Tally:
    """Watches the links to one peer, in the control thread, for as long as that lives.

    The control connection is reliable, so it also tells where nothing comes any more. What a peer had sent at one look must have come by
    the next but one: a message that takes longer than ``LOOK_SECONDS`` counts as lost.
    """

    def __init__(self, control: Control, peer: int, links: list[RdmaLink]) -> None:
        self._control, self._peer, self._links = control, peer, links
        self._told: list[int] = []
        self._expected = [0] * len(links)  # what the peer had sent at the last look
        control.later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        came = [link.messages_came() for link in self._links]
        for link, expected, number in zip(self._links, self._expected, came, strict=True):
            if 0 <= number < expected:
                what = f"{expected - number} of {expected} messages from rank {self._peer} were lost: the connection is unreliable (UC)"
                report = Report.of_rank("lost", self._peer, f"lost rank {self._peer} (rdma {link.where}): {what}")
                self._control.report(report)
                return
        if min(came) < 0:
            return  # the links are over
        sent = [link.messages_sent for link in self._links]
        if sent != self._told:
            self._control.tell_tally(self._peer, json.dumps(sent).encode())
            self._told = sent
        self._expected = json.loads(self._control.tallies.get(self._peer, b"null")) or self._expected
        self._control.later(LOOK_SECONDS, self._look)
