"""What is said of the verbs' binary interface, where its header is installed to hold it against (Debian: libibverbs-dev).

May live here: compiling ``verbs_abi.c``, the forms that pyverbs has. May not: anything that needs a device (``rdma_suite``).
"""

from __future__ import annotations

import enum
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from transports import verbs

HERE = Path(__file__).parent
OFFSETS = {
    "PAIR_QUEUE": verbs._PAIR_QUEUE,
    "PAIR_NUMBER": verbs._PAIR_NUMBER,
    "QUEUE_CHANNEL": verbs._QUEUE_CHANNEL,
    "CHANNEL_FD": verbs._CHANNEL_FD,
}


@pytest.mark.skipif(not Path("/usr/include/infiniband/verbs.h").exists(), reason="no libibverbs-dev")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_structs_and_constants_are_those_of_the_header() -> None:
    words = ["gcc", "-fsyntax-only", "-Wno-unused-function", f"-I{HERE.parent / 'rt'}", *(f"-D{name}={at}" for name, at in OFFSETS.items())]
    done = subprocess.run([*words, str(HERE / "verbs_abi.c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Flags(enum.IntFlag):
    IBV_ACCESS_LOCAL_WRITE = 1
    IBV_ACCESS_REMOTE_WRITE = 2


@pytest.mark.parametrize("module", (SimpleNamespace(**Flags.__members__), SimpleNamespace(ibv_access_flags=Flags)), ids=("44", "59"))
def test_constants_are_found_in_either_form(module: object) -> None:
    assert verbs.constants.__wrapped__(module).IBV_ACCESS_REMOTE_WRITE == 2
