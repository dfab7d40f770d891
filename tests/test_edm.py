"""Molecule models in EDM's format: the original network, its symmetries, its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from published import MODELS, published
from tiltflow.adapters.atom_counts import AtomCounts, FixedAtoms
from tiltflow.adapters.checkpoint import save_tensors
from tiltflow.adapters.edm import (
    EDM,
    QM9_SIZES,
    EDMNet,
    load_edm,
    load_edm_checkpoint,
)
from tiltflow.adapters.egnn import EGNN, of_pairs
from tiltflow.bonds import stable_atoms
from tiltflow.config import interpret
from tiltflow.context import Context
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral, Deterministic
from tiltflow.models import Model
from tiltflow.molecules import Layout
from tiltflow.problem import ControlProblem
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.space import ZeroMean
from tiltflow.training import Training
from tiltflow.types import Cond, joined_cond

FOLDER = MODELS / "edm_qm9_small"
STEPS = 10


def gamma(steps: int = STEPS) -> Tensor:
    """EDM's schedule polynomial_2 without its clipping: alpha^2 = (1 - 2e-5) p + 1e-5."""
    p = (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2) ** 2
    alpha2 = (1 - 2e-5) * p + 1e-5
    return ((1 - alpha2) / alpha2).log().float()


def tiny(features: int = 6, dtype: torch.dtype = torch.float32) -> EDMNet:
    """Random weights, large enough that positions and features matter to each other."""
    net = EDMNet(features, hidden=12, blocks=2, steps=STEPS)
    generator = Seed(3).generator()
    for parameter in net.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    net.gamma = gamma()
    return net.to(dtype).requires_grad_(False)


def clouds(*sizes: int, rows: int = 7, width: int = 9) -> tuple[Tensor, Tensor, Cond]:
    """States, times and masks in float64, of given numbers of atoms."""
    mask = (torch.arange(rows) < torch.tensor(sizes)[:, None]).double()
    generator = Seed(5).generator()
    x = torch.randn(len(sizes), rows, width, generator=generator, dtype=torch.float64)
    space = ZeroMean((rows, width), columns=3, key="mask")
    return (
        space.project(x, {"mask": mask}),
        torch.linspace(0.1, 0.9, len(sizes)).double(),
        {"mask": mask},
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Random weights, as EDM's code saves them."""
    net = tiny()
    state = {f"dynamics.egnn.{k}": v for k, v in net.state_dict().items() if k != "gamma"}
    torch.save(state | {"gamma.gamma": net.gamma, "buffer": torch.zeros(1)}, tmp_path / "ema.npy")
    return tmp_path / "ema.npy"


# --- the network --------------------------------------------------------------------------------


def test_the_split_map_is_the_map() -> None:
    layer, h = nn.Linear(2 * 5 + 2, 4).double(), torch.randn(3, 6, 5).double()
    pairs = torch.randn(3, 6, 6, 2).double()
    both = torch.cat([h[:, :, None].expand(3, 6, 6, 5), h[:, None].expand(3, 6, 6, 5), pairs], -1)
    expected = linear(both, layer.weight, layer.bias)
    assert torch.allclose(of_pairs(layer, h, pairs), expected, atol=1e-12)
    assert not torch.allclose(of_pairs(layer, h, pairs.transpose(1, 2)), expected, atol=1e-3)


def test_rotations_and_reflections() -> None:
    """Positions turn with the molecule, features do not; shifts are not seen."""
    net, (x, t, cond) = tiny(dtype=torch.float64), clouds(7, 5, 2)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=Seed(1).generator()).double())[0]
    out = net(x, t, cond)
    assert float(out[..., :3].abs().max()) > 0.1
    for matrix in (turn, -turn):
        turned = torch.cat([x[..., :3] @ matrix.T, x[..., 3:]], -1)
        expected = torch.cat([out[..., :3] @ matrix.T, out[..., 3:]], -1)
        assert torch.allclose(net(turned, t, cond), expected, atol=1e-8)
    rows = cond["mask"][..., None]  # type: ignore[call-overload]
    shifted = torch.cat([x[..., :3] + 2 * rows, x[..., 3:]], -1)
    assert torch.allclose(net(shifted, t, cond), out, atol=1e-8)
    assert float(out[..., :3].sum(1).abs().max()) < 1e-12


