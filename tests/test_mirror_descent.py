"""Outer loops on exact solvers: the algorithm itself is compared with formulas, no network."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from oracles import (
    ENTROPY_E50,
    ENTROPY_STDS,
    GAUSSIAN_PROBLEMS,
    LEFT_TAIL_OPTIMUM,
    RIGHT_TAIL_OPTIMUM,
    entropy_exponents,
    grid,
    moments,
    tail_dual,
)
from oracles.loops import Recorder, run
from tiltflow.algorithms import LineSearch, PathKLBound, mirror_descent
from tiltflow.algorithms.mirror_descent import stationarity
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.density import Bank, Density, Empirical, FlowDensity, Quadrature
from tiltflow.divergences import KL
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.potential import BlackBox, Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.rewards.points import Linear
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.solvers.exact import GaussianSolver, GridSolver
from tiltflow.types import Access, Cond
from tiltflow.utilities import Entropy, ExpectedReward, LeftCVaR, RightCVaR

FORMS = ("anchored", "successive")
forms = pytest.mark.parametrize("form", FORMS)
X = Linear(1.0)


def wide(q: GaussianMixture) -> Quadrature:
    return grid(q, -14, 15, 20_001)


# ----------------------------------------------------------------------------- closed forms


@forms
@pytest.mark.parametrize("name", GAUSSIAN_PROBLEMS)
def test_one_exact_step(name: str, form: str) -> None:
    """E x - KL/2 from N(.5, .7^2): N(1.48, .7^2). Entropy - KL/2: N(.5, 3 * .7^2)."""
    problem = GAUSSIAN_PROBLEMS[name]
    q = wide(problem.q)
    out, _ = run(problem.objective(q), q, GridSolver(), [problem.rate], form=form)
    mean, std = moments(out.model)
    assert mean == pytest.approx(problem.mean, abs=1e-9)
    assert std == pytest.approx(problem.std, abs=1e-7)
    exact, _ = run(
        problem.objective(problem.q), problem.q, GaussianSolver(), [problem.rate], form=form
    )
    assert float(exact.model.means) == pytest.approx(problem.mean, rel=1e-12)
    assert float(exact.model.stds) == pytest.approx(problem.std, rel=1e-12)


@forms
@pytest.mark.parametrize("rate", ENTROPY_STDS)
def test_entropy_iterates(rate: float, form: str) -> None:
    """Entropy - KL/2: p_k ~ q^{e_k}, also where g > 1 overshoots; grid 1e-6, Gaussians 1e-12."""
    q = gaussian([0.5], 0.7)
    table = wide(q)
    _, on_grid = run(Entropy() - 0.5 * KL(table), table, GridSolver(), [rate] * 4, form=form)
    _, exact = run(Entropy() - 0.5 * KL(q), q, GaussianSolver(), [rate] * 4, form=form)
    formula = [0.7 / math.sqrt(e) for e in entropy_exponents(0.5, rate, 4)]
    assert formula == pytest.approx(ENTROPY_STDS[rate], abs=6e-8)
    assert [moments(i.solution.model)[1] for i in on_grid] == pytest.approx(formula, abs=1e-6)
    assert [float(i.solution.model.stds) for i in exact] == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("weight", ENTROPY_E50)
def test_fifty_entropy_steps(weight: float) -> None:
    """e_50 at 1/rate = 10: .0051538 without anchor, .3335305 with weight 1/2; 1e-9."""
    q = gaussian([0.5], 0.7)
    objective = Entropy() - weight * KL(q) if weight else Entropy()
    out, _ = run(objective, q, GaussianSolver(), [0.1] * 50)
    exponent = 0.49 / float(out.model.stds) ** 2
    assert exponent == pytest.approx(entropy_exponents(weight, 0.1, 50)[-1], rel=1e-9)
    assert exponent == pytest.approx(ENTROPY_E50[weight], abs=6e-8)


def test_right_tail_by_small_steps() -> None:
    """RightCVaR(.8) - KL from N(.5, .7^2) at rate .05 reaches its dual value 2.194182 (1e-6)."""
    q = grid(gaussian([0.5], 0.7), -6, 9, 6001)
    dual = tail_dual(q, q.nodes[:, 0], 0.8, "right")
    assert dual == pytest.approx(RIGHT_TAIL_OPTIMUM, abs=1e-6)
    objective = RightCVaR(X, 0.8) - KL(q)
    out, _ = run(objective, q, GridSolver(), [0.05] * 300, form="successive")
    value = objective.value(out.model).value
    assert value == pytest.approx(dual, abs=1e-6)
    assert value <= dual + 1e-12


def test_right_tail_oscillates_at_large_steps() -> None:
    """At rate .3 the threshold moves too far each time: the value stays below and dips."""
    q = grid(gaussian([0.5], 0.7), -6, 9, 2001)
    _, its = run(RightCVaR(X, 0.8) - KL(q), q, GridSolver(), [0.3] * 120, form="successive")
    values = [i.objective.value for i in its]
    assert max(values) < RIGHT_TAIL_OPTIMUM
    assert sum(b < a for a, b in itertools.pairwise(values)) > 30
    assert values[-1] < RIGHT_TAIL_OPTIMUM - 0.01


def test_left_tail() -> None:
    """LeftCVaR(.2) - KL settles at .0065, within 1e-4 of its dual value .006543 and not above."""
    q = grid(gaussian([0.5], 0.7), -6, 7, 6001)
    dual = tail_dual(q, q.nodes[:, 0], 0.2, "left")
    assert dual == pytest.approx(LEFT_TAIL_OPTIMUM, abs=2e-6)
    objective = LeftCVaR(X, 0.2) - KL(q)
    out, _ = run(objective, q, GridSolver(), [0.1] * 150, form="successive")
    value = objective.value(out.model).value
    assert dual - 1e-4 < value <= dual + 1e-9


@forms
def test_linear_reward_on_a_mixture(form: str) -> None:
    """u_{k+1} = u_k + rate (1 - w u_k): each iterate is the mixture tilted by e^{u x}."""
    q = GaussianMixture([[-1.0], [1.5]], [[0.6], [0.4]], [0.3, 0.7])
    table = grid(q, -8, 12, 8001)
    _, its = run(
        ExpectedReward(X) - 0.5 * KL(table), table, GridSolver(), [0.7, 1.5, 0.2], form=form
    )
    u = 0.0
    for it in its:
        u += it.rate * (1 - 0.5 * u)
        exact, log_z = q.tilted(u)
        means = torch.linspace(-2, 4, 13, dtype=torch.float64)[:, None]
        torch.testing.assert_close(
            it.solution.model.log.value(means), exact.log.value(means), rtol=0, atol=2e-3
        )
        mean = float((exact.weights * exact.means[:, 0]).sum())
        assert moments(it.solution.model)[0] == pytest.approx(mean, abs=1e-8)
        # G = E x - w KL with KL = u E x - log Z.
        assert it.objective.value == pytest.approx(mean - 0.5 * (u * mean - log_z), abs=1e-8)
        assert it.objective.standard_error == 0


def test_forms_agree_when_solves_are_exact() -> None:
    """anchored = successive on a non-linear objective with moving thresholds: TV < 1e-12."""
    q = grid(gaussian([0.5], 0.7), -6, 9, 2001)
    objective = RightCVaR(X, 0.8) + 0.2 * Entropy() - KL(q)
    ends = [run(objective, q, GridSolver(), [0.2, 0.1, 0.3] * 3, form=f)[0].model for f in FORMS]
    assert ends[0].total_variation(ends[1]) < 1e-12
    assert ends[0].total_variation(q) > 0.15


def test_concave_objective_rises() -> None:
    """Entropy - KL/2 is 1.5-smooth: at rates below 1/1.5 no step lowers it, and it converges."""
    q = gaussian([0.5], 0.7)
    table = wide(q)
    objective = Entropy() - 0.5 * KL(table)
    _, its = run(objective, table, GridSolver(), [0.4] * 12)
    values = [objective.value(table).value, *(i.objective.value for i in its)]
    assert all(b > a for a, b in itertools.pairwise(values))
    best = math.log(0.7 * math.sqrt(3) * math.sqrt(2 * math.pi * math.e)) - 0.5 * (
        0.5 * (3 - 1) - math.log(math.sqrt(3))
    )
    assert values[-1] == pytest.approx(best, abs=1e-6)


# ------------------------------------------------------------------- what an iterate reports


def test_reports() -> None:
    """step_kl = KL(p_{k+1} || p_k) in closed form, in both forms, both solvers; rates in stats."""
    q = gaussian([0.0], 1.0)
    for form in FORMS:
        for start, solver in ((q, GaussianSolver()), (grid(q, -9, 10, 8001), GridSolver())):
            _, its = run(ExpectedReward(X) - 1.0 * KL(start), start, solver, [0.5, 0.4], form=form)
            # u: 0 -> .5 -> .5 + .4 (1 - .5) = .7; the KL of a shift by d is d^2 / 2.
            assert [i.number for i in its] == [0, 1]
            assert [i.step_kl for i in its] == pytest.approx([0.125, 0.02], abs=1e-9)
            assert [i.rate for i in its] == [0.5, 0.4]
            assert [i.solution.stats["rate"] for i in its] == [0.5, 0.4]
            path = 0.5 * 0.7**2 if form == "anchored" else 0.02
            assert its[1].solution.stats["path_kl"] == pytest.approx(path, abs=1e-9)


def test_stationarity() -> None:
    """E x - w KL: 1 at the start, |1 - w u| / (1 + w u) at the tilt e^{u x}, 0 at u = 1/w."""
    q = grid(gaussian([0.0], 1.0), -9, 12, 8001)
    objective = ExpectedReward(X) - 0.5 * KL(q)
    assert stationarity(objective, q) == pytest.approx(1)
    _, its = run(objective, q, GridSolver(), [1.0, 2.0])
    assert its[0].stationarity == pytest.approx(0.5 / 1.5, abs=1e-9)
    assert its[1].stationarity == pytest.approx(0, abs=1e-9)


def test_tolerance_stops_early() -> None:
    """The loop ends at the first iterate whose stationarity is below the tolerance, CONVERGED."""
    q = gaussian([0.5], 0.7)
    out, its = run(Entropy() - 0.5 * KL(q), q, GaussianSolver(), [0.3] * 50, tolerance=0.01)
    assert out.result is Result.CONVERGED
    assert len(its) < 15
    assert its[-1].stationarity < 0.01
    assert all(i.stationarity >= 0.01 for i in its[:-1])
    assert float(out.model.stds) == pytest.approx(0.7 * math.sqrt(3), rel=0.02)
    again, _ = run(
        Entropy() - 0.5 * KL(q), q, GaussianSolver(), [0.3] * 50, tolerance=0.01,
        completed=[i.solution for i in its],
    )  # fmt: skip
    assert again.result is Result.CONVERGED
    assert torch.equal(again.model.stds, out.model.stds)


# -------------------------------------------------------------------------- protocol with parts


class ValueSolver(Recorder):
    """Stands for weighted matching."""


@forms
def test_problems_and_addresses(form: str) -> None:
    """anchored: reference model_0; successive: model_k; init model_k; seeds are addressed."""
    q, recorder, seeds = gaussian([0.0], 1.0), Recorder(), []

    def density(model: GaussianMixture, seed: Seed) -> GaussianMixture:
        seeds.append(seed)
        return model

    context = Context(Seed(3).child("run"))
    _, its = run(
        ExpectedReward(X) - KL(q), q, recorder, [0.5, 0.4], density=density, context=context,
        form=form,
    )  # fmt: skip
    models = [q, its[0].solution.model]
    for k, (problem, where, init) in enumerate(recorder.calls):
        assert where.seed == context.seed.child("iteration", k)
        assert init is models[k]
        assert problem.reference is (q if form == "anchored" else models[k])
    assert seeds == [context.seed.child("iteration", k, "density") for k in range(3)]


def test_a_starved_solver_ends_the_loop() -> None:
    """A solver that could not learn is not asked again; its result is the loop's."""
    q = gaussian([0.0], 1.0)
    recorder = Recorder(result=Result.STARVED)
    out, its = run(ExpectedReward(X) - KL(q), q, recorder, [0.1] * 5)
    assert out.result is Result.STARVED
    assert len(recorder.calls) == len(its) == 1


