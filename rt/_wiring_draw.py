"""Pictures of hosts and cables: Graphviz's language, and SVG that needs no other tool.

May live here: drawing. May not: which cables are there or good.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from rt._wiring_model import Machine, Segment

_GOOD, _BROKEN, _GUESSED = "#2a7f6f", "#d0021b", "#8a8a8a"
_BOX = (120, 40)  # of a host, in pixels
_APART = 300  # from host to host along the circle: room for the names of two ports and a speed
_Point = tuple[float, float]


def speed(gigabits: float) -> str:
    """Write Gbit/s for people; "" where it is not known."""
    return f"{gigabits:g} Gb/s" if gigabits else ""


def dot(machines: Sequence[Machine], segments: Sequence[Segment]) -> str:
    """Return a graph: an edge per cable, labelled with the ports at its ends; broken ones red, switches round."""
    lines = ["graph G {", "  node [shape=rectangle];"]
    lines += [f"  h{machine.index} [label={_quoted(machine.ssh)}];" for machine in machines]
    for number, segment in enumerate(segments):
        colour = ", color=red, fontcolor=red, style=dashed" if segment.fault else ""
        if len(segment.ports) == 2:
            left, right = segment.ports
            label = "\n".join(filter(None, [f"{left.name}/{right.name}", speed(segment.speed)]))
            lines.append(f"  h{left.host} -- h{right.host} [label={_quoted(label)}{colour}];")
            continue
        lines.append(f'  s{number} [shape=circle, label="{"?" if segment.fault else ""}", width=0.2{colour}];')
        for port in segment.ports:
            lines.append(f"  h{port.host} -- s{number} [label={_quoted(port.name)}{colour}];")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    """Write a text as Graphviz reads it: its escapes are JSON's but for those of letters."""
    return json.dumps(text, ensure_ascii=False)


# --- SVG ---------------------------------------------------------------------------------------------------------------------------------


def svg(machines: Sequence[Machine], segments: Sequence[Segment], title: str) -> str:
    """Return a picture: hosts on a circle, cables with their ports and speeds between them, broken ones red with what is wrong below."""
    radius = max(190.0, len(machines) * _APART / (2 * math.pi)) if len(machines) > 1 else 0.0
    middle = radius + 110
    places = {machine.index: _on_circle(middle, radius, place, len(machines)) for place, machine in enumerate(machines)}
    faults = [segment.fault for segment in segments if segment.fault]
    height = 2 * middle + 24 * len(faults) + 20
    body = [f'<text x="{middle:.0f}" y="26" class="title">{escape(title)}</text>']
    body += _cables(segments, places, middle)
    body += [_box(machine.ssh, places[machine.index]) for machine in machines]
    body += [
        f'<text x="{middle:.0f}" y="{2 * middle + 20 * place:.0f}" fill="{_BROKEN}">broken: {escape(fault)}</text>'
        for place, fault in enumerate(faults)
    ]
    width = f"{2 * middle:.0f}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}">'
    style = (
        "<style>text{font:13px sans-serif;text-anchor:middle;dominant-baseline:middle} .title{font-size:16px;font-weight:bold} "
        ".port{font-size:11px;paint-order:stroke;stroke:#fff;stroke-width:4px} path{fill:none;stroke-width:2.5}</style>"
    )
    return "\n".join([head, style, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>", ""])


def _on_circle(middle: float, radius: float, place: int, count: int) -> _Point:
    angle = 2 * math.pi * place / count - math.pi / 2
    return middle + radius * math.cos(angle), middle + radius * math.sin(angle)


def _box(name: str, at: _Point) -> str:
    width, height = max(_BOX[0], 8 * len(name) + 20), _BOX[1]
    return (
        f'<rect x="{at[0] - width / 2:.1f}" y="{at[1] - height / 2:.1f}" width="{width}" height="{height}" rx="8" '
        'fill="#eef5f3" stroke="#333"/>'
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}">{escape(name)}</text>'
    )


def _cables(segments: Sequence[Segment], places: dict[int, _Point], middle: float) -> list[str]:
    pairs: dict[tuple[int, int], list[Segment]] = defaultdict(list)
    others = []
    for segment in segments:
        if len(segment.ports) == 2:
            pairs[segment.ports[0].host, segment.ports[1].host].append(segment)
        else:
            others.append(segment)
    drawn = []
    for parallel in pairs.values():
        for number, segment in enumerate(parallel):
            drawn.append(_cable(segment, places, number - (len(parallel) - 1) / 2))
    for number, segment in enumerate(others):
        drawn.append(_star(segment, places, _hub(segment, places, middle, number)))
    return drawn


def _cable(segment: Segment, places: dict[int, _Point], aside: float) -> str:
    """Draw one cable; parallel ones bend ``aside``, so that each is seen."""
    left, right = segment.ports
    start, end = places[left.host], places[right.host]
    length = math.dist(start, end) or 1.0
    across = (end[1] - start[1]) / length, (start[0] - end[0]) / length
    bend = (start[0] + end[0]) / 2 + 90 * aside * across[0], (start[1] + end[1]) / 2 + 90 * aside * across[1]
    curve = f"M{start[0]:.1f} {start[1]:.1f} Q{bend[0]:.1f} {bend[1]:.1f} {end[0]:.1f} {end[1]:.1f}"
    near = _outside(start, end)
    labels = [
        _label(_along(start, bend, end, near), left.name),
        _label(_along(start, bend, end, 1 - near), right.name),
        # The long cables of a mesh cross in the middle.
        _label(_along(start, bend, end, 0.5 if length < 1.1 * _APART else 0.38), speed(segment.speed)),
    ]
    return _line(curve, segment) + "".join(labels)


def _hub(segment: Segment, places: dict[int, _Point], middle: float, number: int) -> _Point:
    """Return where to draw the switch: in the midst of its hosts; an end that leads nowhere is drawn outside the circle."""
    points = [places[port.host] for port in segment.ports]
    if len(points) == 1:
        x, y = points[0]
        return x + (x - middle) * 0.25 + 30, y + (y - middle) * 0.25 + 30
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points) + 34 * number


