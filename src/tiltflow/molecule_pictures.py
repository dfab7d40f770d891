"""Pictures of molecules as SVG: balls and sticks in three dimensions, and RDKit's drawings.

No network, no matplotlib, no script: a picture is a short text that stands in an HTML page.
"""

from __future__ import annotations

import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.bonds import VALENCIES, bond_orders, stable_atoms
from tiltflow.molecules import Molecules, formula

WIDTH, HEIGHT, MARGIN = 168.0, 138.0, 9.0
LARGEST_SCALE = 30.0
"""Pixels per Angstrom, at most: small molecules should not look large."""

CPK = {
    1: "#f2f2f2", 5: "#f2a8a8", 6: "#5a5f66", 7: "#3b5bdb", 8: "#e03131", 9: "#7cc63a",
    14: "#d9b98a", 15: "#f08c00", 16: "#f2c724", 17: "#37b24d", 34: "#e8940c", 35: "#a02c2c",
    53: "#8a2be2",
}  # fmt: skip
"""Colours of elements by convention (Corey, Pauling, Koltun), by atomic number."""
OTHER = "#d977c9"

RADII = {1: 0.27}
RADIUS = 0.43
"""Of a ball, in Angstrom: a good third of the van der Waals radius."""
STICK, APART = 0.15, 0.17
"""Width of a stick, and distance between the sticks of a multiple bond, in Angstrom."""
CAMERA = 14.0
"""Distance of the eye from the centre, in Angstrom."""
FOG = 0.45
"""How pale the farthest atom is."""
TURN = 0.24, 0.20
"""Radians by which the view is off the principal axes, so that nothing is exactly behind."""
WRONG = "#d6336c"
PAPER = "#ffffff"


def _gradient(z: int, mark: str) -> str:
    """What makes a disc look like a ball."""
    colour = CPK.get(z, OTHER)
    return (
        f'<radialGradient id="{mark}{z}" cx=".36" cy=".32" r=".72">'
        f'<stop offset="0" stop-color="{_mixed(colour, "#ffffff", 0.72)}"/>'
        f'<stop offset=".4" stop-color="{colour}"/>'
        f'<stop offset="1" stop-color="{_mixed(colour, "#101018", 0.42)}"/></radialGradient>'
    )


def balls_and_sticks(molecules: Molecules, *, standalone: bool = False) -> list[str]:
    """A picture of each molecule, seen across its longest directions, as SVG.

    Bonds are those of ``bonds.bond_orders``, in the colours of their atoms. A dashed ring marks
    an atom whose bonds do not add up to its valency. Far atoms are paler. Molecules with elements
    whose bond lengths are not known have no sticks; without atoms, or with positions that are not
    finite, there is a text instead.

    Args:
        molecules: B of them.
        standalone: with a name space, as a file needs it; without one, for HTML pages.
    """
    return [_picture(molecules, i, standalone) for i in range(len(molecules))]


def _picture(molecules: Molecules, i: int, standalone: bool) -> str:
    numbers, positions = (part.detach().cpu() for part in molecules[i])
    name = formula(numbers.tolist())
    if len(numbers) == 0:
        return _svg(_text("no atoms"), "no atoms", standalone)
    if not bool(positions.isfinite().all()):
        return _svg(_text("positions are not finite"), name, standalone)
    orders, stable = _bonds(numbers, positions)
    view = _View.of(numbers, oriented(positions.double()))
    pieces = [*view.atoms(stable), *view.sticks(orders)]
    body = "".join(svg for _, svg in sorted(pieces, key=lambda piece: piece[0]))
    # Names of gradients are common to a page: other pictures must have other ones.
    mark = f"b{zlib.crc32(body.encode()):08x}-"
    defs = "".join(_gradient(z, mark) for z in sorted({*numbers.tolist()}))
    return _svg(f"<defs>{defs}</defs>{body.replace('#atom', '#' + mark)}", name, standalone)


def _svg(body: str, name: str, standalone: bool) -> str:
    spaces = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    return (
        f'<svg{spaces} role="img" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" '
        f'height="{HEIGHT:.0f}" stroke-linecap="round"><title>{html.escape(name)}</title>'
        f"{body}</svg>"
    )


