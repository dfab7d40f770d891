"""The experiments of Reward-Guided Flow Merging: what is exact in them, and smoke runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tiltflow.seed import Seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import rfm  # noqa: E402
import rfm_gaussians  # noqa: E402
import rfm_panels  # noqa: E402
import rfm_plane  # noqa: E402
from rfm_plane import BEND, PANELS, SCALE, SHIFT  # noqa: E402
from toys import Store  # noqa: E402

NAMES = ("panels", "toy", "gaussians")
GUIDED = next(panel for panel in PANELS if panel.name == "between-reward")


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Points of a, and their images, which are points of c."""
    x = rfm_plane.LAWS["a"].sample(count, Seed(3))
    return x, x * torch.tensor(SCALE).double() + torch.tensor(SHIFT).double()


def best_point(middle: Tensor) -> tuple[Tensor, Tensor]:
    """argmax_z f(z) - A |z - middle|^2 by Newton's method on its gradient, and the maximum."""
    z = middle.clone()
    for _ in range(2):
        slope = BEND.grad(z) - 2 * GUIDED.circuit.total * (z - middle)
        z = z + slope / (2 * GUIDED.circuit.total + BEND.natural()[1])
    square = (z - middle).square().sum(-1)
    return z, BEND.value(z) - GUIDED.circuit.total * square


def test_the_guided_barycentre_is_the_optimum() -> None:
    """Over all couplings of two empirical measures (the multi-marginal form of the problem): the
    best one, by linear assignment, is that of the closed form, and so are the points."""
    x, y = pairs(80)
    w = GUIDED.circuit.shares
    middle = w[0] * x[:, None] + w[1] * y[None]
    spread = w[0] * w[1] * (x[:, None] - y[None]).square().sum(-1)
    points, worth = best_point(middle.reshape(-1, 2))
    value = worth.reshape(80, 80) - GUIDED.circuit.total * spread
    rows, columns = linear_sum_assignment(-value.numpy())
    assert (rows == columns).all()
    known = rfm_plane.moved(rfm_plane.between(rfm_plane.HALVES), BEND, GUIDED.circuit.total)
    # The same affine map takes a's components to those of the closed form.
    source = rfm_plane.LAWS["a"].means
    image = source * torch.tensor(SCALE).double() + torch.tensor(SHIFT).double()
    assert torch.allclose(best_point(w[0] * source + w[1] * image)[0], known.means, atol=1e-9)
    found = points.reshape(80, 80, 2).diagonal().T
    slope = (found[1] - found[0]) / (x[1] - x[0])
    assert torch.allclose(known.stds, rfm_plane.LAWS["a"].stds * slope, atol=1e-9)


def transported(z: Tensor, part: Tensor) -> Tensor:
    """Where the optimal transport takes each point."""
    _, columns = linear_sum_assignment(torch.cdist(z, part).square().numpy())
    return part[columns]


def test_no_particles_do_better_than_the_guided_barycentre() -> None:
    """Ascent of E f - sum_i a_i W_2^2 from elsewhere comes to the closed form's value from
    below, and to its points."""
    x, y = pairs(60)
    w, total = GUIDED.circuit.shares, GUIDED.circuit.total
    best, _ = best_point(w[0] * x + w[1] * y)
    z = torch.randn(60, 2, dtype=torch.float64, generator=Seed(4).generator())

    def worth(z: Tensor) -> tuple[float, Tensor]:
        value, slope = BEND.value(z).mean(), BEND.grad(z)
        for share, part in zip(w, (x, y), strict=True):
            off = z - transported(z, part)
            value = value - total * share * off.square().sum(1).mean()
            slope = slope - 2 * total * share * off
        return float(value), slope

    value, first = worth(best)[0], worth(z)[0]
    for _ in range(200):
        z = z + 0.2 * worth(z)[1]
    assert first < value - 0.5
    assert value - 0.03 < worth(z)[0] <= value + 1e-12


def test_samples_and_bins_of_a_panel_are_those_of_its_density() -> None:
    for panel in PANELS:
        exact = rfm_plane.bins_of(panel.exact(rfm_plane.FINE))
        x = panel.sample(20_000, Seed(5))
        off = (rfm_plane.binned(x) - exact).abs()
        # Two bins in 900 more than 4.5 standard errors off would be much; small ones are skewed.
        error = (exact.clamp(min=1e-3) / 20_000).sqrt()
        assert float((off / error).max()) < 4.5
        assert rfm_plane.binned_distance(panel, x) < 0.05


def test_every_density_is_inside_the_square() -> None:
    for name, law in rfm_plane.LAWS.items():
        p = rfm_plane.law_on_grid(name, rfm_plane.NODES)
        mass = law.log.value(p.nodes).exp().sum() * p.cell
        assert float(mass) == pytest.approx(1, abs=1e-3)


def test_energy_distances_of_the_same_law_are_zero() -> None:
    x, y = (PANELS[0].sample(1000, Seed(k)) for k in (6, 7))
    within = [rfm_plane.mean_distance(each) for each in (x, y)]
    assert abs(2 * rfm_plane.mean_distance(x, y) - sum(within)) < 0.01
    assert rfm_plane.mean_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5.0)


def test_closed_forms_on_the_line() -> None:
    """Methods, section 5.6."""
    variances = {case.name: case.exact[1] ** 2 for case in rfm_gaussians.CASES}
    assert variances["half"] == pytest.approx(0.4)
    assert rfm_gaussians.CASES[0].late == pytest.approx(0.396035)
    assert variances["shares"] == pytest.approx(0.32258, abs=1e-5)
    assert variances["reward"] == pytest.approx(0.285714, abs=1e-6)
    apart = rfm_gaussians.CASES[-1].exact
    assert apart == pytest.approx((1.1414914, 0.5531070), abs=1e-6)
    known = rfm_gaussians.averages((0.5, 0.5), rfm_gaussians.NORMALS, 4001)
    expected = {"late_sde": 0.4575, "late_ode": 0.4950, "variance_sde": 0.4621}
    for key, value in expected.items():
        assert known[key] == pytest.approx(value, abs=1e-4)


def test_the_verdict_is_by_mean_distances(tmp_path: Path) -> None:
    store, panel = Store(tmp_path / "a.json"), PANELS[2]
    for seed, (merged, direct) in enumerate([(0.03, 0.03), (0.05, 0.02)]):
        store.get(f"default/{panel.name}/{seed}", lambda v=merged: {"tv": v})
        store.get(f"direct/{panel.name}/{seed}", lambda v=direct: {"tv": v})
    assert rfm_panels.factor(store, panel, "default") == pytest.approx(1.6)
    assert "Missed by: balanced union 1.60." in rfm_panels.verdict(store)
    assert math.isclose(rfm_panels.ratios(store, panel, "default")[1], 2.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path) -> None:
    """Every command runs, goes on where it was, and writes its section."""
    arguments = [name, "--quick", "--seeds", "1", "--out", str(tmp_path)]
    rfm.main(arguments)
    before = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    rfm.main(arguments)
    assert (tmp_path / f"{name}.json").read_text(encoding="utf-8") == before
    page = (tmp_path / "docs" / "rfm.md").read_text(encoding="utf-8")
    assert f"rfm.py {name}" in page
