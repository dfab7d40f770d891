"""Optimal experimental design: samples from which a linear model can be learned well."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.functional import Curvature, Functional, error_of, influence, per_density
from tiltflow.potential import Reward
from tiltflow.types import Access, Cond, Estimate

Criterion = Literal["D", "A", "E"]

SINGULAR = 1e-12
"""Eigenvalues below this part of the largest one are rounding: features in double precision are
then linearly dependent to six digits."""

EQUAL = 1e-9
"""Eigenvalues closer than this, relatively, are one repeated eigenvalue."""


@final
@dataclass(frozen=True, eq=False)
class QuadraticForm(Reward):
    """x -> Phi(x)^T matrix Phi(x), computed in float64.

    Args:
        features: Phi, (B, *event) -> (B, m).
        matrix: (m, m), symmetric.
    """

    features: Features
    matrix: Tensor

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        phi = self.features.value(x, cond).double()
        return ((phi @ self.matrix.to(phi)) * phi).sum(1).to(x.dtype)

    def __str__(self) -> str:
        return f"QuadraticForm({self.features})"


@final
@dataclass(frozen=True, eq=False)
class OptimalDesign(Functional):
    """How well samples determine the coefficients of features Phi, M = E_p Phi Phi^T + ridge I.

    ========= ====================== ==========================  ============================
    criterion F[p]                   first variation             what is made small
    ========= ====================== ==========================  ============================
    D         log det M              Phi^T M^-1 Phi              volume of the confidence set
    A         -tr M^-1               Phi^T M^-2 Phi              mean squared error
    E         -1 / lambda_min(M)     (v^T Phi)^2 / lambda_min^2  error of the worst direction
    ========= ====================== ==========================  ============================

    All three are concave in p (methods, section 3.3; Pukelsheim, 2006). v is the unit eigenvector
    of lambda_min; where lambda_min is repeated, F is not differentiable, and the first variation
    is a supergradient, the mean over its eigenvectors. The plug-in value is biased by terms of
    order m / N. Offers a value and a gradient, whatever log p offers.

    The ridge is absolute, in units of Phi squared: were it relative to p, it would have a first
    variation of its own. It bounds the reward of directions that p does not cover, |Phi|^2 / ridge
    for D. A design matrix that is singular without it is regularised by it, with a warning.

    Args:
        features: Phi, m of them.
        criterion: "D", "A" or "E".
        ridge: a number > 0, small against the diagonal of E_p Phi Phi^T.
    """

    features: Features
    criterion: Criterion = "D"
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.criterion not in ("D", "A", "E"):
            raise ConfigError(
                f"OptimalDesign: criterion={self.criterion!r} must be 'D', 'A' or 'E'."
            )
        if not 0 < self.ridge < math.inf:
            raise ConfigError(
                f"OptimalDesign: ridge={self.ridge!r} must be a positive number, in units of the "
                "features squared."
            )

    @property
    def curvature(self) -> Curvature:
        return "concave"

    def offers(self, log: Access) -> Access:
        return Access.BOTH

    def value(self, p: Density) -> Estimate:
        """Plug-in value; the influence function is the first variation.

        Warns:
            UserWarning: if the features are linearly dependent under p.
        """
        spectrum = self._spectrum(p)[0]
        if self.criterion == "D":
            value = float(spectrum.log().sum())
        else:
            inverse = 1 / spectrum
            value = -float(inverse.sum() if self.criterion == "A" else inverse.max())
        values = influence(self.first_variation(p), p)
        return Estimate(value, error_of(values, p), 0 if p.bank.exact else len(values))

    def first_variation(self, p: Density) -> QuadraticForm:
        """The quadratic form of the table, with M frozen.

        Warns:
            UserWarning: if the features are linearly dependent under p.
        """
        spectrum, vectors = self._spectrum(p)
        if self.criterion == "D":
            slopes = 1 / spectrum
        elif self.criterion == "A":
            slopes = spectrum**-2
        else:
            worst = spectrum <= spectrum.min() * (1 + EQUAL)
            slopes = worst / (worst.sum() * spectrum**2)
        return QuadraticForm(self.features, (vectors * slopes) @ vectors.T)

    @per_density
    def _spectrum(self, p: Density) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,), increasing, and eigenvectors (m, m) of M."""
        bank = p.bank
        with torch.no_grad():
            phi = self.features.value(bank.points, bank.cond).double()
        second_moment = (phi.T * bank.weights.to(phi)) @ phi
        values, vectors = torch.linalg.eigh(second_moment)
        rank = int((values > SINGULAR * values[-1]).sum())
        if rank < len(values):
            scale = float(second_moment.diagonal().mean())
            warnings.warn(
                f"OptimalDesign: the {len(values)} features span only {rank} dimensions under "
                f"{type(p).__name__}, so that E Phi Phi^T is singular; ridge={self.ridge:g} was "
                "added to its diagonal, and directions without samples are rewarded by up to "
                f"1/ridge. Remove dependent features, or choose a ridge of about {scale / 100:.1g}"
                " (a hundredth of the mean diagonal).",
                stacklevel=4,  # the caller of value or first_variation
            )
        return values.clamp(min=0) + self.ridge, vectors

    def __str__(self) -> str:
        return f"OptimalDesign({self.features}, {self.criterion})"
