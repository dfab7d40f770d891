"""Every utility with every divergence on a line, solved by the library and by a second route.

The second route shares nothing with the library: values from ``oracles.values``, gradients by
autograd, and L-BFGS on p = z^2 / |z|^2. Kinks are smoothed less and less. From several starts, as
not all of the objectives are concave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from oracles import axis, values
from oracles.values import Nodes, Value
from tiltflow.algorithms import LineSearch, mirror_descent
from tiltflow.algorithms.bank_plan import ways
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.divergences import (
    KL,
    MMD,
    ChiSquare,
    EnergyDistance,
    ForwardKL,
    Hellinger,
    JensenShannon,
    Renyi,
    Wasserstein,
)
from tiltflow.features import FeatureMap
from tiltflow.functional import Functional
from tiltflow.potential import Differentiable, remembering
from tiltflow.similarity import GaussianSimilarity
from tiltflow.solvers.exact import GridSolver
from tiltflow.utilities import (
    EntropicRisk,
    Entropy,
    ExpectedReward,
    KernelDiversity,
    LeftCVaR,
    LogBarrier,
    MeanVariance,
    MomentMatching,
    OptimalDesign,
    RightCVaR,
    SpectralRisk,
)

COUNT = 61
Q = Quadrature.of(
    [axis(-4, 4, COUNT)], GaussianMixture([[-1.0], [1.2]], [0.6, 0.8], [0.6, 0.4]).log
)
R = Differentiable(lambda x: (1.5 * x[:, 0]).sin() + 0.3 * x[:, 0])
PHI = FeatureMap(
    lambda x: torch.stack([torch.ones(len(x)).to(x), x[:, 0] / 2, x[:, 0] ** 2 / 4], 1)
)
ON = Nodes(Q.nodes, Q.cell, R.value(Q.nodes), PHI.value(Q.nodes))
MASS = Q.probabilities
RISK = ((0.3, 0.7), (0.5, 1.0, 2.0))
NEAR, WIDE = GaussianSimilarity(0.7), GaussianSimilarity(0.8)

# name -> (coefficient, functional, its second route)
UTILITIES: dict[str, tuple[float, Functional, Value]] = {
    "ExpectedReward": (1.5, ExpectedReward(R), values.expected_reward(ON)),
    "Entropy": (1.0, Entropy(), values.entropy(ON)),
    "RightCVaR(.8)": (1.0, RightCVaR(R, 0.8), values.right_cvar(ON, 0.8)),
    "LeftCVaR(.2)": (1.0, LeftCVaR(R, 0.2), values.left_cvar(ON, 0.2)),
    "MeanVariance": (1.0, MeanVariance(R, 0.7), values.mean_variance(ON, 0.7)),
    "EntropicRisk(.8)": (1.5, EntropicRisk(R, 0.8), values.entropic_risk(ON, 0.8)),
    "EntropicRisk(-.8)": (1.5, EntropicRisk(R, -0.8), values.entropic_risk(ON, -0.8)),
    "SpectralRisk": (1.0, SpectralRisk(R, *RISK), values.spectral_risk(ON, *RISK)),
    "OptimalDesign D": (0.7, OptimalDesign(PHI, "D", 0.1), values.design(ON, "D", 0.1)),
    "OptimalDesign A": (0.1, OptimalDesign(PHI, "A", 0.1), values.design(ON, "A", 0.1)),
    "OptimalDesign E": (0.2, OptimalDesign(PHI, "E", 0.1), values.design(ON, "E", 0.1)),
    "LogBarrier": (0.5, LogBarrier(R, lower=-0.4), values.log_barrier(ON, -0.4)),
    "MomentMatching": (
        2.0, MomentMatching(PHI, (1.0, 0.5, 0.6)), values.moment_matching(ON, (1.0, 0.5, 0.6)),
    ),
    "KernelDiversity 1": (
        2.0, KernelDiversity(NEAR, 1, 1e-3), values.kernel_diversity(ON, 0.7, 1, 1e-3),
    ),
    "KernelDiversity 2": (2.0, KernelDiversity(NEAR, 2), values.kernel_diversity(ON, 0.7, 2, 0.0)),
}  # fmt: skip
DIVERGENCES: dict[str, tuple[float, Functional, Value]] = {
    "KL": (1.0, KL(Q), values.kl(ON, MASS)),
    "ForwardKL": (0.5, ForwardKL(Q), values.forward_kl(ON, MASS)),
    "Renyi(2)": (0.5, Renyi(Q, 2.0), values.renyi(ON, MASS, 2.0)),
    "Renyi(.5)": (1.0, Renyi(Q, 0.5), values.renyi(ON, MASS, 0.5)),
    "ChiSquare": (0.5, ChiSquare(Q), values.chi_square(ON, MASS)),
    "Hellinger": (3.0, Hellinger(Q), values.hellinger(ON, MASS)),
    "JensenShannon": (3.0, JensenShannon(Q), values.jensen_shannon(ON, MASS)),
    "W_1": (0.7, Wasserstein(Q), values.wasserstein(ON, MASS)),
    "W_2^2": (0.3, Wasserstein(Q, power=2), values.wasserstein_square(ON, MASS)),
    "MMD^2": (3.0, MMD(Q, WIDE), values.mmd(ON, MASS, 0.8, True)),
    "MMD": (1.0, MMD(Q, WIDE, squared=False), values.mmd(ON, MASS, 0.8, False)),
    "EnergyDistance": (2.0, EnergyDistance(Q), values.energy_distance(ON, MASS)),
}
WEIGHTS = {
    ("LeftCVaR(.2)", "W_1"): 0.2,
    ("LeftCVaR(.2)", "MMD^2"): 0.5,
    ("LeftCVaR(.2)", "EnergyDistance"): 0.5,
    ("MeanVariance", "W_1"): 0.3,
}
"""Of divergences in objectives that are not concave and have poor local optima at the weights
above; no first-order method is safe from those."""
ROUGH = {"RightCVaR(.8)", "LeftCVaR(.2)", "SpectralRisk", "OptimalDesign E", "W_1", "MMD"}
"""Those with kinks."""


@dataclass(frozen=True)
class Pair:
    """A utility less a divergence.

    Attributes:
        objective: for the library.
        value: for the second route.
        rough: whether it has kinks.
    """

    objective: Functional
    value: Value
    rough: bool

    @staticmethod
    def of(utility: str, divergence: str) -> Pair:
        c, f, f_value = UTILITIES[utility]
        usual, d, d_value = DIVERGENCES[divergence]
        w = WEIGHTS.get((utility, divergence), usual)
        return Pair(
            c * f - w * d,
            lambda p, blur: c * f_value(p, blur) - w * d_value(p, blur),
            bool(ROUGH & {utility, divergence}),
        )

    def by_mirror_descent(self) -> tuple[float, int]:
        """The value (by the second route) that mirror descent reaches, and its steps; the better
        of a direct ascent and of one by way of the rounded objectives, as ``plan`` has it."""
        ends = [_descend(way) for way in ways(self.objective, Q)]
        return max((float(self.value(p.probabilities.clamp(min=1e-300), 0.0)), k) for p, k in ends)

    def by_second_route(self) -> float:
        """The best value that L-BFGS finds."""
        starts = [(1 - part) * MASS + part / COUNT for part in (0.5, 0.01)]
        if self.objective.curvature != "concave":
            tilted = (torch.softmax(MASS.log() + c * ON.r, 0) for c in (2.0, 6.0))
            starts += [0.9 * p + 0.1 / COUNT for p in tilted]
        blurs = (1e-1, 1e-2, 1e-3, 1e-4, 0.0) if self.rough else (0.0,)
        return max(_ascend(self.value, start, blurs) for start in starts)


def _descend(objectives: list[Functional]) -> tuple[Quadrature, int]:
    p, done = Q, list[int]()
    for objective in objectives:
        with remembering(Q.nodes):
            p = mirror_descent(
                objective, p, GridSolver(), LineSearch(), density=lambda q, seed: q,
                context=Context(), form="successive", num_iterations=1000,
                on_iterate=lambda k, iterate: done.append(k),
            ).model  # fmt: skip
    return p, len(done)


def _ascend(value: Value, start: Tensor, blurs: tuple[float, ...]) -> float:
    z = start.sqrt().numpy()
    for blur in blurs:
        z = minimize(
            _loss(value, blur), z, jac=True, method="L-BFGS-B",
            options={"maxiter": 500, "maxfun": 1000, "ftol": 1e-15, "gtol": 1e-11, "maxcor": 40},
        ).x  # fmt: skip
        z = z / np.linalg.norm(z)
    return float(value(_simplex(torch.from_numpy(z)), 0.0))


def _simplex(z: Tensor) -> Tensor:
    return (z * z / (z @ z)).clamp(min=1e-300)


def _loss(value: Value, blur: float) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        t = torch.tensor(z, requires_grad=True)
        out = -value(_simplex(t), blur)
        (grad,) = torch.autograd.grad(out, t)
        return float(out.detach()), grad.numpy()

    return loss
