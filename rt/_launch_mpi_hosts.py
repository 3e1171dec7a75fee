"""What ``rt.launch --backend mpi`` finds on each host before MPI's own launcher starts anything there.

May live here: both ends of one question to each host (``python -m rt._launch_mpi_hosts`` is the far one), and what is wrong where. May not:
the launcher's command line (``_launch_mpi``), hosts of jobs that we start ourselves (``_launch_hosts``).

MPI's launchers say little about a host on which they fail, and wait for ever for a password.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rt
from rt import _ssh
from rt._frames import MARK
from rt._launch_hosts import READY_SECONDS, Row, advice, explain_python
from rt._launch_options import Options, executable
from rt._launch_plan import crews
from rt._launch_ranks import cores
from rt._mpirun import Launcher, identify

_PROGRAM = ("-P", "-m", "rt._launch_mpi_hosts")


class Found(NamedTuple):
    """What all hosts are like.

    Attributes:
        rows: what is wrong where, and what to do about it.
        address: ours, as they see it; "" if no other host is among them.
        cores: for each rank, where there are fewest.
    """

    rows: list[Row]
    address: str
    cores: int


def look(options: Options, launcher: Launcher, told: Mapping[str, str]) -> Found:
    """Ask all hosts at once whether the job can start there.

    Args:
        options: the command line.
        launcher: which every host must have in the same place and version.
        told: variables that ranks will have.
    """
    crewed = crews(options.hosts)
    question = {"command": options.command, "cwd": options.cwd or os.getcwd(), "launcher": launcher.path, "environment": dict(told)}
    answers = _ssh.ask([crew.host for crew in crewed], [options.python, *_PROGRAM], json.dumps(question).encode(), READY_SECONDS)
    found = Found([], "", sys.maxsize)
    for crew, answer in zip(crewed, answers, strict=True):
        _, mark, said = answer.out.partition(MARK)
        if not mark:
            found.rows.append((crew.host.name, *_unanswered(answer, options.python)))
            continue
        about = json.loads(said)
        found.rows.extend((crew.host.name, *problem) for problem in _problems(about, launcher, options.python))
        found = found._replace(
            address=found.address or about.get("client", ""), cores=min(found.cores, about.get("cores", 1) // len(crew.ranks))
        )
    return found


def _unanswered(answer: _ssh.Answer, python: str) -> tuple[str, str]:
    if answer.code is None:
        return f"no answer for {READY_SECONDS:g} seconds", f"try `ssh {answer.host.ssh} true`"
    if answer.code == _ssh.FAILED:
        return _ssh.explain(answer.host, answer.err)
    return explain_python(python, answer.err, answer.code)


def _problems(about: Mapping[str, Any], launcher: Launcher, python: str) -> list[tuple[str, str]]:
    if about["version"] != rt.__version__:
        return [(f"rt {about['version']}, here {rt.__version__}", f"`{python} -m pip install rt-collectives=={rt.__version__}` there")]
    found = [(problem, advice(problem)) for problem in about["problems"]]
    here, there = launcher.name, about["launcher"]
    if there is None:
        found.append((f"no {launcher.path}, here {here}", "MPI's launcher needs the same MPI in the same place on all hosts"))
    elif there != here:
        found.append((f"{launcher.path} is {there or 'of an unknown MPI'}, here {here}", "install the same version on all hosts"))
    if about["missing"]:
        why, _, how = re.sub(r"[:;] (?=`pip)", "\n", about["missing"], count=1).partition("\n")
        found.append((f"backend mpi, {why}", how))
    elif about["library"] and not _fit(about["library"], launcher):
        found.append((f"the MPI library is {about['library']}, the launcher {here}", "set RT_MPI_LIBNAME to the libmpi of that launcher"))
    return found


def _fit(library: str, launcher: Launcher) -> bool:
    """Say whether ranks with this library find each other under this launcher; any release of MPICH, and patches of Open MPI, do."""
    vendor, _, version = library.rpartition(" ")
    if vendor != "Open MPI" or not launcher.version:
        return launcher.vendor in ("", vendor)
    return launcher.vendor == vendor and launcher.version.split(".")[0] == version.split(".")[0]


# --- there -------------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer the question on stdin: what this host is like, and what keeps the program from running."""
    from transports import mpi

    asked = json.load(sys.stdin)
    environ = {**os.environ, **asked["environment"]}
    client, *_ = [*os.environ.get("SSH_CONNECTION", "").split(), ""]
    problems = _wrong_with(asked["command"], asked["cwd"])
    launcher = identify(asked["launcher"], environ) if os.access(asked["launcher"], os.X_OK) else None
    about = {
        "version": rt.__version__,
        "client": client,
        "cores": cores(),
        "problems": problems,
        "launcher": launcher.name if launcher else None,
        "missing": mpi.missing(environ),
        "library": mpi.library(environ),
    }
    sys.stdout.buffer.write(MARK + json.dumps(about).encode())


def _wrong_with(command: Sequence[str], folder: str) -> list[str]:
    if not os.path.isdir(folder):  # where MPI's launcher would start the ranks, or, of some versions, elsewhere without a word
        return [f"--cwd {folder!r}: no such folder"]
    try:
        executable(command, sys.executable, folder)
    except ValueError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    main()
