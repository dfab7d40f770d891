"""The conformers of ``molecules.py``: two flows of force fields, intersected and united."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from molecules_conformers_judge import judged
from molecules_conformers_models import SHARES, Work, sizes_of
from molecules_conformers_tables import section
from torch import Tensor
from toys import Record, Store

from tiltflow.algorithms import FeynmanKac, Merging, merge
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.operators import Gate, Intersection, Prior, Union
from tiltflow.seed import Seed
from tiltflow.training import Training

GATES = ("balanced", "unbalanced", "guided", "union")


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Parts, gates and what is exact, seed by seed; the full setting where there is a GPU."""
    work = Work(store, sizes_of(store, quick))
    for text in work.smiles:
        work.known(text)
    for name in ("a", "b"):
        store.get(f"trained/{name}/0", lambda n=name: trained(work, n))
    for law in ("a", "b", *GATES):
        store.get(f"exact/{law}/0", lambda n=law: each(work, lambda t: exact(work, n, t)))
    for seed in seeds:
        for key, method in methods(work).items():
            store.get(f"{key}/{seed}", lambda m=method, s=seed: m(s))


def trained(work: Work, name: str) -> Record:
    """How long a part's training took, with its data."""
    start = time.process_time()
    work.part(name)
    return {"cpu": time.process_time() - start}


def methods(work: Work) -> Mapping[str, Callable[[int], Record]]:
    """By key in the store."""
    parts = {
        f"part/{n}": lambda s, n=n: each(work, lambda t: part(work, n, t, s)) for n in ("a", "b")
    }
    gates = {
        f"merged/{g}": lambda s, g=g: each(work, lambda t: merged(work, g, t, s)) for g in GATES
    }
    untrained = {
        f"particles/{g}": lambda s, g=g: each(work, lambda t: particles(work, g, t, s))
        for g in ("balanced", "guided")
    }
    return parts | gates | untrained


def each(work: Work, measure: Callable[[str], Record]) -> Record:
    """A record of every molecule."""
    return {text: measure(text) for text in work.smiles}


def exact(work: Work, gate: str, text: str) -> Record:
    """Of as many samples of the law that a gate should give."""
    x, weights = work.exact(gate, text)
    generator = Seed(0).child("conformers", "exact", gate).generator()
    index = torch.multinomial(weights, work.sizes.fresh, replacement=True, generator=generator)
    return looked(work, gate, text, x[index])


def part(work: Work, name: str, text: str, seed: int) -> Record:
    """Of a pre-trained flow."""
    return seen(work, name, text, work.models(text)[name], seed)


def gate_of(work: Work, gate: str, text: str) -> Gate:
    """As ``merge`` takes it, with A = 1."""
    a, b = Prior("a"), Prior("b")
    if gate == "union":
        return Union(a, b, weights=(0.5, 0.5))
    reward = None
    if gate == "guided":
        reward = work.part("a").reward_of(work.graphs[text], work.reward(text))
    return Intersection(a, b, weights=SHARES.get(gate, (0.5, 0.5)), reward=reward)


def merged(work: Work, gate: str, text: str, seed: int) -> Record:
    """Of one network for a gate; intersections by particles, unions distilled."""
    sizes, start = work.sizes, time.process_time()
    training = Training(
        num_updates=sizes.fit, learning_rate=1e-3, ema=0.99, warmup=min(20, sizes.fit)
    )
    settings = Merging(
        sampler=work.sampler, training=training, bank_size=sizes.bank,
        batch_size=sizes.fit_batch,
    )  # fmt: skip
    made = merge(
        gate_of(work, gate, text), work.models(text),
        context=Context(Seed(seed).child("conformers", gate, text)), settings=settings,
        lowerings={Intersection: "particles"},
    )  # fmt: skip
    (lowered,) = made.gates.values()
    spent = {"cpu": time.process_time() - start, "stats": lowered.stats}
    return seen(work, gate, text, made.model, seed) | spent


def particles(work: Work, gate: str, text: str, seed: int) -> Record:
    """Of the particles themselves, drawn by both parts at every step."""
    drawn = FeynmanKac(equal=True).draw(
        gate_of(work, gate, text), list(work.models(text).values()), work.sizes.fresh,
        seed=Seed(seed).child("conformers", "particles", gate, text), sampler=work.sampler,
    )  # fmt: skip
    states = drawn.bank.points
    x = work.part("a").positions(work.graphs[text], states)
    shuffled = torch.randperm(len(x), generator=Seed(seed).generator())
    return looked(work, gate, text, x[shuffled]) | {"stats": dict(drawn.stats)}


def seen(work: Work, law: str, text: str, model: FlowModel, seed: int) -> Record:
    """Fresh samples of a model, against what it should give."""
    where = Seed(seed).child("conformers", "fresh", law, text)
    states = work.sampler.sample(model, work.sizes.fresh, seed=where)
    return looked(work, law, text, work.part("a").positions(work.graphs[text], states))


def looked(work: Work, law: str, text: str, x: Tensor) -> Record:
    """All measures of samples (B, N, 3)."""
    return judged(
        work.graphs[text], x.float().cpu(), work.law(law, text),
        relax=work.sizes.relax, single=work.sizes.single,
    )  # fmt: skip


__all__ = ["run", "section"]
