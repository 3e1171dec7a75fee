"""``docs/matrix.md`` says what is so.

May live here: the comparison of that page with what its generator finds now.
"""

from __future__ import annotations

import matrix
import pytest
from peers import ROOT, needs_peers

import rt


@needs_peers("jax")
@needs_peers("mlx")
@needs_peers("torch")
@pytest.mark.timeout(400)
def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "matrix.md").read_text() == matrix.page(), "run: python tests/matrix.py > docs/matrix.md"


def test_every_collective_that_takes_arrays_is_on_the_page() -> None:
    text = (ROOT / "docs" / "matrix.md").read_text()
    missing = [name for name, _ in matrix.collectives(rt) if f"`{name}`" not in text]
    assert not missing, "run: python tests/matrix.py > docs/matrix.md"
