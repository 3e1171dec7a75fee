"""The command line of ``rt.distributed_config``: what may be said, and what is wrong with what was said.

May live here: options and their help. May not: asking hosts, decisions about cables.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rt import interfaces
from rt._output_file import unwritable
from rt._wiring_choose import BACKENDS, OVERS
from rt.errors import ConfigError
from rt.hostfile import Hostfile, check_variable, parse_hosts, read_hostfile

_DESCRIPTION = """\
Find out how hosts are connected, give the ends of their cables addresses, and write the hostfile that rt.launch (and mlx.launch) reads."""

_EXAMPLES = """\
examples:
  rt.distributed_config --hosts m1,m2,m3,m4 --output hosts.json
        ask the hosts, choose, print the commands that set up their network, write the hostfile
  rt.distributed_config --hosts m1,m2,m3,m4 --auto-setup --output hosts.json && rt.launch --hostfile hosts.json train.py
        run those commands as well, where sudo wants no password
  rt.distributed_config --hosts m1,m2,m3,m4 --over thunderbolt --dot | dot -Tpng > cables.png
  rt.distributed_config --hosts m1,m2,m3,m4 --svg cables.svg --output hosts.json
        see the cables; broken ones are red. Without Graphviz: --svg
  rt.distributed_config --hosts n1,n2 --over ethernet --output hosts.json
  rt.distributed_config --hosts n1,n2 --over rdma --backend jaccl --output hosts.json
  rt.distributed_config --hosts n1,n2,n3 --save-facts facts.json
  rt.distributed_config --facts facts.json --verbose
        the same again from the file, without a host: what to send with a bug report (it holds names and addresses of your hosts)

Hosts are asked all at once by the system's ssh, with your own configuration of it; nothing is installed or changed on them unless you say
--auto-setup. macOS: system_profiler, networksetup, ifconfig, netstat, ibv_devices. Linux: ip, rdma, /sys/bus/thunderbolt, and ping, by
which the two ends of an Ethernet cable find each other before they have addresses; their interfaces must be up.

Over Thunderbolt the best that the cables allow is chosen: jaccl (RDMA, every pair connected), jaccl-ring, then ring. Between two neighbours
all parallel cables are used that every other pair of neighbours has, too: one ring per cable. Addresses that both ends of a cable have in
one network are kept; else it gets a private network that no host uses or has a route to.

stdout holds the hostfile (without --output), the graph (--dot) or the report (--json), and nothing else; all words for people go to stderr.

After --auto-setup the hosts ping each other over every cable; one that does not answer is named, and the hostfile written all the same.

exit code: 0 if all was done that was asked for; 1 if a host was not reached, the cables do not allow it, a set-up failed or is left to
you after --auto-setup, or a cable did not answer after it; 2 if the command line is wrong."""


@dataclass(frozen=True)
class Options:
    """A checked command line; ``backend`` is "" where it is ours to choose, ``iface`` None where all interfaces will do."""

    hosts: Hostfile | None
    over: str
    backend: str
    iface: interfaces.Choice | None
    envs: tuple[str, ...]
    ignore_unreachable: bool
    auto_setup: bool
    persist: bool
    output: str | None
    dot: bool
    svg: str | None
    json: bool
    facts: str | None
    save_facts: str | None
    verbose: bool


def parse(argv: Sequence[str]) -> Options:
    """Check the command line; what is wrong is said on stderr and raises SystemExit(2)."""
    parser = _parser()
    found = parser.parse_args(argv)
    if found.dot and found.json:
        parser.error("--dot and --json: found both, expected one of them: each wants stdout for itself")
    if found.facts and (found.auto_setup or found.save_facts):
        parser.error(f"--facts and {'--auto-setup' if found.auto_setup else '--save-facts'}: found both, but --facts touches no host")
    try:
        hosts = _hosts(found.hosts, found.hostfile, found.facts)
        iface = interfaces.asked(found.iface)
        for entry in found.env:
            check_variable(entry, "--env")
        for name in ("output", "svg", "save_facts"):
            _check_writable(f"--{name.replace('_', '-')}", getattr(found, name))
    except ConfigError as error:
        parser.error(str(error))
    return Options(
        hosts=hosts,
        over=found.over,
        backend=found.backend or "",
        iface=iface,
        envs=tuple(found.env),
        ignore_unreachable=found.ignore_unreachable,
        auto_setup=found.auto_setup,
        persist=found.persist,
        output=found.output,
        dot=found.dot,
        svg=found.svg,
        json=found.json,
        facts=found.facts,
        save_facts=found.save_facts,
        verbose=found.verbose,
    )


def _check_writable(option: str, path: str | None) -> None:
    """See that a file can be written before hosts are asked, which takes a while."""
    if path is not None and (why := unwritable(path)):
        folder = os.path.dirname(path)
        cure = f"`mkdir -p {shlex.quote(folder)}`, or name another" if folder and not os.path.isdir(folder) else "name another"
        raise ConfigError(f"argument {option}: found {path!r} ({why}), expected a file that can be written: {cure}")


def _hosts(listed: str | None, file: str | None, facts: str | None) -> Hostfile | None:
    """Return the hosts that were named, each once: this is about hosts, not about ranks. None: all that a file of facts has."""
    if listed is not None and file is not None:
        raise ConfigError("--hosts and --hostfile: found both, expected one of them")
    if listed is None and file is None and facts is not None:
        return None
    named = read_hostfile(file) if file is not None else Hostfile(parse_hosts("127.0.0.1" if listed is None else listed))
    once = {host.ssh: host for host in named.hosts}
    return Hostfile(tuple(once.values()), named.backend, named.envs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rt.distributed_config",
        usage="rt.distributed_config [--hosts A,B,... | --hostfile F | --facts F] [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hosts", metavar="A,B,...", help="names or addresses that ssh reaches without a password (default: 127.0.0.1, this host)")
    add("--hostfile", metavar="F", help="take the hosts of a hostfile; what else it says of them is found out anew")
    add("--over", choices=OVERS, default="auto", help="auto (default): Thunderbolt if there is a cable, else RDMA, else Ethernet")
    add("--backend", choices=BACKENDS, help="default: the best that the cables and hosts allow")
    add("--iface", metavar="WHICH", help="use these interfaces only: eth (begin so), =en2,en3, ^eth0 (not), 10.0.0.0/8; RT_SOCKET_IFNAME")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for every rank, kept in the hostfile; repeatable")
    add("--output", "--output-hostfile", metavar="F", help="write the hostfile there, not to stdout")
    setup = "run the commands that give addresses, where root or `sudo -n` allows; else they are printed"
    add("--auto-setup", action=argparse.BooleanOptionalAction, default=False, help=setup)
    add("--persist", action="store_true", help="Linux: set up by NetworkManager or systemd-networkd, so that a restart keeps the addresses")
    add("--ignore-unreachable", action="store_true", help="go on with the hosts that answer")
    add("--dot", action="store_true", help="print the cables in Graphviz's language, and stop there unless --output is given")
    add("--svg", metavar="F", help="draw hosts, ports, speeds and cables; broken ones red")
    add("--json", action="store_true", help="print all that was found and chosen as one JSON object")
    add("--save-facts", metavar="F", help="keep what the hosts said")
    add("--facts", metavar="F", help="take what the hosts said from a file and ask nobody; with --hosts only these")
    add("--verbose", action="store_true", help="show hosts, ports and cables as tables")
    return parser
