"""Weighted matching: closed forms, silence without a tilt, refusal of hopeless ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.affine import EULER, Affine, K, law, same, tensors
from oracles.affine import affine as steps_affine
from oracles.processes import Gloo
from tiltflow.algorithms import mirror_descent
from tiltflow.analytic import gaussian, ring
from tiltflow.context import Context, Snapshot, Step
from tiltflow.delta import MLP, Correction
from tiltflow.density import FlowDensity
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.experiment import prepare, resolve
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Deterministic
from tiltflow.potential import ZERO, BlackBox, Differentiable, Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.rewards.points import Quadratic
from tiltflow.run import check
from tiltflow.sample import Sampler, calibrated
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, WeightedMatching
from tiltflow.solvers.weighted_bank import Samples, WeightedBank, draw, groups_of, tempered
from tiltflow.solvers.weighted_matching import _Regression
from tiltflow.space import Euclidean, ZeroMean
from tiltflow.training import Training
from tiltflow.types import Access, Cond
from tiltflow.utilities import Entropy, ExpectedReward

SEED = Seed(0).child("weighted matching")
STEPS = 20
CHAIN = Sampler(num_steps=STEPS)


def affine(mean: float = 0.0, std: float = 1.0) -> FlowModel:
    """N(mean, std^2) with a correction that is affine at each step of the chain."""
    return steps_affine(mean, std, STEPS)


def quick(num_updates: int = 300, rate: float = 0.1, **options: Any) -> WeightedMatching:
    training = Training(num_updates=num_updates, learning_rate=rate, ema=0.99)
    settings: dict[str, Any] = {
        "sampler": CHAIN, "num_samples": 4096, "neighbours": 128, "num_evaluate": 256,
        "training": training, **options,
    }  # fmt: skip
    return WeightedMatching(**settings)


def solve(
    model: FlowModel, reward: Potential, solver: WeightedMatching | None = None, **context: Any
) -> Solution[FlowModel]:
    problem = ControlProblem(model, reward)
    return (solver or quick()).solve(problem, Context(**{"seed": SEED, **context}))


# ---------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("proposal", "neighbours"), [("mixed", 128), ("reference", 128), ("reference", 0)]
)
def test_linear_reward(proposal: str, neighbours: int) -> None:
    """r = 1.5 x on N(0.3, 0.7^2): mean +0.735, variance 0.49, and the loss is minus the KL.

    exp(1.5^2 0.49) = 3.0 samples count as one: the mean of 5 banks of 4096 is known within
    0.7 / sqrt(5 * 4096 / 3) = 0.009.
    """
    losses: list[float] = []
    solver = quick(proposal=proposal, neighbours=neighbours)
    out = solve(
        affine(0.3, 0.7), LinearReward(1.5), solver,
        on_step=lambda s: losses.append(s.stats["loss"]),
    )  # fmt: skip
    mean, variance = law(out.model, CHAIN)
    kl = 1.5**2 * 0.49 / 2
    assert mean - 0.3 == pytest.approx(0.735, abs=0.045)
    assert variance == pytest.approx(0.49, abs=0.03 if neighbours else 0.06)
    assert out.result is Result.DONE
    assert out.stats["path_kl"] == pytest.approx(kl, rel=0.12)
    assert out.stats["tilt_kl"] == pytest.approx(kl, abs=0.2)  # one bank: a few times 0.05
    assert out.stats["gap"] < 0.02
    assert losses[0] == 0.0
    if neighbours:  # else the noise of single losses is larger than what they are
        assert sum(losses[-100:]) / 100 == pytest.approx(-kl, rel=0.15)


@pytest.mark.parametrize(("slope", "curvature"), [(0.7, 1.0), (0.0, -0.3)])
def test_quadratic_reward(slope: float, curvature: float) -> None:
    """r = a x - c x^2 / 2 on N(0, 1): N(a / (1 + c), 1 / (1 + c)), as far as the chain can.

    The fixed point is the exact end point of the tilted law, in steps of the reference's variance:
    the law of that chain is known. Errors are about 1.4 / sqrt(20000 / 2) = 0.014.
    """
    reward = LinearReward(slope) + Quadratic(0.0, curvature)
    out = solve(affine(), reward)
    exact, _ = gaussian([0.0], 1.0).tilted(slope, curvature)
    assert out.model.moments is not None
    chain = law(exact.flow(hidden=()).with_moments(out.model.moments), CHAIN)
    assert chain == pytest.approx((slope / (1 + curvature), 1 / (1 + curvature)), rel=0.06)
    assert law(out.model, CHAIN) == pytest.approx(chain, abs=0.06)


def test_a_network_is_trained_whole() -> None:
    """No correction: all parameters of a velocity network, which starts exact for N(0, I)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP((2,), (32,), zero_init=True)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.mlp(x, t)
            return ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None] * x + out

    torch.manual_seed(0)
    model = FlowModel(Net(), Linear(), Euclidean((2,)), predicts="velocity")
    out = solve(model, LinearReward([0.8, -0.4]), quick(250, 1e-2))
    x = CHAIN.sample(out.model, 4000, seed=SEED)
    torch.testing.assert_close(x.mean(0), torch.tensor([0.8, -0.4]), rtol=0, atol=0.09)
    torch.testing.assert_close(x.var(0), torch.ones(2), rtol=0, atol=0.12)
    assert not any(p.any() for p in model.net.mlp.layers[-1].parameters())  # type: ignore


