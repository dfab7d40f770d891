"""Metrics of molecules: against a second writing of the rules, and published samples."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch

from molecule_data import (
    EDM,
    EDM_CONFIG,
    GOOD,
    GSCHNET,
    edm_samples,
    embedded,
    gschnet,
    needs,
)
from tiltflow.bonds import LENGTHS, MARGINS, VALENCIES, bond_orders, perceived, smiles
from tiltflow.bonds import stable_atoms as stable
from tiltflow.errors import CapabilityError, ShapeError, UnsupportedError
from tiltflow.metrics import molecule_report
from tiltflow.metrics.molecules import (
    atom_stability,
    diversity,
    energies_by_size,
    fingerprints,
    molecule_stability,
    novelty,
    posebusters,
    uniqueness,
)
from tiltflow.molecules import SYMBOLS, Molecules
from tiltflow.rewards.single_points import SinglePoints

pytest.importorskip("rdkit")

Z = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


@pytest.fixture(scope="module")
def molecules() -> Molecules:
    return embedded(*GOOD)


def first(molecules: Molecules, count: int) -> Molecules:
    return Molecules(molecules.positions[:count], molecules.numbers[:count])


@needs(EDM_CONFIG)
def test_tables_are_the_published_ones() -> None:
    published = json.loads(EDM_CONFIG.read_text(encoding="utf-8"))["stability_metric"]
    for ours, name in zip(LENGTHS, ("single", "double", "triple"), strict=True):
        table = published[f"bond_length_pm_{name}"]
        theirs = {(Z[a], Z[b]): v for a, row in table.items() for b, v in row.items()}
        both = {**ours, **{(b, a): v for (a, b), v in ours.items()}}
        assert both == theirs
    assert tuple(published["margin_pm"].values()) == MARGINS
    assert {Z[a]: v for a, v in published["valency"].items()} == VALENCIES


def by_hand(numbers: list[int], positions: list[list[float]], config: dict) -> list[bool]:  # type: ignore[type-arg]
    """The rule as the published config words it, one pair at a time."""
    names = [SYMBOLS[z] for z in numbers]
    bonds = [0] * len(names)
    for i, j in itertools.combinations(range(len(names)), 2):
        d, order = 100 * math.dist(positions[i], positions[j]), 0
        a, b = names[i], names[j]
        if d < config["bond_length_pm_single"][a][b] + 10:
            order = 1
            two = config["bond_length_pm_double"].get(a, {}).get(b)
            if two is not None and d < two + 5:
                order = 2
                three = config["bond_length_pm_triple"].get(a, {}).get(b)
                if three is not None and d < three + 3:
                    order = 3
        bonds[i] += order
        bonds[j] += order
    return [n == config["valency"][a] for n, a in zip(bonds, names, strict=True)]


@needs(EDM, EDM_CONFIG)
def test_rule_against_a_second_writing() -> None:
    config = json.loads(EDM_CONFIG.read_text(encoding="utf-8"))["stability_metric"]
    found = first(edm_samples(), 60)
    ours = stable(found)
    for i in range(60):
        numbers, positions = found[i]
        theirs = by_hand(numbers.tolist(), positions.double().tolist(), config)
        assert ours[i][found.mask[i]].tolist() == theirs


@needs(EDM)
def test_published_samples_of_edm() -> None:
    """Known of these 192 samples: atoms 0.824, molecules 0.021, valid 0.516, connected 0.344."""
    report = molecule_report(edm_samples())
    known = {
        "atom_stability": 0.824, "molecule_stability": 0.021, "valid": 0.516,
        "valid_connected": 0.344, "unique": 1.0,
    }  # fmt: skip
    for name, value in known.items():
        assert report[name].value == pytest.approx(value, abs=5.1e-4)
    assert report["valid"].standard_error == pytest.approx(0.036, abs=1e-3)
    assert 50 < report["vendi"].value < report["vendi"].count == 99


@pytest.mark.slow
@needs(GSCHNET)
def test_published_samples_of_gschnet() -> None:
    """EDM's paper: 68.1 % of 10,000 are stable molecules, 95.7 % of their atoms; 185 of these were
    unfinished and are not in the file. Valid: 0.850 of 600 of the 10,000."""
    found = gschnet()
    whole = molecule_stability(found)
    assert len(found) == 9815
    assert whole.value * 9815 / 10_000 == pytest.approx(0.681, abs=1e-3)
    atoms = atom_stability(found)
    assert 0.957 < atoms.value < 0.957 / 0.9815
    some = perceived(first(found, 600))
    valid = sum(m is not None for m in some) / 600
    error = math.sqrt(2 * 0.85 * 0.15 / 600)
    assert abs(valid * 0.9815 - 0.850) < 4.5 * error


def test_good_and_bad_molecules(molecules: Molecules) -> None:
    """SMILES come back through positions; one long bond makes two atoms unstable."""
    assert [smiles(m) for m in perceived(molecules)] == [_canonical(s) for s in GOOD]
    assert bool(stable(molecules)[molecules.mask].all())
    assert not bool(stable(molecules)[~molecules.mask].any())
    off = molecules.positions.clone()
    off[0, 8] += 9.0  # the hydrogen of ethanol's hydroxyl
    bad = Molecules(off, molecules.numbers)
    assert stable(bad)[0].logical_not().nonzero().flatten().tolist() == [2, 8, 9]
    assert molecule_stability(bad).value == pytest.approx(1 - 1 / len(GOOD))
    order = bond_orders(molecules)[GOOD.index("C#N")]
    assert order[:3, :3].tolist() == [[0, 3, 1], [3, 0, 0], [1, 0, 0]]


def _canonical(text: str) -> str:
    from rdkit import Chem

    return str(Chem.MolToSmiles(Chem.MolFromSmiles(text)))


def test_errors_are_right() -> None:
    """Stability of atoms: the bootstrap over molecules. Uniqueness: the jackknife, by hand."""
    generator = torch.Generator().manual_seed(0)
    good = embedded("CCO", "CF")
    pick = torch.randint(2, (300,), generator=generator)
    places = good.positions[pick].clone()
    broken = torch.rand(300, generator=generator) < 0.3
    places[broken, 0] += 9.0
    found = Molecules(places, good.numbers[pick])
    error = atom_stability(found).standard_error
    ok, n = stable(found).sum(1).double(), found.mask.sum(1).double()
    draws = torch.randint(300, (4000, 300), generator=generator)
    bootstrap = float((ok[draws].sum(1) / n[draws].sum(1)).std())
    assert error == pytest.approx(bootstrap, rel=0.08)

    written = [f"{k}" for k in torch.randint(150, (200,), generator=generator).tolist()]
    out = uniqueness(written)
    assert out.value == len(set(written)) / 200
    left = torch.tensor([len(set(written[:i] + written[i + 1 :])) / 199 for i in range(200)])
    jackknife = float(((left - left.mean()) ** 2).sum().mul(199 / 200).sqrt())
    assert out.standard_error == pytest.approx(jackknife, rel=0.02)
    assert novelty(["a", "b", "b", "c"], {"b"}).value == pytest.approx(2 / 3)


def test_diversity_is_the_vendi_score() -> None:
    """Against RDKit's similarities and the definition; n copies of one molecule count as one."""
    from rdkit import DataStructs
    from rdkit.Chem import MolFromSmiles, rdFingerprintGenerator

    texts = ["CCO", "CCN", "CC(C)=O", "c1ccccc1", "CCO", "OCC#C", "CCCO", "C1CC1"]
    found = [MolFromSmiles(s) for s in texts]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    prints = [generator.GetFingerprint(m) for m in found]
    kernel = torch.tensor([DataStructs.BulkTanimotoSimilarity(p, prints) for p in prints])
    spectrum = torch.linalg.eigvalsh(kernel.double() / len(texts)).clamp(min=1e-15)
    expected = math.exp(-float((spectrum * spectrum.log()).sum()))
    out = diversity(found)
    assert out.value == pytest.approx(expected, rel=1e-5)
    assert out.standard_error > 0
    assert diversity(found[:1] * 5).value == pytest.approx(1, abs=1e-5)
    assert diversity(found, at_most=3).count == 3
    assert fingerprints(found).sum(1).tolist() == [p.GetNumOnBits() for p in prints]