@pytest.mark.parametrize("count", [1, 3, 5])
def test_completed_is_straight(count: int) -> None:
    """Continued after `count` iterations = uninterrupted, bit for bit; none is solved again."""
    q = gaussian([0.5], 0.7)
    objective = Entropy() - 0.5 * KL(q)
    for rates, options in (
        ([0.3] * 5, {}),
        (PathKLBound(bound=0.02, initial=0.1, max_rate=0.6), {"num_iterations": 5}),
    ):
        straight, its = run(objective, q, GaussianSolver(), rates, **options)
        recorder = Recorder()
        done = [i.solution for i in its[:count]]
        resumed, rest = run(objective, q, recorder, rates, completed=done, **options)
        assert torch.equal(resumed.model.stds, straight.model.stds)
        assert torch.equal(resumed.model.means, straight.model.means)
        assert [i.number for i in rest] == list(range(count, 5))
        assert [i.rate for i in rest] == [i.rate for i in its[count:]]
        assert len(recorder.calls) >= 5 - count
        assert all(int(c[1].seed.path[1]) >= count for c in recorder.calls)


def sampled(model: Quadrature, seed: Seed) -> Empirical:
    """2000 samples of a grid, drawn at the address given."""
    index = torch.multinomial(
        model.probabilities, 2000, replacement=True, generator=seed.generator()
    )
    return Empirical(model.nodes[index])


