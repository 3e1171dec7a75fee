"""From a configuration to connected sockets: who dials whom, who can reach whom, and that all agree.

May live here: the plan of connections and the agreement on what came of it. May not: finding the addresses (``rt.rendezvous``), how a
connection begins (``transports.handshake``), anything after the group has formed (``rt.control``, the engine).

Steps, all under one deadline, with ranks started in any order:

1. *Addresses*: ``rt.rendezvous``.
2. *Connections*, all pairs in parallel: k data and one control connection each. Rank r dials its right neighbour; of other pairs the
   lower rank dials. Neighbours must connect. As soon as two have, they tell each other who else they know to be there, so that at the
   deadline a rank which sees only its neighbours can name the absent.
3. *Up.* A first all-gather round the ring carries each host's description, and rank 0's table of preferred algorithms, which holds for
   all; when it is through, every rank is known to listen.
   From then on a pair that cannot connect is given up (one more attempt, two seconds at most): with one cable per pair of
   neighbours it never will.
   Pairs of one host now try to share memory (``transports.shm``).
4. *Rows.* A second all-gather carries what each rank dialled, and with which of them it shares memory. A dialler has a connection only
   after the acceptor proved to have it (the last message of the handshake), so the dialler's word speaks for both ends, and all ranks
   compute the same pairs.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rt import tuning
from rt.config import RingConfig
from rt.errors import RendezvousError, RTError
from rt.rendezvous import Rendezvous
from rt.tuning import Table
from transports import shm, tcp
from transports.handshake import Acceptor, Hello, Identity, Purpose, Reason, Refused, greet
from transports.tcp import Address, Streams

if TYPE_CHECKING:
    from rt.queue_pairs import QueuePairs

_GRACE_SECONDS = 2.0
_CONNECT_SECONDS = 5.0
_FAREWELL_SECONDS = 1.0
_SHARE_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25
_log = logging.getLogger("rt")


@dataclass(frozen=True)
class HostInfo:
    """What tells whether two ranks share a host and can see each other's process."""

    hostname: str
    boot_id: str
    pid_namespace: int
    pid: int
    shm: str = ""  # name under which it takes memory to share; empty: it shares none
    net_namespace: int = 0

    @classmethod
    def mine(cls, shm: str = "") -> HostInfo:
        """Describe this process; what the system does not offer is empty and equals nothing."""
        boot_id, processes, network = "", 0, 0
        with suppress(OSError):  # not Linux
            with open("/proc/sys/kernel/random/boot_id") as file:
                boot_id = file.read().strip()
            processes = os.stat("/proc/self/ns/pid").st_ino
            network = os.stat("/proc/self/ns/net").st_ino
        return cls(socket.gethostname(), boot_id, processes, os.getpid(), shm, network)

    def sees(self, other: HostInfo) -> bool:
        """Whether ``other.pid`` means that process here."""
        return bool(self.boot_id) and (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)

    @property
    def machine(self) -> tuple[str, str, int, int] | None:
        """Equal for two logins to one host; containers of one system differ. None: the system does not say."""
        return (self.hostname, self.boot_id, self.net_namespace, self.pid_namespace) if self.boot_id else None

    @property
    def network(self) -> tuple[str, str, int]:
        """Equal for ranks that reach each other without a cable, also where they share no memory: one system, one network namespace."""
        return self.hostname, self.boot_id, self.net_namespace


@dataclass(frozen=True)
class Wiring:
    """The connected group.

    Attributes:
        rank: this process.
        size: number of ranks.
        data: per directly connected peer its k data sockets, non-blocking, index i to the peer's i-th address.
        control: per directly connected peer its control connection.
        direct: pairs (a, b), a < b, that are connected directly; the same on all ranks.
        hosts: per rank its host and process.
        memory: per peer with which it is shared the descriptor of the memory, the receiver's to close, and whether this rank is the first
            of the two; it holds the rings of k links.
        ring_bytes: capacity of each of those rings.
        shared: pairs (a, b), a < b, that share memory; the same on all ranks.
        tuning: rank 0's table of preferred algorithms; None for a group of one, which needs none.
        rdma: connected queue pairs, which carry the data in place of the sockets; None: they do it.
    """

    rank: int
    size: int
    data: dict[int, list[socket.socket]]
    control: dict[int, Streams]
    direct: frozenset[tuple[int, int]]
    hosts: tuple[HostInfo, ...]
    memory: dict[int, tuple[int, bool]] = field(default_factory=dict)
    ring_bytes: int = 0
    shared: frozenset[tuple[int, int]] = frozenset()
    tuning: Table | None = None
    rdma: QueuePairs | None = None


