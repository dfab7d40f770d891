"""What the panels of ``rfm.py`` share: densities in the plane, networks, optima, measures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, radians, sin
from pathlib import Path

import torch
from torch import Tensor
from toys import Record

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.algorithms.lowerings import Merging
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.delta import MLP
from tiltflow.density import Bank, Quadrature
from tiltflow.errors import CheckpointError
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Heun
from tiltflow.matching import fit_flow
from tiltflow.operators import Circuit, Gate, Interpolation, Intersection, Prior, Union, circuit
from tiltflow.ratio import Likelihood
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler, calibrated
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.space import Euclidean
from tiltflow.training import Training

Pair = tuple[float, float]

HALF_WIDTH = 4.5
"""Of the square that the grids cover; at most 2e-4 of any density here is near its edge."""

NODES, FINE = 91, 451
"""Per axis: of the grid on which densities are compared, and of that which is sampled from."""

FRESH, COMPARED, BINS = 20_000, 2000, 30
"""Samples of the SDE, in that many bins per axis; and samples of the ODE for energy distances."""

ODE = Sampler(Heun(), 60)


# --- densities -----------------------------------------------------------------------------------


def arc(centre: Pair, radius: float, start: float, end: float) -> GaussianMixture:
    """Seven Gaussians of standard deviation 0.34 on an arc, from angle to angle in degrees."""
    angles = [radians(start + (end - start) * k / 6) for k in range(7)]
    means = [[centre[0] + radius * cos(t), centre[1] + radius * sin(t)] for t in angles]
    return GaussianMixture(means, 0.34)


def image(p: GaussianMixture, scale: Pair | Tensor, shift: Pair | Tensor) -> GaussianMixture:
    """The law of scale * x + shift, coordinate by coordinate."""
    s, m = (torch.as_tensor(each, dtype=torch.float64) for each in (scale, shift))
    return GaussianMixture(p.means * s + m, p.stds * s, p.weights)


SCALE, SHIFT = (0.75, 1.35), (2.85, -0.1)
"""c is the law of SCALE * x + SHIFT under a: an optimal map, as SCALE is positive."""

A_LAW = arc((-1.5, -0.9), 1.5, 10, 170)
LAWS: Mapping[str, GaussianMixture] = {
    "a": A_LAW,
    "b": arc((-1.5, 0.9), 1.5, 190, 350),
    "c": image(A_LAW, SCALE, SHIFT),
    "d": GaussianMixture(
        [[0.5, -1.1], [1.6, -0.3], [2.8, 0.5]], [[0.45, 0.4], [0.5, 0.45], [0.4, 0.45]],
        [0.35, 0.25, 0.4],
    ),
}  # fmt: skip
"""Of the pre-trained models."""


def axes(count: int) -> list[Tensor]:
    """A grid over the square."""
    return [torch.linspace(-HALF_WIDTH, HALF_WIDTH, count, dtype=torch.float64)] * 2


@functools.cache
def law_on_grid(name: str, count: int) -> Quadrature:
    """A pre-trained model's exact law."""
    return Quadrature.of(axes(count), LAWS[name].log)


# --- panels --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Panel:
    """A circuit over the laws.

    Args:
        name: key in the store.
        title: for pages.
        circuit: the expression.
        known: its optimum where the grid has no closed form for the gate.
    """

    name: str
    title: str
    circuit: Gate
    known: GaussianMixture | None = None

    @functools.cache  # noqa: B019 (panels live as long as the program)
    def exact(self, count: int = NODES) -> Quadrature:
        """The optimum on a grid."""
        if self.known is not None:
            return Quadrature.of(axes(count), self.known.log)
        return on_grid(self.circuit, {n: law_on_grid(n, count) for n in self.circuit.names})

    def sample(self, count: int, seed: Seed) -> Tensor:
        """Exact samples, (count, 2): of cells of the fine grid, and uniform within a cell."""
        if self.known is not None:
            return self.known.sample(count, seed).float()
        p, generator = self.exact(FINE), seed.generator()
        index = torch.multinomial(p.probabilities, count, replacement=True, generator=generator)
        cell = float(p.axes[0][1] - p.axes[0][0])
        within = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
        return (p.nodes[index] + cell * within).float()


