"""The experiments on molecules: smoke runs of the published model, and their tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from published import published

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

pytest.importorskip("rdkit")
pytest.importorskip("tblite")

import molecules
import molecules_energy
import molecules_lab as lab
import molecules_merging
import molecules_validity
from toys import Store


def store(path: Path, results: dict[str, dict[str, list[float]]]) -> Store:
    known = {key: {"result": result, "seconds": 60.0} for key, result in results.items()}
    path.write_text(json.dumps(known), encoding="utf-8")
    return Store(path)


def test_means_over_seeds_have_their_spread_as_error() -> None:
    """Of one seed, its own error; 1 and 3 have the mean 2 and the error sqrt(2) / sqrt(2)."""
    assert lab.pooled([{"valid": [0.5, 0.1]}]) == {"valid": [0.5, 0.1]}
    assert lab.pooled([{"valid": [1.0, 0.1]}, {"valid": [3.0, 0.1]}])["valid"] == (
        pytest.approx([2.0, 1.0])
    )


def test_a_table_tells_everything_together(tmp_path: Path) -> None:
    told = {name: [0.5, 0.25] for name in molecules_validity.TOLD}
    found = store(
        tmp_path / "validity.json",
        {"cpu/pre-trained/0": told, "cpu/expected reward/0": told, "cpu/expected reward/1": told},
    )
    text = molecules_validity.section(found)
    assert "| pre-trained (1 seed) | 0.500 ± 0.250 |" in text
    assert "| expected reward (2 seeds) | 0.500 ± 0.000 |" in text
    assert "left CVaR (" not in text  # not run
    assert molecules_validity.section(Store(tmp_path / "none.json")) == ""


def test_tails_are_compared_at_their_path_kl(tmp_path: Path) -> None:
    """Tails 4, 5, 6, 7 at KL 0, 1, 4, 9: 5.5 at 2.25. 6.5 and 8.5 are 1 and 3 more: 2 +- 1."""
    labels = ("pre-trained", *molecules_energy.EXPECTED)
    told = {"mean": [1.0, 0.1], "valid": [0.5, 0.1]}
    results = {
        f"cpu/{label}/{seed}": told | {"tail": [4.0 + k, 0.1], "path_kl": [float(k**2), 0.1]}
        for k, label in enumerate(labels)
        for seed in (0, 1)
    }
    for seed, tail in enumerate((6.5, 8.5)):
        results[f"cpu/FDC/{seed}"] = told | {"tail": [tail, 0.1], "path_kl": [2.25, 0.1]}
    text = molecules_energy.section(store(tmp_path / "energy.json", results))
    assert "FDC less expected reward at the same path KL: best fifth +2.00 ± 1.00, mean" in text
    assert "TFFT less" not in text


def test_merged_models_are_judged_by_their_targets(tmp_path: Path) -> None:
    """A quarter of the way from 140 to 148 is 142; half of the way from 0.8 to 0.4 is 0.6."""
    low, high = (molecules_merging.free(share) for share in molecules_merging.ENDS)
    values = {
        low: (140.0, 0.8), high: (148.0, 0.8), "model": (99.0, 0.8), "twin": (100.0, 0.4),
        molecules_merging.free(0.25): (142.5, 0.8), molecules_merging.BOTH: (120.0, 0.5),
    }  # fmt: skip
    results = {
        f"cpu/{name}/0": {"mean": [mean, 0.1], "atom_stability": [stable, 0.1]}
        for name, (mean, stable) in values.items()
    }
    text = molecules_merging.section(store(tmp_path / "merging.json", results))
    assert "0.25 copy, `FeynmanKac`: mean energy less its target +0.500." in text
    assert "`Superposition`: share of stable atoms less its target -0.100." in text
    assert "one model: mean energy" not in text  # not run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tail_aware")  # it trains far too little, and says so
@published("edm_qm9_small")
@pytest.mark.parametrize("name", ["pretrained", "validity", "diversity", "merging"])
def test_smoke_runs_write_their_page_and_are_not_done_twice(name: str, tmp_path: Path) -> None:
    arguments = [name, "--seeds", "1", "--quick", "--out", str(tmp_path)]
    molecules.main(arguments)
    page = (tmp_path / "docs" / "molecules-experiments.md").read_text(encoding="utf-8")
    assert f"experiments/molecules.py {name}`" in page
    before = (tmp_path / f"{name}.json").read_bytes()
    molecules.main(arguments)
    assert (tmp_path / f"{name}.json").read_bytes() == before
