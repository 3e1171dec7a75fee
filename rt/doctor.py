"""``rt.doctor``: why is it slow, why is it stuck, which RDMA devices are there?

May live here: the command line, and the way from it to an exit code. May not: the parts. Hosts and the ways between them are examined in
``_doctor_network`` and judged in ``_doctor_findings``; a running job is asked in ``_doctor_job``,
RDMA devices in ``_doctor_rdma``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rt import _doctor_job, _doors, interfaces
from rt._doctor_findings import judge
from rt._doctor_network import Examination
from rt._doctor_probes import RemoteProbe
from rt._doctor_show import as_json, show
from rt.errors import ConfigError
from rt.hostfile import Host, parse_hosts, read_hostfile

if TYPE_CHECKING:
    from rich.console import Console

_ENOUGH = 1 << 16  # columns
_DESCRIPTION = """\
Answer two questions: why is it slow (or does not even connect), and why is it stuck?

With --hostfile or --hosts, it goes to every host by ssh, looks at versions, clocks, interfaces and addresses, then connects each host to
each other one, and measures latency and bandwidth of every pair. With --job it asks the ranks of a job what they are doing instead: those
on the hosts that are named, by ssh, else those on this host. Ranks that have met speak for each other, so one host of the job is enough."""

_EXAMPLES = """\
examples:
  rt.doctor --hostfile hosts.json               the file that rt.launch takes
  rt.doctor --hosts node1,node2,user@node3      by name
  rt.doctor --hosts a,b --iface eth1            at other interfaces than ssh's: as RT_SOCKET_IFNAME
  rt.doctor --hostfile hosts.json --json        all that was seen, for a program or a bug report
  rt.doctor --job                               what does each rank wait for? On a host of the job, as its user
  rt.doctor --hostfile hosts.json --job         the same from anywhere
  rt.doctor --rdma                              devices, ports and GIDs of this host, for --backend jaccl

Nothing needs to run on the hosts but sshd and Python; nothing is left there. Pairs are measured in rounds that do not disturb each other:
about two seconds per host.

exit code: 0 if nothing is wrong, or a job was found; 1 if something was found, or no job; 2 if the command line is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor and return its exit code; wrong usage raises SystemExit(2)."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rdma and options.job is not None:
        parser.error("argument --rdma: not allowed with argument --job")
    if options.rdma:
        return _rdma(options.json)
    if options.job is None and options.hosts is None and options.hostfile is None:
        parser.error("one of the arguments --hostfile --hosts --job --rdma is required")
    try:
        if options.job is not None:
            return _ask(options)
        return _examine(_hosts(options), options.python, interfaces.asked(options.iface), options.json)
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rt.doctor",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="F.json", help="the hosts to look at, as rt.launch takes them")
    where.add_argument("--hosts", metavar="A,B", help="the hosts to look at, by name or address")
    where.add_argument("--rdma", action="store_true", help="which RDMA devices has this host, and why can one not be used?")
    add = parser.add_argument
    add("--job", nargs="?", const="", metavar="ID", help="what does each rank of a job do that runs there, or here? ID: which job")
    add("--python", default=sys.executable, metavar="PY", help="interpreter on the hosts (default: the path of this one)")
    add("--iface", metavar="LIST", help=f"which interfaces to use, as {interfaces.VARIABLE} (default: what that says)")
    add("--json", action="store_true", help="print everything that was seen as JSON")
    return parser


def _hosts(options: argparse.Namespace) -> list[Host]:
    """Return each host once, whatever number of ranks it has."""
    hosts = parse_hosts(options.hosts) if options.hosts is not None else read_hostfile(options.hostfile).hosts
    return list({host.ssh: host for host in reversed(hosts)}.values())[::-1]


def _examine(hosts: Sequence[Host], python: str, choice: interfaces.Choice | None, as_text: bool) -> int:
    with Examination([RemoteProbe(host, python) for host in hosts], _say, choice) as examination:
        examination.run()
    findings = judge(examination.hosts, examination.links)
    if as_text:
        print(as_json(examination.hosts, examination.links, findings))
    else:
        show(_console(), examination.hosts, examination.links, findings)
    return 1 if findings else 0


def _rdma(as_text: bool) -> int:
    from rt import _doctor_rdma

    found, why = _doctor_rdma.survey()
    if as_text:
        print(_doctor_rdma.as_json(found, why))
    else:
        _doctor_rdma.show(_console(), found, why)
    return 0 if any(port["usable"] for port in found) else 1


def _ask(options: argparse.Namespace) -> int:
    hosts = _hosts(options) if options.hosts or options.hostfile else []
    unasked: dict[str, tuple[str, str]] = {}
    if hosts:
        where = ", ".join(host.name for host in hosts)
        _say(f"asking {where}")
        answers, unasked = _doctor_job.on_hosts([RemoteProbe(host, options.python) for host in hosts], options.job)
    elif not _doors.SUPPORTED:
        _say("--job: found no Linux, expected one: only there a rank has a door that leaves nothing behind; or name the job's --hosts")
        return 2
    else:
        answers, where = [_doctor_job.here(options.job)], "this host"
    reports = _doctor_job.reports(answers)
    for host, (found, advice) in unasked.items():
        _say(f"{host}: {found}" + (f": {advice}" if advice else ""))
    if options.json:
        print(_doctor_job.as_json(reports, unasked))
    elif reports:
        _doctor_job.show(_console(), reports)
    if not reports:
        _say(f"no job of yours {f'whose identity begins with {options.job} ' if options.job else ''}has a rank on {where}")
    return 0 if reports else 1


def _console() -> Console:
    from rich.console import Console

    # Into a pipe or a file rich would cut tables at 80 columns, and with them addresses.
    return Console(width=None if sys.stdout.isatty() else _ENOUGH)


def _say(text: str) -> None:
    print(f"rt.doctor: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
