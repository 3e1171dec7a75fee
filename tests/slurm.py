"""A Slurm of one node: munged, slurmctld and slurmd with a configuration of their own, started and ended by a test.

May live here: starting and ending it. May not: jobs, anything of ``rt``. Debian: slurmd, slurmctld, slurm-client, munge; it takes root.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PATIENCE = 30.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SwitchType=switch/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing() -> str:
    """Say why there is no Slurm here; "" where one can be started."""
    absent = [tool for tool in ("munged", "slurmctld", "slurmd", "srun", "sinfo") if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmd, slurmctld, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "starting a Slurm of one's own takes root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the variables with which ``srun`` finds a Slurm that lives in ``folder``, ready to run jobs."""
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config.write_text(_CONFIGURATION.format(folder=folder, host=socket.gethostname().partition(".")[0], ports=_free_ports(2)))
    told = {"SLURM_CONF": str(config)}
    own = [f"--{name}={folder}/{file}" for name, file in (("key-file", "munge.key"), ("socket", "munge.sock"), ("pid-file", "munged.pid"))]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w+"))

        def start(command: Sequence[str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, env=os.environ | told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.terminate)
            return process

        munged = start(["munged", "--foreground", "--force", *own, f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"])
        _until(lambda: (folder / "munge.sock").exists(), munged, folder)
        start(["slurmctld", "-D"])
        node = start(["slurmd", "-D"])
        _until(lambda: "idle" in _said(["sinfo", "-h", "-o", "%T"], told), node, folder)
        yield told


def _said(command: Sequence[str], told: dict[str, str]) -> str:
    return subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=PATIENCE).stdout


def _until(ready: object, process: subprocess.Popen[str], folder: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)  # these daemons tell nobody when they are ready


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]
