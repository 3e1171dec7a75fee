"""Averaging trees of gradients in few collectives.

May live here: flattening, bucketing (the rules of MLX's ``average_gradients``, but one bucket per dtype) and their inverse. May not:
waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rt import collectives
from rt.aio import Work
from rt.dtypes import INEXACT, code_of
from rt.group import CoreGroup

BUCKET_BYTES = 32 * 1024**2


class Plan:
    """Which leaves travel together.

    A bucket takes leaves, in tree order, until it holds at least ``bucket_bytes``; the leaf that crosses the line is included.
    """

    def __init__(self, tree: Any, bucket_bytes: int, communication_type: Any) -> None:
        import optree  # here, not above: importing it costs more than the rest of rt

        leaves, self._structure = optree.tree_flatten(tree)
        self._leaves = [np.asarray(leaf) for leaf in leaves]
        self._wire = None if communication_type is None else np.dtype(communication_type)
        if self._wire is not None and code_of(self._wire) not in INEXACT:
            raise TypeError(f"average_gradients: communication_type must be floating or complex, not {self._wire}")
        for leaf in self._leaves:
            if code_of(leaf.dtype) not in INEXACT:
                raise TypeError(f"average_gradients: gradients must be floating or complex, found {leaf.dtype}")
            if self._wire is not None and leaf.dtype.kind == "c" and self._wire.kind != "c":
                raise TypeError(f"average_gradients: communication_type {self._wire} cannot carry the {leaf.dtype} of a gradient")
        self._buckets = self._fill(bucket_bytes)

    def _fill(self, bucket_bytes: int) -> list[list[int]]:
        if bucket_bytes <= 0:
            return [[index] for index in range(len(self._leaves))]
        buckets: list[list[int]] = []
        open_buckets: dict[Any, tuple[list[int], int]] = {}
        for index, leaf in enumerate(self._leaves):
            wire = self._wire or leaf.dtype
            members, nbytes = open_buckets.pop(wire, ([], 0))
            if not members:
                buckets.append(members)
            members.append(index)
            nbytes += leaf.size * wire.itemsize
            if nbytes < bucket_bytes:
                open_buckets[wire] = members, nbytes
        return buckets

    def starts(self) -> Iterator[Callable[[CoreGroup, Any, Any], Work]]:
        """Yield what starts the all-reduce of each bucket, joining it only then: the first travel while the next are copied."""
        for members in self._buckets:
            wire = self._wire or self._leaves[members[0]].dtype
            joined = np.concatenate([self._leaves[index].astype(wire, copy=False).reshape(-1) for index in members])
            yield functools.partial(_mean, joined)

    def finish(self, means: list[Any]) -> Any:
        """Cut the reduced buckets up again."""
        import optree

        results: list[Any] = [None] * len(self._leaves)
        for members, mean in zip(self._buckets, means, strict=True):
            at = 0
            for index in members:
                leaf = self._leaves[index]
                results[index] = mean[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype, copy=False)
                at += leaf.size
        return optree.tree_unflatten(self._structure, results)


def _mean(joined: np.ndarray[Any, Any], core: CoreGroup, _x: Any, _out: Any) -> Work:
    return collectives.all_reduce(core, joined, "mean", joined, "average_gradients")
