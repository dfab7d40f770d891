"""Molecules for tests: small ones by RDKit's force field, and published samples where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from published import MODELS
from tiltflow.molecules import Layout, Molecules

DATA = Path(os.environ.get("TILTFLOW_DATA", MODELS.parent / "data"))
"""One folder per data set: the folder that TILTFLOW_DATA names, or ``data`` beside the models."""

GSCHNET = DATA / "gschnet_qm9_samples" / "gschnet_qm9_samples.safetensors"
EDM = MODELS / "edm_qm9_small" / "samples_epoch341_ancestral200.safetensors"
EDM_CONFIG = MODELS / "edm_qm9_small" / "config.json"

GOOD = ("CCO", "C=O", "C#N", "CF", "CC(C)=O", "NCC#C", "O")
"""SMILES of molecules that EDM's rule finds stable."""


def needs(*paths: Path) -> pytest.MarkDecorator:
    """Skip a test where one of these files is missing."""
    missing = [str(p) for p in paths if not p.is_file()]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"no {', '.join(missing)}; set TILTFLOW_DATA and TILTFLOW_MODELS to the folders",
    )


def padded(numbers: list[Tensor], positions: list[Tensor]) -> Molecules:
    pad = torch.nn.utils.rnn.pad_sequence
    return Molecules(pad(positions, batch_first=True), pad(numbers, batch_first=True))


def gschnet() -> Molecules:
    """9,815 molecules in the style of QM9, finished samples of G-SchNet."""
    t = load_file(GSCHNET)
    sizes = t["n_atoms"].tolist()
    numbers = t["atomic_numbers"].long().split(sizes)
    return padded(list(numbers), list(t["positions"].split(sizes)))


def edm_samples() -> Molecules:
    """192 samples of a small EDM, of which a few are molecules."""
    t = load_file(EDM)
    sizes = t["n_atoms"].tolist()
    numbers = torch.tensor([1, 6, 7, 8, 9])[t["types"].long()].split(sizes)
    return padded(list(numbers), list(t["positions"].split(sizes)))


def embedded(*smiles: str) -> Molecules:
    """Conformers by RDKit with the MMFF force field, with all hydrogens."""
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    numbers, positions = [], []
    for text in smiles:
        molecule = chem.AddHs(chem.MolFromSmiles(text))
        assert AllChem.EmbedMolecule(molecule, randomSeed=7) == 0
        AllChem.MMFFOptimizeMolecule(molecule)
        numbers.append(torch.tensor([a.GetAtomicNum() for a in molecule.GetAtoms()]))
        places = torch.tensor(molecule.GetConformer().GetPositions(), dtype=torch.float64)
        positions.append(places)
    return padded(numbers, positions)


def states(molecules: Molecules) -> tuple[Tensor, dict[str, Tensor]]:
    x, cond = Layout().encode(molecules)
    return x.double(), {k: v for k, v in cond.items() if isinstance(v, Tensor)}