def neighbours(rank: int, size: int) -> set[int]:
    """The ranks beside ``rank`` on the ring."""
    return {(rank - 1) % size, (rank + 1) % size} - {rank}


def dials(a: int, b: int, size: int) -> bool:
    """Whether rank ``a`` opens the connections between ``a`` and ``b`` (exactly one of the two does)."""
    if size > 2 and b in neighbours(a, size):
        return b == (a + 1) % size
    return a < b


async def bootstrap(
    config: RingConfig,
    *,
    reachable: Callable[[int, int], bool] | None = None,
    on_begin: Callable[[Callable[[], list[str]]], None] | None = None,
) -> Wiring:
    """Form the group that ``config`` describes.

    Args:
        config: what this rank knows.
        reachable: for tests: ``reachable(a, b)`` False makes rank b's addresses unreachable from rank a.
        on_begin: is given a function that says, line by line, which ranks are missing and what was tried.

    Raises:
        ConfigError: this host cannot listen where the configuration says it must.
        RendezvousError: some ranks are missing at the deadline (the message names them and what was tried), or one refused.
    """
    if config.size == 1:
        return Wiring(0, 1, {}, {}, frozenset(), (HostInfo.mine(),))
    forming = _Forming(config, reachable or (lambda a, b: True))
    if on_begin is not None:
        on_begin(forming.missing)
    try:
        try:
            async with asyncio.timeout(config.connect_timeout):
                async with asyncio.TaskGroup() as tasks:
                    return await forming.run(tasks)
        except TimeoutError:
            raise RendezvousError(forming.explain()) from None
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    except RTError as error:
        await forming.tell(error)
        raise
    finally:
        await forming.clean_up()


