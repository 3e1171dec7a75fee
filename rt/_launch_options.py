"""The command line of ``rt.launch``: what may be said, and what is wrong with what was said.

May live here: options, their help, and all checks that need no process. May not: processes, pipes, the environment of a rank.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rt import interfaces
from rt.errors import ConfigError
from rt.hostfile import BACKENDS, Host, Hostfile, check_variable, parse_hosts, read_hostfile, repeated

_DESCRIPTION = """\
Start copies of a program, on this host or on many, and join them to one group: in each, rt.init() finds its rank and its peers."""

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
  rt.launch --hosts node1,me@node2 -n 2 train.py     two ranks on each host, by ssh; the script lies in the same place on all
  rt.launch --hostfile hosts.json train.py      the same for a list of hosts that mlx.distributed_config writes, too
  rt.launch --hosts node1,node2 --sync-code . train.py     copy this folder to the same place on all hosts first (rsync)

Hosts are names that your ssh knows, addresses, or localhost, which needs no ssh. All are looked at before anything is started: one table
says what is wrong where, on stderr; with --json it is an object on stdout. Ranks end with the connection: when it, the launcher or the
network goes, they are gone within 5 seconds.

Lines of the ranks are shown as "[rank] line", or "[rank host] line", stdout and stderr apart; a line without an end, such as a prompt, is
shown after 50 ms.
What is typed or piped in goes to every rank, with its end; a rank that reads nothing while others wait loses its input after 5 seconds.

When a rank fails the others get SIGTERM, and SIGKILL 5 seconds later; the last line says which rank it was, after the last lines it wrote
to stderr. Ctrl-C is handed to the ranks; a second one kills them. Whatever ends the launcher ends the ranks and their children.

exit code: 0 if all ranks returned 0, else that of the rank that failed first (128 plus the signal if one killed it, 255 if its host was
lost); 124 if --timeout ended the job; 2 if the command line is wrong or a host is not ready."""

