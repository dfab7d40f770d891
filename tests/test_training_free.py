"""Merging without training: laws of the samples against closed forms, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from oracles import axis
from tiltflow.algorithms.averaging import Disagreement
from tiltflow.algorithms.feynman_kac import FeynmanKac, _Cloud, _product
from tiltflow.algorithms.superposition import Superposition
from tiltflow.algorithms.training_free import Averaging, Chains, TrainingFree
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Quadrature
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral, Deterministic, EulerMaruyama, Heun, LinearKernel
from tiltflow.operators import Contrast, Interpolation, Intersection, Prior, Union
from tiltflow.potential import Differentiable, Potential
from tiltflow.rewards.points import Linear
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine
from tiltflow.schedule import Linear as LinearPath
from tiltflow.seed import Seed
from tiltflow.space import Euclidean
from tiltflow.types import Access

A, B, C = map(Prior, "abc")
LINE = axis(-8, 8, 3201)
SQUARE = Differentiable(lambda x: -0.5 * (x**2).flatten(1).sum(1))
WAVE = Differentiable(lambda x: (1.3 * x[:, 0]).sin())
SEED, EULER = Seed(7), EulerMaruyama()


def normal(mean: float, std: float, dimension: int = 1) -> FlowModel:
    return gaussian([mean] * dimension, std).flow(hidden=())


def known(mean: float, std: float, num_steps: int, dimension: int = 1) -> FlowModel:
    """A normal model that knows its posterior variance: its chain is exact at these steps."""
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    variance = (std * (1 - t)) ** 2 / ((std * t) ** 2 + (1 - t) ** 2)
    moments = tuple(t.tolist()), tuple(variance.tolist())
    return normal(mean, std, dimension).with_moments(moments)


def score(values: Tensor, exact: float) -> float:
    """z of the mean of independent values."""
    values = values.double()
    return abs(float(values.mean() - exact) / float(values.std() / math.sqrt(len(values))))


def share_score(hits: Tensor, share: float) -> float:
    return abs(float(hits.double().mean()) - share) / math.sqrt(share * (1 - share) / len(hits))


# --- unions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [3, 40])
def test_modes_of_a_union(num_steps: int) -> None:
    models = [known(-2.0, 0.5, num_steps), known(2.5, 0.6, num_steps)]
    gate = Union(A, B, weights=(0.6, 1.4))
    drawn = Superposition().draw(
        gate, models, 6000, seed=SEED, sampler=Sampler(num_steps=num_steps)
    )
    x = drawn.bank.points[:, 0]
    assert share_score(x < 0, 0.3) < 4.5
    for mode, mean, std in ((x[x < 0], -2.0, 0.5), (x[x > 0], 2.5, 0.6)):
        assert score(mode, mean) < 4.5
        assert score((mode - mean) ** 2, std**2) < 4.5
    assert drawn.stats["share/0"] == pytest.approx(float((x < 0).double().mean()), abs=1e-3)
    assert drawn.stats["certainty"] > 0.999
    assert drawn.stats["effective_size"] == pytest.approx(6000)


def test_two_modes_of_two_models() -> None:
    """The toy of SuperDiff: each of the four modes has a quarter, by symmetry at any step size."""
    pairs = [[[-2.0, y], [2.0, y]] for y in (2.0, -2.0)]
    models = [GaussianMixture(means, 0.4).flow(hidden=()) for means in pairs]
    for mean in (False, True):
        bank = Superposition(mean).sample(Union(A, B), models, 3000, seed=SEED)
        right, up = bank.points.T > 0
        for quarter in (right & up, right & ~up, ~right & up, ~right & ~up):
            assert share_score(quarter, 0.25) < 4.5


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dimension", [1, 2])
def test_the_posterior_is_that_of_the_end_point(mean: bool, dimension: int) -> None:
    """All paths share one noising process: of the path, only the last state tells."""
    shares, laws = (0.2, 0.5, 0.3), ((-1.0, 0.6), (0.5, 0.9), (1.0, 0.5))
    models = [known(*law, 5, dimension) for law in laws]
    x, kappa = Superposition(mean).traced(
        Union(A, B, C, weights=shares), models, 500, seed=SEED, sampler=Sampler(num_steps=5)
    )
    logs = torch.stack([gaussian([m] * dimension, s).log.value(x.double()) for m, s in laws], 1)
    exact = (torch.tensor(shares, dtype=torch.float64).log() + logs).softmax(1)
    assert torch.allclose(kappa, exact, atol=1e-5)


def test_the_mean_step_is_under_dispersed() -> None:
    """At five steps: the mixture's law is exact if a model is drawn, too narrow if averaged."""
    models, count = [known(-1.0, 0.6, 5), known(1.0, 0.6, 5)], 10_000
    exact = 1.0 + 0.36
    values = {}
    for mean in (False, True):
        bank = Superposition(mean).sample(
            Union(A, B), models, count, seed=SEED, sampler=Sampler(num_steps=5)
        )
        values[mean] = bank.points[:, 0] ** 2
        assert score(bank.points[:, 0], 0.0) < 4.5
    assert score(values[False], exact) < 4.5
    assert score(values[True], exact) > 9
    assert float(values[True].mean()) < exact
    fine = [known(-1.0, 0.6, 160), known(1.0, 0.6, 160)]
    bank = Superposition(mean=True).sample(
        Union(A, B), fine, count, seed=SEED, sampler=Sampler(num_steps=160)
    )
    closer = abs(float((bank.points**2).mean()) - exact)
    assert closer < 0.2 * abs(float(values[True].mean()) - exact)


