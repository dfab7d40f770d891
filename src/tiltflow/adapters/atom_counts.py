"""How many atoms molecules have: the condition of models that draw them atom by atom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from tiltflow.errors import ConfigError
from tiltflow.seed import Seed
from tiltflow.types import Cond


@final
@dataclass(frozen=True)
class AtomCounts:
    """Numbers of atoms drawn from a histogram, as a 0/1 mask (B, N).

    N is the same in all draws, the largest number of atoms of the law, so that any two batches can
    be joined; ``adapters.egnn.EGNN`` does not spend time on the padding. Draws are independent and
    not sorted: halves of a batch have one law.

    Args:
        histogram: number of atoms -> weight; need not be normalised.
        max_atoms: larger molecules are left out; ``None`` for all.
        key: name of the mask in the conditions.

    Raises:
        ConfigError: if a number is below one, a weight negative, or nothing is left.
    """

    histogram: Mapping[int, float]
    max_atoms: int | None = None
    key: str = "mask"

    def __post_init__(self) -> None:
        object.__setattr__(self, "histogram", dict(sorted(self.histogram.items())))
        if any(n < 1 or w < 0 for n, w in self.histogram.items()):
            raise ConfigError(
                "AtomCounts: the histogram must have numbers of at least one atom, and weights "
                "that are not negative."
            )
        if not self.law:
            raise ConfigError(
                f"AtomCounts: no molecule of the histogram has at most {self.max_atoms} atoms."
                if self.histogram else "AtomCounts: the histogram is empty."
            )  # fmt: skip

    @property
    def law(self) -> dict[int, float]:
        """Number of atoms -> weight, of those that can be drawn."""
        kept = {n: w for n, w in self.histogram.items() if w > 0}
        return {n: w for n, w in kept.items() if self.max_atoms is None or n <= self.max_atoms}

    def draw(self, count: int, seed: Seed) -> Cond:
        """The masks of ``count`` molecules, (count, N)."""
        law = self.law
        weights = torch.tensor(list(law.values()), dtype=torch.float64)
        drawn = torch.multinomial(weights, count, replacement=True, generator=seed.generator())
        return {self.key: masks(torch.tensor(list(law))[drawn], max(law))}


@final
@dataclass(frozen=True)
class FixedAtoms:
    """The same number of atoms in every molecule.

    Args:
        atoms: how many.
        padded: rows of a state; ``None`` for one per atom.
        key: name of the mask in the conditions.
    """

    atoms: int
    padded: int | None = None
    key: str = "mask"

    def __post_init__(self) -> None:
        if self.atoms < 1 or (self.padded is not None and self.padded < self.atoms):
            raise ConfigError(
                f"FixedAtoms: atoms={self.atoms} must be at least 1, and at most padded="
                f"{self.padded}."
            )

    def draw(self, count: int, seed: Seed) -> Cond:
        """The masks of ``count`` molecules; nothing is random."""
        return {self.key: masks(torch.full((count,), self.atoms), self.padded or self.atoms)}


def masks(sizes: torch.Tensor, rows: int) -> torch.Tensor:
    """1 for the first ``sizes`` (B,) rows and 0 for the others, (B, rows)."""
    return (torch.arange(rows) < sizes[:, None]).float()
