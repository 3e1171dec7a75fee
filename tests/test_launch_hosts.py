"""``rt.launch`` on many hosts as its users meet it: what ranks are told, what they read and write, and how a job ends in order.

May live here: hosts that are well. May not: hosts, cables and launchers that break (``test_launch_lost``), hosts that are not ready
(``test_launch_ready``).
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import netns
import pytest
import sshd
from far import SCRIPT, command, launch
from hosts import ROOT
from launching import environment
from peers import PYTHON, needs_peers

pytestmark = sshd.NEEDED
DEMO = f"{ROOT}/examples/train_digits.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Site]:
    with sshd.site(tmp_path_factory.mktemp("site"), 4, ipv6=True) as made:
        yield made


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def run_source(site: sshd.Site, script: Path, source: str, *options: str, hosts: list[str] | None = None, **extra: str) -> list[str]:
    """Run a script that is to succeed and return what its ranks wrote, sorted."""
    script.write_text(SCRIPT + source)
    done = launch(site, *options, str(script), hosts=hosts, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(done.stdout.splitlines())


def test_ranks_are_where_they_should_be(site: sshd.Site, script: Path) -> None:
    names = ("RT_WORLD_SIZE", "RT_LOCAL_RANK", "RT_LOCAL_SIZE")
    source = f"import socket\nprint(socket.gethostname(), *(os.environ[name] for name in {names}))"
    assert run_source(site, script, source) == [f"[{rank} host{rank}] host{rank} 4 0 1" for rank in range(4)]
    twice = [f"[{rank} host{rank // 2}] host{rank // 2} 4 {rank % 2} 2" for rank in range(4)]
    assert run_source(site, script, source, "-n2", hosts=["host0", "host1"]) == twice


# --- what ranks are told -------------------------------------------------------------------------------------------------------------


def told(*names: str) -> str:
    return f"print(*(os.environ.get(name) for name in {names}))"


def test_variables_of_some_families_go_along(site: sshd.Site, script: Path, tmp_path: Path) -> None:
    here = {"NCCL_X": "1", "RT_X": "2", "MLX_X": "3", "OMP_NUM_THREADS": "4", "CUDA_X": "5", "OTHER": "6"}
    ours = {"RT_SECRET": "x" * 16, "RT_RANK": "9"}  # what says something about the launcher itself
    for rank, line in enumerate(run_source(site, script, told(*here, *ours, "A", "B"), "--env", "A=a b", **here, **ours)):
        assert line == f"[{rank} host{rank}] 1 2 3 4 5 None None {rank} a b None"
    assert run_source(site, script, told("NCCL_X", "RT_X", "A"), "--no-env", "--env", "A=1", hosts=["host0"], **here) == ["None None 1"]
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"hosts": [{"ssh": "host3"}], "envs": ["A=file", "B=file"]}))
    assert run_source(site, script, told("A", "B", "RT_X"), "--hostfile", str(file), "--env", "A=line", hosts=[], **here) == ["line file 2"]


def test_interfaces_are_a_variable(site: sshd.Site, script: Path) -> None:
    source, which = told("RT_SOCKET_IFNAME"), "=eth0,10.0.0.0/8"
    assert run_source(site, script, source, "--iface", which, hosts=["host0"], RT_SOCKET_IFNAME="other") == [which]


def test_the_secret_is_shared_and_shown_nowhere(site: sshd.Site, script: Path, tmp_path: Path) -> None:
    """Not on a command line or in an environment of any process that ranks can see, which is all of theirs, the launcher's and ssh's; and
    in nothing that is written: what sshd logs, what the launcher says, the files of the ranks' output."""
    source = """
secret = os.pread(int(os.environ["RT_SECRET_FD"]), 4096, 0).removeprefix(b"rt-secret:")
assert len(secret) == 64
processes = [name for name in os.listdir("/proc") if name.isdecimal()]
seen = [open(f"/proc/{process}/{file}", "rb").read() for process in processes for file in ("cmdline", "environ")]
assert len(seen) > 6 and not any(secret in text or bytes.fromhex(secret.decode()) in text for text in seen)
with open(os.open(sys.argv[1] + str(rank), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
    file.write(secret)
print("rank", rank, flush=True)
"""
    script.write_text(SCRIPT + source)
    secrets = []
    for job in ("first", "second"):
        key, logs = tmp_path / f"{job}-key", tmp_path / f"{job}-logs"
        done = launch(site, "--verbose", "--log-dir", str(logs), str(script), str(key))
        assert done.returncode == 0, done.stderr
        (secret,) = {Path(f"{key}{rank}").read_bytes() for rank in range(4)}
        written = [file.read_bytes() for file in (*(server.log for server in site.servers), *logs.iterdir())]
        written += [done.stdout.encode(), done.stderr.encode()]
        for word, count in ((b"Accepted publickey", 4), (b"rank 3", 2), (b"rt.launch: 4 ranks of", 1)):  # they are what they should be
            assert sum(word in text for text in written) >= count
        forms = secret, bytes.fromhex(secret.decode()), base64.b64encode(bytes.fromhex(secret.decode())).rstrip(b"=")
        assert not any(form in text for form in forms for text in written)
        secrets.append(secret)
    assert secrets[0] != secrets[1]