def on_grid(node: Circuit, laws: Mapping[str, Quadrature]) -> Quadrature:
    """A circuit gate by gate on a grid."""
    if isinstance(node, Prior):
        return laws[node.name]
    assert isinstance(node, Gate)
    return node.exact([on_grid(part, laws) for part in node.parts])


def between(shares: Pair) -> GaussianMixture:
    """The W_2 barycentre of a and its image c: the image under the averaged map."""
    s, m = torch.tensor(SCALE).double(), torch.tensor(SHIFT).double()
    return image(A_LAW, shares[0] + shares[1] * s, shares[1] * m)


def moved(p: GaussianMixture, reward: Quadratic, total: float) -> GaussianMixture:
    """The reward-guided interpolation of a and c, from their barycentre p.

    Each point m of the barycentre goes to argmax_z f(z) - A |z - m|^2, for
    f = -sum_d h_d (z_d - c_d)^2 / 2 to z = (A m + h c / 2) / (A + h / 2). This is the optimum:
    over couplings of a and c the objective is E[max_z ...] - A w_1 w_2 E|x_1 - x_2|^2, whose part
    that depends on the coupling is 2 w_1 w_2 E[x_1 . M x_2] with M = A^2 / (A + h / 2) > 0 in each
    coordinate, largest under the monotone map of each coordinate, which is that of c.
    """
    slope, h = reward.natural()
    return image(p, total / (total + h / 2), (slope / 2) / (total + h / 2))


A, B, C, D = (Prior(name) for name in LAWS)
TILT = LinearReward([0.5, 0.8])
BEND = Quadratic([0.0, 1.0], [-0.6, 1.0])
HALVES = (0.5, 0.5)

PANELS = (
    Panel("and", "balanced intersection", A & B),
    Panel(
        "and-reward", "intersection with a reward",
        Intersection(A, B, weights=HALVES, reward=TILT),
    ),
    Panel("or", "balanced union", A | B),
    Panel("or-unbalanced", "unbalanced union", Union(A, C, weights=(0.2, 0.8))),
    Panel("between", "interpolation", Interpolation(A, C), between(HALVES)),
    Panel(
        "between-reward", "interpolation with a reward",
        Interpolation(A, C, weights=HALVES, reward=BEND), moved(between(HALVES), BEND, 1.0),
    ),
    Panel("circuit", "circuit", circuit("(a & b) | (c & d)")),
)  # fmt: skip


# --- networks ------------------------------------------------------------------------------------


HIDDEN = (128, 128, 128)
PRETRAINING = Training(num_updates=20_000, learning_rate=2e-3, ema=0.9995)
"""Of the given models: several times as many updates as a regression here has."""


