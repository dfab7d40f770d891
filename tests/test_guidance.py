"""Learned guidance: a gain on the reward's gradient at the predicted end point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import gaussian
from tiltflow.context import Context
from tiltflow.delta import Correction
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.flow import FlowModel, Prediction
from tiltflow.guidance import guided
from tiltflow.kernel import EulerMaruyama
from tiltflow.potential import Differentiable
from tiltflow.problem import ControlProblem
from tiltflow.rewards import Linear
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear as Straight
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.space import Euclidean
from tiltflow.training import Training
from tiltflow.types import Cond


def test_the_initial_weights_have_an_address() -> None:
    """Two models made one after the other are equal, and the global generator is not used."""
    model, reward = gaussian([0.0, 0.0]).flow(hidden=()), Linear([1.0, 0.0])
    before = torch.random.get_rng_state()
    first, second = (guided(model, reward).trainable.state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any("net" in key and "gain" not in key for key in first)  # nothing shared is saved


def test_an_untrained_guidance_changes_nothing_and_a_clone_shares_the_model() -> None:
    """The gain starts at zero; cloning copies the gain only."""
    plain = gaussian([0.0, 0.0]).flow(hidden=())
    model = guided(plain, Linear([1.0, 0.0]))
    x, t = torch.randn(5, 2), torch.full((5,), 0.4)
    assert torch.equal(model.endpoint(x, t), plain.endpoint(x, t))
    assert model.clone().net is model.net
    assert model.clone().trainable is not model.trainable


def test_a_linear_reward_is_learned() -> None:
    """N(0, I) tilted by exp(x_1) is N(e_1, I); the optimal gain is s^2 / V_t, a function of t.

    Bound: 4.5 standard errors of 4096 samples (0.07), plus 0.08 for 300 updates of a small net.
    """
    model = guided(gaussian([0.0, 0.0]).flow(hidden=()), Linear([1.0, 0.0]))
    solver = AdjointMatching(
        training=Training(num_updates=300, learning_rate=1e-2, ema=0.95), num_evaluate=4096
    )
    solution = solver.solve(
        ControlProblem(model, Linear([1.0, 0.0])), Context(seed=Seed(3).child("guidance"))
    )
    assert abs(solution.stats["terminal"] - 1.0) < 0.15
    assert abs(solution.stats["path_kl"] - 0.5) < 0.15


class Counted(nn.Module):
    """0.5 x + t, counting its evaluations."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += len(x)
        return 0.5 * x + t[:, None]


class Pulled(nn.Module):
    """c(x, t) = strength (e - x), of the end point e that it is given."""

    sees_endpoint = True

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor, t: Tensor, *, endpoint: Tensor) -> Tensor:
        pull: Tensor = self.strength((endpoint - x)[..., None])[..., 0]
        return pull


@pytest.mark.parametrize("predicts", list(Prediction))
def test_a_correction_sees_the_frozen_end_point(predicts: Prediction) -> None:
    """In every conversion, whatever the network predicts, and without a second evaluation."""
    net = Counted()
    model = FlowModel(net, Straight(), Euclidean((2,)), predicts=predicts)
    tuned = model.with_delta(Correction(Pulled()))
    x, t = torch.randn(5, 2), torch.linspace(0.2, 0.8, 5)
    beta2 = tuned.schedule.beta(t)[:, None] ** 2
    frozen = model.endpoint(x, t)
    strength = float(tuned.trainable.strength.weight.detach())  # type: ignore[union-attr, operator, arg-type]
    wanted = frozen + beta2 * strength * (frozen - x)
    for read in ("endpoint", "velocity", "noise", "score"):
        net.calls = 0
        end = getattr(tuned, read)(x, t)
        assert net.calls == 5 if predicts is not Prediction.ENDPOINT else net.calls <= 10
        if read == "endpoint":
            assert torch.allclose(end, wanted, atol=1e-5)
    # x = alpha e + beta noise, by the other readings of the same model.
    alpha, beta = tuned.schedule.alpha(t)[:, None], tuned.schedule.beta(t)[:, None]
    assert torch.allclose(alpha * wanted + beta * tuned.noise(x, t), x, atol=1e-4)
    assert torch.allclose(tuned.velocity(x, t), wanted - tuned.noise(x, t), atol=1e-4)


def test_training_reuses_the_end_points_of_the_roll_out() -> None:
    """Updates on a correction that sees end points do not evaluate the network again."""
    net = Counted()
    model = FlowModel(net, Straight(), Euclidean((2,)), predicts="endpoint")
    tuned = model.with_delta(Correction(Pulled()))

    def calls(updates: int) -> int:
        net.calls = 0
        solver = AdjointMatching(
            sampler=Sampler(EulerMaruyama(), 10), training=Training(num_updates=updates),
            num_trajectories=8, updates_per_rollout=20, num_evaluate=2,
        )  # fmt: skip
        solver.solve(ControlProblem(tuned, Linear([1.0, 0.0])), Context(seed=Seed(0)))
        return net.calls

    assert calls(1) == calls(20)


