"""Targets of the regression: signs, units, expectations, tempering, and which steps enter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltflow.analytic import gaussian, ring
from tiltflow.context import SingleProcess
from tiltflow.delta import MLP, Correction
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Ancestral, EulerMaruyama, LinearKernel, MomentMatched
from tiltflow.potential import ZERO, Differentiable, Potential
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear, Schedule, Tabulated, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.solvers.lean_adjoint import Carried, Rollout, Steps, rollout
from tiltflow.solvers.targets import (
    Mixer,
    Points,
    Weights,
    actual_shift,
    adjoint_target,
    choose_steps,
    path_weights,
    shortened,
    value_target,
)
from tiltflow.space import Euclidean

SEED = Seed(0).child("targets")
ALL_BARS = Tabulated((0.02, 0.2, 0.5, 0.8, 0.99))
KERNELS: dict[str, LinearKernel] = {
    "euler": EulerMaruyama(),
    "ancestral": Ancestral(),
    "moments": MomentMatched((0.0, 1.0), (0.6, 0.0)),
}


def roll(
    tuned: FlowModel,
    reference: FlowModel,
    terminal: Potential,
    kernel: LinearKernel | None = None,
    num_steps: int = 8,
    count: int = 64,
) -> tuple[Rollout, Steps]:
    like = torch.zeros((), dtype=torch.float32)
    steps = Steps.of(Sampler(kernel or EulerMaruyama(), num_steps), reference, like)
    path = rollout(tuned, reference, steps, terminal, count, seed=SEED, backend=SingleProcess())
    return path, steps


def moved(model: FlowModel, scale: float = 0.2) -> FlowModel:
    out, generator = freeze(model.clone()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in out.trainable.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return out


def corrected(schedule: Schedule | None = None) -> FlowModel:
    torch.manual_seed(0)
    delta = Correction(MLP((2,), (8,), zero_init=True))
    return freeze(ring().flow(schedule, hidden=()).with_delta(delta))


def network(predicts: str, schedule: Schedule) -> FlowModel:
    torch.manual_seed(2)
    return freeze(FlowModel(MLP((2,), (16,)), schedule, Euclidean((2,)), predicts=predicts))


# ------------------------------------------------------------------------------ units and sign


CASES = [("correction", Linear(), name) for name in KERNELS]
CASES += [("correction", ALL_BARS, "euler")]
CASES += [(p, Linear(), name) for p in ("velocity", "endpoint") for name in KERNELS]
CASES += [
    (p, s, name)
    for p in ("velocity", "endpoint", "noise", "score")
    for s in (ALL_BARS, VariancePreserving())
    for name in ("euler", "ancestral")
]


@pytest.mark.parametrize(("kind", "schedule", "kernel"), CASES, ids=str)
def test_points_are_the_transition_kl(kind: str, schedule: Schedule, kernel: str) -> None:
    """weight |output - target|^2 = KL(transition(tuned) || transition(reference).tilted(a_{k+1})).

    Every prediction type, network and correction: the same law is regressed on, so that the loss
    of noise prediction has the sign opposite to velocity prediction (oracle 15).
    """
    reference = corrected(schedule) if kind == "correction" else network(kind, schedule)
    tuned = moved(reference)
    path, steps = roll(tuned, reference, Quadratic(1.0, 2.0), KERNELS[kernel])
    targets, _ = adjoint_target(path, steps, None)
    noisy = int((steps.weight > 0).sum())
    k, b = choose_steps(noisy, 64, 1.0, 0.0, SEED.generator())
    points = Points.of(path, targets, steps, k, b, kind == "correction")
    assert len(points.x) == noisy * 64
    out = (tuned.correction if kind == "correction" else tuned.output)(points.x, points.t, None)
    assert out is not None
    loss = points.weight * (out - points.target).square().sum(1)
    t, s = steps.t[k], steps.s[k]
    here = KERNELS[kernel].transition(tuned, points.x, t, s)
    there = KERNELS[kernel].transition(reference, points.x, t, s).tilted(path.adjoints[k + 1, b])
    kl = here.kl(there)
    assert float(kl.max()) > 1e-3
    # float32: means agree to rounding, which the KL divides by twice the variance.
    torch.testing.assert_close(loss, kl, rtol=2e-3, atol=1e-3 * float(kl.median()))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_adjoint_target_is_the_tilted_end_point(kernel: LinearKernel) -> None:
    """on_state x + on_endpoint target = mean of reference.tilted(a_{k+1})."""
    reference = corrected()
    path, steps = roll(moved(reference), reference, LinearReward(0.7), kernel)
    target, active = adjoint_target(path, steps, None)
    assert active == 1.0
    for k in range(7):
        t, s = steps.t[k].expand(64), steps.s[k].expand(64)
        c, x = steps.coefficients, path.states[k]
        tilted = kernel.transition(reference, x, t, s).tilted(path.adjoints[k + 1])
        mean = c.on_state[k] * x + c.on_endpoint[k] * target[k]
        torch.testing.assert_close(mean, tilted.mean, rtol=1e-4, atol=1e-4)


def test_zero_reward_is_a_fixed_point() -> None:
    """phi = 0 and tuned = reference: target = reference, loss exactly 0 (oracle 14)."""
    for reference, shared in ((corrected(), True), (network("velocity", Linear()), False)):
        path, steps = roll(reference, reference, ZERO)
        target, active = adjoint_target(path, steps, 10.0)
        assert active == 0
        assert torch.equal(target, path.reference)
        value = value_target(path, path_weights(path.log_weight, 0.5))  # type: ignore[arg-type]
        torch.testing.assert_close(value, path.tuned, rtol=0, atol=1e-6)
        k, b = choose_steps(8, 64, 1.0, 0.0, SEED.generator())
        points = Points.of(path, target, steps, k, b, shared)
        out = (reference.correction if shared else reference.output)(points.x, points.t, None)
        assert out is not None
        assert float((points.weight * (out - points.target).square().sum(1)).max()) < 1e-9


def test_clipping() -> None:
    """A shift over ``clip`` times the median distance to the actual ends is cut to it."""
    shift = torch.zeros(2, 5, 2)
    shift[:, 0, 0], shift[:, 1, 1] = 0.5, torch.tensor([9.0, -90.0])
    actual = torch.zeros(2, 5, 2)
    actual[:, :, 0] = torch.tensor([1.0, -2.0, 2.0, 3.0, 1000.0])  # median length 2
    for clip in (None, 100.0):
        assert torch.equal(shortened(shift, actual, clip), shift)
    found = shortened(shift, actual, 3.0)
    torch.testing.assert_close(found[:, 1, 1], torch.tensor([6.0, -6.0]))
    assert torch.equal(found[:, 0], shift[:, 0])
    assert float(found[:, 2:].abs().max()) == 0
    torch.testing.assert_close(shortened(shift, actual, 0.1)[:, 0, 0], torch.full((2,), 0.2))


def test_the_targets_are_clipped() -> None:
    """Both targets move a predicted end point by at most ``clip`` typical distances."""
    reference = corrected()
    path, steps = roll(reference, reference, LinearReward([300.0, 0.0]), count=100)
    assert path.log_weight is not None
    actual = (path.states[-1] - path.reference).norm(dim=2).median(1).values
    weights = path_weights(path.log_weight, 0.05)
    for clip in (0.5, 2.0):
        for target in (
            adjoint_target(path, steps, clip)[0],
            value_target(
                path,
                replace(weights, weight=torch.full((100,), 2.0)),
                actual_shift(path, clip),
            ),
        ):
            longest = (target - path.reference).norm(dim=2).max(1).values
            assert bool((longest <= clip * actual * 1.001).all())
            if clip < 1:
                assert float(longest[0]) > 0.99 * clip * float(actual[0])


def test_a_sparse_reward_keeps_its_few_adjoints() -> None:
    """Samples without a gradient do not lower the bound; they are counted as inactive."""
    reference = corrected()
    path, steps = roll(reference, reference, ZERO, count=20)
    adjoints = torch.zeros_like(path.adjoints)
    adjoints[:, :4, 0] = 0.1
    target, active = adjoint_target(replace(path, adjoints=adjoints), steps, 8.0)
    gain = (steps.coefficients.variance / steps.coefficients.on_endpoint)[:, None]
    found = (target - path.reference)[..., 0] / gain
    assert active == pytest.approx(4 / 20)
    torch.testing.assert_close(found[:, :4], torch.full((8, 4), 0.1), rtol=1e-2, atol=1e-4)
    assert float(found[:, 4:].abs().max()) < 1e-4


# ------------------------------------------------------------------------------ path weights


def test_path_weights_without_tempering() -> None:
    """Enough effective samples: w = exp(log_weight) / mean, temper 1."""
    log_weight = 0.3 * torch.randn(500, generator=SEED.generator())
    out = path_weights(log_weight, 0.5)
    assert out.temper == 1.0
    torch.testing.assert_close(out.weight, log_weight.exp() / log_weight.exp().mean())
    assert out.effective == pytest.approx(float(1 / (out.weight**2).mean()), rel=1e-5)


@pytest.mark.parametrize("spread", [2.0, 20.0, 1000.0])
@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
def test_tempering_keeps_the_effective_size(spread: float, bound: float) -> None:
    """The largest power of the weights whose effective fraction is at least the bound."""
    log_weight = spread * torch.randn(400, generator=SEED.generator())
    out = path_weights(log_weight, bound)
    assert 0 < out.temper < 1
    assert float(out.weight.mean()) == pytest.approx(1, rel=1e-5)
    kept = float(1 / (out.weight.double() ** 2).mean())
    assert kept == pytest.approx(bound, rel=2e-3)
    assert kept >= bound * (1 - 1e-5)
    assert out.effective < bound
    # Order is kept, a shift of the log-weights changes nothing.
    assert torch.equal(out.weight.argmax(), log_weight.argmax())
    torch.testing.assert_close(
        path_weights(log_weight + 1e3, bound).weight, out.weight, rtol=1e-2, atol=1e-4
    )


# ------------------------------------------------------------------------------ the value target


def test_expectation_of_the_value_target() -> None:
    """E[(w - 1)_+ (X_1 - e) | x_k] in closed form, on N(0, 1) with phi = s x (|z| < 4.5).

    With Y = X_1 - e ~ N(0, v) and w = exp(s (e + Y) - s^2 / 2) > 1 for Y > c = s/2 - e, and
    W = E[w | x], under which Y ~ N(s v, v)::

        W (s v Phi(u) + sqrt(v) phi(u)) - sqrt(v) phi(c / sqrt(v)),   u = (s v - c) / sqrt(v)
    """
    slope, n, num_steps = 0.5, 200_000, 6
    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    posterior = (1 - times) ** 2 / (times**2 + (1 - times) ** 2)
    kernel = MomentMatched(tuple(times.tolist()), tuple(posterior.tolist()))
    reference = freeze(gaussian([0.0], 1.0).flow(hidden=()))
    path, _ = roll(reference, reference, LinearReward(slope), kernel, num_steps, n)
    assert path.log_weight is not None
    torch.testing.assert_close(path.log_weight, slope * path.states[-1][:, 0])
    weight = (slope * path.states[-1][:, 0] - slope**2 / 2).exp()
    target = value_target(path, Weights(weight, 1.0, 1.0))
    normal = torch.distributions.Normal(0.0, 1.0)
    for k in range(num_steps):
        shift, x = (target - path.tuned)[k, :, 0], path.states[k, :, 0]
        e, v = path.tuned[k, :, 0], float(posterior[k])
        root, c = math.sqrt(v), slope / 2 - e
        u = (slope * v - c) / root
        density = (slope * e + slope**2 * (v - 1) / 2).exp()
        exact = density * (slope * v * normal.cdf(u) + root * normal.log_prob(u).exp())
        exact = exact - root * normal.log_prob(c / root).exp()
        residual = shift - exact
        for test in (residual, residual * x):
            error = float(test.std()) / math.sqrt(n)
            assert abs(float(test.mean())) < 4.5 * error
    assert float((target - path.tuned)[0].mean()) > 0.25  # s Phi(s/2) = 0.299


def test_value_target_points_uphill() -> None:
    """Its mean is on the side of the optimum, and vanishes there: the fixed point (any phi)."""
    mixture = gaussian([0.0], 1.0)
    kernel = MomentMatched((0.0, 0.5, 1.0), (1.0, 0.5, 0.0))
    reference = freeze(mixture.flow(hidden=()))
    tilted = freeze(mixture.tilted(0.8)[0].flow(hidden=()))
    for tuned, low, high in ((reference, 0.1, 1.0), (tilted, -0.02, 0.02)):
        path, _ = roll(tuned, reference, LinearReward(0.8), kernel, 2, 20_000)
        weights = path_weights(path.log_weight, 0.1)  # type: ignore[arg-type]
        shift = value_target(path, weights) - path.tuned
        assert low < float(shift[0].mean()) < high
    # At the optimum of an exact chain the weights are constant, not only on average.
    assert float((weights.weight - 1).abs().max()) < 1e-3


# ------------------------------------------------------------------------------ the mixture


def mixture(noise: float, spread: float, count: int = 4000) -> tuple[Rollout, Tensor, Weights]:
    """Paths of N(0, 1), adjoint targets of pure noise, and path weights that know nothing."""
    reference = freeze(gaussian([0.0], 1.0).flow(hidden=()))
    path, _ = roll(reference, reference, ZERO, count=count)
    generator = SEED.generator()
    adjoint = path.tuned + noise * torch.randn(path.tuned.shape, generator=generator)
    weight = 1 + spread * torch.randn(count, generator=generator)
    return path, adjoint, Weights(weight, 1.0, 1.0)


def mean_square(shift: Tensor) -> Tensor:
    return shift.square().sum(2).mean(1)


def test_shares_are_inverse_to_the_noise() -> None:
    """Share of the adjoint = noise_value / (noise_adjoint + noise_value), tempered or not."""
    for noise, spread, temper in ((0.2, 0.3, 1.0), (0.05, 0.3, 1.0), (0.2, 0.1, 0.25)):
        path, adjoint, weights = mixture(noise, spread)
        mixer = Mixer()
        out = mixer.mix(path, adjoint, replace(weights, temper=temper))
        value = value_target(path, weights)
        v = mean_square(value - path.tuned) / temper**2
        # Nothing disagrees but by chance: a squared mean of 4000 samples, counted 30 times.
        torch.testing.assert_close(
            mixer.share, v / (v + mean_square(adjoint - path.tuned)), rtol=0.1, atol=0.01
        )
        share = mixer.share[:, None, None]
        torch.testing.assert_close(out, share * adjoint + (1 - share) * value)


def test_noise_is_remembered() -> None:
    """The noise is an exponential average over roll-outs, part of the solver's state."""
    mixer, squares = Mixer(memory=0.75), []
    for noise in (0.2, 0.6):
        path, adjoint, weights = mixture(noise, 0.3)
        mixer.mix(path, adjoint, weights)
        squares.append(mean_square(adjoint - path.tuned))
    torch.testing.assert_close(mixer.noise[0], 0.75 * squares[0] + 0.25 * squares[1])


