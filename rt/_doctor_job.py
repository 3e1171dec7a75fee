"""``rt.doctor --job``: what every rank of a running job is doing, and one sentence on who holds it up.

May live here: finding the jobs of this host, asking one rank of each, the verdict, the table. May not: what a rank says (``_status``).
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rt._status import PREFIX, Facts, user_of

if TYPE_CHECKING:
    from rich.console import Console

_ANSWER_SECONDS = 4.0
_SILENT = "did not answer: stopped, or busy in C code, or not to be reached"
_NAME = re.compile(rf"@({PREFIX}/([0-9a-f]+)/(\d+)/[0-9a-f]+)$", re.M)


@dataclass(frozen=True)
class JobReport:
    """A job, as its ranks see it.

    Attributes:
        job: a part of its identity.
        size: number of ranks; 0 where no rank said so.
        ranks: what each rank says of itself, None where it said nothing.
        gone: ranks that have left or are lost, and which.
        missing: of a group that has not formed: per rank that was asked, the lines on whom it waits for.
        verdict: one sentence.
    """

    job: str
    size: int
    ranks: list[Facts | None]
    gone: dict[int, str]
    missing: dict[int, list[str]]
    verdict: str = ""


def doors(listing: str) -> dict[str, dict[int, list[str]]]:
    """Return from the text of ``/proc/net/unix`` the names behind which ranks can be asked, per job and rank."""
    found: dict[str, dict[int, list[str]]] = {}
    for name, job, rank in _NAME.findall(listing):
        found.setdefault(job, {}).setdefault(int(rank), []).append(name)
    return found


def jobs(wanted: str = "") -> list[JobReport]:
    """Ask every job of this host and user, or those whose identity begins with ``wanted``."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        found = doors(file.read())
    reports = [_ask_job(job, ranks) for job, ranks in sorted(found.items()) if job.startswith(wanted)]
    return [report for report in reports if report is not None]


def _ask_job(job: str, ranks: dict[int, list[str]]) -> JobReport | None:
    """Ask rank by rank until one speaks for all; ranks that have not met yet can speak for themselves only."""
    alone: dict[int, Facts] = {}
    silent: list[int] = []
    for rank, names in sorted(ranks.items()):
        answer = next(filter(None, map(_knock, names)), None)
        if answer is None:
            silent.append(rank)
        elif answer.get("formed"):
            gone = {int(each): how for each, how in answer["gone"].items()}
            report = JobReport(job, answer["size"], answer["ranks"], gone, {})
            return replace(report, verdict=verdict(report))
        elif answer:
            alone[rank] = answer
    if not alone and all(not _ours(name) for names in ranks.values() for name in names):
        return None
    size = max((each["size"] for each in alone.values()), default=max(ranks) + 1)
    report = JobReport(job, size, [alone.get(rank) for rank in range(size)], {}, {rank: each["missing"] for rank, each in alone.items()})
    return replace(report, verdict=_forming(report, silent))


def _knock(name: str) -> Facts | None:
    """Return what a rank answers, None where nothing comes."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_SECONDS)
            sock.connect(f"\0{name}")
            if os.geteuid() not in (0, user_of(sock)):
                return None
            pieces = []
            while piece := sock.recv(1 << 16):
                pieces.append(piece)
        return dict(json.loads(b"".join(pieces)))
    except (OSError, ValueError):
        return None


def _ours(name: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_SECONDS)
            sock.connect(f"\0{name}")
            return os.geteuid() in (0, user_of(sock))
    except OSError:
        return False


# --- the verdict -----------------------------------------------------------------------------------------------------------------------


def verdict(report: JobReport) -> str:
    """Say in one sentence who holds the job up.

    Of ranks that wait for each other, those are to blame that wait for nobody: they have not called, or cannot answer.
    """
    waits = {rank: _waits_for(facts) for rank, facts in enumerate(report.ranks) if facts is not None and facts["calls"]}
    broken = next((text for facts in report.ranks if facts is not None for text in facts["broken"]), "")
    if broken:
        return f"the group is broken: {broken}"
    roots = set().union(*waits.values()) - waits.keys()
    if roots:
        return _blame(report, roots, waits)
    if waits:
        return _crosswise(report, waits)
    silent = [rank for rank, facts in enumerate(report.ranks) if facts is None and rank not in report.gone]
    return "no rank waits for another" + (f"; {_ranks(silent)} {_SILENT}" if silent else "")


def _blame(report: JobReport, roots: set[int], waits: dict[int, set[int]]) -> str:
    """``rank 2 has not called all_sum #17; ranks 0, 1 and 3 wait for it since 12.3 s``."""
    concerned = [(rank, call) for rank in waits for call in _calls(report, rank) if roots & {*call["absent"], *call["late"]}]
    first, call = max(concerned, key=lambda pair: pair[1]["seconds"] or 0.0)
    culprits = [rank for rank in call["absent"] if rank in roots]
    if culprits:
        did = f"{_ranks(culprits)} {_have(culprits)} not called {call['what']}"
    else:
        culprits = [rank for rank in call["late"] if rank in roots]
        did = f"{_ranks(culprits)} {_have(culprits)} called {call['what']} and {'owes' if len(culprits) == 1 else 'owe'} data"
    states = [f"rank {rank} {state}" for rank in culprits if (state := _state(report, rank))]
    behind = set(culprits)
    while more := {rank for rank, others in waits.items() if others & behind} - behind:
        behind |= more
    waiting = sorted(behind.difference(culprits))
    them = "it" if len(culprits) == 1 else "them"
    return "; ".join([did, *states, f"{_ranks(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for {them}{_since(call, first)}"])


