"""Solvers with closed forms: the ground truth behind every outer loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture, MixtureLog
from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.errors import UnsupportedError
from tiltflow.potential import Combination, Potential
from tiltflow.problem import ControlProblem, Solution
from tiltflow.types import Access


@final
@dataclass(frozen=True)
class GridSolver:
    """The exact tilt on quadrature nodes: log p_new = log p_reference + terminal + const.

    ``stats``: ``path_kl`` = KL(new || reference) and ``step_kl`` = KL(new || init), both exact.
    """

    needs: ClassVar[Access] = Access.VALUE

    def solve(
        self,
        problem: ControlProblem[Quadrature],
        context: Context,
        *,
        init: Quadrature | None = None,
    ) -> Solution[Quadrature]:
        """The tilted density; ``init`` is only used to report how far the step went."""
        problem.terminal.require(self.needs, "GridSolver")
        old = problem.reference
        new = old.tilted(problem.terminal)
        start = old if init is None else init
        stats = {"path_kl": _grid_kl(new, old), "step_kl": _grid_kl(new, start)}
        return Solution(new, stats=stats)


def _grid_kl(p: Quadrature, q: Quadrature) -> float:
    mass = p.probabilities
    return float((mass * (p.table - q.table).flatten()).sum())


@runtime_checkable
class NaturalForm(Protocol):
    """A potential of the form a . x - sum c x^2 / 2 + const, e.g. ``rewards.points.Linear``."""

    def natural(self) -> tuple[Tensor, Tensor]:
        """(a, c), each a number or (D,)."""
        ...


@final
@dataclass(frozen=True)
class GaussianSolver:
    """The exact tilt of a Gaussian mixture by a linear or quadratic terminal.

    The terminal may be a linear combination of ``rewards.points.Linear`` and ``Quadratic`` and of
    log-densities of single Gaussians (those of a KL or an entropy).

    ``stats``: ``path_kl`` = KL(new || reference) and ``step_kl`` = KL(new || init), in closed
    form: E_new[phi] - log E_old[e^phi].
    """

    needs: ClassVar[Access] = Access.VALUE

    def solve(
        self,
        problem: ControlProblem[GaussianMixture],
        context: Context,
        *,
        init: GaussianMixture | None = None,
    ) -> Solution[GaussianMixture]:
        """The tilted mixture; ``init`` is only used to report how far the step went.

        Raises:
            UnsupportedError: if the terminal is not linear or quadratic.
        """
        old = problem.reference
        slope, curvature = _natural(problem.terminal, old.means.shape[1])
        new, _ = old.tilted(slope, curvature)
        start = old if init is None else init
        stats = {"path_kl": _tilt_kl(new, old), "step_kl": _tilt_kl(new, start)}
        return Solution(new, stats=stats)


def _natural(potential: Potential, dimension: int) -> tuple[Tensor, Tensor]:
    """(a, c), each (D,), with potential = a . x - sum c x^2 / 2 + const."""
    slope = torch.zeros(dimension, dtype=torch.float64)
    curvature = torch.zeros(dimension, dtype=torch.float64)
    terms = potential.terms if isinstance(potential, Combination) else ((1.0, potential),)
    for scale, term in terms:
        if isinstance(term, NaturalForm):
            a, c = term.natural()
        elif isinstance(term, MixtureLog) and len(term.means) == 1:
            c = term.stds[0] ** -2
            a = c * term.means[0]
        else:
            raise UnsupportedError(
                f"GaussianSolver tilts by linear and quadratic potentials, but {term} is neither "
                "(nor the log of a single Gaussian). Use Quadrature with GridSolver."
            )
        slope, curvature = slope + scale * a, curvature + scale * c
    return slope, curvature


def _tilt_kl(new: GaussianMixture, old: GaussianMixture) -> float:
    """KL(new || old) where new is a tilt of old by a quadratic phi: E_new[phi] - log E_old[e^phi].

    phi is read off the first component; all components of a tilt agree on it.
    """
    precision_new, precision_old = new.stds**-2, old.stds**-2
    curvature = (precision_new - precision_old)[0]
    slope = (new.means * precision_new - old.means * precision_old)[0]
    again, log_z = old.tilted(slope, curvature)
    pairs = zip((again.means, again.stds), (new.means, new.stds), strict=True)
    if not all(torch.allclose(a, b) for a, b in pairs):
        raise UnsupportedError(
            "GaussianSolver: `init` and the solution are not tilts of one mixture, so that the KL "
            "between them has no closed form. Pass an earlier iterate of the same run as `init`."
        )
    second = new.means**2 + new.stds**2
    each = (slope * new.means - 0.5 * curvature * second).sum(1)
    return float((new.weights * each).sum()) - log_z
