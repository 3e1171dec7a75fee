"""``rt.launch`` as its users meet it: real launchers, real ranks, real signals; and the cutting of output into lines.

May live here: tests of ``rt.launch`` and ``rt._forward``. May not: groups and collectives; the ranks here are small scripts that never
import ``rt``, so that a failure is the launcher's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rt.launch
from rt._forward import Sink, Stream
from rt.launch import _environment, _split

ROOT = str(Path(rt.launch.__file__).parents[1])
PATIENCE = 20.0  # seconds no test needs; a hang fails after them
linux = pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals, pidfds and /proc are Linux")

PREAMBLE = "import os, signal, sys\nrank = int(os.environ['RT_RANK'])\n"
WAIT_FOR_EVER = "while True: signal.pause()\n"


def launcher(*arguments: str, grace: float = 5.0) -> list[str]:
    return [sys.executable, "-c", f"import sys; from rt.launch import main; sys.exit(main(grace={grace}))", *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, **extra}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def launch(*arguments: str, grace: float = 5.0, **extra: str) -> subprocess.CompletedProcess[str]:
    command = launcher(*arguments, grace=grace)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(**extra), stdin=subprocess.DEVNULL)


def launch_source(script: Path, source: str, size: int = 2, grace: float = 5.0, **extra: str) -> subprocess.CompletedProcess[str]:
    script.write_text(PREAMBLE + source)
    return launch("-n", str(size), str(script), grace=grace, **extra)


@contextlib.contextmanager
def running(script: Path, source: str, size: int = 2, grace: float = 5.0) -> Iterator[subprocess.Popen[bytes]]:
    script.write_text(PREAMBLE + source)
    pipe = subprocess.PIPE
    command = launcher("-n", str(size), str(script), grace=grace)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().decode() for _ in range(count))


def last_line(text: str | bytes) -> str:
    return (text if isinstance(text, str) else text.decode()).splitlines()[-1]


# --- exit codes ----------------------------------------------------------------------------------------------------------------------


def test_all_ranks_succeed(script: Path) -> None:
    done = launch_source(script, "print('size', os.environ['RT_WORLD_SIZE'])", size=3)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0] size 3", "[1] size 3", "[2] size 3"]


@pytest.mark.parametrize("size", [1, 3])
def test_exit_code_is_the_failing_ranks(script: Path, size: int) -> None:
    done = launch_source(script, f"if rank == {size - 1}: sys.exit(3)\n" + WAIT_FOR_EVER, size=size)
    assert done.returncode == 3
    assert last_line(done.stderr) == f"rt.launch: rank {size - 1} exited with code 3"


def test_death_by_signal(script: Path) -> None:
    done = launch_source(script, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + WAIT_FOR_EVER)
    assert done.returncode == 128 + signal.SIGKILL
    assert last_line(done.stderr) == "rt.launch: rank 1 was killed by SIGKILL"


def test_traceback_comes_before_the_verdict(script: Path) -> None:
    done = launch_source(script, "if rank == 1: raise ValueError('loss is NaN')\n" + WAIT_FOR_EVER)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == ["[1] ValueError: loss is NaN", "rt.launch: rank 1 exited with code 1"]


def test_a_rank_that_ignores_sigterm_is_killed(script: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    source = f"""
if rank == 1:
    open({str(fifo)!r}).read()  # returns when rank 0 has closed it, ignoring by then
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(fifo)!r}, "w").close()
"""
    done = launch_source(script, source + WAIT_FOR_EVER, grace=0.2)
    assert done.returncode == 7
    assert re.search(r"^rt\.launch: killing rank 0 \(process \d+\), which has not ended$", done.stderr, re.MULTILINE)
    assert last_line(done.stderr) == "rt.launch: rank 1 exited with code 7"


# --- wrong usage ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: -n"),
        (["-n", "2"], "no program given; expected for example: rt.launch -n 2 train.py"),
        (["-n", "2", "--"], "no program given"),
        (["-n", "0", "true"], "argument -n: found '0', expected a number of ranks from 1 up"),
        (["-n", "-1", "true"], "argument -n: found '-1'"),
        (["-n", "two", "true"], "argument -n: found 'two'"),
        (["-n", "2", "--env", "NAME", "true"], "argument --env: found 'NAME', expected NAME=VALUE"),
        (["-n", "2", "--verb", "true"], "unrecognized arguments: --verb"),
        (["-n", "2", "no-such-program"], "program 'no-such-program' not found: not on PATH"),
        (["-n", "2", "./no-such-program"], "program './no-such-program' not found: no such executable file"),
        (["-n", "2", "no-such-script.py"], "program 'no-such-script.py' not found: no such file"),
        (["-n", "2", "--python", "no-such-python", __file__], "--python 'no-such-python' not found: not on PATH"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"rt.launch: error: {message}" in last_line(done.stderr)


def test_a_program_the_kernel_refuses(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x00neither a script nor a binary")
    program.chmod(0o755)
    done = launch("-n", "2", str(program))
    assert (done.returncode, last_line(done.stderr)) == (2, f"rt.launch: cannot start rank 0: {program}: Exec format error")


def test_help_teaches() -> None:
    done = launch("--help")
    assert done.returncode == 0
    assert "rt.launch -n 4 train.py" in done.stdout


@pytest.mark.parametrize(
    ("line", "ours", "command"),
    [
        ("-n 2 script.py --verbose -n 5", "-n 2", "script.py --verbose -n 5"),
        ("-n 2 --verbose -- script.py -- x", "-n 2 --verbose", "script.py -- x"),
        ("-n2 --env A=B --python=py -- -x", "-n2 --env A=B --python=py", "-x"),
        ("--help", "--help", ""),
    ],
)
def test_options_end_at_the_program(line: str, ours: str, command: str) -> None:
    assert _split(line.split()) == (ours.split(), command.split())


def test_arguments_reach_the_script_unchanged(script: Path) -> None:
    script.write_text("import sys; print(sys.argv[1:])")
    done = launch("-n", "2", str(script), "--verbose", "a b", "--", "$HOME")
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] ['--verbose', 'a b', '--', '$HOME']" for rank in range(2)]


# --- what ranks are given ------------------------------------------------------------------------------------------------------------


def test_variables(script: Path) -> None:
    source = "print(*(os.environ.get(name) for name in ('RT_WORLD_SIZE', 'RT_LOCAL_RANK', 'RT_LOCAL_SIZE', 'MLX_RANK', 'COLOR')))"
    script.write_text(PREAMBLE + source)
    done = launch("-n", "2", "--env", "COLOR=red=1", "--env", "RT_WORLD_SIZE=9", str(script), MLX_RANK="5")
    assert sorted(done.stdout.splitlines()) == ["[0] 2 0 2 None red=1", "[1] 2 1 2 None red=1"]


@pytest.mark.parametrize(("size", "cores", "threads"), [(1, 8, None), (2, 8, "4"), (4, 2, "1")])
def test_blas_threads_share_the_cores(size: int, cores: int, threads: str | None) -> None:
    shared = _environment({"OPENBLAS_NUM_THREADS": "3"}, {}, size, cores)
    assert (shared.get("OMP_NUM_THREADS"), shared["OPENBLAS_NUM_THREADS"]) == (threads, "3")
    assert _environment({}, {"OMP_NUM_THREADS": "7"}, size, cores)["OMP_NUM_THREADS"] == "7"


def test_verbose_names_settings_processes_and_ends(script: Path) -> None:
    script.write_text("")
    done = launch("-n", "2", "--verbose", "--env", "TOKEN=hidden", str(script), OMP_NUM_THREADS="5")
    settings = (r"2 ranks of .*script\.py; coordinator 127\.0\.0\.1:\d+", "OMP_NUM_THREADS=5")
    for part in (*settings, r"rank 1 is process \d+", "rank 0 exited with code 0"):
        assert re.search(part, done.stderr), part
    assert "hidden" not in done.stderr


def test_rank_0_inherits_the_coordinators_socket(script: Path) -> None:
    source = """
