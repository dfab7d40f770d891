"""The models of ``rfm_digits.py``, trained on first use, and what is measured of their samples."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from toys import Record, Store

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.adapters.digits import CLASSES, EVENT, DigitClassifier, DigitNet, load_digit_judge
from tiltflow.adapters.digits_data import Split, load_data, warped
from tiltflow.context import Context
from tiltflow.density import Bank
from tiltflow.flow import FlowModel, freeze
from tiltflow.matching import fit_flow
from tiltflow.sample import calibrated
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.space import Euclidean
from tiltflow.training import Training

SUBSETS = {"a": range(0, 6), "b": range(4, 10), "direct": range(4, 6)}
"""Classes that each model is trained on."""

CONFIDENT = 0.9
"""Probability of its best class by the judge from which on an image counts."""

NOISE, WARP, COPIES = 0.06, 0.3, 20
"""Half a grey level of noise, without which log-densities do not exist (borders are always paper);
strength of small rotations and shifts; copies of each digit."""


@final
@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        width, depth: of the networks; the shipped model's.
        updates: of each pre-trained model.
        bank, thin: samples with log-densities, for intersections and for contrasts.
        likelihood_steps: of each log-density.
        mixture, unite: samples for unions, and updates on them.
        fit: updates on other merged samples.
        control, paths, refit: updates and roll-outs of the intersection by control, and samples
            for its refit.
        fresh: samples that are looked at.
        law: samples with log-densities of the reference.
    """

    width: int = 160
    depth: int = 3
    updates: int = 4000
    bank: int = 4000
    thin: int = 2000
    likelihood_steps: int = 20
    mixture: int = 20_000
    unite: int = 6000
    fit: int = 4000
    control: int = 1000
    paths: int = 128
    refit: int = 12_000
    fresh: int = 4000
    law: int = 3000


QUICK = Sizes(8, 1, 30, 64, 64, 2, 100, 10, 10, 2, 8, 100, 100, 64)


@final
@dataclass
class Work:
    """The pre-trained models, and where results go.

    Args:
        store: results; weights are kept beside them.
        sizes: how much of everything.
    """

    store: Store
    sizes: Sizes
    models: dict[str, FlowModel] = field(default_factory=dict)

    def pretrained(self, name: str) -> FlowModel:
        """A pre-trained model, from the disk or trained now."""
        if name in self.models:
            return self.models[name]
        sizes, path = self.sizes, self.store.path.parent / f"digits_{name}.safetensors"
        seed = Seed(0).child("digits", name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.child("weights").number)
            net = DigitNet(sizes.width, sizes.depth)
        model = FlowModel(net, Linear(), Euclidean(EVENT), predicts="velocity")
        if path.exists():
            net.load_state_dict(load_tensors(path, net.state_dict()))
        else:
            start = time.process_time()
            bank = Bank.equal(examples(SUBSETS[name], seed.child("examples")))
            fit_flow(model, bank, training(sizes.updates), Context(seed))
            save_tensors(path, net.state_dict(), {"cpu": f"{time.process_time() - start:.0f}"})
        self.models[name] = calibrated(freeze(model), seed=seed.child("moments"))
        return self.models[name]

    @property
    def parts(self) -> dict[str, FlowModel]:
        """The models that are merged."""
        return {name: self.pretrained(name) for name in ("a", "b")}


def training(updates: int) -> Training:
    """Of flow matching: as the shipped model was trained."""
    return Training(
        num_updates=updates, learning_rate=2e-3, ema=0.999, warmup=min(200, updates // 5)
    )


@functools.cache
def data() -> Split:
    """The training digits; a sentence says so if scikit-learn is missing."""
    return load_data()[0]


@functools.cache
def judge() -> DigitClassifier:
    """The classifier that looks at samples; no training sees it."""
    return load_digit_judge()


def examples(classes: Sequence[int], seed: Seed) -> Tensor:
    """Training digits of some classes with a little noise, (N, 64)."""
    x, y = data()
    generator = seed.generator()
    kept = x[torch.isin(y, torch.tensor(list(classes)))].repeat(COPIES, 1)
    kept = warped(kept, generator, WARP)
    return kept + NOISE * torch.randn(kept.shape, generator=generator)


# --- what is measured ----------------------------------------------------------------------------


def best(x: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and label of the judge's best class, (N,) each."""
    with torch.no_grad():
        sure, label = judge()(x).softmax(1).max(1)
    return sure, label


def mean(x: Tensor) -> float:
    """Of numbers or truths."""
    return float(x.double().mean())


def looked(x: Tensor, weights: Tensor | None = None) -> Record:
    """Shares of classes of all samples and of confident ones, and how varied the common are."""
    sure, label = best(x)
    w = torch.full((len(x),), 1 / len(x)) if weights is None else weights
    w, clear = w.double() / w.double().sum(), sure > CONFIDENT
    shares = torch.zeros(2, CLASSES, dtype=torch.float64)
    shares[0].index_add_(0, label, w)
    shares[1].index_add_(0, label[clear], w[clear])
    confident = float(w[clear].sum())
    spreads = [spread(x[at], w[at]) for c in (4, 5) if (at := clear & (label == c)).sum() > 1]
    return {
        "effective": float(1 / w.square().sum()), "confident": confident,
        "shares": shares[0].tolist(), "clear": (shares[1] / max(confident, 1e-12)).tolist(),
        "spread": sum(spreads) / len(spreads) if spreads else 0.0,
    }  # fmt: skip


def spread(x: Tensor, w: Tensor) -> float:
    """Root mean squared distance from the mean image."""
    w = (w / w.sum())[:, None]
    x = x.double()
    return float((w * (x - (w * x).sum(0)).square()).sum().sqrt())
