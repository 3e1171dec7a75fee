"""The one extension module and every Cython directive it is built with.

May live here: how ``rt/_fastpath.pyx`` becomes a shared object. Directives stand here and nowhere else, because a directive comment
in a source file silently overrides them. Metadata lives in ``pyproject.toml``.

``RT_DEBUG=1`` compiles the engine's own checks in (and the C assertions), for tests and bug hunts.
"""

import os
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
DEBUG = os.environ.get("RT_DEBUG") == "1"

# No -march=native: a wheel is copied to other hosts, wide vectors come from target_clones at run time. No -ffast-math, and no
# contraction of a*b+c: GCC would fuse complex products, and a*b would no longer equal b*a to the last bit.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unused-function"]

# The included files are named so that setuptools rebuilds when they change.
PXI = (
    "arrays", "lists", "pool", "program", "links", "rdma", "shared", "receive", "send", "works", "deadlock", "submit", "engine", "work",
    "known",
)  # fmt: skip
PARTS = ["_kernels.h", "_place.h", "_poll.h", "_rdma.h", "_ring.h", *(f"_{part}.pxi" for part in PXI)]

extension = Extension(
    "rt._fastpath",
    ["rt/_fastpath.pyx"],
    include_dirs=[numpy.get_include(), str(HERE / "rt")],
    depends=[str(HERE / "rt" / part) for part in PARTS],
    extra_compile_args=[*COMPILE_ARGS, "-UNDEBUG"] if DEBUG else COMPILE_ARGS,
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"), ("RT_DEBUG", "1" if DEBUG else "0")],
)

setup(
    ext_modules=cythonize(
        [extension],
        compiler_directives={
            "language_level": "3",
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": False,
            "binding": True,
            "autotestdict": False,
        },
    )
)
