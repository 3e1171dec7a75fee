"""Backend ``nccl`` where something of it is not there: what is said, and what to do.

May live here: the reasons why it cannot be used. May not: groups on it (``test_nccl``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nccl import STAND_IN

PROGRAM = "from rt import backends; print(backends.unavailable('nccl')); print('cupy' in __import__('sys').modules)"


def told(*path: str | Path, **environ: str) -> list[str]:
    """Return what a process prints that finds these modules first."""
    env = {**os.environ, **environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def package(folder: Path, source: str, nccl: str = "available = False") -> Path:
    """Write a package ``cupy`` with a module ``cupy.cuda.nccl``."""
    for name, text in (("cupy/__init__.py", source), ("cupy/cuda/__init__.py", ""), ("cupy/cuda/nccl.py", nccl)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.skipif(__import__("importlib.util").util.find_spec("cupy") is not None, reason="CuPy is here")
def test_no_cupy() -> None:
    why, loaded = told()
    assert why == (
        f"which needs CuPy, and this Python ({sys.executable}) has none: `pip install 'rt-collectives[cuda12]'` (or [cuda13], by the CUDA "
        "of the driver) installs CuPy and NCCL"
    )
    assert loaded == "False"


def test_a_cupy_that_cannot_be_loaded(tmp_path: Path) -> None:
    why, _ = told(package(tmp_path, "raise ImportError('libcuda.so.1 is not there\\nand more')"))
    assert why.startswith("which needs a CuPy that can be loaded: libcuda.so.1 is not there; `pip install 'rt-collectives[cuda12]'`")


def test_a_cupy_without_nccl(tmp_path: Path) -> None:
    why, _ = told(package(tmp_path, "import warnings; __version__ = '14.2.0'; warnings.warn('no nccl')"))
    assert why.startswith("which needs NCCL, and CuPy 14.2.0 found no libnccl.so.2: `pip install 'rt-collectives[cuda12]'`")


def test_no_device() -> None:
    assert told(STAND_IN, STANDIN_DEVICES="0")[0] == "which needs a CUDA device, and CuPy found none here; expected 'ring' or 'mpi'"
    assert told(STAND_IN)[0] == ""
