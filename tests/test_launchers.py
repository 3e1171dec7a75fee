"""Jobs as other people's launchers, and shells, start them; and what a script says when it was started wrongly.

May live here: torchrun, ``mlx.launch``, mpirun, srun, plain environments. May not: ``rt.launch`` (``test_launch``), the rules of
configuration one by one (``test_config``).

torch and MLX live in ``.venv-peers`` (``make peers``), sklearn and optree in this environment. A rank under torchrun needs both, so those
tests lend it this environment's packages; MLX's launcher takes any interpreter for its ranks and gets ours.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import slurm
from peers import BIN, ROOT, needs_peers

DEMO = str(ROOT / "examples" / "train_digits.py")
PATIENCE = 60.0
_FOREIGN = ("RT_", "MLX_", "TORCHELASTIC_", "MASTER_", "OMPI_", "PMI_", "SLURM_")


def environment(**extra: str) -> dict[str, str]:
    """A shell's environment in which no launcher has been."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end; it and everything below it is killed if that does not come."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(**extra), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def assert_trained(done: subprocess.CompletedProcess[str], size: int) -> None:
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert f"{size} ranks, 20 epochs" in done.stdout, said
    assert len(re.findall(r"^ +ok ", done.stdout, re.MULTILINE)) == 3, said
    assert "FAILED" not in done.stdout and "Traceback" not in done.stderr, said


# --- other people's launchers --------------------------------------------------------------------------------------------------------


@needs_peers("torchrun")
@pytest.mark.parametrize("rendezvous", ["--standalone", "--master-port"])
def test_torchrun_starts_the_demo_unchanged(rendezvous: str) -> None:
    """With both ways of torchrun to meet; in the first, MASTER_PORT is served by torchrun's agent under its own name for this host."""
    where = [rendezvous] if rendezvous == "--standalone" else [rendezvous, str(free_port())]
    packages = os.pathsep.join([str(ROOT), sysconfig.get_path("platlib")])
    done = run([str(BIN / "torchrun"), *where, "--nproc-per-node", "2", DEMO], PYTHONPATH=packages)
    assert_trained(done, 2)


@needs_peers("mlx.launch")
@pytest.mark.parametrize("size", [2, 4])
def test_mlx_launch_starts_the_demo_unchanged(size: int) -> None:
    options = ["--backend", "ring", "--starting-port", str(free_port()), "--python", sys.executable, "-n", str(size)]
    done = run([str(BIN / "mlx.launch"), *options, DEMO])
    assert "[WARN]" not in done.stderr, done.stderr  # its exit status says nothing about ranks
    assert_trained(done, size)


