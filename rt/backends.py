"""Which backends there are, which can be used here, and which one ``init`` takes.

May live here: the names of backends, what each needs, the choice. May not: what configures a backend (``config`` and the backends' own
files), anything that initialises a library.
"""

from __future__ import annotations

import os

from rt.config import RANK_AND_SIZE, Environ
from rt.errors import ConfigError

BACKENDS = ("any", "mpi", "nccl", "jaccl", "ring")


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
    sizes = (environ.get(size, "") for _, size in RANK_AND_SIZE[:2])
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _if_available(backend: str, strict: bool, found: str) -> str | None:
    why = unavailable(backend)
    if not why:
        return backend
    if strict:
        raise ConfigError(f"{found}, {why}")
    return None


def not_configured(backend: str) -> str:
    """Return the error of a ``strict`` start that finds nothing."""
    return (
        f"init(strict=True, backend={backend!r}): nothing configures a group; expected RT_RANK with RT_HOSTFILE, or RT_RANK, RT_WORLD_SIZE "
        "and RT_COORDINATOR, or the keywords of the same names; `rt.launch -n 4 program` sets them"
    )
