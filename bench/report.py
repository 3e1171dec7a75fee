"""What ``rt.bench all_reduce`` prints: nccl-tests' text and JSON, and the comparison with peers.

May live here: text, JSON, and the bandwidths they show. May not: measuring.

The text is laid out as nccl-tests lays it out, because people have scripts that read it; times are in us, bandwidths in GB/s of 1e9.
"""

from __future__ import annotations

import socket
from typing import Any

from bench import host
from bench.all_reduce import ITEM_BYTES, ROUNDS, Cell, Result, Row

# Above this share of a core, a system that waits for its turn disturbs the one that is measured.
_BUSY = 0.05
_PLACES = {"out_of_place": False, "in_place": True}


def bandwidths(nbytes: int, seconds: float, size: int) -> tuple[float, float]:
    """Return algorithm and bus bandwidth in GB/s; the latter is what a link carries, 2(n-1)/n of the former for an all-reduce."""
    algorithm = nbytes / seconds / 1e9
    return algorithm, algorithm * 2 * (size - 1) / size


def average_busbw(rows: list[Row], size: int) -> float:
    """Return the mean bus bandwidth over sizes and placements, as nccl-tests computes it."""
    values = [bandwidths(row.nbytes, cell.seconds, size)[1] for row in rows for cell in row.cells]
    return sum(values) / len(values)


def text(result: Result) -> str:
    """Return everything that is printed: header, a table per front end, and the comparison if there are peers."""
    options = result.options
    fronts = [f"rt {front}" for front in options.fronts]
    lines = _header(result)
    for front in fronts:
        lines += ["#", *_table(result, front)]
    if options.peers:
        lines += ["#", *comparison(result)]
    return "\n".join(lines)


def _header(result: Result) -> list[str]:
    options = result.options
    iters = options.iters or "auto"
    lines = [
        "# Collective test starting: all_reduce_perf",
        f"# nThread 1 nGpus 0 minBytes {options.min_bytes} maxBytes {options.max_bytes} step: {options.factor}(factor) "
        f"warmup iters: {options.warmup} iters: {iters} agg iters: 1 validation: {int(options.check)} graph: 0",
        *host.lines(),
        f"# time: median over samples, the slowest rank counts; {ROUNDS} rounds in turns between systems",
    ]
    for name, uses in result.uses.items():
        lines.append(f"# {name}: {', '.join(f'{label} {version}' for label, version in uses.items())}")
    lines += [f"# warning: {name} used {share:.0%} of a core per rank between its turns" for name, share in _busy(result).items()]
    return lines


def _busy(result: Result) -> dict[str, float]:
    return {name: share for name, share in result.idle_shares.items() if share > _BUSY}


def _table(result: Result, front: str) -> list[str]:
    rows, size = result.rows[front], result.options.size
    wrong = sum(cell.wrong or 0 for row in rows for cell in row.cells)
    return [
        f"# {front}",
        "# Using devices",
        *_devices(result, front),
        "#",
        f"#{'out-of-place':>74}{'in-place':>31}",
        f"# {'size':>10}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}" + f"  {'time':>7}  {'algbw':>6}  {'busbw':>6} #wrong" * 2,
        f"# {'(B)':>10}  {'(elements)':>12}  {'':>8}  {'':>6}  {'':>6}" + f"  {'(us)':>7}  {'(GB/s)':>6}  {'(GB/s)':>6}       " * 2,
        *(_line(row, size) for row in rows),
        f"# {'Out of bounds values':<20} : {wrong} {'FAILED' if wrong else 'OK'}",
        f"# {'Avg bus bandwidth':<20} : {average_busbw(rows, size):g}",
        "#",
        "# Collective test concluded: all_reduce_perf",
    ]


def _devices(result: Result, name: str) -> list[str]:
    where, cpu = socket.gethostname(), host.cpu_model()
    pids = result.pids[name]
    return [f"#  Rank {rank:2} Group  0 Pid {pid:6} on {where:>10} device  0 [loopback] {cpu}" for rank, pid in enumerate(pids)]


def _line(row: Row, size: int) -> str:
    start = f"{row.nbytes:>12}  {row.nbytes // ITEM_BYTES:>12}  {'float':>8}  {'sum':>6}  {-1:>6}"
    return start + "".join(_half(row.nbytes, cell, size) for cell in (row.out_of_place, row.in_place))


def _half(nbytes: int, cell: Cell | None, size: int) -> str:
    if cell is None:
        return f"  {'N/A':>7}  {'N/A':>6}  {'N/A':>6}  {'N/A':>5}"
    algbw, busbw = bandwidths(nbytes, cell.seconds, size)
    wrong = "N/A" if cell.wrong is None else str(cell.wrong)
    return f"  {number(cell.seconds * 1e6, 7)}  {number(algbw, 6)}  {number(busbw, 6)}  {wrong:>5}"


def number(value: float, width: int) -> str:
    """Return ``value`` in ``width`` columns with about four digits, as nccl-tests shows times: 93.35, 113.2, 12345."""
    decimals = 2 if value < 100 else 1 if value < 10_000 else 0
    return f"{value:{width}.{decimals}f}"


def comparison(result: Result) -> list[str]:
    """Return the tables of medians per size and system, and of each peer's time over each front end's: out of place, and in place."""
    options = result.options
    lines = [
        "# Against peers: the same loop and sizes, each system's own barrier before each sample, float32 over loopback.",
        "# A ratio says how many times longer the peer takes than rt: the median over rounds of that round's ratio.",
    ]
    for in_place in (False, True):
        peers = [peer for peer in options.peers if _offers(result, peer, in_place)]
        if peers:
            lines += _ratios(result, peers, in_place)
    wrong = {name: sum(cell.wrong or 0 for row in result.rows[name] for cell in row.cells) for name in options.peers}
    lines += [f"# warning: {name} returned {count} wrong elements" for name, count in wrong.items() if count]
    return lines


