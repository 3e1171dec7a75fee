"""The table of preferred algorithms: what it may hold, what it says, and that all ranks go by rank 0's.

May live here: tests of ``rt/tuning.py``, of ``RT_TUNING`` and of the table's way to all ranks. May not: which algorithm fits which case
(``test_choose``), how a table is measured (``test_bench_tune``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
from ranks import Ranks, results, run, succeeded

from rt import tuning
from rt.config import resolve_ring, tuned
from rt.errors import ConfigError
from rt.tuning import ALGORITHMS, LINKS, Table, parse, shipped

RULE = {"1K": "doubling", "above": "owner"}


def table(rule: Any = None, **more: Any) -> dict[str, Any]:
    return {"version": 1, "all_reduce": {"shm": {"2": RULE if rule is None else rule}}, **more}


def everywhere(name: str, collective: str = "all_reduce", ranks: int = 2) -> dict[str, Any]:
    return {"version": 1, collective: {links: {str(ranks): {"above": name}} for links in LINKS}}


def write(folder: Path, document: Any, name: str = "table.json") -> str:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


# --- what a table may hold -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ([], "F: found [], expected a table"),
        ({}, "F: found version null, expected 1"),
        ({"version": 2}, "F: found version 2, expected 1"),
        ({"version": True}, "F: found version true, expected 1"),
        (table(about=3), "F: about: found 3, expected text"),
        (table(allreduce={}), "F: found 'allreduce', expected one of all_reduce, all_reduce_wide, "),
        (table(broadcast=[]), "F: broadcast: found [], expected an object with one of shm, tcp, mixed"),
        (table(broadcast={"rdma": {}}), "F: broadcast: found 'rdma', expected one of shm, tcp, mixed"),
        (table(broadcast={"tcp": {}}), 'F: broadcast, tcp: found {}, expected at least one number of ranks, as "2"'),
        (table(broadcast={"tcp": {"1": {}}}), "F: broadcast, tcp: found '1', expected a number of ranks >= 2"),
        (table(broadcast={"tcp": {"two": {}}}), "F: broadcast, tcp: found 'two', expected a number of ranks >= 2"),
        (table("ring"), 'F: all_reduce, shm, 2 ranks: found "ring", expected an object with bytes, as "64K", and "above"'),
        (table({}), 'F: all_reduce, shm, 2 ranks: found no "above", expected it last, as in {"64K": "doubling", "above": "ring"}'),
        (table({"1K": "ring"}), 'F: all_reduce, shm, 2 ranks: found no "above", expected it last, '),
        (table({"1Q": "ring"}), "F: all_reduce, shm, 2 ranks: found '1Q', expected a number of bytes, as \"4096\", \"64K\" or \"1M\""),
        (table({"1M": "ring", "1024K": "owner"}), "F: all_reduce, shm, 2 ranks: found 1024K behind 1M, expected bytes to ascend"),
        (table({"above": "ring", "1M": "ring"}), "F: all_reduce, shm, 2 ranks: found 1M behind above, expected bytes to ascend"),
        (table({"above": "rings"}), "F: all_reduce, shm, 2 ranks, above: found 'rings', expected one of doubling, direct, owner, "),
        (table({"4": None, "above": "ring"}), "F: all_reduce, shm, 2 ranks, 4: found None, expected one of doubling, "),
    ],
)
def test_what_is_no_table_is_said(document: Any, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(document, "F")
    assert str(caught.value).startswith(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "found an empty file"),
        ('{"version": 1,', "found no JSON at line 1 column 15"),
        ('{"version": 1, "all_reduce": {"shm": {"2": {"above": "ring"}, "2": {"above": "owner"}}}}', 'found "2" twice in one object'),
    ],
)
def test_what_is_no_file_of_a_table_is_said(text: str, found: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        tuning.read(path, "F")
    assert str(caught.value).startswith(f"F: {found}") and "expected a table of algorithms" in str(caught.value)


def test_a_table_written_and_read_is_the_same(tmp_path: Path) -> None:
    for each in (shipped(), parse(table(about='by "hand"'), "F"), Table({})):
        assert tuning.read(write(tmp_path, each.text()), "F") == each
        assert parse(each.document(), "F").fingerprint == each.fingerprint


def test_bytes_are_shown_by_the_largest_unit_that_divides_them() -> None:
    shown = {4: "4", 1024: "1K", 1536: "1536", 3 << 20: "3M", 1 << 30: "1G", (1 << 30) + 1024: "1048577K"}
    assert {nbytes: tuning.show_bytes(nbytes) for nbytes in shown} == shown


def test_what_is_shipped_has_everything() -> None:
    assert list(shipped().rules) == list(ALGORITHMS)
    for by_links in shipped().rules.values():
        assert tuple(by_links) == LINKS and all(min(by_ranks) == 2 for by_ranks in by_links.values())


# --- what a table says ---------------------------------------------------------------------------------------------------------------


def test_a_rule_holds_up_to_its_bytes_and_ranks() -> None:
    rules = {"2": RULE, "4": {"above": "ring"}, "16": {"above": "direct"}}
    found = parse({"version": 1, "all_reduce": {"shm": rules}}, "F")

    def names(*cases: tuple[int, int]) -> list[str]:
        return [found.prefers("all_reduce", "shm", ranks, nbytes) for ranks, nbytes in cases]

    assert names((2, 0), (2, 1024), (2, 1025), (2, 1 << 40)) == ["doubling", "doubling", "owner", "owner"]
    assert names((3, 4), (4, 4), (5, 4), (16, 4), (1000, 4)) == ["ring", "ring", "direct", "direct", "direct"]


def test_a_short_table_changes_what_it_has_and_nothing_else() -> None:
    before, mine = shipped(), parse(everywhere("owner"), "F")
    after = mine.over(before)
    assert [after.prefers("all_reduce", links, 2, 4) for links in LINKS] == ["owner"] * 3
    for collective, by_links in before.rules.items():
        for links, by_ranks in by_links.items():
            for ranks, rule in by_ranks.items():
                if (collective, ranks) != ("all_reduce", 2):
                    assert after.rules[collective][links][ranks] == rule
    assert shipped().prefers("all_reduce", "tcp", 2, 4) == "doubling", "the one that is shipped is not written to"


def test_fingerprints_tell_rules_apart_and_nothing_else() -> None:
    same = [parse(document, "F").fingerprint for document in (table(), table(about="x"), table({"1024": "doubling", "above": "owner"}))]
    other = [parse(table(rule), "F").fingerprint for rule in ({"1025": "doubling", "above": "owner"}, {"above": "owner"})]
    assert len(set(same)) == 1 and len({same[0], *other}) == 3 and len(same[0]) == 16


# --- RT_TUNING -----------------------------------------------------------------------------------------------------------------------


def test_a_variable_names_the_table(tmp_path: Path) -> None:
    ring = {"RT_RANK": "0", "RT_WORLD_SIZE": "2", "RT_COORDINATOR": "127.0.0.1:1"}
    config = resolve_ring(environ=ring)
    assert config is not None and config.tuning is None
    config = resolve_ring(environ={**ring, "RT_TUNING": write(tmp_path, everywhere("owner"))})
    assert config is not None and config.tuning is not None
    assert config.tuning.prefers("all_reduce", "tcp", 2, 4) == "owner" and config.tuning.prefers("scan", "tcp", 2, 4) == "doubling"


def test_a_table_that_is_wrong_is_named_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, everywhere("rings"))
    for name, found in (
        (path, "all_reduce, shm, 2 ranks, above: found 'rings', expected one of doubling, direct, owner, hierarchy, ring"),
        ("/nowhere", "found 'No such file or directory', expected a table of algorithms: {\"version\": 1, \"all_reduce\": {...}, ...}"),
    ):
        with pytest.raises(ConfigError) as caught:
            tuned({"RT_TUNING": name})
        assert str(caught.value) == f"RT_TUNING {name}: {found}"


def test_importing_rt_loads_no_table() -> None:
    code = "import rt, rt.sync, sys; sys.exit('rt.tuning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- jobs ----------------------------------------------------------------------------------------------------------------------------


async def used(rt: Any, group: Any, ctl: Any, *tables: str) -> list[Any]:
    """Start a group under the table of this rank, and return by what it did one all_sum, and how it reaches the other ranks."""
    import os

    number = int(os.environ["RT_RANK"])
    if tables[number]:
        os.environ["RT_TUNING"] = tables[number]
    group = await rt.init()
    x = np.arange(1000.0, dtype=np.float32) + group.rank()
    size = group.size()
    assert (await rt.all_sum(x) == size * np.arange(1000.0) + size * (size - 1) / 2).all()
    core = group._core
    return [core.algorithm("all_reduce", "float32", 1000), core.link_kind, core.tuning.fingerprint]


@pytest.mark.parametrize("front", ["sync", "asyncio"])
def test_the_table_of_rank_0_is_everybodys(front: str, tmp_path: Path) -> None:
    owner = write(tmp_path, everywhere("owner", ranks=3), "owner.json")
    direct = write(tmp_path, everywhere("direct", ranks=3), "direct.json")
    links = "shm" if front == "sync" else "tcp"
    expected = tuning.read(owner, "F").over(shipped()).fingerprint
    assert results(3, used, front=front, init=False, args=(owner, direct, "")) == [["owner", links, expected]] * 3
    assert results(3, used, front=front, init=False, args=("", direct, owner)) == [["doubling", links, shipped().fingerprint]] * 3


def test_a_wrong_table_ends_its_rank_and_all_that_wait_for_it(tmp_path: Path) -> None:
    wrong = write(tmp_path, everywhere("rings"))
    outcomes = run(2, used, init=False, args=("", wrong), env={"RT_CONNECT_TIMEOUT": "2"})
    assert outcomes[1].error is not None and outcomes[1].error.kind == "ConfigError" and wrong in outcomes[1].error.text
    assert outcomes[0].error is not None and outcomes[0].error.kind == "RendezvousError"


async def halves(rt: Any, group: Any, ctl: Any) -> Any:
    x = np.full(3, 1 + group.rank(), np.float16)
    assert (await rt.all_reduce(x, "mean")).tolist() == [2.0] * 3
    return group._core.algorithm("all_reduce", "float16", 3)


def test_an_algorithm_that_cannot_be_used_gives_way_to_the_nearest(tmp_path: Path) -> None:
    tables = write(tmp_path, everywhere("ring", "all_reduce_wide", ranks=3))
    assert results(3, halves, env={"RT_TUNING": tables}) == ["owner"] * 3, "where all are connected halves travel as halves"


async def apart(rt: Any, group: Any, ctl: Any) -> None:
    """Make believe that this rank's table is its own; by both the same algorithm is used for so few bytes."""
    if group.rank() == 1:
        group._core.tuning = parse(everywhere("doubling"), "F").over(shipped())
    await rt.all_sum(np.ones(3, np.float32))


