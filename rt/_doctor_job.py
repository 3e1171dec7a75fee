"""``rt.doctor --job``: what every rank of a running job is doing, and one sentence on who holds it up.

May live here: joining what the ranks of one host or many have answered, the verdict, the table. May not: how they are asked (``_doors``),
what a rank says (``_status``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from rt import _doors
from rt._doctor_probes import RemoteProbe, Silent
from rt._doors import Facts

if TYPE_CHECKING:
    from rich.console import Console

_HOST_SECONDS = 30.0  # more than ``_doors`` takes to knock at all of a host
_SILENT = "did not answer: stopped, or busy in C code, or not to be reached"
Answers = dict[str, dict[int, Facts]]  # per job and rank


@dataclass(frozen=True)
class JobReport:
    """A job, as its ranks see it.

    Attributes:
        job: a part of its identity.
        size: number of ranks; 0 where no rank said so.
        ranks: what each rank says of itself, None where it said nothing.
        gone: ranks that have left or are lost, and which.
        missing: of a group that has not formed: per rank that was asked, the lines on whom it waits for.
        silent: ranks that were asked, by us or by others, and said nothing in time.
        verdict: one sentence.
    """

    job: str
    size: int
    ranks: list[Facts | None]
    gone: dict[int, str]
    missing: dict[int, list[str]]
    silent: list[int] = field(default_factory=list)
    verdict: str = ""


def here(wanted: str = "") -> Answers:
    """Ask every job of this host and user, or those whose identity begins with ``wanted``. OSError: this system has no doors."""
    return _doors.ask(wanted)


def on_hosts(probes: Sequence[RemoteProbe], wanted: str = "") -> tuple[list[Answers], dict[str, tuple[str, str]]]:
    """Ask the jobs of several hosts at once.

    Returns:
        What the ranks of each host answered; and per host that could not be asked what was found and what to do.
    """
    with ThreadPoolExecutor(max_workers=len(probes)) as threads:
        told = list(threads.map(lambda probe: _on_host(probe, wanted), probes))
    unasked = {probe.host.ssh: each for probe, each in zip(probes, told, strict=True) if isinstance(each, tuple)}
    return [each for each in told if not isinstance(each, tuple)], unasked


def _on_host(probe: RemoteProbe, wanted: str) -> Answers | tuple[str, str]:
    try:
        probe.start()
        said = probe.ask("jobs", _HOST_SECONDS, wanted=wanted)
    except Silent as silence:
        return str(silence), silence.advice
    finally:
        probe.end()
    if "jobs" not in said:
        return f"found {said['no_doors']}, expected Linux: only there a rank has a door that leaves nothing behind", ""
    return {job: {int(rank): answer for rank, answer in ranks.items()} for job, ranks in said["jobs"].items()}


def reports(hosts: Sequence[Answers]) -> list[JobReport]:
    """Join what was answered on each host, a report per job."""
    names = sorted({job for host in hosts for job in host})
    return [_report(job, [host[job] for host in hosts if job in host]) for job in names]


def _report(job: str, hosts: Sequence[dict[int, Facts]]) -> JobReport:
    """Ranks that have not met yet speak for themselves only; one that has speaks for all it can reach, so that several know most."""
    answers = {rank: answer for host in hosts for rank, answer in host.items()}
    formed = [answer for answer in answers.values() if answer.get("formed")]
    if formed:
        ranks = [next(filter(None, seen), None) for seen in zip(*(each["ranks"] for each in formed), strict=True)]
        gone = {int(rank): how for each in formed for rank, how in each["gone"].items()}
        silent = [rank for rank, facts in enumerate(ranks) if facts is None and rank not in gone]
        _ask_the_others(ranks)
        report = JobReport(job, formed[0]["size"], ranks, gone, {}, silent)
        return replace(report, verdict=verdict(report))
    alone = {rank: answer for rank, answer in answers.items() if answer}
    silent = sorted(answers.keys() - alone.keys())
    size = max((each["size"] for each in alone.values()), default=max(answers) + 1)
    missing = {rank: each["missing"] for rank, each in alone.items()}
    report = JobReport(job, size, [alone.get(rank) for rank in range(size)], {}, missing, silent)
    return replace(report, verdict=_forming(report))


def _ask_the_others(ranks: Sequence[Facts | None]) -> None:
    """Say whom the calls that a library carries wait for: the library tells nobody, but each rank knows how often it has called."""
    made = [facts for facts in ranks if facts is not None]
    counts: dict[str, dict[int, int]] = {}
    for facts in made:
        for group, found in facts.get("libraries", {}).items():
            counts.setdefault(group, {}).update({rank: count for rank, count in zip(found["ranks"], found["heard"], strict=False)})
    for facts in made:  # what a rank says of itself is newer
        for group, found in facts.get("libraries", {}).items():
            counts[group][facts["rank"]] = found["called"]
    for facts in made:
        for call in facts["calls"]:
            if not call.get("library"):
                continue
            if call["peer"] is not None:
                call["absent"] = [] if _meets(call, facts["rank"], ranks[call["peer"]]) else [call["peer"]]
                continue
            known = counts[call["group"]]
            members = facts["libraries"][call["group"]]["ranks"]
            call["absent"] = [rank for rank in members if known.get(rank, call["sequence"]) <= call["sequence"]]


def _meets(call: Facts, rank: int, peer: Facts | None) -> bool:
    """Whether the other side of a message is in flight, too."""
    verb = call["what"].split()[0]
    calls = [] if peer is None else peer["calls"]
    return any(each.get("peer") == rank and (verb == "sendrecv" or each["what"].split()[0] != verb) for each in calls)


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
    return "no rank waits for another" + (f"; {_ranks(report.silent)} {_SILENT}" if report.silent else "")


def _blame(report: JobReport, roots: set[int], waits: dict[int, set[int]]) -> str:
    """``rank 2 has not called all_sum #17; ranks 0, 1 and 3 wait for it since 12.3 s``."""
    concerned = [(rank, call) for rank in waits for call in _calls(report, rank) if roots & {*call["absent"], *call["late"]}]
    first, call = max(concerned, key=lambda pair: pair[1]["seconds"] or 0.0)
    culprits = [rank for rank in call["absent"] if rank in roots]
    if culprits:
        did = f"{_ranks(culprits)} {_have(culprits)} not called {_called(call)}"
    else:
        culprits = [rank for rank in call["late"] if rank in roots]
        did = f"{_ranks(culprits)} {_have(culprits)} called {_called(call)} and {'owes' if len(culprits) == 1 else 'owe'} data"
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
    calls = [call for rank in everyone for call in _calls(report, rank)]
    if len({(call["group"], call["what"]) for call in calls}) == 1 and not any(call["absent"] for call in calls):
        return f"{_ranks(everyone)} are all in {_called(calls[0])}: its data is on the way; ask again to see whether it moves"
    each = "; ".join(f"rank {rank} in {_called(_calls(report, rank)[0])} for {_ranks(sorted(waits[rank]))}" for rank in everyone)
    return f"ranks wait for each other in different calls: {each}"


