"""Rewards of molecules by their bonds: a smooth valency, and RDKit's scores."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from molecule_data import EDM, GOOD, edm_samples, embedded, needs, states
from tiltflow.bonds import stable_atoms
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.molecules import Layout, Molecules
from tiltflow.rewards import DrugScore, Valency
from tiltflow.types import Access

pytest.importorskip("rdkit")


@pytest.fixture(scope="module")
def molecules() -> Molecules:
    return embedded(*GOOD)


def shaken(molecules: Molecules, by: float) -> Molecules:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(molecules.positions.shape, generator=generator, dtype=torch.float64)
    places = molecules.positions + by * noise * molecules.mask[..., None]
    return Molecules(places, molecules.numbers)


def test_good_molecules_have_zero(molecules: Molecules) -> None:
    """Where EDM's rule is content; clearly below zero where a hydrogen is lost."""
    x, cond = states(molecules)
    value = Valency().value(x, cond)
    assert bool((value <= 0).all())
    assert float(value.abs().max()) < 0.005
    pulled = x.clone()
    pulled[:, -1, 0] += 5.0  # a hydrogen of the molecule with most atoms, or padding
    off = Valency().value(pulled, cond)
    whole = cond["mask"][:, -1] == 1
    assert bool((off[whole] < -0.03).all())
    assert torch.allclose(off[~whole], value[~whole])


@pytest.mark.parametrize("soft", [None, 0.5])
def test_gradient_is_the_finite_difference(molecules: Molecules, soft: float | None) -> None:
    """Central differences along random directions, in the columns that have a gradient."""
    x, cond = states(shaken(molecules, 0.1))
    reward = Valency(soft_types=soft)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    if soft is None:
        direction[..., 3:] = 0
    value, grad = reward.value_and_grad(x, cond)
    assert bool((value < 0).all())
    h = 1e-6
    difference = reward.value(x + h * direction, cond) - reward.value(x - h * direction, cond)
    slope = (grad * direction).flatten(1).sum(1)
    scale = 1e-6 + grad.flatten(1).norm(dim=1) * direction.flatten(1).norm(dim=1)
    assert float(((difference / (2 * h) - slope) / scale).abs().max()) < 1e-6
    assert bool(grad[..., 3:8].any()) == (soft is not None)
    assert not bool(grad[~molecules.mask].any()), "padding feels nothing"
    assert bool((reward.value(x + 1e-4 * grad, cond) >= value).all())


def test_narrow_sigmoids_are_the_rule(molecules: Molecules) -> None:
    """width -> 0 without slack: mean of e^2 / (1 + e^2) with whole bond orders, excess twice."""
    from tiltflow.bonds import VALENCIES, bond_orders

    off = shaken(molecules, 0.05)
    x, cond = states(off)
    due = torch.zeros(10, dtype=torch.long)
    due[list(VALENCIES)] = torch.tensor(list(VALENCIES.values()))
    e = (due[off.numbers] - bond_orders(off).sum(-1)).double() * off.mask
    e = torch.where(e < 0, 2 * e, e)
    expected = -(e**2 / (1 + e**2)).sum(1) / off.mask.sum(1)
    assert bool((expected < 0).any())
    assert torch.allclose(Valency(width=1e-7, slack=0.0).value(x, cond), expected, atol=1e-12)