def test_ranks_with_different_tables_find_it_out(tmp_path: Path) -> None:
    outcomes = run(2, apart)
    assert [outcome.error and outcome.error.kind for outcome in outcomes] == ["MismatchError"] * 2, outcomes
    for outcome in outcomes:
        assert outcome.error is not None and "they choose algorithms by different tables, links or lanes" in outcome.error.text


async def parts(rt: Any, group: Any, ctl: Any) -> list[Any]:
    """Split off every pair, and return by what the world and the pairs of this rank are joined, in the order of the other rank."""
    kinds = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        part = await group.split(int(group.rank() in (a, b)))
        if group.rank() in (a, b):
            assert (await part.all_sum(np.ones(3, np.float32))).tolist() == [2.0] * 3
            kinds.append(part._core.link_kind)
    assert (await group.all_sum(np.ones(3, np.float32))).tolist() == [3.0] * 3
    return [group._core.link_kind, *kinds]


@pytest.mark.namespaces
@pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")
def test_links_of_a_group_are_those_of_its_pairs() -> None:
    with netns.two_hosts(("10.1.0.1/30", "10.1.0.2/30")) as (left, right):
        env: dict[str, str | None] = {"RT_COORDINATOR": "10.1.0.1:5000", "RT_COORDINATOR_FD": None, "RT_SHM": "1"}
        with Ranks(3, parts, on=[left.command(), left.command(), right.command()], env=env) as ranks:
            found = succeeded(ranks.wait(60))
    assert found == [["mixed", "shm", "tcp"], ["mixed", "shm", "tcp"], ["mixed", "tcp", "tcp"]]