def test_completed_on_samples() -> None:
    """The same where first variations rest on sampled thresholds: banks are redrawn by address."""
    q = grid(gaussian([0.0], 1.0), -6, 9, 1001)
    options = {"density": sampled, "context": Context(Seed(4))}
    straight, its = run(RightCVaR(X, 0.8), q, GridSolver(), [0.2] * 4, **options)
    thresholds = {RightCVaR(X, 0.8).first_variation(sampled(q, Seed(i))).threshold for i in (1, 2)}
    assert len(thresholds) == 2  # the draw matters
    for count in (1, 3):
        done = [i.solution for i in its[:count]]
        resumed, _ = run(RightCVaR(X, 0.8), q, GridSolver(), [0.2] * 4, completed=done, **options)
        assert torch.equal(resumed.model.table, straight.model.table)


# -------------------------------------------------------------------------------- flow models


class Poisoned(Potential):
    """A score that must not be read."""

    @property
    def offers(self) -> Access:
        return Access.GRAD

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        raise AssertionError("the anchored form needs no score")


def flow_density(model: GaussianMixture, seed: Seed) -> FlowDensity:
    """A flow model's density; the model itself is kept in closed form."""
    return FlowDensity(
        model.flow(hidden=()), num_samples=400, sampler=Sampler(num_steps=8), seed=seed
    )