class _Forming:
    """The state of one bootstrap."""

    def __init__(self, config: RingConfig, reachable: Callable[[int, int], bool]) -> None:
        self._connections = 0  # per pair; not known before the table is
        self._timeout = config.connect_timeout
        self._rank, self._size = config.rank, config.size
        self._neighbours = neighbours(config.rank, config.size)
        self._reachable = reachable
        self._me = Identity(config.rank, config.size, config.job, config.secret)
        self._acceptor = Acceptor(self._me, self._admit, self._deliver)
        self._rendezvous = Rendezvous(config, self._acceptor, self._reach_coordinator)
        self._tasks: asyncio.TaskGroup
        self._changed = asyncio.Event()
        self._all_up = asyncio.Event()
        self._sockets: dict[int, dict[tuple[int, int], socket.socket]] = {rank: {} for rank in range(self._size)}
        self._streams: dict[int, Streams] = {}
        self._present: set[int] = {self._rank}
        self._memory: dict[int, int] = {}
        self._tuning = config.tuning
        self._rdma = config.rdma
        self._queue_pairs: QueuePairs | None = None
        self._ring_bytes: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._sharing = shm.listen() if config.shm and shm.SUPPORTED else None
        self._rows: asyncio.Queue[Any] = asyncio.Queue()
        self._tried: dict[int, dict[str, str]] = {}

    async def run(self, tasks: asyncio.TaskGroup) -> Wiring:
        self._tasks = tasks
        attending = [tasks.create_task(self._attend(peer)) for peer in self._neighbours]
        table = await self._rendezvous.find_table()
        self._connections = len(table[self._rank])
        self._changed.set()
        self._meet({peer for peer in range(self._size) if self._is_complete(peer)})  # who has come meanwhile
        dialling = {
            peer: tasks.create_task(self._dial_all(peer, table[peer]))
            for peer in range(self._size)
            if peer != self._rank and dials(self._rank, peer, self._size)
        }
        await self._until(lambda: self._neighbours <= self._streams.keys())
        name = ""
        if self._sharing is not None:
            name = shm.name_of(self._sharing)
            self._acceptor.add([self._sharing])
        rules = (self._tuning or tuning.shipped()).document() if self._rank == 0 else None
        met = await self._all_gather([asdict(HostInfo.mine(name)), rules])
        hosts = [HostInfo(**host) for host, _ in met]
        self._tuning = tuning.parse(met[0][1], "the table of rank 0")
        self._all_up.set()
        self._present = set(range(self._size))
        mine = hosts[self._rank]
        same = {peer for peer, host in enumerate(hosts) if mine.shm and host.shm and mine.boot_id and mine.boot_id == host.boot_id}
        self._ring_bytes.set_result(shm.ring_bytes(len(same), self._connections))
        sharing = [tasks.create_task(self._offer_memory(peer, hosts[peer].shm)) for peer in same & dialling.keys()]
        if dialling:
            _, late = await asyncio.wait(dialling.values(), timeout=_GRACE_SECONDS)
            for task in late:
                task.cancel()
        await asyncio.gather(*sharing)
        if self._rdma is not None:
            from rt import queue_pairs  # with pyverbs behind it

            self._queue_pairs = await queue_pairs.connect(self._rdma, self._rank, self._size, self._all_gather)
        reached = [peer for peer in dialling if self._is_complete(peer) and (self._queue_pairs is None or peer in self._queue_pairs.links)]
        rows = await self._all_gather([reached, [peer for peer in reached if peer in self._memory]])
        self._say({"formed": True})
        await asyncio.wait(attending)
        direct = frozenset((min(a, b), max(a, b)) for a, row in enumerate(rows) for b in row[0])
        shared = frozenset((min(a, b), max(a, b)) for a, row in enumerate(rows) for b in row[1])
        return await self._wire(direct, shared, tuple(hosts))

    async def _wire(
        self, direct: frozenset[tuple[int, int]], shared: frozenset[tuple[int, int]], hosts: tuple[HostInfo, ...]
    ) -> Wiring:
        peers = sorted(a + b - self._rank for a, b in direct if self._rank in (a, b))
        await self._complete(peers)  # an acceptor may be told of a connection a moment before it takes note of it
        control = {peer: await self._stream_to(peer) for peer in peers}
        memory = {a + b - self._rank: (self._memory.pop(a + b - self._rank), a == self._rank) for a, b in shared if self._rank in (a, b)}
        data = {peer: [self._sockets[peer][Purpose.DATA, i] for i in range(self._connections)] for peer in peers}
        for peer in peers:
            tcp.keep_alive(control[peer][1].get_extra_info("socket"), relays=2 * len(direct) < self._size * (self._size - 1))
            ends = ", ".join(f"{tcp.show(sock.getsockname())} - {tcp.show(sock.getpeername())}" for sock in data[peer])
            _log.info("rank %d: rank %d over %s: %s", self._rank, peer, "shm and tcp" if peer in memory else "tcp", ends)
            self._sockets[peer] = {}  # they belong to the caller now, as the streams do
        self._streams = {}
        rdma, self._queue_pairs = self._queue_pairs, None
        return Wiring(self._rank, self._size, data, control, direct, hosts, memory, self._ring_bytes.result(), shared, self._tuning, rdma)

    # Connections

    def _admit(self, hello: Hello) -> Reason | None:
        if not (0 <= hello.sender < self._size and hello.sender != self._rank):
            return Reason.SENDER
        if hello.purpose == Purpose.RENDEZVOUS:
            return None if self._rendezvous.expects() else Reason.PURPOSE
        if not dials(hello.sender, self._rank, self._size):
            return Reason.SENDER
        data = self._connections or self._rendezvous.announced  # whoever dials knows the table, this rank may not yet
        allowed = {int(Purpose.CONTROL): 1, int(Purpose.DATA): data, int(Purpose.SHARED): int(self._sharing is not None)}
        return None if hello.index < allowed.get(hello.purpose, 0) else Reason.PURPOSE

    def _deliver(self, hello: Hello, sock: socket.socket) -> None:
        if hello.purpose == Purpose.SHARED:
            self._tasks.create_task(self._take_memory(hello.sender, sock))
            return
        tcp.no_delay(sock)
        if hello.purpose == Purpose.RENDEZVOUS:
            self._tasks.create_task(self._rendezvous.enrol(hello.sender, sock))
        else:
            self._keep(hello.sender, hello.purpose, hello.index, sock)

    def _keep(self, peer: int, purpose: int, index: int, sock: socket.socket) -> None:
        stale = self._sockets[peer].pop((purpose, index), None)
        if stale is not None:  # its owner gave it up and came again
            stale.close()
        self._sockets[peer][purpose, index] = sock
        self._changed.set()
        if self._is_complete(peer):
            self._meet({peer})

    async def _dial_all(self, peer: int, addresses: list[Address]) -> None:
        async def one(purpose: Purpose, index: int, candidates: list[Address]) -> None:
            sock = await self._reach(peer, purpose, index, candidates)
            if sock is not None:
                self._keep(peer, purpose, index, sock)

        data = (one(Purpose.DATA, i, [address]) for i, address in enumerate(addresses))
        await asyncio.gather(one(Purpose.CONTROL, 0, addresses), *data)

    async def _reach_coordinator(self, coordinator: Address) -> socket.socket:
        sock = await self._reach(0, Purpose.RENDEZVOUS, 0, [coordinator])
        assert sock is not None  # pairs are only given up once all ranks are up
        return sock

    async def _reach(self, peer: int, purpose: Purpose, index: int, addresses: list[Address]) -> socket.socket | None:
        """Dial until somebody answers; None if a rank that need not be reachable is not."""
        pause = _FIRST_PAUSE
        while True:
            last_attempt = self._all_up.is_set() and peer not in self._neighbours
            for address in addresses:
                self._tried.setdefault(peer, {}).setdefault(tcp.show(address), "no answer")
                try:
                    return await self._dial(peer, purpose, index, address)
                except OSError as error:
                    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
                    self._tried.setdefault(peer, {})[tcp.show(address)] = why
                    _log.debug("rank %d: rank %d at %s: %s", self._rank, peer, tcp.show(address), why)
            if last_attempt:
                return None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._all_up.wait()
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _dial(self, peer: int, purpose: Purpose, index: int, address: Address) -> socket.socket:
        if not self._reachable(self._rank, peer):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        sock = await tcp.connect(address, _CONNECT_SECONDS)
        self._tried.setdefault(peer, {})[tcp.show(address)] = "connected, but no answer to the handshake"
        try:
            await greet(sock, self._me, peer, purpose, index)
        except Refused as refusal:
            sock.close()
            text = f"rank {self._rank}/{self._size}: rank {peer} at {tcp.show(address)} and this process do not match: {refusal}"
            if peer in self._neighbours or purpose == Purpose.RENDEZVOUS:
                raise RendezvousError(text) from None
            raise ConnectionRefusedError(str(refusal)) from None  # one address may mean another host here
        except BaseException:
            sock.close()
            raise
        self._tried[peer].pop(tcp.show(address), None)
        return sock

    # Shared memory

    async def _offer_memory(self, peer: int, name: str) -> None:
        try:
            async with asyncio.timeout(_SHARE_SECONDS):
                with await shm.connect(name) as sock:
                    await greet(sock, self._me, peer, Purpose.SHARED, 0)
                    self._memory[peer] = await shm.offer(sock, await self._memory_bytes())
        except (OSError, Refused) as error:  # a time-out is an OSError, too
            _log.info("rank %d: no shared memory with rank %d: %s", self._rank, peer, error or type(error).__name__)

    async def _memory_bytes(self) -> int:
        """What one pair shares: known when all hosts are, which others may know a moment before this rank."""
        return self._connections * shm.stride(await self._ring_bytes)

    async def _take_memory(self, peer: int, sock: socket.socket) -> None:
        with sock:
            try:
                fd = await shm.accept(sock, await self._memory_bytes())
            except OSError as error:
                _log.info("rank %d: no shared memory with rank %d: %s", self._rank, peer, error)
                return
        if peer in self._memory:
            os.close(self._memory.pop(peer))
        self._memory[peer] = fd

    def _is_complete(self, peer: int) -> bool:
        return self._connections > 0 and len(self._sockets[peer]) == 1 + self._connections

    async def _complete(self, peers: Iterable[int]) -> None:
        needed = list(peers)
        await self._until(lambda: all(map(self._is_complete, needed)))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # Agreement

    async def _stream_to(self, peer: int) -> Streams:
        if peer not in self._streams:
            # The entry stays, so that the pair goes on counting as complete.
            self._streams[peer] = await tcp.streams(self._sockets[peer][Purpose.CONTROL, 0])
            self._changed.set()
        return self._streams[peer]

    def _say(self, value: Any) -> None:
        """To the neighbours that are connected."""
        for peer in self._neighbours & self._streams.keys():
            tcp.write_json(self._streams[peer][1], value)

    def _meet(self, ranks: set[int]) -> None:
        """Take note that these ranks are there, and spread the news while it is some."""
        if not ranks <= self._present:
            self._present |= ranks
            self._say({"present": sorted(self._present)})

    async def _attend(self, peer: int) -> None:
        """Hear what a neighbour has to say until its last word of the bootstrap: what follows is the control thread's."""
        await self._complete([peer])
        reader, writer = await self._stream_to(peer)
        tcp.write_json(writer, {"present": sorted(self._present)})
        said: dict[str, Any] = {}
        while "formed" not in said:
            said = await self._hear(peer, reader)
            self._meet(set(said.get("present", ())))
            if "row" in said:
                self._rows.put_nowait(said["row"])

    async def _hear(self, peer: int, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            said = await tcp.read_json(reader)
        except (OSError, EOFError):
            raise RendezvousError(f"rank {self._rank}/{self._size}: rank {peer} left while the group was forming") from None
        if "error" in said:
            raise RendezvousError(said["error"])
        return said

    async def _all_gather(self, value: Any) -> list[Any]:
        """Everyone's ``value`` in rank order, round the ring of neighbours: to the right, from the left, size - 1 times."""
        rows: dict[int, Any] = {self._rank: value}
        _, right = self._streams[(self._rank + 1) % self._size]
        carried = [self._rank, value]
        for _ in range(self._size - 1):
            tcp.write_json(right, {"row": carried})
            carried = await self._rows.get()  # only the left neighbour sends rows to the right
            rows[carried[0]] = carried[1]
        return [rows[rank] for rank in range(self._size)]

    # Failure

    def _missing(self) -> list[int]:
        if self._rendezvous.table is None:
            return self._rendezvous.missing()
        unconnected = {rank for rank in self._neighbours if not self._is_complete(rank)}
        return [rank for rank in range(self._size) if rank not in self._present or rank in unconnected]

    def explain(self) -> str:
        """Name the ranks that are missing at the deadline, and for each what was tried."""
        lines = [f"rank {self._rank}/{self._size}: the group did not form within {self._timeout:g} s; missing:", *self.missing()]
        if len(lines) == 1:
            lines.append("  no rank: all are there, but some neighbours are not connected with each other")
        lines += [f"  a connection from {address} was dropped: {why}" for why, address in self._acceptor.dropped.items()]
        if self._me.secret.of_this_host:
            lines.append("  this rank has its host's own secret: with other hosts all need RT_SECRET_FILE, the same, or RT_INSECURE=1")
        return "\n".join(lines)

    def missing(self) -> list[str]:
        """Return a line for each rank that is missing, with what was tried."""
        lines = []
        for rank in self._missing():
            tried = "; ".join(f"{address}: {error}" for address, error in self._tried.get(rank, {}).items())
            table = self._rendezvous.table
            if not tried and table is not None and dials(rank, self._rank, self._size):
                tried = f"it has not connected to {', '.join(map(tcp.show, table[self._rank]))}"
            lines.append(f"  rank {rank}: {tried or 'not heard of'}")
        return lines

    async def tell(self, error: BaseException) -> None:
        """Tell the ranks that are connected why this one leaves, so that they need not wait for their own deadline."""
        if self._rendezvous.table is not None:
            for peer, sockets in self._sockets.items():
                if (Purpose.CONTROL, 0) in sockets:
                    await self._stream_to(peer)
        for writer in self._writers():
            tcp.write_json(writer, {"error": str(error)})

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [writer for _, writer in self._streams.values()] + self._rendezvous.writers()

    async def clean_up(self) -> None:
        """Close whatever the wiring did not take over."""
        if self._queue_pairs is not None:
            self._queue_pairs.close()
        await self._acceptor.close()
        if self._sharing is not None:
            self._sharing.close()
        for fd in self._memory.values():
            os.close(fd)
        for peer in self._streams:
            del self._sockets[peer][Purpose.CONTROL, 0]  # the stream closes it
        for sockets in self._sockets.values():
            for sock in sockets.values():
                sock.close()
        writers = self._writers()
        for writer in writers:
            writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
