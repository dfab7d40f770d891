"""The digits of ``rfm.py``: a model of 0 to 5 and one of 4 to 9, and what both or either draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rfm_digits_models import (
    CONFIDENT,
    QUICK,
    SUBSETS,
    Sizes,
    Work,
    best,
    data,
    examples,
    looked,
    mean,
    training,
)
from rfm_digits_tables import picture, section
from toys import ROOT, Record, Store

from tiltflow.adapters.digits import CLASSES
from tiltflow.algorithms import Averaging, FeynmanKac, Merging, Superposition, merge
from tiltflow.algorithms.training_free import Drawn, TrainingFree
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.kernel import Heun
from tiltflow.operators import Gate, Intersection, circuit
from tiltflow.ratio import Likelihood
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training

GATES = {
    "and": "a & b", "or": "a | b", "unbalanced": "0.3*a | 0.7*b", "minus": "a - b",
    "strict": "a - 3e6*b",
}  # fmt: skip

SHOWN = 24
"""Images of a row of the picture."""

SAMPLERS = {"sde": Sampler(), "ode": Sampler(kernel=Heun())}


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both gates and their baselines, seed by seed, and the picture."""
    sizes = QUICK if quick else Sizes()
    work = Work(store, sizes)
    store.get("data", described)
    for name in SUBSETS:
        store.get(f"model/{name}/0", lambda n=name: seen(work, work.pretrained(n), 0))
    store.get("law/and/0", lambda: {"ode": law(work)})
    for seed in seeds:
        store.get(f"fresh/{seed}", lambda s=seed: fresh(work, s))
        for key, method in methods(work).items():
            store.get(f"{key}/{seed}", lambda m=method, s=seed: m(s))
    for gate in ("strict", "minus"):
        thin = settings(sizes, sizes.thin, sizes.fit)
        store.get(f"thinned/{gate}/0", lambda g=gate, t=thin: trained(work, g, 0, t))
    picture(store, (store.path.parent if quick else ROOT) / "docs")


def described() -> Record:
    """How many training digits the judge is sure of, as they are and as they are trained on."""
    x, y = data()
    sure, label = best(x)
    noisy, _ = best(examples(range(CLASSES), Seed(0).child("described")))
    return {
        "digits": len(x), "accuracy": mean(label == y), "threshold": CONFIDENT,
        "confident": mean(sure > CONFIDENT), "confident_noisy": mean(noisy > CONFIDENT),
    }  # fmt: skip


def methods(work: Work) -> Mapping[str, Callable[[int], Record]]:
    """Of intersections and unions, by key in the store, method/gate."""
    sizes = work.sizes
    by_bank = settings(sizes, sizes.bank, sizes.fit)
    by_control = settings(sizes, sizes.refit, sizes.fit)
    by_mixture = settings(sizes, sizes.mixture, sizes.unite)
    return {
        "weighted/and": lambda s: trained(work, "and", s, by_bank, "weighted"),
        "one_shot/and": lambda s: trained(work, "and", s, by_control, "one_shot"),
        "averaging/and": lambda s: drawn(work, "and", s, Averaging()),
        "feynman_kac/and": lambda s: drawn(work, "and", s, FeynmanKac()),
        "distilled/or": lambda s: trained(work, "or", s, by_mixture),
        "superposition/or": lambda s: drawn(work, "or", s, Superposition()),
        "distilled/unbalanced": lambda s: trained(work, "unbalanced", s, by_mixture),
        "superposition/unbalanced": lambda s: drawn(work, "unbalanced", s, Superposition()),
    }


def settings(sizes: Sizes, bank_size: int, updates: int) -> Merging:
    """Of all merging; what differs from the defaults."""
    control = Training(num_updates=sizes.control, learning_rate=2e-3, ema=0.99)
    solver = AdjointMatching(
        training=control, num_trajectories=sizes.paths, num_evaluate=max(sizes.paths, 2)
    )
    return Merging(
        solver=solver, training=training(updates), bank_size=bank_size, batch_size=256,
        likelihood_steps=sizes.likelihood_steps,
    )  # fmt: skip


def trained(
    work: Work, gate: str, seed: int, settings: Merging, lowering: str | None = None
) -> Record:
    """A merged model by both samplers."""
    parts, start = work.parts, time.process_time()
    merged = merge(
        GATES[gate], parts, context=Context(Seed(seed).child("digits", gate)), settings=settings,
        lowerings={} if lowering is None else {Intersection: lowering},
    )  # fmt: skip
    cpu = time.process_time() - start
    (lowered,) = merged.gates.values()
    return {"cpu": cpu, "stats": lowered.stats} | seen(work, merged.model, seed)


def seen(work: Work, model: FlowModel, seed: int) -> Record:
    """Fresh samples of a model by both samplers."""
    where, found = Seed(seed).child("digits", "fresh", "model"), Record()
    for name, sampler in SAMPLERS.items():
        x = sampler.sample(model, work.sizes.fresh, seed=where.child(name))
        found[name] = looked(x)
        if name == "sde" and seed == 0:
            found["drawn"] = [[round(v, 2) for v in row] for row in x[:SHOWN].tolist()]
    return found | {"evaluations": SAMPLERS["sde"].num_steps}


def drawn(work: Work, gate: str, seed: int, method: TrainingFree) -> Record:
    """A gate without training."""
    where, found = Seed(seed).child("digits", "drawn", gate), Record()
    root, parts = circuit(GATES[gate]), list(work.parts.values())
    assert isinstance(root, Gate)
    for name, sampler in SAMPLERS.items():
        if name == "ode" and not isinstance(method, Averaging):
            continue
        got: Drawn = method.draw(
            root, parts, work.sizes.fresh, seed=where.child(name), sampler=sampler
        )
        found[name] = looked(got.bank.points, got.bank.weights)
        found["stats"] = dict(got.stats)
    return found | {"evaluations": method.evaluations_per_sample(parts)}


def fresh(work: Work, seed: int) -> Record:
    """Samples of the models that are merged, for comparison with their unions."""
    where, count = Seed(seed).child("digits", "fresh", "parts"), work.sizes.fresh
    return {
        name: looked(SAMPLERS["sde"].sample(model, count, seed=where.child(name)))
        for name, model in work.parts.items()
    }


def law(work: Work) -> Record:
    """The geometric mean of the ODEs' laws, by weights of samples of both."""
    where, half = Seed(0).child("digits", "law"), work.sizes.law // 2
    parts = list(work.parts.values())
    x = torch.cat(
        [SAMPLERS["ode"].sample(model, half, seed=where.child(i)) for i, model in enumerate(parts)]
    )
    steps = work.sizes.likelihood_steps
    a, b = (Likelihood(model, steps).value(x).double() for model in parts)
    return looked(x, (0.5 * (a + b) - torch.logaddexp(a, b)).softmax(0))


__all__ = ["run", "section"]
