"""``rt.bench simulate``: how long the algorithms of ``rt`` take on a cluster that is only described.

May live here: the algorithms that are compared, what is asked for, the table. May not: the simulated machine (``simulator.py``), how a
large one is made small (``fold.py``), this host's numbers (``here.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from bench import fold
from bench.fold import ITEMSIZE, Make
from bench.host import cores
from bench.measure import progress
from bench.simulator import Link, Machine
from rt import algorithms, algorithms_exchange, algorithms_hierarchy, algorithms_move
from rt.choose import choose
from rt.dtypes import DType, Op
from rt.schedule import Collective

_LANES = 1
_ALONE_RANKS = 256  # above, all cores simulate: starting their interpreters takes half a second
_RING_BYTES, _SOCKET_BYTES = 1 << 20, 4 << 20
_PIECE_BYTES, _SEGMENT_BYTES = 1 << 15, 1 << 16
_LOCAL_FRAME_SECONDS, _NETWORK_FRAME_SECONDS = 0.3e-6, 2e-6
_WAKE_SECONDS = 5e-6

ALGORITHMS: dict[str, dict[str, Make]] = {
    "all_reduce": {
        "doubling": lambda rank, machine, count: algorithms.doubling_all_reduce(rank, machine.size, count),
        "owner": lambda rank, machine, count: algorithms.owner_all_reduce(rank, machine.size, count, _LANES, ITEMSIZE),
        "hierarchy": lambda rank, machine, count: algorithms_hierarchy.all_reduce(rank, _hosts(machine), count, _LANES, ITEMSIZE),
        "ring": lambda rank, machine, count: algorithms.ring_all_reduce(rank, machine.size, count, _LANES, ITEMSIZE),
    },
    "all_gather": {
        "direct": lambda rank, machine, count: algorithms_move.direct_all_gather(rank, _blocks(machine, count)),
        "ring": lambda rank, machine, count: algorithms_move.ring_all_gather(rank, _blocks(machine, count), _LANES, ITEMSIZE),
    },
    "reduce_scatter": {
        "direct": lambda rank, machine, count: algorithms.direct_reduce_scatter(rank, _blocks(machine, count), _LANES, ITEMSIZE),
        "ring": lambda rank, machine, count: algorithms.ring_reduce_scatter(rank, _blocks(machine, count), _LANES, ITEMSIZE),
    },
    "all_to_all": {
        "direct": lambda rank, machine, count: algorithms_exchange.direct_all_to_all(
            rank, _blocks(machine, count), _blocks(machine, count), _LANES, ITEMSIZE
        ),
    },
}  # fmt: skip
_KINDS = {name: Collective[name.upper()] for name in ALGORITHMS}


def usable(machine: Machine, collective: str) -> tuple[str, ...]:
    """Return the algorithms that such a machine can run: a hierarchy needs several hosts, and several ranks on each."""
    layered = machine.hosts > 1 and machine.ranks_per_host > 1
    return tuple(name for name in ALGORITHMS[collective] if layered or name != "hierarchy")


def _hosts(machine: Machine) -> tuple[int, ...]:
    return tuple(rank // machine.ranks_per_host for rank in range(machine.size))


def _blocks(machine: Machine, count: int) -> list[int]:
    return [count // machine.size] * machine.size


@dataclasses.dataclass(frozen=True)
class Options:
    """What to simulate: a collective by some of its algorithms, on a machine, for sizes in bytes of the larger buffer."""

    machine: Machine
    collective: str
    algorithms: Sequence[str]
    sizes: Sequence[int]


def machine(
    hosts: int, ranks_per_host: int, *, latency: float, bandwidth: float, local_latency: float, local_bandwidth: float,
    reduce_bandwidth: float, cores: int | None,
) -> Machine:  # fmt: skip
    """Describe a cluster: at either end of every link a core touches each byte once, at the rate at which it copies or reduces."""
    copy, reduce = 1 / local_bandwidth, 1 / reduce_bandwidth
    local = Link(local_latency, copy, copy, reduce, _LOCAL_FRAME_SECONDS, _PIECE_BYTES, _RING_BYTES)
    network = Link(latency, copy, copy, reduce, _NETWORK_FRAME_SECONDS, _SEGMENT_BYTES, _SOCKET_BYTES)
    return Machine(hosts, ranks_per_host, cores or ranks_per_host, bandwidth, local, network, _WAKE_SECONDS)


def run(options: Options) -> list[dict[str, Any]]:
    """Simulate every algorithm at every size; return one row per size, times in seconds (None: no way to find out)."""
    found: dict[int, dict[str, fold.Found | None]] = {nbytes: {} for nbytes in options.sizes}
    tasks = [(options.collective, name, options.machine, nbytes) for nbytes in options.sizes for name in options.algorithms]
    with contextlib.ExitStack() as stack:
        each: Iterator[fold.Found | None] = map(_one, tasks)
        if options.machine.size > _ALONE_RANKS:
            # Not forked: a program that calls this may have threads.
            each = stack.enter_context(ProcessPoolExecutor(cores(), get_context("spawn"))).map(_one, tasks)
        for collective, name, machine, nbytes in tasks:
            progress(f"simulating {collective}, {machine.hosts} hosts x {machine.ranks_per_host} ranks, {nbytes} bytes: {name}")
            found[nbytes][name] = next(each)
    progress("")
    return [_row(options, nbytes, found[nbytes]) for nbytes in options.sizes]


def _one(task: tuple[str, str, Machine, int]) -> fold.Found | None:
    collective, name, machine, nbytes = task
    return fold.seconds(ALGORITHMS[collective][name], machine, nbytes // ITEMSIZE)


def _row(options: Options, nbytes: int, found: dict[str, fold.Found | None]) -> dict[str, Any]:
    times = {name: each.seconds for name, each in found.items() if each is not None}
    return {
        "bytes": nbytes, "times": {name: times.get(name) for name in found}, "best": min(times, key=times.__getitem__, default=None),
        "chosen": chosen(options.collective, options.machine, nbytes // ITEMSIZE),
        "ways": {name: each.way for name, each in found.items() if each is not None},
    }  # fmt: skip


def over_hosts(options: Options) -> list[tuple[int, list[dict[str, Any]]]]:
    """Simulate the same on 2, 4, 8, ... hosts up to those asked for; return hosts and rows."""
    numbers = [1 << power for power in range(1, options.machine.hosts.bit_length()) if 1 << power < options.machine.hosts]
    return [(hosts, run(dataclasses.replace(options, machine=dataclasses.replace(options.machine, hosts=hosts)))) for hosts in numbers]


def chosen(collective: str, machine: Machine, count: int) -> str:
    """Return the name of the algorithm that ``rt`` takes, where all pairs of ranks are connected."""
    each = count if collective == "all_reduce" else count // machine.size
    links = "tcp" if machine.ranks_per_host == 1 else "shm" if machine.hosts == 1 else "mixed"
    return choose(
        _KINDS[collective], rank=0, size=machine.size, count=each, dtype=DType.FLOAT32, op=Op.SUM, lanes=_LANES, full_mesh=True,
        hosts=_hosts(machine), links=links,
    ).name  # fmt: skip


def content(options: Options, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the machine and the rows, for JSON."""
    return {"collective": options.collective, "machine": dataclasses.asdict(options.machine), "rows": rows}


