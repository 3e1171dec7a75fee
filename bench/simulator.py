"""The machine that ``rt.bench simulate`` runs schedules on, event by event: ranks, their cores, links and the hosts' interfaces.

May live here: what takes how long, and in which order a rank does things. May not: which schedules run (``simulate.py``), which ranks
stand for others (``symmetry.py``), what a real machine's numbers are (``here.py``).

A rank is one thread that goes round as the engine's does (``core_progress``): what lies ready on each link is received, piece by piece and
at most a frame per link; local steps go on; then each link is written to once. Every such act takes the rank's core as long as the link's
cost per frame and per byte say; a rank without anything to do gives its core up. What is handed to a link arrives piece by piece while the
rest is still being copied, and a step may go on as far as its hazards allow (``program.py``): so data are passed on while they arrive.

Before a peer's OPEN has come, 64 KiB go out on a link; a link takes no more than its window until the receiver has read. Between hosts each
piece passes the sender's interface, the latency and the receiver's interface, which the ranks of a host share, each direction for itself; a
piece begins to leave the second while it still enters the first. A frame that must wait for its hazards waits in the link: the scratch
that the engine has for one frame is not modelled.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.program import Program
from rt.schedule import Kind

FRAME_BYTES = 261_904  # as FRAME_SENT, EAGER_MOST, FRAME_MOST in rt/_fastpath.pyx
_EAGER_BYTES = 65_536
_WRITE_BYTES = 262_144
_OPEN = -1  # the lane of an OPEN
_RECEIVE, _LOCAL, _SEND = range(3)
_LOCAL_BYTES = 65_536


@dataclass(frozen=True)
class Link:
    """What one kind of link costs.

    Attributes:
        latency: seconds from the end of a write until the other side sees it.
        send, receive, reduce: seconds of a core per byte that is written, received, or received and combined with another operand.
        frame: seconds of a core per write, and per frame that is received.
        piece: bytes that the other side sees, and reads, at once.
        window: bytes that are written and not yet read.
    """

    latency: float
    send: float
    receive: float
    reduce: float
    frame: float
    piece: int
    window: int


@dataclass(frozen=True)
class Machine:
    """Hosts that are all alike; rank r is on host ``r // ranks_per_host``.

    Attributes:
        cores: of each host.
        bandwidth: bytes per second of a host's interface, in each direction.
        local, network: links within a host and between hosts.
        wake: seconds until a rank runs that gave its core up, where ranks are more than cores; where not, they poll, or the links' latency
            says what waking them costs.
    """

    hosts: int
    ranks_per_host: int
    cores: int
    bandwidth: float
    local: Link
    network: Link
    wake: float

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.hosts * self.ranks_per_host


class Deadlock(RuntimeError):
    """No rank can move, and some have not finished."""


class _End:
    """One rank's end of its link to one peer."""

    def __init__(self, owner: _Rank, kind: Link, crosses: bool) -> None:
        self.owner = owner
        self.other: _End = self
        self.kind = kind
        self.crosses = crosses
        self.sending: dict[int, list[int]] = {}  # lane -> steps in order
        self.receiving: dict[int, list[int]] = {}
        self.at: dict[tuple[bool, int], int] = {}  # (sending, lane) -> position among those steps
        self.opened = False  # the peer's OPEN has come
        self.told = False  # ours has gone
        self.eager = _EAGER_BYTES
        self.room = kind.window
        self.starved = False  # it waits for room, and nobody has said yet when there will be any
        self.given: deque[tuple[float, int]] = deque()  # (when, bytes) of room that comes back
        self.inbox: deque[list[int]] = deque()  # [lane, bytes, whether a frame begins]
        self.to_receive = self.to_send = False  # stands in the rank's list


class _Rank:
    def __init__(self, program: Program, host: _Host) -> None:
        self.program = program
        self.host = host
        self.done = [0] * len(program.moves)
        self.left = len(program.moves)
        self.ends: dict[int, _End] = {}
        self.local = [index for index, move in enumerate(program.moves) if move.peer < 0]
        self.receive: deque[_End] = deque()
        self.send: deque[_End] = deque()
        self.turn: deque[tuple[int, _End | None, int]] = deque()  # what is left of this round, and bytes that may be received
        self.running = False
        self.finished = 0.0


class _Host:
    """Cores and the two directions of an interface."""

    def __init__(self, cores: int) -> None:
        self.free = cores
        self.waiting: deque[_Rank] = deque()
        self.out = self.into = 0.0  # when the interface is free again