_NO_PROGRAM = "no program given; expected for example: rt.launch -n 2 train.py"
PREFIXES = ("auto", "always", "never")
FAMILIES = ("NCCL_", "RT_", "MLX_", "OMP_", "CUDA_")  # of variables that go along to other hosts


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        hosts: per rank where it runs.
        command: the program; if all ranks run here, with what runs it in front. Relative to ``cwd`` if it has a folder in its name.
        python: interpreter for .py programs, and on other hosts for the supervisor.
        environment: what every rank is told besides: the hostfile's ``envs``, then ``--iface``, then ``--env``.
        backend: one of ``hostfile.BACKENDS``, "" if nobody chose one.
        mpi_args: words for MPI's launcher.
        starting_port: of the ring file or of jaccl's coordinator, None for free ones.
        travels: whether variables of some families go to other hosts.
        json: whether hosts that are not ready are shown as JSON.
        prefix: one of ``PREFIXES``; auto stands for always unless there is one rank only.
        timeout: seconds, or None.
    """

    hosts: tuple[Host, ...]
    command: list[str]
    python: str
    environment: dict[str, str]
    backend: str
    connections_per_ip: int
    starting_port: int | None
    nccl_port: int
    mpi_args: tuple[str, ...]
    travels: bool
    tty: bool
    sync_code: str | None
    json: bool
    prefix: str
    cwd: str | None
    log_dir: str | None
    timeout: float | None
    dry_run: bool
    verbose: bool

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def remote(self) -> bool:
        """Whether some ranks run elsewhere."""
        return not all(host.is_local for host in self.hosts)


def parse(argv: Sequence[str]) -> Options:
    """Check the command line; what is wrong is said on stderr and raises SystemExit(2), as does --print-python with 0."""
    parser, valued = _parser()
    ours, command = split(argv, valued)
    found = parser.parse_args(ours)
    if found.print_python:
        print(found.python)
        parser.exit()
    try:
        hostfile = _hosts(found)
        if found.sync_code is not None and not os.path.isdir(found.sync_code):
            raise ValueError(f"argument --sync-code: found {found.sync_code!r}, expected a folder that exists")
        backend = _backend(found.backend or hostfile.backend, found, hostfile)
        if all(host.is_local for host in hostfile.hosts):
            _checked_folder(found.cwd)
            command = executable(command, found.python, found.cwd)
        elif not command:
            raise ValueError(_NO_PROGRAM)
        iface = interfaces.asked(found.iface, {})  # the variable goes along by itself
        environment = dict(check_variable(entry, "envs") for entry in hostfile.envs)
        environment |= ({interfaces.VARIABLE: iface.text} if iface else {}) | dict(found.env)
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    return Options(
        hosts=hostfile.hosts,
        command=list(command),
        python=found.python,
        environment=environment,
        backend=backend,
        connections_per_ip=found.connections_per_ip,
        starting_port=found.starting_port,
        nccl_port=found.nccl_port,
        mpi_args=tuple(word for words in found.mpi_arg for word in shlex.split(words)),
        travels=not found.no_env,
        tty=found.tty,
        sync_code=found.sync_code,
        json=found.json,
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
        usage="rt.launch -n N [options] [--] program [args ...]\n       rt.launch --hosts A,B [-n N] [options] [--] program [args ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", "--repeat-hosts", dest="n", type=_count, metavar="N", help="number of ranks; with hosts: on each of them (default there: 1)")
    add("--hosts", metavar="A,B", help="names or addresses to reach by ssh, user@ in front if wanted; localhost needs no ssh")
    add("--hostfile", metavar="F.json", help='a list of hosts such as {"ssh": "node1", "ips": ["10.0.0.1"]}, or an object with "hosts"')
    add("--backend", metavar="B", help=f"one of {', '.join(BACKENDS)} (default: the hostfile's, else nccl if all can, else ring)")
    add("--python", default=sys.executable, metavar="PY", help="interpreter for .py programs, on all hosts (default: this one)")
    add("--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="for every rank; repeatable")
    add("--no-env", action="store_true", help=f"keep the variables {', '.join(f'{family}*' for family in FAMILIES)} from other hosts")
    add("--cwd", metavar="DIR", help="folder to run in, on all hosts; the program's name is looked up from there")
    add("--sync-code", metavar="DIR", help="copy this folder to the same place on all hosts first, with rsync")
    add("--iface", metavar="WHICH", help="where ranks are reached: eth (begin so), =en2,en3, ^eth0 (not), 10.0.0.0/8; RT_SOCKET_IFNAME")
    add("--connections-per-ip", type=_count, default=1, metavar="N", help="ring: sockets between two ranks, for each address")
    add("-p", "--starting-port", type=_port, metavar="P", help="ring: ports P, P + 1, ... in place of free ones; jaccl: the coordinator's")
    add("--nccl-port", type=_port, default=12345, metavar="P", help="nccl: the port of rank 0 (default 12345)")
    add("--mpi-arg", action="append", default=[], metavar="ARGS", help="mpi: more words for mpirun; repeatable")
    add("--tty", action="store_true", help="give each rank a terminal, with stdout and stderr together")
    add("--prefix", type=_prefix, default="auto", metavar="WHEN", help='"[rank] " before lines: always, never, or auto: unless -n 1')
    add("--log-dir", metavar="DIR", help="also write DIR/rankN.out and .err, without prefix; old files of these names are overwritten")
    add("--timeout", type=_seconds, metavar="SECONDS", help="end the job as failed, with exit code 124, if it takes longer")
    add("--dry-run", action="store_true", help="show the commands and variables in place of starting anything")
    add("--json", action="store_true", help="hosts that are not ready: what was found there and what to do, as JSON on stdout")
    add("--print-python", action="store_true", help="show which interpreter would be used, and end")
    add("--verbose", action="store_true", help="say what is started, with which settings, and how it ended")
    return parser, [name for action in parser._actions if action.nargs is None for name in action.option_strings]


def _checked(text: str, good: bool, expected: str) -> str:
    if not good:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return text


def _count(text: str) -> int:
    return int(_checked(text, text.isdecimal() and int(text) > 0, "a number of ranks from 1 up"))


def _variable(text: str) -> tuple[str, str]:
    try:
        return check_variable(text, "--env")
    except ConfigError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE") from None


def _port(text: str) -> int:
    return int(_checked(text, text.isdecimal() and 0 < int(text) < 65536, "a port from 1 to 65535"))


def _prefix(text: str) -> str:
    return _checked(text, text in PREFIXES, "auto, always or never")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    _checked(text, 0 < seconds < math.inf, "a number of seconds above 0")
    return seconds


def _hosts(found: argparse.Namespace) -> Hostfile:
    """Return the hosts, each as often as ``-n`` says."""
    if found.hosts is not None and found.hostfile is not None:
        raise ValueError("--hosts and --hostfile: found both, expected one of them")
    if found.hostfile is not None:
        hostfile = read_hostfile(found.hostfile)
        return Hostfile(repeated(hostfile.hosts, found.n or 1), hostfile.backend, hostfile.envs)
    if found.hosts is not None:
        return Hostfile(parse_hosts(found.hosts, found.n or 1))
    if found.n is None:
        raise ValueError("the following arguments are required: -n, --hosts or --hostfile")
    return Hostfile(parse_hosts("localhost", found.n))


def _backend(backend: str, found: argparse.Namespace, hostfile: Hostfile) -> str:
    if backend and backend not in BACKENDS:
        raise ValueError(f"argument --backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "mpi":
        for given, option in ((found.prefix == "always", "--prefix"), (found.log_dir, "--log-dir"), (found.tty, "--tty")):
            if given:
                raise ValueError(f"{option}: not with --backend mpi, whose mpirun shows what ranks write; --mpi-arg passes on its options")
    elif found.mpi_arg:
        raise ValueError(f"argument --mpi-arg: found {found.mpi_arg[0]!r} without --backend mpi, expected none")
    if backend.startswith("jaccl"):
        _check_rdma(hostfile.hosts, ring=backend == "jaccl-ring")
    return backend


def _check_rdma(hosts: Sequence[Host], *, ring: bool) -> None:
    """See that every rank has a device towards every other one, or, on a ring, towards its neighbours."""
    size = len(hosts)
    for rank, host in enumerate(hosts):
        where = f"--backend jaccl: host [{rank}] ({host.ssh})"
        if len(host.rdma) != size:
            raise ValueError(f'{where}: "rdma": found {len(host.rdma)} entries, expected {size}: one for each rank')
        for peer, device in enumerate(host.rdma):
            wanted = peer in ((rank - 1) % size, (rank + 1) % size) if ring else True
            if peer == rank and device is not None:
                raise ValueError(f'{where}: "rdma"[{peer}]: found {device!r}, expected null: that is the host itself')
            if peer != rank and wanted and not device:
                raise ValueError(f'{where}: "rdma"[{peer}]: found no device, expected the one that leads to {hosts[peer].ssh}')


def _checked_folder(folder: str | None) -> None:
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"argument --cwd: found {folder!r}, expected a folder that exists")


def executable(command: Sequence[str], python: str, cwd: str | None) -> list[str]:
    """Return the command with what runs it in front; ValueError says what is missing, before anything has been started."""
    if not command:
        raise ValueError(_NO_PROGRAM)
    folder = cwd or ""
    if not command[0].endswith(".py"):
        return [_found("program", command[0], folder), *command[1:]]
    if not os.path.isfile(os.path.join(folder, command[0])):
        raise ValueError(f"program {command[0]!r} not found{_in(folder, command[0])}: no such file")
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
        raise ValueError(f"{what} {name!r} not found{_in(folder, name)}: no such executable file")
    return name


def _in(folder: str, name: str) -> str:
    return f" in {folder!r}" if folder and not os.path.isabs(name) else ""
