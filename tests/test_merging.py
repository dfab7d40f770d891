"""Circuits of models as one model: each lowering against its closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltflow.algorithms import averaged, lowerings, merge
from tiltflow.algorithms.averaging import Disagreement
from tiltflow.algorithms.lowerings import LOWERINGS, Lowered, Merging
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.delta import MLP
from tiltflow.density import Bank
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral, EulerMaruyama, Heun
from tiltflow.matching import fit_flow
from tiltflow.operators import Gate, Interpolation, Intersection, Prior, Union
from tiltflow.potential import BlackBox, Differentiable
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training

A, B = Prior("a"), Prior("b")
ODE = Sampler(Heun(), 60)


def normal(mean: float, std: float, hidden: tuple[int, ...] = (32, 32)) -> FlowModel:
    torch.manual_seed(0)
    return gaussian([mean], std).flow(hidden=hidden)


def settings(updates: int, **others: int) -> Merging:
    solver = AdjointMatching()
    solver = replace(solver, training=replace(solver.training, num_updates=updates))
    training = Training(num_updates=updates, learning_rate=2e-3, ema=0.99)
    return Merging(solver=solver, training=training, **others)  # type: ignore[arg-type]


def drawn(model: FlowModel, count: int = 20_000, sampler: Sampler = ODE) -> Tensor:
    return sampler.sample(model, count, seed=Seed(9))[:, 0].double()


# --- the average, and what it lacks --------------------------------------------------------------


def test_the_average_is_not_the_geometric_mean() -> None:
    """Methods, section 5.6: variance 0.4621 (SDE) and 0.5 (ODE) where the mean has 0.4."""
    model = averaged([normal(0, 1), normal(0, 0.5)], (0.5, 0.5))
    n = 10_000
    for sampler, exact in ((Sampler(EulerMaruyama(), 80), 0.4628), (Sampler(Heun(), 60), 0.5)):
        x = drawn(model, n, sampler)
        assert abs(float(x.var()) - exact) < 4.5 * exact * math.sqrt(2 / n) + 1e-3


def test_the_running_reward_makes_products_of_transitions_exact() -> None:
    """prod_i N(x'; m_i, v)^{w_i} = N(x'; mbar, v) exp(reward), at any x'."""
    models, shares = (normal(-1, 0.8), normal(1.5, 0.5), normal(0, 1)), (0.5, 0.3, 0.2)
    kernel, schedule = EulerMaruyama(), models[0].schedule
    reward = Disagreement(models, shares, kernel)
    x, other = torch.randn(50, 1), torch.randn(50, 1)
    t, s = torch.full((50,), 0.4), torch.full((50,), 0.425)
    c = kernel.coefficients(schedule, t, s)
    means = [c.on_state[:, None] * x + c.on_endpoint[:, None] * m.endpoint(x, t) for m in models]

    def log_normal(mean: Tensor) -> Tensor:
        return -((other - mean) ** 2)[:, 0] / (2 * c.variance)

    product = sum(w * log_normal(m) for w, m in zip(shares, means, strict=True))
    average = sum(w * m for w, m in zip(shares, means, strict=True))
    assert torch.allclose(
        torch.as_tensor(product), log_normal(torch.as_tensor(average)) + reward.value(x, t, s),
        atol=1e-3, rtol=1e-4,
    )  # fmt: skip
    step = 1e-2
    slope = (reward.value(x + step, t, s) - reward.value(x - step, t, s)) / (2 * step)
    assert torch.allclose(reward.grad(x, t, s)[:, 0], slope, atol=1e-3, rtol=1e-2)


def test_no_disagreement_without_noise_or_difference() -> None:
    model = normal(0, 1)
    reward = Disagreement((model, model), (0.5, 0.5), EulerMaruyama())
    x, t, s = torch.randn(5, 1), torch.full((5,), 0.3), torch.full((5,), 0.4)
    assert torch.allclose(reward.value(x, t, s), torch.zeros(5), atol=1e-9)


def test_steps_that_are_noiseless_up_to_rounding() -> None:
    """A cosine schedule does not quite reach zero noise in float32."""
    models = tuple(gaussian([m]).flow(Cosine(), hidden=(8,)) for m in (-1.0, 1.0))
    reward = Disagreement(models, (0.5, 0.5), Ancestral())
    x, t, s = torch.randn(5, 1), torch.full((5,), 0.95), torch.ones(5)
    assert reward.value(x, t, s).abs().max() < 1


