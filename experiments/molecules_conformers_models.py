"""The models of ``molecules_conformers.py``: two force fields, a flow of conformers for each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from molecules_conformers_data import KT, Energy, boltzmann
from molecules_conformers_judge import Lowness, Property, references, shares
from torch import Tensor
from toys import Store

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.adapters.conformers import ConformerFlow, ConformerNet, Prior, load_conformer_flow
from tiltflow.adapters.molecular_graph import MolecularGraph
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral
from tiltflow.matching import fit_flow
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.training import Training

SMILES = ("C#C[C@H](C=O)CCC", "NCCO", "CC(O)C=O")
"""The molecule of the published number, and two of 11 atoms on which the fields differ."""

LAWS: Mapping[str, Mapping[str, float]] = {
    "a": {"mmff": 1.0}, "b": {"uff": 1.0}, "balanced": {"mmff": 0.5, "uff": 0.5},
    "unbalanced": {"mmff": 0.75, "uff": 0.25},
}  # fmt: skip
"""Energies whose Boltzmann laws are the parts and the pure intersections."""

SHARES = {"balanced": (0.5, 0.5), "unbalanced": (0.75, 0.25)}
"""Of a and b in intersections."""


@final
@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        hidden, blocks: of the networks.
        updates, batch, rate: of each part's training, for all molecules together.
        data: conformers of each law and molecule.
        chains: of the Monte Carlo.
        bank: particles, or samples of a union.
        fit, fit_batch: updates of each merged model.
        steps: of all samplers.
        fresh: samples that are looked at.
        single: single points of these.
        relax: of these, conformers that are relaxed (of the published protocol: twice the
            references, at most 32).
        embed: ETKDG conformers for the references.
        device: of networks.
        smiles: the molecules.
    """

    hidden: int = 32
    blocks: int = 3
    updates: int = 3000
    batch: int = 24
    rate: float = 4e-3
    data: int = 2000
    chains: int = 100
    bank: int = 256
    fit: int = 300
    fit_batch: int = 24
    steps: int = 30
    fresh: int = 160
    single: int = 48
    relax: int = 12
    embed: int = 300
    device: str = "cpu"
    smiles: tuple[str, ...] = SMILES


QUICK = Sizes(8, 1, 5, 6, 1e-3, 24, 4, 12, 3, 6, 4, 12, 4, 2, 6, smiles=("OO", "CO"))
FULL = Sizes(
    192, 6, 60_000, 192, 5e-4, 20_000, 400, 20_000, 10_000, 192, 100, 5000, 500, 32, 1000,
    "cuda",
)  # fmt: skip
"""For a GPU; ETFlow's network is larger still (20 layers of 160)."""


def sizes_of(store: Store, quick: bool) -> Sizes:
    """As the results began, or now: smoke, full where there is a GPU, or small."""
    now = QUICK if quick else FULL if torch.cuda.is_available() else Sizes()
    known = store.get("sizes", lambda: vars(now))
    return Sizes(**known | {"smiles": tuple(known["smiles"])})


@final
@dataclass(eq=False)
class Work:
    """Where results and weights go, and how much of everything.

    Args:
        store: results; weights and conformers are kept beside them.
        sizes: how much.
        prior: of the flows.
    """

    store: Store
    sizes: Sizes
    prior: Prior = "harmonic"

    @property
    def smiles(self) -> tuple[str, ...]:
        """The molecules."""
        return self.sizes.smiles

    @functools.cached_property
    def graphs(self) -> dict[str, MolecularGraph]:
        """By SMILES."""
        return {text: MolecularGraph.of_smiles(text) for text in self.smiles}

    @functools.cache  # noqa: B019 (one per process)
    def conformers(self, law: str) -> dict[str, Tensor]:
        """Boltzmann samples of a law by SMILES, (count, N, 3)."""
        path = self.store.path.parent / f"conformers_{law}_data.safetensors"
        if path.exists():
            known = load_tensors(path)
            return {text: known[text] for text in self.smiles}
        made = {}
        for i, (text, graph) in enumerate(self.graphs.items()):
            energy, seed = Energy(graph, LAWS[law]), Seed(0).child("conformers", law, i)
            made[text] = boltzmann(
                energy, self.sizes.data, seed.number % 2**31, chains=self.sizes.chains
            )
        save_tensors(path, made)
        return made

    def part(self, name: str, prior: Prior | None = None, seed: int = 0) -> ConformerFlow:
        """A flow of a part's law, from the disk or trained now."""
        sizes, prior = self.sizes, prior or self.prior
        path = self.store.path.parent / f"conformers_{name}_{prior}_{seed}.safetensors"
        if not path.exists():
            where = Seed(seed).child("conformers", name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(where.child("weights").number % 2**31)
                net = ConformerNet(hidden=sizes.hidden, blocks=sizes.blocks)
            flow = ConformerFlow(net.to(sizes.device), prior)
            graphs = [self.graphs[text] for text in self.smiles]
            data = {self.graphs[text]: x for text, x in self.conformers(name).items()}
            training = Training(
                num_updates=sizes.updates, learning_rate=sizes.rate, ema=0.999,
                warmup=min(50, sizes.updates),
            )  # fmt: skip
            fit_flow(
                flow.together(graphs), flow.bank(data), training, Context(where),
                batch_size=sizes.batch,
            )  # fmt: skip
            flow.save(path)
        flow = load_conformer_flow(path)
        flow.net.to(sizes.device)
        return flow

    @functools.cache  # noqa: B019
    def known(self, text: str) -> list[Property]:
        """The references of a molecule."""
        kept = self.store.get(
            f"references/{text}",
            lambda: [vars(p) for p in references(self.graphs[text], self.sizes.embed)],
        )
        return [Property(**each) for each in kept]

    @property
    def sampler(self) -> Sampler:
        """Of all models. The default kernel's noise, alike in all directions, would be as much in
        bonds as in torsions: at 30 steps it doubles the strain of samples."""
        return Sampler(Ancestral(), self.sizes.steps)

    @functools.cache  # noqa: B019
    def models(self, text: str) -> dict[str, FlowModel]:
        """The parts' flows of one molecule."""
        return {name: self.part(name).flow_of(self.graphs[text]) for name in ("a", "b")}

    def reward(self, text: str) -> Lowness:
        """Of the guided intersection, on positions."""
        return Lowness(self.graphs[text], KT, self.known(text)[0].energy)

    @functools.cache  # noqa: B019
    def exact(self, gate: str, text: str) -> tuple[Tensor, Tensor]:
        """Samples of what a gate should give, by Monte Carlo: positions and weights."""
        if gate == "union":
            x = torch.cat([self.conformers(name)[text] for name in ("a", "b")])
            return x, torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        x = self.conformers("balanced" if gate == "guided" else gate)[text]
        if gate == "guided":
            x = x[: max(2 * self.sizes.fresh, 2)]
            return x, self.reward(text).value(x).double().softmax(0)
        return x, torch.full((len(x),), 1 / len(x), dtype=torch.float64)

    def law(self, gate: str, text: str) -> Tensor:
        """Shares of rotamers that a gate should have."""
        x, weights = self.exact(gate, text)
        return shares(self.graphs[text], x, weights)
