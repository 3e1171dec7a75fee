"""The job's secret: where it comes from, and how connections prove that they know it.

May live here: finding, making and holding the key, and the message authentication code over it. May not: sockets that carry data, the
handshake's messages (rendezvous), any text that shows a key. The usual ways out of a :class:`Secret` by accident (repr, format, pickle) are
closed, and no function formats what it read: errors tell lengths, modes and paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from rt.errors import ConfigError

KEY_BYTES = 32
MIN_BYTES = 16
_FD_PREFIX = b"rt-secret:"
_FILE = "secret"
_KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}
_log = logging.getLogger("rt")


@dataclass(frozen=True, repr=False)
class Secret:
    """The key that all ranks of a job share.

    Attributes:
        key: the bytes, or None where ``RT_INSECURE=1`` turned the proof off.
        source: where the key came from, for messages.
        of_this_host: made by itself on this host, so that ranks on other hosts cannot have it.
    """

    key: bytes | None
    source: str
    of_this_host: bool = False

    def __repr__(self) -> str:
        return f"<Secret from {self.source}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # Pickles end up in files and queues; copy() comes this way too, and a key needs no second copy.
        raise TypeError("a Secret cannot be pickled or copied; hand it to child processes on a descriptor (make_secret_fd)")

    def mac(self, *parts: bytes) -> bytes:
        """Return the HMAC-SHA256 (32 bytes) of ``parts``, each preceded by its length, so that no two lists of parts look alike.

        Without a key the empty key is used: the handshake stays one code path, and a rank with a secret still refuses one without.
        """
        mac = hmac.new(self.key or b"", digestmod=hashlib.sha256)
        for part in parts:
            mac.update(len(part).to_bytes(8, "big"))
            mac.update(part)
        return mac.digest()


def resolve_secret(keyword: bytes | str | None, hosts: Iterable[str], environ: Mapping[str, str], spread: str = "") -> Secret:
    """Find the secret of this job: keyword, descriptor of our launcher, RT_SECRET_FILE, RT_SECRET, RT_INSECURE, the user's own on one host.

    RT_INSECURE=1 comes before the user's own secret: where only the coordinator's host is known, rank 0 always finds itself on "one host",
    and would use a key that the ranks on other hosts, told to use none, do not have.

    Args:
        keyword: the ``secret`` given to ``init``; text stands for its UTF-8 bytes.
        hosts: host names and addresses that the ranks will connect to, as far as they are known.
        environ: the environment.
        spread: what says that ranks live on several hosts ("" if nothing does): on rank 0's host the coordinator's address cannot.

    Raises:
        ConfigError: a source is malformed or open to others, or ranks live on several hosts and nobody gave a secret.
    """
    if keyword is not None:
        return _from_keyword(keyword)
    if "RT_SECRET_FD" in environ and (secret := _from_fd(environ["RT_SECRET_FD"])) is not None:
        return secret
    if "RT_SECRET_FILE" in environ:
        return _from_file(environ["RT_SECRET_FILE"])
    if "RT_SECRET" in environ:
        return Secret(_long_enough(_encode(environ["RT_SECRET"]), "RT_SECRET", "characters"), "RT_SECRET")
    if switch(environ, "RT_INSECURE", "connections prove nothing"):
        return Secret(None, "RT_INSECURE=1")
    known = sorted(set(hosts))
    foreign = next((host for host in known if not is_local(host)), None)
    if foreign is None and (not spread or all(map(is_loopback, known))):  # on loopback nobody from elsewhere is to come
        return _own_secret(environ)
    why = spread if foreign is None else f"{foreign} is another"
    raise ConfigError(
        f"no secret for a job across hosts ({why}): found none of RT_SECRET_FILE, RT_SECRET, RT_INSECURE, expected one: "
        "make a file on one host with `(umask 077; head -c 32 /dev/urandom | base64 > ~/.rt-secret)`, "
        "copy it to every other host with `scp -p ~/.rt-secret HOST:` and set RT_SECRET_FILE=~/.rt-secret on all of them; "
        "or, on a network where you trust everybody, set RT_INSECURE=1 on all of them"
        + ("; ranks of one host meet at 127.0.0.1" if foreign is None else "")
    )


def make_key() -> str:
    """Return a fresh key in the form that ``make_secret_fd`` takes."""
    return secrets.token_hex(KEY_BYTES)


def make_secret_fd(key: str = "") -> int:
    """Put a key, a fresh one if none is given, on an anonymous descriptor that the ranks find by ``RT_SECRET_FD``; the caller closes it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("rt-secret")
    else:  # macOS: a file that has no name from here on
        fd, path = tempfile.mkstemp(prefix="rt-secret-")
        os.unlink(path)
    os.write(fd, _FD_PREFIX + (key or make_key()).encode())
    os.set_inheritable(fd, True)
    return fd


def is_local(host: str) -> bool:
    """Say whether every address of ``host`` belongs to this machine. Wildcards say nothing about where the others are, so they do not."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_local_address(family, sockaddr) for family, _, _, _, sockaddr in found)


def is_loopback(host: str) -> bool:
    """Whether an address, or a name by its spelling, means the host itself."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_local_address(family: int, sockaddr: tuple[object, ...]) -> bool:
    address = ipaddress.ip_address(str(sockaddr[0]).partition("%")[0])
    if address.is_loopback:  # ::1 is this host even where IPv6 is switched off
        return True
    if address.is_unspecified or address.is_multicast:
        return False
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(sockaddr)
        except OSError:
            return False
    return True


