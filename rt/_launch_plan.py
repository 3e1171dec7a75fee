"""Which ranks run on which host, and what each is told about itself and the others.

May live here: pure functions from options and what hosts have said to environments. May not: processes, sockets, the environment of this
process, the text of a dry run (``_launch_dry``).
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rt._launch_handed import often
from rt._launch_options import FAMILIES, Options
from rt._launch_ranks import NOT_INHERITED
from rt.hostfile import Host

# What our own launcher tells a rank, and a launcher that runs inside of a rank must not pass on.
_OWN = ("RT_RANK", "RT_WORLD_SIZE", "RT_LOCAL_RANK", "RT_LOCAL_SIZE", "RT_COORDINATOR", "RT_SECRET_FD", "RT_JOB_ID")


@dataclass(frozen=True)
class Crew:
    """A host and the ranks on it, as there is one supervisor for all of them."""

    host: Host
    ranks: tuple[int, ...]


@dataclass
class Ground:
    """What a crew's host has said.

    Attributes:
        address: at which other hosts reach it.
        gpus: its CUDA_VISIBLE_DEVICES.
        addresses: per rank those at which it is reached, each for a cable.
        interfaces: those that were asked for, as NCCL_SOCKET_IFNAME names them; "" if nobody asked.
        listening: rank 0's host: the port of its listening socket, 0 if it has none.
        ports: per rank and address free ports, as many as there are connections.
    """

    address: str
    gpus: str | None = None
    addresses: dict[int, list[str]] = field(default_factory=dict)
    interfaces: str = ""
    listening: int = 0
    ports: dict[int, list[tuple[str, int]]] = field(default_factory=dict)

    def learn(self, answer: Mapping[str, Any]) -> Ground:
        """Note what the host answers to :func:`question`, and return this."""
        self.address, self.interfaces, self.listening = answer["address"], answer["interfaces"], answer["listening"]
        self.addresses = {int(rank): list(addresses) for rank, addresses in answer["addresses"].items()}
        self.ports = {int(rank): [(host, port) for host, port in ports] for rank, ports in answer["ports"].items()}
        return self


@dataclass(frozen=True)
class Told:
    """What a rank is told: variables, and variables that are to name a file with this content."""

    variables: dict[str, str]
    files: dict[str, str]


def crews(hosts: Sequence[Host]) -> tuple[Crew, ...]:
    """Return each host once, in the order in which they come, with its ranks."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault("" if host.is_local else host.ssh, []).append(rank)
    return tuple(Crew(hosts[ranks[0]], tuple(ranks)) for ranks in found.values())


