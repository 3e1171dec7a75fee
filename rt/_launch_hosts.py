"""All hosts of a job: looked at together before anything is started, told who is who, and left together.

May live here: the order of the conversation with the supervisors, and the table of what is wrong where. May not: one connection
(``_launch_link``), the loop and the verdict (``_launch_job``).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rt
from rt import _ssh
from rt._frames import Kind
from rt._launch_backend import SECONDS, Found, decide
from rt._launch_link import Link, RemoteFeed, RemoteRank, Want
from rt._launch_loop import Loop
from rt._launch_options import Options
from rt._launch_plan import Ground, crews, even_out, is_reachable, nth_gpu, question, told, travelling, uses_ring_file
from rt._launch_ranks import Files
from rt.interfaces import VARIABLE
from rt.secret import make_key

READY_SECONDS = 30.0  # for a host to connect, start Python and look around
_PAUSE_SECONDS = 1.0  # for saying that we are going to be stopped
_LEAVE_SECONDS = 5.0  # for a supervisor to end what is left

Row = tuple[str, str, str]


class Hosts:
    """The connections to all hosts.

    Attributes:
        links: one per host.
        ranks: all ranks, in order.
        ready: whether the ranks have been told to start.
        failure: why they cannot be, "" if nothing speaks against it.
    """

    def __init__(
        self, options: Options, job: str, environ: Mapping[str, str], tie: Callable[[], None], report: Callable[[str], None]
    ) -> None:
        self._options = options
        self._report = report
        self._job = job
        self._environ = environ
        self._crews = crews(options.hosts)
        self.links = [Link(crew, options.python, len(self._crews) > 1, tie, report) for crew in self._crews]
        every = {rank: remote for link in self.links for rank, remote in link.ranks.items()}
        self.ranks = [every[rank] for rank in range(options.size)]
        self.ready = False
        self.failure = ""
        report(f"connecting to {self.awaited}")
        self._asked: list[Link] | None = None  # those that have been sent a CHECK, once all have said HELLO
        self._rows: list[Row] = []
        self._deadline = time.monotonic() + READY_SECONDS
        self._grounds: list[Ground] = []

    # --- the loop

    def wants(self) -> Iterator[Want]:
        for link in self.links:
            yield from link.wants()

    @property
    def due(self) -> float | None:
        times = [link.due for link in self.links] + [None if self.ready or self.failure else self._deadline]
        return min((due for due in times if due is not None), default=None)

    def attend(self, now: float) -> None:
        """Do what no event calls for: beats, and the next step when all hosts have taken the last one."""
        for link in self.links:
            link.attend(now)
        if self.ready or self.failure:
            return
        late = self._deadline <= now
        if self._asked is None and all(link.hello is not None or link.over or late for link in self.links):
            self._look_around(late)
        if self._asked is not None and all(link.checked is not None or link.over or late for link in self._asked):
            self._hear_out()

    def reaped(self, pid: int, status: int) -> bool:
        """Note the end of an ssh; False if it is none of ours."""
        for link in self.links:
            if link.pid == pid:
                link.reaped(status)
                return True
        return False

    def ended(self) -> list[RemoteRank]:
        """Return the ranks that have ended since the last call."""
        found = []
        for link in self.links:
            found += link.ended
            link.ended = []
        return found

    @property
    def awaited(self) -> str:
        """The hosts that have not answered, "" once the ranks have been told to start."""
        return "" if self.ready else ", ".join(link.crew.host.name for link in self.links if link.checked is None and not link.over)

    @property
    def feeds(self) -> list[RemoteFeed]:
        """The stdin of each rank."""
        return [link.feeds[rank] for link in self.links for rank in link.crew.ranks]

    @property
    def complaint(self) -> str:
        """What went wrong with the start of a rank, "" if nothing did."""
        return next((link.complaint for link in self.links if link.complaint), "")

    # --- before the start

    def _look_around(self, late: bool) -> None:
        """All have said what they are, or will not: ask those that can be used what they think of the program."""
        unreachable = [self._unreachable(link, late) for link in self.links]
        self._grounds = [Ground(address, gpus=(link.hello or {}).get("gpus")) for link, address in self._addresses()]
        self._rows = [*(row for row in unreachable if row), *self._known_by_two_names()]
        self._asked = [link for link, row in zip(self.links, unreachable, strict=True) if row is None]
        # For what NCCL needs, with these variables; not where the job will not start anyway.
        travels = travelling(self._options, self._environ)
        asks = None if self._options.backend or any(unreachable) else travels
        if asks is not None:
            self._deadline += SECONDS  # a CuPy that takes long makes no host late
        for link, ground in zip(self.links, self._grounds, strict=True):
            if link not in self._asked:
                continue
            self._rows += self._unfit(link, ground)
            job = {"command": self._options.command, "cwd": self._options.cwd, "default_cwd": os.getcwd(), "asks": asks}
            job["iface"] = travels.get(VARIABLE)
            link.send(Kind.CHECK, 0, job | question(self._options, link.crew, ground.address))

    def _unreachable(self, link: Link, late: bool) -> Row | None:
        """Say why a host has not said what it is, or that it is of another version."""
        name, python = link.crew.host.name, self._options.python
        if link.hello is not None:
            version = link.hello["version"]
            if version == rt.__version__:
                return None
            return name, f"rt {version}, here {rt.__version__}", f"`{python} -m pip install rt-collectives=={rt.__version__}` there"
        if not link.over:
            return name, f"no answer for {READY_SECONDS:g} seconds" if late else "no answer", f"try `ssh {link.crew.host.ssh} true`"
        if link.code == _ssh.FAILED:
            return name, *_ssh.explain(link.crew.host, link.noise)
        return name, *explain_python(python, link.noise, link.code)

    def _known_by_two_names(self) -> Iterator[Row]:
        """Find hosts that are one: each of its names would count its ranks, GPUs and cores from the start."""
        known: dict[tuple[str | int, ...], Link] = {}
        for link in self.links:
            machine = (link.hello or {}).get("machine")
            first = known.setdefault(tuple(machine), link) if machine else link
            if first is not link:
                name, other = link.crew.host.ssh, first.crew.host.ssh
                yield link.crew.host.name, f"{name} and {other} are one host", f"write {other} once for each rank, or once with -n"

    def _addresses(self) -> Iterator[tuple[Link, str]]:
        """Yield at which address other hosts reach each one: its own, or the one that ssh used; ours is the one they see ssh come from.

        Where that is not known, it is "".
        """
        seen = next((link.hello["client"] for link in self.links if not link.crew.host.is_local and link.hello), "")
        for link in self.links:
            if len(self.links) == 1:
                found = "127.0.0.1"
            elif link.crew.host.is_local:
                found = seen
            else:
                found = (link.hello or {}).get("server", "")
            yield link, (*link.crew.host.ips, found)[0]

    def _unfit(self, link: Link, ground: Ground) -> Iterator[Row]:
        name, options = link.crew.host.name, self._options
        if len(self.links) > 1 and not is_reachable(ground.address, given=bool(link.crew.host.ips)):
            found = f"ssh reaches it at {ground.address}" if ground.address else "its sshd does not say at which address it was reached"
            yield name, f"{found}, which other hosts cannot", 'give it "ips" in a hostfile'
        allowed = travelling(options, self._environ).get("CUDA_VISIBLE_DEVICES", ground.gpus)
        if options.backend == "nccl" and not nth_gpu(allowed, len(link.crew.ranks) - 1):
            yield name, f"CUDA_VISIBLE_DEVICES={allowed} for {len(link.crew.ranks)} ranks", "allow one GPU per rank, or start fewer"
        first = options.hosts[0]
        if uses_ring_file(options) and any(len(options.hosts[rank].ips) != len(first.ips) for rank in link.crew.ranks):
            count = f"{len(link.crew.host.ips)} ips, {first.name} has {len(first.ips)}"
            yield name, count, "give each host as many: rank connects with rank once for each"

    def _hear_out(self) -> None:
        """All have been looked at: start, or say what is wrong where."""
        for link in self._asked or ():
            host = link.crew.host
            if link.checked is None or link.over:
                late_or_lost = link.lost or f"no answer for {READY_SECONDS:g} seconds"
                self._rows.append((host.name, late_or_lost, f"try `ssh {host.ssh} true`"))
            else:
                self._rows += [(host.name, problem, advice(problem)) for problem in link.checked["problems"]]
        if not self._rows:
            self._start()
            return
        self.failure = verdict(self._rows, len(self.links))
        for rank in self.ranks:
            rank.gone = True

    def report(self) -> list[Row]:
        """Return what is wrong where and what to do about it, in the order of the hosts."""
        order = {link.crew.host.name: index for index, link in enumerate(self.links)}
        return sorted(self._rows, key=lambda row: order[row[0]])

    def _start(self) -> None:
        for link, ground in zip(self.links, self._grounds, strict=True):
            assert link.checked is not None
            ground.learn(link.checked["ground"])
        if even_out(self._grounds, self._options.connections_per_ip):
            self._report("hosts have different numbers of addresses: the first of each is used")
        if not self._options.backend:
            self._choose()
        environment = travelling(self._options, self._environ)
        places = zip(self.links, self._grounds, strict=True)
        where = ", ".join(f"{ground.addresses[link.crew.ranks[0]][0]} ({link.crew.host.name})" for link, ground in places)
        self._report(f"{self._options.size} ranks of {shlex.join(self._options.command)} on {len(self.links)} hosts: {where}")
        self._report(f"variables that go along: {', '.join(sorted(environment)) or 'none'}")
        words = told(self._options, self._crews, self._grounds, environment)
        secret = make_key()
        for link in self.links:
            ranks = {str(rank): {"variables": words[rank].variables, "files": words[rank].files} for rank in link.crew.ranks}
            files = Files.TERMINAL if self._options.tty else Files.PIPES
            job = {"ranks": ranks, "environment": environment, "secret": secret, "job": self._job, "files": files.value}
            link.send(Kind.START, 0, job)
            link.started = True
        self.ready = True

    def _choose(self) -> None:
        """Take the backend that all hosts can have."""
        found = [(link.crew.host.name, len(link.crew.ranks), Found(*(link.checked or {})["found"])) for link in self.links]
        backend, why = decide(found)
        if why:
            self._report(why)
        self._options = dataclasses.replace(self._options, backend=backend)

    def sleep(self) -> None:
        """Stop this process until it is told to go on, as Ctrl-Z does, and have the hosts wait."""
        for link in self.links:
            link.send(Kind.PAUSE)
        self._pump(lambda: all(link.over or link.has_said_all for link in self.links), _PAUSE_SECONDS)
        os.kill(os.getpid(), signal.SIGSTOP)
        for link in self.links:
            link.wake_up()

    # --- the end

    def leave(self, *, sweep: bool) -> None:
        """End the supervisors and wait for them, within reason."""
        for link in self.links:
            if link.hello is None:
                link.lose("it was not waited for")
            link.leave(sweep=sweep)
        self._pump(lambda: all(link.over for link in self.links), _LEAVE_SECONDS)
        for link in self.links:
            if link.code is None:
                link.kill()
                link.reaped(os.waitpid(link.pid, 0)[1])

    def _pump(self, done: Callable[[], bool], patience: float) -> None:
        """Do nothing but talk with the hosts until ``done``, or time is up."""
        deadline, loop = time.monotonic() + patience, Loop()
        while not done() and (left := deadline - time.monotonic()) > 0:
            for want in self.wants():
                loop.want(*want)
            loop.wait(left)


def verdict(rows: Sequence[Row], count: int) -> str:
    """Return in one sentence that of ``count`` hosts those in ``rows`` are not ready."""
    bad = len({host for host, _, _ in rows})
    of = "the host is not" if count == 1 else f"{bad} of {count} hosts {'is' if bad == 1 else 'are'} not"
    return f"nothing was started: {of} ready"


def table(rows: Sequence[Row]) -> str:
    """Return what is wrong where for people: lines, the columns as wide as what is in them."""
    rows = [("host", "found", "what to do"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows)


def as_json(failure: str, rows: Sequence[Row]) -> str:
    """Return the same for programs."""
    problems = [{"host": host, "found": found, "advice": advice} for host, found, advice in rows]
    return json.dumps({"version": 1, "failure": failure, "problems": problems}, indent=2)


def explain_python(python: str, noise: bytes, code: int | None) -> tuple[str, str]:
    """Say why a program of ours did not run there though there was a login; by the last words of a shell or of Python."""
    lines = [line.strip() for line in noise.decode(errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else f"{python} ended with code {code} and said nothing"
    if re.search(r"unknown option -P|Unknown option: -P", "\n".join(lines)):
        return f"{python} is older than 3.11", "install Python 3.11 or newer there, or name one: --python"
    if "No module named" in said:
        return f"{python}: {said.rpartition(': ')[2]}", f"`{python} -m pip install rt-collectives=={rt.__version__}` there"
    if code in (126, 127):
        return f"no Python at {python}", "install it there, or name one that all hosts have: --python"
    return said, f"try `{python} -c 'import rt'` there"


def advice(problem: str) -> str:
    """Say what to do about something that a host has found wrong with the job."""
    if problem.startswith(VARIABLE):
        return "name interfaces or networks that it has: --iface, or RT_SOCKET_IFNAME"
    if "is no address" in problem or "cannot listen" in problem:
        return 'correct "ips" in the hostfile'
    if "--cwd" in problem:
        return "make that folder there, or copy one with --sync-code"
    if "not on PATH" in problem:
        return "install it there, or give its whole path"
    return "copy it there, or let --sync-code do so"
