"""What can be called, how, and what is refused: the same in both front ends.

May live here: signatures, arguments, what ``import rt`` loads. May not: what a call does (``test_collectives``, ``test_init``,
``test_works``).
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import FRONTS, results

import rt
import rt.sync

OPS = (
    "all_reduce", "all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "broadcast", "barrier", "send", "recv", "recv_like",
    "reduce", "gather", "scatter", "all_to_all", "all_gather_v", "reduce_scatter_v", "gather_v", "scatter_v", "all_to_all_v", "scan",
    "exscan", "sendrecv",
)  # fmt: skip
OBJECTS = ("send_object", "recv_object", "broadcast_object", "gather_objects", "all_gather_objects")
CALLS = (*OPS, *OBJECTS, "init", "is_available", "rank", "size", "close", "abort", "average_gradients")


# ---- signatures -----------------------------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any], *without: str) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", *without)]


@pytest.mark.parametrize("name", CALLS)
def test_both_front_ends_take_the_same_arguments(name: str) -> None:
    assert parameters(getattr(rt, name)) == parameters(getattr(rt.sync, name))


@pytest.mark.parametrize("name", [*OPS, *OBJECTS, "average_gradients"])
def test_methods_of_groups_take_the_same_arguments(name: str) -> None:
    expected = parameters(getattr(rt, name), "group")
    assert parameters(getattr(rt.Group, name)) == parameters(getattr(rt.sync.Group, name)) == expected


def test_both_groups_have_the_same_methods() -> None:
    def public(group: type) -> dict[str, Any]:
        return {name: parameters(member) for name, member in inspect.getmembers(group, callable) if not name.startswith("_")}

    assert public(rt.Group) == public(rt.sync.Group)
    assert set(public(rt.Group)) == {*OPS, *OBJECTS, "average_gradients", "rank", "size", "split", "abort"}


def test_what_is_exported() -> None:
    errors = {name for name in rt.__all__ if name.endswith("Error")}
    assert set(rt.__all__) - {"Work", "run"} == set(rt.sync.__all__) == {*CALLS, *errors, "Group"}
    assert errors == {name for name in vars(rt.errors) if name.endswith("Error")}
    assert all(getattr(rt, name) is getattr(rt.sync, name) for name in errors)
    assert all(hasattr(rt, name) for name in rt.__all__) and all(hasattr(rt.sync, name) for name in rt.sync.__all__)


@pytest.mark.parametrize("name", OPS)
def test_what_every_operation_takes_by_keyword_only(name: str) -> None:
    found = {p.name: p for p in inspect.signature(getattr(rt, name)).parameters.values()}
    expected = {"group", "stream", "timeout", "key"}
    expected |= {"out"} if name not in ("barrier", "send") else set()
    expected |= {"tag"} if name in ("send", "recv", "recv_like", "sendrecv") else set()
    assert {p.name for p in found.values() if p.kind is p.KEYWORD_ONLY} == expected
    assert all(found[each].default is None for each in expected - {"tag"})
    assert "tag" not in expected or found["tag"].default == 0


@pytest.mark.parametrize("name", OBJECTS)
def test_what_every_call_with_objects_takes_by_keyword_only(name: str) -> None:
    found = {p.name: p.default for p in inspect.signature(getattr(rt, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert found == {"group": None, "timeout": None} | ({"tag": 0} if name in ("send_object", "recv_object") else {})


def test_average_gradients_has_the_arguments_of_mlx() -> None:
    names = ["gradients", "group", "all_reduce_size", "communication_type", "communication_stream"]
    assert list(inspect.signature(rt.average_gradients).parameters) == names
    assert inspect.signature(rt.average_gradients).parameters["all_reduce_size"].default == 32 * 1024**2


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("init", "rank", "size")])
def test_every_call_is_documented(name: str) -> None:
    assert getattr(rt, name).__doc__ and getattr(rt.sync, name).__doc__


@pytest.mark.parametrize("name", [*OPS, *OBJECTS])
def test_the_help_of_every_call_says_all_that_it_takes_and_raises(name: str) -> None:
    for call in (getattr(rt, name), getattr(rt.sync, name), getattr(rt.Group, name), getattr(rt.sync.Group, name)):
        said = inspect.getdoc(call) or ""
        taken = {p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert set(re.findall(r"^ {4}(\w+): ", said.partition("Keyword Args:")[2], re.M)) == taken
        assert "timeout: seconds until" in said and "GroupBrokenError" in said and "TypeError" in said
        assert said.startswith(inspect.getdoc(getattr(rt, name)).partition("\n")[0]), "methods say what the call does"


def test_the_help_of_both_front_ends_is_whole() -> None:
    assert inspect.getdoc(rt.init) == inspect.getdoc(rt.sync.init) and "connect_timeout: seconds" in str(inspect.getdoc(rt.init))
    assert inspect.getdoc(rt.average_gradients) == inspect.getdoc(rt.sync.average_gradients)
    assert "MismatchError" in str(inspect.getdoc(rt.average_gradients))


def test_everything_works_where_python_drops_documentation() -> None:
    code = "import rt.sync as rt; print(rt.all_reduce.__doc__, rt.all_sum(2))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "None 2\n", done.stderr


# ---- arguments that are refused -------------------------------------------------------------------------------------------------------


async def refused_arguments(face: Any, group: Any, ctl: Any) -> None:
    me, x, i = group.rank(), np.ones((4, 3), np.float32), np.arange(4)
    fixed = np.ones((4, 3), np.float32)
    fixed.flags.writeable = False
    attempts: list[tuple[Any, str, Callable[[], Any]]] = [
        (TypeError, "list", lambda: face.all_sum([1, 2])),
        (TypeError, "tuple", lambda: face.all_gather((1, 2))),
        (TypeError, "NoneType", lambda: face.all_sum(None)),
        (TypeError, "str", lambda: face.all_sum("text")),
        (TypeError, "not supported", lambda: face.all_sum(np.array(["text"]))),
        (TypeError, "not supported", lambda: face.all_sum(np.array([None]))),
        (TypeError, "not supported", lambda: face.all_sum(np.zeros(3, np.longdouble))),
        (TypeError, "not supported", lambda: face.all_sum(np.zeros(3, "M8[s]"))),
        (TypeError, "byte order", lambda: face.all_sum(np.zeros(3, ">i4"))),
        (TypeError, "float32", lambda: face.all_reduce(x, "and")),
        (TypeError, "int64", lambda: face.all_reduce(i, "mean")),
        (TypeError, "int64", lambda: face.sum_scatter(i, "mean")),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, "average")),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, None)),
        (ValueError, "op must be one of sum", lambda: face.all_reduce(x, ["sum"])),
        (ValueError, r"\[sum_scatter\] Invalid shape=\(3, 2\) for a group of size 2", lambda: face.sum_scatter(np.ones((3, 2)))),
        (ValueError, r"\[sum_scatter\] Invalid shape=\(\)", lambda: face.sum_scatter(1.0)),
        (ValueError, "Invalid root=2", lambda: face.broadcast(x, 2)),
        (ValueError, "Invalid root=-1", lambda: face.broadcast(x, -1)),
        (TypeError, "root must be an integer", lambda: face.broadcast(x, 0.5)),
        (ValueError, "Invalid destination=99 for a group of size 2", lambda: face.send(x, 99)),
        (ValueError, "Invalid destination=-1", lambda: face.send(x, -1)),
        (ValueError, "itself", lambda: face.send(x, me)),
        (ValueError, "Invalid source=99 for a group of size 2", lambda: face.recv(3, np.float32, 99)),
        (ValueError, "itself", lambda: face.recv_like(x, me)),
        (TypeError, "tag", lambda: face.send(x, 1 - me, tag="a")),
        (ValueError, "64 bits", lambda: face.send(x, 1 - me, tag=2**64)),
        (ValueError, "negative", lambda: face.recv((3, -1), np.float32, 1 - me)),
        (TypeError, "shape", lambda: face.recv("ab", np.float32, 1 - me)),
        (TypeError, ".", lambda: face.recv((3,), "no dtype", 1 - me)),
        (ValueError, "shape", lambda: face.all_sum(x, out=np.empty((3, 4), np.float32))),
        (ValueError, "dtype", lambda: face.all_sum(x, out=np.empty((4, 3), np.float64))),
        (ValueError, "and is not writeable$", lambda: face.all_sum(x, out=fixed)),
        (ValueError, "and is not C-contiguous$", lambda: face.all_sum(x, out=np.empty((3, 4), np.float32).T)),
        (ValueError, "shape", lambda: face.all_gather(x, out=np.empty((4, 3), np.float32))),
        (ValueError, "shape", lambda: face.sum_scatter(x, out=np.empty((4, 3), np.float32))),
        (ValueError, "shape", lambda: face.recv((3,), np.float32, 1 - me, out=np.empty(4, np.float32))),
        (ValueError, r"has shape \(48,\) and dtype uint8", lambda: face.all_sum(x, out=bytearray(48))),
        (TypeError, "out must be an array, not list", lambda: face.all_sum(x, out=[x])),
        (TypeError, "^all_sum: group must be a Group", lambda: face.all_sum(x, group=0)),
        (TypeError, "^barrier: group must be a Group", lambda: face.barrier(group="world")),
        (rt.ConfigError, "^all_sum: stream=.*stream=None", lambda: face.all_sum(x, stream="gpu")),
        (rt.ConfigError, "^all_sum: key=", lambda: face.all_sum(x, key="a")),
        (ValueError, "^all_sum: timeout", lambda: face.all_sum(x, timeout=0)),
        (ValueError, "^barrier: timeout", lambda: face.barrier(timeout=-1.0)),
        (ValueError, "^send: timeout", lambda: face.send(x, 1 - me, timeout=float("nan"))),
        (TypeError, "^all_sum: timeout .*not str", lambda: face.all_sum(x, timeout="1")),
        (TypeError, "^broadcast_object: timeout .*not str", lambda: face.broadcast_object(x, timeout="1")),
        (TypeError, "^average_gradients: group must be a Group", lambda: face.average_gradients([x], group=0)),
        (TypeError, r"all_sum\(\) got multiple values .* 'x'", lambda: face.all_sum(x, x=x)),
        (TypeError, r"all_reduce\(\) got multiple values .* 'x'", lambda: face.all_reduce(x, x=x)),
        (TypeError, r"all_reduce\(\) got multiple values .* 'op'", lambda: face.all_reduce(x, "sum", op="max")),
        (TypeError, r"sum_scatter\(\) missing .* 'x'", lambda: face.sum_scatter(op="max")),
        (TypeError, "positional", lambda: face.all_sum(x, group)),
        (TypeError, "color", lambda: group.split("red")),
        (TypeError, "key", lambda: group.split(0, 0.5)),
        (ValueError, "64 bits", lambda: group.split(2**63)),
    ]
    for number, (error, words, call) in enumerate(attempts):
        with pytest.raises(error, match=words):
            await call()
            raise AssertionError(f"attempt {number} ({words}) was accepted")
    assert (await face.all_sum(np.full(3, me + 1.0))).tolist() == [3.0] * 3
    assert (await group.split(0)).size() == 2


@pytest.mark.parametrize("front", FRONTS)
def test_bad_arguments_leave_the_group_usable(front: str) -> None:
    results(2, refused_arguments, front=front)


async def refusals(face: Any, group: Any, ctl: Any) -> None:
    x, text, other = np.ones((4, 3), np.float32), np.array(["a", "b"]), 1 - group.rank()

    def each(names: str, *arguments: Any) -> list[tuple[str, Callable[[], Any]]]:
        return [(name, functools.partial(getattr(face, name), *arguments)) for name in names.split()]

    attempts: list[tuple[str, Callable[[], Any]]] = [
        *each("all_reduce all_sum all_max all_min all_gather", text),
        *each("all_reduce sum_scatter reduce scan exscan", x, "avg"),
        *each("broadcast gather scatter", x, 2),
        *each("all_gather_v reduce_scatter_v gather_v scatter_v", x, (4,)),
        ("reduce", lambda: face.reduce(x, root=None)),
        ("reduce_scatter_v", lambda: face.reduce_scatter_v(x, (2, 2), "avg")),
        ("gather_v", lambda: face.gather_v(x, (4, 4), -1)),
        ("scatter_v", lambda: face.scatter_v(x, 4)),
        ("scatter", lambda: face.scatter(text)),
        ("all_to_all", lambda: face.all_to_all(text)),
        ("all_to_all_v", lambda: face.all_to_all_v(x, (2, 2), "ab")),
        ("all_to_all_v", lambda: face.all_to_all_v(x, (2, -2), (2, 2))),
        ("send", lambda: face.send(x, 9)),
        ("send", lambda: face.send(x, other, tag="a")),
        ("recv", lambda: face.recv(3, "no dtype", other)),
        ("recv", lambda: face.recv(3, None, other)),
        ("recv", lambda: face.recv(3, object, other)),
        ("recv", lambda: face.recv((3, -1), np.float32, other)),
        ("recv", lambda: face.recv(3.5, np.float32, other)),
        ("recv_like", lambda: face.recv_like(x, group.rank())),
        ("recv_like", lambda: face.recv_like(text, other)),
        ("sendrecv", lambda: face.sendrecv(x, other, other, tag=2**64)),
        ("send_object", lambda: face.send_object(x, None)),
        ("recv_object", lambda: face.recv_object(other, tag=0.5)),
        ("broadcast_object", lambda: face.broadcast_object(x, 2)),
        ("gather_objects", lambda: face.gather_objects(x, "a")),
        ("average_gradients: item 1", lambda: face.average_gradients([x, text])),
        ("average_gradients", lambda: face.average_gradients([x], communication_type="no dtype")),
        ("all_reduce: item 1", lambda: face.all_reduce([x, text])),
        ("split", lambda: group.split("red")),
    ]
    for name, call in attempts:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            await call()
            raise AssertionError(f"{name} was accepted")


@pytest.mark.parametrize("front", FRONTS)
def test_what_refuses_an_argument_names_the_call(front: str) -> None:
    results(2, refusals, front=front)


# ---- import ---------------------------------------------------------------------------------------------------------------------------


def test_import_loads_nothing_it_may_not_need() -> None:
    program = "\n".join([
        "import sys, asyncio",  # which loads ssl itself
        "before = set(sys.modules)",
        "import rt, rt.sync",
        "print(*{'optree', 'ssl', 'ml_dtypes', 'rich', 'uvloop'} & (set(sys.modules) - before))",
    ])  # fmt: skip
    found = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


@pytest.mark.parametrize("theirs", ["rest1.py", None])
def test_import_tells_of_the_other_package_called_rt(tmp_path: Path, theirs: str | None) -> None:
    assert rt.__file__ is not None
    package = tmp_path / "rt"
    package.mkdir()
    for source in Path(rt.__file__).parent.iterdir():
        if source.suffix in (".py", ".so"):
            (package / source.name).symlink_to(source)
    if theirs is not None:
        (package / theirs).touch()
    path = os.pathsep.join([str(tmp_path), str(Path(rt.__file__).parent.parent)])
    program = "import sys, rt; print(rt.__file__)"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "default", "-c", program]  # whatever PYTHONWARNINGS says
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert found.stdout.startswith(str(tmp_path)), found.stderr
    assert ("RuntimeWarning: PyPI's `rt`" in found.stderr) == (theirs is not None), found.stderr
