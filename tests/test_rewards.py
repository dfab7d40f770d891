"""Rewards of images: gradients against finite differences, range, devices and dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tiltflow.adapters.digits import EVENT, load_digits_flow
from tiltflow.errors import ConfigError, NonFiniteError, ShapeError
from tiltflow.rewards import Readability
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return Sampler(num_steps=20).sample(load_digits_flow(), 64, seed=Seed(1)).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_is_the_finite_difference(samples: Tensor, temperature: float) -> None:
    """Central differences along random directions in float64: relative 1e-6 of the norm."""
    reward = Readability(temperature=temperature)
    assert reward.offers == Access.BOTH
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(samples.shape, generator=generator, dtype=torch.float64)
    h = 1e-5
    difference = reward.value(samples + h * direction) - reward.value(samples - h * direction)
    value, grad = reward.value_and_grad(samples)
    scale = grad.norm(dim=1) * direction.norm(dim=1) + 1e-9
    assert float((difference / (2 * h) - (grad * direction).sum(1)).abs().div(scale).max()) < 1e-5
    assert torch.equal(value, reward.value(samples))


def test_sign_uphill_is_more_readable(samples: Tensor) -> None:
    """A small step along the gradient raises every value."""
    reward = Readability()
    value, grad = reward.value_and_grad(samples)
    step = 1e-3 * grad / grad.norm(dim=1, keepdim=True)
    assert bool((reward.value(samples + step) > value).all())


def test_range_and_class(samples: Tensor) -> None:
    """log(1/10) <= r <= 0, r = log p of ``class_of``, and temperature shrinks logits."""
    reward = Readability()
    noise = torch.randn(256, *EVENT, dtype=torch.float64, generator=Seed(2).generator())
    for x in (samples, noise):
        r = reward.value(x)
        assert bool((r <= 0).all())
        assert bool((r >= math.log(0.1) - 1e-12).all())
    logits = reward.log_probabilities(samples)
    best = logits.gather(1, reward.class_of(samples)[:, None])[:, 0]
    assert torch.equal(best, reward.value(samples))
    hot = Readability(temperature=1e6).value(samples)
    assert float(hot.mean()) == pytest.approx(-math.log(10), abs=1e-4)


def test_dtypes_agree_and_the_network_stays_as_it_is(samples: Tensor) -> None:
    reward = Readability()
    single = reward.value(samples.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), reward.value(samples), atol=1e-5)
    assert next(reward._net.parameters()).dtype == torch.float32
    assert torch.equal(reward.value(samples.float()), single)


def test_batch_split_does_not_matter(samples: Tensor) -> None:
    reward = Readability()
    parts = torch.cat([reward.grad(samples[:10]), reward.grad(samples[10:])])
    assert torch.allclose(parts, reward.grad(samples), atol=1e-12)


def test_own_classifier_and_bad_input() -> None:
    """Any module works: for logits (x, -x) the value is log sigmoid(2 |x|)."""

    class Signs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)

    x = torch.tensor([[0.3], [-1.2]])
    expected = nn.functional.logsigmoid(2 * x.abs()[:, 0])
    assert torch.allclose(Readability(classifier=Signs()).value(x), expected)
    assert Readability(classifier=Signs()).class_of(x).tolist() == [0, 1]
    with pytest.raises(ConfigError, match="temperature=0"):
        Readability(temperature=0)
    with pytest.raises(NonFiniteError):
        Readability(classifier=Signs()).value(torch.tensor([[math.nan]]))
    with pytest.raises(ShapeError, match="logits are"):
        Readability(classifier=nn.Flatten(0)).value(x)
