"""A circuit as a picture: an SVG tree with the result on top and the models at the bottom."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

WIDTH_OF_CHARACTER = 7.6
PADDING, GAP, ROW = 26.0, 22.0, 104.0
HEIGHT = 54.0

SIGNS = {"Intersection": "& ", "Union": "| ", "Contrast": "- "}
COLOURS = {
    "Intersection": "#1f6feb", "Union": "#1a6b3c", "Interpolation": "#8250df",
    "Contrast": "#c2410c",
}  # fmt: skip
MODEL = "#4a5568"


@final
@dataclass(frozen=True)
class _Box:
    """A node, laid out: lines of text, centre, row, parts with their shares."""

    lines: tuple[str, ...]
    colour: str
    x: float
    row: int
    width: float
    parts: tuple[tuple[float, _Box], ...]


def circuit_svg(tree: Mapping[str, Any], lowerings: Mapping[str, str], alternative: str) -> str:
    """The drawing of a report's ``tree``.

    Args:
        tree: nested tables of nodes.
        lowerings: of gates, by their texts.
        alternative: text for readers who do not see it.
    """
    boxes = _every(_laid_out(tree, lowerings, 0.5 * GAP, 0))
    right = _span(tree, lowerings) + GAP
    height = ROW * max(box.row for box in boxes) + HEIGHT + 2 * GAP
    edges = "".join(_edge(box, share, part) for box in boxes for share, part in box.parts)
    nodes = "".join(_node(box) for box in boxes)
    return (
        f'<div class="wide"><svg role="img" viewBox="0 0 {right:.0f} {height:.0f}" '
        f'style="max-width:{right:.0f}px;width:100%;height:auto" '
        'xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui,-apple-system,Segoe UI,Roboto,sans-serif">'
        f"<title>{html.escape(alternative)}</title>{edges}{nodes}</svg></div>"
    )


def _laid_out(
    node: Mapping[str, Any], lowerings: Mapping[str, str], left: float, row: int
) -> _Box:
    """The box of a node whose drawing begins at ``left``; parts are centred below it."""
    span, below = _span(node, lowerings), [_span(part, lowerings) for part in node["parts"]]
    at, parts = left + 0.5 * (span - sum(below)), []
    for part, room in zip(node["parts"], below, strict=True):
        parts.append((float(part["share"]), _laid_out(part, lowerings, at, row + 1)))
        at += room
    colour = COLOURS.get(node["name"], MODEL) if parts else MODEL
    lines = _lines(node, lowerings)
    return _Box(lines, colour, left + span / 2, row, _width(lines), tuple(parts))


def _span(node: Mapping[str, Any], lowerings: Mapping[str, str]) -> float:
    """Room for a node and everything below it."""
    below = sum(_span(part, lowerings) for part in node["parts"])
    return max(_width(_lines(node, lowerings)) + GAP, below)


def _width(lines: Sequence[str]) -> float:
    return WIDTH_OF_CHARACTER * max(len(line) for line in lines) + PADDING


def _lines(node: Mapping[str, Any], lowerings: Mapping[str, str]) -> tuple[str, ...]:
    if not node["parts"]:
        return (str(node["name"]),)
    reward = f", reward {node['reward']}" if node["reward"] else ""
    title = f"{SIGNS.get(node['name'], '')}{node['name']}"
    return title, f"{lowerings[node['text']]}{reward}"


def _every(box: _Box) -> Sequence[_Box]:
    return [box, *(each for _, part in box.parts for each in _every(part))]


def _edge(box: _Box, share: float, part: _Box) -> str:
    top, bottom = GAP + ROW * box.row + HEIGHT, GAP + ROW * part.row
    middle = 0.5 * (top + bottom)
    return (
        f'<path d="M{box.x:.1f} {top:.1f} C{box.x:.1f} {middle:.1f} {part.x:.1f} {middle:.1f} '
        f'{part.x:.1f} {bottom:.1f}" fill="none" stroke="#b8c0cc" '
        f'stroke-width="{1 + 3 * share:.1f}"/>'
        f'<text x="{0.5 * (box.x + part.x):.1f}" y="{middle + 4:.1f}" font-size="12" '
        f'text-anchor="middle" fill="#4a5568" stroke="#fff" stroke-width="5" '
        f'paint-order="stroke">{share:.3g}</text>'
    )


def _node(box: _Box) -> str:
    top, fill = GAP + ROW * box.row, "#ffffff" if box.parts else "#f4f6f9"
    out = [
        f'<rect x="{box.x - box.width / 2:.1f}" y="{top:.1f}" width="{box.width:.1f}" '
        f'height="{HEIGHT:.0f}" rx="8" fill="{fill}" stroke="{box.colour}" stroke-width="1.5"/>'
    ]
    first = top + HEIGHT / 2 + 5 - 9 * (len(box.lines) - 1)
    for i, line in enumerate(box.lines):
        style = 'font-weight="600" font-size="14"' if i == 0 else 'font-size="12.5"'
        out.append(
            f'<text x="{box.x:.1f}" y="{first + 19 * i:.1f}" text-anchor="middle" {style} '
            f'fill="{box.colour if i == 0 else MODEL}">{html.escape(line)}</text>'
        )
    return "".join(out)