def text(options: Options, rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    model, names = options.machine, options.algorithms
    lines = [
        f"# {options.collective} of float32, simulated: {model.hosts} hosts x {model.ranks_per_host} ranks, {model.cores} cores each; us",
        f"# between hosts {model.network.latency * 1e6:g} us, {model.bandwidth / 1e9:g} GB/s per host and direction; "
        f"within {model.local.latency * 1e6:g} us; a core copies {1 / model.local.receive / 1e9:g} GB/s, reduces "
        f"{1 / model.local.reduce / 1e9:g} GB/s",
        "# *: the fastest; -: neither few enough ranks to simulate all, nor alike enough for some to stand for all; algbw: of the fastest",
        f"# {'size (B)':>12}" + "".join(f"  {name:>14}" for name in names) + f"  {'best':>12}  {'rt takes':>12}  {'algbw (GB/s)':>12}",
    ]
    for row in rows:
        times = "".join(f"  {_time(row['times'][name], name == row['best']):>14}" for name in names)
        speed = f"{row['bytes'] / row['times'][row['best']] / 1e9:.2f}" if row["best"] else "-"
        lines.append(f"  {row['bytes']:>12}{times}  {row['best'] or '-':>12}  {row['chosen']:>12}  {speed:>12}")
    ways = sorted({way for row in rows for way in row["ways"].values()})
    return "\n".join([*lines, f"# simulated: {'; '.join(ways)}"])


def _time(seconds: float | None, best: bool) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}{'*' if best else ' '}"
