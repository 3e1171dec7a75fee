"""Hosts that can be reached by ssh: real namespaces with a real sshd each, and a desk from which a user works.

May live here: keys, configurations and processes of sshd, the user's ssh configuration. May not: anything of ``rt``, assertions.

Each sshd has its host's network, processes, name (``host0``, ...) and mounts for itself, and a key and port of its own. What is done to the
file system of one host (``prepare``) is seen there only, and goes with it; nothing is written outside the folder that the test gives. The
desk is a host, too, without sshd: ``Site.command`` runs a program there, with the hosts' names in the system's ssh configuration.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hosts
import netns
import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_FIRST_PORT = 2200


@functools.cache
def missing() -> str:
    """Say why this machine cannot have hosts with sshd; "" where it can."""
    absent = [tool for tool in (SSHD, "ssh", "ssh-keygen") if shutil.which(tool) is None]
    return netns.missing() or (f"no {', '.join(absent)} (Debian: openssh-server)" if absent else "")


# The marks of tests that need such hosts.
NEEDED = [*hosts.NEEDED, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@dataclass
class Server:
    """One host with its sshd.

    Attributes:
        host: the namespace.
        name: how the desk calls it.
        address: at which it is reached.
        port: of its sshd.
        log: what sshd says.
    """

    host: netns.Host
    name: str
    address: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End every process of this host, with no chance to say good-bye; the kernel closes their connections."""
        self.process.kill()  # the first process of its namespace dies with it, and all others with that one
        self.process.wait()

    def processes(self, mark: str) -> list[int]:
        """Return the living processes of this host whose command line or environment contains ``mark``, as numbered on this machine."""
        space = os.stat(f"/proc/{self.process.pid}/ns/pid_for_children").st_ino
        return [pid for pid in _processes() if _is_marked(pid, space, mark.encode())]


@dataclass
class Site:
    """Some hosts with sshd, and the desk."""

    servers: list[Server]
    desk: netns.Host
    config: Path

    @property
    def names(self) -> list[str]:
        return [server.name for server in self.servers]

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs ``words`` at the desk, where ssh knows the hosts by name and by address.

        It becomes what it runs: a signal to it is one to that program, whose death takes nobody along, as in a namespace it would.
        """
        prepared = f'{_bind(self.config, "/etc/ssh/ssh_config")} && exec "$@"'
        return self.desk.command_among_others("unshare", "--mount", "sh", "-c", prepared, "sh", *words)


@contextlib.contextmanager
def site(
    folder: Path,
    count: int,
    *,
    prepare: Mapping[int, Sequence[str]] = {},
    options: Mapping[int, Sequence[str]] = {},
    config: Sequence[str] = (),
    ipv6: bool = False,
) -> Iterator[Site]:
    """Make ``count`` hosts ``host0``, ... on one switch, at 10.2.0.1, ... (with ``ipv6`` also fd02::1, ...), and the desk behind them.

    Args:
        folder: for keys, configurations and logs.
        count: number of hosts.
        prepare: per host lines of shell to be run in its mounts before its sshd, for example ``mount -t tmpfs tmpfs /srv``.
        options: per host lines of its sshd_config, before all others, the first on a matter counts: ``SetEnv PATH=/stand/ins:/usr/bin``.
        config: more lines of the desk's ssh configuration, before all others.
        ipv6: whether there are IPv6 addresses, too.
    """
    with netns.switched(count + 1) as made, contextlib.ExitStack() as stack:
        if ipv6:
            for number, host in enumerate(made):
                host.ip(f"address add fd02::{number + 1}/64 dev cable nodad")
        _make_key(folder / "user_key")
        known = _client_config(folder, count, config)
        servers = [
            stack.enter_context(_server(folder, number, made[number], prepare.get(number, ()), options.get(number, ())))
            for number in range(count)
        ]
        yield Site(servers, made[count], known)


@contextlib.contextmanager
def site_for_mpi(folder: Path, count: int, prepare: Mapping[int, Sequence[str]] = {}) -> Iterator[Site]:
    """Make hosts on which the daemons of MPI do not meet: they keep files under their process' number, which two hosts may share."""
    own = {number: ["mkdir /run/tmp", *prepare.get(number, ())] for number in range(count)}
    with site(folder, count, prepare=own, options={number: ["SetEnv TMPDIR=/run/tmp"] for number in own}) as made:
        yield made