# --- banks of merged samples ---------------------------------------------------------------------


@pytest.fixture
def banks(monkeypatch: pytest.MonkeyPatch) -> list[Bank]:
    """The banks that regressions would be made on, instead of the regressions."""
    seen: list[Bank] = []

    def note(
        bank: Bank, lowering: str, start: FlowModel, given: Merging, context: Context
    ) -> Lowered:
        seen.append(bank)
        return Lowered(start, lowering, {})

    monkeypatch.setattr(lowerings, "_fitted", note)
    return seen


def merged_bank(banks: list[Bank], gate: Gate, models: Sequence[FlowModel], size: int) -> Bank:
    named = dict(zip("ab", models, strict=True))
    chosen = {Intersection: "weighted"}
    merge(gate, named, context=Context(), settings=settings(1, bank_size=size), lowerings=chosen)
    return banks[-1]


def mean_and_variance(bank: Bank) -> tuple[float, float, float]:
    x, w = bank.points[:, 0].double(), bank.weights.double()
    mean = float((w * x).sum())
    return mean, float((w * (x - mean) ** 2).sum()), bank.effective_size


def test_bank_of_a_union(banks: list[Bank]) -> None:
    bank = merged_bank(banks, Union(A, B, weights=(1, 3)), [normal(-2, 0.6), normal(2, 0.6)], 4000)
    assert float((bank.points > 0).double().mean()) == pytest.approx(0.75, abs=0.002)


def test_bank_of_a_guided_union(banks: list[Bank]) -> None:
    """Weights A / (nu - f): E f under them is nu - A."""
    reward = Differentiable(lambda x: x[:, 0].tanh())
    gate = Union(A, B, weights=(0.5, 0.5), reward=reward)
    bank = merged_bank(banks, gate, [normal(-2, 0.6), normal(2, 0.6)], 4000)
    f, w = reward.value(bank.points).double(), bank.weights.double()
    nu = float((1.0 / (w * len(w)) + f).mean())
    assert float((w * f).sum()) == pytest.approx(nu - 1.0, abs=1e-3)
    assert float(w[bank.points[:, 0] > 0].sum()) > 0.6


def test_bank_of_an_intersection(banks: list[Bank]) -> None:
    """Variance 0.4 and, with -x^2 / 2, 0.2857; within 4.5 standard errors."""
    models = [normal(0, 1), normal(0, 0.5)]
    square = Differentiable(lambda x: -(x[:, 0] ** 2))
    for gate, exact in ((A & B, 0.4), ((A & B).guided(square), 2 / 7)):
        _, variance, effective = mean_and_variance(merged_bank(banks, gate, models, 4000))
        assert abs(variance - exact) < 4.5 * exact * math.sqrt(2 / effective) + 0.01


def test_points_of_an_interpolation(banks: list[Bank]) -> None:
    """Mean and standard deviation interpolate; chunks of finite samples smooth a little."""
    gate = Interpolation(A, B, weights=(0.3, 0.7))
    bank = merged_bank(banks, gate, [normal(-1, 0.8), normal(1.5, 0.5)], 4000)
    mean, variance, n = mean_and_variance(bank)
    assert abs(mean - 0.75) < 4.5 * 0.59 / math.sqrt(n) + 0.01
    assert abs(math.sqrt(variance) - 0.59) < 4.5 * 0.59 / math.sqrt(2 * n) + 0.01


def test_a_guided_interpolation_moves_by_half_the_gradient(banks: list[Bank]) -> None:
    """f = c x moves every point of the barycentre by c / (2 A)."""
    models = [normal(-1, 0.8), normal(1.5, 0.5)]
    plain = mean_and_variance(merged_bank(banks, Interpolation(A, B), models, 2000))
    slope = Differentiable(lambda x: 0.8 * x[:, 0])
    guided = Interpolation(A, B, reward=slope)
    moved = mean_and_variance(merged_bank(banks, guided, models, 2000))
    assert moved[0] - plain[0] == pytest.approx(0.8 / 4, abs=0.01)
    assert moved[1] == pytest.approx(plain[1], rel=0.03)


