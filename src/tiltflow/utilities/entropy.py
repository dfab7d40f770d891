"""Differential entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from tiltflow.density import Density
from tiltflow.errors import CapabilityError
from tiltflow.functional import Curvature, Functional
from tiltflow.potential import Combination, Potential
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
        up to a constant, and is refused.
        """
        if Access.VALUE not in p.log.offers or isinstance(p.log, Combination):
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
