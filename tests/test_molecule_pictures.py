"""Pictures of molecules: rotations, signs, depth, marks; cards and the page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from molecule_data import GSCHNET, embedded, gschnet, needs
from test_molecule_files import strange
from tiltflow.bonds import perceived
from tiltflow.gallery import cards, gallery_page, legend, metrics_table
from tiltflow.molecule_pictures import HEIGHT, WIDTH, balls_and_sticks, drawing, oriented
from tiltflow.molecules import Molecules, formula
from tiltflow.seed import Seed
from tiltflow.types import Estimate


def cloud(atoms: int = 9) -> torch.Tensor:
    spread = torch.tensor([3.0, 1.5, 0.7], dtype=torch.float64)
    generator = Seed(0).generator()
    return spread * torch.randn(atoms, 3, generator=generator, dtype=torch.float64)


def turn() -> torch.Tensor:
    """A proper rotation."""
    q = torch.linalg.qr(torch.randn(3, 3, generator=Seed(1).generator()).double())[0]
    return q * torch.linalg.det(q)


def test_the_view_is_a_rotation_and_does_not_depend_on_the_pose() -> None:
    """Distances and handedness stay; the longest direction is across, the shortest to the eye."""
    x = cloud()
    seen = oriented(x)
    assert torch.allclose(torch.cdist(seen, seen), torch.cdist(x, x))
    sides = [torch.linalg.det(y[1:4] - y[0]) for y in (x, seen)]
    assert float(sides[0]) == pytest.approx(float(sides[1]))
    assert torch.allclose(oriented(x @ turn().T + 5), seen, atol=1e-9)
    mirrored = oriented(-x)
    assert not torch.allclose(mirrored, seen, atol=0.1)
    spread = seen.std(0)
    assert float(spread[0]) > float(spread[1]) > float(spread[2])


def test_no_atom_is_exactly_behind_another() -> None:
    """Ethane's hydrogens are pairwise behind each other along a principal axis."""
    molecules = embedded("CC", "CC(C)(C)C")
    for i in range(2):
        flat = oriented(molecules[i][1])[:, :2]
        distances = torch.cdist(flat, flat) + 9 * torch.eye(len(flat)).double()
        assert float(distances.min()) > 0.05


@pytest.mark.parametrize("shape", ["point", "line", "far"])
def test_degenerate_shapes_have_a_view(shape: str) -> None:
    x = {
        "point": torch.zeros(1, 3), "line": torch.eye(3)[:1] * torch.arange(4.0)[:, None],
        "far": torch.tensor([[0.0, 0, 0], [1e4, 0, 0], [0, 1, 0]]),
    }[shape]  # fmt: skip
    molecules = Molecules(x[None], torch.ones(1, len(x), dtype=torch.long))
    assert bool(oriented(x.double()).isfinite().all())
    (picture,) = balls_and_sticks(molecules)
    assert "nan" not in picture
    numbers = [float(v) for v in re.findall(r'c[xy]="([-0-9.]+)" r', picture)]
    assert len(numbers) >= 2 * len(x)
    assert all(-1 <= v <= WIDTH + 1 for v in numbers)


def test_a_picture_has_its_atoms_inside_and_sorted_by_depth() -> None:
    molecules = embedded("NCC#C")
    (picture,) = balls_and_sticks(molecules, standalone=True)
    root = ET.fromstring(picture)
    name = "{http://www.w3.org/2000/svg}"
    balls = [c for c in root.iter(f"{name}circle") if (c.get("fill") or "").startswith("url")]
    assert len(balls) == 9
    for ball in balls:
        x, y, r = (float(ball.get(k) or "nan") for k in ("cx", "cy", "r"))
        assert r < x < WIDTH - r
        assert r < y < HEIGHT - r
    assert "stroke-dasharray" not in picture
    depths = oriented(molecules[0][1])[:, 2]
    order = depths.argsort()
    drawn = [re.sub(r"\D", "", (b.get("fill") or "").rsplit("-", 1)[-1]) for b in balls]
    assert [int(z) for z in drawn] == molecules[0][0][order].tolist()


