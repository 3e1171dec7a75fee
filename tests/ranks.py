"""Real rank processes for tests: start them on this host, talk to them, see how they end.

May live here: starting, hearing and ending rank processes, and the face that lets one body run under every front end. May not:
assertions about collectives.

A body is a module-level ``async def body(rt, group, ctl, *args)`` of a test module. Under the asyncio fronts ``rt`` is the module and the
body runs in a loop; under ``sync`` it is ``rt.sync`` with results that are already there to be awaited, and no loop exists. Each process
costs about 0.3 s to start, so small checks belong together in one body.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import IO, Any, NamedTuple

FRONTS = ("sync", "asyncio", "debug", "uvloop")
# Fronts whose ranks share memory; those of the others use TCP. RT_SHM in the environment of the tests decides for all.
_SHARING = ("sync", "uvloop")
_TOLD, _VALUE, _ERROR = "told", "value", "error"
_FOREIGN = ("RT_", "MLX_", "TORCHELASTIC_", "MASTER_")


def end_soon(pids: Iterable[int], seconds: float = 5.0) -> bool:
    """Return whether these processes, which need not be children of ours, all end within some seconds; a zombie has ended."""

    def lives(pid: int) -> bool:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] != "Z"
        except ProcessLookupError:
            return False
        except FileNotFoundError:  # it has just ended, or there is no /proc here
            return not os.path.isdir("/proc")

    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if lives(pid)]
        time.sleep(0.01)
    return not left


class Failure(NamedTuple):
    """What a body raised; ``culprit``, ``work`` and ``group`` are those of rt's errors."""

    kind: str
    text: str
    culprit: int | None
    work: str | None
    group: str | None
    traceback: str


@dataclass
class Outcome:
    """How one rank ended; ``value`` is what its body returned, ``error`` what it raised."""

    rank: int
    returncode: int | None = None
    value: Any = None
    error: Failure | None = None
    stderr: str = ""
    stdout: str = ""

    def __str__(self) -> str:
        raised = self.error.traceback if self.error else ""
        return f"--- rank {self.rank}, exit status {self.returncode}\n{raised}{self.stdout}{self.stderr}"


