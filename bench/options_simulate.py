"""The options of ``rt.bench simulate``.

May live here: those options, their help, and what is wrong about them. May not: the collectives' options (``options.py``), simulating.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import Any

from bench import simulate
from bench.fold import ITEMSIZE
from bench.options import at_least, byte_count, choice_of
from bench.simulate import ALGORITHMS, Options

_DESCRIBING: dict[str, Any] = {
    "hosts": 8, "ranks_per_host": 1, "cores": None, "latency": 20e-6, "bandwidth": 12.5e9, "local_latency": 1e-6, "local_bandwidth": 10e9,
    "reduce_bandwidth": 10e9, "collective": "all_reduce", "algorithm": None, "plot": None,
}  # fmt: skip

DESCRIPTION = """\
How long each algorithm takes on a cluster that you describe, and which is best: the very schedules that rt runs, step by step on modelled
ranks, links and interfaces, in float32 and out of place. Nothing is started and nothing is measured.

A host has cores, ranks and one interface, which its ranks share, each direction for itself. A rank does one thing at a time; at either end
of a link it touches every byte once, at the rate at which it copies, or reduces what it receives. Data go in frames of at most 256 KiB, and
are passed on while they arrive.

Large clusters: where all hosts do the same (which is compared, not assumed), one stands for all. Else the time is followed along a line
from fewer hosts, or fewer bytes, if it lies on one. Where neither holds there is a dash.

With --here the model is held against real all-reduces of -n ranks on this host (RT_SHM=0: over TCP), of the algorithm that rt takes: how
fast cores copy and add is measured at each size, in turns with the real thing.

examples:
  rt.bench simulate --hosts 1024 --ranks-per-host 8 --latency 20e-6 --bandwidth 12.5e9 -e 1G
  rt.bench simulate --hosts 16 --algorithm ring,doubling -b 1K -e 1M -f 2
  rt.bench simulate --collective all_gather --hosts 64 --latency 50e-6 --bandwidth 1.25e9
  rt.bench simulate --here -n 2 -b 1M
"""


def positive(what: str) -> Callable[[str], float]:
    """Return a parser of numbers above 0."""

    def parse(word: str) -> float:
        if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", word, re.I) or not float(word) > 0:
            raise argparse.ArgumentTypeError(f"expected {what} above 0, as in 20e-6 or 12.5e9, found {word!r}")
        return float(word)

    return parse


def add(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    option = command.add_argument
    seconds, rate = positive("seconds"), positive("bytes per second")
    option("--hosts", type=at_least(1), metavar="N", help="hosts (default: 8)")
    option("--ranks-per-host", type=at_least(1), metavar="N", help="ranks on each (default: 1)")
    option("--cores", type=at_least(1), metavar="N", help="cores of each for those ranks (default: one per rank)")
    option("--latency", type=seconds, metavar="SECONDS", help="between hosts (default: 20e-6)")
    option("--bandwidth", type=rate, metavar="B/S", help="of a host's interface, each way (default: 12.5e9)")
    option("--local-latency", type=seconds, metavar="SECONDS", help="between ranks of a host (default: 1e-6)")
    option("--local-bandwidth", type=rate, metavar="B/S", help="at which a core copies (default: 10e9)")
    option("--reduce-bandwidth", type=rate, metavar="B/S", help="at which a core reduces what it receives (default: 10e9)")
    option("--here", action="store_true", help="hold the model against real calls on this host")
    option("-n", type=at_least(2), metavar="RANKS", help="with --here: how many (default: 2)")
    option("-b", type=byte_count, default="4", metavar="BYTES", help="smallest size (default: 4)")
    option("-e", type=byte_count, default="64M", metavar="BYTES", help="largest size (default: 64M)")
    step = command.add_mutually_exclusive_group()
    step.add_argument("-f", type=at_least(2), default=4, metavar="FACTOR", help="from one size to the next (default: 4)")
    step.add_argument("-i", type=byte_count, metavar="BYTES", help="add this to each size for the next, instead of -f")
    option("--collective", choices=tuple(ALGORITHMS), help="which (default: all_reduce)")
    names = tuple(dict.fromkeys(name for each in ALGORITHMS.values() for name in each))
    option("--algorithm", type=choice_of(names), help=f"which, out of {','.join(names)} (default: all that the collective has)")
    option("--plot", metavar="F.png", help="also draw time over size, and the best over hosts and sizes; needs matplotlib")


def options(arguments: argparse.Namespace) -> Options:
    """Return what a command line asks for.

    Raises:
        argparse.ArgumentTypeError: it contradicts itself or the collective.
    """
    if arguments.n is not None:
        raise argparse.ArgumentTypeError("-n: found it without --here, expected --hosts and --ranks-per-host")
    given = {name: default if getattr(arguments, name) is None else getattr(arguments, name) for name, default in _DESCRIBING.items()}
    collective, chosen, _ = (given.pop(name) for name in ("collective", "algorithm", "plot"))
    machine = simulate.machine(**given)
    if machine.size < 2:
        raise argparse.ArgumentTypeError("found 1 host of 1 rank, expected at least 2 ranks: --hosts, --ranks-per-host")
    able = simulate.usable(machine, collective)
    for name in chosen or ():
        if name not in able:
            found = f"{machine.hosts} x {machine.ranks_per_host} ranks"
            raise argparse.ArgumentTypeError(f"--algorithm: {collective} of {found} has no {name}; it has {', '.join(able)}")
    unit = ITEMSIZE if collective == "all_reduce" else ITEMSIZE * machine.size
    return Options(machine, collective, chosen or able, sizes(arguments, unit))


def here(arguments: argparse.Namespace) -> tuple[int, list[int]]:
    """Return how many ranks of this host, and the sizes.

    Raises:
        argparse.ArgumentTypeError: another machine or collective is described beside it.
    """
    for name in _DESCRIBING:
        if getattr(arguments, name) is not None:
            raise argparse.ArgumentTypeError(f"--{name.replace('_', '-')}: found it beside --here, which measures all_reduce on this host")
    return arguments.n or 2, sizes(arguments, ITEMSIZE)


def sizes(arguments: argparse.Namespace, unit: int) -> list[int]:
    """Return the sizes, as many whole ``unit`` as fit, ascending."""
    if arguments.e < arguments.b:
        raise argparse.ArgumentTypeError(f"-e {arguments.e} is below -b {arguments.b}")
    found = list(dict.fromkeys(nbytes // unit * unit for nbytes in _sizes(arguments) if nbytes >= unit))
    if not found:
        raise argparse.ArgumentTypeError(f"-e {arguments.e} leaves no float32 for each of {unit // ITEMSIZE}: expected at least {unit}")
    return found


def _sizes(arguments: argparse.Namespace) -> Iterator[int]:
    nbytes = arguments.b
    while nbytes <= arguments.e:
        yield nbytes
        nbytes = nbytes + arguments.i if arguments.i else nbytes * arguments.f
