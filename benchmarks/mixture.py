"""Five Gaussians of unequal weight, a velocity network fitted to them, and honest measures of it.

What benchmarks/utilities.py and benchmarks/planning.py share: the pre-trained network, its own
density on a grid, exact optima on that grid, and the objective of a tuned network.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import ROOT, Settings

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.algorithms import Iterate, LineSearch, mirror_descent
from tiltflow.algorithms.bank_plan import ways
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.delta import MLP
from tiltflow.density import Bank, Density, FlowDensity, Quadrature
from tiltflow.divergences import KL
from tiltflow.errors import CheckpointError
from tiltflow.flow import FlowModel, freeze
from tiltflow.functional import Functional
from tiltflow.kernel import Heun
from tiltflow.matching import fit_flow
from tiltflow.ratio import Likelihood
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.sample import Sampler, calibrated
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GridSolver
from tiltflow.space import Euclidean
from tiltflow.training import Training
from tiltflow.types import Estimate

ANGLES = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
DENSITY = GaussianMixture(
    2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.4, [0.4, 0.25, 0.15, 0.12, 0.08]
)
# The ratio of the slopes is irrational, so that no two nodes of a square grid have one reward.
REWARD = LinearReward([(5**0.5 - 1) / 2, 1.0])
ODE = Sampler(Heun(), 60)
HALF_WIDTH, FINE, COARSE = 4.8, 121, 61

Objective = Callable[[Density], Functional]
"""prior -> what is to be raised."""


def pretrained(settings: Settings) -> FlowModel:
    """A calibrated network 3-128-128-128-2 fitted to the mixture; kept beside this file."""
    torch.manual_seed(0)
    net = MLP((2,), (128, 128, 128))
    model = FlowModel(net, Linear(), Euclidean((2,)), predicts="velocity")
    path = ROOT / ".cache" / "mixture_velocity.safetensors"
    try:
        net.load_state_dict(load_tensors(path, net.state_dict()))
    except CheckpointError:
        updates = 200 if settings.quick else 16_000
        print(f"pre-training the velocity network: {updates} updates ...", flush=True)
        bank = Bank.equal(DENSITY.sample(200_000, Seed(9)).float())
        training = Training(num_updates=updates, learning_rate=1e-3, ema=0.9995)
        fit_flow(model, bank, training, Context(Seed(1)), batch_size=1024)
        if not settings.quick:
            save_tensors(path, net.state_dict(), {"made_by": "benchmarks/mixture.py"})
    return calibrated(freeze(model), seed=Seed(11))


def fingerprint(model: FlowModel) -> str:
    """Of the parameters: results belong to a network."""
    parts = [p.detach().numpy().tobytes() for p in model.net.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


@functools.cache
def exact_flow() -> FlowModel:
    """The exact flow of the mixture, calibrated, with a correction network to train."""
    torch.manual_seed(0)
    return calibrated(DENSITY.flow(hidden=(128, 128, 128)), seed=Seed(11))


@functools.cache
def table(model: FlowModel, count: int = FINE) -> Quadrature:
    """The density of the network's own ODE on ``count``^2 nodes."""
    axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, count, dtype=torch.float64)
    log = Likelihood(model)
    return Quadrature.of([axis, axis], lambda x: log.value(x.float()).double())


@dataclass(frozen=True)
class Best:
    """The exact optimum on the grid.

    Attributes:
        before, value: the objective at the pre-trained density and at the optimum.
        kl: KL(optimum || pre-trained), nats.
        stationarity: of the iterate.
    """

    before: float
    value: float
    kl: float
    stationarity: float

    @property
    def gain(self) -> float:
        """What there is to be gained."""
        return self.value - self.before

    def gap(self, objective: float) -> float:
        """The part of the possible gain that was not made."""
        return (self.value - objective) / self.gain


def exact(objective: Objective, q: Quadrature, weight: float, num_iterations: int = 400) -> Best:
    """Mirror descent with exact steps and line search, from the pre-trained density; the better
    of the direct way and of the one by the rounded objectives, where there are any."""
    g = objective(q)
    ends = [ascend(way, q, weight, num_iterations) for way in ways(g, q)]
    last = max(ends, key=lambda iterate: iterate.objective.value)
    p = last.solution.model
    kl = float((p.probabilities * (p.table - q.table).flatten()).sum())
    return Best(g.value(q).value, last.objective.value, kl, last.stationarity)


def ascend(
    way: list[Functional], p: Quadrature, weight: float, num_iterations: int
) -> Iterate[Quadrature]:
    """The best iterate for the last of the objectives, each started where the one before ended."""
    rule = LineSearch(initial=min(1.0, 1 / weight), max_rate=1 / weight)
    for g in way:
        kept = list[Iterate[Quadrature]]()
        mirror_descent(
            g, p, GridSolver(), rule, density=lambda p, seed: p, context=Context(),
            form="successive", num_iterations=num_iterations, tolerance=1e-5,
            on_iterate=lambda k, iterate, kept=kept: kept.append(iterate),
        )  # fmt: skip
        if kept:
            best = max(kept, key=lambda iterate: iterate.objective.value)
            p = best.solution.model
    return best


def law(model: FlowModel, count: int, seed: int = 98) -> FlowDensity:
    """The law of a model's ODE: samples by Heun's method, log-density by ``Likelihood``."""
    return FlowDensity(
        model, sampler=ODE, num_samples=count, seed=Seed(seed), log=Likelihood(model)
    )


@dataclass(frozen=True)
class Reached:
    """What a tuned model reached: G and KL(tuned || pre-trained) in nats, on the same samples."""

    objective: Estimate
    kl: float


def reached(objective: Objective, tuned: FlowModel, model: FlowModel, count: int) -> Reached:
    """G of a tuned model: the utility and E[log p_tuned - log p_pre] on the same fresh samples."""
    prior, p = law(model, count), law(tuned, count, seed=99)
    return Reached(objective(prior).value(p), KL(prior).value(p).value)


def prior_of(model: FlowModel, seed: int) -> FlowDensity:
    """The pre-trained law as a plan sees it: samples of the training sampler.

    Args:
        model: the pre-trained model.
        seed: of the samples.
    """
    return FlowDensity(model, seed=Seed(12).child(seed))