def test_a_union_with_a_reward() -> None:
    """A pbar / (nu - f): E f against the closed form on a grid."""
    laws = ((-1.0, 0.8), (1.5, 0.5))
    gate = Union(A, B, weights=(0.1, 0.3), reward=WAVE)
    exact = gate.exact([Quadrature.of([LINE], gaussian([m], s).log) for m, s in laws])
    drawn = Superposition().draw(
        gate, [known(*law, 10) for law in laws], 8000, seed=SEED, sampler=Sampler(num_steps=10)
    )
    f, w = WAVE.value(drawn.bank.points).double(), drawn.bank.weights
    best, plain = float((exact.probabilities * WAVE.value(exact.nodes)).sum()), float(f.mean())
    # nu is of the same samples; its noise is of the order of the weighted mean's.
    error = float((w * (f - (w * f).sum())).square().sum().sqrt())
    assert abs(float((w * f).sum()) - best) < 4.5 * error < abs(best - plain)
    assert drawn.stats["effective_size"] < 7500


# --- intersections -------------------------------------------------------------------------------


def chains_product(
    stds: Sequence[float], shares: Sequence[float], kernel: LinearKernel, steps: int, tilt: float
) -> tuple[float, float]:
    """Variance and log Z of the product of the discretised chains of centred normal models, times
    exp(-tilt x^2 / 2): a scalar Gaussian measure pushed through, step by step."""
    times, path = torch.linspace(0, 1, steps + 1, dtype=torch.float64), LinearPath()
    variance, log_z = 1.0, 0.0
    for t, s in pairwise(times):
        c = kernel.coefficients(path, t[None], s[None])
        alpha, beta = float(path.alpha(t)), float(path.beta(t))
        ends = [alpha * std**2 / (alpha**2 * std**2 + beta**2) for std in stds]
        gains = [float(c.on_state) + float(c.on_endpoint) * end for end in ends]
        gain, noise = sum(w * g for w, g in zip(shares, gains, strict=True)), float(c.variance)
        if noise > 0:
            cost = sum(w * (g - gain) ** 2 for w, g in zip(shares, gains, strict=True)) / noise
            log_z -= 0.5 * math.log1p(cost * variance)
            variance /= 1 + cost * variance
        variance = gain**2 * variance + noise
    log_z -= 0.5 * math.log1p(tilt * variance)
    return variance / (1 + tilt * variance), log_z


def runs(
    method: FeynmanKac, gate: Intersection, models: Sequence[FlowModel], sampler: Sampler
) -> Tensor:
    """Of 16 independent runs: log Z, mean, mean square (of all coordinates), (16, 3)."""
    rows = []
    for i in range(16):
        drawn = method.draw(gate, models, 800, seed=SEED.child(i), sampler=sampler)
        x, w = drawn.bank.points.double(), drawn.bank.weights
        rows.append([drawn.stats["log_z"], float(w @ x.mean(1)), float(w @ (x**2).mean(1))])
    return torch.tensor(rows, dtype=torch.float64)


def check(rows: Tensor, log_z: float, mean: float, square: float) -> None:
    """Z and Z E[.] are estimated without bias."""
    z = (rows[:, 0] - log_z).exp()
    assert score(z, 1.0) < 4.5
    assert score(z * rows[:, 1], mean) < 4.5
    assert score(z * rows[:, 2], square) < 4.5


