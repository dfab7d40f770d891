"""Stage 1 of Tail-aware Flow Fine-Tuning against its reference table and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oracles import TFFT_LEFT, TFFT_RIGHT, axis, tail_dual
from tiltflow.algorithms import optimal_thresholds, smallest_weight
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Bank, Empirical, Quadrature, Reweighted, UnknownLog
from tiltflow.divergences import KL
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.potential import Differentiable
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.utilities import LeftCVaR, RightCVaR

X = Linear(1.0)
NORMAL = Quadrature.of([axis(-9, 21, 60_001)], gaussian([0.0]).log)


def samples(count: int, seed: int = 0) -> Empirical:
    return Empirical(gaussian([0.0]).sample(count, Seed(seed)))


@pytest.mark.parametrize("row", TFFT_RIGHT)
def test_right_table(row: tuple[float, ...]) -> None:
    """N(0, 1), r = x, best tenth: threshold, value, CVaR and KL to three decimals."""
    weight, *expected = row
    found = optimal_thresholds(RightCVaR(X, 0.9), weight, NORMAL)
    got = (found.at[0], found.value, found.utility, found.kl)
    assert got == pytest.approx(expected, abs=5e-4)
    assert 0.1 * found.drives[0] == pytest.approx(0.1, abs=1e-3)
    assert found.active == pytest.approx(0.5 * math.erfc(expected[0] / 2**0.5), abs=1e-3)


@pytest.mark.parametrize("row", TFFT_LEFT)
def test_left_table(row: tuple[float, ...]) -> None:
    """The same for the worst fifth."""
    weight, *expected = row
    found = optimal_thresholds(LeftCVaR(X, 0.2), weight, NORMAL)
    got = (found.at[0], found.value, found.utility, found.kl)
    assert got == pytest.approx(expected, abs=5e-4)
    assert 0.2 * found.drives[0] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("utility", "weight", "exact", "spread"),
    [
        (RightCVaR(X, 0.9), 5.0, 1.829, 0.040),
        (RightCVaR(X, 0.9), 3.0, 2.240, 0.150),
        (LeftCVaR(X, 0.2), 1.0, 0.535, 0.038),
    ],
)
def test_on_banks(
    utility: LeftCVaR | RightCVaR, weight: float, exact: float, spread: float
) -> None:
    """Banks of 10,000 (methods, section 4.6): mean of 40 thresholds within 4.5 errors, spread
    within 4.5 / sqrt(80) of what is stated."""
    found = torch.tensor(
        [optimal_thresholds(utility, weight, samples(10_000, i)).at[0] for i in range(40)]
    )
    assert abs(float(found.mean()) - exact) < 4.5 * spread / math.sqrt(40) + 0.002
    assert float(found.std()) / spread == pytest.approx(1, abs=4.5 / math.sqrt(80))


@pytest.mark.parametrize("side", ["right", "left"])
def test_bimodal_rewards(side: str) -> None:
    """Several local optima on the left: the global one, by a second search over thresholds."""
    q = Quadrature.of([axis(-4, 4, 801)], GaussianMixture([[-1.0], [1.2]], [0.6, 0.8]).log)
    reward = Differentiable(lambda x: (1.5 * x[:, 0]).sin() + 0.3 * x[:, 0])
    utility = LeftCVaR(reward, 0.2) if side == "left" else RightCVaR(reward, 0.8)
    found = optimal_thresholds(utility, 1.0, q)
    best = tail_dual(q, reward.value(q.nodes), utility.level, side)
    assert found.value == pytest.approx(best, abs=1e-6)
    tilted = q.tilted(found.potential)
    assert utility.value(tilted).value - KL(q).value(tilted).value == pytest.approx(best, abs=1e-4)


def test_weighted_banks() -> None:
    """A re-weighted bank is searched with its weights."""
    bank = Bank.equal(gaussian([0.0]).sample(20_000, Seed(0)))
    moved = Reweighted(bank, UnknownLog("samples")).tilted(X)  # N(1, 1)
    found = optimal_thresholds(LeftCVaR(X, 0.2), 1.0, moved)
    assert found.at[0] == pytest.approx(1 + TFFT_LEFT[3][1], abs=0.15)


def test_conditions() -> None:
    """Two conditions with one threshold and a normaliser each, by brute force over knots."""
    x, cond = gaussian([0.0]).sample(600, Seed(0)), {"kind": torch.arange(600) % 2}
    x = x + 2.0 * cond["kind"][:, None]
    p = Empirical(x, cond=cond)
    for utility in (LeftCVaR(X, 0.25), RightCVaR(X, 0.75)):
        found = optimal_thresholds(utility, 2.0, p)
        sign = 1.0 if isinstance(utility, RightCVaR) else -1.0

        def value(y: Tensor, mass: float = utility.mass, sign: float = sign) -> Tensor:
            hinge = sign * (sign * (x[:, 0] - y)).clamp(min=0) / (2.0 * mass)
            halves = (hinge[k::2].double().logsumexp(0) - math.log(300) for k in (0, 1))
            return y + 2.0 * 0.5 * sum(halves)

        searched = torch.stack([value(y) for y in torch.linspace(-3, 5, 4001)])
        best = searched.max() if sign < 0 else searched.min()
        assert found.value == pytest.approx(float(best), abs=1e-4)
        assert 0.25 * found.drives[0] == pytest.approx(0.25, abs=0.01)


def test_limits() -> None:
    """A large weight leaves the quantile of the law."""
    found = optimal_thresholds(RightCVaR(X, 0.9), 1e6, NORMAL)
    assert found.at[0] == pytest.approx(1.28155, abs=1e-3)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_starvation_is_refused() -> None:
    """Methods, section 4.6: a bank of 10,000 knows the right tail at weight 5, not at 1."""
    utility, p = RightCVaR(X, 0.9), samples(10_000)
    optimal_thresholds(utility, 5.0, p).require_learnable()
    with pytest.raises(UnsupportedError, match="Raise the weight of the KL"):
        optimal_thresholds(utility, 1.0, p).require_learnable()
    least = smallest_weight(utility, p)
    assert 2.0 < least < 4.5
    assert optimal_thresholds(utility, least, p).problem is None
    assert optimal_thresholds(utility, 0.8 * least, p).problem is not None


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight"):
        optimal_thresholds(LeftCVaR(X, 0.2), weight, NORMAL)


def test_a_constant_reward() -> None:
    """A constant reward has no tail: whatever the threshold, no sample is beyond it."""
    found = optimal_thresholds(RightCVaR(0.0 * X, 0.9), 1.0, samples(2000))
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert "beyond the threshold" in str(found.problem)