def test_permutations_and_padding() -> None:
    """The order of atoms, of molecules, and rows without an atom change nothing else."""
    net, (x, t, cond) = tiny(dtype=torch.float64), clouds(7, 5, 2)
    mask, out = torch.as_tensor(cond["mask"]), net(x, t, cond)
    order = torch.randperm(7, generator=Seed(2).generator())
    permuted = net(x[:, order], t, {"mask": mask[:, order]})
    assert torch.allclose(permuted, out[:, order], atol=1e-8)
    assert torch.allclose(net(x.flip(0), t.flip(0), {"mask": mask.flip(0)}), out.flip(0))
    wider = torch.cat([x, torch.zeros(3, 4, 9).double()], 1)
    padded = net(wider, t, {"mask": torch.cat([mask, torch.zeros(3, 4).double()], 1)})
    assert torch.allclose(padded[:, :7], out, atol=1e-8)
    assert not bool(padded[:, 7:].any())
    assert not bool(out[1, 5:].any())
    alone = net(x[1:2, :5], t[1:2])
    assert torch.allclose(alone[0], out[1, :5], atol=1e-8)


def test_groups_are_the_whole() -> None:
    """More molecules than one group, of all sizes: as evaluated together."""
    net, (x, t, cond) = tiny(dtype=torch.float64), clouds(*[2 + i % 6 for i in range(37)])
    mask = torch.as_tensor(cond["mask"])
    out = net.at(x, t, mask)
    assert torch.allclose(out, net.dense(x, t, mask), atol=1e-10)
    with torch.no_grad():  # activations are in place then
        assert torch.equal(net.at(x, t, mask), out)


def test_time_matters() -> None:
    net, (x, t, cond) = tiny(dtype=torch.float64), clouds(7, 5)
    assert float((net(x, t, cond) - net(x, t / 2, cond)).abs().max()) > 1e-3


# --- the flow model -----------------------------------------------------------------------------


def test_levels_are_nodes_of_the_schedule(checkpoint: Path) -> None:
    """Level i is at t = (T - i) / (T + 1); the network sees i / T; t = 1 is clean."""
    model = load_edm_checkpoint(checkpoint).model
    assert isinstance(model.net, EDMNet)
    level = torch.arange(STEPS + 1, dtype=torch.float64)
    t = (STEPS - level) / (STEPS + 1)
    assert torch.allclose(model.net.level(t), level / STEPS, atol=1e-12)
    assert torch.allclose(
        model.schedule.alpha(t) ** 2, torch.sigmoid(-gamma().double()), rtol=1e-9
    )
    middle = 0.5 * (t[3] + t[4])
    assert float(model.net.level(middle)) == pytest.approx(3.5 / STEPS)
    end = torch.tensor(1.0, dtype=torch.float64)
    assert (float(model.schedule.beta(end)), float(model.net.level(end))) == pytest.approx((0, 0))


@pytest.mark.parametrize(("level", "to"), [(10, 9), (7, 3), (1, 0)])
def test_a_step_is_that_of_edm(checkpoint: Path, level: int, to: int) -> None:
    """z_s given z_t and eps: mean = z_t / a - (s_ts^2 / (a s_t)) eps, std = s_ts s_s / s_t, with
    a = alpha_t / alpha_s and s_ts^2 = s_t^2 - a^2 s_s^2 (Hoogeboom et al., equations 4 and 8)."""
    model = load_edm_checkpoint(checkpoint).model
    x, _, cond = clouds(6, 4)
    assert isinstance(model.net, EDMNet)
    model.net.double()
    mask = torch.as_tensor(cond["mask"])
    alpha2 = torch.sigmoid(-gamma().double())
    (a_t, a_s), (s_t, s_s) = alpha2[[level, to]].sqrt(), (1 - alpha2[[level, to]]).sqrt()
    a = a_t / a_s
    variance = s_t**2 - (a * s_s) ** 2
    eps = model.net.at(x, torch.full((2,), level / STEPS).double(), mask)
    t, s = (torch.full((2,), (STEPS - i) / (STEPS + 1)).double() for i in (level, to))
    step = Ancestral().transition(model, x, t, s, cond)
    assert torch.allclose(step.mean, x / a - variance / (a * s_t) * eps, rtol=1e-5, atol=1e-6)
    assert torch.allclose(step.variance.sqrt(), (variance.sqrt() * s_s / s_t).expand(2), rtol=1e-5)


def test_the_last_step_returns_the_predicted_molecule(checkpoint: Path) -> None:
    model, (x, _, cond) = load_edm_checkpoint(checkpoint).model, clouds(6, 4)
    assert isinstance(model.net, EDMNet)
    model.net.double()
    t = torch.full((2,), STEPS / (STEPS + 1)).double()
    step = Ancestral().transition(model, x, t, torch.ones(2).double(), cond)
    alpha2 = torch.sigmoid(-gamma()[0].double())
    eps = model.net.at(x, torch.zeros(2).double(), torch.as_tensor(cond["mask"]))
    assert torch.allclose(step.mean, (x - (1 - alpha2).sqrt() * eps) / alpha2.sqrt(), rtol=1e-5)
    assert float(step.variance.abs().max()) < 1e-12


