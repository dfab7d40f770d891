"""Back-propagation through the sampler: exact on whole chains, and what truncation leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.affine import affine as steps_affine
from oracles.affine import law as law_of
from oracles.affine import optimal_law, same, tensors
from tiltflow.analytic import ring
from tiltflow.context import Context, Snapshot, Step
from tiltflow.delta import MLP, Correction
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.experiment import prepare, resolve
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Ancestral, Deterministic, EulerMaruyama
from tiltflow.potential import ZERO, BlackBox, Differentiable, Hinge, Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import DirectBackprop
from tiltflow.solvers.direct import _Unrolled
from tiltflow.space import Euclidean, ZeroMean
from tiltflow.training import Training
from tiltflow.types import Access, Cond

SEED = Seed(0).child("direct")
K = 16
EULER = Sampler(EulerMaruyama(), K)


def affine(mean: float = 0.0, std: float = 1.0, num_steps: int = K) -> FlowModel:
    """N(mean, std^2) with a correction that is affine at each step of the chain."""
    return steps_affine(mean, std, num_steps)


def law(model: FlowModel, sampler: Sampler = EULER) -> tuple[float, float]:
    """Mean and variance of the chain's end."""
    return law_of(model, sampler)


def quick(num_updates: int = 120, rate: float = 0.1, **options: Any) -> DirectBackprop:
    training = Training(num_updates=num_updates, learning_rate=rate, ema=0.95)
    settings: dict[str, Any] = {
        "sampler": EULER, "num_evaluate": 256, "training": training, **options,
    }  # fmt: skip
    return DirectBackprop(**settings)


def solve(
    model: FlowModel, reward: Potential, solver: DirectBackprop | None = None, **context: Any
) -> Solution[FlowModel]:
    problem = ControlProblem(model, reward)
    return (solver or quick()).solve(problem, Context(**{"seed": SEED, **context}))


@dataclass(frozen=True, eq=False)
class SlopeOnly(Potential):
    """A potential of which only the gradient is known."""

    whole: Potential

    @property
    def offers(self) -> Access:
        return Access.GRAD

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.whole.grad(x, cond)


# ---------------------------------------------------------------------------- the optimum


def test_linear_reward() -> None:
    """r = 1.5 x on N(0, 0.7^2): the exact optimum of the chain, +1.5 times its own variance."""
    model = affine(std=0.7)
    own = law(model)[1]
    out = solve(model, LinearReward(1.5))
    mean, variance = law(out.model)
    assert mean == pytest.approx(1.5 * own, abs=0.025)
    assert variance == pytest.approx(own, abs=0.025)
    assert out.result is Result.DONE
    assert out.stats["path_kl"] == pytest.approx(1.5**2 * own / 2, rel=0.05)
    assert out.stats["gap"] < 0.01


@pytest.mark.parametrize(("slope", "curvature"), [(0.7, 1.0), (0.0, -0.3)])
def test_quadratic_reward(slope: float, curvature: float) -> None:
    """r = a x - c x^2 / 2 on N(0, 1): the law of the best chain, by its Riccati recursion."""
    model = affine()
    best = optimal_law(model, EULER, slope, curvature)
    assert best[1] == pytest.approx(1 / (1 + curvature), abs=0.05)
    out = solve(model, LinearReward(slope) + Quadratic(0.0, curvature), quick(200))
    assert law(out.model) == pytest.approx(best, abs=0.04)


def test_only_the_gradient_is_needed() -> None:
    """The same updates, bit for bit, for a potential without values; its loss lacks -phi."""
    reward, solver = LinearReward(1.0), quick(10)
    stats: list[Mapping[str, float]] = []
    both = solve(affine(), reward, solver, on_step=lambda s: stats.append(s.stats))
    alone = solve(affine(), SlopeOnly(reward), solver, on_step=lambda s: stats.append(s.stats))
    assert same(both.model, alone.model)
    assert "terminal" in both.stats
    assert "terminal" not in alone.stats
    for first, second in zip(stats[:10], stats[10:], strict=True):
        assert second["loss"] == pytest.approx(first["loss"] + first["terminal"], abs=1e-5)
        assert second["loss"] == pytest.approx(second["path_kl"], abs=1e-6)


def test_zero_mean_space() -> None:
    """A network that leaves its space: the loss sees the space only, and so does the reward."""
    space, slope = ZeroMean((3,)), torch.tensor([1.0, 0.0, 0.5])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(K, 3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            v = ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None] * x
            return v + self.shift[(t * K).round().long()] + 5.0

    model = FlowModel(Net(), Linear(), space, predicts="velocity")
    out = solve(model, LinearReward(slope), quick(100))
    x = EULER.sample(out.model, 8000, seed=SEED)
    assert float(x.mean(1).abs().max()) < 1e-5
    own = law(affine())[1]  # of each direction of the space
    exact = own * space.project(slope[None])[0]
    torch.testing.assert_close(x.mean(0), exact, rtol=0, atol=0.07)


