"""Reading a JSON file that a person wrote.

May live here: what can be wrong with any such file. May not: what a certain one must hold (``config``, ``tuning``).
"""

from __future__ import annotations

import json
import os
from typing import Any

from rt.errors import ConfigError


def load(path: str | os.PathLike[str], where: str, expected: str) -> object:
    """Return the content of a file.

    Raises:
        ConfigError: it cannot be read, or is no JSON, or names something twice in one object; one line that begins with ``where`` and
            ends with what was ``expected``.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ConfigError(f"{where}: found {json.dumps(name)} twice in one object, expected {expected}")
            fields[name] = value
        return fields

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{where}: found {error.strerror!r}, expected {expected}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: found a byte that is no UTF-8 at offset {error.start}, expected {expected}") from None
    if not text.strip():
        raise ConfigError(f"{where}: found an empty file, expected {expected}")
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}"
        raise ConfigError(f"{where}: found no JSON at {at} ({error.msg}), expected {expected}") from None


def brief(value: object) -> str:
    """Describe what JSON held, on one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
