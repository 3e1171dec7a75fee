"""``rt.launch``: start the ranks of a job, show what they write, and end them all together.

May live here: the way from a command line to an exit code, in outline. May not: the parts. The command line is in ``_launch_options``, who
is told what in ``_launch_plan``, the loop in ``_launch_job``, processes in ``_launch_ranks``, what they write and read in ``_forward`` and
``_launch_input``, what is left when the launcher itself is killed in ``_launch_guard``, and the backend that nobody named in
``_launch_backend``. Other hosts: ``_launch_hosts`` looks at them together, ``_launch_link`` is the connection to one, and ``_supervisor``
is at its far end. MPI's own launcher: ``_launch_mpi``. What is shown in place of all this: ``_launch_dry``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rt._launch_dry import dry_run
from rt._launch_hosts import as_json, table
from rt._launch_job import Job
from rt._launch_options import Options, parse
from rt._launch_sync import sync
from rt.errors import ConfigError

GRACE = 5.0  # seconds between asking a process to end and killing it


def main(argv: Sequence[str] | None = None, *, grace: float = GRACE) -> int:
    """Run the launcher and return its exit code; wrong usage raises SystemExit(2).

    It takes over the signal handlers and the children of the process, so it is for processes that do nothing else.

    Args:
        argv: the command line without the program's name; None stands for ``sys.argv[1:]``.
        grace: seconds from asking a rank to end to killing it, and until one that does not read its input is left behind (for tests).
    """
    _open_standard_files()
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.sync_code is not None and not options.dry_run and not _synced(options.sync_code, options):
        return 2
    if options.backend == "mpi":
        from rt import _launch_mpi

        return _launch_mpi.start(options)
    if options.dry_run:
        try:
            print(*dry_run(options, os.environ), sep="\n")
        except ConfigError as error:
            print(f"rt.launch: {error}", file=sys.stderr)
            return 2
        return 0
    with Job(options, grace) as job:
        return job.run()


def _synced(folder: str, options: Options) -> bool:
    """Copy the folder, and say where that did not work; Ctrl-C ends it as it would end rsync."""
    try:
        rows = sync(folder, options.hosts, verbose=options.verbose)
    except KeyboardInterrupt:
        rows = [(folder, "stopped while copying", "copies may be incomplete")]
    if rows:
        failure = f"--sync-code {folder}: not copied everywhere, nothing was started"
        print(as_json(failure, rows) if options.json else table(rows), file=sys.stdout if options.json else sys.stderr)
        print(f"rt.launch: {failure}", file=sys.stderr)
    return not rows


def _open_standard_files() -> None:
    """Have something on 0, 1 and 2, where a shell's "<&-" closed them: else a socket of ours would get the number, and be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
