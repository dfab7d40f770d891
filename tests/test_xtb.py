"""xTB rewards: against tblite itself and published numbers; failures, processes, memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molecule_data import GOOD, embedded, states
from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.molecules import Layout, Molecules
from tiltflow.registry import kinds
from tiltflow.rewards import Standardised, XTBEnergy, XTBProperty, single_points
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.signatures import arguments_of
from tiltflow.single_point import BOHR, HARTREE_EV, Job, SinglePoint, atom_energy
from tiltflow.types import Access

pytest.importorskip("tblite")

METHODS = ("GFN2-xTB", "GFN1-xTB")
WATER = Molecules(
    torch.tensor(
        [[[0, 0, 0.119262], [0, 0.763239, -0.477047], [0, -0.763239, -0.477047]]],
        dtype=torch.float64,
    ),
    torch.tensor([[8, 1, 1]]),
)
"""Water of the G2 set, as tblite's documentation takes it from ASE."""


@pytest.fixture(scope="module")
def molecules() -> Molecules:
    return embedded(*GOOD)


def reference(method: str, numbers: Any, positions: Any) -> Any:
    """tblite's own answer, in atomic units."""
    from tblite.interface import Calculator

    calculator = Calculator(method, np.asarray(numbers), np.asarray(positions) / BOHR)
    calculator.set("verbosity", 0)
    return calculator.singlepoint()


def test_published_water() -> None:
    """tblite's documentation ("Usage in ASE"): GFN2-xTB energy -137.96777594 eV, force on O
    -0.749527 eV/A, dipole 0.476021 e A; xtb-python's says -0.749515 eV/A, so that forces at the
    default SCF accuracy are known to 1.3e-5."""
    x, cond = states(WATER)
    value, grad = XTBEnergy().value_and_grad(x, cond)
    assert float(value) * HARTREE_EV == pytest.approx(137.96777594361677, rel=1e-8)
    force = grad[0, :, :3] * HARTREE_EV  # the reward is minus the energy
    assert force[0].tolist() == pytest.approx([0, 0, -0.749527168], abs=1.3e-5)
    assert force[1].tolist() == pytest.approx([0, -0.153506496, 0.374763584], abs=1.3e-5)
    dipole = XTBProperty("dipole", unit="e angstrom").value(x, cond)
    assert float(dipole) == pytest.approx(0.476020974, rel=1e-5)
    assert float(XTBProperty("dipole").value(x, cond)) == pytest.approx(2.28643, rel=1e-4)


