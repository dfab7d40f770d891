"""Molecules as states: written and read back."""

from __future__ import annotations

import pytest
import torch

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.molecules import ElementCounts, Layout, Molecules

WATER = Molecules(
    torch.tensor([[[0.0, 0.0, 0.1], [0.8, 0.0, 0.7], [-0.8, 0.0, 0.7], [0.0, 0.0, 0.0]]]),
    torch.tensor([[8, 1, 1, 0]]),
)


@pytest.mark.parametrize("layout", [Layout(), Layout(charge=None), Layout((8, 1), 1.0)])
def test_states_and_back(layout: Layout) -> None:
    x, cond = layout.encode(WATER)
    assert x.shape == (1, 4, layout.width)
    assert not bool(x[0, 3].any())
    assert torch.allclose(x[0, :, :3].sum(0), torch.zeros(3), atol=1e-6)
    found = layout.decode(x, cond)
    assert torch.equal(found.numbers, WATER.numbers)
    assert torch.allclose(
        torch.cdist(found.positions[0, :3], found.positions[0, :3]),
        torch.cdist(WATER.positions[0, :3], WATER.positions[0, :3]), atol=1e-5,
    )  # fmt: skip


def test_text() -> None:
    lines = WATER.xyz(0, "water").splitlines()
    assert lines[:2] == ["3", "water"]
    assert [line.split()[0] for line in lines[2:]] == ["O", "H", "H"]
    assert [float(v) for v in lines[3].split()[1:]] == pytest.approx([0.8, 0.0, 0.7])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"14 \(Si\)"):
        Layout().encode(Molecules(torch.zeros(1, 1, 3), torch.tensor([[14]])))
    with pytest.raises(ConfigError, match="elements"):
        Layout(elements=(0,))
    with pytest.raises(ShapeError, match="Molecules"):
        Molecules(torch.zeros(1, 2, 3), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="decode"):
        Layout().decode(torch.zeros(1, 2, 8))


def test_elements_are_counted() -> None:
    """Padding counts nothing; at a mixture of types the expected number."""
    layout = Layout()
    x, _ = layout.encode(WATER)
    assert torch.allclose(ElementCounts(layout, (8, 1, 6)).value(x), torch.tensor([[1.0, 2, 0]]))
    mixed = 0.5 * (x + layout.encode(Molecules(WATER.positions, torch.tensor([[6, 1, 1, 0]])))[0])
    assert torch.allclose(ElementCounts(layout, (6, 8)).value(mixed), torch.full((1, 2), 0.5))
    for wrong in ((14,), ()):
        with pytest.raises(ConfigError, match="those of the layout"):
            ElementCounts(layout, wrong)
