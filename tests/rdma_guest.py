"""A Linux kernel with real RDMA verbs where there is no RDMA hardware: Soft-RoCE in a guest that qemu emulates.

May live here: what the guest is made of, booting it, and bringing results back. May not: tests; ``test_rdma_guest`` boots it once and
reports what the suite inside it, ``tests/rdma``, found.

``python tests/rdma_guest.py [COMMAND]`` boots it and runs the suite, or a command of yours, in the tree that the guest gets.

The guest's root is the host's, read-only and without a cache, so that an import takes seconds there. Therefore Python, the packages that
the tests need and this tree travel as one archive, which is unpacked in the guest's memory.
"""

from __future__ import annotations

import glob
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = (  # `make test-rdma` installs them
    "qemu-system-x86 linux-image-amd64 rdma-core ibverbs-providers ibverbs-utils busybox-static kmod python3-pyverbs perftest iproute2"
).split()
SECONDS = 1800  # alone on two cores it takes nine minutes; others may be busy, too
SUITE = (  # with what the ring's ranks do together and how they fail, over jaccl, in both front ends
    "python -m pytest -q -p no:cacheprovider -p rdma_plugin -o junit_family=xunit1 --timeout 120 -o faulthandler_timeout=280 --durations 8 "
    "-k 'rdma or not (asyncio or debug or test_links)' tests/test_links.py tests/rdma_suite.py tests/rdma_wires.py "
    "tests/test_concurrency.py tests/test_works.py tests/test_mismatch.py tests/test_failures.py tests/test_cancel.py "
    "--junitxml=$OUT/junit.xml"
)
_PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")  # for Debian's Python, whose extensions any other of its version loads
_PACKAGES = ("numpy", "ml_dtypes", "optree", "psutil", "rich", "uvloop", "pytest", "pytest-asyncio", "pytest-timeout")
_NO_NEED = re.compile(r"/(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|config-[^/]*|site-packages)(/|$)|\.opt-\d\.pyc$|\.a$")
# Devices that the guest does not have, and modules that take seconds to find out.
_BLACKLIST = "kvm,kvm_amd,kvm_intel,ahci,libahci,sr_mod,cdrom,psmouse,i2c_i801,lpc_ich,iTCO_wdt,aesni_intel,usbcore,floppy"
_INSIDE = """\
set -e
mkdir -p /run/rt; mount -t tmpfs -o size=80% none /run/rt; cd /run/rt
tar xf {share}/guest.tar
modprobe -a rdma_rxe ib_uverbs veth
ip link set lo up
rdma link add rxe0 type rxe netdev lo
ulimit -l unlimited
export PATH=/run/rt/python/bin:$PATH OUT={share} HOME=/run/rt TMPDIR=/run/rt
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/run/rt/tree:/run/rt/tree/tests RT_RDMA_GUEST=1
cd tree
set +e
{command}
echo $? > {share}/status
"""


