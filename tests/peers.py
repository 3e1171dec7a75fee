"""The environment of torch, MLX, MPI and JAX, ``.venv-peers`` (``make peers``), and what tests lend it.

May live here: where it is, what it holds, how ranks run in it. May not: tests.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv-peers" / "bin"
PYTHON = BIN / "python"
# This environment's packages come first: ranks there need NumPy, pytest, uvloop and rt's dependencies from here.
LENT: dict[str, Any] = {
    "python": str(PYTHON),
    "env": {"PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("platlib")]), "JAX_PLATFORMS": "cpu"},
}


@functools.cache
def _extension_suffix() -> str:
    code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def missing(name: str) -> str:
    """Return why a program or package of the peers' cannot be used, "" if it can."""
    packages = ROOT.glob(f".venv-peers/lib/python*/site-packages/{name}")
    if not PYTHON.exists() or not ((BIN / name).exists() or any(packages)):
        return f"no {name} in .venv-peers: make peers"
    ours = sysconfig.get_config_var("EXT_SUFFIX")
    theirs = _extension_suffix()
    return "" if theirs == ours else f".venv-peers has extensions {theirs}, this Python {ours}"


def needs_peers(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test, with the reason, where a program or package of the peers' is missing."""
    reason = missing(name)
    return pytest.mark.skipif(bool(reason), reason=reason or "-")
