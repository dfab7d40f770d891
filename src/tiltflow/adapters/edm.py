"""EDM: noise-predicting diffusion models of molecules, with their numbers of atoms given.

Hoogeboom et al., Equivariant Diffusion for Molecule Generation in 3D (arXiv 2203.17003). States
are positions and features of atoms (``molecules.Layout``), all under one noise; positions have
zero mean. A model knows T + 1 noise levels i = 0..T, with alpha_i^2 = sigmoid(-gamma_i), and sees
i / T. Level i is at this library's time t = (T - i) / (T + 1), and t = 1 is clean data: the step
onto it returns the predicted molecule, which is how EDM reads one at level 0.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.adapters.atom_counts import AtomCounts
from tiltflow.adapters.checkpoint import compare, load_published
from tiltflow.adapters.egnn import EGNN
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.flow import FlowModel, Prediction, freeze
from tiltflow.molecules import Layout
from tiltflow.schedule import Tabulated
from tiltflow.space import ZeroMean
from tiltflow.types import Cond

PUBLISHED = {
    341: "014fd66ad3a71c811b0171965a1c6c8cff0435ba02705afc88f9fb97d551aac3",
    21: "081b7cf4f93d5d095cb04f129f20a6e0783d85688f606fef1c1eaeef39914bc3",
}
"""SHA-256 of the weights after so many epochs: github.com/james-b-yu/e3_diffusion_for_molecules,
a small EDM of QM9 under the MIT licence, as safetensors."""

QM9_SIZES = {
    3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060, 14: 5136,
    15: 7796, 16: 10644, 17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970, 22: 3393, 23: 4848,
    24: 539, 25: 1506, 26: 48, 27: 266, 29: 25,
}  # fmt: skip
"""Number of atoms -> molecules of QM9 with so many, in EDM's training split."""


@final
class EDMNet(EGNN):
    """Noise of a molecule: an ``EGNN`` that sees i / T, 1 for noise alone.

    Args:
        features, hidden, blocks, coords_range, norm_constant: of ``EGNN``.
        steps: T.
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        blocks: int = 5,
        steps: int = 200,
        *,
        coords_range: float = 15.0,
        norm_constant: float = 1.0,
    ) -> None:
        super().__init__(
            features, hidden, blocks, coords_range=coords_range, norm_constant=norm_constant
        )
        self.register_buffer("gamma", torch.zeros(steps + 1))
        self.gamma: Tensor

    def level(self, t: Tensor) -> Tensor:
        """i / T at times t in [0, 1]; 0 from the least noise to clean data."""
        steps = len(self.gamma) - 1
        return (1 - t * (steps + 1) / steps).clamp(min=0)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, N, 3 + features), (B,) and cond["mask"] (B, N) -> like x; all are atoms without."""
        mask = torch.ones(x.shape[:2]) if cond is None else torch.as_tensor(cond["mask"])
        return self.at(x, self.level(t), mask.to(x))


@final
@dataclass(frozen=True)
class EDM:
    """A model of molecules, and what its states and sizes are.

    Attributes:
        model: predicts noise; takes cond["mask"].
        layout: how states are molecules.
        sizes: law of the numbers of atoms in its training, to be passed as ``conditions``.
    """

    model: FlowModel
    layout: Layout
    sizes: AtomCounts

    def with_atoms(self, atoms: int) -> FlowModel:
        """The model of molecules with so many atoms, which takes no conditions.

        It shares its weights with ``model``; ``clone`` makes a copy to train.
        """
        if atoms < 2:
            raise ConfigError(f"EDM.with_atoms: {atoms} atoms have no distances; 2 are needed.")
        space = ZeroMean((atoms, self.layout.width), over=(0,), columns=3)
        return FlowModel(self.model.net, self.model.schedule, space, predicts=Prediction.NOISE)


