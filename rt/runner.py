"""``rt.run``: a program of one rank, from its first line to an end that the other ranks can tell.

May live here: the loop that runs a rank's main coroutine, and what the world is told when that ends. May not: anything about groups that
``world`` does not offer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rt import world
from rt.errors import GroupBrokenError

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine as ``asyncio.run`` does, on uvloop where that is installed, and let the other ranks know how it ended.

    If ``main`` returns (or raises SystemExit with code 0), the world is closed in order. If it raises anything else, every group of this
    rank is aborted at once: the other ranks' calls raise ``GroupAbortedError`` with this rank as ``culprit``, instead of waiting for ever.
    What was raised is raised here, and Ctrl-C behaves as under ``asyncio.run``.

    Args:
        main: a coroutine, for example ``main()`` of an ``async def main()``.
        debug: as of ``asyncio.run``.

    Raises:
        RuntimeError: called from a running loop.
        ValueError: ``main`` is no coroutine.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("rt.run() cannot be called from a running event loop; await the coroutine")
    if not asyncio.iscoroutine(main):
        raise ValueError(f"rt.run() takes a coroutine, for example main() of `async def main()`, not {main!r}")
    try:
        with asyncio.Runner(debug=debug, loop_factory=_loop_factory()) as runner:
            return runner.run(_told(main))
    except BaseException as error:
        _tell(error)  # a second Ctrl-C ends the loop without a word to the coroutine
        raise
    finally:
        world.end()


async def _told(main: Coroutine[Any, Any, T]) -> T:
    """Await ``main``; the ranks are told before other tasks are cancelled, which may take as long as it likes."""
    try:
        return await main
    except BaseException as error:
        _tell(error)
        raise


def _tell(error: BaseException) -> None:
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return
    culprit = error.culprit if isinstance(error, GroupBrokenError) else None
    name = "was interrupted" if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)) else f"raised {type(error).__name__}"
    for found in world.worlds():
        if not found.closed:
            found.abort_all(culprit, f"the program of rank {found.rank} {name}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