import socket
host, port = os.environ["RT_COORDINATOR"].split(":")
if rank == 0:
    connection, _ = socket.socket(fileno=int(os.environ["RT_COORDINATOR_FD"])).accept()
    print(connection.recv(5).decode())
else:
    assert "RT_COORDINATOR_FD" not in os.environ
    socket.create_connection((host, int(port))).sendall(b"hello")
"""
    done = launch_source(script, source)
    assert (done.returncode, done.stdout) == (0, "[0] hello\n")


@linux
def test_the_secret_is_shared_and_shown_nowhere(script: Path) -> None:
    source = """
import hashlib
secret = os.pread(int(os.environ["RT_SECRET_FD"]), 4096, 0)
assert secret.startswith(b"rt-secret:") and len(secret) > 40
for process in (os.getpid(), os.getppid()):
    for file in ("environ", "cmdline"):
        assert secret.removeprefix(b"rt-secret:") not in open(f"/proc/{process}/{file}", "rb").read()
print(hashlib.sha256(secret).hexdigest())
"""
    first, second = (launch_source(script, source, RT_SECRET="the launcher's user has one too") for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert len({line.split()[1] for line in first.stdout.splitlines()}) == 1
    assert first.stdout.split()[1] != second.stdout.split()[1]


# --- output --------------------------------------------------------------------------------------------------------------------------


def test_output_is_complete_apart_and_never_mixed(script: Path) -> None:
    done = launch_source(
        script,
        """
