"""Where secrets come from, who else could have read them, and that they never show.

May live here: tests of ``rt/secret.py``, with real files, descriptors and processes. May not: the
handshake that uses the secret, network traffic.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import logging
import os
import pickle
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from rt.config import resolve_ring
from rt.errors import ConfigError
from rt.secret import Secret, is_local, make_secret_fd, resolve_secret

KEY = b"correct horse battery staple"
HERE = ["127.0.0.1"]
ELSEWHERE = ["192.0.2.1"]  # TEST-NET-1: nobody's address
RACERS, ROUNDS = 8, 50

RACER = """
import hashlib, os, sys
from rt.secret import resolve_secret
for argument in sys.argv[1:]:
    home, fd = argument.rsplit("=", 1)
    print("ready", flush=True)
    os.read(int(fd), 1)
    print(hashlib.sha256(resolve_secret(None, ["127.0.0.1"], {"HOME": home}).key).hexdigest(), flush=True)
"""


def private(path: Path, content: bytes = KEY, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def failure(keyword: bytes | str | None = None, hosts: list[str] = HERE, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_secret(keyword, hosts, environ)
    whole = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in whole and "\n" not in str(caught.value)
    return str(caught.value)


# --- a secret does not show ----------------------------------------------------------------------------------------------------------


def test_no_text_shows_the_key() -> None:
    secret = Secret(KEY, "a test")
    for text in (repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", f"{[secret]}", f"{secret}"):
        assert "correct" not in text and KEY.hex() not in text and "a test" in text


@pytest.mark.parametrize("escape", [pickle.dumps, copy.copy, copy.deepcopy, lambda secret: pickle.dumps([secret], protocol=0)])
def test_it_refuses_to_be_pickled(escape: object) -> None:
    assert callable(escape)
    with pytest.raises(TypeError, match="cannot be pickled") as caught:
        escape(Secret(KEY, "a test"))
    assert "correct" not in str(caught.value)


def test_logs_do_not_show_the_key(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG, "rt")
    path = private(tmp_path / "other", b"rt-secret:hunter2")
    with path.open("rb") as file:
        resolve_secret(None, HERE, {"RT_SECRET_FD": str(file.fileno()), "RT_SECRET": "hunter2 hunter2 hunter2"})
    assert "ignored" in caplog.text and "hunter2" not in caplog.text


# --- the code over messages ----------------------------------------------------------------------------------------------------------


def test_mac_is_hmac_sha256_of_length_prefixed_parts() -> None:
    message = (2).to_bytes(8, "big") + b"ab" + (0).to_bytes(8, "big") + (1).to_bytes(8, "big") + b"c"
    assert Secret(KEY, "").mac(b"ab", b"", b"c") == hmac.digest(KEY, message, "sha256")


def test_mac_tells_apart_how_parts_are_cut() -> None:
    secret = Secret(KEY, "")
    assert len({secret.mac(b"ab", b"c"), secret.mac(b"a", b"bc"), secret.mac(b"abc"), secret.mac(b"abc", b""), secret.mac()}) == 5


def test_mac_without_a_key_differs_from_any_with_one() -> None:
    assert Secret(None, "").mac(b"x") != Secret(KEY, "").mac(b"x")


# --- order of the sources ------------------------------------------------------------------------------------------------------------


def test_each_source_gives_way_to_the_one_before(tmp_path: Path) -> None:
    fd = make_secret_fd()
    sources = {
        "RT_SECRET_FD": str(fd),
        "RT_SECRET_FILE": str(private(tmp_path / "file")),
        "RT_SECRET": "an environment variable",
        "RT_INSECURE": "1",
    }
    environ = {"HOME": str(tmp_path), **sources}
    assert resolve_secret(b"a keyword of 20 byte", ELSEWHERE, environ).source == "keyword secret"
    found = []
    for name in sources:
        found.append(resolve_secret(None, ELSEWHERE, environ).source)
        del environ[name]
    os.close(fd)
    assert found == ["RT_SECRET_FD", f"RT_SECRET_FILE={tmp_path / 'file'}", "RT_SECRET", "RT_INSECURE=1"]
    assert resolve_secret(None, HERE, environ).source == str(tmp_path / ".cache/rt/secret")


def test_text_and_its_bytes_are_the_same_secret() -> None:
    text = "passphrase with é"
    assert resolve_secret(text, HERE, {}).key == resolve_secret(text.encode(), HERE, {}).key == text.encode()


def test_bytes_in_the_environment_that_are_no_utf8_survive() -> None:
    raw = b"\xff" * 16
    assert resolve_secret(None, HERE, {"RT_SECRET": raw.decode("utf-8", "surrogateescape")}).key == raw


@pytest.mark.parametrize("keyword", [b"hunter2", "hunter2"])
def test_a_short_keyword_is_an_error(keyword: bytes | str) -> None:
    text = failure(keyword)
    assert "keyword secret" in text and "found 7" in text and "expected at least 16" in text


def test_a_keyword_of_another_type_is_an_error() -> None:
    assert failure(["hunter2"]) == "keyword secret: found list, expected bytes or str"  # type: ignore[arg-type]


def test_a_short_variable_is_an_error() -> None:
    assert failure(RT_SECRET="hunter2") == "RT_SECRET: found 7 characters, expected at least 16"


def test_across_hosts_the_error_is_the_fix() -> None:
    text = failure(hosts=HERE + ELSEWHERE)
    for part in (
        "192.0.2.1",
        "found none of",
        "expected one",
        "umask 077; head -c 32 /dev/urandom",
        "scp -p",
        "RT_SECRET_FILE=",
        "RT_INSECURE=1",
    ):
        assert part in text


def test_insecure_has_no_key_and_must_be_said_clearly() -> None:
    assert resolve_secret(None, ELSEWHERE, {"RT_INSECURE": "1"}).key is None
    assert failure(hosts=ELSEWHERE, RT_INSECURE="yes").startswith("RT_INSECURE: found 'yes', expected 1")
    assert "across hosts" in failure(hosts=ELSEWHERE, RT_INSECURE="0")


# --- the descriptor of our launcher --------------------------------------------------------------------------------------------------


def test_ranks_inherit_the_launchers_descriptor() -> None:
    fd = make_secret_fd()
    code = (
        "import os, hashlib; from rt.secret import resolve_secret; "
        "print(hashlib.sha256(resolve_secret(None, ['192.0.2.1'], os.environ).key).hexdigest())"
    )
    environ = {**os.environ, "RT_SECRET_FD": str(fd)}
    answers = [
        subprocess.run([sys.executable, "-c", code], env=environ, pass_fds=[fd], capture_output=True, text=True, check=True).stdout
        for _ in "ab"
    ]
    assert os.get_inheritable(fd)
    key = resolve_secret(None, ELSEWHERE, {"RT_SECRET_FD": str(fd)}).key
    os.close(fd)
    assert key is not None and len(key) == 32
    assert answers == [hashlib.sha256(key).hexdigest() + "\n"] * 2


def test_every_launch_has_another_key() -> None:
    fds = [make_secret_fd() for _ in range(2)]
    keys = {resolve_secret(None, HERE, {"RT_SECRET_FD": str(fd)}).key for fd in fds}
    for fd in fds:
        os.close(fd)
    assert len(keys) == 2


def test_without_memfd_the_file_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fd = make_secret_fd()
    assert resolve_secret(None, HERE, {"RT_SECRET_FD": str(fd)}).source == "RT_SECRET_FD"
    assert list(tmp_path.iterdir()) == [] and stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    os.close(fd)


@pytest.mark.parametrize(
    "content", [b"", b"something else entirely", b"rt-secret:", b"rt-secret:" + b"zz" * 32, b"rt-secret:" + b"ab" * 31]
)
def test_a_descriptor_open_on_something_else_is_passed_over(content: bytes, tmp_path: Path) -> None:
    with private(tmp_path / "other", content).open("rb") as file:
        assert resolve_secret(None, HERE, {"RT_SECRET_FD": str(file.fileno()), "RT_SECRET": "x" * 16}).source == "RT_SECRET"


def test_a_closed_descriptor_or_a_pipe_is_passed_over() -> None:
    reader, writer = os.pipe()
    assert resolve_secret(None, HERE, {"RT_SECRET_FD": str(reader), "RT_SECRET": "x" * 16}).source == "RT_SECRET"
    os.close(reader)
    os.close(writer)
    assert resolve_secret(None, HERE, {"RT_SECRET_FD": str(reader), "RT_SECRET": "x" * 16}).source == "RT_SECRET"


@pytest.mark.parametrize("value", ["", "x", "-1", "3.0", "99999999999999999999"])
def test_a_descriptor_that_is_no_number_is_an_error(value: str) -> None:
    assert failure(RT_SECRET_FD=value) == f"RT_SECRET_FD: found {value!r}, expected the number of an inherited descriptor"


# --- the file ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_private_file_is_taken_whatever_ends_it(mode: int, tmp_path: Path) -> None:
    for ending in (b"", b"\n", b"\r\n"):
        path = private(tmp_path / f"file{len(ending)}", KEY + ending, mode)
        assert resolve_secret(None, ELSEWHERE, {"RT_SECRET_FILE": str(path)}).key == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644])
def test_a_file_open_to_others_is_refused_with_the_cure(mode: int, tmp_path: Path) -> None:
    path = private(tmp_path / "file", mode=mode)
    assert failure(RT_SECRET_FILE=str(path)) == f"RT_SECRET_FILE={path}: found mode {mode:04o}, expected 0600; `chmod 600 {path}`"


def test_a_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private(tmp_path / "file")
    if os.geteuid() == 0:
        os.chown(path, 54322, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    text = failure(RT_SECRET_FILE=str(path))
    assert f"{path}: found owner uid {path.stat().st_uid}, expected uid 54321 or root" in text


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    path = private(tmp_path / "file", b"hunter2\n")
    assert failure(RT_SECRET_FILE=str(path)) == f"RT_SECRET_FILE={path}: found 7 bytes, expected at least 16"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    text = failure(RT_SECRET_FILE=str(tmp_path / "none"))
    assert "No such file" in text and "expected a readable file" in text and str(tmp_path / "none") in text


def test_only_regular_files_count_and_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name, kind in (("fifo", "FIFO"), ("folder", "a folder")):
        text = failure(RT_SECRET_FILE=str(tmp_path / name))
        assert str(tmp_path / name) in text and kind in text and "expected a regular file" in text


def test_a_link_to_a_private_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(private(tmp_path / "file"))  # mounted secrets look like this
    assert resolve_secret(None, ELSEWHERE, {"RT_SECRET_FILE": str(tmp_path / "link")}).key == KEY


# --- which hosts are this one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_here(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::", "224.0.0.1"])
def test_foreign_and_wildcard_addresses_are_not_here(host: str) -> None:
    assert not is_local(host)


def test_an_interfaces_address_is_here() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; asks the routing table for our side
        except OSError:
            pytest.skip("this host has no route to anywhere")
        assert is_local(probe.getsockname()[0])


def test_names_count_by_all_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: int, **_: object) -> list[object]:
        if host == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (address, 0)) for address in host.split("+")]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert is_local("127.0.0.1+127.0.0.2") and not is_local("127.0.0.1+192.0.2.1") and not is_local("unknown")


# --- the user's own secret -----------------------------------------------------------------------------------------------------------


def test_it_is_made_once_private_and_random(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, again, other = (resolve_secret(None, HERE, {"HOME": str(home)}).key for home in (tmp_path, tmp_path, tmp_path / "other"))
    folder = tmp_path / ".cache/rt"
    assert first == again != other and (folder / "secret").stat().st_size == 32
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["secret"]


def test_the_runtime_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    assert resolve_secret(None, HERE, environ).source == str(tmp_path / "run/rt/secret")


def test_a_runtime_folder_or_home_of_somebody_else_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    environ = {"HOME": "/proc/does-not-exist", "XDG_RUNTIME_DIR": "relative/path"}
    assert resolve_secret(None, HERE, environ).source == str(temporary / f"rt-{os.geteuid()}" / "secret")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert f"rt-{54321}" in failure(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)).partition("found")[0]
    assert not (tmp_path / ".cache").exists() and not (tmp_path / "rt").exists()


def test_a_squatted_temporary_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"rt-{os.geteuid()}"
    folder.mkdir(mode=0o700)
    folder.chmod(0o755)
    owner = f"uid {os.geteuid()}"
    assert failure() == f"{folder}: found owner {owner} and mode 0755, expected {owner} and 0700; `chmod 700 {folder}`"
    folder.rmdir()
    (tmp_path / "target").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "target")
    assert failure() == f"{folder}: found a symbolic link, expected a folder of yours with mode 0700"
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o666])
def test_an_own_secret_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    resolve_secret(None, HERE, {"HOME": str(tmp_path)})
    path = tmp_path / ".cache/rt/secret"
    path.chmod(mode)
    assert failure(HOME=str(tmp_path)) == f"{path}: found mode {mode:04o}, expected 0600; `chmod 600 {path}`"


def test_without_any_place_the_error_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    private(tmp_path / ".cache", b"a file in the way")
    text = failure(HOME=str(tmp_path))
    assert f"{tmp_path}/.cache/rt: Not a directory" in text and f"{tmp_path}/gone/rt-" in text and "expected a writable" in text


def test_who_comes_second_takes_the_firsts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank does everything in the middle of our making a key: the race below, forced to its worst case."""
    environ, real, keys = {"HOME": str(tmp_path)}, secrets.token_bytes, []

    def interrupted(size: int) -> bytes:
        monkeypatch.setattr(secrets, "token_bytes", real)
        keys.append(resolve_secret(None, HERE, environ).key)
        return real(size)

    monkeypatch.setattr(secrets, "token_bytes", interrupted)
    keys.append(resolve_secret(None, HERE, environ).key)
    assert len(keys) == 2 and keys[0] == keys[1] == resolve_secret(None, HERE, environ).key
    assert os.listdir(tmp_path / ".cache/rt") == ["secret"]


