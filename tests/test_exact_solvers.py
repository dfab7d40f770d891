"""The solvers with closed forms, against each other."""

from __future__ import annotations

import pytest
import torch

from oracles import grid
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.errors import UnsupportedError
from tiltflow.potential import Differentiable
from tiltflow.problem import ControlProblem
from tiltflow.rewards.points import Linear, Quadratic
from tiltflow.solvers.exact import GaussianSolver, GridSolver

X = Linear(1.0)


def test_grid_solver() -> None:
    """log p + phi - log Z at the nodes; path_kl = E_new phi - log Z."""
    q = grid(gaussian([0.0], 1.0), -9, 9, 4001)
    phi = Differentiable(lambda x: x[:, 0].sin())
    out = GridSolver().solve(ControlProblem(q, phi), Context())
    log_z = float(torch.logsumexp(q.probabilities.log() + phi.value(q.nodes), 0))
    torch.testing.assert_close(out.model.table, q.table + phi.value(q.nodes) - log_z)
    kl = float(out.model.expect(phi.value)) - log_z
    assert out.stats["path_kl"] == pytest.approx(kl, rel=1e-9)
    assert GridSolver().solve(ControlProblem(q, phi), Context(), init=out.model).stats[
        "step_kl"
    ] == pytest.approx(0, abs=1e-12)


def test_gaussian_solver_on_a_mixture() -> None:
    """Linear and quadratic terms add up; model and KL equal the grid's."""
    q = GaussianMixture([[-1.0], [1.5]], [[0.6], [0.4]], [0.3, 0.7])
    phi = 0.5 * Linear(1.0) - 0.3 * Quadratic(0.4, 1.5)
    out = GaussianSolver().solve(ControlProblem(q, phi), Context())
    on_grid = GridSolver().solve(ControlProblem(grid(q, -9, 9, 8001), phi), Context())
    x = on_grid.model.nodes
    torch.testing.assert_close(
        on_grid.model.table.exp(), out.model.log.value(x).exp(), rtol=0, atol=1e-9
    )
    for key in ("path_kl", "step_kl"):
        assert out.stats[key] == pytest.approx(on_grid.stats[key], abs=1e-8)


def test_gaussian_solver_refuses() -> None:
    """Anything but linear, quadratic and Gaussian logs is named; so is a foreign `init`."""
    q = gaussian([0.0], 1.0)
    with pytest.raises(UnsupportedError, match="Differentiable is neither"):
        GaussianSolver().solve(ControlProblem(q, X + Differentiable(lambda x: x[:, 0])), Context())
    mixture = GaussianMixture([[-1.0], [1.5]])
    other = GaussianMixture([[-1.0], [7.5]])
    with pytest.raises(UnsupportedError, match="init"):
        GaussianSolver().solve(ControlProblem(mixture, X), Context(), init=other)
