"""A measurement on ranks of our own, all on this host.

May live here: starting every system that is compared. May not: how (``conductor.py``), what is measured (``measure.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from bench import measure
from bench.adapters import ADAPTERS
from bench.conductor import RANK, running


def run(options: measure.Options) -> measure.Result:
    """Start every system, measure, end the systems.

    Raises:
        BenchError: a system could not be started or broke.
    """
    return run_each([options])[0]


def run_each(wanted: Sequence[measure.Options]) -> list[measure.Result]:
    """As ``run``, for several measurements of the same systems, which are started once."""
    options = wanted[0]
    with contextlib.ExitStack() as stack:
        systems = []
        for name in options.systems:
            measure.progress(f"starting {options.size} ranks of {name}")
            systems.append(stack.enter_context(running(name, ADAPTERS[name].meeting or ADAPTERS[name].kind, options.size, [*RANK, name])))
        return [measure.run(each, systems) for each in wanted]