class Simulation:
    """Programs on a machine.

    Args:
        programs: rank -> its program, of all ranks or of those that stand for all.
        image: (rank, peer) -> the rank among those simulated that stands for the peer, and what it calls that rank.
    """

    def __init__(self, machine: Machine, programs: Mapping[int, Program], image: Callable[[int, int], tuple[int, int]]) -> None:
        self.machine = machine
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._number = 0
        self._wake_seconds = machine.wake if machine.ranks_per_host > machine.cores else 0.0
        hosts: dict[int, _Host] = {}
        self.ranks = {
            rank: _Rank(program, hosts.setdefault(rank // machine.ranks_per_host, _Host(machine.cores)))
            for rank, program in programs.items()
        }
        for rank, state in self.ranks.items():
            self._links(rank, state)
        for rank, state in self.ranks.items():
            for peer, end in state.ends.items():
                stands, called = image(rank, peer)
                if called not in self.ranks[stands].ends:
                    raise ValueError(f"rank {rank} talks to {peer}, for which {stands} stands, but that does not talk to {called}")
                end.other = self.ranks[stands].ends[called]

    def _links(self, rank: int, state: _Rank) -> None:
        per_host = self.machine.ranks_per_host
        for index, move in enumerate(state.program.moves):
            if move.peer < 0:
                continue
            if move.peer not in state.ends:
                crosses = move.peer // per_host != rank // per_host
                state.ends[move.peer] = _End(state, self.machine.network if crosses else self.machine.local, crosses)
            end = state.ends[move.peer]
            streams = end.sending if move.kind is Kind.SEND else end.receiving
            streams.setdefault(move.lane, []).append(index)
            end.at[move.kind is Kind.SEND, move.lane] = 0

    def run(self) -> float:
        """Return the seconds until the last rank has finished.

        Raises:
            Deadlock: no rank can move any more.
        """
        for state in self.ranks.values():
            for end in state.ends.values():
                self._ask_to_send(end)
            self._wake(0.0, state)
        while self._events:
            now, _, act, argument = heapq.heappop(self._events)
            act(now, argument)
        stuck = [rank for rank, state in self.ranks.items() if state.left]
        if stuck:
            raise Deadlock(f"ranks {stuck[:8]} wait for each other")
        return max(state.finished for state in self.ranks.values())

    def _at(self, when: float, act: Callable[..., None], argument: Any) -> None:
        self._number += 1  # events of one moment happen in the order in which they were caused
        heapq.heappush(self._events, (when, self._number, act, argument))

    # -- who runs

    def _wake(self, now: float, state: _Rank) -> None:
        if state.running:
            return
        state.running = True
        if state.host.free:
            state.host.free -= 1
            self._at(now + self._wake_seconds, self._go_on, state)
        else:
            state.host.waiting.append(state)

    def _rest(self, now: float, state: _Rank) -> None:
        state.running = False
        if state.host.waiting:
            self._at(now + self._wake_seconds, self._go_on, state.host.waiting.popleft())
        else:
            state.host.free += 1

    def _go_on(self, now: float, state: _Rank) -> None:
        """Do the next thing that can be done, in this round or a new one, and come back when it is over."""
        for fresh in (False, True):
            if fresh:
                self._new_round(state)
            while state.turn:
                spent = self._act(now, state, *state.turn.popleft())
                if spent is not None:
                    if not state.left:
                        state.finished = now + spent
                    self._at(now + spent, self._go_on, state)
                    return
        self._rest(now, state)

    def _new_round(self, state: _Rank) -> None:
        state.turn.extend((_RECEIVE, end, _WRITE_BYTES) for end in state.receive)
        if state.local:
            state.turn.append((_LOCAL, None, 0))
        state.turn.extend((_SEND, end, 0) for end in state.send)
        for end in state.receive:
            end.to_receive = False
        for end in state.send:
            end.to_send = False
        state.receive.clear()
        state.send.clear()

    def _act(self, now: float, state: _Rank, what: int, end: _End | None, budget: int) -> float | None:
        """Do one thing; return the seconds it takes, or None where there is nothing to do."""
        if end is None:
            return self._work(state)
        return self._receive(now, state, end, budget) if what == _RECEIVE else self._send(now, end)

    def _ask_to_send(self, end: _End) -> None:
        if not end.to_send:
            end.to_send = True
            end.owner.send.append(end)

    def _ask_to_receive(self, end: _End) -> None:
        if not end.to_receive:
            end.to_receive = True
            end.owner.receive.append(end)

    # -- what a rank does

    def _allowed(self, state: _Rank, index: int) -> int:
        """Return up to which byte a step's hazards allow it to go."""
        moves, done = state.program.moves, state.done
        move = moves[index]
        limit = move.nbytes
        for earlier, delta in move.waits:
            if done[earlier] < moves[earlier].nbytes and delta + done[earlier] < limit:
                limit = delta + done[earlier]
        return limit

    def _advance(self, state: _Rank, index: int, nbytes: int) -> None:
        state.done[index] += nbytes
        moves = state.program.moves
        if state.done[index] == moves[index].nbytes:
            state.left -= 1
        for waiter in state.program.waiters[index]:
            move = moves[waiter]
            if move.peer >= 0:
                end = state.ends[move.peer]
                if move.kind is Kind.SEND:
                    self._ask_to_send(end)
                elif end.inbox:
                    self._ask_to_receive(end)

    def _receive(self, now: float, state: _Rank, end: _End, budget: int) -> float | None:
        """Take the next piece, and ask for the one behind it."""
        if not end.inbox:
            return None
        head = end.inbox[0]
        lane, piece, begins = head
        index = end.receiving[lane][end.at[False, lane]]
        move = state.program.moves[index]
        nbytes = min(piece, self._allowed(state, index) - state.done[index])
        if nbytes <= 0:
            return None
        if nbytes == piece:
            end.inbox.popleft()
        else:
            head[1:] = piece - nbytes, 0
        self._advance(state, index, nbytes)
        if state.done[index] == move.nbytes:
            end.at[False, lane] += 1
        if budget > nbytes:
            state.turn.appendleft((_RECEIVE, end, budget - nbytes))
        elif end.inbox:
            self._ask_to_receive(end)
        spent = nbytes * (end.kind.receive if move.kind is Kind.RECV else end.kind.reduce) + begins * end.kind.frame
        self._give_room(now + spent + end.kind.latency, end.other, nbytes)
        return spent

    def _give_room(self, when: float, writer: _End, nbytes: int) -> None:
        writer.given.append((when, nbytes))
        if writer.starved:
            writer.starved = False
            self._at(when, self._room, writer)

    def _room(self, now: float, end: _End) -> None:
        self._ask_to_send(end)
        self._wake(now, end.owner)

    def _work(self, state: _Rank) -> float | None:
        """Do a piece of the first local step that can go on: an operand is read and the result written, as by a receiver."""
        local = self.machine.local
        for index in state.local:
            move = state.program.moves[index]
            nbytes = min(_LOCAL_BYTES, self._allowed(state, index) - state.done[index])
            if nbytes > 0:
                self._advance(state, index, nbytes)
                if state.done[index] == move.nbytes:
                    state.local.remove(index)
                return nbytes * (local.reduce if move.kind is Kind.REDUCE else local.receive)
        return None

    def _send(self, now: float, end: _End) -> float | None:
        """Write what may go: a frame or two, and before the first of all the OPEN. The other side sees it piece by piece."""
        while end.given and end.given[0][0] <= now:
            end.room += end.given.popleft()[1]
        frames = [] if end.told else [(_OPEN, 0)]
        end.told = True
        queued = 0
        while queued < _WRITE_BYTES:
            lane, nbytes = self._frame(end)
            if not nbytes:
                break
            frames.append((lane, nbytes))
            queued += nbytes
        if end.room < end.kind.piece:
            if end.given:
                self._at(end.given[0][0], self._room, end)
            else:
                end.starved = True
        if not frames:
            return None
        self._ask_to_send(end)
        return self._write(now, end, frames)

    def _frame(self, end: _End) -> tuple[int, int]:
        """Take the next frame (lane, bytes) of the first stream that has one; no bytes: there is none."""
        state = end.owner
        room = min(FRAME_BYTES, end.room if end.opened else min(end.room, end.eager))
        for lane, steps in end.sending.items() if room else ():
            at = end.at[True, lane]
            if at == len(steps):
                continue
            index = steps[at]
            nbytes = min(room, self._allowed(state, index) - state.done[index])
            if nbytes > 0:
                end.room -= nbytes
                if not end.opened:
                    end.eager -= nbytes
                self._advance(state, index, nbytes)
                if state.done[index] == state.program.moves[index].nbytes:
                    end.at[True, lane] += 1
                return lane, nbytes
        return _OPEN, 0

    def _write(self, now: float, end: _End, frames: list[tuple[int, int]]) -> float:
        kind = end.kind
        hop, leave = (0.0, self._leave) if end.crosses else (kind.latency, self._arrive)
        when = now + kind.frame
        for lane, nbytes in frames:
            for at in range(0, max(nbytes, 1), kind.piece):
                piece = min(kind.piece, nbytes - at)
                when += piece * kind.send
                self._at(when + hop, leave, (end.other, lane, piece, not at))
        return when - now

    # -- what links do: (the end that it goes to, lane, bytes, whether a frame begins)

    def _leave(self, now: float, piece: tuple[_End, int, int, bool]) -> None:
        host = piece[0].other.owner.host
        start = max(now, host.out)
        host.out = start + piece[2] / self.machine.bandwidth
        self._at(start + piece[0].kind.latency, self._enter, piece)

    def _enter(self, now: float, piece: tuple[_End, int, int, bool]) -> None:
        host = piece[0].owner.host
        host.into = max(now, host.into) + piece[2] / self.machine.bandwidth
        self._at(host.into, self._arrive, piece)

    def _arrive(self, now: float, piece: tuple[_End, int, int, bool]) -> None:
        end, lane, nbytes, begins = piece
        if lane == _OPEN:
            end.opened = True
            self._ask_to_send(end)
        else:
            end.inbox.append([lane, nbytes, begins])
            self._ask_to_receive(end)
        self._wake(now, end.owner)