def _offers(result: Result, system: str, in_place: bool) -> bool:
    return all(row.cell(in_place) is not None for row in result.rows[system])


def _ratios(result: Result, peers: list[str], in_place: bool) -> list[str]:
    options = result.options
    systems = [f"rt {front}" for front in options.fronts] + peers
    pairs = [(peer, front) for peer in peers for front in options.fronts]
    titles = [f"{name} (us)" for name in systems] + [f"{peer}/{front}" for peer, front in pairs]
    lines = ["# In place." if in_place else "# Out of place, into an array that is there already."]
    if not in_place and "gloo" in peers:
        lines.append("# gloo reduces in place only: out of place it copies first, as its users do.")
    if not in_place and "mlx" in peers:
        lines.append("# mlx returns an array of its own, from its cache of buffers; building the expression is part of the call.")
    if "nospin" in peers:
        lines.append("# nospin is the blocking front end of rt that sleeps at once instead of polling briefly.")
    if "tcp" in peers:
        lines.append("# tcp is no system: the bytes of an all-reduce passed round a ring by send and recv alone, nothing reduced.")
    lines.append(f"# {'size (B)':>10}" + "".join(f"  {title:>13}" for title in titles))
    for index, nbytes in enumerate(options.sizes):
        cells = {name: cell for name in systems if (cell := result.rows[name][index].cell(in_place)) is not None}
        times = [number(cell.seconds * 1e6, 13) for cell in cells.values()]
        ratios = [number(cells[peer].ratio(cells[f"rt {front}"]), 13) for peer, front in pairs]
        lines.append(f"{nbytes:>12}" + "".join(f"  {shown}" for shown in times + ratios))
    return lines


def as_json(result: Result) -> dict[str, Any]:
    """Return the tables as nccl-tests' JSON, with what it has no place for in keys of our own.

    Ours: ``host``, ``systems``, ``comparison``, and ``system`` in each result. Times are in us, bandwidths in GB/s. ``results`` and the
    summaries cover rt's front ends; peers stand in ``comparison``.
    """
    options = result.options
    fronts = {f"rt {front}": result.rows[f"rt {front}"] for front in options.fronts}
    wrong = sum(cell.wrong or 0 for rows in fronts.values() for row in rows for cell in row.cells)
    every_row = [row for rows in fronts.values() for row in rows]
    return {
        "config": _config(result),
        "host": host.facts(),
        "systems": {name: {"uses": result.uses[name], "idle_share": result.idle_shares[name]} for name in options.systems},
        "devices": [_device(name, rank, pid) for name in fronts for rank, pid in enumerate(result.pids[name])],
        "results": [{"system": name, **_result(row, options.size)} for name, rows in fronts.items() for row in rows],
        "out_of_bounds": {"count": wrong, "okay": wrong == 0},
        "average_bus_bandwidth": {"bandwidth": average_busbw(every_row, options.size), "okay": "unchecked"},
        "comparison": [_compared(result, index) for index in range(len(options.sizes))] if options.peers else [],
        "errors": [],
    }


def _config(result: Result) -> dict[str, Any]:
    options = result.options
    return {
        "nranks": options.size,
        "nthreads": 1,
        "ngpus": 0,
        "minimum_bytes": options.min_bytes,
        "maximum_bytes": options.max_bytes,
        "step_factor": options.factor,
        "warmup_iters": options.warmup,
        "iterations": options.iters or "auto",
        "aggregated_iterations": 1,
        "rounds": ROUNDS,
        "validation": int(options.check),
    }


def _device(system: str, rank: int, pid: int) -> dict[str, Any]:
    where = {"hostname": socket.gethostname(), "device": 0, "device_info": host.cpu_model()}
    return {"system": system, "rank": rank, "group": 0, "pid": pid, **where}


def _result(row: Row, size: int) -> dict[str, Any]:
    cells = {"out_of_place": row.out_of_place, "in_place": row.in_place}
    halves = {key: None if cell is None else _half_json(row.nbytes, cell, size) for key, cell in cells.items()}
    return {"size": row.nbytes, "count": row.nbytes // ITEM_BYTES, "type": "float", "redop": "sum", "root": -1, **halves}


def _half_json(nbytes: int, cell: Cell, size: int) -> dict[str, Any]:
    algbw, busbw = bandwidths(nbytes, cell.seconds, size)
    samples = sum(len(samples) for samples in cell.rounds)
    return {"time": cell.seconds * 1e6, "alg_bw": algbw, "bus_bw": busbw, "nwrong": cell.wrong, "samples": samples}


def _compared(result: Result, index: int) -> dict[str, Any]:
    options = result.options
    return {"size": options.sizes[index], **{key: _compared_cells(result, index, place) for key, place in _PLACES.items()}}


def _compared_cells(result: Result, index: int, in_place: bool) -> dict[str, Any]:
    options = result.options
    cells = {name: cell for name in options.systems if (cell := result.rows[name][index].cell(in_place)) is not None}
    peers = [peer for peer in options.peers if peer in cells]
    return {
        "time": {name: cell.seconds * 1e6 for name, cell in cells.items()},
        "nwrong": {name: cell.wrong for name, cell in cells.items()},
        "ratio": {peer: {f"rt {front}": cells[peer].ratio(cells[f"rt {front}"]) for front in options.fronts} for peer in peers},
    }
