"""One rank of one system under test: joins its group, then measures what its conductor asks for.

May live here: a rank's buffers, one series of samples on them, and the check of what it left behind. May not: an import of ``rt`` or of a
peer at module level. Run as ``python -m bench.rank SYSTEM`` by ``conductor.py``, under an interpreter that may have nothing but NumPy.

The command (the protocol is ``worker.py``'s)::

    {"do": "measure", "collective": "all_gather", "count": 16, "dtype": "float32", "op": "sum", "root": 0, "place": "out_of_place",
     "warmup": 5, "samples": 9, "check": true}       count as nccl-tests has it, names of dtypes and operators as rt has them
    {"ns": [...], "wrong": 0, "algorithm": "ring"}   wrong None: nobody looked
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import sys
import traceback

import numpy as np

from bench import host
from bench.adapters import ADAPTERS, Adapter
from bench.collectives import COLLECTIVES, Buffers
from bench.data import Array, Data
from bench.worker import Answer, Channel, place


def measure(adapter: Adapter, command: Answer) -> Answer:
    """Time one collective ``warmup + samples`` times; return the samples and the number of wrong elements on the measured buffers."""
    collective = COLLECTIVES[command["collective"]]
    rank, size, where, root = adapter.rank, adapter.size, command["place"], command["root"]
    sends, _ = collective.items(command["count"], size)
    data = Data(size, sends, command["dtype"], command["op"], root)
    source = data.of(rank)
    x, out = collective.memory(rank, size, command["count"], source.dtype, where)
    given = where != "fresh" and not (adapter.kind == "rt" and collective.at_root and rank != root)
    np.copyto(x, source)
    buffers = Buffers(x, out if given else None, command["op"], root, rank, size, where)
    call = adapter.bind(collective.binds[adapter.kind], buffers)

    def prepare(left: int) -> None:
        if left == 0:
            out.fill(0)  # what an earlier call left there must not pass the check of the last one
        if where == "in_place":
            np.copyto(x, source)

    gc.collect()
    gc.disable()  # a collection inside a window would be charged to whoever is measured
    try:
        spent, returned = adapter.samples(call, prepare, command["warmup"] + command["samples"])
    finally:
        gc.enable()
    wrong = None
    if command["check"] and adapter.reduces:
        gets = not collective.at_root or rank == root
        wrong = count_wrong(adapter.result(returned, out), collective.expected(rank, data)) if gets and collective.moves else 0
    return {"ns": spent[command["warmup"] :], "wrong": wrong, "algorithm": adapter.algorithm(command)}


def count_wrong(result: Array, expected: Array) -> int:
    """Return how many elements differ from those expected; exactly, since nothing was rounded that need not be."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return len(expected)
    return int(np.count_nonzero(result != expected))


def greeting(adapter: Adapter) -> Answer:
    """Join the group; return who this rank is, what it runs on and how it reaches the others."""
    uses = adapter.setup()
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "cpu": f"{host.cpu_model()}, {host.cores()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "uses": {"python": platform.python_version(), "numpy": np.__version__, **uses},
        "links": {str(peer): link for peer, link in adapter.links().items()},
    }


def main() -> None:
    """Serve as the rank that the environment says, of the system named by the first argument."""
    channel = Channel()
    rank, size = place()
    adapter = ADAPTERS[sys.argv[1]](rank, size)
    try:
        channel.say(greeting(adapter))
    except Exception:
        channel.say({"error": traceback.format_exc()})
        raise
    channel.serve({"measure": lambda command: measure(adapter, command)})
    adapter.close()


if __name__ == "__main__":
    main()
