"""What machine a number was taken on, since a number without it says nothing.

May live here: facts about this host. May not: measurements.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def facts() -> dict[str, str]:
    """Return label -> fact, in the order to print them."""
    return {
        "cpu": cpu_model(),
        "cores": str(cores()),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "uvloop": _version("uvloop"),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def lines() -> list[str]:
    """Return the facts as comment lines of the header of a table whose ranks are all on this host."""
    found = facts()
    pairs = [f"{label} {found[label]}" for label in ("cpu", "cores", "kernel")]
    versions = [f"{label} {found[label]}" for label in ("python", "numpy", "uvloop")]
    return [f"# {', '.join(pairs)}", f"# {', '.join(versions)}", f"# load average {found['load']}; loopback: all ranks on this host"]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the processor's marketing name, or the architecture where the system does not tell."""
    if sys.platform == "darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        label, _, value = line.partition(":")
        if label.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
