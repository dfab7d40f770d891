"""A model of molecules with random weights, in a folder as the published one is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tiltflow.adapters.checkpoint import save_tensors
from tiltflow.adapters.edm import EDMNet
from tiltflow.seed import Seed

STEPS = 10
SIZES = {3: 2, 5: 1, 6: 1}


def tiny_edm(folder: Path, seed: int = 3) -> tuple[Path, Path]:
    """The folder, with its config.json, and a file of weights in it."""
    network = {
        "type": "EGNN", "attention": True, "tanh": True, "edge_features": 2,
        "normalization_factor": 1, "aggregation": "sum", "activation": "silu",
        "in_features": 7, "hidden": 8, "n_layers": 1, "coords_range": 1.0, "norm_constant": 1.0,
    }  # fmt: skip
    names = ["H", "C", "N", "O", "F"]
    card = {
        "network": network, "diffusion": {"prediction": "eps", "steps": STEPS},
        "n_atoms_histogram": {str(n): w for n, w in SIZES.items()},
        "atomic_numbers": [1, 6, 7, 8, 9], "atom_types": names,
        "state": {"layout": ["x", "y", "z", *(f"onehot_{n}" for n in names), "charge"]},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(card))
    net = EDMNet(6, hidden=8, blocks=1, steps=STEPS, coords_range=1.0)
    generator = Seed(seed).generator()
    for parameter in net.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    # Little noise: more is nothing that random weights could undo, and atoms would be hundreds of
    # Angstrom apart.
    alpha2 = torch.linspace(0.999, 0.6, STEPS + 1, dtype=torch.float64)
    net.gamma = ((1 - alpha2) / alpha2).log().float()
    weights = folder / f"weights_{seed}.safetensors"
    save_tensors(weights, net.state_dict())
    return folder, weights


def recipe(folder: Path, seed: int = 3, more: str = "") -> str:
    """Of a run file."""
    path, weights = tiny_edm(folder, seed)
    return f'{{ kind = "EDM", path = "{path}", weights = "{weights}"{more} }}'