def test_what_is_carried_follows_the_share() -> None:
    """Everything at first; then an eighth of the trajectories where the share is below that."""
    mixer = Mixer()
    assert mixer.carry()[0] == 0
    mixer.noise = torch.tensor([[9.0, 9.0, 1.0, 9.0], [1.0] * 4, [0.0] * 4, [0.0] * 4])
    assert mixer.carry() == (2, 1 / 8)
    mixer.noise[1] = 0.0
    assert mixer.carry() == (3, 1 / 8)  # the last step is always whole


def test_a_few_carried_adjoints_speak_for_all() -> None:
    """Averaged over trajectories, the share of the adjoint is that of everything carried."""
    path, adjoint, weights = mixture(1.0, 0.3)
    index = torch.arange(0, 4000, 4)
    value = value_target(path, weights)
    means = []
    for part in (path, replace(path, carried=Carried(5, index))):
        out = Mixer().mix(part, adjoint, weights)
        share = ((out - value) / (adjoint - value))[..., 0]
        means.append(share.mean(1))
    assert bool((share[:5, 1] == 0).all())
    assert bool((share[:5, 0] > 0).all())
    # The noise is estimated from fewer samples, hence the tolerance.
    torch.testing.assert_close(means[1][:5], means[0][:5], rtol=0.2, atol=0.01)
    torch.testing.assert_close(means[1][5:], means[0][5:], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------ which steps


@pytest.mark.parametrize(
    ("num_steps", "late", "early"),
    [(40, 0.25, 1 / 3), (39, 0.25, 0.5), (5, 0.1, 0.0), (1, 0.5, 1.0)],
)
def test_choose_steps(num_steps: int, late: float, early: float) -> None:
    """All of the last ``late`` part, nearest DATA, and ``early`` of the rest, each once."""
    count = 300
    k, b = choose_steps(num_steps, count, late, early, SEED.generator())
    num_late = math.ceil(late * num_steps)
    num_early = round(early * (num_steps - num_late))
    assert len(k) == len(b) == count * (num_late + num_early)
    assert len(set(zip(k.tolist(), b.tolist(), strict=True))) == len(k)
    hits = torch.bincount(k, minlength=num_steps)
    assert bool((hits[num_steps - num_late :] == count).all())  # the data end is always in
    assert int(hits[-1]) == count
    if num_early:
        rest = hits[: num_steps - num_late].double()
        p = num_early / (num_steps - num_late)
        if p < 1:  # uniform: binomial counts, |z| < 4.5
            assert float((rest - count * p).abs().max()) < 4.5 * math.sqrt(count * p * (1 - p))
    assert bool((torch.bincount(b) == num_late + num_early).all())


def test_choose_steps_is_shuffled_and_addressed() -> None:
    """The order is random (mini-batches are slices of it), and the seed decides everything."""
    first = choose_steps(40, 64, 0.25, 1 / 3, SEED.generator())
    again = choose_steps(40, 64, 0.25, 1 / 3, SEED.generator())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first[1][:64].unique()) > 30
    assert not torch.equal(
        first[0], choose_steps(40, 64, 0.25, 1 / 3, SEED.child(1).generator())[0]
    )