def test_a_black_box_is_as_good_as_a_formula() -> None:
    """Only values are asked for: the same bits with and without gradients."""
    solver = quick(20)
    known = solve(affine(), LinearReward(1.0), solver)
    opaque = solve(affine(), BlackBox(lambda x: x[:, 0]), solver)
    assert same(known.model, opaque.model)
    assert law(opaque.model, CHAIN)[0] > 0.1


def test_zero_mean_space() -> None:
    """On a subspace: N(0, P) with reward a.x moves to +P a and stays inside."""
    space, slope = ZeroMean((3,)), torch.tensor([1.0, 0.0, 0.5])

    class Net(nn.Module):
        """The exact velocity of N(0, P), and what is learnt; deliberately leaves the space."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(K, 3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            v = ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None] * x
            return v + self.shift[(t * K).round().long()] + 5.0

    model = FlowModel(Net(), Linear(), space, predicts="velocity")
    out = solve(model, LinearReward(slope), quick(250, sampler=EULER))
    x = EULER.sample(out.model, 8000, seed=SEED)
    assert float(x.mean(1).abs().max()) < 1e-5
    exact = 1.0121 * space.project(slope[None])[0]
    torch.testing.assert_close(x.mean(0), exact, rtol=0, atol=0.07)


# ---------------------------------------------------------------------------- silence


@pytest.mark.parametrize("proposal", ["mixed", "reference"])
@pytest.mark.parametrize("kind", ["correction", "network"])
def test_zero_tilt_changes_nothing(kind: str, proposal: str) -> None:
    """phi constant: the loss and its gradient are 0, and the model stays bit for bit."""
    torch.manual_seed(0)
    model = ring().flow(hidden=(16,))
    if kind == "network":
        model = FlowModel(MLP((2,), (16,)), Linear(), Euclidean((2,)), predicts="velocity")
    losses: list[float] = []
    constant = BlackBox(lambda x: torch.full((len(x),), -7.3))
    solver = quick(20, proposal=proposal, num_samples=512)
    for reward in (constant, ZERO):
        out = solve(model, reward, solver, on_step=lambda s: losses.append(s.stats["loss"]))
        assert same(model, out.model)
    assert set(losses) == {0.0}


def test_errors_of_the_reference_are_left_alone() -> None:
    """A model whose end points are not the conditional means of its samples: nothing is repaired.

    The end point of N(0, 1) gets an error of -beta^2 x. Plain weighted regression learns the
    error away and pays for it in KL; with neighbours only the tilt is learnt, here a tiny one.
    """
    wrong = affine()
    with torch.no_grad():
        wrong.trainable.slope -= 1.0  # type: ignore[union-attr, operator]
    kl = {
        neighbours: solve(wrong, LinearReward(0.1), quick(300, neighbours=neighbours)).stats
        for neighbours in (128, 0)
    }
    tilt = 0.1**2 * law(wrong, CHAIN)[1] / 2
    assert kl[128]["path_kl"] == pytest.approx(tilt, rel=0.5)  # 0.003
    assert kl[0]["path_kl"] > 7 * tilt


def test_neighbours_take_noise_away_and_no_signal() -> None:
    """The gradient at the start: the same mean (|z| < 4.5), and less than 0.6 of the variance."""
    torch.manual_seed(0)
    model = freeze(calibrated(ring().flow(hidden=(8,)), seed=SEED))
    reward, found = LinearReward([1.0, 0.0]), []
    for neighbours in (256, 0):
        solver = quick(proposal="reference", rounds=1, neighbours=neighbours)
        loss = _Regression(solver, model, None, reward, None, Context(SEED))
        assert not loss.converged(0)
        last = list(loss.tuned.trainable.parameters())[-2:]
        gradients = []
        for update in range(300):
            value, _ = loss(update, 0)
            grads = torch.autograd.grad(value, last)
            gradients.append(torch.cat([g.flatten() for g in grads]))
        found.append(torch.stack(gradients).double())
    means, variances = [g.mean(0) for g in found], [g.var(0) for g in found]
    z = (means[0] - means[1]) / ((variances[0] + variances[1]) / 300).sqrt()
    assert float(z.abs().max()) < 4.5
    assert float(variances[0].sum()) < 0.6 * float(variances[1].sum())
    assert float((means[1] / (variances[1] / 300).sqrt()).abs().max()) > 10  # there is a signal


# ---------------------------------------------------------------------------- the bank


def bank(slope: float, count: int = 50_000, temper: float = 1.0) -> WeightedBank:
    """Samples of N(0, 1) weighted with exp(slope x)."""
    x = gaussian([0.0], 1.0).sample(count, SEED)
    zero = torch.zeros(count, dtype=torch.float64)
    return WeightedBank.of(Samples(x, slope * x[:, 0], zero, None, zero.long()), temper)


def test_effective_size_and_kl() -> None:
    """ESS = 1 / sum of squared weights, near N exp(-a^2); KL near a^2 / 2, and below its bound."""
    found = bank(0.8)
    w = torch.softmax(0.8 * found.points[:, 0], 0)
    assert found.effective_size == pytest.approx(float(1 / (w**2).sum()), rel=1e-9)
    assert found.effective == found.effective_size / 50_000
    assert found.effective == pytest.approx(math.exp(-0.64), rel=0.05)
    assert found.tilt_kl == pytest.approx(0.32, rel=0.05)
    assert found.tilt_kl < math.log(1 / found.effective)
    assert float(found.weight.mean()) == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(found.weight, w * 50_000, rtol=1e-9, atol=0)


def test_weights_survive_huge_values() -> None:
    """exp(1e4 x) overflows; its weights do not."""
    found = bank(1e4, 100)
    assert bool(torch.isfinite(found.weight).all())
    assert found.effective_size == pytest.approx(1.0)
    assert found.tilt_kl == pytest.approx(math.log(100))


def test_tempered() -> None:
    """The largest power that keeps the effective size: exp(-temper^2 a^2) = 0.5 for Gaussians."""
    x = gaussian([0.0], 1.0).sample(50_000, SEED)
    zero = torch.zeros(len(x), dtype=torch.float64)
    samples = Samples(x, 3.0 * x[:, 0], zero, None, zero.long())
    found = tempered(samples, 25_000)
    assert found.effective_size == pytest.approx(25_000, rel=1e-3)
    assert found.temper == pytest.approx(math.sqrt(math.log(2)) / 3, rel=0.03)
    assert tempered(samples, 1.0).temper == 1.0


def test_mixed_proposal() -> None:
    """Half of the paths from a shifted model: weights stand for the reference and are at most 2.

    u = 2 / (1 + dP_other / dP_reference), whose mean is one; E[u X], E[u X^2] are the reference's.
    """
    reference, other = affine(), affine()
    with torch.no_grad():
        other.trainable.offset += 1.2  # type: ignore[union-attr, operator]
    found = draw(
        reference, other, LinearReward(1.0), 20_000, sampler=CHAIN, seed=SEED,
    )  # fmt: skip
    u, x = found.log_base.exp(), found.points[:, 0].double()
    assert float(u.max()) <= 2.0
    _, variance = law(reference)
    for statistic, exact in ((torch.ones_like(x), 1.0), (x, 0.0), (x**2, variance)):
        z = (u * statistic - exact).mean() / (u * statistic).std() * math.sqrt(len(x))
        assert abs(float(z)) < 4.5
    assert float(x.mean()) > 0.3  # which a plain mean is not
    plain = draw(reference, None, LinearReward(1.0), 20_000, sampler=CHAIN, seed=SEED)
    sizes = [WeightedBank.of(s).effective for s in (plain, found)]
    assert sizes[0] == pytest.approx(math.exp(-variance), rel=0.1)
    assert sizes[1] > 1.3 * sizes[0]


def test_expected_excess() -> None:
    """c - 1 is the ratio of Nadaraya-Watson means over the others, and blind to the sample itself.

    Where u = 1 and w varies slowly given x_t, c is near E[w | x_t] (here at t = 0.9).
    """
    found = bank(0.8, 4000)
    generator = SEED.generator()
    own, others = torch.arange(50), torch.arange(25, 1025)
    alpha, beta = torch.full((50,), 0.9).double(), torch.full((50,), 0.1).double()
    x = 0.9 * found.points[own] + 0.1 * torch.randn(50, 1, generator=generator).double()
    c = 1 + found.expected_excess(x, alpha, beta, own, others)
    w, q = found.weight, (1 + found.weight) / 2
    kernel = (-((x - 0.9 * found.points[others, 0]) ** 2) / 0.02).exp()
    kernel[own[:, None] == others] = 0.0
    expected = (kernel @ (w / q)[others]) / (kernel @ (1 / q)[others])
    torch.testing.assert_close(c, expected, rtol=1e-4, atol=1e-5)
    # X_1 | x_t ~ N(0.9 x / 0.82, 0.01 / 0.82); w = exp(0.8 x_1 - 0.32)
    near = x[:, 0].abs() < 1.5
    given = (0.8 * 0.9 * x[:, 0] / 0.82 + 0.32 * 0.01 / 0.82 - 0.32).exp()
    torch.testing.assert_close(c[near], given[near], rtol=0.1, atol=0.0)
    hidden = replace(found, points=found.points.clone())
    hidden.points[25:50] += 3.0  # among the others: seen by the rest, not by themselves
    moved = 1 + hidden.expected_excess(x, alpha, beta, own, others)
    alone = 1 + hidden.expected_excess(x[30:31], alpha[:1], beta[:1], own[30:31], own[30:31])
    assert not torch.equal(moved[:25], c[:25])
    assert float(alone) == 1.0


# ---------------------------------------------------------------------------- hopeless tilts


@pytest.mark.parametrize("proposal", ["mixed", "reference"])
def test_hopeless(proposal: str) -> None:
    """exp(8 x) on N(0, 1) needs e^32 samples: DEGENERATE, no update, the model as it was."""
    model, init = affine(), affine()
    with torch.no_grad():
        init.trainable.offset += 0.5  # type: ignore[union-attr, operator]
    problem = ControlProblem(model, LinearReward(8.0))
    solver = quick(20, proposal=proposal, rounds=1)
    for start in (None, init):
        out = solver.solve(problem, Context(SEED), init=start)
        assert out.result is Result.DEGENERATE
        assert out.stats["num_updates"] == 0
        assert out.stats["effective_size"] < 100
        assert same(out.model, start or model)
        assert not any(p.requires_grad for p in out.model.trainable.parameters())
    assert out.stats["path_kl"] > 0.01  # of init, against the reference


def test_hopeless_after_all_rounds() -> None:
    """Too few stages for the tilt: trained, found wanting, and the untouched model returned."""
    model = affine()
    out = solve(model, LinearReward(20.0), quick(20, rounds=2))
    assert out.result is Result.DEGENERATE
    assert out.stats["num_updates"] == 10
    assert same(out.model, model)


def test_strong_tilt_in_stages() -> None:
    """exp(3 x) on N(0, 1): 4.5 nats, hopeless for samples of the reference (e^9 to one)."""
    plain = quick(10, proposal="reference", rounds=1)
    assert solve(affine(), LinearReward(3.0), plain).result is Result.DEGENERATE
    tempers: dict[int, float] = {}
    out = solve(
        affine(), LinearReward(3.0), quick(600, 0.2, rounds=6),
        on_step=lambda s: tempers.update({s.update: s.stats["temper"]}),
    )  # fmt: skip
    assert out.result is Result.DONE
    assert tempers[1] < 0.6
    assert tempers[600] == 1.0
    mean, variance = law(out.model, CHAIN)
    assert mean == pytest.approx(3.0, abs=0.1)
    assert variance == pytest.approx(1.0, abs=0.15)
    assert out.stats["tilt_kl"] == pytest.approx(4.5, rel=0.05)


# ---------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Levels:
    """Conditions: a level of -1 or 1 for each sample, and its name."""

    def draw(self, count: int, seed: Seed) -> Cond:
        level = torch.randint(0, 2, (count,), generator=seed.generator()) * 2.0 - 1
        return {"level": level, "name": ["up" if v > 0 else "down" for v in level.tolist()]}


class Conditional(nn.Module):
    """A correction that sees the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.ModuleList([Affine(STEPS), Affine(STEPS)])

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        level = cond["level"]
        assert isinstance(level, Tensor)
        down, up = (part(x, t) for part in self.affine)
        return torch.where(level[:, None] > 0, up, down)


