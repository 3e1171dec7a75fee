"""What ranks of ``rt.launch`` write, on its way to the user and into log files.

May live here: tests of ``rt._forward``, with and without a launcher. May not: input, groups and collectives; the ranks here are small
scripts that never import ``rt``, so that a failure is the launcher's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import (
    PATIENCE,
    PREAMBLE,
    WAIT_FOR_EVER,
    environment,
    last_line,
    launch,
    launch_source,
    launcher,
    lines,
    linux,
    running,
)

from rt._forward import BACKLOG_BYTES, Sink, Stream


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


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


def test_a_line_without_end_is_shown_soon(script: Path) -> None:
    with running(script, "sys.stdout.write('\\r50 %')\nsys.stdin.readline()") as process:
        assert process.stdout is not None
        shown = b""
        while shown.count(b"50 %") < 2:  # the ranks write nothing more before they have read
            shown += process.stdout.read(100)
        assert sorted(shown.decode().replace("\r", "").split("\n")) == ["[0] 50 %", "[1] 50 %"]
        process.communicate(b"go on\n", timeout=PATIENCE)
        assert process.returncode == 0


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


@linux
def test_a_full_disk_ends_the_job(script: Path) -> None:
    script.write_text("while True: print('y')")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(launcher("-n", "2", str(script)), stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=PATIENCE)
    assert (done.returncode, last_line(done.stderr)) == (1, "rt.launch: cannot write our output: No space left on device")


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


@linux
@pytest.mark.parametrize(
    ("flood", "prefixes"),
    [("head -c 1000000000 /dev/zero", 1), (f"yes {'x' * 39} | head -c 1000000000", 25_000_000)],
    ids=["zeros", "lines"],
)
@pytest.mark.timeout(300)  # seconds on a quiet machine
def test_a_gigabyte_from_one_rank_leaves_memory_as_it_was(flood: str, prefixes: int) -> None:
    def run(program: str) -> tuple[int, int]:
        command = launcher("-n", "2", "sh", "-c", f"test $RT_RANK = 0 || {program}")
        with subprocess.Popen(["wc", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as wc:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=wc.stdin, env=environment())
            assert wc.stdin is not None and wc.stdout is not None
            wc.stdin.close()
            _, status, used = os.wait4(process.pid, 0)  # the peak is the highest of the launcher's and the ranks', which are small
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            return int(wc.stdout.read()), used.ru_maxrss << 10

    _, idle_bytes = run("echo a line")
    output_bytes, peak_bytes = run(flood)
    assert output_bytes == 10**9 + prefixes * len("[1] ")
    assert peak_bytes - idle_bytes < 16 << 20


def test_a_line_as_long_as_a_backlog_is_shown_in_pieces() -> None:
    sink = Sink(-1)
    stream = Stream(sys.stdin.buffer, b"[0] ", sink, -1)
    for _ in range(100):
        stream.feed(b"x" * 65_000, 0.0)
        assert len(stream.pending) < BACKLOG_BYTES
    stream.feed(b"y\n", 0.0)
    assert bytes(sink.waiting) == b"[0] " + b"x" * 6_500_000 + b"y\n"


# --- prefixes and logs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "shown"),
    [
        (1, [], ["0"]),
        (1, ["--prefix", "auto"], ["0"]),
        (1, ["--prefix", "always"], ["[0] 0"]),
        (2, ["--prefix", "auto"], ["[0] 0", "[1] 1"]),
        (2, ["--prefix=never"], ["0", "1"]),
    ],
)
def test_prefix(size: int, options: list[str], shown: list[str], script: Path) -> None:
    script.write_text(PREAMBLE + "print(rank)\nprint(rank, file=sys.stderr)")
    done = launch("-n", str(size), *options, str(script))
    assert (done.returncode, sorted(done.stdout.splitlines()), sorted(done.stderr.splitlines())) == (0, shown, shown)


@pytest.mark.parametrize("size", [1, 2])
def test_logs_are_complete_and_without_prefix(size: int, script: Path, tmp_path: Path) -> None:
    logs = tmp_path / "new" / "logs"
    script.write_text(PREAMBLE + "os.write(1, b'\\0\\xff\\r50 %\\n' * 50_000)\nif rank == 0: os.write(2, b'no end')")
    done = subprocess.run(
        launcher("-n", str(size), "--log-dir", str(logs), str(script)), capture_output=True, env=environment(), timeout=PATIENCE, check=True
    )
    assert sorted(os.listdir(logs)) == sorted(f"rank{rank}.{kind}" for rank in range(size) for kind in ("err", "out"))
    for rank in range(size):
        assert (logs / f"rank{rank}.out").read_bytes() == b"\0\xff\r50 %\n" * 50_000
        assert (logs / f"rank{rank}.err").read_bytes() == (b"" if rank else b"no end")
    assert done.stdout.count(b"50 %") == size * 50_000
    assert done.stderr == (b"no end" if size == 1 else b"[0] no end")


def test_old_logs_are_overwritten(script: Path, tmp_path: Path) -> None:
    (tmp_path / "rank1.out").write_text("of yesterday\n" * 100)
    script.write_text("print('new')")
    done = launch("-n", "2", "--log-dir", str(tmp_path), str(script))
    assert (done.returncode, (tmp_path / "rank1.out").read_text()) == (0, "new\n")


@linux
def test_a_log_that_cannot_be_written_is_named_and_the_job_goes_on(script: Path, tmp_path: Path) -> None:
    (tmp_path / "rank0.out").symlink_to("/dev/full")
    script.write_text("print('one')\nprint('two')")
    done = launch("-n", "2", "--log-dir", str(tmp_path), str(script))
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["[0] one", "[0] two", "[1] one", "[1] two"])
    assert done.stderr == f"rt.launch: cannot write '{tmp_path}/rank0.out': No space left on device; it is not complete\n"


def test_a_log_folder_that_cannot_be_made(script: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    script.write_text("print('started')")
    done = launch("-n", "2", "--log-dir", str(tmp_path / "file"), str(script))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rt.launch: --log-dir: cannot write '{tmp_path}/file': File exists\n"


# --- the last lines of the rank that failed ------------------------------------------------------------------------------------------

FAIL_AND_BURY = """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b"lost a peer\\n" * 500), os._exit(1)))
    print("ready")
    while True: signal.pause()
