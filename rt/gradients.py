"""Averaging trees of gradients in few collectives.

May live here: flattening, the rules of MLX's ``average_gradients`` (but one bucket per dtype), and their inverse. May not: how arrays
travel together (``fused``), waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rt import _fastpath, arrays
from rt.aio import Work
from rt.dtypes import INEXACT, Op, code_of
from rt.group import CoreGroup

if TYPE_CHECKING:
    import optree

BUCKET_BYTES = 32 * 1024**2
_WHAT = "average_gradients"
_NOTHING = np.empty(0, np.float32)


def averaging(bucket_bytes: int, communication_type: Any) -> Callable[[CoreGroup, Any, Any], Work]:
    """Return what starts the averaging of a tree on a group."""
    return lambda group, tree, _out: average(group, tree, bucket_bytes, communication_type)


def average(group: CoreGroup, tree: Any, bucket_bytes: int, communication_type: Any) -> Work:
    """Start to average the leaves of a tree over all ranks; the result is a tree of the same structure, shapes, dtypes and kinds."""
    work = Work(group)
    if group.size == 1:
        work.finish(tree)
        return work
    from rt import fused

    leaves, rebuild, names = _flatten(tree)
    wire = None if communication_type is None else arrays.dtype_of(communication_type, _WHAT)
    if wire is not None and code_of(wire, _WHAT) not in INEXACT:
        raise TypeError(f"{_WHAT}: communication_type must be floating or complex, not {wire}")
    if group.takes_devices and any(group.on_device(leaf, _WHAT) is not None for leaf in leaves):
        return _on_device(group, leaves, wire, rebuild)
    # A tree without leaves is a call as any other, to be compared with those of the other ranks.
    given = fused.views(leaves or [_NOTHING], _WHAT, numbers=True)
    layout = fused.layout_of(_WHAT, given, wire, bucket_bytes, None, names)
    for code in layout.codes:
        if code not in INEXACT:
            raise TypeError(f"{_WHAT}: gradients must be floating or complex, found {code.name.lower()}")
        if wire is not None and code.name.startswith("COMPLEX") and wire.kind != "c":
            raise TypeError(f"{_WHAT}: communication_type {wire} cannot carry the {code.name.lower()} of a gradient")
    works = fused.start(group, layout, given.items, Op.MEAN, _WHAT)
    return fused.hold(works, f"{len(leaves)} arrays", lambda results: rebuild(given.hand_out(layout.cut(results))[: len(leaves)]))


def _on_device(group: CoreGroup, leaves: list[Any], wire: np.dtype[Any] | None, rebuild: Callable[[list[Any]], Any]) -> Work:
    """As ``average``, of arrays of CuPy."""
    from rt import fused

    if wire is None:
        return fused.each(group, leaves, Op.MEAN, None, _WHAT, rebuild)

    def back(results: list[Any]) -> Any:
        return rebuild([result.astype(leaf.dtype) for result, leaf in zip(results, leaves, strict=True)])

    return fused.each(group, [leaf.astype(wire) for leaf in leaves], Op.MEAN, None, _WHAT, back)


def _flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any], str]:
    """Return the leaves of a tree, what makes a tree of the same structure of others, and their names."""
    # A plain list of plain arrays is its own leaves; optree would take as long as all the rest of the call.
    if type(tree) in (list, tuple) and tree and _fastpath.forms_key(list(tree)) is not None:
        return list(tree), type(tree), ""
    import optree  # here, not above: importing it costs more than the rest of rt

    leaves, structure = optree.tree_flatten(tree)
    return leaves, lambda results: optree.tree_unflatten(structure, results), _names(structure)


@functools.lru_cache(256)
def _names(structure: optree.PyTreeSpec) -> str:
    """Return where each leaf is found. Of keys that are not names or numbers the type counts: they may read otherwise on each rank."""
    found = [".".join(str(key) if isinstance(key, (str, int)) else type(key).__name__ for key in path) for path in structure.paths()]
    return "" if found == [str(index) for index in range(len(found))] else " ".join(found)  # a list of arrays needs no names
