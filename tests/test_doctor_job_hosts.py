"""``rt.doctor --job --hosts``: a job on hosts with sshd is asked from a desk that has no part in it.

May live here: jobs that hang, asked by ssh. May not: what is asked on the job's own hosts, verdicts in detail (``test_doctor_job``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sshd
from far import lines, running
from hosts import ROOT
from test_doctor_job import calling

pytestmark = sshd.NEEDED
PATIENCE = 60.0

HANGS = """
import numpy as np, rt.sync as rt
group = rt.init()
print("met", flush=True)
if rank == 1:
    sys.stdin.readline()
group.all_sum(np.ones(4, np.float32))
print("end", flush=True)
"""
LATE = """
import rt.sync as rt
print("runs", flush=True)
if rank == 2:
    sys.stdin.readline()
rt.init()
"""


def doctor(site: sshd.Site, *words: str) -> subprocess.CompletedProcess[str]:
    command = site.command("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "rt.doctor", "--job", *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def until(site: sshd.Site, words: list[str], happened: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask until the ranks are where the test wants them: nobody tells from outside that a call has begun to wait."""
    deadline = time.monotonic() + PATIENCE
    while True:
        told = json.loads(doctor(site, "--json", *words).stdout)
        if told["jobs"] and happened(told["jobs"][0]):
            return told, told["jobs"][0]
        assert time.monotonic() < deadline, told


def test_a_job_is_asked_from_a_desk(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site, running(site, tmp_path / "script.py", HANGS) as process:
        assert all(line.endswith("met\n") for line in lines(process, 3))
        _, job = until(site, ["--hosts", ",".join(site.names)], lambda job: calling(0, 2)(job) and bool(job["ranks"][1]))
        assert job["verdict"].startswith("rank 1 has not called all_sum #0 (float32, 16 B); rank 1 is at script.py:")
        assert "; ranks 0 and 2 wait for it since " in job["verdict"] and job["size"] == 3
        # One host of the job speaks for all; what cannot be asked is said, and hides nothing.
        (tmp_path / "hosts.json").write_text(json.dumps([{"ssh": "no-such-name.invalid"}, {"ssh": "host1"}]))
        told, again = until(site, ["--hostfile", str(tmp_path / "hosts.json")], lambda job: all(job["ranks"]))
        assert [rank["host"] for rank in again["ranks"]] == [rank["host"] for rank in job["ranks"]]
        assert [problem["host"] for problem in told["problems"]] == ["no-such-name.invalid"]
        shown = doctor(site, job["job"][:4], "--hosts", "host2,no-such-name.invalid")
        assert shown.returncode == 0 and f"job {job['job']}, 3 ranks" in shown.stdout
        assert "rt.doctor: no-such-name.invalid: ssh: Could not resolve hostname" in shown.stderr
        assert process.stdin is not None
        process.stdin.write(b"go on\n")
        assert process.wait(PATIENCE) == 0
        none = doctor(site, "--hosts", "host0,host1")
        assert none.returncode == 1 and none.stderr.splitlines()[-1] == "rt.doctor: no job of yours has a rank on host0, host1"


def test_ranks_that_have_not_met_are_asked_on_each_host(tmp_path: Path) -> None:
    with sshd.site(tmp_path, 3) as site, running(site, tmp_path / "script.py", LATE) as process:
        assert all(line.endswith("runs\n") for line in lines(process, 3))
        said = "the group has not formed: rank 0 waits for rank 2: not heard of"
        _, job = until(site, ["--hosts", ",".join(site.names)], lambda job: job["verdict"] == said and bool(job["ranks"][1]))
        assert sorted(job["missing"]) == ["0", "1"] and job["ranks"][2] is None
