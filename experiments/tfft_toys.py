"""What the experiments of Tail-aware Flow Fine-Tuning share: cases, exact optima, measures."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from toys import ROOT, Exact, Record, best_tail, kl

from tiltflow.algorithms import tail_aware
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.density import FlowDensity, Quadrature
from tiltflow.divergences import KL
from tiltflow.flow import FlowModel
from tiltflow.potential import Hinge, remembering
from tiltflow.problem import ControlProblem, Solution, Solver
from tiltflow.recorder import count_evaluations
from tiltflow.rewards.points import Linear
from tiltflow.sample import Sampler, calibrated
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, WeightedMatching
from tiltflow.types import Access
from tiltflow.utilities import LeftCVaR, RightCVaR

sys.path.insert(0, str(ROOT / "benchmarks"))

import mixture as mixture  # the network that the benchmarks tune
import planning as planning
from common import Settings

UPDATES = 4000
"""Of every training in the plane and on the line, unless an experiment says otherwise."""

COUNT = 5000
"""Samples of the ODE behind an objective; their log-densities are what costs."""

FRESH = 50_000
"""Samples behind a tail mass or a tail mean."""

X = Linear([1.0])
BINS = 70
"""Of the histograms of rewards."""

Axes = list[Tensor]


def adjoint_matching(quick: bool, updates: int = UPDATES, steps: int = 40) -> AdjointMatching:
    """The one solver of these experiments: the defaults, with numbers of updates and steps."""
    default = AdjointMatching()
    number = 20 if quick else updates
    training = replace(default.training, num_updates=number)
    return replace(default, training=training, sampler=Sampler(num_steps=steps))


def solver_named(name: str, updates: int, quick: bool) -> Solver[FlowModel]:
    """Defaults, with a number of updates."""
    if name == "adjoint":
        return adjoint_matching(quick, updates)
    default = WeightedMatching(num_samples=512 if quick else 4096)
    training = replace(default.training, num_updates=20 if quick else updates)
    return replace(default, training=training)


# --- cases ---------------------------------------------------------------------------------------


@functools.cache
def on_the_line(quick: bool) -> FlowModel:
    """N(0, 1) as an exact flow with a correction to train."""
    return _exact_flow(gaussian([0.0]))


THREE = GaussianMixture([[-2.0], [0.5], [2.5]], [0.5, 0.7, 0.4], [0.35, 0.4, 0.25])


@functools.cache
def three_modes(quick: bool) -> FlowModel:
    """Three Gaussians on the line, likewise."""
    return _exact_flow(THREE)


def _exact_flow(law: GaussianMixture) -> FlowModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return calibrated(law.flow(), seed=Seed(11))


@functools.cache
def in_the_plane(quick: bool) -> FlowModel:
    """The fitted network of benchmarks/mixture.py."""
    return mixture.pretrained(Settings(quick=quick))


@functools.cache
def _law_of_plane(quick: bool) -> Quadrature:
    return mixture.table(in_the_plane(quick), 31 if quick else mixture.FINE)


def _line(law: GaussianMixture, low: float, high: float) -> Callable[[bool], Quadrature]:
    @functools.cache
    def on_grid(quick: bool) -> Quadrature:
        axis = torch.linspace(low, high, 301 if quick else 4001, dtype=torch.float64)
        return Quadrature.of([axis], law.log)

    return on_grid


@dataclass(frozen=True)
class Case:
    """A tail of a reward, the weight of the KL, and a pre-trained model.

    Args:
        name: key in the stores.
        title: for pages.
        model: the pre-trained model; a smoke run may have a poor one.
        law: its density on a grid.
        utility: the tail.
        weight: of the KL.
        steps: time steps of the sampler. A hinge is steep, and 40 steps smear it out.
    """

    name: str
    title: str
    model: Callable[[bool], FlowModel]
    law: Callable[[bool], Quadrature]
    utility: LeftCVaR | RightCVaR
    weight: float
    steps: int = 40

    @property
    def side(self) -> Literal["above", "below"]:
        """Of the threshold on which the tail is."""
        return "above" if isinstance(self.utility, RightCVaR) else "below"

    def best(self, quick: bool) -> Exact:
        """The exact optimum on the grid."""
        return best_tail(
            self.law(quick), self.utility.reward, self.utility.mass, self.side, self.weight
        )

    def hinge(self, threshold: float) -> Hinge:
        """The pseudo-reward at a threshold."""
        return Hinge(self.utility.reward, threshold, 1 / self.utility.mass, self.side)

    def prior(self, quick: bool, seed: int) -> FlowDensity:
        """The pre-trained law as stage 1 sees it: samples of the training sampler."""
        sampler = Sampler(num_steps=self.steps)
        return FlowDensity(self.model(quick), sampler=sampler, seed=Seed(12).child(seed))


GAUSSIAN = (on_the_line, _line(gaussian([0.0]), -8.0, 16.0))
MODES = (three_modes, _line(THREE, -6.0, 9.0))
PLANE = (in_the_plane, _law_of_plane)

R = mixture.REWARD
CASES = (
    Case("gauss-left-2", "N(0, 1), left 0.2, w = 1", *GAUSSIAN, LeftCVaR(X, 0.2), 1.0, 80),
    Case("gauss-right-9", "N(0, 1), right 0.9, w = 10", *GAUSSIAN, RightCVaR(X, 0.9), 10.0, 80),
    Case("modes-left-2", "three modes, left 0.2, w = 1", *MODES, LeftCVaR(X, 0.2), 1.0, 80),
    Case("modes-right-8", "three modes, right 0.8, w = 2", *MODES, RightCVaR(X, 0.8), 2.0, 80),
    Case("plane-left-2", "the plane, left 0.2, w = 2", *PLANE, LeftCVaR(R, 0.2), 2.0, 80),
    Case("plane-right-8", "the plane, right 0.8, w = 2", *PLANE, RightCVaR(R, 0.8), 2.0, 80),
    Case("plane-left-1", "the plane, left 0.1, w = 2", *PLANE, LeftCVaR(R, 0.1), 2.0, 80),
    Case("plane-right-9", "the plane, right 0.9, w = 4", *PLANE, RightCVaR(R, 0.9), 4.0, 80),
)


# --- measures ------------------------------------------------------------------------------------


def on_grid(case: Case, p: Quadrature, quick: bool) -> Record:
    """Objective, tail mean and KL of a law on the grid, exactly."""
    tail, distance = case.utility.value(p).value, kl(p, case.law(quick))
    return {"objective": tail - case.weight * distance, "tail": tail, "kl": distance}


def exact(case: Case, quick: bool) -> Record:
    """The optimum, its threshold, and what there is to be gained."""
    best, q = case.best(quick), case.law(quick)
    found = on_grid(case, best.p, quick)
    return found | {
        "objective": best.objective,
        "before": on_grid(case, q, quick)["objective"],
        "threshold": best.threshold,
        "laws": histograms(case, best.p, quick),
    }


def histograms(case: Case, p: Quadrature, quick: bool) -> dict[str, list[float]]:
    """Law of the reward before and at the optimum, and the edges of the bins."""
    v = case.utility.reward.value(p.nodes).double()
    inside = v[(p.probabilities > 1e-5) | (case.law(quick).probabilities > 1e-5)]
    edges = torch.linspace(float(inside.min()), float(inside.max()), BINS + 1).double()
    found = {"edges": edges.tolist()}
    for name, law in (("before", case.law(quick)), ("optimum", p)):
        found[name] = histogram(v, edges, law.probabilities)
    return found


def histogram(values: Tensor, edges: Tensor, weights: Tensor | None = None) -> list[float]:
    """Mass of each bin."""
    w = torch.full((len(values),), 1 / len(values)).double() if weights is None else weights
    mass, _ = torch.histogram(values.double(), edges, weight=w)
    return [round(each, 6) for each in mass.tolist()]


def looked(case: Case, tuned: FlowModel, quick: bool) -> Record:
    """Objective, tail mean and KL of the law of a tuned model's ODE, on the same samples, with
    log-densities by ``Likelihood``."""
    count = 500 if quick else COUNT
    count = max(count, case.utility.samples_needed)
    prior, p = mixture.law(case.model(quick), count), mixture.law(tuned, count, seed=99)
    distance = KL(prior)
    objective = case.utility - case.weight * distance
    with remembering(p.bank.points):
        g, tail, far = (each.value(p) for each in (objective, case.utility, distance))
    named = {"objective": g, "tail": tail, "kl": far}
    errors = {f"{name}_error": each.standard_error for name, each in named.items()}
    return {name: each.value for name, each in named.items()} | errors


def tail_masses(case: Case, tuned: FlowModel, threshold: float, quick: bool) -> Record:
    """P(r beyond the threshold) of fresh samples of the training sampler and of the ODE."""
    found: Record = {}
    for name, sampler in (("sampler", Sampler(num_steps=case.steps)), ("ode", mixture.ODE)):
        x = sampler.sample(tuned, 1000 if quick else FRESH, seed=Seed(97))
        share = case.hinge(threshold).active(x).double()
        mass = float(share.mean())
        found |= {f"mass_{name}": mass, f"mass_{name}_error": (mass * (1 - mass) / len(x)) ** 0.5}
        found[f"rewards_{name}"] = case.utility.reward.value(x).double()
    return found


def run(
    case: Case,
    solver: Solver[FlowModel],
    seed: int,
    quick: bool,
    anyway: bool = False,
    **options: Any,
) -> Solution[FlowModel]:
    """Tail-aware fine-tuning of a case."""
    return tail_aware(
        case.utility, case.model(quick), solver, weight=case.weight,
        prior=case.prior(quick, seed), context=Context(Seed(seed)),
        bank_size=2000 if quick else 10_000, anyway=anyway or quick, **options,
    )  # fmt: skip


# --- cost ----------------------------------------------------------------------------------------


@dataclass
class Counted:
    """A solver that knows how many evaluations were made inside it.

    Args:
        solver: the solver.
        counter: evaluations so far.
    """

    solver: Solver[FlowModel]
    counter: list[int]
    inside: int = 0

    @property
    def needs(self) -> Access:
        """What the solver needs."""
        return self.solver.needs

    def solve(
        self, problem: ControlProblem[FlowModel], context: Context, *,
        init: FlowModel | None = None,
    ) -> Solution[FlowModel]:  # fmt: skip
        """The solver's solution."""
        before = self.counter[0]
        solution = self.solver.solve(problem, context, init=init)
        self.inside += self.counter[0] - before
        return solution


def counting(model: FlowModel) -> tuple[FlowModel, list[int]]:
    """A copy of a model whose networks count their evaluations, points times forward passes."""
    copy, counter = model.clone(), [0]
    parts: Sequence[Any] = (copy.net, copy.trainable)
    for part in {id(each): each for each in parts}.values():
        count_evaluations(part, counter)
    return copy, counter
