"""What hosts say about their ports: asked for in one go per host, kept word for word, and read back from a file.

May live here: the questions, and how the answers travel. May not: what the answers mean (``_wiring_macos``, ``_wiring_linux``). Answers are
kept as the tools printed them, so that a file of facts replays the whole discovery: what we read wrongly can be mended and tried again
without the hosts.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import rt
from rt.errors import ConfigError
from rt.json_file import brief, load

_FORMAT = "rt.distributed_config facts 1"
_EXPECTED = "a file that `rt.distributed_config --save-facts` wrote"

# Linux has no list of who is plugged in where. All hosts of a wire answer a ping to "all nodes" (RFC 4291, 2.7.1), which works before any
# address is given, and each leaves its MAC address in the neighbour table. All interfaces at once, and 3 pings: an answer may get lost.
_PING = (
    "for i in $(ip -o link show up | cut -d: -f2 | cut -d@ -f1); do "
    "ping -6 -n -c 3 -i 0.2 -w 2 ff02::1%$i >/dev/null 2>&1 & done; wait; "
    "command -v ping >/dev/null || echo no ping >&2; ip -j neighbour show"
)
_SYSFS = (
    "grep -H . /sys/bus/thunderbolt/devices/*/unique_id /sys/bus/thunderbolt/devices/*/device_name "
    "/sys/bus/thunderbolt/devices/*/rx_speed /sys/bus/thunderbolt/devices/*/rx_lanes /sys/class/net/*/speed "
    "/sys/class/net/*/mode 2>/dev/null; "
    'for i in /sys/class/net/*; do echo "$i/device:$(readlink "$i/device")"; [ ! -e "$i/phy80211" ] || echo "$i/phy80211:yes"; done'
)
_EVERYWHERE = (("uname", "uname -s"), ("user", "id -u"), ("sudo", "sudo -n true"))
_MACOS = (
    ("system_profiler", "system_profiler SPThunderboltDataType -json"),
    ("networksetup", "networksetup -listallhardwareports"),
    ("ifconfig", "ifconfig -a"),
    ("routes", "netstat -rn -f inet"),
    ("ibv_devices", "ibv_devices"),
)
_LINUX = (
    ("addresses", "ip -j -d address show"),
    ("routes", "ip -4 -j route show table all"),
    ("rdma", "rdma -j link show"),
    ("sysfs", _SYSFS),
    ("neighbours", _PING),
    ("managers", "systemctl is-active NetworkManager systemd-networkd"),
)


@dataclass(frozen=True)
class Facts:
    """The answers of one host.

    Attributes:
        ssh: what was given to ssh.
        answers: per question the exit status of the tool (127: there is none) and what it printed.
        said: what the tools wrote to stderr, for who reads the file.
    """

    ssh: str
    answers: dict[str, tuple[int, str]]
    said: str = ""

    @property
    def system(self) -> str:
        return self.text("uname").strip()

    def text(self, question: str) -> str:
        """Return what a tool printed, or "" if it failed."""
        code, out = self.answers.get(question, (127, ""))
        return out if code == 0 else ""

    def went_well(self, question: str) -> bool:
        return self.answers.get(question, (127, ""))[0] == 0


def script(mark: str) -> str:
    """Return what a POSIX shell runs on a host; ``mark`` begins the lines between the answers."""
    lines = [
        'PATH="$PATH:/usr/sbin:/sbin:/usr/bin:/bin"; LC_ALL=C; export PATH LC_ALL',  # sbin is not on the PATH that sshd gives
        f'ask() {{ echo \'{mark}\' "$1"; sh -c "$2" </dev/null; s=$?; echo; echo \'{mark}\' "= $s"; }}',
    ]
    lines += [_asked(question) for question in _EVERYWHERE]
    for system, questions in (("Darwin", _MACOS), ("Linux", _LINUX)):
        lines.append(f'if [ "$(uname -s)" = {system} ]; then')
        lines += [_asked(question) for question in questions]
        lines.append("fi")
    return "\n".join([*lines, "exit 0", ""])


def _asked(question: tuple[str, str]) -> str:
    name, command = question
    quoted = command.replace("'", "'\\''")
    return f"ask {name} '{quoted}'"


def new_mark() -> str:
    """Return what no tool prints."""
    return f"rt-{secrets.token_hex(8)}"


def read(ssh: str, mark: str, out: str, said: str) -> Facts:
    """Cut what :func:`script` printed into answers."""
    answers: dict[str, tuple[int, str]] = {}
    name, kept = "", [""]
    for line in out.splitlines(keepends=True):
        if not line.startswith(mark + " "):
            kept.append(line)
            continue
        word = line[len(mark) + 1 :].strip()
        if word.startswith("= "):
            answers[name] = int(word[2:]), "".join(kept)[:-1]  # without the line that ends an answer which has none
        name, kept = word, []
    return Facts(ssh, answers, said)


# --- files -------------------------------------------------------------------------------------------------------------------------------


def save(path: str, hosts: Sequence[Facts], unreachable: dict[str, str]) -> None:
    """Write facts; OSError is the caller's."""
    content = {
        "format": _FORMAT,
        "rt": rt.__version__,
        "hosts": [{"ssh": each.ssh, "answers": each.answers, "said": each.said} for each in hosts],
        "unreachable": unreachable,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def replay(path: str) -> tuple[list[Facts], dict[str, str]]:
    """Return the facts of a file, and who could not be reached when it was made, with the reason.

    Raises:
        ConfigError: no such file, or not one of ours; it says what was found where.
    """
    where = f"--facts {path}"
    content = load(path, where, _EXPECTED)
    found = content.get("format") if isinstance(content, dict) else content
    if not isinstance(content, dict) or found != _FORMAT:
        raise ConfigError(f"{where}: found {brief(found)}, expected {_EXPECTED} (format {_FORMAT!r})")
    hosts, unreachable = content.get("hosts"), content.get("unreachable", {})
    if not isinstance(hosts, list) or not isinstance(unreachable, dict):
        raise ConfigError(f'{where}: found no list "hosts", expected {_EXPECTED}')
    if not hosts and not unreachable:
        raise ConfigError(f"{where}: found no host in it, expected {_EXPECTED}")
    return [_host(entry, f"{where}: hosts[{index}]") for index, entry in enumerate(hosts)], unreachable


def _host(entry: object, where: str) -> Facts:
    try:
        assert isinstance(entry, dict)
        answers = {str(name): (int(code), str(out)) for name, (code, out) in entry["answers"].items()}
        return Facts(str(entry["ssh"]), answers, str(entry.get("said", "")))
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f'{where}: found {brief(entry)}, expected {{"ssh": ..., "answers": {{name: [status, text]}}}}') from None
