"""Problems with answers: numbers that the library must reproduce, and exact ways to get them.

Each table names the section of the derivation that it belongs to. Second routes to an answer
(quadrature, closed forms) stand here or beside the test that uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Density, Quadrature
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
from tiltflow.features import FeatureMap, Features
from tiltflow.functional import Exponential, Functional, Hinges
from tiltflow.potential import Differentiable, Potential
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.similarity import GaussianSimilarity
from tiltflow.utilities import (
    CertaintyEquivalent,
    EntropicRisk,
    Entropy,
    ExpectedReward,
    KernelDiversity,
    LeftCVaR,
    LogBarrier,
    MeanVariance,
    MomentMatching,
    MutualInformation,
    OptimalDesign,
    RightCVaR,
    SpectralRisk,
)


def axis(low: float, high: float, count: int) -> Tensor:
    """Equally spaced nodes in float64."""
    return torch.linspace(low, high, count, dtype=torch.float64)


def grid(density: Density, low: float, high: float, count: int) -> Quadrature:
    """A one-dimensional density on a grid."""
    return Quadrature.of([axis(low, high, count)], density.log)


def moments(p: Density) -> tuple[float, float]:
    """Mean and standard deviation of the first coordinate."""
    mean = float(p.expect(lambda x, cond: x[:, 0]))
    return mean, math.sqrt(float(p.expect(lambda x, cond: (x[:, 0] - mean) ** 2)))


def identity(model: Density, seed: Seed) -> Density:
    """The ``density`` argument of an outer loop whose models are densities."""
    return model


@dataclass(frozen=True)
class Problem:
    """max of ``objective(q)`` over densities, started at ``q``; its optimum is Gaussian.

    One step of ``rate`` is exact.
    """

    q: GaussianMixture
    objective: Callable[[Density], Functional]
    rate: float
    mean: float
    std: float


# E x - 0.5 KL: mean 0.5 + 0.7^2 / 0.5. Entropy - 0.5 KL: q^(1/3), std 0.7 sqrt(3).
GAUSSIAN_PROBLEMS: Mapping[str, Problem] = {
    "expected_reward": Problem(
        gaussian([0.5], 0.7), lambda p: ExpectedReward(Linear(1.0)) - 0.5 * KL(p), 2.0, 1.48, 0.7
    ),
    "entropy": Problem(
        gaussian([0.5], 0.7), lambda p: Entropy() - 0.5 * KL(p), 1 / 1.5, 0.5, 1.2124355652982140
    ),
}

# Section 3.8: standard deviations after k = 1..4 steps on Entropy - 0.5 KL(N(.5, .7^2)), by rate.
ENTROPY_STDS = {
    0.3: (0.8366600, 0.9570203, 1.0502298, 1.1147154),
    0.9: (2.2135944, 1.0866107, 1.2680202, 1.1946410),
}
# The exponent e_50 of p_50 ~ q^e for 1 / rate = 10, by the KL weight.
ENTROPY_E50 = {0.0: 0.0051538, 0.5: 0.3335305}


def entropy_exponents(weight: float, rate: float, count: int) -> list[float]:
    """e_k = (1 - g) e_{k-1} + g b with g = rate (1 + weight), b = weight / (1 + weight)."""
    g, b = rate * (1 + weight), weight / (1 + weight)
    out = [1.0]
    for _ in range(count):
        out.append((1 - g) * out[-1] + g * b)
    return out[1:]


# Section 3.8: sup of tail - KL(N(.5, .7^2)) with r = x.
RIGHT_TAIL_OPTIMUM = 2.194182  # RightCVaR(0.8)
LEFT_TAIL_OPTIMUM = 0.006543  # LeftCVaR(0.2)


# Table 4.5: N(0, 1) with r = x; (weight, threshold, value, CVaR, KL) of the optimum.
TFFT_RIGHT = (  # level 0.9
    (20.0, 1.40660, 1.85113, 1.95086, 0.00499),
    (10.0, 1.53950, 1.95475, 2.17010, 0.02154),
    (5.0, 1.83177, 2.18824, 2.69396, 0.10114),
    (3.0, 2.28171, 2.56384, 3.60221, 0.34612),
    (2.0, 2.93584, 3.14323, 5.04833, 0.95255),
    (1.0, 5.21972, 5.32508, 10.00000, 4.67492),
)
TFFT_LEFT = (  # level 0.2
    (10.0, -0.68503, -1.28601, -1.17525, 0.01108),
    (5.0, -0.53391, -1.17806, -0.96757, 0.04210),
    (2.0, -0.10810, -0.88295, -0.42147, 0.23074),
    (1.0, 0.53591, -0.45831, 0.33019, 0.78850),
    (0.5, 1.69456, 0.25647, 1.57742, 2.64190),
    (0.3, 3.12852, 1.08426, 3.05544, 6.57062),
)


def tail_dual(q: Quadrature, r: Tensor, level: float, side: str) -> float:
    """The second route to a tail optimum: a search over one threshold (duality, section 4.2).

    right: min_y y + log E_q exp((r - y)_+ / (1 - level));
    left:  max_y y + log E_q exp(-(y - r)_+ / level).
    """
    log_mass = q.probabilities.log()

    def at(y: float) -> float:
        if side == "right":
            hinge = (r - y).clamp(min=0) / (1 - level)
        else:
            hinge = -(y - r).clamp(min=0) / level
        return y + float(torch.logsumexp(log_mass + hinge, 0))

    best = min if side == "right" else max
    low, high = float(r.min()), float(r.max())
    for _ in range(8):
        candidates = torch.linspace(low, high, 201).tolist()
        y = best(candidates, key=at)
        width = (high - low) / 200
        low, high = y - width, y + width
    return at(y)


# Table 1.9a: N(0, 1) data, Linear path, kernel form; (ODE shift, SDE shift = chain variance) for
# K = 10, 20, 40, 100, 250.
STEPS = (10, 20, 40, 100, 250)
KERNEL_FORM = {
    "both": ((1.043, 1.027, 1.015, 1.006, 1.003), (1.261, 1.143, 1.075, 1.031, 1.012)),
    "denominator": ((0.877, 0.937, 0.968, 0.987, 0.995), (1.028, 1.020, 1.012, 1.005, 1.002)),
    "ancestral": ((0.733, 0.853, 0.922, 0.968, 0.987), (0.648, 0.794, 0.886, 0.951, 0.980)),
}
UNTILTED_ODE = (0.773, 0.879, 0.938, 0.975, 0.990)
# Oracle 17: the same variances to four digits.
CHAIN_VARIANCE = {
    "both": (1.2608, 1.1430, 1.0749, 1.0308, 1.0125),
    "denominator": (1.0278, 1.0204, 1.0121, 1.0053, 1.0022),
    "ancestral": (0.6483, 0.7935, 0.8864, 0.9514, 0.9800),
}
# Table 1.9c: variance under the reward -d x^2 / 2, K = 10, 20, 40, 100, 250, 1000.
QUADRATIC_STEPS = (10, 20, 40, 100, 250, 1000)
QUADRATIC = {
    ("denominator", 1.0): (0.5618, 0.5315, 0.5159, 0.5064, 0.5026, 0.5006),
    ("both", 1.0): (0.6252, 0.5629, 0.5317, 0.5128, 0.5051, 0.5013),
    ("ancestral", 1.0): (0.4255, 0.4626, 0.4812, 0.4924, 0.4969, 0.4992),
    ("denominator", -0.5): (1.9008, 1.9775, 1.9971, 2.0011, 2.0008, 2.0002),
}
# Table 1.9d: own variance of untilted chains relative to s^2, at K = 40 and K = 100.
OWN_VARIANCE = {
    0.01: {"denominator": (1.001, 0.995), "both": (1.383, 1.155)},
    0.04: {"denominator": (0.987, 0.994), "both": (1.195, 1.080)},
    0.25: {"denominator": (0.994, 0.998), "both": (1.093, 1.038)},
    1.0: {"denominator": (1.012, 1.005), "both": (1.075, 1.031)},
    4.0: {"denominator": (1.050, 1.021), "both": (1.095, 1.039)},
}
OWN_VARIANCE[0.01] |= {"ancestral": (0.662, 0.820), "ode": (0.799, 0.914)}
OWN_VARIANCE[0.04] |= {"ancestral": (0.768, 0.888), "ode": (0.880, 0.950)}
OWN_VARIANCE[0.25] |= {"ancestral": (0.856, 0.936), "ode": (0.929, 0.971)}
OWN_VARIANCE[1.0] |= {"ancestral": (0.886, 0.951), "ode": (0.938, 0.975)}
OWN_VARIANCE[4.0] |= {"ancestral": (0.891, 0.954), "ode": (0.929, 0.971)}


# Oracle 26: the set-up of the Gateaux check (second numbers are standard deviations).
GATEAUX_P = gaussian([-0.3], 0.9)
GATEAUX_Q = GaussianMixture([[1.0], [-1.2]], [0.5, 0.7], [0.6, 0.4])
GATEAUX_PRIOR = gaussian([0.2], 1.3)
GATEAUX_REWARD: Potential = Differentiable(lambda x: x[:, 0].sin() + 0.3 * x[:, 0])
GATEAUX_FEATURES: Features = FeatureMap(lambda x: torch.cat([x, x.cos()], 1))

# One example of every functional that `utilities` and `divergences` export: name -> (reward,
# prior) -> functional. A new functional adds its line here and is under contract. What stands
# behind the name of a class, after a blank, distinguishes its variants.
FUNCTIONALS: dict[str, Callable[[Potential, Density], Functional]] = {
    "CertaintyEquivalent": lambda r, prior: CertaintyEquivalent(r, Exponential(0.6)),
    "CertaintyEquivalent left": lambda r, prior: CertaintyEquivalent(
        r, Hinges((-0.4, 0.3), (2.0, 1.2, 0.1))
    ),
    "ChiSquare": lambda r, prior: ChiSquare(prior),
    "EnergyDistance": lambda r, prior: EnergyDistance(prior),
    "EntropicRisk": lambda r, prior: EntropicRisk(r, -0.8),
    "Entropy": lambda r, prior: Entropy(),
    "ExpectedReward": lambda r, prior: ExpectedReward(r),
    "ForwardKL": lambda r, prior: ForwardKL(prior),
    "Hellinger": lambda r, prior: Hellinger(prior),
    "JensenShannon": lambda r, prior: JensenShannon(prior),
    "KL": lambda r, prior: KL(prior),
    "KernelDiversity": lambda r, prior: KernelDiversity(GaussianSimilarity(0.7)),
    "LeftCVaR": lambda r, prior: LeftCVaR(r, 0.2),
    "LogBarrier": lambda r, prior: LogBarrier(r, lower=-1.5),
    "LogBarrier upper": lambda r, prior: LogBarrier(r, upper=1.5),
    "MMD": lambda r, prior: MMD(prior, GaussianSimilarity(0.8)),
    "MeanVariance": lambda r, prior: MeanVariance(r, 0.7),
    "MomentMatching": lambda r, prior: MomentMatching(GATEAUX_FEATURES, (0.5, 0.2)),
    "MutualInformation": lambda r, prior: MutualInformation((prior,), (0.4, 0.6)),
    "OptimalDesign": lambda r, prior: OptimalDesign(GATEAUX_FEATURES, "D", 0.1),
    "OptimalDesign A": lambda r, prior: OptimalDesign(GATEAUX_FEATURES, "A", 0.1),
    "OptimalDesign E": lambda r, prior: OptimalDesign(GATEAUX_FEATURES, "E", 0.1),
    "Renyi": lambda r, prior: Renyi(prior, 2.0),
    "Renyi low": lambda r, prior: Renyi(prior, 0.3),
    "RightCVaR": lambda r, prior: RightCVaR(r, 0.8),
    "SpectralRisk": lambda r, prior: SpectralRisk(r, (0.1, 0.5, 0.8), (2.0, 0.5, 1.0, 4.0)),
    "SpectralRisk rounded": lambda r, prior: SpectralRisk(r, (0.3, 0.8), (2.0, 0.5, 1.0), 0.4),
    "Wasserstein": lambda r, prior: Wasserstein(prior),
    "Wasserstein square": lambda r, prior: Wasserstein(prior, power=2),
}
