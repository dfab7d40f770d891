"""Tail-aware Flow Fine-Tuning: one training, or several where the bank is too small."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oracles import TFFT_LEFT, TFFT_RIGHT, axis
from tiltflow.algorithms import Thresholds, optimal_thresholds, tail_aware
from tiltflow.analytic import gaussian
from tiltflow.context import Context
from tiltflow.density import FlowDensity, Quadrature
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.functional import Functional, Hinges
from tiltflow.potential import BlackBox
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, WeightedMatching
from tiltflow.types import Access
from tiltflow.utilities import (
    CertaintyEquivalent,
    EntropicRisk,
    ExpectedReward,
    LeftCVaR,
    MeanVariance,
    RightCVaR,
    SpectralRisk,
)

SHORT = pytest.mark.filterwarnings("ignore:tail_aware. E u")
"""Trainings that stop long before the optimum, which is said."""

X = Linear([1.0])


class Untouched:
    """A solver that only looks at the problem."""

    def __init__(self, needs: Access = Access.BOTH) -> None:
        self.needs = needs
        self.problems: list[ControlProblem[FlowModel]] = []

    def solve(
        self, problem: ControlProblem[FlowModel], context: Context, *,
        init: FlowModel | None = None,
    ) -> Solution[FlowModel]:  # fmt: skip
        self.problems.append(problem)
        return Solution(problem.reference if init is None else init)


def prior_of(hidden: tuple[int, ...] = ()) -> FlowDensity:
    torch.manual_seed(0)
    return FlowDensity(gaussian([0.0]).flow(hidden=hidden), num_samples=2000)


@SHORT
def test_the_problem_of_stage_two() -> None:
    """The hinge of stage 1 in units of the weight, and the statistics of an untouched model."""
    solver, prior = Untouched(), prior_of()
    out = tail_aware(
        LeftCVaR(X, 0.2), prior.model, solver, weight=1.0, prior=prior, context=Context()
    )
    terminal = solver.problems[0].terminal
    y = out.stats["threshold"]
    assert y == pytest.approx(TFFT_LEFT[3][1], abs=0.15)
    x = torch.tensor([[y - 1.0], [y + 1.0]])
    assert terminal.value(x).tolist() == pytest.approx([-5.0, 0.0], rel=1e-5)
    assert out.stats["plan_objective"] == pytest.approx(TFFT_LEFT[3][2], abs=0.05)
    assert out.stats["level_mass"] == 0.2
    assert out.stats["tail_mass"] == pytest.approx(0.2 * out.stats["drive"])
    assert out.stats["tail_mass"] == pytest.approx(out.stats["active"], abs=0.05)
    assert out.stats["tail"] == pytest.approx(-1.4, abs=5 * out.stats["tail_error"] + 0.05)
    assert out.stats["rounds"] == 1


@SHORT
def test_starvation_is_refused_before_any_training() -> None:
    solver, prior = Untouched(), prior_of()
    arguments = {"weight": 0.5, "prior": prior, "context": Context(), "bank_size": 2000}
    with pytest.raises(UnsupportedError, match=r"supports weights of [0-9.]+ and more"):
        tail_aware(RightCVaR(X, 0.9), prior.model, solver, **arguments)
    assert not solver.problems
    with pytest.warns(RuntimeWarning, match="may starve"):
        tail_aware(RightCVaR(X, 0.9), prior.model, solver, anyway=True, **arguments)
    assert len(solver.problems) == 1


@pytest.mark.parametrize("wrong", ["max_rounds", "tail_samples"])
def test_bad_arguments(wrong: str) -> None:
    prior = prior_of()
    with pytest.raises(ConfigError, match=wrong):
        tail_aware(
            LeftCVaR(X, 0.2), prior.model, Untouched(), weight=1.0, prior=prior,
            context=Context(), **{wrong: 0},
        )  # fmt: skip


@SHORT
@pytest.mark.parametrize(("in_the_tail", "fresh"), [(400, 2000), (600, 3000)])
def test_the_result_is_checked_on_so_many_samples_in_the_tail(
    in_the_tail: int, fresh: int
) -> None:
    """At least as many as the prior's bank has."""
    prior = prior_of()
    out = tail_aware(
        LeftCVaR(X, 0.2), prior.model, Untouched(), weight=1.0, prior=prior,
        context=Context(), tail_samples=in_the_tail,
    )  # fmt: skip
    assert out.stats["fresh"] == fresh