def _text(words: str) -> str:
    return (
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT / 2:.0f}" text-anchor="middle" font-size="12" '
        f'fill="{WRONG}">{words}</text>'
    )


def _bonds(numbers: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Orders (n, n), and which atoms are stable (n,); all are, where lengths are not known."""
    if not {*numbers.tolist()} <= {*VALENCIES}:
        return torch.zeros(len(numbers), len(numbers)), torch.ones(len(numbers), dtype=torch.bool)
    alone = Molecules(positions[None], numbers[None])
    return bond_orders(alone)[0], stable_atoms(alone)[0]


def oriented(positions: Tensor) -> Tensor:
    """Positions (n, 3) with their centre at 0, turned to their principal axes: the longest to
    the right, the shortest to the eye, then by a little more. A rotation, never a reflection.

    Signs are chosen by the third moments, so that the view does not depend on how the molecule
    was turned (unless it is symmetric).
    """
    x = positions - positions.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    for k in range(2):
        along = x @ axes[:, k]
        skew = float((along**3).sum())
        first = float(along[along.abs().argmax()])
        if (skew if abs(skew) > 1e-6 * float(along.abs().max()) ** 3 else first) < 0:
            axes[:, k] = -axes[:, k]
    axes[:, 2] = torch.linalg.cross(axes[:, 0], axes[:, 1])
    a, b = (torch.tensor(angle, dtype=x.dtype) for angle in TURN)
    about_x = torch.eye(3, dtype=x.dtype)
    about_x[1:, 1:] = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).reshape(2, 2)
    about_y = torch.eye(3, dtype=x.dtype)
    about_y[::2, ::2] = torch.stack([b.cos(), b.sin(), -b.sin(), b.cos()]).reshape(2, 2)
    turned: Tensor = x @ axes @ about_x.T @ about_y.T
    return turned


@final
@dataclass(frozen=True)
class _View:
    """A molecule on paper.

    Attributes:
        numbers: of the n atoms.
        places: (n, 3), in Angstrom, the third to the eye.
        scale: pixels per Angstrom at the centre.
        middle: (2,), what is at the middle of the picture, in Angstrom.
    """

    numbers: Sequence[int]
    places: Tensor
    scale: float
    middle: Tensor

    @staticmethod
    def of(numbers: Tensor, places: Tensor) -> _View:
        # A molecule that has come apart must not reach the eye.
        camera = max(CAMERA, 3 * float(places.abs().max()))
        near = camera / (camera - places[:, 2:])
        flat = torch.cat([places[:, :2] * near, places[:, 2:]], 1)
        low = flat[:, :2].min(0).values - RADIUS
        high = flat[:, :2].max(0).values + RADIUS
        room = torch.tensor([WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN], dtype=places.dtype)
        scale = min(LARGEST_SCALE, float((room / (high - low)).min()))
        return _View(numbers.tolist(), flat, scale, (low + high) / 2)

    def atoms(self, stable: Tensor) -> list[tuple[float, str]]:
        """Balls, with their depths."""
        out = []
        for i, z in enumerate(self.numbers):
            (x, y), r = self.at(self.places[i]), self.scale * _radius(z)
            ball = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="url(#atom{z})"/>'
            fog = self.fog(float(self.places[i, 2]))
            if fog > 0.02:
                ball += (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r + 0.3:.1f}" fill="{PAPER}" '
                    f'opacity="{fog:.2f}"/>'
                )
            if not bool(stable[i]):
                ball += (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r + 2:.1f}" fill="none" '
                    f'stroke="{WRONG}" stroke-width="1.3" stroke-dasharray="2.5 2.5"/>'
                )
            out.append((float(self.places[i, 2]), ball))
        return out

    def sticks(self, orders: Tensor) -> list[tuple[float, str]]:
        """Halves of bonds, from the surface of a ball to the middle, with their depths."""
        out = []
        for i, j in orders.nonzero().tolist():
            a, b = self.places[i], self.places[j]
            length = float((b - a).norm())
            start = min(0.9 * _radius(self.numbers[i]) / max(length, 1e-9), 0.5)
            begin, end = torch.lerp(a, b, start), torch.lerp(a, b, 0.5)
            depth = float(torch.lerp(a, b, 0.25)[2])
            out.append((depth, self._stick(begin, end, self.numbers[i], int(orders[i, j]))))
        return out

    def _stick(self, begin: Tensor, end: Tensor, z: int, order: int) -> str:
        """Dark below, then the colour of the atom, then a highlight; side by side by order."""
        fog = self.fog(float(begin[2] + end[2]) / 2)
        colour = _mixed(CPK.get(z, OTHER), PAPER, fog)
        edge = _mixed(_mixed(CPK.get(z, OTHER), "#101018", 0.5), PAPER, fog)
        shine = _mixed(colour, "#ffffff", 0.55)
        (x1, y1), (x2, y2) = self.at(begin), self.at(end)
        long = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1e-9)
        width = self.scale * STICK * (1.0 if order == 1 else 0.72 if order == 2 else 0.55)
        away = self.scale * APART * (0.0 if order == 1 else 1.0 if order == 2 else 0.85)
        nx, ny = -(y2 - y1) / long, (x2 - x1) / long
        # Both halves must see their sticks in one order: the side does not depend on direction.
        lines = "".join(
            f"M{x1 + k * away * nx:.1f} {y1 + k * away * ny:.1f}"
            f"L{x2 + k * away * nx:.1f} {y2 + k * away * ny:.1f}"
            for k in _offsets(order)
        )
        return "".join(
            f'<path d="{lines}" stroke="{c}" stroke-width="{w:.1f}"/>'
            for c, w in ((edge, width + 1.3), (colour, width), (shine, 0.28 * width))
        )

    def at(self, place: Tensor) -> tuple[float, float]:
        """Pixels."""
        x, y = ((place[:2] - self.middle) * self.scale).tolist()
        return WIDTH / 2 + x, HEIGHT / 2 - y

    def fog(self, depth: float) -> float:
        """0 for the nearest atom; a flat molecule has none."""
        near, far = float(self.places[:, 2].max()), float(self.places[:, 2].min())
        return FOG * (near - depth) / max(near - far, 4.0)


def _offsets(order: int) -> tuple[float, ...]:
    return ((0.0,), (-0.5, 0.5), (-1.0, 0.0, 1.0))[order - 1]


def _radius(z: int) -> float:
    return RADII.get(z, RADIUS)


def _mixed(colour: str, other: str, share: float) -> str:
    """A colour with a share of another one."""
    a, b = (int(c[1:], 16).to_bytes(3, "big") for c in (colour, other))
    return "#" + bytes(round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True)).hex()


def drawing(molecule: Any | None) -> str | None:
    """RDKit's drawing of a molecule of ``bonds.perceived``, without its hydrogens, as SVG.

    ``None`` for an invalid molecule, and for one that RDKit cannot draw.
    """
    if molecule is None:
        return None
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDepictor
    from rdkit.Chem.Draw import rdMolDraw2D

    with rdBase.BlockLogs():
        try:
            flat = Chem.RemoveHs(molecule)
            rdDepictor.Compute2DCoords(flat)
            drawer = rdMolDraw2D.MolDraw2DSVG(int(WIDTH), int(HEIGHT))
            options: Any = drawer.drawOptions()
            options.clearBackground, options.padding = False, 0.08
            options.fixedBondLength, options.bondLineWidth = 26, 1.4
            rdMolDraw2D.PrepareAndDrawMolecule(drawer, flat)
            drawer.FinishDrawing()
            text = drawer.GetDrawingText()
        except (ValueError, RuntimeError):
            return None
    body = text[text.index("<!-- END OF HEADER -->") :].partition("-->")[2]
    body = re.sub(r" class='[^']*'", "", body).replace("</svg>", "").replace("\n", "")
    return _svg(body, Chem.MolToSmiles(flat), standalone=False)


__all__ = ["balls_and_sticks", "drawing", "oriented"]
