"""Differential entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from tiltflow.density import Density, Reweighted
from tiltflow.errors import CapabilityError
from tiltflow.functional import Curvature, Functional
from tiltflow.potential import Combination, Potential
from tiltflow.ratio import LogRatio
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class Entropy(Functional):
    """F[p] = -E_p log p, with first variation -log p: concave in p.

    Its gradient is minus the score, so that exploring with a flow model needs no density (Flow
    Density Control, section 4). Without an anchor it has no maximiser on an unbounded space: stop
    early, or subtract a divergence. Offers what log p offers.
    """

    @property
    def curvature(self) -> Curvature:
        return "concave"

    def offers(self, log: Access) -> Access:
        return log

    def value(self, p: Density) -> Estimate:
        """-E_p log p; needs the log-density with its normaliser.

        A sum of a log-density and potentials (mirror descent's record of its own tilts) is known
        up to a constant, and is refused; but for the tilts of a bank, which weigh their origin on
        the same points: there the constant is log E_origin exp(psi).
        """
        if isinstance(p, Reweighted) and _is_known(p.origin) and isinstance(p.log, Combination):
            return _tracked(p)
        if not _is_known(p.log):
            known = "its values up to a constant" if p.log.offers & Access.VALUE else p.log.offers
            raise CapabilityError(
                f"Entropy.value needs normalised values of log p, but {type(p).__name__} offers "
                f"{known}. Use a density with a known log-probability (an analytic one, a "
                "Quadrature, or FlowDensity(model, log=Likelihood(model))); optimising the "
                "entropy needs none."
            )
        mean = p.estimate(p.log.value)
        return Estimate(-mean.value, mean.standard_error, mean.count)

    def first_variation(self, p: Density) -> Potential:
        return -p.log


def _is_known(log: Potential) -> bool:
    """Whether it has values, with their normaliser."""
    return Access.VALUE in log.offers and not isinstance(log, Combination)


def _tracked(p: Reweighted) -> Estimate:
    """-E_p log p of a tilted bank, with the normaliser that its origin has on the same points."""
    psi, bank = p.log - p.origin, p.bank
    origin = p.original(psi)
    ratio = LogRatio(psi, origin)
    log = p.log.value(bank.points, bank.cond).double() - ratio.log_normaliser
    weights, before = bank.weights.double(), origin.bank.weights.double()
    value = float(-(weights * log).sum())
    influence = weights * (-log - value) + weights - before
    error = 0.0 if bank.exact else float(influence.norm())
    return Estimate(value, error, 0 if bank.exact else len(weights))
