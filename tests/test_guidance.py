"""Learned guidance: a gain on the reward's gradient at the predicted end point."""

from __future__ import annotations

import torch

from tiltflow.analytic import gaussian
from tiltflow.context import Context
from tiltflow.guidance import guided
from tiltflow.problem import ControlProblem
from tiltflow.rewards import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training


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
