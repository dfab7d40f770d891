"""Four parts of ``rfm.py``: the union of two models of two modes, in the manner of SuperDiff."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from math import sqrt

import rfm_texts as texts
import torch
from rfm_plane import fitted, merging, network, shortened
from tfft_tables import said
from torch import Tensor
from toys import Record, Store, of_seeds, table

from tiltflow.algorithms import Superposition, merge
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.operators import Prior
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.training import Training

STD = 0.4
LAWS = {
    "first": GaussianMixture([[-2.0, -2.0], [2.0, 2.0]], STD),
    "second": GaussianMixture([[-2.0, 2.0], [2.0, -2.0]], STD),
}
CENTRES = torch.cat([law.means for law in LAWS.values()])
SHARE, NEAR = 0.25, 0.03
"""What each mode is to have, and how near is near."""

FRESH = 20_000
PRETRAINING = Training(num_updates=5000, learning_rate=2e-3, ema=0.999)
UNION = Prior("first") | Prior("second")

METHODS = {
    "merged": "merged, SDE",
    "superposition": "`Superposition()`",
    "mean": "`Superposition(mean=True)`",
}


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """The union by one trained model, and by both models at each step."""
    home, training = store.path.parent / "pretrained", shortened(PRETRAINING, quick)
    models = {
        name: fitted(name, law, network(k, quick, (64, 64, 64)), home, training)
        for k, (name, law) in enumerate(LAWS.items())
    }
    for name, model in models.items():
        store.get(f"pretrained/{name}", lambda m=model: counted(drawn(m, 0, quick)))
    for seed in seeds:
        for method in METHODS:
            store.get(f"{method}/{seed}", lambda m=method, s=seed: one(m, models, s, quick))


def one(method: str, models: Mapping[str, FlowModel], seed: int, quick: bool) -> Record:
    """Shares of the modes by one method, and what a sample costs."""
    sampler, count = Sampler(), 500 if quick else FRESH
    if method == "merged":
        merged = merge(UNION, models, context=Context(Seed(seed)), settings=merging(quick))
        return counted(drawn(merged.model, seed, quick)) | {"evaluations": sampler.num_steps}
    way, parts = Superposition(mean=method == "mean"), list(models.values())
    x = way.sample(UNION, parts, count, seed=Seed(51).child(seed), sampler=sampler).points
    return counted(x) | {"evaluations": way.evaluations_per_sample(parts, sampler)}


def drawn(model: FlowModel, seed: int, quick: bool) -> Tensor:
    """Samples of the SDE, (N, 2)."""
    return Sampler().sample(model, 500 if quick else FRESH, seed=Seed(52).child(seed))


def counted(x: Tensor) -> Record:
    """Share of each mode, by the nearest centre, and the standard deviation around it."""
    distance, nearest = torch.cdist(x.double(), CENTRES).min(1)
    shares = (nearest.bincount(minlength=len(CENTRES)).double() / len(x)).tolist()
    off = max(abs(share - SHARE) for share in shares)
    width = sqrt(float((distance**2).mean()) / 2)
    return {"shares": shares, "off": off, "width": width, "count": len(x)}


# --- the section ---------------------------------------------------------------------------------


def section(store: Store) -> str:
    """Shares of all modes, and the cost of a sample."""
    rows, verdicts = list[list[str]](), list[str]()
    for method, name in METHODS.items():
        runs = of_seeds(store, method)
        if not runs:
            continue
        flat = [{f"mode{k}": share for k, share in enumerate(r["shares"])} | r for r in runs]
        rows.append([
            name, *(said(flat, f"mode{k}", 3) for k in range(len(CENTRES))),
            said(runs, "off", 3), said(runs, "width", 3), f"{runs[0]['evaluations']}",
            str(len(runs)),
        ])  # fmt: skip
        if method == "merged":
            verdicts.append(_verdict(runs))
    if not rows:
        return ""
    noise = sqrt(SHARE * (1 - SHARE) / of_seeds(store, "merged")[0]["count"])
    head = ["", *(f"({x:+.0f}, {y:+.0f})" for x, y in CENTRES.tolist()), "farthest from a quarter",
            "width of a mode", "evaluations per sample", "seeds"]  # fmt: skip
    given = [
        f"{name}: {', '.join(f'{share:.3f}' for share in known['shares'] if share > 0.05)}"
        for name in LAWS
        if (known := store.known[f"pretrained/{name}"]["result"])
    ]
    lines = ["## Four parts from two models", "", *texts.TOY.strip().splitlines(), ""]
    lines += table(head, rows)
    lines += [
        *verdicts,
        f"A share of {of_seeds(store, 'merged')[0]['count']} samples has a standard error of "
        f"{noise:.4f}. Shares of the given models' own two modes: {'; '.join(given)}.",
    ]
    return "\n".join(lines)


def _verdict(runs: Sequence[Record]) -> str:
    worst = max(run["off"] for run in runs)
    means = [statistics.fmean(each) for each in zip(*(r["shares"] for r in runs), strict=True)]
    kept = all(abs(mean - SHARE) <= NEAR for mean in means)
    return (
        f"Mean shares of the merged model are {'' if kept else 'not '}all within {NEAR:g} of "
        f"{SHARE:g}; the farthest share of any one training is {worst:.3f} away."
    )