@dataclass(frozen=True)
class Levels:
    """Conditions: a level of -1 or 1 for each sample."""

    def draw(self, count: int, seed: Seed) -> Cond:
        return {"level": torch.randint(0, 2, (count,), generator=seed.generator()) * 2.0 - 1}


class Conditional(nn.Module):
    """A correction that sees the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(K))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        level = cond["level"]
        assert isinstance(level, Tensor)
        return (self.offset[(t * K).round().long()] * level)[:, None]


def test_conditions() -> None:
    """Each conditional law is tilted by its own reward, without any normaliser."""

    def reward(x: Tensor, cond: Cond) -> Tensor:
        level = cond["level"]
        assert isinstance(level, Tensor)
        return level * x[:, 0] + 2.5 * level

    delta = Correction(Conditional(), takes_cond=True)
    problem = ControlProblem(
        affine().with_delta(delta), Differentiable(reward, takes_cond=True), Levels()
    )
    out = quick(60).solve(problem, Context(SEED))
    assert "gap" not in out.stats
    cond = Levels().draw(4000, SEED)
    x, level = EULER.sample(out.model, 4000, seed=SEED, cond=cond)[:, 0], cond["level"]
    assert isinstance(level, Tensor)
    for sign in (-1.0, 1.0):
        assert float(x[level == sign].mean()) == pytest.approx(sign, abs=0.12)


# ---------------------------------------------------------------------------- the gradient


class Tiny(nn.Module):
    """Two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.numbers[0] * (x + t[:, None]).sin() + self.numbers[1]


REWARD = Differentiable(lambda x: (1.3 * x[:, 0]).sin() - 0.2 * x[:, 1] ** 2)


def unrolled(model: FlowModel, reference: FlowModel, checkpointing: bool) -> _Unrolled:
    """The loss with six steps and sixteen trajectories."""
    sampler = Sampler(EulerMaruyama(), 6)
    solver = quick(sampler=sampler, num_trajectories=16, checkpointing=checkpointing)
    return _Unrolled(solver, model, freeze(reference), REWARD, None, Context(SEED))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["correction", "corrected reference", "network"])
def test_gradient_against_finite_differences(kind: str, checkpointing: bool) -> None:
    """d loss / d parameters along whole paths with fixed noise, |relative error| < 1 %."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = MLP((2,), (8,))
    if kind == "network":
        reference = FlowModel(base, Linear(), Euclidean((2,)), predicts="velocity")
        model, number = reference.clone(), 2
    else:
        reference = ring(3).flow(hidden=()).with_delta(Correction(Tiny()))
        model, number = reference.clone(), 2
        if kind == "correction":
            reference = ring(3).flow(hidden=())
            model = FlowModel(
                reference.net, Linear(), Euclidean((2,)), predicts="endpoint",
                delta=Correction(Tiny()),
            )  # fmt: skip
    parameter = list(model.trainable.parameters())[-1]
    with torch.no_grad():
        parameter += 0.1
    loss = unrolled(model, reference, checkpointing)
    (gradient,) = torch.autograd.grad(loss(3, 0)[0], parameter)
    for i in range(number):
        step, values = 0.02, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[i] += sign * step
                values.append(float(loss(3, 0)[0]))
                parameter[i] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert float(gradient[i]) == pytest.approx(slope, rel=0.01, abs=2e-4)


def test_checkpointing_changes_nothing_but_memory() -> None:
    """The same parameters after training, up to rounding."""
    plain, saved = (
        solve(affine(), LinearReward(1.0), quick(10, checkpointing=c)).model for c in (False, True)
    )
    for p, q in zip(tensors(plain), tensors(saved), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert law(saved)[0] > 0.1


def test_depth_differentiates_the_last_steps_only() -> None:
    """Steps before the last four stay as they were, and no KL is charged for them."""
    model = affine()
    out = solve(model, LinearReward(1.0), quick(30, depth=4))
    for before, after in zip(tensors(model), tensors(out.model), strict=True):
        assert torch.equal(before[:-4], after[:-4])
        assert not bool((before[-4:] == after[-4:]).any())
    # The best tilt of the last four steps alone falls short of the whole chain's.
    assert 0.1 < law(out.model)[0] < 0.9 * law(model)[1]


def test_a_step_without_noise_is_not_trained() -> None:
    """The last step of DDPM's kernel: no KL can be charged there, so no reward is taken there."""
    model, sampler = affine(), Sampler(Ancestral(), K)
    out = solve(model, LinearReward(1.0), quick(20, sampler=sampler))
    for p in tensors(out.model):
        assert float(p[-1]) == 0.0
        assert float(p[-2]) != 0.0
    own = law(affine(), sampler)[1]
    assert 0.1 < law(out.model, sampler)[0] < 1.2 * own


