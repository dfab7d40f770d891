"""Circuits of models as one model: each lowering against its closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tiltflow.algorithms import averaged, merge
from tiltflow.algorithms.averaging import Disagreement
from tiltflow.algorithms.lowerings import (
    LOWERINGS,
    Descent,
    Job,
    Keeper,
    Lowered,
    Lowering,
    Merging,
    regression,
    untrained,
)
from tiltflow.algorithms.lowerings.control import ScoreGap
from tiltflow.algorithms.merging import chosen_lowerings
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
from tiltflow.problem import ControlProblem, Solution
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine, Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.space import Euclidean
from tiltflow.training import Training
from tiltflow.types import Access, Cond

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

    def note(bank: Bank, job: Job) -> Lowered:
        seen.append(bank)
        return Lowered(job.start, job.lowering, {})

    monkeypatch.setattr(regression, "_fitted", note)
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


def test_particles_of_an_intersection(banks: list[Bank]) -> None:
    models = {"a": normal(0, 1), "b": normal(0, 0.5)}
    square = Differentiable(lambda x: -(x[:, 0] ** 2))
    for gate, exact in ((A & B, 0.4), ((A & B).guided(square), 2 / 7)):
        out = merge(
            gate, models, context=Context(), settings=settings(1, bank_size=4000),
            lowerings={Intersection: "particles"},
        )  # fmt: skip
        _, variance, _ = mean_and_variance(banks[-1])
        stats = next(iter(out.gates.values())).stats
        # Steps of finite size cost a little beside the error of the sample.
        assert abs(variance - exact) < 4.5 * exact * math.sqrt(2 / stats["ancestors"]) + 0.01
        if gate.reward is None:
            assert stats["apart"] == pytest.approx(0.5 * math.log(1.25), abs=0.03)


def test_log_densities_by_random_signs(banks: list[Bank]) -> None:
    """In one dimension one sign is exact."""
    models, found = [normal(0, 1), normal(0, 0.5)], []
    for trace in ("exact", "hutchinson"):
        given = replace(settings(1, bank_size=500), trace=trace)
        merge(
            A & B, dict(zip("ab", models, strict=True)), context=Context(), settings=given,
            lowerings={Intersection: "weighted"},
        )  # fmt: skip
        found.append(banks[-1].weights)
    assert torch.allclose(found[0], found[1], rtol=1e-4)
    with pytest.raises(ConfigError, match="trace"):
        Merging(trace="none")  # type: ignore[arg-type]


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


class Notes(Keeper):
    """Knows some gates, and the solves that it was told of."""

    def __init__(self, known: dict[str, Lowered]) -> None:
        self.known, self.later = known, list[str]()
        self.jobs: list[Job] = []
        self.solves: dict[int, Solution[FlowModel]] = {}

    def gate(self, key: str, job: Job) -> Lowered | None:
        return self.known.get(key)

    def made(self, key: str, job: Job, lowered: Lowered) -> None:
        self.later.append(key)
        self.jobs.append(job)

    def solve(self, job: Job, number: int) -> Solution[FlowModel] | None:
        return self.solves.get(number)

    def solved(self, job: Job, number: int, solution: Solution[FlowModel]) -> None:
        self.solves[number] = solution


def test_gates_are_made_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def fake(job: Job) -> Lowered:
        seen.append((str(job.gate), len(job.models)))
        return Lowered(job.models[0], "fake", {"address": float(job.context.seed.path[-1])})

    for kind in LOWERINGS:
        monkeypatch.setitem(LOWERINGS, kind, {"fake": Lowering(fake, Access.NONE)})
    models = {name: normal(i, 1) for i, name in enumerate("abc")}
    out = merge("(a & b) | interpolation(a & b, c)", models, context=Context())
    assert seen == [
        ("a & b", 2), ("interpolation(a & b, c)", 2), ("(a & b) | interpolation(a & b, c)", 2)
    ]  # fmt: skip
    assert [g.stats["address"] for g in out.gates.values()] == [0, 1, 2]
    assert out.model.net is models["a"].net
    assert merge("b", models, context=Context()).model.net is models["b"].net
    reward = Differentiable(lambda x: x[:, 0])
    both = Union(A & B, (A & B).guided(reward))
    made = merge(both, models, context=Context()).gates
    assert len(made) == 3
    seen.clear()
    notes = Notes(dict(list(made.items())[:2]))
    again = merge(both, models, context=Context(), keeper=notes)
    assert again.gates == made
    assert (notes.later, len(seen)) == ([list(made)[2]], 1)


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
    with pytest.raises(UnsupportedError, match="transported: it needs VALUE and GRAD"):
        merge(box, models, context=Context())
    chosen = {Interpolation: "transported"}
    with pytest.raises(UnsupportedError, match="W_2"):
        merge(Interpolation(A, B, power=1), models, context=Context(), lowerings=chosen)
    net = FlowModel(
        torch.nn.Identity(), models["a"].schedule, models["a"].space, predicts="endpoint",
        takes_cond=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="conditions"):
        merge("a & b", {"a": net, "b": models["b"]}, context=Context())
    with pytest.raises(ConfigError, match="start"):
        merge("b & a", {"a": net, "b": models["b"]}, context=Context(), conditions=Halves())
    with pytest.raises(UnsupportedError, match="conditions"):
        merge("interpolation(a, b)", {"a": net, "b": net}, context=Context(), conditions=Halves())
    plane = gaussian([0.0, 0.0]).flow(hidden=(8,))
    with pytest.raises(ConfigError, match="space"):
        merge("a & b", {"a": normal(0, 1), "b": plane}, context=Context())
    for wrong in ({"rate": 2.0}, {"num_iterations": 0}, {"until": 1.0}, {"score_time": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Descent(**wrong)  # type: ignore[arg-type]


def test_the_lowering_is_the_first_that_fits() -> None:
    box, slope = BlackBox(lambda x: x[:, 0]), Differentiable(lambda x: x[:, 0])
    gates = ((A & B).guided(slope), (A & B).guided(box), Interpolation(A, B, power=1))
    found = [chosen_lowerings(gate, {})[0][1] for gate in gates]
    assert found == ["one_shot", "weighted", "terminal"]


@pytest.mark.parametrize("lowering", ["one_shot", "weighted", "trajectory", "terminal"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_merge_goes_on(lowering: str, whole: bool) -> None:
    """A gate can be loaded again; from what was solved of it, the same gate is made."""
    models = {"a": normal(0, 1), "b": normal(0, 0.5)}
    if whole:
        models = {
            name: FlowModel(MLP((1,), (8,)), Linear(), Euclidean((1,)), predicts="velocity")
            for name in models
        }
    solver = replace(AdjointMatching(), num_trajectories=8, num_evaluate=8)
    solver = replace(solver, training=replace(solver.training, num_updates=2))
    given = replace(settings(2, bank_size=64), solver=solver, descent=Descent(num_iterations=2))
    chosen, notes = {Intersection: lowering}, Notes({})

    def made() -> FlowModel:
        return merge(
            "a & b", models, context=Context(), settings=given, lowerings=chosen, keeper=notes
        ).model

    first, x = made(), torch.randn(4, 1)
    assert len(notes.solves) == {"weighted": 0, "one_shot": 1}.get(lowering, 2)
    again = untrained(notes.jobs[0])
    again.trainable.load_state_dict(first.trainable.state_dict())
    assert torch.equal(again.endpoint(x, 0.5), first.endpoint(x, 0.5))
    if lowering != "weighted":  # after a kill in the middle
        notes.solves = {0: notes.solves[0]}
        assert torch.equal(made().endpoint(x, 0.5), first.endpoint(x, 0.5))


class Halves:
    """Labels 0 and 1, in turn."""

    def draw(self, count: int, seed: Seed) -> Cond:
        return {"label": torch.arange(count) % 2}


class Labelled(torch.nn.Module):
    """End points of N(mean + 4 label, std^2)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, std**2

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mean = self.mean + 4 * torch.as_tensor(cond["label"]).to(x)[:, None]
        t = t[:, None]
        gain = t * self.variance / (t**2 * self.variance + (1 - t) ** 2)
        return mean + gain * (x - t * mean)

    def flow(self) -> FlowModel:
        return FlowModel(self, Linear(), Euclidean((1,)), predicts="endpoint", takes_cond=True)


