"""Backend ``jaccl``: the suite that needs verbs, run in its guest, and what can be seen without.

May live here: booting the guest once and reporting what it found. May not: tests on verbs (``rdma_suite``, which runs inside).
"""

from __future__ import annotations

import faulthandler
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import rdma_guest

import rt
import rt.sync
from rt import doctor
from transports import verbs

WHY_NOT = rdma_guest.missing()


@pytest.mark.timeout(rdma_guest.SECONDS + 20)
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it can run")
def test_the_suite_in_the_guest(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # it takes minutes, and says itself what hangs in it
    status, output = rdma_guest.boot(rdma_guest.SUITE, tmp_path)
    assert (tmp_path / "junit.xml").exists(), output[-20_000:]
    found = ElementTree.parse(tmp_path / "junit.xml").getroot()[0].attrib
    print(f"in the guest: {found}")
    assert status == 0, output[-20_000:]
    assert int(found["tests"]) - int(found["skipped"]) > 30, output[-20_000:]


@pytest.mark.skipif(not verbs.missing(), reason="pyverbs is installed")
def test_without_pyverbs_it_says_what_to_install() -> None:
    assert not rt.is_available("jaccl")
    with pytest.raises(rt.ConfigError, match=r"^keyword backend: found 'jaccl', pyverbs cannot be loaded .*rt-collectives\[rdma\]"):
        rt.sync.init(strict=True, backend="jaccl")


@pytest.mark.skipif(not verbs.missing(), reason="pyverbs is installed")
def test_the_doctor_says_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--rdma"]) == 1
    assert "pyverbs cannot be loaded" in capsys.readouterr().out