def test_points_are_indexed_together() -> None:
    """Indexing keeps x, t, target, weight and conditions of a point together."""
    n = torch.arange(6.0)
    points = Points(n[:, None], n, n[:, None], n, n[:, None], {"id": n})
    part = points[torch.tensor([4, 1])]
    for entry in (part.x[:, 0], part.t, part.target[:, 0], part.weight, part.cond["id"]):  # type: ignore[index]
        assert isinstance(entry, Tensor)
        assert entry.tolist() == [4.0, 1.0]


def test_nonlinear_reward_value_and_adjoint_agree() -> None:
    """Both targets move the mean the same way at the first step of a small tilt (first order).

    E[(v/on_endpoint) a] is Cov(X_1, phi) + O(phi^2); E[(w - 1)_+ (X_1 - e)] is half of it for an
    odd phi, because bad paths do not push.
    """
    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    posterior = (1 - times) ** 2 / (times**2 + (1 - times) ** 2)
    kernel = MomentMatched(tuple(times.tolist()), tuple(posterior.tolist()))
    reference = freeze(gaussian([0.0], 1.0).flow(hidden=()))
    terminal = Differentiable(lambda x: 0.1 * x[:, 0].tanh())
    path, steps = roll(reference, reference, terminal, kernel, 40, 100_000)
    adjoint, _ = adjoint_target(path, steps, None)
    value = value_target(path, path_weights(path.log_weight, 0.1))  # type: ignore[arg-type]
    exact = 0.1 * 0.605706  # Cov(x, tanh x) = E sech^2 x under N(0, 1)
    for target, part, tolerance in ((adjoint, 1.0, 0.01), (value, 0.5, 0.05)):
        shift = (target - path.tuned)[0, :, 0]
        error = 4.5 * float(shift.std()) / 100_000**0.5
        assert abs(float(shift.mean()) - part * exact) < tolerance * exact + error


def test_silent_adjoints_lose_their_share() -> None:
    """Adjoints near zero where values say "move" get almost nothing, in spite of no noise.

    The means may differ in sign, or symmetrically in x. Late steps have nothing to move.
    """
    reference = freeze(gaussian([0.0], 1.0).flow(hidden=()))
    path, _ = roll(reference, reference, ZERO, count=2000)
    x = path.states[-1][:, 0]
    for log_weight, most in ((2 * x.sign(), 0.25), (x**2 / 10, 0.5)):
        weights = Weights(log_weight.exp() / log_weight.exp().mean(), 1.0, 1.0)
        silent = path.tuned + 1e-4 * torch.randn(path.tuned.shape, generator=SEED.generator())
        mixer = Mixer()
        out = mixer.mix(path, silent, weights)
        early = mixer.share[3:6]
        assert float(early.max()) < most
        move = (out - path.tuned)[3:6, :, 0].square().mean(1)
        full = (value_target(path, weights) - path.tuned)[3:6, :, 0].square().mean(1)
        torch.testing.assert_close(move, (1 - early) ** 2 * full, rtol=1e-2, atol=1e-4)