def conditional() -> FlowModel:
    return (
        gaussian([0.0], 1.0).flow(hidden=()).with_delta(Correction(Conditional(), takes_cond=True))
    )


def uneven(x: Tensor, cond: Cond) -> Tensor:
    """level * x, and 5 nats less for one of the levels."""
    level = cond["level"]
    assert isinstance(level, Tensor)
    return level * x[:, 0] + 2.5 * level


@pytest.mark.parametrize("proposal", ["mixed", "reference"])
def test_conditions_have_their_own_normalisers(proposal: str) -> None:
    """Each conditional law is tilted by its own reward, hard condition or not."""
    problem = ControlProblem(conditional(), BlackBox(uneven, takes_cond=True), Levels())
    out = quick(200, proposal=proposal).solve(problem, Context(SEED))
    assert "gap" not in out.stats
    if proposal == "mixed":  # half of the last bank comes from where the optimum is
        assert out.stats["effective"] > 0.5
    else:
        assert out.stats["effective"] == pytest.approx(math.exp(-1), rel=0.3)
    cond = Levels().draw(4000, SEED)
    x, level = CHAIN.sample(out.model, 4000, seed=SEED, cond=cond)[:, 0], cond["level"]
    assert isinstance(level, Tensor)
    for sign in (-1.0, 1.0):
        assert float(x[level == sign].mean()) == pytest.approx(sign, abs=0.13)


