"""The toy fields of Flow Density Control: values, bounds, gradients, and who fails on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltflow.density import Quadrature
from tiltflow.errors import ConfigError, ShapeError
from tiltflow.experiment import load, prepare
from tiltflow.potential import Reward
from tiltflow.rewards import NoveltyField, RiskField
from tiltflow.run import check

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import fdc  # noqa: E402
import fdc_others  # noqa: E402
import fdc_runs  # noqa: E402
from toys import Store, best_tail, kl, tail_mean  # noqa: E402

FIELDS: list[Reward] = [RiskField(), NoveltyField()]
LOWEST = {"RiskField": -330.0, "NoveltyField": 10.0}
HIGHEST = {"RiskField": -60.0, "NoveltyField": 600.0}


def at(field: Reward, *points: tuple[float, float]) -> list[float]:
    values: list[float] = field.value(torch.tensor(points, dtype=torch.float64)).tolist()
    return values


def test_values_of_risk() -> None:
    """Left, start, and right: between stripes, in stripes, and on average over x2."""
    left, start, gap, stripe, other = at(
        RiskField(), (-2.0, 0.3), (0.6, -4.0), (2.0, 0.5), (2.0, 0.0), (2.0, -1.0)
    )
    assert left == pytest.approx(-90)
    u = 0.6 / 1.5
    rise = u**3 * (6 * u**2 - 15 * u + 10)
    assert start == pytest.approx(-(215 + 35 * rise))
    assert gap == pytest.approx(-60, abs=1e-6)
    assert stripe == other == pytest.approx(-330)
    x2 = torch.arange(0, 1, 1e-3, dtype=torch.float64)
    mean = RiskField().value(torch.stack([torch.full_like(x2, 2.0), x2], 1)).mean()
    bessel = float(torch.special.i0e(torch.tensor(100.0, dtype=torch.float64)))
    assert float(mean) == pytest.approx(-(60 + 270 * bessel), rel=1e-9)
    assert float(mean) == pytest.approx(-71, abs=0.5)


def test_values_of_novelty() -> None:
    """Left, start, right, the tops of the spikes, and halfway down in the squared radius."""
    left, start, right, top, other, half = at(
        NoveltyField(), (-3, 0), (0, 0), (2.0, 0), (3, 0.8), (3.2, -0.8), (3 + 0.3125**0.5, 0.8)
    )
    assert (left, start, right) == pytest.approx((55, 40, 10))
    assert top == other == pytest.approx(600)
    assert half == pytest.approx(305)


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_bounds_everywhere(field: Reward) -> None:
    """Within the bounds of the docstring, and finite, far away too."""
    generator = torch.Generator().manual_seed(0)
    near = 3 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    for x in (near, 1e6 * near, near.float()):
        value, grad = field.value_and_grad(x)
        assert bool(torch.isfinite(grad).all())
        name = type(field).__name__
        assert LOWEST[name] - 1e-3 <= float(value.min())
        assert float(value.max()) <= HIGHEST[name] + 1e-3


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_gradients_are_finite_differences(field: Reward) -> None:
    """Central differences in float64, at the centres of the spikes as well."""
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(500, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([[3.0, 0.8], [3.4, 0.8], [1.2, 0.05]], dtype=torch.float64)])
    grad, h = field.grad(x), 1e-6
    for d in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[d] = h
        numeric = (field.value(x + step) - field.value(x - step)) / (2 * h)
        assert torch.allclose(numeric, grad[:, d], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RiskField(cheap=100), "cheap <= safe"),
        (lambda: RiskField(disaster=255), "disaster above all"),
        (lambda: RiskField(period=0), "period and sharpness must be positive"),
        (lambda: NoveltyField(right=50), "right <= middle"),
        (lambda: NoveltyField(width=0.6), "must lie between"),
        (lambda: NoveltyField(width=-1), "must lie between"),
    ],
)
def test_bad_arguments(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_only_in_the_plane(field: Reward) -> None:
    with pytest.raises(ShapeError, match="field in the plane"):
        field.value(torch.zeros(4, 3))


def plane(nodes: int) -> Quadrature:
    """N(0, I) on a grid."""
    axes = [torch.linspace(-5, 5.5, nodes), torch.linspace(-4.5, 4.5, nodes)]
    return Quadrature.of(axes, lambda x: -0.5 * x.square().sum(1))


def tail_of(p: Quadrature, field: Reward, side: str) -> float:
    return tail_mean(field.value(p.nodes), 0.01, side, p.probabilities)


def test_risk_needs_the_tail() -> None:
    """With one weight of the KL, the mean cost leaves the worst 1 % bad; the CVaR does not; the
    same holds at one distance from the start. Where the cheap side is cheapest on average, the
    mean goes there."""
    q, field = plane(301), RiskField()
    best = best_tail(q, field, 0.01, "below", 25.0, nodes=100).p
    assert tail_of(q, field, "below") < -250
    assert tail_of(best, field, "below") > -95
    same_weight = q.tilted(0.04 * field)
    assert tail_of(same_weight, field, "below") < -180
    same_distance = q.tilted(0.06 * field)
    assert kl(same_distance, q) > kl(best, q)
    assert tail_of(same_distance, field, "below") < -130
    # what a solver sees that cannot resolve the stripes: the mean over x2
    blurred = field.value(q.nodes).reshape(301, 301)
    weights = q.probabilities.reshape(301, 301)
    mean = (weights * blurred).sum(1) / weights.sum(1)
    left, right = q.axes[0] < -1.2, q.axes[0] > 1.5
    assert float(mean[right].max()) > float(mean[left].max())


def test_novelty_needs_the_tail() -> None:
    """With one weight of the KL, the mean reward does not look for the spikes; the CVaR does."""
    q, field = plane(351), NoveltyField()
    weight = 6000.0
    best = best_tail(q, field, 0.01, "above", weight).p
    mean = q.tilted((1 / weight) * field)
    assert tail_of(q, field, "above") < 240
    assert tail_of(mean, field, "above") < 250
    assert tail_of(best, field, "above") > 580
    assert kl(best, q) < 0.01


def test_best_tail_is_the_best() -> None:
    """Its worth is its tail mean less the weighted KL, and no tilt of the reward is worth more."""
    q = plane(201)
    for field, side, weight in ((RiskField(), "below", 25.0), (NoveltyField(), "above", 6000.0)):
        best = best_tail(q, field, 0.01, side, weight, nodes=200)
        worth = tail_of(best.p, field, side) - weight * kl(best.p, q)
        assert best.objective == pytest.approx(worth, rel=2e-2)
        for rate in (1e-3, 1e-2, 0.05, 0.1):
            other = q.tilted(rate * field)
            assert tail_of(other, field, side) - weight * kl(other, q) < worth


def test_tail_mean_splits_the_atom_at_the_boundary() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    weights = torch.tensor([0.5, 0.25, 0.25])
    assert tail_mean(values, 0.5, "above", weights) == pytest.approx(3.0)
    assert tail_mean(values, 0.3, "below", weights) == pytest.approx((0.25 + 0.1) / 0.3)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("fdc_*.toml")), ids=str)
def test_run_files(path: Path) -> None:
    """They build, their parts fit, and they say what the page about them assumes."""
    plan = prepare(load(path))
    check(plan)
    assert plan.planned == ("exploration" not in path.stem)


def test_exponents_of_exploration() -> None:
    """Methods, section 3.8: e_50 = 0.00515 for alpha = 0 and 0.33353 for 0.5, at rate 0.1."""
    assert fdc_others.exponents(0.0, [0.1] * 50)[-1] == pytest.approx(0.00515, abs=1e-5)
    assert fdc_others.exponents(0.5, [0.1] * 50)[-1] == pytest.approx(0.33353, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", fdc.NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs, goes on where it was, and writes its section."""
    monkeypatch.setattr(fdc_runs, "FRESH", 1000)
    arguments = [name, "--quick", "--seeds", "1", "--out", str(tmp_path)]
    fdc.main(arguments)
    before = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    fdc.main(arguments)
    assert (tmp_path / f"{name}.json").read_text(encoding="utf-8") == before
    page = (tmp_path / "docs" / "fdc.md").read_text(encoding="utf-8")
    assert f"fdc.py {name}" in page
    assert Store(tmp_path / f"{name}.json").known