for line in range(2500):
    os.write(1, b"out %d %s\\n" % (line, b"x" * (line % 97)))
    os.write(2, b"err %d\\n" % line)
""",
        size=4,
    )
    assert done.returncode == 0
    for rank in range(4):
        mark = f"[{rank}] "
        out, err = ([line for line in text.splitlines() if line.startswith(mark)] for text in (done.stdout, done.stderr))
        assert out == [f"{mark}out {n} {'x' * (n % 97)}" for n in range(2500)]
        assert err == [f"{mark}err {n}" for n in range(2500)]
    assert len(done.stdout.splitlines()) == len(done.stderr.splitlines()) == 10_000


def test_a_line_without_end_is_not_lost(script: Path) -> None:
    done = launch_source(script, "sys.stdout.write('the end') if rank else None")
    assert done.stdout == "[1] the end"


def test_a_progress_line_shows_and_rank_0_reads_our_stdin(script: Path) -> None:
    with running(script, "sys.stdout.write('\\r50 %') if rank == 0 else None\nprint(repr(sys.stdin.readline()))") as process:
        assert process.stdout is not None
        shown = b""
        while b"50 %" not in shown:  # rank 0 writes nothing more before it has read
            shown += process.stdout.read(100)
        rest = process.communicate(b"go on\n", timeout=PATIENCE)[0]
        assert process.returncode == 0
    text = (shown + rest).decode()
    assert "[0] 50 %" in text
    assert "'go on\\n'" in text
    assert "[1] ''\n" in text  # the others read /dev/null


def test_both_outputs_in_one_file(script: Path, tmp_path: Path) -> None:
    script.write_text("import os\nfor n in range(500): os.write(1 + n % 2, b'%d %s\\n' % (n, b'x' * 80))")
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(launcher("-n", "2", str(script)), stdout=log, stderr=log, env=environment(), timeout=PATIENCE, check=True)
    found = (tmp_path / "log").read_text().splitlines()
    assert sorted(found) == sorted(f"[{rank}] {n} {'x' * 80}" for rank in range(2) for n in range(500))


def test_a_reader_that_leaves_ends_the_job(script: Path) -> None:
    with running(script, "while True: print('y')") as process:
        lines(process, 1)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE


def test_an_output_nobody_reads_does_not_stop_signals(script: Path) -> None:
    with running(script, "print('ready', file=sys.stderr)\nwhile True: os.write(1, b'y' * 4095 + b'\\n')", grace=0.5) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_ranks_wait_for_a_slow_reader(script: Path) -> None:
    source = """
