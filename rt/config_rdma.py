"""The configuration of backend ``jaccl``: which RDMA devices lead from which rank to which, and where the ranks meet.

May live here: names of variables, the file of devices, what makes a mesh or a ring of it, the text of errors. May not: opening devices
(``transports.verbs``), the settings that all backends share (``rt.config``).

The variables are RT's, then JACCL's, then MLX's: ``RT_IBV_DEVICES``, ``JACCL_IBV_DEVICES``, ``MLX_IBV_DEVICES`` and so on. MLX's files are
taken as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rt.config import Environ, RingConfig, resolve_ring
from rt.errors import ConfigError
from rt.json_file import brief, load

Names = tuple[str, ...]  # of the devices, in order, that lead from one rank to another
Matrix = tuple[tuple[Names, ...], ...]
AllGather = Callable[[bytes, int], bytes]
AllGatherFactory = Callable[[int, int], AllGather]

AUTO = "auto"
_DEVICES = ("RT_IBV_DEVICES", "JACCL_IBV_DEVICES", "MLX_IBV_DEVICES")
_RANKS = ("RT_RANK", "JACCL_RANK", "MLX_RANK")
# What a launcher found to be free comes before the fixed port that it names for MLX's sake.
_COORDINATORS = ("RT_COORDINATOR", "RT_JACCL_COORDINATOR", "JACCL_COORDINATOR", "MLX_JACCL_COORDINATOR")
_RINGS = ("RT_JACCL_RING", "JACCL_RING", "MLX_JACCL_RING")
_FILE = "a JSON list with a list per rank, and in that, per rank, null, the name of a device, or a list of names"


@dataclass(frozen=True)
class RdmaConfig:
    """What a rank knows of the devices.

    Attributes:
        devices: entry [i][j] names the devices on rank i that reach rank j; None: ``device`` reaches everybody.
        device: the name of a device, or ``auto`` for the first that can be used.
        ring: only neighbours are connected.
        factory: makes what the queue pairs' data are exchanged by, or None for our own connections.
    """

    devices: Matrix | None
    device: str
    ring: bool
    factory: AllGatherFactory | None = None

    def names(self, rank: int, peer: int) -> Names:
        """Return which devices of ``rank`` lead to ``peer``."""
        return (self.device,) if self.devices is None else self.devices[rank][peer]

    def connected(self, a: int, b: int, size: int) -> bool:
        """Whether two ranks are to have a connection."""
        return a != b and (not self.ring or (a - b) % size in (1, size - 1))


def resolve_rdma(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    coordinator: str | None = None,
    device: str | None = None,
    all_gather_factory: AllGatherFactory | None = None,
    environ: Environ = os.environ,
    **keywords: Any,
) -> RingConfig | None:
    """Find out who the ranks are, where they meet, and which devices lead where.

    Args:
        rank: this process; ``RT_RANK``, ``JACCL_RANK``, ``MLX_RANK``.
        world_size: number of ranks; ``RT_WORLD_SIZE``, else that of the file of devices.
        coordinator: where rank 0 listens; ``RT_COORDINATOR``, ``RT_JACCL_COORDINATOR``, ``JACCL_COORDINATOR``, ``MLX_JACCL_COORDINATOR``.
        device: name of the device that reaches every rank, or ``auto``; ``RT_IBV_DEVICE``. Without it the file counts that
            ``RT_IBV_DEVICES``, ``JACCL_IBV_DEVICES`` or ``MLX_IBV_DEVICES`` name; without that one too, ``auto``.
        all_gather_factory: ``factory(rank, size)`` returns ``f(mine: bytes, nbytes) -> bytes`` of all ranks in order; see MLX.
        environ: the environment.
        **keywords: see :func:`rt.config.resolve_ring`.

    Returns:
        A configuration whose ``rdma`` is set, or None if nothing begins to configure one.

    Raises:
        ConfigError: begun but incomplete, malformed or contradictory.
        TypeError: ``all_gather_factory`` cannot be called.
    """
    if all_gather_factory is not None and not callable(all_gather_factory):
        raise TypeError(f"all_gather_factory must be a function (rank, size), not {type(all_gather_factory).__name__}")
    rdma, name = _devices(device, environ)
    told = {name: environ[name] for name in environ if not name.startswith(("MLX_", "JACCL_"))}
    told.pop("RT_HOSTFILE", None)  # of the ring; a launcher gives both
    for target, names in (("RT_RANK", _RANKS), ("RT_COORDINATOR", _COORDINATORS)):
        found = _first(names, environ)
        if found is not None:
            told[target] = environ[found]
            if found != "RT_COORDINATOR" and target == "RT_COORDINATOR":
                told.pop("RT_COORDINATOR_FD", None)
    if rdma.devices is not None and (rank is not None or "RT_RANK" in told):
        told.setdefault("RT_WORLD_SIZE", str(len(rdma.devices)))
    config = resolve_ring(rank=rank, world_size=world_size, coordinator=coordinator, environ=told, **(keywords | {"shm": False}))
    if config is None:
        return None
    if rdma.devices is not None and config.size != len(rdma.devices):
        raise ConfigError(f"{name}: found {len(rdma.devices)} ranks, expected {config.size}, as {config.source} say")
    # The job's name must differ from a ring's of the same ranks: another kind of link, another world.
    return replace(config, rdma=replace(rdma, factory=all_gather_factory))


def _devices(device: str | None, environ: Environ) -> tuple[RdmaConfig, str]:
    prefers_ring = _prefers_ring(environ)
    given = device if device is not None else environ.get("RT_IBV_DEVICE")
    found = _first(_DEVICES, environ)
    if given is not None or found is None:
        where = "keyword device" if device is not None else "RT_IBV_DEVICE"
        if given is not None and (not isinstance(given, str) or not given):
            raise ConfigError(f"{where}: found {given!r}, expected the name of an RDMA device, or {AUTO!r}")
        return RdmaConfig(None, given or AUTO, prefers_ring), where
    where = f"{found} {environ[found]}"
    matrix = _matrix(load(environ[found], where, _FILE), where)
    mesh, ring = is_mesh(matrix), is_ring(matrix)
    if not (mesh or ring):
        raise ConfigError(f"{where}: found neither a mesh nor a ring, expected {_missing(matrix)}")
    return RdmaConfig(matrix, "", ring and (prefers_ring or not mesh)), where


def _matrix(content: object, where: str) -> Matrix:
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: found {brief(content)}, expected {_FILE}")
    for rank, row in enumerate(content):
        if not isinstance(row, list) or len(row) != len(content):
            found = f"{len(row)} entries" if isinstance(row, list) else brief(row)
            raise ConfigError(f"{where}: row [{rank}]: found {found}, expected a list of {len(content)}, one for each rank")
    matrix = tuple(tuple(_names(entry, f"{where}: [{i}][{j}]") for j, entry in enumerate(row)) for i, row in enumerate(content))
    for i, row in enumerate(matrix):
        if row[i]:
            raise ConfigError(f"{where}: [{i}][{i}]: found {row[i][0]!r}, expected null: a rank needs no device to itself")
        for j, names in enumerate(row):
            if len(names) != len(matrix[j][i]):
                expected = f"{len(matrix[j][i])}, as many as at [{j}][{i}]"
                raise ConfigError(f"{where}: [{i}][{j}]: found {len(names)} devices, expected {expected}")
    return matrix


def _names(entry: object, where: str) -> Names:
    names = [] if entry is None else [entry] if isinstance(entry, str) else entry
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{where}: found {brief(entry)}, expected null, the name of a device, or a list of names")
    return tuple(names)


def is_mesh(matrix: Matrix) -> bool:
    """Whether every rank has a device towards every other one."""
    return len(matrix) > 1 and all(names for i, row in enumerate(matrix) for j, names in enumerate(row) if i != j)


def is_ring(matrix: Matrix) -> bool:
    """Whether every rank has as many devices towards either neighbour as rank 0 has towards rank 1."""
    size = len(matrix)
    count = len(matrix[0][1 % size])
    return size > 1 and count > 0 and all(len(row[(i + way) % size]) == count for i, row in enumerate(matrix) for way in (1, -1))


def _missing(matrix: Matrix) -> str:
    size = len(matrix)
    for i, row in enumerate(matrix):
        for way in (1, -1):
            if not row[(i + way) % size]:
                return f"a device at [{i}][{(i + way) % size}]: towards each rank (mesh), or at least towards both neighbours (ring)"
    return "two ranks or more, and on a ring as many devices towards every neighbour"


def _first(names: tuple[str, ...], environ: Environ) -> str | None:
    return next((name for name in names if name in environ), None)


def _prefers_ring(environ: Mapping[str, str]) -> bool:
    """As MLX reads it, the variable's presence counts; ours may also say no."""
    found = _first(_RINGS, environ)
    if found == "RT_JACCL_RING":
        if environ[found] not in ("0", "1"):
            raise ConfigError(f"RT_JACCL_RING: found {environ[found]!r}, expected 1 or 0")
        return environ[found] == "1"
    return found is not None