def missing() -> str:
    """Return why the guest cannot run here and what to do about it, "" if it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return f"the guest is for Linux on x86-64, this is {sys.platform} on {os.uname().machine}"
    programs = ("qemu-system-x86_64", "busybox", "ib_write_bw", "rdma")
    if not all(map(shutil.which, programs)) or not _kernel() or not _PYVERBS.exists():
        return f"no guest: install {' '.join(DEBIAN)}"
    if not list(_PYVERBS.glob(f"device.cpython-3{sys.version_info.minor}-*.so")):
        return f"Debian's pyverbs is for another Python than this 3.{sys.version_info.minor}"
    return "" if _vng() else "no guest: install virtme-ng (pip)"


def _kernel() -> str:
    """The newest kernel in /boot that has Soft-RoCE, or ""."""
    kernels = sorted(glob.glob("/boot/vmlinuz-*"), key=os.path.getmtime)
    versions = [(kernel, kernel.removeprefix("/boot/vmlinuz-")) for kernel in kernels if os.access(kernel, os.R_OK)]
    return next((kernel for kernel, name in reversed(versions) if glob.glob(f"/lib/modules/{name}/kernel/drivers/infiniband/sw/rxe/*")), "")


def _vng() -> str:
    return shutil.which("vng", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])) or ""


def pack(archive: Path) -> None:
    """Write the archive that the guest unpacks: ``python`` with its library and packages, and ``tree``."""
    library = Path(sysconfig.get_path("stdlib"))
    name = f"python3.{sys.version_info.minor}"
    packages = f"python/lib/{name}/site-packages"
    with tarfile.open(archive, "w") as tar:
        tar.add(os.path.realpath(sys.executable), "python/bin/python")
        tar.add(library, f"python/lib/{name}", filter=lambda entry: None if _NO_NEED.search(entry.name) else entry)
        for file, inside in _installed():
            tar.add(file, f"{packages}/{inside}", recursive=False)
        tar.add(_PYVERBS, f"{packages}/pyverbs")
        for folder in ("rt", "transports", "bench", "tests", "examples", "docs"):
            tar.add(ROOT / folder, f"tree/{folder}", filter=lambda entry: None if "__pycache__" in entry.name else entry)
        tar.add(ROOT / "pyproject.toml", "tree/pyproject.toml")


def _installed() -> Iterator[tuple[str, str]]:
    """The files of the packages that are needed, and of those that they need."""
    todo, done = list(_PACKAGES), set[str]()
    while todo:
        name = todo.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # a dependency of other systems or extras
            continue
        if found.name.lower() in done:
            continue
        done.add(found.name.lower())
        todo += [re.split(r"[^A-Za-z0-9._-]", each)[0] for each in found.requires or () if "extra ==" not in each]
        for file in found.files or ():
            place = str(found.locate_file(file))
            if not str(file).startswith("..") and os.path.isfile(place):
                yield place, str(file)


def boot(command: str, share: Path, seconds: float = SECONDS) -> tuple[int, str]:
    """Boot the guest, run a shell command in the tree there, and return its exit status (-1: it did not come to its end) and output.

    Args:
        command: finds Python in PATH, the device ``rxe0`` on ``lo``, and in ``$OUT`` the folder ``share``.
        share: an empty folder; what the command writes there is here afterwards.
        seconds: the guest is ended after so many.
    """
    pack(share / "guest.tar")
    (share / "inside.sh").write_text(_INSIDE.format(share=share, command=command))
    scripts = sysconfig.get_path("scripts")
    words = [_vng(), "-r", _kernel(), "--disable-kvm", "--cpus", "2", "--memory", "2G", f"--rwdir={share}"]
    words += ["--append", f"modprobe.blacklist={_BLACKLIST}", "--", f"bash {share}/inside.sh"]
    environ = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    # A file would be overwritten from its beginning by every program that the guest starts.
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, start_new_session=True, text=True,
        errors="replace",
    )  # fmt: skip
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output = process.communicate()[0] + f"\nthe guest was ended after {seconds:g} s"
    status = share / "status"
    return int(status.read_text()) if status.exists() else -1, output


def main() -> int:
    """Run the suite, or the command line's words, in the guest; show what it says. As root, install first what is missing."""
    if missing() and os.getuid() == 0 and shutil.which("apt-get"):
        subprocess.run(f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(DEBIAN)}", shell=True, check=False)
    why = missing()
    if why:
        print(why)
        return 2
    with tempfile.TemporaryDirectory(prefix="rt-rdma-") as share:
        status, output = boot(" ".join(sys.argv[1:]) or SUITE, Path(share))
        junit = Path(share, "junit.xml")
        if junit.exists():
            shutil.copy(junit, "junit-rdma.xml")
    io.TextIOWrapper(sys.stdout.buffer, errors="replace").write(output)
    return status


if __name__ == "__main__":
    sys.exit(main())