def _forming(report: JobReport) -> str:
    if not report.missing:
        return f"{_ranks(report.silent)} {_SILENT}"
    rank, lines = next(iter(sorted(report.missing.items())))
    who = "; ".join(line.strip() for line in lines) or "nobody: all are there, but not all neighbours are connected"
    return f"the group has not formed: rank {rank} waits for {who}"


def _calls(report: JobReport, rank: int) -> list[Facts]:
    facts = report.ranks[rank]
    return list(facts["calls"]) if facts is not None else []


def _called(call: Facts) -> str:
    """``all_sum #0 (float32, 4 B)``, and of which group, if it is not the world's."""
    return call["what"] if call["name"] == "world" else f"{call['what']} of {call['name']}"


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


def as_json(reports: Sequence[JobReport], unasked: Mapping[str, tuple[str, str]]) -> str:
    """Return everything that the ranks said, and which hosts could not be asked."""
    problems = [{"host": host, "found": found, "advice": advice} for host, (found, advice) in unasked.items()]
    return json.dumps({"version": 1, "jobs": [asdict(report) for report in reports], "problems": problems}, indent=2)


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
        return [[str(rank), "", "", report.gone.get(rank, "no answer" if rank in report.silent else "not here"), "", "", ""]]
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
        rows.append([*head, _called(call), since, "; ".join(filter(None, (absent, late))), facts["at"]])
        head = ["", "", ""]
    return rows