def test_report(molecules: Molecules) -> None:
    """Everything together; energies are means of those that did not fail."""
    pytest.importorskip("tblite")
    points = SinglePoints()
    off = molecules.positions.clone()
    off[-1, 1] = off[-1, 0]
    batch = Molecules(off, molecules.numbers)
    report = molecule_report(batch, known={_canonical("CCO")}, points=points)
    assert report["xtb_failed"].value == pytest.approx(1 / 7)
    assert report["novel"].value == pytest.approx(1 - 1 / report["vendi"].count)
    assert report["atoms"].value == pytest.approx(float(molecules.mask.sum(1).double().mean()))
    sizes = {int(n) for n in molecules.mask[:-1].sum(1)}
    by_size = energies_by_size(batch, points)
    assert set(by_size) == sizes
    assert sum(e.count for e in by_size.values()) == 6
    total = sum(e.value * e.count for e in by_size.values()) / 6
    mean = report["formation_energy_per_atom"]
    assert mean.value == pytest.approx(total, rel=1e-12)
    assert -0.3 < mean.value < -0.15
    assert {f"formation_energy_per_atom[{n}]" for n in sizes} < set(report)


def test_report_without_valid_molecules(molecules: Molecules) -> None:
    crushed = Molecules(molecules.positions * 0.1, molecules.numbers)
    report = molecule_report(first(crushed, 3), known=())
    assert report["valid"].value == 0
    assert report["valid"].standard_error > 0
    assert not {"unique", "vendi", "novel"} & set(report)


def test_refusals(molecules: Molecules, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShapeError, match="no molecules"):
        molecule_report(first(molecules, 0))
    with pytest.raises(UnsupportedError, match="14"):
        molecule_stability(Molecules(torch.zeros(1, 1, 3), torch.tensor([[14]])))
    monkeypatch.setitem(sys.modules, "posebusters", None)
    with pytest.raises(CapabilityError, match=r"tiltflow\[eval\]"):
        posebusters(perceived(first(molecules, 1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_posebusters(molecules: Molecules) -> None:
    """Good conformers pass, a crushed one and an invalid one fail."""
    pytest.importorskip("posebusters")
    ethanol, crushed = first(molecules, 1), molecules.positions[:1] * 0.8
    found = [*perceived(ethanol), *perceived(Molecules(crushed, ethanol.numbers)), None]
    assert posebusters(found).value == pytest.approx(1 / 3)
