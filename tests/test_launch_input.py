"""The launcher's stdin: every rank reads all of it, from pipes, files and terminals.

May live here: tests of ``rt._launch_input``, with and without a launcher. May not: output for its own sake, groups and collectives; the
ranks here are small scripts that never import ``rt``, so that a failure is the launcher's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import signal
import subprocess
from pathlib import Path

import pytest
from launching import PATIENCE, PREAMBLE, WAIT_FOR_EVER, Terminal, environment, last_line, launch, launcher, lines, linux, running

from rt._launch_input import LIMIT_BYTES, Feed, Input

DIGEST = "import hashlib\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_reads_all_and_its_end(size: int, script: Path) -> None:
    script.write_text(PREAMBLE + "print(sys.stdin.read().split())")
    done = launch("-n", str(size), str(script), stdin="some\nwords")
    shown = [f"[{rank}] " if size > 1 else "" for rank in range(size)]
    assert sorted(done.stdout.splitlines()) == [f"{prefix}['some', 'words']" for prefix in shown]


@pytest.mark.parametrize("source", ["pipe", "file"])
def test_binary_input_arrives_unchanged(source: str, script: Path, tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    (tmp_path / "content").write_bytes(content)
    with running(script, DIGEST, size=3) as process:
        if source == "pipe":
            output = process.communicate(content, timeout=PATIENCE)[0].decode()
        else:
            with open(tmp_path / "content", "rb") as file:
                command = launcher("-n", "3", str(script))
                output = subprocess.run(command, stdin=file, capture_output=True, env=environment(), timeout=PATIENCE, text=True).stdout
    assert sorted(output.splitlines()) == [f"[{rank}] {hashlib.sha256(content).hexdigest()}" for rank in range(3)]


def test_input_arrives_line_by_line(script: Path) -> None:
    with running(script, "for line in sys.stdin: print(line.strip())") as process:
        assert process.stdin is not None
        for word in ("one", "two"):
            process.stdin.write(f"{word}\n".encode())
            assert lines(process, 2) == [f"[0] {word}\n", f"[1] {word}\n"]
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0


def test_a_rank_that_closed_its_stdin_is_skipped(script: Path) -> None:
    content = os.urandom(3_000_000)
    with running(script, "if rank == 0: os.close(0); print('closed'); signal.pause()\n" + DIGEST.replace("\n", "; ")) as process:
        assert process.stdin is not None
        lines(process, 1)
        process.stdin.write(content)
        process.stdin.close()
        assert lines(process, 1) == [f"[1] {hashlib.sha256(content).hexdigest()}\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_a_rank_that_does_not_read_holds_the_others_back_for_a_while_only(script: Path) -> None:
    content = os.urandom(5_000_000)
    with running(script, "if rank == 0: signal.pause()\n" + DIGEST, grace=0.5) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(content)
        process.stdin.close()
        assert lines(process, 1) == [f"[1] {hashlib.sha256(content).hexdigest()}\n"]
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith(b"rt.launch: rank 0 has not read its stdin for 0.5 seconds, and others wait for theirs")
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_input_that_nobody_reads_is_left_where_it_is(script: Path) -> None:
    with running(script, "print('ready')\n" + WAIT_FOR_EVER, grace=0.5) as process:
        assert process.stdin is not None and process.stderr is not None
        lines(process, 2)
        os.set_blocking(process.stdin.fileno(), False)
        taken = 0
        while select.select([], [process.stdin], [], 1)[1]:  # a whole second without room, twice the time for which others may wait
            taken += os.write(process.stdin.fileno(), b"x" * 4096)
            assert taken < 2 * LIMIT_BYTES
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert process.stderr.read() == b"rt.launch: stopped by SIGTERM\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files(closed: str, script: Path, tmp_path: Path) -> None:
    source = f"open(f'{tmp_path}/{{rank}}', 'w').write(repr(sys.stdin.read()))\nprint('out')\nprint('err', file=sys.stderr)"
    script.write_text(PREAMBLE + source)
    line = f'"$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *launcher("-n", "2", str(script))],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        timeout=PATIENCE,
        text=True,
    )
    assert done.returncode == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["''", "''"]
    assert sorted(done.stdout.splitlines()) == ([] if ">&- " in f"{closed} ".replace("2>&-", "") else ["[0] out", "[1] out"])
    assert sorted(done.stderr.splitlines()) == ([] if "2>&-" in closed else ["[0] err", "[1] err"])


# --- terminals -----------------------------------------------------------------------------------------------------------------------

PROMPT = """
for _ in range(2): print("you said", input("what? "))
"""


def test_prompts_on_a_terminal(script: Path) -> None:
    script.write_text(PREAMBLE + PROMPT)
    with Terminal(*launcher("-n", "3", str(script))) as terminal:
        terminal.until(r"\[\d\] what\? ", 3)
        terminal.type("hello\n")
        shown = terminal.until(r"\[\d\] what\? ", 3)
        assert shown.startswith("hello\r\n")  # the terminal's echo has ended the prompt's line: nobody need do it again
        assert sorted(line for line in shown.splitlines() if "said" in line) == [f"[{rank}] you said hello" for rank in range(3)]
        terminal.type("bye\n")
        terminal.until(r"\[\d\] you said bye\r\n", 3)
        assert terminal.process.wait(PATIENCE) == 0


def test_the_end_of_input_on_a_terminal(script: Path) -> None:
    script.write_text(PREAMBLE + "print('ready')\nprint('read', repr(sys.stdin.read()))")
    with Terminal(*launcher("-n", "2", str(script))) as terminal:
        terminal.until("ready", 2)
        terminal.type("word\n\x04")
        terminal.until(r"\[\d\] read 'word\\n'", 2)
        assert terminal.process.wait(PATIENCE) == 0


def test_control_c_on_a_terminal(script: Path) -> None:
    script.write_text(PREAMBLE + "signal.signal(signal.SIGINT, signal.SIG_DFL)\nprint('ready')\n" + WAIT_FOR_EVER)
    with Terminal(*launcher("-n", "2", str(script))) as terminal:
        terminal.until("ready", 2)
        terminal.type("\x03")
        assert last_line(terminal.until("stopped by SIGINT\r\n")) == "rt.launch: stopped by SIGINT"
        assert terminal.process.wait(PATIENCE) == 130


# What a process may do to a terminal that it reads: a rank that were stopped by SIGTTIN or SIGTTOU would never say so.
ALONE = """
import termios, tty
print("session", os.getsid(0) == os.getsid(os.getppid()), "group", os.getpgrp() == os.getpid())
try: os.open("/dev/tty", os.O_RDWR)
except OSError: print("no controlling terminal")
tty.setcbreak(0)
print("ready")
print("read", os.read(0, 1))
"""


@linux
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_our_session_and_are_not_stopped_by_its_terminal(size: int, script: Path) -> None:
    """Linux shares the processor between sessions first, and only then between what runs in them."""
    script.write_text(PREAMBLE + (ALONE if size == 1 else ALONE.replace("tty.setcbreak(0)\n", "")))
    with Terminal(*launcher("-n", str(size), str(script))) as terminal:
        shown = terminal.until("ready", size)
        assert len(re.findall("session True group True", shown)) == len(re.findall("no controlling terminal", shown)) == size
        terminal.type("x" if size == 1 else "x\n")
        terminal.until("read b'x'", size)


SUSPENDED = "print('ready')\nos.kill(0, signal.SIGTSTP)\nprint('went on')\n"


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_that_suspends_itself_goes_on(size: int, script: Path) -> None:
    """Nobody else would continue it, as a shell knows only the launcher."""
    script.write_text(PREAMBLE + SUSPENDED)
    done = launch("-n", str(size), str(script))
    assert (done.returncode, done.stdout.count("went on")) == (0, size)


def test_a_lone_rank_that_suspends_itself_suspends_the_launcher(script: Path) -> None:
    """As Ctrl-Z in an editor does: the shell has the terminal until it is told ``fg``."""
    script.write_text(PREAMBLE + SUSPENDED + "print('read', input())\n")
    shell = 'set -m; "$@"; echo code $?; read word; echo shell read $word; fg; echo code $?'
    with Terminal("bash", "-c", shell, "bash", *launcher("-n", "1", str(script))) as terminal:
        terminal.until(r"code 148\r\n")
        terminal.type("mine\n")
        terminal.until(r"shell read mine\r\n(.|\n)*went on\r\n")
        terminal.type("its\n")
        terminal.until(r"read its\r\n(.|\n)*code 0\r\n")


@linux
def test_in_the_background_the_terminal_is_not_ours(script: Path, tmp_path: Path) -> None:
    """The launcher neither stops (as whoever reads the terminal from the background does) nor takes what is typed for others."""
    done = tmp_path / "done"
    for rank in range(2):  # one each: opening waits for the other end, and a pipe with two readers lets go when the first is there
        os.mkfifo(f"{done}{rank}")
    script.write_text(PREAMBLE + f"print('ready')\nopen({str(done)!r} + str(rank)).read()")
    shell = f'set -m; "$@" & read word; echo read $word; echo > {done}0; echo > {done}1; wait $!; echo code $?'
    with Terminal("bash", "-c", shell, "bash", *launcher("-n", "2", str(script))) as terminal:
        terminal.until("ready", 2)
        terminal.type("mine\n")
        terminal.until("read mine\r\n(.|\n)*code 0\r\n")


# --- without a launcher --------------------------------------------------------------------------------------------------------------


def test_the_slowest_sets_the_pace_until_others_have_waited_long_enough() -> None:
    reader, writer = os.pipe()
    pipes = [os.pipe() for _ in range(2)]
    said: list[str] = []
    source = Input(reader, [Feed(rank, os.fdopen(end, "wb", 0)) for rank, (_, end) in enumerate(pipes)], 5.0, said.append)
    quick, slow = source.feeds
    os.set_blocking(writer, False)
    while source.wanted():
        os.write(writer, b"x" * 4096)
        source.read()
        while source.has_more_for(quick):  # the quick one reads what it gets, the slow one nothing
            source.write(quick)
            os.read(pipes[0][0], 1 << 16)
    now = slow.moved + 100
    assert source.due(now) == now + 5.0  # others wait from now on, however long the slow one has taken nothing before
    source.attend(now + 4.9)
    assert not said and not source.wanted()
    source.attend(now + 5.0)
    assert said == [
        f"rank 1 has not read its stdin for 5 seconds, and others wait for theirs: it gets no more, {LIMIT_BYTES} bytes are lost to it"
    ]
    assert (source.wanted(), source.due(now + 6), slow.pipe.closed) == (True, None, True)
    quick.pipe.close()
    for end in (reader, writer, source.fd, pipes[0][0], pipes[1][0]):
        os.close(end)