def test_range_order_and_place(molecules: Molecules) -> None:
    """Within [-1, 0]; the same for atoms in another order, moved, or with one more pad."""
    x, cond = states(shaken(molecules, 0.2))
    reward = Valency(soft_types=0.3)
    value = reward.value(x, cond)
    far = x.clone()
    far[..., :3] *= 100
    lonely = Valency().value(far, cond)
    assert bool((lonely >= -1).all())
    assert bool((lonely < -0.3).all()), "atoms far apart have no bonds"
    together = x.clone()
    together[..., :3] = 0
    crushed, grad = Valency().value_and_grad(together, cond)
    assert bool((crushed >= -1).all())
    assert bool(grad.isfinite().all())
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    turned = reward.value(x[:, order], {"mask": cond["mask"][:, order]})
    assert torch.allclose(turned, value, atol=1e-12)
    moved = x + torch.tensor([1.0, -2.0, 3.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    wider = torch.nn.functional.pad(moved, (0, 0, 0, 1))
    mask = torch.nn.functional.pad(cond["mask"], (0, 1))
    assert torch.allclose(reward.value(wider, {"mask": mask}), value, atol=1e-12)


def test_cold_soft_types_are_hard_ones(molecules: Molecules) -> None:
    x, cond = states(shaken(molecules, 0.1))
    cold, hard = Valency(soft_types=1e-3), Valency()
    assert torch.allclose(cold.value(x, cond), hard.value(x, cond), atol=1e-12)


@needs(EDM)
def test_it_goes_with_stability() -> None:
    """On samples of a weak model: correlation with the share of stable atoms above 0.7."""
    found = edm_samples()
    x, cond = states(found)
    stable = stable_atoms(found).sum(1) / found.mask.sum(1)
    pair = torch.stack([Valency().value(x, cond), stable.double()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.7


@pytest.mark.slow
@needs(EDM)
@pytest.mark.parametrize("soft", [None, 0.1])
def test_uphill_is_towards_molecules(soft: float | None) -> None:
    """From a weak model's samples: not only are more atoms stable, more of them are molecules."""
    from tiltflow.bonds import perceived

    x, cond = states(edm_samples())
    layout, reward = Layout(), Valency(soft_types=soft)

    def shares(x: torch.Tensor) -> tuple[float, float]:
        found = layout.decode(x, cond)
        valid = sum(m is not None for m in perceived(found)) / len(found)
        return float(stable_atoms(found).sum() / found.mask.sum()), valid

    before = shares(x)
    for _ in range(60):
        grad = reward.grad(x, cond)
        x = x + 0.02 * grad / grad.flatten(1).norm(dim=1).clamp(min=0.2)[:, None, None]
    after = shares(x)
    assert after[0] > before[0] + 0.05
    assert after[1] > before[1] + 0.3


def test_scores_are_those_of_the_molecule() -> None:
    """Through positions and back: RDKit's scores of the SMILES itself."""
    from rdkit import Chem
    from rdkit.Chem import QED, Crippen

    from tiltflow.rewards.molecules import _accessibility

    texts = ("CCO", "NCC#C", "CC(C)=O", "CF")
    x, cond = states(embedded(*texts))
    read = [Chem.MolFromSmiles(text) for text in texts]
    accessibility = _accessibility()
    for score, expected in (
        ("qed", [QED.qed(m) for m in read]),
        ("logp", [Crippen.MolLogP(m) for m in read]),
        ("ease", [(10 - accessibility(m)) / 9 for m in read]),
    ):
        reward = DrugScore(score)  # type: ignore[arg-type]
        assert reward.value(x, cond).tolist() == pytest.approx(expected, abs=1e-9)
        assert reward.offers is Access.VALUE
        assert reward.failures == {}


def test_scores_of_wrecks() -> None:
    """In pieces, invalid, not finite, empty: the floor, counted."""
    good = embedded("CCO")
    pieces, crowded, missing = (good.positions.clone() for _ in range(3))
    pieces[0, -1] += 9.0
    crowded[0, 1:] = good.positions[0, 0] + 0.3 * torch.arange(8.0)[:, None] / 8
    missing[0, 0, 0] = float("nan")
    batch = Molecules(
        torch.cat([good.positions, pieces, crowded, missing, good.positions]),
        torch.cat([good.numbers.repeat(4, 1), torch.zeros_like(good.numbers)]),
    )
    x = Layout().encode(Molecules(batch.positions.nan_to_num(), batch.numbers))[0].double()
    x[..., :3] = batch.positions
    cond = {"mask": batch.mask.double()}
    reward = DrugScore("qed", floor=-0.5)
    assert reward.value(x, cond).tolist()[1:] == [-0.5] * 4
    assert reward.failures == {"in pieces": 1, "invalid": 3}
    assert DrugScore("logp").value(x, cond).tolist()[1:] == [-5.0] * 4


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    silicon = Layout(elements=(1, 14))
    with pytest.raises(UnsupportedError, match="14"):
        Valency(silicon)
    with pytest.raises(UnsupportedError, match="14"):
        DrugScore("qed", silicon)
    with pytest.raises(ConfigError, match="'ease'"):
        DrugScore("sa")  # type: ignore[arg-type]
    for wrong in ({"width": 0.0}, {"slack": 1.0}, {"soft_types": -1.0}):
        with pytest.raises(ConfigError, match="Valency"):
            Valency(**wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"pip install 'tiltflow\[molecules\]'"):
        DrugScore("qed")