def test_a_ring_file_where_all_have_addresses_and_a_coordinator_else(site: sshd.Site, script: Path, tmp_path: Path) -> None:
    source = "print(os.environ.get('RT_COORDINATOR'), open(os.environ['RT_HOSTFILE']).read() if 'RT_HOSTFILE' in os.environ else None)"
    for line in run_source(site, script, source, hosts=["host1", "host0"]):
        assert re.fullmatch(r"\[\d host\d\] 10\.2\.0\.2:\d+ None", line)
    for line in run_source(site, script, source, "--connections-per-ip", "2", hosts=["10.2.0.2", "fd02::1"]):
        ring = json.loads(line.partition("None ")[2])
        assert [[re.sub(r"\d+$", "P", address) for address in entry] for entry in ring] == [["10.2.0.2:P"] * 2, ["[fd02::1]:P"] * 2]
        assert len({address for entry in ring for address in entry}) == 4
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([{"ssh": "host0", "ips": ["10.2.0.1", "fd02::1"]}, {"ssh": "host2", "ips": ["10.2.0.3", "fd02::3"]}]))
    lines = run_source(site, script, source, "--hostfile", str(file), "-n2", "-p", "6000", "--connections-per-ip", "2", hosts=[])
    rings = {line.partition("None ")[2] for line in lines}
    entries = [
        [f"{ip}:{6000 + 4 * rank + 2 * index + twice}" for index, ip in enumerate(ips) for twice in range(2)]
        for rank, ips in enumerate([("10.2.0.1", "[fd02::1]")] * 2 + [("10.2.0.3", "[fd02::3]")] * 2)
    ]
    assert len(lines) == 4 and [json.loads(ring) for ring in rings] == [entries]


def test_names_of_mlx(site: sshd.Site, script: Path) -> None:
    source = "print(os.environ['MLX_RANK'], os.environ['MLX_WORLD_SIZE'], open(os.environ['MLX_HOSTFILE']).read())"
    lines = run_source(site, script, source, hosts=["host0", "host1"])
    assert [line.split()[2:4] for line in lines] == [["0", "2"], ["1", "2"]]
    rings = {re.sub(r":\d+", ":P", line.partition("2 ")[2]) for line in lines}
    assert rings == {'[["10.2.0.1:P"], ["10.2.0.2:P"]]'}