import select
os.set_blocking(1, False)
pipe, total = select.poll(), 0
pipe.register(1, select.POLLOUT)
while pipe.poll(1000):  # a whole second without room: the launcher holds us back instead of keeping everything in memory
    total += os.write(1, b"y" * 4095 + b"\\n")
    if total > 64 << 20: sys.exit(9)
print("held back", file=sys.stderr)
"""
    with running(script, source + WAIT_FOR_EVER, grace=0.5) as process:
        assert process.stderr is not None
        assert process.stderr.readline().endswith(b"held back\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b"a\nb\n"], b"[0] a\n[0] b\n"),
        ([b"a", b"b\n"], b"[0] ab\n"),
        ([b"a\r", b"\nb\n"], b"[0] a\r\n[0] b\n"),
        ([b"\r10 %\r20 %", b"\r\n"], b"\r[0] 10 %\r[0] 20 %\r\n"),
        ([b"\n\n"], b"[0] \n[0] \n"),
        ([b"a\r\rb\n"], b"[0] a\r\r[0] b\n"),
    ],
)
def test_lines(pieces: list[bytes], shown: bytes) -> None:
    sink = Sink(-1)
    stream = Stream(sys.stdin.buffer, b"[0] ", sink, -1)
    for piece in pieces:
        stream.feed(piece, 0.0)
    assert (bytes(sink.waiting), stream.due) == (shown, None)


def test_another_ranks_line_breaks_an_unfinished_one() -> None:
    sink = Sink(-1)
    zero, one = (Stream(sys.stdin.buffer, b"[%d] " % rank, sink, -1) for rank in range(2))
    zero.feed(b"half", 1.0)
    assert zero.due is not None and not sink.waiting
    zero.feed(b" of it", 2.0)
    zero.flush()
    zero.feed(b", more", 3.0)
    zero.flush()
    one.feed(b"whole\n", 3.0)
    zero.feed(b"rest\n", 4.0)
    assert bytes(sink.waiting) == b"[0] half of it, more\n[1] whole\n[0] rest\n"


# --- signals and orphans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handed_on(script: Path, number: signal.Signals) -> None:
    with running(script, "signal.signal(signal.SIGINT, signal.SIG_DFL)\nprint('ready')\n" + WAIT_FOR_EVER) as process:
        lines(process, 2)
        process.send_signal(number)
        error = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, last_line(error)) == (128 + number, f"rt.launch: stopped by {number.name}")


def test_ranks_that_end_in_order_when_told_to_are_no_failure(script: Path) -> None:
    source = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('ready')\n"
    with running(script, source + WAIT_FOR_EVER) as process:
        lines(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=PATIENCE)[1] == b""
        assert process.returncode == 0


def test_a_second_sigint_kills(script: Path) -> None:
    source = "signal.signal(signal.SIGINT, lambda *_: print('not yet'))\nprint('ready')\n"
    with running(script, source + WAIT_FOR_EVER, grace=10 * PATIENCE) as process:
        lines(process, 2)
        process.send_signal(signal.SIGINT)
        assert lines(process, 2) == ["[0] not yet\n", "[1] not yet\n"]
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, last_line(error)) == (130, "rt.launch: stopped by SIGINT")


def wait_for_death(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(5000))


@linux
def test_no_rank_outlives_a_killed_launcher(script: Path) -> None:
    with running(script, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid())\n" + WAIT_FOR_EVER, size=3) as process:
        pidfds = [os.pidfd_open(int(line.split()[1])) for line in lines(process, 3)]
        process.kill()
        try:
            assert all(wait_for_death(pidfd) for pidfd in pidfds)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


@linux
@pytest.mark.parametrize("ending", ["exit 0", "exit 5"])
def test_children_of_ranks_are_ended_too(ending: str) -> None:
    child = f"sleep 1000 >/dev/null 2>&1 & echo $!; {ending}"
    done = launch("-n", "1", "sh", "-c", child, grace=0.2)
    assert done.returncode == int(ending.split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_ranks_helper_may_finish_its_work() -> None:
    done = launch("-n", "2", "sh", "-c", "(sleep 0.3; echo late) & exit 0", grace=PATIENCE)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["[0] late", "[1] late"])
