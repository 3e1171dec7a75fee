"""Which backend ``rt.launch`` takes where nobody names one: NCCL where every rank can have it, else the ring.

May live here: the choice, what is said of it, and what it must not cost. May not: what ranks are told with a backend that was named
(``test_launch``, ``test_launch_hosts``), NCCL itself (``test_nccl``). CuPy and its devices are stand-ins: nothing here runs on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sshd
from far import Watch
from far import command as command_far
from far import launch as launch_far
from hosts import ROOT
from launching import PATIENCE, PREAMBLE, environment, last_line, launch, launcher, linux, read_until
from nccl import STAND_IN
from test_nccl_missing import package

from rt import _launch_backend
from rt._launch_backend import Found, decide
from rt._launch_loop import Loop

TOLD = PREAMBLE + "print(*(os.environ.get(name) for name in ('RT_BACKEND', 'CUDA_VISIBLE_DEVICES', 'NCCL_HOST_IP')))"
CHOSEN = "rt.launch: backend nccl: CuPy, NCCL and a GPU for each rank are there; --backend ring is without"
RING = ["[0] None None None", "[1] None None None"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(TOLD)
    return path


def path(*folders: str | Path) -> str:
    return os.pathsep.join(map(str, (ROOT, *folders)))


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what was said of the backend."""
    return [line for line in done.stderr.splitlines() if line.startswith("rt.launch: backend ")]


def told(where: str) -> Found:
    """Return what our Python says of CuPy if it looks for it there, too."""
    loop, found = Loop(), list[Found]()
    question = _launch_backend.ask(loop, [sys.executable], None, environment(PYTHONPATH=where), found.append)
    while not found:
        assert question is not None
        loop.wait(max(0.0, question.due - time.monotonic()))
        if not found:
            question.attend(time.monotonic())
    return found[0]


# --- the decision ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "backend", "why"),
    [
        ([("a", 2, Found(True, 2, "")), ("b", 1, Found(True, 8, ""))], "nccl", CHOSEN.removeprefix("rt.launch: ")),
        ([("a", 2, Found(True, 2, "")), ("b", 2, Found(True, 1, ""))], "", "backend ring: b has 1 GPU for 2 ranks"),
        ([("a", 4, Found(True, 2, "")), ("b", 1, Found(False, 0, "is bare"))], "", "backend ring: a has 2 GPUs for 4 ranks; b is bare"),
        ([("a", 1, Found(False, 0, "is bare")), ("b", 1, Found(False, 0, "is bare"))], "", ""),
    ],
)
def test_nccl_takes_cupy_everywhere_and_a_gpu_for_each_rank(hosts: list[tuple[str, int, Found]], backend: str, why: str) -> None:
    assert decide(hosts) == (backend, why)


# --- on this host ------------------------------------------------------------------------------------------------------------------------


def test_a_gpu_for_each_rank(script: Path) -> None:
    devices = {"PYTHONPATH": path(STAND_IN), "STANDIN_DEVICES": "2"}
    done = launch("-n", "2", "--verbose", str(script), **devices)
    assert sorted(done.stdout.splitlines()) == ["[0] nccl 0 127.0.0.1", "[1] nccl 1 127.0.0.1"]
    assert said(done) == [CHOSEN]
    done = launch("-n", "2", sys.executable, str(script), CUDA_VISIBLE_DEVICES="5,0,1", **devices)
    assert (sorted(done.stdout.splitlines()), done.stderr) == (["[0] nccl 5 127.0.0.1", "[1] nccl 0 127.0.0.1"], "")


def test_a_group_on_the_backend_that_was_chosen(script: Path) -> None:
    script.write_text("import rt.sync as rt\ngroup = rt.init(strict=True)\nprint(type(group._core).__name__, group.size())\n")
    done = launch("-n", "2", str(script), PYTHONPATH=path(STAND_IN), STANDIN_DEVICES="2")
    assert (sorted(done.stdout.splitlines()), done.stderr) == (["[0] NcclGroup 2", "[1] NcclGroup 2"], "")


def test_too_few_gpus(script: Path) -> None:
    done = launch("-n", "2", "--verbose", str(script), PYTHONPATH=path(STAND_IN), STANDIN_DEVICES="1")
    assert (sorted(done.stdout.splitlines()), said(done)) == (RING, ["rt.launch: backend ring: this host has 1 GPU for 2 ranks"])
    allowed = {"PYTHONPATH": path(STAND_IN), "STANDIN_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}
    assert said(launch("-n", "2", "--verbose", str(script), **allowed)) == ["rt.launch: backend ring: this host has 1 GPU for 2 ranks"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise ImportError('libcuda.so.1 is not there')", "which needs a CuPy that can be loaded: libcuda.so.1 is not there"),
        ("print('said on stdout')", "which needs NCCL"),
        ("import atexit; atexit.register(print, 3)", "which needs NCCL"),
        ("import subprocess; subprocess.Popen(['sleep', '1000'])", "which needs NCCL"),
        ("import os; os.abort()", "crashed, or took 10 seconds, when asked for CuPy"),
    ],
)
def test_a_cupy_that_is_broken_is_no_reason_to_fail(tmp_path: Path, script: Path, source: str, why: str) -> None:
    done = launch("-n", "2", "--verbose", str(script), PYTHONPATH=path(package(tmp_path, source)))
    (line,) = said(done)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, RING)
    assert line.startswith("rt.launch: backend ring: this host ") and why in line