def test_conditions_that_never_repeat_are_refused() -> None:
    """Continuous conditions have no normalisers to estimate: a sentence before any work."""

    class Continuous:
        def draw(self, count: int, seed: Seed) -> Cond:
            return {"level": torch.rand(count, generator=seed.generator())}

    problem = ControlProblem(conditional(), BlackBox(uneven, takes_cond=True), Continuous())
    with pytest.raises(UnsupportedError, match=r"normaliser.* 4096 distinct .*rarest has 1"):
        quick(sampler=EULER).solve(problem, Context(SEED))


def test_groups() -> None:
    """Samples share a group where all of their conditions agree."""
    cond: Cond = {"a": torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0]]), "b": ["x", "y", "y", "x"]}
    label, sizes = groups_of(cond, 4)
    assert label[0] == label[3]
    assert len({int(v) for v in label}) == 3
    assert sorted(sizes) == [1, 1, 2]
    assert groups_of(None, 3)[1] == [3]


# ---------------------------------------------------------------------------- driving it


@pytest.mark.parametrize("proposal", ["mixed", "reference"])
def test_resumed_equals_straight(proposal: str) -> None:
    """From every snapshot, the rest of the run gives the same bits and statistics.

    With a bank of the reference any update can be resumed; with a mixed one the ends of rounds.
    """
    problem = ControlProblem(affine(), LinearReward(1.0))
    training = Training(num_updates=12, learning_rate=1e-2, ema=0.9, accumulate=2)
    solver = quick(
        training=training, sampler=Sampler(num_steps=10), num_samples=200, rounds=3,
        batch_size=32, min_effective_size=5.0, proposal=proposal, num_evaluate=16,
    )  # fmt: skip
    frames: dict[int, Snapshot] = {}
    steps: dict[int, Mapping[str, float]] = {}

    def keep(step: Step) -> None:
        steps[step.update] = step.stats
        if step.snapshot is not None:
            frames[step.update] = step.snapshot()

    context = Context(SEED.child("resume"), on_step=keep)
    straight = solver.solve(problem, context)
    first = dict(steps)
    assert sorted(frames) == ([4, 8, 12] if proposal == "mixed" else list(range(1, 13)))
    assert len({s["effective"] for s in first.values()}) == 3
    for update, frame in list(frames.items()):
        if update == 12:  # nothing is left to train, and no bank is drawn for that
            continue
        steps.clear()
        resumed = solver.solve(problem, replace(context, resume=frame))
        assert resumed.stats == straight.stats
        assert steps == {u: s for u, s in first.items() if u > update}
        assert same(straight.model, resumed.model)


