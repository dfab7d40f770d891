"""Runs of models of molecules: conditions from the run file, metrics, galleries, exports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from published import MODELS, published
from test_report import Outline
from tiltflow import plots
from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.adapters.edm import load_edm
from tiltflow.adapters.molecule_files import read_sdf, read_xyz
from tiltflow.cli import FAILED, FINE, USAGE, main
from tiltflow.diagnosis import Facts, diagnose
from tiltflow.errors import ConfigError
from tiltflow.evaluation import regression
from tiltflow.experiment import load_models
from tiltflow.kernel import Ancestral
from tiltflow.models import EDM, Model, Pretrained
from tiltflow.molecules import Layout
from tiltflow.rewards import Valency
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Estimate
from tiny_edm import SIZES, recipe, tiny_edm

TUNE = """
name = "molecules"
[models]
pretrained = {model}
[objective]
utility = {{ kind = "{utility}", reward = {{ kind = "Valency" }}{more} }}
divergences = [{{ kind = "KL", prior = "pretrained", weight = 1.0 }}]
[algorithm]
num_samples = 24
{algorithm}
[solver]
kind = "AdjointMatching"
sampler = {{ kernel = "Ancestral", num_steps = 5 }}
training = {{ num_updates = 4, learning_rate = 1e-2 }}
num_trajectories = 8
updates_per_rollout = 2
num_evaluate = 8
[evaluate]
num_samples = 40
sampler = {{ kernel = "Ancestral", num_steps = 6 }}
{evaluate}
[expect]
"molecules.atoms" = {{ value = 4.25, within = 1.5, from = "the law of the sizes" }}
"""

MERGE = """
name = "merged molecules"
circuit = "(a | b)"
[models]
a = {a}
b = {b}
[merging]
sampler = {{ kernel = "Ancestral", num_steps = 5 }}
solver = {{ sampler = {{ kernel = "Ancestral", num_steps = 5 }} }}
training = {{ num_updates = 3, learning_rate = 1e-4 }}
bank_size = 32
batch_size = 8
[evaluate]
num_samples = 24
sampler = {{ kernel = "Ancestral", num_steps = 6 }}
reward = {{ kind = "Valency" }}
"""


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)


def tune(
    tmp_path: Path, atoms: str = "", utility: str = "ExpectedReward", more: str = "",
    algorithm: str = "", evaluate: str = "",
) -> Path:  # fmt: skip
    file = tmp_path / "tune.toml"
    model = recipe(tmp_path / "model", more=atoms)
    text = TUNE.format(
        model=model, utility=utility, more=more, algorithm=algorithm, evaluate=evaluate
    )
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with numbers of atoms as conditions, of two steps and a baseline."""
    folder = tmp_path_factory.mktemp("run")
    file = tune(folder, utility="LeftCVaR", more=", level = 0.3", algorithm=TWO)
    file.write_text(file.read_text() + BASELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "available", lambda: False)
        assert main(["run", str(file), "--out", str(folder / "out")]) == FINE
    return folder / "out"


TWO = "num_iterations = 2\nrates = [0.5, 0.5]"
BASELINE = """
[baseline]
utility = { kind = "ExpectedReward", reward = { kind = "Valency" } }
match = "rate"
rate = 0.5
"""


