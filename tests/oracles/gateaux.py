"""The definition of a first variation, checked on a grid (oracle 26)."""

from __future__ import annotations

from oracles import GATEAUX_P, GATEAUX_PRIOR, GATEAUX_Q, grid
from tiltflow.density import Density, Quadrature
from tiltflow.functional import Functional


def nodes(density: Density) -> Quadrature:
    return grid(density, -8, 8, 4001)


P, Q, PRIOR = nodes(GATEAUX_P), nodes(GATEAUX_Q), nodes(GATEAUX_PRIOR)


def mixed(weight: float) -> Quadrature:
    """(1 - weight) p + weight q on the grid."""
    return Quadrature(P.axes, ((1 - weight) * P.table.exp() + weight * Q.table.exp()).log())


def gateaux(functional: Functional, h: float = 1e-4) -> tuple[float, float]:
    """Central difference of F along (1 - e) p + e q at e = 1/2, and int delta F (q - p)."""
    numeric = (functional.value(mixed(0.5 + h)).value - functional.value(mixed(0.5 - h)).value) / (
        2 * h
    )
    middle = mixed(0.5)
    variation = functional.first_variation(middle).value(middle.nodes)
    return numeric, float((variation * (Q.probabilities - P.probabilities)).sum())