sys.stdin.readline()
"""


def test_the_last_lines_of_stderr_are_repeated_where_others_wrote_since(script: Path) -> None:
    with running(script, FAIL_AND_BURY + "for n in range(30): print('line', n, file=sys.stderr)\nsys.exit(4)") as process:
        lines(process, 1)
        error = process.communicate(b"go on\n", timeout=PATIENCE)[1].decode().splitlines()
    assert error[-12:] == [
        "rt.launch: rank 1 ended its stderr with:",
        *(f"[1] line {n}" for n in range(20, 30)),
        "rt.launch: rank 1 exited with code 4",
    ]
    assert error.count("[0] lost a peer") == 500


def test_the_last_lines_are_bounded(script: Path) -> None:
    with running(script, FAIL_AND_BURY + "os.write(2, b'x' * 100_000 + b'\\nthe end')\nos.kill(os.getpid(), signal.SIGKILL)") as process:
        lines(process, 1)
        error = process.communicate(b"go on\n", timeout=PATIENCE)[1].decode().splitlines()
    assert error[-3:] == ["rt.launch: rank 1 ended its stderr with:", "[1] the end", "rt.launch: rank 1 was killed by SIGKILL"]


def test_last_lines_that_are_just_above_are_not_repeated(script: Path) -> None:
    done = launch_source(script, "if rank == 1: sys.exit('once')\n" + WAIT_FOR_EVER)
    assert done.stderr == "[1] once\nrt.launch: rank 1 exited with code 1\n"


# --- lines ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b"a\nb\n"], b"[0] a\n[0] b\n"),
        ([b"a", b"b\n"], b"[0] ab\n"),
        ([b"a\r", b"\nb\n"], b"[0] a\r\n[0] b\n"),
        ([b"\r10 %\r20 %", b"\r\n"], b"\r[0] 10 %\r[0] 20 %\r\n"),
        ([b"\n\n"], b"[0] \n[0] \n"),
        ([b"a", b"b\nc\nd", b"e\n"], b"[0] ab\n[0] c\n[0] de\n"),
        ([b"a\r", b"b\n"], b"[0] a\r[0] b\n"),
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




@pytest.mark.parametrize(("echoed", "end"), [(True, b""), (False, b"\n")])
def test_an_answer_ends_the_line_of_its_prompt(echoed: bool, end: bytes) -> None:
    sink = Sink(-1)
    stream = Stream(sys.stdin.buffer, b"[0] ", sink, -1)
    for _ in range(2):
        stream.feed(b"what? ", 0.0)
        stream.flush()
        sink.answered(echoed=echoed)
        sink.answered(echoed=echoed)  # a second answer, and no prompt in between
        stream.feed(b"you said\n", 0.0)
    assert bytes(sink.waiting) == (b"[0] what? " + end + b"[0] you said\n") * 2