@pytest.mark.parametrize("k", [0.5, 4.0, 10.0])
def test_a_curved_reward_does_not_push_an_interpolation_apart(k: float, banks: list[Bank]) -> None:
    """f = -k x^2: every point of the barycentre times A / (A + k), here with A = 2."""
    models = [normal(-1, 0.8), normal(1.5, 0.5)]
    curved = Interpolation(A, B, reward=Differentiable(lambda x: -k * x[:, 0] ** 2))
    mean, variance, _ = mean_and_variance(merged_bank(banks, curved, models, 1000))
    shrunk = 2 / (2 + k)
    assert mean == pytest.approx(0.25 * shrunk, abs=0.03 * shrunk + 0.01)
    assert math.sqrt(variance) == pytest.approx(0.65 * shrunk, rel=0.06)


def test_an_interpolation_rewarded_by_a_network(banks: list[Bank]) -> None:
    net = torch.nn.Linear(1, 1)
    gate = Interpolation(A, B, reward=Differentiable(lambda x: net(x)[:, 0]))
    bank = merged_bank(banks, gate, [normal(-1, 0.8), normal(1.5, 0.5)], 200)
    assert bank.points.dtype == torch.float32


def test_bank_of_a_contrast(banks: list[Bank]) -> None:
    """p_1^2 / (p_1 + p_2) of N(0, 1) and N(1, 1): mass below 1/2 by quadrature."""
    bank = merged_bank(banks, A - B, [normal(0, 1), normal(1, 1)], 4000)
    x = torch.linspace(-8, 8, 4001).double()
    p, q = (-(x**2) / 2).exp(), (-((x - 1) ** 2) / 2).exp()
    density = p * p / (p + q)
    exact = float(density[x < 0.5].sum() / density.sum())
    share = float(bank.weights.double()[bank.points[:, 0] < 0.5].sum())
    assert abs(share - exact) < 4.5 * math.sqrt(exact * (1 - exact) / bank.effective_size) + 0.01


# --- whole circuits ------------------------------------------------------------------------------


def test_gates_are_made_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def fake(
        gate: Gate, models: Sequence[FlowModel], start: FlowModel, given: Merging, at: Context
    ) -> Lowered:
        seen.append((str(gate), len(models)))
        return Lowered(models[0], "fake", {"address": float(at.seed.path[-1])})

    for kind in LOWERINGS:
        monkeypatch.setitem(LOWERINGS, kind, {"fake": fake})
    models = {name: normal(i, 1) for i, name in enumerate("abc")}
    out = merge("(a & b) | interpolation(a & b, c)", models, context=Context())
    assert seen == [
        ("a & b", 2), ("interpolation(a & b, c)", 2), ("(a & b) | interpolation(a & b, c)", 2)
    ]  # fmt: skip
    assert [g.stats["address"] for g in out.gates.values()] == [0, 1, 2]
    assert out.model is models["a"]
    assert merge("b", models, context=Context()).model is models["b"]
    reward = Differentiable(lambda x: x[:, 0])
    both = Union(A & B, (A & B).guided(reward))
    assert len(merge(both, models, context=Context()).gates) == 3