@contextlib.contextmanager
def _server(folder: Path, number: int, host: netns.Host, prepare: Sequence[str], options: Sequence[str]) -> Iterator[Server]:
    """Start a host's sshd and wait until it listens."""
    name, port, log = f"host{number}", _FIRST_PORT + number, folder / f"host{number}.log"
    lines = [
        *options,
        f"Port {port}",
        f"HostKey {folder}/{name}_key",
        f"AuthorizedKeysFile {folder}/user_key.pub",
        *("StrictModes no", "PermitRootLogin yes", "UsePAM no", "UseDNS no", "PidFile none", "LogLevel VERBOSE", "PrintMotd no"),
        *("KbdInteractiveAuthentication no", "PrintLastLog no", "MaxStartups 100", "Subsystem sftp internal-sftp"),
    ]
    file = folder / f"{name}_sshd_config"
    file.write_text("\n".join([*lines, ""]))
    script = [
        "set -e",
        f"hostname {name}",
        "mount -t tmpfs tmpfs /run && mkdir -p /run/sshd",  # which sshd wants, and this machine may not have
        _bind(folder / "ssh_config", "/etc/ssh/ssh_config"),  # from each host to each
        "[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc",  # what this machine does to its shells is nothing to the hosts
        *prepare,
        f"exec {SSHD} -D -e -f {file}",
    ]
    command = host.command("unshare", "--uts", "sh", "-c", "\n".join(script))
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "LC_ALL")}
    reading, writing = os.pipe()
    with open(log, "wb") as written, open(reading, "rb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=clean, start_new_session=True)
        os.close(writing)
        drain: subprocess.Popen[bytes] | None = None
        try:
            for line in said:
                written.write(line)
                if b"Server listening" in line:
                    break
            else:
                raise RuntimeError(f"sshd of {name} did not start: {log.read_text()}")
            drain = subprocess.Popen(["cat"], stdin=said, stdout=written)
            yield Server(host, name, f"10.2.0.{number + 1}", port, log, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if drain is not None:
                drain.wait(timeout=20)  # its input ends when the last process of the host has gone


def _client_config(folder: Path, count: int, extra: Sequence[str]) -> Path:
    """Write the desk's configuration: names and addresses, the ports that belong to them, and the keys of all hosts."""
    known, lines = [], [*extra]
    for number in range(count):
        key = _make_key(folder / f"host{number}_key")
        known.append(f"host{number} {key}")
        addresses = f"10.2.0.{number + 1} fd02::{number + 1}"
        lines += [f"Host host{number} {addresses}", f"  Port {_FIRST_PORT + number}", f"  HostKeyAlias host{number}"]
        lines += [f"Host host{number}", f"  HostName 10.2.0.{number + 1}"]
    (folder / "known_hosts").write_text("\n".join([*known, ""]))
    lines += ["Host *", f"  IdentityFile {folder}/user_key", "  IdentitiesOnly yes", f"  UserKnownHostsFile {folder}/known_hosts"]
    lines += ["  GlobalKnownHostsFile /dev/null", "  StrictHostKeyChecking yes"]
    path = folder / "ssh_config"
    path.write_text("\n".join([*lines, ""]))
    return path


def _make_key(path: Path) -> str:
    """Make a pair of keys and return the public one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=20)
    kind, key, *_ = path.with_suffix(".pub").read_text().split()
    return f"{kind} {key}"


def _bind(source: Path, target: str) -> str:
    return f"mount --bind {shlex.quote(str(source))} {target}"


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _is_marked(pid: int, space: int, mark: bytes) -> bool:
    try:
        if os.stat(f"/proc/{pid}/ns/pid").st_ino != space:
            return False
        return any(mark in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    except OSError:  # it has ended meanwhile
        return False
