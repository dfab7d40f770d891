"""Models on another schedule and under one condition: the same laws, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.delta import MLP, Correction, Full
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Heun
from tiltflow.sample import Sampler, calibrated
from tiltflow.schedule import Cosine, Linear, Schedule, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, Masked
from tiltflow.types import Cond
from tiltflow.views import conditioned, rescheduled

LAW = GaussianMixture([[-1.0, 0.5], [2.0, -0.3]], 0.4, (0.3, 0.7))


@pytest.mark.parametrize("old", [Linear(), Cosine(), VariancePreserving()])
@pytest.mark.parametrize("new", [Linear(), Cosine(), VariancePreserving()])
def test_the_exact_model_of_the_other_schedule(old: Schedule, new: Schedule) -> None:
    """End points, velocities and scores at every time are those of the law on that schedule."""
    model, exact = (LAW.flow(schedule, hidden=(8,)) for schedule in (old, new))
    for each in (model, exact):
        each.trainable.double()
    model = rescheduled(model, new)
    assert model.schedule == new
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    for time in (0.05, 0.3, 0.6, 0.9):
        t = torch.full((64,), time, dtype=torch.float64)
        for what in ("endpoint", "velocity", "score"):
            ours, theirs = getattr(model, what)(x, t), getattr(exact, what)(x, t)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_ends_of_time() -> None:
    """Finite at t = 0, and the state itself at t = 1."""
    for old, new in ((VariancePreserving(), Linear()), (Linear(), Cosine())):
        model, x = rescheduled(LAW.flow(old, hidden=(8,)), new), torch.randn(16, 2)
        assert bool(torch.isfinite(model.endpoint(x, 0.0)).all())
        assert torch.allclose(model.endpoint(x, 1.0), x, atol=1e-3)


def test_what_is_kept() -> None:
    model = LAW.flow(hidden=(8,))
    assert rescheduled(model, Linear()) is model
    tuned = model.clone()
    for parameter in tuned.trainable.parameters():
        nn.init.normal_(parameter, std=0.3)
    seen, x = rescheduled(tuned, Cosine()), torch.randn(5, 2)
    angle = torch.tensor(0.7).double()
    t, u = Cosine().time_at(angle), Linear().time_at(angle)
    scale = float(torch.hypot(u, 1 - u))
    ours, theirs = seen.endpoint(x, float(t)), tuned.endpoint(scale * x, float(u))
    torch.testing.assert_close(ours, theirs)  # as close as float32 can be, also near zero
    assert isinstance(seen.delta, Correction)
    assert seen.delta.is_null()
    whole = FlowModel(MLP((2,), (8,)), Linear(), Euclidean((2,)), predicts="velocity")
    copy = rescheduled(whole, Cosine()).clone()
    for parameter in copy.trainable.parameters():
        nn.init.zeros_(parameter)
    assert isinstance(copy.delta, Full)
    assert any(bool(p.any()) for p in whole.trainable.parameters())
    noise = torch.zeros(3, 2)
    assert not bool(copy.velocity(noise, 0.5).any())


def test_moments_move_with_time() -> None:
    """The average posterior variance belongs to a ratio of data to noise."""
    model = calibrated(gaussian([0.0], 0.5).flow(hidden=(8,)), seed=Seed(0), num_steps=10)
    assert model.moments is not None
    moved = rescheduled(model, Cosine()).moments
    assert moved is not None
    for t, variance in zip(*moved, strict=True):
        a, b = (float(f(torch.tensor(t).double())) for f in (Cosine().alpha, Cosine().beta))
        exact = 0.25 * b**2 / (0.25 * a**2 + b**2)
        assert variance == pytest.approx(exact, rel=0.25, abs=2e-3)


class Shifted(nn.Module):
    """End points of N(c, 1), c the condition."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        shift = torch.as_tensor(cond["shift"]).to(x)
        scale = torch.tensor([float(len(name)) for name in cond["name"]]).to(x)[:, None]
        mean, time = shift * scale, t[:, None]
        return mean + time / (time**2 + (1 - time) ** 2) * (x - time * mean)


def test_one_condition_for_all() -> None:
    space = Euclidean((1,))
    model = FlowModel(Shifted(), Linear(), space, predicts="endpoint", takes_cond=True)
    fixed = conditioned(model, {"shift": torch.tensor([[2.0]]), "name": ["abc"]})
    assert not fixed.takes_cond
    x = Sampler(Heun(), 40).sample(fixed, 4000, seed=Seed(0))
    assert float(x.mean()) == pytest.approx(6.0, abs=4.5 / 4000**0.5)
    with pytest.raises(ConfigError, match="leading length 1"):
        conditioned(model, {"shift": torch.zeros(2, 1), "name": ["a"]})
    with pytest.raises(ConfigError, match="no conditions"):
        conditioned(fixed, {})
    masked = FlowModel(Shifted(), Linear(), Masked((3, 1)), predicts="endpoint", takes_cond=True)
    with pytest.raises(UnsupportedError, match="mask"):
        conditioned(masked, {"mask": torch.ones(1, 3)})
    corrected = model.with_delta(Correction(MLP((1,), (4,), zero_init=True), takes_cond=True))
    with pytest.raises(UnsupportedError, match="correction"):
        conditioned(corrected, {"shift": torch.zeros(1, 1), "name": ["a"]})
