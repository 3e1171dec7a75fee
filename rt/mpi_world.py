"""A world whose ranks MPI has started and numbered.

May live here: how such ranks meet, their communicators, what MPI's failures mean to the world, its end. May not: collectives
(``mpi_group``), MPI's words (``transports.mpi``).

MPI itself carries what the ranks need to meet as any others do: rank 0's address and a secret. So a dead rank, ``abort()``, time-outs and
disagreements are found and told by the control connections, and objects and splits go over the ring's links.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from rt import config, interfaces
from rt import world as worlds
from rt.bootstrap import HostInfo
from rt.errors import ConfigError, RendezvousError
from rt.group import CoreGroup, hash64
from rt.library_waiting import patiently
from rt.library_world import LibraryWorld
from rt.mpi_group import LAST_WORDS_SECONDS, MpiGroup
from rt.secret import KEY_BYTES, Secret, resolve_secret
from transports import mpi

_GIVEN_SECRETS = ("RT_SECRET_FD", "RT_SECRET_FILE", "RT_SECRET")
_ALONE = "[mpi] The world has a single process. Launch with mpirun to initialize the mpi backend."
_SRUN_SIZE = "SLURM_STEP_NUM_TASKS"
_words: mpi.Words | None = None
_meeting = threading.Lock()  # ranks meet in the order in which they call init, one world after the other


class MpiWorld(LibraryWorld):
    """One engine, one control thread, MPI, and the groups on them.

    Args:
        settings: without a place to meet.
        words: of the library.
        carries: whether arrays travel by MPI; if not its ranks only meet by it, and all goes over the ring's links.
    """

    library = "MPI"
    unsaid = "one awaits it and the other blocks in it (rt.sync), which MPI does not match"
    leave_seconds = math.inf  # MPI_Finalize waits for the other ranks, too, and must not be called while a thread is inside MPI

    def __init__(self, settings: config.RingConfig, words: mpi.Words, carries: bool) -> None:
        super().__init__(settings)
        self.words = words
        self._carries = carries
        self._comms: tuple[Any, Any] | None = None

    # -- meeting

    def _begin(self, future: concurrent.futures.Future[CoreGroup]) -> None:
        threading.Thread(target=self._meet_by_mpi, args=(future,), name="rt-mpi meeting", daemon=True).start()

    def _meet_by_mpi(self, future: concurrent.futures.Future[CoreGroup]) -> None:
        """In a thread of its own: tell each other by MPI where to meet."""
        try:
            with _meeting:
                ring = self._find_each_other(future)
            self._identity = hash64("world", ring.job)
            self._meet(ring, future)
        except BaseException as error:
            self.whole = False
            if not future.cancelled():
                future.set_exception(error)

    def _find_each_other(self, future: concurrent.futures.Future[CoreGroup]) -> config.RingConfig:
        until = time.monotonic() + self._ring.connect_timeout
        small, all_here = self.words.mpi.COMM_WORLD.Idup()
        if not patiently(all_here.Test, lambda: future.cancelled() or time.monotonic() > until):
            raise RendezvousError(
                f"rank {self.rank}/{self.size}: not all ranks that MPI started called init(backend='mpi') within "
                f"{self._ring.connect_timeout:g} s; MPI does not say which did"
            )
        large = small.Dup()
        self._comms = small, large
        hosts = small.allgather(HostInfo.mine().network)
        addresses = small.allgather(interfaces.reachable(interfaces.listing())) if len(set(hosts)) > 1 else []
        listener: socket.socket | None = None
        place: tuple[Any, ...] | str | None = None
        if self.rank == 0:
            try:
                listener = _listener(hosts, addresses, self.size)
                place = (*listener.getsockname()[:2], self._ring.secret.key, secrets.token_hex(16))
            except OSError as error:  # the others wait for this very message
                place = f"rank 0/{self.size}: no address at which the other hosts could reach this one: {error}"
        place = small.bcast(place)
        if isinstance(place, str):
            raise RendezvousError(place)
        host, port, key, job = place
        fd = listener.detach() if listener is not None else None
        return dataclasses.replace(self._ring, coordinator=(host, port), coordinator_fd=fd, secret=Secret(key, "MPI"), job=job)

    # -- groups

    def _make_group(self, ranks: Any, rank: int, name: str, identity: int, timeout: float | None) -> CoreGroup:
        if not self._carries:
            return super()._make_group(ranks, rank, name, identity, timeout)
        comms: concurrent.futures.Future[tuple[Any, Any]] = concurrent.futures.Future()
        if name == "world":
            comms.set_result(self._comms)  # type: ignore[arg-type]
        elif len(ranks) > 1:
            threading.Thread(target=self._split_off, args=(list(ranks), identity, comms), name=f"rt-mpi {name}", daemon=True).start()
        return MpiGroup(self, ranks, rank, name, identity, timeout, comms)

    def _split_off(self, ranks: list[int], identity: int, comms: concurrent.futures.Future[tuple[Any, Any]]) -> None:
        """In a thread of its own: make the communicators of a part of the world, when all its ranks have come here.

        Not by ``MPI_Comm_split``, which all ranks of the world would have to call in one order, and whose colours and keys have 31 bits.
        """
        try:
            parent = self._comms[0]  # type: ignore[index]
            most = parent.Get_attr(self.words.mpi.TAG_UB)
            small = parent.Create_group(parent.Get_group().Incl(ranks), identity % most)
            comms.set_result((small, small.Dup()))
        except Exception as error:
            comms.set_exception(error)

def make(strict: bool, keywords: dict[str, Any]) -> MpiWorld | None:
    """Return the world of the processes that MPI started, None if there is only this one.

    Raises:
        ConfigError: MPI cannot be loaded, does not fit the launcher, or, if ``strict``, this is the only process.
    """
    loaded = load()
    size = loaded.mpi.COMM_WORLD.Get_size()
    if size == 1:
        _check_alone(loaded)
        if strict:
            raise ConfigError(_ALONE)
        return None
    return _settled(loaded, keywords, True)


def _check_alone(loaded: mpi.Words) -> None:
    """See that no launcher has started others, which MPI did not find: each would be alone, and say nothing."""
    sizes = [*(size for _, size in config.RANK_AND_SIZE[:2]), _SRUN_SIZE]  # what Slurm says of an allocation is no word on processes
    name = next((name for name in sizes if os.environ.get(name, "").isdigit()), None)
    if name is None or int(os.environ[name]) == 1:
        return
    found = f"found this one alone; {name}={os.environ[name]}, library {os.environ.get('MPI4PY_LIBMPI')}"
    if _SRUN_SIZE in os.environ:
        why = (
            "srun has to offer what the library asks for: MPICH asks for `srun --mpi=pmi2`, Open MPI 5 for `srun --mpi=pmix`, which "
            "`srun --mpi=list` must know; or let the library's own mpirun start the ranks within the allocation"
        )
    else:
        why = (
            "launcher and library are of different MPIs; set RT_MPI_LIBNAME to the libmpi of that launcher, or start with the mpirun of "
            "that library"
        )
    raise ConfigError(f"backend 'mpi': a launcher started {os.environ[name]} processes, but {mpi.name_of(loaded.mpi)} {found}: {why}")


def ring(keywords: dict[str, Any]) -> MpiWorld:
    """Return a world of the same processes whose arrays travel over the ring's links."""
    return _settled(load(), keywords, False)


