"""Molecules as XYZ and SDF: written and read back, and what is wrong with a file or a molecule."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from molecule_data import GOOD, embedded
from published import MODELS, published
from tiltflow.adapters.molecule_files import read_sdf, read_xyz, write_sdf, write_xyz
from tiltflow.bonds import perceived, perceived_where_known, smiles
from tiltflow.errors import ConfigError
from tiltflow.experiment import resolve
from tiltflow.molecules import Molecules
from tiltflow.runfile import parse_toml


def strange() -> Molecules:
    """Hydrogen cyanide; an atom alone; nothing; a NaN; methane's carbon twice in one place;
    hydrogen chloride; two atoms 10^5 Angstrom apart."""
    numbers = torch.tensor(
        [[1, 6, 7], [8, 0, 0], [0, 0, 0], [6, 8, 0], [6, 6, 1], [1, 17, 0], [1, 1, 0]]
    )
    positions = torch.zeros(7, 3, 3)
    positions[0, :, 0] = torch.tensor([-1.06, 0.0, 1.15])
    positions[3, 0, 0] = math.nan
    positions[4, 2, 0] = 1.09
    positions[5, 1, 0] = 1.27
    positions[6, 1, 0] = 1e5
    return Molecules(positions, numbers)


def test_xyz_there_and_back(tmp_path: Path) -> None:
    molecules = embedded(*GOOD)
    told = {"energy in Hartree": torch.arange(7.0), "name": [f"a b{i}" for i in range(7)]}
    written = write_xyz(molecules, tmp_path / "a.xyz", told)
    assert (written.count, written.left_out) == (7, {})
    text = (tmp_path / "a.xyz").read_text()
    assert 'index=2 energy_in_Hartree=2 name="a b2"\n' in text
    read = read_xyz(tmp_path / "a.xyz")
    assert torch.equal(read.numbers, molecules.numbers)
    assert torch.allclose(read.positions.double(), molecules.positions, atol=1e-6)


def test_sdf_there_and_back(tmp_path: Path) -> None:
    """Also by RDKit, which finds the bonds and the properties that were written."""
    chem = pytest.importorskip("rdkit.Chem")
    molecules = embedded(*GOOD)
    rewards = torch.linspace(-1, 1, 7)
    written = write_sdf(molecules, tmp_path / "a.sdf", {"reward": rewards})
    assert (written.count, written.left_out, written.without_bonds) == (7, {}, {})
    read = read_sdf(tmp_path / "a.sdf")
    assert torch.equal(read.numbers, molecules.numbers)
    assert torch.allclose(read.positions.double(), molecules.positions, atol=6e-5)
    records = list(chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False))
    assert [smiles(m) for m in records] == [smiles(m) for m in perceived(molecules)]
    assert [float(m.GetProp("reward")) for m in records] == pytest.approx(rewards.tolist())
    assert [m.GetProp("bonds") for m in records] == ["perceived"] * 7


def test_a_batch_never_dies_for_one_molecule(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    sdf = write_sdf(strange(), tmp_path / "a.sdf", {"reward": range(7)})
    assert sdf.left_out == {
        "no atoms": 1, "positions not finite": 1, "an atom farther than 9999 Angstrom": 1,
    }  # fmt: skip
    assert sdf.without_bonds == {"invalid": 1, "element without known bond lengths": 1}
    assert "4 molecules; 1 left out (no atoms)" in str(sdf)
    assert read_sdf(tmp_path / "a.sdf").numbers.tolist() == [
        [1, 6, 7], [8, 0, 0], [6, 6, 1], [1, 17, 0],
    ]  # fmt: skip
    text = (tmp_path / "a.sdf").read_text()
    assert text.count(">  <bonds>\nperceived\n") == 2
    assert ">  <bonds>\ninvalid\n\n>  <reward>\n4\n" in text
    xyz = write_xyz(strange(), tmp_path / "a.xyz")
    assert (xyz.count, xyz.left_out) == (5, {"no atoms": 1, "positions not finite": 1})
    assert len(read_xyz(tmp_path / "a.xyz")) == 5


def test_records_of_atoms_only_are_read_by_others(tmp_path: Path) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    write_sdf(strange(), tmp_path / "a.sdf")
    records = list(chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False, sanitize=False))
    assert [m.GetNumBonds() for m in records] == [2, 0, 0, 0]
    assert records[3].GetConformer().GetAtomPosition(1).x == pytest.approx(1.27)


def test_without_rdkit_a_file_has_atoms_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert perceived_where_known(strange())[0] == (None, "RDKit is not installed")
    written = write_sdf(strange(), tmp_path / "a.sdf")
    assert written.without_bonds == {"RDKit is not installed": 4}
    assert len(read_sdf(tmp_path / "a.sdf")) == 4


def test_an_empty_batch_is_an_empty_file(tmp_path: Path) -> None:
    none = Molecules(torch.zeros(0, 3, 3), torch.zeros(0, 3, dtype=torch.long))
    assert write_xyz(none, tmp_path / "a.xyz").count == 0
    assert write_sdf(none, tmp_path / "a.sdf").count == 0
    with pytest.raises(ConfigError, match="there are no molecules in it"):
        read_xyz(tmp_path / "a.xyz")


def test_properties_are_one_per_molecule(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"properties\['reward'\] has 2 values for 7 molecules"):
        write_xyz(strange(), tmp_path / "a.xyz", {"reward": [1.0, 2.0]})
    assert not (tmp_path / "a.xyz").exists()


def test_properties_that_files_could_not_hold(tmp_path: Path) -> None:
    """What would end a record is refused before anything is written; quotes are escaped."""
    path, rest = tmp_path / "a.sdf", ["1"] * 6
    with pytest.raises(ConfigError, match=r"properties\['name'\]: .* would end the record"):
        write_sdf(strange(), path, {"name": ["$$$$", *rest]})
    assert not path.exists()
    write_xyz(strange(), tmp_path / "a.xyz", {"a b": ['x"y z', "k=v", *rest[1:]]})
    lines = (tmp_path / "a.xyz").read_text()
    assert 'a_b="x\\"y z"' in lines
    assert 'a_b="k=v"' in lines


WATER = "3\nwater\nO 0 0 0.12\nH 0 0.76 -0.48 extra 7\n1 0 -0.76 -0.48\n"


def test_other_spellings_of_xyz(tmp_path: Path) -> None:
    """Numbers instead of symbols, more columns, small letters, empty lines at the end."""
    (tmp_path / "a.xyz").write_text(WATER + "1\n\nfe 1 2 3\n\n\n")
    read = read_xyz(tmp_path / "a.xyz")
    assert read.numbers.tolist() == [[8, 1, 1], [26, 0, 0]]
    assert read.positions[1].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"a\.xyz: there are no molecules"),
        (WATER.replace("O 0", "Qq 0"), r"a\.xyz, line 3: 'Qq' is no element from H to Xe"),
        (WATER.replace("1 0 -", "92 0 -"), "line 5: '92' is no element"),
        (WATER.replace("0.12", "nan"), r"line 3: the position 0\.0, 0\.0, nan is not finite"),
        (WATER.replace("0.12", "1e400"), "line 3: .* is not finite"),
        (WATER.replace("0.12", ""), "line 3: expected an element and a position, found 'O 0 0 '"),
        (WATER.replace("3\n", "4\n", 1), "line 6: the file ends inside a molecule"),
        (WATER.replace("3\n", "2\n", 1), "line 5: expected the number of atoms, found '1 0"),
        (WATER + "water\n", "line 6: expected the number of atoms, found 'water'"),
        (WATER.replace("3\n", "-3\n", 1), "line 1: -3 atoms"),
    ],
)
def test_wrong_xyz_names_file_and_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_xyz(tmp_path / "a.xyz")


def test_wrong_sdf_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.sdf"
    write_sdf(strange(), file)
    good = file.read_text()
    for old, new, says in (
        ("V2000", "V3000", "line 4: the record is V3000"),
        (" O  ", " Zz ", "'Zz' is no element"),
        ("    0.0000    0.0000    0.0000 O", "       nan    0.0000    0.0000 O", "is not finite"),
        ("  3  2", "  x  2", "line 4: expected the number of atoms in its first 3 columns"),
    ):
        assert old in good
        file.write_text(good.replace(old, new, 1))
        with pytest.raises(ConfigError, match=says):
            read_sdf(file)
    file.write_text(good[:150])
    with pytest.raises(ConfigError, match=r"a\.sdf, line \d+: (the file ends|expected)"):
        read_sdf(file)
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_sdf(tmp_path / "missing.sdf")


# The page about molecules

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "molecules.md").read_text("utf-8")


def test_the_page_about_files_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "read_xyz" in b]
    scope: dict[str, Any] = {"molecules": embedded(*GOOD)}
    exec(compile(block, "molecules.md", "exec"), scope)
    assert len(scope["pictures"]) == len(scope["drawings"]) == 7
    assert {p.name for p in tmp_path.iterdir()} == {"mine.sdf", "mine.xyz"}


def test_the_run_file_of_the_page_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    tree = resolve(parse_toml(text))
    assert tree.plain["evaluate"]["energies"] == "GFN2-xTB"


@published("edm_qm9_small")
@pytest.mark.slow
def test_the_quick_start_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rdkit")
    block = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    for old, new in (
        ("models/edm_qm9_small", str(MODELS / "edm_qm9_small")),
        ("updates=40", "updates=2"), ("evaluate=16", "evaluate=4"), ("=16, up", "=4, up"),
        ("draw(64", "draw(8"), ("tuned, 64", "tuned, 8"), ("), 100)", "), 40)"),
    ):  # fmt: skip
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, "molecules.md", "exec"), {})
    assert "atom_stability" in capsys.readouterr().out