def test_published_atoms() -> None:
    """GFN1-xTB energies of free atoms as published code lists them, to their three digits."""
    listed = {1: -0.401, 6: -1.741, 7: -2.899, 8: -4.353, 9: -4.997}
    for number, energy in listed.items():
        assert atom_energy(number, "GFN1-xTB") == pytest.approx(energy, abs=5.1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_equals_tblite(molecules: Molecules, method: Any) -> None:
    """Energies to 1e-9 Ha, gradients to 1e-8 Ha/A, by another way through padding and units."""
    x, cond = states(molecules)
    value, grad = XTBEnergy(method=method, max_force=1e6).value_and_grad(x, cond)
    gap = XTBProperty("gap", method=method).value(x, cond)
    for i in range(len(molecules)):
        z, places = molecules[i]
        found = reference(method, z, places)
        assert float(value[i]) == pytest.approx(-float(found.get("energy")), abs=1e-9)
        slope = torch.as_tensor(found.get("gradient") / BOHR)
        assert torch.allclose(grad[i, : len(z), :3], -slope, atol=1e-8)
        levels, homo = found.get("orbital-energies"), int(found.get("orbital-occupations").sum())
        expected = (levels[homo // 2] - levels[homo // 2 - 1]) * HARTREE_EV
        assert float(gap[i]) == pytest.approx(expected, rel=1e-9)
        assert not bool(grad[i, len(z) :].any())
    assert not bool(grad[..., 3:].any())


def test_gradient_is_the_finite_difference(molecules: Molecules) -> None:
    """Along random directions of the positions; central differences of SCF energies: 1e-5."""
    x, cond = states(molecules)
    reward = XTBEnergy(per="atom", unit="kcal/mol")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    direction[..., 3:] = 0
    direction = direction * cond["mask"][..., None]
    h = 1e-4
    difference = reward.value(x + h * direction, cond) - reward.value(x - h * direction, cond)
    slope = (reward.grad(x, cond) * direction).flatten(1).sum(1)
    scale = reward.grad(x, cond).flatten(1).norm(dim=1) * direction.flatten(1).norm(dim=1)
    assert float(((difference / (2 * h) - slope) / scale).abs().max()) < 1e-5


def test_sign_and_what_it_is_per(molecules: Molecules) -> None:
    """A step along the gradient lowers the energy; formation energies by hand; units."""
    x, cond = states(molecules)
    points = SinglePoints()
    plain = XTBEnergy(points=points)
    value, grad = plain.value_and_grad(x, cond)
    assert bool((plain.value(x + 0.01 * grad, cond) > value).all())
    assert float(grad[..., :3].sum(1).abs().max()) < 1e-12
    n = cond["mask"].sum(1)
    atoms = torch.tensor([
        sum(atom_energy(z, "GFN2-xTB") for z in molecules[i][0].tolist())
        for i in range(len(molecules))
    ], dtype=torch.float64)  # fmt: skip
    energy = -value
    for per, unit, expected in (
        ("atom", "hartree", -energy / n),
        ("formation", "hartree", atoms - energy),
        ("formation_per_atom", "kcal/mol", (atoms - energy) / n * 627.5094740631),
    ):
        found = XTBEnergy(per=per, unit=unit, points=points)  # type: ignore[arg-type]
        assert torch.allclose(found.value(x, cond), expected, rtol=1e-9)
    assert bool((XTBEnergy(per="formation", points=points).value(x, cond) > 0).all())
    upward = XTBEnergy(negate=False, points=points).value_and_grad(x, cond)
    assert torch.equal(upward[0], energy)
    assert torch.equal(upward[1], -grad)
    assert torch.allclose(plain.energies(molecules), energy, atol=1e-9)


def wrecks() -> tuple[Molecules, Sequence[str | None]]:
    """Water, and what can go wrong with it."""
    one = WATER.positions[0]
    close, missing, tight = one.clone(), one.clone(), one.clone()
    close[1] = one[0] + 0.01
    missing[1, 1] = float("nan")
    tight[1] = one[0] + torch.tensor([0.0, 0.0, 0.31])
    numbers = torch.tensor([8, 1, 1])
    alone, none = torch.tensor([8, 0, 0]), torch.zeros(3, dtype=torch.long)
    batch = Molecules(
        torch.stack([one, close, missing, one, one, tight]),
        torch.stack([numbers, numbers, numbers, alone, none, numbers]),
    )
    return batch, (
        None, "atoms too close", "positions not finite", "fewer than two atoms",
        "fewer than two atoms", "energy out of bounds",
    )  # fmt: skip


def test_failures_cost_one_molecule() -> None:
    """Finite, flat, counted; worse than the good molecule; its neighbours do not notice."""
    batch, reasons = wrecks()
    points = SinglePoints(bound=0.25)
    assert [p.failure for p in points(batch)] == list(reasons)
    x = Layout().encode(Molecules(batch.positions.nan_to_num(), batch.numbers))[0].double()
    x[..., :3] = batch.positions
    cond = {"mask": batch.mask.double()}
    for per in ("molecule", "atom", "formation", "formation_per_atom"):
        reward = XTBEnergy(per=per, points=points)  # type: ignore[arg-type]
        value, grad = reward.value_and_grad(x, cond)
        assert bool(value.isfinite().all())
        alike = [1, 2, 3, 4, 5] if per.startswith("formation") else [1, 2, 5]
        assert bool((value[alike] < value[0]).all())
        assert not bool(grad[1:].any())
        good = XTBEnergy(per=per).value_and_grad(x[:1], {"mask": cond["mask"][:1]})  # type: ignore[arg-type]
        assert torch.equal(value[:1], good[0])
        assert torch.equal(grad[:1], good[1])
    assert reward.failures == {
        "atoms too close": 1, "positions not finite": 1, "fewer than two atoms": 2,
        "energy out of bounds": 1,
    }  # fmt: skip
    assert XTBEnergy(failure=-7.0, points=points).value(x, cond).tolist()[1:] == [-7.0] * 5
    gap = XTBProperty("gap", failure=-1.0, points=points).value(x, cond)
    assert gap.tolist()[1:] == [-1.0] * 5
    assert float(gap[0]) > 5


def test_what_tblite_refuses_is_a_failure() -> None:
    """An element beyond radon: an error of the library itself, beside a good molecule."""
    numbers = torch.tensor([[8, 1, 1], [99, 1, 1]])
    batch = Molecules(WATER.positions.repeat(2, 1, 1), numbers)
    points = SinglePoints()
    assert [p.failure for p in points(batch)] == [None, "not converged"]
    assert points.counts == {"not converged": 1}


def test_strong_forces_are_clipped(molecules: Molecules) -> None:
    """The norm over the molecule is at most max_force; the direction stays."""
    x, cond = states(molecules)
    squeezed = x.clone()
    squeezed[..., :3] *= 0.8
    free = XTBEnergy(max_force=1e6).grad(squeezed, cond).flatten(1)
    held = XTBEnergy(max_force=0.5).grad(squeezed, cond).flatten(1)
    assert bool((free.norm(dim=1) > 0.5).all())
    assert torch.allclose(held.norm(dim=1), torch.full((len(x),), 0.5, dtype=torch.float64))
    assert torch.allclose(held / 0.5, free / free.norm(dim=1, keepdim=True), atol=1e-9)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many molecules each call computed."""
    sizes: list[int] = []
    original = single_points.single_points

    def counting(jobs: list[Job]) -> list[SinglePoint]:
        sizes.append(len(jobs))
        return original(jobs)

    monkeypatch.setattr(single_points, "single_points", counting)
    return sizes


def test_each_molecule_is_computed_once(molecules: Molecules, computed: list[int]) -> None:
    """Value, then gradient, then another reward of the same points; twins in one batch."""
    x, cond = states(molecules)
    points = SinglePoints(capacity=len(molecules))
    reward = XTBEnergy(points=points)
    reward.value(x, cond)
    reward.grad(x, cond)
    XTBProperty("gap", points=points).value(x, cond)
    assert computed == [len(molecules)]
    twins = x[:1] + torch.tensor([1e-3, 0.0, 1e-3], dtype=torch.float64)[:, None, None]
    reward.value(twins, {"mask": cond["mask"][:1].expand(3, -1)})
    assert computed == [len(molecules), 1]
    reward.value(x[2:3], {"mask": cond["mask"][2:3]})
    reward.value(x[1:2], {"mask": cond["mask"][1:2]})
    assert computed == [len(molecules), 1, 1], "the oldest are forgotten first"


def test_dtype_of_the_state(molecules: Molecules) -> None:
    """Float32 states give float32 numbers, computed in float64 at their very positions."""
    x, cond = states(molecules)
    value, grad = XTBEnergy().value_and_grad(x.float(), cond)
    assert value.dtype == grad.dtype == torch.float32
    exact = XTBEnergy().value(x.float().double(), cond)
    assert torch.equal(value, exact.float())


def test_standardised_under_a_law(molecules: Molecules) -> None:
    """Zero mean and unit spread; value and gradient are scaled alike."""
    from tiltflow.density import Empirical

    x, cond = states(molecules)
    reward = XTBEnergy(per="formation_per_atom")
    weights = torch.arange(1.0, len(x) + 1)
    scaled = Standardised.under(reward, Empirical(x, weights, cond))
    r, w = reward.value(x, cond), weights.double() / weights.sum()
    mean = (w * r).sum()
    std = (w * (r - mean) ** 2).sum().sqrt()
    assert torch.allclose(scaled.value(x, cond), (r - mean) / std, atol=1e-9)
    assert torch.allclose(scaled.grad(x, cond), reward.grad(x, cond) / std)
    assert scaled.offers is Access.BOTH
    with pytest.raises(ConfigError, match="no spread"):
        Standardised(reward, 0.0, 0.0)


def test_a_wreck_does_not_set_a_robust_spread() -> None:
    """One extreme value moves the standard deviation, not the interquartile range."""
    from tiltflow.density import Empirical
    from tiltflow.potential import Differentiable

    reward = Differentiable(lambda x: x[:, 0])
    torch.manual_seed(0)
    x = 3 * torch.randn(4000, 1) + 2
    wrecked = torch.cat([x, torch.tensor([[-1e5]])])
    for points in (x, wrecked):
        found = Standardised.under(reward, Empirical(points), robust=True)
        assert abs(found.mean - 2) < 4.5 * 1.26 * 3 / 4000**0.5  # errors of a Gaussian's
        assert abs(found.std / 3 - 1) < 4.5 * 1.17 / 4000**0.5  # median and IQR
    assert Standardised.under(reward, Empirical(wrecked)).std > 1000


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"method": "AM1"}, {"per": "bond"}, {"unit": "eV"}, {"max_force": 0.0},
                  {"failure": float("nan")}, {"workers": -1}, {"backend": "xtb"}):  # fmt: skip
        with pytest.raises(ConfigError):
            XTBEnergy(**wrong)  # type: ignore[arg-type]
    for quantity, unit in (("gap", "debye"), ("dipole", "ev"), ("charge", None)):
        with pytest.raises(ConfigError, match="'dipole' in 'debye'"):
            XTBProperty(quantity, unit=unit)  # type: ignore[arg-type]
    assert XTBProperty("gap").offers is Access.VALUE
    if importlib.util.find_spec("dxtb") is None:
        with pytest.raises(CapabilityError, match=r"tiltflow\[dxtb\]"):
            XTBEnergy(backend="dxtb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"pip install 'tiltflow\[molecules\]'"):
        XTBEnergy()


def test_run_files_can_name_them() -> None:
    found = arguments_of(kinds("rewards")["XTBEnergy"])
    assert {"method", "per", "unit", "failure", "workers"} <= set(found)
    assert "quantity" in arguments_of(kinds("rewards")["XTBProperty"])


@pytest.mark.slow
def test_processes_give_the_same_numbers(molecules: Molecules) -> None:
    """Bit for bit; and a pool whose processes have died is replaced."""
    batch, reasons = wrecks()
    pooled = SinglePoints(workers=2, bound=0.25)
    assert [p.failure for p in pooled(batch)] == list(reasons)
    for a, b in zip(pooled(molecules), SinglePoints()(molecules), strict=True):
        assert a.energy == b.energy
        assert np.array_equal(a.gradient, b.gradient)
    single_points._pool(2).submit(os._exit, 1)
    again = SinglePoints(workers=2)(molecules)
    assert [p.energy for p in again] == [p.energy for p in pooled(molecules)]
    assert all(p.failure is None for p in again)


@pytest.mark.slow
def test_script_without_a_guard(tmp_path: Path) -> None:
    """New processes import the script, which would start processes again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom tiltflow.molecules import Molecules\n"
        "from tiltflow.rewards.single_points import SinglePoints\n"
        "x = torch.tensor([[[0.0, 0, 0], [0, 0, 0.74]]])\n"
        "SinglePoints(workers=1)(Molecules(x, torch.tensor([[1, 1]])))\n",
        encoding="utf-8",
    )
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert out.returncode != 0
    assert "if __name__ == '__main__':" in out.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dxtb's own
@pytest.mark.parametrize("method", METHODS)
def test_dxtb_agrees(molecules: Molecules, method: Any) -> None:
    """Another program: energies to 3e-6 Ha, gradients to 3e-5 Ha/A."""
    pytest.importorskip("dxtb")
    few = Molecules(molecules.positions[:3], molecules.numbers[:3])
    ours, theirs = SinglePoints(method)(few), SinglePoints(method, "dxtb")(few)
    for a, b in zip(ours, theirs, strict=True):
        assert b.energy == pytest.approx(a.energy, abs=3e-6)
        assert np.abs(a.gradient - b.gradient).max() < 3e-5