def load_edm(folder: str | Path, *, epoch: int = 341, weights: str | Path | None = None) -> EDM:
    """The small EDM of QM9 (746,892 parameters), frozen.

    Of 512 molecules by 200 ancestral steps, 83 % of the atoms and 4 % of the molecules were
    stable after 341 epochs; after 21 epochs 42 % of the atoms.

    Args:
        folder: holds ``config.json`` and ``model_epoch341.safetensors``, ``model_epoch21...``.
        epoch: which weights, 341 or 21.
        weights: a file that ``adapters.checkpoint.save_tensors`` wrote, e.g. after training,
            instead of those in the folder.

    Raises:
        CheckpointError: if a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    card = folder / "config.json"
    net, layout, sizes = _of_card(card)
    if weights is None and epoch not in PUBLISHED:
        raise CheckpointError(
            f"{folder}: there is no epoch {epoch} of this model; epochs: "
            f"{', '.join(map(str, PUBLISHED))}."
        )
    path = folder / f"model_epoch{epoch}.safetensors" if weights is None else Path(weights)
    digests = {digest: f"model_epoch{name}" for name, digest in PUBLISHED.items()}
    net.load_state_dict(load_published(path, net.state_dict(), digests))
    return _assembled(net, layout, sizes, path)


def load_edm_checkpoint(
    path: str | Path,
    *,
    layout: Layout | None = None,
    sizes: Mapping[int, float] = QM9_SIZES,
    coords_range: float = 15.0,
    norm_constant: float = 1.0,
) -> EDM:
    """A checkpoint of EDM's own code, e.g. ``generative_model_ema.npy``, frozen.

    Width, blocks and steps are read from the shapes, ``args.pickle`` is not needed and not read:
    unpickling it would run what is in it. What no shape tells is an argument, or assumed:
    positions in Angstrom, tanh, and plain sums of messages (``normalize_factors`` [1, ...],
    ``tanh``, ``normalization_factor`` 1). Models that were trained with a property as a condition
    are not supported; the property is one input more, for which a wrong layout has room.

    Args:
        path: a state dict written by ``torch.save``.
        layout: elements in the order of the model's decoder, and EDM's ``normalize_factors``
            [1, c, q] as ``one_hot=1 / c`` and ``charge=1 / q`` (``charge=None`` without
            ``include_charges``); the default is QM9's, H, C, N, O, F with [1, 4, 10].
        sizes: number of atoms -> how many molecules of the training data have so many.
        coords_range: of ``EGNN``, 15 in EDM's code.
        norm_constant: of ``EGNN``, 1 in EDM's code.

    Raises:
        CheckpointError: if the file is missing, damaged, holds more than tensors, or is of another
            model.
    """
    path, layout = Path(path), layout or Layout()
    tensors = _of_state_dict(path, _unpickled(path))
    entry, gamma = tensors.get("embedding.weight"), tensors.get("gamma")
    if entry is None or gamma is None or entry.ndim != 2 or gamma.ndim != 1 or len(gamma) < 2:
        raise CheckpointError(
            f"{path} has no 'dynamics.egnn.embedding.weight' and 'gamma.gamma' of an EDM with "
            "a predefined noise schedule; it belongs to another model."
        )
    if entry.shape[1] != layout.width - 3 + 1:
        raise CheckpointError(
            f"{path}: the network has {entry.shape[1]} inputs per atom, but the layout has "
            f"{layout.width - 3} features and there is the time; give the layout of the model."
        )
    blocks = {name.split(".")[0] for name in tensors if name.startswith("e_block_")}
    net = EDMNet(
        layout.width - 3, entry.shape[0], max(1, len(blocks)), len(gamma) - 1,
        coords_range=coords_range, norm_constant=norm_constant,
    )  # fmt: skip
    compare(path, tensors, net.state_dict())
    net.load_state_dict(tensors)
    return _assembled(net, layout, AtomCounts(sizes), path)


def _assembled(net: EDMNet, layout: Layout, sizes: AtomCounts, path: Path) -> EDM:
    space = ZeroMean((max(sizes.law), layout.width), over=(0,), columns=3, key=layout.key)
    try:
        schedule = Tabulated((1.0, *torch.sigmoid(-net.gamma.double()).tolist()))
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: 'gamma' does not increase from data to noise ({error}) The file is damaged "
            "or of another model."
        ) from error
    model = FlowModel(net, schedule, space, predicts=Prediction.NOISE, takes_cond=True)
    return EDM(freeze(model), layout, sizes)


_ASSUMED: dict[str, dict[str, Any]] = {
    "network": {"type": "EGNN", "attention": True, "tanh": True, "edge_features": 2,
                "normalization_factor": 1, "aggregation": "sum", "activation": "silu"},
    "diffusion": {"prediction": "eps"},
}  # fmt: skip
"""What ``EDMNet`` is, and a card must say."""


def _of_card(path: Path) -> tuple[EDMNet, Layout, AtomCounts]:
    """An empty network, the layout and the sizes that a config.json describes."""
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        net = card["network"]
        wrong = [
            f"{part}.{key} = {card[part][key]!r}"
            for part, entries in _ASSUMED.items()
            for key, value in entries.items()
            if card[part][key] != value
        ]
        made = EDMNet(
            net["in_features"] - 1, net["hidden"], net["n_layers"], card["diffusion"]["steps"],
            coords_range=net["coords_range"], norm_constant=net["norm_constant"],
        )  # fmt: skip
        sizes = AtomCounts({int(n): w for n, w in card["n_atoms_histogram"].items()})
        layout = Layout(tuple(card["atomic_numbers"]))
        names, columns = card["atom_types"], card["state"]["layout"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path}, the description of the model, is missing or damaged ({error}). Give the "
            "folder that holds config.json and the weights."
        ) from error
    expected = ["x", "y", "z", *(f"onehot_{name}" for name in layout.symbols), "charge"]
    if names != list(layout.symbols) or columns != expected:
        wrong.append(f"state.layout = {columns!r} with atom_types = {names!r}")
    if wrong:
        raise CheckpointError(
            f"{path} describes a model that this adapter does not know: {'; '.join(wrong)}."
        )
    return made, layout, sizes


def _unpickled(path: Path) -> Mapping[str, Any]:
    """A state dict; nothing in the file is run."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path of the checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable file of tensors ({str(error).splitlines()[0]}); it is "
            "damaged, or holds more than a state dict. Restore it from a copy, or save only "
            "model.state_dict()."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds something other than a state dict of tensors.")
    return state


def _of_state_dict(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of EDM's modules under the names of ``EDMNet``; others keep theirs."""
    tensors = {}
    for name, tensor in state.items():
        own = name.removeprefix("module.").removeprefix("dynamics.egnn.")
        if own != "buffer":
            tensors["gamma" if own == "gamma.gamma" else own] = tensor.float()
    return tensors
