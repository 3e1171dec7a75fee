"""``rt.launch --backend mpi``: MPI's own launcher starts the ranks, and takes this one's place.

May live here: its command line and environment, and becoming it. May not: finding it (``_mpirun``), what is looked at on other hosts before
(``_launch_mpi_hosts``), the options of ``rt.launch`` (``_launch_options``), what ranks do with MPI (``transports.mpi``).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping

from rt._launch_hosts import as_json, table, verdict
from rt._launch_mpi_hosts import Found, look
from rt._launch_options import Options
from rt._launch_plan import crews, program, travelling
from rt._launch_ranks import THREADS, environment
from rt._mpirun import Launcher, find, installed, library
from rt.errors import ConfigError

_OF_MLX = "MLX_MPI_LIBNAME"
_HERE = Found([], "", 0)  # nobody needs to be asked
# By default every host starts those on the next ones where there are many (above 64 in Open MPI 5): each would have to reach each by ssh.
_ONE_STARTS_ALL = {"4": "OMPI_MCA_plm_rsh_no_tree_spawn", "5": "PRTE_MCA_plm_ssh_no_tree_spawn"}
_HALVES = "coll_libnbc_iallreduce_algorithm"
# Open MPI 5's Iallreduce, which awaited calls are, by itself sends all to rank 0 and back where ranks are fewer than four. Of algorithms
# number 3, Rabenseifner's, exchanges halves; with more ranks it goes round a ring where a rank has less than an item.
EXCHANGE_HALVES = ("--mca", _HALVES, "3")
FEW = (2, 3)


def start(options: Options) -> int:
    """Become the launcher of MPI. Returns only what ``rt.launch`` exits with when nothing is started."""
    try:
        _check_names(options)
        launcher = find(options.python, {**os.environ, **options.environment})
        options = _with_library(options, launcher)
    except ConfigError as error:
        print(f"rt.launch: {error}", file=sys.stderr)
        return 2
    found = look(options, launcher, _told(options, os.environ)) if options.remote and not options.dry_run else _HERE
    if found.rows:
        failure = verdict(found.rows, len(crews(options.hosts)))
        print(as_json(failure, found.rows) if options.json else table(found.rows), file=sys.stdout if options.json else sys.stderr)
        print(f"rt.launch: {failure}", file=sys.stderr)
        return 2
    words, environ = command(options, launcher, found), variables(options, launcher, found, os.environ)
    if options.verbose or options.dry_run:
        print(shlex.join(words), file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if options.dry_run:
        return 0
    if options.cwd is not None:
        os.chdir(options.cwd)
    os.execve(words[0], words, environ)


def _with_library(options: Options, launcher: Launcher) -> Options:
    """Add which library MLX is to load, unless the user says so: it takes the first it finds, and where two MPIs are that one is alone."""
    known = {**os.environ, **options.environment}
    name = library(launcher, known)
    if _OF_MLX in known or not name:
        return options
    return dataclasses.replace(options, environment={_OF_MLX: name, **options.environment})


def _check_names(options: Options) -> None:
    """See that MPI's launcher can be told the hosts: it takes names with a colon and a number behind, and nothing else."""
    for host in options.hosts:
        if options.remote and "@" in host.ssh:
            raise ConfigError(
                f"--backend mpi: found the user in {host.ssh!r}, expected a name alone, since mpirun takes no other: "
                f"put `Host {host.name}` and `User {host.ssh.rpartition('@')[0]}` into ~/.ssh/config"
            )
        if options.remote and ":" in host.name:
            raise ConfigError(
                f"--backend mpi: found the address {host.name!r}, expected a name or an IPv4 address, since mpirun takes no colon: "
                "put a `Host` with it as `HostName` into ~/.ssh/config"
            )


def command(options: Options, launcher: Launcher, found: Found) -> list[str]:
    """Return the launcher's command line; the words of ``--mpi-arg`` stand last, before the program."""
    words = [launcher.path, "-n", str(options.size)]
    names = [host.name for host in options.hosts]
    hosts = ",".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names))
    told = sorted(_told_elsewhere(options, found, os.environ))
    if launcher.vendor == "Open MPI":
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        words += ["--timeout", str(int(options.timeout))] if options.timeout is not None else []
        if options.remote:
            words += ["--host", hosts, *(word for name in told for word in ("-x", name))]
        if options.size in FEW and launcher.version.startswith("5") and not _chosen(options):
            words += EXCHANGE_HALVES
        if (options.remote or options.size > (os.cpu_count() or 1)) and "--map-by" not in options.mpi_args:
            words += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    elif options.remote:
        words += ["-hosts", hosts, "-genvlist", ",".join(told)]
        if found.address and not {"-localhost", "-iface"} & set(options.mpi_args):  # else they would look for us by our hostname
            words += ["-localhost", found.address]
    return [*words, *options.mpi_args, *program(options)]


def _chosen(options: Options) -> bool:
    """Say whether the user has told Open MPI by which algorithm to reduce."""
    return _HALVES in options.mpi_args or f"OMPI_MCA_{_HALVES}" in {**os.environ, **options.environment}


def variables(options: Options, launcher: Launcher, found: Found, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's environment, which ranks of this host inherit."""
    told = _told_elsewhere(options, found, inherited) if options.remote else _told(options, {})
    environ = installed(launcher.path, environment(inherited, told, options.size))
    if launcher.vendor == "Open MPI":
        environ.setdefault(_ONE_STARTS_ALL["4" if launcher.version.startswith("4") else "5"], "1")
    elif options.timeout is not None:
        environ["MPIEXEC_TIMEOUT"] = str(int(options.timeout))
    return environ


def _told(options: Options, inherited: Mapping[str, str]) -> dict[str, str]:
    return {**travelling(options, inherited), "RT_BACKEND": "mpi", **options.environment}


def _told_elsewhere(options: Options, found: Found, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that go along to other hosts."""
    threads = {name: str(max(1, found.cores)) for name in THREADS} if found.cores else {}
    return threads | _told(options, inherited)