def _star(segment: Segment, places: dict[int, _Point], hub: _Point) -> str:
    drawn = []
    for port in segment.ports:
        at = places[port.host]
        drawn.append(_line(f"M{at[0]:.1f} {at[1]:.1f} L{hub[0]:.1f} {hub[1]:.1f}", segment))
        near = _outside(at, hub)
        beside = at[0] + (hub[0] - at[0]) * near, at[1] + (hub[1] - at[1]) * near
        drawn.append(_label(beside, f"{port.name} {speed(port.speed)}".strip()))
    colour = _colour(segment)
    return "".join(drawn) + f'<circle cx="{hub[0]:.1f}" cy="{hub[1]:.1f}" r="9" fill="#fff" stroke="{colour}" stroke-width="2.5"/>'


def _outside(start: _Point, end: _Point) -> float:
    """Return which part of the way a name stands clear of the box at its start; boxes and names are wider than high."""
    length = math.dist(start, end) or 1.0
    return min(0.45, (38 + 60 * abs(end[0] - start[0]) / length) / length)


def _line(path: str, segment: Segment) -> str:
    dashes = ' stroke-dasharray="7 5"' if segment.fault or segment.guessed else ""
    ends = " - ".join(f"{port.name}" for port in segment.ports)
    note = escape(" ".join(filter(None, [ends, speed(segment.speed), segment.fault])))
    return f'<path d="{path}" stroke="{_colour(segment)}"{dashes}><title>{note}</title></path>'


def _colour(segment: Segment) -> str:
    return _BROKEN if segment.fault else _GUESSED if segment.guessed else _GOOD


def _along(start: _Point, bend: _Point, end: _Point, part: float) -> _Point:
    """Return a point of a quadratic Bezier curve."""
    back = 1 - part
    x, y = (back * back * start[axis] + 2 * back * part * bend[axis] + part * part * end[axis] for axis in (0, 1))
    return x, y


def _label(at: _Point, text: str) -> str:
    return f'<text class="port" x="{at[0]:.1f}" y="{at[1]:.1f}">{escape(text)}</text>' if text else ""