@pytest.mark.parametrize("weight", [-1.0, 0.0, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    prior = prior_of()
    with pytest.raises(ConfigError, match="weight"):
        tail_aware(
            LeftCVaR(X, 0.2), prior.model, Untouched(), weight=weight, prior=prior,
            context=Context(),
        )  # fmt: skip


def test_tied_rewards_are_settled() -> None:
    """A reward of whole numbers: the threshold is one of them, and its mass counts as needed."""
    prior = prior_of()
    steps = BlackBox(lambda x: (1.5 * x[:, 0]).round())
    out = tail_aware(
        LeftCVaR(steps, 0.2), prior.model, Untouched(Access.VALUE), weight=1000.0, prior=prior,
        context=Context(),
    )  # fmt: skip
    assert out.stats["drive"] == pytest.approx(1.0)
    assert out.stats["settled"] == 1


def solver(updates: int) -> AdjointMatching:
    default = AdjointMatching()
    return replace(default, training=replace(default.training, num_updates=updates))


def test_left_tail_trained() -> None:
    """N(0, 1), worst fifth, weight 1: realised mass within 10 % of the level, gap under 5 %."""
    prior = prior_of((32, 32))
    out = tail_aware(
        LeftCVaR(X, 0.2), prior.model, solver(300), weight=1.0, prior=prior, context=Context()
    )
    assert out.stats["tail_mass"] == pytest.approx(0.2, rel=0.1)
    best = TFFT_LEFT[3][2]
    reached = out.stats["tail"] - out.stats["path_kl"]
    assert reached > best - 0.05 * (best + 1.39981) - 3 * out.stats["tail_error"]


def test_mean_less_variance_trained() -> None:
    """N(0, 1), r = x, weight 1, aversion 1/2: the optimum is N(1, 1/2), at threshold 1."""
    prior = prior_of((32, 32))
    utility = MeanVariance(X, 0.5)
    out = tail_aware(utility, prior.model, solver(300), weight=1.0, prior=prior, context=Context())
    assert out.stats["threshold"] == pytest.approx(1.0, abs=0.05)
    assert out.stats["drive"] == pytest.approx(1.0, abs=0.1)
    best = 0.75 - 0.5 * (0.5 - math.log(0.5))
    reached = out.stats["tail"] - out.stats["path_kl"]
    assert reached > best - 0.05 * (best + 0.5) - 3 * out.stats["tail_error"]


NORMAL = Quadrature.of([axis(-9, 12, 6001)], gaussian([0.0]).log)


@pytest.mark.slow
@pytest.mark.parametrize(
    "utility",
    [
        SpectralRisk(X, (0.2, 0.6), (3.0, 1.0, 0.2)),
        EntropicRisk(X, -1.0),
        0.5 * ExpectedReward(X) + 0.5 * LeftCVaR(X, 0.2),
        CertaintyEquivalent(X, Hinges((0.0,), (0.5, 1.5))),
    ],
    ids=str,
)
def test_certainty_equivalents_trained(utility: Functional) -> None:
    """At most 5 % of the possible gain is missing, for one threshold, two, and mixtures."""
    prior = prior_of((64, 64))
    best = optimal_thresholds(utility, 1.0, NORMAL)
    out = tail_aware(
        utility, prior.model, solver(1000), weight=1.0, prior=prior, context=Context()
    )
    gain = best.value - utility.value(NORMAL).value
    reached = out.stats["tail"] - out.stats["path_kl"]
    assert reached > best.value - 0.05 * gain - 3 * out.stats["tail_error"]
    assert out.stats["drive"] == pytest.approx(1.0, abs=0.15)


def test_a_model_that_stays_is_starved() -> None:
    """With a warning, and with the reason in the result."""
    prior = prior_of()

    class Still(Untouched):
        def solve(
            self, problem: ControlProblem[FlowModel], context: Context, *,
            init: FlowModel | None = None,
        ) -> Solution[FlowModel]:  # fmt: skip
            return Solution(problem.reference, stats={"path_kl": 0.0})

    with pytest.warns(RuntimeWarning, match="starved"):
        out = tail_aware(
            LeftCVaR(X, 0.2), prior.model, Still(), weight=1.0, prior=prior, context=Context(),
            max_rounds=4,
        )  # fmt: skip
    assert out.result is Result.STARVED
    assert out.stats["rounds"] == 1


@SHORT
def test_black_box_rewards() -> None:
    """With a solver that needs values only."""
    prior = prior_of((32, 32))
    weighted = WeightedMatching(rounds=2, num_samples=2048, neighbours=64)
    weighted = replace(weighted, training=replace(weighted.training, num_updates=300))
    out = tail_aware(
        LeftCVaR(BlackBox(lambda x: x[:, 0]), 0.2), prior.model, weighted, weight=2.0,
        prior=prior, context=Context(),
    )  # fmt: skip
    assert out.stats["tail"] > -0.9  # from -1.4, to -0.42 at best


@SHORT
def test_a_bank_is_rewarded_once() -> None:
    """Thresholds at many weights on one bank, then fresh samples: an evaluation for each."""
    calls: list[int] = []
    reward = BlackBox(lambda x: calls.append(len(x)) or x[:, 0])
    prior = prior_of()
    with pytest.raises(UnsupportedError, match="supports weights"):
        tail_aware(
            RightCVaR(reward, 0.9), prior.model, Untouched(Access.VALUE), weight=0.5, prior=prior,
            context=Context(), bank_size=2000,
        )  # fmt: skip
    assert calls == [2000]
    tail_aware(
        LeftCVaR(reward, 0.2),
        prior.model,
        Untouched(Access.VALUE),
        weight=2.0,
        prior=prior,
        context=Context(),
    )
    assert calls == [2000, 10_000, 2000]


@pytest.mark.slow
def test_a_starving_weight_is_reached_in_rounds() -> None:
    """Right tail, level 0.9, weight 1: 4.7 nats from a bank of 10,000, by tuning in between; then
    the threshold is recalibrated on the tuned model."""
    prior, seen = prior_of((64, 64)), list[Thresholds]()
    out = tail_aware(
        RightCVaR(X, 0.9), prior.model, solver(800), weight=1.0, prior=prior,
        context=Context(Seed(0)), max_rounds=6, ease="weight",
        on_round=lambda r, found, _: seen.append(found),
    )  # fmt: skip
    weights = [found.weight for found in seen]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 1.0
    weight, y, value = TFFT_RIGHT[-1][:3]
    assert weight == 1.0
    assert out.stats["threshold"] == pytest.approx(y, abs=0.15)
    assert out.stats["plan_objective"] == pytest.approx(value, abs=0.1)
    assert out.stats["tail_mass"] == pytest.approx(0.1, abs=0.02)
