"""The hosts of a job: the launcher's hostfile in both of its forms, and the list of ``--hosts``.

May live here: the schema, its errors, and writing a file. May not: ring files (``config``), connections, the choice of what runs where.

The schema is that of ``mlx.launch`` and ``mlx.distributed_config``: a list of hosts, or an object with ``hosts`` and, if wanted,
``backend`` and ``envs``. A host has ``ssh``, and if wanted ``ips`` and ``rdma``. The order of the list is the order of the ranks.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rt.errors import ConfigError
from rt.json_file import brief, load

BACKENDS = ("ring", "mpi", "nccl", "jaccl", "jaccl-ring")

_HOSTS = 'a JSON list of hosts such as {"ssh": "node1", "ips": ["10.0.0.1"]}, or an object with such a list as "hosts"'
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Host:
    """One entry of a hostfile.

    Attributes:
        ssh: what ``ssh`` is told: a name of DNS or of its configuration, an address (IPv6 without brackets), or user@ one of these.
        ips: addresses at which other hosts reach this one, as many as there are cables to use.
        rdma: per host of the file the RDMA device or devices that lead there, None for the host itself.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | tuple[str, ...] | None, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether programs run here without ssh."""
        return self.ssh in _LOCAL

    @property
    def chosen_ips(self) -> tuple[str, ...]:
        """The ``ips`` that somebody chose: not an address that ``--hosts`` names the host by, which says where its ssh is."""
        return () if self.ips == (self.name,) else self.ips

    @property
    def name(self) -> str:
        """What stands for the host in messages and before its lines: without the user."""
        return self.ssh.rpartition("@")[2]


@dataclass(frozen=True)
class Hostfile:
    """What a hostfile says.

    Attributes:
        hosts: in the order of their ranks.
        backend: one of ``BACKENDS``, or "" for the launcher's choice.
        envs: ``NAME=VALUE`` each, for every rank.
    """

    hosts: tuple[Host, ...]
    backend: str = ""
    envs: tuple[str, ...] = ()


def parse_hosts(text: str, repeat: int = 1) -> tuple[Host, ...]:
    """Read what ``--hosts`` takes: names and addresses with commas between, an address being the host's ``ips`` too.

    Args:
        text: for example ``node1,user@node2,10.0.0.3,[fd00::4]``.
        repeat: see :func:`repeated`.

    Raises:
        ConfigError: an entry is empty or cannot be a host.
    """
    hosts = []
    for index, entry in enumerate(text.split(",")):
        name = _ssh_name(entry.strip(), f"--hosts: entry [{index}] of {text!r}")
        address = name.rpartition("@")[2]
        hosts.append(Host(name, (address,) if is_address(address) else ()))
    return repeated(hosts, repeat)


def repeated(hosts: Iterable[Host], repeat: int) -> tuple[Host, ...]:
    """Return each host ``repeat`` times in a row: the ranks of a host are neighbours."""
    return tuple(host for host in hosts for _ in range(repeat))


def read_hostfile(path: str | os.PathLike[str]) -> Hostfile:
    """Read a hostfile.

    Raises:
        ConfigError: the file cannot be read or is none; one line that names the file and the place in it, what was found and expected.
    """
    where = f"hostfile {os.fspath(path)}"
    content = load(path, where, _HOSTS)
    fields = content if isinstance(content, dict) else {"hosts": content}
    _known_only(fields, ("hosts", "backend", "envs"), where)
    hosts = fields.get("hosts")
    if _is_ring_file(hosts):
        raise ConfigError(
            f'{where}: found a ring file (per rank a list of "ip:port"), expected {_HOSTS}; '
            "ranks read a ring file by themselves: RT_HOSTFILE takes this one"
        )
    if not isinstance(hosts, list) or not hosts:
        raise ConfigError(f"{where}: found {brief(content)}, expected {_HOSTS}")
    backend = fields.get("backend", "")
    if backend != "" and backend not in BACKENDS:
        raise ConfigError(f'{where}: "backend": found {brief(backend)}, expected one of {", ".join(BACKENDS)}, or ""')
    envs = _texts(fields.get("envs", []), f'{where}: "envs"', 'a list of "NAME=VALUE"')
    for index, entry in enumerate(envs):
        check_variable(entry, f'{where}: "envs"[{index}]')
    return Hostfile(tuple(_host(entry, f"{where}: host [{index}]") for index, entry in enumerate(hosts)), backend, envs)


def write_hostfile(path: str | os.PathLike[str], hostfile: Hostfile) -> None:
    """Write a file that :func:`read_hostfile` and ``mlx.launch`` read; an OSError is the caller's."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(show_hostfile(hostfile))


