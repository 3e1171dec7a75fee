"""``python tests/matrix.py > docs/matrix.md``: what every collective takes, found by trying everything.

May live here: the probe that ranks run, and the page made of what it found. May not: expectations; ``test_matrix`` compares the page, and
the other tests say what is right.

Collectives are those of ``rt.__all__`` that take arrays: a new one appears by itself. Every cell is a call between two ranks; one that is
refused gives the reason in a footnote. The page needs torch, MLX and JAX (``make peers``).
"""

from __future__ import annotations

import array
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from peers import LENT, missing
from ranks import FRONTS, results

from rt import arrays
from rt.dtypes import OPS, DType, numpy_dtype

DTYPES = [code.name.lower() for code in DType]
NO_DTYPE = "has no such dtype"
_ITEMS = 4

Make = Callable[[Any], Any]  # an array of this kind, of a NumPy array; ValueError or TypeError: the kind has no such dtype


def kinds() -> dict[str, Make]:
    """Return how an array of each kind is made."""
    import jax
    import jax.numpy as jnp
    import mlx.core as mx
    import torch

    jax.config.update("jax_enable_x64", True)
    codes = {np.dtype(code).name: code for code in "bBhHiIlLfd"}

    def of_array(x: Any) -> Any:
        return array.array(_known(codes, x), x.tobytes())

    def bytes_like(kind: Any) -> Make:
        return lambda x: kind(_known({"uint8": x}, x).tobytes())

    def of_mlx(x: Any) -> Any:
        dtypes = {name: mx.bool_ if name == "bool" else getattr(mx, name) for name in DTYPES if name != "complex128"}
        return mx.array(x, dtype=_known(dtypes, x))

    def of_torch(x: Any) -> Any:
        dtype = getattr(torch, x.dtype.name)
        return torch.from_numpy(x.view(np.int16)).view(dtype) if x.dtype.name == "bfloat16" else torch.from_numpy(x)

    def number(x: Any) -> Any:
        return _known({"bool": bool, "int64": int, "float64": float, "complex128": complex}, x)(x[0].item())

    return {
        "numpy.ndarray": lambda x: x, "torch.Tensor": of_torch, "mlx.core.array": of_mlx, "jax.Array": jnp.asarray,
        "memoryview": lambda x: _known(dict.fromkeys([d for d in DTYPES if d != "bfloat16"], x), x).data, "array.array": of_array,
        "bytearray": bytes_like(bytearray), "bytes": bytes_like(bytes), "Python number": number, "list of ndarray": lambda x: [x, x],
    }  # fmt: skip


def _known(table: dict[str, Any], x: Any) -> Any:
    if x.dtype.name not in table:
        raise ValueError(NO_DTYPE)
    return table[x.dtype.name]