def test_anchored_needs_no_score() -> None:
    """On flows, KL(prior) becomes the tracked psi: a value-only solver works, and is exact."""
    q = GaussianMixture([[-1.0], [1.5]], [[0.6], [0.4]], [0.3, 0.7])
    prior = flow_density(q, Seed(0)).with_log(Poisoned())
    objective = ExpectedReward(X) - 0.5 * KL(prior)
    out, its = run(
        objective, q, GaussianSolver(), [0.7, 1.5, 0.2], density=flow_density, prior=prior
    )
    u = 0.0
    for it in its:
        u += it.rate * (1 - 0.5 * u)
        assert it.stationarity == pytest.approx(abs(1 - 0.5 * u) / (1 + 0.5 * u), abs=1e-5)
    exact, log_z = q.tilted(u)
    torch.testing.assert_close(out.model.means, exact.means)
    torch.testing.assert_close(out.model.weights, exact.weights)
    mean = float((exact.weights * exact.means[:, 0]).sum())
    value, error = its[-1].objective.value, its[-1].objective.standard_error
    assert abs(value - (mean - 0.5 * (u * mean - log_z))) < 4.5 * error + 0.1  # 8-step chains


def test_abilities_are_checked_before_work() -> None:
    """Scores alone do not serve a value-only solver: refused before one sample is drawn."""
    q = gaussian([0.0], 1.0)
    prior = flow_density(q, Seed(0))
    with pytest.raises(CapabilityError, match="ValueSolver needs VALUE"):
        run(Entropy(), q, ValueSolver(), [0.1], density=flow_density, prior=prior)
    objective = ExpectedReward(X) - KL(prior)
    with pytest.raises(CapabilityError, match=r"from the second iteration on.*VALUE is missing"):
        run(
            objective, q, ValueSolver(), [0.1, 0.1], density=flow_density, prior=prior,
            form="successive",
        )  # fmt: skip
    assert "bank" not in prior.__dict__
    # One successive step is fine: at p_0 the two logs are one object.
    run(objective, q, ValueSolver(), [0.1], density=flow_density, prior=prior, form="successive")
    # Without `prior`, the logs of p_0 and of the prior are two objects, and do not cancel.
    with pytest.raises(CapabilityError, match="KL"):
        run(objective, q, ValueSolver(), [0.1], density=flow_density)


