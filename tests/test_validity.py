"""The gap to a valid molecule in one piece: zero exactly there, continuous, with its gradient."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree

from molecule_data import EDM as SAMPLES
from molecule_data import GOOD, edm_samples, embedded, needs, states
from tiltflow.bonds import connected, perceived
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.molecules import Layout, Molecules
from tiltflow.rewards import ValidityGap
from tiltflow.rewards.validity import spanning_edges

pytest.importorskip("rdkit")


@pytest.fixture(scope="module")
def molecules() -> Molecules:
    return embedded(*GOOD)


def shaken(molecules: Molecules, by: float, seed: int = 3) -> Molecules:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(molecules.positions.shape, generator=generator, dtype=torch.float64)
    return Molecules(
        molecules.positions + by * noise * molecules.mask[..., None], molecules.numbers
    )


def fine(molecules: Molecules) -> torch.Tensor:
    return torch.tensor([connected(found) for found in perceived(molecules)])


def test_zero_is_valid_and_connected(molecules: Molecules) -> None:
    """Without a margin, for molecules and for wrecks of them, an equivalence."""
    seen = []
    for seed, by in enumerate((0.0, 0.02, 0.05, 0.1, 0.2, 0.4)):
        moved = shaken(molecules, by, seed)
        value = ValidityGap(margin=0.0).value(*states(moved))
        assert torch.equal(value == 0, fine(moved))
        assert bool((value <= 0).all())
        seen.append(fine(moved))
    assert 0.2 < float(torch.cat(seen).double().mean()) < 0.9  # both kinds were there


@needs(SAMPLES)
def test_zero_is_valid_and_connected_for_samples_of_a_model() -> None:
    samples = edm_samples()
    x, cond = Layout().encode(samples)
    assert torch.equal(ValidityGap(margin=0.0).value(x, cond) == 0, fine(samples))


def test_gradient_is_the_finite_difference(molecules: Molecules) -> None:
    x, cond = states(shaken(molecules, 0.2))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    value, grad = ValidityGap().value_and_grad(x, cond)
    assert bool((value < 0).any())
    h = 1e-7 * direction
    slope = (ValidityGap().value(x + h, cond) - ValidityGap().value(x - h, cond)) / 2e-7
    assert torch.allclose(slope, (grad * direction).sum((1, 2)), rtol=1e-5, atol=1e-6)


def test_it_is_continuous_where_bonds_come_and_go() -> None:
    """A hydrogen drawn from methane's carbon through all distances, in steps of 1e-4 Angstrom."""
    whole = embedded("C")
    out = torch.linspace(0.3, 4.0, 37_001, dtype=torch.float64)
    positions = whole.positions.expand(len(out), -1, -1).clone()
    axis = positions[:, 1] - positions[:, 0]
    axis = axis / axis.norm(dim=1, keepdim=True)
    positions[:, 1] = positions[:, 0] + out[:, None] * axis
    drawn = Molecules(positions, whole.numbers.expand(len(out), -1))
    value = ValidityGap().value(*states(drawn))
    # The steepest slope is 1 / scale for each of a few gaps.
    assert float(value.diff().abs().max()) < 1e-4 * 10 * 4
    assert float(value.max()) <= 0.0
    assert float(value[-1]) < -0.4


def test_symmetries_and_padding(molecules: Molecules) -> None:
    x, cond = states(shaken(molecules, 0.2))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    value, grad = ValidityGap().value_and_grad(x, cond)
    turned = torch.cat([x[..., :3] @ turn.T, x[..., 3:]], -1)
    again, pull = ValidityGap().value_and_grad(turned, cond)
    assert torch.allclose(value, again)
    assert torch.allclose(grad[..., :3] @ turn.T, pull[..., :3])
    order = torch.randperm(x.shape[1])
    swapped = {"mask": cond["mask"][:, order]}
    assert torch.allclose(value, ValidityGap().value(x[:, order], swapped))
    wide = torch.nn.functional.pad(x, (0, 0, 0, 4), value=0.7)
    more = {"mask": torch.nn.functional.pad(cond["mask"], (0, 4))}
    assert torch.allclose(value, ValidityGap().value(wide, more))
    assert torch.allclose(grad.sum(1)[..., :3], torch.zeros(3, dtype=torch.float64), atol=1e-9)


def test_spanning_trees_are_the_shortest() -> None:
    """Against scipy, the total length of graphs of several sizes."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(6, 9, 9, generator=generator, dtype=torch.float64) + 0.1
    lengths = lengths + lengths.transpose(1, 2)
    sizes = torch.tensor([9, 7, 5, 3, 2, 1])
    mask = torch.arange(9) < sizes[:, None]
    ours = spanning_edges(lengths, mask)
    for i, n in enumerate(sizes.tolist()):
        theirs = minimum_spanning_tree(lengths[i, :n, :n].numpy()).sum()
        assert float(ours[i].sum()) == pytest.approx(float(theirs))
        assert int((ours[i] > 0).sum()) == n - 1


def test_overlapping_and_single_atoms() -> None:
    """Everything stays finite; a lone atom is one piece without bonds."""
    numbers = torch.tensor([[6, 1, 1], [6, 0, 0]])
    x, cond = states(Molecules(torch.zeros(2, 3, 3, dtype=torch.float64), numbers))
    value, grad = ValidityGap().value_and_grad(x, cond)
    assert bool(grad.isfinite().all())
    assert float(value[0]) < 0
    assert float(value[1]) == 0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="scale=0"):
        ValidityGap(scale=0.0)
    with pytest.raises(UnsupportedError, match="element 15"):
        ValidityGap(Layout(elements=(1, 15)))
