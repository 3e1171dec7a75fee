"""``rt.launch --sync-code``: a folder is copied to the same place on all other hosts before anything is looked at there.

May live here: rsync, and what its failures mean. May not: what is launched afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from rt import _ssh
from rt.hostfile import Host

Row = tuple[str, str, str]


def sync(folder: str, hosts: Sequence[Host], *, verbose: bool) -> list[Row]:
    """Copy a folder to each host that is not local, all at once; what is on a host only stays there.

    Returns:
        For each host that has no copy its name, what was found, and what to do.
    """
    folder = os.path.abspath(folder)
    far = list({host.ssh: host for host in hosts if not host.is_local}.values())
    if verbose or os.isatty(2):
        print(f"rt.launch: copying {folder} to {', '.join(host.name for host in far)}", file=sys.stderr)
    made = _ssh.ask(far, ["mkdir", "-p", folder])
    rows = [_explain(answer.host, answer.code, answer.err) for answer in made if answer.code != 0]
    ready = [answer.host for answer in made if answer.code == 0]
    copying = [(host, _start(folder, host)) for host in ready]
    try:
        for host, process in copying:
            if process is None:
                rows.append((host.name, "no rsync here", "install rsync on all hosts"))
                continue
            error = process.communicate()[1]
            if process.returncode:
                rows.append(_explain(host, process.returncode, error))
    finally:
        for _, process in copying:
            if process is not None:
                process.kill()
                process.wait()
    return rows


def _start(folder: str, host: Host) -> subprocess.Popen[bytes] | None:
    user, at, name = host.ssh.rpartition("@")
    there = f"{user}{at}[{name}]" if ":" in name else host.ssh
    shell = " ".join(["ssh", *_ssh.OPTIONS])
    command = ["rsync", "--archive", "-s", "--timeout=30", "-e", shell, "--", f"{folder}/", f"{there}:{folder}/"]
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except FileNotFoundError:
        return None


def _explain(host: Host, code: int | None, error: bytes) -> Row:
    if code == _ssh.FAILED:
        return host.name, *_ssh.explain(host, error)
    lines = [line.strip() for line in error.decode(errors="replace").splitlines() if line.strip()]
    if re.search(r"rsync: (command )?not found|rsync: No such file", "\n".join(lines)):
        return host.name, "no rsync there", "install rsync on all hosts"
    return host.name, lines[0] if lines else f"rsync ended with code {code}", "see whether you may write to that folder there"
