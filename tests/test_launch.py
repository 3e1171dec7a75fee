"""``rt.launch`` as its users meet it: exit codes, wrong usage, and what ranks are given.

May live here: the command line and what becomes of it. May not: output, input and ends, which have files of their own, and groups; the
ranks here are small scripts that never import ``rt``, so that a failure is the launcher's own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
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
    linux,
)

from rt._launch_options import _parser, split
from rt._launch_ranks import environment as shared_environment


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


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
        ([], "the following arguments are required: -n, --hosts or --hostfile"),
        (["-n", "2"], "no program given; expected for example: rt.launch -n 2 train.py"),
        (["-n", "2", "--"], "no program given"),
        (["-n", "0", "true"], "argument -n/--repeat-hosts: found '0', expected a number of ranks from 1 up"),
        (["-n", "-1", "true"], "argument -n/--repeat-hosts: found '-1'"),
        (["-n", "two", "true"], "argument -n/--repeat-hosts: found 'two'"),
        (["-n", "2", "--env", "NAME", "true"], "argument --env: found 'NAME', expected NAME=VALUE"),
        (["-n", "2", "--env", "NA-ME=x", "true"], "argument --env: found 'NA-ME=x', expected NAME=VALUE"),
        (["-n", "2", "--no-such-option", "true"], "unrecognized arguments: --no-such-option"),
        (["-n", "2", "--timeout", "soon", "true"], "argument --timeout: found 'soon', expected a number of seconds above 0"),
        (["-n", "2", "--timeout", "0", "true"], "argument --timeout: found '0', expected a number of seconds above 0"),
        (["-n", "2", "--prefix", "often", "true"], "argument --prefix: found 'often', expected auto, always or never"),
        (["-n", "2", "--cwd", "/no/folder", "true"], "argument --cwd: found '/no/folder', expected a folder that exists"),
        (["-n", "2", "--cwd", "/", "program.py"], "program 'program.py' not found in '/': no such file"),
        (["-n", "2", "--cwd", "/", "./program"], "program './program' not found in '/': no such executable file"),
        (["-n", "2", "--cwd"], "argument --cwd: expected one argument"),
        (["-n", "2", "--verb", "true"], "unrecognized arguments: --verb"),
        (["-n", "2", "--hosts", "a", "--hostfile", "F", "true"], "--hosts and --hostfile: found both, expected one of them"),
        (["--hosts", "a,,b", "true"], "--hosts: entry [1] of 'a,,b': found '', expected a host's name"),
        (["--hosts", "a"], "no program given"),
        (["--hostfile", "/no/file", "true"], "hostfile /no/file: found 'No such file or directory', expected a JSON list of hosts"),
        (["-n", "2", "--backend", "gloo", "true"], "argument --backend: found 'gloo', expected one of ring, mpi, nccl, jaccl, jaccl-ring"),
        (["-n", "2", "--backend", "mpi", "--log-dir", "x", "true"], "--log-dir: not with --backend mpi"),
        (["-n", "2", "--backend", "mpi", "--prefix", "always", "true"], "--prefix: not with --backend mpi"),
        (["-n", "2", "--backend", "mpi", "--tty", "true"], "--tty: not with --backend mpi"),
        (["-n", "2", "--mpi-arg", "x", "true"], "argument --mpi-arg: found 'x' without --backend mpi, expected none"),
        (["--hosts", "a,b", "--backend", "jaccl", "true"], '--backend jaccl: host [0] (a): "rdma": found 0 entries, expected 2'),
        (["-n", "2", "--iface", "eth0,,eth1", "true"], "--iface: found an empty entry in 'eth0,,eth1'"),
        (["-n", "2", "-p", "70000", "true"], "argument -p/--starting-port: found '70000', expected a port from 1 to 65535"),
        (["-n", "2", "--sync-code", "/no/folder", "true"], "argument --sync-code: found '/no/folder', expected a folder that exists"),
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
    examples = re.findall(r"rt\.launch (-.+?)   ", done.stdout)
    assert len(examples) == 11
    for example in examples:  # each has only options that exist
        ours, command = split(shlex.split(example), _parser()[1])
        found = _parser()[0].parse_args(ours)
        assert (found.n in (2, 4) or found.hosts or found.hostfile) and command


def test_every_option_with_a_value_is_known_to_take_one() -> None:
    parser, valued = _parser()
    assert valued == [name for action in parser._actions if action.nargs is None for name in action.option_strings]


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
    assert split(line.split(), _parser()[1]) == (ours.split(), command.split())


@pytest.mark.parametrize(
    ("line", "size", "words"),
    [("-n 8 -- ./my-job.sh", 8, ""), ("-n2 -- ./my-job.sh --verbose", 2, " --verbose"), ("-n2 -- script.py -n 3", 2, " -n 3")],
)
def test_programs_behind_two_dashes(line: str, size: int, words: str, tmp_path: Path) -> None:
    """As MLX's guide writes them."""
    (tmp_path / "my-job.sh").write_text('#!/bin/sh\necho "$RT_RANK of $RT_WORLD_SIZE" "$@"\n')
    (tmp_path / "my-job.sh").chmod(0o755)
    (tmp_path / "script.py").write_text("import os, sys; print(os.environ['RT_RANK'], 'of', os.environ['RT_WORLD_SIZE'], *sys.argv[1:])")
    command = launcher(*line.split())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False)
    expected = [f"[{rank}] {rank} of {size}{words}".rstrip() for rank in range(size)]
    assert (done.returncode, [line.rstrip() for line in sorted(done.stdout.splitlines())], done.stderr) == (0, expected, "")


