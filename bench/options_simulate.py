"""The options of ``rt.bench simulate``.

May live here: those options, their help, and what is wrong about them. May not: the collectives' options (``options.py``), simulating.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator

from bench import simulate
from bench.fold import ITEMSIZE
from bench.options import at_least, byte_count, choice_of
from bench.simulate import ALGORITHMS, Options

DESCRIPTION = """\
How long each algorithm takes on a cluster that you describe, and which is best: the very schedules that rt runs, step by step on modelled
ranks, links and interfaces, in float32 and out of place. Nothing is started and nothing is measured.

A host has cores, ranks and one interface, which its ranks share, each direction for itself. A rank does one thing at a time; at either end
of a link it touches every byte once, at the rate at which it copies, or reduces what it receives. Data go in frames of at most 256 KiB, and
are passed on while they arrive.

Large clusters: where all hosts do the same (which is compared, not assumed), one stands for all. Else the time is followed along a line
from fewer hosts, or fewer bytes, if it lies on one. Where neither holds there is a dash.

examples:
  rt.bench simulate --hosts 1024 --ranks-per-host 8 --latency 20e-6 --bandwidth 12.5e9 -e 1G
  rt.bench simulate --hosts 16 --algorithm ring,doubling -b 1K -e 1M -f 2
  rt.bench simulate --collective all_gather --hosts 64 --latency 50e-6 --bandwidth 1.25e9
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
    option("--hosts", type=at_least(1), default=8, metavar="N", help="hosts (default: 8)")
    option("--ranks-per-host", type=at_least(1), default=1, metavar="N", help="ranks on each (default: 1)")
    option("--cores", type=at_least(1), metavar="N", help="cores of each for those ranks (default: one per rank)")
    option("--latency", type=seconds, default=20e-6, metavar="SECONDS", help="between hosts (default: 20e-6)")
    option("--bandwidth", type=rate, default=12.5e9, metavar="B/S", help="of a host's interface, each way (default: 12.5e9)")
    option("--local-latency", type=seconds, default=1e-6, metavar="SECONDS", help="between ranks of a host (default: 1e-6)")
    option("--local-bandwidth", type=rate, default=10e9, metavar="B/S", help="at which a core copies (default: 10e9)")
    option("--reduce-bandwidth", type=rate, default=10e9, metavar="B/S", help="at which a core reduces what it receives (default: 10e9)")
    option("-b", type=byte_count, default="4", metavar="BYTES", help="smallest size (default: 4)")
    option("-e", type=byte_count, default="64M", metavar="BYTES", help="largest size (default: 64M)")
    step = command.add_mutually_exclusive_group()
    step.add_argument("-f", type=at_least(2), default=4, metavar="FACTOR", help="from one size to the next (default: 4)")
    step.add_argument("-i", type=byte_count, metavar="BYTES", help="add this to each size for the next, instead of -f")
    option("--collective", choices=tuple(ALGORITHMS), default="all_reduce", help="which (default: all_reduce)")
    names = tuple(dict.fromkeys(name for each in ALGORITHMS.values() for name in each))
    option("--algorithm", type=choice_of(names), help=f"which, out of {','.join(names)} (default: all that the collective has)")


def options(arguments: argparse.Namespace) -> Options:
    """Return what a command line asks for.

    Raises:
        argparse.ArgumentTypeError: it contradicts itself or the collective.
    """
    machine = simulate.machine(
        arguments.hosts, arguments.ranks_per_host, latency=arguments.latency, bandwidth=arguments.bandwidth, cores=arguments.cores,
        local_latency=arguments.local_latency, local_bandwidth=arguments.local_bandwidth, reduce_bandwidth=arguments.reduce_bandwidth,
    )  # fmt: skip
    if machine.size < 2:
        raise argparse.ArgumentTypeError("found 1 host of 1 rank, expected at least 2 ranks: --hosts, --ranks-per-host")
    known = ALGORITHMS[arguments.collective]
    for name in arguments.algorithm or ():
        if name not in known:
            raise argparse.ArgumentTypeError(f"--algorithm: {arguments.collective} has no {name}; it has {', '.join(known)}")
    if arguments.e < arguments.b:
        raise argparse.ArgumentTypeError(f"-e {arguments.e} is below -b {arguments.b}")
    unit = ITEMSIZE if arguments.collective == "all_reduce" else ITEMSIZE * machine.size
    sizes = list(dict.fromkeys(nbytes // unit * unit for nbytes in _sizes(arguments) if nbytes >= unit))
    if not sizes:
        raise argparse.ArgumentTypeError(f"-e {arguments.e} leaves no float32 for each of {unit // ITEMSIZE}: expected at least {unit}")
    return Options(machine, arguments.collective, arguments.algorithm or tuple(known), sizes)


def _sizes(arguments: argparse.Namespace) -> Iterator[int]:
    nbytes = arguments.b
    while nbytes <= arguments.e:
        yield nbytes
        nbytes = nbytes + arguments.i if arguments.i else nbytes * arguments.f