# ---------------------------------------------------------------------------- driving it


def test_zero_reward_changes_nothing() -> None:
    """phi = 0: the loss and its gradient are 0; the result says that nothing was learnt."""
    losses: list[float] = []
    model = affine(0.3, 0.7)
    out = solve(model, ZERO, quick(12), on_step=lambda s: losses.append(s.stats["loss"]))
    assert set(losses) == {0.0}
    assert same(model, out.model)
    assert out.result is Result.STARVED


def test_starved() -> None:
    """A hinge that no sample reaches has no gradient: STARVED, and the model is unchanged."""
    hinge = Hinge(LinearReward(1.0), threshold=1e3, slope=5.0, side="above")
    model = affine()
    out = solve(model, hinge, quick(12))
    assert out.result is Result.STARVED
    assert same(model, out.model)
    assert solve(model, hinge, quick(4)).result is Result.DONE  # too early to say


def test_resumed_equals_straight() -> None:
    """From every update, the rest of the run gives the same bits and statistics."""
    problem = ControlProblem(affine(num_steps=5), LinearReward(1.0))
    training = Training(num_updates=6, learning_rate=1e-2, ema=0.9, accumulate=2)
    solver = quick(
        training=training, sampler=Sampler(num_steps=5), num_trajectories=8, num_evaluate=16
    )
    frames: dict[int, Snapshot] = {}
    steps: dict[int, Mapping[str, float]] = {}

    def keep(step: Step) -> None:
        steps[step.update] = step.stats
        assert step.snapshot is not None
        frames[step.update] = step.snapshot()

    context = Context(SEED.child("resume"), on_step=keep)
    straight = solver.solve(problem, context)
    first = dict(steps)
    assert sorted(frames) == [1, 2, 3, 4, 5, 6]
    for update, frame in list(frames.items()):
        steps.clear()
        resumed = solver.solve(problem, replace(context, resume=frame))
        assert resumed.stats == straight.stats
        assert steps == {u: s for u, s in first.items() if u > update}
        assert same(straight.model, resumed.model)


def test_started_from_init() -> None:
    """Training begins at ``init``; the KL is still that to the reference."""
    problem = ControlProblem(affine(), LinearReward(1.0))
    warm = quick().solve(problem, Context(SEED)).model
    out = quick(1, 1e-6).solve(problem, Context(SEED), init=warm)
    assert law(out.model)[0] == pytest.approx(law(warm)[0], abs=1e-3)
    assert out.stats["path_kl"] == pytest.approx(0.506, rel=0.1)


# ---------------------------------------------------------------------------- bad input


def test_missing_gradient_is_found_before_any_work() -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise AssertionError("called")

    model = FlowModel(Untouchable(), Linear(), Euclidean((1,)), predicts="velocity")
    with pytest.raises(CapabilityError, match="DirectBackprop needs GRAD"):
        solve(model, BlackBox(lambda x: x[:, 0]))


def test_run_files() -> None:
    """``kind = "DirectBackprop"``; ``depth`` is a number, or "none" for all steps."""
    data: dict[str, Any] = {
        "models": {"pretrained": {"kind": "Gaussian", "mean": [0.0, 0.0]}},
        "objective": {
            "utility": {
                "kind": "ExpectedReward", "reward": {"kind": "Linear", "slope": [1.0, 0.0]}
            },
            "divergences": [{"kind": "KL", "prior": "pretrained", "weight": 1.0}],
        },
        "solver": {"kind": "DirectBackprop", "depth": 10},
    }  # fmt: skip
    for depth, means in ((10, 10), ("none", None)):
        data["solver"]["depth"] = depth
        solver = prepare(resolve(data)).experiment.solver
        assert isinstance(solver, DirectBackprop)
        assert solver.depth == means


def test_divergence_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        solve(affine(), Differentiable(lambda x: x[:, 0].log()))


def test_only_memoryless_kernels() -> None:
    with pytest.raises(UnsupportedError, match="DirectBackprop cannot train with Determin"):
        DirectBackprop(sampler=Sampler(Deterministic()))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_trajectories", 0), ("depth", 0), ("depth", 41), ("num_evaluate", 1)],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        DirectBackprop(**{name: value})
