"""A griffe extension: the calls of ``rt`` and ``rt.sync`` are shown as their callers see them, without ``self``.

May live here: what the API page needs to know of our modules. May not: anything the runtime needs.
"""

from __future__ import annotations

from typing import Any

import griffe


class BoundMethods(griffe.Extension):
    """Drop ``self`` from the methods of ``Api``: the modules offer them bound."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Hear of each function and method that was inspected."""
        if func.parent is not None and func.parent.name == "Api" and "self" in func.parameters:
            del func.parameters["self"]