def test_started_from_init() -> None:
    """Training begins at ``init``, and a mixed bank knows that it is nearly there."""
    problem = ControlProblem(affine(std=0.7), LinearReward(1.5))
    warm = quick().solve(problem, Context(SEED)).model
    solver = quick(1, rate=1e-6, rounds=1)
    out = solver.solve(problem, Context(SEED.child("again")), init=warm)
    cold = solver.solve(problem, Context(SEED.child("again")))
    assert law(out.model, CHAIN)[0] == pytest.approx(law(warm, CHAIN)[0], abs=1e-3)
    assert out.stats["effective_size"] > 1.3 * cold.stats["effective_size"]


# ---------------------------------------------------------------------------- bad input


class Untouchable(nn.Module):
    """A network that must not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")


def untouchable() -> FlowModel:
    return FlowModel(Untouchable(), Linear(), Euclidean((1,)), predicts="velocity")


def test_missing_values_are_found_before_any_work() -> None:
    """The entropy of a flow has a gradient only: an error at the solver and at the loop."""
    model = untouchable()
    score = FlowDensity(model).log
    assert score.offers is Access.GRAD
    with pytest.raises(CapabilityError, match="WeightedMatching needs VALUE"):
        solve(model, score)
    with pytest.raises(CapabilityError, match=r"WeightedMatching needs VALUE.*VALUE is missing"):
        mirror_descent(
            Entropy(), model, quick(), [0.1],
            density=lambda m, seed: FlowDensity(m, seed=seed), context=Context(SEED),
        )  # fmt: skip


def test_a_black_box_and_adjoint_matching_do_not_fit() -> None:
    """The loop says so before any work, and what to use instead; this solver is fine with it."""
    objective = ExpectedReward(BlackBox(lambda x: x[:, 0]))

    def density(m: FlowModel, seed: Seed) -> FlowDensity:
        return FlowDensity(m, sampler=EULER, num_samples=256, seed=seed)

    context = Context(SEED)
    with pytest.raises(CapabilityError, match=r"needs GRAD.*such as WeightedMatching"):
        mirror_descent(
            objective, untouchable(), AdjointMatching(), [1.0], density=density, context=context
        )
    solver = quick(100, num_samples=2048)
    out = mirror_descent(
        objective, affine(), solver, [0.25, 0.25], density=density, context=context
    )
    assert law(out.model, CHAIN)[0] == pytest.approx(0.5, abs=0.1)


def test_run_files(tmp_path: Path) -> None:
    """``kind = "WeightedMatching"`` with its arguments; a mismatch is found by the check."""
    data: dict[str, Any] = {
        "models": {"pretrained": {"kind": "Gaussian", "mean": [0.0, 0.0]}},
        "objective": {
            "utility": {
                "kind": "ExpectedReward", "reward": {"kind": "Linear", "slope": [1.0, 0.0]}
            },
            "divergences": [{"kind": "KL", "prior": "pretrained", "weight": 1.0}],
        },
        "solver": {"kind": "WeightedMatching", "proposal": "reference", "rounds": 2},
    }  # fmt: skip
    plan = prepare(resolve(data))
    solver = plan.experiment.solver
    assert isinstance(solver, WeightedMatching)
    assert (solver.proposal, solver.rounds) == ("reference", 2)
    assert check(plan)
    data["objective"]["utility"] = {"kind": "Entropy"}
    data["objective"]["divergences"] = []
    data["evaluate"] = {"reward": {"kind": "Linear", "slope": [1.0, 0.0]}}
    data["algorithm"] = {"rates": [1.0]}
    with pytest.raises(CapabilityError, match="WeightedMatching needs VALUE"):
        check(prepare(resolve(data)))


def test_nan_reward() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        solve(affine(), Differentiable(lambda x: x[:, 0].log()))


def test_only_memoryless_kernels() -> None:
    with pytest.raises(UnsupportedError, match="WeightedMatching cannot train with Determin"):
        WeightedMatching(sampler=Sampler(Deterministic()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 1), ("batch_size", 0), ("neighbours", -1), ("rounds", 0),
        ("proposal", "init"), ("min_effective_size", 0.0), ("min_effective_size", 1e9),
        ("min_effective", 1.0), ("num_evaluate", 1),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        WeightedMatching(**{name: value})


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="Correction"):
        solve(gaussian([0.0], 1.0).flow(hidden=()), LinearReward(1.0))


# ---------------------------------------------------------------------------- several processes


def process(rank: int, folder: str) -> None:
    """One of two processes; a fit, and a tilt at the edge of hopeless for one bank alone."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    backend, found = Gloo(rank), {}
    for name, least in (("fit", 100.0), ("edge", 740.0)):
        solver = quick(200, rounds=2, num_samples=2000, min_effective_size=least)
        out = solve(affine(), LinearReward(1.0), solver, backend=backend)
        found[name] = {
            "parameters": tensors(out.model), "stats": dict(out.stats), "result": out.result.name,
        }  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    """Banks of their own, averaged gradients: the same parameters and the same decisions."""
    spawn: Callable[..., Any] = torch.multiprocessing.spawn
    spawn(process, args=(str(tmp_path),), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    sizes = [found["fit"]["stats"]["effective_size"] for found in (first, second)]
    assert sizes[0] != sizes[1]
    for name in ("fit", "edge"):
        assert first[name]["result"] == second[name]["result"]
        pairs = zip(first[name]["parameters"], second[name]["parameters"], strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    assert first["fit"]["result"] == "DONE"
    assert float(first["fit"]["stats"]["terminal"]) == pytest.approx(1.0, abs=0.25)
