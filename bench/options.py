"""The options of ``rt.bench COLLECTIVE``: nccl-tests' letters where they mean the same.

May live here: those options, their help, and what is wrong about them, or about a file to write. May not: the other commands
(``__main__.py``), measuring.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from bench import measure, report
from bench.adapters import MPI_PEERS, PEERS
from bench.collectives import COLLECTIVES, Collective
from bench.data import DTYPES, OPS
from rt._output_file import unwritable as why_unwritable

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_FRONTS = ("sync", "async")
_FLOATS = ("half", "bfloat16", "float", "double")
_ALL = "all"

_HELP = (
    "Time {name}. The table is nccl-tests' ({program}): time is the median over samples, each sample starts at a barrier and the slowest "
    "rank counts; algbw = size / time; busbw is what the wire carries, for any number of ranks; #wrong counts elements that differ from "
    "the exact result. {sizes}Lines of our own begin with #: where it ran, and all systems side by side.",
    "Letters are nccl-tests' (-b -e -f -i -w -d -o -r -c -J), but: -n is the number of ranks and --iters that of iterations, since "
    "every rank is a process and there is neither -t nor -g. Inside a job (rt.launch, torchrun, mpirun with RT_COORDINATOR) its ranks are "
    "measured and none are started.",
    "With --peers the same is measured of other systems, in turns with ours; a ratio above 1 means that rt is faster. gloo, mlx, "
    "mpich and openmpi need `make peers`, and the last two use shared memory; nospin is rt's blocking front end without its brief polling "
    "(what an event loop costs), tcp a bare exchange of the same bytes (what the kernel costs).",
)
_BLOCKS = (
    "The size is that of the larger buffer, which holds a block of whole 16 bytes per rank, as nccl-tests has it; sizes that leave no "
    "block are left out. "
)
_WIDTH = 100


def byte_count(word: str) -> int:
    """Parse 4, 64K, 1M, 2G (binary units, as nccl-tests has them)."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", word.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no byte count; expected a number with K, M or G behind it or nothing, as in 64M")
    count = int(match[1]) * _UNITS[match[2]]
    if count < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no size to measure; expected at least one byte")
    return count


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are not below ``least``."""

    def parse(word: str) -> int:
        if not re.fullmatch(r"\d+", word) or int(word) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {word!r}")
        return int(word)

    return parse


def iterations(word: str) -> int | None:
    """Parse a number of samples; ``auto`` is None."""
    return None if word == "auto" else at_least(1)(word)


def choice_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names out of ``known``; the order is kept, repetitions are not."""

    def parse(word: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(word.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; known: {', '.join(known)}")
        return names

    return parse


def description(collective: Collective) -> str:
    """Return what ``--help`` says of a collective."""
    sizes = _BLOCKS if any(collective.blocks) else ""
    paragraphs = (part.format(name=collective.name, program=collective.program, sizes=sizes) for part in _HELP)
    return "\n\n".join(textwrap.fill(part, _WIDTH) for part in paragraphs)


def add_sizes(command: argparse.ArgumentParser, smallest: str) -> None:
    """Add the options that say which sizes to measure."""
    command.add_argument("-b", type=byte_count, default=smallest, metavar="BYTES", help=f"smallest size (default: {smallest})")
    command.add_argument("-e", type=byte_count, default="64M", metavar="BYTES", help="largest size (default: 64M)")
    step = command.add_mutually_exclusive_group()
    step.add_argument("-f", type=at_least(2), metavar="FACTOR", help="from one size to the next (default: 4)")
    step.add_argument("-i", type=byte_count, metavar="BYTES", help="add this to each size for the next, instead of -f")


def add(command: argparse.ArgumentParser, collective: Collective) -> None:
    """Add the options of one collective."""
    option = command.add_argument
    if collective.moves:
        add_sizes(command, "4")
        option("-d", choices=(*DTYPES, _ALL), default="float", help="dtype, as nccl-tests calls it (default: float)")
    if collective.reduces:
        option("-o", choices=(*OPS, _ALL), default="sum", help="operator (default: sum); with all, avg is of floats only")
    if collective.rooted:
        option("-r", type=at_least(0), default=0, metavar="ROOT", help="root (default: 0)")
    option("--iters", type=iterations, default="auto", metavar="N", help="samples per size (default: auto, about 0.4 s)")
    option("-w", type=at_least(0), default=5, metavar="N", help="calls before the clock runs, per size (default: 5)")
    option("-c", type=int, choices=(0, 1), default=1, help="verify the results (default: 1)")
    option("--front", type=choice_of(_FRONTS), default="sync,async", help="front ends of rt, the table's first (default: sync,async)")
    option("--peers", type=choice_of(PEERS), default=(), help=f"systems to compare with, out of {','.join(PEERS)}")
    backends = "of rt; mpi: on each MPI library among the peers; jaccl: on an RDMA device, beside perftest (default: ring)"
    option("--backend", choices=("ring", "mpi", "jaccl"), default="ring", help=backends)
    option("--stats", action="store_true", help="also least, largest, 99th percentile and standard deviation over mean of the samples")
    option("--format", choices=report.FORMATS, default="nccl", help="whose table (default: nccl)")
    option("--plot", metavar="F.png", help="also draw time over size, all systems; needs matplotlib (pip install rt-collectives[bench])")


def options(arguments: argparse.Namespace, job_size: int | None = None) -> measure.Options:
    """Return what a command line asks for; ``job_size`` is the number of ranks where they are not ours to start.

    Raises:
        argparse.ArgumentTypeError: it contradicts itself, the collective, or the job.
    """
    collective = COLLECTIVES[arguments.command]
    given: dict[str, Any] = vars(arguments)
    size = ranks_of(arguments.n, job_size)
    if job_size is not None and arguments.peers:
        raise argparse.ArgumentTypeError(f"--peers {','.join(arguments.peers)} starts ranks of its own, which cannot be done inside a job")
    if arguments.backend == "mpi" and (job_size is not None or not set(arguments.peers) & set(MPI_PEERS)):
        raise argparse.ArgumentTypeError("--backend mpi: found no MPI library among --peers, expected mpich, openmpi or both, not in a job")
    if arguments.backend == "jaccl" and job_size is not None:
        raise argparse.ArgumentTypeError("--backend jaccl starts ranks of its own; in a job RT_BACKEND=jaccl does what it says")
    for peer in arguments.peers:
        if not measure.places(peer, collective):
            able = [name for name in PEERS if measure.places(name, collective)]
            raise argparse.ArgumentTypeError(f"--peers: {peer} has no {collective.name}; of the peers, {', '.join(able)} have")
    if given.get("o") == "avg" and arguments.d not in _FLOATS:
        raise argparse.ArgumentTypeError(f"-o avg: found dtype {arguments.d}, expected one of {', '.join(_FLOATS)}")
    if given.get("r", 0) >= size:
        raise argparse.ArgumentTypeError(f"-r {arguments.r}: expected a rank below {size}")
    sizes = {**_sizes(arguments), "dtype": arguments.d} if collective.moves else {}
    found = measure.Options(
        collective, size, **sizes, iters=arguments.iters, warmup=arguments.w, op=given.get("o", "sum"), root=given.get("r", 0),
        fronts=arguments.front, peers=arguments.peers, check=bool(arguments.c), backend=arguments.backend,
    )  # fmt: skip
    return _checked(found)


def each(arguments: argparse.Namespace, job_size: int | None = None) -> list[measure.Options]:
    """As ``options``, one per dtype and operator, in nccl-tests' order: ``all`` is each that there is.

    Raises:
        argparse.ArgumentTypeError: as there, or what else is asked for has room for one of each only.
    """
    given: dict[str, Any] = vars(arguments)
    asked = [f"-{letter} {_ALL}" for letter in "do" if given.get(letter) == _ALL]
    if not asked:
        return [options(arguments, job_size)]
    single = {"--peers": arguments.peers, "--plot": arguments.plot, f"--format {arguments.format}": arguments.format != "nccl"}
    if narrow := [name for name, there in {**single, "--backend jaccl": arguments.backend == "jaccl"}.items() if there]:
        raise argparse.ArgumentTypeError(f"{' '.join(asked)}: found {narrow[0]} beside it, expected one dtype and operator there")
    wanted = [
        {"d": dtype, **({"o": op} if "o" in given else {})}
        for dtype in (DTYPES if given["d"] == _ALL else (given["d"],))
        for op in (OPS if given.get("o") == _ALL else (given.get("o"),))
        if op != "avg" or dtype in _FLOATS
    ]
    return [options(argparse.Namespace(**{**given, **one}), job_size) for one in wanted]


def all_reduces(arguments: argparse.Namespace) -> measure.Options:
    """Return the float32 all-reduces that a command without options but ``-n`` and sizes asks for.

    Raises:
        argparse.ArgumentTypeError: there are no such sizes.
    """
    return _checked(measure.Options(COLLECTIVES["all_reduce"], arguments.n or 2, **_sizes(arguments)))


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"min_bytes": arguments.b, "max_bytes": arguments.e, "step_bytes": arguments.i, "factor": arguments.f or 4}


def _checked(found: measure.Options) -> measure.Options:
    if found.max_bytes < found.min_bytes:
        raise argparse.ArgumentTypeError(f"-e {found.max_bytes} is below -b {found.min_bytes}")
    if not found.counts:
        blocks = f" in each of {found.size} blocks of whole 16 bytes" if any(found.collective.blocks) else ""
        raise argparse.ArgumentTypeError(f"-e {found.max_bytes} leaves no {found.dtype}{blocks}")
    return found


def ranks_of(asked: int | None, job_size: int | None) -> int:
    """Return how many ranks to measure: those of the job, where we are in one.

    Raises:
        argparse.ArgumentTypeError: others are asked for.
    """
    if job_size is None:
        return asked or 2
    if asked not in (None, job_size):
        raise argparse.ArgumentTypeError(f"-n {asked}: found a job of {job_size} ranks, and inside a job none are started")
    return job_size


def unwritable(arguments: argparse.Namespace) -> str:
    """Return which option names a file that could not be written in the end, and why; "" if all can be. Leaves files as they are."""
    for name in ("json", "plot", "output", "into"):
        path = getattr(arguments, name, None)
        if path is None or (name == "json" and path == "-"):
            continue
        if why := why_unwritable(path):
            return f"--{name} {path}: found {why!r}, expected a file that can be written"
    return ""
