"""``rt.launch --dry-run``: the commands that would start the ranks, for a shell.

May live here: their text, and what stands in it for answers of hosts that nobody asks. May not: what ranks are told (``_launch_plan``).
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence

from rt._launch_handed import Handed, often
from rt._launch_options import Options
from rt._launch_plan import Crew, Ground, Told, crews, even_out, program, question, told, travelling, uses_ring_file
from rt._launch_ranks import NOT_INHERITED, THREADS, UNBUFFERED, environment
from rt.errors import ConfigError
from rt.interfaces import VARIABLE

_PORT = 32323  # where nobody chose one, as for mlx.launch


def dry_run(options: Options, inherited: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a shell that would start the ranks, one line for each.

    A secret is not among them: the launcher makes one for every job, and ranks that find none use their user's own.

    Raises:
        ConfigError: no address of a host is known where others need it.
    """
    crewed = crews(options.hosts)
    travels = travelling(options, inherited) if options.remote else {**inherited, **options.environment}
    grounds = _guess(options, crewed, inherited) if options.remote else [_here(options, crewed[0], travels)]
    even_out(grounds, options.connections_per_ip)
    words = told(options, crewed, grounds, travels)
    yield "# One command for each rank, in a terminal of its own. rt.launch hands over a secret too, and to rank 0 a listening socket."
    yield from _notes(options, travels, words)
    gone = [word for name in NOT_INHERITED if name in inherited and name not in options.environment for word in ("-u", name)]
    for crew in crewed:
        chosen = (UNBUFFERED, *THREADS, *options.environment)
        shared = {name: value for name, value in environment(inherited, options.environment, len(crew.ranks)).items() if name in chosen}
        if not crew.host.is_local:
            shared = travels | shared
        shared.pop("RT_SECRET", None)
        for rank in crew.ranks:
            line = _command(options, words[rank], shared, gone if crew.host.is_local else [])
            yield line if crew.host.is_local else shlex.join(["ssh", crew.host.ssh, line])


def _here(options: Options, crew: Crew, variables: Mapping[str, str]) -> Ground:
    """Return what this host says, with ports that are free, at least now."""
    handed, ground = Handed(), Ground("127.0.0.1")
    ground.learn(handed.look(question(options, crew, ground.address), variables))
    handed.let_go()
    handed.started()
    return ground


def _guess(options: Options, crewed: Sequence[Crew], inherited: Mapping[str, str]) -> list[Ground]:
    """Return what hosts might say: their names as addresses, where they have no others, and ports that have to be free."""
    ports = itertools.count((options.starting_port or _PORT) + 1)  # the first is for jaccl's coordinator
    grounds = [Ground(_address(crew, len(crewed)), listening=next(ports) if index == 0 else 0) for index, crew in enumerate(crewed)]
    for crew, ground in zip(crewed, grounds, strict=True):
        ground.gpus = inherited.get("CUDA_VISIBLE_DEVICES") if crew.host.is_local else None
        for rank in crew.ranks:
            ground.addresses[rank] = list(options.hosts[rank].chosen_ips or (ground.address,))
            ground.ports[rank] = [(address, next(ports)) for address in often(ground.addresses[rank], options.connections_per_ip)]
    return grounds


def _address(crew: Crew, count: int) -> str:
    if crew.host.is_local and not crew.host.chosen_ips and count > 1:
        raise ConfigError(
            f"--dry-run: found no address of {crew.host.name} that other hosts could use, and nobody is asked for one: "
            'name it as others know it, or give it "ips" in a hostfile'
        )
    return (*crew.host.ips, crew.host.name)[0]


def _notes(options: Options, travels: Mapping[str, str], words: Sequence[Told]) -> Iterator[str]:
    if options.remote:
        yield "# Across hosts they need a secret: make a file with mode 0600, copy it to all, and set RT_SECRET_FILE."
        yield "# The hosts were not asked: names stand for addresses, and ports have to be free."
    if options.remote and travels.get(VARIABLE) and uses_ring_file(options):
        yield f"# {VARIABLE} was not looked at: put addresses on these interfaces into the ring file."
    if not options.backend:
        yield "# No backend was named: this is the ring; rt.launch would take nccl if all hosts had it."
    if any(each.files for each in words):
        yield "# Files that ranks are told of stay in $TMPDIR."


def _command(options: Options, words: Told, shared: dict[str, str], unset: Sequence[str]) -> str:
    """Return the line that starts a rank on its host."""
    names = {content: f"file{index}" for index, content in enumerate(dict.fromkeys(words.files.values()))}
    steps = [f"cd {shlex.quote(options.cwd)}"] if options.cwd else []
    steps += [f'{name}=$(mktemp) && printf %s {shlex.quote(content)} > "${name}"' for content, name in names.items()]
    variables = [f"{name}={value}" for name, value in (shared | words.variables).items()]
    files = [f'{name}="${names[content]}"' for name, content in words.files.items()]
    return " && ".join([*steps, " ".join([shlex.join(["env", *unset, *variables]), *files, shlex.join(program(options))])])