def test_each_condition_is_merged_by_itself(banks: list[Bank]) -> None:
    """Of N(4c, 1) and N(2 + 4c, 1): N(1 + 4c, 1), with as much mass for every c as drawn."""
    models = {"a": Labelled(0, 1).flow(), "b": Labelled(2, 1).flow()}
    given = replace(settings(1, bank_size=8000), sampler=Sampler(Heun(), 40))
    merge(
        "a & b", models, context=Context(), settings=given,
        lowerings={Intersection: "weighted"}, conditions=Halves(),
    )  # fmt: skip
    bank = banks[-1]
    assert bank.cond is not None
    label, x = torch.as_tensor(bank.cond["label"]), bank.points[:, 0].double()
    for c in (0, 1):
        w = bank.weights[label == c]
        assert float(w.sum()) == pytest.approx(0.5, abs=1e-3)
        mean = float((w * x[label == c]).sum() / w.sum())
        assert mean == pytest.approx(1 + 4 * c, abs=0.06)
    f = Differentiable(lambda x: (x[:, 0] - 4).tanh())
    union = Union(A, B, reward=f)
    merge(union, models, context=Context(), settings=given, conditions=Halves())
    bank = banks[-1]
    assert [float(bank.weights[label == c].sum()) for c in (0, 1)] == pytest.approx([0.5, 0.5])