def network(seed: int, quick: bool, hidden: tuple[int, ...] = HIDDEN) -> FlowModel:
    """An untrained velocity network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP((2,), (16, 16) if quick else hidden)
    return FlowModel(net, Linear(), Euclidean((2,)), predicts="velocity")


def shortened(training: Training, quick: bool) -> Training:
    """The same, or 20 updates for a smoke run."""
    return replace(training, num_updates=20) if quick else training


def fitted(
    name: str, law: GaussianMixture, model: FlowModel, home: Path, training: Training
) -> FlowModel:
    """A network, fitted to 100,000 exact samples of a law; kept in ``home``."""
    at, path = Seed(31).child(name), home / f"{name}.safetensors"
    try:
        model.net.load_state_dict(load_tensors(path, model.net.state_dict()))
    except CheckpointError:
        bank = Bank.equal(law.sample(100_000, at.child("bank")).float())
        fit_flow(model, bank, training, Context(at), batch_size=512)
        home.mkdir(parents=True, exist_ok=True)
        save_tensors(path, model.net.state_dict(), {"made_by": "experiments/rfm_plane.py"})
    return calibrated(freeze(model), seed=Seed(32).child(name))


def merging(quick: bool) -> Merging:
    """The defaults, but 2000 updates of a regression, 1000 of a control problem, and 30 steps of
    the ODE for densities of parts, and 2 rounds of transport where a reward needs several."""
    solver, given = AdjointMatching(), Merging(likelihood_steps=30, transports=2)
    updates = (20, 20) if quick else (2000, 1000)
    training = replace(given.training, num_updates=updates[0])
    solver = replace(solver, training=replace(solver.training, num_updates=updates[1]))
    given = replace(given, solver=solver, training=training)
    if quick:
        return replace(given, bank_size=500, chunk=250, likelihood_steps=4)
    return given


def trained(panel: Panel, start: FlowModel, seed: int, quick: bool) -> FlowModel:
    """A network fitted to exact samples of the optimum, as ``merge`` fits one to merged ones."""
    settings, at = merging(quick), Seed(36).child(panel.name, seed)
    model, bank = start.clone(), Bank.equal(panel.sample(settings.bank_size, at.child("bank")))
    fit_flow(model, bank, settings.training, Context(at), batch_size=settings.batch_size)
    return calibrated(freeze(model), seed=at.child("moments"))


# --- measures ------------------------------------------------------------------------------------


def law_of(model: FlowModel, quick: bool) -> tuple[Quadrature, float]:
    """The density of a model's ODE on the grid, normalised there, and its mass before that."""
    log = Likelihood(model, 5 if quick else 30)
    nodes = torch.cartesian_prod(*axes(NODES))
    values = log.value(nodes.float()).double()
    p = Quadrature(axes(NODES), values.reshape(NODES, NODES))
    return p, float(values.exp().sum()) * p.cell


def binned(x: Tensor) -> Tensor:
    """Share of the points (N, 2) in each bin of the square."""
    edges = torch.linspace(-HALF_WIDTH, HALF_WIDTH, BINS + 1, dtype=torch.float64)
    found = torch.histogramdd(x.double().clamp(-HALF_WIDTH, HALF_WIDTH), [edges, edges])
    return found.hist / len(x)


def bins_of(p: Quadrature) -> Tensor:
    """Mass of each bin of a law on the fine grid; a node on an edge is shared by both sides."""
    per, count = (FINE - 1) // BINS, len(p.axes[0])
    share = torch.zeros(BINS, count, dtype=torch.float64)
    for i in range(BINS):
        share[i, i * per : (i + 1) * per + 1] = 1.0
        share[i, [i * per, (i + 1) * per]] = 0.5
    mass = share @ p.probabilities.reshape(count, count) @ share.T
    return mass / mass.sum()


def mean_distance(x: Tensor, y: Tensor | None = None) -> float:
    """E|X - Y| over all pairs; within one sample, over pairs of different points."""
    other = x if y is None else y
    total = sum(float(torch.cdist(part, other).sum(dtype=torch.float64)) for part in x.split(1000))
    return total / (len(x) * (len(other) - (y is None)))


@functools.cache
def reference(panel: Panel, count: int) -> tuple[Tensor, float]:
    """Exact samples, and the mean distance between two of them."""
    y = panel.sample(count, Seed(34))
    return y, mean_distance(y)


def measured(panel: Panel, model: FlowModel, quick: bool) -> Record:
    """How far a model is from the optimum: by its density, by ODE samples, by SDE samples."""
    p, mass = law_of(model, quick)
    found: Record = {"tv": p.total_variation(panel.exact()), "mass": mass}
    count = 200 if quick else COMPARED
    x, (y, within) = ODE.sample(model, count, seed=Seed(33)), reference(panel, 2 * count)
    found["energy"] = 2 * mean_distance(x, y) - mean_distance(x) - within
    noisy = Sampler().sample(model, 500 if quick else FRESH, seed=Seed(35))
    found["tv_sde"] = binned_distance(panel, noisy)
    return found | {"picture": picture(p)}


def binned_distance(panel: Panel, x: Tensor) -> float:
    """Total variation between samples and the optimum, both in bins."""
    return float((binned(x) - bins_of(panel.exact(FINE))).abs().sum()) / 2


def picture(p: Quadrature) -> list[list[float]]:
    """A density at every second node, for figures."""
    rows: list[list[float]] = p.table.exp()[::2, ::2].tolist()
    return [[round(each, 3) for each in row] for row in rows]