def test_samples_with_and_without_conditions(checkpoint: Path) -> None:
    """Zero mean, zero padding; a fixed number of atoms is the same model without a mask."""
    edm = load_edm_checkpoint(checkpoint, sizes={3: 1, 6: 2})
    cond = edm.sizes.draw(9, Seed(0).child("cond"))
    x = Sampler(Ancestral(), 5, batch_size=4).sample(edm.model, 9, seed=Seed(0), cond=cond)
    mask = torch.as_tensor(cond["mask"])
    assert x.shape == (9, 6, 9)
    assert float(x[..., :3].sum(1).abs().max()) < 1e-6 * float(x.abs().max())
    assert not bool((x * (1 - mask[..., None])).any())
    assert edm.layout.decode(x, cond).mask.sum(1).tolist() == mask.sum(1).tolist()
    assert edm.model.space.dimension(9, cond).tolist() == [int(9 * n - 3) for n in mask.sum(1)]
    fixed = edm.with_atoms(6)
    fully = FixedAtoms(6).draw(2, Seed(0))
    y = Sampler(Ancestral(), 5).sample(fixed, 2, seed=Seed(1))
    z = Sampler(Ancestral(), 5).sample(edm.model, 2, seed=Seed(1), cond=fully)
    assert torch.allclose(y, z, atol=1e-5)
    assert fixed.net is edm.model.net
    with pytest.raises(ConfigError, match="have no distances"):
        edm.with_atoms(1)


def test_training_moves_all_weights_but_the_schedule(checkpoint: Path) -> None:
    model = load_edm_checkpoint(checkpoint).model.clone()
    names = {name for name, _ in model.trainable.named_parameters()}
    assert names == set(model.net.state_dict()) - {"gamma"}
    model.trainable.requires_grad_(True)
    x, t, cond = clouds(6, 4)
    model.noise(x.float(), t.float(), cond).square().sum().backward()
    unused = {name for name, p in model.trainable.named_parameters() if p.grad is None}
    assert not unused


# --- endpoint prediction ------------------------------------------------------------------------


class Endpoints(EGNN):
    """A predictor of clean molecules as those of FlowMol, in this library's time."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x + self.at(x, t, torch.as_tensor(cond["mask"]))


def test_an_endpoint_predictor_is_a_flow_model() -> None:
    """FlowMol's velocity alpha' / (1 - alpha) (x_1 - x); steps commute with rotations."""
    net, (x, t, cond) = Endpoints(4, hidden=8, blocks=1).double(), clouds(5, 3, rows=5, width=7)
    space = ZeroMean((5, 7), columns=3, key="mask")
    model = FlowModel(net, Linear(), space, predicts="endpoint", takes_cond=True)
    with torch.no_grad():
        end = space.project(net(x, t, cond), cond)
        expected = (end - x) / (1 - t)[:, None, None]
        assert torch.allclose(model.velocity(x, t, cond), expected, atol=1e-10)
        step: Callable[[Tensor], Tensor] = lambda y: (  # noqa: E731
            Deterministic().transition(model, y, t, t + 0.1, cond).mean
        )
        turn = torch.linalg.qr(torch.randn(3, 3, generator=Seed(1).generator()).double())[0]
        turned = torch.cat([x[..., :3] @ turn, x[..., 3:]], -1)
        assert torch.allclose(step(turned)[..., :3], step(x)[..., :3] @ turn, atol=1e-10)
    samples = Sampler(Deterministic(), 4).sample(
        model, 2, seed=Seed(0), cond=cond, dtype=torch.float64
    )
    assert float(samples[..., :3].sum(1).abs().max()) < 1e-10


class Gain(nn.Module):
    """The end points of N(0, 1) on the linear path, times a number per step, size and feature."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(20, 2, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        large = (torch.as_tensor(cond["mask"]).sum(1) > 2).long()
        gain = self.table[(20 * t).round().long(), large]
        gain = gain * (t / (t**2 + (1 - t) ** 2))[:, None]
        return x * gain[:, None, [0, 0, 0, 1, 1]]