CHAINS = [
    ((1.0, 0.5), (0.5, 0.5), EULER, 40, 0.0, 0.5),
    ((1.0, 0.5), (0.5, 0.5), EULER, 40, 1.0, 0.5),
    ((1.0, 0.3), (0.3, 0.7), EulerMaruyama(final_noise=False), 10, 1.0, 1.0),
    ((1.0, 0.5, 2.0), (0.2, 0.3, 0.5), EULER, 20, 0.0, 0.9),
    ((1.0, 0.5, 2.0), (0.2, 0.3, 0.5), Ancestral(), 20, 1.0, 0.0),
]


@pytest.mark.parametrize(("stds", "shares", "kernel", "steps", "tilt", "threshold"), CHAINS)
def test_particles_have_the_law_of_the_product_of_chains(
    stds: tuple[float, ...], shares: tuple[float, ...], kernel: LinearKernel, steps: int,
    tilt: float, threshold: float,
) -> None:  # fmt: skip
    variance, log_z = chains_product(stds, shares, kernel, steps, tilt)
    gate = Intersection(
        *[Prior(f"p{i}") for i in range(len(stds))], weights=[2 * w for w in shares],
        reward=2 * tilt * SQUARE if tilt else None,
    )  # fmt: skip
    models = [normal(0.0, std) for std in stds]
    rows = runs(FeynmanKac(threshold), gate, models, Sampler(kernel, steps))
    check(rows, log_z, 0.0, variance)


def test_the_numbers_of_the_derivation() -> None:
    """N(0, 1) and N(0, 1/4) (methods, section 5.6): the product 0.40 and 0.286, not the average's
    0.46; log Z = -0.1116. At 40 steps of Euler-Maruyama."""
    variance, log_z = chains_product((1.0, 0.5), (0.5, 0.5), EULER, 40, 0.0)
    assert variance == pytest.approx(0.3990, abs=1e-4)
    assert log_z == pytest.approx(-0.1116, abs=0.01)
    assert chains_product((1.0, 0.5), (0.5, 0.5), EULER, 40, 1.0)[0] == pytest.approx(
        0.2857, abs=0.002
    )
    fine = chains_product((1.0, 0.5), (0.5, 0.5), EULER, 5000, 0.0)
    assert fine == pytest.approx((0.4, -0.1116), abs=1e-3)
    models = [normal(0.0, 1.0), normal(0.0, 0.5)]
    x = Averaging().sample(Intersection(A, B), models, 20_000, seed=SEED).points
    assert score(x**2, 0.4632) < 4.5
    assert score(x**2, variance) > 9


EXACT = [
    (((-1.0, 1.0), (1.5, 0.5)), (0.5, 0.5), 3, 1, 0.0),
    (((-1.0, 1.0), (1.5, 0.5)), (0.5, 0.5), 10, 1, 1.5),
    (((-0.5, 1.0), (1.0, 0.7)), (0.3, 0.7), 5, 2, -1.0),
    (((-1.0, 1.0), (0.5, 0.7), (1.5, 0.8)), (0.2, 0.3, 0.5), 10, 1, 0.0),
]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("laws", "shares", "steps", "dimension", "slope"), EXACT)
def test_exact_chains_give_the_geometric_mean(
    laws: tuple[tuple[float, float], ...], shares: tuple[float, ...], steps: int, dimension: int,
    slope: float, lookahead: bool,
) -> None:  # fmt: skip
    """Models whose steps have their own variances: no error of discretisation at all."""
    triples = [(w, m, s) for w, (m, s) in zip(shares, laws, strict=True)]
    precision = sum(w / s**2 for w, _, s in triples)
    pull = sum(w * m / s**2 for w, m, s in triples) + slope
    log_z = 0.5 * (pull**2 / precision + math.log(2 * math.pi / precision)) - 0.5 * sum(
        w * ((m / s) ** 2 + math.log(2 * math.pi * s**2)) for w, m, s in triples
    )
    gate = Intersection(
        *[Prior(f"p{i}") for i in range(len(laws))], weights=shares,
        reward=Linear(slope) if slope else None,
    )  # fmt: skip
    models = [known(*law, steps, dimension) for law in laws]
    rows = runs(FeynmanKac(0.8, lookahead=lookahead), gate, models, Sampler(num_steps=steps))
    mean = pull / precision
    check(rows, dimension * log_z, mean, mean**2 + 1 / precision)