def test_abilities_of_later_iterates_are_checked_before_work() -> None:
    """A black-box reward spoils the gradient of psi: a gradient solver is refused at once."""

    class GradientSolver(Recorder):
        needs: ClassVar[Access] = Access.GRAD

    q = gaussian([0.0], 1.0)
    prior = flow_density(q, Seed(0))
    black = ExpectedReward(BlackBox(lambda x: x[:, 0])) - KL(prior)
    with pytest.raises(CapabilityError, match=r"BlackBox.*GRAD is missing"):
        run(black, q, GradientSolver(), [0.1], density=flow_density, prior=prior)
    # Value-only solvers may go on for ever: psi has values because its terms have.
    recorder = ValueSolver(inner=_Absorb())
    run(black, q, recorder, [0.1] * 3, density=flow_density, prior=prior)
    assert len(recorder.calls) == 3


@dataclass(frozen=True)
class _Absorb:
    """Returns the reference: for tests that do not look at the answer."""

    def solve(
        self, problem: ControlProblem[Any], context: Context, *, init: Any = None
    ) -> Solution[Any]:
        return Solution(problem.reference, stats={"path_kl": 0.0, "step_kl": 0.0})


def test_step_kl_of_flow_models() -> None:
    """Without a solver's word, the KL of a later anchored step is the path KL of old and new."""

    def fine(model: GaussianMixture, seed: Seed) -> FlowDensity:
        sampler = Sampler(num_steps=100)
        return FlowDensity(model.flow(hidden=()), num_samples=200, sampler=sampler, seed=seed)

    q = gaussian([0.0], 1.0)
    prior, recorder = fine(q, Seed(0)), Recorder(keep_stats=False)
    _, its = run(ExpectedReward(X) - KL(prior), q, recorder, [0.5, 0.4], density=fine, prior=prior)
    # Shifts by .5 and .2; the path KL of 100 Euler steps is 3 % high.
    assert its[0].step_kl == pytest.approx(0.125, rel=0.06)
    assert its[1].step_kl == pytest.approx(0.02, rel=0.06)


