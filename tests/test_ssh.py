"""Programs on other hosts by ssh: what is asked of it, and what its failures are taken for.

May live here: ``rt._ssh``. May not: launching.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import sshd
from hosts import ROOT

from rt._ssh import Answer, ask, command, explain
from rt.hostfile import Host, parse_hosts

pytestmark = sshd.NEEDED

ASK = f"""
import json, sys
sys.path.insert(0, {ROOT!r})
from rt._ssh import FAILED, ask, explain
from rt.hostfile import parse_hosts
answers = ask(parse_hosts(sys.argv[1]), sys.argv[2:], input=b"said", timeout=20)
rows = [[a.host.ssh, a.code, a.out.decode(), a.err.decode(), explain(a.host, a.err) if a.code == FAILED else None] for a in answers]
print(json.dumps(rows))
"""


def from_the_desk(site: sshd.Site, hosts: str, *program: str) -> list[tuple[str, int | None, str, str, list[str] | None]]:
    done = subprocess.run(site.command(sys.executable, "-c", ASK, hosts, *program), capture_output=True, timeout=60, check=True)
    return [tuple(row) for row in json.loads(done.stdout)]


def test_each_host_answers_and_each_word_arrives_as_it_is(tmp_path: Path) -> None:
    words = ["a b", "$HOME", "it's", 'say "no"', "*", "", "-n", "ü\n;"]
    program = ["sh", "-c", 'printf "<%s>" "$@"; cat; hostname >&2; exit 3', "sh", *words]
    shown = "".join(f"<{word}>" for word in words) + "said"
    with sshd.site(tmp_path, 2, ipv6=True) as site:
        rows = from_the_desk(site, "host1,root@10.2.0.1,fd02::2,localhost", *program)
        assert [row[:3] for row in rows] == [(name, 3, shown) for name in ("host1", "root@10.2.0.1", "fd02::2", "localhost")]
        assert [row[3] for row in rows[:3]] == ["host1\n", "host0\n", "host1\n"]


def test_failures_say_what_to_do(tmp_path: Path) -> None:
    password = ["PubkeyAuthentication no", "PasswordAuthentication yes"]
    with sshd.site(tmp_path, 4, options={0: password}, config=["Host nothere", "  HostName 10.2.0.77", "  ConnectTimeout 1"]) as site:
        site.servers[1].kill()
        site.servers[2].host.ip("link set cable down")
        known = (tmp_path / "known_hosts").read_text().splitlines(keepends=True)
        (tmp_path / "known_hosts").write_text("".join(known[:3]))
        rows = from_the_desk(site, "host0,host1,host2,host3,no-such-name.invalid", "true")
    assert [row[1] for row in rows] == [255] * 5
    found, advice = zip(*(row[4] or ["", ""] for row in rows), strict=True)
    for text, part in zip(found, ("Permission denied", "refused", "", "key", "resolve"), strict=True):
        assert part in text, found
    for text, part in zip(advice, ("ssh-copy-id host0", "start sshd", "no answer", "`ssh host3`", "no such name"), strict=True):
        assert part in text, advice


def test_time_runs_out() -> None:
    (answer,) = ask(parse_hosts("localhost"), ["sh", "-c", "echo begun; exec sleep 60"], timeout=1)
    assert answer == Answer(Host("localhost"), None, b"begun\n", b"")


def test_programs_that_are_not_there_and_messages_nobody_foresaw() -> None:
    (answer,) = ask([Host("localhost")], ["/no/such/program"])
    assert (answer.code, answer.err) == (127, b"/no/such/program: No such file or directory")
    assert explain(Host("a"), b"kex: odd\n") == ("kex: odd", "try `ssh a true`")
    assert explain(Host("a"), b"") == ("ssh failed and said nothing", "try `ssh a true`")


def test_no_word_of_a_host_is_an_option() -> None:
    line = command(Host("me@a"), ["echo", "it's"])
    assert line[0] == "ssh" and line[-3:] == ["--", "me@a", "echo 'it'\"'\"'s'"]
    assert command(Host("localhost"), ["echo", "x"]) == ["echo", "x"]
