from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiltflow.errors import CapabilityError, NonFiniteError, ShapeError
from tiltflow.potential import (
    ZERO,
    BlackBox,
    Combination,
    Decoded,
    Differentiable,
    Hinge,
    Potential,
    Rate,
    combine,
)
from tiltflow.rewards.points import Distance, Linear, Norm, Quadratic
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond

X = torch.randn(7, 2, generator=Seed(0).generator(), dtype=torch.float64)


def wave(x: Tensor) -> Tensor:
    return x[:, 0].sin() + x[:, 1] ** 2


def wave_grad(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0].cos(), 2 * x[:, 1]], 1)


WAVE = Differentiable(wave)


class ScoreOnly(Potential):
    """A potential with a gradient and no value."""

    @property
    def offers(self) -> Access:
        return Access.GRAD

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return -x


def differences(phi: Potential, x: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of the value, coordinate by coordinate."""
    columns = []
    for d in range(x.shape[1]):
        e = torch.zeros_like(x)
        e[:, d] = h
        columns.append((phi.value(x + e) - phi.value(x - e)) / (2 * h))
    return torch.stack(columns, 1)


def test_differentiable() -> None:
    """Value and gradient of a torch function are the function's and autograd's."""
    value, grad = WAVE.value_and_grad(X)
    torch.testing.assert_close(value, wave(X))
    torch.testing.assert_close(grad, wave_grad(X))
    torch.testing.assert_close(WAVE.grad(X), grad)
    assert not WAVE.value(X.clone().requires_grad_()).requires_grad


def test_conditions_are_passed() -> None:
    """A reward that takes conditions sees them; one that does not is not handed any."""
    phi = Differentiable(lambda x, cond: cond["s"] * x[:, 0], takes_cond=True)
    s = torch.arange(7.0, dtype=torch.float64)
    torch.testing.assert_close(phi.value(X, {"s": s}), s * X[:, 0])
    torch.testing.assert_close(phi.grad(X, {"s": s})[:, 0], s)


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_vector_space(a: float, b: float) -> None:
    """Values and gradients of a phi + b psi - phi are linear in the terms."""
    psi = Quadratic(1.0, [1.0, 3.0])
    both = a * WAVE + b * psi - WAVE
    expected = (a - 1) * wave(X) + b * psi.value(X)
    torch.testing.assert_close(both.value(X), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        both.grad(X), (a - 1) * wave_grad(X) + b * psi.grad(X), rtol=1e-10, atol=1e-10
    )
    value, grad = both.value_and_grad(X)
    assert torch.equal(value, both.value(X))
    assert torch.equal(grad, both.grad(X))


def test_identical_terms_cancel() -> None:
    """(score + phi) - score offers everything phi offers, although the score has no value."""
    score = ScoreOnly()
    tracked = score + 2.0 * WAVE
    assert tracked.offers is Access.GRAD
    ratio = tracked - score
    assert ratio.offers is Access.BOTH
    torch.testing.assert_close(ratio.value(X), 2 * wave(X))
    assert (score - score).offers is Access.BOTH
    assert float((score - score).grad(X).abs().max()) == 0
    assert (ScoreOnly() - ScoreOnly()).offers is Access.GRAD  # equal means the same object


def test_rounding_counts_as_cancelled() -> None:
    """0.1 + 0.2 - 0.3 is not a term: its 5e-17 would demand an ability nobody has."""
    score = ScoreOnly()
    residue = 0.1 * score + 0.2 * score - 0.3 * score
    assert isinstance(residue, Combination)
    assert residue.terms == ()


def test_collection() -> None:
    """Sums are flat, equal terms once; a single term with coefficient 1 is itself."""
    total = (WAVE + ZERO) + (WAVE - ScoreOnly())
    assert isinstance(total, Combination)
    assert [c for c, _ in total.terms] == [2.0, -1.0]
    assert combine((1.0, WAVE)) is WAVE
    assert (WAVE + ZERO) is WAVE
    assert float(ZERO.value(X).abs().max()) == 0


@pytest.mark.parametrize("side", ["above", "below"])
def test_hinge(side: str) -> None:
    """above: s (r - y)_+, below: -s (y - r)_+; gradient s grad r on the active side; both rise."""
    y, s = 0.4, 2.5
    hinge = Hinge(WAVE, y, s, side)  # type: ignore[arg-type]
    r = wave(X)
    over = torch.where(r > y, r - y, 0.0) if side == "above" else -torch.where(r < y, y - r, 0.0)
    active = r > y if side == "above" else r < y
    torch.testing.assert_close(hinge.value(X), s * over)
    torch.testing.assert_close(hinge.grad(X), s * active[:, None] * wave_grad(X))
    torch.testing.assert_close(hinge.grad(X), differences(hinge, X), rtol=1e-6, atol=1e-6)
    assert torch.equal(hinge.active(X), active)
    assert 0 < int(active.sum()) < 7
    higher = Hinge(WAVE + Linear(0.0), y, s, side)  # type: ignore[arg-type]
    assert bool((higher.value(X)[r.argsort()].diff() >= 0).all())


def test_hinge_needs_the_value_for_its_gradient() -> None:
    """A score-only reward cannot say which side a sample is on; a black box has no gradient."""
    assert Hinge(ScoreOnly(), 0.0, 1.0, "above").offers is Access.NONE
    assert Hinge(BlackBox(wave), 0.0, 1.0, "above").offers is Access.VALUE


def test_decoded() -> None:
    """grad of phi(decode(x)) is J^T grad phi (finite differences)."""
    mixing = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    phi = Decoded(WAVE, lambda x: (x @ mixing).tanh())
    torch.testing.assert_close(phi.value(X), wave((X @ mixing).tanh()))
    torch.testing.assert_close(phi.grad(X), differences(phi, X), rtol=1e-7, atol=1e-8)
    assert Decoded(BlackBox(wave), torch.tanh).offers is Access.VALUE


@pytest.mark.parametrize(
    "reward",
    [
        Linear([0.3, -2.0]),
        Linear(0.7),
        Quadratic([0.1, 0.2], 2.0),
        Quadratic(0.0, [1.0, -0.5]),
        Distance([0.5, 0.5]),
        Norm(1.5),
    ],
    ids=str,
)
def test_point_rewards(reward: Potential) -> None:
    """Gradients of the closed forms agree with finite differences; float32 stays float32."""
    torch.testing.assert_close(reward.grad(X), differences(reward, X), rtol=1e-6, atol=1e-7)
    assert reward.value(X.float()).dtype == torch.float32
    torch.testing.assert_close(reward.value(X[:3]), reward.value(X)[:3])


def test_point_rewards_formulas() -> None:
    """slope . x; -sum c (x - m)^2 / 2; -|x - m|; |x|; the natural form differs by a constant."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert float(Linear([1.0, -2.0]).value(x)) == -5
    assert float(Linear(2.0).value(x)) == 14
    assert float(Quadratic([1.0, 0.0], [1.0, 0.5]).value(x)) == -2 - 4
    assert float(Distance(0.0).value(x)) == -5
    assert float(Norm().value(x)) == 5
    assert float(Norm().grad(torch.zeros(1, 2)).abs().max()) == 0
    for reward in (Linear([1.0, -2.0]), Quadratic([1.0, 3.0], [1.0, 0.5])):
        a, c = reward.natural()
        rest = reward.value(X) - (X * a).sum(1) + 0.5 * (c * X**2).sum(1)
        assert float(rest.std()) < 1e-12


def test_rate_reward() -> None:
    """f(x, t, s) = (s - t) weight(t) phi(x), and its gradient."""
    t, s = torch.full((7,), 0.2, dtype=X.dtype), torch.full((7,), 0.25, dtype=X.dtype)
    f = Rate(WAVE, weight=lambda t: 1 / t)
    torch.testing.assert_close(f.value(X, t, s), 0.05 / 0.2 * wave(X))
    torch.testing.assert_close(f.grad(X, t, s), 0.05 / 0.2 * wave_grad(X))


def test_missing_access_is_named() -> None:
    """Asking for what is not offered is a sentence with both names, not an AttributeError."""
    with pytest.raises(CapabilityError, match=r"VALUE of the potential ScoreOnly.*GRAD"):
        ScoreOnly().value(X)
    with pytest.raises(CapabilityError, match="GRAD is missing"):
        (WAVE + BlackBox(wave)).grad(X)


def test_no_gradient() -> None:
    """A reward that leaves autograd is refused when its gradient is asked for."""
    detached = Differentiable(lambda x: wave(x.detach()))
    with pytest.raises(CapabilityError, match="does not depend on x"):
        detached.grad(X)
    assert BlackBox(lambda x: torch.tensor(x.numpy()[:, 0])).value(X).tolist() == X[:, 0].tolist()


@pytest.mark.parametrize(
    "function", [lambda x: x.sum(), lambda x: x, lambda x: x[:, :1], lambda x: 3.0]
)
def test_wrong_shape(function: object) -> None:
    """A value is one number per sample."""
    with pytest.raises(ShapeError, match=r"value.*where \(7,\) is needed"):
        Differentiable(function).value(X)  # type: ignore[arg-type]


def test_not_a_number() -> None:
    """NaN and infinity raise, with the number of bad samples; nothing is repaired."""
    sick = Differentiable(lambda x: torch.where(x[:, 0] > X[2, 0] - 1e-9, x[:, 0], math.nan))
    bad = int((X[:, 0] < X[2, 0]).sum())
    assert bad > 0
    with pytest.raises(NonFiniteError, match=f"{bad} of 7 samples: value"):
        sick.value(X)
    root = Differentiable(lambda x: x[:, 0].abs().sqrt())
    with pytest.raises(NonFiniteError, match="gradient"):
        root.grad(torch.zeros(1, 2))


def test_hinges_of_one_reward_share_its_evaluation() -> None:
    """A combination evaluates each reward once, whatever is made of it; gradients alike."""
    calls = []

    def reward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x[:, 0] ** 2

    base = Differentiable(reward)
    hinges = [
        Hinge(base, 1.0, 2.0, "above"),
        Hinge(base, 0.5, 3.0, "below"),
        Hinge(base, 2.0, 1.0, "above"),
    ]
    both = combine((1.0, base), *((0.5, hinge) for hinge in hinges))
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    value, grad = both.value_and_grad(x)
    assert len(calls) == 1
    torch.testing.assert_close(both.grad(x), grad)
    torch.testing.assert_close(both.value(x), value)
    assert len(calls) <= 4  # the plain term of a gradient may come before the shared one
    by_hand = base.value(x) + sum(0.5 * h.value(x) for h in hinges)
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(grad, base.grad(x) + sum(0.5 * h.grad(x) for h in hinges))


def test_gradients_without_values_beside_a_hinge() -> None:
    """A term that has no value, e.g. a score, does not stop a hinge from giving its gradient."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    hinge = Hinge(Linear([1.0, 0.0]), 0.0, 2.0, "above")
    score = GradientOnly()
    found = combine((1.0, score), (1.0, hinge)).grad(x)
    torch.testing.assert_close(found, -x + hinge.grad(x))


class GradientOnly(Potential):
    @property
    def offers(self) -> Access:
        return Access.GRAD

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return -x
