"""Which algorithm is preferred for what: the table, as data.

May live here: the format of a table, its checks, its look-up, its fingerprint, and where the one that is shipped lies. May not: what an
algorithm is and when it cannot be used (``choose``), the environment and other files (``config``), measuring (``bench.tune``).

A table, as ``RT_TUNING`` names one and ``tuning.json`` beside this file is one::

    {
      "version": 1,
      "about": "whatever the reader should know",
      "all_reduce": {
        "shm": {
          "2": {"64K": "doubling", "above": "ring"},
          "4": {"above": "owner"}
        }
      }
    }

collective -> kind of links -> ranks -> up to that many bytes -> algorithm. A number of ranks holds from the next smaller one in the table
up to itself, the largest one for all above: here "4" is for 3 ranks and more. What a table does not have is as in the one that is shipped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt.errors import ConfigError
from rt.json_file import brief, load

VERSION = 1
LINKS = ("shm", "tcp", "mixed")  # what joins the pairs of a group: memory, TCP, or some of them this and some that
# What there is to choose from, per collective, those for small messages first. Where the preferred one cannot be used, the next one
# behind it that can is taken, else the next before it. Collectives with counts per rank (``_v``) go by the rows of those without;
# ``all_reduce_wide`` is that of half types which are accumulated in float32.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("doubling", "direct", "owner", "hierarchy", "ring"),
    "all_reduce_wide": ("direct", "owner", "hierarchy", "ring"),
    "reduce_scatter": ("direct", "ring"),
    "all_gather": ("direct", "ring"),
    "broadcast": ("binomial", "pipeline"),
    "reduce": ("binomial", "owner", "pipeline"),
    "gather": ("binomial", "direct", "ring"),
    "scatter": ("binomial", "direct", "ring"),
    "all_to_all": ("direct", "ring"),
    "scan": ("doubling", "pipeline"),
    "exscan": ("doubling", "pipeline"),
    "barrier": ("dissemination", "ring"),
}
_TABLE = 'a table of algorithms: {"version": 1, "all_reduce": {...}, ...}'
_ABOVE = "above"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Rule = tuple[tuple[float, str], ...]  # (most bytes, algorithm), ascending; the last one's most is infinite
Rules = Mapping[str, Mapping[str, Mapping[int, Rule]]]


@dataclass(frozen=True)
class Table:
    """Rules by collective, kind of links and number of ranks; one that is asked has all collectives and kinds of links.

    Bytes are those of x for all-reduce, broadcast, reduce and the scans, of one rank's block (the largest) for the others.
    """

    rules: Rules
    about: str = ""  # for who reads it; no part of what the table says

    def prefers(self, collective: str, links: str, ranks: int, nbytes: int) -> str:
        """Return the name of the algorithm that is preferred, whether or not it can be used."""
        by_ranks = self.rules[collective][links]
        rule = by_ranks[min((count for count in by_ranks if count >= ranks), default=max(by_ranks))]
        return next(name for most, name in rule if nbytes <= most)

    def over(self, other: Table) -> Table:
        """Return the rules of both; where both have one for the same number of ranks, it is this table's."""
        rules = {collective: {links: dict(found) for links, found in by_links.items()} for collective, by_links in other.rules.items()}
        for collective, by_links in self.rules.items():
            for links, found in by_links.items():
                rules.setdefault(collective, {}).setdefault(links, {}).update(found)
        return Table(rules, self.about or other.about)

    def document(self) -> dict[str, Any]:
        """Return the table as ``parse`` takes it, in the order of ``ALGORITHMS``, ``LINKS`` and ranks."""
        found: dict[str, Any] = {"version": VERSION}
        for collective in (name for name in ALGORITHMS if name in self.rules):
            by_links = self.rules[collective]
            found[collective] = {
                links: {str(ranks): _document(by_links[links][ranks]) for ranks in sorted(by_links[links])}
                for links in LINKS
                if links in by_links
            }
        return found

    def text(self) -> str:
        """Return the table as a file for people: a line per number of ranks."""
        lines = [f'  "version": {VERSION}'] + ([f'  "about": {json.dumps(self.about)}'] if self.about else [])
        for collective, by_links in self.document().items():
            if collective != "version":
                kinds = []
                for links, by_ranks in by_links.items():
                    rows = ",\n".join(f'      "{ranks}": {json.dumps(rule)}' for ranks, rule in by_ranks.items())
                    kinds.append(f'    "{links}": {{\n{rows}\n    }}')
                lines.append(f'  "{collective}": {{\n' + ",\n".join(kinds) + "\n  }")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tables with the same rules share, and no others."""
        return hashlib.blake2b(json.dumps(self.document()).encode(), digest_size=8).hexdigest()


def _document(rule: Rule) -> dict[str, str]:
    return {_ABOVE if most == math.inf else show_bytes(int(most)): name for most, name in rule}


def show_bytes(nbytes: int) -> str:
    """Return a number of bytes as tables have it: ``64K``; in full where no unit divides it."""
    unit = max((unit for unit, factor in _UNITS.items() if nbytes % factor == 0), key=lambda unit: _UNITS[unit])
    return f"{nbytes // _UNITS[unit]}{unit}"


@functools.cache
def shipped() -> Table:
    """Return the table that comes with rt, which has everything."""
    path = Path(__file__).with_name("tuning.json")
    return read(path, str(path))


def read(path: str | os.PathLike[str], where: str) -> Table:
    """Return the table that a file holds, and nothing that it does not; raises as ``parse``."""
    return parse(load(path, where, _TABLE), where)


def parse(document: object, where: str) -> Table:
    """Return the table that a JSON document holds.

    Raises:
        ConfigError: it holds none; one line that says where (beginning with ``where``), what was found and what was expected.
    """
    fields = _mapping(document, where, _TABLE)
    if fields.get("version") != VERSION or isinstance(fields["version"], bool):
        raise ConfigError(f"{where}: found version {json.dumps(fields.get('version'))}, expected {VERSION}")
    if not isinstance(fields.get("about", ""), str):
        raise ConfigError(f"{where}: about: found {json.dumps(fields['about'])}, expected text")
    rules = {name: _by_links(found, name, where) for name, found in fields.items() if name not in ("version", "about")}
    return Table(rules, fields.get("about", ""))


def _by_links(document: object, collective: str, where: str) -> dict[str, dict[int, Rule]]:
    _known(collective, ALGORITHMS, where)
    where = f"{where}: {collective}"
    fields = _mapping(document, where, f"an object with one of {', '.join(LINKS)}")
    for links in fields:
        _known(links, LINKS, where)
    return {links: _by_ranks(found, collective, f"{where}, {links}") for links, found in fields.items()}


def _by_ranks(document: object, collective: str, where: str) -> dict[int, Rule]:
    fields = _mapping(document, where, 'an object with numbers of ranks, as "2"')
    if not fields:
        raise ConfigError(f'{where}: found {{}}, expected at least one number of ranks, as "2"')
    found = {}
    for ranks, rule in fields.items():
        if not re.fullmatch("[1-9][0-9]{0,8}", ranks) or int(ranks) < 2:
            raise ConfigError(f"{where}: found {ranks!r}, expected a number of ranks >= 2")
        found[int(ranks)] = _rule(rule, collective, f"{where}, {ranks} ranks")
    return found


def _rule(document: object, collective: str, where: str) -> Rule:
    fields = _mapping(document, where, f'an object with bytes, as "64K", and "{_ABOVE}"')
    rule: list[tuple[float, str]] = []
    for size, name in fields.items():
        most = math.inf if size == _ABOVE else _bytes(size, where)
        if rule and most <= rule[-1][0]:
            raise ConfigError(f'{where}: found {size} behind {list(fields)[len(rule) - 1]}, expected bytes to ascend, "{_ABOVE}" last')
        _known(name, ALGORITHMS[collective], f"{where}, {size}")
        rule.append((most, name))
    if not rule or rule[-1][0] != math.inf:
        raise ConfigError(f'{where}: found no "{_ABOVE}", expected it last, as in {{"64K": "{ALGORITHMS[collective][0]}", "{_ABOVE}": '
                          f'"{ALGORITHMS[collective][-1]}"}}')  # fmt: skip
    return tuple(rule)


def _bytes(size: str, where: str) -> int:
    match = re.fullmatch("([0-9]{1,18})([KMG]?)", size)
    if match is None:
        raise ConfigError(f'{where}: found {size!r}, expected a number of bytes, as "4096", "64K" or "1M", or "{_ABOVE}"')
    return int(match[1]) * _UNITS[match[2]]


def _mapping(document: object, where: str, expected: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: found {brief(document)}, expected {expected}")
    return document


def _known(name: object, known: Collection[str], where: str) -> None:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}: found {name!r}, expected one of {', '.join(known)}")