def watched() -> tuple[Differentiable, list[int]]:
    """x_1 as a reward, and of how many states it has been asked, call by call."""
    asked: list[int] = []

    def first(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x[:, 0]

    return Differentiable(first), asked


def test_before_its_time_guidance_adds_nothing_and_does_not_ask_the_reward() -> None:
    """After it, it is the same guidance; a batch may hold both."""
    reward, asked = watched()
    plain = gaussian([0.0, 0.0]).flow(hidden=())
    early, late = guided(plain, reward), guided(plain, reward, since=0.5)
    with torch.no_grad():
        for model in (early, late):
            for parameter in model.trainable.parameters():
                parameter.fill_(0.1)
    x, t = torch.randn(6, 2), torch.tensor([0.1, 0.6, 0.3, 0.9, 0.5, 0.2])
    all_of_it = early.endpoint(x, t)
    asked.clear()
    found = late.endpoint(x, t)
    assert asked == [3]
    ahead = t < 0.5
    assert torch.equal(found[ahead], plain.endpoint(x, t)[ahead])
    assert torch.allclose(found[~ahead], all_of_it[~ahead])
    assert not torch.allclose(found[~ahead], plain.endpoint(x, t)[~ahead])
    late.endpoint(x[:1], t[:1]).sum().backward()  # of a batch before its time alone
    assert asked == [3]
    copy = late.clone()
    assert torch.equal(copy.endpoint(x, t), found)
    with pytest.raises(ConfigError, match=r"since=1\.5"):
        guided(plain, reward, since=1.5)


class Squares(Features):
    """x_1^2, x_2 and a constant."""

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return torch.stack([x[:, 0] ** 2, x[:, 1], torch.ones_like(x[:, 0])], 1)


def test_samples_of_an_untrained_guidance_cost_no_reward() -> None:
    """While its gain is zero only training has a use for the reward's gradient."""
    reward, asked = watched()
    plain = gaussian([0.0, 0.0]).flow(hidden=())
    model = guided(plain, reward)
    sampler = Sampler(EulerMaruyama(), 4)
    found = sampler.sample(model, 3, seed=Seed(1))
    assert torch.equal(found, sampler.sample(plain, 3, seed=Seed(1)))
    assert not asked
    model.endpoint(torch.randn(2, 2), torch.tensor(0.5)).sum().backward()
    assert asked == [2]
    with torch.no_grad():
        for parameter in model.trainable.parameters():
            parameter.fill_(0.1)
    sampler.sample(model, 3, seed=Seed(1))
    assert asked[1:] == [3] * 4


def test_features_have_a_gain_each() -> None:
    """The correction is J_F(e)^T gain(t, F(e)), which training can differentiate."""
    x, t = torch.randn(5, 2), torch.full((5,), 0.4)
    values, rows = Squares().value_and_jacobian(x)
    assert torch.allclose(rows[:, 0, 0], 2 * x[:, 0])
    assert torch.equal(rows[:, 1], torch.tensor([0.0, 1.0]).expand(5, 2))
    assert not rows[:, 2].any()
    assert not rows.requires_grad
    assert not values.requires_grad
    plain = gaussian([0.0, 0.0]).flow(hidden=())
    model = guided(plain, Squares())
    assert torch.equal(model.endpoint(x, t), plain.endpoint(x, t))
    gains = torch.tensor([0.3, -0.2, 5.0])
    with torch.no_grad():
        last = [m for m in model.trainable.modules() if isinstance(m, nn.Linear)][-1]
        last.bias.copy_(gains)
    e = plain.endpoint(x, t)
    pull = torch.stack([0.3 * 2 * e[:, 0], torch.full((5,), -0.2)], 1)
    beta = plain.schedule.beta(t)[:, None]
    assert torch.allclose(model.endpoint(x, t), e + beta**2 * pull, atol=1e-6)
    (model.endpoint(x, t) ** 2).sum().backward()
    assert last.bias.grad is not None
    assert last.bias.grad.bool().tolist() == [True, True, False]


def test_rewards_of_features_are_learned_whatever_they_are() -> None:
    """One direction serves both rewards +x_2 and -x_2: N(0, I) is moved to -+e_2.

    Bound: 4.5 standard errors of 4096 samples (0.07), plus 0.08 for 300 updates of a small net.
    """
    model = guided(gaussian([0.0, 0.0]).flow(hidden=()), Squares())
    solver = AdjointMatching(
        training=Training(num_updates=300, learning_rate=1e-2, ema=0.95), num_evaluate=4096
    )
    for sign in (1.0, -1.0):
        reward = Linear([0.0, sign])
        solution = solver.solve(ControlProblem(model, reward), Context(seed=Seed(4)))
        assert abs(solution.stats["terminal"] - 1.0) < 0.15
        assert abs(solution.stats["path_kl"] - 0.5) < 0.15
