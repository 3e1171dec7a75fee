"""The command line of ``rt.launch``: what may be said, and what is wrong with what was said.

May live here: options, their help, and all checks that need no process. May not: processes, pipes, the environment of a rank.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_DESCRIPTION = """\
Start N copies of a program on this host and join them to one group: in each, rt.init() finds its rank and its peers."""

_EXAMPLES = """\
options end at the program, or at "--": what follows belongs to the program.

examples:
  rt.launch -n 4 train.py --epochs 10           train.py runs under this Python; --epochs is its own option
  rt.launch -n 2 python -m package.module       anything else is looked up on PATH
  rt.launch -n 2 --env RT_LOG=info train.py     one more variable for every rank
  rt.launch -n 4 --log-dir logs train.py        keep logs/rank0.out, logs/rank0.err, logs/rank1.out, ... as well
  rt.launch -n 4 --timeout 600 test.py          end the job after ten minutes, with exit code 124
  rt.launch -n 4 --dry-run train.py             show the commands, to start a rank by hand, under a debugger perhaps
  echo 'c' | rt.launch -n 2 debug.py            every rank reads all of our stdin
  rt.launch -n 2 --verbose -- ./-odd-name       say what is started; "--" ends the options

Lines of the ranks are shown as "[rank] line", stdout and stderr apart; a line without an end, such as a prompt, is shown after 50 ms.
What is typed or piped in goes to every rank, with its end; a rank that reads nothing while others wait loses its input after 5 seconds.

When a rank fails the others get SIGTERM, and SIGKILL 5 seconds later; the last line says which rank it was, after the last lines it wrote
to stderr. Ctrl-C is handed to the ranks; a second one kills them. Whatever ends the launcher ends the ranks and their children.

exit code: 0 if all ranks returned 0, else that of the rank that failed first (128 plus the signal if one killed it); 124 if --timeout
ended the job; 2 if the command line is wrong."""

PREFIXES = ("auto", "always", "never")


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        command: the program with what runs it in front, relative to ``cwd`` if it has a folder in its name.
        prefix: one of ``PREFIXES``; auto stands for always unless there is one rank only.
        timeout: seconds, or None.
    """

    size: int
    command: list[str]
    environment: dict[str, str]
    prefix: str
    cwd: str | None
    log_dir: str | None
    timeout: float | None
    dry_run: bool
    verbose: bool


def parse(argv: Sequence[str]) -> Options:
    """Check the command line; what is wrong is said on stderr and raises SystemExit(2)."""
    parser, valued = _parser()
    ours, command = split(argv, valued)
    found = parser.parse_args(ours)
    try:
        command = _executable(command, found.python, found.cwd)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        size=found.n,
        command=command,
        environment=dict(found.env),
        prefix=found.prefix,
        cwd=found.cwd,
        log_dir=found.log_dir,
        timeout=found.timeout,
        dry_run=found.dry_run,
        verbose=found.verbose,
    )


def split(argv: Sequence[str], valued: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the command line in ours and the program's. Not left to argparse: its REMAINDER treats options and "--" in too many ways.

    Args:
        argv: the words.
        valued: the options whose value is a word of its own.
    """
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        if argv[at] == "--":
            return list(argv[:at]), list(argv[at + 1 :])
        at += 2 if argv[at] in valued else 1
    return list(argv[:at]), list(argv[at:])


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser and the names of the options that have values."""
    parser = argparse.ArgumentParser(
        prog="rt.launch",
        usage="rt.launch -n N [options] [--] program [args ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    valued = ["-n", "--python", "--env", "--cwd", "--prefix", "--log-dir", "--timeout"]
    add = parser.add_argument
    add("-n", type=_count, required=True, metavar="N", help="number of ranks")
    add("--python", default=sys.executable, metavar="PY", help="interpreter for .py programs (default: this one)")
    add("--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="for every rank; repeatable")
    add("--cwd", type=_folder, metavar="DIR", help="folder to run in; the program's name is looked up from there")
    add("--prefix", type=_prefix, default="auto", metavar="WHEN", help='"[rank] " before lines: always, never, or auto: unless -n 1')
    add("--log-dir", metavar="DIR", help="also write DIR/rankN.out and .err, without prefix; old files of these names are overwritten")
    add("--timeout", type=_seconds, metavar="SECONDS", help="end the job as failed, with exit code 124, if it takes longer")
    add("--dry-run", action="store_true", help="show the commands and variables in place of starting anything")
    add("--verbose", action="store_true", help="say what is started, with which settings, and how it ended")
    return parser, valued


def _checked(text: str, good: bool, expected: str) -> str:
    if not good:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return text


def _count(text: str) -> int:
    return int(_checked(text, text.isdecimal() and int(text) > 0, "a number of ranks from 1 up"))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    _checked(text, bool(name and equals), "NAME=VALUE")
    return name, value


def _folder(text: str) -> str:
    return _checked(text, os.path.isdir(text), "a folder that exists")


def _prefix(text: str) -> str:
    return _checked(text, text in PREFIXES, "auto, always or never")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    _checked(text, 0 < seconds < math.inf, "a number of seconds above 0")
    return seconds


def _executable(command: Sequence[str], python: str, cwd: str | None) -> list[str]:
    """Return the command with what runs it in front; ValueError says what is missing, before anything has been started."""
    if not command:
        raise ValueError("no program given; expected for example: rt.launch -n 2 train.py")
    folder = cwd or ""
    if not command[0].endswith(".py"):
        return [_found("program", command[0], folder), *command[1:]]
    if not os.path.isfile(os.path.join(folder, command[0])):
        raise ValueError(f"program {command[0]!r} not found{_in(folder)}: no such file")
    interpreter = _found("--python", python, "")
    return [os.path.abspath(interpreter), "-u", *command]


def _found(what: str, name: str, folder: str) -> str:
    """Return the path of a program: on PATH, or, if its name has a folder, as it is, to be found from ``folder``."""
    if os.sep not in name:
        path = shutil.which(name)
        if path is None:
            raise ValueError(f"{what} {name!r} not found: not on PATH")
        return os.path.abspath(path)
    if shutil.which(os.path.join(folder, name)) is None:
        raise ValueError(f"{what} {name!r} not found{_in(folder)}: no such executable file")
    return name


def _in(folder: str) -> str:
    return f" in {folder!r}" if folder else ""
