"""Rewards of molecules by their bonds: a smooth valency, and scores of RDKit."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from tiltflow.bonds import (
    VALENCIES,
    connected,
    distances,
    perceived,
    reach,
    require_rdkit,
    require_tables,
)
from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.molecules import Layout
from tiltflow.potential import Potential, Reward
from tiltflow.types import Access, Cond

DEAD = 0.2
"""Of 4 s (1 - s): what ordinary lengths of bonds have."""


@final
@dataclass(frozen=True, eq=False)
class Valency(Reward):
    """How well the valencies of all atoms are satisfied, smooth in the positions::

        s_ijk = sigmoid((reach_k(i, j) - d_ij) / width),  k = 1, 2, 3
        off_i = valency_i - sum_jk s_ijk                  soft bonds that an atom lacks
        e_i   = (c_i |off_i| - slack)_+                   c_i: 1, or ``excess`` where off_i < 0
        u_i   = sum_j (4 s_ij1 (1 - s_ij1) - 0.2)_+ / 0.8     partners neither bonded nor not
        l_i   = e_i^2 + undecided u_i
        r(x)  = -mean_i l_i / (1 + l_i),                  -1 < r <= 0

    reach_k is the distance below which EDM's rule sees a bond of order k (``bonds.reach``), so
    that for ``width -> 0`` r = 0 is EDM's stable molecule. Relaxed molecules have -0.005
    to 0, stable ones of a model -0.04 to 0.

    Sums of halves can look like whole bonds: without ``excess`` and ``undecided``, 60 steps of
    0.02 Angstrom uphill from 192 samples of a weak model raised its share of stable atoms from
    0.82 to 0.91 while RDKit's validity fell from 0.52 to 0.23; with them it reaches 0.92 and the
    validity 0.93. An atom farther than some widths from every reach feels nothing.

    Types are read by argmax and constant. With ``soft_types`` they are a softmax over the
    one-hot columns, valencies and bonds are averages over it, and these columns have a gradient
    too.

    Args:
        layout: how states are molecules.
        width: of the sigmoids, in Angstrom.
        slack: how far off a sum of orders may be.
        excess: how much worse a bond too many is than one too few; a missing hydrogen is easily
            added.
        undecided: weight of u.
        soft_types: temperature of the softmax, as a part of what a one is written as, such as
            0.1; ``None`` for types that are constant.

    Raises:
        UnsupportedError: for a layout with elements other than H, C, N, O and F.
    """

    layout: Layout = field(default_factory=Layout)
    width: float = 0.03
    slack: float = 0.2
    excess: float = 2.0
    undecided: float = 0.1
    soft_types: float | None = None
    _reach: Tensor = field(init=False, repr=False)
    _valencies: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.width > 0 or not 0 <= self.slack < 1 or not (self.soft_types or 1.0) > 0:
            raise ConfigError(
                f"Valency: width={self.width} must be positive, slack={self.slack} inside [0, 1), "
                f"soft_types={self.soft_types} positive or None."
            )
        if not (self.excess > 0 and self.undecided >= 0):
            raise ConfigError(
                f"Valency: excess={self.excess} must be positive and "
                f"undecided={self.undecided} not negative."
            )
        elements = self.layout.elements
        object.__setattr__(self, "_reach", reach(elements))
        valencies = torch.tensor([VALENCIES[z] for z in elements], dtype=torch.float64)
        object.__setattr__(self, "_valencies", valencies)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        molecules = self.layout.decode(x.detach(), cond)
        types, mask = self._types(x), molecules.mask
        orders, undecided = self._sums(distances(x[..., :3]), types, molecules.pairs)
        off = types @ self._valencies.to(x) - orders
        e = (torch.where(off > 0, off, -self.excess * off) - self.slack).clamp(min=0)
        loss = e**2 + self.undecided * undecided
        return -(loss / (1 + loss) * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _types(self, x: Tensor) -> Tensor:
        """Probabilities of the elements, (B, N, E)."""
        columns = x[..., 3 : 3 + len(self.layout.elements)]
        if self.soft_types is None:
            hot = torch.nn.functional.one_hot(columns.argmax(-1), columns.shape[-1])
            return hot.to(x)
        return torch.softmax(columns / (self.layout.one_hot * self.soft_types), -1)

    def _sums(self, d: Tensor, types: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the partners of each atom: soft bonds, and undecided ones, both (B, N)."""
        orders, undecided = (
            self._hard(d, types) if self.soft_types is None else self._soft(d, types)
        )
        return (orders * pairs).sum(-1), (undecided * pairs).sum(-1)

    def _hard(self, d: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over k of all pairs of atoms, both (B, N, N)."""
        index = types.argmax(-1)
        limits = self._reach.to(d)[:, index[:, :, None], index[:, None]]
        s = torch.sigmoid((limits - d) / self.width)
        return s.sum(0), _undecided(s[0])

    def _soft(self, d: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """The same, averaged over types; a pair of elements at a time, for memory."""
        orders, undecided = torch.zeros_like(d), torch.zeros_like(d)
        for k, e, f in (self._reach.triu() > 0).nonzero().tolist():
            share = types[:, :, e, None] * types[:, None, :, f]
            if e != f:
                share = share + share.transpose(1, 2)
            s = torch.sigmoid((float(self._reach[k, e, f]) - d) / self.width)
            orders = orders + share * s
            if k == 0:
                undecided = undecided + share * _undecided(s)
        return orders, undecided


def _undecided(s: Tensor) -> Tensor:
    """1 for half a bond, 0 where one is 95 % there or not."""
    return (4 * s * (1 - s) - DEAD).clamp(min=0) / (1 - DEAD)


@final
@dataclass(frozen=True, eq=False)
class DrugScore(Potential):
    """A score of the molecular graph by RDKit, with bonds from distances; values only.

    * "qed": quantitative estimate of drug-likeness, 0 to 1 (Bickerton et al., 2012).
    * "ease": (10 - SA) / 9 of the synthetic accessibility SA (Ertl and Schuffenhauer, 2009), which
      is 1 for easy and 10 for hard: 1 is easy, 0 is hard.
    * "logp": octanol-water partition coefficient, log10 (Wildman and Crippen, 1999).

    Bonds are those of ``bonds.perceived``, so that missing hydrogens are implied. A molecule that
    is invalid or in several pieces fails: it scores ``floor`` and is counted in ``failures``.

    Args:
        score: see above.
        layout: how states are molecules.
        floor: of failures; by default 0, and -5 for "logp".

    Raises:
        CapabilityError: if RDKit is not installed.
        UnsupportedError: for a layout with elements other than H, C, N, O and F.
    """

    score: Literal["qed", "ease", "logp"]
    layout: Layout = field(default_factory=Layout)
    floor: float | None = None
    _counts: Counter[str] = field(init=False, repr=False, default_factory=Counter)
    _function: Callable[[Any], float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.score not in ("qed", "ease", "logp"):
            raise ConfigError(f"DrugScore: score={self.score!r} must be 'qed', 'ease' or 'logp'.")
        require_tables(self.layout.elements)
        object.__setattr__(self, "_function", _function(self.score))

    @property
    def offers(self) -> Access:
        return Access.VALUE

    @property
    def failures(self) -> Mapping[str, int]:
        """How often a molecule was "invalid" or "in pieces" so far."""
        return dict(self._counts)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        found = perceived(self.layout.decode(x.detach(), cond))
        return torch.tensor([self._one(m) for m in found], dtype=torch.float64).to(x)

    def _one(self, molecule: Any | None) -> float:
        if connected(molecule):
            return float(self._function(molecule))
        self._counts["invalid" if molecule is None else "in pieces"] += 1
        lowest = -5.0 if self.score == "logp" else 0.0
        return lowest if self.floor is None else self.floor

    def __str__(self) -> str:
        return f"DrugScore({self.score})"


def _function(score: str) -> Callable[[Any], float]:
    """RDKit's function of a molecule whose hydrogens are atoms."""
    require_rdkit()
    chem = importlib.import_module("rdkit.Chem")
    if score == "qed":
        qed = importlib.import_module("rdkit.Chem.QED").qed
        return lambda m: qed(chem.RemoveHs(m))
    if score == "logp":
        return importlib.import_module("rdkit.Chem.Crippen").MolLogP  # type: ignore[no-any-return]
    accessibility = _accessibility()
    return lambda m: (10 - accessibility(chem.RemoveHs(m))) / 9


def _accessibility() -> Callable[[Any], float]:
    """SA, of RDKit's folder of contributions, which is not a package."""
    folder = str(Path(importlib.import_module("rdkit.RDConfig").RDContribDir) / "SA_Score")
    sys.path.append(folder)
    try:
        return importlib.import_module("sascorer").calculateScore  # type: ignore[no-any-return]
    except ImportError as error:
        raise CapabilityError(f"This RDKit has no SA score in {folder}; use 'qed'.") from error
    finally:
        sys.path.remove(folder)


__all__ = ["DrugScore", "Valency"]