def test_conditions_that_are_too_many(banks: list[Bank]) -> None:
    class Own:
        def draw(self, count: int, seed: Seed) -> Cond:
            return {"label": torch.arange(count)}

    models = {"a": Labelled(0, 1).flow(), "b": Labelled(2, 1).flow()}
    with pytest.raises(UnsupportedError, match="normaliser"):
        merge(
            "a & b", models, context=Context(), settings=settings(1, bank_size=100),
            lowerings={Intersection: "weighted"}, conditions=Own(),
        )  # fmt: skip


def test_schedules_may_differ(banks: list[Bank]) -> None:
    """The Gaussians of methods 5.6, one on a cosine path: variance 0.4."""
    cosine = gaussian([0.0], 0.5).flow(Cosine(), hidden=(8,))
    bank = merged_bank(banks, A & B, [normal(0, 1), cosine], 4000)
    _, variance, n = mean_and_variance(bank)
    assert abs(variance - 0.4) < 4.5 * 0.4 * math.sqrt(2 / n) + 0.01


# --- mirror descent ------------------------------------------------------------------------------


def terminal_gradient(gate: Gate, seen: list[ControlProblem[FlowModel]]) -> Tensor:
    """Gradient of the first control problem at some points."""

    @dataclass(frozen=True)
    class Spy:
        needs: ClassVar[Access] = Access.GRAD

        def solve(
            self, problem: ControlProblem[FlowModel], context: Context, *,
            init: FlowModel | None = None,
        ) -> Solution[FlowModel]:  # fmt: skip
            seen.append(problem)
            return Solution(problem.reference)

    models = {"a": normal(-1, 0.8), "b": normal(1.5, 0.5)}
    one = Descent(num_iterations=1, num_samples=1000)
    given = replace(Merging(), solver=Spy(), descent=one)  # type: ignore[arg-type]
    merge(gate, models, context=Context(), settings=given, lowerings={type(gate): "terminal"})
    return seen[-1].terminal.grad(torch.tensor([[-1.0], [0.5], [2.0]]))[:, 0]


