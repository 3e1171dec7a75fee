"""Programs on other hosts, through the system's ``ssh`` and the user's own configuration of it.

May live here: the command line of ssh, asking many hosts at once, and what ssh's own failures mean. May not: what is asked, or started.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rt.hostfile import Host

CONNECT_SECONDS = 5
FAILED = 255  # the exit code of ssh for failures of its own
SILENCE_SECONDS = 3  # after which a host that does not answer has gone

OPTIONS = (
    *("-T", "-x", "-a"),  # no terminal, X11 or agent on the other side: a job needs none
    *("-o", "BatchMode=yes"),  # whoever would be asked a question sits nowhere
    *("-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=1", "-o", f"ServerAliveCountMax={SILENCE_SECONDS}"),
    *("-o", "ControlMaster=no"),  # a connection of the user's may be shared, but ours ends with us
    *("-o", "RemoteCommand=none", "-o", "PermitLocalCommand=no", "-o", "ClearAllForwardings=yes"),  # what is for when a person logs in
    *("-o", "EscapeChar=none", "-o", "LogLevel=INFO"),
)

_ADVICE = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "the host's key has changed: see `ssh {name}`, and `ssh-keygen -R` if it was meant to"),
    ("Host key verification failed|No .* host key is known", "ssh does not know this host's key: connect by hand: `ssh {name}`"),
    (r"Permission denied|Too many authentication failures", "it asks for a password: `ssh-copy-id {name}`, or load a key: `ssh-add`"),
    ("Could not resolve hostname", "no such name: correct it, or add it to ~/.ssh/config"),
    ("Connection refused", "nothing listens there: start sshd, or correct its port"),
    ("timed out|No route to host|Network is unreachable|Host is down", "no answer: is it on, and past the firewall?"),
)


@dataclass(frozen=True)
class Answer:
    """What became of a program on a host.

    Attributes:
        host: where.
        code: the exit code; 255 where ssh itself failed, minus the signal's number if one killed the program or ssh, None if time ran out.
        out: its stdout.
        err: its stderr, and ssh's.
    """

    host: Host
    code: int | None
    out: bytes
    err: bytes


def command(host: Host, program: Sequence[str]) -> list[str]:
    """Return the command line that runs ``program`` on ``host``; a local one runs it directly.

    The login shell of the user, whichever it is, gets one line in which each word is quoted.
    """
    return list(program) if host.is_local else ["ssh", *OPTIONS, "--", host.ssh, shlex.join(program)]


def ask(
    hosts: Sequence[Host], program: Sequence[str] | Callable[[Host], Sequence[str]], input: bytes = b"", timeout: float = 30.0
) -> list[Answer]:
    """Run a program on all hosts at once and return what each answered, in the order of ``hosts``.

    Args:
        hosts: where; one that is there twice is asked twice.
        program: the words of its command line, or what makes them of a host.
        input: its stdin.
        timeout: seconds for each; what runs longer is killed on this side, and on the other it gets an end of file.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as threads:
        return list(threads.map(lambda host: _ask(host, program(host) if callable(program) else program, input, timeout), hosts))


def _ask(host: Host, program: Sequence[str], input: bytes, timeout: float) -> Answer:
    try:
        # In our session: Ctrl-C ends all of them with us.
        done = subprocess.run(command(host, program), input=input, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        return Answer(host, None, late.stdout or b"", late.stderr or b"")
    except OSError as error:  # no ssh here; a local program that is not there: what a shell would say
        return Answer(host, 127, b"", f"{error.filename}: {error.strerror}".encode())
    return Answer(host, done.returncode, done.stdout, done.stderr)


def explain(host: Host, err: bytes) -> tuple[str, str]:
    """Say what ssh found and what to do about it, when it ended with ``FAILED``; two short texts."""
    lines = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    text = "\n".join(lines)
    found = lines[-1] if lines else "ssh failed and said nothing"
    for pattern, advice in _ADVICE:
        if match := re.search(pattern, text):
            said = next(line for line in lines if match[0].splitlines()[0] in line)
            return said, advice.format(name=host.ssh)
    return found, f"try `ssh {host.ssh} true`"