def test_a_stick_for_each_half_of_a_bond() -> None:
    """Hydrogen cyanide: single and triple, each with two halves of three strokes."""
    (picture,) = balls_and_sticks(embedded("C#N"))
    paths = re.findall(r'<path d="([^"]*)"', picture)
    assert len(paths) == 2 * 2 * 3
    assert sorted(path.count("M") for path in paths) == [1] * 6 + [3] * 6


def test_wrong_atoms_are_marked() -> None:
    """A CH2 with nothing else lacks two bonds at its carbon; its hydrogens are fine."""
    positions = torch.tensor([[[0.0, 0, 0], [1.09, 0, 0], [-0.3, 1.05, 0]]])
    (picture,) = balls_and_sticks(Molecules(positions, torch.tensor([[6, 1, 1]])))
    assert picture.count("stroke-dasharray") == 1


def test_strange_molecules_have_pictures() -> None:
    pictures = balls_and_sticks(strange())
    assert len(pictures) == 7
    assert "no atoms" in pictures[2]
    assert "positions are not finite" in pictures[3]
    assert "<path" not in pictures[5], "the bond length of HCl is not known"
    for picture in balls_and_sticks(strange(), standalone=True):
        ET.fromstring(picture)
        assert "nan" not in picture


def test_pictures_are_the_same_every_time_and_names_do_not_clash() -> None:
    molecules = embedded("CCO", "CF")
    first, second = balls_and_sticks(molecules)
    assert [first, second] == balls_and_sticks(molecules)
    ids = [{*re.findall(r'id="([^"]+)"', picture)} for picture in (first, second)]
    assert not ids[0] & ids[1]
    assert max(len(first), len(second)) < 12_000


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([6, 1, 1, 8, 1, 1, 6], "C2H4O"), ([1, 8, 1], "H2O"), ([17, 1], "ClH"), ([], "")],
)
def test_formulas(numbers: list[int], text: str) -> None:
    assert formula(numbers) == text


def test_drawings() -> None:
    pytest.importorskip("rdkit")
    ethanol, bad = perceived(embedded("CCO"))[0], None
    text = drawing(ethanol)
    assert text is not None
    assert "<title>CCO</title>" in text
    assert "http" not in text
    assert ET.fromstring(text).tag == "svg"
    assert drawing(bad) is None


# Cards


def test_cards_say_what_is_wrong() -> None:
    pytest.importorskip("rdkit")
    pair = embedded("CCO", "C=O")
    both = torch.cat([pair.positions[0], pair.positions[1] + 20])
    numbers = torch.cat([pair.numbers[0], pair.numbers[1]])
    apart = Molecules(both[None].float(), numbers[None])
    told = cards(apart) + cards(pair) + cards(strange(), torch.arange(7.0))
    assert "2 pieces" in told[0]
    assert "poor" in told[0]
    assert "C<sub>2</sub>H<sub>6</sub>O</b> · stable" in told[1]
    assert "poor" not in told[1]
    assert "reward 0" in told[3]
    assert "empty" in told[5]
    assert "invalid" in told[7]
    assert "element without known bond lengths" in told[8]
    assert "poor" not in told[8]


def test_a_page_of_a_batch_with_and_without_numbers() -> None:
    pytest.importorskip("rdkit")
    molecules = embedded("CCO", "C=O")
    numbers = {"molecules.valid": Estimate(0.5, 0.1, 2)}
    page = gallery_page("a <b>", molecules, torch.tensor([1.0, 2.0]), numbers)
    assert "a &lt;b&gt;" in page
    assert page.count("<figure") == 2
    assert "0.50 <small>± 0.10" in page
    assert "Mean reward 1.50 <small>± 0.50" in page
    silent = gallery_page("a", molecules, None, {}, "RDKit < needed")
    assert "No metrics: RDKit &lt; needed" in silent
    assert "reward" not in silent.split("<main>")[1]
    assert metrics_table({"m": {}}, {"m": "m"}, None) == ""
    assert legend().count("<b>") == 0


@needs(GSCHNET)
def test_many_molecules() -> None:
    """All of them have a picture of reasonable size with every atom on the paper."""
    some = gschnet().chosen(range(0, 9800, 490))
    pictures = balls_and_sticks(some)
    for i, picture in enumerate(pictures):
        assert picture.count("url(#") == len(some[i][0])
        assert len(picture) < 16_000
    assert math.isfinite(sum(map(len, pictures)))