def _from_keyword(keyword: bytes | str) -> Secret:
    if not isinstance(keyword, bytes | str):
        raise ConfigError(f"keyword secret: found {type(keyword).__name__}, expected bytes or str")
    unit = "characters" if isinstance(keyword, str) else "bytes"
    return Secret(_long_enough(_encode(keyword), "keyword secret", unit), "keyword secret")


def _encode(text: bytes | str) -> bytes:
    # surrogateescape: the environment may hold bytes that are no UTF-8, and an UnicodeEncodeError would carry the whole secret with it
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _long_enough(key: bytes, where: str, unit: str = "bytes") -> bytes:
    if len(key) < MIN_BYTES:
        raise ConfigError(f"{where}: found {len(key)} {unit}, expected at least {MIN_BYTES}")
    return key


def _from_fd(text: str) -> Secret | None:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"RT_SECRET_FD: found {text!r}, expected the number of an inherited descriptor")
    try:
        # pread: all ranks share one file offset. Blocking is impossible: what has no offsets fails with ESPIPE.
        content = os.pread(int(text), 4096, 0)
    except OSError as error:
        _log.debug("RT_SECRET_FD=%s ignored: %s", text, error.strerror)
        return None
    digits = content.removeprefix(_FD_PREFIX)
    if digits == content or len(digits) != 2 * KEY_BYTES or digits.strip(b"0123456789abcdef"):
        _log.debug("RT_SECRET_FD=%s ignored: it is open on something else", text)  # a grandchild whose parent closed ours
        return None
    return Secret(bytes.fromhex(digits.decode()), "RT_SECRET_FD")


def _from_file(path: str) -> Secret:
    where = f"RT_SECRET_FILE={path}"
    try:
        fd = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO must not hang us
    except OSError as error:
        raise ConfigError(f"{where}: found {error.strerror!r}, expected a readable file of at least {MIN_BYTES} bytes") from None
    with _closing(fd):
        key = _read_private(fd, where, path)
    return Secret(key, where)


def _read_private(fd: int, where: str, path: str) -> bytes:
    """Read a key from a file that nobody else could have read or written; checked on the open descriptor, so a swap cannot slip in."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{where}: found {_kind(found.st_mode)}, expected a regular file")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{where}: found owner uid {found.st_uid}, expected uid {os.geteuid()} or root; `chown {os.geteuid()} {path}`")
    if found.st_mode & 0o077:
        raise ConfigError(f"{where}: found mode {stat.S_IMODE(found.st_mode):04o}, expected 0600; `chmod 600 {path}`")
    with open(fd, "rb", closefd=False) as file:
        return _long_enough(file.read().rstrip(b"\r\n"), where)  # editors and base64 end a file with a newline, or do not


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a device or FIFO")


def switch(environ: Mapping[str, str], name: str, meaning: str) -> bool:
    """Say whether a variable that gives up some safety is 1; unset is 0, and anything else a ConfigError."""
    value = environ.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{name}: found {value!r}, expected 1 ({meaning}) or 0")
    return value == "1"


# --- the user's own secret, for jobs on one host -------------------------------------------------------------------------------------


def _own_secret(environ: Mapping[str, str]) -> Secret:
    """Return the secret of this user on this host, made at first use. Every rank walks the same folders and so ends at the same file."""
    failures = []
    for path in _folders(environ):
        try:
            folder = _open_folder(path)
            with _closing(folder):
                return Secret(_read_or_make(folder, path), os.path.join(path, _FILE), of_this_host=True)
        except OSError as error:
            failures.append(f"{path}: {error.strerror}")
    raise ConfigError(
        f"no place for the user's own secret: found {'; '.join(failures)}, expected a writable $XDG_RUNTIME_DIR, ~/.cache or folder for "
        "temporary files; or set RT_SECRET_FILE or RT_SECRET"
    )


def _folders(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the folders to try. Under sudo, the first two may name another user's home: those are passed over."""
    runtime, home = environ.get("XDG_RUNTIME_DIR", ""), environ.get("HOME", "")
    if _is_ours(runtime):
        yield os.path.join(runtime, "rt")
    if _is_ours(home):
        cache = os.path.join(home, ".cache")
        with contextlib.suppress(OSError):  # a read-only home: opening the folder fails next, and says so
            os.makedirs(cache, mode=0o700, exist_ok=True)
        yield os.path.join(cache, "rt")
    yield os.path.join(tempfile.gettempdir(), f"rt-{os.geteuid()}")


def _is_ours(folder: str) -> bool:
    try:
        return os.path.isabs(folder) and os.stat(folder).st_uid == os.geteuid()
    except OSError:
        return False


def _open_folder(path: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    # In /tmp anybody may have been first: look before opening (a symbolic link), and again at what was opened (a swap in between).
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{path}: found {_kind(mode)}, expected a folder of yours with mode 0700")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
        return fd
    os.close(fd)
    was = f"owner uid {found.st_uid} and mode {stat.S_IMODE(found.st_mode):04o}"
    raise ConfigError(f"{path}: found {was}, expected uid {os.geteuid()} and 0700; `chmod 700 {path}`")


def _read_or_make(folder: int, where: str) -> bytes:
    path = os.path.join(where, _FILE)
    try:
        return _read_own(folder, path)
    except FileNotFoundError:
        _make(folder)
    return _read_own(folder, path)


def _read_own(folder: int, path: str) -> bytes:
    fd = os.open(_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with _closing(fd):
        return _read_private(fd, path, path)


def _make(folder: int) -> None:
    """Publish a key under its name whole or not at all: link() never replaces, so of many ranks exactly one wins and all read it."""
    draft = f".{_FILE}-{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with _closing(fd):
            os.write(fd, secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(draft, _FILE, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.unlink(draft, dir_fd=folder)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)
