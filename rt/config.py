"""From keywords and environment to one frozen description of the job.

May live here: names of variables, parsing, precedence, the text of configuration errors. May not: opening connections, importing torch or
MPI, anything that waits for a peer. Everything after this file works on :class:`RingConfig` and never looks at the environment.

A *set* is a source of a rank and of a place to meet: keywords and ``RT_*`` (one set: a keyword takes the place of its variable), ``MLX_*``,
torchrun. The first set that is begun must be complete; all sets present must agree on the rank. mpirun and srun number ranks but do not say
where to meet: their numbers count where keywords or ``RT_*`` give a place and no rank.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rt.errors import ConfigError
from rt.json_file import brief, load
from rt.secret import Secret, resolve_secret

if TYPE_CHECKING:
    from rt.config_rdma import RdmaConfig
    from rt.interfaces import Choice
    from rt.tuning import Table

Address = tuple[str, int]
Environ = Mapping[str, str]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_AND_SIZE = (  # launchers that number ranks but say nothing of where to meet, in order of precedence
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_RANKS_HERE = {  # by where the rank came from: how many ranks its launcher started on this host, and how many in all
    "RANK": ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "PMI_RANK": ("MPI_LOCALNRANKS", "PMI_SIZE"),
    "SLURM_PROCID": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),  # of one host "4", of two "2(x2)"
}
_RING_FILE = 'a JSON list with one list of "ip:port" per rank'


@dataclass(frozen=True)
class RingConfig:
    """What a rank knows before it meets the others; exactly one of ``addresses``, ``coordinator`` and ``store`` is not None.

    Attributes:
        rank: this process, 0 <= rank < size.
        size: number of ranks.
        addresses: from a ring file: per rank its (host, port) list, one connection per address.
        coordinator: rank 0 listens there and the ranks exchange addresses.
        store: the TCPStore of torchrun's agent, through which rank 0 publishes its coordinator.
        connections: sockets per pair of ranks, for each interface that ``interfaces`` names; with a ring file the addresses per rank.
        job: 32 hexadecimal digits, equal on all ranks of a job and on no others. It covers the meeting place as spelled (but for case and
            the many ways to write an IP address), so all ranks must spell it alike.
        connect_timeout: seconds until the ranks must have met.
        timeout: seconds a collective may take, None for ever.
        secret: what connections prove to know.
        shm: whether this rank shares memory with ranks of its host that do so too, and can.
        spin: seconds a lone work is polled before a sleep, None for what fits the number of cores.
        tuning: which algorithms are preferred, if this is rank 0; None for what is shipped.
        coordinator_fd: rank 0 only: an inherited listening socket for ``coordinator``.
        interfaces: where this rank listens for others; None: where the way to the coordinator begins. A ring file says it itself.
        source: what configured this, for messages, for example ``RT_RANK, RT_HOSTFILE``.
        rdma: which RDMA devices lead where, for backend ``jaccl``; None: sockets and shared memory.
    """

    rank: int
    size: int
    addresses: tuple[tuple[Address, ...], ...] | None
    coordinator: Address | None
    store: Address | None
    connections: int
    job: str
    connect_timeout: float
    timeout: float | None
    secret: Secret
    shm: bool
    spin: float | None
    tuning: Table | None
    coordinator_fd: int | None
    interfaces: Choice | None
    source: str
    rdma: RdmaConfig | None = None


class _Given(NamedTuple):
    """One value and the keyword or variable it came from."""

    name: str
    value: Any


class _Place(NamedTuple):
    """Who and where, before the settings that every source shares."""

    rank: int
    rank_from: str
    size: int
    source: str
    addresses: tuple[tuple[Address, ...], ...] | None = None
    coordinator: Address | None = None
    store: Address | None = None
    coordinator_fd: int | None = None
    run_id: str = ""


def resolve_ring(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    coordinator: str | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    connections_per_ip: int | None = None,
    connect_timeout: float | None = None,
    timeout: float | None = None,
    secret: bytes | str | None = None,
    shm: bool | None = None,
    environ: Environ = os.environ,
) -> RingConfig | None:
    """Find out rank, size, meeting place and settings of the ring.

    Args:
        rank: this process; ``RT_RANK``.
        world_size: number of ranks; ``RT_WORLD_SIZE``.
        coordinator: ``host:port`` or ``[v6]:port`` where rank 0 listens; ``RT_COORDINATOR``. Excludes a hostfile.
        hostfile: path of a ring file; ``RT_HOSTFILE``. Excludes a coordinator.
        connections_per_ip: sockets per pair of ranks, without a ring file; ``RT_CONNECTIONS_PER_IP``, default 1.
        connect_timeout: seconds; ``RT_CONNECT_TIMEOUT``, default 60.
        timeout: seconds per collective; ``RT_TIMEOUT``, default for ever.
        secret: at least 16 bytes or characters; see :func:`rt.secret.resolve_secret`.
        shm: share memory with ranks of this host; ``RT_SHM`` (1 or 0), default true.
        environ: the environment.

    Returns:
        The configuration, or None if nothing begins to configure a ring.

    Raises:
        ConfigError: begun but incomplete, malformed or contradictory; one line that names the keyword, variable or file.
    """
    who = _pick("rank", rank, "RT_RANK", environ)
    size = _pick("world_size", world_size, "RT_WORLD_SIZE", environ)
    where = _meeting(coordinator, hostfile, environ)
    place = _place(who, size, where, environ)
    if place is None:
        return None
    _check_agreement(place, environ)
    found = resolve_secret(secret, [host for host, _ in _known(place)], environ, _spread(place, environ))
    return _complete(place, found, connections_per_ip, connect_timeout, timeout, shm, environ)


def check_settings(
    *, connections_per_ip: int | None = None, connect_timeout: float | None = None, timeout: float | None = None, shm: bool | None = None,
    environ: Environ = os.environ, **_: object,
) -> None:  # fmt: skip
    """Raise ConfigError for the settings that are one for several ranks. Of a secret nothing is asked: finding one may make a file."""
    _complete(_Place(0, "", 1, ""), Secret(None, ""), connections_per_ip, connect_timeout, timeout, shm, environ)


def resolve_numbered(
    rank: int, size: int, source: str, secret: Secret, *, connections_per_ip: int | None = None, connect_timeout: float | None = None,
    timeout: float | None = None, shm: bool | None = None, environ: Environ = os.environ,
) -> RingConfig:  # fmt: skip
    """Find out the settings of ranks that a library has numbered and which will agree by it on where to meet.

    Args:
        rank, size: this process and how many there are.
        source: what numbered them, for messages.
        secret: what they will prove to know.

    The others, and errors, are those of ``resolve_ring``. ``coordinator`` is still to be filled in.
    """
    return _complete(_Place(rank, source, size, source), secret, connections_per_ip, connect_timeout, timeout, shm, environ)


def _complete(
    place: _Place, secret: Secret, connections: int | None, connect_timeout: float | None, timeout: float | None, shm: bool | None,
    environ: Environ,
) -> RingConfig:  # fmt: skip
    count = _pick("connections_per_ip", connections, "RT_CONNECTIONS_PER_IP", environ) or _Given("default", 1)
    per_pair = _integer(count, 1, None)
    wait = _seconds(_pick("connect_timeout", connect_timeout, "RT_CONNECT_TIMEOUT", environ))
    return RingConfig(
        rank=place.rank,
        size=place.size,
        addresses=place.addresses,
        coordinator=place.coordinator,
        store=place.store,
        connections=per_pair if place.addresses is None else len(place.addresses[0]),
        job=_job(place, environ.get("RT_JOB_ID", place.run_id)),
        connect_timeout=60.0 if wait is None else wait,
        timeout=_seconds(_pick("timeout", timeout, "RT_TIMEOUT", environ)),
        secret=secret,
        shm=_shares(shm, environ),
        spin=_spin(environ),
        tuning=tuned(environ),
        coordinator_fd=place.coordinator_fd,
        interfaces=_interfaces(environ),
        source=place.source,
    )


# --- the sets ------------------------------------------------------------------------------------------------------------------------


def _pick(keyword: str, value: object, variable: str, environ: Environ) -> _Given | None:
    if value is not None:
        return _Given(f"keyword {keyword}", value)
    return _Given(variable, environ[variable]) if variable in environ else None


def _shares(keyword: bool | None, environ: Environ) -> bool:
    if keyword is not None:
        if not isinstance(keyword, bool):
            raise ConfigError(f"keyword shm: found {keyword!r}, expected True or False")
        return keyword
    value = environ.get("RT_SHM", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"RT_SHM: found {value!r}, expected 1 or 0")
    return value == "1"


def _spin(environ: Environ) -> float | None:
    text = environ.get("RT_SPIN_US")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"RT_SPIN_US: found {text!r}, expected a number of microseconds >= 0")
    return int(text) / 1e6


def tuned(environ: Environ = os.environ) -> Table | None:
    """Return the table that ``RT_TUNING`` names, completed by the one that is shipped; None if it names none. Raises ConfigError."""
    if "RT_TUNING" not in environ:
        return None
    from rt import tuning  # which ``import rt`` can do without

    return tuning.read(environ["RT_TUNING"], f"RT_TUNING {environ['RT_TUNING']}").over(tuning.shipped())


def _interfaces(environ: Environ) -> Choice | None:
    text = environ.get("RT_SOCKET_IFNAME")
    if not text:  # empty is unset, as for NCCL
        return None
    from rt import interfaces  # which ``import rt`` can do without

    return interfaces.parse(text)


def _meeting(coordinator: object, hostfile: object, environ: Environ) -> _Given | None:
    """Return where to meet: a keyword hides both variables, two of a kind contradict each other."""
    keywords = [
        _Given(f"keyword {name}", value) for name, value in (("coordinator", coordinator), ("hostfile", hostfile)) if value is not None
    ]
    variables = [_Given(name, environ[name]) for name in ("RT_COORDINATOR", "RT_HOSTFILE") if name in environ]
    found = keywords or variables
    if len(found) == 2:
        raise ConfigError(f"{found[0].name} and {found[1].name}: found both, expected one of them (a coordinator or a ring file)")
    return found[0] if found else None


def _place(rank: _Given | None, size: _Given | None, where: _Given | None, environ: Environ) -> _Place | None:
    """Go through the sets in order of precedence; the first that is begun decides."""
    if where is not None and rank is None:
        rank, size = _launcher_rank(size, environ)
    if rank or size or where:
        return _from_items(rank, size, where, environ)
    if "MLX_RANK" in environ or "MLX_HOSTFILE" in environ:
        return _from_mlx(environ)
    if "TORCHELASTIC_RUN_ID" in environ or all(name in environ for name in _TORCHRUN):
        return _from_torchrun(environ)
    return None


def _launcher_rank(size: _Given | None, environ: Environ) -> tuple[_Given | None, _Given | None]:
    for rank_name, size_name in RANK_AND_SIZE:
        if rank_name in environ:
            return _pick("", None, rank_name, environ), size or _pick("", None, size_name, environ)
    return None, size


def _from_items(rank: _Given | None, size: _Given | None, where: _Given | None, environ: Environ) -> _Place:
    by_file = where is not None and where.name in ("keyword hostfile", "RT_HOSTFILE")
    if rank is None or where is None or (size is None and not by_file):
        raise ConfigError(_incomplete(rank, size, where, by_file))
    source = _source(rank, None if by_file else size, where)
    if by_file:
        addresses = _ring_file(where)
        if size is not None and _integer(size, 1, None) != len(addresses):
            raise ConfigError(f"{size.name}: found {size.value!r}, expected {len(addresses)}, the number of ranks in {_file_name(where)}")
        return _Place(_integer(rank, 0, len(addresses)), rank.name, len(addresses), source, addresses)
    assert size is not None
    count = _integer(size, 1, None)
    number = _integer(rank, 0, count)
    fd = _coordinator_fd(environ) if number == 0 and where.name == "RT_COORDINATOR" else None
    return _Place(number, rank.name, count, source, coordinator=_address(where.value, where.name), coordinator_fd=fd)


def _incomplete(rank: _Given | None, size: _Given | None, where: _Given | None, by_file: bool) -> str:
    present = ", ".join(given.name for given in (rank, size, where) if given is not None)
    missing = []
    if rank is None:
        missing.append("RT_RANK")
    if where is None:
        missing.append("RT_HOSTFILE or RT_COORDINATOR")
    elif size is None and not by_file:
        missing.append("RT_WORLD_SIZE")
    return (
        f"{present}: found no {', no '.join(missing)} beside it, expected RT_RANK with RT_HOSTFILE, or RT_RANK with RT_WORLD_SIZE and "
        "RT_COORDINATOR (or the keywords rank, hostfile, world_size, coordinator)"
    )


def _source(*items: _Given | None) -> str:
    names = [item.name for item in items if item is not None]
    return "keywords" if all(name.startswith("keyword ") for name in names) else ", ".join(names)


def _from_mlx(environ: Environ) -> _Place:
    for present, missing in (("MLX_RANK", "MLX_HOSTFILE"), ("MLX_HOSTFILE", "MLX_RANK")):
        if missing not in environ:
            raise ConfigError(f"{present}: found no {missing} beside it, expected both MLX_RANK and MLX_HOSTFILE for the ring")
    addresses = _ring_file(_Given("MLX_HOSTFILE", environ["MLX_HOSTFILE"]))
    rank = _integer(_Given("MLX_RANK", environ["MLX_RANK"]), 0, len(addresses))
    return _Place(rank, "MLX_RANK", len(addresses), "MLX_RANK, MLX_HOSTFILE", addresses)


def _from_torchrun(environ: Environ) -> _Place:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise ConfigError(f"TORCHELASTIC_RUN_ID: found no {', no '.join(missing)} beside it, expected all of {', '.join(_TORCHRUN)}")
    count = _integer(_Given("WORLD_SIZE", environ["WORLD_SIZE"]), 1, None)
    rank = _integer(_Given("RANK", environ["RANK"]), 0, count)
    address = _host(environ["MASTER_ADDR"], "MASTER_ADDR"), _port(environ["MASTER_PORT"], "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" in environ:
        return _Place(rank, "RANK", count, "torchrun", store=address, run_id=environ["TORCHELASTIC_RUN_ID"])
    # The same variables set by hand: there is no agent, so nobody listens on that port yet and rank 0 may.
    return _Place(rank, "RANK", count, ", ".join(_TORCHRUN), coordinator=address)


def _check_agreement(place: _Place, environ: Environ) -> None:
    """Compare with every other rank in the environment: a job started by two launchers at once must not guess which one is right.

    MPI's and Slurm's are left out: everything below an allocation inherits them, whoever numbers the ranks.
    """
    others = ["RT_RANK", "MLX_RANK"]
    if "TORCHELASTIC_RUN_ID" in environ or all(name in environ for name in _TORCHRUN):
        others.append("RANK")
    for name in others:
        if name in environ and _integer(_Given(name, environ[name]), 0, None) != place.rank:
            raise ConfigError(
                f"{place.rank_from} and {name}: found ranks {place.rank} and {environ[name]}, expected the same (or unset one)"
            )


def _known(place: _Place) -> list[Address]:
    if place.addresses is not None:
        return [address for addresses in place.addresses for address in addresses]
    return [address for address in (place.coordinator, place.store) if address is not None]


def _spread(place: _Place, environ: Environ) -> str:
    """What the rank's launcher says if it started some ranks on other hosts, else ""."""
    here, all_of_them = _RANKS_HERE.get(place.rank_from, ("", ""))
    if place.addresses is not None:  # of all ranks: no more needs to be known
        return ""
    if here not in environ or environ[here] == environ.get(all_of_them):
        return ""
    return f"{here}={environ[here]}, {all_of_them}={environ.get(all_of_them)}"


