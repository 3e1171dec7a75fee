"""Where every rank listens: from the ring file, from rank 0's coordinator, or from rank 0 by way of torchrun's store.

May live here: opening this rank's listeners and making the table of addresses. May not: the connections made from that table
(``rt.bootstrap``), the handshake (``transports.handshake``).

With a coordinator, rank 0 listens there and goes on listening there for its data connections; each other rank connects, proves itself,
listens on the local address of that connection (which the network evidently routes) and says so; when all have come, everyone
gets the table. Rank 0 says who is missing each time somebody comes, so that at the deadline every rank can name the absent.
Where ``RT_SOCKET_IFNAME`` names interfaces, a rank listens on one address of each instead, rank 0 too; a pair of ranks then has connections
over all of them, but over the first only where ranks found different numbers.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module

from rt import interfaces
from rt.config import RingConfig
from rt.errors import ConfigError, RendezvousError
from rt.secret import is_loopback
from transports import tcp
from transports.handshake import Acceptor
from transports.tcp import Address, Streams

Table = list[list[Address]]

_log = logging.getLogger("rt")
_stores = itertools.count()  # a second init in one process must not read the address that the first one published


class Rendezvous:
    """One rank's way to the table.

    Attributes:
        table: per rank the addresses it listens on, one per connection of a pair, None until known.
        announced: how many addresses this rank has named for itself; the table may have fewer for it.
    """

    def __init__(self, config: RingConfig, acceptor: Acceptor, reach_coordinator: Callable[[Address], Awaitable[socket.socket]]) -> None:
        self._config = config
        self._rank, self._size = config.rank, config.size
        self._acceptor = acceptor
        self._reach_coordinator = reach_coordinator
        self._enrolled: dict[int, tuple[Streams, list[Address]]] = {}
        self._changed = asyncio.Event()
        self._absent = [rank for rank in range(self._size) if rank != self._rank]
        self.table: Table | None = None
        self.announced = 0

    async def find_table(self) -> Table:
        """Listen, and learn where all ranks do.

        Raises:
            ConfigError: this host cannot listen where the configuration says it must.
            RendezvousError: rank 0 refuses this rank, or went away.
        """
        config = self._config
        if config.addresses is not None:
            entry = f"entry {self._rank} of the ring file"
            self._acceptor.add([await self._listen(address, entry) for address in config.addresses[self._rank]])
            self.announced = config.connections
            self.table = [list(addresses) for addresses in config.addresses]
        elif config.store is not None:
            self.table = await self._through_store(config.store)
        elif config.coordinator is None:
            raise ConfigError(f"{config.source}: found neither ring file nor coordinator nor store; expected one of them")
        elif self._rank > 0:
            self.table = await self._enrol_with(config.coordinator)
        else:
            self.table = await self._coordinate(await self._coordinator_socket(config.coordinator), config.coordinator)
        return self.table

    def expects(self) -> bool:
        """Whether ranks may come to enrol here now."""
        return self._rank == 0 and self._config.addresses is None and self.table is None

    def missing(self) -> list[int]:
        """The ranks that have not come to rank 0, as far as this rank knows."""
        return self._absent

    def writers(self) -> list[asyncio.StreamWriter]:
        """Rank 0's connections to the ranks that enrolled."""
        return [writer for (_, writer), _ in self._enrolled.values()]

    async def enrol(self, rank: int, sock: socket.socket) -> None:
        """Rank 0's side of one rank's rendezvous connection, for as long as that connection lives."""
        reader, writer = streams = await tcp.streams(sock)
        try:
            addresses = [(str(host), int(port)) for host, port in (await tcp.read_json(reader))["addresses"]]
            if rank in self._enrolled:
                self._turn_away(rank, writer)
            else:
                self._enrolled[rank] = streams, addresses
                self._census()
                await reader.read(1)  # nothing more is said: this waits for the end of the connection
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            _log.info("rank 0: rank %d broke off: %s", rank, error)
        # Not in a finally clause: when the bootstrap ends early, this rank must still be told why.
        if self.table is None and rank in self._enrolled and self._enrolled[rank][0] is streams:
            del self._enrolled[rank]  # it may come again
            self._census()
        writer.close()

    def _turn_away(self, rank: int, writer: asyncio.StreamWriter) -> None:
        (_, first), _ = self._enrolled[rank]
        here, there = (tcp.show(each.get_extra_info("peername")) for each in (writer, first))
        _log.info("rank 0: %s says that it is rank %d, but %s came first", here, rank, there)
        tcp.write_json(writer, {"error": f"another process, at {there}, has already joined as rank {rank}"})

    def _census(self) -> None:
        self._absent = [rank for rank in range(1, self._size) if rank not in self._enrolled]
        self._changed.set()
        for writer in self.writers():
            tcp.write_json(writer, {"missing": self._absent})

    async def _coordinator_socket(self, coordinator: Address) -> socket.socket:
        fd = self._config.coordinator_fd
        if fd is None:
            return await self._listen(await self._reachable_for_all(coordinator), "the coordinator")
        try:
            # A copy, so that this process may form a group again: until then, ranks that are quicker wait in the kernel's queue.
            listener = socket.socket(fileno=os.dup(fd))
        except OSError as error:
            raise ConfigError(f"{self._config.source}: found descriptor {fd} ({error.strerror}); expected a listening socket") from None
        listener.setblocking(False)
        return listener

    async def _reachable_for_all(self, coordinator: Address) -> Address:
        """Where to listen, so that ranks on other hosts come in: Debian has a host's own name mean 127.0.1.1 there, and nowhere else."""
        if is_loopback(coordinator[0]) or self._config.secret.of_this_host:  # then no rank on another host is expected
            return coordinator
        with suppress(OSError):  # whoever listens will say it better
            family, where = (await tcp.resolve(coordinator))[0]
            if is_loopback(where[0]):
                return ("::" if family == socket.AF_INET6 else "0.0.0.0"), coordinator[1]
        return coordinator

    async def _coordinate(self, listener: socket.socket, address: Address) -> Table:
        """Rank 0: wait for everybody's addresses and hand out the table."""
        self._absent = list(range(1, self._size))
        mine = [address] if self._config.interfaces is None else await self._announce(str((await tcp.resolve(address))[0][1][0]))
        self.announced = len(mine) * self._config.connections
        self._acceptor.add([listener])
        while self._absent:
            self._changed.clear()
            await self._changed.wait()
        rows = [mine] + [self._enrolled[rank][1] for rank in range(1, self._size)]
        self._check_loopback(rows)
        if len({len(row) for row in rows}) > 1:
            counts = ", ".join(f"rank {rank}: {len(row)}" for rank, row in enumerate(rows))
            _log.info("rank 0: different numbers of interfaces (%s): connections go over the first only", counts)
            rows = [row[:1] for row in rows]
        for writer in self.writers():
            tcp.write_json(writer, {"table": rows})
        return self._per_connection(rows)

    def _check_loopback(self, rows: Table) -> None:
        """Where the coordinator's name means loopback on some hosts, their ranks would be told to others as 127.0.0.1."""
        peers = [writer.get_extra_info("peername") for writer in self.writers()]
        foreign = next((peer for peer in peers if not is_loopback(peer[0])), None)
        for rank, row in enumerate(rows[1:], 1):
            if foreign is not None and is_loopback(row[0][0]):
                name, setting = ("coordinator's", "RT_COORDINATOR") if self._config.store is None else ("master's", "--master-addr")
                raise RendezvousError(
                    f"rank {self._rank}/{self._size}: rank {rank} is reached at {tcp.show(row[0])} only, since the {name} name "
                    f"means loopback on its host, but another rank comes from {tcp.show(foreign)}: give {setting} an address and no "
                    f"name, or set {interfaces.VARIABLE} on all ranks"
                )

    def _per_connection(self, rows: Table) -> Table:
        return [row * self._config.connections for row in rows]

    async def _announce(self, here: str) -> list[Address]:
        """Listen where others are to connect to this rank, and return the addresses; ``here`` is its own on the way to the coordinator."""
        wanted = self._config.interfaces
        hosts = [here] if wanted is None else interfaces.choose(await tcp.in_thread(interfaces.listing), wanted, here)
        what = "the local address of the connection to rank 0" if wanted is None else f"an address of {interfaces.VARIABLE}={wanted.text}"
        listeners = [await self._listen((host, 0), what) for host in hosts]
        self._acceptor.add(listeners)
        return [listener.getsockname()[:2] for listener in listeners]

    async def _enrol_with(self, coordinator: Address) -> Table:
        """Other ranks: tell rank 0 where this one listens and wait for the table."""
        sock = await self._reach_coordinator(coordinator)
        here = sock.getsockname()[0]
        reader, writer = await tcp.streams(sock)
        try:
            mine = await self._announce(here)
            self.announced = len(mine) * self._config.connections
            tcp.write_json(writer, {"addresses": mine})
            return await self._wait_for_table(reader)
        except (OSError, EOFError) as error:
            text = f"rank 0 at {tcp.show(coordinator)} left the rendezvous: {error}"
            raise RendezvousError(f"rank {self._rank}/{self._size}: {text}") from None
        finally:
            writer.close()

    async def _wait_for_table(self, reader: asyncio.StreamReader) -> Table:
        while True:
            said = await tcp.read_json(reader)
            if "error" in said:
                raise RendezvousError(f"rank {self._rank}/{self._size}: rank 0 says: {said['error']}")
            if "table" in said:
                return self._per_connection([[(host, port) for host, port in addresses] for addresses in said["table"]])
            self._absent = said["missing"]

    async def _through_store(self, store: Address) -> Table:
        """torchrun's agent owns MASTER_PORT, so rank 0 listens elsewhere and the agent's store says where."""
        run, restart = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
        key = f"rt/{run}/{restart}/{self._config.job}/{next(_stores)}"
        timeout = timedelta(seconds=self._config.connect_timeout)
        try:
            torch = await tcp.in_thread(lambda: import_module("torch.distributed"))
        except ImportError as error:
            raise ConfigError(
                f"torchrun: ranks meet through torch's TCPStore, but this Python ({sys.executable}) cannot import torch ({error}); "
                "install it there, or set RT_RANK, RT_WORLD_SIZE and RT_COORDINATOR"
            ) from None
        client = await tcp.in_thread(lambda: torch.TCPStore(store[0], store[1], is_master=False, timeout=timeout))
        if self._rank > 0:
            host, _, port = (await tcp.in_thread(lambda: client.get(key))).decode().rpartition(":")
            return await self._enrol_with((host, int(port)))
        listener, address = await self._beside_store(store)
        await tcp.in_thread(lambda: client.set(key, f"{address[0]}:{address[1]}"))
        return await self._coordinate(listener, address)

    async def _beside_store(self, store: Address) -> tuple[socket.socket, Address]:
        """Rank 0 under torchrun: listen where the others can come, and return at which address they find that."""
        everywhere = await self._reachable_for_all((store[0], 0))
        wanted = self._config.interfaces
        if wanted is not None:
            host = interfaces.choose(await tcp.in_thread(interfaces.listing), wanted, await tcp.host_towards(store))[0]
            listener = await self._listen((host, 0), f"an address of {interfaces.VARIABLE}={wanted.text}")
        elif everywhere[0] != store[0]:  # the agents meet at a name that others know better than this host
            listener = await self._listen(everywhere, "every address of this host")
            return listener, (store[0], listener.getsockname()[1])
        else:
            listener = await self._listen((await tcp.host_towards(store), 0), "an address on the way to torchrun's store")
        return listener, listener.getsockname()[:2]

    async def _listen(self, address: Address, what: str) -> socket.socket:
        where = f"{self._config.source}: {what}, {tcp.show(address)}"
        try:
            family, place = (await tcp.resolve(address))[0]
            return tcp.listen(family, place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = f"{where}: the port is taken; expected it to be free (does another process run as rank {self._rank}?)"
            elif error.errno == errno.EADDRNOTAVAIL:
                text = f"{where}: this host does not have that address; expected rank {self._rank} to run on the host that has it"
            else:
                text = f"{where}: rank {self._rank} cannot listen there: {error}"
            raise ConfigError(text) from None
