"""Which backends there are, which can be used here, and which one ``init`` takes.

May live here: the names of backends, what each needs, the choice, and what ``init`` says where nothing configures one. May not: what
configures a backend (``config`` and the backends' own files), anything that initialises a library.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from rt.config import RANK_AND_SIZE, Environ, check_settings
from rt.errors import ConfigError

BACKENDS = ("any", "mpi", "nccl", "jaccl", "ring")
# What launchers tell a process of which there are several. SLURM_NTASKS is not: an allocation's shell has it, too.
_STARTED = (("RT_RANK", "RT_WORLD_SIZE"), *RANK_AND_SIZE[:2], ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("RANK", "WORLD_SIZE"))
_warned = False
_checked = False


def choose_backend(backend: str, environ: Environ = os.environ, strict: bool = False) -> str | None:
    """Return which backend ``init`` should try: the name asked for, or for ``any`` that of ``RT_BACKEND``, else the best available.

    Returns:
        A concrete backend that is available, or None where a named one is not and ``strict`` is false (then ``init`` makes a singleton,
        as MLX does). Whether it is *configured* is not looked at here.

    Raises:
        ValueError: unknown backend.
        TypeError: ``strict`` is no bool.
        ConfigError: ``RT_BACKEND`` names an unknown or missing backend, or ``backend`` a missing one and ``strict`` is true.
    """
    if not isinstance(strict, bool):
        hint = f"; did you mean backend={strict!r}?" if isinstance(strict, str) else ""
        raise TypeError(f"strict must be a bool, not {type(strict).__name__}{hint}")
    if backend not in BACKENDS:
        known = f"{', '.join(map(repr, BACKENDS[:-1]))} and {BACKENDS[-1]!r}"
        raise ValueError(f"[distributed] The only valid values for backend are {known} but {backend!r} was provided.")
    if backend != "any":
        return _if_available(backend, strict, f"keyword backend: found {backend!r}")
    wanted = environ.get("RT_BACKEND", "any")
    if wanted not in BACKENDS:
        raise ConfigError(f"RT_BACKEND: found {wanted!r}, expected one of {', '.join(BACKENDS)}")
    if wanted == "any":
        if configured_for_nccl(environ) and is_available("nccl"):
            return "nccl"
        return "jaccl" if configured_for_rdma(environ) and is_available("jaccl") else "ring"
    return _if_available(wanted, True, f"RT_BACKEND: found {wanted!r}")


def is_available(backend: str = "any") -> bool:
    """Say whether a backend can be used here; False for unknown names, as in MLX. Nothing is initialised (no ``MPI_Init``)."""
    return backend in BACKENDS and not unavailable(backend)


def unavailable(backend: str) -> str:
    """Return why a backend cannot be used here and what to do about it, "" if it can."""
    if backend in ("any", "ring"):
        return ""
    if backend == "mpi":
        from transports import mpi

        return mpi.missing()
    if backend == "jaccl":
        from transports import verbs

        return verbs.missing()
    from transports import nccl

    return nccl.missing()


def configured_for_rdma(environ: Environ = os.environ) -> bool:
    """Say whether RDMA devices are named, and no ring file: as MLX's launcher does it for its ``jaccl``."""
    return any(f"{of}_IBV_DEVICES" in environ for of in ("RT", "JACCL", "MLX")) and not {"RT_HOSTFILE", "MLX_HOSTFILE"} & environ.keys()


def configured_for_nccl(environ: Environ = os.environ) -> bool:
    """Say whether all of MLX's variables for NCCL are there, and nothing of ours that says where to meet."""
    found = {"NCCL_HOST_IP", "NCCL_PORT", "MLX_RANK", "MLX_WORLD_SIZE"} <= environ.keys()
    return found and not {"RT_RANK", "RT_HOSTFILE", "RT_COORDINATOR", "MLX_HOSTFILE"} & environ.keys()


def check_devices(chosen: str | None, keywords: dict[str, object]) -> None:
    """Raise ValueError where ``init`` was given what only backend ``jaccl`` knows and it will be another."""
    for name, value in keywords.items():
        if value is not None and chosen != "jaccl":
            raise ValueError(f"{name} is only supported with backend='jaccl'.")


def numbered_by_mpi(environ: Environ = os.environ) -> bool:
    """Say whether ``mpirun``, ``mpiexec`` or the like started this process as one of several."""
    return any(_several(environ, size) for _, size in RANK_AND_SIZE[:2])


def _several(environ: Environ, size: str) -> bool:
    value = environ.get(size, "")
    return value.isascii() and value.isdigit() and int(value) > 1


def _if_available(backend: str, strict: bool, found: str) -> str | None:
    why = unavailable(backend)
    if not why:
        return backend
    if strict:
        raise ConfigError(f"{found}, {why}")
    return None


def settle_for_one(backend: str, strict: bool, keywords: dict[str, Any], environ: Environ = os.environ) -> None:
    """Allow the group of one that ``init`` makes where nothing configures another. Raises ConfigError if ``strict``, or for bad settings.

    Warns, once per process, where a launcher started several: each would be alone, and say nothing. It is no error, because ``RANK`` and
    ``WORLD_SIZE`` may be anybody's, and one program in a job may do without a group.
    """
    global _checked, _warned
    others = _others(backend, environ) if strict or not _warned else ""
    if strict:
        raise ConfigError(
            f"init(strict=True, backend={backend!r}): nothing configures a group{others and f' ({others})'}; expected RT_RANK with "
            "RT_HOSTFILE, or RT_RANK, RT_WORLD_SIZE and RT_COORDINATOR, or the keywords of the same names; `rt.launch -n 4 program` sets "
            "them"
        )
    if not _checked or any(value is not None for value in keywords.values()):  # once: every call of a group of one comes here
        check_settings(environ=environ, **keywords)
        _checked = True
    if others:
        warnings.warn(f"this process is a group of one, but {others}", RuntimeWarning, stacklevel=_outside())
        _warned = True


def _others(backend: str, environ: Environ) -> str:
    """Return what says that a launcher started other processes, why they are no group, and what to do; "" if nothing says so."""
    rank, size = next((names for names in _STARTED if names[0] in environ and _several(environ, names[1])), ("", ""))
    if not rank:
        return ""
    found = f"found {rank}={environ[rank]} of {size}={environ[size]} processes"
    if why := unavailable(backend):
        return f"{found}, and backend {backend!r} cannot be used here, {why}"
    if backend == "mpi":
        return f"{found}, of which MPI does not know: start them with mpirun, or `rt.launch --backend mpi`"
    if rank == "RANK":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        return f"{found}, and nothing that says where they meet: set {' and '.join(missing)}"
    by_mpi = numbered_by_mpi(environ) and unavailable("mpi")
    return f"{found}, and nothing that says where they meet: set RT_COORDINATOR=host:port, at which rank 0 is to listen" + (
        f", or take backend 'mpi', {by_mpi}" if by_mpi else ""
    )


def _outside() -> int:
    """Return the ``stacklevel``, for the function that calls this, of the first frame that is not this package's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "rt":
        frame, level = frame.f_back, level + 1
    return level
