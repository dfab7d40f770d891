"""Molecules as point clouds: atoms with positions, and how they are written as states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.features import Features
from tiltflow.types import Cond

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As "
    "Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe"
).split()
"""Of elements, by atomic number."""


@final
@dataclass(frozen=True)
class Molecules:
    """A batch of molecules.

    Attributes:
        positions: (B, N, 3), in Angstrom.
        numbers: (B, N), integer atomic numbers; 0 is padding.
    """

    positions: Tensor
    numbers: Tensor

    def __post_init__(self) -> None:
        b, n = self.numbers.shape[0], self.numbers.shape[-1]
        if self.positions.shape != (b, n, 3) or self.numbers.shape != (b, n):
            raise ShapeError(
                f"Molecules: positions of shape {tuple(self.positions.shape)} and numbers of "
                f"{tuple(self.numbers.shape)} must be (B, N, 3) and (B, N)."
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def mask(self) -> Tensor:
        """(B, N), which rows are atoms."""
        return self.numbers > 0

    @property
    def pairs(self) -> Tensor:
        """(B, N, N), which pairs of rows are two different atoms."""
        same = torch.eye(self.mask.shape[1], dtype=torch.bool, device=self.mask.device)
        return self.mask[:, :, None] & self.mask[:, None] & ~same

    def chosen(self, index: Tensor | Sequence[int]) -> Molecules:
        """Some of them."""
        which = torch.as_tensor(index, dtype=torch.long)
        return Molecules(self.positions[which], self.numbers[which])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Atomic numbers (n,) and positions (n, 3) in Angstrom of one molecule, no padding."""
        atoms = self.mask[i]
        return self.numbers[i][atoms], self.positions[i][atoms]

    def xyz(self, i: int, comment: str = "") -> str:
        """One molecule in the XYZ format, in Angstrom."""
        numbers, positions = self[i]
        rows = [
            f"{SYMBOLS[z]:<2} {x:15.8f} {y:15.8f} {w:15.8f}"
            for z, (x, y, w) in zip(numbers.tolist(), positions.tolist(), strict=True)
        ]
        return "\n".join([str(len(rows)), comment, *rows]) + "\n"


@final
@dataclass(frozen=True)
class Layout:
    """How a molecule is written as a state (N, 3 + elements + charge).

    Columns: positions, one-hot types, and where there is one the atomic number. Types are
    ordinary real numbers under the noise; they are read by argmax.

    Args:
        elements: atomic numbers, in the order of the one-hot columns.
        one_hot: what a one is written as.
        charge: what the atomic number is multiplied by in its column; ``None`` for no column.
        key: name of the 0/1 mask (B, N) in the conditions.
    """

    elements: tuple[int, ...] = (1, 6, 7, 8, 9)
    one_hot: float = 0.25
    charge: float | None = 0.1
    key: str = "mask"

    def __post_init__(self) -> None:
        known = len(SYMBOLS)
        if not self.elements or not all(0 < z < known for z in self.elements):
            raise ConfigError(
                f"Layout: elements={self.elements} must be atomic numbers from 1 to {known - 1}."
            )

    @property
    def width(self) -> int:
        """Columns of a state."""
        return 3 + len(self.elements) + (self.charge is not None)

    def decode(self, x: Tensor, cond: Cond | None = None) -> Molecules:
        """The molecules of states (B, N, width); rows outside the mask are padding."""
        if x.ndim != 3 or x.shape[2] != self.width:
            raise ShapeError(
                f"Layout.decode: states of shape {tuple(x.shape)} must be (B, N, {self.width})."
            )
        elements = torch.tensor(self.elements, device=x.device)
        numbers = elements[x[..., 3 : 3 + len(self.elements)].argmax(-1)]
        mask = None if cond is None else cond.get(self.key)
        if isinstance(mask, Tensor):
            numbers = numbers * (mask.to(x.device) > 0)
        return Molecules(x[..., :3], numbers)

    def encode(self, molecules: Molecules) -> tuple[Tensor, Cond]:
        """States (B, N, width) with zero centre of mass, and the condition with their mask.

        Raises:
            ConfigError: for an element that has no column.
        """
        numbers, mask = molecules.numbers, molecules.mask
        unknown = sorted({*numbers.flatten().tolist()} - {0, *self.elements})
        if unknown:
            raise ConfigError(
                f"Layout.encode: element {unknown[0]} ({SYMBOLS[unknown[0]]}) is not among "
                f"{self.symbols}."
            )
        rows = mask[..., None].to(molecules.positions)
        total = rows.sum(1, keepdim=True).clamp(min=1)
        centre = (molecules.positions * rows).sum(1, keepdim=True) / total
        columns = [(molecules.positions - centre) * rows]
        types = numbers[..., None] == torch.tensor(self.elements, device=numbers.device)
        columns.append(self.one_hot * types.to(columns[0]))
        if self.charge is not None:
            columns.append(self.charge * numbers[..., None].to(columns[0]))
        return torch.cat(columns, -1), {self.key: mask.to(columns[0])}

    @property
    def symbols(self) -> Sequence[str]:
        """Of the elements."""
        return [SYMBOLS[z] for z in self.elements]


@final
@dataclass(frozen=True)
class ElementCounts(Features):
    """How many atoms are of each of some elements, (B, N, width) -> (B, elements).

    Sums of the one-hot columns as they are: whole numbers at the end of a path, up to what is left
    of the noise, and what is expected of them at a predicted end point before. Linear in the
    state; rows of padding are zero and count nothing.

    Args:
        layout: of the states.
        elements: atomic numbers that the layout knows.
    """

    layout: Layout
    elements: tuple[int, ...]

    def __post_init__(self) -> None:
        unknown = [z for z in self.elements if z not in self.layout.elements]
        if unknown or not self.elements:
            raise ConfigError(
                f"ElementCounts: elements={self.elements} must be some of "
                f"{self.layout.elements}, those of the layout."
            )

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        columns = [3 + self.layout.elements.index(z) for z in self.elements]
        return x[..., columns].sum(1) / self.layout.one_hot


def formula(numbers: Sequence[int]) -> str:
    """Hill's order: carbon, hydrogen, then by alphabet; without carbon all by alphabet."""
    symbols = [SYMBOLS[z] for z in numbers]
    first = [s for s in ("C", "H") if "C" in symbols and s in symbols]
    names = first + sorted({*symbols} - {*first})
    return "".join(f"{s}{symbols.count(s) if symbols.count(s) > 1 else ''}" for s in names)