class Ranks:
    """Context manager: rank processes, each in its own process group; whatever is left of them is killed at the end.

    Args:
        n: number of ranks.
        body: what they run; see the module.
        front: one of ``FRONTS``.
        args: further arguments of the body, pickled.
        env: environment of all ranks, on top of this process'; None removes a variable.
        init: False: the body finds ``group`` None and nothing initialised.
        on: per rank the words that its command line begins with, which bring it onto a host of ``netns``; none: all run here.
        python: the interpreter of the ranks.
    """

    def __init__(
        self, n: int, body: Callable[..., Any], *, front: str = "sync", args: Iterable[Any] = (), env: dict[str, str | None] | None = None,
        init: bool = True, on: Sequence[Sequence[str]] = (), python: str = sys.executable,
    ) -> None:  # fmt: skip
        if front == "uvloop" and importlib.util.find_spec("uvloop") is None:
            raise unittest.SkipTest("uvloop is not installed")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.outcomes = [Outcome(rank) for rank in range(n)]
        self._ended = [False] * n
        self._on = on or [()] * n
        self._python = python
        self._connections: list[Connection] = []
        self._files: list[tuple[IO[bytes], IO[bytes]]] = []
        self._secret = secrets.token_hex(32)
        module = sys.modules[body.__module__]
        assert module.__file__ is not None
        job = (os.path.abspath(module.__file__), body.__qualname__, front, tuple(args), init)
        try:
            self._begin(n, {"RT_SHM": os.environ.get("RT_SHM", str(int(front in _SHARING))), **(env or {})}, job)
        except BaseException:
            self._kill()
            raise

    def _begin(self, n: int, env: dict[str, str | None], job: Any) -> None:
        """Start the processes and send each its job."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(n):
                self._start(rank, n, listener, env)
                self._connections[rank].send(job)

    def _start(self, rank: int, size: int, listener: socket.socket, env: dict[str, str | None]) -> None:
        ours, theirs = socket.socketpair()
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        fds = [theirs.fileno()] + ([listener.fileno()] if rank == 0 else [])
        with theirs:
            process = self._spawn(rank, _environment(rank, size, listener, self._secret, env), files, fds)
        self.processes.append(process)
        self._connections.append(Connection(ours.detach()))
        self._files.append(files)

    def _spawn(self, rank: int, env: dict[str, str], files: tuple[IO[bytes], IO[bytes]], fds: list[int]) -> subprocess.Popen[bytes]:
        """Start a process that lives by the first of its descriptors, and keeps the others."""
        here = os.path.dirname(os.path.abspath(__file__))
        program = f"import sys; sys.path.insert(0, {here!r}); import ranks; ranks._rank({fds[0]})"
        return subprocess.Popen(
            [*self._on[rank], self._python, "-X", "faulthandler", "-W", "error", "-c", program],
            env=env, stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1], pass_fds=fds, start_new_session=True,
        )  # fmt: skip

    def tell(self, rank: int, thing: object) -> None:
        """Send an object to a rank's ``ctl.hear()``."""
        self._connections[rank].send(thing)

    def hear(self, rank: int, timeout: float = 30) -> Any:
        """Return the next object that the rank gave to ``ctl.tell``; AssertionError if it ends or keeps silent."""
        until = time.monotonic() + timeout
        while (rest := until - time.monotonic()) > 0 and not self._ended[rank]:
            if self._connections[rank].poll(rest):
                found = self._receive(rank)
                if found is not None:
                    return found[0]
        why = "ended" if self._ended[rank] else f"said nothing for {timeout} s"
        raise AssertionError(f"rank {rank} {why} when it was to tell something\n{self._autopsy()}")

    def wait(self, timeout: float = 30) -> list[Outcome]:
        """Return how all ranks ended; AssertionError, with what they printed and where they were, if one does not end in time."""
        until = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > until:
                raise AssertionError(f"not all ranks ended within {timeout} s\n{self._autopsy()}")
            self._listen(0.02)
        self._listen(0)
        self._collect()
        return self.outcomes

    def _listen(self, seconds: float) -> None:
        """Hear what ranks have to say; the end of a process is looked for by ``wait``, as a forked child may keep a connection open."""
        open_ones = {connection: rank for rank, connection in enumerate(self._connections) if not self._ended[rank]}
        if not open_ones:
            time.sleep(seconds)
        while ready := wait(list(open_ones), seconds):
            for connection in ready:
                rank = open_ones[connection]  # type: ignore[index]
                self._receive(rank)
                if self._ended[rank]:
                    del open_ones[connection]  # type: ignore[arg-type]
            seconds = 0
            if not open_ones:
                break

    def _receive(self, rank: int) -> tuple[Any] | None:
        try:
            kind, thing = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._ended[rank] = True
            return None
        if kind == _TOLD:
            return (thing,)
        setattr(self.outcomes[rank], kind, thing)
        return None

    def _collect(self) -> None:
        for outcome, process, (stdout, stderr) in zip(self.outcomes, self.processes, self._files, strict=True):
            outcome.returncode = process.poll()
            stdout.seek(0)
            stderr.seek(0)
            outcome.stdout, outcome.stderr = stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")

    def _autopsy(self) -> str:
        """End all ranks so that those alive print where they are, and return what everybody printed."""
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGABRT)
        for process in alive:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listen(0)
        self._collect()
        return "\n".join(map(str, self.outcomes))

    def _kill(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        for process in self.processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        for stdout, stderr in self._files:
            stdout.close()
            stderr.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()


def run(n: int, body: Callable[..., Any], *, timeout: float = 30, **how: Any) -> list[Outcome]:
    """Run ``body`` on ``n`` ranks to the end and return how each ended; ``how`` is for ``Ranks``."""
    with Ranks(n, body, **how) as ranks:
        return ranks.wait(timeout)


def results(n: int, body: Callable[..., Any], *, timeout: float = 30, **how: Any) -> list[Any]:
    """As ``run``, for bodies that must succeed: return their values."""
    return succeeded(run(n, body, timeout=timeout, **how))


def succeeded(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return the values of the bodies; AssertionError if a rank raised, failed at exit or left a trace."""
    bad = [outcome for outcome in outcomes if outcome.error or outcome.returncode or "Traceback" in outcome.stderr]
    if bad:
        raise AssertionError("\n".join(str(outcome) for outcome in [*bad, *(each for each in outcomes if each not in bad)]))
    return [outcome.value for outcome in outcomes]


def _environment(rank: int, size: int, listener: socket.socket, secret: str, extra: dict[str, str | None]) -> dict[str, str]:
    env = bare_environment()
    host, port = listener.getsockname()
    env |= {"RT_RANK": str(rank), "RT_WORLD_SIZE": str(size), "RT_COORDINATOR": f"{host}:{port}", "RT_SECRET": secret}
    if rank == 0:
        env["RT_COORDINATOR_FD"] = str(listener.fileno())
    return changed(env, extra)


def bare_environment() -> dict[str, str]:
    """Return this process' environment without what would configure ranks."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN) and name not in ("RANK", "WORLD_SIZE")}
    env["OPENBLAS_NUM_THREADS"] = "1"  # the ranks share the cores
    return env


def changed(env: dict[str, str], extra: dict[str, str | None]) -> dict[str, str]:
    """Return an environment with variables set, or removed where None."""
    return {name: value for name, value in {**env, **extra}.items() if value is not None}


# -- in the rank --------------------------------------------------------------------------------------------------------------------------


class Ctl:
    """The rank's end of the conversation with the test."""

    def __init__(self, connection: Connection, front: str) -> None:
        self.front = front
        self._connection = connection

    def tell(self, thing: object) -> None:
        """Give an object to the test's ``hear``."""
        self._connection.send((_TOLD, thing))

    def hear(self) -> Any:
        """Wait, blocking this thread, for what the test tells."""
        return self._connection.recv()


class Done:
    """An awaitable whose result is there."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __await__(self) -> Generator[None, None, Any]:
        return self._value
        yield


class Face:
    """A module or group of the blocking front end that looks like the awaitable one; what it is the face of is ``.real``."""

    _PLAIN = ("rank", "size", "abort", "is_available")

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name.startswith("_") or name in self._PLAIN or isinstance(value, type) or not callable(value):
            return value

        def call(*args: Any, **keywords: Any) -> Done:
            if isinstance(keywords.get("group"), Face):
                keywords["group"] = keywords["group"].real
            result = value(*[arg.real if isinstance(arg, Face) else arg for arg in args], **keywords)
            return Done(Face(result) if name in ("init", "split") else result)

        return call

    def __repr__(self) -> str:
        return repr(self.real)


async def in_order(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await works one after the other: ``asyncio.gather`` for bodies that also run without a loop."""
    return [await work for work in works]


def _rank(fd: int) -> None:
    """The whole life of a rank process."""
    live(Connection(fd))


def live(connection: Connection) -> None:
    """Do what comes on the connection, and tell how it went."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that puts the tests in the background ignores it, and so would we
    unhandled: list[str] = []
    _watch(unhandled)
    path, name, front, args, init = connection.recv()
    ctl = Ctl(connection, front)
    try:
        sys.path.insert(0, os.path.dirname(path))
        module = importlib.import_module(os.path.splitext(os.path.basename(path))[0])
        body: Callable[..., Any] = getattr(module, name)
        value = _drive(body, ctl, args, init) if front == "sync" else _loop(body, ctl, args, init, unhandled)
        gc.collect()
        if unhandled:
            raise RuntimeError("nobody handled:\n" + "\n".join(unhandled))
    except BaseException as error:
        connection.send((_ERROR, _failure(error)))
        sys.exit(1)
    connection.send((_VALUE, value))


def _failure(error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(error))
    culprit, work, group = (getattr(error, name, None) for name in ("culprit", "work", "group"))
    return Failure(type(error).__name__, str(error), culprit, work, group, trace)


def _watch(unhandled: list[str]) -> None:
    """Keep what threads and destructors raise, which Python only prints."""

    def in_thread(args: threading.ExceptHookArgs) -> None:
        unhandled.append("".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)))
        threading.__excepthook__(args)

    def in_destructor(args: Any) -> None:
        unhandled.append(f"{args.err_msg} {args.object!r}: " + "".join(traceback.format_exception(args.exc_value)))
        sys.__unraisablehook__(args)

    threading.excepthook = in_thread
    sys.unraisablehook = in_destructor


def _drive(body: Callable[..., Any], ctl: Ctl, args: tuple[Any, ...], init: bool) -> Any:
    """Run a coroutine that never has to wait: no loop exists."""
    import rt.sync

    face = Face(rt.sync)
    group = Face(rt.sync.init()) if init else None
    coroutine = body(face, group, ctl, *args)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("the body waited for an event loop under the blocking front end")


def _loop(body: Callable[..., Any], ctl: Ctl, args: tuple[Any, ...], init: bool, unhandled: list[str]) -> Any:
    import rt

    factory = None
    if ctl.front == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop

    def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        unhandled.append(f"{context['message']}: {context.get('exception')!r}")
        loop.default_exception_handler(context)

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(on_exception)
        loop.slow_callback_duration = math.inf  # a loop in debug mode reports what a busy host delayed
        value = await body(rt, await rt.init() if init else None, ctl, *args)
        gc.collect()  # a task whose exception nobody fetched says so when it goes
        return value

    with asyncio.Runner(debug=ctl.front == "debug", loop_factory=factory) as runner:
        return runner.run(main())