def test_who_names_a_backend_has_it_and_nobody_is_asked(tmp_path: Path, script: Path) -> None:
    """The stand-in leaves a trace where somebody imports it; ranks do not."""
    trace = tmp_path / "imported"
    there = {"PYTHONPATH": path(package(tmp_path, f"open({str(trace)!r}, 'w')"))}
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"backend": "ring", "hosts": [{"ssh": "localhost"}]}))
    for options in (["-n2", "--backend", "ring"], ["-n2", "--hostfile", str(file)]):
        assert [line.split()[1] for line in launch(*options, str(script), **there).stdout.splitlines()] == ["ring", "ring"]
    file.write_text(json.dumps({"backend": "nccl", "hosts": [{"ssh": "localhost"}]}))
    over = launch("-n2", "--hostfile", str(file), "--backend", "ring", str(script), **there)
    assert [line.split()[1] for line in over.stdout.splitlines()] == ["ring", "ring"], "the command line goes before the file"
    assert launch("-n2", "--env", "RT_BACKEND=any", str(script), **there).stdout.split()[1] == "any"
    assert launch("-n2", str(script), RT_BACKEND="ring", **there).stdout.split()[1] == "ring"
    assert not trace.exists()
    launch("-n2", str(script), **there)
    assert trace.exists()


def test_programs_that_are_no_python_are_not_asked_about(tmp_path: Path) -> None:
    done = launch("-n2", "--verbose", "env", PYTHONPATH=path(STAND_IN), STANDIN_DEVICES="2")
    assert "RT_BACKEND" not in done.stdout and said(done) == []


def test_a_program_whose_name_begins_as_python_does_is_not_run_to_be_asked(tmp_path: Path) -> None:
    program = tmp_path / "python_train.sh"
    program.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/ran\n")
    program.chmod(0o755)
    assert launch("-n2", str(program), PYTHONPATH=path(STAND_IN), STANDIN_DEVICES="2").returncode == 0
    assert (tmp_path / "ran").read_text() == "\n\n", "twice, without words"


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is here")
def test_nothing_is_started_where_there_is_no_cupy(script: Path) -> None:
    """The launcher's audit hook tells of every program that it starts: two ranks, and with CuPy one to ask."""
    hook = "import sys; sys.addaudithook(lambda name, made: name == 'subprocess.Popen' and print('made', made[1][:2], file=sys.stderr))\n"
    _, option, source, *rest = launcher("-n", "2", str(script))
    command = [sys.executable, option, hook + source, *rest]
    bare = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    there = subprocess.run(command, env=environment(PYTHONPATH=path(STAND_IN)), capture_output=True, text=True, timeout=PATIENCE)
    assert (bare.returncode, there.returncode) == (0, 0)
    assert (bare.stderr.count("made"), there.stderr.count("made")) == (2, 3), there.stderr


def test_another_python_is_asked_itself(tmp_path: Path, script: Path) -> None:
    """It finds another CuPy than ours, which has none."""
    other = tmp_path / "python3"
    other.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{STAND_IN}" STANDIN_DEVICES=2 exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    done = launch("-n2", "--python", str(other), str(script))
    assert (sorted(done.stdout.splitlines()), done.stderr) == (["[0] nccl 0 127.0.0.1", "[1] nccl 1 127.0.0.1"], "")


@linux
@pytest.mark.parametrize(("options", "stop", "code"), [([], signal.SIGTERM, 143), (["--timeout", "1"], 0, 124)])
def test_a_cupy_that_hangs_holds_up_no_end(tmp_path: Path, script: Path, options: list[str], stop: int, code: int) -> None:
    fifo = tmp_path / "hangs"
    os.mkfifo(fifo)
    hangs = package(tmp_path, f"import os, signal; print(os.getpid(), file=open({str(fifo)!r}, 'w')); signal.pause()")
    there = environment(PYTHONPATH=path(hangs))
    command = launcher("-n2", *options, str(script))
    pipe = subprocess.PIPE
    told = os.open(fifo, os.O_RDWR)
    with subprocess.Popen(command, env=there, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        pidfd = os.pidfd_open(int(read_until(told, "[0-9]+\n")))
        if stop:
            process.send_signal(stop)
        out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, "")
    expected = "stopped by SIGTERM" if stop else "ended by --timeout 1: no answer yet from a Python that was asked for CuPy"
    assert last_line(error) == f"rt.launch: {expected}"
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, 0)
    for fd in (pidfd, told):
        os.close(fd)