def test_ranks_that_start_at_once_agree_on_it(tmp_path: Path) -> None:
    gates = [os.pipe() for _ in range(ROUNDS)]
    homes = [tmp_path / str(index) for index in range(ROUNDS)]
    arguments = [f"{home}={reader}" for home, (reader, _) in zip(homes, gates, strict=True)]
    for home in homes:
        home.mkdir()
    command = [sys.executable, "-c", RACER, *arguments]
    readers = [reader for reader, _ in gates]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=readers) for _ in range(RACERS)]
    try:
        for _, writer in gates:
            assert [line(racer) for racer in racers] == ["ready"] * RACERS
            os.close(writer)  # the end of the pipe lets all of them go in one moment
            digests = {line(racer) for racer in racers}
            assert len(digests) == 1 and len(digests.pop()) == 64
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
        for reader in readers:
            os.close(reader)
    assert all(os.listdir(home / ".cache/rt") == ["secret"] for home in homes)


def line(racer: subprocess.Popen[str]) -> str:
    assert racer.stdout is not None
    return racer.stdout.readline().strip()


# --- what other people's launchers say of the hosts ----------------------------------------------------------------------------------


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "run"}


@pytest.mark.parametrize(
    ("rank", "sizes"),
    [
        ("RANK", "LOCAL_WORLD_SIZE=2, WORLD_SIZE=4"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE=2, OMPI_COMM_WORLD_SIZE=4"),
        ("PMI_RANK", "MPI_LOCALNRANKS=2, PMI_SIZE=4"),
        ("SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE=2(x2), SLURM_STEP_NUM_TASKS=4"),
    ],
)
def test_a_launcher_that_started_ranks_elsewhere_too(rank: str, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host of rank 0 the place to meet is local, and the user's own secret of no use."""
    monkeypatch.setattr("rt.secret.is_local", lambda host: True)
    place = TORCHRUN if rank == "RANK" else {"RT_COORDINATOR": "10.0.0.1:5000", "RT_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError) as caught:
        resolve_ring(environ={**place, rank: "0", **dict(each.split("=") for each in sizes.split(", "))})
    assert f"no secret for a job across hosts ({sizes})" in str(caught.value)


def test_a_launcher_that_started_ranks_here_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rt.secret.is_local", lambda host: True)
    alone = {**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "HOME": str(tmp_path)}
    agents = {**alone, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}  # two on one host: nobody from elsewhere comes to loopback
    for environ in (alone, agents):
        found = resolve_ring(environ=environ)
        assert found is not None and found.secret.of_this_host