def travelling(options: Options, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that go along to other hosts: some families of the launcher's own, then what the user chose."""
    kept = {name: value for name, value in inherited.items() if name.startswith(FAMILIES) and name not in (*NOT_INHERITED, *_OWN)}
    return (kept if options.travels else {}) | options.environment


def uses_ring_file(options: Options) -> bool:
    """Say whether ranks meet by a ring file: where all hosts have addresses of their own, or ports were chosen; else at rank 0's."""
    return options.size > 1 and (options.starting_port is not None or (options.remote and all(host.ips for host in options.hosts)))


def question(options: Options, crew: Crew, here: str) -> dict[str, Any]:
    """Return what a host is asked: at which addresses its ranks are reached, and for ports there.

    Args:
        options: the command line.
        crew: the host.
        here: its address on the way to the others, "" where that is not known.
    """
    return {
        "here": here,
        "size": options.size,
        "ips": {str(rank): options.hosts[rank].chosen_ips for rank in crew.ranks},
        "listen": 0 in crew.ranks and not uses_ring_file(options),
        "ports": options.connections_per_ip if options.starting_port is None and options.size > 1 else 0,
    }


def even_out(grounds: Sequence[Ground], connections: int) -> bool:
    """Leave each rank the first of its addresses where ranks have different numbers of them; say whether that was so."""
    uneven = len({len(addresses) for ground in grounds for addresses in ground.addresses.values()}) > 1
    for ground in grounds if uneven else ():
        ground.addresses = {rank: addresses[:1] for rank, addresses in ground.addresses.items()}
        ground.ports = {rank: ports[:connections] for rank, ports in ground.ports.items()}
    return uneven


def told(options: Options, crewed: Sequence[Crew], grounds: Sequence[Ground], travels: Mapping[str, str]) -> list[Told]:
    """Return what each rank is told, in the order of the ranks.

    Args:
        options: the command line.
        crewed: all hosts.
        grounds: what each of them has said.
        travels: the variables that ranks have from the launcher; where CUDA_VISIBLE_DEVICES is not among them, each host's own counts.
    """
    place = {rank: (crew, ground) for crew, ground in zip(crewed, grounds, strict=True) for rank in crew.ranks}
    ring = json.dumps(_ring(options, place))
    rdma = json.dumps([host.rdma for host in options.hosts])
    first = place[0][1].addresses[0][0]
    all_told = []
    for rank in range(options.size):
        crew, ground = place[rank]
        local = crew.ranks.index(rank)
        variables = identity(rank, options.size, local, len(crew.ranks))
        files: dict[str, str] = {}
        if uses_ring_file(options):
            files["RT_HOSTFILE"] = ring
        else:
            variables["RT_COORDINATOR"] = show_address(place[0][1].address, place[0][1].listening)
            if options.connections_per_ip > 1:
                variables["RT_CONNECTIONS_PER_IP"] = str(options.connections_per_ip)
        if options.backend:
            variables["RT_BACKEND"] = options.backend.removesuffix("-ring")
        if options.backend == "nccl":
            gpus = travels.get("CUDA_VISIBLE_DEVICES", ground.gpus)
            variables |= {"NCCL_HOST_IP": first, "NCCL_PORT": str(options.nccl_port), "CUDA_VISIBLE_DEVICES": nth_gpu(gpus, local)}
            if ground.interfaces and "NCCL_SOCKET_IFNAME" not in travels:
                variables["NCCL_SOCKET_IFNAME"] = ground.interfaces
        elif options.backend.startswith("jaccl"):
            for prefix in ("RT", "MLX"):
                variables[f"{prefix}_JACCL_COORDINATOR"] = show_address(first, options.starting_port or 32323)
                files[f"{prefix}_IBV_DEVICES"] = rdma
                if options.backend == "jaccl-ring":
                    variables[f"{prefix}_JACCL_RING"] = "1"
        elif options.size > 1:  # MLX has no ring of one, and finds that it is alone if nothing is said
            files["MLX_HOSTFILE"] = ring
        if options.size > 1:
            variables |= {"MLX_RANK": str(rank), "MLX_WORLD_SIZE": str(options.size)}
        all_told.append(Told(variables, files))
    return all_told


def identity(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """Return what tells a rank who it is."""
    numbers = {"RT_RANK": rank, "RT_WORLD_SIZE": size, "RT_LOCAL_RANK": local_rank, "RT_LOCAL_SIZE": local_size}
    return {name: str(number) for name, number in numbers.items()}


def nth_gpu(allowed: str | None, index: int) -> str:
    """Return the GPU of a host's n-th rank: of those that CUDA_VISIBLE_DEVICES allows, "" if it does not allow as many."""
    if allowed is None:
        return str(index)
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return names[index] if index < len(names) else ""


def show_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_reachable(address: str, *, given: bool) -> bool:
    """Say whether other hosts could use an address: one of IPv6's link-local ones only if somebody has ``given`` it with that in mind."""
    if not address:
        return False
    found = ipaddress.ip_address(address.partition("%")[0])
    return not found.is_loopback and (given or not found.is_link_local)


def _ring(options: Options, place: Mapping[int, tuple[Crew, Ground]]) -> list[list[str]]:
    """Return the ring file: with chosen ports these count over all hosts, addresses and connections, as in MLX."""
    port = options.starting_port or 0
    ring = []
    for rank in range(options.size):
        _, ground = place[rank]
        if options.starting_port is None:
            ring.append([show_address(host, free) for host, free in ground.ports.get(rank, [])])
            continue
        addresses = often(ground.addresses[rank], options.connections_per_ip)
        ring.append([show_address(host, port + index) for index, host in enumerate(addresses)])
        port += len(addresses)
    return ring


def program(options: Options) -> list[str]:
    """Return the command as it would be run where nobody has looked whether it exists."""
    is_script = options.remote and options.command[0].endswith(".py")
    return [options.python, "-u", *options.command] if is_script else options.command
