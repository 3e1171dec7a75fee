"""A Slurm of its own: munged, slurmctld and a slurmd per node, started and ended by a test, on this machine or on hosts of namespaces.

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

import netns

PATIENCE = 30.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({address})
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
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={port}
SwitchType=switch/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing() -> str:
    """Say why there is no Slurm here; "" where one can be started."""
    absent = [tool for tool in ("munged", "slurmctld", "slurmd", "srun", "sinfo") if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmd, slurmctld, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "starting a Slurm of one's own takes root"


@contextmanager
def cluster(folder: Path, hosts: Sequence[netns.Host] = ()) -> Iterator[dict[str, str]]:
    """Yield the variables with which ``srun`` finds a Slurm that lives in ``folder``, ready to run jobs.

    Args:
        folder: for configuration, key, logs and state.
        hosts: on a switch, as ``netns.switched`` makes them: a node on each but the last, where srun runs; none: this machine alone.
    """
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    (folder / "state").mkdir()
    name = socket.gethostname().partition(".")[0]
    addresses = [f"10.2.0.{number + 1}" for number in range(len(hosts))] or ["127.0.0.1"] * 2
    port, *ports = _free_ports(len(addresses))
    nodes = [
        f"NodeName=node{number} NodeHostname={name} NodeAddr={addresses[number]} Port={each} CPUs=4 State=UNKNOWN"
        for number, each in enumerate(ports)
    ]
    config.write_text(_CONFIGURATION.format(folder=folder, host=name, address=addresses[-1], port=port, nodes="\n".join(nodes)))
    told = {"SLURM_CONF": str(config)}
    own = [f"--{name}={folder}/{file}" for name, file in (("key-file", "munge.key"), ("socket", "munge.sock"), ("pid-file", "munged.pid"))]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w+"))

        def start(*command: str, on: int = -1) -> subprocess.Popen[str]:
            words = hosts[on].command_among_others(*command) if hosts else command
            process = subprocess.Popen(words, env=os.environ | told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.terminate)
            return process

        munged = start("munged", "--foreground", "--force", *own, f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
        _until(lambda: (folder / "munge.sock").exists(), munged, folder)
        controller = start("slurmctld", "-D")
        for number in range(len(nodes)):
            start("slurmd", "-D", "-N", f"node{number}", on=number)
        asking = ["sinfo", "-h", "-N", "-o", "%T"]
        asking = hosts[-1].command_among_others(*asking) if hosts else asking
        _until(lambda: _said(asking, told).split() == ["idle"] * len(nodes), controller, folder)
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