def test_what_is_promised_for_nccl_and_jaccl(site: sshd.Site, script: Path, tmp_path: Path) -> None:
    names = ("RT_BACKEND", "NCCL_HOST_IP", "NCCL_PORT", "MLX_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    options = ("--backend", "nccl", "-n2")
    lines = run_source(site, script, told(*names), *options, hosts=["host0", "host1"], CUDA_VISIBLE_DEVICES="5,7,9")
    assert lines == [f"[{rank} host{rank // 2}] nccl 10.2.0.1 12345 4 {(5, 7)[rank % 2]}" for rank in range(4)]
    lines = run_source(site, script, told(*names), *options, "--nccl-port", "99", hosts=["host0", "host1"])
    assert lines == [f"[{rank} host{rank // 2}] nccl 10.2.0.1 99 4 {rank % 2}" for rank in range(4)]
    file = tmp_path / "hosts.json"
    rdma = [[None, "rdma_en2"], [["rdma_en3", "rdma_en4"], None]]
    file.write_text(json.dumps([{"ssh": f"host{index}", "ips": [f"10.2.0.{index + 1}"], "rdma": row} for index, row in enumerate(rdma)]))
    files = "print(open(os.environ['MLX_IBV_DEVICES']).read() == open(os.environ['RT_IBV_DEVICES']).read() == sys.argv[1], end=' ')\n"
    script.write_text(SCRIPT + files + told("RT_BACKEND", "MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING"))
    for backend, ring in (("jaccl", "None"), ("jaccl-ring", "1")):
        done = launch(site, "--hostfile", str(file), "--backend", backend, str(script), json.dumps(rdma), hosts=[])
        assert sorted(done.stdout.splitlines()) == [f"[{rank} host{rank}] True jaccl {rank} 10.2.0.1:32323 {ring}" for rank in range(2)]


# --- input and output ----------------------------------------------------------------------------------------------------------------


def test_every_rank_reads_all_of_our_input_and_its_end(site: sshd.Site, script: Path) -> None:
    content = os.urandom(3_000_000)
    script.write_text(SCRIPT + "import hashlib\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())")
    done = launch(site, "-n2", str(script), stdin=content)
    digest = hashlib.sha256(content).hexdigest()
    assert sorted(done.stdout.splitlines()) == [f"[{rank} host{rank // 2}] {digest}" for rank in range(8)]


def test_64_mib_of_output_of_each_rank_arrive_and_stdout_and_stderr_stay_apart(site: sshd.Site, script: Path, tmp_path: Path) -> None:
    script.write_text(SCRIPT + "for _ in range(1 << 10): sys.stdout.write(f'{rank}' * 65535 + '\\n')\nprint('done', file=sys.stderr)")
    with open(tmp_path / "out", "wb") as file:
        line = command(site, "--log-dir", str(tmp_path / "logs"), "--prefix", "never", str(script))
        done = subprocess.run(line, stdout=file, stderr=subprocess.PIPE, timeout=100, env=environment(), stdin=subprocess.DEVNULL)
    assert (done.returncode, sorted(done.stderr.decode().splitlines())) == (0, ["done"] * 4)
    counted = collections.Counter((tmp_path / "out").read_bytes().splitlines())
    assert counted == {f"{rank}".encode() * 65535: 1 << 10 for rank in range(4)}
    for rank in range(4):
        assert (tmp_path / "logs" / f"rank{rank}.out").stat().st_size == 64 << 20


def test_a_terminal_for_each_rank_where_that_is_wanted(site: sshd.Site, script: Path) -> None:
    source = "print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty(), input())"
    script.write_text(SCRIPT + source)
    expected = [f"[{rank}] True True True word" for rank in (0, 1)]
    for hosts in (["host0", "host1"], []):
        size = ["-n", "2"] if not hosts else []
        done = launch(site, "--tty", *size, str(script), hosts=hosts, stdin=b"word\n")
        assert done.returncode == 0, done.stderr
        assert sorted(re.sub(" host.", "", line) for line in done.stdout.splitlines()) == expected


# --- hosts by other names, and whole programs ----------------------------------------------------------------------------------------


def test_hosts_by_any_name(site: sshd.Site, script: Path) -> None:
    """Names of ssh's configuration, addresses, users, IPv6, and this host without ssh; they all reduce together."""
    source = "import numpy as np\nimport rt.sync as rt\nprint(int(rt.all_sum(np.ones(1))[0]), 'SSH_CONNECTION' in os.environ)"
    names = ["root@host0", "10.2.0.2", "root@[fd02::3]", "fd02::4", "localhost"]
    shown = ["host0", "10.2.0.2", "fd02::3", "fd02::4", "localhost"]
    lines = run_source(site, script, source, hosts=names)
    assert lines == [f"[{rank} {name}] 5 {name != 'localhost'}" for rank, name in enumerate(shown)]
    lines = run_source(site, script, source, hosts=["localhost", "host1"])  # rank 0, where all meet, is the one that ssh comes from
    assert lines == ["[0 localhost] 2 False", "[1 host1] 2 True"]


def test_hosts_cabled_with_their_neighbours_only(site: sshd.Site, tmp_path: Path) -> None:
    """The hostfile of a ring of cables: each host's address is the one that faces its left neighbour, and no other host can reach it."""
    machines = [server.host for server in site.servers]
    for number, machine in enumerate(machines):
        right = (number + 1) % 4
        netns.connect(machine, f"10.0.{number}.1/30", machines[right], f"10.0.{number}.2/30", f"ring{number}")
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([{"ssh": f"host{number}", "ips": [f"10.0.{(number - 1) % 4}.2"]} for number in range(4)]))
    done = launch(site, "--hostfile", str(file), DEMO, hosts=[])
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 ranks, 20 epochs" in done.stdout and done.stdout.count(" ok ") == 3


def test_a_login_shell_that_talks(tmp_path: Path) -> None:
    chatter = tmp_path / "bashrc"
    chatter.write_text("echo Welcome; echo to this host >&2\n")
    with sshd.site(tmp_path, 1, prepare={0: [f"touch ~/.bashrc && mount --bind {chatter} ~/.bashrc"]}) as site:
        done = launch(site, "echo", "said")
    assert (done.returncode, done.stdout, done.stderr) == (0, "said\n", "")