def test_terminal_gradient_of_an_intersection() -> None:
    """gamma = 1: f' / A + sum_i w_i s_i - s_start, scores of data with a little noise."""
    f = Differentiable(lambda x: x[:, 0] ** 2)
    gate = Intersection(A, B, weights=(0.3, 0.9), reward=f)
    found = terminal_gradient(gate, [])
    x, t = torch.tensor([-1.0, 0.5, 2.0]), 0.99
    noise = ((1 - t) / t) ** 2
    a, b = (-(x - m) / (s**2 + noise) for m, s in ((-1, 0.8), (1.5, 0.5)))
    exact = 2 * x / 1.2 + 0.25 * a + 0.75 * b - a
    assert torch.allclose(found, exact, atol=1e-3, rtol=1e-3)


def test_terminal_gradient_of_a_contrast() -> None:
    """One exact step: the odds, plus f / A."""
    found = terminal_gradient(A - B, [])
    x = torch.tensor([-1.0, 0.5, 2.0]).double()

    def log(x: Tensor, m: float, s: float) -> Tensor:
        return -((x - m) ** 2) / (2 * s**2) - math.log(s)

    step = 1e-4
    values = [
        -torch.nn.functional.softplus(log(y, 1.5, 0.5) - log(y, -1, 0.8))
        for y in (x - step, x + step)
    ]
    assert torch.allclose(found.double(), (values[1] - values[0]) / (2 * step), atol=0.1, rtol=0.1)


def test_terminal_steps_of_other_gates_go_the_right_way() -> None:
    """From p_1 at -1 towards p_2 at 1.5: the gradient points to the right of p_1's mode."""
    for gate in (Union(A, B), Interpolation(A, B), Interpolation(A, B, power=1)):
        assert float(terminal_gradient(gate, [])[1]) > 0


def test_the_gap_of_scores() -> None:
    models = tuple(normal(0, std) for std in (1.0, 0.5))
    gap = ScoreGap(models, (0.5, 0.5), models[0], lambda t: 2 * (t < 0.8))
    x, t = torch.randn(6, 1), torch.full((6,), 0.5)
    exact = 0.02 * 0.5 * (models[1].score(x, t) - models[0].score(x, t))
    assert torch.allclose(gap.grad(x, t, t + 0.01), exact, atol=1e-5)
    assert not bool(gap.grad(x, t + 0.4, t + 0.41).any())
    with pytest.raises(CapabilityError):
        gap.value(x, t, t)


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
@pytest.mark.parametrize("lowering", ["one_shot", "weighted", "terminal"])
def test_intersection_trained(lowering: str) -> None:
    """Variance 0.4 by SDE and ODE, in one training, and the overlap of the parts."""
    models = {"a": normal(0, 1), "b": normal(0, 0.5)}
    out = merge(
        "a & b", models, context=Context(),
        settings=settings(4000 if lowering == "weighted" else 1500),
        lowerings={Intersection: lowering},
    )  # fmt: skip
    for sampler in (Sampler(), ODE):
        assert float(drawn(out.model, 50_000, sampler).var()) == pytest.approx(0.4, abs=0.02)
    if lowering == "one_shot":
        apart = next(iter(out.gates.values())).stats["apart"]
        assert apart == pytest.approx(0.5 * math.log(1.25), abs=0.02)


@pytest.mark.slow
def test_intersection_of_learned_networks() -> None:
    """Two fitted networks, one tuned whole, and refitted: SDE and ODE have variance 0.4."""
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
    given = replace(settings(600), training=settings(3000).training)
    out = merge("a & b", models, context=Context(), settings=given)
    for sampler in (Sampler(), ODE):
        assert float(drawn(out.model, 50_000, sampler).var()) == pytest.approx(0.4, abs=0.04)
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