def load() -> mpi.Words:
    """Return MPI's words, initialised once."""
    global _words
    if _words is None:
        _words = mpi.Words(mpi.load())
        atexit.register(_finish, os.getpid())
    return _words


def _settled(loaded: mpi.Words, keywords: dict[str, Any], carries: bool) -> MpiWorld:
    comm = loaded.mpi.COMM_WORLD
    given = keywords.pop("secret", None)
    keywords = {name: value for name, value in keywords.items() if name in ("connections_per_ip", "connect_timeout", "timeout", "shm")}
    told = given is not None or any(name in os.environ for name in _GIVEN_SECRETS)
    secret = resolve_secret(given, [], os.environ) if told else Secret(secrets.token_bytes(KEY_BYTES), "MPI")
    source = f"{mpi.name_of(loaded.mpi)}'s launcher"
    return MpiWorld(config.resolve_numbered(comm.Get_rank(), comm.Get_size(), source, secret, **keywords), loaded, carries)


def _listener(hosts: list[tuple[Any, ...]], addresses: list[list[str]], backlog: int) -> socket.socket:
    """On rank 0: listen where all others can come; ``hosts`` and ``addresses`` are theirs, by rank, the latter empty on one host."""
    others = {host: theirs for host, theirs in zip(hosts[1:], addresses[1:], strict=True) if host != hosts[0]} if addresses else {}
    address = interfaces.between(addresses[0], list(others.values())) if others else "127.0.0.1"
    if not address:  # networks with routers between
        address = next((found for name, *_ in others if (found := _towards(name))), "") or socket.gethostname()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def _towards(name: str) -> str:
    """Return the address from which this host reaches another, "" if it does not; nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    return ""


def _finish(process: int) -> None:
    """At exit: leave the worlds, and MPI in order, unless a failure keeps others from coming there too, or MPI is that of a parent."""
    if os.getpid() != process:
        return
    worlds.end()
    assert _words is not None
    ours = sys.modules["mpi4py"].rc.finalize is False  # who initialised MPI ends it
    whole = all(world.whole for world in worlds.worlds() if isinstance(world, MpiWorld))
    if not ours or _words.mpi.Is_finalized():
        return
    if whole:
        _words.mpi.Finalize()
    elif _words.mpi.COMM_WORLD.Get_size() > 1:  # the launcher ends the others as soon as this process is gone
        time.sleep(LAST_WORDS_SECONDS)


__all__ = ["MpiWorld", "load", "make", "ring"]
