"""Conformer flows and end-point models: graphs, contracts, files; small ones are trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltflow.adapters.atom_counts import AtomCounts
from tiltflow.adapters.conformers import ConformerFlow, ConformerNet, Prior, load_conformer_flow
from tiltflow.adapters.endpoint import Clock, EndpointFlow, EndpointNet, load_endpoint_flow
from tiltflow.adapters.molecular_graph import MolecularGraph, OfGraph, embedded
from tiltflow.algorithms import Merging, merge
from tiltflow.context import Context
from tiltflow.density import Bank
from tiltflow.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    ShapeError,
    TiltflowError,
    UnsupportedError,
)
from tiltflow.kernel import EulerMaruyama, Heun
from tiltflow.matching import fit_flow
from tiltflow.operators import Intersection
from tiltflow.problem import ControlProblem
from tiltflow.rewards import XTBEnergy
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler, calibrated
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

PEROXIDE = MolecularGraph((8, 8, 1, 1), ((0, 1, 1.0), (0, 2, 1.0), (1, 3, 1.0)))
METHANOL = MolecularGraph(
    (6, 8, 1, 1, 1, 1), ((0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 1), (1, 5, 1))
)
PRIORS = pytest.mark.parametrize("prior", ["gaussian", "harmonic"])


def noise(graph: MolecularGraph, count: int, seed: int = 0) -> Tensor:
    x = torch.randn(count, len(graph), 3, generator=Seed(seed).generator(), dtype=torch.float64)
    return x - x.mean(1, keepdim=True)


def lively(net: nn.Module) -> nn.Module:
    """In float64, with displacements that are not next to nothing."""
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if "coord_mlp.4" in name:
            nn.init.normal_(p, std=0.3)
    return net.double()


def network(**sizes: Any) -> ConformerNet:
    net = lively(ConformerNet(hidden=8, blocks=2, **sizes))
    assert isinstance(net, ConformerNet)
    return net


def turned() -> Tensor:
    """A rotation with a reflection."""
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=Seed(5).generator()).double())
    return q if torch.linalg.det(q) < 0 else -q


# --- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MolecularGraph((2,), ()), "1 atom has no conformers"),
        (lambda: MolecularGraph((), ()), "0 atoms has no conformers"),
        (lambda: MolecularGraph((1, 0), ((0, 1, 1),)), "0 is not the atomic number"),
        (lambda: MolecularGraph((1, 170), ((0, 1, 1),)), "170 is not the atomic number"),
        (lambda: MolecularGraph((8, 1, 1), ((0, 1, 1),)), r"not connected.*atom 2 \(H\)"),
        (lambda: MolecularGraph((1, 1), ((0, 2, 1),)), "not between two different atoms"),
        (lambda: MolecularGraph((1, 1), ((1, 1, 1),)), "not between two different atoms"),
        (lambda: MolecularGraph((1, 1), ((0, 1, 1), (1, 0, 1))), "there twice"),
        (lambda: MolecularGraph((1, 1), ((0, 1, 5),)), "order other than"),
        (lambda: MolecularGraph.of_smiles("C.C"), "not connected"),
        (lambda: MolecularGraph.of_smiles("[He]"), "1 atom has no conformers"),
        (lambda: MolecularGraph.of_smiles("C(C"), "cannot read the SMILES"),
        (lambda: MolecularGraph.of_smiles("C[N+](=O)[O-]"), "formal charges"),
        (lambda: MolecularGraph((1, 26), ((0, 1, 1),)).kept(torch.zeros(1, 2, 3)), "radius of Fe"),
        (lambda: PEROXIDE.kept(torch.zeros(2, 3, 3)), r"graph of 4 atoms, H2O2.*\(B, 4, 3\)"),
        (lambda: PEROXIDE.molecules(torch.zeros(4, 3)), r"\(B, 4, 3\)"),
        (lambda: ConformerNet((1, 6)).told(PEROXIDE), r"H2O2 has element 8 \(O\).*knows H, C"),
        (lambda: ConformerFlow(network()).positions(PEROXIDE, noise(METHANOL, 1)), "4 atoms"),
        (lambda: ConformerFlow(network()).states(PEROXIDE, noise(METHANOL, 1)), "4 atoms"),
        (lambda: ConformerFlow(network()).bank({PEROXIDE: noise(PEROXIDE, 2)}), "none of the 2"),
        (lambda: ConformerFlow(network(), "white"), "must be 'gaussian' or 'harmonic'"),  # type: ignore[arg-type]
        (lambda: ConformerNet(hidden=0), "must be at least 1"),
        (lambda: EndpointFlow(EndpointNet(4, 8, 1), AtomCounts({4: 1})), "4 types.*5 elements"),
        (lambda: ends().with_atoms(1), "1 atoms have no distances"),
        (lambda: Clock(0.0), "must be positive"),
    ],
)
def test_sentences(make: Callable[[], object], match: str) -> None:
    with pytest.raises(TiltflowError, match=match) as caught:
        make()
    assert isinstance(caught.value, ConfigError | ShapeError | UnsupportedError)


def test_without_rdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    for make in (lambda: MolecularGraph.of_smiles("CO"), lambda: embedded(METHANOL, 1, 0)):
        with pytest.raises(CapabilityError, match=r"pip install 'tiltflow\[molecules\]'"):
            make()


def test_graphs_are_rdkits() -> None:
    """Bonds of an aromatic ring, and the shortest ways between atoms."""
    chem = pytest.importorskip("rdkit.Chem")
    for text in ("c1ccccc1C=O", "C#C[C@H](C=O)CCC"):
        graph, molecule = MolecularGraph.of_smiles(text), chem.AddHs(chem.MolFromSmiles(text))
        ways = torch.tensor(chem.GetDistanceMatrix(molecule)).long()
        assert torch.equal(graph.steps, ways)
        again = graph.rdkit()
        assert chem.MolToSmiles(again) == chem.MolToSmiles(molecule, isomericSmiles=False)
    ring = MolecularGraph.of_smiles("c1ccccc1")
    assert sorted({o for *_, o in ring.bonds}) == [1.0, 1.5]
    assert str(ring) == "C6H6"


def test_bonds_are_kept_or_not() -> None:
    """As embedded, with an atom torn off, with two that touch, and with what is no number."""
    pytest.importorskip("rdkit")
    x = embedded(METHANOL, 4, 0, relaxed=True)
    assert torch.equal(x, embedded(METHANOL, 4, 0, relaxed=True))
    assert float(x.mean(1).abs().max()) < 1e-12
    assert METHANOL.kept(x).all()
    x[0, 5] += 2.0
    x[1, 5] = x[1, 4] + 0.3
    x[2, 0, 0] = torch.nan
    assert METHANOL.kept(x).tolist() == [False, False, False, True]


def test_rewards_of_one_graph() -> None:
    """xTB energies of positions are those of the molecules; the gradient by differences, also
    through the coordinates of a harmonic prior."""
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")
    energy = XTBEnergy(METHANOL.layout, max_force=1e3)
    x = embedded(METHANOL, 2, 0) + 0.02 * noise(METHANOL, 2)
    reward = OfGraph(energy, METHANOL)
    direct = energy.energies(METHANOL.molecules(x))
    assert torch.allclose(reward.value(x), -direct)
    flow = ConformerFlow(network(), "harmonic")
    in_states, z = flow.reward_of(METHANOL, reward), flow.states(METHANOL, x)
    value, grad = in_states.value_and_grad(z)
    assert torch.allclose(value, -direct, atol=1e-7)
    step = 1e-3 * noise(METHANOL, 2, 3)
    slope = (in_states.value(z + step) - in_states.value(z - step)) / 2
    assert torch.allclose(slope, (grad * step).sum((1, 2)), rtol=1e-3, atol=1e-7)
    assert torch.allclose(grad, in_states.grad(z))


# --- conformer flows ----------------------------------------------------------------------------


def test_symmetries() -> None:
    """Rotations, reflections, shifts, and other numberings of the atoms, in float64."""
    net, x, t = network(), noise(METHANOL, 5), torch.linspace(0, 1, 5).double()
    atoms, pairs = net.told(METHANOL)
    out = net(x, t, atoms, pairs)
    assert float(out.detach().abs().mean()) > 1e-2
    assert float(out.detach().mean(1).abs().max()) < 1e-12
    q = turned()
    assert torch.allclose(net(x @ q + 0.7, t, atoms, pairs), out @ q, atol=1e-10)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    place = {int(old): new for new, old in enumerate(order)}
    other = MolecularGraph(
        tuple(METHANOL.numbers[i] for i in order),
        tuple((place[i], place[j], o) for i, j, o in METHANOL.bonds),
    )
    assert torch.allclose(net(x[:, order], t, *net.told(other)), out[:, order], atol=1e-12)


def test_the_graph_is_seen() -> None:
    """One set of positions, two graphs of the same atoms."""
    net, x = network(), noise(PEROXIDE, 3)
    water_oxide = MolecularGraph((8, 8, 1, 1), ((0, 1, 1), (0, 2, 1), (0, 3, 1)))
    t = torch.full((3,), 0.5).double()
    one, other = (net(x, t, *net.told(graph)) for graph in (PEROXIDE, water_oxide))
    assert float((one - other).detach().abs().max()) > 1e-3


@PRIORS
def test_vector_jacobian_products(prior: Prior) -> None:
    """Of the velocity in states, against central differences in float64."""
    model = ConformerFlow(network(), prior).flow_of(METHANOL)
    x, a = noise(METHANOL, 3).requires_grad_(), noise(METHANOL, 3, 1)
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    (pulled,) = torch.autograd.grad(model.velocity(x, t), x, a)
    assert float(pulled.mean(1).abs().max()) < 1e-10
    along = noise(METHANOL, 3, 2)
    with torch.no_grad():
        ahead, behind = (model.velocity(x + s * 1e-5 * along, t) for s in (1, -1))
    slope = ((ahead - behind) / 2e-5 * a).sum((1, 2))
    assert torch.allclose(slope, (pulled * along).sum((1, 2)), rtol=1e-6, atol=1e-8)


@PRIORS
def test_time_and_coordinates(prior: Prior) -> None:
    """The network's velocity is that of the path, and end points are where it leads: with the
    linear path x + (1 - t) v of positions."""
    flow = ConformerFlow(network(), prior, noise=0.0)
    model, x, t = flow.flow_of(METHANOL), noise(METHANOL, 4), torch.rand(4).double()
    z = flow.states(METHANOL, x)
    assert torch.allclose(flow.positions(METHANOL, z), x, atol=1e-10)
    v = flow.net(x, t, *flow.net.told(METHANOL))
    assert torch.allclose(flow.positions(METHANOL, model.velocity(z, t)), v, atol=1e-8)
    end = x + (1 - t)[:, None, None] * v
    assert torch.allclose(flow.positions(METHANOL, model.endpoint(z, t)), end, atol=1e-8)


@PRIORS
def test_several_graphs_together(prior: Prior) -> None:
    """Each as by itself, whatever stands beside it or in the rows that are no atoms."""
    pytest.importorskip("rdkit")
    flow = ConformerFlow(network(), prior)
    data = {METHANOL: embedded(METHANOL, 3, 0), PEROXIDE: peroxides(90, 130, 1, 0)}
    together, bank = flow.together(list(data)), flow.bank(data)
    assert bank.weights.tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    x, t = bank.points.double(), torch.linspace(0.2, 0.8, 4).double()
    out = together.velocity(x, t, bank.cond)
    singles = {graph: flow.flow_of(graph) for graph in data}
    assert torch.allclose(out[:3], singles[METHANOL].velocity(x[:3], t[:3]), atol=1e-12)
    assert torch.allclose(out[3:, :4], singles[PEROXIDE].velocity(x[3:, :4], t[3:]), atol=1e-12)
    assert not out[3:, 4:].any()
    littered = x.clone()
    littered[3, 4:] = 7.0
    assert torch.equal(together.velocity(littered, t, bank.cond), out)
    assert together.net.net is flow.net


@PRIORS
def test_files(prior: Prior, tmp_path: Path) -> None:
    """Weights and settings come back; other files are refused with a reason."""
    flow, path = ConformerFlow(network().float(), prior, 0.2, 2.0), tmp_path / "flow.safetensors"
    flow.save(path)
    again = load_conformer_flow(path)
    assert (again.prior, again.noise, again.stiffness) == (prior, 0.2, 2.0)
    x, t = noise(METHANOL, 2).float(), torch.tensor([0.3, 0.6])
    same = [f.flow_of(METHANOL).velocity(x, t) for f in (flow, again)]
    assert torch.equal(same[0].detach(), same[1])
    assert not any(p.requires_grad for p in again.net.parameters())
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"flow\.safetensors"):
        load_conformer_flow(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_conformer_flow(tmp_path / "none.safetensors")
    ends().save(path)
    with pytest.raises(CheckpointError, match=r"'endpoint flow'.*another model"):
        load_conformer_flow(path)
    flow.save(path)
    with pytest.raises(CheckpointError, match=r"'conformer flow'.*another model"):
        load_endpoint_flow(path)


# --- end-point models ---------------------------------------------------------------------------


def ends(power: float = 1.0) -> EndpointFlow:
    net = lively(EndpointNet(5, 8, 2))
    assert isinstance(net, EndpointNet)
    return EndpointFlow(net, AtomCounts({4: 1, 6: 2}), clock=Clock(power))


def atoms_and_types(rows: int, count: int, seed: int = 0) -> Tensor:
    generator = Seed(seed).generator()
    x = torch.randn(count, rows, 8, generator=generator, dtype=torch.float64)
    x[..., :3] -= x[..., :3].mean(1, keepdim=True)
    return x


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_end_points_in_the_librarys_time(power: float) -> None:
    """The network is asked at tau with alpha(tau) = t, and the velocity in tau is FlowMol's,
    alpha' / (1 - alpha) (x_1 - x)."""
    flow, x = ends(power), atoms_and_types(6, 5)
    tau = torch.linspace(0.1, 0.95, 5).double()
    clock, model = flow.clock, flow.with_atoms(6)
    t = clock.alpha(tau)
    assert torch.allclose(t, (0.5 * torch.pi * tau**power).sin() ** 2)
    assert torch.allclose(clock.own(t), tau, atol=1e-12)
    assert clock.own(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    with torch.no_grad():
        end = flow.net(x, tau)
        assert torch.allclose(model.endpoint(x, t), end, atol=1e-12)
        slope = (clock.alpha(tau + 1e-6) - clock.alpha(tau - 1e-6)) / 2e-6
        own = (slope / (1 - t))[:, None, None] * (end - x)
        assert torch.allclose(slope[:, None, None] * model.velocity(x, t), own, rtol=1e-6)


def test_end_points_contract() -> None:
    """Symmetries, probabilities, padding, and vector-Jacobian products, in float64."""
    flow, x, t = ends(), atoms_and_types(6, 4), torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
    mask = torch.ones(4, 6)
    mask[1:3, 4:] = 0
    cond, model = {"mask": mask}, flow.model
    x = model.space.project(x, cond)
    out = model.endpoint(x, t, cond)
    assert torch.allclose(out[..., 3:].sum(-1), mask.double())
    assert not out[1:3, 4:].any()
    q = turned()
    moved = torch.cat([x[..., :3] @ q, x[..., 3:]], -1)
    back = torch.cat([out[..., :3] @ q, out[..., 3:]], -1)
    assert torch.allclose(model.endpoint(moved, t, cond), back, atol=1e-10)
    alone = flow.with_atoms(4).endpoint(x[1:3, :4], t[1:3])
    assert torch.allclose(alone, out[1:3, :4], atol=1e-10)
    leaf, a = x.clone().requires_grad_(), atoms_and_types(6, 4, 1)
    (pulled,) = torch.autograd.grad(model.endpoint(leaf, t, cond), leaf, a)
    along = model.space.project(atoms_and_types(6, 4, 2), cond)
    with torch.no_grad():
        ahead, behind = (model.endpoint(x + s * 1e-5 * along, t, cond) for s in (1, -1))
    slope = ((ahead - behind) / 2e-5 * a).sum((1, 2))
    assert torch.allclose(slope, (pulled * along).sum((1, 2)), rtol=1e-6, atol=1e-8)


def test_end_point_files(tmp_path: Path) -> None:
    flow, path = ends(1.5), tmp_path / "ends.safetensors"
    flow.net.float()
    flow.save(path)
    again = load_endpoint_flow(path)
    assert again.clock == Clock(1.5)
    assert again.sizes.law == {4: 1, 6: 2}
    assert again.layout.symbols == ["C", "H", "N", "O", "F"]
    x, t = atoms_and_types(6, 2).float(), torch.tensor([0.3, 0.6])
    same = [f.with_atoms(6).endpoint(x, t) for f in (flow, again)]
    assert torch.equal(same[0].detach(), same[1])


# --- trained ------------------------------------------------------------------------------------


def peroxides(low: float, high: float, count: int, seed: int) -> Tensor:
    """Hydrogen peroxide with any torsion of a range, of both signs, and jittered."""
    g = Seed(seed).generator()
    angle = torch.deg2rad(low + (high - low) * torch.rand(count, generator=g))
    angle = angle * (1 - 2 * torch.randint(0, 2, (count,), generator=g))
    across, along = 0.95 * 0.98, 0.2
    first = torch.tensor([along, across, 0.0]).expand(count, 3)
    second = torch.stack(
        [1.45 - along + 0 * angle, across * angle.cos(), across * angle.sin()], -1
    )
    oxygens = torch.tensor([[0.0, 0, 0], [1.45, 0, 0]]).expand(count, 2, 3)
    x = torch.cat([oxygens, torch.stack([first, second], 1)], 1)
    x = x + 0.04 * torch.randn(x.shape, generator=g)
    return x - x.mean(1, keepdim=True)


def torsions(x: Tensor) -> Tensor:
    """|torsion| of hydrogen peroxide, in degrees."""
    from molecules_conformers_data import torsions as of_rotors

    return of_rotors(PEROXIDE, x)[:, 0]


def trained(x: Tensor, prior: Prior) -> ConformerFlow:
    torch.manual_seed(0)
    flow = ConformerFlow(ConformerNet((1, 8), hidden=24, blocks=2), prior, stiffness=2.0)
    training = Training(num_updates=2000, learning_rate=4e-3, ema=0.995)
    bank = flow.bank({PEROXIDE: x})
    fit_flow(flow.together([PEROXIDE]), bank, training, Context(Seed(0)), batch_size=64)
    flow.net.requires_grad_(False).eval()
    return flow


def of_torsions(flow: ConformerFlow, states: Tensor) -> Tensor:
    """Shares of six ranges of the torsion, (6,); nearly all samples are molecules."""
    x = flow.positions(PEROXIDE, states)
    assert float(PEROXIDE.kept(x).double().mean()) > 0.95
    return torch.histc(torsions(x), 6, 0, 180) / len(x)


@pytest.mark.slow
@PRIORS
def test_training_and_merging(prior: Prior) -> None:
    """Two flows of hydrogen peroxide, trained on torsions of 20 to 120 and of 80 to 175 degrees,
    which is all that differs: their intersection has the geometric mean of their torsions' laws,
    as far as these were learned, and neither's."""
    flows = {
        name: trained(peroxides(*angles, 2000, 1), prior)
        for name, angles in {"a": (20.0, 120.0), "b": (80.0, 175.0)}.items()
    }
    models = {name: flow.flow_of(PEROXIDE) for name, flow in flows.items()}
    training = Training(num_updates=600, learning_rate=1e-3, ema=0.99)
    merged = merge(
        "a & b", models, context=Context(Seed(1)), lowerings={Intersection: "particles"},
        settings=Merging(training=training, bank_size=1000, batch_size=64),
    ).model  # fmt: skip
    a, b, both = (
        of_torsions(flows["a"], Sampler(Heun(), 20).sample(model, 1000, seed=Seed(3)))
        for model in (*models.values(), merged)
    )
    assert float(a[:4].sum()) > 0.75
    assert float(b[2:].sum()) > 0.85
    mean = (a * b).sqrt() / (a * b).sqrt().sum()
    apart = [float((law - mean).abs().sum() / 2) for law in (a, b, both)]
    assert min(apart[:2]) > 0.2
    assert apart[2] < 0.5 * min(apart[:2])


@pytest.mark.slow
def test_tuning_by_energy() -> None:
    """Adjoint Matching on a trained flow in white coordinates, with gradients of xTB in units of
    kT: the mean reward rises by more than the path KL costs."""
    pytest.importorskip("tblite")
    flow = trained(peroxides(20.0, 175.0, 2000, 1), "harmonic")
    model, kt = flow.flow_of(PEROXIDE), 4.0
    energy = XTBEnergy(PEROXIDE.layout, per="formation", unit="kcal/mol")
    reward = (1 / kt) * flow.reward_of(PEROXIDE, OfGraph(energy, PEROXIDE))
    training = Training(num_updates=60, learning_rate=1e-3, ema=0.9)
    sampler = Sampler(num_steps=20)
    solver = AdjointMatching(
        sampler=sampler, num_trajectories=32, updates_per_rollout=5, num_evaluate=64,
        training=training,
    )  # fmt: skip
    solution = solver.solve(ControlProblem(model, reward), Context(Seed(0)))
    start = calibrated(model, seed=Seed(4), count=128, num_steps=20)
    before, after = (
        reward.value(sampler.sample(m, 300, seed=Seed(5))).double()
        for m in (start, solution.model)
    )
    gain, error = float(after.mean() - before.mean()), float((before.var() / 300).sqrt())
    assert gain > solution.stats["path_kl"] > 0
    assert gain > 4.5 * 1.5 * error


@pytest.mark.parametrize("kind", ["conformers", "end points"])
def test_solvers_take_them(kind: str) -> None:
    """Two updates of Adjoint Matching: finite, of zero mean, and without padding's atoms."""
    sizes = AtomCounts({4: 1, 6: 2}) if kind == "end points" else None
    flow = ends()
    model = flow.model if sizes else ConformerFlow(network(), "harmonic").flow_of(METHANOL)
    model.net.float()
    sampler = Sampler(EulerMaruyama(), 4)
    solver = AdjointMatching(
        sampler=sampler, num_trajectories=4, num_evaluate=4, use_values=False,
        updates_per_rollout=2, training=Training(num_updates=2),
    )  # fmt: skip
    problem = ControlProblem(model, Quadratic(0, 0.1), sizes)
    solution = solver.solve(problem, Context(Seed(0)))
    cond = None if sizes is None else sizes.draw(5, Seed(1))
    x = sampler.sample(solution.model, 5, seed=Seed(2), cond=cond)
    assert x.isfinite().all()
    assert float(x[..., :3].mean(1).abs().max()) < 1e-5
    if cond is not None:
        assert not x[torch.as_tensor(cond["mask"]) == 0].any()


@pytest.mark.slow
def test_a_trained_end_point_model() -> None:
    """Positions and types of two molecules, told by the number of atoms."""
    pytest.importorskip("rdkit")
    torch.manual_seed(0)
    flow = EndpointFlow(EndpointNet(5, 32, 3), AtomCounts({4: 1, 6: 1}))
    points, masks = [], []
    for graph in (PEROXIDE, METHANOL):
        molecules = graph.molecules(embedded(graph, 200, 0).float())
        states, _ = flow.layout.encode(molecules)
        points.append(nn.functional.pad(states, (0, 0, 0, 6 - len(graph))))
        masks.append((torch.arange(6) < len(graph)).float().expand(200, -1))
    bank = Bank.equal(torch.cat(points), {"mask": torch.cat(masks)})
    training = Training(num_updates=1500, learning_rate=3e-3, ema=0.995)
    fit_flow(flow.model, bank, training, Context(Seed(0)), batch_size=64)
    cond = flow.sizes.draw(200, Seed(1))
    x = Sampler(Heun(), 25).sample(flow.model, 200, seed=Seed(2), cond=cond)
    found = flow.layout.decode(x, cond)
    right = 0
    for i in range(200):
        numbers, positions = found[i]
        graph = PEROXIDE if len(numbers) == 4 else METHANOL
        if sorted(numbers.tolist()) == sorted(graph.numbers):
            order = torch.argsort(torch.tensor(graph.numbers), stable=True).argsort()
            placed = positions[torch.argsort(numbers, stable=True)][order]
            near = (placed[:, None] - placed).norm(dim=-1)
            heavy = float(near[0, 1])
            right += 1.2 < heavy < 1.7
    assert right > 160


# --- experiments --------------------------------------------------------------------------------


def test_hamiltonian_moves() -> None:
    """E[grad f . grad U] = kT E[Laplacian f] of samples, with f = sum of (r - r0)^2 / 2 over the
    bonds, which turns leave alone."""
    pytest.importorskip("rdkit")
    import molecules_conformers_data as data

    energy = data.Energy(PEROXIDE, {"mmff": 0.5, "uff": 0.5})
    x = data.boltzmann(energy, 400, 3, chains=40, warm=20, apart=8).double()
    assert float(x.mean(1).abs().max()) < 1e-6
    slope = torch.tensor([energy.slope(v).tolist() for v in x.numpy()]) / data.KT
    gap = torch.zeros(len(x)).double()
    for i, j in PEROXIDE.edges:
        along, pull = x[:, i] - x[:, j], slope[:, i] - slope[:, j]
        r = along.norm(dim=-1)
        off = r - r.mean()
        gap += off / r * (along * pull).sum(-1) - 2 * (1 + 2 * off / r)
    error = float(gap.std()) / len(gap) ** 0.5
    assert error < 0.4
    assert abs(float(gap.mean())) < 4.5 * error


def test_turns() -> None:
    """About a bond of one conformer: shares of six ranges of the torsion against the integral of
    exp(-E / kT) over a grid of angles; moves propose any angle, so that every fifth state is all
    but independent. And what can be turned at all."""
    pytest.importorskip("rdkit")
    import molecules_conformers_data as data
    import numpy as np

    (turn,), rng = data.rotors(PEROXIDE), np.random.default_rng(0)
    assert turn[:2] == (0, 1)
    assert data.rotors(METHANOL) == []
    energy = data.Energy(PEROXIDE, {"uff": 1.0})
    x = embedded(PEROXIDE, 1, 0)[0].numpy()
    states = [x := data.turned(energy, x, turn, rng) for _ in range(10_000)]
    found = torch.histc(torsions(torch.tensor(np.stack(states[::5]))), 6, 0, 180) / 2000
    grid = [data.rotated(x, turn, angle) for angle in np.linspace(-np.pi, np.pi, 720, False)]
    weights = torch.tensor([-energy.value(y) / data.KT for y in grid]).double().softmax(0)
    classes = (torsions(torch.tensor(np.stack(grid))) // 30).long().clamp(max=5)
    law = torch.zeros(6).double().index_add_(0, classes, weights)
    assert float((law - 1 / 6).abs().max()) > 0.03
    error = (law * (1 - law) / 2000).sqrt()
    assert bool(((found - law).abs() < 4.5 * error + 0.005).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_smoke(tmp_path: Path) -> None:
    """The experiments on tiny molecules and networks: they go on where they were, and say what
    they found."""
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")
    import molecules_conformers
    import molecules_conformers_priors
    from toys import Store

    modules = {"conformers": molecules_conformers, "priors": molecules_conformers_priors}
    for name, module in modules.items():
        store = Store(tmp_path / f"{name}.json")
        assert module.section(store) == ""
        module.run(store, [0], True)
        before = store.path.read_text(encoding="utf-8")
        module.run(Store(store.path), [0], True)
        assert store.path.read_text(encoding="utf-8") == before
    text = molecules_conformers.section(Store(tmp_path / "conformers.json"))
    for row in ("a, of MMFF94", "B: a & b", "RG: (a & b)[reward]", "UNION: a \\| b", "exact B"):
        assert f"| {row} |" in text
    text = molecules_conformers_priors.section(Store(tmp_path / "priors.json"))
    assert "| harmonic, linear path, SDE |" in text


def test_one_conformer_each() -> None:
    """Averages over distinct conformers, and what was found of the references."""
    pytest.importorskip("scipy")
    import molecules_conformers_judge as judge

    low, high, far = (judge.Property(e, d, 100.0) for e, d in ((0, 1.0), (0.592, 2.0), (5, 1.0)))
    again = judge.Property(0.05, 1.05, 100.0)
    assert judge.distinct([high, again, low]) == [low, high]
    weight = 1 / (1 + 2.718281828)
    assert judge.ensemble([high, again, low])["dipole"] == pytest.approx(1 + weight)
    found = judge.errors([high, high], [low, high, far])
    assert found["coverage"] == 0.5
    assert found["lowest"] == found["mean"] == pytest.approx(0.592)
    assert judge.errors([], [low]) == {"coverage": 0.0}
