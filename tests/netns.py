"""Hosts made of namespaces, and the cables between them: real networks for tests, on one machine and without a trace outside.

May live here: making and connecting hosts, and running commands on them. May not: anything of ``rt``, assertions.

A host is a network namespace that has no name: a process holds it, and with the last process in it the kernel takes it away, with its
cables. The holder ends when its input ends, so even a test run that is killed leaves nothing behind. Each program on a host gets a process
namespace of its own: ranks on different machines cannot watch each other's processes, and here they cannot either.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

_APART = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]  # killing the first kills the program

_PATIENCE = 30.0


@functools.cache
def missing() -> str:
    """Say why this machine cannot make hosts; "" where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux"
    absent = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    tried = subprocess.run(["unshare", "--net", *_APART[1:], "true"], capture_output=True, text=True, timeout=20)
    return f"this root may not make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@functools.cache
def no_limits() -> str:
    """Say why the wires of hosts cannot be slowed down here; "" where they can."""
    if missing() or shutil.which("tc") is None:
        return missing() or "no tc (Debian: iproute2)"
    with hosts(1) as (host,):
        host.ip("link add name cable type veth peer name end")
        try:
            host.limit("cable", "1gbit")
        except RuntimeError as error:
            return f"this kernel has no tbf (CONFIG_NET_SCH_TBF): {error}"
    return ""


class Host:
    """One host; at first it has only a loopback interface, and it never forwards.

    Attributes:
        number: counts the hosts of a network.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.write(b"up\n")  # the echo comes from inside: until then the namespace may not exist
        if self._holder.stdout.readline() != b"up\n":
            raise RuntimeError("the holder of a namespace did not start")
        self.ip("link set lo up")

    @property
    def holder(self) -> int:
        """The process that stands for this host where ``ip`` wants to know a namespace."""
        return self._holder.pid

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs ``words`` here, apart from the processes of all other hosts."""
        return [*self._enter(), *_APART, *words]

    def command_among_others(self, *words: str) -> list[str]:
        """Return the command line that runs ``words`` here among this machine's processes: its own is the number of what it starts."""
        return [*self._enter(), *words]

    def ip(self, words: str) -> str:
        """Run ``ip`` here and return what it prints."""
        return self._run("ip", *words.split())

    def limit(self, interface: str, rate: str) -> None:
        """Send no more than ``rate`` (as tc writes it: ``1gbit``, headers of Ethernet included) on an interface."""
        # The burst must hold a segment as large as the interface takes (64 KiB) and what goes out between two ticks of a slow clock; the
        # limit is the queue of a switch: far below what TCP would fill it with, it would drop, and the bytes be sent twice.
        self._run("tc", "qdisc", "replace", "dev", interface, "root", "tbf", "rate", rate, "burst", "128kb", "limit", "2mb")

    def sent(self, interface: str) -> int:
        """Bytes that have gone out on an interface, with all headers."""
        (found,) = json.loads(self.ip(f"-s -j link show {interface}"))
        return int(found["stats64"]["tx"]["bytes"])

    def retransmitted(self) -> int:
        """TCP segments that this host has sent again because nobody acknowledged them."""
        names, values = (line.split() for line in self._run("cat", "/proc/net/snmp").splitlines() if line.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._enter(), *words], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net"]

    def end(self) -> None:
        """Let the namespace go; processes in it keep it until they end."""
        self._holder.communicate(timeout=20)


def connect(left: Host, left_address: str, right: Host, right_address: str, name: str) -> None:
    """Lay a cable; both ends are interfaces called ``name``, with addresses such as ``10.0.0.1/30`` or ``fd00::1/64``."""
    left.ip(f"link add {name} type veth peer name {name} netns {right.holder}")
    for host, address in ((left, left_address), (right, right_address)):
        # nodad: an IPv6 address could else not be used for a second, until the host is sure that nobody else has it.
        host.ip(f"address add {address} dev {name}" + (" nodad" if ":" in address else ""))
        host.ip(f"link set {name} up")


def until_running(made: Sequence[Host]) -> None:
    """The kernel tells at most once in a second that cables have been plugged in; until then they are not looked at."""
    until = time.monotonic() + _PATIENCE
    for host in made:
        while any(cable["operstate"] != "UP" for cable in json.loads(host.ip("-j link show")) if cable["ifname"] != "lo"):
            if until < time.monotonic():
                raise RuntimeError("a cable that was plugged in does not come up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make unconnected hosts."""
    made: list[Host] = []
    try:
        for number in range(count):
            made.append(Host(number))
        yield made
    finally:
        for host in made:
            host.end()


@contextlib.contextmanager
def ring_of_hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts with one cable and one network of two addresses per pair of neighbours, and no route to anybody else.

    ``cable<r>`` connects host r, 10.0.r.1, with its right neighbour, 10.0.r.2.
    """
    with hosts(count) as made:
        for number, host in enumerate(made):
            connect(host, f"10.0.{number}.1/30", made[(number + 1) % count], f"10.0.{number}.2/30", f"cable{number}")
        yield made


@contextlib.contextmanager
def switched(count: int) -> Iterator[list[Host]]:
    """Make hosts with one ``cable`` each, all to one switch; host r is 10.2.0.(r + 1)."""
    with hosts(count + 1) as (switch, *made):
        switch.ip("link add name switch type bridge")
        switch.ip("link set switch up")
        for number, host in enumerate(made):
            host.ip(f"link add cable type veth peer name port{number} netns {switch.holder}")
            host.ip(f"address add 10.2.0.{number + 1}/24 dev cable")
            switch.ip(f"link set port{number} master switch up")
            host.ip("link set cable up")
        yield made


@contextlib.contextmanager
def two_hosts(*networks: tuple[str, str]) -> Iterator[list[Host]]:
    """Make two hosts with one cable per pair of addresses: ``cable0``, ``cable1`` and so on."""
    with hosts(2) as made:
        for index, (left, right) in enumerate(networks):
            connect(made[0], left, made[1], right, f"cable{index}")
        yield made