def test_lookahead_saves_particles() -> None:
    """A reward of several nats: particles that foresee it keep more ancestors, and know Z."""
    models = [known(-1.0, 1.0, 20), known(1.0, 0.6, 20)]
    gate = Intersection(A, B, weights=(0.5, 0.5), reward=Linear(6.0))
    blind, seeing = (
        FeynmanKac(lookahead=look).draw(
            gate, models, 2000, seed=SEED, sampler=Sampler(num_steps=20)
        )
        for look in (False, True)
    )
    assert seeing.stats["effective_size"] > 20 * blind.stats["effective_size"]
    assert seeing.stats["effective_ancestors"] > 1.5 * blind.stats["effective_ancestors"]
    assert abs(seeing.stats["log_z"] - 11.555) < 4.5 * seeing.stats["log_z_error"] < 1.5


def test_the_error_of_log_z() -> None:
    """Over 40 runs of models far apart, the spread of log Z is the reported error."""
    models, gate = [known(-2.0, 1.0, 10), known(2.0, 0.4, 10)], Intersection(A, B)
    for threshold in (0.0, 0.5):
        stats = [
            FeynmanKac(threshold).draw(
                gate, models, 500, seed=SEED.child(i), sampler=Sampler(num_steps=10)
            ).stats
            for i in range(40)
        ]  # fmt: skip
        spread = float(torch.tensor([s["log_z"] for s in stats]).std())
        reported = float(torch.tensor([s["log_z_error"] for s in stats]).mean())
        assert spread / reported == pytest.approx(1, abs=4.5 / math.sqrt(80))


def test_weights_and_ancestors() -> None:
    models, gate, sampler = [normal(-2.0, 1.0), normal(2.0, 0.4)], Intersection(A, B), Sampler()
    never, always = (
        FeynmanKac(threshold).draw(gate, models, 1000, seed=SEED, sampler=sampler)
        for threshold in (0.0, 1.0)
    )
    assert never.stats["resamplings"] == 0
    assert never.stats["ancestors"] == 1000
    assert never.stats["effective_ancestors"] == pytest.approx(never.bank.effective_size)
    assert always.stats["resamplings"] >= 39
    assert always.stats["ancestors"] < 700
    assert always.stats["effective_ancestors"] <= always.stats["ancestors"]
    assert always.bank.effective_size > 990 > 2 * never.bank.effective_size
    for drawn in (never, always):
        assert float(drawn.bank.weights.sum()) == pytest.approx(1)
        assert drawn.stats["effective_size"] == pytest.approx(drawn.bank.effective_size)


def test_points_of_equal_weight() -> None:
    """The weighted points, each about as often as its weight says."""
    models, gate = [normal(-2.0, 1.0), normal(2.0, 0.4)], Intersection(A, B, reward=SQUARE)
    weighted, equal = (
        FeynmanKac(equal=flag).sample(gate, models, 1000, seed=SEED) for flag in (False, True)
    )
    assert torch.allclose(equal.weights, torch.full_like(equal.weights, 1e-3))
    copies = (equal.points[None, :, 0] == weighted.points[:, None, 0]).sum(1)
    assert int(copies.sum()) == 1000
    assert float((copies - 1000 * weighted.weights).abs().max()) <= 1 + 1e-9


def test_resampling_keeps_weights_on_average() -> None:
    """Copies of a particle: its weight times the count, rounded up or down, without bias."""
    weights = torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0], dtype=torch.float64)
    generator, copies = SEED.generator(), []
    for _ in range(2000):
        cloud = _Cloud(5, torch.device("cpu"))
        cloud.weight(weights.log())
        index = cloud.resample(generator)
        assert torch.equal(cloud.ancestors, index)
        copies.append(index.bincount(minlength=5).double())
        assert cloud.log_z == pytest.approx(-math.log(5))
    each = torch.stack(copies)
    assert bool(((each - 5 * weights).abs() < 1).all())
    for column, weight in zip(each.T[:4], weights[:4], strict=True):
        assert share_score(column - (5 * weight).floor(), float((5 * weight) % 1)) < 4.5


