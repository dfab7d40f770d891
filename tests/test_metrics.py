"""Metrics: known values on known laws, and standard errors that cover."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import norm

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.metrics import bootstrap_interval, left_cvar, reward, right_cvar, shares, tails
from tiltflow.seed import Seed


def normal(count: int, *path: str | int) -> torch.Tensor:
    generator = Seed(0).child("metrics", *path).generator()
    return torch.randn(count, generator=generator, dtype=torch.float64)


def test_cvar_by_hand() -> None:
    """Fractional boundary: of 1..5, the worst 0.3 is (1 + 0.5 * 2) / 1.5."""
    r = torch.tensor([5.0, 3.0, 1.0, 4.0, 2.0])
    assert left_cvar(r, 0.3).value == pytest.approx((1 + 0.5 * 2) / 1.5, abs=1e-12)
    assert right_cvar(r, 0.7).value == pytest.approx((5 + 0.5 * 4) / 1.5, abs=1e-12)
    assert left_cvar(r, 0.4).value == pytest.approx(1.5, abs=1e-12)
    assert left_cvar(r, 0.1).value == pytest.approx(1.0, abs=1e-12)
    assert left_cvar(r, 1.0).value == pytest.approx(3.0, abs=1e-12)
    assert right_cvar(r, 0.0).value == pytest.approx(3.0, abs=1e-12)


def test_level_times_count_is_not_rounded_up() -> None:
    """0.1 * 30 is 3.0000000000000004: the fourth sample must not count."""
    r = torch.arange(30.0)
    r[3] = 1e12
    assert left_cvar(r, 0.1).value == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.5])
def test_cvar_of_a_normal(level: float) -> None:
    """E[X | X < q] = -pdf(q) / level; n = 40 000, |z| < 4.5 (false alarm 7e-6)."""
    x = normal(40_000, "cvar")
    exact = -norm.pdf(norm.ppf(level)) / level
    left, right = left_cvar(x, level), right_cvar(x, 1 - level)
    assert abs(left.value - exact) < 4.5 * left.standard_error
    assert abs(right.value + exact) < 4.5 * right.standard_error
    assert tails(x, left=level, right=1 - level) == {"left_cvar": left, "right_cvar": right}


def test_standard_errors_are_the_scatter_over_data_sets() -> None:
    """400 data sets of 500: the reported error is the standard deviation within 20 %.

    The standard deviation of 400 numbers is known to 3.5 %, the reported errors scatter less.
    """
    tail, median = [], []
    for i in range(400):
        x = normal(500, "scatter", i)
        tail.append(left_cvar(x, 0.2))
        median.append(reward(x, levels=[0.5])["q50"])
    for estimates in (tail, median):
        values = torch.tensor([e.value for e in estimates])
        reported = sum(e.standard_error for e in estimates) / len(estimates)
        assert reported == pytest.approx(float(values.std()), rel=0.2)


def test_standard_error_of_cvar_agrees_with_the_bootstrap() -> None:
    x = normal(2000, "bootstrap")
    generator = Seed(1).generator()
    index = torch.randint(0, len(x), (400, len(x)), generator=generator)
    again = torch.tensor([left_cvar(x[i], 0.1).value for i in index])
    assert left_cvar(x, 0.1).standard_error == pytest.approx(float(again.std()), rel=0.2)


def test_the_bootstrap_interval_covers() -> None:
    """95 % of 200 data sets of 500 normals; the binomial's standard error is 1.5 %."""
    exact, covered, width, plain = -norm.pdf(norm.ppf(0.2)) / 0.2, 0, 0.0, 0.0
    for i in range(200):
        x = normal(500, "coverage", i)
        low, high = bootstrap_interval(x, 0.2, "left", resamples=400, seed=Seed(i))
        covered += low <= exact <= high
        width, plain = width + high - low, plain + left_cvar(x, 0.2).standard_error
    assert abs(covered / 200 - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / 200)
    assert width / plain == pytest.approx(2 * norm.ppf(0.975), rel=0.05)


