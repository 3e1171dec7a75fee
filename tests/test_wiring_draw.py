"""Pictures of cables: whole, readable by the tools they are for, and red where something is broken.

May live here: ``rt._wiring_draw``. May not: finding cables.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as tree

import pytest

from rt._wiring_draw import dot, svg
from rt._wiring_model import ETHERNET, THUNDERBOLT, Machine, Port, Segment

NAMES = ["m0", 'm"1', "m<2>&"]
MACHINES = [Machine(index, name, "Darwin", ()) for index, name in enumerate(NAMES)]
SVG = "{http://www.w3.org/2000/svg}"


def port(host: int, name: str, speed: float = 80.0, kind: str = THUNDERBOLT) -> Port:
    return Port(host, name, kind, speed)


CABLES = [
    Segment((port(0, "en2"), port(1, "en3"))),
    Segment((port(0, "en4"), port(1, "en5", 40.0))),
    Segment((port(1, "en6"), port(2, "en2")), fault="m2 en2 sees m1 en6, which does not see it"),
    Segment((port(2, "en9"),), fault="m2 en9 sees m0, which does not see it"),
    Segment(tuple(port(host, "eth0", 0.0, ETHERNET) for host in range(3)), guessed=True),
]


def test_an_svg_shows_hosts_ports_speeds_and_what_is_broken() -> None:
    picture = tree.fromstring(svg(MACHINES, CABLES, "a & b"))
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts[0] == "a & b"
    assert {*NAMES, "en2", "en3", "80 Gb/s", "40 Gb/s", "eth0", f"broken: {CABLES[2].fault}", f"broken: {CABLES[3].fault}"} <= set(texts)
    paths = list(picture.iter(f"{SVG}path"))
    assert len(paths) == 2 + 1 + 1 + 3
    red = {path.attrib["stroke"] for path in paths if "does not see it" in (path[0].text or "")}
    assert len(red) == 1 and red.isdisjoint(path.attrib["stroke"] for path in paths if "does not see" not in (path[0].text or ""))
    assert len({path.attrib["d"] for path in paths}) == len(paths)  # parallel cables do not lie on each other


def test_all_that_an_svg_shows_is_inside() -> None:
    many = [Machine(index, f"host{index}", "Linux", ()) for index in range(64)]
    picture = tree.fromstring(svg(many, [Segment((port(0, "a"), port(63, "b")))], "64 hosts"))
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    for box in list(picture.iter(f"{SVG}rect"))[1:]:
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    assert tree.fromstring(svg(many[:1], [], "one")).attrib["width"]


def test_dot_names_both_ends_of_each_cable() -> None:
    text = dot(MACHINES, CABLES)
    assert 'h0 -- h1 [label="en2/en3\\n80 Gb/s"];' in text
    assert "color=red" in next(line for line in text.splitlines() if "en6/en2" in line)
    assert sum("-- s" in line for line in text.splitlines()) == 1 + 3


def test_letters_of_all_alphabets_reach_graphviz_as_they_are() -> None:
    assert 'label="m\u00fcller"' in dot([Machine(0, "m\u00fcller", "Linux", ())], [])


@pytest.mark.skipif(shutil.which("dot") is None, reason="no dot (Debian: graphviz)")
def test_graphviz_reads_it() -> None:
    done = subprocess.run(["dot", "-Tjson"], input=dot(MACHINES, CABLES), capture_output=True, text=True, timeout=60, check=True)
    graph = json.loads(done.stdout)
    assert {node["label"] for node in graph["objects"]} >= set(NAMES)
    assert len(graph["edges"]) == 3 + 1 + 3
