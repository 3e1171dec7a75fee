"""The lines of logger ``rt``: only if asked for, with the rank once it is known.

May live here: tests of ``rt/log.py`` against dictionaries. May not: what is logged, the real environment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from rt.errors import ConfigError
from rt.log import configure


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("rt")
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, None),
        ({"RT_VERBOSE": "0"}, None),
        ({"RT_VERBOSE": "0", "MLX_RING_VERBOSE": "1"}, None),
        ({"RT_VERBOSE": "1"}, logging.INFO),
        ({"MLX_RING_VERBOSE": "0"}, logging.INFO),
        ({"RT_LOG": "info"}, logging.INFO),
        ({"RT_LOG": "debug", "RT_VERBOSE": "0"}, logging.DEBUG),
    ],
)
def test_a_handler_only_if_asked(environ: dict[str, str], level: int | None, logger: logging.Logger) -> None:
    before, old_level = logger.handlers[:], logger.level
    configure(environ)
    assert len(logger.handlers) == len(before) + (level is not None)
    assert logger.level == (old_level if level is None else level)


def test_lines_bear_the_rank_once_it_is_known(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure({"RT_VERBOSE": "1"})
    logger.info("hello %d", 1)
    configure({"RT_VERBOSE": "1"}, rank=3)
    logger.info("hello %d", 2)
    logger.debug("hello %d", 3)
    assert capsys.readouterr().err == "[rt] hello 1\n[rt rank 3] hello 2\n"


@pytest.mark.parametrize(("name", "value"), [("RT_LOG", "trace"), ("RT_LOG", ""), ("RT_VERBOSE", "yes")])
def test_malformed_logging(name: str, value: str, logger: logging.Logger) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: found '{value}', expected"):
        configure({name: value})
