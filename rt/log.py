"""What logger ``rt`` writes where, as ``RT_LOG``, ``RT_VERBOSE`` and ``MLX_RING_VERBOSE`` say.

May live here: the handler of that logger. May not: what is logged; each module has its own lines.
"""

from __future__ import annotations

import logging
import os

from rt.config import Environ
from rt.errors import ConfigError


def configure(environ: Environ = os.environ, rank: int | None = None) -> None:
    """Let logger ``rt`` write to stderr if ``RT_LOG``, ``RT_VERBOSE`` or ``MLX_RING_VERBOSE`` asks for it.

    Call it again once the rank is known: the one handler then shows it.

    Raises:
        ConfigError: ``RT_LOG`` is neither info nor debug, or ``RT_VERBOSE`` neither 1 nor 0.
    """
    level = _log_level(environ)
    if level is None:
        return
    logger = logging.getLogger("rt")
    handler = next((known for known in logger.handlers if known.get_name() == "rt-stderr"), None)
    if handler is None:
        handler = logging.StreamHandler()
        handler.set_name("rt-stderr")
        logger.addHandler(handler)
    handler.setFormatter(logging.Formatter("[rt] %(message)s" if rank is None else f"[rt rank {rank}] %(message)s"))
    logger.setLevel(level)


def _log_level(environ: Environ) -> int | None:
    log, verbose = environ.get("RT_LOG"), environ.get("RT_VERBOSE")
    if log not in (None, "info", "debug"):
        raise ConfigError(f"RT_LOG: found {log!r}, expected info or debug")
    if verbose not in (None, "0", "1"):
        raise ConfigError(f"RT_VERBOSE: found {verbose!r}, expected 1 or 0")
    if log is not None:
        return logging.DEBUG if log == "debug" else logging.INFO
    asked = verbose == "1" or (verbose is None and "MLX_RING_VERBOSE" in environ)  # MLX looks at its presence only
    return logging.INFO if asked else None
