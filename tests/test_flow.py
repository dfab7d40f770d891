from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.delta import MLP, Correction, Full
from tiltflow.errors import ConfigError, ShapeError
from tiltflow.flow import ControlledProcess, FlowModel, Prediction, device_of, freeze, unfreeze
from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, ZeroMean

MIXTURE = GaussianMixture([[-1.0, 0.5], [1.5, -0.3]], [[0.6, 0.9], [0.4, 0.5]], [0.3, 0.7])
SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "tabulated": Tabulated((0.001, 0.1, 0.4, 0.8, 0.9999)),
}
X = torch.randn(40, 2, generator=Seed(0).generator(), dtype=torch.float64) * 1.5
T = torch.rand(40, generator=Seed(1).generator(), dtype=torch.float64) * 0.9 + 0.05


class Exact(nn.Module):
    """The exact prediction for MIXTURE, by autograd of its noised log-density (another route)."""

    def __init__(self, schedule: Schedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, beta = self.schedule.alpha(t)[:, None], self.schedule.beta(t)[:, None]
        s = score(self.schedule, x, t)
        noise = -beta * s
        endpoint = (x + beta**2 * s) / alpha
        velocity = self.schedule.d_alpha(t)[:, None] * endpoint
        velocity = velocity + self.schedule.d_beta(t)[:, None] * noise
        return {"score": s, "noise": noise, "endpoint": endpoint, "velocity": velocity}[self.kind]


def score(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t of MIXTURE, by autograd of a sum of Gaussian densities."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        alpha, beta = schedule.alpha(t)[:, None, None], schedule.beta(t)[:, None, None]
        variance = alpha**2 * MIXTURE.stds**2 + beta**2
        exponent = -0.5 * (y[:, None] - alpha * MIXTURE.means) ** 2 / variance
        parts = (exponent - 0.5 * (2 * math.pi * variance).log()).sum(-1).exp()
        log = (parts * MIXTURE.weights).sum(1).log()
        return torch.autograd.grad(log.sum(), y)[0]


def models(schedule: Schedule, delta: Correction | None = None) -> dict[str, FlowModel]:
    return {
        kind.value: FlowModel(
            Exact(schedule, kind.value), schedule, Euclidean((2,)), predicts=kind, delta=delta
        )
        for kind in Prediction
    }


READ_OUTS = ("velocity", "endpoint", "noise", "score")
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@every
def test_conversions_against_autograd(schedule: Schedule) -> None:
    """4 predictions x 4 read-outs: every one equals the exact quantity of the mixture, 1e-10."""
    exact = {kind: Exact(schedule, kind)(X, T) for kind in READ_OUTS}
    for kind, model in models(schedule).items():
        for read_out in READ_OUTS:
            out = getattr(model, read_out)(X, T)
            torch.testing.assert_close(
                out, exact[read_out], rtol=1e-10, atol=1e-10, msg=f"{kind} -> {read_out}"
            )


@every
def test_conversions_agree_with_each_other(schedule: Schedule) -> None:
    """The closed identities between the read-outs of one model hold to 1e-12 (section 1.4)."""
    alpha, beta = schedule.alpha(T)[:, None], schedule.beta(T)[:, None]
    d_alpha, d_beta = schedule.d_alpha(T)[:, None], schedule.d_beta(T)[:, None]
    d = schedule.wronskian(T)[:, None]
    correction = Correction(MLP((2,), (8,)).double())
    for model in models(schedule, correction).values():
        with torch.no_grad():
            v, e, n, s = (getattr(model, name)(X, T) for name in READ_OUTS)
        identities = {
            "x": (alpha * e + beta * n, X),
            "v": (d_alpha * e + d_beta * n, v),
            "e": ((beta * v - d_beta * X) / d, e),
            "n": ((d_alpha * X - alpha * v) / d, n),
            "s": (-n / beta, s),
            "drift": (schedule.kappa(T)[:, None] * X + schedule.eta(T)[:, None] * s, v),
        }
        for name, (left, right) in identities.items():
            # Relative to the largest number: e = (x - beta n) / alpha cancels at small alpha.
            scale = float(right.abs().max() + (beta / alpha).max())
            assert float((left - right).abs().max()) < 1e-12 * scale, (name, model.predicts)


@every
def test_correction_has_one_meaning(schedule: Schedule) -> None:
    """endpoint = frozen endpoint + beta^2 c, the same for every prediction."""
    torch.manual_seed(0)
    correction = Correction(MLP((2,), (8,)).double())
    plain, moved = models(schedule), models(schedule, correction)
    beta2 = schedule.beta(T)[:, None] ** 2
    with torch.no_grad():
        shift = correction.module(X, T)
        for kind in plain:
            expected = plain[kind].endpoint(X, T) + beta2 * shift
            torch.testing.assert_close(moved[kind].endpoint(X, T), expected, rtol=1e-9, atol=1e-9)
            difference = moved[kind].score(X, T) - plain[kind].score(X, T)
            torch.testing.assert_close(
                difference, schedule.alpha(T)[:, None] * shift, rtol=1e-9, atol=1e-9
            )
    assert float(shift.abs().max()) > 0.01


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_time_zero_is_noise(schedule: Schedule) -> None:
    """At t = 0, X_0 ~ N(0, I): the score is -x and the end point the mean of the data."""
    model = MIXTURE.flow(schedule, hidden=())
    torch.testing.assert_close(model.score(X, 0.0), -X, rtol=1e-12, atol=1e-12)
    mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum(0).expand_as(X)
    torch.testing.assert_close(model.endpoint(X, 0.0), mean, rtol=1e-12, atol=1e-12)


@every
def test_gaussian_data(schedule: Schedule) -> None:
    """N(m, s^2): score -(x - a m)/V, endpoint m + a s^2/V (x - a m), noise b/V (x - a m)."""
    m, s2 = 0.4, 0.6
    model = gaussian([m], math.sqrt(s2)).flow(schedule, hidden=())
    x, t = torch.tensor([[0.8]], dtype=torch.float64), torch.tensor([0.37], dtype=torch.float64)
    a, b = schedule.alpha(t), schedule.beta(t)
    v = a**2 * s2 + b**2
    z = x[0] - a * m
    assert float(model.score(x, t)) == pytest.approx(float(-z / v), rel=1e-12)
    assert float(model.endpoint(x, t)) == pytest.approx(float(m + a * s2 / v * z), rel=1e-12)
    assert float(model.noise(x, t)) == pytest.approx(float(b / v * z), rel=1e-12)
    velocity = schedule.d_alpha(t) * (m + a * s2 / v * z) + schedule.d_beta(t) * b / v * z
    assert float(model.velocity(x, t)) == pytest.approx(float(velocity), rel=1e-12)


def test_predictions_are_projected() -> None:
    """On a subspace every prediction and every read-out of a state in it stays in it."""
    torch.manual_seed(0)
    space = ZeroMean((3, 2))
    x = space.noise(5, Seed(0).generator())
    for kind in READ_OUTS:
        model = FlowModel(MLP((3, 2), (8,)), Linear(), space, predicts=kind)
        for read_out in READ_OUTS:
            with torch.no_grad():
                out = getattr(model, read_out)(x, 0.4)
            torch.testing.assert_close(space.project(out), out, rtol=1e-4, atol=1e-5)


def test_clone_copies_what_is_trained() -> None:
    """Full: the network is copied. Correction: the network is shared, the small net copied."""
    full = FlowModel(MLP((2,), (4,)), Linear(), Euclidean((2,)), predicts="velocity")
    twin = full.clone()
    assert twin.net is not full.net
    with torch.no_grad():
        next(twin.trainable.parameters()).add_(1.0)
        assert not torch.equal(twin.velocity(X.float(), 0.5), full.velocity(X.float(), 0.5))
    light = MIXTURE.flow(hidden=(4,))
    twin = light.clone()
    assert twin.net is light.net
    assert twin.trainable is not light.trainable
    assert isinstance(full.delta, Full)


def test_zero_correction_changes_nothing() -> None:
    """A zero-initialised correction leaves all read-outs bit-equal."""
    plain, corrected = MIXTURE.flow(hidden=()), MIXTURE.flow(hidden=(8,))
    with torch.no_grad():
        for name in READ_OUTS:
            left = getattr(plain, name)(X.float(), 0.3)
            assert torch.equal(left, getattr(corrected, name)(X.float(), 0.3))


def test_controlled_process_has_no_score() -> None:
    """The optimum of a running reward is an SDE only: neither score nor velocity nor noise."""
    process = ControlledProcess(MIXTURE.flow(hidden=()))
    for name in ("score", "velocity", "noise"):
        assert not hasattr(process, name)
    torch.testing.assert_close(process.endpoint(X, 0.5), MIXTURE.flow(hidden=()).endpoint(X, 0.5))


def test_freeze_and_unfreeze() -> None:
    """Freezing switches gradients and training mode off; unfreezing only the delta back on."""
    model = MIXTURE.flow(hidden=(4,))
    model.trainable.train()
    freeze(model)
    assert not any(p.requires_grad for p in model.trainable.parameters())
    assert not model.trainable.training
    unfreeze(model)
    assert all(p.requires_grad for p in model.trainable.parameters())
    assert device_of(model) == torch.device("cpu")


def test_unknown_prediction() -> None:
    """A wrong name lists the right ones."""
    with pytest.raises(ConfigError, match="velocity, endpoint, noise, score"):
        FlowModel(nn.Identity(), Linear(), Euclidean((2,)), predicts="x0")


@pytest.mark.parametrize("bad", [lambda x: x[:, :1], lambda x: x.sum(), lambda x: (x, x)])
def test_wrong_output_shape(bad: object) -> None:
    """A prediction has the shape of its input; the message names the network."""

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return bad(x)  # type: ignore[operator,no-any-return]

    model = FlowModel(Net(), Linear(), Euclidean((2,)), predicts="velocity")
    with pytest.raises(ShapeError, match="Net returned"):
        model.velocity(X, 0.5)


def test_wrong_state_shape() -> None:
    """States of another space are refused before the network sees them."""
    with pytest.raises(ShapeError, match="state space"):
        MIXTURE.flow(hidden=()).endpoint(torch.zeros(4, 3), 0.5)
