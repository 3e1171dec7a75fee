"""``make results``: measure all_reduce over 2 and 4 ranks, and write a page's table and picture from what was found.

May live here: that table and where it goes. May not: measuring. Run as ``python -m bench.readme README.md docs/all_reduce.png gloo,mlx``,
with the peers to compare with; ``RT_SHM=0`` in the environment measures TCP.
"""

from __future__ import annotations

import sys
import textwrap
from datetime import date
from pathlib import Path

from bench import host, local, plot
from bench.collectives import COLLECTIVES
from bench.measure import Options, Result

_WIDTH = 140
_WAYS = {"shm": "shared memory", "tcp": "TCP on loopback"}  # what rt went through
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def section(results: list[Result], picture: str) -> str:
    """Return what stands between the markers: how it was measured, the picture, and a table with a part per result."""
    facts = host.facts()
    versions = {}
    for result in results:
        for greetings in result.greetings.values():
            versions.update(greetings[0]["uses"])
    uses = ", ".join(version if name == "loop" else f"{name} {version}" for name, version in sorted(versions.items()))
    greetings = [greeting for result in results for greeting in result.greetings[result.main]]
    ways = sorted({_WAYS[link.split()[0]] for greeting in greetings for link in greeting["links"].values()})
    kernel = ".".join(facts["kernel"].split(".")[:2])
    about = (
        f"`all_reduce` of float32 through {' and '.join(ways)}, out of place with `out=`, median us. "
        f"{facts['cores']} cores ({facts['cpu']}), {kernel}; {uses}; load average {facts['load']}; {date.today().isoformat()}. "
        "A ratio is the time of the best peer at that size over ours, in turns in one run."
    )
    titles, columns = [], []
    for result in results:
        for position, name in enumerate(result.options.systems):
            short = name.removeprefix("rt ")
            titles.append(f"{short}, {result.options.size} ranks" if position == 0 else short)
            columns.append([f"{row.cells['out_of_place'].seconds * 1e6:,.0f}".replace(",", " ") for row in result.rows[name]])
        for front in result.options.fronts if result.options.peers else ():
            titles.append(f"best/{front}")
            columns.append([])
            for ours, *peers in zip(*(result.rows[name] for name in (f"rt {front}", *result.options.peers)), strict=True):
                best = min(peer.cells["out_of_place"].ratio(ours.cells["out_of_place"]) for peer in peers)
                columns[-1].append(f"{best:.2f}")
    sizes = [plot.binary(results[0].options.nbytes(row.count)) for row in results[0].rows[results[0].main]]
    lines = [
        textwrap.fill(about, _WIDTH),
        "",
        f"![time over size, logarithmic, rt and peers]({picture})",
        "",
        f"| bytes | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
        *(f"| {size} | {' | '.join(column[index] for column in columns)} |" for index, size in enumerate(sizes)),
    ]
    return "\n".join(lines)


def replaced(text: str, between: str) -> str:
    """Return a page with what stands between its markers replaced.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in before + after:
        raise ValueError(f"expected {BEGIN} and after it {END}, once each")
    return f"{before}{BEGIN}\n{between}\n{END}{after}"


def main() -> None:
    """Measure, draw and write."""
    page, picture, peers = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
    text = page.read_text(encoding="utf-8")
    replaced(text, "")  # now: not after minutes of measuring
    collective = COLLECTIVES["all_reduce"]
    # MLX between two ranks only, so that this ends within minutes.
    results = [local.run(Options(collective, size, peers=tuple(peer for peer in peers if size == 2 or peer != "mlx"))) for size in (2, 4)]
    plot.draw(results[0], picture)
    page.write_text(replaced(text, section(results, str(picture.relative_to(page.parent)))), encoding="utf-8")


if __name__ == "__main__":
    main()