def test_the_bootstrap_interval_on_the_right() -> None:
    """The mirror image of the left, and about 1.96 standard errors of the influence function."""
    x = normal(4000, "right")
    low, high = bootstrap_interval(x, 0.9, "right", resamples=2000, seed=Seed(0))
    found = right_cvar(x, 0.9)
    assert low < found.value < high
    assert high - low == pytest.approx(2 * norm.ppf(0.975) * found.standard_error, rel=0.1)
    mirrored = bootstrap_interval(-x, 0.1, "left", resamples=2000, seed=Seed(0))
    assert mirrored == pytest.approx((-high, -low))


@pytest.mark.parametrize("level", [0.2, 0.5, 0.8, 1.0])
def test_the_bootstrap_of_four_samples(level: float) -> None:
    """Against the tail means of all 256 resamples of four samples, fractions included: between
    its ends lies the stated part of them, to 4.5 standard errors of 4000 resamples."""
    r = torch.tensor([0.0, 1.0, 3.0, 7.0])
    every = [left_cvar(r[list(i)], level).value for i in itertools.product(range(4), repeat=4)]
    for confidence in (0.3, 0.7, 0.9):
        low, high = bootstrap_interval(
            r, level, "left", confidence=confidence, resamples=4000, seed=Seed(2)
        )
        slack = 4.5 * math.sqrt(0.25 / 4000)
        for end, part in ((low, (1 - confidence) / 2), (high, (1 + confidence) / 2)):
            under = sum(v < end - 1e-9 for v in every) / 256
            up_to = sum(v <= end + 1e-9 for v in every) / 256
            assert under - slack <= part <= up_to + slack


def test_quantiles_of_a_normal() -> None:
    x = normal(40_000, "quantiles")
    got = reward(x)
    assert set(got) == {"mean", *(f"q{p:02d}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99))}
    for level in (0.01, 0.1, 0.5, 0.99):
        q = got[f"q{100 * level:02.0f}"]
        assert abs(q.value - norm.ppf(level)) < 4.5 * q.standard_error
        exact = math.sqrt(level * (1 - level) / len(x)) / norm.pdf(norm.ppf(level))
        assert q.standard_error == pytest.approx(exact, rel=0.25)
    assert reward(torch.tensor([3.0, 1.0, 2.0]), levels=[0.5])["q50"].value == 2.0


def test_shares() -> None:
    got = shares(torch.tensor([0, 0, 2, 0]), 4)
    assert {k: v.value for k, v in got.items()} == {"0": 0.75, "1": 0.0, "2": 0.25, "3": 0.0}
    assert got["1"].standard_error > 0
    many = shares(torch.arange(1000) % 4, 4)["3"]
    assert many.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 1000), rel=0.01)


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ShapeError, match="one number per sample"):
        reward(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="N > 0"):
        left_cvar(torch.zeros(0), 0.1)
    with pytest.raises(ShapeError, match="NaN"):
        reward(torch.tensor([1.0, math.nan]))
    with pytest.raises(ConfigError, match=r"level=1\.5"):
        left_cvar(torch.zeros(3), 1.5)
    with pytest.raises(ConfigError, match="level"):
        right_cvar(torch.zeros(3), 1.0)
    with pytest.raises(ConfigError, match="levels"):
        reward(torch.zeros(3), levels=[0.0])
    for level, confidence, resamples in ((0.0, 0.95, 9), (0.1, 1.0, 9), (0.1, 0.95, 0)):
        with pytest.raises(ConfigError, match="bootstrap_interval"):
            bootstrap_interval(
                torch.arange(9.0), level, "left", confidence=confidence, resamples=resamples,
                seed=Seed(0),
            )  # fmt: skip
    with pytest.raises(ConfigError, match="bootstrap_interval"):
        bootstrap_interval(torch.arange(9.0), 1.0, "right", seed=Seed(0))
    with pytest.raises(ShapeError, match="at least 2"):
        bootstrap_interval(torch.zeros(1), 0.1, "left", seed=Seed(0))
    with pytest.raises(ShapeError, match="outside"):
        shares(torch.tensor([0, 10]), 10)
    with pytest.raises(ShapeError, match="integers"):
        shares(torch.tensor([0.5]), 10)
