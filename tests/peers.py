"""The environment of torch, MLX and JAX, ``.venv-peers`` (``make peers``), and what tests lend it.

May live here: where it is, what it holds, how ranks run in it. May not: tests.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
# This environment's packages come first: ranks there need NumPy, pytest, uvloop and rt's dependencies from here.
LENT: dict[str, Any] = {
    "python": str(PYTHON),
    "env": {"PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("platlib")]), "JAX_PLATFORMS": "cpu"},
}


def _extension_suffix() -> str:
    code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def missing(package: str) -> str:
    """Return why ranks cannot use a package of the peers', "" if they can."""
    if not PYTHON.exists() or not list((ROOT / ".venv-peers").glob(f"lib/python*/site-packages/{package}")):
        return f"no {package} in .venv-peers: make peers"
    ours = sysconfig.get_config_var("EXT_SUFFIX")
    theirs = _extension_suffix()
    return "" if theirs == ours else f".venv-peers has extensions {theirs}, this Python {ours}"


def needs_peers(package: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test, with the reason, where a package of the peers' is missing."""
    reason = missing(package)
    return pytest.mark.skipif(bool(reason), reason=reason or "-")
