"""Thin tails in roll-outs: which trajectories are kept, and that nothing is biased by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiltflow.analytic import gaussian
from tiltflow.context import Context, SingleProcess
from tiltflow.errors import ConfigError
from tiltflow.kernel import EulerMaruyama
from tiltflow.potential import ZERO, Differentiable, Hinge
from tiltflow.problem import ControlProblem
from tiltflow.rewards.points import Linear
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.solvers.lean_adjoint import Rollout, Steps, kept, rollout
from tiltflow.solvers.targets import adjoint_target, path_weights, weighted_mean
from tiltflow.training import Training

X = Linear(1.0)


def tail(threshold: float = 2.0) -> Hinge:
    return Hinge(X, threshold, 3.0, "above")


def generator(number: int = 0) -> torch.Generator:
    return Seed(number).generator()


@pytest.mark.parametrize(("total", "inside"), [(1000, 10), (1000, 400), (64, 0), (64, 64)])
def test_strata(total: int, inside: int) -> None:
    """All of a thin stratum, half of a thick one; weights restore the strata's sizes."""
    active = torch.zeros(total, dtype=torch.bool)
    active[:inside] = True
    index, weight = kept(active, 64, torch.zeros(total, 1), generator())
    assert len(set(index.tolist())) == 64
    number = int(active[index].sum())
    assert number == (64 if inside == total else min(inside, 32))
    assert float(weight.mean()) == pytest.approx(1, abs=1e-6)
    assert float((weight * active[index]).mean()) == pytest.approx(inside / total, abs=1e-6)


def test_strata_are_unbiased() -> None:
    """The weighted mean of any function over the kept ones is the mean over all, on average."""
    x = torch.randn(2000, 1, generator=generator(1))
    active, f = x[:, 0] > 2, x[:, 0].exp()
    means = []
    for i in range(400):
        index, weight = kept(active, 64, x, generator(i))
        means.append(float((weight * f[index]).mean()))
    found = torch.tensor(means)
    assert abs(float(found.mean() - f.mean())) < 4.5 * float(found.std()) / 20


def paths(
    oversample: int, number: int = 0, chunk: int | None = None, threshold: float = 2.0
) -> tuple[Rollout, Steps]:
    model = gaussian([0.0], 1.0).flow(hidden=())
    steps = Steps.of(Sampler(EulerMaruyama(), 10), model, torch.zeros(()))
    out = rollout(
        model, model, steps, tail(threshold), 64, seed=Seed(number), backend=SingleProcess(),
        oversample=oversample, chunk=chunk,
    )  # fmt: skip
    return out, steps


def test_more_of_the_tail_is_kept() -> None:
    """Of 64 paths 1 or 2 are beyond two deviations; of 16 times as many, half are kept."""
    few, steps = paths(1)
    many, _ = paths(16)
    assert few.importance is None
    assert many.importance is not None
    assert many.states.shape == few.states.shape

    def beyond(path: Rollout) -> Tensor:
        return (path.states[-1, :, 0] > 2).float()

    assert float(beyond(few).sum()) <= 6
    assert 15 <= float(beyond(many).sum()) <= 32
    # The fraction that is reported is that of the law.
    _, active = adjoint_target(many, steps, None)
    assert active == pytest.approx(float(weighted_mean(beyond(many), many.importance)))
    assert active == pytest.approx(0.023, abs=0.02)


@pytest.mark.parametrize("chunk", [None, 20])
def test_adjoints_of_kept_paths(chunk: int | None) -> None:
    """On N(0, 1) the adjoint is a product of numbers times the gradient at the end, path by path,
    also where its graph was made only after the choice."""
    everywhere, _ = paths(1, threshold=-20.0)
    many, _ = paths(8, chunk=chunk)
    gradient = 3.0 * (many.states[-1] > 2)
    torch.testing.assert_close(many.adjoints[-1], gradient)
    gains = everywhere.adjoints[:, 0] / 3.0
    torch.testing.assert_close(many.adjoints, gains[:, None] * gradient)


def test_statistics_of_kept_paths_are_those_of_all() -> None:
    """E[log weight] and E[adjoint target] from 16-fold roll-outs agree with plain ones."""
    shifts: dict[int, list[float]] = {1: [], 16: []}
    for oversample, found in shifts.items():
        for i in range(60):
            path, steps = paths(oversample, 100 + i)
            target, _ = adjoint_target(path, steps, None)
            shift = (target - path.reference)[0, :, 0]
            found.append(float(weighted_mean(shift, path.importance)))
    plain, many = (torch.tensor(shifts[k]) for k in (1, 16))
    assert float(many.std()) < 0.5 * float(plain.std())  # what it is for
    error = float((plain.var() / 60 + many.var() / 60).sqrt())
    assert abs(float(plain.mean() - many.mean())) < 4.5 * error


def test_weights_of_weighted_paths() -> None:
    """Integer importances are repetitions."""
    values = torch.randn(30, generator=generator())
    counts = torch.arange(30) % 3 + 1
    stands = counts.float() / counts.float().mean()
    weighted = path_weights(values, 0.1, stands)
    repeated = path_weights(values.repeat_interleave(counts), 0.1)
    torch.testing.assert_close(weighted.weight.repeat_interleave(counts), repeated.weight)
    assert float((stands * weighted.weight).mean()) == pytest.approx(1, abs=1e-6)


def test_which_potentials_are_sparse() -> None:
    """Hinges are, and sums of hinges; a reward is not, nor is nothing."""
    smooth = Differentiable(lambda x: x[:, 0])
    x = torch.tensor([[-3.0], [0.0], [3.0]])
    both = 2 * tail() + Hinge(X, -2.0, 1.0, "below")
    assert both.sparse
    assert both.active(x).tolist() == [True, False, True]
    for other in (smooth, tail() + smooth, ZERO):
        assert not other.sparse
    assert smooth.active(x).all()


def test_oversampling_follows_the_tail() -> None:
    """Nothing is simulated in vain for a smooth reward; a thin tail brings more paths."""
    seen: list[float] = []
    context = Context(on_step=lambda step: seen.append(step.stats["active"]))
    model = gaussian([0.0], 1.0).flow(hidden=(8,))
    solver = AdjointMatching(
        training=Training(num_updates=30, learning_rate=1e-6), num_trajectories=64,
        updates_per_rollout=2, num_evaluate=16,
    )  # fmt: skip
    solver.solve(ControlProblem(model, tail()), context)
    late = torch.tensor(seen[10:])
    assert float(late.mean()) == pytest.approx(0.023, abs=0.01)
    assert len(set(late.tolist())) > 5  # finer than multiples of 1 / 64
    with pytest.raises(ConfigError, match="oversample"):
        AdjointMatching(oversample=0)
