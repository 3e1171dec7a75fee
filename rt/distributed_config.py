"""``rt.distributed_config``: find out how hosts are connected, set up their network, and write the hostfile of a job.

May live here: the way from a command line to an exit code, in outline, and all that touches hosts and files. May not: the parts. Hosts are
asked in ``_wiring_facts``' words, understood by ``_wiring_macos`` and ``_wiring_linux``, joined by ``_wiring_segments``; ``_wiring_choose``
decides, ``_wiring_plan`` gives addresses, ``_wiring_commands`` says how, ``_wiring_reach`` tries them; what is shown is in ``_wiring_draw``
and ``_wiring_report``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from rt import _wiring_choose as choosing
from rt import _wiring_draw as draw
from rt import _wiring_facts as facts
from rt import _wiring_linux, _wiring_macos, _wiring_reach, _wiring_report
from rt._ssh import FAILED, Answer, ask, explain
from rt._wiring_choose import Layout
from rt._wiring_commands import commands, not_kept
from rt._wiring_facts import Facts
from rt._wiring_model import Machine, Segment
from rt._wiring_options import Options, parse
from rt._wiring_plan import Wire, plan
from rt._wiring_segments import segments
from rt.errors import ConfigError
from rt.hostfile import Host, Hostfile, show_hostfile
from rt.interfaces import Choice, Interface

_SECONDS = 60.0  # for a host to answer: system_profiler takes a few on a Mac with many devices
_SYSTEMS = {"Darwin": _wiring_macos.machine, "Linux": _wiring_linux.machine}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code; wrong usage raises SystemExit(2).

    Args:
        argv: the command line without the program's name; None stands for ``sys.argv[1:]``.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        return _run(options)
    except (ConfigError, OSError) as error:
        _say(f"rt.distributed_config: {error}")
        return 1
    except KeyboardInterrupt:
        _say("rt.distributed_config: stopped")
        return 130


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(options: Options) -> int:
    asked, unreachable = _facts(options)
    if options.save_facts:
        facts.save(options.save_facts, asked, unreachable)
    _check_all_there(asked, unreachable, options.ignore_unreachable)
    machines = [_with_ports(_machine(index, each), options.iface) for index, each in enumerate(asked)]
    _check_each_once(machines)
    found = segments(machines)
    over = choosing.chosen_over(machines, found) if options.over == "auto" else options.over
    shown = choosing.shown(found, over)
    for text in _remarks(machines, shown):
        _say(text)
    if options.svg:
        with open(options.svg, "w", encoding="utf-8") as file:
            file.write(draw.svg(machines, shown, f"{len(machines)} hosts over {over}"))
    if options.dot:
        print(draw.dot(machines, shown))
        if not options.output:
            return 0
    try:
        layout = choosing.choose(machines, found, over, options.backend)
    except ConfigError:
        if options.verbose:  # when it is needed most
            _say(_wiring_report.tables(machines, shown, ()))
        raise
    return _write(options, machines, shown, layout)


def _remarks(machines: Sequence[Machine], shown: Sequence[Segment]) -> list[str]:
    said = [f"{machine.ssh}: {remark}" for machine in machines for remark in machine.remarks]
    return said + [f"broken cable: {segment.fault}" for segment in shown if segment.fault]


def _write(options: Options, machines: Sequence[Machine], shown: Sequence[Segment], layout: Layout) -> int:
    """Set up what was chosen, or say how, and write the hostfile."""
    _say(_wiring_report.summary(layout, machines))
    for remark in layout.remarks:
        _say(remark)
    wires = plan(machines, layout.set_up)
    if options.verbose:
        _say(_wiring_report.tables(machines, shown, wires))
    setup = {machine.ssh: commands(machine, wires, options.persist) for machine in machines}
    done = _set_up(options, machines, setup)
    reached = _try(machines, wires, setup) if options.auto_setup else {}
    hostfile = Hostfile(_hosts(machines, layout, wires), layout.backend, (*(options.hosts.envs if options.hosts else ()), *options.envs))
    text = show_hostfile(hostfile)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text)
        _say(f"wrote {options.output}: rt.launch --hostfile {options.output} program.py")
    if options.json:
        remarks = [*_remarks(machines, shown), *layout.remarks]
        print(json.dumps(_wiring_report.report(machines, shown, layout, wires, reached, setup, hostfile, remarks), indent=2))
    elif not options.output and not options.dot:
        print(text, end="")
    return 0 if done and not any(reached.values()) else 1


# --- asking ------------------------------------------------------------------------------------------------------------------------------


def _facts(options: Options) -> tuple[list[Facts], dict[str, str]]:
    """Return what the hosts said, in their order, and per unreachable host why."""
    if options.facts is None:
        assert options.hosts is not None
        return _ask(options.hosts.hosts)
    kept, unreachable = facts.replay(options.facts)
    if options.hosts is None:
        return kept, unreachable
    by_name = {each.ssh: each for each in kept}
    names = [host.ssh for host in options.hosts.hosts]
    unknown = [name for name in names if name not in by_name and name not in unreachable]
    if unknown:
        raise ConfigError(f"--facts {options.facts}: found nothing of {', '.join(unknown)}, expected one of {', '.join(by_name)}")
    return [by_name[name] for name in names if name in by_name], {name: unreachable[name] for name in names if name in unreachable}


def _ask(hosts: Sequence[Host]) -> tuple[list[Facts], dict[str, str]]:
    mark = facts.new_mark()
    script = facts.script(mark).encode()
    found: dict[str, Facts] = {}
    unreachable: dict[str, str] = {}
    with ThreadPoolExecutor(len(hosts)) as threads:
        asked = {threads.submit(ask, [host], ["sh", "-s"], script, _SECONDS): host for host in hosts}
        waiting = [host.ssh for host in hosts]
        _progress(len(hosts), waiting)
        for answered in as_completed(asked):
            (answer,) = answered.result()
            name = answer.host.ssh
            waiting.remove(name)
            _progress(len(hosts), waiting)
            if answer.code == 0:
                found[name] = facts.read(name, mark, answer.out.decode(errors="replace"), answer.err.decode(errors="replace"))
            else:
                unreachable[name] = _why(answer)
    return [found[host.ssh] for host in hosts if host.ssh in found], unreachable


def _progress(count: int, waiting: Sequence[str]) -> None:
    """Keep one line of a terminal up to date."""
    if sys.stderr.isatty():
        few = ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else "")
        text = f"asked {count} host{'s' * (count != 1)}, waiting for {len(waiting)}: {few}" if waiting else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _why(answer: Answer) -> str:
    if answer.code is None:
        return f"no answer within {_SECONDS:.0f} s"
    if answer.code == FAILED:
        return "; ".join(explain(answer.host, answer.err))
    lines = answer.err.decode(errors="replace").strip().splitlines()
    return f"its `sh -s` ended with {answer.code}: {lines[-1] if lines else 'it said nothing'}"


def _check_all_there(asked: Sequence[Facts], unreachable: dict[str, str], ignore: bool) -> None:
    said = [f"  {name}: {why}" for name, why in unreachable.items()]
    if unreachable and not (ignore and asked):
        more = "" if not asked else "\n  --ignore-unreachable goes on without"
        raise ConfigError("\n".join(["not reached:", *said]) + more)
    if unreachable:
        _say("\n".join(["going on without:", *said]))


def _machine(index: int, told: Facts) -> Machine:
    if told.system not in _SYSTEMS:
        raise ConfigError(f"{told.ssh}: found system {told.system!r}, expected one of {', '.join(_SYSTEMS)}")
    try:
        return _SYSTEMS[told.system](index, told)
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # what a tool printed has another form than any we know
        raise ConfigError(
            f"{told.ssh}: its tools print something that is not understood ({type(error).__name__}: {error}); "
            "--save-facts F.json keeps it for a bug report"
        ) from error


def _check_each_once(machines: Sequence[Machine]) -> None:
    """Refuse two names for one host: it would be joined with itself."""
    known: dict[frozenset[str], str] = {}
    for machine in machines:
        macs = frozenset(port.mac for port in machine.ports if port.mac)
        other = known.setdefault(macs, machine.ssh)
        if macs and other != machine.ssh:
            raise ConfigError(f"{other} and {machine.ssh}: found one host of two names, expected each host once")


def _with_ports(machine: Machine, choice: Choice | None) -> Machine:
    """Leave the ports that ``--iface`` allows."""
    if choice is None:
        return machine
    ports = [(port, Interface(port.name, tuple(map(str, port.all_addresses)), up=port.up)) for port in machine.ports]
    left = tuple(port for port, interface in ports if (choice.rank(interface) is None) == choice.exclude)
    if not left:
        there = ", ".join(str(interface) for _, interface in ports) or "no port at all"
        expected = "one that is left" if choice.exclude else "one that matches"
        raise ConfigError(f"{machine.ssh}: interfaces {choice.text}: found {there}, expected {expected}")
    return replace(machine, ports=left)


# --- setting up --------------------------------------------------------------------------------------------------------------------------


def _set_up(options: Options, machines: Sequence[Machine], setup: dict[str, list[str]]) -> bool:
    """Run the commands, or show them; return whether all is done that was asked for."""
    todo = [machine for machine in machines if setup[machine.ssh]]
    if options.persist:
        for text in filter(None, map(not_kept, todo)):
            _say(text)
    mine = [machine for machine in todo if options.auto_setup and machine.sudo]
    yours = [machine for machine in todo if machine not in mine]
    for machine in yours:
        why = " (its sudo wants a password: run them yourself)" if options.auto_setup else ""
        _say("\n".join([f"Setup for {machine.ssh}{why}", "=" * (10 + len(machine.ssh)), *setup[machine.ssh], ""]))
    if not mine:
        return not (options.auto_setup and yours)
    answers = ask([Host(machine.ssh) for machine in mine], lambda host: ["sh", "-ec", "\n".join(setup[host.ssh])], timeout=_SECONDS)
    failed = [f"  {answer.host.ssh}: {_why_not(answer)}" for answer in answers if answer.code != 0]
    if failed:
        raise ConfigError("\n".join(["the set-up failed:", *failed]))
    _say(f"set up: {', '.join(machine.ssh for machine in mine)}")
    return not yours


def _why_not(answer: Answer) -> str:
    if answer.code in (None, FAILED):
        return _why(answer)
    lines = answer.err.decode(errors="replace").strip().splitlines()
    return f"a command ended with {answer.code}: {lines[-1] if lines else 'it said nothing'}"


def _try(machines: Sequence[Machine], wires: Sequence[Wire], setup: dict[str, list[str]]) -> dict[Segment, str]:
    """Have the hosts that are set up ping each other over every cable; return per cable that was tried what is wrong, "" if nothing is."""
    ready = [machine for machine in machines if machine.sudo or not setup[machine.ssh]]
    scripts = {machine.ssh: text for machine in ready if (text := _wiring_reach.script(machine, wires, ready))}
    trying = [machine for machine in ready if machine.ssh in scripts]
    if not trying:
        return {}
    _say("trying the cables")
    answers = ask([Host(machine.ssh) for machine in trying], lambda host: ["sh", "-c", scripts[host.ssh]], timeout=_SECONDS)
    said = {machine.index: answer.out.decode(errors="replace") for machine, answer in zip(trying, answers, strict=True) if answer.code == 0}
    reached = _wiring_reach.judge(machines, wires, said)
    for answer in answers:
        if answer.code != 0:
            _say(f"{answer.host.ssh}: its cables could not be tried: {_why(answer)}")
    untried = [wire.segment for wire in wires if wire.segment not in reached]
    for segment in untried:
        _say(f"not tried, as no end has a ping or is set up: {_wiring_report.ends(segment, machines)}")
    for fault in filter(None, reached.values()):
        _say(f"no way through: {fault}: is it the cable, a firewall, or another interface with an address in that network?")
    good = sum(not fault for fault in reached.values())
    if good:
        _say(f"tried: {good} of {len(wires)} cable{'s' * (len(wires) != 1)} answer{'s' * (good == 1)} at both ends")
    return reached


# --- the hostfile ------------------------------------------------------------------------------------------------------------------------


def _hosts(machines: Sequence[Machine], layout: Layout, wires: Sequence[Wire]) -> tuple[Host, ...]:
    """Return the hosts in order of ranks: their addresses that face the left neighbour (jaccl: their own), the devices that face each."""
    planned = {wire.segment: wire for wire in wires}
    order = layout.order
    hosts = []
    for rank, index in enumerate(order):
        machine = machines[index]
        facing = [planned[segment].of(index) for segment in layout.between(order[rank - 1], index) if segment in planned]
        rdma: tuple[str | tuple[str, ...] | None, ...] = ()
        if layout.backend.startswith("jaccl"):
            rdma = tuple(_devices(layout, index, other) for other in order)
            facing = [machine.address] if machine.address else facing[:1]
        hosts.append(Host(machine.ssh, tuple(facing or filter(None, [machine.address])), rdma))
    return tuple(hosts)


def _devices(layout: Layout, index: int, other: int) -> str | tuple[str, ...] | None:
    """Return the device, or devices, by which a host reaches another; None where it is no neighbour."""
    if layout.backend == "jaccl-ring":
        place = layout.order.index(index)
        if other not in (layout.order[place - 1], layout.order[(place + 1) % len(layout.order)]):
            return None
    ports = [segment.port_of(index) for segment in layout.between(index, other)]
    devices = tuple(port.rdma for port in ports if port is not None)
    return None if not devices else devices[0] if len(devices) == 1 else devices


if __name__ == "__main__":
    sys.exit(main())
