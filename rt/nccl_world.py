"""A world whose ranks move arrays on devices by NCCL.

May live here: what configures such a world, which device is a rank's, when its groups are ready, its end. May not: collectives
(``nccl_group``), NCCL's words (``transports.nccl``).

The ranks meet as those of the ring do, and NCCL's by what they tell each other over its links. So a dead rank, ``abort()``, time limits and
disagreements are found and told by the control connections, and end in ``ncclCommAbort`` and an error of ours, never in the process' end.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

from rt import config
from rt.blame import Report
from rt.errors import ConfigError, ProtocolError, RendezvousError
from rt.group import CoreGroup
from rt.library_world import LibraryWorld
from rt.nccl_group import NcclGroup
from transports import nccl

_MLX = ("NCCL_HOST_IP", "NCCL_PORT", "MLX_RANK", "MLX_WORLD_SIZE")


class NcclWorld(LibraryWorld):
    """One engine, one control thread, NCCL, and the groups on them."""

    library = "NCCL"
    unsaid = "one passes arrays of the host, which go over the ring's links, and the other arrays of CuPy, which go by NCCL"

    def __init__(self, settings: config.RingConfig) -> None:
        super().__init__(settings)
        cupy, _ = nccl.load()
        self._devices: int = cupy.cuda.runtime.getDeviceCount()

    @property
    def device(self) -> int:
        """Number of this rank's device: the n-th that this process sees, for the n-th rank of its host."""
        return self.hosts[: self.rank].count(self.hosts[self.rank]) % self._devices

    def _wired(self, wiring: concurrent.futures.Future[Any], future: concurrent.futures.Future[CoreGroup]) -> None:
        """In the control thread: as ever; and the world has formed when NCCL has connected its devices."""
        formed: concurrent.futures.Future[CoreGroup] = concurrent.futures.Future()
        super()._wired(wiring, formed)
        error = formed.exception()
        if error is not None:
            if not future.cancelled():
                future.set_exception(error)
            return
        group = formed.result()
        assert group.making is not None

        def made(making: concurrent.futures.Future[Any]) -> None:
            if future.set_running_or_notify_cancel():
                error = making.exception()
                future.set_result(group) if error is None else future.set_exception(error)

        group.making.add_done_callback(made)

    def _make_group(self, ranks: Any, rank: int, name: str, identity: int, timeout: float | None) -> CoreGroup:
        group = NcclGroup(self, ranks, rank, name, identity, timeout)
        if self.control is not None:
            self.control.later(self._ring.connect_timeout, self._still_connecting, group)
        return group

    def _still_connecting(self, group: NcclGroup) -> None:
        if not group.making.done():
            seconds = f"{self._ring.connect_timeout:g} s"
            text = f"rank {group.rank}/{group.size}: NCCL did not connect the ranks of group {group.name} within {seconds}"
            group.fail(lambda work, later=False: RendezvousError(text))

    def advice(self) -> str:
        """Return what may be wrong where NCCL cannot connect, which it says in a word or two, and how to do without it."""
        here = self.hosts.count(self.hosts[self.rank])
        shared = f"this host has {here} ranks, and this one sees {self._devices} device{'s' * (self._devices != 1)}: ranks that share one "
        shared += "need NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1; "
        return shared * (here > self._devices) + "NCCL_DEBUG=WARN has NCCL say more, and backend 'ring' does without it"

    def not_connected(self, group: NcclGroup, text: str) -> None:
        """NCCL could not connect; all ranks of the group are told."""
        self._report(Report("protocol", group.identity, 0, -1, "", text))
        group.fail(group.broken(ProtocolError, None, text))

    def _end_library(self) -> None:
        for group in list(self.groups.values()):
            if isinstance(group, NcclGroup):
                group.end()


def make(keywords: dict[str, Any], environ: config.Environ = os.environ) -> NcclWorld | None:
    """Return the world that is configured, None if nothing begins to: as the ring's, or by MLX's variables for NCCL.

    Raises:
        ConfigError: configured wrongly.
    """
    if environ.get("MLX_NCCL_TIMEOUT") and keywords.get("connect_timeout") is None and "RT_CONNECT_TIMEOUT" not in environ:
        keywords = {**keywords, "connect_timeout": _milliseconds(environ["MLX_NCCL_TIMEOUT"])}
    given = any(keywords.get(name) is not None for name in ("rank", "world_size", "coordinator", "hostfile"))
    if not given and "RT_RANK" not in environ and ("NCCL_HOST_IP" in environ or "NCCL_PORT" in environ):
        absent = [name for name in _MLX if name not in environ]
        if absent:
            raise ConfigError(f"backend 'nccl': found no {', no '.join(absent)}, expected all of {', '.join(_MLX)}, or RT_RANK and so on")
        for name in _MLX[1:]:
            if not (environ[name].isascii() and environ[name].isdigit()):
                raise ConfigError(f"{name}: found {environ[name]!r}, expected an integer >= 0")
        host = environ["NCCL_HOST_IP"]
        place = f"[{host}]:{environ['NCCL_PORT']}" if ":" in host else f"{host}:{environ['NCCL_PORT']}"
        numbers = {"rank": int(environ["MLX_RANK"]), "world_size": int(environ["MLX_WORLD_SIZE"])}
        keywords = {**keywords, **numbers, "coordinator": place}
    settings = config.resolve_ring(**keywords)
    return None if settings is None else NcclWorld(settings)


def _milliseconds(text: str) -> float:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"MLX_NCCL_TIMEOUT: found {text!r}, expected a number of milliseconds > 0")
    return int(text) / 1000