def _job(place: _Place, job_id: str) -> str:
    facts = json.dumps([place.size, place.addresses, place.coordinator, place.store, job_id])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


# --- values --------------------------------------------------------------------------------------------------------------------------


def _integer(given: _Given, low: int, limit: int | None) -> int:
    """Return an integer, low <= integer < limit. Strict about text: no sign, space, underscore or foreign digit."""
    value = given.value
    if isinstance(value, str):
        number = int(value) if re.fullmatch("[0-9]{1,9}", value) else None
    else:
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if number is None or number < low or (limit is not None and number >= limit):
        span = f">= {low}" if limit is None else f"from {low} to {limit - 1} (there are {limit} ranks)"
        raise ConfigError(f"{given.name}: found {value!r}, expected an integer {span}")
    return number


def _seconds(given: _Given | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = math.nan if isinstance(given.value, bool) else float(given.value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{given.name}: found {given.value!r}, expected a number of seconds > 0")
    return seconds


def _coordinator_fd(environ: Environ) -> int | None:
    name = "RT_COORDINATOR_FD"
    if name not in environ:
        return None
    fd = _integer(_Given(name, environ[name]), 0, None)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise ConfigError(f"{name}: found {fd}, which is no open socket, expected the listening socket that the launcher handed down")
    return fd


def _address(value: object, where: str) -> Address:
    """Parse ``host:port`` or ``[v6]:port``."""
    expected = 'expected "host:port", or "[v6]:port" for IPv6'
    if not isinstance(value, str):
        raise ConfigError(f"{where}: found {value!r}, {expected}")
    host, colon, port = value.rpartition(":")
    if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise ConfigError(f"{where}: found {value!r}, {expected}")
    return _host(host, where), _port(port, where)


def _port(text: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ConfigError(f"{where}: found port {text!r}, expected 1 to 65535")
    return int(text)


def _host(text: str, where: str) -> str:
    """Return a host in its one spelling, so that it hashes and compares alike on all ranks. Names are not looked up here."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        if ":" in inner or re.fullmatch("[0-9.]+", inner) or inner != text:
            return str(ipaddress.IPv6Address(inner) if ":" in inner or inner != text else ipaddress.IPv4Address(inner))
    except ipaddress.AddressValueError:
        raise ConfigError(f"{where}: found host {text!r}, expected a valid IP address or a host name") from None
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", text):
        raise ConfigError(f"{where}: found host {text!r}, expected an IP address or a host name")
    return text.lower()


# --- the ring file -------------------------------------------------------------------------------------------------------------------


def _file_name(given: _Given) -> str:
    return f"{given.name} {os.fspath(given.value)}"


def _ring_file(given: _Given) -> tuple[tuple[Address, ...], ...]:
    """Read a ring file: per rank its addresses, the same number for each, none twice."""
    where = _file_name(given)
    content = load(given.value, where, _RING_FILE)
    _refuse_launcher_file(content, where)
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: found {brief(content)}, expected {_RING_FILE}")
    ranks = tuple(_entry(entry, f"{where}: entry [{index}]") for index, entry in enumerate(content))
    _check_ranks(ranks, where)
    return ranks


def _refuse_launcher_file(content: object, where: str) -> None:
    hosts = isinstance(content, dict) and "hosts" in content
    if hosts or (isinstance(content, list) and any(isinstance(entry, dict) and "ssh" in entry for entry in content)):
        raise ConfigError(
            f"{where}: found a launcher's hostfile (hosts to ssh to), expected {_RING_FILE}; `rt.launch --hostfile` takes this file"
        )


def _entry(entry: object, where: str) -> tuple[Address, ...]:
    if not isinstance(entry, list) or not entry:
        raise ConfigError(f'{where}: found {brief(entry)}, expected a list of "ip:port"')
    return tuple(_address(address, f"{where}[{index}]") for index, address in enumerate(entry))


def _check_ranks(ranks: tuple[tuple[Address, ...], ...], where: str) -> None:
    seen: dict[Address, str] = {}
    for rank, addresses in enumerate(ranks):
        if len(addresses) != len(ranks[0]):
            raise ConfigError(f"{where}: entry [{rank}]: found {len(addresses)} addresses, expected {len(ranks[0])}, as many as rank 0 has")
        for index, address in enumerate(addresses):
            first = seen.setdefault(address, f"[{rank}][{index}]")
            if first != f"[{rank}][{index}]":
                raise ConfigError(
                    f"{where}: entry [{rank}][{index}]: found {address[0]} port {address[1]} again, expected it only at {first}"
                )