@pytest.mark.parametrize("size", [1, 2])
def test_the_demo_trains_on_four_hosts(site: sshd.Site, size: int) -> None:
    done = launch(site, "-n", str(size), DEMO)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{4 * size} ranks, 20 epochs" in done.stdout and done.stdout.count(" ok ") == 3


def test_four_hosts_learn_bit_for_bit_what_four_local_ranks_do(site: sshd.Site, tmp_path: Path) -> None:
    """The command of the guide, and the digest of the weights that the example shows."""
    (tmp_path / "F").write_text(json.dumps([{"ssh": name} for name in site.names]))
    # BLAS, too, has to add in one order: what chooses its kernels here goes along, which the launcher leaves to each host.
    chosen = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("OPENBLAS_", "NPY_"))]
    kernels = [word for variable in chosen for word in ("--env", variable)]
    shown = []
    for ranks in (["--hostfile", str(tmp_path / "F")], ["-n", "4"]):
        line = command(site, *ranks, *kernels, "examples/train_digits.py", hosts=[])
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
        assert done.returncode == 0 and "4 ranks, 20 epochs" in done.stdout, done.stderr
        shown.append(re.findall(r"ok +weights bit-identical on all ranks \(sha256 [0-9a-f]{16}\)", done.stdout))
    assert len(shown[0]) == 1 and shown[0] == shown[1]


def test_what_a_user_has_configured_for_logging_in_does_not_get_between(tmp_path: Path) -> None:
    forward = ["RemoteCommand tmux", "RequestTTY force", "LocalForward 9999 localhost:1", "ExitOnForwardFailure yes", "LogLevel QUIET"]
    local = ["PermitLocalCommand yes", f"LocalCommand touch {tmp_path}/logged_in", "ControlMaster auto", f"ControlPath {tmp_path}/%h"]
    with sshd.site(tmp_path, 2, config=["Host host*", *forward, *local]) as site:
        done = launch(site, "echo", "said")
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, ["[0 host0] said", "[1 host1] said"], "")
    assert not (tmp_path / "logged_in").exists() and not (tmp_path / "10.2.0.1").exists()


def test_a_program_the_kernel_refuses_on_one_host(tmp_path: Path) -> None:
    program, broken = tmp_path / "program", tmp_path / "broken"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    broken.write_bytes(b"\0neither a script nor a binary")
    for file in (program, broken):
        file.chmod(0o755)
    with sshd.site(tmp_path, 2, prepare={1: [f"mount --bind {broken} {program}"]}) as site:
        done = launch(site, "-n2", str(program))
        assert (done.returncode, done.stderr) == (2, f"rt.launch: cannot start rank 2 (host1): {program}: Exec format error\n")
        assert not any(server.processes("RT_JOB_ID=") for server in site.servers)


@needs_peers("mlx.launch")
@pytest.mark.parametrize("hosts", [["host0", "host1"], []])
def test_a_program_of_mlx_finds_its_ring(site: sshd.Site, script: Path, hosts: list[str]) -> None:
    source = "import mlx.core as mx\nmx.distributed.init(strict=True, backend='ring')\n"
    script.write_text(source + "print(mx.distributed.all_sum(mx.ones(1)).item())")
    done = launch(site, "-n", "2", str(PYTHON), str(script), hosts=hosts)
    assert done.returncode == 0, done.stderr
    size = 2 * max(1, len(hosts))
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [f"{size}.0"] * size


def test_code_is_copied_first_if_asked(tmp_path: Path) -> None:
    code = tmp_path / "my code"
    code.mkdir()
    (code / "script.py").write_text("import helper; print(helper.NAME)")
    (code / "helper.py").write_text("NAME = 'copied'")
    elsewhere = {number: [f"mount -t tmpfs tmpfs '{code}'"] for number in range(2)}
    with sshd.site(tmp_path, 2, prepare=elsewhere, ipv6=True) as site:
        hosts = ["host0", "root@fd02::2", "localhost"]
        assert launch(site, str(code / "script.py"), hosts=hosts).returncode == 2
        done = launch(site, "--sync-code", str(code), str(code / "script.py"), hosts=hosts)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(line.split()[-1] for line in done.stdout.splitlines()) == ["copied"] * 3
        done = launch(site, "--sync-code", str(code), "true", hosts=["host0", "no-such-name.invalid"])
        assert done.returncode == 2 and done.stderr.splitlines()[1].startswith("no-such-name.invalid  ssh: Could not resolve")
        assert done.stderr.splitlines()[-1] == f"rt.launch: --sync-code {code}: not copied everywhere, nothing was started"


def test_the_path_of_the_python(site: sshd.Site) -> None:
    assert launch(site, "--print-python").stdout == f"{sys.executable}\n"
    assert launch(site, "--python", "/other/python", "--print-python").stdout == "/other/python\n"