@pytest.mark.parametrize("program", [["script.py"], ["./script.py"], ["python", "script.py"], ["./program"]])
def test_a_folder_to_run_in(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import os; print(os.getcwd())")
    (tmp_path / "program").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "program").chmod(0o755)
    done = launch("-n", "2", "--cwd", str(tmp_path), *program)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"[{rank}] {tmp_path}" for rank in range(2)])


def test_arguments_reach_the_script_unchanged(script: Path) -> None:
    script.write_text("import sys; print(sys.argv[1:])")
    done = launch("-n", "2", str(script), "--verbose", "a b", "--", "$HOME")
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] ['--verbose', 'a b', '--', '$HOME']" for rank in range(2)]


# --- what ranks are given ------------------------------------------------------------------------------------------------------------


def test_variables(script: Path) -> None:
    source = "print(*(os.environ.get(name) for name in ('RT_WORLD_SIZE', 'RT_LOCAL_RANK', 'RT_LOCAL_SIZE', 'MLX_RANK', 'COLOR')))"
    script.write_text(PREAMBLE + source)
    done = launch("-n", "2", "--env", "COLOR=red=1", "--env", "RT_WORLD_SIZE=9", str(script), MLX_RANK="5")
    assert sorted(done.stdout.splitlines()) == ["[0] 2 0 2 0 red=1", "[1] 2 1 2 1 red=1"]


def test_programs_written_for_mlx_find_their_ring(script: Path) -> None:
    names = "print(os.environ['MLX_RANK'], os.environ['MLX_WORLD_SIZE'], open(os.environ['MLX_HOSTFILE']).read())"
    rows = [line.split(maxsplit=3) for line in launch_source(script, names).stdout.splitlines()]
    assert sorted(row[:3] for row in rows) == [["[0]", "0", "2"], ["[1]", "1", "2"]]
    (ring,) = {row[3] for row in rows}
    assert re.fullmatch(r'\[\["127\.0\.0\.1:\d+"\], \["127\.0\.0\.1:\d+"\]\]', ring)
    script.write_text(PREAMBLE + names)
    done = launch("-n", "2", "-p", "32323", "--connections-per-ip", "2", str(script))
    assert json.loads(done.stdout.splitlines()[0].split(maxsplit=3)[3]) == [
        ["127.0.0.1:32323", "127.0.0.1:32324"],
        ["127.0.0.1:32325", "127.0.0.1:32326"],
    ]


def test_each_rank_has_the_next_gpu_that_is_allowed(script: Path) -> None:
    script.write_text(PREAMBLE + "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['RT_BACKEND'], os.environ['NCCL_HOST_IP'])")
    done = launch("-n", "2", "--backend", "nccl", str(script), CUDA_VISIBLE_DEVICES="3,5")
    assert sorted(done.stdout.splitlines()) == ["[0] 3 nccl 127.0.0.1", "[1] 5 nccl 127.0.0.1"]
    done = launch("-n", "3", "--backend", "nccl", str(script), CUDA_VISIBLE_DEVICES="3,5")
    assert (done.returncode, last_line(done.stderr)) == (
        2,
        "rt.launch: CUDA_VISIBLE_DEVICES: found '3,5' for 3 ranks, expected a GPU for each",
    )


@pytest.mark.parametrize(("size", "cores", "threads"), [(1, 8, None), (2, 8, "4"), (4, 2, "1")])
def test_blas_threads_share_the_cores(size: int, cores: int, threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rt._launch_ranks.cores", lambda: cores)
    shared = shared_environment({"OPENBLAS_NUM_THREADS": "3"}, {}, size)
    assert (shared.get("OMP_NUM_THREADS"), shared["OPENBLAS_NUM_THREADS"]) == (threads, "3")
    assert shared_environment({}, {"OMP_NUM_THREADS": "7"}, size)["OMP_NUM_THREADS"] == "7"


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