def test_entropy_of_a_flow_is_not_invented() -> None:
    """The objective of a score-only density is NaN, its stationarity too; the run goes on."""

    class GradientSolver(Recorder):
        needs: ClassVar[Access] = Access.GRAD

    q = gaussian([0.0], 1.0)
    prior = flow_density(q, Seed(0))
    recorder = GradientSolver(inner=_Absorb())
    _, its = run(Entropy(), q, recorder, [0.1, 0.1], density=flow_density, prior=prior)
    assert math.isnan(its[0].objective.value)
    assert math.isnan(its[0].stationarity)
    assert len(its) == 2


def test_priors_of_another_kind_are_refused() -> None:
    """Another space, or scores on another schedule, are found before any sample is drawn."""
    model = gaussian([0.0, 0.0], 1.0).flow(hidden=())
    p = FlowDensity(model)
    for prior in (gaussian([0.0], 1.0), Empirical(torch.zeros(4, 3))):
        with pytest.raises(ConfigError, match="must live in one space"):
            run(
                ExpectedReward(Linear(1.0)) - KL(prior), model, AdjointMatching(), [1.0],
                density=lambda m, s: p, prior=p,
            )  # fmt: skip
    other = FlowDensity(gaussian([0.0, 0.0], 1.0).flow(Cosine(), hidden=()))
    with pytest.raises(UnsupportedError, match="differently noised"):
        run(
            ExpectedReward(Linear(1.0)) - KL(other), model, AdjointMatching(), [1.0],
            density=lambda m, s: p, prior=p,
        )  # fmt: skip
    assert "bank" not in p.__dict__


def test_a_step_that_went_too_far_is_shortened() -> None:
    """Where the new density refuses to be looked at, whatever it is asked for."""
    q, calls = grid(gaussian([0.5], 0.7), -5, 6, 301), []

    def density(p: Quadrature, seed: Seed) -> Quadrature:
        calls.append(p)
        if len(calls) < 4:
            raise UnsupportedError("too far")
        return p

    objective = ExpectedReward(Linear(1.0)) - 0.5 * KL(q)
    out = mirror_descent(
        objective, q, GridSolver(), LineSearch(), density=density, prior=q, context=Context(),
        num_iterations=1,
    )  # fmt: skip
    assert out.stats["rate"] == 1 / 64


def test_a_line_search_needs_values() -> None:
    """Of an entropy, a flow model knows the first variation by its score, not the value."""
    prior = FlowDensity(gaussian([0.0]).flow(hidden=()), num_samples=64)
    with pytest.raises(CapabilityError, match="LineSearch compares values"):
        mirror_descent(
            Entropy() - KL(prior), prior.model, AdjointMatching(), LineSearch(),
            density=lambda m, seed: prior, prior=prior, context=Context(), num_iterations=2,
        )  # fmt: skip


def test_the_last_density_is_drawn_only_for_somebody_who_looks() -> None:
    """A bank of samples can cost as much as a training. The first variation of an expected reward
    needs none, so that only the report does, of both models."""
    q, drawn = gaussian([0.5], 0.7), []

    class Watched(Empirical):
        @property
        def bank(self) -> Bank:
            drawn.append(id(self))
            return super().bank

    def banks(**more: Any) -> int:
        drawn.clear()
        kept: list[Density] = []  # so that no two have one id

        def density(model: GaussianMixture, seed: Seed) -> Density:
            kept.append(Watched(model.sample(200, seed)))
            return kept[-1]

        mirror_descent(
            ExpectedReward(X), q, GaussianSolver(), [0.5, 0.5], density=density,
            context=Context(), form="successive", step_kl=lambda *each: 0.0, **more,
        )  # fmt: skip
        return len(set(drawn))

    assert banks() == 0
    assert banks(on_iterate=lambda k, iterate: None) == 2