def test_a_model_with_itself() -> None:
    model = normal(0.5, 0.7)
    drawn = FeynmanKac().draw(Intersection(A, B, C), [model] * 3, 200, seed=SEED)
    assert drawn.stats["log_z"] == pytest.approx(0, abs=1e-6)
    assert torch.allclose(drawn.bank.weights, torch.full_like(drawn.bank.weights, 1 / 200))
    union = Union(A, B, C, weights=(0.2, 0.3, 0.5))
    x, kappa = Superposition().traced(union, [model] * 3, 200, seed=SEED)
    assert torch.allclose(kappa, torch.tensor([0.2, 0.3, 0.5]).double(), atol=1e-6)
    assert x.shape == (200, 1)


def test_costs_are_the_disagreement() -> None:
    """With one variance the weights are those of the one-shot control problem."""
    models, shares = (normal(-1.0, 1.0, 2), normal(1.0, 0.4, 2)), (0.3, 0.7)
    chains = Chains.of(models, Sampler(EULER, 10), "test")
    x = torch.randn(50, 2, generator=SEED.generator())
    for k in (0, 4, 9):
        t, s = (chains.times[j].float().expand(50) for j in (k, k + 1))
        w = torch.tensor(shares, dtype=torch.float64)
        mean, variance, cost = _product(chains, chains.means(x, k), w, k)
        reward = Disagreement(models, shares, EULER).value(x, t, s)
        assert torch.allclose(cost, -reward.double(), rtol=1e-4, atol=1e-6)
        assert variance == pytest.approx(float(chains.variances[0, k]))
        average = sum(
            w * EULER.transition(m, x, t, s).mean for w, m in zip(shares, models, strict=True)
        )
        assert torch.allclose(mean, torch.as_tensor(average), atol=1e-5)


# --- the interface -------------------------------------------------------------------------------

METHODS = [
    (Superposition(), Union(A, B)),
    (Superposition(mean=True), Union(A, B)),
    (FeynmanKac(), Intersection(A, B, reward=SQUARE)),
    (Averaging(), Intersection(A, B)),
]
BY_METHOD = pytest.mark.parametrize(
    ("method", "gate"), METHODS, ids=["superposition", "mean", "feynman_kac", "averaging"]
)


@BY_METHOD
def test_samples_are_a_function_of_the_seed(
    method: TrainingFree, gate: Intersection | Union
) -> None:
    models, sampler = [normal(-1.0, 0.5), normal(1.0, 0.8)], Sampler(num_steps=10)
    one, same, other = (
        method.sample(gate, models, 100, seed=Seed(i), sampler=sampler) for i in (1, 1, 2)
    )
    assert torch.equal(one.points, same.points)
    assert torch.equal(one.weights, same.weights)
    assert not torch.equal(one.points, other.points)


def test_batches_of_particles_are_one_population() -> None:
    models, gate = [normal(-1.0, 0.5), normal(1.0, 0.8)], Intersection(A, B)
    whole, parts = (
        FeynmanKac().sample(gate, models, 100, seed=SEED, sampler=Sampler(EULER, 10, size))
        for size in (4096, 33)
    )
    assert torch.allclose(whole.points, parts.points, atol=1e-5)
    points, kappa = Superposition().traced(
        Union(A, B), models, 100, seed=SEED, sampler=Sampler(EULER, 10, 33)
    )
    assert points.shape == (100, 1)
    assert torch.allclose(kappa.sum(1), torch.ones(100).double())


class Counting(nn.Module):
    """The end points of N(0, 1), counted."""

    seen = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen += len(x)
        alpha, beta = t[:, None], 1 - t[:, None]
        return alpha * x / (alpha**2 + beta**2)


@pytest.mark.parametrize(
    ("method", "gate", "kernel"),
    [*((*row, EULER) for row in METHODS), (Averaging(), Intersection(A, B), Heun())],
)
def test_evaluations(
    method: TrainingFree, gate: Intersection | Union, kernel: EulerMaruyama | Heun
) -> None:
    nets = [Counting(), Counting()]
    models = [FlowModel(n, LinearPath(), Euclidean((1,)), predicts="endpoint") for n in nets]
    sampler = Sampler(kernel, 7)
    method.sample(gate, models, 50, seed=SEED, sampler=sampler)
    assert sum(n.seen for n in nets) == 50 * method.evaluations_per_sample(models, sampler)
    assert method.evaluations_per_sample(models) == 80