def _state(report: JobReport, rank: int) -> str:
    facts = report.ranks[rank]
    if rank in report.gone:
        return "has left" if report.gone[rank] == "left" else "is lost"
    if facts is None:
        return _SILENT
    return f"is at {facts['at']}" if facts["at"] else ""


def _crosswise(report: JobReport, waits: dict[int, set[int]]) -> str:
    everyone = sorted(waits)
    whats = {call["what"] for rank in everyone for call in _calls(report, rank)}
    if len(whats) == 1:
        return f"{_ranks(everyone)} are all in {whats.pop()}: its data is on the way; ask again to see whether it moves"
    each = "; ".join(f"rank {rank} in {_calls(report, rank)[0]['what']} for {_ranks(sorted(waits[rank]))}" for rank in everyone)
    return f"ranks wait for each other in different calls: {each}"


def _forming(report: JobReport, silent: Sequence[int]) -> str:
    if not report.missing:
        return f"{_ranks(silent)} {_SILENT}"
    rank, lines = next(iter(sorted(report.missing.items())))
    who = "; ".join(line.strip() for line in lines) or "nobody: all are there, but not all neighbours are connected"
    return f"the group has not formed: rank {rank} waits for {who}"


def _calls(report: JobReport, rank: int) -> list[Facts]:
    facts = report.ranks[rank]
    return list(facts["calls"]) if facts is not None else []


def _waits_for(facts: Facts) -> set[int]:
    return {rank for call in facts["calls"] for rank in call["absent"] + call["late"]}


def _since(call: Facts, rank: int) -> str:
    return f" since {call['seconds']:.1f} s" if call["seconds"] is not None else f", but nobody on rank {rank} awaits it yet"


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 2``; ``ranks 0, 1 and 3``."""
    words = [str(rank) for rank in ranks]
    return f"rank {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}" if words else "no rank"


def _have(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


# --- showing ---------------------------------------------------------------------------------------------------------------------------


def as_json(reports: Sequence[JobReport]) -> str:
    """Return everything that the ranks said."""
    return json.dumps({"version": 1, "jobs": [asdict(report) for report in reports]}, indent=2)


def show(console: Console, reports: Sequence[JobReport]) -> None:
    """Print a table and a sentence per job."""
    from rich import box
    from rich.table import Table

    for report in reports:
        table = Table(title=f"job {report.job}, {report.size} ranks", title_justify="left", box=box.SIMPLE)
        for column in ("rank", "host", "process", "call", "since", "waits for", "at"):
            table.add_column(column, overflow="fold")
        for rank in range(report.size):
            for row in _rows(report, rank):
                table.add_row(*row)
        console.print(table)
        console.print(f"{report.verdict}\n", highlight=False, markup=False, soft_wrap=True)


def _rows(report: JobReport, rank: int) -> list[list[str]]:
    facts = report.ranks[rank]
    if facts is None:
        local = report.missing and rank not in report.missing
        return [[str(rank), "", "", report.gone.get(rank, "not here" if local else "no answer"), "", "", ""]]
    head = [str(rank), facts["host"], str(facts["pid"])]
    if rank in report.missing:
        return [[*head, "init", "", ", ".join(re.findall(r"rank (\d+):", "\n".join(report.missing[rank]))), facts["at"]]]
    if not facts["calls"]:
        last = ", ".join(" ".join(text.split()[:2]) for text in facts["last"].values())
        return [[*head, f"none, after {last}" if last else "none yet", "", "", facts["at"]]]
    rows = []
    for call in facts["calls"]:
        since = f"{call['seconds']:.1f} s" if call["seconds"] is not None else "not awaited"
        absent = f"{_ranks(call['absent'])} to call" if call["absent"] else ""
        late = f"data of {_ranks(call['late'])}" if call["late"] else ""
        rows.append([*head, call["what"], since, "; ".join(filter(None, (absent, late))), facts["at"]])
        head = ["", "", ""]
    return rows