@needs_peers("ompirun_wrapper")
@needs_peers("mpiexec.hydra")
@pytest.mark.parametrize(
    "launcher",
    [
        ["ompirun_wrapper", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--allow-run-as-root", "-x", "RT_COORDINATOR"],
        ["mpiexec.hydra"],
    ],
    ids=["Open MPI", "MPICH"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_mpirun_starts_the_demo_unchanged(launcher: list[str], size: int) -> None:
    place = {"RT_COORDINATOR": f"127.0.0.1:{free_port()}", "OPAL_PREFIX": str(BIN.parent)}
    done = run([str(BIN / launcher[0]), *launcher[1:], "-n", str(size), sys.executable, DEMO], **place)
    assert_trained(done, size)


@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "-")
def test_srun_starts_the_demo_unchanged(tmp_path: Path) -> None:
    with slurm.cluster(tmp_path) as told:
        done = run(["srun", "-n", "4", sys.executable, DEMO], RT_COORDINATOR=f"127.0.0.1:{free_port()}", **told)
    assert_trained(done, 4)


# --- shells --------------------------------------------------------------------------------------------------------------------------

HELLO = """
import numpy as np, rt.sync as rt
group = rt.init()
print("sum", rt.all_sum(np.float32(group.rank() + 1)).item(), "of", group.size())
"""


class Shell:
    """One user's terminal: a rank in the background whose log can be waited for."""

    def __init__(self, line: str) -> None:
        command = ["sh", "-c", line, "sh", sys.executable, HELLO]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        self._log: list[str] = []
        self._grew = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grew:
                self._log.append(line)
                self._grew.notify_all()

    def logged(self, text: str) -> None:
        with self._grew:
            assert self._grew.wait_for(lambda: any(text in line for line in self._log), PATIENCE), "".join(self._log)

    def end(self) -> str:
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        assert self.process.wait(PATIENCE) == 0, "".join(self._log)
        return output


@contextmanager
def shells() -> Iterator[list[Shell]]:
    opened: list[Shell] = []
    try:
        yield opened
    finally:
        for shell in opened:
            shell.process.kill()
            shell.process.wait()
            shell._reader.join()
            for pipe in (shell.process.stdout, shell.process.stderr):
                assert pipe is not None
                pipe.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_from_shells_in_any_order(order: tuple[int, ...]) -> None:
    port = free_port()
    with shells() as opened:
        for rank in order:
            setting = f"RT_RANK={rank} RT_WORLD_SIZE=3 RT_COORDINATOR=127.0.0.1:{port} RT_LOG=debug"
            opened.append(Shell(f'{setting} exec "$1" -c "$2"'))
            if rank > 0 and 0 not in order[: order.index(rank)]:
                opened[-1].logged("Connection refused")  # it has looked for rank 0, which is not there yet
        assert [shell.end() for shell in opened] == ["sum 6.0 of 3\n"] * 3


def test_mlx_variables_from_shells_in_any_order(tmp_path: Path) -> None:
    ring = tmp_path / "ring.json"
    ring.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    with shells() as opened:
        for rank in range(2):
            opened.append(Shell(f'MLX_RANK={rank} MLX_HOSTFILE={ring} RT_LOG=debug exec "$1" -c "$2"'))
            if rank == 0:
                opened[0].logged("Connection refused")
        assert [shell.end() for shell in opened] == ["sum 3.0 of 2\n"] * 2


def test_no_configuration_is_a_group_of_one() -> None:
    done = run([sys.executable, "-c", HELLO])
    assert (done.returncode, done.stdout, done.stderr) == (0, "sum 1.0 of 1\n", "")


# --- started wrongly: the last line says it all --------------------------------------------------------------------------------------

SYNC = "import rt.sync; rt.sync.init()"
ASYNC = "import asyncio, rt; asyncio.run(rt.init())"
GOOD = '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]'
FIRST = {"RT_RANK": "0"}
WRONG = {  # ring file, further variables, what the error must say; @ is the path of the file
    "file": ('[["127.0.0.1:5000"],\n ["127.0.0.1:5', FIRST, r"^RT_HOSTFILE @: found no JSON at line 2 .*, expected a JSON list"),
    "rank": (GOOD, {"RT_RANK": "2"}, r"^RT_RANK: found '2', expected an integer from 0 to 1"),
    "rank-text": (GOOD, {"RT_RANK": "one"}, r"^RT_RANK: found 'one', expected an integer from 0 to 1"),
    "no-rank": (GOOD, {}, r"^RT_HOSTFILE: found no RT_RANK beside it, expected RT_RANK with RT_HOSTFILE"),
    "address": ('[["[::1]:5000"], ["127.0.0.1"]]', FIRST, r"^RT_HOSTFILE @: entry \[1\]\[0\]: found '127.0.0.1', expected \"host:port\""),
    "ip": ('[["[::1]:5000"], ["127.0.0.300:1"]]', FIRST, r"^RT_HOSTFILE @: entry \[1\]\[0\]: found host '127.0.0.300', expected a"),
    "port": ('[["[::1]:5000"], ["127.0.0.1:70000"]]', FIRST, r"^RT_HOSTFILE @: entry \[1\]\[0\]: found port '70000', expected 1 to 65535"),
    "elsewhere": (
        '[["192.0.2.1:5000"], ["127.0.0.1:5001"]]',
        {"RT_RANK": "0", "RT_INSECURE": "1"},
        r"^RT_RANK, RT_HOSTFILE: entry 0 of the ring file, 192.0.2.1:5000: this host does not have that address; expected rank 0 to run on",
    ),
    "secret-mode": (GOOD, {"RT_RANK": "0", "RT_SECRET_FILE": "@"}, r"^RT_SECRET_FILE=@: found mode 0644, expected 0600; `chmod 600 @`$"),
}


@pytest.mark.parametrize("source", [SYNC, ASYNC], ids=["sync", "asyncio"])
@pytest.mark.parametrize(("content", "settings", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_start_ends_in_one_line(content: str, settings: dict[str, str], said: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / "ring.json"
    file.write_text(content)
    file.chmod(0o644)
    given = {name: value.replace("@", str(file)) for name, value in settings.items()}
    done = run([sys.executable, "-c", source], RT_HOSTFILE=str(file), **given)
    assert done.returncode == 1
    kind, _, line = done.stderr.splitlines()[-1].partition(": ")
    assert kind == "rt.errors.ConfigError"
    assert re.search(said.replace("@", re.escape(str(file))), line), line


def test_a_taken_port_ends_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run([sys.executable, "-c", SYNC], RT_RANK="0", RT_WORLD_SIZE="2", RT_COORDINATOR=where)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("rt.errors.ConfigError: RT_RANK, RT_WORLD_SIZE, RT_COORDINATOR: ") and f"{where}: the port is taken" in line