@BY_METHOD
def test_other_gates_are_refused(method: TrainingFree, gate: Intersection | Union) -> None:
    models = [normal(0.0, 1.0), normal(0.0, 0.5)]
    advice = {Union: "Superposition", Intersection: "FeynmanKac"}
    others = (Union(A, B), Intersection(A, B), Contrast(A, B), Interpolation(A, B))
    for other in others:
        if type(other) is not type(gate):
            with pytest.raises(UnsupportedError, match=advice.get(type(other), "merge")):
                method.sample(other, models, 10, seed=SEED)
    with pytest.raises(ConfigError, match="2 parts, but 3 models"):
        method.sample(gate, [*models, models[0]], 10, seed=SEED)
    with pytest.raises(ConfigError, match="count=0"):
        method.sample(gate, models, 0, seed=SEED)
    with pytest.raises(ConfigError, match="2 parts, but 1 models"):
        Superposition().traced(Union(A, B), models[:1], 10, seed=SEED)
    with pytest.raises(ConfigError, match="one space"):
        method.sample(gate, [models[0], normal(0.0, 1.0, 2)], 10, seed=SEED)
    cond = FlowModel(
        nn.Identity(), models[0].schedule, models[0].space, predicts="endpoint",
        takes_cond=True,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="conditioned"):
        method.sample(gate, [models[0], cond], 10, seed=SEED)


@pytest.mark.parametrize("method", [Averaging(), FeynmanKac(), Superposition()])
def test_schedules_may_differ(method: TrainingFree) -> None:
    """The same law on another path is the same part: means and variances agree."""
    gate = (Union if isinstance(method, Superposition) else Intersection)(A, B)
    moments = []
    for schedule in (LinearPath(), Cosine()):
        models = [normal(-1.0, 1.0), gaussian([1.0], 0.5).flow(schedule, hidden=())]
        bank = method.sample(gate, models, 4000, seed=SEED)
        x, w = bank.points[:, 0].double(), bank.weights.double()
        mean = float((w * x).sum())
        moments.append((mean, float((w * (x - mean) ** 2).sum()), bank.effective_size))
    (m, v, n), (m2, v2, n2) = moments
    assert abs(m - m2) < 4.5 * math.sqrt(v / n + v2 / n2)
    assert abs(v - v2) < 4.5 * 2 * v * math.sqrt(1 / n + 1 / n2)


@pytest.mark.parametrize(("method", "gate"), METHODS[:3])
def test_kernels_that_do_not_fit(method: TrainingFree, gate: Intersection | Union) -> None:
    models = [normal(0.0, 1.0), known(0.0, 0.5, 10)]
    for kernel in (Deterministic(), Heun()):
        with pytest.raises(UnsupportedError, match="densities of the memoryless"):
            method.sample(gate, models, 10, seed=SEED, sampler=Sampler(kernel, 10))
    with pytest.raises(UnsupportedError, match="Calibrate all"):
        method.sample(gate, models, 10, seed=SEED)
    point = normal(0.0, 1.0).with_moments(((0.0, 1.0), (0.0, 0.0)))
    with pytest.raises(UnsupportedError, match="noiseless for one model"):
        method.sample(gate, [point, models[1]], 10, seed=SEED, sampler=Sampler(num_steps=10))


def test_steps_without_noise_tell_nothing() -> None:
    models, sampler = [normal(-2.0, 0.3), normal(2.0, 0.3)], Sampler(Ancestral(), 40)
    union = Union(A, B, weights=(0.3, 0.7))
    x, kappa = Superposition().traced(union, models, 2000, seed=SEED, sampler=sampler)
    assert share_score(x[:, 0] < 0, 0.3) < 4.5
    assert torch.allclose(kappa[:, 0], (x[:, 0] < 0).double(), atol=1e-3)


class NoValue(Potential):
    """A reward with a gradient only."""

    @property
    def offers(self) -> Access:
        return Access.GRAD


class Broken(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / 0


def test_rewards_and_models_that_fail() -> None:
    models = [normal(0.0, 1.0), normal(0.0, 0.5)]
    with pytest.raises(UnsupportedError, match="FeynmanKac"):
        Averaging().sample(Intersection(A, B, reward=SQUARE), models, 10, seed=SEED)
    for method, kind in ((FeynmanKac(), Intersection), (Superposition(), Union)):
        with pytest.raises(CapabilityError, match="needs VALUE"):
            method.sample(kind(A, B, reward=NoValue()), models, 10, seed=SEED)
        broken = FlowModel(Broken(), LinearPath(), Euclidean((1,)), predicts="endpoint")
        with pytest.raises(NonFiniteError, match="diverged"):
            method.sample(kind(A, B), [broken, broken], 10, seed=SEED)
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            FeynmanKac(threshold)