def test_a_cupy_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that no alarm reaches."""
    monkeypatch.setattr(_launch_backend, "SECONDS", 1)
    deaf = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\nwhile True: pass"
    assert told(path(package(tmp_path, deaf))) == Found(True, 0, "crashed, or took 1 seconds, when asked for CuPy")


def test_what_a_cupy_has_started_goes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    starts = f"import subprocess; open({str(file)!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))"
    assert "which needs NCCL" in told(path(package(tmp_path, starts))).lacks
    assert not Path(f"/proc/{file.read_text()}/cmdline").exists() or not Path(f"/proc/{file.read_text()}/cmdline").read_bytes()


def test_a_finder_of_modules_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            raise RuntimeError(f"found no {name}")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert told(path()).gpus == 0


# --- on many hosts -----------------------------------------------------------------------------------------------------------------------


def far(test: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Mark a test that takes hosts with sshd."""
    for mark in sshd.NEEDED:
        test = mark(test)
    return test


@far
def test_all_hosts_are_asked(tmp_path: Path, script: Path) -> None:
    broken = package(tmp_path / "broken", "raise ImportError('libcuda.so.1 is not there')")
    devices = {0: ["SetEnv STANDIN_DEVICES=2"], 1: ["SetEnv STANDIN_DEVICES=1"], 2: [f"SetEnv PYTHONPATH={ROOT}:{broken}"]}
    stand_in = ("--verbose", "--env", f"PYTHONPATH={path(STAND_IN)}")
    with sshd.site(tmp_path, 3, options=devices) as site:
        done = launch_far(site, *stand_in, str(script), hosts=["host0", "host1"])
        lines = [f"[{rank} host{rank}] nccl 0 10.2.0.1" for rank in range(2)]
        assert (sorted(done.stdout.splitlines()), said(done)) == (lines, [CHOSEN])
        done = launch_far(site, *stand_in, "-n2", str(script), hosts=["host0", "host1"])
        assert {line.split("] ")[1] for line in done.stdout.splitlines()} == {"None None None"}
        assert said(done) == ["rt.launch: backend ring: host1 has 1 GPU for 2 ranks"]
        done = launch_far(site, *stand_in, "-n2", str(script), hosts=["host0"], CUDA_VISIBLE_DEVICES="7,1")
        assert sorted(done.stdout.splitlines()) == ["[0] nccl 7 127.0.0.1", "[1] nccl 1 127.0.0.1"]
        done = launch_far(site, "--verbose", str(script), hosts=["host1", "host2"])
        assert sorted(done.stdout.splitlines()) == ["[0 host1] None None None", "[1 host2] None None None"]
        (line,) = said(done)
        why = r"host1 (has no CuPy|cannot have nccl, .*); host2 cannot have nccl, which needs a CuPy that can be loaded: libcuda\.so\.1 .*"
        assert re.fullmatch(f"rt.launch: backend ring: {why}", line), line
        done = launch_far(site, *stand_in, "--backend", "ring", str(script), hosts=["host0", "host1"])
        assert (done.stdout.count("ring None None"), said(done)) == (2, [])


@far
def test_a_cupy_that_hangs_elsewhere_goes_with_the_job(tmp_path: Path, script: Path) -> None:
    fifo = tmp_path / "hangs"
    os.mkfifo(fifo)
    hangs = package(tmp_path, f"print('here', file=open({str(fifo)!r}, 'w')); __import__('signal').pause()")
    with sshd.site(tmp_path, 1, options={0: [f"SetEnv PYTHONPATH={ROOT}:{hangs}"]}) as site:
        told = os.open(fifo, os.O_RDWR)
        with subprocess.Popen(command_far(site, str(script)), env=environment(), stderr=subprocess.PIPE, text=True) as process:
            read_until(told, "here")
            asked = Watch(site.servers, "find_spec")
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=PATIENCE)
        os.close(told)
        assert (process.returncode, last_line(error)) == (143, "rt.launch: stopped by SIGTERM")
        assert asked.count == 1 and asked.gone(time.monotonic())


@far
def test_a_slow_cupy_makes_no_host_late(tmp_path: Path, script: Path) -> None:
    slow = package(tmp_path, "import time; time.sleep(6)")
    with sshd.site(tmp_path, 1, options={0: [f"SetEnv PYTHONPATH={ROOT}:{slow}"]}) as site:
        source = "import sys; from rt import _launch_hosts, launch; _launch_hosts.READY_SECONDS = 5.0; sys.exit(launch.main())"
        command = site.command(sys.executable, "-c", source, "--verbose", "--hosts", "host0", "-n2", str(script))
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, RING), done.stderr
    assert "which needs NCCL" in said(done)[0]
