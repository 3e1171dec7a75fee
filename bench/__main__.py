"""The command line of ``rt.bench`` (also ``python -m bench``).

May live here: options, their help, where output goes, exit codes. May not: measuring.

Exit codes: 0 all well; 1 a system broke or returned wrong numbers; 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import all_reduce, fused, idle, imports, loop_lag, report
from bench.conductor import PEERS, BenchError, peers_python

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_FRONTS = ("sync", "async")

_EPILOG = """\
examples:
  rt.bench all_reduce                          2 ranks, 4 bytes to 64 MiB, both front ends
  rt.bench all_reduce -n 4 -b 1M -e 1M         one size, 4 ranks
  rt.bench all_reduce --peers gloo,mlx         peers beside us in the same run (`make peers` first)
  rt.bench loop_lag                            does the event loop stay responsive?
  rt.bench idle                                what does waiting cost?
  rt.bench fused                               what does one call for many arrays save?
  rt.bench import                              what does `import rt` cost?

All ranks run on this host, over loopback. Load from elsewhere shows in every number: look at the load average in the header.
"""

_ALL_REDUCE = """\
Time one all-reduce of float32, for sizes from -b to -e. The table is nccl-tests': time is the median over samples, each
sample starts at a barrier and the slowest rank counts; algbw = bytes / time; busbw = algbw * 2(n-1)/n, which compares with what
the wire carries, for any number of ranks; #wrong counts elements that differ from the exact sum.

With --peers, a second table shows the same measurement of other systems, taken in turns with ours, and how many times longer
they take. A ratio above 1 means that rt is faster. gloo and mlx need `make peers`; nospin is rt's blocking front end without its
brief polling (what an event loop costs), tcp a bare exchange of the same bytes (what the kernel costs).
"""

_LOOP_LAG = """\
How late a 1 ms timer fires on rank 0's event loop: while nothing happens, during one large all_reduce, and while small ones are
awaited in a tight loop; on uvloop and on asyncio's own loop. What a request handler on that loop would have to wait.
"""

_IDLE = """\
CPU of an open group while nothing moves, over 5 s each, worst rank, in both front ends: nothing posted; one rank ahead of the
other in an all_reduce; waiting for a broadcast.
"""

_FUSED = """\
200 arrays of 1 KiB: one all_sum after the other, one all_sum of the list, and average_gradients of it, in turns, in both front ends.
"""

_IMPORT = """\
Wall time of `import rt` in a fresh interpreter, less that of an interpreter that imports nothing; numpy, which rt needs, beside it.
"""


def byte_count(word: str) -> int:
    """Parse 4, 64K, 1M, 2G (binary units, as nccl-tests has them)."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", word.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no byte count; expected a number with K, M or G behind it or nothing, as in 64M")
    count = int(match[1]) * _UNITS[match[2]]
    if count < all_reduce.ITEM_BYTES:
        raise argparse.ArgumentTypeError(f"{word!r} is less than one float32 of {all_reduce.ITEM_BYTES} bytes")
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


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="rt.bench",
        description="Measure rt on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{all_reduce,loop_lag,idle,fused,import}")
    _add_all_reduce(commands)
    lag = _add(commands, "loop_lag", "how late timers fire while ranks reduce", _LOOP_LAG, ranks=True)
    lag.add_argument("--bytes", type=byte_count, default="1G", help="size of the large all_reduce; each rank holds it twice (default: 1G)")
    _add(commands, "idle", "CPU that waiting costs", _IDLE, ranks=True)
    _add(commands, "fused", "many small arrays in one call", _FUSED, ranks=True)
    _add(commands, "import", "how long `import rt` takes", _IMPORT, ranks=False)
    return top


def _add(commands: Any, name: str, summary: str, description: str, *, ranks: bool) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if ranks:
        command.add_argument("-n", type=at_least(2), default=2, metavar="RANKS", help="processes to start on this host (default: 2)")
    command.add_argument("--json", metavar="FILE", help="also write JSON; - is standard output, and moves the text to standard error")
    return command


def _add_all_reduce(commands: Any) -> None:
    command = _add(commands, "all_reduce", "time all-reduces, peers beside us", _ALL_REDUCE, ranks=True)
    command.add_argument("-b", type=byte_count, default="4", metavar="BYTES", help="smallest size (default: 4)")
    command.add_argument("-e", type=byte_count, default="64M", metavar="BYTES", help="largest size (default: 64M)")
    command.add_argument("-f", type=at_least(2), default=4, metavar="FACTOR", help="from one size to the next (default: 4)")
    command.add_argument("--iters", type=iterations, default="auto", metavar="N", help="samples per size (default: auto, about 0.4 s)")
    command.add_argument("-w", type=at_least(0), default=5, metavar="N", help="calls before the clock runs, per size (default: 5)")
    command.add_argument("--front", type=choice_of(_FRONTS), default="sync,async", help="front ends of rt (default: sync,async)")
    command.add_argument("--peers", type=choice_of(PEERS), default=(), help=f"systems to compare with, out of {','.join(PEERS)}")
    command.add_argument("-c", type=int, choices=(0, 1), default=1, help="verify the results (default: 1)")


def _options(arguments: argparse.Namespace) -> all_reduce.Options:
    if arguments.e < arguments.b:
        raise argparse.ArgumentTypeError(f"-e {arguments.e} is below -b {arguments.b}")
    if {"gloo", "mlx"} & set(arguments.peers):
        peers_python()  # now, not after our own groups were started
    return all_reduce.Options(
        size=arguments.n,
        min_bytes=arguments.b,
        max_bytes=arguments.e,
        factor=arguments.f,
        iters=arguments.iters,
        warmup=arguments.w,
        fronts=arguments.front,
        peers=arguments.peers,
        check=bool(arguments.c),
    )


def run(arguments: argparse.Namespace) -> tuple[str, Any, int]:
    """Run one command; return its text, its content for JSON, and the exit code."""
    if arguments.command == "all_reduce":
        result = all_reduce.run(_options(arguments))
        return report.text(result), report.as_json(result), 1 if result.wrong else 0
    if arguments.command == "loop_lag":
        rows = loop_lag.run(arguments.n, arguments.bytes)
        return loop_lag.text(rows), rows, 0
    if arguments.command == "idle":
        rows = idle.run(arguments.n)
        return idle.text(rows), rows, 0
    if arguments.command == "fused":
        rows = fused.run(arguments.n)
        return fused.text(rows), rows, 0
    rows = imports.run()
    return imports.text(rows), rows, 0


def emit(text: str, content: Any, target: str | None) -> None:
    """Print the text, and write the JSON where ``--json`` says."""
    print(text, file=sys.stderr if target == "-" else sys.stdout)
    if target is None:
        return
    document = json.dumps(content, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(document)
    else:
        Path(target).write_text(document, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rt.bench`` and return its exit code."""
    top = parser()
    arguments = top.parse_args(argv)
    try:
        text, content, code = run(arguments)
    except argparse.ArgumentTypeError as error:
        top.error(str(error))
    except BenchError as error:
        print(f"rt.bench: {error}", file=sys.stderr)
        return 1
    emit(text, content, arguments.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