def test_molecules_of_several_sizes_are_tuned() -> None:
    """N(0, 1) on the subspace, tilted by -|x|^2, is N(0, 1 / 3) in all dimensions and sizes.

    20 steps leave 8 %, with a mask and without.
    """
    space = ZeroMean((4, 5), columns=3, key="mask")
    model = FlowModel(Gain(), Linear(), space, predicts="endpoint", takes_cond=True)
    sampler, sizes = Sampler(num_steps=20), AtomCounts({2: 1, 4: 1})
    solver = AdjointMatching(
        sampler=sampler, num_trajectories=64, updates_per_rollout=20, num_evaluate=2,
        training=Training(num_updates=300, learning_rate=2e-2, ema=0.9),
    )  # fmt: skip
    tuned = solver.solve(ControlProblem(model, Quadratic(0, 2), sizes), Context(Seed(0))).model
    cond = sizes.draw(4000, Seed(1))
    x = sampler.sample(tuned, 4000, seed=Seed(2), cond=cond)
    counts = torch.as_tensor(cond["mask"]).sum(1)
    assert float(x[..., :3].sum(1).abs().max()) < 1e-5
    for n in (2, 4):
        positions, features = x[counts == n].square().split([3, 2], -1)
        assert float(positions.sum((1, 2)).mean()) / (3 * n - 3) == pytest.approx(1 / 3, rel=0.12)
        assert float(features.sum((1, 2)).mean()) / (2 * n) == pytest.approx(1 / 3, rel=0.12)


# --- numbers of atoms ---------------------------------------------------------------------------


