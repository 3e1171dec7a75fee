"""The command line of ``rt.bench`` (also ``python -m bench``).

May live here: the commands, their help, where output goes, exit codes. May not: the options of the collectives (``options.py``), measuring.

Exit codes: 0 all well; 1 a system broke or returned wrong numbers; 2 a mistake on the command line or in the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import (
    fused,
    here,
    idle,
    imports,
    job,
    kernels,
    limits,
    local,
    loop_lag,
    measure,
    options,
    options_simulate,
    perftest,
    report,
    simulate,
    tune,
)
from bench.collectives import COLLECTIVES
from bench.meeting import BenchError, require
from rt.errors import ConfigError
from rt.tuning import read

_EPILOG = """\
examples:
  rt.bench all_reduce                          2 ranks, 4 bytes to 64 MiB, both front ends
  rt.bench all_gather -n 4 -b 1M -e 1M         one size, 4 ranks
  rt.bench all_reduce --peers mpich,gloo       peers beside us in the same run (`make peers` first)
  rt.bench all_reduce --backend jaccl          on an RDMA device, beside perftest's ib_write_bw and latencies
  rt.bench all_reduce -d half -J found.json    nccl-tests' flags, text and JSON
  rt.launch -n 4 rt.bench broadcast            the ranks of a job; also under torchrun and mpirun
  rt.bench loop_lag                            does the event loop stay responsive?
  rt.bench idle                                what does waiting cost?
  rt.bench fused                               what does one call for many arrays save?
  rt.bench kernels -d float32                  how fast is the arithmetic, beside loops written by hand?
  rt.bench limits --measure                    how near does all_reduce come to what memory allows?
  rt.bench import                              what does `import rt` cost?
  rt.bench tune -n 4 --into here.json          which algorithm is fastest here? then RT_TUNING=here.json
  rt.bench tune --show                         which algorithms are preferred now?
  rt.bench simulate --hosts 1024 -e 1G         which algorithm would be best on a large cluster?

Outside a job all ranks run on this host, over loopback. Load from elsewhere shows in every number: look at the load average in the header.
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

_KERNELS = """\
The loops that reduce, for every operator and dtype, on one core: GB/s of bytes read and written (dst = left op right moves three
times the operand's bytes), in the first-level cache, in the second-level one and in memory.

In cache, beside loops that are vectorised by hand (bench/hand_loops.c) and compiled now, with `cc`, for the widest vectors that this
processor has; the fastest of them counts. They do the same: integers wrap, min and max know NaN and -0, half types round once. Below
0.75 a loop of rt's is worth looking at. In memory, beside a loop that hardly computes: 1.0 is as fast as memory is.

Loops take turns, in five sweeps over the table; a ratio is the median over the rounds of one round's ratio. mean is a sum, and is not
listed.
"""

_LIMITS = """\
The least time in which memory lets an all_reduce of S bytes in shared memory end, between n ranks of this host:

  bound = max over cores of (bytes the ranks on it must read and write once) / (rate at which it streams while the others stream too)

Bytes: 2 S per rank. The n inputs must all be read and the n results all be written, n S each, because nobody knows an input that was
not read, and each rank's result is memory of its own. Shared evenly that is S read and S written by each rank's core, for any n: one
that reads its share of every input and writes its share of every result moves no more. What could be spared is not counted: the second
reading of an input by whoever did not reduce it, bytes that pass through a ring (which is in cache), lines that are fetched to be
overwritten, waiting for each other. n ranks go round the cores; a core with two of them must move 4 S.

Rate: one process per core, pinned, all at once; each goes over float32 arrays of S bytes by a copy (a = b, as the C library's memcpy
does it: past the cache where S is large; 2 S read and written) and by an addition (a = b + c; 3 S), and the faster of the two counts.
Arrays that fit a cache stream at the cache's rate, as the all_reduce does.

With --measure all_reduce itself (float32, out of place with out=, ranks not pinned) is timed in turns with the streams, by both front ends;
"% of bound" is bound / time, the median over the rounds. 100 % means that nothing is left to gain.
"""

_IMPORT = """\
Wall time of `import rt` in a fresh interpreter, less that of an interpreter that imports nothing; numpy, which rt needs, beside it.
"""