def report(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return data


def test_conditions_reach_every_part_of_a_run(done: Path) -> None:
    """All models are measured on the same sizes, which have the law of the training."""
    masks = [load_tensors(done / "samples" / f"{m}.safetensors")["cond.mask"]
             for m in ("pretrained", "tuned", "baseline")]  # fmt: skip
    assert all(bool((mask == masks[0]).all()) for mask in masks)
    model = done.parent / "model"
    edm = load_edm(model, weights=model / "weights_3.safetensors")
    seed = Seed(0).child("evaluation").child("batch", 0)
    cond = edm.sizes.draw(40, seed.child("cond"))
    path = Sampler(Ancestral(), 6).simulate(edm.model, 40, seed=seed, cond=cond)
    saved = load_tensors(done / "samples" / "pretrained.safetensors")
    assert torch.equal(saved["points"], path.end)
    assert torch.equal(saved["rewards"], Valency().value(path.end, cond))
    sizes = masks[0].sum(1).long().tolist()
    assert {*sizes} == {*SIZES}
    numbers = report(done)["numbers"]
    assert numbers["tuned"]["molecules.atoms"]["value"] == pytest.approx(sum(sizes) / len(sizes))
    assert numbers["tuned"]["path_kl"]["value"] > 0
    for absent in ("entropy_change", "tilt.ess"):
        assert absent not in numbers["tuned"]


def test_metrics_are_told_together_with_errors(done: Path) -> None:
    data = report(done)
    assert data["molecule_note"] is None
    for model in ("pretrained", "tuned", "baseline"):
        found = {k: v for k, v in data["numbers"][model].items() if k.startswith("molecules.")}
        together = ("atom_stability", "molecule_stability", "valid", "valid_connected")
        assert {f"molecules.{k}" for k in together} <= {*found}
        assert all(v["standard_error"] >= 0 for v in found.values())
    text = (done / "report.html").read_text()
    for row in ("stable atoms", "stable molecules", "valid and in one piece", "mean number"):
        assert row in text


def test_the_page_has_a_gallery_and_stays_whole(done: Path) -> None:
    text = (done / "report.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert not re.search("https?:", text)
    assert text.count('<figure class="molecule') == 3 * 8 + 3 * 12
    ids = re.findall(r'radialGradient id="([^"]+)"', text)
    used = re.findall(r'fill="url\(#([^)]+)\)', text)
    assert {*used} == {*ids}
    assert main(["report", str(done)]) == FINE
    assert (done / "report.html").read_text() == text


def test_a_run_continues_to_the_same_bits(done: Path, tmp_path: Path) -> None:
    """As if it had been killed after the first of the two iterations; and measured again."""
    again = tmp_path / "again"
    shutil.copytree(done, again)
    (again / "report.json").unlink()
    for name in ("iteration_0001", "baseline"):
        shutil.rmtree(again / "checkpoints" / name)
    assert main(["run", str(done / "config.toml"), "--out", str(again)]) == FINE
    assert report(again)["numbers"] == report(done)["numbers"]


def test_sample_writes_molecules(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(done), "-n", "7"]) == FINE
    shown = capsys.readouterr().out
    stem = done / "samples" / "tuned_7_0"
    bank = load_tensors(stem.with_suffix(".safetensors"))
    expected = Layout().decode(bank["points"], {"mask": bank["cond.mask"]})
    assert bank["rewards"].shape == (7,)
    read = read_xyz(stem.with_suffix(".xyz"))
    assert torch.equal(read.numbers, expected.numbers[:, : read.numbers.shape[1]])
    assert torch.allclose(read.positions[read.mask], expected.positions[expected.mask], atol=1e-6)
    assert torch.equal(read_sdf(stem.with_suffix(".sdf")).numbers, read.numbers)
    page = stem.with_suffix(".html").read_text()
    assert page.count("<figure") == 7
    assert f"reward {float(bank['rewards'][0]):.4g}" in page
    assert ".xyz: 7 molecules" in shown


def test_one_number_of_atoms_needs_no_conditions(tmp_path: Path) -> None:
    file = tune(tmp_path, atoms=", atoms = 4", evaluate="keep = 10")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == FINE
    saved = load_tensors(tmp_path / "out" / "samples" / "tuned.safetensors")
    assert saved["points"].shape == (10, 4, 9)
    assert "cond.mask" not in saved
    assert report(tmp_path / "out")["numbers"]["tuned"]["molecules.atoms"]["value"] == 4
    assert "<figure" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("atoms", ["", ", atoms = 4"])
def test_guidance_is_trained_instead_of_the_weights(tmp_path: Path, atoms: str) -> None:
    """With numbers of atoms as conditions and without; what is saved is a gain, not a network."""
    more = atoms + ', guidance = { kind = "ValidityGap" }, since = 0.5'
    file = tune(tmp_path, atoms=more)
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == FINE
    (saved,) = (tmp_path / "out" / "checkpoints" / "iteration_0000").glob("*.safetensors")
    weights = load_tensors(saved)
    assert {name.split(".")[0] for name in weights} == {"gain"}
    assert report(tmp_path / "out")["numbers"]["tuned"]["path_kl"]["value"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("algorithm.way=plan", 'algorithm.way = "plan" needs one normaliser'),
        ("solver.tolerance=0.1", "solver.tolerance above 0"),
        ('baseline={ utility = { kind = "ExpectedReward", reward = "Valency" } }', "path_kl"),
        ('algorithm={ kind = "tail_aware", max_rounds = 2 }', "max_rounds above 1"),
    ],
)
def test_what_needs_one_normaliser_is_refused_before_work(
    change: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tune(tmp_path, utility="LeftCVaR", more=", level = 0.3")
    if change.startswith("algorithm={"):
        file.write_text(file.read_text().replace("[algorithm]\nnum_samples = 24\n", ""))
    out = tmp_path / "out"
    assert main(["run", str(file), "--out", str(out), "--set", change]) == FAILED
    shown = capsys.readouterr().err
    assert says in shown
    assert "atoms = 18" in shown
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tail_aware")
def test_a_tail_aware_run_of_one_round(tmp_path: Path) -> None:
    file = tune(tmp_path, utility="LeftCVaR", more=", level = 0.5")
    text = file.read_text().replace("[algorithm]\nnum_samples = 24\n", "")
    file.write_text(text)
    tail = 'algorithm={ kind = "tail_aware", bank_size = 256, num_samples = 32, anyway = true }'
    out = tmp_path / "out"
    assert main(["run", str(file), "--out", str(out), "--set", tail]) == FINE
    assert "tail_aware.utility" in report(out)["numbers"]["tuned"]


@pytest.mark.slow
def test_tuning_from_a_run_file_raises_the_reward(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["solver.training.num_updates=60", "solver.num_trajectories=32",
            "objective.divergences.0.weight=0.05", "evaluate.num_samples=256"]  # fmt: skip
    sets = [part for each in more for part in ("--set", each)]
    assert main(["run", str(tune(tmp_path)), "--out", str(out), *sets]) == FINE
    numbers = report(out)["numbers"]["tuned"]
    for key in ("gain.mean", "tilt.slope"):
        assert numbers[key]["value"] > 3 * numbers[key]["standard_error"]


@pytest.mark.slow
def test_energies_of_random_molecules_fail_and_are_counted(tmp_path: Path) -> None:
    """A model with random weights makes no molecules; a run is not given up for that."""
    pytest.importorskip("tblite")
    file = tune(tmp_path, evaluate='energies = "GFN2-xTB"')
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == FINE
    data = report(tmp_path / "out")
    failed = data["numbers"]["pretrained"]["molecules.xtb_failed"]["value"]
    assert failed > 0.3
    both = sum(data["numbers"][m]["molecules.xtb_failed"]["value"] for m in data["numbers"])
    assert sum(data["xtb_failures"].values()) == pytest.approx(40 * both)
    assert "xTB failed, in all: " in (tmp_path / "out" / "report.html").read_text()


def test_energies_are_for_molecules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in vain: refused before work. Not asked for: xTB is not needed."""
    file = tune(tmp_path, evaluate='energies = "GFN2-xTB"')
    model = '{ kind = "Gaussian", mean = [0.0] }'
    set_ = ["--set", f"models.pretrained={model}"]
    set_ += ["--set", 'objective.utility.reward={ kind = "Linear", slope = 1.0 }']
    assert main(["run", str(file), "--out", str(tmp_path / "out"), *set_]) == USAGE
    assert "does not make molecules" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == FAILED
    assert "tiltflow[molecules]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_rdkit_there_are_pictures_and_a_note(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    out = tmp_path / "bank.safetensors"
    assert main(["sample", str(done), "-n", "3", "--out", str(out)]) == FINE
    page = out.with_suffix(".html").read_text()
    assert page.count("radialGradient id") > 0
    assert "No metrics: RDKit is needed" in page
    assert "Without it there are no drawings" in page
    assert "RDKit is not installed" in out.with_suffix(".sdf").read_text()


@pytest.mark.parametrize("suffix", [".xyz", ".sdf", ".html"])
def test_a_file_of_molecules_does_not_replace_the_samples(
    done: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"bank{suffix}"
    assert main(["sample", str(done), "-n", "3", "--out", str(out)]) == FINE
    assert len(load_tensors(tmp_path / "bank.safetensors")["points"]) == 3
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".xyz", ".sdf", ".html"}


def test_inspect_knows_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tune(tmp_path))]) == FINE
    assert "time        about" in capsys.readouterr().out


# Merging


def merge_file(tmp_path: Path, a: str = "", b: str = "") -> Path:
    folder = tmp_path / "model"
    file = tmp_path / "merge.toml"
    file.write_text(MERGE.format(a=recipe(folder, 3, a), b=recipe(folder, 4, b)))
    return file


def test_conditional_models_are_merged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["run", str(merge_file(tmp_path)), "--out", str(out)]) == FINE
    data = report(out)
    assert all("molecules.valid" in numbers for numbers in data["numbers"].values())
    assert all("mean.0" not in numbers for numbers in data["numbers"].values())
    assert "cond.mask" in load_tensors(out / "samples" / "gate_0000.safetensors")
    assert (out / "report.html").read_text().count("<figure") == 3 * 6
    assert main(["sample", str(out), "-n", "3"]) == FINE
    assert (out / "samples" / "merged_3_0.xyz").exists()
    assert main(["inspect", str(out / "config.toml")]) == FINE


def test_models_of_different_conditions_are_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = merge_file(tmp_path, b=", atoms = 4")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == USAGE
    assert "models.b: takes no conditions, but another model does" in capsys.readouterr().err
    card = json.loads((tmp_path / "model" / "config.json").read_text())
    other = tmp_path / "other"
    _, weights = tiny_edm(other, 4)
    card["n_atoms_histogram"] = {"6": 1}
    (other / "config.json").write_text(json.dumps(card))
    model = f'models.b={{ kind = "EDM", path = "{other}", weights = "{weights}" }}'
    assert main(["run", str(file), "--out", str(tmp_path / "out"), "--set", model]) == USAGE
    assert "models.b: its conditions have another law" in capsys.readouterr().err


def test_models_that_write_elements_differently_are_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = merge_file(tmp_path), tmp_path / "other"
    _, weights = tiny_edm(other, 4)
    card = json.loads((other / "config.json").read_text())
    card["atomic_numbers"] = [6, 1, 7, 8, 9]
    card["atom_types"] = ["C", "H", "N", "O", "F"]
    card["state"]["layout"][3:5] = ["onehot_C", "onehot_H"]
    (other / "config.json").write_text(json.dumps(card))
    model = f'models.b={{ kind = "EDM", path = "{other}", weights = "{weights}" }}'
    assert main(["run", str(file), "--out", str(tmp_path / "out"), "--set", model]) == USAGE
    assert "models.b: its atoms are written as" in capsys.readouterr().err


# Parts


def test_a_recipe_says_what_conditions_are(tmp_path: Path) -> None:
    folder, weights = tiny_edm(tmp_path)
    loaded = EDM(folder, weights=weights).load()
    edm = load_edm(folder, weights=weights)
    assert (loaded.conditions, loaded.layout) == (edm.sizes, edm.layout)

    class Forgetful(Model):
        def load(self) -> Pretrained:
            return Pretrained(edm.model)

    with pytest.raises(ConfigError, match=r"models.a: it takes conditions, but Forgetful"):
        load_models({"a": Forgetful()}, None)


def test_slopes_are_those_within_conditions() -> None:
    """y = 2 x + c: with a constant for each condition the slope is 2, with one constant not."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(90) % 3
    x = torch.randn(90, generator=generator) + 3 * group
    y = 2 * x - 40.0 * group
    cond = {"mask": torch.eye(3)[group]}
    found = regression("t", y, x, cond)
    assert found["t.slope"].value == pytest.approx(2)
    assert found["t.r2"].value == pytest.approx(1)
    assert regression("t", y, x)["t.slope"].value < 0
    alone = {"text": [str(i) for i in range(90)]}
    assert regression("t", y, x, alone) == {}


def test_worse_molecules_are_a_warning() -> None:
    """A reward that rose while validity fell; not where it fell by chance."""

    def found(valid: float, gain: float = 1.0) -> list[str]:
        common = {"path_kl": Estimate(1.0), "reward.std": Estimate(1.0)}
        before = common | {"molecules.valid": Estimate(0.8, 0.02, 400)}
        after = common | {"molecules.valid": Estimate(valid, 0.02, 400)}
        before["reward.mean"], after["reward.mean"] = Estimate(0.0), Estimate(gain)
        return [f.title for f in diagnose(Facts(before=before, after=after))]

    title = "The reward rose and the molecules got worse"
    assert title in found(0.6)
    assert title not in found(0.75)
    assert title not in found(0.6, gain=-1.0)


@published("edm_qm9_small")
@pytest.mark.slow
def test_the_published_model(tmp_path: Path) -> None:
    """One update of the real model, from file to report with energies."""
    pytest.importorskip("tblite")
    file = tune(tmp_path, evaluate='energies = "GFN2-xTB"')
    model = f'pretrained = {{ kind = "EDM", path = "{MODELS / "edm_qm9_small"}" }}'
    text = re.sub(r"pretrained = .*", model, file.read_text()).split("[expect]")[0]
    text = text.replace("num_updates = 4", "num_updates = 1").replace("= 40", "= 16")
    text = text.replace("num_samples = 24", "num_samples = 4")
    text = text.replace("num_steps = 5", "num_steps = 30").replace("steps = 6", "steps = 40")
    file.write_text(text)
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == FINE
    numbers = report(tmp_path / "out")["numbers"]["pretrained"]
    assert 0.6 < numbers["molecules.atom_stability"]["value"] < 0.95
    energy = numbers["molecules.formation_energy_per_atom"]["value"]
    assert -0.28 < energy < -0.1, "Hartree per atom"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "formation energy, Hartree per atom" in page
    assert "<summary>Formation energies by number of atoms" in page