def show_hostfile(hostfile: Hostfile) -> str:
    """Return the text of a hostfile, in the form of an object, with a newline at its end."""
    hosts = [{"ssh": host.ssh, "ips": host.ips, "rdma": host.rdma} for host in hostfile.hosts]
    return json.dumps({"backend": hostfile.backend, "envs": hostfile.envs, "hosts": hosts}, indent=4) + "\n"


def check_variable(text: str, where: str) -> tuple[str, str]:
    """Cut ``NAME=VALUE`` in two. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"{where}: found {text!r}, expected NAME=VALUE, the name of letters, digits and underscores")
    return name, value


def is_address(text: str) -> bool:
    """Say whether ``text`` is an IP address, with or without a zone (``fe80::1%eth0``)."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _host(entry: object, where: str) -> Host:
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: found {brief(entry)}, expected an object such as {{"ssh": "node1"}}')
    _known_only(entry, ("ssh", "ips", "rdma"), where)
    if not isinstance(entry.get("ssh"), str):
        raise ConfigError(f'{where}: "ssh": found {brief(entry.get("ssh"))}, expected the name that ssh knows the host by')
    ips = _texts(entry.get("ips", []), f'{where}: "ips"', "a list of IP addresses")
    for index, address in enumerate(ips):
        if not is_address(address):
            raise ConfigError(f'{where}: "ips"[{index}]: found {address!r}, expected an IP address')
    return Host(_ssh_name(entry["ssh"], f'{where}: "ssh"'), ips, _rdma(entry.get("rdma", []), f'{where}: "rdma"'))


def _ssh_name(text: str, where: str) -> str:
    """Return a name as ssh wants it. One that begins with "-" would be taken for an option, by which ssh can be told to run anything."""
    user, at, host = text.rpartition("@")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or (at and not user) or "-" in (text[0], host[0]) or re.search(r"[\s\x00-\x1f\x7f'\"\\$`;&|<>(){}]", text):
        raise ConfigError(f"{where}: found {text!r}, expected a host's name, its address, or user@host")
    return f"{user}{at}{host}"


def _rdma(value: object, where: str) -> tuple[str | tuple[str, ...] | None, ...]:
    expected = "a list with, per host, null, the name of a device, or a list of names"
    if not isinstance(value, list):
        raise ConfigError(f"{where}: found {brief(value)}, expected {expected}")
    devices: list[str | tuple[str, ...] | None] = []
    for index, entry in enumerate(value):
        if entry is None or isinstance(entry, str):
            devices.append(entry)
        else:
            devices.append(_texts(entry, f"{where}[{index}]", "null, the name of a device, or a list of names"))
    return tuple(devices)


def _texts(value: object, where: str, expected: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{where}: found {brief(value)}, expected {expected}")
    return tuple(value)


def _known_only(fields: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in fields:
        if name not in known:
            raise ConfigError(f"{where}: found {json.dumps(name)}, expected nothing but {', '.join(map(json.dumps, known))}")


def _is_ring_file(hosts: object) -> bool:
    return isinstance(hosts, list) and bool(hosts) and all(isinstance(entry, list) for entry in hosts)