def test_refusals() -> None:
    models = {"a": normal(0, 1), "b": normal(1, 1)}
    with pytest.raises(ConfigError, match="no model 'c'"):
        merge("a & c", models, context=Context())
    with pytest.raises(ConfigError, match="no model 'c'"):
        merge(A & Prior("c"), models, context=Context())
    with pytest.raises(ConfigError, match="no lowering 'magic'"):
        merge("a & b", models, context=Context(), lowerings={Intersection: "magic"})
    with pytest.raises(ConfigError, match="bank_size"):
        Merging(bank_size=0)
    with pytest.raises(ConfigError, match="by class"):
        merge("a & b", models, context=Context(), lowerings={"Intersection": "weighted"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="mapping"):
        merge("a & b", list(models.values()), context=Context())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gets none"):
        merge(
            Union(A, B, weights=(1, 1000)), models, context=Context(),
            settings=settings(1, bank_size=100),
        )  # fmt: skip
    box = Interpolation(A | B, B, reward=BlackBox(lambda x: x[:, 0]))
    with pytest.raises(CapabilityError, match="Interpolation"):
        merge(box, models, context=Context())
    net = FlowModel(
        torch.nn.Identity(), models["a"].schedule, models["a"].space, predicts="endpoint",
        takes_cond=True,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="conditions"):
        merge("a & b", {"a": net, "b": models["b"]}, context=Context())
    with pytest.raises(UnsupportedError, match="schedule"):
        merge("a & b", models, context=Context(), start=gaussian([0.0]).flow(Cosine()))
    plane = gaussian([0.0, 0.0]).flow(hidden=(8,))
    with pytest.raises(ConfigError, match="space"):
        merge("a & b", {"a": normal(0, 1), "b": plane}, context=Context())
    other = gaussian([0.0]).flow(Cosine(), hidden=(8,))
    with pytest.raises(UnsupportedError, match="schedule"):
        merge("a & b", {"a": normal(0, 1), "b": other}, context=Context())


def test_parts_that_hardly_meet(banks: list[Bank]) -> None:
    with pytest.warns(RuntimeWarning, match="overlap"):
        merged_bank(banks, A & B, [normal(-5, 0.5), normal(5, 0.5)], 500)


def test_a_union_trained() -> None:
    """Shares of the two modes, through the network."""
    models = {"a": normal(-2, 0.6), "b": normal(2, 0.6)}
    given = settings(400, bank_size=10_000)
    out = merge(Union(A, B, weights=(1, 3)), models, context=Context(), settings=given)
    x = drawn(out.model, 5000)
    assert float((x > 0).double().mean()) == pytest.approx(0.75, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["one_shot", "weighted"])
def test_intersection_trained(lowering: str) -> None:
    """Variance 0.4 by SDE and ODE, in one training, and the overlap of the parts."""
    models = {"a": normal(0, 1), "b": normal(0, 0.5)}
    out = merge(
        "a & b", models, context=Context(),
        settings=settings(1500 if lowering == "one_shot" else 4000),
        lowerings={Intersection: lowering},
    )  # fmt: skip
    for sampler in (Sampler(), ODE):
        assert float(drawn(out.model, 50_000, sampler).var()) == pytest.approx(0.4, abs=0.02)
    if lowering == "one_shot":
        apart = next(iter(out.gates.values())).stats["apart"]
        assert apart == pytest.approx(0.5 * math.log(1.25), abs=0.02)


@pytest.mark.slow
def test_intersection_of_learned_networks() -> None:
    """Two fitted networks, one tuned whole: the SDE has the variance 0.4 to a tenth."""
    models = {}
    for name, std in (("a", 1.0), ("b", 0.5)):
        torch.manual_seed(0)
        line = normal(0, std)
        models[name] = FlowModel(
            MLP((1,), (64, 64)), line.schedule, line.space, predicts="velocity"
        )
        bank = Bank.equal(gaussian([0.0], std).sample(50_000, Seed(1)).float())
        fitting = Training(num_updates=2500, learning_rate=2e-3, ema=0.999)
        fit_flow(models[name], bank, fitting, Context(Seed(2)), batch_size=512)
    out = merge("a & b", models, context=Context(), settings=settings(600))
    assert float(drawn(out.model, 50_000, Sampler()).var()) == pytest.approx(0.4, abs=0.04)
    assert not hasattr(out.model.net, "nets")  # one network, not an average of two


@pytest.mark.slow
def test_a_circuit_trained() -> None:
    """(a & b) | c: a normal of precision-weighted moments beside c, half each."""
    wide = (64, 64)
    models = {"a": normal(-2.5, 0.8, wide), "b": normal(-1, 0.8), "c": normal(3, 0.5)}
    given = replace(settings(1000), training=settings(4000).training)
    out = merge("(a & b) | c", models, context=Context(), settings=given)
    x = drawn(out.model, 20_000)
    left, right = x[x < 1], x[x >= 1]
    assert len(right) / len(x) == pytest.approx(0.5, abs=0.03)
    assert float(left.mean()) == pytest.approx(-1.75, abs=0.05)
    assert float(left.std()) == pytest.approx(0.8, abs=0.05)
    assert float(right.mean()) == pytest.approx(3, abs=0.05)


@pytest.mark.slow
def test_four_modes_from_two_models() -> None:
    """SuperDiff's public toy: two models with two modes each; every mode within 0.03 of 1/4."""
    torch.manual_seed(0)
    corners = torch.tensor([[-3.0, -3.0], [3.0, 3.0], [-3.0, 3.0], [3.0, -3.0]])
    models = {
        name: GaussianMixture(corners[i : i + 2], 0.5).flow(hidden=(64, 64))
        for name, i in (("a", 0), ("b", 2))
    }
    out = merge("a | b", models, context=Context(), settings=settings(3000))
    x = ODE.sample(out.model, 20_000, seed=Seed(4))
    nearest = torch.cdist(x, corners).argmin(1)
    shares = torch.bincount(nearest, minlength=4) / len(x)
    assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.03)
