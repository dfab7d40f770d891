"""Several models tuned at once, so that each finds modes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, final

import torch
from torch import Tensor

from tiltflow.algorithms.steps import objective_value
from tiltflow.context import Context
from tiltflow.density import Density
from tiltflow.divergences.kl import KL
from tiltflow.errors import ConfigError
from tiltflow.functional import Functional, check
from tiltflow.potential import Differentiable, Potential
from tiltflow.problem import ControlProblem, M, Result, Solution, Solver
from tiltflow.seed import Seed
from tiltflow.types import Access, Estimate
from tiltflow.utilities.mutual_information import MutualInformation


@final
@dataclass(frozen=True)
class Component:
    """One of the models: its tilt of the common start, and its density."""

    psi: Potential
    p: Density


def discover_modes(
    model: M,
    count: int,
    solver: Solver[M],
    rates: Sequence[float],
    *,
    prior: Density,
    density: Callable[[M, Seed], Density],
    context: Context,
    anchor: float = 0.0,
    weights: Sequence[float] | None = None,
    utility: Functional | None = None,
    apart: Sequence[Potential] | None = None,
    on_iterate: Callable[[int, Estimate], None] = lambda number, objective: None,
) -> list[Solution[M]]:
    """Tune ``count`` copies of a model until one can tell their samples apart::

        G(p_1, ..., p_n) = I(X; Z) + sum_z w_z (F[p_z] - anchor KL(p_z || prior))
        p_z <- p_z exp(rate_k / w_z * delta G / delta p_z)           for all z, from one iterate

    Diverse mode discovery (Flow Density Control, table 1), with the sign of methods, section 3.5.
    Steps are anchored, as in ``mirror_descent``: each component is solved from the start for its
    accumulated tilt. With ``0 <= anchor < 1`` and no utility, I - anchor KL equals
    (1 - anchor) I - anchor KL(mixture || prior), so that the optimum is a partition of the prior's
    mass among the components: I = log n for equal weights, if its modes can be so divided.

    Args:
        model: the start of every component.
        count: number of components, at least 2.
        solver: solves each step.
        rates: one per iteration, for components of weight one.
        prior: the density of ``model``.
        density: the law of a model.
        context: seed, backend, callbacks; component z of iteration k runs at
            ``iteration/k/component/z``.
        anchor: weight of the KL to the prior.
        weights: of the components; equal by default.
        utility: what each component is to raise besides.
        apart: initial tilts that break the symmetry, one per component; by default each is drawn
            to one of ``count`` far-apart samples of the prior (``far_apart``).
        on_iterate: called with the objective after each iteration.

    Returns:
        the last solution of every component.

    Raises:
        ConfigError: for fewer than two components, or a wrong number of weights or tilts.
        CapabilityError: before any training, if the solver would miss what it needs.
    """
    if count < 2 or (apart is not None and len(apart) != count):
        raise ConfigError(f"discover_modes: {count} components need one tilt each, and be >= 2.")
    w = [1 / count] * count if weights is None else [float(v) / sum(weights) for v in weights]
    if len(w) != count or min(w) <= 0:
        raise ConfigError(f"discover_modes: weights must be {count} positive numbers.")
    seed = context.seed.child("apart")
    tilts = far_apart(prior, count, seed) if apart is None else list(apart)
    job = _Modes(model, solver, prior, density, context, anchor, tuple(w), utility)
    job.check(tilts)
    solutions = [job.solve(0, z, tilts[z], model) for z in range(count)]
    parts = [job.component(0, z, tilts[z], solutions[z]) for z in range(count)]
    for k, rate in enumerate(rates, 1):
        variations = [job.objective(z, parts).first_variation(parts[z].p) for z in range(count)]
        psi = [c.psi + (rate / w[z]) * variations[z] for z, c in enumerate(parts)]
        solutions = [job.solve(k, z, psi[z], solutions[z].model) for z in range(count)]
        parts = [job.component(k, z, psi[z], solutions[z]) for z in range(count)]
        on_iterate(k, job.value(parts))
        if any(s.result in (Result.STARVED, Result.DEGENERATE) for s in solutions):
            break
    return solutions


def far_apart(prior: Density, count: int, seed: Seed, strength: float = 1.0) -> list[Potential]:
    """Tilts -strength |x - c_z|^2 / (2 s^2) towards ``count`` samples of the prior, far apart.

    The first is drawn at random, each further one is the sample farthest from those before; s^2 is
    the mean squared distance between samples and their nearest c.
    """
    points = prior.bank.points.flatten(1).double()
    weights = prior.bank.weights.double()
    chosen = [int(torch.multinomial(weights, 1, generator=seed.generator()))]
    # Nodes of a grid that carry no mass are no samples.
    carried = weights > 1e-3 * weights.max()
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(int(torch.where(carried, nearest, -1.0).argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    scale = float((weights * nearest).sum()) or 1.0

    def towards(centre: Tensor) -> Potential:
        def value(x: Tensor) -> Tensor:
            return -0.5 * strength / scale * (x.flatten(1) - centre.to(x)).square().sum(1)

        return Differentiable(value)

    return [towards(points[i]) for i in chosen]


@final
@dataclass(frozen=True)
class _Modes(Generic[M]):
    """The arguments of ``discover_modes``, and one method for each part of a step."""

    model: M
    solver: Solver[M]
    prior: Density
    density: Callable[[M, Seed], Density]
    context: Context
    anchor: float
    weights: tuple[float, ...]
    utility: Functional | None

    def at(self, k: int, z: int) -> Context:
        return self.context.child("iteration", k, "component", z)

    def check(self, tilts: Sequence[Potential]) -> None:
        """Before any training: the tilts, and the first variation at densities like theirs."""
        user, needs = type(self.solver).__name__, self.solver.needs
        for tilt in tilts:
            tilt.require(needs | Access.VALUE, user)
        parts = [Component(t, self.prior.with_log(self.prior.log + t)) for t in tilts]
        check(self.objective(0, parts), parts[0].p, needs, user)

    def objective(self, z: int, parts: Sequence[Component]) -> Functional:
        """G as a functional of component z."""
        w, rest = self.weights, [i for i in range(len(parts)) if i != z]
        others = [parts[i].p for i in rest]
        weights = [w[z], *(w[i] for i in rest)]
        total = 1.0 * MutualInformation(others, weights, reference=self.prior)
        if self.utility is not None:
            total = total + w[z] * self.utility
        return total - (self.anchor * w[z]) * KL(self.prior) if self.anchor else total

    def solve(self, k: int, z: int, psi: Potential, init: M) -> Solution[M]:
        return self.solver.solve(ControlProblem(self.model, psi), self.at(k, z), init=init)

    def component(self, k: int, z: int, psi: Potential, solution: Solution[M]) -> Component:
        p = self.density(solution.model, self.at(k, z).seed.child("density"))
        return Component(psi, p.with_log(self.prior.log + psi))

    def value(self, parts: Sequence[Component]) -> Estimate:
        """G of all components."""
        total = 1.0 * self.objective(0, parts).terms[0][1]
        worth = objective_value(total, parts[0].p)
        value, variance = worth.value, worth.standard_error**2
        for w, part in zip(self.weights, parts, strict=True):
            extra = [(w * c, term) for c, term in self._each()]
            for scale, term in extra:
                one = objective_value(term, part.p)
                value += scale * one.value
                variance += (scale * one.standard_error) ** 2
        return Estimate(value, variance**0.5, worth.count)

    def _each(self) -> list[tuple[float, Functional]]:
        own = [] if self.utility is None else list(self.utility.terms)
        return own + ([(-self.anchor, KL(self.prior))] if self.anchor else [])