_TUNE = """\
Times every algorithm of a collective, size by size in turns, on ranks that it starts on this host, or beside those of the job that it is
in (rt.launch, mpirun with RT_COORDINATOR), and writes the table of the fastest: collective -> kind of links (shm, or tcp with RT_SHM=0)
-> ranks -> up to that many bytes -> algorithm. RT_TUNING=F.json makes a job use it; rank 0's holds for all ranks. What a table does not
have is as in the one that comes with rt, so tables may be short, and are made to be edited. Sizes are those of the collective's own
command; the table counts the bytes of one rank's block where there are blocks. all_reduce_wide is that of half types, which are
accumulated in float32. Algorithms: docs/algorithms.md.

A threshold has to save a fifth of the time, spread over two sizes or more, and lies about halfway between two that were measured: -f 2
places it closer, and takes longer. Between more ranks than cores times scatter: run it more than once.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="rt.bench",
        description="Measure rt on this machine, or on those of a job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, collective in COLLECTIVES.items():
        options.add(_add(commands, name, f"time {name}, peers beside us", options.description(collective), ranks=True), collective)
    lag = _add(commands, "loop_lag", "how late timers fire while ranks reduce", _LOOP_LAG, ranks=True)
    large = "size of the large all_reduce; each rank holds it twice (default: 1G)"
    lag.add_argument("--bytes", type=options.byte_count, default="1G", help=large)
    _add(commands, "idle", "CPU that waiting costs", _IDLE, ranks=True)
    _add(commands, "fused", "many small arrays in one call", _FUSED, ranks=True)
    loops = _add(commands, "kernels", "the reduction loops, beside loops by hand", _KERNELS, ranks=False)
    for letter, known, what in (("-o", kernels.OPS, "operators"), ("-d", kernels.DTYPES, "dtypes")):
        told = f"{what}, of {','.join(known)} (default: all)"
        loops.add_argument(letter, type=options.choice_of(known), default=known, metavar="A,B", help=told)
    least = _add(commands, "limits", "what memory lets an all_reduce take at least", _LIMITS, ranks=True)
    options.add_sizes(least, "1M")
    least.add_argument("--measure", action="store_true", help="also time all_reduce, and say how near it comes")
    _add(commands, "import", "how long `import rt` takes", _IMPORT, ranks=False)
    _add_tune(_add(commands, "tune", "find the fastest algorithms, or show those preferred", _TUNE, ranks=True))
    options_simulate.add(_add(commands, "simulate", "the algorithms on a described cluster", options_simulate.DESCRIPTION, ranks=False))
    return top


def _add(commands: Any, name: str, summary: str, description: str, *, ranks: bool) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if ranks:
        command.add_argument("-n", type=options.at_least(2), metavar="RANKS", help="processes to start on this host (default: 2)")
    command.add_argument(
        "--json", "-J", metavar="FILE", help="also write JSON; - is standard output, and moves the text to standard error"
    )
    return command


def _add_tune(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("rows", nargs="*", metavar="COLLECTIVE", help=f"what to measure (default: all), out of {', '.join(tune.ROWS)}")
    option("-b", type=options.byte_count, default="4", metavar="BYTES", help="smallest size (default: 4)")
    option("-e", type=options.byte_count, default="64M", metavar="BYTES", help="largest size (default: 64M)")
    option("-f", type=options.at_least(2), default=4, metavar="FACTOR", help="from one size to the next (default: 4)")
    target = command.add_mutually_exclusive_group()
    target.add_argument("--output", metavar="F.json", help="write the table there (default: standard output)")
    target.add_argument("--into", metavar="F.json", help="put the table into that one: for more collectives, ranks or links")
    target.add_argument(
        "--show", nargs="?", const="", metavar="F.json", help="measure nothing: print the table in force, or that of a file, completed"
    )


def _check_files(arguments: argparse.Namespace, group: Any = None) -> None:
    """Raise now if what is to be written at the end, by rank 0 of a job, cannot be: not after minutes of measuring."""
    wrong = options.unwritable(arguments) if group is None or group.rank() == 0 else ""
    if group is not None:
        wrong = job.shared(group, wrong)[0]
    if wrong:
        raise argparse.ArgumentTypeError(wrong)


def _tune(arguments: argparse.Namespace) -> tuple[str, Any, int] | None:
    if arguments.show is not None:
        _check_files(arguments)
        table, source = tune.in_force(arguments.show or None)
        return tune.show(table, source), {"source": source, "fingerprint": table.fingerprint, "table": table.document()}, 0
    unknown = [row for row in arguments.rows if row not in tune.ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} cannot be tuned; expected some of {', '.join(tune.ROWS)}")
    group = job.join()
    size = options.ranks_of(arguments.n, group and group.size())
    _check_files(arguments, group)
    known = read(arguments.into, arguments.into) if arguments.into and Path(arguments.into).exists() else None
    found, table = tune.run(arguments.rows or list(tune.ROWS), size, arguments.b, arguments.e, arguments.f, group)
    if group is not None and group.rank() > 0:
        return None
    text, content = tune.report(found, table), tune.as_json(found, table)
    table = table.over(known) if known else table
    if arguments.output or arguments.into:
        Path(arguments.output or arguments.into).write_text(table.text(), encoding="utf-8")
    else:
        print(text, file=sys.stderr)
        text = table.text().rstrip()
    return text, content, int(any(sum(each.wrong) for each in found))


def _measured(arguments: argparse.Namespace) -> list[measure.Result] | None:
    """Measure a collective in the job we are in, or on ranks of our own; one result per dtype and operator. None: another rank tells."""
    import rt

    needs = COLLECTIVES[arguments.command].needs
    if not hasattr(rt, needs):
        raise BenchError(f"this version of rt has no {needs}")
    group = job.join()
    wanted = options.each(arguments, group and group.size())
    _check_files(arguments, group)
    if group is not None:
        results = job.run_each(wanted, group)
        return results if group.rank() == 0 else None
    require(wanted[0].peers)  # now, not after our own groups were started
    if wanted[0].backend == "jaccl":
        perftest.require()
    return local.run_each(wanted)


def _run_collective(arguments: argparse.Namespace) -> tuple[str, Any, int] | None:
    if arguments.plot:
        from bench import plot  # now: matplotlib may be missing, and that should not be found out at the end

        plot.check(arguments.plot)
    started = datetime.now()
    results = _measured(arguments)
    if results is None:
        return None
    if arguments.plot:
        plot.draw(results[0], Path(arguments.plot))
    target = arguments.json if arguments.json != "-" else None
    text = report.text(results, arguments.format, stats=arguments.stats, target=target)
    content = report.as_json(results, started, stats=arguments.stats)
    if arguments.backend == "jaccl":
        content["perftest"] = perftest.rows(results[0])
        text += "\n" + perftest.text(content["perftest"])
    return text, content, int(any(result.wrong for result in results))


def _run_simulate(arguments: argparse.Namespace) -> tuple[str, Any, int]:
    if arguments.here:
        found = here.run(*options_simulate.here(arguments))
        return here.text(found), found, 0
    wanted = options_simulate.options(arguments)
    if arguments.plot:
        from bench import plot, plot_simulate  # now: matplotlib may be missing, and that should not be found out at the end

        plot.check(arguments.plot)
    rows = simulate.run(wanted)
    if arguments.plot:
        plot_simulate.draw(wanted, [*simulate.over_hosts(wanted), (wanted.machine.hosts, rows)], Path(arguments.plot))
    return simulate.text(wanted, rows), simulate.content(wanted, rows), 0


def run(arguments: argparse.Namespace) -> tuple[str, Any, int] | None:
    """Run one command; return its text, its content for JSON and the exit code, or None where another rank of the job tells."""
    if arguments.command in COLLECTIVES:
        return _run_collective(arguments)
    if arguments.command == "tune":
        return _tune(arguments)
    _check_files(arguments)
    if arguments.command == "loop_lag":
        rows = loop_lag.run(arguments.n or 2, arguments.bytes)
        return loop_lag.text(rows), rows, 0
    if arguments.command == "idle":
        rows = idle.run(arguments.n or 2)
        return idle.text(rows), rows, 0
    if arguments.command == "fused":
        rows = fused.run(arguments.n or 2)
        return fused.text(rows), rows, 0
    if arguments.command == "limits":
        rows = limits.run(options.all_reduces(arguments), measured=arguments.measure)
        return limits.text(rows), rows, 0
    if arguments.command == "kernels":
        if not kernels.cases(arguments.o, arguments.d):
            raise argparse.ArgumentTypeError(f"-o {','.join(arguments.o)}: found dtypes {','.join(arguments.d)}, expected bool or integers")
        rows = kernels.run(arguments.o, arguments.d)
        return kernels.text(rows), rows, 0
    if arguments.command == "simulate":
        return _run_simulate(arguments)
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
        found = run(arguments)
    except (argparse.ArgumentTypeError, ConfigError) as error:
        top.error(str(error))
    except BenchError as error:
        print(f"rt.bench: {error}", file=sys.stderr)
        return 1
    if found is None:
        return 0
    text, content, code = found
    emit(text, content, arguments.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