def collectives(module: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield what takes arrays, or dtypes, with the names of its positional parameters."""
    for name in module.__all__:
        member = getattr(module, name)
        if callable(member) and not isinstance(member, type):
            names = [p.name for p in inspect.signature(member).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            if {"x", "dtype", "gradients"} & set(names):
                yield name, names


def arguments(name: str, names: list[str], x: Any, peer: int) -> list[Any]:
    """Return what to call a collective with; a parameter that is not known here and has no default must be added here."""
    halves, wholes = [_ITEMS // 2] * 2, [_ITEMS] * 2
    known = {
        "x": x, "gradients": [x], "dst": peer, "src": peer, "shape": _ITEMS, "dtype": getattr(x, "dtype", None),
        "counts": halves if "scatter" in name else wholes, "send_counts": halves, "recv_counts": halves,
    }  # fmt: skip
    found = []
    for each in names:
        if each not in known:
            break  # what follows has a default, or the call will say so
        found.append(known[each])
    return found


async def call(rt: Any, name: str, names: list[str], x: Any, plain: Any, peer: int, **how: Any) -> Any:
    """Call a collective on both ranks, with the other half of those that need one."""
    given = arguments(name, names, x, peer)
    function = getattr(rt, name)
    if "dst" in names and "src" not in names:
        found = await function(*given, **how)
        await rt.recv(plain.shape, plain.dtype, peer)
        return found
    if "src" in names and "dst" not in names:
        sent = rt.send(plain, peer)
        try:
            return await function(*given, **how)
        except (TypeError, ValueError):
            await rt.recv(plain.shape, plain.dtype, peer)
            raise
        finally:
            await sent
    found = await function(*given, **how)
    return found[0] if "gradients" in names else found


def reason(error: Exception) -> str:
    """Return why a call was refused, without what differs from cell to cell."""
    text = re.sub(r"^\w+: |^\[\w+\] ", "", str(error).splitlines()[0])
    text = re.sub(r"op '(and|or|xor)' is", "bitwise operators are", text)
    text = re.sub(r"counts\[\d\] = \d", "counts[rank]", text)
    return re.sub(r"(, not|, found|, but has|\. The|; take|; use|; supported).*", "", text)


def same(found: Any, plain: Any, x: Any) -> bool:
    """Say whether a result has the items of NumPy's result and the kind of x."""
    if found is None or plain is None:
        return found is plain
    if isinstance(x, list):
        return all(same(each, plain, plain) for each in found)
    expected = np.ndarray if isinstance(x, arrays.SCALARS) else type(x)
    return type(found) is expected and np.array_equal(arrays.view(found, "").array, plain)


async def probe(rt: Any, group: Any, ctl: Any) -> dict[tuple[str, str, str], str]:
    """Return for every collective, dtype, and operator or kind, "" if it did what it does with NumPy arrays, else why not."""
    found: dict[tuple[str, str, str], str] = {}
    me, peer = group.rank(), 1 - group.rank()
    every = list(collectives(getattr(rt, "real", rt)))
    makes = kinds()
    for dtype in DTYPES:
        plain = (np.arange(_ITEMS) + me).astype(numpy_dtype(DType[dtype.upper()]))
        for name, names in every:
            for op in OPS if "op" in names else ():
                found[name, dtype, f"op {op}"] = await tried(rt, name, names, plain, plain, peer, op=op)
            for kind, make in makes.items():
                try:
                    x = make(plain.copy())
                except ValueError as error:
                    found[name, dtype, kind] = str(error)
                    continue
                base = plain[:1].reshape(()) if isinstance(x, arrays.SCALARS) else plain
                if "dtype" in names and not hasattr(x, "dtype"):
                    found[name, dtype, kind] = "takes a dtype, not an array"
                else:
                    found[name, dtype, kind] = await tried(rt, name, names, x, base, peer)
    for kind, make in makes.items():
        plain = np.arange(_ITEMS, dtype=np.uint8)
        try:
            out = make(plain.copy()) if kind != "Python number" else 1
            found["out", "", kind] = "" if await rt.all_sum(plain, out=out) is out else "is not what the call returns"
        except TypeError as error:
            found["out", "", kind] = reason(error)
    return found


async def tried(rt: Any, name: str, names: list[str], x: Any, plain: Any, peer: int, **how: Any) -> str:
    try:
        found = await call(rt, name, names, x, plain, peer, **how)
    except (TypeError, ValueError) as error:
        return reason(error)
    if how or x is plain:
        return ""
    if "dtype" in names:
        return "" if type(found) is np.ndarray else "wrong"
    return "" if same(found, await call(rt, name, names, plain, plain, peer), x) else "wrong"


# -- the page -----------------------------------------------------------------------------------------------------------------------------

_HEAD = """\
# What every collective takes

Written by `python tests/matrix.py > docs/matrix.md`, which tries every cell between two ranks; `tests/test_matrix.py` fails when this page
is not what that finds. All four front ends (`rt.sync`, asyncio, asyncio's debug mode, uvloop) found the same, cell by cell. `yes`: the call
did what it does with NumPy arrays, and its result is of the caller's kind (a Python number gives a NumPy array; `recv` is given the
kind's dtype, and always gives a NumPy array). A number in brackets: why not, below. `-`: the kind has no such dtype.
"""


def page() -> str:
    """Run the probe in all front ends and return the page.

    Raises:
        AssertionError: front ends or ranks found different things, or a result was wrong.
    """
    found = [each for front in FRONTS for each in results(2, probe, front=front, timeout=100, **LENT)]
    for other in found[1:]:
        assert other == found[0], {key: (value, other[key]) for key, value in found[0].items() if other[key] != value}
    cells, notes = found[0], Notes()
    assert "wrong" not in cells.values(), [key for key, value in cells.items() if value == "wrong"]
    names = list(dict.fromkeys(name for name, _, _ in cells if name != "out"))
    lines = [_HEAD]
    for title, operators in (("Operators and dtypes", True), ("Kinds and dtypes", False)):
        lines.append(f"## {title}\n")
        tables: dict[str, list[str]] = {}
        for name in names:
            rows = list(dict.fromkeys(row for each, _, row in cells if each == name and row.startswith("op ") is operators))
            if rows:
                tables.setdefault(_table(rows, lambda row, d, name=name: notes.cell(cells[name, d, row])), []).append(name)
        lines += [f"{', '.join(f'`{name}`' for name in members)}:\n\n{table}" for table, members in tables.items()]
    lines.append("## `out=`\n\nReceives results, and is returned:\n")
    lines += [f"- {kind}: {'no, ' + why if why else 'yes'}" for (name, _, kind), why in cells.items() if name == "out"]
    return "\n".join([*lines, "\n## Why not\n", *notes.lines()]) + "\n"


class Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, why: str) -> str:
        """Return what stands in a cell."""
        return "yes" if not why else "-" if why == NO_DTYPE else f"[{self._numbers.setdefault(why, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        """Return the footnotes."""
        return [f"{number}. {why}" for why, number in self._numbers.items()]


def _table(rows: list[str], cell: Callable[[str, str], str]) -> str:
    lines = ["| | " + " | ".join(DTYPES) + " |", "|---" * (len(DTYPES) + 1) + "|"]
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(" | ".join(cell(row, dtype) for dtype in DTYPES), []).append(row.removeprefix("op "))
    return "\n".join([*lines, *(f"| {', '.join(members)} | {text} |" for text, members in grouped.items()), ""])


if __name__ == "__main__":
    for package in ("torch", "mlx", "jax"):
        if missing(package):
            sys.exit(missing(package))
    sys.stdout.write(page())