def test_numbers_of_atoms_follow_the_histogram() -> None:
    law = AtomCounts({4: 1, 2: 2, 9: 1, 30: 0}, max_atoms=8)
    cond = law.draw(3000, Seed(0))
    mask = torch.as_tensor(cond["mask"])
    assert mask.shape == (3000, 4)  # one width in all draws, so that they can be joined
    counts = mask.sum(1).long()
    assert sorted(set(counts.tolist())) == [2, 4]
    share = float((counts == 2).double().mean())
    assert abs(share - 2 / 3) < 4.5 * (2 / 9 / 3000) ** 0.5
    halves = [float((half == 2).double().mean()) for half in counts.split(1500)]
    assert abs(halves[0] - halves[1]) < 4.5 * (4 / 9 / 1500) ** 0.5
    assert torch.equal(mask, torch.as_tensor(law.draw(3000, Seed(0))["mask"]))
    assert not torch.equal(mask, torch.as_tensor(law.draw(3000, Seed(1))["mask"]))
    joined = joined_cond([law.draw(1, Seed(i)) for i in range(3)])
    assert torch.as_tensor(joined["mask"]).shape == (3, 4)
    fixed = FixedAtoms(3, padded=5).draw(2, Seed(0))["mask"]
    assert torch.as_tensor(fixed).tolist() == [[1, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: AtomCounts({}),
        lambda: AtomCounts({0: 1}),
        lambda: AtomCounts({3: -1}),
        lambda: AtomCounts({3: 1}, max_atoms=2),
        lambda: FixedAtoms(0),
        lambda: FixedAtoms(5, padded=4),
        lambda: EGNN(0),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"AtomCounts|FixedAtoms|EGNN"):
        make()


# --- files --------------------------------------------------------------------------------------


def test_a_state_dict_of_edm(checkpoint: Path) -> None:
    """Sizes are read from the shapes; the weights are those of the file."""
    edm = load_edm_checkpoint(checkpoint)
    assert isinstance(edm, EDM)
    x, t, cond = clouds(6, 4)
    expected = tiny()(x.float(), t.float(), cond)
    assert torch.allclose(edm.model.net(x.float(), t.float(), cond), expected)
    assert edm.model.space.event == (29, 9)
    assert not any(p.requires_grad for p in edm.model.net.parameters())
    with pytest.raises(CheckpointError, match=r"7 inputs per atom, but the layout has 5 features"):
        load_edm_checkpoint(checkpoint, layout=Layout(charge=None))


def test_wrong_state_dicts_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    good = torch.load(checkpoint, weights_only=True)

    def refused(state: Any, match: str) -> None:
        torch.save(state, tmp_path / "wrong.npy")
        with pytest.raises(CheckpointError, match=match):
            load_edm_checkpoint(tmp_path / "wrong.npy")

    block = "dynamics.egnn.e_block_1"
    refused(good | {f"{block}.gcl_1.att_mlp.0.bias": torch.zeros(1)}, "nobody asked for")
    refused({k: v for k, v in good.items() if "att_mlp" not in k}, r"lacks 'e_block_0.*att_mlp")
    refused({k: v for k, v in good.items() if "gamma" not in k}, "predefined noise schedule")
    wide = good | {f"{block}.gcl_0.edge_mlp.0.weight": torch.zeros(12, 48)}
    refused(wide, r"has shape \(12, 48\), the model needs \(12, 26\)")
    refused(good | {"gamma.gamma": gamma().flip(0) * 0}, "does not increase from data to noise")
    refused({"args": {"nf": 3}}, "other than a state dict")
    refused({"model": nn.Linear(2, 2)}, "holds more than a state dict")
    (tmp_path / "wrong.npy").write_bytes(checkpoint.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="not a readable file of tensors"):
        load_edm_checkpoint(tmp_path / "wrong.npy")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_edm_checkpoint(tmp_path / "missing.npy")


@published("edm_qm9_small")
@pytest.mark.parametrize("epoch", [341, 21])
def test_the_network_is_the_original(epoch: int) -> None:
    """Outputs and vector-Jacobian products of the original code, to 1e-4 of their norm."""
    edm = load_edm(FOLDER, epoch=epoch)
    file = load_file(FOLDER / "reference_io.safetensors")
    z = file["z"].clone().requires_grad_()
    assert isinstance(edm.model.net, EDMNet)
    eps = edm.model.net.at(z, file["t"], file["mask"])
    (vjp,) = torch.autograd.grad((eps * file["v"]).sum(), z)
    for own, name in ((eps.detach(), "eps"), (vjp, "vjp")):
        original = file[f"{name}_epoch{epoch}"]
        assert float((own - original).norm()) < 1e-4 * float(original.norm())
    assert sum(p.numel() for p in edm.model.trainable.parameters()) == 746_892
    assert dict(edm.sizes.histogram) == QM9_SIZES
    assert edm.layout == Layout()


@published("edm_qm9_small")
def test_the_recipe() -> None:
    """From a run file: the model of one number of atoms, which needs no conditions."""
    table = {"kind": "EDM", "path": str(FOLDER), "atoms": 5, "epoch": 21}
    model = interpret(Model, table, "models.pretrained").build({}).load().model
    samples = Sampler(Ancestral(), 3).sample(model, 2, seed=Seed(0))
    assert samples.shape == (2, 5, 9)
    weights = load_edm(FOLDER, epoch=21).model.net.state_dict()
    assert torch.equal(model.net.state_dict()["embedding.weight"], weights["embedding.weight"])


@published("edm_qm9_small")
def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in FOLDER.glob("*.*"):
        shutil.copyfile(file, folder / file.name)
    weights = folder / "model_epoch341.safetensors"
    mine = load_edm(folder).model.net.state_dict()
    save_tensors(folder / "mine.safetensors", {k: 2 * v for k, v in mine.items()})
    tuned = load_edm(folder, weights=folder / "mine.safetensors").model.net.state_dict()
    assert torch.equal(tuned["embedding.bias"], 2 * mine["embedding.bias"])
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="but other content"):
        load_edm(folder)
    save_file({"weight": torch.zeros(3)}, weights)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_edm(folder)
    with pytest.raises(CheckpointError, match="there is no epoch 7"):
        load_edm(folder, epoch=7)
    card = json.loads((folder / "config.json").read_text())
    changes: list[tuple[list[str], Any, str]] = [
        (["network", "attention"], False, r"network.attention = False"),
        (["diffusion", "prediction"], "x", r"diffusion.prediction = 'x'"),
        (["atom_types"], ["C", "H", "N", "O", "F"], "state.layout"),
        (["network", "hidden"], "wide", "missing or damaged"),
        (["n_atoms_histogram"], {}, "histogram is empty"),
    ]
    for keys, value, match in changes:
        changed = json.loads(json.dumps(card))
        (changed[keys[0]] if len(keys) == 2 else changed)[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=match):
            load_edm(folder)
    with pytest.raises(CheckpointError, match=r"config.json, the description of the model"):
        load_edm(tmp_path / "nothing")


@published("edm_qm9_small")
@pytest.mark.slow
def test_samples_are_as_good_as_measured() -> None:
    """Of the original code 0.809 of the atoms were stable (192 molecules, 50 ancestral steps)."""
    edm = load_edm(FOLDER)
    cond = edm.sizes.draw(64, Seed(0).child("cond"))
    x = Sampler(Ancestral(), 50).sample(edm.model, 64, seed=Seed(0), cond=cond)
    molecules = edm.layout.decode(x, cond)
    atoms = molecules.mask.sum(1)
    stable = stable_atoms(molecules).sum(1) / atoms
    # Atoms of one molecule are not independent; their shares in molecules are.
    error = float(stable.std()) * (1 / 64 + 1 / 192) ** 0.5
    assert abs(float((stable * atoms).sum() / atoms.sum()) - 0.809) < 4.5 * error
