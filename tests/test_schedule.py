from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from tiltflow.errors import ConfigError
from tiltflow.kernel import Ancestral
from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
DDPM = tuple(
    torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).tolist()
)
SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "tabulated": Tabulated(DDPM),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_linear_table() -> None:
    """kappa = 1/t, eta = (1-t)/t, sigma = sqrt(2 (1-t)/t), D = 1 (table 1.2)."""
    s, t = Linear(), TIMES
    close(s.kappa(t), 1 / t)
    close(s.eta(t), (1 - t) / t)
    close(s.sigma(t), (2 * (1 - t) / t).sqrt())
    close(s.wronskian(t), torch.ones_like(t))


def test_cosine_table() -> None:
    """kappa = eta = (pi/2) cot(pi t/2), sigma = sqrt(pi cot), D = pi/2 (table 1.2)."""
    s, t = Cosine(), TIMES
    cot = 1 / (math.pi / 2 * t).tan()
    close(s.kappa(t), math.pi / 2 * cot)
    close(s.eta(t), math.pi / 2 * cot)
    close(s.sigma(t), (math.pi * cot).sqrt())
    close(s.wronskian(t), torch.full_like(t, math.pi / 2))


def test_variance_preserving_table() -> None:
    """alpha^2 = exp(-int_t^1 b), by adaptive quadrature; kappa = eta, sigma^2 = abar'/abar."""
    s, t = VariancePreserving(), TIMES
    for time in t.tolist():
        integral, _ = quad(lambda u: 0.1 + 19.9 * u, 0, 1 - time)
        assert float(s.alpha(torch.tensor(time, dtype=torch.float64))) ** 2 == pytest.approx(
            math.exp(-integral), rel=1e-12
        )
    close(s.kappa(t), s.eta(t))
    abar_rate = 2 * s.d_alpha(t) / s.alpha(t)
    close(s.sigma(t) ** 2, abar_rate)
    close(s.wronskian(t), s.d_alpha(t) / s.beta(t))


@every
def test_derivatives(schedule: Schedule) -> None:
    """d_alpha and d_beta are the derivatives of alpha and beta (autograd)."""
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.beta, schedule.d_beta)):
        t = (TIMES + 1e-4).requires_grad_()  # inside a cell of the table
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        close(slope(t.detach()), expected)


@every
def test_identities(schedule: Schedule) -> None:
    """eta = beta D / alpha = beta (kappa beta - beta'), sigma^2 = 2 eta, D > 0."""
    t = TIMES
    alpha, beta = schedule.alpha(t), schedule.beta(t)
    d = schedule.d_alpha(t) * beta - alpha * schedule.d_beta(t)
    close(schedule.wronskian(t), d)
    close(schedule.eta(t), beta * d / alpha)
    close(schedule.eta(t), beta * (schedule.kappa(t) * beta - schedule.d_beta(t)))
    close(schedule.sigma(t) ** 2, 2 * schedule.eta(t))
    assert bool((d > 0).all())


@every
def test_direction_of_time(schedule: Schedule) -> None:
    """t = 0 is noise and t = 1 data: alpha rises to 1, beta falls from 1."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert bool((schedule.alpha(t).diff() > 0).all())
    assert bool((schedule.beta(t).diff() < 0).all())
    assert float(schedule.alpha(t)[0]) ** 2 < 1e-4
    assert float(schedule.alpha(t)[-1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["cosine", "vp", "tabulated"])
def test_variance_is_preserved(name: str) -> None:
    """alpha^2 + beta^2 = 1."""
    s = SCHEDULES[name]
    close(s.alpha(TIMES) ** 2 + s.beta(TIMES) ** 2, torch.ones_like(TIMES))


@every
def test_dtype_is_kept(schedule: Schedule) -> None:
    """float32 times give float32 numbers, equal to float64's up to rounding."""
    t = TIMES.float()
    for f in (schedule.alpha, schedule.beta, schedule.d_alpha, schedule.d_beta):
        assert f(t).dtype == torch.float32
        torch.testing.assert_close(f(t).double(), f(t.double()), rtol=1e-4, atol=1e-5)


def test_table_is_exact_at_its_nodes() -> None:
    """alpha(k / (n-1))^2 is entry k of the table, read from noise to data, either way round."""
    for table in (DDPM, DDPM[::-1]):
        s = Tabulated(table)
        assert s.nodes[0] == 0
        assert s.nodes[-1] == 1
        close(s.alpha(s.nodes) ** 2, torch.tensor(DDPM[::-1], dtype=torch.float64))


def test_table_of_a_smooth_schedule_is_second_order() -> None:
    """A table of Cosine's angle is exact, one of VP's is off by O(n^-2): a ratio of 4."""
    t = torch.linspace(0.11, 0.97, 57, dtype=torch.float64)
    nodes = torch.linspace(0, 1, 11, dtype=torch.float64)
    close(
        Tabulated(tuple((Cosine().alpha(nodes) ** 2).tolist())).alpha(t), Cosine().alpha(t), 1e-7
    )
    errors = []
    for n in (101, 201, 401):
        nodes = torch.linspace(0, 1, n, dtype=torch.float64)
        table = Tabulated(tuple((VariancePreserving().alpha(nodes) ** 2).tolist()))
        errors.append(float((table.alpha(t) - VariancePreserving().alpha(t)).abs().max()))
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


@pytest.mark.parametrize(
    "table", [(0.5,), (0.1, 0.1, 0.9), (0.5, 0.4, 0.6), (-0.1, 0.9), (0.1, 1.1)]
)
def test_bad_tables(table: tuple[float, ...]) -> None:
    """A table must be strictly monotone, inside [0, 1], and have two entries."""
    with pytest.raises(ConfigError, match="Tabulated"):
        Tabulated(table)


def test_bad_variance_preserving() -> None:
    """b_min must be positive and below b_max."""
    with pytest.raises(ConfigError, match="b_min"):
        VariancePreserving(b_min=2.0, b_max=1.0)


@every
def test_time_at_an_angle(schedule: Schedule) -> None:
    """The inverse of atan2(alpha, beta), in closed form and by bisection."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    angle = torch.atan2(schedule.alpha(t), schedule.beta(t))
    close(schedule.time_at(angle), t, 1e-9)
    close(Schedule.time_at(schedule, angle), t, 1e-9)
    ends = schedule.time_at(torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 11, 202, 1001])
def test_clean_data_are_clean(dtype: torch.dtype, count: int) -> None:
    """beta(1) is 0 and not a rounding error, by whose square the last step would be weighted."""
    one = torch.ones((), dtype=dtype)
    table = Tabulated(torch.linspace(1, 0.001, count).double().tolist())
    for schedule in (table, Cosine(), Linear(), VariancePreserving()):
        assert float(schedule.beta(one)) == 0.0
        assert float(Ancestral().variance(schedule, 0.9 * one, one)) == 0.0
